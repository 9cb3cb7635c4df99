"""`opd bench teachers`: a step with many teachers, of which few are in memory, against a step with one, on the same tokens.

Contenders take turns (opd/bench.py): every number of teachers, and the largest with each teacher read only when it is asked for. What a step is, and
where teachers come from: opd/bench_residency.py. The first step of each is not counted; with it the optimizer's state and the buffers come, and every
teacher's model runs once for its logits to be verified. A share of load time that is hidden means little where the machine is slow at everything else,
so the ratio of whole steps stands beside it, and that of processor time, which other work on the machine hardly changes. Memory is compared at equal
sizes of forwards, each contender in a process of its own.

RUN/teachers.csv (schema 1), a line per contender and page cache; empty where not measured:

    schema                                  1
    teachers, prefetch, cache               the contender; warm or cold
    tokens, rollouts, length_spread, seed   of a step, and how it was drawn
    teacher_parameters, student_parameters, vocab_size              the models
    repeats, first_seconds                  counted steps; the first, which is not counted
    median_seconds, min_seconds             of a step
    score_seconds, update_seconds, cpu_seconds                      medians of its phases, and of the processor's seconds in all threads
    ratio, score_ratio, update_ratio, cpu_ratio                     its seconds over those of the first contender in the same round: medians
    loads, bytes_read, disk_bytes           of a step: readings of weights and heads; what they read; what of it came from the disk: means
    load_seconds, waited_seconds            of a step: reading and copying, and how much of that somebody waited for: means
    hidden_share                            1 - waited_seconds / load_seconds
    start_bytes, peak_bytes, memory_ratio   anonymous memory of a process: before the first step, at most; peak over that of the first contender
    device, hardware, threads, load         cpu or cuda; its name; load: 1-minute average before the start
    python, torch, transformers, deepspeed, safetensors             versions
"""

import statistics
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from opd.bench import begin_folder, device_kind, machine_caption, machine_columns, print_lines, write_csv
from opd.bench_config import PageCache, TeachersBenchConfig
from opd.bench_memory import require_high_water_mark
from opd.bench_residency import (
    Contender,
    Memory,
    StepFigures,
    Workplace,
    base_config,
    build_workplace,
    contenders_of,
    make_rollouts,
    measure_memory,
    require_cold,
    save_teachers,
    word_tokenizer,
)
from opd.console import ProgressDisplay
from opd.distributed import start_processes
from opd.run import require_own_folder

SCHEMA = 1
PACKAGES = ("transformers", "deepspeed", "safetensors")
MIB = 1 << 20

Steps = dict[tuple[Contender, PageCache], list[StepFigures]]
"""Of all rounds; the first is not counted."""


def bench_teachers(cfg: TeachersBenchConfig) -> None:
    """Measure, print a table and a summary, and write RUN/teachers.csv."""
    kind, folder, contenders = device_kind(), Path(cfg.run_dir), contenders_of(cfg)
    machine = machine_columns(kind, PACKAGES)
    require_own_folder(folder, "bench")
    if not cfg.caches:
        raise ValueError("caches must not be empty: write caches=[warm], or [warm,cold]")
    if cfg.memory:
        require_high_water_mark(kind)
    for architecture in {cfg.teacher_architecture, cfg.student_architecture}:
        base_config(cfg, architecture)
    word_tokenizer(cfg.vocab_size)
    make_rollouts(cfg)
    begin_folder(folder, cfg)
    parent = Path(cfg.teacher_folder or folder)
    parent.mkdir(parents=True, exist_ok=True)
    with ProgressDisplay() as display, TemporaryDirectory(prefix="teachers-", dir=parent) as written:
        teachers, total = Path(written), 2 + cfg.memory * len(contenders) + cfg.repeats
        display.update("teachers", 0, total, "writing them")
        teacher_parameters = save_teachers(cfg, teachers)
        if PageCache.cold in cfg.caches:
            require_cold(teachers)
        memory = {}
        for contender in contenders if cfg.memory else ():
            display.update("teachers", 1 + len(memory), total, f"memory of {contender.name}")
            memory[contender] = measure_memory(cfg, contender, teachers, torch.get_num_threads())
        workplace = build_workplace(cfg, contenders, teachers, start_processes())
        steps = take_steps(cfg, workplace, lambda step: display.update("teachers", total - cfg.repeats - 1 + step, total, f"step {step} of each"))
        display.update("teachers", total, total)
        workplace.close()
    problem = _problem(cfg, teacher_parameters, workplace.num_parameters)
    lines = [{"schema": SCHEMA, **line, **machine} for line in teacher_lines(problem, steps, memory)]
    write_csv(folder / "teachers.csv", lines)
    _print(lines)
    print(summary(lines))


def take_steps(cfg: TeachersBenchConfig, workplace: Workplace, tell: Callable[[int], None]) -> Steps:
    """Steps of all contenders, in turns."""
    steps: Steps = {(contender, cache): [] for cache in cfg.caches for contender in workplace.pools}
    for number in range(cfg.repeats + 1):
        tell(number)
        for (contender, cache), taken in steps.items():
            taken.append(workplace.step(contender, cache))
    return steps


