"""Checkpoints of a run: what is on disk after a kill at any point, what is taken up, and the format of its records."""

import hashlib
import itertools
import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest

from opd.batch import supervised_batches
from opd.checkpoint import is_due, resume, save
from opd.config import BatchConfig
from opd.engine import Engine
from opd.job_config import CheckpointConfig
from opd.run import write_config
from opd.tracker import Tracker


class Counter:
    """The smallest resumable stream: how many examples were drawn."""

    prompts = SimpleNamespace(domains={})

    def __init__(self, drawn: int = 0):
        self.drawn = drawn

    def state(self) -> dict:
        return {"drawn": self.drawn}

    def restore(self, state: dict) -> None:
        self.drawn = state["drawn"]

    def forget_before(self, step: int) -> None:
        pass


@pytest.fixture
def engine(new_student, make_engine, make_config, tmp_path) -> Engine:
    """Of a run in the test's folder."""
    engine = make_engine(new_student("qwen3_moe_tiny", num_hidden_layers=1, hidden_size=32), make_config())
    write_config(tmp_path, engine.cfg, "test")
    return engine


@pytest.fixture
def tracker(tmp_path, make_config) -> Tracker:
    return Tracker(tmp_path, "test", make_config())


def saved(run_dir: Path) -> set[str]:
    return {path.name for path in (run_dir / "checkpoints").glob("step-*")}


def pointer(run_dir: Path) -> dict:
    return json.loads((run_dir / "checkpoints" / "latest.json").read_text())


def step_once(engine: Engine, rollouts: list) -> None:
    [batch] = supervised_batches(rollouts, {"law": 0.1}, BatchConfig())
    loss, _ = engine.loss(batch, None, True)
    engine.backward(loss)
    engine.step()


@pytest.mark.parametrize(
    ("every", "num_steps", "due"),
    [(2, 5, [2, 4, 5]), (2, None, [2, 4]), (5, 5, [5]), (9, 5, [5]), (9, None, []), (0, 5, [5]), (0, None, []), (1, 3, [1, 2, 3, 4, 5])],
)
def test_what_happens_every_so_many_steps_also_happens_after_the_last(every, num_steps, due):
    assert [step for step in range(1, 6) if is_due(step, every, num_steps)] == due


def test_the_newest_checkpoint_brings_back_engine_stream_and_step(engine, tracker, tmp_path, random_rollouts):
    rollouts = random_rollouts([("law", 3, 4), ("law", 2, 6)])
    step_once(engine, rollouts)
    save(tmp_path, 1, engine, Counter(10), CheckpointConfig())
    step_once(engine, rollouts)
    save(tmp_path, 2, engine, Counter(20), CheckpointConfig())
    expected = engine.full_weights()
    step_once(engine, rollouts)
    stream = Counter()
    assert resume(tmp_path, engine, stream, tracker) == 2
    assert stream.drawn == 20
    assert engine.policy_step == 2
    assert all(bool((tensor == expected[name]).all()) for name, tensor in engine.full_weights().items())


def clip_norm_of(engine: Engine) -> float:
    """That DeepSpeed clips to: its own setting at ZeRO 0, its optimizer's at the other stages."""
    return engine.engine.gradient_clipping() if engine.zero_stage == 0 else engine.engine.optimizer.clip_grad


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_the_optimizer_keeps_the_settings_of_the_run_that_goes_on(stage, new_student, make_engine, make_config, tracker, tmp_path):
    """As branch_from may have others."""
    student = {"num_hidden_layers": 1, "hidden_size": 32}
    before = make_engine(new_student("qwen3_moe_tiny", **student), make_config(stage=stage, optim={"weight_decay": 0.1, "clip_norm": 1.0}))
    write_config(tmp_path, before.cfg, "test")
    save(tmp_path, 1, before, Counter(10), CheckpointConfig())
    changed = {"weight_decay": 0.3, "eps": 1e-6, "clip_norm": 0.25}
    after = make_engine(new_student("qwen3_moe_tiny", **student), make_config(stage=stage, optim=changed))
    resume(tmp_path, after, Counter(0), tracker)
    groups = after.engine.optimizer.param_groups
    assert sorted({group["weight_decay"] for group in groups}) == [0.0, 0.3]
    assert {group["eps"] for group in groups} == {1e-6}
    assert clip_norm_of(after) == 0.25


def test_a_new_run_begins_at_step_zero_and_keeps_its_stream(engine, tracker, tmp_path):
    stream = Counter(3)
    assert resume(tmp_path, engine, stream, tracker) == 0
    assert stream.drawn == 3


