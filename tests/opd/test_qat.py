"""Training under FP4: the forward multiplies decoded values, the gradient goes straight through, and no ZeRO stage changes either."""

import copy
import itertools
import logging
from collections.abc import Callable

import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoConfig, AutoModelForCausalLM

from opd.__main__ import load_config
from opd.batch import MicroBatch, supervised_batches
from opd.config import BatchConfig, OptimizerKind, RunConfig, StudentConfig
from opd.engine import Engine
from opd.export import export
from opd.qat import ExpertQuantizer
from opd.quant_config import ExpertFormat, QuantConfig
from opd.student import build_student, copy_for_sampling, seed_everything
from opd.update import supervised_update
from rollout.compiler import has_compiler
from rollout.config import Dtype, Experts, ModelConfig
from rollout.experts import EXPERT_WEIGHTS, copy_with_packed_experts, decoded_weight, find_experts, find_packed, packed_weight
from rollout.fp4 import MAGNITUDES
from rollout.indexer import indexer_recall
from rollout.model import load_model, save_model
from rollout.sampler import LocalSampler
from rollout.types import Rollout
from teachers.config import DomainConfig

FAMILIES = ["deepseek_v4_tiny", "qwen3_moe_tiny", "gpt_oss"]
MXFP4 = QuantConfig(experts=ExpertFormat.mxfp4)
SHAPES = [("law", 4, 8), ("law", 6, 9), ("law", 3, 12), ("law", 9, 6), ("law", 5, 5), ("law", 2, 16)]


def naive_fp4(weight: torch.Tensor) -> torch.Tensor:
    """FP4 values along the last dimension: of all powers of two the smallest that reaches, of all magnitudes the nearest, a tie to the even code."""
    blocks = weight.detach().double().reshape(-1, 32)
    powers = 2.0 ** torch.arange(-60, 60, dtype=torch.float64)
    first = (6 * powers >= blocks.abs().amax(1, keepdim=True)).int().argmax(1)
    grid = powers[first][:, None, None] * torch.tensor(MAGNITUDES, dtype=torch.float64)
    distance = (blocks.abs()[..., None] - grid).abs() + 1e-12 * grid[..., 1:2] * torch.tensor([0, 1, 0, 1, 0, 1, 0, 1])
    values = grid.expand(-1, 32, -1).gather(2, distance.argmin(2, keepdim=True))[..., 0] * blocks.sign()
    return values.reshape(weight.shape).to(weight.dtype)


def decoded(model) -> torch.nn.Module:
    """A plain copy of a model whose experts hold FP4 values."""
    plain = copy.deepcopy(model)
    with torch.no_grad():
        for module in find_experts(plain).values():
            for name in EXPERT_WEIGHTS:
                weight = getattr(module, name)
                values = naive_fp4(weight.transpose(1, 2).contiguous()).transpose(1, 2) if module.is_transposed else naive_fp4(weight)
                weight.copy_(values)
    return plain


def expert_parameters(model) -> dict[str, torch.Tensor]:
    return {f"{name}.{weight}": getattr(module, weight) for name, module in find_experts(model).items() for weight in EXPERT_WEIGHTS}


@pytest.fixture
def new_model(new_student) -> Callable:
    """new_model("gpt_oss"): a student of two layers of 4 experts, one of the families."""

    def build(family: str):
        if family == "gpt_oss":
            torch.manual_seed(0)
            sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16}
            return AutoModelForCausalLM.from_config(AutoConfig.for_model("gpt_oss", vocab_size=128, num_local_experts=4, **sizes)).eval()
        return new_student(family)

    return build


@pytest.fixture
def examples(random_rollouts) -> list[Rollout]:
    return random_rollouts(SHAPES)


@pytest.fixture
def batches(examples) -> list[MicroBatch]:
    """Three micro-batches of one step."""
    weight = 1 / sum(after for _, _, after in SHAPES)
    return [batch for start in range(3) for batch in supervised_batches(examples[start::3], {"law": weight}, BatchConfig())]


