"""What the subjects of `opd bench` have in common: their folder, the clock, what the machine is, the table file and the printed table.

All contenders of a subject run in one process in turns, round after round, so that what else the machine does hits all of them. A first call of each is
not counted (compilation falls into it) and is where its result is held to the right one. Figures are medians and minima over the rounds; a ratio
of two medians of one run hardly depends on the machine, a figure alone does.
"""

import csv
import io
import os
import platform
import time
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from opd.bench_config import BenchConfig
from opd.console import print_table
from opd.distributed import num_cores
from opd.run import write_config
from rollout.files import replace_text

BUSY = 0.5
"""Load per core before the start from which on figures are not worth comparing."""

Run = Callable[[], Any]
"""Does everything once."""


def device_kind() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def begin_folder(folder: Path, cfg: BenchConfig) -> None:
    """Make the folder, and write the configuration into it."""
    folder.mkdir(parents=True, exist_ok=True)
    write_config(folder, cfg, "bench")


def timed(run: Run, device: str) -> tuple[Any, float]:
    """(outcome, seconds); what is dropped or collected before and after does not count."""
    if device == "cuda":
        torch.cuda.synchronize()
    begun = time.perf_counter()
    outcome = run()
    if device == "cuda":
        torch.cuda.synchronize()
    return outcome, time.perf_counter() - begun


def take_turns(runs: dict[str, Run], repeats: int, device: str, tell: Callable[[int], None]) -> dict[str, list[float]]:
    """Seconds of each, round by round; `tell` is called with the number of each round before it."""
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for repeat in range(repeats):
        tell(repeat)
        for name, run in runs.items():
            seconds[name].append(timed(run, device)[1])
    return seconds


def machine_columns(device: str, packages: tuple[str, ...]) -> dict:
    """Columns of the table file that do not depend on what is measured; to be asked before anything runs, for the load."""
    load = os.getloadavg()[0]
    names = [line.partition(":")[2].strip() for line in _cpu_lines() if line.startswith("model name")]
    cpu = f"{names[0] if names else platform.processor() or platform.machine()}, {num_cores()} cores"
    return {
        "device": device,
        "hardware": torch.cuda.get_device_name() if device == "cuda" else cpu,
        "threads": torch.get_num_threads(),
        "load": round(load, 2),
        "python": platform.python_version(),
        "torch": torch.__version__,
        **{package.replace("-", "_"): installed_version(package) for package in packages},
    }


def installed_version(distribution: str) -> str | None:
    """The version of a package; None where it is not installed."""
    try:
        return version(distribution)
    except PackageNotFoundError:
        return None


def write_csv(path: Path, lines: list[dict]) -> None:
    text = io.StringIO()
    writer = csv.DictWriter(text, list(lines[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(lines)
    replace_text(path, text.getvalue())


def print_lines(title: str, label: str, lines: list[dict], figures: dict[str, tuple[str, str]], caption: str) -> None:
    """A table of some columns, {title: (column, format)}, led by that of `label`. A column in which nothing was measured is left out."""
    shown = {name: figure for name, figure in figures.items() if any(line[figure[0]] is not None for line in lines)}
    rows = [[line[label], *("" if line[name] is None else format(line[name], style) for name, style in shown.values())] for line in lines]
    print_table(title, [label, *shown], rows, caption)


def machine_caption(line: dict, parts: list[str]) -> str:
    """What stands under a table: the machine of one of its lines, some parts, and whether the machine was busy."""
    busy = [f"load {line['load']} before the start: not comparable"] if line["load"] > BUSY * num_cores() else []
    return "; ".join([line["hardware"], f"{line['threads']} threads", f"torch {line['torch']}", *parts, *busy])


def _cpu_lines() -> list[str]:
    path = Path("/proc/cpuinfo")
    return path.read_text().splitlines() if path.is_file() else []
