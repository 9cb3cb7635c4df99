"""A module as a process that does not outlive its parent: `python -m rollout.child MODULE ARGUMENTS`.

Set by the process itself: a preexec_fn would have the parent, a trainer with all its memory, forked rather than spawned, which is slow and may be refused.
"""

import ctypes
import os
import runpy
import signal
import subprocess
import sys


def child_command(module: str, *arguments: str) -> list[str]:
    """The command that runs a module so."""
    return [sys.executable, "-m", "rollout.child", str(os.getpid()), module, *arguments]


def run_child(module: str, *arguments: str) -> str | None:
    """Run a module so, to its end; returns why it failed, None where it did not."""
    ended = subprocess.run(child_command(module, *arguments), capture_output=True, text=True, check=False)
    return None if ended.returncode == 0 else last_words(ended.returncode, ended.stderr)


def last_words(code: int, words: str) -> str:
    """Why a process ended that wrote these words to stderr."""
    if code < 0:
        return f"it was killed by {signal.Signals(-code).name}"
    return (words.strip().splitlines() or [f"exit code {code}"])[-1]


def main() -> None:
    """Run the module that the arguments name, unless the parent is gone already."""
    parent, sys.argv = int(sys.argv[1]), sys.argv[2:]
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
    if os.getppid() != parent:
        sys.exit(1)
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
