"""Writing a checkpoint beside training: checkpoint.asynchronous=true.

Each rank saves its files to shared memory, and goes on; a process of its own, the writer, brings them to the run folder, has them on disk and hashes them. The
main rank's waits for what the others say of theirs, and then does what a save does: manifest, rename, reading all of it again, pointer, older ones go. So
the checkpoint is in force as soon as it is whole, without the ranks. They look at their writers before the next save, when the run ends and when it is
asked to end (`settle`), and wait for them there; where one has died, that fails, and the older checkpoint stays in force. A writer dies with its rank.

    /dev/shm/opd-HASH-RANK/          what a rank has saved, HASH being of the run folder's path
    RUN/checkpoints/parts/RANK.json  what its writer has written: its part of the manifest, {NAME: {"bytes", "sha256"}}; RANK.failed: that it has died
"""

import hashlib
import json
import logging
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

from opd import checkpoint_files as files
from rollout.child import child_command, last_words
from rollout.files import read_json, replace_text

MEMORY = Path("/dev/shm")
PARTS = "parts"
LOG = logging.getLogger(__name__)
POLL_SECONDS = 0.2
OUTLASTED = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
"""Signals that a writer does not get."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """Of one rank's writer. source: where its files are; names: which; folder: RUN/checkpoints; keep: as checkpoint.keep."""

    source: str
    names: list[str]
    folder: str
    step: int
    rank: int
    ranks: int
    keep: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Pending:
    """A checkpoint that is being written. afterwards: what the main rank does when it is in force."""

    task: Task
    writer: subprocess.Popen
    afterwards: Callable[[], None]


_PENDING: list[Pending] = []
"""Of this process, one at most."""


def memory_folder(run_dir: Path, rank: int) -> Path:
    """Where a rank saves to."""
    return MEMORY / f"opd-{hashlib.sha256(str(run_dir.resolve()).encode()).hexdigest()[:16]}-{rank}"


def begin_memory(run_dir: Path, rank: int) -> Path:
    """The same, empty and for nobody else; what an earlier process has left there is deleted."""
    forget_memory(run_dir, rank)
    memory_folder(run_dir, rank).mkdir(mode=0o700)
    return memory_folder(run_dir, rank)


def forget_memory(run_dir: Path, rank: int) -> None:
    """Delete what an earlier process has left there."""
    shutil.rmtree(memory_folder(run_dir, rank), ignore_errors=True)


def require_room(num_bytes: int) -> None:
    """Raises ValueError where shared memory has no room for what the ranks of this machine save; every rank calls it.

    num_bytes: of this rank.
    """
    from opd.distributed import Group, gather_objects

    here = socket.gethostname()
    total = sum(part for host, part in gather_objects((here, num_bytes), Group.data) if host == here)
    free = shutil.disk_usage(MEMORY).free
    words = f"checkpoint.asynchronous=true keeps {total / 2**30:.2f} GiB in {MEMORY} of {here} while they are written, where {free / 2**30:.2f} are free"
    found = gather_objects(None if total <= free else f"{words}: make it larger, or set checkpoint.asynchronous=false", Group.data)
    problem = next((problem for problem in found if problem is not None), None)
    if problem is not None:
        raise ValueError(problem)


def begin_parts(folder: Path) -> None:
    """An empty RUN/checkpoints/parts; the main rank calls it before any writer starts."""
    shutil.rmtree(folder / PARTS, ignore_errors=True)
    (folder / PARTS).mkdir()


def start(task: Task, afterwards: Callable[[], None]) -> None:
    """Start this rank's writer."""
    command = child_command("opd.checkpoint_writer", json.dumps(asdict(task)))
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, OUTLASTED)  # which the writer inherits: what is asked to end waits for it
    writer = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    signal.pthread_sigmask(signal.SIG_SETMASK, mask)
    _PENDING.append(Pending(task=task, writer=writer, afterwards=afterwards))


def wait(seconds: float) -> None:
    """Wait for this rank's writer alone, so long at most, where the run ends by an error: the main rank's may wait for a part that does not come."""
    if _PENDING:
        with suppress(subprocess.TimeoutExpired):
            _PENDING[0].writer.wait(seconds)


def settle() -> None:
    """Wait until the checkpoint that is being written is in force; every rank calls it. Raises ValueError where a writer has died or failed."""
    from opd.distributed import Group, gather_objects, is_main  # the writer's process has no use for torch

    if not _PENDING:
        return
    pending = _PENDING.pop()
    task, (_, words) = pending.task, pending.writer.communicate()
    code = pending.writer.returncode
    if code != 0:
        (Path(task.folder) / PARTS / f"{task.rank}.failed").touch()
    elif words.strip():
        LOG.warning("%s", words.strip())
    found = gather_objects(None if code == 0 else f"rank {task.rank}: {last_words(code, words)}", Group.data)
    problems = [problem for problem in found if problem is not None]
    if problems:
        raise ValueError(f"the checkpoint of step {task.step} has not been written ({problems[-1]}): the older one stays in force")
    if is_main():
        shutil.rmtree(Path(task.folder) / PARTS)
        pending.afterwards()


def write(task: Task) -> None:
    """A writer's work."""
    source, folder = Path(task.source), Path(task.folder)
    for name in task.names:
        (folder / files.PARTIAL / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source / name, folder / files.PARTIAL / name)
    sealed = files.seal(folder / files.PARTIAL, task.names)
    shutil.rmtree(source.parent)
    replace_text(folder / PARTS / f"{task.rank}.json", json.dumps(sealed))
    if task.rank == 0:
        _commit_parts(task, folder)


def _commit_parts(task: Task, folder: Path) -> None:
    parts = [folder / PARTS / f"{rank}.json" for rank in range(task.ranks)]
    while not all(part.is_file() for part in parts):
        failed = [part.stem for part in parts if part.with_suffix(".failed").exists()]
        if failed:
            raise ValueError(f"the writer of rank {failed[0]} has died")
        time.sleep(POLL_SECONDS)
    files.commit(folder, task.step, {name: entry for part in parts for name, entry in read_json(part).items()})
    problem = files.problem_of(folder / files.tag_of(task.step))
    if problem is not None:
        raise ValueError(f"it is not what was written: {problem}")
    files.point_to(folder, task.step)
    files.forget_older(folder, task.step, task.keep)


def main() -> int:
    """Run the writer whose task is the argument; returns the exit code."""
    try:
        write(Task(**json.loads(sys.argv[1])))
    except (ValueError, OSError) as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
