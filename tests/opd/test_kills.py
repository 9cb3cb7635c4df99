"""A run of two ranks whose ranks are killed, in every phase of a step, of a save and of a conversion, ends bit for bit like one that nobody disturbed."""

import json
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest

NUM_KILLS = 20
PHASES = {
    "sampling": ("rollout.sampler:LocalSampler", "sample"),
    "scoring": ("teachers.pool:TeacherPool", "score"),
    "update": ("opd.engine:Engine", "backward"),
    "optimizer step": ("opd.engine:Engine", "step"),
    "save: begin": ("opd.checkpoint_files:", "begin_partial"),
    "save: files": ("opd.engine:Engine", "save"),
    "save: hashes": ("opd.checkpoint_files:", "seal"),
    "save: rename": ("opd.checkpoint_files:", "commit"),
    "save: verify": ("opd.checkpoint_files:", "problem_of"),
    "save: pointer": ("opd.checkpoint_files:", "point_to"),
    "save: older ones go": ("opd.checkpoint_files:", "forget_older"),
}
BESIDE = {name: place for name, place in PHASES.items() if not name.startswith("save: ")} | {
    "save: files": ("opd.engine:Engine", "save"),
    "save: writers start": ("opd.checkpoint_writer:", "start"),
    "save: writers are waited for": ("opd.checkpoint_writer:", "settle"),
}  # fmt: skip
"""With checkpoint.asynchronous=true. A writer dies with its rank, so that a kill in a step finds it at work."""

CONVERSION = {
    "conversion": ("opd.resharding:", "_convert"),
    "conversion: what DeepSpeed left": ("opd.resharding:", "_wrap_states"),
    "conversion: read": ("opd.engine:Engine", "load"),
}
OF_RANK_0 = ("save: begin", "save: rename", "save: pointer", "save: older ones go", "conversion", "conversion: what DeepSpeed left")

SCRIPT = """
import importlib, json, os, signal, sys, threading
from pathlib import Path

from opd.__main__ import main

plan, kills, phases = json.loads(Path(sys.argv[1]).read_text()), Path(sys.argv[1]).with_name("kills"), json.loads(sys.argv[2])
done = len(kills.read_text().splitlines()) if kills.exists() else 0


def die(phase):
    with kills.open("a") as file:
        file.write(phase + chr(10))
    os.kill(os.getpid(), signal.SIGKILL)


def doom(phase, calls, delay):
    module, _, owner = phases[phase][0].partition(":")
    owner = getattr(importlib.import_module(module), owner) if owner else importlib.import_module(module)
    whole = getattr(owner, phases[phase][1])

    def doomed(*arguments, **named):
        nonlocal calls
        calls -= 1
        if calls == 0 and delay == 0:
            die(phase)
        if calls == 0:
            timer = threading.Timer(delay, die, [phase])
            timer.daemon = True
            timer.start()
        return whole(*arguments, **named)

    setattr(owner, phases[phase][1], doomed)


if "RANK" in os.environ and done < len(plan) and int(os.environ["RANK"]) == plan[done]["rank"]:
    doom(plan[done]["phase"], plan[done]["calls"], plan[done]["delay"])
sys.exit(main(sys.argv[3:]))
"""

SUPERVISED = """
import json, sys
from opd.__main__ import load_config
from opd.supervisor import Supervisor
sys.exit(Supervisor([sys.executable, *json.loads(sys.argv[1])], load_config("distill", json.loads(sys.argv[2]))).run())
"""


@pytest.fixture(scope="module")
def settings(saved_v4, teacher_folders) -> list[str]:
    """Of the quickstart's sizes, but for the number of steps and prompts."""
    return [
        "experiment=quickstart", "domain=[arithmetic,tools]", "num_steps=40", "rollout.prompts_per_step=16", "checkpoint.every=1", "evaluation.every=0",
        "evaluation.prompts=8", "check.signal=off", "check.teacher_answers=0", "logger=none", "threads=1", f"student.model={saved_v4}",
        "launch.processes=2", "launch.heartbeat_seconds=20", f"launch.max_restarts={NUM_KILLS}",
        *(f"domains.{name}.teacher.model={teacher_folders['v4']}" for name in ("arithmetic", "tools")),
    ]  # fmt: skip


def plan_of(seed: int, phases: dict, count: int) -> list[dict]:
    """Every phase once, at its begin, then some drawn, at their begin or while they last; in the first call or the second, where there are several."""
    draws = random.Random(seed)
    drawn = [(phase, draws.choice([0, 0.02, 0.2])) for phase in draws.choices(list(phases), k=count - len(phases))]
    kills = [*((phase, 0) for phase in phases), *drawn]
    draws.shuffle(kills)
    last = 1 if phases is CONVERSION else 2
    return [
        {"phase": phase, "rank": 0 if phase in OF_RANK_0 else draws.randrange(2), "calls": draws.randint(1, last), "delay": delay} for phase, delay in kills
    ]  # fmt: skip


def run(folder: Path, plan: list[dict], phases: dict, settings: list[str]) -> Path:
    """A supervised run whose ranks die as planned; returns its folder."""
    folder.mkdir()
    (folder / "plan.json").write_text(json.dumps(plan))
    (folder / "script.py").write_text(SCRIPT)
    settings = [*settings, f"run_dir={folder / 'run'}"]
    rank = [str(folder / "script.py"), str(folder / "plan.json"), json.dumps(phases), "distill", *settings]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", SUPERVISED, json.dumps(rank), json.dumps(settings)]
    ended = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=3000, check=False)
    assert ended.returncode == 0, ended.stderr[-4000:]
    return folder / "run"


def require_same(tmp_path: Path, phases: dict, count: int, settings: list[str], numbers) -> None:
    """So many kills, all of which happen, change nothing."""
    whole = run(tmp_path / "whole", [], phases, settings)
    plan = plan_of(0, phases, count)
    killed = run(tmp_path / "killed", plan, phases, settings)
    assert (tmp_path / "killed/kills").read_text().splitlines() == [kill["phase"] for kill in plan]
    assert numbers(killed) == numbers(whole)
    assert (killed / "student/model.safetensors").read_bytes() == (whole / "student/model.safetensors").read_bytes()


@pytest.mark.slow
@pytest.mark.multi
def test_twenty_kills_change_nothing(settings, numbers, tmp_path):
    require_same(tmp_path, PHASES, NUM_KILLS, settings, numbers)


@pytest.mark.slow
@pytest.mark.multi
def test_ten_kills_of_a_run_that_saves_beside_training_change_nothing(settings, numbers, tmp_path):
    require_same(tmp_path, BESIDE, 10, [*settings, "checkpoint.asynchronous=true", "num_steps=20"], numbers)


@pytest.mark.slow
@pytest.mark.multi
def test_kills_while_a_checkpoint_is_converted_change_nothing(settings, numbers, tmp_path):
    alone = [*settings, "num_steps=3", "rollout.save=true", "launch.processes=1", "launch.max_restarts=0", f"run_dir={tmp_path / 'alone'}"]
    subprocess.run([sys.executable, "-m", "opd", "distill", *alone], check=True, env=os.environ | {"OMP_NUM_THREADS": "1"}, timeout=600)
    require_same(tmp_path, CONVERSION, 6, [*settings, "num_steps=5", f"branch_from={tmp_path / 'alone'}@2"], numbers)
