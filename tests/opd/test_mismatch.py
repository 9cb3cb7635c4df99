"""How far the trainer's student is from the one that sampled: log-probabilities of sampled tokens, and the figures made of them."""

import math
import os
import shutil
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

import opd.tiles
from opd.__main__ import load_config
from opd.config import DistillConfig, Router
from opd.divergence import ModelStates
from opd.estimators import SampledToken, TopK, distillation_loss
from opd.loss_config import Backend, DivergenceKind, LossConfig
from opd.metrics import mismatch
from opd.tiles import Targets
from opd.update import domain_weights, supervised_update, update
from rollout.config import RolloutConfig
from rollout.sampler import LocalSampler
from rollout.types import LogitTransform, Rollout
from teachers.config import DomainConfig, TeacherConfig, TeachersConfig
from teachers.pool import TeacherPool

N, V, V_PADDED, D = 11, 53, 60, 8
WEIGHT_N = torch.rand(N, generator=torch.Generator().manual_seed(9)) + 0.1
SAMPLED_N = torch.randint(V, (N,), generator=torch.Generator().manual_seed(8))
SOFTCAP = LogitTransform(0.8, 3.0)
SHAPES = [("law", 3, 9), ("code", 9, 2), ("law", 6, 4), ("code", 2, 12), ("law", 12, 1), ("code", 5, 5), ("law", 1, 7)]


def states(seed: int, rows: int, transform: LogitTransform) -> ModelStates:
    generator = torch.Generator().manual_seed(seed)
    head_VD = torch.randn(rows, D, generator=generator)
    head_VD[V:] = 1e4
    return ModelStates(torch.randn(N, D, generator=generator).requires_grad_(), head_VD.requires_grad_(), transform)


def signals() -> dict[str, ModelStates | TopK | SampledToken]:
    teacher = states(1, V, LogitTransform())
    log_q_NV = (teacher.hidden_ND.detach() @ teacher.head_VD.detach().T).log_softmax(-1)
    logprob_NK, token_NK = log_q_NV.topk(6)
    return {"hidden_states": teacher, "top_k": TopK(token_NK, logprob_NK), "sampled_token": SampledToken(log_q_NV[torch.arange(N), SAMPLED_N])}


def naive_logprob(student: ModelStates, temperature: float) -> torch.Tensor:
    products_NV = student.hidden_ND.detach().double() @ student.head_VD.detach().double()[:V].T
    logits_NV = student.transform.softcap * torch.tanh(student.transform.scale * products_NV / student.transform.softcap)
    return (logits_NV / temperature).log_softmax(-1)[torch.arange(N), SAMPLED_N].float()


@pytest.fixture(params=[(1, 8192), (4 * V, 20), (1 << 23, 1), (1 << 23, 8192)], ids=["rows", "rows and blocks", "columns", "all"])
def tiles(request, monkeypatch) -> None:
    monkeypatch.setitem(opd.tiles.TILE_ELEMENTS, "cpu", request.param[0])
    monkeypatch.setattr(opd.tiles, "BLOCK_COLUMNS", request.param[1])


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("kind", ["hidden_states", "top_k", "sampled_token"])
def test_the_log_probability_of_the_sampled_token_is_that_of_the_whole_logits(tiles, kind, temperature):
    if kind == "sampled_token" and temperature != 1:
        pytest.skip("refused: it estimates at temperature 1 alone")
    student = states(0, V_PADDED, SOFTCAP)
    _, losses = distillation_loss(student, signals()[kind], Targets(SAMPLED_N, temperature), WEIGHT_N, LossConfig(backend=Backend.eager), V)
    torch.testing.assert_close(losses.target_logprob_N, naive_logprob(student, temperature), rtol=0, atol=2e-6)


@pytest.mark.parametrize("settings", [{"temperature": 1.6}, {"kind": DivergenceKind.jsd, "smoothing": 0.1}, {"cap": 0.1}, {"policy_gradient": True}], ids=str)
def test_settings_of_the_loss_do_not_change_the_log_probability(settings):
    student = states(0, V_PADDED, SOFTCAP)
    cfg = LossConfig(backend=Backend.eager, **settings)
    _, losses = distillation_loss(student, signals()["hidden_states"], Targets(SAMPLED_N, 1.0), WEIGHT_N, cfg, V)
    torch.testing.assert_close(losses.target_logprob_N, naive_logprob(student, 1.0), rtol=0, atol=2e-6)


