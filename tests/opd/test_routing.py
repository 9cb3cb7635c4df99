"""Where tokens go: counts without padding, balance against naive formulas, and what a frozen router keeps."""

import math

import pytest
import torch

from opd.batch import MicroBatch, supervised_batches
from opd.config import BatchConfig, Router
from opd.engine import Engine
from opd.routing import RoutingRecorder, find_routers
from opd.student import build_student
from opd.update import supervised_update
from rollout.model import backbone_of

SHAPES = [("law", 3, 5), ("law", 6, 10), ("law", 2, 3), ("law", 9, 1)]


@pytest.fixture(params=["v4", "qwen3_moe"])
def model(request, v4_model, qwen3_moe_model):
    return {"v4": v4_model, "qwen3_moe": qwen3_moe_model}[request.param]


@pytest.fixture
def batch(random_rollouts) -> MicroBatch:
    [batch] = supervised_batches(random_rollouts(SHAPES), {"law": 1.0}, BatchConfig())
    return batch


def run(model, batch: MicroBatch) -> None:
    backbone_of(model)(input_ids=batch.tokens_BL, use_cache=False)


def chosen_alone(model, batch: MicroBatch, router: str) -> list[list[list[int]]]:
    """Experts of each token of each row of the batch, from forwards of single rows without padding: [row][position][choice]."""
    found, result = {}, []
    handle = model.get_submodule(router).register_forward_hook(lambda _module, _inputs, output: found.update(indices=output[2]))
    for tokens_L, real_L in zip(batch.tokens_BL, batch.real_BL, strict=True):
        backbone_of(model)(input_ids=tokens_L[real_L][None], use_cache=False)
        result.append(found["indices"].tolist())
    handle.remove()
    return result


def test_every_layer_of_experts_has_its_router(model):
    assert list(find_routers(model)) == [f"model.layers.{layer}.mlp.gate" for layer in range(3)]


def test_experts_without_a_router_beside_them_are_refused():
    experts = torch.nn.Module()
    experts.gate_up_proj = torch.nn.Parameter(torch.zeros(2, 4, 4))
    experts.down_proj = torch.nn.Parameter(torch.zeros(2, 4, 4))
    layer = torch.nn.Module()
    layer.experts = experts
    model = torch.nn.Module()
    model.layer = layer
    with pytest.raises(ValueError, match=r"layer\.experts have no router named gate or router"):
        find_routers(model)


def test_a_router_that_returns_something_else_is_refused(qwen3_moe_model, batch):
    qwen3_moe_model.get_submodule("model.layers.0.mlp.gate").register_forward_hook(lambda _module, _inputs, output: output[0])
    RoutingRecorder(qwen3_moe_model)
    with pytest.raises(ValueError, match="this family is not supported"):
        run(qwen3_moe_model, batch)


def test_counts_are_those_of_the_rows_without_padding(model, batch):
    recorder = RoutingRecorder(model)
    recorder.start_step()
    run(model, batch)
    recorder.count(batch.real_BL)
    for name, counts_E in recorder.counts.items():
        chosen = [expert for row in chosen_alone(model, batch, name) for token in row for expert in token]
        assert counts_E.tolist() == [chosen.count(expert) for expert in range(8)]


def test_counts_add_up_over_micro_batches_and_begin_anew_each_step(model, batch):
    recorder = RoutingRecorder(model)
    run(model, batch)
    for times in (1, 2):
        recorder.count(batch.real_BL)
        assert all(counts_E.sum() == times * 2 * batch.real_BL.sum() for counts_E in recorder.counts.values())
    recorder.start_step()
    assert recorder.counts == {}


def test_load_entropy_and_dead_experts_are_those_of_the_counts(v4_model):
    recorder = RoutingRecorder(v4_model)
    name = next(iter(recorder.routers))
    recorder.counts = {name: torch.tensor([4.0, 4.0, 0, 0, 0, 0, 0, 0])}
    first = recorder.metrics()
    assert first["router/layer_00/load_entropy"] == pytest.approx(math.log(2))
    assert (first["router/layer_00/dead_experts"], first["router/layer_00/load_entropy_change"]) == (6.0, 0.0)
    recorder.counts = {name: torch.full((8,), 3.0)}
    second = recorder.metrics()
    assert second["router/layer_00/dead_experts"] == 0.0
    assert second["router/layer_00/load_entropy_change"] == pytest.approx(math.log(8) - math.log(2))


