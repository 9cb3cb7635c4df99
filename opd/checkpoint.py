"""Checkpoints of a run, and finding the newest when it starts again.

Tree (schema version 1): `RUN/checkpoints/latest.json` is {"schema": 1, "step": S, "tag": "step-SSSSSS"}; the folder `step-SSSSSS` holds
DeepSpeed's files (weights, optimizer, routing) and `opd.json`, {"schema": 1, "step": S, "ranks": R, "stream": prompt positions} and, of a
distillation, "teachers": which scored which steps (teachers/manifest.py). A folder is written under the name `partial` and renamed when it is
complete, then the pointer is replaced; a kill leaves the older checkpoint in force. A pointer to nothing, or several checkpoints without a
pointer, refuse: training silently from step 0 is worse than not training.
"""

import json
import shutil
from pathlib import Path
from typing import Protocol

from opd.config import CheckpointConfig, DistillConfig
from opd.distributed import Group, barrier, is_main, num_ranks, on_main
from opd.engine import Engine
from opd.run import replace_domains
from opd.tracker import Tracker
from rollout.files import read_json, replace_text
from teachers.manifest import describe_domains
from teachers.pool import TeacherPool

SCHEMA = 1


class Resumable(Protocol):
    """A stream of training data that can be taken up where it was left."""

    def state(self) -> dict:
        """JSON values."""

    def restore(self, state: dict) -> None:
        """Take up a state that `state` returned."""

    def forget_before(self, step: int) -> None:
        """Delete what was kept for taking up steps before one."""


def is_due(step: int, every: int, num_steps: int | None = None) -> bool:
    """Whether something that happens `every` steps happens after update number `step` (1, 2, ...); 0 is never.

    num_steps: where given, also after the last update.
    """
    return step == num_steps or (every > 0 and step % every == 0)


def save(run_dir: Path, step: int, engine: Engine, stream: Resumable, cfg: CheckpointConfig, teachers: TeacherPool | None = None) -> None:
    """Save after update number `step`; every rank calls it."""
    folder, tag = run_dir / "checkpoints", f"step-{step:06d}"
    if is_main():
        shutil.rmtree(folder / "partial", ignore_errors=True)
        folder.mkdir(parents=True, exist_ok=True)
    barrier()
    engine.save(folder, "partial")
    barrier()
    if is_main():
        state = {"schema": SCHEMA, "step": step, "ranks": num_ranks(Group.data), "stream": stream.state()}
        state |= {} if teachers is None else {"teachers": teachers.manifest.record()}
        (folder / "partial" / "opd.json").write_text(json.dumps(state))
        shutil.rmtree(folder / tag, ignore_errors=True)
        (folder / "partial").rename(folder / tag)
        replace_text(folder / "latest.json", json.dumps({"schema": SCHEMA, "step": step, "tag": tag}))
        saved = sorted(path for path in folder.glob("step-*") if path.name <= tag)  # a later one was left by a kill before its pointer
        for old in saved[: -max(1, cfg.keep)]:
            shutil.rmtree(old)
        stream.forget_before(step)
        if teachers is not None:
            teachers.manifest.write(run_dir)
    barrier()


def resume(run_dir: Path, engine: Engine, stream: Resumable, tracker: Tracker, teachers: TeacherPool | None = None) -> int:
    """Restore the newest checkpoint; returns the number of updates it holds, 0 where the run is new.

    The run's teachers are held to the checkpoint's manifest, and one of the present ones begins where there is none.

    Raises ValueError where checkpoints are there but none can be taken up, and where teachers differ without teachers.allow_change.
    """
    folder = run_dir / "checkpoints"
    tag = _newest(folder)
    step = 0 if tag is None else _restore(folder, tag, engine, stream, teachers)
    if tag is None and teachers is not None:
        _take_up(teachers, None, 0)
    tracker.resume(step)
    if teachers is not None and is_main():
        replace_domains(run_dir, teachers.domains)
        teachers.manifest.write(run_dir)
        tracker.record_teachers(teachers.manifest.history())
        tracker.display.say(teachers.plan.description)
    return step


def dropped_domains(cfg: DistillConfig) -> dict[str, str]:
    """The domains that a run goes on without when it is taken up, with the reasons; every rank calls it. Looks only.

    None of a run that begins, and with teachers.allow_change, which tries their teachers again. Raises ValueError as `resume` does.
    """
    folder = Path(cfg.run_dir) / "checkpoints"

    def find() -> dict[str, str]:
        tag = None if cfg.fresh or cfg.teachers.allow_change else _newest(folder)
        if tag is None or not (folder / tag / "opd.json").is_file():
            return {}
        record = read_json(folder / tag / "opd.json").get("teachers")
        return {} if record is None else {name: drop["reason"] for name, drop in record["spans"][-1]["dropped"].items() if name in cfg.domains}

    return on_main(find)


def _restore(folder: Path, tag: str, engine: Engine, stream: Resumable, teachers: TeacherPool | None) -> int:
    state_file = folder / tag / "opd.json"
    if not state_file.is_file():
        raise ValueError(f"the checkpoint {folder / tag} is missing or incomplete: begin anew with fresh=true")
    state = read_json(state_file)
    if state["ranks"] != num_ranks(Group.data):
        raise ValueError(f"{folder / tag} was saved by {state['ranks']} ranks and this run has {num_ranks(Group.data)}: start as many")
    if teachers is not None:
        _take_up(teachers, state.get("teachers"), state["step"])
    engine.load(folder, tag)
    stream.restore(state["stream"])
    return state["step"]


def _take_up(teachers: TeacherPool, record: dict | None, step: int) -> None:
    """Begin or continue the manifest. The main rank reads the teachers' files, so that the ranks cannot disagree on them."""
    known = {} if record is None else record["spans"][-1]["domains"]
    gone = {name: known[name]["teacher"] for name in teachers.dropped if name in known}  # what failed is not looked at again
    present = on_main(lambda: describe_domains(teachers.domains, gone | teachers.identities()))
    teachers.manifest.take_up(record, step, present, teachers.cfg.allow_change)
    teachers.dropped.update({name: failure["reason"] for name, failure in teachers.manifest.dropped.items()})


def _newest(folder: Path) -> str | None:
    """The checkpoint to take up; None where there is none.

    One folder without a pointer is a first save that was cut between the two: it is complete, since it has its name.
    Raises ValueError where a pointer is of another schema, or missing beside several folders.
    """
    pointer, saved = folder / "latest.json", sorted(path.name for path in folder.glob("step-*"))
    if not pointer.exists():
        if len(saved) > 1:
            raise ValueError(f"{folder} holds checkpoints but no latest.json: restore it, or begin anew with fresh=true")
        return saved[0] if saved else None
    record = read_json(pointer)
    if record.get("schema") != SCHEMA:
        raise ValueError(f"{pointer} has schema {record.get('schema')}; this version reads schema {SCHEMA}")
    return record["tag"]
