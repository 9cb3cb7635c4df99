"""The engine in one process: DeepSpeed's updates against plain torch, mixed precision, weights for samplers, checkpoints and refusals."""

import copy
import math
from collections.abc import Callable

import pytest
import torch
from torch.nn import functional

from opd.batch import MicroBatch, supervised_batches
from opd.config import BatchConfig, OptimConfig, OptimizerKind, Router, RunConfig, StudentConfig
from opd.deepspeed_settings import OWNED_KEYS, deepspeed_settings
from opd.engine import Engine
from opd.optim import parameter_groups
from opd.student import build_student, seed_everything
from rollout.config import Dtype
from rollout.types import Rollout

SHAPES = [("law", 4, 8), ("law", 6, 9), ("law", 3, 12), ("law", 9, 6), ("law", 5, 5), ("law", 2, 16)]
NUM_TOKENS = sum(after for _, _, after in SHAPES)


@pytest.fixture
def examples(random_rollouts) -> list[Rollout]:
    return random_rollouts(SHAPES)


def micro_batches(examples: list[Rollout], count: int) -> list[MicroBatch]:
    """The examples in so many micro-batches of equal numbers; the whole step's loss is their mean negative log-likelihood."""
    parts = [examples[start::count] for start in range(count)]
    return [batch for part in parts for batch in supervised_batches(part, {"law": 1 / NUM_TOKENS}, BatchConfig())]


def backward(engine: Engine, batches: list[MicroBatch]) -> None:
    for number, batch in enumerate(batches):
        loss, _ = engine.loss(batch, None, number == len(batches) - 1)
        engine.backward(loss)


def train(engine: Engine, batches: list[MicroBatch], steps: int = 1) -> list[dict[str, float]]:
    metrics = []
    for _ in range(steps):
        backward(engine, batches)
        metrics.append(engine.step())
    return metrics


def naive_loss(model, examples: list[Rollout]) -> torch.Tensor:
    total = 0.0
    for example in examples:
        ids = torch.tensor([[*example.prompt.tokens, *example.completion_T.tolist()]])
        logits_TV = model(input_ids=ids).logits[0, len(example.prompt.tokens) - 1 : -1]
        total = total + functional.cross_entropy(logits_TV, example.completion_T, reduction="sum")
    return total / NUM_TOKENS


