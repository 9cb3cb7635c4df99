"""Evaluation on held-out prompts: its figures against naive computations, its comparison of models, and the names of its record."""

import json
import math
import os
import statistics
import subprocess
import sys
from dataclasses import replace

import pytest
import torch

from opd.__main__ import load_config
from opd.comparison import DomainResult, PerturbedResult, comparison, paired_difference, print_comparison, require_certificates
from opd.config import DistillConfig, EvaluationConfig
from opd.evaluate import evaluate
from opd.evaluator import Evaluator, evaluation_metrics, in_prompt_order
from opd.export import export
from opd.intervals import Interval, proportion
from opd.loss_config import DivergenceKind, LossConfig
from opd.rollouts import FirstRequest
from rollout.config import HeldOutConfig, PerturbationConfig, PromptsConfig, SamplingConfig
from rollout.grader_config import GraderKind
from rollout.sampler import LocalSampler
from rollout.types import Rollout
from teachers.config import DomainConfig, SignalKind, TeacherConfig, TeachersConfig
from teachers.pool import TeacherPool

ROWS = 12


@pytest.fixture
def cfg(teacher_folders) -> DistillConfig:
    """Two domains on the same prompts with different teachers; one is not graded."""
    domains = {}
    for name, teacher, grader in [("law", "v4", GraderKind.exact), ("code", "qwen3_moe", None)]:
        held_out = HeldOutConfig(path="synthetic:tools", split="held_out", rows=ROWS)
        prompts = PromptsConfig(path="synthetic:tools", rows=8)
        domains[name] = DomainConfig(teacher=TeacherConfig(model=str(teacher_folders[teacher])), prompts=prompts, held_out=held_out, grader=grader)
    return DistillConfig(domains=domains, evaluation=EvaluationConfig(every=1, max_new_tokens=5, decode_width=6))


@pytest.fixture
def evaluator(cfg, session_v4_model, tokenizer, device) -> Evaluator:
    return Evaluator(cfg, session_v4_model, tokenizer, TeacherPool(cfg.domains, TeachersConfig(max_resident=2), tokenizer, device))


@pytest.fixture
def sampler(session_v4_model, tokenizer) -> LocalSampler:
    return LocalSampler(session_v4_model, [tokenizer.eos_token_id], 0, len(tokenizer))


def naive_kl(student, teacher, rollout: Rollout) -> float:
    """Divergence of one completion, without padding, from whole logits."""
    ids = torch.tensor([[*rollout.prompt.tokens, *rollout.completion_T.tolist()]])
    with torch.no_grad():
        log_p_TV, log_q_TV = (model(input_ids=ids).logits[0, len(rollout.prompt.tokens) - 1 : -1].double().log_softmax(-1) for model in (student, teacher))
    return float((log_p_TV.exp() * (log_p_TV - log_q_TV)).sum())


def test_divergences_are_those_of_the_sampled_completions_with_intervals_over_sequences(evaluator, sampler, session_v4_model):
    for name in ("law", "code"):
        result = evaluator.evaluate_domain(name, sampler)
        rollouts = sampler.sample(evaluator.prompts[name], SamplingConfig(max_new_tokens=5, decode_width=6))
        teacher = evaluator.teachers.get(evaluator.teachers.teacher_of[name]).model
        kl = [naive_kl(session_v4_model, teacher, rollout) for rollout in rollouts]
        tokens = [len(rollout.completion_T) for rollout in rollouts]
        per_token, per_sequence = sum(kl) / sum(tokens), sum(kl) / ROWS
        assert result.kl_per_token.value == pytest.approx(per_token, rel=1e-4)
        assert result.kl_per_sequence.value == pytest.approx(per_sequence, rel=1e-4)
        deviation = math.sqrt(sum((value - per_sequence) ** 2 for value in kl) / (ROWS - 1) / ROWS)
        assert result.kl_per_sequence.high - result.kl_per_sequence.value == pytest.approx(1.959964 * deviation, rel=1e-3)
        residuals = math.sqrt(sum((value - per_token * count) ** 2 for value, count in zip(kl, tokens, strict=True)) / (ROWS - 1) / ROWS)
        assert result.kl_per_token.high - result.kl_per_token.value == pytest.approx(1.959964 * residuals / (sum(tokens) / ROWS), rel=1e-3)


