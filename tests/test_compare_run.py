"""`opd compare`, small and whole: arms are made, judged and summarised, what is finished is not done again, and the table needs no model."""

import json
import os
import shutil
import subprocess
import sys

import pytest

COMPARISON = """# @package _global_
run_dir: runs/small
base_model: ${run_dir}/base/student
stages:
  base:
    command: specialize
    processes: 1
    overrides: [student=deepseek_v4_tiny, "domain=[arithmetic]", domains.arithmetic.prompts.rows=50, num_steps=2, examples_per_step=8, optim.lr=1e-3]
  teacher:
    command: specialize
    processes: 1
    after: [base]
    overrides: ["domain=[arithmetic]", "student.model=${base_model}", domains.arithmetic.prompts.rows=50, num_steps=2, examples_per_step=8]
teachers: {arithmetic: "${run_dir}/teacher/student"}
settings:
  distill: ["domain=[arithmetic]", check.signal=off, domains.arithmetic.prompts.rows=50, num_steps=2, rollout.prompts_per_step=8, rollout.max_new_tokens=4,
    rollout.decode_width=4]
  specialize: ["domain=[arithmetic]", domains.arithmetic.prompts.rows=50, num_steps=0, grpo.num_steps=2, rollout.prompts_per_step=2,
    rollout.completions_per_prompt=4, rollout.max_new_tokens=4, rollout.decode_width=4]
  merge: ["domain=[arithmetic]"]
  evaluate: ["domain=[arithmetic]", domains.arithmetic.held_out.rows=16, evaluation.max_new_tokens=4]
arms:
  opd: {label: on-policy distillation, role: method, seeds: 2}
  sft: {label: SFT on teacher samples, overrides: [warmup=sft, warmup.steps=3, warmup.prompts=12, num_steps=0]}
  grpo: {label: mixed GRPO, command: specialize}
  sft_seconds: {label: SFT with the same seconds, like: sft, seconds_of: opd, scaled: [warmup.steps, warmup.prompts]}
  average: {label: average, command: merge, overrides: [kind=average]}
"""


def opd(workspace, *overrides: str) -> str:
    """The comparison's output."""
    command = [sys.executable, "-m", "opd", "compare", "experiment=small", "logger=none", *overrides]
    result = subprocess.run(command, cwd=workspace, capture_output=True, text=True, timeout=1200, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    workspace = tmp_path_factory.mktemp("workspace")
    (workspace / "conf/experiment").mkdir(parents=True)
    (workspace / "conf/experiment/small.yaml").write_text(COMPARISON)
    return workspace, opd(workspace)


@pytest.mark.slow
def test_every_arm_is_summarised_with_its_budget_and_shown(finished):
    workspace, printed = finished
    summaries = {path.stem: json.loads(path.read_text()) for path in (workspace / "runs/small/results").glob("*.json")}
    assert summaries.keys() == {"opd-0", "opd-1", "sft-0", "grpo-0", "sft_seconds-0", "average-0"}
    assert summaries["opd-0"]["budget"]["steps"] == summaries["grpo-0"]["budget"]["steps"] == 2
    assert summaries["sft-0"]["budget"]["steps"] == 3
    assert summaries["average-0"]["budget"]["steps"] == 0
    assert 0 < summaries["opd-0"]["budget"]["student_tokens"] <= 2 * 8 * 4
    assert 0 < summaries["sft-0"]["budget"]["student_tokens"] <= 3 * 8 * 4
    assert all(summary["budget"]["seconds"] > 0 for summary in summaries.values())
    assert "not finished" not in printed
    assert "SFT with the same seconds*" in printed


@pytest.mark.slow
def test_an_arm_has_the_base_s_record_from_the_cache(finished):
    workspace, _ = finished
    records = [json.loads((workspace / f"runs/small/{arm}-evaluation/evaluation.json").read_text())["domains"]["arithmetic"] for arm in ("opd-0", "average-0")]
    assert records[0]["base"] == records[1]["base"]
    keys = [json.loads(path.read_text())["key"] for path in (workspace / "runs/small/evaluations").glob("*.json")]
    assert len(keys) == 2 + 5  # base, five students, and the teacher, which the average of one teacher is
    assert records[1]["student"] == records[1]["teacher"]


@pytest.mark.slow
def test_finished_arms_are_not_run_again_even_where_base_and_teachers_are_gone(finished, tmp_path):
    workspace, printed = finished
    shutil.copytree(workspace / "conf", tmp_path / "conf")
    shutil.copytree(workspace / "runs/small/results", tmp_path / "runs/small/results")
    again = opd(tmp_path)
    assert again.splitlines()[-4:-1] == printed.splitlines()[-4:-1]
    assert not (tmp_path / "runs/small/base").exists()
