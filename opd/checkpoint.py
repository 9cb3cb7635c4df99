"""Checkpoints of a run, and finding the one to go on from when it starts again.

A checkpoint (its folder: opd/checkpoint_files.py) holds DeepSpeed's files (weights, optimizer, routing) and `opd.json`, {"schema": 2, "step": S,
"ranks": R, "stream": prompt positions, and which weights sample the next step} and, of a distillation, "teachers": which scored which steps
(teachers/manifest.py). Random numbers are keyed, and the schedule follows from the step: neither has a state.

A run goes on from the checkpoint in force; where it is damaged, from the one before, and says so. Where checkpoints are there and none is whole it
refuses: training silently from step 0 is worse than not training.
"""

import json
import logging
from pathlib import Path
from typing import Protocol

from opd import checkpoint_files as files
from opd import checkpoint_writer as writer
from opd.branch import branch_source, branched_at
from opd.config import DistillConfig
from opd.deepspeed_settings import zero_stage
from opd.distributed import Group, barrier, gather_objects, is_main, num_ranks, on_main, rank
from opd.engine import Engine
from opd.job_config import CheckpointConfig
from opd.resharding import converted, fits, layout_for, layout_of
from opd.run import record_changes
from opd.run_facts import record_start
from opd.run_state import begin_state
from opd.tracker import Tracker
from rollout.files import read_json
from rollout.prompts import PromptMixture
from teachers.manifest import describe_domains
from teachers.pool import TeacherPool

LOG = logging.getLogger(__name__)


class Resumable(Protocol):
    """A stream of training data that can be taken up where it was left."""

    def state(self) -> dict:
        """JSON values."""

    def restore(self, state: dict) -> None:
        """Take up a state that `state` returned."""

    def forget_before(self, step: int) -> None:
        """Delete what was kept for taking up steps before one."""

    @property
    def prompts(self) -> PromptMixture:
        """The data that the run begins with."""


def is_due(step: int, every: int, num_steps: int | None = None) -> bool:
    """Whether something that happens `every` steps happens after update number `step` (1, 2, ...); 0 is never.

    num_steps: where given, also after the last update.
    """
    return step == num_steps or (every > 0 and step % every == 0)


def save(run_dir: Path, step: int, engine: Engine, stream: Resumable, cfg: CheckpointConfig, teachers: TeacherPool | None = None) -> None:
    """Save after update number `step`; every rank calls it. Raises ValueError where the disk refuses, or what was written reads otherwise.

    With checkpoint.asynchronous such an error is raised by what follows: the next save, or `settle` of opd/checkpoint_writer.py.
    """
    writer.settle()
    folder = run_dir / "checkpoints"
    if is_main():
        files.begin_partial(folder)
    barrier()
    target = writer.begin_memory(run_dir, rank(Group.data)) if cfg.asynchronous else folder
    names = engine.save(target, files.PARTIAL)
    if is_main():
        state = {"schema": files.SCHEMA, "step": step, "ranks": num_ranks(Group.data), "stream": stream.state()}
        state |= {} if teachers is None else {"teachers": teachers.manifest.record()}
        (target / files.PARTIAL / "opd.json").write_text(json.dumps(state))
        names.append("opd.json")

    def forget() -> None:
        stream.forget_before(step)
        if teachers is not None:
            teachers.manifest.write(run_dir)

    if cfg.asynchronous:
        on_main(lambda: writer.begin_parts(folder))
        place = {"source": str(target / files.PARTIAL), "names": names, "folder": str(folder)}
        return writer.start(writer.Task(**place, step=step, rank=rank(Group.data), ranks=num_ranks(Group.data), keep=cfg.keep), forget)
    _commit(folder, step, names, cfg.keep)
    if is_main():
        forget()
    barrier()


def _commit(folder: Path, step: int, names: list[str], keep: int) -> None:
    """names: of this rank's files, which are in `partial`."""
    sealed = gather_objects(files.seal(folder / files.PARTIAL, names), Group.data)
    on_main(lambda: files.commit(folder, step, dict(item for part in sealed for item in part.items())))
    problem = _problem_of(folder / files.tag_of(step))
    if problem is not None:
        raise ValueError(f"the checkpoint of step {step} is not what was written ({problem}): the older one stays in force")
    if is_main():
        files.point_to(folder, step)
        files.forget_older(folder, step, keep)


