"""One step from scored rollouts: the objective's formula, and what must not change it (DESIGN section 5, properties 1 to 3)."""

import math
from collections.abc import Callable

import pytest
import torch

from opd.config import DistillConfig
from opd.engine import Engine
from opd.update import domain_weights, supervised_update, update
from rollout.model import load_model
from rollout.types import Rollout
from teachers.config import DomainConfig, TeacherConfig, TeachersConfig
from teachers.pool import TeacherPool

SHAPES = [("law", 3, 9), ("code", 9, 2), ("law", 6, 4), ("code", 2, 12), ("law", 12, 1), ("code", 5, 5), ("law", 1, 7)]
PLAIN_ADAM = {"lr": 1.0, "eps": 1.0, "clip_norm": None}
"""With eps 1 the first update is g / (|g| + 1), a smooth function of the gradient, so that equal updates mean equal gradients."""


@pytest.fixture
def make_pool(teacher_folders, saved_v4, tokenizer, device) -> Callable[..., TeacherPool]:
    """make_pool({"law": "v4"}): "v4" and "qwen3_moe" are teachers, "student" is the student's own checkpoint."""
    folders = teacher_folders | {"student": saved_v4}

    def make(teacher_of: dict[str, str], max_tokens: int = 16384) -> TeacherPool:
        domains = {name: DomainConfig(teacher=TeacherConfig(model=str(folders[teacher]))) for name, teacher in teacher_of.items()}
        return TeacherPool(domains, TeachersConfig(max_resident=2, max_tokens_per_forward=max_tokens), tokenizer, device)

    return make


@pytest.fixture
def rollouts(random_rollouts) -> list[Rollout]:
    """Seven rollouts of two domains, one with environment tokens in its completion."""
    rollouts = random_rollouts(SHAPES)
    rollouts[0].completion_mask_T[2:5] = False
    return rollouts


def weighted(make_config, weights: dict[str, float], **fields) -> DistillConfig:
    return make_config({name: DomainConfig(loss_weight=weight) for name, weight in weights.items()}, optim=PLAIN_ADAM, **fields)


def one_update(engine: Engine, pool: TeacherPool, rollouts: list[Rollout], cfg: DistillConfig) -> tuple[dict[str, float], dict[str, torch.Tensor]]:
    """(metrics, change of each weight) of one real update."""
    before = engine.full_weights()
    metrics = update(engine, pool, pool.score(rollouts), cfg)
    return metrics, {name: tensor - before[name] for name, tensor in engine.full_weights().items()}


def naive_step(student, teachers: dict, rollouts: list[Rollout], weights: dict[str, float], vocab_size: int) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """(loss, gradients): the formula, rollout by rollout and without padding, from whole logits."""
    tokens = {name: sum(r.num_loss_tokens for r in rollouts if r.prompt.domain == name) for name in weights}
    loss = torch.zeros(())
    for rollout in rollouts:
        ids = torch.tensor([[*rollout.prompt.tokens, *rollout.completion_T.tolist()]])
        first = len(rollout.prompt.tokens) - 1
        log_p_TV = student(input_ids=ids).logits[0, first:-1, :vocab_size].log_softmax(-1)
        with torch.no_grad():
            log_q_TV = teachers[rollout.prompt.domain](input_ids=ids).logits[0, first:-1, :vocab_size].log_softmax(-1)
        kl_T = (log_p_TV.exp() * (log_p_TV - log_q_TV)).sum(-1)
        loss = loss + weights[rollout.prompt.domain] / tokens[rollout.prompt.domain] * kl_T[rollout.completion_mask_T].sum()
    names, parameters = zip(*[(name, p) for name, p in student.named_parameters() if p.requires_grad], strict=True)
    return loss.detach(), dict(zip(names, torch.autograd.grad(loss, parameters), strict=True))


def assert_same_changes(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor], tolerance: float = 1e-5) -> None:
    assert max(tensor.abs().max() for tensor in one.values()) > 1e-2, "nothing moved, so the comparison shows nothing"
    for name in one:
        torch.testing.assert_close(one[name], other[name], rtol=0, atol=tolerance, msg=lambda text, name=name: f"{name}: {text}")


def test_loss_and_update_are_those_of_the_formula(v4_model, make_pool, make_engine, make_config, rollouts, tokenizer):
    weights = {"law": 0.75, "code": 0.25}
    pool = make_pool({"law": "v4", "code": "qwen3_moe"})
    cfg = weighted(make_config, weights, max_tokens=30)
    metrics, changes = one_update(make_engine(v4_model, cfg), pool, rollouts, cfg)
    teachers = {name: pool.get(teacher).model for name, teacher in pool.teacher_of.items()}
    loss, gradients = naive_step(v4_model, teachers, rollouts, weights, len(tokenizer))
    assert metrics["step/loss"] == pytest.approx(float(loss), rel=1e-5)
    assert_same_changes({name: changes[name] for name in gradients}, {name: -g / (g.abs() + 1) for name, g in gradients.items()}, tolerance=2e-5)


