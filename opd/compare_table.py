"""The tables of a comparison, from the summaries of its finished arms (opd/compare_summary.py).

An arm with several seeds shows each of them: a mean of three with its spread would say more than three runs can tell. Recovery is accuracy over the teacher's
on a domain; "lowest" is that of the domain that recovers least, and "mean" over the domains, of one run each. "all" is the accuracy over all held-out prompts,
the mean of the seeds, with the 95 % interval of one run: seeds answer the same prompts, which three times over are no more prompts. The difference is
from the first row's, with the interval of two independent runs; where it holds 0, neither can be said to win.
"""

import math
from collections.abc import Collection
from pathlib import Path
from typing import Any

from opd.compare_config import ArmRole, CompareConfig
from opd.compare_summary import Summaries
from opd.console import print_table
from opd.intervals import Interval, Z, proportion

FLOOR_SHARE = 0.9
"""A certificate that guarantees less than this much of the teacher's accuracy says little."""


ELICITED = 0.9
"""A control that recovers this much of a domain shows that the base had its skill."""


def print_tables(cfg: CompareConfig, summaries: Summaries, results: Path, others: Collection[str]) -> None:
    """Both tables, and what is not finished; a table of what is there also stands in RESULTS/table.md. others: arms that are outdated (opd/compare.py)."""
    names = [name for name in cfg.arms if (name, 0) in summaries]
    missing = [f"{name}-{seed}" for name, arm in cfg.arms.items() for seed in range(arm.seeds) if (name, seed) not in summaries]
    if names:
        header, rows = overview(summaries, names, others)
        marks = "* one seed alone; † made of another base or other teachers; ‡ made with other settings than the arm has now"
        caption = f"recovery and floors of each seed; student tokens of the first, seconds of the fastest; {marks}"
        print_table("", header, rows, caption)
        of_domains, domain_rows = domain_table(summaries, names)
        print_table("", of_domains, domain_rows, "recovery of each domain, the lowest of an arm's seeds")
        (results / "table.md").write_text(markdown(header, rows) + "\n" + markdown(of_domains, domain_rows))
        for line in elicited(summaries, [name for name in names if cfg.arms[name].role is ArmRole.control]):
            print(line)
    if missing:
        print(f"not finished: {', '.join(missing)}")
    if names:
        print(f"summaries in {results}")


def overview(summaries: Summaries, names: list[str], others: Collection[str] = ()) -> tuple[list[str], list[list[str]]]:
    """(header, a row for each arm). others: arms whose settings are not those of their summaries."""
    header = ["arm", "role", "lowest recovery", "mean recovery", "accuracy on all", "less the first's", f"floors >= {FLOOR_SHARE}", "student tokens", "seconds"]
    first = _all_prompts(_seeds(summaries, names[0]))
    models = summaries[names[0], 0]["models"]
    rows = []
    for name in names:
        runs = _seeds(summaries, name)
        own = _all_prompts(runs)
        mark = ("" if len(runs) > 1 else "*") + ("" if all(run["models"] == models for run in runs) else "†") + ("‡" if name in others else "")
        lowest = " ".join(_lowest(run) for run in runs)
        mean = " ".join(f"{_mean_recovery(run):.3f}" for run in runs)
        floors = " ".join(str(num_floors(run["evaluation"])) for run in runs)
        seconds = min(run["budget"]["seconds"] for run in runs)
        difference = "" if name == names[0] else _cell(_difference(own, first), "+")
        tokens = f"{runs[0]['budget']['student_tokens']:,}"
        rows.append([runs[0]["label"] + mark, runs[0]["role"], lowest, mean, _cell(own[0]), difference, floors, tokens, f"{seconds:.0f}"])
    return header, rows


def domain_table(summaries: Summaries, names: list[str]) -> tuple[list[str], list[list[str]]]:
    """(header with the domains, a row for the accuracy of base, teachers and for each arm): an arm has its lowest recovery over its seeds; a domain with a
    perturbation also has a column of the accuracies under it, each arm's of every seed.
    """
    domains = summaries[names[0], 0]["evaluation"]["domains"]
    columns = [["arm", "base, its accuracy", "teachers, their accuracy", *(summaries[name, 0]["label"] for name in names)]]
    for domain, record in domains.items():
        if record["teacher"]["accuracy"] is None:
            continue  # without a grader
        recoveries = [_least([recovery_of(run["evaluation"]["domains"][domain]) for run in _seeds(summaries, name)]) for name in names]
        base = "" if "base" not in record else f"{record['base']['accuracy']:.3f}"
        columns.append([domain, base, f"{record['teacher']['accuracy']:.3f}", *(f"{recovery:.3f}" for recovery in recoveries)])
        if "perturbed" in record:
            found = {role: f"{record['perturbed'][role]['accuracy']:.3f}" for role in ("base", "teacher") if role in record["perturbed"]}
            arms = [[run["evaluation"]["domains"][domain]["perturbed"]["student"]["accuracy"] for run in _seeds(summaries, name)] for name in names]
            cells = [" ".join(f"{accuracy:.3f}" for accuracy in own) for own in arms]
            columns.append([f"{domain}, accuracy perturbed", found.get("base", ""), found["teacher"], *cells])
    header, *rows = (list(row) for row in zip(*columns, strict=True))
    return header, rows