@pytest.fixture
def quantized_engine(make_engine, make_config) -> Callable[..., Engine]:
    def make(model, stage: int = 1, **fields) -> Engine:
        return make_engine(model, make_config(stage=stage, quant=fields.pop("quant", MXFP4), **fields))

    return make


def forward(engine: Engine, batch: MicroBatch, is_last: bool = True) -> torch.Tensor:
    return engine.loss(batch, None, is_last)[0]


def test_the_naive_rule_of_this_file_breaks_ties_to_even():
    block = torch.tensor([6.0, 0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0, -0.25, -5.0] + [0.0] * 22)
    assert naive_fp4(block)[:10].tolist() == [6, 0, 1, 1, 2, 2, 4, 4, 0, -4]


@pytest.mark.parametrize("implementation", list(Experts))
@pytest.mark.parametrize("family", FAMILIES)
def test_forward_and_gradients_are_those_of_a_plain_model_that_holds_the_decoded_values(family, implementation, new_model):
    model = new_model(family)
    model.set_experts_implementation(implementation.value)
    plain, tokens_BL = decoded(model), torch.randint(3, 60, (3, 20), generator=torch.Generator().manual_seed(1))
    unquantized = model(tokens_BL).logits
    ExpertQuantizer(model, zero_stage=1, gradient_checkpointing=False)
    logits, expected = model(tokens_BL).logits, plain(tokens_BL).logits
    assert torch.equal(logits, expected)
    assert not torch.allclose(logits, unquantized, atol=1e-4)
    for found in (logits, expected):
        found.logsumexp(-1).sum().backward()
    for (name, parameter), other in zip(model.named_parameters(), plain.parameters(), strict=True):
        assert (parameter.grad is None) == (other.grad is None), name
        assert parameter.grad is None or torch.equal(parameter.grad, other.grad), name
    assert all(parameter.grad.abs().sum() > 0 for parameter in expert_parameters(model).values())