@pytest.mark.parametrize("family", ["v4", "qwen3_moe"])
@pytest.mark.parametrize("max_tokens", [1, 30])
def test_micro_batch_size_changes_neither_loss_nor_update(family, max_tokens, v4_model, qwen3_moe_model, make_pool, make_engine, make_config, rollouts):
    model = {"v4": v4_model, "qwen3_moe": qwen3_moe_model}[family]
    found = []
    for size in (max_tokens, 1000):
        cfg = weighted(make_config, {"law": 0.75, "code": 0.25}, max_tokens=size)
        found.append(one_update(make_engine(model, cfg), make_pool({"law": "v4", "code": "qwen3_moe"}), rollouts, cfg))
    (metrics, changes), (other_metrics, other_changes) = found
    assert metrics["step/loss"] == pytest.approx(other_metrics["step/loss"], rel=1e-5)
    assert metrics["optim/grad_norm"] == pytest.approx(other_metrics["optim/grad_norm"], rel=1e-5)
    assert_same_changes(changes, other_changes)


def test_order_of_the_rollouts_changes_neither_loss_nor_update(v4_model, make_pool, make_engine, make_config, rollouts):
    cfg = weighted(make_config, {"law": 0.75, "code": 0.25}, max_tokens=40)
    pool = make_pool({"law": "v4", "code": "qwen3_moe"})
    metrics, changes = one_update(make_engine(v4_model, cfg), pool, rollouts, cfg)
    other_metrics, other_changes = one_update(make_engine(v4_model, cfg), pool, rollouts[::-1], cfg)
    assert metrics["step/loss"] == pytest.approx(other_metrics["step/loss"], rel=1e-5)
    assert_same_changes(changes, other_changes)


def test_a_domain_without_rollouts_gives_its_weight_to_those_present(v4_model, make_pool, make_engine, make_config, rollouts):
    law = [rollout for rollout in rollouts if rollout.prompt.domain == "law"]
    pool = make_pool({"law": "v4", "code": "qwen3_moe"})
    both, alone = weighted(make_config, {"law": 0.2, "code": 0.8}), weighted(make_config, {"law": 1.0})
    metrics, changes = one_update(make_engine(v4_model, both), pool, law, both)
    other_metrics, other_changes = one_update(make_engine(v4_model, alone), pool, law, alone)
    assert metrics["step/loss"] == other_metrics["step/loss"]
    assert_same_changes(changes, other_changes, tolerance=0)


def test_a_teacher_equal_to_the_student_gives_zero_loss_and_moves_nothing(v4_model, make_pool, make_engine, make_config, rollouts):
    cfg = weighted(make_config, {"law": 0.5, "code": 0.5}, max_tokens=60)
    metrics, changes = one_update(make_engine(v4_model, cfg), make_pool({"law": "student", "code": "student"}, max_tokens=60), rollouts, cfg)
    assert metrics["step/loss"] == 0.0
    assert metrics["optim/grad_norm"] == 0.0
    assert all((change == 0).all() for change in changes.values())


def test_two_domains_with_one_checkpoint_give_the_divergence_of_one_domain(v4_model, make_pool, make_engine, make_config, rollouts, make_rollout):
    """Its loss too, when the weights are in proportion to the tokens."""
    tokens = {name: sum(r.num_loss_tokens for r in rollouts if r.prompt.domain == name) for name in ("law", "code")}
    two = weighted(make_config, {name: float(count) for name, count in tokens.items()}, max_tokens=60)
    metrics, changes = one_update(make_engine(v4_model, two), make_pool({"law": "v4", "code": "v4"}), rollouts, two)

    merged = [make_rollout("all", r.prompt.tokens, r.completion_T.tolist(), mask=r.completion_mask_T.tolist(), request=r.prompt.request) for r in rollouts]
    one = weighted(make_config, {"all": 1.0}, max_tokens=60)
    single, other_changes = one_update(make_engine(v4_model, one), make_pool({"all": "v4"}), merged, one)
    per_token = sum(metrics[f"domain/{name}/kl_per_token"] * count for name, count in tokens.items()) / sum(tokens.values())
    assert per_token == pytest.approx(single["domain/all/kl_per_token"], rel=1e-6)
    assert metrics["step/loss"] == pytest.approx(single["step/loss"], rel=1e-6)
    assert_same_changes(changes, other_changes)
    assert metrics["system/teacher_loads"] == 1


