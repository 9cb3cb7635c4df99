"""Typed settings of the commands that only look: `opd runs`, `opd inspect`."""

from dataclasses import dataclass, field


@dataclass(slots=True)
class RunsConfig:
    """`opd runs`: how the runs in some folders stand; reads only.

    folders: each a run, or a folder of runs, of pipelines, of comparisons, which are looked for in it.
    """

    folders: list[str] = field(default_factory=lambda: ["runs"])


@dataclass(slots=True)
class InspectConfig:
    """`opd inspect RUN`: the rollouts that a run keeps, to be read; reads only.

    run_dir: folder of the run, written behind the command.
    domain_name: the domain to look at, written domain=NAME; null shows a line for each.
    step: one of the kept steps; null takes the newest.
    tokens: worst tokens of a rollout, and recurring prompts, that are shown at most.
    """

    run_dir: str = ""
    domain_name: str | None = None
    step: int | None = None
    tokens: int = 6
