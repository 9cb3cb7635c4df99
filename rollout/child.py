"""A module as a process that does not outlive its parent: `python -m rollout.child MODULE ARGUMENTS`.

Set by the process itself: a preexec_fn would have the parent, a trainer with all its memory, forked rather than spawned, which is slow and may be refused.
"""

import ctypes
import os
import runpy
import signal
import sys


def child_command(module: str, *arguments: str) -> list[str]:
    """The command that runs a module so."""
    return [sys.executable, "-m", "rollout.child", str(os.getpid()), module, *arguments]


def main() -> None:
    """Run the module that the arguments name, unless the parent is gone already."""
    parent, sys.argv = int(sys.argv[1]), sys.argv[2:]
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
    if os.getppid() != parent:
        sys.exit(1)
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
