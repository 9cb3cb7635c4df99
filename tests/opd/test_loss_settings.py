"""Settings of the loss and of what teachers give: refusals, one step against autograd over whole logits, other families, a whole run."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from opd.__main__ import load_config
from opd.config import DistillConfig
from opd.distill import distill
from opd.engine import Engine
from opd.loss_config import DivergenceKind, LossConfig
from opd.update import update
from rollout.config import Dtype, ModelConfig
from rollout.model import build_model, save_model
from rollout.types import Rollout
from teachers.config import DomainConfig, SignalKind, TeacherConfig, TeachersConfig
from teachers.pool import TeacherPool

# What a configuration may hold


@pytest.mark.parametrize(
    ("overrides", "sentence"),
    [
        (["loss.smoothing=1"], "loss.smoothing must be from 0 to below 1, not 1.0"),
        (["loss.smoothing=-0.1"], "loss.smoothing must be from 0 to below 1, not -0.1"),
        (["loss.smoothing=nan"], "loss.smoothing must be from 0 to below 1, not nan"),
        (["loss.beta=2"], "loss.beta must be from 0 (forward KL) to 1 (reverse KL), not 2.0"),
        (["loss.beta=nan"], "loss.beta must be from 0 (forward KL) to 1 (reverse KL), not nan"),
        (["loss.temperature=0"], "loss.temperature must be above 0 and finite, not 0.0"),
        (["loss.temperature=inf"], "loss.temperature must be above 0 and finite, not inf"),
        (["loss.beta=0.3"], "loss.beta belongs to loss.kind=jsd and would be ignored with reverse_kl: remove it"),
        (["teachers.top_k=8"], "teachers.top_k belongs to teachers.signal=top_k and would be ignored with hidden_states: remove it"),
        (["loss.cap=0"], "loss.cap must be above 0, not 0.0: null has no cap"),
        (["loss.cap=nan"], "loss.cap must be above 0, not nan: null has no cap"),
        (["teachers.top_k=0"], "teachers.top_k must be at least 1, not 0"),
        (["teachers.signal=top_k", "loss.policy_gradient=true"], "teachers.signal=top_k gives less: remove one"),
        (["teachers.signal=sampled_token", "loss.policy_gradient=true"], "teachers.signal=sampled_token gives less: remove one"),
        (["teachers.signal=top_k", "loss.temperature=2"], "use teachers.signal=hidden_states"),
        (["teachers.signal=sampled_token", "loss.temperature=2"], "use teachers.signal=hidden_states"),
        (["teachers.signal=top_k", "loss.backend=triton"], "loss.backend=triton would be ignored with teachers.signal=top_k: remove it"),
        (["loss.policy_gradient=true", "loss.temperature=2"], "remove loss.kind, loss.smoothing and loss.temperature, or loss.policy_gradient=true"),
        (["teachers.signal=sampled_token", "loss.kind=jsd"], "remove loss.kind, loss.smoothing and loss.temperature, or teachers.signal=sampled_token"),
        (["teachers.signal=sampled_token", "loss.smoothing=0.1"], "teachers.signal=sampled_token estimates reverse KL at temperature 1"),
        (["loss.policy_gradient=true", "loss.kind=forward_kl"], "loss.policy_gradient=true estimates reverse KL at temperature 1"),
        (["loss.policy_gradient=true", "rollout.temperature=0.5"], "rollout.temperature=0.5 would bias loss.policy_gradient=true"),
        (["loss.policy_gradient=true", "rollout.replay=runs/one"], "rollout.replay would bias loss.policy_gradient=true"),
        (["teachers.signal=sampled_token", "rollout.temperature=0.5"], "use rollout.temperature=1"),
        (["loss.kind=k1"], "loss.kind: Invalid value 'k1', expected one of [reverse_kl, forward_kl, jsd]"),
        (["loss.kind=partial_top_k"], "loss.kind: Invalid value 'partial_top_k', expected one of [reverse_kl, forward_kl, jsd]"),
        (["teachers.signal=topk"], "teachers.signal: Invalid value 'topk', expected one of [hidden_states, top_k, sampled_token]"),
        (["loss.backend=cuda"], "loss.backend: Invalid value 'cuda', expected one of [auto, eager, compiled, triton]"),
        (["loss.smooth=0.1"], "distill has no setting 'loss.smooth' (did you mean 'loss.smoothing'?)"),
    ],
)
def test_a_loss_that_cannot_be_computed_is_refused_in_one_sentence_with_the_fix(overrides, sentence):
    with pytest.raises(ValueError) as error:  # noqa: PT011 - the test looks at the sentence
        load_config("distill", overrides)
    assert sentence in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "overrides",
    [
        ["loss.kind=forward_kl", "loss.temperature=2", "loss.smoothing=0.1", "loss.cap=3", "rollout.temperature=0.5"],
        ["loss.kind=jsd", "loss.beta=0"],
        ["loss.kind=jsd", "loss.beta=1", "loss.cap=null"],
        ["teachers.signal=top_k", "teachers.top_k=1", "loss.kind=jsd", "loss.smoothing=0.1", "loss.cap=3", "rollout.temperature=0.5"],
        ["teachers.signal=sampled_token", "loss.cap=2"],
        ["loss.policy_gradient=true", "loss.cap=2"],
    ],
)
def test_settings_that_go_together_are_accepted(overrides):
    assert isinstance(load_config("distill", overrides), DistillConfig)


def test_an_evaluation_refuses_a_signal_that_it_would_ignore():
    with pytest.raises(ValueError, match="signal would be ignored"):
        load_config("evaluate", ["teachers.signal=top_k"])


@pytest.mark.parametrize("command", ["specialize", "evaluate", "pipeline"])
def test_commands_without_a_divergence_to_choose_have_no_loss(command):
    with pytest.raises(ValueError, match=f"{command} has no setting 'loss'"):
        load_config(command, ["loss.kind=jsd"])


# One step against autograd through the whole model

SHAPES = [("law", 3, 9), ("code", 9, 2), ("law", 6, 4), ("code", 2, 12), ("law", 12, 1), ("code", 5, 5), ("law", 1, 7)]
WEIGHTS = {"law": 0.75, "code": 0.25}
K = 6
TOP_K, SAMPLED = TeachersConfig(signal=SignalKind.top_k, top_k=K, max_resident=2), TeachersConfig(signal=SignalKind.sampled_token, max_resident=2)
WHOLE = TeachersConfig(max_resident=2)
FORWARD, JSD = DivergenceKind.forward_kl, DivergenceKind.jsd
CASES = {
    "reverse": (LossConfig(), WHOLE),
    "forward": (LossConfig(kind=FORWARD), WHOLE),
    "jsd": (LossConfig(kind=JSD, beta=0.3), WHOLE),
    "jsd at temperature 2": (LossConfig(kind=JSD, temperature=2.0), WHOLE),
    "temperature 2": (LossConfig(temperature=2.0), WHOLE),
    "smoothing": (LossConfig(smoothing=0.2), WHOLE),
    "forward with smoothing": (LossConfig(kind=FORWARD, smoothing=0.2), WHOLE),
    "jsd with smoothing": (LossConfig(kind=JSD, beta=0.3, smoothing=0.2), WHOLE),
    "cap": (LossConfig(cap=0.9), WHOLE),
    "policy gradient": (LossConfig(policy_gradient=True), WHOLE),
    "policy gradient with cap": (LossConfig(policy_gradient=True, cap=0.7), WHOLE),
    "top-k": (LossConfig(), TOP_K),
    "top-k, forward": (LossConfig(kind=FORWARD), TOP_K),
    "top-k, jsd with smoothing and cap": (LossConfig(kind=JSD, beta=0.7, smoothing=0.1, cap=0.04), TOP_K),
    "sampled token": (LossConfig(), SAMPLED),
    "sampled token with cap": (LossConfig(cap=1.0), SAMPLED),
}


@pytest.fixture
def new_pool(teacher_folders, saved_qwen3_moe, tokenizer, device) -> Callable[..., TeacherPool]:
    """new_pool({"law": "v4"}, TOP_K): "v4" and "qwen3_moe" are teachers, "student" is the student's own checkpoint; or folders."""
    folders = {name: str(folder) for name, folder in (teacher_folders | {"student": saved_qwen3_moe}).items()}

    def make(teacher_of: dict[str, str], teachers: TeachersConfig, **model) -> TeacherPool:
        domains = {name: DomainConfig(teacher=TeacherConfig(model=folders.get(teacher, teacher), **model)) for name, teacher in teacher_of.items()}
        return TeacherPool(domains, teachers, tokenizer, device)

    return make