def elicited(summaries: Summaries, controls: list[str]) -> list[str]:
    """A sentence for each control: the domains that it recovers without their teacher's opinion, where what the arms above it show is no proof of
    distillation, or that there is none.
    """
    lines = []
    for name in controls:
        label = f"{summaries[name, 0]['label']}, a control,"
        recoveries = recoveries_of(summaries[name, 0])
        found = [f"{domain} {recovery:.3f}" for domain, recovery in recoveries.items() if recovery >= ELICITED]
        if found:
            lines.append(f"{label} recovers {', '.join(found)}: these domains were elicited there, and need no distillation")
        else:
            most = max(recoveries, key=lambda domain: recoveries[domain])
            lines.append(f"{label} recovers no domain to {ELICITED} (at most {recoveries[most]:.3f}, {most}): none is merely elicited by it")
    return lines


def recovery_of(domain: dict[str, Any]) -> float:
    """Of a domain's record; NaN where it is not defined."""
    return domain["recovery"]["value"] if isinstance(domain["recovery"], dict) else math.nan


def recoveries_of(run: dict[str, Any]) -> dict[str, float]:
    """Of a summary's graded domains with a teacher, by name."""
    return {name: recovery_of(domain) for name, domain in run["evaluation"]["domains"].items() if not isinstance(domain["recovery"], str)}


def num_floors(evaluation: dict[str, Any]) -> int:
    """Domains whose certificate guarantees FLOOR_SHARE of the teacher's accuracy, at the worse ends of the intervals of both."""
    shares = [domain["certificate"]["share"] for domain in evaluation["domains"].values() if domain["certificate"] is not None]
    return sum(share is not None and share >= FLOOR_SHARE for share in shares)


def markdown(header: list[str], rows: list[list[str]]) -> str:
    """A table for a README."""
    lines = [header, ["---"] * len(header), *rows]
    return "".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |\n" for line in lines)


def _seeds(summaries: Summaries, name: str) -> list[dict[str, Any]]:
    return [summary for (arm, _), summary in sorted(summaries.items()) if arm == name]


def _lowest(run: dict[str, Any]) -> str:
    recoveries = recoveries_of(run)
    least = _least([*recoveries.values()])
    return f"{least:.3f}" if math.isnan(least) else f"{least:.3f} ({next(name for name, value in recoveries.items() if value == least)})"


def _least(values: list[float]) -> float:
    """The smallest, NaN where one is not known."""
    return math.nan if any(math.isnan(value) for value in values) else min(values)


def _mean_recovery(run: dict[str, Any]) -> float:
    recoveries = recoveries_of(run).values()
    return sum(recoveries) / len(recoveries)


def _all_prompts(runs: list[dict[str, Any]]) -> tuple[Interval, int]:
    """(mean over the runs of the accuracy over all graded prompts, with the interval of one run; the number of one run's prompts)."""
    graded = [[domain["student"] for domain in run["evaluation"]["domains"].values() if domain["student"]["accuracy"] is not None] for run in runs]
    prompts = sum(student["prompts"] for student in graded[0])
    right = sum(student["accuracy"] * student["prompts"] for students in graded for student in students) / len(runs)
    return proportion(right, prompts), prompts


def _difference(own: tuple[Interval, int], other: tuple[Interval, int]) -> Interval:
    """Of two accuracies, as if their prompts were independent: wider than a paired interval would be, and without the spread of an arm's seeds."""
    variance = sum(found.value * (1 - found.value) / prompts for found, prompts in (own, other))
    value, half = own[0].value - other[0].value, Z * math.sqrt(variance)
    return Interval(value, value - half, value + half)


def _cell(interval: Interval, sign: str = "") -> str:
    return f"{interval.value:{sign}.3f} [{interval.low:{sign}.3f}, {interval.high:{sign}.3f}]"
