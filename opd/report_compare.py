"""`opd report RUN RUN ...`: runs beside each other on one page: what differs between them, their curves, and who is better on the same held-out prompts.

Of a pipeline its last stage that distils (else trains) is compared (opd/report_reader.py); among pipelines alone, their own settings too.

Only what differs is listed: settings (dotted paths of config.yaml), code, versions, hardware, initial student, teachers, data, as they were last; what
changed in the midst of a run stands below, with the first step that it held for.

Curves of the figures that at least two of the runs have stand over steps, over the student's tokens and over seconds, both added up over the steps that count;
a run that records no tokens, as a supervised one, has no curves over them, and the page says so.
The table pairs each run with the first, prompt by prompt: an interval of the mean of differences, which is much smaller than the difference of two intervals.
The scores are those that `opd evaluate RUN` found of the chosen checkpoints (else the newest) where it was asked of all these runs, otherwise those of the
newest evaluations while they trained (opd/scores.py). The table is blank, and says why, where two runs have answered other prompts; where they were asked
the same prompts otherwise, it says in what.
"""

import base64
import hashlib
import json
import re
from dataclasses import dataclass
from datetime import datetime
from importlib.metadata import version
from itertools import pairwise, product
from pathlib import Path
from typing import Any

import jinja2
import yaml
from markupsafe import Markup

from opd.checkpoint_record import shown_record
from opd.comparison import paired_difference
from opd.composition import leaves
from opd.config_changes import lasting_changes, read_changes
from opd.intervals import Interval
from opd.report_charts import STEPS, Line, line_chart, style_class
from opd.report_figures import Figure, Section
from opd.report_reader import train_folder_of, without_text
from opd.run_facts import read_starts
from opd.run_folder import read_records
from opd.runs import RunRow, describe
from opd.scores import asked_otherwise, read_scores
from rollout.files import read_json

UNCOUNTED = ("run_dir", "fresh", "logger", "launch")
"""Settings that do not make two runs differ."""
UNKNOWN = "not recorded"
CURVES = {
    r"step/loss": ("Loss of the step", "nats"),
    r"evaluation/(.+)/accuracy": ("Accuracy on held-out prompts", "share right"),
    r"evaluation/(.+)/kl_per_sequence": ("KL to the teacher on held-out prompts", "nats per completion"),
    r"domain/(.+)/kl_per_token": ("KL to the teacher on the rollouts", "nats per token"),
    r"domain/(.+)/student_entropy": ("Entropy of the student", "nats per token"),
    r"domain/(.+)/completion_length": ("Length of completions", "tokens"),
}
OTHERWISE = "asked otherwise"
AXES = {"steps": STEPS, "tokens": "completion tokens of the student, added up", "seconds": "seconds of steps, added up"}
ADDED_UP = {"tokens": "step/completion_tokens", "seconds": "seconds/step"}


@dataclass(frozen=True, slots=True)
class Midway:
    """Something that changed in the course of a run. step: the first that was done with it, as metrics.jsonl counts them."""

    step: int
    what: str
    before: str
    after: str


def render_comparison(folders: list[Path]) -> str:
    """The page. Raises ValueError for a folder that is no run, has nothing to draw, or is named twice."""
    trained = [train_folder_of(folder) for folder in folders]
    if len({folder.resolve() for folder in trained}) < len(folders):
        raise ValueError("a run is named twice: a comparison needs different ones")
    names = _names(folders)
    runs = dict(zip(names, trained, strict=True))
    records = {name: read_records(folder) for name, folder in runs.items()}
    for name, found in records.items():
        if not found:
            raise ValueError(f"{runs[name]} has no records of training (metrics.jsonl), so that there is nothing to draw of it yet: leave it out")
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True
    )
    script = (Path(__file__).parent / "report_page.js").read_text()
    return environment.get_template("report_compare.html").render(
        names=names,
        runs=[_about(name, describe(folder), runs[name]) for name, folder in zip(names, folders, strict=True)],
        midway=[(name, row) for name, folder in runs.items() for row in changed_midway(folder)],
        differences=differences(dict(zip(names, folders, strict=True))),
        pairs=paired_table(runs),
        origin=scores_of(runs)[1],
        sections=[_section(axis, records) for axis in AXES],
        script=Markup(script),
        script_hash=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
        written=datetime.now().astimezone().strftime("%Y-%m-%d %H:%M %Z"),
        version=version("opd"),
    )


