"""`opd bench qat`: what FP4 experts cost and save: kernels alone, a step of the quickstart's distillation, memory of the sampler.

Contenders take turns (opd/bench.py). Kernels: opd/bench_kernels.py; the yardstick is the product that the weights are for. Steps: opd/bench_qat_steps.py;
those with FP4 are compared with those without. Memory is counted, not measured: parameters and buffers of the model that samples.

RUN/qat.csv (schema 1), a line per kernel, per phase of a step and option of `quant`, and per thing held and option; empty where it does not apply:

    schema                                  1
    table                                   kernel, step, or memory
    name                                    a kernel; rollout, score, update, or step, their sum; weights (of the kernels), experts, or sampler, which has them
    quant                                   of steps and memory: none or mxfp4_experts
    experts, outputs, inputs, tokens_per_expert, seed               the kernels' problem
    completion_tokens                       of one step
    repeats, first_seconds                  counted rounds (steps that do not measure); the first call, which is not counted
    median_seconds, min_seconds             of those rounds
    measuring_repeats, measuring_seconds    steps that measure quantisation, and their median
    expected_seconds                        of any step: both kinds in proportion
    ratio                                   of kernels: median over that of grouped; of steps: expected (else median) over that without FP4
    gigabytes_per_second                    what a kernel must read and write, over its median
    num_bytes, bits_per_weight              memory; bits where there is nothing but experts' weights
    device, hardware, threads, load         cpu or cuda; its name; load: 1-minute average before the start
    python, torch, triton, torchao, transformers, deepspeed         versions
"""

import statistics
from pathlib import Path
from tempfile import TemporaryDirectory

from opd.bench import begin_folder, device_kind, machine_caption, machine_columns, print_lines, take_turns, timed, write_csv
from opd.bench_config import QatBenchConfig
from opd.bench_kernels import Experts, Kernel, choose_kernels, make_experts
from opd.bench_qat_steps import PHASES, QUANTS, STEP, PhaseTime, measure_steps, phase_time, sampler_memory, step_config
from opd.console import ProgressDisplay
from opd.distributed import start_processes
from opd.run import require_own_folder

SCHEMA = 1
PACKAGES = ("triton", "torchao", "transformers", "deepspeed")
MIB = 1 << 20
YARDSTICK = "grouped"
COLUMNS = (
    "table", "name", "quant", "experts", "outputs", "inputs", "tokens_per_expert", "seed", "completion_tokens", "repeats", "first_seconds", "median_seconds",
    "min_seconds", "measuring_repeats", "measuring_seconds", "expected_seconds", "ratio", "gigabytes_per_second", "num_bytes", "bits_per_weight",
)  # fmt: skip
"""Of a line, after its schema and before the machine's."""


def bench_qat(cfg: QatBenchConfig) -> None:
    """Measure, print three tables and a summary, and write RUN/qat.csv, which grows table by table."""
    kind, folder = device_kind(), Path(cfg.run_dir)
    machine = machine_columns(kind, PACKAGES)
    require_own_folder(folder, "bench")
    settings = step_config(cfg, QUANTS[1])
    kernels, missing = choose_kernels()
    experts = make_experts(cfg.shape, cfg.tokens_per_expert, cfg.seed, kind)
    memory = _memory_lines(cfg, experts)
    begin_folder(folder, cfg)
    lines = _written(folder, [], measure_kernels(experts, kernels, cfg, kind), machine)
    _print_kernels(cfg, lines, missing)
    if cfg.steps:
        lines = _written(folder, lines, _step_lines(cfg, settings.quant.measure_every), machine)
        _print_steps(lines, settings.quant.measure_every)
    lines = _written(folder, lines, memory, machine)
    _print_memory(lines)
    print(summary(lines))