@pytest.mark.parametrize("keep", [0, 1, 2])
def test_the_newest_checkpoints_stay_and_at_least_one(keep, engine, tmp_path):
    for step in (1, 2, 3):
        save(tmp_path, step, engine, Counter(), CheckpointConfig(keep=keep))
    assert saved(tmp_path) == {f"step-{step:06d}" for step in (1, 2, 3)[-max(1, keep) :]}


class Killed(BaseException):
    """What no handler catches."""


def or_die(operation: Callable, left: Iterator[int]) -> Callable:
    def attempt(*arguments, **named):
        if next(left, None) is None:
            raise Killed
        return operation(*arguments, **named)

    return attempt


def kill_at(patch: pytest.MonkeyPatch, count: int) -> None:
    """Let so many operations on the disk happen, and none after them."""
    left = iter(range(count))
    for owner, name in ((os, "fsync"), (Path, "rename"), (Path, "replace"), (Path, "write_text"), (shutil, "rmtree"), (Path, "mkdir")):
        patch.setattr(owner, name, or_die(getattr(owner, name), left))


def test_a_kill_at_any_operation_of_a_save_leaves_a_whole_checkpoint_in_force(engine, tracker, tmp_path, monkeypatch):
    outcomes = []
    for count in itertools.count():
        run_dir = tmp_path / str(count)
        run_dir.mkdir()
        write_config(run_dir, engine.cfg, "test")
        save(run_dir, 1, engine, Counter(10), CheckpointConfig(keep=1))
        with monkeypatch.context() as patch:
            kill_at(patch, count)
            try:
                save(run_dir, 2, engine, Counter(20), CheckpointConfig(keep=1))
                is_whole = True
            except Killed:
                is_whole = False
        stream = Counter()
        outcomes.append(resume(run_dir, engine, stream, tracker))
        assert stream.drawn == 10 * outcomes[-1]
        save(run_dir, 2, engine, Counter(20), CheckpointConfig(keep=1))
        assert (pointer(run_dir)["step"], saved(run_dir)) == (2, {"step-000002"})
        if is_whole:
            break
    assert outcomes == sorted(outcomes)
    assert set(outcomes) == {1, 2}


