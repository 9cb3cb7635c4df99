"""TeacherManifest: which teachers scored which steps of a run, and what a resume may change about that.

RUN/teachers.json, and "teachers" in the opd.json of each checkpoint (schema version 1): {"schema": 1, "spans": [SPAN, ...]}. SPAN is
    {"from_step": S,            the first step, as metrics.jsonl counts them (1, 2, ...), that these teachers scored; it ends where the next one begins,
                                and holds no step where that begins at the same
     "domains": {D: {"teacher": IDENTITY, "settings": all other settings of the domain, as in config.yaml}, ...},     in the order of the run;
                                "grader" is its identity: `grader_identity` of rollout/grading.py; "perturbation" where there is one
     "check": JSON or null,     verdict of the start-up check on this span's teachers; later spans have none, since it judges the initial student
     "dropped": {D: {"step": K, "reason": text}, ...}}      domains whose teacher failed: step K and those after it went on without them
IDENTITY of a teacher loaded here: its settings (teachers/config.py; what is null is left out), "hash" (of its weights, teachers/fingerprint.py),
"config_hash" (sha256 of the config.json of a local folder), and of an adapter "adapter_hash" and "adapter_config_hash". Of a teacher behind a server: its
address and what the server says of itself, with "fingerprint", log-probabilities of a fixed probe. Where these are near enough the address may change.

The checkpoint's manifest is the truth and the file of the run folder a copy for people: steps after the checkpoint are done again, and whose
they were is forgotten with them. A run is held to its last span. What differs (a teacher's path, revision, settings or content; a domain added or gone, their
order, its prompts, share, weight or grader) refuses the resume, unless teachers.allow_change=true: then a new span begins. Left on, it changes
nothing where nothing differs. A domain dropped by failure stays dropped at a resume, as in a run that was never interrupted; with
allow_change its teacher is tried again.

A checkpoint without a manifest was written before there was one: its history begins with the resume, and the steps before are in no span.
"""

import hashlib
import json
import logging
from dataclasses import asdict
from enum import Enum
from pathlib import Path
from typing import Any

from rollout.config import ModelConfig
from rollout.files import replace_text
from rollout.grading import grader_identity
from teachers.config import DomainConfig, TeacherConfig, TeachersConfig
from teachers.fingerprint import weights_fingerprint

SCHEMA = 1
FILE = "teachers.json"

NAMED = 3
"""Domains that a refusal names at most."""


class TeacherManifest:
    """The spans of a run. `take_up` begins or continues it; until then it is empty."""

    def __init__(self, probe_tolerance: float = TeachersConfig().probe_tolerance):
        """probe_tolerance: of teachers behind servers (teachers/config.py)."""
        self.probe_tolerance = probe_tolerance
        self.spans: list[dict[str, Any]] = []
        self.verdict: dict[str, Any] | None = None

    def take_up(self, record: dict[str, Any] | None, step: int, domains: dict[str, dict[str, Any]], allow_change: bool) -> None:
        """Continue after `step` updates with the domains described (`describe_domains`).

        record: the manifest of the checkpoint; None where there is no checkpoint, or where it has none.
        Raises ValueError where domains or teachers differ from the last span's and that is not allowed.
        """
        if record is not None and record.get("schema") != SCHEMA:
            raise ValueError(f"the checkpoint's teacher manifest has schema {record.get('schema')}; this version reads schema {SCHEMA}")
        if record is None:
            self.spans = [_span(step, domains) | {"check": self.verdict}]
            if step:
                _log().info("the checkpoint of step %d does not say which teachers scored it: the record of teachers begins with step %d", step, step + 1)
            return
        last = record["spans"][-1]
        found = changes(last["domains"], domains, self.probe_tolerance)
        if found and not allow_change:
            words = "; ".join(list(found.values())[:NAMED]) + (f"; and {len(found) - NAMED} more" if len(found) > NAMED else "")
            raise ValueError(f"teachers or domains are not those of this run's step {step} ({words}): restore them, or go on with teachers.allow_change=true")
        if allow_change:
            dropped = {name: drop for name, drop in last["dropped"].items() if name not in found}
            found |= {name: f"{name} is tried again, dropped at step {drop['step']} ({drop['reason']})" for name, drop in dropped.items()}
        self.spans = record["spans"] + ([_span(step, domains)] if found else [])
        for words in found.values():
            _log().info("from step %d on: %s", step + 1, words)

    @property
    def dropped(self) -> dict[str, dict[str, Any]]:
        """The domains that the run goes on without, as in the format."""
        return self.spans[-1]["dropped"] if self.spans else {}

    def record_check(self, verdict: dict[str, Any]) -> None:
        """Keep the verdict of the start-up check, for the span that then begins."""
        self.verdict = verdict

    def record_failure(self, domain: str, step: int, reason: str) -> None:
        """Keep that the run goes on without a domain, from a step (1, 2, ...) on; outside of a run there is nothing to keep it in."""
        if self.spans:
            self.spans[-1]["dropped"][domain] = {"step": step, "reason": reason}

    def record(self) -> dict[str, Any]:
        """JSON values, as in the format."""
        return {"schema": SCHEMA, "spans": self.spans}

    def history(self) -> list[dict[str, Any]]:
        """The spans with the teachers' identities alone: nothing of the settings, and so no text of a system prompt."""
        return [{"from_step": span["from_step"], "teachers": {name: domain["teacher"] for name, domain in span["domains"].items()}} for span in self.spans]

    def write(self, run_dir: Path) -> None:
        """Write RUN/teachers.json."""
        replace_text(run_dir / FILE, json.dumps(self.record(), indent=1) + "\n")


