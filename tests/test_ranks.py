"""Whole runs of `opd distill` in one and in two gloo processes, at every ZeRO stage (DESIGN section 5, property 1).

The runs on two ranks are made one after another by one pair of processes, since importing what they need takes longer than they do.
"""

import itertools
import json
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from opd.__main__ import load_config
from opd.distill import distill
from rollout.model import save_model
from rollout.replay import load_rollouts, replay_file, save_rollouts

NUM_STEPS = 20
NUM_QUANTIZED_STEPS = 8
OTHERS = ["zero1", "zero2"]
STAGES = ["zero3", *(pytest.param(stage, marks=pytest.mark.slow) for stage in OTHERS)]
SETTINGS = [
    "domain=[arithmetic,tools]",
    f"num_steps={NUM_STEPS}",
    "rollout.prompts_per_step=12",
    "rollout.max_new_tokens=10",
    "rollout.decode_width=8",
    "domains.arithmetic.prompts.rows=64",
    "domains.tools.prompts.rows=64",
    "batch.max_tokens_per_micro_batch=100",
    "optim.lr=1e-3",
    "optim.warmup_steps=2",
    "logger=none",
    "threads=1",
    "check.signal=off",
    "check.teacher_answers=3",
]

SCRIPT = """
import json, sys

from opd.__main__ import load_config
from opd.distill import distill

for arguments in json.load(open(sys.argv[1])):
    distill(load_config("distill", arguments))
"""


def python(*arguments: str) -> subprocess.CompletedProcess:
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    result = subprocess.run([sys.executable, *arguments], capture_output=True, text=True, env=environment, timeout=900)
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-4000:]
    return result


def records(run_dir: Path) -> list[dict[str, float]]:
    """Of the steps after training began."""
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()][1:]


def losses(run_dir: Path) -> list[float]:
    return [record["step/loss"] for record in records(run_dir)]


@pytest.fixture(scope="module")
def settings(tmp_path_factory, tokenizer, new_student) -> list[str]:
    """Settings with a student and two teachers on disk, of different weights."""
    folder = tmp_path_factory.mktemp("models")
    for seed, name in enumerate(["student", "arithmetic", "tools"]):
        model = new_student("deepseek_v4_tiny", seed=seed)
        save_model(folder / name, model, tokenizer, model.state_dict())
    teachers = [f"domains.{name}.teacher.model={folder / name}" for name in ("arithmetic", "tools")]
    return [*SETTINGS, f"student.model={folder / 'student'}", *teachers]


@pytest.fixture(scope="module")
def saved_run(tmp_path_factory, settings, device) -> Path:
    """A run in one process that sampled its rollouts and saved them, with their routes."""
    run_dir = tmp_path_factory.mktemp("runs") / "saved"
    distill(load_config("distill", [*settings, f"run_dir={run_dir}", "rollout.save=true", "rollout.record_routes=true", "check.signal=warn"]))
    return run_dir


@pytest.fixture(scope="module")
def far_off(tmp_path_factory, saved_run) -> Path:
    """The saved rollouts of three steps, as if a sampler had been off by 1 in the log-probabilities of each fourth one."""
    run_dir = tmp_path_factory.mktemp("runs") / "far_off"
    for step in range(3):
        rollouts = load_rollouts(replay_file(saved_run, step))
        shifted = [replace(rollout, logprob_T=rollout.logprob_T + (number % 4 == 1)) for number, rollout in enumerate(rollouts)]
        save_rollouts(replay_file(run_dir, step), step, shifted)
    return run_dir


@pytest.fixture(scope="module")
def quantized_run(tmp_path_factory, settings, saved_run) -> Path:
    """A run in one process that trained under FP4 on the saved rollouts."""
    run_dir = tmp_path_factory.mktemp("runs") / "quantized"
    distill(load_config("distill", [*settings, f"run_dir={run_dir}", f"rollout.replay={saved_run}", "quant=mxfp4_experts", f"num_steps={NUM_QUANTIZED_STEPS}"]))
    return run_dir


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory, settings, saved_run, far_off) -> tuple[Path, str]:
    """Folder of runs on two ranks at ZeRO-3, and what they wrote to stderr: "none/zero3" and "mxfp4_experts/zero3" replay the saved run, "routes" with its
    routes, "live" samples beside it, and "masked" leaves out rollouts of those that are far off.
    """
    folder = tmp_path_factory.mktemp("two_ranks")
    live = [*settings, f"run_dir={folder / 'live'}", f"rollout.compare={saved_run}", "num_steps=3", "check.signal=warn", "deepspeed=zero3"]
    short = [*settings, "num_steps=3", "deepspeed=zero3"]
    routes = [*short, f"run_dir={folder / 'routes'}", f"rollout.replay={saved_run}", "student.replay_routes=true"]
    masked = [*short, f"run_dir={folder / 'masked'}", f"rollout.replay={far_off}", "rollout.max_mismatch=0.1"]
    return folder, on_two_ranks(folder, [live, *replays(folder, ["zero3"], settings, saved_run), routes, masked])


