"""`opd bench step`: whole optimizer steps beside TRL and DeepSpeed: rollout, teacher, loss and update, in completion tokens per second.

Contenders do the same: the same student, teacher and prompts (opd/bench_step_problem.py), one completion of each prompt at temperature 1, reverse KL over the
whole vocabulary, AdamW, float32. Each stays in processes of its own (opd/bench_step_worker.py, opd/bench_step_peers.py), since DeepSpeed and TRL change
the process they are in, and they do a step in turns, so that what else the machine does hits all. All run on the CPU: one process each for ours and
TRL, two gloo ranks each for ours and DeepSpeed at ZeRO 2 and 3. What is counted are tokens up to the one that ends a completion, itself included, so that
decoding on after it brings nothing. The first steps are not counted (compilation, optimizer state).

Completions are random and everybody draws his own, so tokens of a step differ; rates are compared, and mean lengths and losses stand beside them.

RUN/step.csv (schema 1), a line per architecture and contender:

    schema                                  1
    architecture, contender, ranks          an option of `student`; ours, trl, ours_zero2, deepspeed_zero2, ours_zero3, deepspeed_zero3; processes
    prompts, max_new_tokens, mean_new_tokens, vocab_size, parameters, lr, seed      the problem: parameters of the student
    repeats, median_seconds, min_seconds    counted steps
    tokens_per_second, most_tokens_per_second       of a step: median and maximum
    cpu_seconds, tokens_per_cpu_second      medians; of all threads of all ranks, which other work on the machine changes less
    ours_to_it, ours_to_it_at_best, ours_to_it_by_cpu       rate of ours in as many processes at the same ZeRO stage over its rate: of the medians, of the
                                            maxima, and of the rates by seconds of the processor
    rollout_seconds                         median, on the slowest rank; empty where it is not known
    mean_length, ended, loss                completion tokens; share that ended before the limit; nats per token: means over counted steps
    device, hardware, threads, load         cpu; its name; of this process; 1-minute average before the start
    python, torch, transformers, deepspeed, trl     versions
"""

import statistics
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory

from opd.bench import begin_folder, installed_version, machine_caption, machine_columns, print_lines, take_turns, write_csv
from opd.bench_config import StepBenchConfig
from opd.bench_step_crew import Crew
from opd.bench_step_problem import Outcome, write_problem
from opd.console import ProgressDisplay
from opd.errors import nearest
from opd.run import require_own_folder

SCHEMA = 1
CONTENDERS = {"ours": 1, "trl": 1, "ours_zero2": 2, "deepspeed_zero2": 2, "ours_zero3": 2, "deepspeed_zero3": 2}
"""By name, the number of processes."""

WARM_UP = 3
"""Steps that are not counted: ours compiles its loss in the first ones."""

COLUMNS = {
    "median s": ("median_seconds", ".3f"), "min s": ("min_seconds", ".3f"), "rollout s": ("rollout_seconds", ".3f"), "tokens/s": ("tokens_per_second", ".0f"),
    "most": ("most_tokens_per_second", ".0f"), "ours/it": ("ours_to_it", ".2f"), "at best": ("ours_to_it_at_best", ".2f"),
    "CPU s": ("cpu_seconds", ".3f"), "by CPU": ("ours_to_it_by_cpu", ".2f"),
    "length": ("mean_length", ".1f"), "ended": ("ended", ".0%"), "loss": ("loss", ".4f"),
}  # fmt: skip


def bench_step(cfg: StepBenchConfig) -> None:
    """Measure, print a table for each architecture and a summary, and write RUN/step.csv, which grows architecture by architecture."""
    folder, names = Path(cfg.run_dir), choose(cfg.contenders)
    machine = machine_columns("cpu", ("transformers", "deepspeed", "trl"))
    require_own_folder(folder, "bench")
    lines: list[dict] = []
    with TemporaryDirectory(prefix="opd-step-") as scratch:
        parameters = {name: write_problem(cfg, name, Path(scratch) / name) for name in cfg.architectures}
        begin_folder(folder, cfg)
        for architecture in cfg.architectures:
            seconds, outcomes = race(cfg, architecture, names, Path(scratch) / architecture)
            own = [_line(cfg, architecture, name, parameters[architecture], seconds[name], outcomes[name]) for name in names]
            lines += [{"schema": SCHEMA, **line, **machine} for line in with_ratios(own)]
            write_csv(folder / "step.csv", lines)
            title = f"{architecture}: {cfg.prompts_per_step} prompts, up to {cfg.max_new_tokens} tokens, vocabulary {cfg.vocab_size}"
            print_lines(title, "contender", lines[-len(own) :], COLUMNS, machine_caption(lines[0], [f"{cfg.repeats} rounds"]))
    print(summary(lines))


