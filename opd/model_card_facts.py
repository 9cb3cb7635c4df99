"""What a model card can say of a model: read from the run that made it, and never guessed; what is not known is None.

The run is the folder that the model lies in (RUN/student, RUN/students/step-SSSSSS, or an export's source). Paths of this machine stay here: a local folder is
named by its last parts, since the rest says nothing to who gets the model.
"""

import functools
import logging
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import HfApi, metadata_load, try_to_load_from_cache

from opd.checkpoint_record import shown_records
from opd.run_facts import read_starts, without_passwords
from opd.run_folder import command_of, read_records
from opd.runs import describe
from rollout.files import read_json

LICENCES = ("LICENSE", "LICENSE.txt", "LICENSE.md", "LICENCE")
LOCAL_PATH = re.compile(r"(?:(?<=[\s'\"=,\[])|^)(?:~|/[\w.@+-]+)(?:/[\w.@+-]+)+")
HOMES = re.compile(r"^(?:/(?:home|Users)/[^/]+|/root|~)(?=/|$)")

LOG = logging.getLogger(__name__)
HUB_SECONDS = 10.0


@dataclass(frozen=True, slots=True, kw_only=True)
class CardFacts:
    """What is known of a model's making.

    run: its folder; None where the model lies in none. command: distill, specialize, merge. config: RUN/config.yaml. step: of the weights, of `steps`; None
        where it is not known, which is so of the RUN/student of a run that has gone on since.
    starts: RUN/starts.jsonl. spans: of RUN/teachers.json. records: of metrics.jsonl. All three up to the model's step. lineage: RUN/lineage.json. merged:
    RUN/merge.json.
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
    merged: dict[str, Any] | None = None

    @property
    def base(self) -> dict[str, Any]:
        """Settings of the model that it was made from; without a "model" where it was new."""
        return self.config.get("base" if self.command == "merge" else "student", {})

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
    command = command_of(run)
    if command == "export" and (run / "export.json").is_file():
        return read_facts(read_json(run / "export.json")["source"])
    config = yaml.safe_load((run / "config.yaml").read_text())
    records = read_records(run)
    is_end = step is None and bool(records) and describe(run).state == "done"  # of a run that was taken up again, RUN/student is of an earlier end
    reached = records[-1]["step"] if is_end else step
    teachers = read_json(run / "teachers.json") if (run / "teachers.json").is_file() else {"spans": []}
    return CardFacts(
        run=run,
        command=command,
        config=config,
        step=reached,
        steps=config.get("num_steps", 0) + config.get("grpo", {}).get("num_steps", 0) or None,
        starts=[start for start in read_starts(run) if step is None or start["step"] < max(step, 1)],
        spans=[span for span in teachers["spans"] if step is None or span["from_step"] <= step],
        records=[record for record in records if reached is not None and record["step"] <= reached],
        lineage=read_json(run / "lineage.json") if (run / "lineage.json").is_file() else None,
        merged=read_json(run / "merge.json") if (run / "merge.json").is_file() else None,
    )


def checkpoint_results(model: str) -> dict[str, Any] | None:
    """What `opd evaluate RUN` found of a model's weights, those of a run's checkpoint or of its end (opd/comparison.py); None where it was not asked."""
    facts = read_facts(model)
    if facts.run is None or facts.step is None:
        return None
    record, made = shown_records(facts.run).get(facts.step), Path(model) / "checkpoint.json"
    is_same = record is not None and (not made.is_file() or read_json(made)["manifest"] == record["manifest"])
    return record["evaluation"] if is_same else None


def scored_by(facts: CardFacts) -> list[tuple[str, dict[str, Any], str]]:
    """(domain, teacher, steps that it scored), the teachers of a merged model included."""
    if facts.command == "merge":
        return [(name, domain.get("teacher", {}), "-") for name, domain in facts.config.get("domains", {}).items()]
    found = []
    for number, span in enumerate(facts.spans):
        end = facts.spans[number + 1]["from_step"] - 1 if number + 1 < len(facts.spans) else facts.step
        for name, domain in span["domains"].items():
            ends = [each for each in (end, span["dropped"].get(name, {}).get("step", end + 1) - 1 if end is not None else None) if each is not None]
            if not ends or min(ends) >= span["from_step"]:
                found.append((name, domain["teacher"], f"{span['from_step']}-{min(ends)}" if ends else f"from {span['from_step']}"))
    return found


def licences(facts: CardFacts) -> set[str | None]:
    """What the base and the teachers state, each its own; None of one that states nothing."""
    stated = {licence for _, teacher, _ in scored_by(facts) for licence in licences_of(teacher)}
    return stated | ({licence_of(facts.base["model"], facts.base.get("revision"))} if facts.base.get("model") else set())


def licences_of(teacher: dict[str, Any]) -> list[str | None]:
    """Of a teacher's model, and of its adapter."""
    adapter = [licence_of(teacher["adapter"], teacher.get("adapter_revision"))] if teacher.get("adapter") else []
    return [licence_of(teacher.get("model"), teacher.get("revision")), *adapter]