@pytest.mark.parametrize("family", FAMILIES)
def test_packed_experts_give_the_logits_of_a_plain_model_that_holds_the_decoded_values(family, new_model):
    model, tokens_BL = new_model(family), torch.randint(3, 60, (3, 20), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        assert torch.equal(copy_with_packed_experts(model, "student")(tokens_BL).logits, decoded(model)(tokens_BL).logits)


def test_packed_experts_take_4_25_bits_per_weight_and_leave_the_student_as_it_was(v4_model):
    before = {name: tensor.clone() for name, tensor in v4_model.state_dict().items()}
    packed = copy_with_packed_experts(v4_model, "student")
    num_weights = sum(parameter.numel() for parameter in expert_parameters(v4_model).values())
    assert 8 * sum(packed_weight(*where).num_bytes for where in find_packed(packed).values()) == 4.25 * num_weights
    assert sum(parameter.numel() for parameter in v4_model.parameters()) - sum(parameter.numel() for parameter in packed.parameters()) == num_weights
    assert all(torch.equal(tensor, before[name]) for name, tensor in v4_model.state_dict().items())
    assert find_packed(v4_model) == {}


INDEXER_TOO = QuantConfig(experts=ExpertFormat.mxfp4, indexer=True)
CASES = list(itertools.product([1, 3], list(Dtype), [MXFP4, INDEXER_TOO]))
BY_DEFAULT = [(1, Dtype.bfloat16, MXFP4), (3, Dtype.float32, INDEXER_TOO)]


@pytest.mark.parametrize(("stage", "dtype", "quant"), [pytest.param(*case, marks=[] if case in BY_DEFAULT else pytest.mark.slow) for case in CASES])
def test_one_run_gives_the_same_logits_in_trainer_sampler_and_export(stage, dtype, quant, architecture, tokenizer, device, make_config, batches, tmp_path):
    student = {"architecture": architecture("deepseek_v4_tiny", index_head_dim=32), "dtype": dtype}
    cfg = make_config(stage=stage, student=student, quant=quant, optim={"lr": 1e-2})
    seed_everything(0)
    model = build_student(cfg.student, tokenizer, quant)
    sampler = LocalSampler(copy_for_sampling(model, device, quant), [tokenizer.eos_token_id], seed=0)
    start = {name: tensor.clone() for name, tensor in sampler.model.state_dict().items()}
    engine = Engine(model, len(tokenizer), cfg, device)
    for _ in range(2):
        engine.backward(forward(engine, batches[0]))
        engine.step()
    sampler.refresh(engine)
    weights = engine.full_weights()
    save_model(tmp_path / "student", engine.model, tokenizer, weights)
    export(load_config("export", [f"student.model={tmp_path / 'student'}", f"run_dir={tmp_path / 'export'}"]))
    exported = load_model(ModelConfig(model=str(tmp_path / "export" / "student"), dtype=dtype), "student")

    tokens_BL = torch.randint(3, len(tokenizer), (5, 22), generator=torch.Generator().manual_seed(4))
    with torch.no_grad():
        trained, sampled, reloaded = (one(tokens_BL, use_cache=False).logits for one in (engine.model, sampler.model, exported))
    assert torch.equal(trained, sampled)
    assert torch.equal(trained, reloaded)
    sampled_weights = {name: decoded_weight(*where) for name, where in find_packed(sampler.model).items()}
    assert set(sampled_weights) == set(expert_parameters(exported))
    for name, parameter in expert_parameters(exported).items():
        assert torch.equal(parameter, weights[name]), name
        assert torch.equal(parameter, sampled_weights[name]), name
    changed = [name for name, tensor in sampler.model.state_dict().items() if name.endswith("_codes") and not torch.equal(tensor, start[name])]
    assert changed, "the updates must have moved codes, or the comparison shows nothing"


@pytest.mark.parametrize("stage", [1, 3])
def test_only_the_routed_experts_are_quantised(stage, v4_model, quantized_engine):
    engine = quantized_engine(v4_model, stage)
    given, experts = engine.full_weights(), expert_parameters(v4_model)
    for name, tensor in v4_model.state_dict().items():
        if name not in experts:
            assert torch.equal(given[name], tensor), name
    assert {name.split(".")[-2] for name in given if "gate." in name or "shared" in name} >= {"gate", "gate_proj"}
    for name, tensor in experts.items():
        assert torch.equal(given[name], naive_fp4(tensor)), name


@pytest.mark.parametrize(("stage", "checkpointing"), [(0, False), (2, False), (3, False), (1, True), (3, True)])
def test_losses_do_not_depend_on_zero_stage_or_gradient_checkpointing(stage, checkpointing, new_student, make_config, examples, tokenizer, device):
    def losses(stage: int, student: dict) -> list[float]:
        cfg = make_config({"law": DomainConfig()}, stage=stage, student=student, quant=QuantConfig(experts=ExpertFormat.mxfp4, measure_every=0), max_tokens=60)
        model = new_student("qwen3_moe_tiny")
        if student:
            model.gradient_checkpointing_enable({"use_reentrant": False})
            model.train()
        engine = Engine(model, len(tokenizer), cfg, device)
        return [supervised_update(engine, examples, cfg)["step/loss"] for _ in range(6)]

    found, expected = losses(stage, {"gradient_checkpointing": True} if checkpointing else {}), losses(1, {})
    assert found[0] == pytest.approx(expected[0], rel=1e-6)
    assert found == pytest.approx(expected, rel=1e-3)
    assert expected[-1] < expected[0] - 0.1


def test_fp4_values_are_computed_once_per_update_and_anew_after_it(qwen3_moe_model, quantized_engine, batches):
    engine, seen = quantized_engine(qwen3_moe_model, stage=2), []
    for _ in range(2):
        for number, batch in enumerate(batches):
            engine.backward(forward(engine, batch, number == len(batches) - 1))
            seen.append({name: tensor.data_ptr() for name, tensor in engine.quantizer.copies.items()})
        masters = {name: parameter.detach().clone() for name, parameter in expert_parameters(engine.model).items()}
        assert all(torch.equal(engine.quantizer.copies[name], naive_fp4(master)) for name, master in masters.items())
        engine.step()
        assert not engine.quantizer.copies
    assert seen[0] == seen[1] == seen[2]
    assert len(seen[0]) == len(masters)


class StoragesOfShape(TorchDispatchMode):
    """Weak references to the memory of every float32 result of given shapes that is no part of something larger (DeepSpeed's partition)."""

    def __init__(self, shapes: set[torch.Size]):
        super().__init__()
        self.shapes, self.found = shapes, []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, list | tuple) else [result]:
            if isinstance(tensor, torch.Tensor) and tensor.shape in self.shapes and tensor.untyped_storage().nbytes() == 4 * tensor.numel():
                self.found.append(StorageWeakRef(tensor.untyped_storage()))
        return result

    def num_alive(self) -> int:
        return len({reference.cdata for reference in self.found if not reference.expired()})


