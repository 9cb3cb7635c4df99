"""GRPO: advantages, loss and gradient against naive formulas, what teaches nothing, settings that are refused, and runs that are killed or branched off."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import opd.metrics
from opd.__main__ import load_config
from opd.batch import supervised_batches
from opd.check import check
from opd.config import BatchConfig, OptimConfig, SpecializeConfig
from opd.divergence import ModelStates
from opd.estimators import GradedTokens, clipped_policy_gradient, grpo_loss
from opd.grpo import advantages, grade_groups, reward_metrics, with_advantages
from opd.grpo_config import GrpoConfig, LengthPenaltyConfig
from opd.specialize import specialize
from rollout.types import Rollout
from teachers.config import DomainConfig

# Rewards and advantages


def test_advantages_are_rewards_less_the_mean_of_their_group():
    assert advantages([1.0, 0.0, 0.0, 0.0], divide_by_std=False) == pytest.approx([0.75, -0.25, -0.25, -0.25])


def test_advantages_in_units_of_the_groups_standard_deviation():
    rewards = torch.tensor([1.0, 0.25, 0.0, 0.5], dtype=torch.float64)
    expected = (rewards - rewards.mean()) / (rewards.std(correction=0) + 1e-4)
    assert advantages(rewards.tolist(), divide_by_std=True) == pytest.approx(expected.tolist())


@pytest.mark.parametrize("divide_by_std", [False, True])
def test_equal_rewards_have_no_advantage_whatever_their_mean_rounds_to(divide_by_std):
    assert advantages([0.1] * 3, divide_by_std) == [0.0] * 3
    assert sum([0.1] * 3) / 3 != 0.1


def rollouts_of(make_rollout, tokenizer, answers: dict[int, list[str]]) -> list[Rollout]:
    """Completions of prompts whose reference answer is "7", by request."""
    return [
        make_rollout("law", [5], tokenizer(text, add_special_tokens=False)["input_ids"] + [tokenizer.eos_token_id], request=request, answer="7", sample=sample)
        for request, texts in answers.items()
        for sample, text in enumerate(texts)
    ]


def test_completions_are_compared_with_those_of_their_own_prompt_alone(make_rollout, tokenizer):
    rollouts = rollouts_of(make_rollout, tokenizer, {3: ["7", "8"], 4: ["8", "9"], 5: ["7", "7"], 6: ["1", "7"]})
    graded = grade_groups(rollouts, GrpoConfig(), {"law": "exact"}, tokenizer)
    assert [graded.advantages[3, i] for i in (0, 1)] == [0.5, -0.5]
    assert [graded.advantages[request, i] for request in (4, 5) for i in (0, 1)] == [0.0] * 4
    assert [graded.advantages[6, i] for i in (0, 1)] == [-0.5, 0.5]


def test_groups_without_a_difference_are_counted(make_rollout, tokenizer):
    cfg = SpecializeConfig(domains={"law": DomainConfig(grader="exact"), "absent": DomainConfig(grader="exact")})
    rollouts = rollouts_of(make_rollout, tokenizer, {3: ["7", "8"], 4: ["8", "9"], 5: ["7", "7"], 6: ["1", "1"]})
    metrics = reward_metrics(grade_groups(rollouts, GrpoConfig(), {"law": "exact"}, tokenizer), cfg)
    assert metrics == {"grpo/reward": 3 / 8, "grpo/zero_variance": 0.75, "domain/law/reward": 3 / 8, "domain/law/zero_variance": 0.75}


@pytest.mark.parametrize(
    ("penalties", "cost"),
    [({}, 0.0), ({"law": (3, 0.1)}, 0.2), ({"law": (5, 0.1)}, 0.0), ({"law": (3, 0.1), "law/prompts": (1, 0.5)}, 2.0), ({"law/other": (1, 0.5)}, 0.0)],
)
def test_tokens_beyond_the_budget_of_a_domain_or_source_take_from_the_score(penalties, cost, make_rollout, tokenizer):
    """A completion of five tokens, its end included, that is right, from the source `prompts`."""
    rollout = make_rollout("law", [5], tokenizer("1234", add_special_tokens=False)["input_ids"] + [tokenizer.eos_token_id], answer="1234")
    cfg = GrpoConfig(length_penalty={name: LengthPenaltyConfig(budget, per_token) for name, (budget, per_token) in penalties.items()})
    graded = grade_groups([rollout], cfg, {"law": "exact"}, tokenizer)
    assert graded.scores[0, 0] == 1.0
    assert graded.rewards[0, 0] == pytest.approx(1.0 - cost)


# Loss and gradient


@pytest.fixture
def states() -> tuple[ModelStates, ModelStates, GradedTokens, torch.Tensor]:
    """Student and reference over eleven tokens of vocabulary, 40 sampled tokens whose ratios spread well beyond the clip, and weights of all signs' tokens."""
    generator = torch.Generator().manual_seed(0)
    student, reference = (ModelStates(torch.randn(40, 6, generator=generator), torch.randn(11, 6, generator=generator)) for _ in range(2))
    student.hidden_ND.requires_grad_()
    student.head_VD.requires_grad_()
    token_N = torch.randint(11, (40,), generator=generator)
    with torch.no_grad():
        own_N = (student.hidden_ND @ student.head_VD.T).log_softmax(1).gather(1, token_N[:, None])[:, 0]
    graded = GradedTokens(token_N, own_N + 0.4 * torch.randn(40, generator=generator), torch.randn(40, generator=generator))
    return student, reference, graded, torch.rand(40, generator=generator)