def test_accuracy_is_the_share_of_right_completions_and_truncation_that_of_unfinished_ones(evaluator, sampler, tokenizer):
    """The reference answers of every third prompt are made what the model says at temperature 1, of the next what it says greedily."""
    prompts = evaluator.prompts["law"]
    rollouts, greedy = (sampler.sample(prompts, SamplingConfig(max_new_tokens=5, decode_width=6, temperature=heat)) for heat in (1.0, 0.0))
    said, said_greedily = ([tokenizer.decode(r.completion_T, skip_special_tokens=True) for r in sampled] for sampled in (rollouts, greedy))
    answers = [(said, said_greedily, ["never"] * ROWS)[number % 3][number] for number in range(ROWS)]
    evaluator.prompts["law"] = [replace(prompt, answer=answer) for prompt, answer in zip(prompts, answers, strict=True)]
    result = evaluator.evaluate_domain("law", sampler)
    assert result.accuracy.value == sum(one.strip() == other.strip() for one, other in zip(said, answers, strict=True)) / ROWS >= 1 / 3
    assert result.greedy.value == sum(one.strip() == other.strip() for one, other in zip(said_greedily, answers, strict=True)) / ROWS >= 1 / 3
    assert result.accuracy.value < 1
    assert result.truncated == sum(tokenizer.eos_token_id not in rollout.completion_T.tolist() for rollout in rollouts) / ROWS
    assert result.prompts == ROWS


def test_a_domain_without_a_grader_has_no_accuracy_and_one_without_teachers_no_divergence(evaluator, sampler, cfg, session_v4_model, tokenizer):
    assert evaluator.evaluate_domain("code", sampler).accuracy is None
    alone = Evaluator(cfg, session_v4_model, tokenizer, teachers=None).evaluate_domain("law", sampler)
    assert alone.kl_per_token is None
    assert alone.accuracy is not None


def test_evaluating_twice_gives_the_same_figures_and_random_numbers_apart_from_trainings(evaluator, sampler):
    assert evaluator.evaluate(sampler) == evaluator.evaluate(sampler)
    assert min(prompt.request for prompts in evaluator.prompts.values() for prompt in prompts) == FirstRequest.evaluation > 1 << 32


def test_the_divergence_does_not_depend_on_the_runs_loss_and_signal(evaluator, sampler, cfg, session_v4_model, tokenizer, device):
    """So that runs with different losses can be compared."""
    cfg.loss = LossConfig(kind=DivergenceKind.jsd, temperature=2.0, smoothing=0.1, cap=0.01)
    cfg.teachers = TeachersConfig(max_resident=2, signal=SignalKind.top_k, top_k=3)
    other = Evaluator(cfg, session_v4_model, tokenizer, TeacherPool(cfg.domains, cfg.teachers, tokenizer, device))
    found = evaluator.evaluate(sampler)
    assert other.evaluate(sampler) == found
    assert found["law"].kl_per_token.value > 0.01


def test_so_many_prompts_are_taken_and_none_where_evaluation_is_off(cfg, session_v4_model, tokenizer):
    cfg.evaluation.prompts = 5
    assert [len(prompts) for prompts in Evaluator(cfg, session_v4_model, tokenizer, None).prompts.values()] == [5, 5]
    cfg.evaluation.every = 0
    assert Evaluator(cfg, session_v4_model, tokenizer, None).prompts == {}


def test_held_out_prompts_without_answers_are_refused_where_they_are_graded(cfg, session_v4_model, tokenizer, tmp_path):
    (tmp_path / "held_out.jsonl").write_text('{"prompt": "T:a1b2="}\n')
    cfg.domains["law"].held_out = HeldOutConfig(path=str(tmp_path / "held_out.jsonl"))
    with pytest.raises(ValueError, match="no answer to grade against"):
        Evaluator(cfg, session_v4_model, tokenizer, None)


# Under perturbation

CHARACTERS = list("0123456789abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ +-*/=:;.,()[]{}<>!?_|'")


@pytest.fixture
def perturbed(cfg, session_v4_model, tokenizer, device) -> Evaluator:
    """As `evaluator`, where every other character that is written in one of the two domains becomes another."""
    cfg.domains["law"].perturbation = PerturbationConfig(rate=0.5, alphabet=CHARACTERS)
    return Evaluator(cfg, session_v4_model, tokenizer, TeacherPool(cfg.domains, TeachersConfig(max_resident=2), tokenizer, device))


