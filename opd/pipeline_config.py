"""Typed settings of `opd pipeline`: stages, each a command in processes of its own (opd/stages.py)."""

from dataclasses import dataclass, field

from opd.job_config import LoggerConfig


@dataclass(slots=True)
class StageConfig:
    """One step of a pipeline: a command with its overrides, run in processes of its own.

    command: distill, specialize, merge, export or evaluate.
    overrides: as on the command line.
    processes: ranks; null takes one per device (on a CPU machine: one per core, two at most), for an export or a merge one.
    after: stages that must be done before.
    seed: of this stage; null takes the pipeline's.
    """

    command: str = ""
    overrides: list[str] = field(default_factory=list)
    processes: int | None = None
    after: list[str] = field(default_factory=list)
    seed: int | None = None


@dataclass(slots=True)
class PipelineConfig:
    """`opd`: stages in order of their dependencies, side by side where cores allow; finished ones are skipped.

    run_dir: folder of the pipeline; each stage writes to a folder of its own name in it.
    fresh: redo everything.
    seed, logger: given to every stage that has none of its own.
    """

    run_dir: str = "runs/quickstart"
    seed: int = 0
    fresh: bool = False
    logger: LoggerConfig = field(default_factory=LoggerConfig)
    stages: dict[str, StageConfig] = field(default_factory=dict)