def gradients(loss: torch.Tensor, student: ModelStates) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.autograd.grad(loss, [student.hidden_ND, student.head_VD])


def test_loss_and_gradient_are_those_of_the_clipped_surrogate(states):
    student, _, graded, weight_N = states
    cfg = GrpoConfig(clip_low=0.1, clip_high=0.3)
    loss, losses = clipped_policy_gradient(student, graded, weight_N, cfg, 11)
    logprob_N = (student.hidden_ND @ student.head_VD.T).log_softmax(1).gather(1, graded.token_N[:, None])[:, 0]
    ratio_N = (logprob_N - graded.logprob_N).exp()
    naive_N = -torch.minimum(ratio_N * graded.advantage_N, ratio_N.clamp(0.9, 1.3) * graded.advantage_N)
    torch.testing.assert_close(losses.loss_N, naive_N.detach())
    torch.testing.assert_close(losses.target_logprob_N, logprob_N.detach())
    for found, expected in zip(gradients(loss, student), gradients((weight_N * naive_N).sum(), student), strict=True):
        torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-5)
    is_clipped_N = torch.where(graded.advantage_N > 0, ratio_N > 1.3, ratio_N < 0.9)
    assert torch.equal(losses.capped_N.bool(), is_clipped_N)
    assert 5 < is_clipped_N.sum() < 35


def test_the_gradient_of_the_kl_is_the_mean_over_all_tokens_of_the_score_function(states):
    """E_v~p[log(p_v / q_v) grad log p_v] over the whole vocabulary, each token's surrogate formed for itself; and not that of k3 as a loss."""
    student, reference, graded, weight_N = states
    graded = GradedTokens(graded.token_N, graded.logprob_N, torch.zeros(40))
    loss, losses = grpo_loss(student, reference, graded, weight_N, GrpoConfig(kl=0.3), 11)
    found = gradients(loss, student)
    logprob_NV = (student.hidden_ND @ student.head_VD.T).log_softmax(1)
    ratio_NV = logprob_NV - (reference.hidden_ND @ reference.head_VD.T).log_softmax(1)
    p_NV, fixed_NV = logprob_NV.exp().detach(), ratio_NV.detach()
    expected = gradients((0.3 * weight_N[:, None] * p_NV * fixed_NV * logprob_NV).sum(), student)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-4)
    logprob_NV = (student.hidden_ND @ student.head_VD.T).log_softmax(1)
    ratio_NV = logprob_NV - (reference.hidden_ND @ reference.head_VD.T).log_softmax(1)
    k3 = gradients((0.3 * weight_N[:, None] * p_NV * ((-ratio_NV).exp() - 1 + ratio_NV)).sum(), student)
    assert float((k3[0] - expected[0]).norm() / expected[0].norm()) > 0.3
    torch.testing.assert_close(losses.reference_kl_N, (p_NV * fixed_NV).sum(1), atol=1e-5, rtol=1e-4)


def test_loss_and_gradient_are_the_sum_of_policy_gradient_and_kl(states):
    student, reference, graded, weight_N = states
    cfg, without = GrpoConfig(kl=0.3), GradedTokens(graded.token_N, graded.logprob_N, torch.zeros(40))
    whole, policy = grpo_loss(student, reference, graded, weight_N, cfg, 11)[0], grpo_loss(student, None, graded, weight_N, cfg, 11)[0]
    kl = grpo_loss(student, reference, without, weight_N, cfg, 11)[0]
    torch.testing.assert_close(whole, policy + kl)
    for one, *parts in zip(*(gradients(loss, student) for loss in (whole, policy, kl)), strict=True):
        torch.testing.assert_close(one, sum(parts))