def teacher_lines(problem: dict, steps: Steps, memory: dict[Contender, Memory]) -> list[dict]:
    """Lines of the table file between its schema and the machine."""
    first = next(iter(steps))[0]
    return [_line(problem, key, taken, steps[first, key[1]]) | _memory_columns(memory, key[0], first) for key, taken in steps.items()]


def summary(lines: list[dict]) -> str:
    """The figures that matter, in one sentence."""
    first, parts = lines[0], []
    for line in lines:
        if line["teachers"] == first["teachers"] or not line["prefetch"]:
            continue
        hidden = "nothing was read" if line["hidden_share"] is None else f"{line['hidden_share']:.0%} of its load time is hidden"
        parts.append(f"page cache {line['cache']}: a step with {line['teachers']} teachers takes {line['ratio']:.2f} x one with {first['teachers']}, {hidden}")
    most = [line for line in lines if line["memory_ratio"] is not None and line["prefetch"]]
    if most:
        parts.append(f"its peak of anonymous memory is {most[-1]['memory_ratio']:.2f} x")
    return "; ".join(parts)


def _problem(cfg: TeachersBenchConfig, teacher_parameters: int, student_parameters: int) -> dict:
    return {
        "tokens": cfg.tokens_per_step,
        "rollouts": max(cfg.num_teachers) * cfg.rollouts_per_teacher,
        "length_spread": cfg.length_spread,
        "seed": cfg.seed,
        "teacher_parameters": teacher_parameters,
        "student_parameters": student_parameters,
        "vocab_size": cfg.vocab_size,
    }


def _line(problem: dict, key: tuple[Contender, PageCache], taken: list[StepFigures], yardstick: list[StepFigures]) -> dict:
    contender, cache = key
    counted, compared = taken[1:], yardstick[1:]
    load_seconds, waited = (statistics.mean(times) for times in ([step.load_seconds for step in counted], [step.waited_seconds for step in counted]))

    def ratio(seconds: Callable[[StepFigures], float]) -> float:
        return statistics.median(seconds(own) / seconds(other) for own, other in zip(counted, compared, strict=True))

    return {
        "teachers": contender.num_teachers,
        "prefetch": contender.prefetch,
        "cache": cache.value,
        **problem,
        "repeats": len(counted),
        "first_seconds": taken[0].seconds,
        "median_seconds": statistics.median(step.seconds for step in counted),
        "min_seconds": min(step.seconds for step in counted),
        "score_seconds": statistics.median(step.score_seconds for step in counted),
        "update_seconds": statistics.median(step.update_seconds for step in counted),
        "cpu_seconds": statistics.median(step.cpu_seconds for step in counted),
        "ratio": ratio(lambda step: step.seconds),
        "score_ratio": ratio(lambda step: step.score_seconds),
        "update_ratio": ratio(lambda step: step.update_seconds),
        "cpu_ratio": ratio(lambda step: step.cpu_seconds),
        "loads": statistics.mean(step.loads for step in counted),
        "bytes_read": statistics.mean(step.num_bytes for step in counted),
        "disk_bytes": statistics.mean(step.disk_bytes for step in counted),
        "load_seconds": load_seconds,
        "waited_seconds": waited,
        "hidden_share": 1 - waited / load_seconds if load_seconds else None,
    }


def _memory_columns(memory: dict[Contender, Memory], contender: Contender, first: Contender) -> dict:
    found = memory.get(contender)
    return {
        "start_bytes": found and found.start,
        "peak_bytes": found and found.peak,
        "memory_ratio": found and found.peak / memory[first].peak,
    }


def _print(lines: list[dict]) -> None:
    first = lines[0]
    shown = [
        line
        | {
            "contender": f"{line['teachers']}{'' if line['prefetch'] else ' without prefetch'}, {line['cache']}",
            "megabytes": line["bytes_read"] / 1e6,
            "disk_megabytes": line["disk_bytes"] / 1e6,
            "peak_mib": line["peak_bytes"] and line["peak_bytes"] / MIB,
        }
        for line in lines
    ]
    figures = {
        "step s": ("median_seconds", ".2f"), "min s": ("min_seconds", ".2f"), "score s": ("score_seconds", ".2f"), "update s": ("update_seconds", ".2f"),
        f"/ {first['teachers']}": ("ratio", ".3f"), "score": ("score_ratio", ".2f"), "update": ("update_ratio", ".2f"), "CPU": ("cpu_ratio", ".3f"),
        "MB read": ("megabytes", ".0f"), "from disk": ("disk_megabytes", ".0f"), "load s": ("load_seconds", ".2f"), "waited s": ("waited_seconds", ".2f"),
        "hidden": ("hidden_share", ".1%"), "peak MiB": ("peak_mib", ".0f"), "memory": ("memory_ratio", ".3f"),
    }  # fmt: skip
    sizes = f"teachers of {first['teacher_parameters'] / 1e6:.3g} M parameters in bfloat16, student of {first['student_parameters'] / 1e6:.3g} M"
    title = f"{first['tokens']} tokens in {first['rollouts']} rollouts, {sizes}; columns after / {first['teachers']} are ratios too"
    print_lines(title, "contender", shown, figures, machine_caption(first, [f"{first['repeats']} rounds"]))
