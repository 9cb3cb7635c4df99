"""Typed settings of `opd runs`."""

from dataclasses import dataclass, field


@dataclass(slots=True)
class RunsConfig:
    """`opd runs`: how the runs in some folders stand; reads only.

    folders: each a run, or a folder of runs, of pipelines, of comparisons, which are looked for in it.
    """

    folders: list[str] = field(default_factory=lambda: ["runs"])