def commit_of(folder: Path) -> str:
    """The commit that a run was last started with, as far as it was recorded."""
    starts = read_starts(folder)
    return _commit(starts[-1]) if starts else UNKNOWN


def _commit(start: dict[str, Any]) -> str:
    git = start["git"]
    return UNKNOWN if git is None else git["commit"][:12] + (" with changes" if git["diff"] else "")


def differences(folders: dict[str, Path]) -> list[tuple[str, list[str]]]:
    """(what, its value in each run) of everything that is not the same in all. folders: of runs, or of pipelines, whose own settings are compared too."""
    trained = {name: train_folder_of(folder) for name, folder in folders.items()}
    found = {name: _described(trained[name], folder) for name, folder in folders.items()}
    if all(trained[name] != folder for name, folder in folders.items()):
        for name, folder in folders.items():
            found[name] |= {f"pipeline: {path}": value for path, value in _settings(folder, folder).items()}
    keys = list(dict.fromkeys(key for values in found.values() for key in values))
    rows = [(key, [values.get(key, UNKNOWN if key.startswith(RECORDED) else "-") for values in found.values()]) for key in keys]
    return [(key, values) for key, values in rows if len(set(values)) > 1]


def paired_table(folders: dict[str, Path]) -> list[dict[str, Any]]:
    """A row for each domain of any run and each run but the first: prompts, both accuracies, and the paired difference or why there is none. Where there is
    more than one domain also a row for all prompts of those in which both answered the same, each prompt once.
    """
    found, _ = scores_of(folders)
    scores = {name: {} if record is None else record["domains"] for name, record in found.items()}
    seeds = {name: yaml.safe_load((folder / "config.yaml").read_text()).get("seed") for name, folder in folders.items()}
    first, *others = scores
    domains, rows, pairs = list(dict.fromkeys(domain for own in scores.values() for domain in own)), [], {name: {} for name in others}
    for domain, name in product(domains, others):
        ours, theirs = scores[first].get(domain), scores[name].get(domain)
        row = {"domain": domain, "run": name, "first": _mean(ours), "other": _mean(theirs), "difference": "", "note": ""}
        if ours is None and theirs is None:
            continue
        if ours is None or theirs is None:
            row["note"] = f"no scores of {first if ours is None else name}: opd evaluate RUN of each run makes them, or evaluation.every=N while it trains"
        elif theirs["prompts"] != ours["prompts"]:
            row["note"] = "it answered other prompts"
        else:
            pairs[name][domain] = ours["scores"], theirs["scores"]
            note = _note(ours | {"seed": seeds[first]}, theirs | {"seed": seeds[name]})
            row |= {"difference": _shown(paired_difference(theirs["scores"], ours["scores"])), "note": note}
        rows.append(row | {"prompts": len((ours or theirs)["scores"])})
    otherwise = {row["run"] for row in rows if row["note"].startswith(OTHERWISE)}
    return rows + [_all_row(name, own, domains, name in otherwise) for name, own in pairs.items() if own and len(domains) > 1]


def _note(ours: dict[str, Any], theirs: dict[str, Any]) -> str:
    """What was not the same beside the prompts. seed: of the run, where the record does not say with which it was asked."""
    one, other = (record.get("asked", record)["seed"] for record in (ours, theirs))
    seed = "" if one == other else "another seed, so other random numbers: the interval is still of the same prompts"
    asked = asked_otherwise(ours, theirs)
    return "; ".join(part for part in (asked and f"{OTHERWISE}: {asked}", seed) if part)