@pytest.fixture
def rollouts(random_rollouts) -> list[Rollout]:
    """Seven rollouts of two domains, one with environment tokens in its completion."""
    rollouts = random_rollouts(SHAPES)
    rollouts[0].completion_mask_T[2:5] = False
    return rollouts


@pytest.fixture
def new_cfg(make_config) -> Callable[..., DistillConfig]:
    """new_cfg(loss, teachers): with eps 1 the first update is g / (|g| + 1), so that equal updates mean equal gradients."""

    def make(loss: LossConfig, teachers: TeachersConfig, weights: dict[str, float] = WEIGHTS, **fields) -> DistillConfig:
        domains = {name: DomainConfig(loss_weight=weight) for name, weight in weights.items()}
        return make_config(domains, optim={"lr": 1.0, "eps": 1.0, "clip_norm": None}, loss=loss, teachers=teachers, **({"max_tokens": 30} | fields))

    return make


def one_update(engine: Engine, pool: TeacherPool, rollouts: list[Rollout], cfg: DistillConfig) -> tuple[dict[str, float], dict[str, torch.Tensor]]:
    """(metrics, change of each weight) of one real update."""
    before = engine.full_weights()
    metrics = update(engine, pool, pool.score(rollouts), cfg)
    return metrics, {name: tensor - before[name] for name, tensor in engine.full_weights().items()}