@pytest.mark.parametrize("family", ["qwen3_moe_tiny", "gpt_oss"])
@pytest.mark.parametrize(("implementation", "recomputes"), [("grouped_mm", True), ("eager", True), ("grouped_mm", False)])
def test_zero_3_holds_no_fake_quantised_copy_from_forward_to_backward(implementation, recomputes, family, new_model, quantized_engine, batches):
    model = new_model(family)
    model.set_experts_implementation(implementation)
    engine = quantized_engine(model, stage=3)
    engine.quantizer.recomputes = recomputes
    shapes, held = {tensor.shape for tensor in expert_parameters(model).values()}, 0 if recomputes else len(expert_parameters(model))
    with StoragesOfShape(shapes) as storages:
        loss = forward(engine, batches[0])
        partitioned = {parameter.data.shape for parameter in expert_parameters(engine.model).values()}
    assert partitioned == {torch.Size([0])}
    assert storages.num_alive() == held
    engine.backward(loss)


@pytest.mark.parametrize("kind", list(OptimizerKind))
def test_both_optimizers_train_the_masters_behind_quantised_experts(kind, qwen3_moe_model, quantized_engine, batches):
    if kind is OptimizerKind.muon and not has_compiler():
        pytest.skip("DeepSpeed's Muon needs a C++ compiler")
    engine = quantized_engine(qwen3_moe_model, stage=1, optim={"kind": kind, "clip_norm": None, "muon_lr": 1e-2})
    before = {name: parameter.detach().clone() for name, parameter in expert_parameters(engine.model).items()}
    losses = []
    for _ in range(5):
        loss = forward(engine, batches[0])
        losses.append(float(loss))
        engine.backward(loss)
        engine.step()
    assert losses[-1] < 0.9 * losses[0]
    for name, parameter in expert_parameters(engine.model).items():
        assert not torch.equal(parameter, before[name]), name
        assert not torch.equal(parameter, naive_fp4(parameter)), f"{name}: the master must not be rounded itself"


def test_a_checkpoint_taken_up_replaces_the_fp4_values_of_the_weights_before(qwen3_moe_model, quantized_engine, batches, tmp_path):
    engine = quantized_engine(qwen3_moe_model, stage=1, optim={"lr": 1e-2})
    expected = float(forward(engine, batches[0]).detach())
    engine.save(tmp_path, "start")
    engine.backward(forward(engine, batches[0]))
    engine.step()
    assert float(forward(engine, batches[0]).detach()) != expected
    engine.load(tmp_path, "start")
    assert float(forward(engine, batches[0]).detach()) == expected


