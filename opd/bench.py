"""`opd bench divergence`: time and peak memory of the distillation loss, forward and backward, beside other ways to compute it.

One process times all contenders in turns, round after round, so that what else the machine does hits all of them; a first round is not counted
(compilation falls into it) and holds each contender to the naive formula. Medians and minima are over the rounds. `products`, the matrix
products alone, is the yardstick: a ratio to it hardly depends on the machine. Peak memory: opd/bench_memory.py.

RUN/divergence.csv (schema 1), a line per size and contender, empty where not measured:

    schema                                  1
    num_tokens, vocab_size, hidden, teacher_hidden, dtype, kind, seed           the problem
    contender                               opd/bench_contenders.py, opd/bench_peers.py
    repeats, first_seconds                  counted rounds; the first call, which is not counted
    median_seconds, min_seconds             forward and backward
    ratio_to_products, ours_to_it           its median over that of products; ours' median over its
    peak_mib, without_gradients_mib         peak above the inputs, and the same less both gradients
    matrix_rate_share                       of the card's bf16 rate, counting the loss's matrix products (CUDA only)
    device, hardware, threads, load         cpu or cuda; its name; load: 1-minute average before the start
    python, torch, triton, trl, liger_kernel, deepspeed           versions
"""

import csv
import io
import os
import platform
import statistics
import time
from dataclasses import asdict
from pathlib import Path

import psutil
import torch

from opd.bench_contenders import OWN, Contender, Problem, Run, make_inputs, reference, require_agreement
from opd.bench_memory import Peak, measure_peak, require_high_water_mark
from opd.bench_peers import PEERS, installed_version
from opd.config import BenchConfig
from opd.console import ProgressDisplay, print_table
from opd.distributed import num_cores
from opd.errors import nearest
from opd.run import belongs_to, write_config
from rollout.files import replace_text

SCHEMA = 1
MIB = 1 << 20
BUSY = 0.5
"""Load per core before the start from which on figures are not worth comparing."""


def bench(cfg: BenchConfig) -> None:
    """Measure, print a table per size, and write RUN/divergence.csv, which grows size by size."""
    load, device = os.getloadavg()[0], "cuda" if torch.cuda.is_available() else "cpu"
    folder = Path(cfg.run_dir)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())) and not belongs_to(folder, "bench"):
        raise ValueError(f"{folder} is not a folder of `opd bench`: choose another run_dir")
    if cfg.memory:
        require_high_water_mark(device)
    problems = [_problem(cfg, num_tokens, vocab_size, device) for vocab_size in cfg.vocab_sizes for num_tokens in cfg.num_tokens]
    contenders, missing = choose(cfg.contenders, device)
    machine = _machine(device, load)
    rate = _matrix_rate() if device == "cuda" else None
    folder.mkdir(parents=True, exist_ok=True)
    write_config(folder, cfg, "bench")
    lines: list[dict] = []
    for problem in problems:
        fitting, too_large = what_fits(contenders, problem, is_asked=cfg.contenders is not None)
        lines += [line | machine for line in measure(problem, fitting, cfg, rate)]
        _write_csv(folder / "divergence.csv", lines)
        _print(problem, lines[-len(fitting) :], missing + too_large)


def choose(asked: list[str] | None, device: str) -> tuple[dict[str, Contender], list[str]]:
    """(contenders by name, a line for each that is not installed). Raises ValueError for one asked for that cannot take part."""
    known = OWN | PEERS
    for name in asked or ():
        if name not in known:
            raise ValueError(f"there is no contender {name!r}{nearest(name, list(known))}; there are {', '.join(known)}")
    if asked == []:
        raise ValueError(f"contenders is empty: choose from {', '.join(known)}")
    smallest = make_inputs(_problem(BenchConfig(hidden=2), 1, 2, "cpu"))
    chosen, missing = {}, []
    for name in known if asked is None else dict.fromkeys(asked):
        if asked is None and device not in known[name].devices:
            continue
        try:
            known[name].prepare(smallest)
            chosen[name] = known[name]
        except Exception as error:  # a package that is broken raises anything while it is imported
            if name in OWN:
                raise
            line = f"{name} cannot be imported ({' '.join(str(error).split())[:200] or type(error).__name__}): pip install 'opd[bench]'"
            if asked is not None:
                raise ValueError(line) from error
            missing.append(line)
    return chosen, missing


def measure(problem: Problem, contenders: dict[str, Contender], cfg: BenchConfig, rate: float | None) -> list[dict]:
    """Lines of the CSV for one size, without the machine. Raises ValueError for a contender that computes something else."""
    size = f"N {problem.num_tokens}, V {problem.vocab_size}"
    total, threads = len(contenders) * (cfg.memory + 1) + cfg.repeats, torch.get_num_threads()
    peaks: dict[str, Peak] = {}
    with ProgressDisplay() as display:
        for name in contenders if cfg.memory else ():
            display.update(size, len(peaks), total, f"memory of {name}")
            peaks[name] = measure_peak(name, problem, threads)
        inputs = make_inputs(problem)
        expected = reference(inputs)
        runs: dict[str, Run] = {}
        seconds: dict[str, list[float]] = {}
        for name, contender in contenders.items():
            display.update(size, len(peaks) + len(runs), total, f"first call of {name}")
            runs[name] = contender.prepare(inputs)
            outcome, first = _timed(runs[name], problem.device)
            require_agreement(name, outcome, expected, problem.dtype)
            seconds[name] = [first]
            del outcome
        del expected
        for repeat in range(cfg.repeats):
            display.update(size, total - cfg.repeats + repeat, total, f"round {repeat + 1}")
            for name, run in runs.items():
                seconds[name].append(_timed(run, problem.device)[1])
        display.update(size, total, total)
    return [_line(problem, name, seconds, peaks.get(name), rate) for name in contenders]


