"""Replayed routes: the step with them against gates written out in the test, and what a replay leaves alone."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch.nn import functional

from opd.__main__ import load_config
from opd.config import DistillConfig, Router
from opd.update import supervised_update, update
from rollout.config import RolloutConfig
from rollout.routes import find_routers
from rollout.sampler import LocalSampler
from rollout.types import Rollout
from teachers.config import DomainConfig, TeacherConfig, TeachersConfig
from teachers.pool import TeacherPool

LAYERS, EXPERTS = 3, 8
FAMILIES = ["v4", "qwen3_moe"]


@pytest.fixture
def models(v4_model, qwen3_moe_model) -> dict:
    return {"v4": v4_model, "qwen3_moe": qwen3_moe_model}


@pytest.fixture
def pool(teacher_folders, tokenizer, device) -> TeacherPool:
    domains = {"law": DomainConfig(teacher=TeacherConfig(model=str(teacher_folders["v4"])))}
    return TeacherPool(domains, TeachersConfig(), tokenizer, device)


@pytest.fixture
def config(make_config) -> Callable[..., DistillConfig]:
    """config(replay_routes=True): a step with these settings of the student, whose update shows the gradient, g / (|g| + 1)."""

    def make(stage: int = 1, packing: bool = False, **student) -> DistillConfig:
        rollout = RolloutConfig(max_new_tokens=10, decode_width=4, record_routes=True)
        cfg = make_config(optim={"lr": 1.0, "eps": 1.0, "clip_norm": None}, student=student, max_tokens=60, stage=stage, rollout=rollout)
        cfg.batch.packing = packing
        return cfg

    return make


@pytest.fixture
def sampled(make_prompt, tokenizer) -> Callable[..., list[Rollout]]:
    """sampled(model): four rollouts with the routes by which the model sampled them."""

    def sample(model) -> list[Rollout]:
        prompts = [make_prompt("law", list(range(5, 8 + 3 * number)), request=number) for number in range(4)]
        cfg = RolloutConfig(max_new_tokens=10, decode_width=4, record_routes=True)
        return LocalSampler(model, [tokenizer.eos_token_id], 0, len(tokenizer)).sample(prompts, cfg)

    return sample


def perturbed(rollouts: list[Rollout], hash_layers: int) -> list[Rollout]:
    """The same with other experts at every second token, in the layers that are not hash-routed."""
    changed = []
    for rollout in rollouts:
        routes_TMK = rollout.routes_TMK.clone()
        routes_TMK[::2, hash_layers:] = (routes_TMK[::2, hash_layers:] + 3) % EXPERTS
        changed.append(replace(rollout, routes_TMK=routes_TMK))
    return changed


def hash_layers(family: str) -> int:
    return int(family == "v4")


def one_update(engine, pool: TeacherPool, rollouts: list[Rollout], cfg: DistillConfig) -> tuple[dict[str, float], dict[str, torch.Tensor]]:
    before = engine.full_weights()
    metrics = update(engine, pool, pool.score(rollouts), cfg)
    return metrics, {name: tensor - before[name] for name, tensor in engine.full_weights().items()}


def assert_same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor], tolerance: float) -> None:
    assert max(tensor.abs().max() for tensor in one.values()) > 1e-2, "nothing moved, so the comparison shows nothing"
    for name in one:
        torch.testing.assert_close(one[name], other[name], rtol=0, atol=tolerance)


def gate(family: str, router, logits_NE: torch.Tensor, chosen_NK: torch.Tensor) -> torch.Tensor:
    """Weights of chosen experts: DeepSeek-V4's sqrt(softplus), and the softmax of Qwen3-MoE, each divided by its sum over the chosen."""
    score_NE = functional.softplus(logits_NE).sqrt() if family == "v4" else logits_NE.softmax(-1)
    scale = router.routed_scaling_factor if family == "v4" else 1.0
    weight_NK = score_NE.gather(1, chosen_NK)
    return scale * weight_NK / weight_NK.sum(-1, keepdim=True)


def naive_step(family: str, model, teacher, rollouts: list[Rollout], vocab_size: int) -> tuple[float, dict[str, torch.Tensor]]:
    """(loss, gradients) of the formula, rollout by rollout and without padding, with the recorded experts put in the place of the routers' own."""
    loss, tokens = torch.zeros(()), sum(rollout.num_loss_tokens for rollout in rollouts)
    for rollout in rollouts:
        first, last = len(rollout.prompt.tokens) - 1, len(rollout.prompt.tokens) - 1 + len(rollout.completion_T)

        def instead(router, _inputs, output, layer, rollout=rollout, first=first, last=last):
            logits_LE, _, own_LK = output
            chosen_LK = torch.cat([own_LK[:first], rollout.routes_TMK[:, layer].long(), own_LK[last:]])
            return logits_LE, gate(family, router, logits_LE, chosen_LK), chosen_LK

        handles = []
        for layer, router in enumerate(find_routers(model).values()):
            handles.append(router.register_forward_hook(lambda router, inputs, output, layer=layer, put=instead: put(router, inputs, output, layer)))
        ids = torch.tensor([[*rollout.prompt.tokens, *rollout.completion_T.tolist()]])
        log_p_TV = model(input_ids=ids).logits[0, first:last, :vocab_size].log_softmax(-1)
        for handle in handles:
            handle.remove()
        with torch.no_grad():
            log_q_TV = teacher(input_ids=ids).logits[0, first:last, :vocab_size].log_softmax(-1)
        loss = loss + (log_p_TV.exp() * (log_p_TV - log_q_TV)).sum() / tokens
    names, parameters = zip(*[(name, p) for name, p in model.named_parameters() if p.requires_grad], strict=True)
    gradients = torch.autograd.grad(loss, parameters, allow_unused=True)
    return float(loss), {name: gradient for name, gradient in zip(names, gradients, strict=True) if gradient is not None}