def test_supervised_update_is_the_weighted_cross_entropy(v4_model, make_engine, make_config, rollouts, tokenizer):
    cfg = weighted(make_config, {"law": 0.75, "code": 0.25}, max_tokens=60)
    metrics = supervised_update(make_engine(v4_model, cfg), rollouts, cfg)
    expected, tokens = 0.0, {name: sum(r.num_loss_tokens for r in rollouts if r.prompt.domain == name) for name in cfg.domains}
    for rollout in rollouts:
        ids = torch.tensor([[*rollout.prompt.tokens, *rollout.completion_T.tolist()]])
        with torch.no_grad():
            logits_TV = v4_model(input_ids=ids).logits[0, len(rollout.prompt.tokens) - 1 : -1]
        loss_T = torch.nn.functional.cross_entropy(logits_TV, rollout.completion_T, reduction="none")
        domain = rollout.prompt.domain
        expected += cfg.domains[domain].loss_weight / tokens[domain] * float(loss_T[rollout.completion_mask_T].sum())
    assert metrics["step/loss"] == pytest.approx(expected, rel=1e-5)


def test_weights_of_domains_follow_their_schedules_and_divide_by_tokens(make_config, rollouts):
    cfg = weighted(make_config, {"law": {0: 1.0, 5: 3.0}, "code": 1.0, "absent": 4.0})
    tokens = {name: sum(r.num_loss_tokens for r in rollouts if r.prompt.domain == name) for name in ("law", "code")}
    for step, share in [(4, 0.5), (5, 0.75)]:
        weights, metrics = domain_weights(rollouts, cfg, step)
        assert weights == pytest.approx({"law": share / tokens["law"], "code": (1 - share) / tokens["code"], "absent": 0.0})
        assert [metrics[f"domain/{name}/loss_weight"] for name in cfg.domains] == pytest.approx([share, 1 - share, 0.0])
    assert metrics["domain/absent/loss_weight_asked"] == pytest.approx(0.5)


@pytest.mark.parametrize("weights", [{"law": 0.0, "code": 0.0}, {"law": 0.0, "code": 0.0, "absent": 1.0}])
def test_a_step_in_which_no_token_has_weight_is_refused(weights, make_config, rollouts):
    with pytest.raises(ValueError, match="loss_weight above 0"):
        domain_weights(rollouts, weighted(make_config, weights), 3)


def test_a_loss_that_is_not_finite_is_refused_with_the_request_that_gave_it(v4_model, make_pool, make_engine, make_config, make_rollout):
    pool, cfg = make_pool({"law": "v4"}), weighted(make_config, {"law": 1.0})
    with torch.no_grad():
        v4_model.get_input_embeddings().weight[7] = float("nan")
    engine = make_engine(v4_model, cfg)
    rollouts = [make_rollout("law", [5, 6], [8, 9], request=3), make_rollout("law", [5, 7], [8, 9], request=4)]
    with pytest.raises(ValueError, match=r"not finite on request 4 of domain law \(row prompts:4\)"):
        update(engine, pool, pool.score(rollouts), cfg)


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_a_loss_that_is_not_finite_in_a_later_micro_batch_leaves_weights_and_optimizer(stage, v4_model, make_pool, make_engine, make_config, make_rollout):
    """The third of four micro-batches, of another domain than the first: what came before it is not applied either."""
    cfg = weighted(make_config, {"law": 0.5, "code": 0.5}, max_tokens=1, stage=stage)
    pool = make_pool({"law": "v4", "code": "v4"})
    with torch.no_grad():
        v4_model.get_input_embeddings().weight[7] = float("nan")
    engine = make_engine(v4_model, cfg)
    good = [make_rollout("law", [5, 6], [8, 9], request=1), make_rollout("code", [5, 6], [8], request=2)]
    update(engine, pool, pool.score(good), cfg)
    before, moments_before = engine.full_weights(), moments(engine)
    bad = [make_rollout("law", [5, 6, 8], [8], request=3), make_rollout("law", [5, 6], [8, 9, 9], request=4)]
    bad += [make_rollout("code", [5, 7, 8], [8, 9, 8], request=5), make_rollout("law", [5, 7], [8, 9, 9, 8, 9], request=6)]
    with pytest.raises(ValueError, match=r"loss of step 2 is not finite on request 5 of domain code \(row prompts:5\), request 6 of domain law"):
        update(engine, pool, pool.score(bad), cfg)
    after = engine.full_weights()
    assert all(torch.equal(after[name].nan_to_num(), before[name].nan_to_num()) for name in before)
    assert len(moments_before) > 2
    assert all(torch.equal(one, other) for one, other in zip(moments(engine), moments_before, strict=True))