def _timed(run: Run, device: str):
    """(outcome, seconds); what is dropped or collected before and after does not count."""
    if device == "cuda":
        torch.cuda.synchronize()
    begun = time.perf_counter()
    outcome = run()
    if device == "cuda":
        torch.cuda.synchronize()
    return outcome, time.perf_counter() - begun


def _line(problem: Problem, name: str, seconds: dict[str, list[float]], peak: Peak | None, rate: float | None) -> dict:
    medians = {other: statistics.median(found[1:]) for other, found in seconds.items()}
    median = medians[name]
    operations = 2 * problem.num_tokens * problem.vocab_size * (3 * problem.hidden + problem.teacher_hidden)
    return {
        "schema": SCHEMA,
        **asdict(problem),
        "dtype": problem.dtype.value,
        "kind": problem.kind.value,
        "contender": name,
        "repeats": len(seconds[name]) - 1,
        "first_seconds": seconds[name][0],
        "median_seconds": median,
        "min_seconds": min(seconds[name][1:]),
        "ratio_to_products": median / medians["products"] if "products" in medians else None,
        "ours_to_it": medians["ours"] / median if "ours" in medians else None,
        "peak_mib": peak and peak.bytes / MIB,
        "without_gradients_mib": peak and peak.without_gradients / MIB,
        "matrix_rate_share": rate and operations / median / rate,
    }


def _problem(cfg: BenchConfig, num_tokens: int, vocab_size: int, device: str) -> Problem:
    return Problem(
        num_tokens=num_tokens,
        vocab_size=vocab_size,
        hidden=cfg.hidden,
        teacher_hidden=cfg.teacher_hidden or cfg.hidden,
        dtype=cfg.dtype,
        kind=cfg.kind,
        seed=cfg.seed,
        device=device,
    )


def what_fits(contenders: dict[str, Contender], problem: Problem, is_asked: bool) -> tuple[dict[str, Contender], list[str]]:
    """(those whose whole matrices fit into memory, a line for each that does not). Raises ValueError where that one was asked for."""
    available = torch.cuda.mem_get_info()[0] if problem.device == "cuda" else psutil.virtual_memory().available
    fitting, too_large = {}, []
    for name, contender in contenders.items():
        needed = 4 * contender.whole_matrices * problem.num_tokens * problem.vocab_size
        if needed < available:
            fitting[name] = contender
            continue
        line = f"{name} needs about {needed >> 30} GiB at N {problem.num_tokens}, V {problem.vocab_size}, and {available >> 30} GiB are free: left out"
        if is_asked:
            raise ValueError(f"{line.removesuffix(': left out')}: leave it out of contenders, or choose a smaller size")
        too_large.append(line)
    return fitting, too_large


def _machine(device: str, load: float) -> dict:
    """Columns of the CSV that do not depend on what is measured."""
    names = [line.partition(":")[2].strip() for line in _cpu_lines() if line.startswith("model name")]
    cpu = f"{names[0] if names else platform.processor() or platform.machine()}, {num_cores()} cores"
    versions = {package.replace("-", "_"): installed_version(package) for package in ("triton", "trl", "liger-kernel", "deepspeed")}
    return {
        "device": device,
        "hardware": torch.cuda.get_device_name() if device == "cuda" else cpu,
        "threads": torch.get_num_threads(),
        "load": round(load, 2),
        "python": platform.python_version(),
        "torch": torch.__version__,
        **versions,
    }


def _cpu_lines() -> list[str]:
    path = Path("/proc/cpuinfo")
    return path.read_text().splitlines() if path.is_file() else []


def _matrix_rate(size: int = 8192, repeats: int = 10) -> float:
    """Operations per second of the card's bf16 matrix product: the best of some square ones, the first not counted."""
    left, right = (torch.randn(size, size, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    out = left @ right
    seconds = [_timed(lambda: torch.mm(left, right, out=out), "cuda")[1] for _ in range(repeats)]
    return 2 * size**3 / min(seconds)


def _write_csv(path: Path, lines: list[dict]) -> None:
    text = io.StringIO()
    writer = csv.DictWriter(text, list(lines[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(lines)
    replace_text(path, text.getvalue())


def _print(problem: Problem, lines: list[dict], notes: list[str]) -> None:
    """The table of one size, and a line for each contender that did not take part."""
    figures = {
        "median s": ("median_seconds", ".4g"),
        "min s": ("min_seconds", ".4g"),
        "/ products": ("ratio_to_products", ".2f"),
        "ours / it": ("ours_to_it", ".2f"),
        "peak MiB": ("peak_mib", ".0f"),
        "without gradients": ("without_gradients_mib", ".0f"),
        "of matrix rate": ("matrix_rate_share", ".0%"),
    }
    shown = {title: figure for title, figure in figures.items() if lines[0][figure[0]] is not None}
    rows = [[line["contender"], *(format(line[name], style) for name, style in shown.values())] for line in lines]
    first = lines[0]
    width = first["hidden"] if first["hidden"] == first["teacher_hidden"] else f"{first['hidden']} (teacher {first['teacher_hidden']})"
    title = f"{first['kind']}, forward and backward: {problem.num_tokens} tokens, vocabulary {problem.vocab_size}, hidden {width}, {first['dtype']}"
    compiled = [f"first call of ours {line['first_seconds']:.1f} s" for line in lines if line["contender"] == "ours"]
    parts = [first["hardware"], f"{first['threads']} threads", f"torch {first['torch']}", f"{first['repeats']} rounds", *compiled]
    if first["load"] > BUSY * num_cores():
        parts.append(f"load {first['load']} before the start: not comparable")
    print_table(title, ["contender", *shown], rows, "; ".join(parts))
    for note in notes:
        print(note)
