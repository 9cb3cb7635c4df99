"""The lock that keeps two jobs out of one folder, and the sign of life of the one that is in it.

    FOLDER/.lock     locked (flock) by the process that writes here, which touches it every TOUCH_SECONDS while it lives

A lock ends with its process, however that ends: so one is never left behind on this machine. Some shared file systems keep locks on each host apart; there
a folder of which another host says that it is running (opd/run_state.py) is watched for WATCH_SECONDS: where the file is touched it is in use, else what
is left is a dead job's, which is said, and the folder is taken over. Whose clock is right does not matter: only whether the time of the file changes.
"""

import fcntl
import logging
import os
import socket
import threading
import time
from contextlib import suppress
from datetime import datetime
from pathlib import Path
from typing import IO

from opd.run_state import RunState, State, read_state

LOCK_FILE = ".lock"
TOUCH_SECONDS = 5.0
WATCH_SECONDS = 4 * TOUCH_SECONDS
LOG = logging.getLogger(__name__)

_LOCKS: dict[Path, IO] = {}
"""Lock files this process holds open, by folder; a lock lasts as long as its process."""


def lock(folder: Path) -> str | None:
    """Keep other processes out of a folder until this one ends; returns the problem where one is in it already."""
    if folder.resolve() in _LOCKS:
        return None
    file = (folder / LOCK_FILE).open("a")
    before = read_state(folder)
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.close()
        return f"another process is writing to {folder}{_who(before)}: wait for it, end it, or choose another run_dir"
    if before is not None and before.state is State.running and before.host != socket.gethostname():
        if _is_touched(folder / LOCK_FILE):
            file.close()
            return f"another process is writing to {folder}{_who(before)}: wait for it, end it, or choose another run_dir"
        LOG.warning("taking over %s, which was in use%s: it has given no sign of life for %g s", folder, _who(before), WATCH_SECONDS)
    _LOCKS[folder.resolve()] = file
    threading.Thread(target=_live, args=(folder / LOCK_FILE,), daemon=True).start()
    return None


def is_held(folder: Path) -> bool:
    """Whether another process of this machine holds a folder's lock; takes none."""
    if folder.resolve() in _LOCKS or not (folder / LOCK_FILE).is_file():
        return False
    with (folder / LOCK_FILE).open() as file:
        try:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False


def last_sign(folder: Path) -> float | None:
    """When the job in a folder last gave a sign of life, in seconds since 1970; None where there has been none."""
    file = folder / LOCK_FILE
    return file.stat().st_mtime if file.is_file() else None


def gives_signs(folder: Path) -> bool:
    """Whether a job in a folder has given a sign of life within the last minute; that of another host, if the two clocks agree to that."""
    sign = last_sign(folder)
    return sign is not None and time.time() - sign < 12 * TOUCH_SECONDS


def _who(state: RunState | None) -> str:
    if state is None or state.state is not State.running:
        return ""
    return f" (pid {state.pid} on {state.host}, since {datetime.fromtimestamp(state.begun):%Y-%m-%d %H:%M})"


def _is_touched(file: Path) -> bool:
    before, end = file.stat().st_mtime_ns, time.monotonic() + WATCH_SECONDS
    while time.monotonic() < end:
        time.sleep(TOUCH_SECONDS / 5)
        if file.stat().st_mtime_ns != before:
            return True
    return False


def _live(file: Path) -> None:
    while True:
        with suppress(OSError):  # the folder may be gone, as a rehearsal's is
            os.utime(file)
        time.sleep(TOUCH_SECONDS)