def choose(asked: list[str] | None) -> list[str]:
    """Contenders by name. Raises ValueError for one that does not exist or is not installed; unless it was asked for, that is left out, and said."""
    for name in asked or ():
        if name not in CONTENDERS:
            raise ValueError(f"there is no contender {name!r}{nearest(name, list(CONTENDERS))}; there are {', '.join(CONTENDERS)}")
    if asked == []:
        raise ValueError(f"contenders is empty: choose from {', '.join(CONTENDERS)}")
    if installed_version("trl") is not None or (asked and "trl" not in asked):
        return list(asked or CONTENDERS)
    missing = "trl is not installed: pip install 'opd[bench]'"
    if asked:
        raise ValueError(missing)
    print(missing)
    return [name for name in CONTENDERS if name != "trl"]


def race(cfg: StepBenchConfig, architecture: str, names: list[str], folder: Path) -> tuple[dict[str, list[float]], dict[str, list[list[Outcome]]]]:
    """(seconds of each contender's counted steps, and what came of them on each rank)."""
    total = 1 + WARM_UP + cfg.repeats
    outcomes: dict[str, list[list[Outcome]]] = {name: [] for name in names}
    with ProgressDisplay() as display:
        display.update(architecture, 0, total, "starting processes")
        with Crew({name: CONTENDERS[name] for name in names}, folder, cfg.threads or 1) as crew:
            runs = {name: _turn(crew, name, outcomes[name]) for name in names}
            take_turns(runs, WARM_UP, "cpu", lambda number: display.update(architecture, 1 + number, total, "not counted"))
            seconds = take_turns(runs, cfg.repeats, "cpu", lambda number: display.update(architecture, 1 + WARM_UP + number, total))
        display.update(architecture, total, total)
    return seconds, {name: taken[WARM_UP:] for name, taken in outcomes.items()}


def with_ratios(lines: list[dict]) -> list[dict]:
    """Lines of one architecture, each other system compared with ours in as many processes at the same stage."""
    by_name = {line["contender"]: line for line in lines}
    result = []
    for line in lines:
        ours = by_name.get(partner(line["contender"]))
        rates = {"ours_to_it": "tokens_per_second", "ours_to_it_at_best": "most_tokens_per_second", "ours_to_it_by_cpu": "tokens_per_cpu_second"}
        result.append(line | {name: ours[rate] / line[rate] if ours and ours is not line else None for name, rate in rates.items()})
    return result


def partner(name: str) -> str:
    """Ours in as many processes, at the same ZeRO stage."""
    return "ours" + "".join(name.partition("_")[1:])


def summary(lines: list[dict]) -> str:
    """The figures that matter, in one sentence."""
    found = [f"{line['ours_to_it']:.2f} x {line['contender']} on {line['architecture']}" for line in lines if line["ours_to_it"] is not None]
    return f"completion tokens per second of ours: {', '.join(found)}" if found else "nobody to compare with"


def _turn(crew: Crew, name: str, outcomes: list[list[Outcome]]) -> Callable[[], None]:
    return lambda: outcomes.append(crew.step(name))


def _line(cfg: StepBenchConfig, architecture: str, name: str, parameters: int, seconds: list[float], outcomes: list[list[Outcome]]) -> dict:
    tokens = [sum(outcome.tokens for outcome in ranks) for ranks in outcomes]
    everything = [outcome for ranks in outcomes for outcome in ranks]
    completions = sum(outcome.completions for outcome in everything)
    rates = [count / taken for count, taken in zip(tokens, seconds, strict=True)]
    cpu_seconds = [sum(outcome.cpu_seconds for outcome in ranks) for ranks in outcomes]
    is_timed = everything[0].rollout_seconds is not None
    return {
        "architecture": architecture,
        "contender": name,
        "ranks": CONTENDERS[name],
        "prompts": cfg.prompts_per_step,
        "max_new_tokens": cfg.max_new_tokens,
        "mean_new_tokens": cfg.mean_new_tokens,
        "vocab_size": cfg.vocab_size,
        "parameters": parameters,
        "lr": cfg.lr,
        "seed": cfg.seed,
        "repeats": len(seconds),
        "median_seconds": statistics.median(seconds),
        "min_seconds": min(seconds),
        "tokens_per_second": statistics.median(rates),
        "most_tokens_per_second": max(rates),
        "cpu_seconds": statistics.median(cpu_seconds),
        "tokens_per_cpu_second": statistics.median(count / taken for count, taken in zip(tokens, cpu_seconds, strict=True)),
        "rollout_seconds": statistics.median(max(outcome.rollout_seconds for outcome in ranks) for ranks in outcomes) if is_timed else None,
        "mean_length": sum(tokens) / completions,
        "ended": sum(outcome.ended for outcome in everything) / completions,
        "loss": statistics.mean(outcome.loss for outcome in everything),
    }