def test_perturbed_accuracy_is_the_share_of_right_completions_as_the_environment_left_them(perturbed, sampler, tokenizer):
    """The reference answers of every third prompt are made what is left of its completion."""
    prompts = perturbed.prompts["law"]
    rollouts = sampler.sample_perturbed(prompts, SamplingConfig(max_new_tokens=5, decode_width=6), perturbed.perturbations["law"])
    left = [tokenizer.decode(rollout.completion_T, skip_special_tokens=True) for rollout in rollouts]
    answers = [text if number % 3 == 0 else "never" for number, text in enumerate(left)]
    perturbed.prompts["law"] = [replace(prompt, answer=answer) for prompt, answer in zip(prompts, answers, strict=True)]
    found = perturbed.evaluate_domain("law", sampler).perturbed
    assert found.rate == 0.5
    assert found.accuracy.value == ROWS / 3 / ROWS
    assert found.truncated == sum(not rollout.finished for rollout in rollouts) / ROWS
    assert found.replaced == sum(int((~rollout.completion_mask_T).sum()) for rollout in rollouts) / ROWS > 1


def test_a_perturbation_changes_no_other_figure_and_no_other_domain(evaluator, perturbed, sampler):
    spoilt, clean = perturbed.evaluate(sampler), evaluator.evaluate(sampler)
    assert spoilt["law"].perturbed is not None
    assert {name: replace(result, perturbed=None) for name, result in spoilt.items()} == clean


def test_metrics_have_the_accuracy_under_perturbation(perturbed, sampler):
    found = evaluation_metrics(perturbed.evaluate(sampler))
    names = {name for name in found if "perturbed" in name}
    assert names == {f"evaluation/law/{name}" for name in ("perturbed", "perturbed_low", "perturbed_high")}


def test_an_alphabet_that_the_tokenizer_does_not_have_is_refused_before_anything_is_evaluated(cfg, session_v4_model, tokenizer):
    cfg.domains["law"].perturbation = PerturbationConfig(rate=0.1, alphabet=["1", "12"])
    with pytest.raises(ValueError, match=r"domains\.law\.perturbation\.alphabet has '12', which is 2 tokens"):
        Evaluator(cfg, session_v4_model, tokenizer, None)


ON_RANKS = """
import json, sys

from opd.__main__ import load_config
from opd.evaluate import evaluate

evaluate(load_config("evaluate", json.loads(sys.argv[1])))
"""


@pytest.mark.slow
@pytest.mark.multi
def test_two_ranks_find_the_perturbed_accuracy_of_one(saved_v4, tmp_path):
    """The scores are the share of digits, so that they tell completions apart; one perturbed token more or less would show."""
    (tmp_path / "digits.py").write_text("def score(completion, answer):\n    return sum(map(str.isdigit, completion)) / 8\n")
    settings = ["domain=[backspace]", "domains.backspace.held_out.rows=16", "evaluation.max_new_tokens=8", "evaluation.decode_width=8", "threads=1"]
    settings += [f"student.model={saved_v4}", f"domains.backspace.teacher.model={saved_v4}", "domains.backspace.perturbation.rate=0.7"]
    settings += ["domains.backspace.grader={kind: python, function: 'digits:score', seconds: 60}"]
    found = []
    for ranks in (1, 2):
        store = torch.distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(store.port), "TORCHELASTIC_USE_AGENT_STORE": "True", "OMP_NUM_THREADS": "1"}
        places = [{"RANK": str(place), "LOCAL_RANK": str(place), "WORLD_SIZE": str(ranks)} for place in range(ranks)]
        command = [sys.executable, "-c", ON_RANKS, json.dumps([*settings, f"run_dir={tmp_path / str(ranks)}"])]
        processes = [subprocess.Popen(command, cwd=tmp_path, env=os.environ | shared | place) for place in places]
        assert [process.wait(timeout=300) for process in processes] == [0] * ranks
        found.append(json.loads((tmp_path / str(ranks) / "evaluation.json").read_text())["domains"]["backspace"])
    assert found[0]["perturbed"] == found[1]["perturbed"]
    assert found[0]["perturbed"]["student"]["replaced"] > 0.3
    assert found[0]["perturbed"]["student"] == found[0]["perturbed"]["teacher"]


