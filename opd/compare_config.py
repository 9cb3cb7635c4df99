"""Typed settings of `opd compare`: a base, its teachers, and the ways to make one student of them (opd/compare.py)."""

import re
from dataclasses import dataclass, field
from enum import Enum

from opd.job_config import LoggerConfig
from opd.pipeline_config import StageConfig


class ArmRole(Enum):
    """What an arm is there for: method is what is judged, baseline what one would do instead, control what must fail, or change nothing."""

    method = "method"
    baseline = "baseline"
    control = "control"


@dataclass(slots=True)
class ArmConfig:
    """One way to make a student.

    label: its name in the table.
    role: what it is there for.
    command: distill, specialize or merge.
    overrides: what differs from the comparison's settings of that command.
    seeds: how often, with the seeds 0, 1, ...; one alone is marked so in the table.
    processes: as of a stage.
    seconds_of: an arm whose seconds it is given: the settings in `scaled` are those of the arm `like`, times the seconds of the one over those of the other,
        of each the fastest of its seeds. Null takes the steps that its settings say.
    like: the arm whose command and overrides it has, besides its own; needed with seconds_of.
    scaled: the settings that an arm with another's seconds has more or less of: that of its steps, and of what a step uses up.
    """

    label: str = ""
    role: ArmRole = ArmRole.baseline
    command: str = "distill"
    overrides: list[str] = field(default_factory=list)
    seeds: int = 1
    processes: int | None = 1
    seconds_of: str | None = None
    like: str | None = None
    scaled: list[str] = field(default_factory=lambda: ["num_steps"])


@dataclass(slots=True)
class CompareConfig:
    """`opd compare`: arms side by side, on the same base, teachers, prompts and held-out prompts.

    run_dir: folder of the comparison; each stage writes to a folder of its own name in it.
    seed: of the stages before the arms, and of every evaluation.
    fresh: redo everything.
    logger: given to every stage that trains.
    stages: what is made before the arms, as of a pipeline: the base and the teachers, where they do not exist yet.
    base_model: folder or hub id of the model that every arm begins with.
    teachers: of each domain, folder or hub id.
    settings: overrides that all arms of a command have, by command: specialize, distill, merge, evaluate; base and teachers are added to them.
    arms: by name.
    only: names of the arms to run; null runs all.
    results: folder of the summaries of arms that are finished, from which the table is made; an arm that has one is not run again. Null takes RUN/results.
    table_only: make the table from the summaries that are there, and run nothing.
    """

    run_dir: str = "runs/compare"
    seed: int = 0
    fresh: bool = False
    logger: LoggerConfig = field(default_factory=LoggerConfig)
    stages: dict[str, StageConfig] = field(default_factory=dict)
    base_model: str | None = None
    teachers: dict[str, str] = field(default_factory=dict)
    settings: dict[str, list[str]] = field(default_factory=dict)
    arms: dict[str, ArmConfig] = field(default_factory=dict)
    only: list[str] | None = None
    results: str | None = None
    table_only: bool = False


ARM_COMMANDS = ("distill", "specialize", "merge")


def check_compare(cfg: CompareConfig) -> None:
    """Raises ValueError for arms that cannot be run, or that name others that are not there."""
    for name in cfg.settings:
        if name not in (*ARM_COMMANDS, "evaluate"):
            raise ValueError(f"settings.{name} is of no command of a comparison: use {', '.join((*ARM_COMMANDS, 'evaluate'))}")
    for name, arm in cfg.arms.items():
        if not re.fullmatch(r"[A-Za-z0-9_]+", name):
            raise ValueError(f"arm {name!r} cannot name a stage: use letters, digits and '_'")
        if arm.seeds < 1:
            raise ValueError(f"arms.{name}.seeds must be at least 1, not {arm.seeds}")
        if (arm.seconds_of is None) != (arm.like is None):
            raise ValueError(f"arms.{name} needs both seconds_of and like, or neither")
        for other in (arm.seconds_of, arm.like):
            if other is not None and (other not in cfg.arms or cfg.arms[other].seconds_of is not None):
                raise ValueError(f"arms.{name} names {other}, which is not an arm with steps of its own")
        if arm.like is None and arm.command not in ARM_COMMANDS:
            raise ValueError(f"arms.{name} runs {arm.command!r}: use {', '.join(ARM_COMMANDS)}")
    unknown = [name for name in cfg.only or () if name not in cfg.arms]
    if unknown:
        raise ValueError(f"only names {unknown[0]}, which is no arm: there are {', '.join(cfg.arms)}")
