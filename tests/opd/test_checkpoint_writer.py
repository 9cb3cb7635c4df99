"""Checkpoints that are written beside training are those that are written in it, and one that is not written is no silent loss."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from opd import checkpoint_writer
from opd.__main__ import load_config
from opd.batch import supervised_batches
from opd.checkpoint import resume, save
from opd.checkpoint_files import find, problem_of
from opd.checkpoint_writer import MEMORY, forget_memory, memory_folder, settle
from opd.config import BatchConfig, RunConfig
from opd.distill import distill
from opd.errors import Preempted
from opd.job_config import CheckpointConfig
from opd.run import write_config
from opd.stopping import StopRequest
from opd.tracker import Tracker

BESIDE = CheckpointConfig(asynchronous=True)


class Nothing:
    """A stream without a state; notes what it may forget."""

    prompts = SimpleNamespace(domains={})

    def __init__(self):
        self.forgotten: list[int] = []

    def state(self) -> dict:
        return {}

    def restore(self, state: dict) -> None:
        pass

    def forget_before(self, step: int) -> None:
        self.forgotten.append(step)


@pytest.fixture
def engine(new_student, make_engine, make_config, tmp_path):
    engine = make_engine(new_student("qwen3_moe_tiny", num_hidden_layers=1, hidden_size=32), make_config())
    write_config(tmp_path, engine.cfg, "test")
    return engine


def newest(run_dir: Path) -> str:
    return json.loads((run_dir / "checkpoints/latest.json").read_text())["tag"]


def test_a_run_that_saves_beside_training_ends_with_the_same_checkpoints_and_weights(short_settings, short_run, numbers, tmp_path):
    distill(load_config("distill", [*short_settings, f"run_dir={tmp_path}", "logger=none", "checkpoint.asynchronous=true"]))
    assert numbers(tmp_path) == numbers(short_run)
    assert (tmp_path / "student/model.safetensors").read_bytes() == (short_run / "student/model.safetensors").read_bytes()
    assert find(tmp_path / "checkpoints").tags == find(short_run / "checkpoints").tags
    for tag in find(tmp_path / "checkpoints").tags:
        assert problem_of(tmp_path / "checkpoints" / tag) is None
        assert sorted(os.listdir(tmp_path / "checkpoints" / tag)) == sorted(os.listdir(short_run / "checkpoints" / tag))


def test_it_is_taken_up_like_any_other(engine, tmp_path):
    stream = Nothing()
    engine.policy_step = 7
    save(tmp_path, 7, engine, stream, BESIDE)
    settle()
    engine.policy_step = 0
    assert resume(tmp_path, engine, stream, Tracker(tmp_path, "test", engine.cfg)) == 7
    assert engine.policy_step == 7


def test_nothing_is_forgotten_before_it_is_in_force(engine, tmp_path):
    stream = Nothing()
    save(tmp_path, 1, engine, stream, BESIDE)
    assert stream.forgotten == []
    save(tmp_path, 2, engine, stream, BESIDE)
    assert (stream.forgotten, newest(tmp_path)) == ([1], "step-000001")
    settle()
    assert (stream.forgotten, newest(tmp_path)) == ([1, 2], "step-000002")


def test_nothing_stays_in_memory(engine, tmp_path):
    save(tmp_path, 1, engine, Nothing(), BESIDE)
    settle()
    assert memory_folder(tmp_path, 0).parent == MEMORY
    assert not memory_folder(tmp_path, 0).exists()
    assert not (tmp_path / "checkpoints/parts").exists()


def test_a_writer_that_was_killed_fails_the_next_save_and_the_older_checkpoint_stays_in_force(engine, tmp_path):
    stream = Nothing()
    save(tmp_path, 1, engine, stream, CheckpointConfig())
    save(tmp_path, 2, engine, stream, BESIDE)
    checkpoint_writer._PENDING[0].writer.kill()
    with pytest.raises(ValueError, match=r"the checkpoint of step 2 has not been written \(rank 0: it was killed by SIGKILL\): the older one stays in force"):
        save(tmp_path, 3, engine, stream, BESIDE)
    assert newest(tmp_path) == "step-000001"
    assert problem_of(tmp_path / "checkpoints/step-000001") is None
    assert stream.forgotten == [1]


def test_a_writer_that_fails_says_why(engine, tmp_path):
    save(tmp_path, 1, engine, Nothing(), BESIDE)
    forget_memory(tmp_path, 0)  # under the writer's hands
    with pytest.raises(ValueError, match=r"the checkpoint of step 1 has not been written \(rank 0: .*No such file"):
        settle()


def test_a_run_that_ends_by_an_error_still_has_its_checkpoint_written(engine, tmp_path):
    def fail_after_a_save() -> None:
        with StopRequest(RunConfig()):
            save(tmp_path, 3, engine, Nothing(), BESIDE)
            raise KeyError("something")

    with pytest.raises(KeyError):
        fail_after_a_save()
    assert newest(tmp_path) == "step-000003"
    settle()


def test_a_run_that_is_asked_to_end_waits_for_its_checkpoint(engine, tmp_path):
    with StopRequest(RunConfig(num_steps=5)) as stop:
        stop.reason = "SIGTERM"
        assert stop.is_due(3)
        save(tmp_path, 3, engine, Nothing(), BESIDE)
        with pytest.raises(Preempted):
            stop.leave(3)
    assert newest(tmp_path) == "step-000003"


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_what_a_checkpoint_will_take_is_known_before(stage, new_student, make_engine, make_config, random_rollouts, tmp_path):
    engine = make_engine(new_student("qwen3_moe_tiny"), make_config(stage=stage))
    expected = engine.checkpoint_bytes()
    [batch] = supervised_batches(random_rollouts([("law", 3, 4)]), {"law": 0.25}, BatchConfig())
    engine.backward(engine.loss(batch, None, True)[0])
    engine.step()
    save(tmp_path, 1, engine, Nothing(), CheckpointConfig())
    found = sum(path.stat().st_size for path in (tmp_path / "checkpoints/step-000001").iterdir())
    assert found == pytest.approx(expected, rel=0.05)


def test_a_run_without_room_in_memory_for_its_checkpoints_is_refused(engine, tmp_path, monkeypatch):
    engine.cfg.checkpoint.asynchronous = True
    usage = shutil.disk_usage
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(path)._replace(free=1000))
    with pytest.raises(ValueError, match=r"asynchronous=true keeps .* GiB in /dev/shm .* where 0\.00 are free: make it larger, or set .*=false"):
        resume(tmp_path, engine, Nothing(), Tracker(tmp_path, "test", engine.cfg))


@pytest.mark.slow
@pytest.mark.multi
def test_two_ranks_write_theirs_side_by_side(short_settings, tmp_path):
    settings = [*short_settings, "logger=none", "checkpoint.asynchronous=true", f"run_dir={tmp_path}", "launch.processes=2"]
    ended = subprocess.run([sys.executable, "-m", "opd", "distill", *settings], capture_output=True, text=True, timeout=600, check=False)
    assert ended.returncode == 0, ended.stderr[-3000:]
    assert newest(tmp_path) == "step-000002"
    for tag in ("step-000001", "step-000002"):
        assert problem_of(tmp_path / "checkpoints" / tag) is None
        assert {"zero_pp_rank_0_mp_rank_00_optim_states.pt", "zero_pp_rank_1_mp_rank_00_optim_states.pt"} <= set(os.listdir(tmp_path / "checkpoints" / tag))