def test_a_kill_during_the_first_checkpoint_begins_anew(engine, tracker, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(Engine, "save", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            save(tmp_path, 1, engine, Counter(), CheckpointConfig())
    assert resume(tmp_path, engine, Counter(), tracker) == 0


def test_a_folder_left_by_a_kill_before_its_pointer_does_not_push_out_the_present_one(engine, tracker, tmp_path):
    save(tmp_path, 5, engine, Counter(5), CheckpointConfig(keep=1))
    (tmp_path / "checkpoints" / "step-000010").mkdir()
    save(tmp_path, 7, engine, Counter(7), CheckpointConfig(keep=1))
    assert resume(tmp_path, engine, Counter(), tracker) == 7


def test_the_pointer_is_written_after_the_folder_is_complete(engine, tmp_path, monkeypatch):
    order, rename, replace = [], Path.rename, Path.replace
    monkeypatch.setattr(Path, "rename", lambda path, target: (order.append(Path(target).name), rename(path, target))[1])
    monkeypatch.setattr(Path, "replace", lambda path, target: (order.append(Path(target).name), replace(path, target))[1])
    save(tmp_path, 1, engine, Counter(), CheckpointConfig())
    assert order == ["manifest.json", "step-000001", "latest.json"]


def test_a_first_checkpoint_cut_before_its_pointer_is_taken_up(engine, tracker, tmp_path):
    save(tmp_path, 1, engine, Counter(), CheckpointConfig())
    (tmp_path / "checkpoints" / "latest.json").unlink()
    assert resume(tmp_path, engine, Counter(), tracker) == 1


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(bytes(content))


SHARD = "step-000002/mp_rank_00_model_states.pt"
DAMAGES = {
    "pointer missing": (2, "latest.json is missing", lambda folder: (folder / "latest.json").unlink()),
    "pointer empty": (2, "latest.json is damaged", lambda folder: (folder / "latest.json").write_text("")),
    "pointer to nothing": (2, "latest.json is damaged", lambda folder: (folder / "latest.json").write_text('{"schema": 2}')),
    "pointer dangling": (1, "step-000002 is missing", lambda folder: shutil.rmtree(folder / "step-000002")),
    "pointer out of the folder": (2, "latest.json is damaged", lambda folder: (folder / "latest.json").write_text('{"schema": 2, "tag": "../step-000002"}')),
    "manifest out of the folder": (1, "names files outside", lambda folder: (folder / "step-000002/manifest.json").write_text('{"files": {"../x": {}}}')),
    "shard missing": (1, "model_states.pt is missing", lambda folder: (folder / SHARD).unlink()),
    "shard truncated": (1, "model_states.pt is cut", lambda folder: os.truncate(folder / SHARD, 1000)),
    "shard flipped": (1, "model_states.pt is damaged: its sha256", lambda folder: flip(folder / SHARD)),
    "record missing": (1, "has no opd.json", lambda folder: (folder / "step-000002/opd.json").unlink()),
    "record flipped": (1, "opd.json is damaged", lambda folder: flip(folder / "step-000002/opd.json")),
    "manifest missing": (1, "has no manifest.json", lambda folder: (folder / "step-000002/manifest.json").unlink()),
    "manifest empty": (1, "manifest.json is damaged", lambda folder: (folder / "step-000002/manifest.json").write_text("")),
    "manifest of another kind": (1, "manifest.json is damaged", lambda folder: (folder / "step-000002/manifest.json").write_text("{}")),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_what_is_damaged_is_named_and_the_newest_whole_checkpoint_taken_up(damage, engine, tracker, tmp_path, monkeypatch):
    expected, words, spoil = DAMAGES[damage]
    for step in (1, 2):
        save(tmp_path, step, engine, Counter(10 * step), CheckpointConfig(keep=2))
    spoil(tmp_path / "checkpoints")
    stream, said = Counter(), []
    monkeypatch.setattr(type(tracker.display), "say", lambda _, text: said.append(text))
    assert resume(tmp_path, engine, stream, tracker) == expected
    assert stream.drawn == 10 * expected
    assert words in said[0]
    assert f"going on from step-00000{expected}" in said[0]


@pytest.mark.parametrize("damage", [name for name, (expected, *_) in DAMAGES.items() if expected == 1])
def test_checkpoints_of_which_none_is_whole_are_refused(damage, engine, tracker, tmp_path):
    _, words, spoil = DAMAGES[damage]
    save(tmp_path, 2, engine, Counter(), CheckpointConfig())
    spoil(tmp_path / "checkpoints")
    with pytest.raises(ValueError, match=rf"no checkpoint in .* is whole \(.*{words}.*begin anew with fresh=true"):
        resume(tmp_path, engine, Counter(), tracker)


def test_a_checkpoint_that_reads_otherwise_than_it_was_written_does_not_replace_the_older_one(engine, tracker, tmp_path, monkeypatch):
    save(tmp_path, 1, engine, Counter(10), CheckpointConfig(keep=1))
    rename = Path.rename

    def spoiling(path: Path, target: Path) -> Path:
        flip(path / "mp_rank_00_model_states.pt")
        return rename(path, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", spoiling)
        with pytest.raises(ValueError, match="is not what was written"):
            save(tmp_path, 2, engine, Counter(20), CheckpointConfig(keep=1))
    assert pointer(tmp_path)["step"] == 1
    assert resume(tmp_path, engine, Counter(), tracker) == 1


def test_a_checkpoint_without_manifest_of_an_earlier_version_is_taken_up(engine, tracker, tmp_path):
    save(tmp_path, 1, engine, Counter(10), CheckpointConfig())
    folder = tmp_path / "checkpoints"
    (folder / "step-000001/manifest.json").unlink()
    for path in (folder / "latest.json", folder / "step-000001/opd.json"):
        path.write_text(json.dumps(json.loads(path.read_text()) | {"schema": 1}))
    assert resume(tmp_path, engine, Counter(), tracker) == 1


def test_a_pointer_of_another_schema_is_refused(engine, tracker, tmp_path):
    save(tmp_path, 1, engine, Counter(), CheckpointConfig())
    (tmp_path / "checkpoints" / "latest.json").write_text(json.dumps(pointer(tmp_path) | {"schema": 3}))
    with pytest.raises(ValueError, match="schema 3; this version reads schema 2"):
        resume(tmp_path, engine, Counter(), tracker)


def test_the_records_have_the_format_on_file(short_run, golden_dir):
    folder = short_run / "checkpoints"
    latest = json.loads((folder / "latest.json").read_text())
    state = json.loads((folder / latest["tag"] / "opd.json").read_text())
    assert state.pop("teachers") == json.loads((short_run / "teachers.json").read_text()), "its own format: tests/teachers/test_manifest.py"
    manifest = json.loads((folder / latest["tag"] / "manifest.json").read_text())
    assert set(manifest["files"]) == {path.name for path in (folder / latest["tag"]).iterdir()} - {"manifest.json"}
    for name, record in manifest["files"].items():
        content = (folder / latest["tag"] / name).read_bytes()
        assert record == {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    manifest["files"] = sorted(manifest["files"])
    assert {"latest.json": latest, "opd.json": state, "manifest.json": manifest} == json.loads((golden_dir / "checkpoint.json").read_text())
