"""Checkpoints of a run: what is on disk after a kill at any point, what is taken up, and the format of the two records."""

import json
from pathlib import Path

import pytest

from opd.batch import supervised_batches
from opd.checkpoint import is_due, resume, save
from opd.config import BatchConfig, CheckpointConfig
from opd.engine import Engine
from opd.tracker import Tracker


class Counter:
    """The smallest resumable stream: how many examples were drawn."""

    def __init__(self, drawn: int = 0):
        self.drawn = drawn

    def state(self) -> dict:
        return {"drawn": self.drawn}

    def restore(self, state: dict) -> None:
        self.drawn = state["drawn"]

    def forget_before(self, step: int) -> None:
        pass


@pytest.fixture
def engine(new_student, make_engine, make_config) -> Engine:
    return make_engine(new_student("qwen3_moe_tiny", num_hidden_layers=1, hidden_size=32), make_config())


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


def test_a_new_run_begins_at_step_zero_and_keeps_its_stream(engine, tracker, tmp_path):
    stream = Counter(3)
    assert resume(tmp_path, engine, stream, tracker) == 0
    assert stream.drawn == 3


@pytest.mark.parametrize("keep", [0, 1, 2])
def test_the_newest_checkpoints_stay_and_at_least_one(keep, engine, tmp_path):
    for step in (1, 2, 3):
        save(tmp_path, step, engine, Counter(), CheckpointConfig(keep=keep))
    assert saved(tmp_path) == {f"step-{step:06d}" for step in (1, 2, 3)[-max(1, keep) :]}


@pytest.mark.parametrize("operation", ["rename", "replace"])
def test_a_kill_while_a_checkpoint_is_being_put_in_place_leaves_the_older_one_in_force(operation, engine, tracker, tmp_path, monkeypatch):
    """Between the complete folder `partial` and its new name, and between that and the pointer."""
    save(tmp_path, 1, engine, Counter(10), CheckpointConfig(keep=1))

    def killed(*_arguments):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Path, operation, killed)
        with pytest.raises(KeyboardInterrupt):
            save(tmp_path, 2, engine, Counter(20), CheckpointConfig(keep=1))
    stream = Counter()
    assert resume(tmp_path, engine, stream, tracker) == 1
    assert stream.drawn == 10
    save(tmp_path, 2, engine, Counter(20), CheckpointConfig(keep=1))
    assert (pointer(tmp_path)["step"], saved(tmp_path)) == (2, {"step-000002"})


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
    assert order == ["step-000001", "latest.json"]


def test_a_first_checkpoint_cut_before_its_pointer_is_taken_up(engine, tracker, tmp_path):
    save(tmp_path, 1, engine, Counter(), CheckpointConfig())
    (tmp_path / "checkpoints" / "latest.json").unlink()
    assert resume(tmp_path, engine, Counter(), tracker) == 1


def test_several_checkpoints_without_a_pointer_are_refused(engine, tracker, tmp_path):
    save(tmp_path, 1, engine, Counter(), CheckpointConfig(keep=2))
    save(tmp_path, 2, engine, Counter(), CheckpointConfig(keep=2))
    (tmp_path / "checkpoints" / "latest.json").unlink()
    with pytest.raises(ValueError, match=r"no latest\.json: restore it, or begin anew with fresh=true"):
        resume(tmp_path, engine, Counter(), tracker)


@pytest.mark.parametrize("missing", ["step-000001", "step-000001/opd.json", "step-000001/mp_rank_00_model_states.pt"])
def test_a_pointer_to_a_checkpoint_that_is_gone_or_incomplete_is_refused(missing, engine, tracker, tmp_path):
    save(tmp_path, 1, engine, Counter(), CheckpointConfig())
    path = tmp_path / "checkpoints" / missing
    path.rename(tmp_path / "elsewhere")
    with pytest.raises(ValueError, match="missing or incomplete"):
        resume(tmp_path, engine, Counter(), tracker)


def test_a_pointer_of_another_schema_is_refused(engine, tracker, tmp_path):
    save(tmp_path, 1, engine, Counter(), CheckpointConfig())
    (tmp_path / "checkpoints" / "latest.json").write_text(json.dumps(pointer(tmp_path) | {"schema": 2}))
    with pytest.raises(ValueError, match="schema 2; this version reads schema 1"):
        resume(tmp_path, engine, Counter(), tracker)


def test_the_two_records_have_the_format_on_file(short_run, golden_dir):
    folder = short_run / "checkpoints"
    latest = json.loads((folder / "latest.json").read_text())
    state = json.loads((folder / latest["tag"] / "opd.json").read_text())
    assert state.pop("teachers") == json.loads((short_run / "teachers.json").read_text()), "its own format: tests/teachers/test_manifest.py"
    assert {"latest.json": latest, "opd.json": state} == json.loads((golden_dir / "checkpoint.json").read_text())