def largest_difference(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> float:
    return max(float((one[name].double() - other[name].double()).abs().max()) for name in other)


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_three_adamw_steps_with_clipping_are_those_of_torch_on_a_plain_copy(stage, v4_model, make_engine, make_config, examples):
    optim = OptimConfig(lr=1e-3, betas=[0.9, 0.95], eps=1e-3, weight_decay=0.1, clip_norm=0.5)
    plain = copy.deepcopy(v4_model)
    groups = [{"params": g.parameters, "weight_decay": 0.1 if g.decay else 0.0} for g in parameter_groups(plain, optim)]
    optimizer, norms = torch.optim.AdamW(groups, lr=1e-3, betas=(0.9, 0.95), eps=1e-3), []
    for _ in range(3):
        optimizer.zero_grad()
        naive_loss(plain, examples).backward()
        norms.append(float(torch.nn.utils.clip_grad_norm_(plain.parameters(), 0.5)))
        optimizer.step()

    cfg = make_config(stage=stage, optim={"eps": 1e-3, "weight_decay": 0.1, "clip_norm": 0.5})
    engine = make_engine(v4_model, cfg)
    metrics = train(engine, micro_batches(examples, 1), steps=3)
    assert largest_difference(v4_model.state_dict(), plain.state_dict()) > 1e-3
    assert largest_difference(engine.full_weights(), plain.state_dict()) < 1e-6
    assert [record["optim/grad_norm"] for record in metrics] == pytest.approx(norms, rel=1e-4)
    assert [record["optim/clipped"] for record in metrics] == [1.0] * 3


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_the_number_of_accumulated_micro_batches_changes_nothing(stage, qwen3_moe_model, make_engine, make_config, examples):
    cfg = make_config(stage=stage, optim={"eps": 1.0, "lr": 1.0, "clip_norm": None})
    found = {}
    for count in (1, 2, 3):
        engine = make_engine(qwen3_moe_model, cfg)
        [metrics] = train(engine, micro_batches(examples, count))
        found[count] = metrics["optim/grad_norm"], engine.full_weights()
    assert largest_difference(found[1][1], qwen3_moe_model.state_dict()) > 1e-2
    for count in (2, 3):
        assert found[count][0] == pytest.approx(found[1][0], rel=1e-5)
        assert largest_difference(found[count][1], found[1][1]) < 1e-5


@pytest.mark.parametrize("stage", [0, 1])
def test_without_a_clip_norm_nothing_is_clipped(stage, qwen3_moe_model, make_engine, make_config, examples):
    """DeepSpeed left alone clips to a norm of 1."""
    scaled = micro_batches(examples, 1)
    scaled[0].weight_N.mul_(100)
    engine = make_engine(qwen3_moe_model, make_config(stage=stage, optim={"eps": 1.0, "lr": 1.0, "clip_norm": None}))
    [metrics] = train(engine, scaled)
    plain = copy.deepcopy(qwen3_moe_model)
    (100 * naive_loss(plain, examples)).backward()
    head, gradient = plain.lm_head.weight, plain.lm_head.weight.grad
    assert metrics["optim/grad_norm"] > 10
    torch.testing.assert_close(engine.full_weights()["lm_head.weight"], head.detach() - gradient / (gradient.abs() + 1), rtol=0, atol=1e-4)
    assert metrics["optim/clipped"] == 0.0


def test_the_learning_rate_follows_the_schedule(qwen3_moe_model, make_engine, make_config, examples):
    cfg = make_config(optim={"warmup_steps": 2}, num_steps=4)
    found = [record["optim/lr"] for record in train(make_engine(qwen3_moe_model, cfg), micro_batches(examples, 1), steps=4)]
    assert found == pytest.approx([0.5e-3, 1e-3, 1e-3, 1e-3])


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_update_to_weight_is_the_norm_of_the_change_over_the_norm_of_what_is_trained(stage, v4_model, make_engine, make_config, examples):
    engine = make_engine(v4_model, make_config(stage=stage, optim={"update_ratio_every": 2}))
    before = {name: p.detach().double() for name, p in v4_model.named_parameters() if p.requires_grad}
    first, second, third = train(engine, micro_batches(examples, 1), steps=1) + train(engine, micro_batches(examples, 1), steps=2)
    assert ["optim/update_to_weight" in record for record in (first, second, third)] == [True, False, True]
    again = make_engine(v4_model, make_config(stage=stage))
    train(again, micro_batches(examples, 1))
    after = again.full_weights()
    change = sum((after[name].double() - tensor).square().sum() for name, tensor in before.items())
    weight = sum(tensor.square().sum() for tensor in before.values())
    assert first["optim/update_to_weight"] == pytest.approx(float((change / weight).sqrt()), rel=1e-4)


def newton_schulz(matrix: torch.Tensor) -> torch.Tensor:
    """Five quintic iterations of one matrix in bfloat16, after Jordan (2024)."""
    x = matrix.bfloat16()
    x = x.T if matrix.shape[0] > matrix.shape[1] else x
    x = x / (x.norm() + 1e-7)
    for _ in range(5):
        a = x @ x.T
        x = 3.4445 * x + (-4.7750 * a + 2.0315 * a @ a) @ x
    return (x.T if matrix.shape[0] > matrix.shape[1] else x).float()


def naive_muon(weight: torch.Tensor, gradients: list[torch.Tensor], lr: float, momentum: float, decay: float) -> torch.Tensor:
    """Nesterov momentum, orthogonalised, scaled by the aspect ratio; a three-dimensional weight is a stack of matrices."""
    buffer = torch.zeros_like(weight)
    for gradient in gradients:
        buffer = momentum * buffer + (1 - momentum) * gradient
        update = (1 - momentum) * gradient + momentum * buffer
        matrices = update[None] if update.ndim == 2 else update
        orthogonal = torch.stack([newton_schulz(matrix) * math.sqrt(max(1, matrix.shape[0] / matrix.shape[1])) for matrix in matrices])
        weight = weight * (1 - lr * decay) - lr * orthogonal.view_as(weight)
    return weight


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
@pytest.mark.parametrize("stance", ["force_eager", pytest.param("default", marks=pytest.mark.slow)])
def test_muon_steps_are_momentum_and_newton_schulz_on_matrices_and_on_each_expert(stage, stance, qwen3_moe_model, make_engine, make_config, examples):
    naive_loss(qwen3_moe_model, examples).backward()
    optim = {"kind": OptimizerKind.muon, "clip_norm": None, "lr": 1e-6, "muon_lr": 1e-2, "momentum": 0.9, "weight_decay": 0.1}
    engine = make_engine(qwen3_moe_model, make_config(stage=stage, optim=optim))
    with torch.compiler.set_stance(stance):
        train(engine, micro_batches(examples, 2))
    found = engine.full_weights()
    for name in ("model.layers.0.self_attn.q_proj.weight", "model.layers.1.self_attn.o_proj.weight", "model.layers.2.mlp.experts.gate_up_proj"):
        assert engine.model.get_parameter(name).use_muon
        before = qwen3_moe_model.get_parameter(name).detach()
        expected = naive_muon(before, [qwen3_moe_model.get_parameter(name).grad], lr=1e-2, momentum=0.9, decay=0.1)
        moved, wanted = found[name] - before, expected - before
        likeness = functional.cosine_similarity(moved.flatten(), wanted.flatten(), dim=0)
        assert likeness > (0.999 if stance == "force_eager" else 0.9), (name, float(likeness))  # fused bfloat16 rounds otherwise, where there is no gradient
        assert float(moved.norm()) == pytest.approx(float(wanted.norm()), rel=0.1), name
    assert largest_difference({"head": found["lm_head.weight"]}, {"head": qwen3_moe_model.lm_head.weight.detach()}) < 2e-6, "the head is AdamW's"


def test_muon_keeps_its_momentum_from_step_to_step(qwen3_moe_model, make_engine, make_config, examples):
    name = "model.layers.0.self_attn.q_proj.weight"
    cfg = make_config(optim={"kind": OptimizerKind.muon, "clip_norm": None, "lr": 0.0, "muon_lr": 1e-7, "momentum": 0.9})
    engine = make_engine(qwen3_moe_model, cfg)
    first, second = micro_batches(examples[:3], 1), micro_batches(examples[3:], 1)
    gradients = []
    for part in (examples[:3], examples[3:]):
        qwen3_moe_model.zero_grad()
        naive_loss(qwen3_moe_model, part).backward()
        gradients.append(qwen3_moe_model.get_parameter(name).grad.clone())
    with torch.compiler.set_stance("force_eager"):
        train(engine, first)
        between = engine.full_weights()[name]
        train(engine, second)
    before = qwen3_moe_model.get_parameter(name).detach()
    for found, expected, other in [
        (between - before, naive_muon(before.double(), gradients[:1], 1e-7, 0.9, 0.0) - before, gradients[1]),
        (engine.full_weights()[name] - before, naive_muon(before.double(), gradients, 1e-7, 0.9, 0.0) - before, gradients[1]),
    ]:
        assert other.norm() > 0
        assert functional.cosine_similarity(found.flatten().double(), expected.flatten(), dim=0) > 0.98


@pytest.mark.parametrize("stage", [1, 2])
def test_bfloat16_keeps_float32_masters_so_that_tiny_updates_add_up(stage, new_student_in, make_engine, make_config, examples):
    """A step of 1e-3 is lost on a bfloat16 weight of 1 (spacing 4e-3 below and 8e-3 above), and 20 of them are not."""
    model = new_student_in(Dtype.bfloat16)
    cfg = make_config(stage=stage, optim={"lr": 1e-3, "betas": [0.0, 0.0], "eps": 1e-30, "clip_norm": None})
    engine = make_engine(model, cfg)
    name, batches = "model.norm.weight", micro_batches(examples[:2], 1)
    start = model.get_parameter(name).detach().float()
    train(engine, batches)
    assert torch.equal(engine.full_weights()[name].float(), start)
    train(engine, batches, steps=19)
    moved = (engine.full_weights()[name].float() - start).abs()
    assert engine.full_weights()[name].dtype is torch.bfloat16
    assert moved.max() == pytest.approx(20 * 1e-3, abs=4e-3)


@pytest.fixture
def new_student_in(architecture, tokenizer) -> Callable:
    """new_student_in(Dtype.bfloat16): a Qwen3-MoE of one layer."""

    def build(dtype: Dtype):
        seed_everything(0)
        return build_student(StudentConfig(architecture=architecture("qwen3_moe_tiny", num_hidden_layers=1), dtype=dtype), tokenizer)

    return build


@pytest.mark.parametrize(("stage", "bad"), [(0, float("nan")), (0, float("inf")), (1, float("nan")), (1, float("inf")), (2, float("nan")), (3, float("nan"))])
@pytest.mark.parametrize("kind", list(OptimizerKind))
def test_a_gradient_that_is_not_finite_is_skipped_and_leaves_the_weights(stage, kind, bad, qwen3_moe_model, make_engine, make_config, examples):
    cfg = make_config(stage=stage, optim={"kind": kind, "clip_norm": 1.0 if kind is OptimizerKind.adamw else None})
    engine = make_engine(qwen3_moe_model, cfg)
    loss, _ = engine.loss(micro_batches(examples, 1)[0], None, True)
    with torch.compiler.set_stance("force_eager"):
        engine.backward(loss * bad)
        engine.step()
    assert (engine.policy_step, engine.num_skipped, engine.skipped_in_a_row) == (1, 1, 1)
    assert largest_difference(engine.full_weights(), qwen3_moe_model.state_dict()) == 0.0


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
@pytest.mark.parametrize("kind", list(OptimizerKind))
def test_a_step_that_was_skipped_leaves_nothing_behind_in_weights_and_optimizer(stage, kind, qwen3_moe_model, make_engine, make_config, examples):
    """One matrix alone has a gradient that is not finite; what follows equals a run that never had this step."""
    cfg = make_config(stage=stage, optim={"kind": kind, "clip_norm": 1.0 if kind is OptimizerKind.adamw else None, "max_skipped_steps": 1})
    batches = micro_batches(examples, 2)
    found = []
    with torch.compiler.set_stance("force_eager"):
        for spoils in (False, True):
            engine = make_engine(qwen3_moe_model, cfg)
            train(engine, batches[:1])
            if spoils:
                spoiled = engine.model.get_parameter("model.layers.0.self_attn.q_proj.weight").register_hook(lambda gradient: gradient * math.nan)
                train(engine, batches[1:2])
                spoiled.remove()
                assert (engine.policy_step, engine.skipped_in_a_row) == (2, 1)
            train(engine, batches, steps=2)
            assert (engine.num_skipped, engine.skipped_in_a_row) == (int(spoils), 0)
            found.append(engine.full_weights())
    assert largest_difference(*found) == 0.0
    assert largest_difference(found[0], qwen3_moe_model.state_dict()) > 0


def test_a_checkpoint_brings_back_how_many_steps_were_skipped(qwen3_moe_model, make_engine, make_config, examples, tmp_path):
    engine, other = (make_engine(qwen3_moe_model, make_config(optim={"max_skipped_steps": 1})) for _ in range(2))
    loss, _ = engine.loss(micro_batches(examples, 1)[0], None, True)
    engine.backward(loss * math.nan)
    engine.step()
    engine.save(tmp_path, "one")
    other.load(tmp_path, "one")
    assert (other.policy_step, other.num_skipped, other.skipped_in_a_row) == (1, 1, 1)


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_weights_are_every_parameter_and_persistent_buffer_in_full(stage, v4_model, make_engine, make_config):
    engine = make_engine(v4_model, make_config(stage=stage))
    found = {name: tensor.clone() for name, tensor in engine.weights()}
    expected = v4_model.state_dict()
    assert set(found) == set(expected)
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert any(name.endswith("tid2eid") for name in found)


def test_weights_of_a_tied_head_are_given_once(make_engine, make_config, new_student):
    model = new_student("qwen3_moe_tiny", tie_word_embeddings=True)
    engine = make_engine(model, make_config())
    names = [name for name, _ in engine.weights()]
    assert len(names) == len(set(names))
    assert "model.embed_tokens.weight" in names


@pytest.mark.parametrize(("family", "stage"), [("v4", 0), ("v4", 1), ("v4", 2), ("v4", 3), ("qwen3_moe", 1)])
def test_a_checkpoint_brings_back_weights_optimizer_and_routing_so_that_training_goes_on_bit_for_bit(
    stage, family, v4_model, qwen3_moe_model, make_engine, make_config, examples, tmp_path
):
    model = {"v4": v4_model, "qwen3_moe": qwen3_moe_model}[family]
    student = {"router": Router.train, "router_bias_speed": 0.01 if family == "v4" else 0.0}
    for parameter in model.parameters():
        parameter.requires_grad_(True)
    cfg = make_config(stage=stage, student=student, num_steps=20, optim={"warmup_steps": 10})
    batches = micro_batches(examples, 2)

    def steps(engine: Engine, count: int) -> list[dict[str, float]]:
        metrics = []
        for _ in range(count):
            engine.recorder.start_step()
            metrics += train(engine, batches)
            if student["router_bias_speed"]:
                engine.recorder.update_bias(student["router_bias_speed"])
            metrics[-1] |= engine.recorder.metrics() | engine.probe_routing(batches[0])
        return metrics

    engine = make_engine(model, cfg)
    steps(engine, 2)
    engine.save(tmp_path, "tag")
    saved = engine.full_weights()
    expected = steps(engine, 2)

    for parameter in model.parameters():
        parameter.data.mul_(1.1)
    resumed = make_engine(model, cfg)
    resumed.load(tmp_path, "tag")
    assert resumed.policy_step == 2
    assert largest_difference(resumed.full_weights(), saved) == 0.0
    assert steps(resumed, 2) == expected
    assert largest_difference(resumed.full_weights(), engine.full_weights()) == 0.0


def test_a_checkpoint_that_is_not_there_is_refused(qwen3_moe_model, make_engine, make_config, tmp_path):
    with pytest.raises(ValueError, match=r"tag cannot be loaded: it is missing or incomplete"):
        make_engine(qwen3_moe_model, make_config()).load(tmp_path, "tag")


def test_a_checkpoint_of_bfloat16_brings_back_the_float32_masters(new_student_in, make_engine, make_config, examples, tmp_path):
    model, cfg = new_student_in(Dtype.bfloat16), make_config(optim={"lr": 1e-4})
    batches = micro_batches(examples[:2], 1)
    engine = make_engine(model, cfg)
    train(engine, batches, steps=2)
    engine.save(tmp_path, "tag")
    train(engine, batches, steps=2)
    resumed = make_engine(model, cfg)
    resumed.load(tmp_path, "tag")
    train(resumed, batches, steps=2)
    assert largest_difference(resumed.full_weights(), engine.full_weights()) == 0.0


@pytest.mark.parametrize("stage", [1, 3])
@pytest.mark.parametrize("name", ["deepseek_v4_tiny", "qwen3_moe_tiny"])
def test_gradient_checkpointing_computes_layers_again_and_changes_no_update(stage, name, architecture, tokenizer, device, make_config, examples):
    found = {}
    for checkpointing in (False, True):
        student = {"architecture": architecture(name), "gradient_checkpointing": checkpointing}
        seed_everything(0)
        model = build_student(StudentConfig(**student), tokenizer)
        engine = Engine(model, len(tokenizer), make_config(stage=stage, student=student), device)
        forwards = []
        model.base_model.layers[1].self_attn.register_forward_hook(lambda *_, forwards=forwards: forwards.append(1))
        train(engine, micro_batches(examples, 1))
        found[checkpointing] = len(forwards), engine.full_weights()
    assert (found[False][0], found[True][0]) == (1, 2)
    assert largest_difference(found[True][1], found[False][1]) == 0.0


def refused(cfg: RunConfig, dtype: torch.dtype = torch.float32) -> str:
    with pytest.raises(ValueError) as error:  # noqa: PT011 - the tests look at the sentence
        deepspeed_settings(cfg, dtype)
    return str(error.value)


@pytest.mark.parametrize("key", list(OWNED_KEYS))
def test_a_deepspeed_key_that_another_setting_owns_is_refused_with_that_setting(key):
    assert refused(RunConfig(deepspeed={key: 1})) == f"deepspeed.{key} is owned by {OWNED_KEYS[key]}: set that instead"


def test_muon_with_a_clip_norm_is_refused():
    assert "clip_norm must be null" in refused(RunConfig(optim=OptimConfig(kind=OptimizerKind.muon)))


@pytest.mark.parametrize("stage", [0, 1])
def test_muon_in_bfloat16_below_zero_2_is_refused(stage):
    cfg = RunConfig(optim=OptimConfig(kind=OptimizerKind.muon, clip_norm=None), deepspeed={"zero_optimization": {"stage": stage}})
    assert "needs ZeRO 2 or 3" in refused(cfg, torch.bfloat16)


def test_bfloat16_without_zero_is_refused():
    assert "float32 master weights" in refused(RunConfig(), torch.bfloat16)


def test_a_balance_loss_with_gradient_checkpointing_is_refused():
    assert "gradient_checkpointing" in refused(RunConfig(student=StudentConfig(router=Router.train, router_balance_loss=0.1, gradient_checkpointing=True)))


def test_a_balance_loss_with_packing_is_refused():
    cfg = RunConfig(student=StudentConfig(router=Router.train, router_balance_loss=0.1), batch=BatchConfig(packing=True))
    assert "packing" in refused(cfg)


def test_a_student_with_nothing_to_train_is_refused(qwen3_moe_model, make_engine, make_config):
    with pytest.raises(ValueError, match="every parameter is frozen"):
        make_engine(qwen3_moe_model.requires_grad_(False), make_config())


def test_other_deepspeed_keys_pass_through_untouched():
    own = {"zero_optimization": {"stage": 2, "overlap_comm": False}, "wall_clock_breakdown": True}
    settings = deepspeed_settings(RunConfig(deepspeed=own), torch.float32)
    assert {key: settings[key] for key in own} == own


def test_muon_at_zero_3_gets_the_reduction_it_needs():
    cfg = RunConfig(optim=OptimConfig(kind=OptimizerKind.muon, clip_norm=None), deepspeed={"zero_optimization": {"stage": 3}})
    assert deepspeed_settings(cfg, torch.float32)["zero_optimization"] == {"reduce_scatter": False, "stage": 3}