def test_the_record_and_the_table_have_accuracy_without_and_with_perturbation_side_by_side(capsys):
    def spoilt(right: int, left: int) -> DomainResult:
        return replace(result(right), perturbed=PerturbedResult(rate=0.1, accuracy=proportion(left, 200), truncated=0.0, replaced=0.7))

    record = comparison({"law": spoilt(60, 40)}, {"law": spoilt(200, 198)}, {"law": spoilt(199, 180)}, {"law": 0})
    perturbed = record["domains"]["law"]["perturbed"]
    assert perturbed["rate"] == 0.1
    assert {role: perturbed[role]["accuracy"] for role in ("base", "teacher", "student")} == {"base": 0.2, "teacher": 0.99, "student": 0.9}
    assert perturbed["student"] | {"low": 0, "high": 0} == {"accuracy": 0.9, "low": 0, "high": 0, "truncated": 0.0, "replaced": 0.7}
    print_comparison(record)
    printed = capsys.readouterr().out
    assert "student, perturbed" in printed
    assert "0.900 [" in printed


def test_a_record_without_perturbation_has_no_word_of_it(capsys):
    record = comparison({}, {"law": result(198)}, {"law": result(180)}, {"law": 0})
    assert "perturbed" not in record["domains"]["law"]
    print_comparison(record)
    assert "perturbed" not in capsys.readouterr().out


def test_perturbed_completions_that_are_often_cut_are_named(capsys):
    cut = replace(result(180), perturbed=PerturbedResult(rate=0.1, accuracy=proportion(90, 200), truncated=0.02, replaced=0.7))
    print_comparison(comparison({}, {"law": cut}, {"law": cut}, {"law": 0}))
    assert "of the student's perturbed completions were cut at max_new_tokens in law" in " ".join(capsys.readouterr().out.split())


def result(right: int | None, trials: int = 200) -> DomainResult:
    accuracy = None if right is None else proportion(right, trials)
    scores = None if right is None else (1.0,) * right + (0.0,) * (trials - right)
    return DomainResult(prompts=trials, truncated=0.0, scores=scores, accuracy=accuracy, greedy=accuracy, kl_per_token=None, kl_per_sequence=None)


def test_recovery_is_the_students_accuracy_over_its_teachers_and_the_lowest_is_reported():
    teacher = {"law": result(180), "code": result(100)}
    record = comparison({}, teacher, {"law": result(171), "code": result(80)}, {"law": 0, "code": 3})
    assert record["domains"]["law"]["recovery"]["value"] == pytest.approx(0.95)
    assert record["domains"]["law"]["recovery"]["low"] < 0.95 < record["domains"]["law"]["recovery"]["high"]
    assert record["min_recovery"] == pytest.approx(0.8)
    assert record["domains"]["code"]["dropped_prompts"] == 3
    assert "base" not in record["domains"]["law"]


def test_a_domain_that_is_not_graded_is_named_and_does_not_count():
    record = comparison({}, {"law": result(180), "code": result(None)}, {"law": result(171), "code": result(None)}, {"law": 0, "code": 0})
    assert record["not_graded"] == ["code"]
    assert record["domains"]["code"]["recovery"] == "not graded"
    assert record["min_recovery"] == pytest.approx(0.95)


@pytest.mark.parametrize("students", [{"law": result(10)}, {"law": result(None)}])
def test_where_no_recovery_is_known_there_is_no_lowest(students):
    """The teacher knows nothing, or nothing is graded."""
    teacher = {name: result(0 if student.accuracy else None) for name, student in students.items()}
    assert comparison({}, teacher, students, {"law": 0})["min_recovery"] is None


def test_metrics_leave_out_what_was_not_measured():
    names = {name.split("/")[-1] for name in evaluation_metrics({"law": result(None)})}
    assert names == {"truncated"}
    assert {name.split("/")[-1] for name in evaluation_metrics({"law": result(3)})} == {"truncated", "accuracy", "accuracy_low", "accuracy_high", "greedy"}


# The certificate


def with_kl(right: int, kl: float) -> DomainResult:
    return replace(result(right), kl_per_token=Interval(kl, kl, kl), kl_per_sequence=Interval(kl, kl, kl))