def _all_row(run: str, pairs: dict[str, tuple[list[float], list[float]]], domains: list[str], is_otherwise: bool) -> dict[str, Any]:
    """pairs: domain -> the first run's scores and this run's. is_otherwise: whether one of them was asked otherwise."""
    ours, theirs = ([score for scores in column for score in scores] for column in zip(*pairs.values(), strict=True))
    note = "; ".join(([] if len(pairs) == len(domains) else [f"of {', '.join(pairs)}"]) + [OTHERWISE] * is_otherwise)
    row = {"domain": "all", "run": run, "first": _mean({"scores": ours}), "other": _mean({"scores": theirs}), "prompts": len(ours)}
    return row | {"difference": _shown(paired_difference(theirs, ours)), "note": note}


def scores_of(folders: dict[str, Path]) -> tuple[dict[str, dict[str, Any] | None], str]:
    """The scores by which runs are paired, and where they are from, in words."""
    judged = {name: shown_record(folder) for name, folder in folders.items()}
    if all(record is not None for record in judged.values()):
        found = {name: {"step": record["step"], "domains": record["scores"]} for name, record in judged.items()}
        origin = "what `opd evaluate RUN` found of the chosen checkpoints, else of the newest"
    else:
        found, origin = {name: read_scores(folder) for name, folder in folders.items()}, "the newest evaluations while the runs trained"
    steps = [f"{name} step {record['step']}" for name, record in found.items() if record is not None]
    return found, f"{origin}: {', '.join(steps)}"


RECORDED = ("code", "commit", "version of ", "hardware", "initial student", "teacher of ", "data of ", "held-out data of ")


def _described(folder: Path, named: Path) -> dict[str, str]:
    """Everything by which a run may differ from another, as text. named: the run's folder, or that of the pipeline around it."""
    found = _settings(folder, named)
    starts = read_starts(folder)
    if starts:
        found |= start_facts(starts[-1])
        found["initial student"] = (starts[0]["student"] or {"hash": "a new model"})["hash"] or UNKNOWN
    spans = _spans(folder)
    return found | (_teachers(spans[-1]) if spans else {})


def changed_midway(folder: Path, with_text: bool = True) -> list[Midway]:
    """What changed in a run when it was taken up, in order of steps: settings (opd/config_changes.py), what a start was made with, the teachers. What held
    from the first step on is left out, and what held for no step that counts. with_text: whether system prompts may stand in it.
    """
    found, starts, spans = [], read_starts(folder), _spans(folder)
    for change in lasting_changes(read_changes(folder), [start["step"] for start in starts]):
        before, after = (_setting_text(change["setting"], change[when], with_text) for when in ("before", "after"))
        found.append(Midway(change["step"] + 1, change["setting"], before, after))
    for before, after in pairwise(_lasting_starts(starts)):
        found += _differing(after["step"] + 1, start_facts(before), start_facts(after))
    for before, after in pairwise(spans):
        found += _differing(after["from_step"], _teachers(before), _teachers(after))
    for span in spans:
        found += [Midway(drop["step"], f"teacher of {name}", "in use", f"dropped: {drop['reason']}") for name, drop in span["dropped"].items()]
    return sorted((row for row in dict.fromkeys(found) if row.step > 1), key=lambda row: row.step)  # a later span tells of the same drop