def describe_domains(domains: dict[str, DomainConfig], identities: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """The "domains" of a span: each domain's teacher and its other settings."""
    described = {}
    for name, domain in domains.items():
        settings = _plain(domain)
        del settings["teacher"]
        if not domain.perturbation.rate:
            del settings["perturbation"]
        described[name] = {"teacher": identities[name], "settings": settings | {"grader": grader_identity(domain.grader)}}
    return described


def teacher_identity(cfg: TeacherConfig, role: str) -> dict[str, Any]:
    """The identity of a teacher that is loaded here; `role` names it in errors. Reads a small part of its files (teachers/fingerprint.py).

    Raises ValueError where a file is cut off or not there.
    """
    identity = {name: value for name, value in _plain(cfg).items() if value is not None}
    identity |= {"hash": weights_fingerprint(cfg, role), "config_hash": _file_hash(cfg.model, "config.json")}
    if cfg.adapter is not None:
        adapter = ModelConfig(model=cfg.adapter, revision=cfg.adapter_revision)
        adapter_hash = weights_fingerprint(adapter, f"adapter of the {role}")
        identity |= {"adapter_hash": adapter_hash, "adapter_config_hash": _file_hash(cfg.adapter, "adapter_config.json")}
    return {name: value for name, value in identity.items() if value is not None}


def changes(old: dict[str, dict[str, Any]], new: dict[str, dict[str, Any]], probe_tolerance: float) -> dict[str, str]:
    """Domain -> what differs, in words, between the "domains" of two spans; domains that are the same are not in it."""
    found = {name: f"{name} is gone (its teacher was {_title(domain)})" for name, domain in old.items() if name not in new}
    found |= {name: f"{name} is new (its teacher is {_title(domain)})" for name, domain in new.items() if name not in old}
    for name in new:
        differences = _differences(_comparable(old[name], new[name], probe_tolerance), new[name]) if name in old else []
        if differences:
            found[name] = f"{name}: {', '.join(differences)}"
    if not found and list(old) != list(new):
        found[next(iter(new))] = f"the order of the domains was {', '.join(old)} and is {', '.join(new)}"
    return found


def _span(step: int, domains: dict[str, dict[str, Any]]) -> dict[str, Any]:
    return {"from_step": step + 1, "domains": domains, "check": None, "dropped": {}}


def _comparable(old: dict[str, Any], new: dict[str, Any], probe_tolerance: float) -> dict[str, Any]:
    """The old description, with the new address and fingerprint where both are those of a server that holds the same model."""
    left, right = old["teacher"].get("fingerprint"), new["teacher"].get("fingerprint")
    if left is None or right is None or len(left) != len(right):
        return old
    distance = sum(abs(a - b) for a, b in zip(left, right, strict=True)) / max(1, len(left))
    if not distance <= probe_tolerance:
        return old
    return old | {"teacher": old["teacher"] | {"server": new["teacher"].get("server"), "fingerprint": right}}


def _differences(old: dict[str, Any], new: dict[str, Any], path: str = "") -> list[str]:
    """Each setting that differs, in words; of settings, only the last part of the path."""
    found = []
    for key in dict.fromkeys([*old, *new]):
        before, after = old.get(key), new.get(key)
        if isinstance(before, dict) and isinstance(after, dict):
            found += _differences(before, after, "" if key == "settings" else f"{path}{key}.")
        elif before != after:
            found.append(f"{path}{key} was {_short(key, before)} and is {_short(key, after)}")
    return found


def _title(domain: dict[str, Any]) -> str:
    """A teacher in a message: its adapter, model or address."""
    return next((domain["teacher"][name] for name in ("adapter", "model", "server") if name in domain["teacher"]), "unknown")


def _short(key: str, value: Any) -> str:
    """A value in a message: of hashes the first twelve digits, of a fingerprint the first number."""
    if key == "fingerprint" and value:
        return f"[{value[0]:.4g}, ...]"
    return value[:12] if key.endswith("hash") and value else json.dumps(value)


def _plain(cfg: Any) -> dict[str, Any]:
    """The settings of a dataclass as JSON values; the steps of a schedule become text, as JSON has them."""
    return json.loads(json.dumps(asdict(cfg), default=lambda value: value.value if isinstance(value, Enum) else str(value)))


def _file_hash(folder: str, name: str) -> str | None:
    """sha256 of a file; None on the hub, where the weights' hash holds the commit of all files."""
    path = Path(folder) / name
    return hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else None


def _log() -> logging.Logger:
    return logging.getLogger(__name__)