def test_groups_without_a_difference_have_no_gradient(qwen3_moe_model, make_rollout, make_engine, tokenizer):
    zero = {"zero_optimization": {"stage": 1}}
    cfg = SpecializeConfig(domains={"law": DomainConfig(grader="exact")}, grpo=GrpoConfig(num_steps=1), optim=OptimConfig(warmup_steps=0), deepspeed=zero)
    engine = make_engine(qwen3_moe_model, cfg)

    def largest_gradient(answers: dict[int, list[str]]) -> float:
        rollouts = rollouts_of(make_rollout, tokenizer, answers)
        graded = grade_groups(rollouts, cfg.grpo, {"law": "exact"}, tokenizer)
        [batch] = with_advantages(supervised_batches(rollouts, {"law": 0.1}, BatchConfig()), graded.advantages)
        return max(float(gradient.abs().max()) for gradient in engine.gradient(batch, None))

    assert largest_gradient({0: ["7", "7"], 1: ["8", "9"]}) == 0.0
    assert largest_gradient({0: ["7", "8"], 1: ["8", "9"]}) > 0.0


# Settings


@pytest.mark.parametrize(
    ("overrides", "sentence"),
    [
        (["grpo.kl=0.1"], "settings of grpo would be ignored with grpo.num_steps=0: set grpo.num_steps, or remove them"),
        (["rollout.max_new_tokens=9"], "settings of rollout would be ignored without GRPO"),
        (["student.replay_routes=true"], "student.replay_routes=true would be ignored: opd specialize without grpo.num_steps"),
        (["grpo.num_steps=-1"], "grpo.num_steps must be at least 0, not -1"),
        (["grpo.num_steps=1", "grpo.lr_factor=0"], "grpo.lr_factor must be above 0 and finite, not 0.0"),
        (["grpo.num_steps=1", "grpo.clip_low=1"], "grpo.clip_low must be above 0 and below 1, not 1.0"),
        (["grpo.num_steps=1", "grpo.clip_high=nan"], "grpo.clip_high must be above 0 and finite, not nan"),
        (["grpo.num_steps=1", "grpo.kl=-1"], "grpo.kl must be at least 0 and finite, not -1.0"),
        (["grpo.num_steps=1", "rollout.completions_per_prompt=1"], "rollout.completions_per_prompt=1 has no group to compare a completion with"),
        (["grpo.num_steps=1", "rollout.temperature=0.5"], "GRPO trains the very distribution that is sampled"),
        (["grpo.num_steps=1", "rollout.top_k=5"], "GRPO trains the very distribution that is sampled"),
        (["grpo.num_steps=1", "rollout.replay=runs/one"], "rollout.replay would bias GRPO"),
        (["grpo.num_steps=1", "rollout.max_mismatch=1"], "rollout.max_mismatch would be ignored"),
        (["grpo.num_steps=1", "student.replay_routes=true"], "student.replay_routes=true has no routes to replay: set rollout.record_routes=true"),
        (["grpo.num_steps=1", "rollout.staleness=1"], "rollout.staleness=1 samples while the trainer trains"),
        (["grpo.num_steps=1", "domains.tools.grader=null"], "GRPO needs a grader in every domain: set domains.tools.grader"),
        (["grpo.num_steps=1", "+grpo.length_penalty={law: {budget: 1, per_token: 1}}"], "grpo.length_penalty names law, which is neither"),
        (["grpo.num_steps=1", "+grpo.length_penalty={tools/a: {budget: 1, per_token: 1}}"], "there are tools"),
        (["grpo.num_steps=1", "+grpo.length_penalty={tools: {per_token: 1}}"], "grpo.length_penalty.tools.budget must be at least 1, not 0"),
        (["grpo.num_steps=1", "+grpo.length_penalty={tools: {budget: 1}}"], "grpo.length_penalty.tools.per_token must be above 0 and finite, not 0.0"),
        (["num_steps=2", "grpo.num_steps=3", "profile.steps=[5,6]"], "profile.steps must be the first and the last step to trace"),
    ],
)
def test_settings_that_cannot_be_meant_are_refused_in_one_sentence(overrides, sentence):
    with pytest.raises(ValueError) as error:  # noqa: PT011 - the test looks at the sentence
        load_config("specialize", ["domain=[tools]", *overrides])
    assert sentence in str(error.value)
    assert "\n" not in str(error.value)