def resume(run_dir: Path, engine: Engine, stream: Resumable, tracker: Tracker, teachers: TeacherPool | None = None) -> int:
    """Restore the newest whole checkpoint; returns the number of updates it holds, 0 where the run is new.

    The run's teachers are held to the checkpoint's manifest, and one of the present ones begins where there is none.

    Raises ValueError where checkpoints are there but none can be taken up, where teachers differ without teachers.allow_change, and where
    checkpoint.asynchronous has no room to save in.
    """
    folder = run_dir / "checkpoints"
    writer.forget_memory(run_dir, rank(Group.data))
    if engine.cfg.checkpoint.asynchronous:
        barrier()  # what other ranks have left is gone, too
        writer.require_room(engine.checkpoint_bytes())
    tag, problems = _choose(folder)
    for problem in problems if is_main() else ():
        tracker.display.say(f"{problem}; going on from {tag}")
    step = 0 if tag is None else _restore(folder, tag, engine, stream, teachers)
    if tag is None and teachers is not None:
        _take_up(teachers, None, 0)
    tracker.resume(step)
    for change in record_changes(run_dir, engine.cfg, step) if is_main() else ():
        tracker.display.say(f"{change} ({change.rule.value})")
    if is_main():
        begin_state(run_dir, tracker.task, tracker.num_steps)  # not before: a start that is refused leaves the run as it was
        tracker.record_start(record_start(run_dir, step, engine.cfg, stream.prompts.domains))
    if teachers is not None and is_main():
        teachers.manifest.write(run_dir)
        tracker.record_teachers(teachers.manifest.history())
        tracker.display.say(teachers.plan.description)
    return step


def dropped_domains(cfg: DistillConfig) -> dict[str, str]:
    """The domains that a run goes on without when it is taken up, with the reasons; every rank calls it. Looks only.

    None of a run that begins, and with teachers.allow_change, which tries their teachers again. Raises ValueError as `resume` does, before teachers and
    engine take their time.
    """
    folder = Path(cfg.run_dir) / "checkpoints"
    tag = None if cfg.fresh else _choose(folder)[0]
    if tag is not None:
        _require_readable(folder / tag, cfg)
    elif cfg.branch_from is not None:
        _require_readable(on_main(lambda: branch_source(cfg.branch_from)), cfg)
    if tag is None or cfg.teachers.allow_change or _is_branching(folder, tag):
        return {}
    record = on_main(lambda: read_json(folder / tag / "opd.json")).get("teachers")
    return {} if record is None else {name: drop["reason"] for name, drop in record["spans"][-1]["dropped"].items() if name in cfg.domains}


def _require_readable(checkpoint: Path, cfg: DistillConfig) -> None:
    """Raises ValueError for a checkpoint that as many ranks at this run's stage can neither read nor have converted."""
    written = on_main(lambda: layout_of(checkpoint, read_json(checkpoint / "opd.json")["ranks"]))
    fits(written, layout_for(zero_stage(cfg), num_ranks(Group.data)), cfg.optim.kind)


def _restore(folder: Path, tag: str, engine: Engine, stream: Resumable, teachers: TeacherPool | None) -> int:
    state = read_json(folder / tag / "opd.json")
    written, wanted = layout_of(folder / tag, state["ranks"]), layout_for(engine.zero_stage, num_ranks(Group.data))
    is_fitting = fits(written, wanted, engine.cfg.optim.kind)
    if teachers is not None:
        _take_up(teachers, state.get("teachers"), state["step"], _is_branching(folder, tag))
    if is_fitting:
        engine.load(folder, tag)
    else:
        if is_main():
            LOG.info("%s was saved by %s and is converted for %s", folder / tag, written, wanted)
        with converted(folder, tag) as universal:
            engine.load(universal, tag, is_universal=True)
    stream.restore(state["stream"])
    return state["step"]


def _is_branching(folder: Path, tag: str) -> bool:
    """Whether a checkpoint is the one of another run with which this one begins."""
    return on_main(lambda: branched_at(folder.parent) == int(tag.removeprefix("step-")))


def _take_up(teachers: TeacherPool, record: dict | None, step: int, is_branching: bool = False) -> None:
    """Begin or continue the manifest. The main rank reads the teachers' files, so that the ranks cannot disagree on them."""
    known = {} if record is None else record["spans"][-1]["domains"]
    gone = {name: known[name]["teacher"] for name in teachers.dropped if name in known}  # what failed is not looked at again
    present = on_main(lambda: describe_domains(teachers.domains, gone | teachers.identities()))
    teachers.manifest.take_up(record, step, present, teachers.cfg.allow_change or is_branching)
    teachers.dropped.update({name: failure["reason"] for name, failure in teachers.manifest.dropped.items()})


def _choose(folder: Path) -> tuple[str | None, list[str]]:
    """(the checkpoint to take up, None where there is none; what is wrong with those that would have come first); every rank calls it.

    Raises ValueError where checkpoints are there and none is whole.
    """
    found = on_main(lambda: files.find(folder))
    problems = [] if found.problem is None else [found.problem]
    for tag in found.tags:
        problem = _problem_of(folder / tag)
        if problem is None:
            return tag, problems
        problems.append(problem)
    if not found.tags:
        return None, []
    raise ValueError(f"no checkpoint in {folder} is whole ({'; '.join(problems)}): restore one, or begin anew with fresh=true")


def _problem_of(folder: Path) -> str | None:
    """The first thing that is wrong with a checkpoint, each rank having read its share; every rank calls it."""
    found = gather_objects(files.problem_of(folder, rank(Group.data), num_ranks(Group.data)), Group.data)
    return next((problem for problem in found if problem is not None), None)