@pytest.fixture(scope="module")
def other_stages(tmp_path_factory, settings, saved_run) -> tuple[Path, str]:
    """The same of the replays at the other ZeRO stages."""
    folder = tmp_path_factory.mktemp("other_stages")
    return folder, on_two_ranks(folder, replays(folder, OTHERS, settings, saved_run))


@pytest.fixture
def at_stage(stage, request) -> Path:
    """Folder of the replays at a stage."""
    return request.getfixturevalue("other_stages" if stage in OTHERS else "two_ranks")[0]


def replays(folder: Path, stages: list[str], settings: list[str], saved_run: Path) -> list[list[str]]:
    """Settings of the runs that replay the saved one, without and with FP4."""
    runs = []
    for quant, stage in itertools.product(("none", "mxfp4_experts"), stages):
        steps = NUM_STEPS if quant == "none" else NUM_QUANTIZED_STEPS
        arguments = [f"run_dir={folder / quant / stage}", f"rollout.replay={saved_run}", f"deepspeed={stage}", f"quant={quant}", f"num_steps={steps}"]
        runs.append([*settings, *arguments])
    return runs


def on_two_ranks(folder: Path, runs: list[list[str]]) -> str:
    """Make runs one after another; returns what they wrote to stderr."""
    (folder / "runs.json").write_text(json.dumps(runs))
    (folder / "script.py").write_text(SCRIPT)
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    return python(*launcher, str(folder / "script.py"), str(folder / "runs.json")).stderr


@pytest.mark.multi
@pytest.mark.parametrize("stage", STAGES)
def test_two_ranks_give_the_loss_trace_of_one_on_saved_rollouts(stage, saved_run, at_stage):
    expected, found = losses(saved_run), losses(at_stage / "none" / stage)
    assert len(found) == NUM_STEPS
    assert found == pytest.approx(expected, rel=1e-5)
    assert abs(expected[0] - expected[-1]) > 0.01, "the loss has to move, or the comparison shows nothing"


@pytest.mark.multi
@pytest.mark.parametrize("stage", STAGES)
def test_two_ranks_keep_the_rollouts_that_one_keeps_with_the_same_figures(stage, saved_run, at_stage):
    expected, found = (json.loads((folder / f"samples/{NUM_STEPS:06d}.json").read_text()) for folder in (saved_run, at_stage / "none" / stage))
    assert set(expected["domains"]) == {"arithmetic", "tools"}
    for name, kept in expected["domains"].items():
        for ours, theirs in zip(kept, found["domains"][name], strict=True):
            assert theirs.pop("kl") == pytest.approx(ours.pop("kl"), rel=1e-3, abs=1e-5)
            require_same_at_worst(theirs.pop("at_worst"), ours.pop("at_worst"))
            assert theirs == ours
        shown, wanted = found["figures"][name], expected["figures"][name]
        assert set(shown["classes"]) == set(wanted["classes"])
        assert shown["deciles"] == [pytest.approx(pair, rel=1e-3, abs=1e-4) for pair in wanted["deciles"]]
        assert shown["classes"] == {kind: pytest.approx(pair, rel=1e-3, abs=1e-4) for kind, pair in wanted["classes"].items()}
        assert shown["prompts"][0]["row"] == wanted["prompts"][0]["row"]


def require_same_at_worst(found: list[dict], expected: list[dict]) -> None:
    """But for the order of what is nearly equal: twenty steps of rounding lie between the two."""
    by_place = {worst["position"]: worst for worst in found}
    common = [worst for worst in expected if worst["position"] in by_place]
    assert len(common) >= len(expected) - 1
    for ours in common:
        theirs = by_place[ours["position"]]
        for role in ("student", "teacher"):
            assert [token["logprob"] for token in theirs[role]] == pytest.approx([token["logprob"] for token in ours[role]], abs=1e-3)