def naive_balance(model, batch: MicroBatch, name: str) -> float:
    """sum_i f_i P_i of one layer, summed over the rows, each without its padding (DeepSeek-V3, eqs. 17-20)."""
    router, found, total = model.get_submodule(name), {}, 0.0
    handle = router.register_forward_hook(lambda _module, _inputs, output: found.update(logits=output[0], indices=output[2]))
    for tokens_L, real_L in zip(batch.tokens_BL, batch.real_BL, strict=True):
        backbone_of(model)(input_ids=tokens_L[real_L][None], use_cache=False)
        score = (lambda x: torch.nn.functional.softplus(x).sqrt()) if model.config.model_type == "deepseek_v4" else (lambda x: x.softmax(-1))
        affinity_LE = score(found["logits"])
        tokens, experts = affinity_LE.shape
        for expert in range(experts):
            fraction = experts / (2 * tokens) * sum(expert in row for row in found["indices"].tolist())
            probability = sum(float(row[expert] / row.sum()) for row in affinity_LE) / tokens
            total += fraction * probability
    handle.remove()
    return total


def test_the_balance_loss_is_the_naive_formula_row_by_row(model, batch):
    learned = [name for name, router in find_routers(model).items() if "tid2eid" not in dict(router.named_buffers())]
    expected = sum(naive_balance(model, batch, name) for name in learned) / len(learned)
    recorder = RoutingRecorder(model)
    run(model, batch)
    assert float(recorder.balance_loss(batch.real_BL).detach()) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("max_tokens", [1000, 16])
def test_the_balance_loss_enters_with_its_weight_as_the_mean_over_the_steps_sequences(max_tokens, qwen3_moe_model, make_engine, make_config, random_rollouts):
    """With eps 1 the first update is g / (|g| + 1), so that it shows the gradient."""
    rollouts, student = random_rollouts(SHAPES), {"router": Router.train, "router_balance_loss": 0.5}
    qwen3_moe_model.requires_grad_(True)
    cfg = make_config(student=student, optim={"eps": 1.0, "clip_norm": None, "lr": 1.0}, max_tokens=max_tokens)
    engine = make_engine(qwen3_moe_model, cfg)
    supervised_update(engine, rollouts, cfg)

    recorder, loss = RoutingRecorder(qwen3_moe_model), 0.0
    for rollout in rollouts:
        ids = torch.tensor([[*rollout.prompt.tokens, *rollout.completion_T.tolist()]])
        logits_TV = qwen3_moe_model(input_ids=ids).logits[0, len(rollout.prompt.tokens) - 1 : -1]
        loss = loss + torch.nn.functional.cross_entropy(logits_TV, rollout.completion_T, reduction="sum") / sum(after for _, _, after in SHAPES)
        loss = loss + 0.5 * recorder.balance_loss(torch.ones_like(ids, dtype=torch.bool)) / len(rollouts)
    for name in ("model.layers.1.mlp.gate.weight", "model.layers.0.self_attn.q_proj.weight"):
        weight = qwen3_moe_model.get_parameter(name)
        (gradient,) = torch.autograd.grad(loss, weight, retain_graph=True)
        torch.testing.assert_close(engine.full_weights()[name], weight.detach() - gradient / (gradient.abs() + 1), rtol=0, atol=1e-5)


def test_bias_rises_for_experts_below_the_mean_load_and_falls_above(v4_model):
    recorder = RoutingRecorder(v4_model)
    name = "model.layers.1.mlp.gate"
    recorder.counts = {name: torch.tensor([0.0, 8, 4, 4, 4, 4, 4, 4])}
    recorder.update_bias(0.25)
    assert v4_model.get_submodule(name).e_score_correction_bias.tolist() == [0.25, -0.25, 0, 0, 0, 0, 0, 0]
    assert not v4_model.get_submodule("model.layers.2.mlp.gate").e_score_correction_bias.any(), "no counts, no change"


