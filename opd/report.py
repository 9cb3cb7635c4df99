"""`opd report RUN`: what a run did, as one HTML page that loads nothing from elsewhere: RUN/report.html.

The page is composed by jinja2 with everything escaped, from opd/report_page.html (with its style sheet) and opd/report_page.js; numbers come from the files
of the run (opd/report_reader.py), pictures from opd/report_figures.py. Its content policy lets no script run but the page's own, named by its hash, and
forbids every request, so that text which a model wrote is text whatever it says.

`upload=true` also logs the file as an artifact of the run's W&B run, online or offline as the run was. Text of prompts and completions leaves this machine
only where the run's logger.upload_text allows it: without, the page that is written, and uploaded, has none, and says so. One file with two contents would
be worse: nobody could tell which of them was uploaded.
"""

import base64
import hashlib
import json
from dataclasses import dataclass
from datetime import datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup
from omegaconf import OmegaConf

from opd.checkpoint_files import tag_of
from opd.job_config import LoggerConfig, LoggerKind, ReportConfig
from opd.report_compare import changed_midway, commit_of, render_comparison
from opd.report_figures import accuracy_intervals, sections
from opd.report_reader import RunFacts, read_run, without_text
from rollout.files import replace_text

FILE = "report.html"
MOST_TOKENS = 400
"""Of a completion that are shown."""
COLUMNS = ["domain", "base", "teacher", "student", "recovery", "KL (nats)", "certified floor", "prompts"]
STRONGEST = 85
"""Per cent of the colour on a token at the end of the scale, so that its text stays readable."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Cell:
    """A number of the table with its interval."""

    value: str = ""
    interval: str = ""
    is_bad: bool = False


def report(cfg: ReportConfig) -> None:
    """Write RUN/report.html, upload it if asked, and print its path. Raises ValueError where there is nothing to report on, or nowhere to upload."""
    if not cfg.run_dir:
        raise ValueError("report needs a run: write `opd report RUN`, with the folder of a run or of a pipeline")
    if cfg.others:
        if cfg.upload:
            raise ValueError("a comparison belongs to no W&B run: leave upload=true out")
        replace_text(Path(cfg.out), render_comparison([Path(name) for name in (cfg.run_dir, *cfg.others)]))
        return print(cfg.out)
    facts = read_run(Path(cfg.run_dir))
    logger = _logger_of(facts)
    if cfg.upload and logger.kind is LoggerKind.none:
        raise ValueError(f"{cfg.run_dir} was run with logger=none, so that there is no W&B run to upload to: leave upload=true out")
    path = facts.folder / FILE
    replace_text(path, render(facts, with_text=logger.upload_text or not cfg.upload))
    if cfg.upload:
        from opd.wandb_log import upload_file

        upload_file(facts.train_folder, logger, path)
    print(path)


def render(facts: RunFacts, with_text: bool) -> str:
    """The page. with_text: whether prompts, completions and system prompts may stand in it."""
    folder = Path(__file__).parent
    script = (folder / "report_page.js").read_text()
    loader = jinja2.FileSystemLoader(folder)
    environment = jinja2.Environment(loader=loader, autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True)
    samples = _samples(facts) if with_text else []
    intervals = accuracy_intervals(facts)
    return environment.get_template("report_page.html").render(
        facts=facts,
        name=str(facts.folder),
        about=_about(facts),
        rows=_table(facts),
        columns=COLUMNS,
        table_note=_table_note(facts),
        no_table="No accuracies are known: neither `opd evaluate` nor an evaluation while training (evaluation.every=N) has run on this run\u2019s student.",
        checkpoints=_checkpoints(facts),
        result="Result" if facts.of_step is None else f"Result after step {facts.of_step}",
        parts=sections(facts),
        intervals=intervals,
        samples=samples,
        scale=f"{_colour_scale(facts):.2g}",
        samples_when=f"step {facts.samples[-1]['step']}" if facts.samples else "",
        no_samples=_no_samples(facts, with_text),
        teachers=_teachers(facts),
        no_teachers="No teachers are recorded: only `opd distill` writes teachers.json.",
        settings=_settings(facts, with_text),
        midway=changed_midway(facts.train_folder, with_text),
        script=Markup(script),
        script_hash=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
        written=datetime.now().astimezone().strftime("%Y-%m-%d %H:%M %Z"),
        version=version("opd"),
    )


def _logger_of(facts: RunFacts) -> LoggerConfig:
    """How the run with the curves was logged; of `opd evaluate`, not at all."""
    settings = facts.train_config.get("logger")
    if settings is None:
        return LoggerConfig(kind=LoggerKind.none)
    return OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(LoggerConfig), settings))


def _about(facts: RunFacts) -> list[tuple[str, str]]:
    config = facts.train_config
    student = config.get("student", {})
    steps = "" if facts.num_steps is None else f"{facts.steps} of {facts.num_steps}"
    found = [
        ("student", student.get("model") or student.get("architecture", {}).get("model_type") or "new model"),
        ("domains", ", ".join(facts.domains)),
        ("optimizer steps", steps),
        ("begun, last changed", f"{facts.begun}, {facts.changed}"),
        ("experts", config.get("quant", {}).get("experts", "")),
        ("seed", str(config.get("seed", ""))),
        ("versions", ", ".join(f"{name} {number}" for name, number in facts.versions.items()) or "not recorded by this command"),
        ("git commit", commit_of(facts.train_folder)),
    ]
    if facts.train_folder != facts.folder:
        found.insert(0, ("curves from", f"stage {facts.train_folder.name} (opd {facts.train_command})"))
    if facts.stages:
        found.append(("stages", ", ".join(f"{name} {state} {seconds:.0f} s" for name, (state, seconds) in facts.stages.items())))
    return [(term, value) for term, value in found if value]


def _table(facts: RunFacts) -> list[dict[str, Any]]:
    """Rows of the result: from the evaluation, else base and student from the run's own first and last evaluation."""
    if facts.evaluation is not None:
        rows = []
        for name, domain in facts.evaluation["domains"].items():
            rows.append({"name": name, "cells": _evaluated(domain)})
            if "perturbed" in domain:
                cells = [_cell(None if role not in domain["perturbed"] else _accuracy(domain["perturbed"][role])) for role in ("base", "teacher", "student")]
                rows.append({"name": f"{name}, perturbed", "cells": [*cells, Cell(), Cell(), Cell(), Cell(value=str(domain["student"]["prompts"]))]})
        return rows
    measured = [record for record in facts.records if any(name.startswith("evaluation/") for name in record)]
    if not measured:
        return []
    first, last = (measured[0] if measured[0]["step"] == 0 else {}), measured[-1]
    rows = []
    for name in facts.domains:
        cells = [_logged(first, name, "accuracy"), Cell(), _logged(last, name, "accuracy"), Cell(), _logged(last, name, "kl_per_sequence"), Cell(), Cell()]
        if any(cell.value for cell in cells):
            rows.append({"name": name, "cells": cells})
    return rows