@pytest.mark.parametrize("stage", [1, 3])
def test_flipped_is_the_share_of_fp4_values_that_an_update_changed(stage, qwen3_moe_model, quantized_engine, batches):
    engine = quantized_engine(qwen3_moe_model, stage, optim={"lr": 1e-2})
    before = engine.full_weights()
    engine.backward(forward(engine, batches[0]))
    metrics = engine.step()
    after, names = engine.full_weights(), list(expert_parameters(qwen3_moe_model))
    flipped = sum(int((after[name] != before[name]).sum()) for name in names) / sum(after[name].numel() for name in names)
    assert 0 < metrics["quant/flipped"] == pytest.approx(flipped)


def test_scale_spread_is_the_largest_among_the_experts(qwen3_moe_model, quantized_engine, batches):
    """Of these small experts, gate, up and down projection are each within one tile of 128 x 128."""
    with torch.no_grad():
        qwen3_moe_model.model.layers[1].mlp.experts.down_proj[3, 5] *= 2.0**-7
        qwen3_moe_model.model.layers[1].mlp.experts.gate_up_proj[:, :64] *= 2.0**-20  # all gates: no spread within a matrix
    engine = quantized_engine(qwen3_moe_model)
    engine.backward(forward(engine, batches[0]))
    metrics, spreads = engine.step(), []
    for name, parameter in expert_parameters(engine.model).items():
        for expert in parameter.detach():
            for matrix in expert.chunk(2) if "gate_up" in name else [expert]:
                exponents = (matrix.reshape(-1, 32).abs().amax(1) / 6).log2().ceil()
                spreads.append(float(exponents.max() - exponents.min()))
    assert metrics["quant/scale_spread"] == max(spreads) > 5


def test_quantisation_kl_is_that_of_whole_logits(qwen3_moe_model, quantized_engine, make_config, examples, tokenizer):
    quant = QuantConfig(experts=ExpertFormat.mxfp4, measure_every=1, measure_rollouts=4)
    cfg = make_config({"law": DomainConfig(), "code": DomainConfig()}, quant=quant)
    engine = quantized_engine(qwen3_moe_model, quant=quant)
    found = supervised_update(engine, examples, cfg)
    plain, quantized, total, tokens = qwen3_moe_model, decoded(qwen3_moe_model), 0.0, 0
    for example in sorted(examples, key=lambda example: example.prompt.request)[:4]:
        ids = torch.tensor([[*example.prompt.tokens, *example.completion_T.tolist()]])
        first = len(example.prompt.tokens) - 1
        with torch.no_grad():
            log_p, log_q = (model(ids).logits[0, first:-1, : len(tokenizer)].double().log_softmax(-1) for model in (plain, quantized))
        total, tokens = total + float((log_p.exp() * (log_p - log_q)).sum()), tokens + len(example.completion_T)
    assert found["quant/law/kl_per_token"] == pytest.approx(total / tokens, rel=1e-3)
    assert "quant/code/kl_per_token" not in found


@pytest.mark.parametrize("stage", [1, 3])
def test_the_recall_of_the_fp4_indexer_is_logged(stage, architecture, tokenizer, device, make_config, examples):
    quant = QuantConfig(indexer=True, measure_every=1)
    student = {"architecture": architecture("deepseek_v4_tiny", index_head_dim=32)}
    cfg = make_config({"law": DomainConfig()}, stage=stage, student=student, quant=quant)
    seed_everything(0)
    student = build_student(cfg.student, tokenizer, quant)
    matched = total = 0
    for example in examples:
        ids = torch.tensor([[*example.prompt.tokens, *example.completion_T.tolist()]])
        with indexer_recall(student, torch.ones_like(ids, dtype=torch.bool)) as sums, torch.no_grad():
            student(ids)
        matched, total = matched + int(sums[0]), total + int(sums[1])
    found = supervised_update(Engine(student, len(tokenizer), cfg, device), examples, cfg)
    assert found["quant/indexer_recall"] == matched / total
    assert 0.5 < matched / total < 1
    assert "quant/flipped" not in found


