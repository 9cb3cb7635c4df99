"""The teacher's length: that of answers it samples itself, known to every step of the run and after a resume, and nothing else changes by asking for it."""

import json

import pytest

from opd.__main__ import load_config
from opd.distill import distill
from opd.evaluator import Evaluator
from opd.rollouts import FirstRequest, build_stream
from opd.signal_figures import measure_signals
from opd.student import build_student, load_student_tokenizer
from opd.teacher_answers import length_ratios
from rollout.config import ModelConfig
from rollout.model import load_model, save_model
from rollout.sampler import LocalSampler
from teachers.pool import TeacherPool

DOMAINS = ("arithmetic", "tools")
ADDED = ("/teacher_length", "/length_ratio", "alarms/active")


@pytest.fixture
def settings(saved_qwen3_moe, teacher_folders, tmp_path) -> list[str]:
    """A run of random weights, whose answers end where chance will have it."""
    chosen = ["domain=[arithmetic,tools]", f"student.model={saved_qwen3_moe}", f"run_dir={tmp_path / 'run'}", "logger=none", "num_steps=2", "check.signal=warn"]
    chosen += ["rollout.prompts_per_step=4", "rollout.max_new_tokens=12", "rollout.decode_width=4", "check.prompts=2", "optim.warmup_steps=0"]
    chosen += [f"domains.arithmetic.teacher.model={teacher_folders['v4']}", f"domains.tools.teacher.model={teacher_folders['qwen3_moe']}"]
    return chosen + [f"domains.{name}.prompts.rows=16" for name in DOMAINS]


def records(tmp_path) -> list[dict]:
    return [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]


def figures(overrides: list[str], device) -> tuple:
    """(what the check measures, its config and stream)."""
    cfg = load_config("check", overrides)
    tokenizer = load_student_tokenizer(cfg.student)
    student = build_student(cfg.student, tokenizer)
    stream = build_stream(cfg, student, tokenizer, device)
    return measure_signals(cfg, stream, Evaluator(cfg, student, tokenizer, TeacherPool(cfg.domains, cfg.teachers, tokenizer, device))), cfg, stream


def test_the_length_is_that_of_the_teachers_own_answers(settings, teacher_folders, tokenizer, device):
    found, cfg, stream = figures([*settings, "check.teacher_answers=6"], device)
    for number, (name, folder) in enumerate(zip(DOMAINS, ("v4", "qwen3_moe"), strict=True)):
        prompts = stream.prompts.choose(name, 6, "check/teacher", FirstRequest.teacher_answers + 6 * number)
        teacher = load_model(ModelConfig(model=str(teacher_folders[folder])), "teacher")
        answers = LocalSampler(teacher, [tokenizer.eos_token_id], cfg.seed, len(tokenizer)).sample(prompts, cfg.rollout)
        assert found[name].teacher_length == sum(len(answer.completion_T) for answer in answers) / 6


def test_reference_answers_are_measured_with_their_end_whether_they_are_graded_or_not(settings, device):
    found, _, stream = figures([*settings, "domains.tools.grader=null", "check.prompts=16"], device)
    rows = stream.prompts.domains["tools"].sources["prompts"]
    assert found["tools"].reference_length == sum(len(row["answer"]) + 1 for row in rows) / 16  # one token per character
    assert found["tools"].teacher_length is None, "nobody asked"


def test_a_domain_whose_warm_up_asks_its_teacher_is_not_asked_for_the_check(settings, device):
    found, _, _ = figures([*settings, "check.teacher_answers=2", "warmup=sft", "warmup.domains=[tools]"], device)
    assert found["arithmetic"].teacher_length is not None
    assert found["tools"].teacher_length is None


def test_a_dense_teacher_answers_in_a_run_that_records_its_students_routes(settings, new_student, tokenizer, tmp_path, device):
    dense = new_student("qwen3_tiny", hidden_size=32, num_hidden_layers=1)
    save_model(tmp_path / "dense", dense, tokenizer, dense.state_dict())
    found, _, _ = figures([*settings, "check.teacher_answers=2", "rollout.record_routes=true", f"domains.tools.teacher.model={tmp_path / 'dense'}"], device)
    assert found["tools"].teacher_length is not None


@pytest.mark.slow
def test_the_answers_change_nothing_of_the_run(settings, numbers, tmp_path, device):
    distill(load_config("distill", [*settings, f"run_dir={tmp_path / 'without'}"]))
    distill(load_config("distill", [*settings, "check.teacher_answers=3"]))
    found, without = (numbers(tmp_path / run) for run in ("run", "without"))
    assert [{name: value for name, value in record.items() if not name.endswith(ADDED)} for record in found] == [
        {name: value for name, value in record.items() if name != "alarms/active"} for record in without
    ]


@pytest.mark.slow
def test_a_resumed_run_has_the_ratios_of_one_that_was_not(settings, tmp_path, device):
    chosen = [*settings, "check.teacher_answers=3", "checkpoint.every=1"]
    distill(load_config("distill", chosen))
    whole = records(tmp_path)
    for record in whole[1:]:
        for name in DOMAINS:
            assert record[f"domain/{name}/length_ratio"] == record[f"domain/{name}/completion_length"] / whole[0][f"check/{name}/teacher_length"]
    (tmp_path / "run").rename(tmp_path / "whole")
    distill(load_config("distill", [*chosen, "num_steps=1"]))
    stored = tmp_path / "run" / "config.yaml"
    stored.write_text(stored.read_text().replace("num_steps: 1\n", "num_steps: 2\n"))
    distill(load_config("distill", chosen))
    ratios = [{name: value for name, value in record.items() if name.endswith("length_ratio")} for record in records(tmp_path)]
    assert ratios == [{name: value for name, value in record.items() if name.endswith("length_ratio")} for record in whole]


def test_the_warm_ups_length_counts_before_the_checks():
    first = {"check/law/teacher_length": 8.0, "warmup/law/teacher_length": 10.0, "check/code/teacher_length": 4.0}
    step = {"domain/law/completion_length": 5.0, "domain/code/completion_length": 5.0, "domain/chess/completion_length": 5.0}
    assert length_ratios(step, first) == {"domain/law/length_ratio": 0.5, "domain/code/length_ratio": 1.25}
