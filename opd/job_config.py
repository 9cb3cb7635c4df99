"""Typed settings of a job: what it saves, when it ends early, and what it shows (opd/checkpoint.py, stopping.py, tracker.py, samples.py, profiling.py,
report.py).
"""

from dataclasses import dataclass, field
from enum import Enum


class LoggerKind(Enum):
    none = "none"
    offline = "offline"
    wandb = "wandb"


@dataclass(slots=True)
class CheckpointConfig:
    """every: steps between checkpoints; 0 saves the last step only, which is always saved.

    keep: newest checkpoints that stay; with one alone there is nothing to go on from where it is damaged.
    asynchronous: train on while a process of each rank writes its share (opd/checkpoint_writer.py); until then that stands in the host's shared memory,
        which has to have room for it.
    """

    every: int = 50
    keep: int = 2
    asynchronous: bool = False


@dataclass(slots=True)
class RanksConfig:
    """The processes of a job (opd/supervisor.py, heartbeat.py).

    processes: ranks that the command starts on this machine; 1 is the command's own process, unless max_restarts asks for a supervisor.
    max_restarts: how often ranks that died are started again.
    heartbeat_seconds: a rank that is not heard of for this long ends the job.
    timeout_minutes: a rank that waits longer than this for another ends with an error.
    """

    processes: int = 1
    max_restarts: int = 0
    heartbeat_seconds: float = 60.0
    timeout_minutes: float = 30.0


@dataclass(slots=True)
class LaunchConfig(RanksConfig):
    """And how a job ends before its run does (opd/stopping.py).

    max_hours: hours after which a run saves and ends, to be started again; null never.
    grace_seconds: from SIGTERM or SIGUSR1 to the end of the process at most.
    """

    max_hours: float | None = None
    grace_seconds: float = 120.0


@dataclass(slots=True)
class LoggerConfig:
    """Weights & Biases beside metrics.jsonl.

    kind: none, offline (no account needed), or wandb (online).
    project, entity, group, name: as in wandb.init.
    upload_text: allow text of prompts to leave the machine: without it, system prompts are left out of the uploaded configuration.
    """

    kind: LoggerKind = LoggerKind.offline
    project: str = "opd"
    entity: str | None = None
    group: str | None = None
    name: str | None = None
    upload_text: bool = False


@dataclass(slots=True)
class ProfileConfig:
    """Trace of torch's profiler over a few steps (opd/profiling.py).

    steps: the first and the last step to trace, as numbered in metrics.jsonl; empty traces none.
    all_ranks: trace every rank, not the main one alone.
    """

    steps: list[int] = field(default_factory=list)
    all_ranks: bool = False


@dataclass(slots=True)
class SamplesConfig:
    """Rollouts that are kept for reading.

    every: steps between two of which a few rollouts per domain are kept in RUN/samples, with text, grade and the divergence of each token
        (opd/samples.py); the last step's are kept too. 0 keeps none.
    """

    every: int = 50


@dataclass(slots=True)
class ReportConfig:
    """`opd report RUN`: one HTML page on a run (opd/report.py).

    run_dir: folder of the run or pipeline; report.html is written there.
    others: further runs, in `opd report RUN RUN ...`: then the page compares them all with the first (opd/report_compare.py), and is written to `out`.
    out: file of a comparison.
    upload: also log the page as an artifact of the run's W&B run, without text of prompts and completions unless the run has logger.upload_text=true.
    """

    run_dir: str = ""
    others: list[str] = field(default_factory=list)
    out: str = "comparison.html"
    upload: bool = False