@pytest.mark.parametrize("checkpointing", [False, True], ids=["kept", "recomputed"])
@pytest.mark.parametrize("family", FAMILIES)
def test_loss_and_update_are_those_of_the_formula_with_the_recorded_experts(family, checkpointing, models, pool, make_engine, config, sampled, tokenizer):
    """With other experts than the routers would choose; gates learn, so that their gradients are seen too."""
    model = models[family]
    for router in find_routers(model).values():
        router.weight.requires_grad_(True)
    rollouts = perturbed(sampled(model), hash_layers(family))
    cfg = config(replay_routes=True, router=Router.train, gradient_checkpointing=checkpointing)
    if checkpointing:
        model.gradient_checkpointing_enable()
    engine = make_engine(model.train(), cfg)
    metrics, changes = one_update(engine, pool, rollouts, cfg)
    model.gradient_checkpointing_disable()
    loss, gradients = naive_step(family, model, pool.get(pool.teacher_of["law"]).model, rollouts, len(tokenizer))
    assert metrics["step/loss"] == pytest.approx(loss, rel=1e-5)
    assert any(name.endswith("gate.weight") and gradient.abs().max() > 1e-5 for name, gradient in gradients.items())
    assert_same({name: changes[name] for name in gradients}, {name: -g / (g.abs() + 1) for name, g in gradients.items()}, tolerance=2e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_routes_of_the_same_weights_agree_and_their_replay_changes_nothing(family, models, pool, make_engine, config, sampled):
    rollouts, found = sampled(models[family]), []
    for replays in (False, True):
        cfg = config(replay_routes=replays)
        found.append(one_update(make_engine(models[family], cfg), pool, rollouts, cfg))
        assert found[-1][0]["router/agreement"] == 1.0
    assert found[0][0]["step/loss"] == pytest.approx(found[1][0]["step/loss"], abs=1e-6)
    assert_same(found[0][1], found[1][1], tolerance=1e-6)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_replay_of_other_routes_changes_the_loss(family, models, pool, make_engine, config, sampled):
    rollouts, cfg = sampled(models[family]), config(replay_routes=True)
    losses = [one_update(make_engine(models[family], cfg), pool, r, cfg)[0]["step/loss"] for r in (rollouts, perturbed(rollouts, hash_layers(family)))]
    assert abs(losses[0] - losses[1]) > 1e-4


@pytest.mark.parametrize("replays", [False, True])
def test_the_agreement_is_with_what_the_routers_choose_themselves(replays, qwen3_moe_model, pool, make_engine, config, sampled):
    """Without a replay, the states are those of the sampler, so that what was recorded is what the routers choose; only tokens of the loss count."""
    rollouts = sampled(qwen3_moe_model)
    rollouts[1].completion_mask_T[:3] = False
    other, matched, total = perturbed(rollouts, 0), 0, 0
    for one, changed in zip(rollouts, other, strict=True):
        for token in range(len(one.completion_T)):
            if one.completion_mask_T[token]:
                pairs = zip(one.routes_TMK[token].tolist(), changed.routes_TMK[token].tolist(), strict=True)
                matched, total = matched + sum(len(set(a) & set(b)) for a, b in pairs), total + LAYERS * 2
    cfg = config(replay_routes=replays)
    agreement = one_update(make_engine(qwen3_moe_model, cfg), pool, other, cfg)[0]["router/agreement"]
    assert 0.5 <= matched / total < 0.9
    if not replays:
        assert agreement == pytest.approx(matched / total)
    else:
        assert agreement < 0.9, "what is replayed is not what is compared"


@pytest.mark.parametrize("stage", [2, 3])
def test_a_replay_is_the_same_at_every_stage(stage, v4_model, pool, make_engine, config, sampled):
    rollouts, found = perturbed(sampled(v4_model), 1), []
    for number in (1, stage):
        cfg = config(stage=number, replay_routes=True)
        found.append(one_update(make_engine(v4_model, cfg), pool, rollouts, cfg))
    assert found[0][0]["step/loss"] == pytest.approx(found[1][0]["step/loss"], rel=1e-6)
    assert_same(found[0][1], found[1][1], tolerance=1e-6)


def test_a_packed_row_replays_every_documents_own_routes(qwen3_moe_model, pool, make_engine, config, sampled):
    rollouts, found = perturbed(sampled(qwen3_moe_model), 0), []
    for packing in (False, True):
        cfg = config(packing=packing, replay_routes=True)
        found.append(one_update(make_engine(qwen3_moe_model, cfg), pool, rollouts, cfg))
    assert found[0][0]["step/loss"] == pytest.approx(found[1][0]["step/loss"], rel=1e-5)
    assert_same(found[0][1], found[1][1], tolerance=1e-5)


def test_masking_compares_log_probabilities_under_the_replayed_routes(qwen3_moe_model, pool, make_engine, config, sampled):
    """As the update's own forward gives them: with the routes that the rollouts are said to have had, the mismatch is that of the metric."""
    rollouts, cfg = perturbed(sampled(qwen3_moe_model), 0), config(replay_routes=True)
    mismatch = one_update(make_engine(qwen3_moe_model, cfg), pool, rollouts[:1], cfg)[0]["domain/law/mismatch_kl"]
    assert mismatch > 1e-6
    cfg.rollout.max_mismatch = mismatch * 0.99
    with pytest.raises(ValueError, match="every rollout of step 0 is masked"):
        one_update(make_engine(qwen3_moe_model, cfg), pool, rollouts[:1], cfg)
    cfg.rollout.max_mismatch = mismatch * 1.01
    assert one_update(make_engine(qwen3_moe_model, cfg), pool, rollouts[:1], cfg)[0]["domain/law/masked"] == 0.0


def test_the_next_probe_and_supervised_step_route_by_themselves(qwen3_moe_model, pool, make_engine, config, sampled, random_rollouts):
    rollouts, examples, found = perturbed(sampled(qwen3_moe_model), 0), random_rollouts([("law", 3, 5), ("law", 2, 9)]), []
    for replays in (True, False):
        cfg = config(replay_routes=replays, router_probe_every=1)
        cfg.optim.lr = 1e-9
        engine = make_engine(qwen3_moe_model, cfg)
        one = [update(engine, pool, pool.score(rollouts), cfg) for _ in range(2)][1]
        other = supervised_update(engine, examples, cfg)
        names = [f"router/layer_{layer:02d}/routed_as_at_start" for layer in range(LAYERS)]
        found.append(([one[name] for name in names], other["domain/law/loss_per_token"]))
    assert found[0][0] == found[1][0] == [1.0] * LAYERS
    assert found[0][1] == pytest.approx(found[1][1], abs=1e-6)


def test_rollouts_without_routes_are_trained_on_and_not_compared(qwen3_moe_model, pool, make_engine, config, sampled):
    rollouts, cfg = [replace(rollout, routes_TMK=None) for rollout in sampled(qwen3_moe_model)], config()
    assert "router/agreement" not in one_update(make_engine(qwen3_moe_model, cfg), pool, rollouts, cfg)[0]


def test_a_replay_of_rollouts_without_routes_is_refused(qwen3_moe_model, pool, make_engine, config, sampled):
    rollouts, cfg = [replace(rollout, routes_TMK=None) for rollout in sampled(qwen3_moe_model)], config(replay_routes=True)
    with pytest.raises(ValueError, match=r"request 0 has no routes: replay a run that sampled with rollout\.record_routes=true"):
        one_update(make_engine(qwen3_moe_model, cfg), pool, rollouts, cfg)


def test_routes_of_a_model_with_other_layers_are_refused(qwen3_moe_model, pool, make_engine, config, sampled):
    rollouts, cfg = [replace(rollout, routes_TMK=rollout.routes_TMK[:, :2]) for rollout in sampled(qwen3_moe_model)], config()
    with pytest.raises(ValueError, match="routes are of 2 layers, and the student routes in 3"):
        one_update(make_engine(qwen3_moe_model, cfg), pool, rollouts, cfg)


SERVED = ["rollout.sampler=vllm", "rollout.vllm.servers=[http://a:1]"]


@pytest.mark.parametrize(
    ("command", "overrides", "message"),
    [
        ("distill", ["student.replay_routes=true"], r"has no routes to replay: set rollout\.record_routes=true"),
        ("distill", ["rollout.record_routes=true", *SERVED], r"rollout\.sampler=vllm does not say which experts it chose"),
        ("distill", ["rollout.record_routes=true", "rollout.sampler=service"], r"rollout\.sampler=service does not say which experts it chose"),
        ("distill", ["rollout.record_routes=true", "rollout.replay=runs/other"], r"rollout\.record_routes would be ignored"),
        ("specialize", ["student.replay_routes=true"], r"student\.replay_routes=true would be ignored"),
    ],
)
def test_routes_that_cannot_be_had_are_refused(command, overrides, message):
    with pytest.raises(ValueError, match=message):
        load_config(command, overrides)


def test_a_replayed_run_may_bring_its_routes():
    assert load_config("distill", ["student.replay_routes=true", "rollout.replay=runs/other"]).student.replay_routes
