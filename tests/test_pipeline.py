"""The pipeline command, small: stages, hashes, skipping, the summary."""

import json
import os
import signal
import subprocess
import sys

import pytest
import torch

from opd.__main__ import load_config
from opd.pipeline import run_pipeline
from opd.stages import _last_error
from opd.stopping import SIGNALS
from rollout.config import ModelConfig
from rollout.model import load_model

PIPELINE = """# @package _global_
stages:
  base:
    command: specialize
    processes: 1
    overrides: [student=deepseek_v4_tiny, "domain=[arithmetic]", domains.arithmetic.prompts.rows=50, num_steps=2, examples_per_step=8, optim.lr=1e-3]
  teacher:
    command: specialize
    processes: 1
    after: [base]
    overrides: ["domain=[arithmetic]", "student.model=${run_dir}/base/student", domains.arithmetic.prompts.rows=50, num_steps=2, examples_per_step=8]
  distill:
    command: distill
    after: [teacher]
    overrides: ["domain=[arithmetic]", "student.model=${run_dir}/base/student", "domains.arithmetic.teacher.model=${run_dir}/teacher/student", check.signal=off,
      quant=mxfp4_experts, domains.arithmetic.prompts.rows=50, num_steps=2, rollout.prompts_per_step=8, rollout.max_new_tokens=4, rollout.decode_width=4]
  export:
    command: export
    after: [distill]
    overrides: ["student.model=${run_dir}/distill/student"]
  evaluate:
    command: evaluate
    processes: 1
    after: [export]
    overrides: ["domain=[arithmetic]", "student.model=${run_dir}/export/student", "base.model=${run_dir}/base/student",
      "domains.arithmetic.teacher.model=${run_dir}/teacher/student", domains.arithmetic.held_out.rows=16, evaluation.max_new_tokens=4]
"""


RECORDS = ("summary.json", "evaluate/evaluation.json", "stages/distill.json", "distill/state.json")
ARGUMENTS = ["pipeline=small", "run_dir=runs/small", "logger=none"]


def formats(run_dir, shape) -> dict:
    """What a pipeline's files look like: the JSON records by shape, the folder of its distillation by the names of our files."""
    records = {name: shape(json.loads((run_dir / name).read_text())) for name in RECORDS}
    files = sorted(str(path.relative_to(run_dir)) for path in run_dir.rglob("*") if path.is_file())
    others = ("zero_", "mp_rank_")  # DeepSpeed's own files, one per rank
    kept = [name for name in files if not name.split("/")[-1].startswith(others) and not name.endswith(".patch")]  # a patch there is of a changed tree alone
    return {"records": records, "distill": [name for name in kept if name.startswith("distill/")]}


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A working directory in which the small pipeline has run once, with that run's output."""
    workspace = tmp_path_factory.mktemp("workspace")
    (workspace / "conf" / "pipeline").mkdir(parents=True)
    (workspace / "conf" / "pipeline" / "small.yaml").write_text(PIPELINE)
    command = [sys.executable, "-m", "opd", *ARGUMENTS]
    result = subprocess.run(command, cwd=workspace, capture_output=True, text=True, timeout=1200, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert result.returncode == 0, result.stdout + result.stderr
    return workspace, result.stdout


@pytest.fixture
def opd(finished, monkeypatch, capsys):
    """opd(): the same command in the tests' own process, which saves the seconds of its imports; returns what it printed."""

    def run() -> str:
        run_pipeline(load_config("pipeline", ARGUMENTS))
        return capsys.readouterr().out

    monkeypatch.chdir(finished[0])
    before = {number: signal.getsignal(number) for number in SIGNALS}
    yield run
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.multi
def test_the_summary_has_every_figure(finished):
    workspace, output = finished
    summary = json.loads((workspace / "runs/small/summary.json").read_text())
    assert set(summary) == {"schema", "domains", "difference", "min_recovery", "not_graded", "base", "seconds", "peak_memory_bytes", "seed", "versions"}
    domain = summary["domains"]["arithmetic"]
    for role in ("base", "teacher", "student"):
        assert {"accuracy", "low", "high"} <= set(domain[role])
        assert domain[role]["low"] <= domain[role]["accuracy"] <= domain[role]["high"]
    assert set(summary["seconds"]) == {"base", "teacher", "distill", "export", "evaluate"}
    assert summary["peak_memory_bytes"] > 1e8
    assert "arithmetic" in output


@pytest.mark.multi
def test_records_and_run_folder_have_the_format_on_file(finished, golden_dir, shape):
    workspace, _ = finished
    assert formats(workspace / "runs/small", shape) == json.loads((golden_dir / "pipeline.json").read_text())


@pytest.mark.slow
@pytest.mark.multi
def test_finished_stages_are_skipped_and_changed_ones_done_again(finished, opd):
    workspace, _ = finished
    before = {name: (workspace / f"runs/small/stages/{name}.json").read_text() for name in ("base", "teacher", "distill", "export")}
    assert opd().count("done before, skipped") == 5
    changed = PIPELINE.split("  evaluate:")[0].replace("rollout.max_new_tokens=4", "rollout.max_new_tokens=5")
    (workspace / "conf" / "pipeline" / "small.yaml").write_text(changed)
    printed = opd()
    assert [name for name in ("base", "teacher", "distill", "export") if f"{name}: done before" in printed] == ["base", "teacher"]
    after = {name: (workspace / f"runs/small/stages/{name}.json").read_text() for name in before}
    assert after["base"] == before["base"]
    assert after["distill"] != before["distill"]
    assert after["export"] != before["export"]


@pytest.mark.multi
def test_a_student_trained_under_fp4_is_exported_without_changing_a_weight(finished):
    workspace, _ = finished
    assert json.loads((workspace / "runs/small/export/export.json").read_text())["experts"]["share_off_grid"] == 0
    distilled, exported = (load_model(ModelConfig(model=str(workspace / f"runs/small/{stage}/student")), "student") for stage in ("distill", "export"))
    ours, theirs = distilled.state_dict(), exported.state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    tokens = torch.arange(64)[None] % distilled.config.vocab_size
    with torch.no_grad():
        assert torch.equal(distilled(tokens).logits, exported(tokens).logits)


@pytest.mark.parametrize(
    ("log", "found"),
    [
        ("MXFP4 attached to 3 layers\nopd: the student is not at ./no/student\n[rank1]: ChildFailedError: \n", "the student is not at ./no/student"),
        ("MXFP4 attached to 3 layers\n[rank1]: RuntimeError: out of memory\nat exit\n", "RuntimeError: out of memory"),
        ("opd: start 2\n[rank 1] opd: rank 0 is gone\n", "rank 0 is gone"),
        ("MXFP4 attached to 3 layers\nKilled\n\n", "Killed"),
        ("", "nothing"),
    ],
)
def test_a_failed_stage_is_explained_by_its_own_sentence_else_by_an_exception(log, found, tmp_path):
    (tmp_path / "stage.log").write_text(log)
    assert _last_error(tmp_path / "stage.log") == found