def naive_divergence(log_p: torch.Tensor, log_q: torch.Tensor, loss: LossConfig) -> torch.Tensor:
    """The divergence of each row's two distributions, by definition."""
    p, q = log_p.exp(), log_q.exp()
    if loss.smoothing:
        q = (1 - loss.smoothing) * q + loss.smoothing * p
    if loss.kind is DivergenceKind.reverse_kl:
        return (p * (log_p - q.log())).sum(-1)
    if loss.kind is DivergenceKind.forward_kl:
        return (q * (q.log() - log_p)).sum(-1)
    m = (1 - loss.beta) * p + loss.beta * q
    return ((1 - loss.beta) * p * (p / m).log() + loss.beta * q * (q / m).log()).sum(-1)


def coarse(log_TV: torch.Tensor, token_TK: torch.Tensor) -> torch.Tensor:
    """Log-probabilities of some tokens and of all others together."""
    named = torch.zeros_like(log_TV, dtype=torch.bool).scatter(1, token_TK, True)
    tail_T1 = log_TV.masked_fill(named, -torch.inf).logsumexp(-1, keepdim=True)
    return torch.cat([log_TV.gather(1, token_TK), tail_T1], dim=1)


def naive_losses(student_TV: torch.Tensor, teacher_TV: torch.Tensor, sampled_T: torch.Tensor, loss: LossConfig, signal: SignalKind) -> torch.Tensor:
    """Loss of each token from the whole logits of both, with the gradients it should have."""
    log_p, log_q = (student_TV / loss.temperature).log_softmax(-1), (teacher_TV / loss.temperature).log_softmax(-1)
    if signal is SignalKind.sampled_token or loss.policy_gradient:
        p_y, q_y = (log.gather(1, sampled_T[:, None])[:, 0] for log in (log_p, log_q))
        value = p_y - q_y if signal is SignalKind.sampled_token else naive_divergence(log_p, log_q, loss)
        advantage = q_y - p_y if signal is SignalKind.sampled_token else value + q_y - p_y
        advantage = advantage if loss.cap is None else advantage.clamp(-loss.cap, loss.cap)
        with_gradient = -advantage.detach() * p_y
        return value.detach() + with_gradient - with_gradient.detach()
    if signal is SignalKind.top_k:
        token_TK = log_q.topk(K, dim=1).indices
        log_p, log_q = coarse(log_p, token_TK), coarse(log_q, token_TK)
    value = naive_divergence(log_p, log_q, loss)
    return value if loss.cap is None else value.clamp(max=loss.cap)