@pytest.fixture
def skipping(v4_model, make_pool, make_engine, make_config, make_rollout) -> Callable[[bool], dict[str, float]]:
    """skipping(is_bad): one update of a run that may skip two steps in a row, whose loss is not finite on request 4 where it is bad."""
    pool, cfg = make_pool({"law": "v4"}), make_config({"law": DomainConfig()}, optim={"max_skipped_steps": 2})
    with torch.no_grad():
        v4_model.get_input_embeddings().weight[7] = float("nan")
    engine = make_engine(v4_model, cfg)

    def step(is_bad: bool) -> dict[str, float]:
        rollouts = [make_rollout("law", [5, 6], [8, 9], request=3), make_rollout("law", [5, 7 if is_bad else 8], [8, 9], request=4)]
        return update(engine, pool, pool.score(rollouts), cfg)

    return step


def test_as_many_skipped_steps_as_allowed_are_counted_and_named_and_one_more_stops(skipping, caplog):
    assert [skipping(is_bad)["optim/skipped_steps"] for is_bad in (True, True, False, True, True)] == [1, 2, 2, 3, 4]
    assert caplog.messages[-1].startswith("the loss of step 5 is not finite on request 4 of domain law (row prompts:4): its update is skipped (2 of at most 2")
    with pytest.raises(ValueError, match=r"the loss of step 6 is not finite on request 4 .* after 2 before it that were skipped"):
        skipping(True)


def test_a_skipped_step_has_no_metric_that_is_not_finite(skipping):
    metrics = skipping(True)
    assert all(math.isfinite(value) for value in metrics.values())
    assert "step/loss" not in metrics
    assert "step/loss" in skipping(False)


def test_a_gradient_that_is_not_finite_under_finite_losses_is_said_to_be_alone(v4_model, make_pool, make_engine, make_config, make_rollout):
    pool, cfg = make_pool({"law": "v4"}), weighted(make_config, {"law": 1.0})
    engine = make_engine(v4_model, cfg)
    engine.model.get_input_embeddings().weight.register_hook(lambda gradient: gradient * math.inf)
    with pytest.raises(ValueError, match="the gradient of step 1 is not finite, though every loss is: look at these rollouts"):
        update(engine, pool, pool.score([make_rollout("law", [5, 6], [8, 9], request=3)]), cfg)


def moments(engine: Engine) -> list[torch.Tensor]:
    """Copies of what the AdamW inside keeps."""
    adamw = getattr(engine.engine.optimizer, "optimizer", engine.engine.optimizer)
    return [tensor.detach().clone() for state in adamw.state.values() for tensor in state.values()]


@pytest.mark.parametrize("stage", [0, 1, 2])
def test_gradient_shares_and_cosines_are_those_of_each_teachers_part_of_the_gradient(stage, v4_model, make_pool, make_engine, make_config, rollouts, tokenizer):
    cfg = weighted(make_config, {"law": 0.75, "code": 0.25}, max_tokens=60, stage=stage)
    pool = make_pool({"law": "v4", "code": "qwen3_moe"})
    teachers = {name: load_model(pool.configs[teacher][1], "teacher") for name, teacher in pool.teacher_of.items()}
    whole = {}
    for name in teachers:
        own = [rollout for rollout in rollouts if rollout.prompt.domain == name]
        _, gradients = naive_step(v4_model, teachers, own, {name: {"law": 0.75, "code": 0.25}[name]}, len(tokenizer))
        whole[name] = torch.cat([gradient.flatten() for gradient in gradients.values()])
    norms = {name: float(gradient.norm()) for name, gradient in whole.items()}
    metrics, measured = one_update(make_engine(v4_model, cfg), pool, rollouts, cfg)
    for name, norm in norms.items():
        assert metrics[f"teacher/{name}/gradient_share"] == pytest.approx(norm / sum(norms.values()), rel=1e-4)
    [cosine] = [value for name, value in metrics.items() if name in ("conflict/law/code/gradient_cosine", "conflict/code/law/gradient_cosine")]
    assert cosine == pytest.approx(float(whole["law"] @ whole["code"]) / (norms["law"] * norms["code"]), abs=1e-5)
    cfg.teachers.gradient_share_every = 0
    metrics, unmeasured = one_update(make_engine(v4_model, cfg), pool, rollouts, cfg)
    assert not any(name.endswith(("gradient_share", "gradient_cosine")) for name in metrics)
    assert_same_changes(measured, unmeasured)
