"""What a model card can say of a model: read from the run that made it, and never guessed; what is not known is None.

The run is the folder that the model lies in (RUN/student, RUN/students/step-SSSSSS, or an export's source). Paths of this machine stay here: a local folder is
named by its last parts, since the rest says nothing to who gets the model.
"""

import json
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import metadata_load, try_to_load_from_cache

from opd.run_facts import read_starts, without_passwords
from rollout.files import read_json

LICENCES = ("LICENSE", "LICENSE.txt", "LICENSE.md", "LICENCE")


@dataclass(frozen=True, slots=True, kw_only=True)
class CardFacts:
    """What is known of a model's making.

    run: its folder; None where the model lies in none. command: distill, specialize, merge. config: RUN/config.yaml. step: of the weights, of `steps`.
    starts: RUN/starts.jsonl. spans: of RUN/teachers.json. first, last: records of metrics.jsonl at step 0 and at the model's step. tokens: completion tokens
    trained on.
    """

    run: Path | None = None
    command: str | None = None
    config: dict[str, Any] = field(default_factory=dict)
    step: int | None = None
    steps: int | None = None
    starts: list[dict[str, Any]] = field(default_factory=list)
    spans: list[dict[str, Any]] = field(default_factory=list)
    records: list[dict[str, Any]] = field(default_factory=list)
    lineage: dict[str, Any] | None = None

    @property
    def tokens(self) -> int:
        """Completion tokens of the steps that the weights have seen."""
        return int(sum(record.get("step/completion_tokens", 0) for record in self.records))


def read_facts(model: str) -> CardFacts:
    """The facts of a model's folder, or of what an export was made of."""
    folder = Path(model)
    run, step = _run_of(folder)
    if run is None:
        return CardFacts()
    mark = (run / "config.yaml").read_text().partition("\n")[0].removeprefix("# written by opd ")
    if mark == "export" and (run / "export.json").is_file():
        return read_facts(read_json(run / "export.json")["source"])
    config = yaml.safe_load((run / "config.yaml").read_text())
    records = _records(run)
    newest = records[-1]["step"] if records else None
    kept = [record for record in records if step is None or record["step"] <= step]
    teachers = read_json(run / "teachers.json") if (run / "teachers.json").is_file() else {"spans": []}
    return CardFacts(
        run=run,
        command=mark,
        config=config,
        step=newest if step is None else step,
        steps=config.get("num_steps", 0) + config.get("grpo", {}).get("num_steps", 0) or None,
        starts=read_starts(run),
        spans=[span for span in teachers["spans"] if step is None or span["from_step"] <= step],
        records=kept,
        lineage=read_json(run / "lineage.json") if (run / "lineage.json").is_file() else None,
    )


def licence_of(model: str | None, revision: str | None = None) -> str | None:
    """What a model's own card, or the licence file beside it, says; None where it says nothing, or is not here."""
    if model is None:
        return None
    folder = Path(model)
    card = try_to_load_from_cache(model, "README.md", revision=revision) if is_hub_id(model) else folder / "README.md"
    if isinstance(card, str | Path) and Path(card).is_file():
        stated = (metadata_load(card) or {}).get("license")
        if stated:
            return str(stated)
    return next((f"see its {name}" for name in LICENCES if folder.is_dir() and (folder / name).is_file()), None)


def is_hub_id(model: str | None) -> bool:
    """Whether a model is named as the hub names it, and is no folder here."""
    return model is not None and re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", model) is not None and not Path(model).exists()


def shown_name(model: str | None) -> str:
    """A model or data set as it may stand in a card: a hub id as it is, a local path by its last two parts."""
    if model is None:
        return "not known"
    text = without_passwords(model)
    path = Path(text)
    if not path.is_absolute() and not path.exists():
        return text
    parts = [part for part in path.parts if part not in ("/", "..", ".")]
    return "/".join(parts[-2:]) + " (local)"


def _run_of(folder: Path) -> tuple[Path | None, int | None]:
    """The run that a model's folder belongs to, and the step where it is a checkpoint's."""
    if folder.parent.name == "students" and (folder.parents[1] / "config.yaml").is_file():
        return folder.parents[1], int(folder.name.removeprefix("step-"))
    return (folder.parent, None) if folder.name == "student" and (folder.parent / "config.yaml").is_file() else (None, None)


def _records(run: Path) -> list[dict[str, Any]]:
    file = run / "metrics.jsonl"
    return [json.loads(line) for line in file.read_text().splitlines() if line.endswith("}")] if file.is_file() else []
