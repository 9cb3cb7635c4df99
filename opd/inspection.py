"""`opd inspect RUN [domain=law] [step=140]`: why one domain is bad, from the rollouts that a run keeps (opd/samples.py), in a terminal.

Without a domain, a line for each: where its divergence lies, and which prompts recur among its worst. With one, its kept rollouts with the divergence of
each token, what student and teacher would have said at the worst of them, the divergence by tenth of the answer and by class of token, and the prompts that
are among its worst again and again. Reads RUN/samples alone, which are whole files: a run that is going on is not touched, and no model is loaded.
"""

import math
from collections import Counter
from pathlib import Path
from typing import Any

from opd.console import print_line, print_table, print_tokens, visible
from opd.errors import nearest
from opd.runs_config import InspectConfig
from rollout.files import read_json

FOLDER, SCHEMA = "samples", 1
SHOWN_STEPS = 8
"""Kept steps that a refusal names at most."""
SHOWN_LETTERS = 60
NO_TOKENS = "(what student and teacher would have said was not kept: this file is of an older opd)"


def inspect_run(cfg: InspectConfig) -> None:
    """Print what is asked. Raises ValueError where the run, the step or the domain is not there."""
    files = kept_steps(Path(cfg.run_dir))
    step = _choose(files, cfg.step, cfg.run_dir)
    record = _read(files[step])
    if cfg.domain_name is None:
        _print_overview(cfg.run_dir, record, files)
        return
    if cfg.domain_name not in record["domains"]:
        known = list(record["domains"])
        raise ValueError(f"step {step} of {cfg.run_dir} has no rollout of {cfg.domain_name!r}{nearest(cfg.domain_name, known)}; it has {', '.join(known)}")
    _print_domain(cfg, record, files)


def kept_steps(run_dir: Path) -> dict[int, Path]:
    """The steps of which rollouts are kept, with their files. Raises ValueError where there are none."""
    if not (run_dir / "config.yaml").is_file():
        raise ValueError(f"{run_dir} is not a folder of a run: write opd inspect RUN")
    files = {int(path.stem): path for path in sorted((run_dir / FOLDER).glob("*.json")) if path.stem.isdigit()}
    if not files:
        raise ValueError(f"{run_dir} has kept no rollouts yet: a distillation does every samples.every steps, and at its last")
    return files


def recurring(files: dict[int, Path], domain: str) -> list[tuple[str, int, float, list[int], str]]:
    """Rows that are among the domain's worst prompts at two kept steps or more: (row, how often, mean nats per token, steps, the end of its text), most often
    first.
    """
    seen: dict[str, list[tuple[int, float]]] = {}
    texts: dict[str, str] = {}
    for step, path in files.items():
        for prompt in _read(path).get("figures", {}).get(domain, {}).get("prompts", []):
            seen.setdefault(prompt["row"], []).append((step, prompt["kl"]))
            texts[prompt["row"]] = prompt.get("text", "")  # which is not in the files of older versions
    times = Counter({row: len({step for step, _ in found}) for row, found in seen.items()})
    means = {row: sum(kl for _, kl in found) / len(found) for row, found in seen.items()}
    found = [(row, count, means[row], sorted({step for step, _ in seen[row]}), texts[row]) for row, count in times.items() if count > 1]
    return sorted(found, key=lambda item: (-item[1], -item[2], item[0]))


def _choose(files: dict[int, Path], step: int | None, run_dir: str) -> int:
    if step is None:
        return max(files)
    if step not in files:
        near = sorted(sorted(files, key=lambda kept: abs(kept - step))[:SHOWN_STEPS])
        raise ValueError(f"{run_dir} has kept no rollouts of step {step}; the nearest are {', '.join(map(str, near))} (samples.every)")
    return step


def _read(path: Path) -> dict[str, Any]:
    record = read_json(path)
    if record.get("schema") != SCHEMA:
        raise ValueError(f"{path} is of another version of opd: this one reads schema {SCHEMA}")
    return record


