"""A command as a job of submitit's: `python -m opd.submission distill hydra/launcher=opd_slurm run_dir=... [setting=value ...]`.

For who would rather submit from Python than with conf/slurm/opd.sbatch; it needs hydra-submitit-launcher (`pip install 'opd[slurm]'`). Hydra's multirun finds
the launcher, whose settings are hydra.launcher.*, and what it starts is the command itself with the same overrides: `opd` composes, checks and runs them as it
does by hand. A value with commas (optim.lr=1e-3,1e-4) makes a job of each, which then need a run_dir each, as in 'run_dir=runs/lr_${optim.lr}'.

A job that ends early with a checkpoint asks submitit to queue it again, by the signal at which submitit does so. This is SIGUSR1 here, which a run heeds
(opd/stopping.py): submitit's own SIGUSR2 would end it at once, without a checkpoint. Any other exit code is the job's.
"""

import os
import re
import signal
import sys
from functools import partial

import hydra
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

from opd.__main__ import ON_RANKS, main
from opd.composition import CONF, register_schemas
from opd.errors import PREEMPTED, USER_ERROR

SIGNAL = "USR1"
FRESH = re.compile(r"\+*fresh=(true|yes|on|y|1)", re.IGNORECASE)


def run_job(command: str, _cfg: DictConfig) -> None:
    """What a job does, where submitit has started it."""
    code = main([command, *HydraConfig.get().overrides.task])
    if code == PREEMPTED:
        signal.raise_signal(signal.Signals["SIG" + SIGNAL])
    if code:
        sys.exit(code)


def submit(arguments: list[str]) -> int:
    """Start the jobs that a command line asks for, and wait for them; returns the exit code."""
    if not arguments or arguments[0] not in ON_RANKS:
        print(f"opd: name the command to submit first, one of {', '.join(ON_RANKS)}", file=sys.stderr)
        return USER_ERROR
    if not any(argument.startswith("hydra/launcher=") for argument in arguments):
        print("opd: choose how to submit, with hydra/launcher=opd_slurm (or submitit_local, to try it on this machine)", file=sys.stderr)
        return USER_ERROR
    if any(FRESH.fullmatch(argument) for argument in arguments):
        print("opd: a job that is queued again with fresh=true would begin anew each time: leave it out, or delete the run folder first", file=sys.stderr)
        return USER_ERROR
    os.environ["SUBMITIT_PREEMPT_SIGNAL"] = SIGNAL  # submitit reads it when it is imported, here and in the job
    register_schemas()
    sys.argv = ["opd", "--multirun", *arguments[1:]]
    hydra.main(config_path=str(CONF), config_name=arguments[0], version_base="1.3")(partial(run_job, arguments[0]))()
    return 0


if __name__ == "__main__":
    from opd.submission import submit as submit_by_name  # a job unpickles run_job by the module's name

    sys.exit(submit_by_name(sys.argv[1:]))