def _evaluated(domain: dict[str, Any]) -> list[Cell]:
    roles = [_cell(None if role not in domain else _accuracy(domain[role])) for role in ("base", "teacher", "student")]
    recovery = Cell(value=domain["recovery"]) if isinstance(domain["recovery"], str) else _cell(domain["recovery"])
    certificate = domain.get("certificate")
    floor = Cell() if certificate is None else Cell(
        value=f"{certificate['floor']:.3f}", interval=f"{certificate['low']:.3f} at the least", is_bad=not certificate["holds"]
    )  # fmt: skip
    kl = domain.get("kl", {}).get("student")
    return [*roles, recovery, _cell(None if kl is None else kl["per_sequence"]), floor, Cell(value=str(domain["student"]["prompts"]))]


def _checkpoints(facts: RunFacts) -> list[dict[str, Any]]:
    """Rows of the checkpoints that `opd evaluate RUN` was asked of, with what the acceptance rule says of each."""
    judged = {} if facts.choice is None else {found["step"]: "; ".join(found["against"]) for found in facts.choice["checkpoints"]}
    chosen = None if facts.choice is None or facts.choice["chosen"] is None else facts.choice["chosen"]["step"]
    rows = []
    for step, evaluation in facts.checkpoints.items():
        accuracies = {name: _cell(_accuracy(domain["student"])) for name, domain in evaluation["domains"].items()}
        lowest = evaluation["min_recovery"]
        verdict = "chosen" if step == chosen else judged.get(step, "not judged yet: checkpoints=all does") or "accepted"
        verdict += "" if (facts.train_folder / "checkpoints" / tag_of(step)).is_dir() else ", deleted since"
        rows.append({"step": step, "accuracies": accuracies, "lowest": "" if lowest is None else f"{lowest:.3f}", "verdict": verdict})
    return rows


def _accuracy(record: dict[str, Any]) -> dict[str, Any]:
    return record | {"value": record["accuracy"]}


def _cell(record: dict[str, Any] | None) -> Cell:
    if record is None or record["value"] is None:
        return Cell()
    return Cell(value=f"{record['value']:.3f}", interval=f"[{record['low']:.3f}, {record['high']:.3f}]")


