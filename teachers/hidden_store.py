"""HiddenStore: the teachers' last hidden states of one step, each written once, read once, and gone.

Scoring is done teacher by teacher and the update micro-batch by micro-batch, so all hidden states of a step wait in between; they are what
grows with its tokens (14 KiB per token for DeepSeek-V4-Pro, 14 GB for a million tokens: arXiv:2606.19348, 5.2.2). Each rollout's are a file of
their own, in shared memory (/dev/shm) up to a limit and beyond it in a folder on disk, mapped into memory when they are asked for. A checksum
(CRC-32) tells a damaged file; what is lost or damaged raises `HiddenLostError`, and the pool has the teacher score that rollout again.

Folders are locked by the process that uses them and removed when it ends: one whose process was killed is removed by the next that starts.

T: completion tokens of one rollout. D: the teacher's hidden size.
"""

import errno
import fcntl
import itertools
import math
import os
import shutil
import tempfile
import weakref
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

SHARED_MEMORY = Path("/dev/shm")
PREFIX, LOCK = "opd-hidden-", ".lock"


class HiddenLostError(Exception):
    """Hidden states that are not where they were written, or not what was written."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredHidden:
    """Where hidden_TD of one rollout waits.

    path: its file. shape: (T, D). checksum: CRC-32 of its bytes.
    """

    path: Path
    shape: tuple[int, int]
    dtype: torch.dtype
    checksum: int

    @property
    def num_bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


class HiddenStore:
    """Holds hidden states between scoring and update."""

    def __init__(self, memory_gb: float | None = None, folder: str | None = None, local_processes: int = 1):
        """memory_gb: shared memory that may be used (10**9 bytes); None takes half of what is free there, divided among the machine's processes.
        folder: where the rest goes; None is the system's folder of temporary files. Nothing is made before it is needed.
        """
        self.limit = memory_gb if memory_gb is None else int(memory_gb * 1e9)
        self.local_processes = local_processes
        self.disk = Path(folder or tempfile.gettempdir())
        self.numbers = itertools.count()
        self.in_memory = 0
        self.paths_in_memory: set[Path] = set()
        self.folders: dict[Path, Path] = {}
        self.locks: list[int] = []
        self.remove_folders = weakref.finalize(self, _remove, self.folders, self.locks, os.getpid())

    def put(self, hidden_TD: torch.Tensor) -> StoredHidden:
        """Write hidden states. Raises ValueError where neither memory nor disk takes them."""
        content = hidden_TD.detach().cpu().contiguous()
        data = content.reshape(-1).view(torch.uint8).numpy()
        fits = os.access(SHARED_MEMORY, os.W_OK) and self.in_memory + content.nbytes <= self._memory_limit()
        path = self._write(SHARED_MEMORY, data) if fits else None
        if path is not None:
            self.in_memory += content.nbytes
            self.paths_in_memory.add(path)
        else:
            path = self._write(self.disk, data)
        if path is None:
            raise ValueError(f"a teacher's hidden states do not fit into {self.disk}: set teachers.hidden_folder to a larger disk")
        return StoredHidden(path=path, shape=tuple(content.shape), dtype=content.dtype, checksum=zlib.crc32(data))

    def take(self, stored: StoredHidden) -> torch.Tensor:
        """hidden_TD on the CPU, mapped from its file, which is gone afterwards. Raises HiddenLostError."""
        hidden_TD = self.look(stored)
        self.drop(stored)
        return hidden_TD

    def look(self, stored: StoredHidden) -> torch.Tensor:
        """As `take`, and the file stays."""
        try:
            size = stored.path.stat().st_size
            if size != stored.num_bytes:
                raise HiddenLostError(f"{stored.path} has {size} bytes in place of {stored.num_bytes}")
            if not size:
                return torch.empty(stored.shape, dtype=stored.dtype)
            flat = torch.from_file(str(stored.path), shared=False, size=math.prod(stored.shape), dtype=stored.dtype)
        except (OSError, RuntimeError) as error:
            raise HiddenLostError(f"{stored.path} is lost") from error
        if zlib.crc32(flat.view(torch.uint8).numpy()) != stored.checksum:
            raise HiddenLostError(f"{stored.path} is damaged")
        return flat.view(stored.shape)

    def drop(self, stored: StoredHidden) -> None:
        """Forget hidden states that nobody will ask for (again)."""
        if stored.path in self.paths_in_memory:
            self.paths_in_memory.remove(stored.path)
            self.in_memory -= stored.num_bytes
        stored.path.unlink(missing_ok=True)

    def close(self) -> None:
        """Remove the folders; nothing can be put any more."""
        self.remove_folders()

    def _write(self, parent: Path, data: np.ndarray) -> Path | None:
        """A new file; None where there is no room."""
        path = self._folder(parent) / f"{next(self.numbers)}"
        try:
            with path.open("wb") as file:
                file.write(data)
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise
            path.unlink(missing_ok=True)
            return None
        return path

    def _memory_limit(self) -> int:
        if self.limit is None:
            self.limit = shutil.disk_usage(SHARED_MEMORY).free // (2 * self.local_processes)
        return self.limit

    def _folder(self, parent: Path) -> Path:
        """This process's folder in a parent, made when it is first asked for, and anew where somebody has removed it."""
        if parent not in self.folders or not self.folders[parent].is_dir():
            try:
                parent.mkdir(parents=True, exist_ok=True)
                _remove_dead(parent)
                new = Path(tempfile.mkdtemp(prefix="opd-new-", dir=parent))
                lock = os.open(new / LOCK, os.O_CREAT | os.O_RDWR)
                fcntl.flock(lock, fcntl.LOCK_EX)
                self.folders[parent] = new.rename(parent / new.name.replace("opd-new-", PREFIX))  # by its name it is known to be locked
            except OSError as error:
                raise ValueError(f"teachers.hidden_folder: {parent} cannot be written to ({error.strerror})") from error
            self.locks.append(lock)
        return self.folders[parent]


def _remove(folders: dict[Path, Path], locks: list[int], owner: int) -> None:
    """Remove the folders, unless this is a process that the owner forked."""
    if os.getpid() != owner:
        return
    for folder in folders.values():
        shutil.rmtree(folder, ignore_errors=True)
    for lock in locks:
        os.close(lock)


def _remove_dead(parent: Path) -> None:
    """Remove what processes left that were killed: folders whose lock nobody holds."""
    for folder in parent.glob(f"{PREFIX}*"):
        try:
            lock = os.open(folder / LOCK, os.O_RDWR)
        except OSError:  # another user's, or one that is being made
            continue
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(folder, ignore_errors=True)
        except BlockingIOError:
            pass
        finally:
            os.close(lock)