@pytest.mark.multi
@pytest.mark.parametrize("stage", [pytest.param(stage, marks=pytest.mark.slow) for stage in OTHERS])
def test_two_ranks_measure_the_cosines_of_gradients_that_one_measures(stage, saved_run, at_stage):
    name = "conflict/arithmetic/tools/gradient_cosine"
    expected, found = ([record[name] for record in records(folder) if name in record] for folder in (saved_run, at_stage / "none" / stage))
    assert len(expected) >= 1
    assert found == pytest.approx(expected, abs=1e-4)


@pytest.mark.multi
@pytest.mark.parametrize("stage", STAGES)
def test_two_ranks_compare_the_tokens_that_one_compares(stage, saved_run, at_stage):
    wanted = re.compile(r"domain/\w+/(overlap|log_ratio_right|log_ratio_wrong|mismatch_p99)")
    one, two = ([{name: value for name, value in record.items() if wanted.fullmatch(name)} for record in records(folder)]
                for folder in (saved_run, at_stage / "none" / stage))  # fmt: skip
    assert {name.rsplit("/")[-1] for record in one for name in record} >= {"overlap", "log_ratio_wrong", "mismatch_p99"}
    assert two == [pytest.approx(record, rel=1e-3, abs=1e-3) for record in one]


@pytest.mark.multi
def test_two_ranks_that_replay_routes_give_the_loss_trace_of_the_run_that_recorded_them(saved_run, two_ranks):
    found = records(two_ranks[0] / "routes")
    assert [record["step/loss"] for record in found] == pytest.approx(losses(saved_run)[:3], rel=1e-5)
    assert [record["router/agreement"] for record in found] == [1.0] * 3


@pytest.mark.multi
def test_two_ranks_leave_out_the_rollouts_that_one_leaves_out(far_off, settings, two_ranks, tmp_path):
    distill(load_config("distill", [*settings, "num_steps=3", f"run_dir={tmp_path}", f"rollout.replay={far_off}", "rollout.max_mismatch=0.1"]))
    found, expected = records(two_ranks[0] / "masked"), records(tmp_path)
    assert losses(tmp_path) == pytest.approx(losses(two_ranks[0] / "masked"), rel=1e-5)
    for name in ("domain/arithmetic/masked", "domain/tools/masked"):
        assert [record[name] for record in found] == [record[name] for record in expected]
        assert 0 < found[0][name] < 1


@pytest.mark.multi
@pytest.mark.parametrize("stage", STAGES)
def test_under_fp4_two_ranks_give_the_first_loss_of_one_and_stay_close(stage, quantized_run, saved_run, at_stage):
    """A code that flips amplifies rounding, so later steps agree to 1e-3 only."""
    expected, found = losses(quantized_run), losses(at_stage / "mxfp4_experts" / stage)
    assert len(found) == NUM_QUANTIZED_STEPS
    assert found[0] == pytest.approx(expected[0], rel=1e-5)
    assert found == pytest.approx(expected, rel=1e-3)
    assert abs(expected[0] - losses(saved_run)[0]) > 1e-3, "FP4 has to change the loss, or the comparison shows nothing"


@pytest.mark.slow
@pytest.mark.multi
def test_replaying_saved_rollouts_in_another_process_is_bit_identical(saved_run, settings, tmp_path):
    python("-m", "opd", "distill", *settings, f"run_dir={tmp_path / 'run'}", f"rollout.replay={saved_run}")
    assert losses(tmp_path / "run") == losses(saved_run)


@pytest.mark.multi
def test_live_sampling_on_two_ranks_reports_the_first_differing_token(two_ranks):
    folder, errors = two_ranks
    lines = (folder / "live" / "metrics.jsonl").read_text().splitlines()
    differs = [json.loads(line)["step/differs"] for line in lines[1:]]
    assert len(differs) == 3
    assert differs[0] == 0.0, "the first step has the same weights and keys"
    assert any(differs) == ("completion token" in errors)


@pytest.mark.multi
def test_the_check_of_two_ranks_finds_what_that_of_one_finds(saved_run, two_ranks):
    """But for what depends on which rollouts share a micro-batch, and for sizes of rounding."""
    one, two = (json.loads((folder / "metrics.jsonl").read_text().splitlines()[0]) for folder in (saved_run, two_ranks[0] / "live"))
    names = [name for name in one if name.startswith("check/") and not name.endswith(("self_kl", "shift_change"))]
    assert len(names) > 15
    assert "check/tools/teacher_length" in names
    assert {name: two[name] for name in names} == pytest.approx({name: one[name] for name in names}, rel=1e-3)