def test_a_bias_moves_tokens_to_the_experts_it_favours(v4_model, batch):
    recorder = RoutingRecorder(v4_model)
    name = "model.layers.1.mlp.gate"
    counts = []
    for bias in (0.0, 100.0):
        v4_model.get_submodule(name).e_score_correction_bias[3] = bias
        recorder.start_step()
        run(v4_model, batch)
        recorder.count(batch.real_BL)
        counts.append(recorder.counts[name][3])
    assert counts[0] < counts[1] == batch.real_BL.sum()


def routing_state(engine: Engine) -> dict[str, torch.Tensor]:
    return {name: tensor for name, tensor in engine.full_weights().items() if "mlp.gate." in name}


@pytest.mark.parametrize("family", ["deepseek_v4_tiny", "qwen3_moe_tiny"])
@pytest.mark.parametrize("router", list(Router))
def test_a_frozen_router_keeps_gates_tables_and_biases_and_a_trained_one_keeps_its_tables(
    family, router, architecture, tokenizer, make_engine, make_config, random_rollouts
):
    cfg = make_config(student={"router": router, "architecture": architecture(family)}, optim={"weight_decay": 0.1, "lr": 1e-2})
    if router is Router.train and family == "deepseek_v4_tiny":
        cfg.student.router_bias_speed = 0.01
    engine = make_engine(build_student(cfg.student, tokenizer), cfg)
    before = routing_state(engine)
    for _ in range(2):
        supervised_update(engine, random_rollouts(SHAPES), cfg)
    changed = {name for name, tensor in routing_state(engine).items() if not torch.equal(tensor, before[name])}
    moving = {name for name in before if not name.endswith("tid2eid")} if router is Router.train else set()
    assert changed == moving


def test_the_probe_is_unchanged_at_first_and_sees_a_changed_gate(v4_model, batch):
    recorder = RoutingRecorder(v4_model)
    first = recorder.probe(backbone_of(v4_model), batch.tokens_BL, batch.real_BL)
    assert first == {f"router/layer_{layer:02d}/routed_as_at_start": 1.0 for layer in range(3)}
    with torch.no_grad():
        v4_model.get_submodule("model.layers.1.mlp.gate").weight.neg_()
    second = recorder.probe(backbone_of(v4_model), torch.zeros_like(batch.tokens_BL), batch.real_BL)
    assert second["router/layer_00/routed_as_at_start"] == 1.0, "a hash table does not change, and the probe's tokens are those of the first call"
    assert second["router/layer_01/routed_as_at_start"] < 1.0


def test_the_share_of_kept_decisions_is_counted_choice_by_choice(v4_model, batch):
    recorder = RoutingRecorder(v4_model)
    recorder.probe(backbone_of(v4_model), batch.tokens_BL, batch.real_BL)
    gate = v4_model.get_submodule("model.layers.1.mlp.gate")
    before = recorder.probe_experts["model.layers.1.mlp.gate"].tolist()
    with torch.no_grad():
        gate.weight[2].neg_()
    found = recorder.probe(backbone_of(v4_model), batch.tokens_BL, batch.real_BL)["router/layer_01/routed_as_at_start"]
    after = recorder.last["model.layers.1.mlp.gate"][1][batch.real_BL.flatten()].tolist()
    kept = [len(set(one) & set(other)) for one, other in zip(before, after, strict=True)]
    assert found == pytest.approx(sum(kept) / (2 * len(kept)))
    assert 0 < found < 1


def test_state_brings_back_probe_and_start(v4_model, batch):
    recorder = RoutingRecorder(v4_model)
    run(v4_model, batch)
    recorder.count(batch.real_BL)
    recorder.metrics()
    recorder.probe(backbone_of(v4_model), batch.tokens_BL, batch.real_BL)
    other = RoutingRecorder(v4_model)
    other.restore(recorder.state())
    with torch.no_grad():
        v4_model.get_submodule("model.layers.1.mlp.gate").weight.neg_()
    assert other.start_entropy == recorder.start_entropy
    assert other.probe(backbone_of(v4_model), torch.zeros_like(batch.tokens_BL), batch.real_BL)["router/layer_01/routed_as_at_start"] < 1.0
