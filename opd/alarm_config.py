"""Typed settings of the alarms that watch a run's metrics (opd/alarms.py)."""

from dataclasses import dataclass


@dataclass(slots=True)
class AlarmsConfig:
    """enabled: judge the metrics of each step, and log one line when one of them begins to look like a known failure."""

    enabled: bool = True