def sources(facts: CardFacts) -> list[tuple[str, str, dict[str, Any]]]:
    """(domain, source, its settings) of all prompts."""
    prompts = {name: domain["prompts"] for name, domain in facts.config.get("domains", {}).items()}
    return [(name, source, cfg) for name, each in prompts.items() for source, cfg in (each.get("sources") or {"prompts": each}).items()]


def licence_of(model: str | None, revision: str | None = None) -> str | None:
    """What a model's own card, here or on the hub, or the licence file beside it, says; None where it says nothing, or cannot be had."""
    if model is None:
        return None
    folder = Path(model)
    card = try_to_load_from_cache(model, "README.md", revision=revision) if is_hub_id(model) else folder / "README.md"
    if isinstance(card, str | Path) and Path(card).is_file():
        stated = _stated_licence(Path(card))
        if stated:
            return stated
    elif is_hub_id(model):
        return _licence_on_hub(model, revision)
    return next((f"see its {name}" for name in LICENCES if folder.is_dir() and (folder / name).is_file()), None)


@functools.cache
def _licence_on_hub(model: str, revision: str | None) -> str | None:
    """Loading a model leaves its card on the hub; None where that states nothing, or nobody answers within HUB_SECONDS."""
    try:
        card = HfApi().model_info(model, revision=revision, timeout=HUB_SECONDS).card_data
    except Exception as error:  # of the network in many ways, and no reason to lose an export
        LOG.warning("the card of %s cannot be had from the hub (%s), so its licence counts as not stated", model, type(error).__name__)
        return None
    return _licence_in({} if card is None else card.to_dict())


def _stated_licence(card: Path) -> str | None:
    """In a card's metadata. One that cannot be read states nothing: it is somebody else's, and no reason to lose an export."""
    try:
        metadata = metadata_load(card) or {}
    except (yaml.YAMLError, ValueError):
        LOG.warning("the metadata of %s cannot be read, so its licence counts as not stated", card)
        return None
    return _licence_in(metadata)


def _licence_in(metadata: dict[str, Any]) -> str | None:
    stated = metadata.get("license")
    names = [str(name) for name in (stated if isinstance(stated, list) else [stated]) if name]
    if names == ["other"] and metadata.get("license_name"):
        return f"other: {metadata['license_name']}"
    return ", ".join(names) or None


def is_hub_id(model: str | None) -> bool:
    """Whether a model is named as the hub names it, and is no folder here."""
    return model is not None and re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", model) is not None and not Path(model).exists()


def shown_name(model: str | None) -> str:
    """A model or data set as it may stand in a card: a hub id as it is, a local path by its last two parts."""
    if model is None:
        return "not known"
    text = without_passwords(model)
    if "://" in text:
        return public_text(text)
    path = Path(text)
    if not path.is_absolute() and not text.startswith("~") and not path.exists():
        return text
    return f"{_last_parts(text)} (local)"


def public_text(text: str) -> str:
    """A setting without passwords, without what follows the ? of an address (where keys stand), and with the ends of local paths alone."""
    text = re.sub(r"(\w+://[^\s?'\"]+)\?[^\s'\"]+", r"\1?***", without_passwords(text))
    return LOCAL_PATH.sub(lambda found: f"{_last_parts(found[0])} (local)", text)


def _last_parts(path: str) -> str:
    """The last two parts of a path, and nobody's home folder."""
    parts = [part for part in Path(HOMES.sub("", path)).parts if part not in ("/", "..", ".")]
    return "/".join(parts[-2:]) or "home"


def _run_of(folder: Path) -> tuple[Path | None, int | None]:
    """The run that a model's folder belongs to, and the step where it is a checkpoint's."""
    if folder.parent.name == "students" and (folder.parents[1] / "config.yaml").is_file():
        return folder.parents[1], int(folder.name.removeprefix("step-"))
    return (folder.parent, None) if folder.name == "student" and (folder.parent / "config.yaml").is_file() else (None, None)
