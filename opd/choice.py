"""Which checkpoint of a run is chosen: the best of those within the bounds of the acceptance rule (`accept` of `opd evaluate RUN`).

    RUN/evaluations/choice.json    schema version 1
    {"schema": 1, "rule": settings of `accept`, "settings": of the records that it is made from (opd/checkpoint_record.py),
     "chosen": {"step", "manifest": sha256 of its manifest.json | null} | null,
     "asked_to_end": `begun` of the start (opd/run_state.py) that was asked to end | null,
     "checkpoints": [{"step", "against": [sentence, ...], "is_there": bool}]}
    RUN/evaluations/end.json       {"schema": 1, "step", "begun"}: that start of the run is asked to end, since this step's checkpoint is accepted; the run
                                   deletes it, and another start does not heed it
    RUN/evaluations/reading.json   {"schema": 1, "step", "manifest"}: the checkpoint that is being evaluated; it counts while the evaluation lives

`opd evaluate` alone writes them. The run reads which checkpoints are to stay when it deletes older ones (opd/checkpoint_files.py), and looks for end.json
after each step (opd/stopping.py). RUN@chosen stands wherever RUN@STEP may.
"""

import json
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from opd.evaluate_config import AcceptConfig, Prefer
from opd.run_lock import gives_signs
from opd.run_state import read_state
from rollout.files import read_json, replace_text

SCHEMA = 1
EVALUATIONS = "evaluations"
"""Of a run's folder."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """What the rule says of a checkpoint.

    record: what was found of it. accuracy: of the student over all held-out prompts of the graded domains that are distilled; None where there are none.
    against: why it is not accepted, in words; none: it is. is_there: whether it has not been deleted.
    """

    step: int
    record: dict[str, Any]
    accuracy: float | None
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
    accuracy = accuracy_of(record, retention)
    if accuracy is None and rule.prefer in (Prefer.lowest_recovery, Prefer.accuracy):
        against.append(f"no domain is graded, so that accept.prefer={rule.prefer.value} ranks nothing: set accept.prefer=newest or earliest")
    return Verdict(step=step, record=record, accuracy=accuracy, against=against, is_there=is_there)


def choose(rule: AcceptConfig, verdicts: list[Verdict]) -> Verdict | None:
    """The best of the accepted checkpoints that are there; of equals, the earlier. None where there is none."""
    accepted = sorted((verdict for verdict in verdicts if not verdict.against and verdict.is_there), key=lambda verdict: verdict.step)
    if rule.prefer is Prefer.newest:
        return accepted[-1] if accepted else None
    worth = {
        Prefer.earliest: lambda verdict: -verdict.step,
        Prefer.lowest_recovery: lambda verdict: verdict.accuracy if verdict.record["min_recovery"] is None else verdict.record["min_recovery"],
        Prefer.accuracy: lambda verdict: verdict.accuracy,
    }
    return max(accepted, key=worth[rule.prefer], default=None)


def accuracy_of(record: dict[str, Any], retention: Iterable[str]) -> float | None:
    """The student's accuracy over all held-out prompts of the graded domains that are distilled; None where there are none."""
    found = [domain["student"] for name, domain in record["domains"].items() if name not in retention and domain["student"]["accuracy"] is not None]
    prompts = sum(domain["prompts"] for domain in found)
    return sum(domain["accuracy"] * domain["prompts"] for domain in found) / prompts if prompts else None


def write_choice(run: Path, rule: AcceptConfig, settings: str, verdicts: list[Verdict], chosen: dict[str, Any] | None, asked_to_end: float | None) -> None:
    """Write RUN/evaluations/choice.json, where it would be another. chosen, asked_to_end: as there."""
    checkpoints = [{"step": verdict.step, "against": verdict.against, "is_there": verdict.is_there} for verdict in verdicts]
    record = {"schema": SCHEMA, "rule": asdict(rule) | {"prefer": rule.prefer.value}, "settings": settings, "chosen": chosen, "asked_to_end": asked_to_end}
    file, text = run / EVALUATIONS / "choice.json", json.dumps(record | {"checkpoints": checkpoints}, indent=2) + "\n"
    if not file.is_file() or file.read_text() != text:
        replace_text(file, text)


def read_choice(run: Path) -> dict[str, Any] | None:
    """The choice that stands; None where none was made. Raises ValueError for a file of another version."""
    path = run / EVALUATIONS / "choice.json"
    if not path.is_file():
        return None
    record = read_json(path)
    if record.get("schema") != SCHEMA:
        raise ValueError(f"{path} has schema {record.get('schema')}; this version reads schema {SCHEMA}")
    return record


def claim(run: Path, step: int, manifest: str | None) -> None:
    """Have a run keep the checkpoint that is being evaluated, and no longer the one before: it may be chosen, once more is known of it."""
    replace_text(run / EVALUATIONS / "reading.json", json.dumps({"schema": SCHEMA, "step": step, "manifest": manifest}))


def release(run: Path) -> None:
    """Have a run keep none but the chosen one."""
    (run / EVALUATIONS / "reading.json").unlink(missing_ok=True)


def kept_checkpoints(run: Path) -> list[dict[str, Any]]:
    """The checkpoints that a run keeps beside its newest, {"step", "manifest"}: the one that is being evaluated, and the chosen one. Raises ValueError where
    one of the files cannot be read.
    """
    claimed, found = run / EVALUATIONS / "reading.json", []
    if gives_signs(run / EVALUATIONS):
        with suppress(FileNotFoundError):
            found.append(json.loads(claimed.read_text()))
    choice = read_choice(run)  # after the other: one that is chosen is claimed until then
    return found + ([choice["chosen"]] if choice is not None and choice["chosen"] is not None else [])


def rule_of(choice: dict[str, Any]) -> AcceptConfig:
    """The rule by which a choice was made."""
    return AcceptConfig(**choice["rule"] | {"prefer": Prefer(choice["rule"]["prefer"])})


def ask_to_end(run: Path, step: int, begun: float) -> None:
    """Have a run's start of that time end after the step under way."""
    replace_text(run / EVALUATIONS / "end.json", json.dumps({"schema": SCHEMA, "step": step, "begun": begun}))


def take_end_request(run: Path) -> int | None:
    """The accepted step for whose sake this start of a run is asked to end, once; None where it is not asked."""
    path = run / EVALUATIONS / "end.json"
    if not path.is_file():
        return None
    asked, state = read_json(path), read_state(run)
    path.unlink()
    return asked["step"] if state is not None and asked.get("begun") == state.begun else None


def _bound(rule: AcceptConfig, end: str) -> str:
    return f"at {end} " if rule.confident else ""