def naive_step(student, teachers: dict, rollouts: list[Rollout], weights: dict[str, float], vocab_size: int, loss: LossConfig, signal: SignalKind):
    """(the step's loss, gradients), rollout by rollout and without padding."""
    tokens = {name: sum(r.num_loss_tokens for r in rollouts if r.prompt.domain == name) for name in weights}
    total = torch.zeros((), dtype=torch.float64)
    for rollout in rollouts:
        ids = torch.tensor([[*rollout.prompt.tokens, *rollout.completion_T.tolist()]])
        first = len(rollout.prompt.tokens) - 1
        student_TV = student(input_ids=ids).logits[0, first:-1, :vocab_size].double()
        with torch.no_grad():
            teacher_TV = teachers[rollout.prompt.domain](input_ids=ids).logits[0, first:-1, :vocab_size].double()
        loss_T = naive_losses(student_TV, teacher_TV, rollout.completion_T, loss, signal)[rollout.completion_mask_T]
        total = total + weights[rollout.prompt.domain] / tokens[rollout.prompt.domain] * loss_T.sum()
    names, parameters = zip(*[(name, p) for name, p in student.named_parameters() if p.requires_grad], strict=True)
    return float(total), dict(zip(names, torch.autograd.grad(total, parameters), strict=True))


def models_of(pool: TeacherPool) -> dict:
    return {name: pool.get(teacher).model for name, teacher in pool.teacher_of.items()}