def test_settings_that_go_together_are_accepted():
    overrides = ["grpo.num_steps=3", "num_steps=2", "profile.steps=[4,5]", "student.replay_routes=true", "rollout.record_routes=true", "grpo.kl=0.1"]
    cfg = load_config("specialize", ["domain=[tools]", "+grpo.length_penalty={tools: {budget: 9, per_token: 0.1}}", *overrides])
    assert cfg.total_steps == 5


# Runs

FINE_TUNING, GRPO = 2, 3
SAVING = ["checkpoint.every=2", "checkpoint.keep=9", "student.router_probe_every=0"]


@pytest.fixture(scope="module")
def settings() -> list[str]:
    """Two steps of fine-tuning and three of GRPO, with all that it can have; lengths differ, so that rewards do."""
    chosen = ["student=qwen3_moe_tiny", "domain=[tools]", "domains.tools.prompts.rows=16", "examples_per_step=4", "logger=none", "optim.lr=1e-2"]
    chosen += ["optim.warmup_steps=1", "optim.schedule=linear", "rollout.prompts_per_step=2", "rollout.completions_per_prompt=4", "rollout.max_new_tokens=8"]
    chosen += ["rollout.decode_width=8", "rollout.record_routes=true", "student.replay_routes=true"]
    chosen += ["+grpo.length_penalty={tools: {budget: 1, per_token: 0.1}}"]
    return [*chosen, f"num_steps={FINE_TUNING}", f"grpo.num_steps={GRPO}", "grpo.kl=0.1", *SAVING]


def run(settings: list[str], run_dir: Path) -> Path:
    specialize(load_config("specialize", [*settings, f"run_dir={run_dir}"]))
    return run_dir


@pytest.fixture(scope="module")
def whole(device, settings, tmp_path_factory) -> Path:
    """Folder of the undisturbed run."""
    return run(settings, tmp_path_factory.mktemp("grpo") / "whole")


def weights(run_dir: Path) -> bytes:
    return (run_dir / "student" / "model.safetensors").read_bytes()


def test_the_fine_tuning_before_grpo_is_that_of_a_run_without_grpo(whole, settings, numbers, tmp_path, device):
    own = ("grpo.", "rollout.", "+grpo.", "student.replay")
    alone = run([*(setting for setting in settings if not setting.startswith(own)), "checkpoint.every=0"], tmp_path / "alone")
    without = [{name: value for name, value in record.items() if not name.startswith("router/agreement")} for record in numbers(whole)]
    assert numbers(alone) == without[: FINE_TUNING + 1]
    assert weights(alone) == (whole / "reference" / "model.safetensors").read_bytes()


def test_learning_rates_begin_anew_with_grpo(whole, numbers):
    assert [record["optim/lr"] for record in numbers(whole)[1:]] == pytest.approx([1e-2, 1e-3 * 10, 1e-3, 1e-3, 1e-4])


def test_the_kl_from_the_reference_is_0_where_grpo_begins_and_more_after(whole, numbers):
    first, second, _ = [record["domain/tools/reference_kl"] for record in numbers(whole)[FINE_TUNING + 1 :]]
    assert first == pytest.approx(0.0, abs=1e-6)
    assert second > 1e-4


def test_the_sampler_agrees_with_the_trainer_so_that_nothing_is_clipped(whole, numbers):
    for record in numbers(whole)[FINE_TUNING + 1 :]:
        assert record["domain/tools/capped"] == 0.0
        assert record["domain/tools/mismatch_max"] < 1e-4
        assert record["router/agreement"] == 1.0


@pytest.mark.parametrize("call", [1, 3])
def test_a_run_killed_in_grpo_goes_on_bit_for_bit(call, whole, settings, numbers, tmp_path, device, monkeypatch, kill_at):
    """After sampling, before the update: of GRPO's first step, and of one after a checkpoint in its midst."""
    kill_at("opd.grpo.train", call)
    with pytest.raises(KeyboardInterrupt):
        run(settings, tmp_path / "run")
    monkeypatch.undo()
    run(settings, tmp_path / "run")
    assert numbers(tmp_path / "run") == numbers(whole)
    assert weights(tmp_path / "run") == weights(whole)