def _print_overview(run_dir: str, record: dict[str, Any], files: dict[int, Path]) -> None:
    rows = []
    for name in record["domains"]:
        figures = record.get("figures", {}).get(name)
        if figures is None:
            rows.append([name, *[""] * 5])
            continue
        deciles, classes = figures["deciles"], figures["classes"]
        worst_tenth = max(range(10), key=lambda number: _mean(deciles[number], -math.inf))
        worst_class = max(classes, key=lambda kind: _mean(classes[kind], -math.inf))
        total = _mean([sum(pair[0] for pair in deciles), sum(pair[1] for pair in deciles)])
        prompt, often = figures["prompts"][0], recurring(files, name)
        again = f"{often[0][0]} ({often[0][1]} x)" if often else ""
        where = f"{10 * worst_tenth}-{10 * worst_tenth + 10} % ({_mean(deciles[worst_tenth]):.4f})"
        rows.append([name, f"{total:.4f}", where, f"{worst_class} ({_mean(classes[worst_class]):.4f})", f"{prompt['row']} ({prompt['kl']:.4f})", again])
    header = ["domain", "KL (nats per token)", "worst tenth of the answer", "worst class of token", "worst prompt", "most often among the worst"]
    print_table(f"step {record['step']} of {run_dir}; kept steps: {_steps(files)}", header, rows)
    print_line(f"closer: opd inspect {run_dir} domain={next(iter(record['domains']))} step={record['step']}")


def _print_domain(cfg: InspectConfig, record: dict[str, Any], files: dict[int, Path]) -> None:
    name = cfg.domain_name
    print_line(f"{name} at step {record['step']} of {cfg.run_dir}; kept steps: {_steps(files)}\n")
    for rollout in record["domains"][name]:
        _print_rollout(rollout, cfg.tokens)
    figures = record.get("figures", {}).get(name)
    if figures is not None:
        columns = ["nats per token", "tokens", "share of the KL"]
        tenths = {f"{10 * number}-{10 * number + 10} %": pair for number, pair in enumerate(figures["deciles"])}
        print_table("KL by tenth of the answer, all rollouts of the step", ["part", *columns], _shares(tenths))
        classes = dict(sorted(figures["classes"].items(), key=lambda item: -item[1][0]))
        print_table("KL by class of token, all rollouts of the step", ["class", *columns], _shares(classes))
    often = recurring(files, name)
    rows = [
        [row, f"{count} of {len(files)}", f"{mean:.4f}", ", ".join(map(str, steps)), visible(text)[-SHOWN_LETTERS:]]
        for row, count, mean, steps, text in often[: cfg.tokens]
    ]
    if rows:
        print_table("prompts that recur among the worst", ["row", "kept steps", "nats per token", "steps", "the end of the prompt"], rows)
    else:
        print_line("no prompt is among the worst at two kept steps")


def _print_rollout(rollout: dict[str, Any], most: int) -> None:
    inside = [kl for kl in rollout["kl"] if kl is not None]
    grade = "not graded" if rollout["grade"] is None else f"grade {rollout['grade']:g}"
    end = "" if rollout["finished"] else ", cut at its longest"
    print_line(f"{rollout['place']}: {sum(inside) / len(inside):.4f} nats per token, {len(inside)} tokens, {grade}{end}, row {rollout['row']}")
    print_line(f"  prompt      {visible(rollout['prompt'])}")
    print_tokens("  completion  ", rollout["pieces"], rollout["kl"])
    if "at_worst" not in rollout:
        print_line(f"  {NO_TOKENS}\n")
        return
    rows = []
    for worst in rollout["at_worst"][:most]:
        place = worst["position"]
        rows.append([str(place), visible(rollout["pieces"][place]), f"{rollout['kl'][place]:.4f}", _likeliest(worst["student"]), _likeliest(worst["teacher"])])
    print_table("", ["token", "sampled", "KL", "student would say", "teacher would say"], rows)


def _likeliest(tokens: list[dict[str, Any]]) -> str:
    return "  ".join(f"{visible(token['text'])} {math.exp(token['logprob']):.3f}" for token in tokens)


def _shares(pairs: dict[str, list]) -> list[list[str]]:
    """Rows of a table: name, mean, number of tokens, part of the sum."""
    total = sum(nats for nats, _ in pairs.values())
    return [[name, f"{_mean(pair):.4f}" if pair[1] else "", str(pair[1]), f"{pair[0] / total:.0%}" if total else ""] for name, pair in pairs.items()]


def _mean(pair: list, nothing: float = 0.0) -> float:
    return pair[0] / pair[1] if pair[1] else nothing


def _steps(files: dict[int, Path]) -> str:
    steps = list(files)
    return ", ".join(map(str, steps)) if len(steps) <= SHOWN_STEPS else f"{steps[0]}, {steps[1]}, ... {steps[-1]} ({len(steps)})"