@pytest.mark.parametrize("backend", [Backend.compiled, Backend.triton])
def test_every_backend_leaves_the_logits_from_which_it_is_read(backend, monkeypatch):
    if backend is Backend.triton:
        pytest.importorskip("triton")
        monkeypatch.setenv("TRITON_INTERPRET", "1")
    elif shutil.which(os.environ.get("CXX", "g++")) is None:
        pytest.skip("needs a C++ compiler")
    monkeypatch.setattr(opd.tiles, "BLOCK_COLUMNS", 20)
    student = states(0, V_PADDED, SOFTCAP)
    _, losses = distillation_loss(student, signals()["hidden_states"], Targets(SAMPLED_N, 1.3), WEIGHT_N, LossConfig(temperature=1.3, backend=backend), V)
    torch.testing.assert_close(losses.target_logprob_N, naive_logprob(student, 1.3), rtol=0, atol=2e-6)


@pytest.mark.parametrize("kind", ["hidden_states", "top_k", "sampled_token"])
def test_reading_it_changes_neither_loss_nor_gradient(tiles, kind):
    found = []
    for temperature in (None, 1.0):
        student = states(0, V_PADDED, SOFTCAP)
        loss, losses = distillation_loss(student, signals()[kind], Targets(SAMPLED_N, temperature), WEIGHT_N, LossConfig(backend=Backend.eager), V)
        assert (losses.target_logprob_N is None) == (temperature is None)
        found.append((losses.loss_N, *torch.autograd.grad(loss, (student.hidden_ND, student.head_VD))))
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))


def test_a_sampled_token_has_no_log_probability_at_another_temperature():
    with pytest.raises(ValueError, match="at temperature 1 alone"):
        distillation_loss(states(0, V_PADDED, SOFTCAP), signals()["sampled_token"], Targets(SAMPLED_N, 0.7), WEIGHT_N, LossConfig(), V)


def test_the_estimate_has_the_divergence_as_its_mean():
    """Over all outcomes of a distribution, each with its own probability."""
    log_sampler_V, log_trainer_V = torch.randn(2, V, dtype=torch.float64, generator=torch.Generator().manual_seed(3)).log_softmax(-1)
    kl = (log_sampler_V.exp() * (log_sampler_V - log_trainer_V)).sum()
    estimate_V = mismatch(log_trainer_V - log_sampler_V)
    torch.testing.assert_close((log_sampler_V.exp() * estimate_V).sum(), kl)
    assert (estimate_V >= 0).all()


# In a step


@pytest.fixture
def pool(teacher_folders, tokenizer, device) -> TeacherPool:
    domains = {"law": DomainConfig(teacher=TeacherConfig(model=str(teacher_folders["v4"])))}
    domains["code"] = DomainConfig(teacher=TeacherConfig(model=str(teacher_folders["qwen3_moe"])))
    return TeacherPool(domains, TeachersConfig(max_resident=2), tokenizer, device)


@pytest.fixture
def config(make_config) -> Callable[..., DistillConfig]:
    """config(max_mismatch=0.1): a step of two domains with these settings of rollout."""

    def make(max_tokens: int = 40, stage: int = 1, **rollout) -> DistillConfig:
        domains = {"law": DomainConfig(loss_weight=0.75), "code": DomainConfig(loss_weight=0.25)}
        optim = {"lr": 1.0, "eps": 1.0, "clip_norm": None}
        return make_config(domains, optim=optim, max_tokens=max_tokens, stage=stage, rollout=RolloutConfig(**rollout))

    return make


@torch.no_grad()
def logprobs(model, rollout: Rollout, temperature: float = 1.0) -> torch.Tensor:
    """Of a rollout's tokens, from a forward of it alone."""
    ids = torch.tensor([[*rollout.prompt.tokens, *rollout.completion_T.tolist()]])
    logits_TV = model(input_ids=ids).logits[0, len(rollout.prompt.tokens) - 1 : -1]
    return (logits_TV / temperature).log_softmax(-1).gather(1, rollout.completion_T[:, None])[:, 0]


def with_shift(model, rollouts: list[Rollout], shift: float, temperature: float = 1.0) -> list[Rollout]:
    """The rollouts as a sampler would have left them that is off by up to `shift` in every log-probability."""
    generator = torch.Generator().manual_seed(4)
    return [replace(r, logprob_T=logprobs(model, r, temperature) + shift * (2 * torch.rand(len(r.completion_T), generator=generator) - 1)) for r in rollouts]