def test_a_branch_in_the_midst_of_grpo_goes_on_as_the_run_did(whole, settings, numbers, tmp_path, device):
    run([*settings, f"branch_from={whole}@4"], tmp_path / "branch")
    assert numbers(tmp_path / "branch") == numbers(whole)[5:]
    assert weights(tmp_path / "branch") == weights(whole)


@pytest.mark.parametrize(
    ("step", "override", "sentence"),
    [
        (4, "num_steps=3", r"GRPO has begun after 2 steps of fine-tuning, and num_steps=3: set num_steps=2"),
        (2, "num_steps=1", r"the run has done 2 steps of fine-tuning, and GRPO should have begun after num_steps=1: set num_steps=2"),
    ],
)
def test_a_checkpoint_of_another_stage_is_refused(step, override, sentence, whole, settings, tmp_path, device):
    with pytest.raises(ValueError, match=sentence):
        run([*settings, override, f"branch_from={whole}@{step}"], tmp_path / "branch")


def test_grpo_alone_needs_no_answer_to_learn_from(settings, tmp_path, device):
    """Answers are for the grader alone then, and may be longer than the fine-tuning could take."""
    chosen = [setting for setting in settings if not setting.startswith(("num_steps", "grpo.kl"))]
    run([*chosen, "num_steps=0", "grpo.num_steps=1", "max_tokens=1"], tmp_path / "alone")
    records = [json.loads(line) for line in (tmp_path / "alone" / "metrics.jsonl").read_text().splitlines()]
    assert [record["step"] for record in records] == [0, 1]
    assert records[0]["data/tools/rows"] == 16
    assert not (tmp_path / "alone" / "reference").exists()


def test_records_of_grpo_have_the_names_on_file(whole, golden_dir):
    record = json.loads((whole / "metrics.jsonl").read_text().splitlines()[-1])
    found = "".join(f"{name}\n" for name in sorted(name.replace("/tools/", "/D/") for name in record))
    assert found == (golden_dir / "metrics_names_grpo.txt").read_text()
    names = {name.split("/")[-1] for name in found.split() if "/" in name} - {"rollout", "score", "update"}
    assert not [name for name in names if not re.search(rf"\b{name}\b", opd.metrics.__doc__)]


@pytest.mark.slow
def test_grpo_makes_a_base_that_is_right_in_a_third_of_its_answers_right_in_most_and_a_teacher_that_check_accepts(tmp_path, device):
    """Sixteen rows of the tool domain, learnt right and then mostly wrong; the mean of five steps of 64 answers, at the beginning of GRPO and at its end."""
    chosen = ["domain=[tools]", "domains.tools.prompts.rows=16", "logger=none", "rollout.prompts_per_step=8", "rollout.max_new_tokens=14"]
    learning = ["student=qwen3_moe_tiny", "num_steps=90", "examples_per_step=16", "slip_rate={0: 0.0, 50: 0.65}", "optim.lr=5e-3"]
    learning += ["grpo.num_steps=50", "grpo.lr_factor=0.2", "rollout.completions_per_prompt=8"]
    teacher = run([*chosen, *learning], tmp_path / "teacher") / "student"
    records = [json.loads(line) for line in (tmp_path / "teacher" / "metrics.jsonl").read_text().splitlines()]
    first, last = (sum(record["domain/tools/accuracy"] for record in part) / 5 for part in (records[91:96], records[-5:]))
    assert 0.2 < first < 0.6
    assert last > 0.85
    check(load_config("check", [*chosen, f"student.model={teacher}", f"domains.tools.teacher.model={teacher}", f"run_dir={tmp_path / 'check'}"]))


@pytest.mark.slow
@pytest.mark.multi
def test_two_ranks_that_share_the_weights_learn_what_one_learns(whole, settings, numbers, tmp_path):
    """ZeRO-3, the reference and the groups of a step divided among them. Experts that are chosen otherwise for rounding would end this; here none are."""
    command = [sys.executable, "-m", "opd", "specialize", *settings, f"run_dir={tmp_path / 'two'}", "launch.processes=2", "deepspeed=zero3", "fresh=true"]
    ended = subprocess.run(command, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=300, check=False)
    assert ended.returncode == 0, ended.stderr
    for one, two in zip(numbers(whole)[1:], numbers(tmp_path / "two")[1:], strict=True):
        for name in ("step/loss", "optim/grad_norm", *(("grpo/reward", "grpo/zero_variance", "domain/tools/reference_kl") if "grpo/reward" in one else ())):
            assert two[name] == pytest.approx(one[name], abs=1e-5), name