def test_an_accuracy_that_its_divergence_rules_out_is_refused_with_the_domains_name():
    teacher, dropped = {"law": result(198), "code": result(198)}, {"law": 0, "code": 0}
    kept = comparison({}, teacher, {"law": with_kl(197, 0.01), "code": with_kl(196, 0.02)}, dropped)
    require_certificates(kept)
    assert kept["domains"]["law"]["certificate"]["floor"] < 197 / 200
    broken = comparison({}, teacher, {"law": with_kl(197, 0.01), "code": with_kl(100, 0.02)}, dropped)
    with pytest.raises(ValueError, match=r"code: no student can have an accuracy of 0\.500 at 0\.02 nats per completion from a teacher with 0\.990"):
        require_certificates(broken)


def test_what_is_not_graded_or_has_no_divergence_has_no_certificate():
    assert comparison({}, {"law": result(None)}, {"law": result(None)}, {"law": 0})["domains"]["law"]["certificate"] is None
    assert comparison({}, {"law": result(9)}, {"law": result(9)}, {"law": 0})["domains"]["law"]["certificate"] is None


def test_the_floor_stands_in_the_table(capsys):
    print_comparison(comparison({}, {"law": result(198)}, {"law": with_kl(197, 0.01)}, {"law": 0}))
    assert "0.973, 0.935" in capsys.readouterr().out


# Student less base


def with_scores(scores: list[float]) -> DomainResult:
    return replace(result(0, len(scores)), scores=tuple(scores), accuracy=proportion(sum(scores), len(scores)))


def test_the_difference_of_two_models_is_paired_prompt_by_prompt():
    base, student = [1.0, 0.0, 0.0, 1.0, 0.0, 1.0, 0.0, 0.0], [1.0, 1.0, 0.0, 1.0, 1.0, 0.0, 1.0, 0.0]
    differences = [one - other for one, other in zip(student, base, strict=True)]
    half = 1.959964 * statistics.stdev(differences) / math.sqrt(8)
    found = paired_difference(student, base)
    assert found.value == 2 / 8
    assert found.low == pytest.approx(2 / 8 - half, rel=1e-5)
    assert found.high == pytest.approx(2 / 8 + half, rel=1e-5)


def alike(value: float, prompts: int) -> dict[str, float]:
    """The difference of so many prompts, the same of each."""
    others = 1 - 0.025 ** (1 / prompts)
    return {"value": value, "low": pytest.approx(value - others * (value + 1)), "high": pytest.approx(value + others * (1 - value))}


def test_a_model_differs_from_itself_by_0_and_by_as_much_as_its_prompts_may_miss():
    same = {"law": with_scores([1.0, 0.0, 0.0, 1.0])}
    assert comparison(same, same, same, {"law": 0})["domains"]["law"]["difference"] == alike(0.0, 4)


def test_over_all_domains_every_prompt_counts_once():
    """Three prompts and one, so that the mean of the domains' differences (0.5) is another number."""
    base = {"law": with_scores([0.0, 0.0, 0.0]), "code": with_scores([1.0])}
    student = {"law": with_scores([1.0, 1.0, 1.0]), "code": with_scores([1.0])}
    record = comparison(base, student, student, {"law": 0, "code": 0})
    assert record["domains"]["law"]["difference"]["value"] == 1
    assert record["domains"]["code"]["difference"]["value"] == 0
    assert record["difference"]["value"] == 3 / 4
    assert record["difference"]["high"] - 3 / 4 == pytest.approx(1.959964 * statistics.stdev([1, 1, 1, 0]) / 2, rel=1e-5)


def test_without_a_base_or_a_grader_there_is_no_difference():
    student = {"law": with_scores([1.0, 0.0]), "code": result(None)}
    alone = comparison({}, student, student, {"law": 0, "code": 0})
    assert alone["difference"] is None
    assert alone["domains"]["law"]["difference"] is None
    both = comparison(student, student, student, {"law": 0, "code": 0})
    assert both["domains"]["code"]["difference"] is None
    assert both["difference"] == both["domains"]["law"]["difference"]


@pytest.mark.parametrize("num_ranks", [1, 2, 3])
def test_scores_of_the_ranks_are_put_back_in_the_order_of_the_prompts(num_ranks):
    scores = [float(number) for number in range(7)]
    assert in_prompt_order([scores[rank::num_ranks] for rank in range(num_ranks)]) == tuple(scores)


def test_the_difference_is_printed_below_the_table(capsys):
    base, student = {"law": with_scores([0.0] * 8)}, {"law": with_scores([1.0] * 8)}
    print_comparison(comparison(base, student, student, {"law": 0}))
    assert "student less base, accuracy on the same prompts: all +1.000 [+0.261, +1.000]; law +1.000 [+0.261, +1.000]" in capsys.readouterr().out