@pytest.mark.parametrize("temperature", [1.0, 0.8])
def test_the_mismatch_of_a_domain_is_the_mean_over_the_tokens_of_its_loss(temperature, v4_model, pool, make_engine, config, random_rollouts):
    cfg, rollouts = config(temperature=temperature), random_rollouts(SHAPES)
    rollouts[0].completion_mask_T[2:5] = False
    shifted = with_shift(v4_model, rollouts, 0.5, temperature)
    metrics = update(make_engine(v4_model, cfg), pool, pool.score(shifted), cfg)
    for domain in ("law", "code"):
        log_ratio = [logprobs(v4_model, r, temperature) - r.logprob_T for r in shifted if r.prompt.domain == domain]
        log_ratio = torch.cat([x[r.completion_mask_T] for x, r in zip(log_ratio, (r for r in shifted if r.prompt.domain == domain), strict=True)])
        assert metrics[f"domain/{domain}/mismatch_kl"] == pytest.approx(float((log_ratio.exp() - 1 - log_ratio).mean()), rel=1e-4)
        assert metrics[f"domain/{domain}/mismatch_max"] == pytest.approx(float(log_ratio.abs().max()), rel=1e-4)
        assert metrics[f"domain/{domain}/mismatch_p99"] == metrics[f"domain/{domain}/mismatch_max"], "of less than a hundred tokens it is the largest"


@pytest.mark.parametrize("family", ["v4", "qwen3_moe"])
def test_rollouts_of_the_same_weights_differ_in_rounding_alone(family, v4_model, qwen3_moe_model, pool, make_engine, config, make_prompt, tokenizer):
    model = {"v4": v4_model, "qwen3_moe": qwen3_moe_model}[family]
    cfg = config(max_new_tokens=12, decode_width=4, temperature=1.2)
    engine = make_engine(model, cfg)
    prompts = [make_prompt(("law", "code")[number % 2], list(range(5, 8 + number)), request=number) for number in range(4)]
    metrics = update(engine, pool, pool.score(LocalSampler(model, [tokenizer.eos_token_id], 0, len(tokenizer)).sample(prompts, cfg.rollout)), cfg)
    assert 0 <= metrics["domain/law/mismatch_kl"] <= 1e-9
    assert metrics["domain/code/mismatch_max"] <= 1e-5


@pytest.mark.parametrize("settings", [{"top_p": 0.9}, {"top_k": 5}, {"min_p": 0.1}, {"temperature": 0.0}], ids=str)
def test_what_cannot_be_compared_is_not_measured(settings, v4_model, pool, make_engine, config, random_rollouts):
    cfg = config(**settings)
    metrics = update(make_engine(v4_model, cfg), pool, pool.score(random_rollouts(SHAPES[:2])), cfg)
    assert not [name for name in metrics if "mismatch" in name]


def test_supervised_training_has_no_mismatch(v4_model, make_engine, config, random_rollouts):
    cfg = config()
    assert not [name for name in supervised_update(make_engine(v4_model, cfg), random_rollouts(SHAPES[:2]), cfg) if "mismatch" in name]


# Sequence masking


@pytest.fixture
def far_off(v4_model, random_rollouts) -> list[Rollout]:
    """Rollouts whose log-probabilities are right, but for the second and the third, one of each domain: these are off by 1."""
    exact = with_shift(v4_model, random_rollouts(SHAPES), 0.0)
    return [replace(rollout, logprob_T=rollout.logprob_T + (number in (1, 2))) for number, rollout in enumerate(exact)]


def changes(engine, pool: TeacherPool, rollouts: list[Rollout], cfg: DistillConfig) -> tuple[dict[str, float], dict[str, torch.Tensor]]:
    before = engine.full_weights()
    metrics = update(engine, pool, pool.score(rollouts), cfg)
    return metrics, {name: tensor - before[name] for name, tensor in engine.full_weights().items()}


def assert_same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor], tolerance: float) -> None:
    assert max(tensor.abs().max() for tensor in one.values()) > 1e-2, "nothing moved, so the comparison shows nothing"
    for name in one:
        torch.testing.assert_close(one[name], other[name], rtol=0, atol=tolerance)