def _lasting_starts(starts: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Those without which no step that counts would have been done: after the others a later start did all steps again."""
    found = []
    for start in reversed(starts):
        if not found or start["step"] < found[-1]["step"]:
            found.append(start)
    return found[::-1]


def _setting_text(name: str, value: Any, with_text: bool) -> str:
    if isinstance(value, dict):
        return "settings of its own"
    return json.dumps(value if with_text else without_text(value, name.rpartition(".")[2]))


def _differing(step: int, before: dict[str, str], after: dict[str, str]) -> list[Midway]:
    return [Midway(step, what, value, after[what]) for what, value in before.items() if after.get(what, value) != value]


def start_facts(start: dict[str, Any]) -> dict[str, str]:
    """What a start was made with and may differ at another, in another run or in the same one, as text."""
    hardware = ", ".join(start["hardware"]["devices"]) or start["hardware"]["cpu"]
    found = {"code": start["code"][:12], "commit": _commit(start), "hardware": hardware}
    found |= {f"version of {name}": number for name, number in start["versions"].items()}
    found |= {f"data of {name}, {source}": data["sha256"][:16] for name, sources in start["data"].items() for source, data in sources.items()}
    return found | {f"held-out data of {name}": data["sha256"][:16] for name, data in start.get("held_out", {}).items()}


def _spans(folder: Path) -> list[dict[str, Any]]:
    """Of teachers.json (teachers/manifest.py)."""
    file = folder / "teachers.json"
    return read_json(file)["spans"] if file.is_file() else []


def _teachers(span: dict[str, Any]) -> dict[str, str]:
    identities = {name: domain["teacher"] for name, domain in span["domains"].items()}
    return {f"teacher of {name}": str(own.get("hash") or own.get("fingerprint") or UNKNOWN)[:16] for name, own in identities.items()}


def _settings(folder: Path, named: Path) -> dict[str, str]:
    """The settings of a folder by their paths. What they name in the run's, or the pipeline's, own folder is named without it."""
    own = re.escape(f"{yaml.safe_load((named / 'config.yaml').read_text()).get('run_dir')}/")
    config = yaml.safe_load((folder / "config.yaml").read_text())
    return {path: re.sub(rf"(?<![\w./-]){own}", "RUN/", json.dumps(value)) for path, value in leaves(config) if path.split(".")[0] not in UNCOUNTED}


def _section(axis: str, records: dict[str, list[dict[str, Any]]]) -> Section:
    """All curves over one axis, of the runs that have a place on it."""
    places = {name: found for name, own in records.items() if (found := positions(own, axis)) is not None}
    figures = []
    for pattern, (title, unit) in CURVES.items():
        metrics = sorted({key for name in places for record in records[name] for key in record if re.fullmatch(pattern, key)})
        for metric in metrics:
            lines = []
            for number, (name, found) in enumerate(records.items()):
                placed = zip(places[name], found, strict=True) if name in places else ()
                points = [(place, record[metric]) for place, record in placed if metric in record]
                lines += [Line(name=name, points=points, style=number)] if points else []
            if len(lines) > 1:
                domain = re.fullmatch(pattern, metric).groups()
                full = f"{title}: {domain[0]}" if domain else title
                picture = line_chart(full, lines, unit, may_be_log=unit.startswith("nats"), x_axis=AXES[axis])
                legend = [(line.name, style_class(line.style)) for line in lines]
                figures.append(Figure(title=full, picture=picture, caption=metric, legend=legend))
    absent = [f"{name} is left out: its records have no {ADDED_UP[axis]} to add up." for name in records if name not in places]
    if not figures:
        runs = "these runs" if len(places) == len(records) else "those that are left"
        absent.append(f"No figure is in the metrics of two of {runs}.")
    return Section(title=f"Over {axis}", figures=figures, absent=absent)


def positions(records: list[dict[str, Any]], axis: str) -> list[float] | None:
    """Where each record stands on an axis: its step, or the tokens or seconds of all steps up to it; None where no step says how many those were."""
    if axis == "steps":
        return [float(record["step"]) for record in records]
    total, found, key = 0.0, [], ADDED_UP[axis]
    steps = [record for record in records if record["step"]]
    if steps and not any(key in record for record in steps):
        return None
    for record in records:
        total += record.get(key, 0.0) if record["step"] else 0.0
        found.append(total)
    return found


def _about(name: str, row: RunRow, folder: Path) -> dict[str, str]:
    step = "" if row.step is None else f", step {row.step}" + (f" of {row.steps}" if row.steps else "")
    return {"name": name, "folder": str(folder), "about": f"opd {row.command}, {row.state}{step}", "commit": commit_of(folder)}


def _names(folders: list[Path]) -> list[str]:
    """The folders' last names, with as much before as tells them apart."""
    for length in range(1, max(len(folder.parts) for folder in folders) + 1):
        names = ["/".join(folder.parts[-length:]) for folder in folders]
        if len(set(names)) == len(names):
            return names
    return [str(folder) for folder in folders]


def _mean(scores: dict[str, Any] | None) -> str:
    return "" if scores is None else f"{sum(scores['scores']) / len(scores['scores']):.3f}"


def _shown(found: Interval) -> str:
    return f"{found.value:+.3f} [{found.low:+.3f}, {found.high:+.3f}]"