def assert_same_changes(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    """To a thousandth of the largest change."""
    largest = float(max(tensor.abs().max() for tensor in one.values()))
    assert largest > 2e-3, "nothing moved, so the comparison shows nothing"
    for name in one:
        torch.testing.assert_close(one[name], other[name], rtol=0, atol=1e-3 * largest, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("case", CASES)
def test_loss_and_update_are_those_of_the_formula(case, qwen3_moe_model, new_pool, make_engine, new_cfg, rollouts, tokenizer):
    loss, teachers = CASES[case]
    pool, cfg = new_pool({"law": "v4", "code": "qwen3_moe"}, teachers), new_cfg(loss, teachers)
    metrics, changes = one_update(make_engine(qwen3_moe_model, cfg), pool, rollouts, cfg)
    expected, gradients = naive_step(qwen3_moe_model, models_of(pool), rollouts, WEIGHTS, len(tokenizer), loss, teachers.signal)
    assert metrics["step/loss"] == pytest.approx(expected, rel=1e-5)
    assert_same_changes({name: changes[name] for name in gradients}, {name: -g / (g.abs() + 1) for name, g in gradients.items()})


@pytest.mark.parametrize("case", [case for case, (loss, _) in CASES.items() if loss.cap is not None])
def test_the_caps_of_the_cases_hold_back_some_tokens_and_not_all(case, qwen3_moe_model, new_pool, rollouts, tokenizer):
    """Else the comparisons with the formula would show nothing about them."""
    loss, teachers = CASES[case]
    models = models_of(new_pool({"law": "v4", "code": "qwen3_moe"}, teachers))
    found = [naive_step(qwen3_moe_model, models, rollouts, WEIGHTS, len(tokenizer), one, teachers.signal)[1] for one in (loss, replace(loss, cap=None))]
    heads = [gradients["lm_head.weight"].norm() for gradients in found]
    assert 0.05 * heads[1] < heads[0] < 0.99 * heads[1]


@pytest.mark.parametrize("case", ["top-k", "sampled token"])
def test_the_formula_holds_for_a_deepseek_student_too(case, v4_model, new_pool, make_engine, new_cfg, rollouts, tokenizer):
    loss, teachers = CASES[case]
    pool, cfg = new_pool({"law": "v4", "code": "qwen3_moe"}, teachers), new_cfg(loss, teachers)
    metrics, changes = one_update(make_engine(v4_model, cfg), pool, rollouts, cfg)
    expected, gradients = naive_step(v4_model, models_of(pool), rollouts, WEIGHTS, len(tokenizer), loss, teachers.signal)
    assert metrics["step/loss"] == pytest.approx(expected, rel=1e-5)
    assert_same_changes({name: changes[name] for name in gradients}, {name: -g / (g.abs() + 1) for name, g in gradients.items()})


# Properties 1 and 2 of the objective


@pytest.mark.parametrize(("case", "max_tokens"), [("top-k", 30), ("sampled token", 1)])
def test_micro_batch_size_and_order_change_neither_loss_nor_update(case, max_tokens, qwen3_moe_model, new_pool, make_engine, new_cfg, rollouts):
    loss, teachers = CASES[case]
    found = []
    for size, order in ((max_tokens, rollouts[::-1]), (1000, rollouts)):
        cfg = new_cfg(loss, teachers, max_tokens=size)
        found.append(one_update(make_engine(qwen3_moe_model, cfg), new_pool({"law": "v4", "code": "qwen3_moe"}, teachers), order, cfg))
    (metrics, changes), (other_metrics, other_changes) = found
    assert metrics["step/loss"] == pytest.approx(other_metrics["step/loss"], rel=1e-5)
    assert metrics["optim/grad_norm"] == pytest.approx(other_metrics["optim/grad_norm"], rel=1e-5)
    assert_same_changes(changes, other_changes)


@pytest.mark.parametrize("case", ["forward", "jsd", "temperature 2", "smoothing", "top-k", "sampled token"])
def test_a_teacher_equal_to_the_student_gives_zero_loss_and_no_gradient(case, qwen3_moe_model, new_pool, make_engine, new_cfg, rollouts):
    """To rounding of float32 at entropies near 5; the plain reverse KL is exactly 0 (tests/opd/test_update.py)."""
    loss, teachers = CASES[case]
    cfg, pool = new_cfg(loss, teachers, max_tokens=60), new_pool({"law": "student", "code": "student"}, teachers)
    metrics, changes = one_update(make_engine(qwen3_moe_model, cfg), pool, rollouts, cfg)
    assert metrics["step/loss"] == pytest.approx(0.0, abs=2e-7)
    assert metrics["optim/grad_norm"] == pytest.approx(0.0, abs=2e-6)
    assert max(change.abs().max() for change in changes.values()) < 1e-6


# Families with a scale or a soft cap

HEADS = {"hidden_size": 48, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 2}
SPECIAL = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "max_position_embeddings": 256, "tie_word_embeddings": False}
FAMILIES = {
    "gemma2 capped at 8": {"model_type": "gemma2", "head_dim": 24, "final_logit_softcapping": 8.0},
    "gemma2 capped at 3": {"model_type": "gemma2", "head_dim": 24, "final_logit_softcapping": 3.0, "hidden_size": 32},
    "granite": {"model_type": "granite", "logits_scaling": 4.0},
    "cohere": {"model_type": "cohere", "logit_scale": 0.5},
    "qwen3_moe": {},
}


@pytest.fixture
def new_family(new_student, tokenizer) -> Callable:
    """new_family("granite", seed=1): a tiny model of FAMILIES whose products are large enough for caps and scales to matter."""

    def build(name: str, seed: int):
        torch.manual_seed(seed)
        if not FAMILIES[name]:
            model = new_student("qwen3_moe_tiny", seed=seed)
        else:
            model = build_model(HEADS | SPECIAL | FAMILIES[name], len(tokenizer), ModelConfig(), name).eval()
        with torch.no_grad():
            head, ids = model.get_output_embeddings(), torch.arange(3, 40)[None]
            head.weight.mul_(5 / head(model.base_model(input_ids=ids, use_cache=False)[0]).std())
        return model

    return build


@pytest.mark.parametrize(
    ("student", "teacher"),
    [("gemma2 capped at 8", "gemma2 capped at 3"), ("granite", "cohere"), ("cohere", "gemma2 capped at 3"), ("qwen3_moe", "gemma2 capped at 8")],
)
@pytest.mark.parametrize("case", ["temperature 2", "top-k"])
def test_loss_and_update_are_those_of_both_models_own_logits(student, teacher, case, new_family, new_pool, make_engine, new_cfg, rollouts, tokenizer, tmp_path):
    loss, teachers = CASES[case]
    model, frozen = new_family(student, seed=0), new_family(teacher, seed=1)
    save_model(tmp_path / "teacher", frozen, tokenizer, frozen.state_dict())
    law = [rollout for rollout in rollouts if rollout.prompt.domain == "law"]
    pool, cfg = new_pool({"law": str(tmp_path / "teacher")}, teachers), new_cfg(loss, teachers, {"law": 1.0})
    metrics, changes = one_update(make_engine(model, cfg), pool, law, cfg)
    expected, gradients = naive_step(model, {"law": frozen}, law, {"law": 1.0}, len(tokenizer), loss, teachers.signal)
    assert metrics["step/loss"] == pytest.approx(expected, rel=1e-5)
    assert_same_changes({name: changes[name] for name in gradients}, {name: -g / (g.abs() + 1) for name, g in gradients.items()})


# Partitioned and tied heads, precisions, recomputation


@pytest.mark.parametrize(("case", "tied"), [("reverse", True), ("top-k", False)])
def test_a_partitioned_head_gives_the_loss_and_update_of_a_whole_one(case, tied, new_student, new_pool, make_engine, new_cfg, rollouts, tokenizer):
    loss, teachers = CASES[case]
    model, found = new_student("qwen3_moe_tiny", tie_word_embeddings=tied), {}
    for stage in (0, 3):
        cfg = new_cfg(loss, teachers, stage=stage)
        found[stage] = one_update(make_engine(model, cfg), new_pool({"law": "v4", "code": "qwen3_moe"}, teachers), rollouts, cfg)
    assert found[3][0]["step/loss"] == pytest.approx(found[0][0]["step/loss"], rel=1e-6)
    assert_same_changes(found[3][1], found[0][1])


@pytest.mark.parametrize("case", ["top-k"])
def test_a_tied_head_gets_the_gradients_of_embedding_and_head(case, new_student, new_pool, make_engine, new_cfg, rollouts, tokenizer):
    loss, teachers = CASES[case]
    model = new_student("qwen3_moe_tiny", tie_word_embeddings=True)
    pool, cfg = new_pool({"law": "v4", "code": "qwen3_moe"}, teachers), new_cfg(loss, teachers)
    _, changes = one_update(make_engine(model, cfg), pool, rollouts, cfg)
    _, gradients = naive_step(model, models_of(pool), rollouts, WEIGHTS, len(tokenizer), loss, teachers.signal)
    assert_same_changes({name: changes[name] for name in gradients}, {name: -g / (g.abs() + 1) for name, g in gradients.items()})


@pytest.mark.parametrize("case", ["jsd"])
@pytest.mark.parametrize(("student_dtype", "teacher_dtype"), [(Dtype.bfloat16, Dtype.float32), (Dtype.float32, Dtype.bfloat16)])
def test_student_and_teacher_may_differ_in_precision(case, student_dtype, teacher_dtype, new_student, new_pool, make_engine, new_cfg, rollouts):
    """bfloat16 rounds hidden states and weights, so that losses agree with those of float32 to a per cent."""
    loss, teachers = CASES[case]
    losses = []
    for dtypes in [(Dtype.float32, Dtype.float32), (student_dtype, teacher_dtype)]:
        model = new_student("qwen3_moe_tiny").to(getattr(torch, dtypes[0].value))
        cfg, pool = new_cfg(loss, teachers), new_pool({"law": "v4", "code": "qwen3_moe"}, teachers, dtype=dtypes[1])
        metrics, changes = one_update(make_engine(model, cfg), pool, rollouts, cfg)
        losses.append(metrics["step/loss"])
        assert all(change.isfinite().all() for change in changes.values())
        assert changes["lm_head.weight"].abs().max() > 2e-3
    assert losses[1] == pytest.approx(losses[0], rel=2e-2)


# A whole run


def records(run_dir: Path) -> list[dict]:
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def test_a_run_on_the_teachers_top_k_finishes_and_records_both_tails(device, saved_qwen3_moe, teacher_folders, tmp_path):
    settings = ["rollout.prompts_per_step=4", "rollout.max_new_tokens=6", "rollout.decode_width=4", "num_steps=2", "optim.warmup_steps=0", "check.signal=off"]
    settings += ["domain=[arithmetic,tools]", "logger=none", "teachers.signal=top_k", "teachers.top_k=4", "loss.kind=jsd", "loss.cap=0.05"]
    settings += [f"domains.{name}.{part}.rows=8" for name in ("arithmetic", "tools") for part in ("prompts", "held_out")]
    settings += [f"domains.arithmetic.teacher.model={teacher_folders['v4']}", f"domains.tools.teacher.model={teacher_folders['qwen3_moe']}"]
    run_dir = tmp_path / "run"
    distill(load_config("distill", [*settings, f"student.model={saved_qwen3_moe}", f"run_dir={run_dir}"]))
    assert (run_dir / "student" / "model.safetensors").is_file()
    for record in records(run_dir)[1:]:
        for domain in ("arithmetic", "tools"):
            assert 0 < record[f"domain/{domain}/teacher_tail"] < record[f"domain/{domain}/student_tail"] < 1
            assert 0 <= record[f"domain/{domain}/capped"] <= 1
            assert f"domain/{domain}/teacher_entropy" not in record
            assert record[f"domain/{domain}/kl_per_token"] <= 0.0500001