@pytest.mark.parametrize("stage", [1, 3])
def test_a_masked_sequence_gives_the_step_without_it(stage, far_off, v4_model, pool, make_engine, config):
    masking, plain = config(max_mismatch=0.1, stage=stage), config(stage=stage)
    metrics, found = changes(make_engine(v4_model, masking), pool, far_off, masking)
    expected, other = changes(make_engine(v4_model, plain), pool, [r for number, r in enumerate(far_off) if number not in (1, 2)], plain)
    assert (metrics["domain/law/masked"], metrics["domain/code/masked"]) == (pytest.approx(1 / 4), pytest.approx(1 / 3))
    names = [f"domain/{domain}/{name}" for domain in ("law", "code") for name in ("kl_per_token", "kl_per_sequence", "student_entropy", "loss_share")]
    assert {name: metrics[name] for name in ["step/loss", *names]} == pytest.approx({name: expected[name] for name in ["step/loss", *names]}, rel=1e-5)
    assert metrics["domain/law/mismatch_kl"] <= 1e-9
    assert_same(found, other, tolerance=1e-5)


def test_a_masked_sequence_adds_nothing_to_the_balance_loss(qwen3_moe_model, random_rollouts, pool, make_engine, config):
    qwen3_moe_model.requires_grad_(True)
    rollouts = with_shift(qwen3_moe_model, random_rollouts(SHAPES), 0.0)
    rollouts[1] = replace(rollouts[1], logprob_T=rollouts[1].logprob_T + 1)
    found = []
    for kept, settings in ((rollouts, {"max_mismatch": 0.1}), (rollouts[:1] + rollouts[2:], {})):
        cfg = config(**settings)
        cfg.student.router, cfg.student.router_balance_loss = Router.train, 5.0
        found.append(changes(make_engine(qwen3_moe_model, cfg), pool, kept, cfg)[1])
    assert_same(*found, tolerance=1e-5)


def test_a_threshold_above_every_sequence_changes_nothing(far_off, v4_model, pool, make_engine, config):
    masking, plain = config(max_mismatch=10.0), config()
    metrics, found = changes(make_engine(v4_model, masking), pool, far_off, masking)
    expected, other = changes(make_engine(v4_model, plain), pool, far_off, plain)
    assert metrics["domain/law/masked"] == metrics["domain/code/masked"] == 0.0
    assert metrics["step/loss"] == expected["step/loss"]
    assert_same(found, other, tolerance=0.0)


def test_sequences_are_judged_by_the_mean_over_their_tokens_of_the_loss(v4_model, pool, make_engine, config, random_rollouts):
    """Of two sequences of nine tokens, one is off in all and one in a token that has no loss."""
    rollouts = with_shift(v4_model, random_rollouts([("law", 3, 9), ("law", 4, 9), ("code", 2, 4)]), 0.0)
    rollouts[0] = replace(rollouts[0], logprob_T=rollouts[0].logprob_T + 0.5)
    rollouts[1].logprob_T[3] += 100
    rollouts[1].completion_mask_T[3] = False
    mean = math.exp(-0.5) - 1 + 0.5
    for limit, expected in ((mean * 0.99, 0.5), (mean * 1.01, 0.0)):
        cfg = config(max_mismatch=limit)
        assert update(make_engine(v4_model, cfg), pool, pool.score(rollouts), cfg)["domain/law/masked"] == expected


def test_a_step_with_every_rollout_masked_is_refused(far_off, v4_model, pool, make_engine, config):
    cfg = config(max_mismatch=0.1)
    with pytest.raises(ValueError, match=r"every rollout of step 0 is masked, the least mismatch being 0\.368: raise rollout\.max_mismatch=0\.1"):
        update(make_engine(v4_model, cfg), pool, pool.score(far_off[1:3]), cfg)


def test_without_the_setting_no_rollout_is_judged(far_off, v4_model, pool, make_engine, config):
    cfg = config()
    metrics = update(make_engine(v4_model, cfg), pool, pool.score(far_off), cfg)
    assert not [name for name in metrics if name.endswith("/masked")]
    assert domain_weights(far_off, cfg, 0)[0]["law"] == pytest.approx(0.75 / sum(after for domain, _, after in SHAPES if domain == "law"))


@pytest.mark.parametrize("setting", ["rollout.top_p=0.9", "rollout.temperature=0"])
def test_masking_by_what_cannot_be_compared_is_refused(setting):
    with pytest.raises(ValueError, match=r"rollout\.max_mismatch compares log-probabilities"):
        load_config("distill", ["rollout.max_mismatch=0.1", setting])


@pytest.mark.parametrize("value", ["0", "-1", "inf", "nan"])
def test_a_threshold_is_a_finite_number_above_0(value):
    with pytest.raises(ValueError, match=r"rollout\.max_mismatch must be above 0 and finite"):
        load_config("distill", [f"rollout.max_mismatch={value}"])
