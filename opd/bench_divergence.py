"""`opd bench divergence`: time and peak memory of the distillation loss, forward and backward, beside other ways to compute it.

Contenders take turns (opd/bench.py); in its first call each is held to the naive formula. `products`, the matrix products alone, is the yardstick.
Peak memory: opd/bench_memory.py.

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

import statistics
from dataclasses import asdict
from pathlib import Path

import psutil
import torch

from opd.bench import begin_folder, device_kind, machine_caption, machine_columns, print_lines, take_turns, timed, write_csv
from opd.bench_config import DivergenceBenchConfig
from opd.bench_contenders import OWN, Contender, Problem, Run, make_inputs, reference, require_agreement
from opd.bench_memory import Peak, measure_peak, require_high_water_mark
from opd.bench_peers import PEERS
from opd.console import ProgressDisplay
from opd.errors import nearest
from opd.run import require_own_folder

SCHEMA = 1
MIB = 1 << 20
PACKAGES = ("triton", "trl", "liger-kernel", "deepspeed")


def bench_divergence(cfg: DivergenceBenchConfig) -> None:
    """Measure, print a table per size, and write RUN/divergence.csv, which grows size by size."""
    device, folder = device_kind(), Path(cfg.run_dir)
    machine = machine_columns(device, PACKAGES)
    require_own_folder(folder, "bench")
    if cfg.memory:
        require_high_water_mark(device)
    problems = [_problem(cfg, num_tokens, vocab_size, device) for vocab_size in cfg.vocab_sizes for num_tokens in cfg.num_tokens]
    contenders, missing = choose(cfg.contenders, device)
    rate = _matrix_rate() if device == "cuda" else None
    begin_folder(folder, cfg)
    lines: list[dict] = []
    for problem in problems:
        fitting, too_large = what_fits(contenders, problem, is_asked=cfg.contenders is not None)
        lines += [line | machine for line in measure(problem, fitting, cfg, rate)]
        write_csv(folder / "divergence.csv", lines)
        _print(problem, lines[-len(fitting) :], missing + too_large)


def choose(asked: list[str] | None, device: str) -> tuple[dict[str, Contender], list[str]]:
    """(contenders by name, a line for each that is not installed). Raises ValueError for one asked for that cannot take part."""
    known = OWN | PEERS
    for name in asked or ():
        if name not in known:
            raise ValueError(f"there is no contender {name!r}{nearest(name, list(known))}; there are {', '.join(known)}")
    if asked == []:
        raise ValueError(f"contenders is empty: choose from {', '.join(known)}")
    smallest = make_inputs(_problem(DivergenceBenchConfig(hidden=2), 1, 2, "cpu"))
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


def measure(problem: Problem, contenders: dict[str, Contender], cfg: DivergenceBenchConfig, rate: float | None) -> list[dict]:
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
            outcome, first = timed(runs[name], problem.device)
            require_agreement(name, outcome, expected, problem.dtype)
            seconds[name] = [first]
            del outcome
        del expected
        tell = lambda repeat: display.update(size, total - cfg.repeats + repeat, total, f"round {repeat + 1}")  # noqa: E731
        for name, counted in take_turns(runs, cfg.repeats, problem.device, tell).items():
            seconds[name] += counted
        display.update(size, total, total)
    return [_line(problem, name, seconds, peaks.get(name), rate) for name in contenders]


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


def _problem(cfg: DivergenceBenchConfig, num_tokens: int, vocab_size: int, device: str) -> Problem:
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


def _matrix_rate(size: int = 8192, repeats: int = 10) -> float:
    """Operations per second of the card's bf16 matrix product: the best of some square ones, the first not counted."""
    left, right = (torch.randn(size, size, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    out = left @ right
    seconds = [timed(lambda: torch.mm(left, right, out=out), "cuda")[1] for _ in range(repeats)]
    return 2 * size**3 / min(seconds)


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
    first = lines[0]
    width = first["hidden"] if first["hidden"] == first["teacher_hidden"] else f"{first['hidden']} (teacher {first['teacher_hidden']})"
    title = f"{first['kind']}, forward and backward: {problem.num_tokens} tokens, vocabulary {problem.vocab_size}, hidden {width}, {first['dtype']}"
    compiled = [f"first call of ours {line['first_seconds']:.1f} s" for line in lines if line["contender"] == "ours"]
    print_lines(title, "contender", lines, figures, machine_caption(first, [f"{first['repeats']} rounds", *compiled]))
    for note in notes:
        print(note)
