"""Which checkpoint of a run is chosen: the best of those within the bounds of the acceptance rule (`accept` of `opd evaluate RUN`).

    RUN/evaluations/choice.json    schema version 1
    {"schema": 1, "rule": settings of `accept`, "chosen": {"step", "manifest": sha256 of its manifest.json | null} | null,
     "asked_to_end": whether the run has been asked to end, "checkpoints": [{"step", "against": [sentence, ...], "is_there": bool}]}
    RUN/evaluations/end.json       {"schema": 1, "step"}: the run is asked to end, since this step's checkpoint is accepted; the run deletes it

`opd evaluate` alone writes them. The run reads who is chosen when it deletes older checkpoints (opd/checkpoint_files.py), and looks for end.json after each
step (opd/stopping.py). RUN@chosen stands wherever RUN@STEP may.
"""

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from opd.evaluate_config import AcceptConfig, Prefer
from rollout.files import read_json, replace_text

SCHEMA = 1
FOLDER = "evaluations"
"""Of a run's folder."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """What the rule says of a checkpoint. against: why it is not accepted, in words; none: it is. is_there: whether it has not been deleted."""

    step: int
    record: dict[str, Any]
    against: list[str]
    is_there: bool


def judge(rule: AcceptConfig, step: int, record: dict[str, Any], retention: Iterable[str], is_there: bool) -> Verdict:
    """Hold the record of a checkpoint (opd/comparison.py) against the rule."""
    against = []
    for name, domain in record["domains"].items():
        recovery = domain["recovery"]
        if recovery is None and (rule.minimum_recovery is not None or rule.prefer is Prefer.lowest_recovery):
            against.append(f"recovery of {name} is undefined, since its teacher may be right on none")
        elif isinstance(recovery, dict) and rule.minimum_recovery is not None:
            found = recovery["low" if rule.confident else "value"]
            if found < rule.minimum_recovery:
                against.append(f"recovery of {name} {_bound(rule, 'least')}{found:.3f} < {rule.minimum_recovery:g}")
    for name in retention if rule.maximum_retention_drop is not None else ():
        difference = record["domains"][name]["difference"]
        if difference is None:
            against.append(f"{name} is not graded, so that nobody knows what of it is retained")
        elif -difference["low" if rule.confident else "value"] > rule.maximum_retention_drop:
            drop = -difference["low" if rule.confident else "value"]
            against.append(f"drop of {name} {_bound(rule, 'most')}{drop:.3f} > {rule.maximum_retention_drop:g}")
    if rule.prefer is Prefer.lowest_recovery and not any(isinstance(domain["recovery"], dict) for domain in record["domains"].values()) and not against:
        against.append("no graded domain has a teacher, so that accept.prefer=lowest_recovery ranks nothing: set accept.prefer=accuracy")
    return Verdict(step=step, record=record, against=against, is_there=is_there)


def choose(rule: AcceptConfig, verdicts: list[Verdict], retention: Iterable[str]) -> Verdict | None:
    """The best of the accepted checkpoints that are there; of equals, the earlier. None where there is none."""
    accepted = sorted((verdict for verdict in verdicts if not verdict.against and verdict.is_there), key=lambda verdict: verdict.step)
    if rule.prefer is Prefer.newest:
        return accepted[-1] if accepted else None
    worth = {
        Prefer.earliest: lambda verdict: -verdict.step,
        Prefer.lowest_recovery: lambda verdict: verdict.record["min_recovery"],
        Prefer.accuracy: lambda verdict: accuracy_of(verdict.record, retention) or 0.0,
    }
    return max(accepted, key=worth[rule.prefer], default=None)


def accuracy_of(record: dict[str, Any], retention: Iterable[str]) -> float | None:
    """The student's accuracy over all held-out prompts of the graded domains that are distilled; None where there are none."""
    found = [domain["student"] for name, domain in record["domains"].items() if name not in retention and domain["student"]["accuracy"] is not None]
    prompts = sum(domain["prompts"] for domain in found)
    return sum(domain["accuracy"] * domain["prompts"] for domain in found) / prompts if prompts else None


def write_choice(run: Path, rule: AcceptConfig, verdicts: list[Verdict], chosen: dict[str, Any] | None, asked_to_end: bool) -> None:
    """Write RUN/evaluations/choice.json. chosen: as there."""
    checkpoints = [{"step": verdict.step, "against": verdict.against, "is_there": verdict.is_there} for verdict in verdicts]
    record = {"schema": SCHEMA, "rule": asdict(rule) | {"prefer": rule.prefer.value}, "chosen": chosen, "asked_to_end": asked_to_end}
    replace_text(run / FOLDER / "choice.json", json.dumps(record | {"checkpoints": checkpoints}, indent=2) + "\n")


def read_choice(run: Path) -> dict[str, Any] | None:
    """The choice that stands; None where none was made. Raises ValueError for a file of another version."""
    path = run / FOLDER / "choice.json"
    if not path.is_file():
        return None
    record = read_json(path)
    if record.get("schema") != SCHEMA:
        raise ValueError(f"{path} has schema {record.get('schema')}; this version reads schema {SCHEMA}")
    return record


def chosen_step(run: Path) -> int:
    """The step of RUN@chosen. Raises ValueError where no checkpoint is chosen."""
    choice = read_choice(run)
    if choice is None:
        raise ValueError(f"{run}@chosen: no checkpoint was chosen yet: opd evaluate {run} checkpoints=all does")
    if choice["chosen"] is None:
        raise ValueError(f"{run}@chosen: no checkpoint met the rule: opd evaluate {run} checkpoints=all says why")
    return choice["chosen"]["step"]


def ask_to_end(run: Path, step: int) -> None:
    """Have a run end after the step under way."""
    replace_text(run / FOLDER / "end.json", json.dumps({"schema": SCHEMA, "step": step}))


def take_end_request(run: Path) -> int | None:
    """The accepted step for whose sake a run is asked to end, once; None where it is not asked."""
    path = run / FOLDER / "end.json"
    if not path.is_file():
        return None
    step = read_json(path)["step"]
    path.unlink()
    return step


def _bound(rule: AcceptConfig, end: str) -> str:
    return f"at {end} " if rule.confident else ""