def test_an_export_is_evaluated_beside_its_student_and_as_its_own_teacher(device, fp4_student, tmp_path):
    """It is the student, bit for bit: the same completions on the same prompts, and no divergence."""
    source = fp4_student("bfloat16")
    export(load_config("export", [f"student.model={source}", f"run_dir={tmp_path / 'export'}", "threads=1"]))
    exported = tmp_path / "export" / "student"
    settings = ["domain=[tools]", "domains.tools.held_out.rows=12", "evaluation.max_new_tokens=5", "evaluation.decode_width=12"]
    models = {"student": exported, "base": source, "domains.tools.teacher": exported}
    settings += [setting for name, folder in models.items() for setting in (f"{name}.model={folder}", f"{name}.dtype=bfloat16")]
    evaluate(load_config("evaluate", [*settings, f"run_dir={tmp_path / 'run'}"]))
    record = json.loads((tmp_path / "run" / "evaluation.json").read_text())
    tools = record["domains"]["tools"]
    assert tools["student"] == tools["base"] == tools["teacher"]
    assert record["difference"] == tools["difference"] == alike(0.0, 12)
    assert tools["kl"]["student"]["per_token"]["value"] == pytest.approx(0, abs=1e-9)


def graded(scores: list[float]) -> DomainResult:
    accuracy = proportion(sum(scores), len(scores))
    figures = {"truncated": 0.0, "scores": tuple(scores), "accuracy": accuracy, "greedy": accuracy, "kl_per_token": None, "kl_per_sequence": None}
    return DomainResult(prompts=len(scores), **figures)


def test_the_gap_closed_is_the_paired_ratio_and_null_where_the_teacher_may_not_lead():
    base, teacher, student = [0.0] * 30 + [1.0] * 10, [1.0] * 40, [0.0] * 15 + [1.0] * 25
    found = comparison({"law": graded(base)}, {"law": graded(teacher)}, {"law": graded(student)}, {"law": 0})["domains"]["law"]["gap_closed"]
    assert found["value"] == pytest.approx(0.5)
    assert found["low"] < 0.5 < found["high"]
    closed = comparison({"law": graded(base)}, {"law": graded(teacher)}, {"law": graded(teacher)}, {"law": 0})["domains"]["law"]["gap_closed"]
    assert (closed["value"], closed["low"]) == (1.0, pytest.approx(1 - (1 - 0.025 ** (1 / 40)) / (30 / 40))), "as far as forty prompts can tell"
    level = comparison({"law": graded(base)}, {"law": graded(base)}, {"law": graded(student)}, {"law": 0})["domains"]["law"]
    assert level["gap_closed"] is None
    for prompts, is_known in ((5, False), (6, True)):
        roles = [{"law": graded([score] * prompts)} for score in (0.0, 1.0, 1.0)]
        assert (comparison(*roles, {"law": 0})["domains"]["law"]["gap_closed"] is not None) == is_known, "a lead on each of a few prompts may be luck"
    assert comparison({}, {"law": graded(teacher)}, {"law": graded(student)}, {"law": 0})["domains"]["law"]["gap_closed"] is None


def test_with_several_samples_a_prompts_score_is_their_mean_and_the_divergence_that_of_the_first(evaluator, sampler, tokenizer, cfg):
    one = evaluator.evaluate_domain("law", sampler)
    prompts = evaluator.prompts["law"]
    rollouts = sampler.sample(prompts, SamplingConfig(max_new_tokens=5, decode_width=6), 3)
    said = [tokenizer.decode(rollout.completion_T, skip_special_tokens=True).strip() for rollout in rollouts]
    evaluator.prompts["law"] = [replace(prompt, answer=said[3 * number + 1]) for number, prompt in enumerate(prompts)]
    cfg.evaluation.samples = 3
    found = evaluator.evaluate_domain("law", sampler)
    right = tuple(sum(said[3 * number + sample] == said[3 * number + 1] for sample in range(3)) for number in range(ROWS))
    assert found.right == right
    assert found.scores == tuple(count / 3 for count in right)
    assert found.accuracy.value == pytest.approx(sum(right) / (3 * ROWS))
    assert found.kl_per_sequence == one.kl_per_sequence
