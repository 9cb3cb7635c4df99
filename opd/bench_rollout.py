"""`opd bench rollout`: what the token log costs, and what it brings that rows leave when they end, on one cohort of the LocalSampler.

A new model answers prompts of random tokens; so many ids end a completion that lengths spread geometrically up to the limit. All contenders draw the same
tokens (but for rounding at other widths), in turns (opd/bench.py). The log's share is that of the seconds from the first decode step on, by the sampler's own
clock: a difference of two whole runs would drown in noise.

RUN/rollout.csv (schema 1), a line per contender:

    schema                                  1
    contender                               logged, unlogged, fixed_width (logged)
    requests, decode_width, prompt_tokens, max_new_tokens, architecture, seed
    repeats, median_seconds, min_seconds    of all requests
    ratio                                   its seconds over those of `logged` in the same round: median
    tokens, steps                           sampled; decode steps
    tokens_per_second                       of the median
    occupancy                               tokens sampled over row slots of the decode steps
    log_share                               seconds in the log over those of decoding: median over rounds
    log_microseconds                        per decode step: median over rounds
    device, hardware, threads, load         cpu or cuda; its name; load: 1-minute average before the start
    python, torch, transformers             versions
"""

import statistics
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from opd.bench import begin_folder, device_kind, machine_caption, machine_columns, print_lines, take_turns, write_csv
from opd.bench_config import RolloutBenchConfig
from opd.console import ProgressDisplay
from opd.run import require_own_folder
from opd.student import build_student, seed_everything
from rollout.cohort import DecodingFigures
from rollout.config import SamplingConfig
from rollout.sampler import LocalSampler, StepLog
from rollout.synthetic import character_tokenizer
from rollout.types import Prompt
from rollout.wal import RolloutLog

SCHEMA = 1
CONTENDERS = ("logged", "unlogged", "fixed_width")


def bench_rollout(cfg: RolloutBenchConfig) -> None:
    """Measure, print a table and a summary, and write RUN/rollout.csv."""
    kind, folder = device_kind(), Path(cfg.run_dir)
    machine = machine_columns(kind, ("transformers",))
    require_own_folder(folder, "bench")
    sampler, prompts, sampling = build(cfg, kind)
    begin_folder(folder, cfg)
    figures: dict[str, list[DecodingFigures]] = {name: [] for name in CONTENDERS}
    with ProgressDisplay() as display, TemporaryDirectory(prefix="log-", dir=folder) as logs:
        runs = {name: _run(name, sampler, prompts, sampling, Path(logs), figures[name]) for name in CONTENDERS}
        for run in runs.values():
            run()  # not counted
        seconds = take_turns(runs, cfg.repeats, kind, lambda number: display.update("rollout", number, cfg.repeats))
        display.update("rollout", cfg.repeats, cfg.repeats)
    lines = [{"schema": SCHEMA, **_line(cfg, name, figures[name][1:], seconds), **machine} for name in CONTENDERS]
    write_csv(folder / "rollout.csv", lines)
    columns = {
        "median s": ("median_seconds", ".2f"), "min s": ("min_seconds", ".2f"), "/ logged": ("ratio", ".3f"), "tokens": ("tokens", "d"),
        "steps": ("steps", "d"), "tokens/s": ("tokens_per_second", ".0f"), "occupancy": ("occupancy", ".1%"), "log": ("log_share", ".2%"),
        "log us/step": ("log_microseconds", ".0f"),
    }  # fmt: skip
    title = f"{cfg.requests} requests of up to {cfg.max_new_tokens} tokens, {cfg.architecture}"
    print_lines(title, "contender", lines, columns, machine_caption(lines[0], [f"{cfg.repeats} rounds"]))
    print(f"the log takes {lines[0]['log_share']:.2%} of the time of decoding; rows that keep their places until the last ends take {lines[2]['ratio']:.2f} x")


def build(cfg: RolloutBenchConfig, device: str) -> tuple[LocalSampler, list[Prompt], SamplingConfig]:
    """(sampler, prompts, how they are answered). Raises ValueError for an architecture that is not there, and for too many ending ids."""
    tokenizer = character_tokenizer()
    if cfg.num_end_tokens >= len(tokenizer):
        raise ValueError(f"num_end_tokens must be below {len(tokenizer)}, the number of tokens, not {cfg.num_end_tokens}")
    from opd.composition import load_config

    student = load_config("distill", [f"student={cfg.architecture}", *cfg.overrides]).student
    seed_everything(cfg.seed)
    model = build_student(student, tokenizer).to(device)
    generator = torch.Generator().manual_seed(cfg.seed)
    tokens = torch.randint(3, len(tokenizer), (cfg.requests, cfg.prompt_tokens), generator=generator).tolist()
    prompts = [Prompt(domain="bench", request=number, row="", tokens=tuple(each)) for number, each in enumerate(tokens)]
    ends = list(range(len(tokenizer) - cfg.num_end_tokens, len(tokenizer)))
    sampling = SamplingConfig(max_new_tokens=cfg.max_new_tokens, decode_width=cfg.decode_width, stop_tokens=ends)
    return LocalSampler(model, [], cfg.seed, len(tokenizer)), prompts, sampling


def _run(
    name: str, sampler: LocalSampler, prompts: list[Prompt], sampling: SamplingConfig, logs: Path, figures: list[DecodingFigures]
) -> Callable[[], None]:
    """One round of a contender, each with a log of its own."""

    def run() -> None:
        log = None if name == "unlogged" else StepLog(RolloutLog(logs / f"{name}-{len(figures)}"), 0, "bench")
        sampler.sample(prompts, replace(sampling, fixed_width=name == "fixed_width"), log=log)
        figures.append(sampler.figures)

    return run


def _line(cfg: RolloutBenchConfig, name: str, figures: list[DecodingFigures], seconds: dict[str, list[float]]) -> dict:
    own, last = seconds[name], figures[-1]
    return {
        "contender": name,
        "requests": cfg.requests,
        "decode_width": cfg.decode_width,
        "prompt_tokens": cfg.prompt_tokens,
        "max_new_tokens": cfg.max_new_tokens,
        "architecture": cfg.architecture,
        "seed": cfg.seed,
        "repeats": len(own),
        "median_seconds": statistics.median(own),
        "min_seconds": min(own),
        "ratio": statistics.median(mine / other for mine, other in zip(own, seconds[CONTENDERS[0]], strict=True)),
        "tokens": last.sampled,
        "steps": last.steps,
        "tokens_per_second": last.sampled / statistics.median(own),
        "occupancy": last.sampled / last.slots,
        "log_share": statistics.median(each.log_seconds / each.decode_seconds for each in figures),
        "log_microseconds": 1e6 * statistics.median(each.log_seconds / each.steps for each in figures),
    }