def _logged(record: dict[str, Any], domain: str, figure: str) -> Cell:
    names = {"value": "", "low": "_low", "high": "_high"}
    return _cell({end: record.get(f"evaluation/{domain}/{figure}{suffix}") for end, suffix in names.items()})


def _table_note(facts: RunFacts) -> str:
    if facts.evaluation is None:
        return (
            "From the run\u2019s own evaluations, at step 0 (base; after a warm-up where there is one) and at the last; 95 % intervals. Teacher, recovery and "
            "certificate take `opd evaluate`, or a pipeline that ends with it."
        )
    is_perturbed = any("perturbed" in domain for domain in facts.evaluation["domains"].values())
    return (
        f"From {facts.evaluation_file}. Accuracy at temperature 1 on held-out prompts, with 95 % intervals; recovery: student over teacher; KL(student || "
        "teacher) in nats per completion; floor: the accuracy that this KL guarantees, and at the least, with the upper end of its interval."
        + (" Perturbed: the environment replaces tokens of the answer." if is_perturbed else "")
    )


def _colour_scale(facts: RunFacts) -> float:
    """Nats at which the colour is full: of the last samples' tokens the largest but for a fiftieth, and 0.05 at least."""
    domains = facts.samples[-1]["domains"] if facts.samples else {}
    values = sorted(value for kept in domains.values() for item in kept for value in item["kl"] if value is not None)
    return max(0.05, values[int(0.98 * (len(values) - 1))]) if values else 1.0


def _samples(facts: RunFacts) -> list[dict[str, Any]]:
    """The last step's samples, as the template shows them."""
    if not facts.samples:
        return []
    scale, found = _colour_scale(facts), []
    for name, kept in facts.samples[-1]["domains"].items():
        shown = [_sample(item, scale) for item in kept]
        found.append({"name": name, "samples": shown, "summary": "; ".join(f"{item['place']} {_mean(item['kl']):.3g}" for item in kept) + " nats per token"})
    return found


def _sample(item: dict[str, Any], scale: float) -> dict[str, Any]:
    pairs = list(zip(item["pieces"], item["kl"], strict=True))
    tokens = [
        {"text": text, "kl": kl, "share": 0 if kl is None else round(STRONGEST * min(1.0, max(0.0, kl) / scale)), "title": _hint(text, kl)}
        for text, kl in pairs[:MOST_TOKENS]
    ]
    grade = "not graded" if item["grade"] is None else f"grade {item['grade']:g}"
    length = f"{len(pairs)} tokens{'' if item['finished'] else ', cut at the limit'}"
    return {
        "place": item["place"],
        "facts": f"{_mean(item['kl']):.3g} nats per token \u00b7 {grade} \u00b7 {length} \u00b7 request {item['request']}, row {item['row']}",
        "prompt": item["prompt"],
        "tokens": tokens,
        "more": f" \u2026 and {len(pairs) - MOST_TOKENS} more tokens" if len(pairs) > MOST_TOKENS else "",
    }


def _hint(text: str, kl: float | None) -> str:
    return f"{json.dumps(text, ensure_ascii=False)}: " + ("not in the loss" if kl is None else f"{kl:.4g} nats")


def _mean(values: list[float | None]) -> float:
    known = [value for value in values if value is not None]
    return sum(known) / len(known)


def _no_samples(facts: RunFacts, with_text: bool) -> str:
    if not with_text:
        return "Left out: this page was made for upload, and logger.upload_text=false keeps the text of prompts and completions on the machine of the run."
    reason = "none has been kept yet" if facts.train_config.get("samples", {}).get("every", 0) else "samples.every=N of `opd distill` keeps some"
    return f"No rollouts to show: {reason}."


def _teachers(facts: RunFacts) -> list[dict[str, str]]:
    if facts.teachers is None:
        return []
    rows = []
    for domain, described in facts.teachers["domains"].items():
        teacher, drop = described["teacher"], facts.teachers["dropped"].get(domain)
        rows.append(
            {
                "domain": domain,
                "model": " with ".join(str(teacher[name]) for name in ("model", "server", "adapter") if teacher.get(name)) or "unknown",
                "revision": teacher.get("revision") or "",
                "hash": (teacher.get("hash") or "none: behind a server")[:16],
                "state": f"dropped at step {drop['step']}: {drop['reason']}" if drop else "in use",
            }
        )
    return rows


def _settings(facts: RunFacts, with_text: bool) -> list[tuple[str, str]]:
    found = {f"opd {facts.command}: every setting, resolved": facts.config}
    if facts.train_folder != facts.folder:
        found[f"opd {facts.train_command}, of stage {facts.train_folder.name}"] = facts.train_config
    return [(title, OmegaConf.to_yaml(OmegaConf.create(config if with_text else without_text(config)))) for title, config in found.items()]