def test_measurements_change_nothing_and_come_as_often_as_asked(qwen3_moe_model, make_engine, make_config, examples):
    records = {}
    for every in (0, 2):
        cfg: RunConfig = make_config({"law": DomainConfig()}, quant=QuantConfig(experts=ExpertFormat.mxfp4, measure_every=every))
        engine = make_engine(qwen3_moe_model, cfg)
        records[every] = [supervised_update(engine, examples, cfg) for _ in range(3)]
    assert [record["step/loss"] for record in records[0]] == [record["step/loss"] for record in records[2]]
    assert [("quant/flipped" in record, "quant/law/kl_per_token" in record) for record in records[2]] == [(True, True), (False, False), (True, True)]
    assert not any(name.startswith("quant/") for record in records[0] for name in record)


def test_what_was_attached_is_logged(v4_model, caplog):
    with caplog.at_level(logging.INFO, logger="opd"):
        ExpertQuantizer(v4_model, zero_stage=1, gradient_checkpointing=False)
    assert "MXFP4 attached to the routed experts of 3 layers: model.layers.0.mlp.experts" in caplog.text


DENSE = {"model_type": "llama", "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}


def test_a_student_without_routed_experts_is_refused(tokenizer):
    with pytest.raises(ValueError, match=r"the student \(llama\) has no routed experts to quantise to FP4: set quant=none"):
        build_student(StudentConfig(architecture=DENSE), tokenizer, MXFP4)


def test_inputs_that_are_no_multiple_of_a_block_are_refused_by_name(architecture, tokenizer):
    narrow = architecture("qwen3_moe_tiny", moe_intermediate_size=48)
    with pytest.raises(ValueError, match=r"experts\.down_proj of the student has 48 inputs, no multiple of FP4's block of 32"):
        build_student(StudentConfig(architecture=narrow), tokenizer, MXFP4)


def test_experts_that_do_not_ask_the_registry_are_refused_by_name(qwen3_moe_model):
    for module in find_experts(qwen3_moe_model).values():
        del module.is_transposed
    with pytest.raises(ValueError, match=r"\(Qwen3MoeExperts\) are not multiplied through transformers' registry"):
        ExpertQuantizer(qwen3_moe_model, zero_stage=1, gradient_checkpointing=False)


def test_a_student_taken_up_from_packed_experts_starts_with_no_weight_changed(fp4_student, tokenizer, device, tmp_path):
    export(load_config("export", [f"student.model={fp4_student()}", f"run_dir={tmp_path}"]))
    student = build_student(StudentConfig(model=str(tmp_path / "student")), tokenizer, MXFP4)
    for name, parameter in expert_parameters(student).items():
        assert torch.equal(naive_fp4(parameter), parameter), name
    assert find_packed(student) == {}, "masters are plain weights"


def test_experts_that_a_checkpoint_calls_fp4_and_are_not_are_refused_as_a_student(saved_v4, changed_checkpoint, tokenizer):
    layout = {"quant_method": "fp8", "fmt": "e4m3", "scale_fmt": "ue8m0", "activation_scheme": "dynamic", "weight_block_size": [128, 128]}
    folder = changed_checkpoint(saved_v4, config={"expert_dtype": "fp4", "quantization_config": layout})
    with pytest.raises(ValueError, match=r"experts\.gate_up_proj of the student at .* is FP4 and changes when it is quantised to MXFP4"):
        build_student(StudentConfig(model=str(folder)), tokenizer, MXFP4)


def test_a_student_whose_indexer_is_fp4_is_not_trained_without_it(architecture, tokenizer, tmp_path):
    student = build_student(StudentConfig(architecture=architecture("deepseek_v4_tiny", index_head_dim=32)), tokenizer, QuantConfig(indexer=True))
    save_model(tmp_path / "student", student, tokenizer, student.state_dict())
    with pytest.raises(ValueError, match=r"has its indexer in FP4: set quant\.indexer=true"):
        build_student(StudentConfig(model=str(tmp_path / "student")), tokenizer, MXFP4)