def measure_kernels(experts: Experts, kernels: dict[str, Kernel], cfg: QatBenchConfig, device: str) -> list[dict]:
    """Lines of the kernels. Raises ValueError for one that computes something else."""
    runs, first = {}, {}
    with ProgressDisplay() as display:
        total = len(kernels) + cfg.repeats
        for name, kernel in kernels.items():
            display.update("kernels", len(runs), total, f"first call of {name}")
            runs[name] = kernel.prepare(experts)
            outcome, first[name] = timed(runs[name], device)
            if not kernel.is_right(experts, outcome):
                raise ValueError(f"{name} is not timed: what it computes on weights of shape {cfg.shape} is not what it should")
            del outcome
        tell = lambda repeat: display.update("kernels", len(runs) + repeat, total, f"round {repeat + 1}")  # noqa: E731
        seconds = take_turns(runs, cfg.repeats, device, tell)
        display.update("kernels", total, total)
    medians = {name: statistics.median(taken) for name, taken in seconds.items()}
    return [
        _line(
            table="kernel",
            name=name,
            **_problem(experts),
            tokens_per_expert=cfg.tokens_per_expert,
            seed=cfg.seed,
            repeats=cfg.repeats,
            first_seconds=first[name],
            median_seconds=medians[name],
            min_seconds=min(seconds[name]),
            ratio=medians[name] / medians[YARDSTICK],
            gigabytes_per_second=kernel.num_bytes(experts) / medians[name] / 1e9,
        )
        for name, kernel in kernels.items()
    ]


def _step_lines(cfg: QatBenchConfig, measure_every: int) -> list[dict]:
    with ProgressDisplay() as display, TemporaryDirectory() as teachers:
        tell = lambda step: display.update("steps", step, cfg.steps + 1, "with FP4 and without, in turns")  # noqa: E731
        seconds, completion_tokens = measure_steps(cfg, start_processes(), Path(teachers), tell)
        display.update("steps", cfg.steps + 1, cfg.steps + 1)
    lines = []
    for phase in (*PHASES, STEP):
        found = {quant: phase_time(seconds[quant][phase], measure_every) for quant in QUANTS}
        for quant, taken in found.items():
            lines.append(
                _line(
                    table="step",
                    name=phase,
                    quant=quant,
                    seed=cfg.seed,
                    completion_tokens=completion_tokens,
                    repeats=taken.num_plain,
                    first_seconds=seconds[quant][phase][0],
                    median_seconds=taken.plain,
                    min_seconds=taken.least,
                    measuring_repeats=taken.num_measuring,
                    measuring_seconds=taken.measuring,
                    expected_seconds=taken.expected,
                    ratio=_usual(taken) / _usual(found[QUANTS[0]]),
                )
            )
    return lines


def _memory_lines(cfg: QatBenchConfig, experts: Experts) -> list[dict]:
    held = {"none": experts.weight_EOI.nbytes, "mxfp4_experts": experts.packed.num_bytes}
    count = experts.weight_EOI.numel()
    lines = [
        _line(table="memory", name="weights", quant=quant, **_problem(experts), num_bytes=held[quant], bits_per_weight=8 * held[quant] / count)
        for quant in QUANTS
    ]
    for quant, model in sampler_memory(cfg).items():
        bits = 8 * model.experts / model.num_expert_weights
        lines.append(_line(table="memory", name="experts", quant=quant, num_bytes=model.experts, bits_per_weight=bits))
        lines.append(_line(table="memory", name="sampler", quant=quant, num_bytes=model.model))
    return lines


def summary(lines: list[dict]) -> str:
    """The figures that matter, in two sentences."""
    found = {(line["name"], line["quant"]): line for line in lines}
    kernel, sampler = found["fake_quantize", None], [found["sampler", quant]["num_bytes"] / MIB for quant in QUANTS]
    shape = [kernel[name] for name in ("experts", "outputs", "inputs")]
    count, compared = shape[0] * shape[1] * shape[2] / 1e6, f"{kernel['ratio']:.2f} x the grouped product of {kernel['tokens_per_expert']} tokens per expert"
    parts = [f"{count:.3g} M bfloat16 weights {shape} fake-quantised in {1e3 * kernel['median_seconds']:.3g} ms, {compared}"]
    if (STEP, QUANTS[1]) in found:
        parts.append(f"a step with FP4 experts takes {found[STEP, QUANTS[1]]['ratio']:.3f} x one without")
    bits = found["experts", QUANTS[1]]["bits_per_weight"]
    parts.append(f"the sampler's model holds {sampler[1]:.3g} MiB in place of {sampler[0]:.3g}, {bits:.4g} bits an expert's weight")
    return "; ".join(parts)


def _line(**found) -> dict:
    assert set(found) <= set(COLUMNS)
    return {"schema": SCHEMA, **{column: found.get(column) for column in COLUMNS}}


def _problem(experts: Experts) -> dict[str, int]:
    return dict(zip(("experts", "outputs", "inputs"), experts.weight_EOI.shape, strict=True))


def _usual(taken: PhaseTime) -> float:
    """Seconds that stand for a phase: of any step where both kinds were seen, else of the kind that was."""
    return next(seconds for seconds in (taken.expected, taken.plain, taken.measuring) if seconds is not None)


def _written(folder: Path, before: list[dict], new: list[dict], machine: dict) -> list[dict]:
    """All lines so far; they are in the file too."""
    lines = before + [line | machine for line in new]
    write_csv(folder / "qat.csv", lines)
    return lines


def _print_kernels(cfg: QatBenchConfig, lines: list[dict], notes: list[str]) -> None:
    shown = [line | {"kernel": line["name"]} | _milliseconds(line) for line in lines]
    figures = {"median ms": ("median", ".3g"), "min ms": ("least", ".3g"), "/ grouped": ("ratio", ".2f"), "GB/s": ("gigabytes_per_second", ".3g")}
    title = f"bfloat16 weights {cfg.shape}, {cfg.tokens_per_expert} tokens per expert"
    compiled = [f"first call of fake_quantize {line['first_seconds']:.1f} s" for line in lines if line["name"] == "fake_quantize"]
    print_lines(title, "kernel", shown, figures, machine_caption(lines[0], [f"{cfg.repeats} rounds", *compiled]))
    for note in notes:
        print(note)


def _print_steps(lines: list[dict], measure_every: int) -> None:
    steps = [line for line in lines if line["table"] == "step"]
    shown = [line | {"phase": f"{line['name']} {line['quant']}"} | _milliseconds(line) for line in steps]
    figures = {"median ms": ("median", ".4g"), "min ms": ("least", ".4g"), "measuring ms": ("measuring", ".4g"), "expected ms": ("expected", ".4g")}
    first = steps[0]
    counted = [f"{first['repeats']} steps", f"{first['measuring_repeats']} that measure quantisation, as one in {measure_every} does"]
    if first["expected_seconds"] is None:
        counted.append("steps of one kind only were counted: the ratio is theirs (more steps, or a smaller quant.measure_every)")
    title = f"a step of the quickstart's distillation, {first['completion_tokens']} completion tokens"
    print_lines(title, "phase", shown, figures | {"/ none": ("ratio", ".3f")}, machine_caption(first, counted))


def _print_memory(lines: list[dict]) -> None:
    shown = [line | {"held": f"{line['name']} {line['quant']}", "mib": line["num_bytes"] / MIB} for line in lines if line["table"] == "memory"]
    title = "weights: of the kernels; sampler: the model that samples in those steps; experts: its routed experts"
    print_lines(title, "held", shown, {"bytes": ("num_bytes", "d"), "MiB": ("mib", ".4g"), "bits per weight": ("bits_per_weight", ".4g")}, "")


def _milliseconds(line: dict) -> dict[str, float | None]:
    names = {"median": "median_seconds", "least": "min_seconds", "measuring": "measuring_seconds", "expected": "expected_seconds"}
    return {name: None if line[column] is None else 1e3 * line[column] for name, column in names.items()}
