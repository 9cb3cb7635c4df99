"""`opd evaluate RUN`: checkpoints of a run on the held-out prompts, each once, and which of them is chosen (opd/choice.py).

It is a process of its own, beside the run or after it: it reads the run's checkpoints, writes to RUN/evaluations, and makes the models that it needs in
RUN/students (opd/checkpoint_model.py), which it deletes again where it made them. What was found of a checkpoint is taken from its file as long as the
checkpoint and what it was asked are the same, so that one that is killed goes on where it was; within a checkpoint, from the cache. A checkpoint that the
run deletes meanwhile is passed over with a word.

    RUN/evaluations/step-SSSSSS.json         opd/checkpoint_record.py: what was found of a checkpoint
    RUN/evaluations/choice.json, end.json    opd/choice.py
    RUN/evaluations/config.yaml              settings of the newest `opd evaluate RUN`
    RUN/evaluations/cache/                   opd/evaluation_cache.py
"""

import hashlib
import importlib.metadata
import json
import shutil
import time
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf

from opd import checkpoint_files as files
from opd.checkpoint_model import model_folder
from opd.checkpoint_record import read_record, record_file, recorded_steps, write_record
from opd.choice import FOLDER, Verdict, accuracy_of, ask_to_end, choose, judge, read_choice, write_choice
from opd.comparison import DomainResult, comparison, print_comparison, require_certificates
from opd.config import EvaluateConfig
from opd.console import print_table
from opd.distributed import barrier, is_main, on_main
from opd.evaluator import Evaluator
from opd.held_out import build_evaluator, results_of, teacher_results
from opd.run import require_own_folder, write_config
from opd.run_lock import lock
from opd.runs import describe
from rollout.grading import grader_identity
from rollout.model import load_model, load_tokenizer
from teachers.compatibility import check_compatible
from teachers.manifest import teacher_identity


class CheckpointEvaluation:
    """The evaluation of one run's checkpoints; every rank has one."""

    def __init__(self, cfg: EvaluateConfig, device: torch.device):
        self.cfg, self.device, self.run = cfg, device, Path(cfg.run)
        self.settings = on_main(lambda: _settings_hash(cfg))
        self.evaluator: Evaluator | None = None
        self.base: dict[str, DomainResult] = {}
        self.teacher: dict[str, DomainResult] = {}

    def record(self, step: int) -> dict[str, Any] | None:
        """What is known of a checkpoint, measured where it is not yet; every rank calls it. None where the run has deleted it."""
        known = on_main(lambda: self.known(step))
        if known is not None:
            return known
        tag = files.tag_of(step)
        made = on_main(lambda: not (self.run / "students" / tag).is_dir())
        if not on_main(lambda: self._is_made(step)):
            return None
        folder = self.run / "students" / tag
        found = self._measure(folder)
        on_main(lambda: self._write(step, found))
        barrier()
        if is_main() and made:
            shutil.rmtree(folder)
        return found

    def known(self, step: int) -> dict[str, Any] | None:
        """What the file of a checkpoint says, where it is of that checkpoint and of these settings; of one that is gone it says what there was."""
        record = read_record(self.run, step)
        return record["evaluation"] if record is not None and record["settings"] == self.settings else None

    def _is_made(self, step: int) -> bool:
        """Whether the model could be made; not where the checkpoint is gone."""
        try:
            model_folder(f"{self.run}@{step}")
        except (ValueError, OSError):
            if (self.run / "checkpoints" / files.tag_of(step)).is_dir():
                raise
            return False
        return True

    def _measure(self, folder: Path) -> dict[str, Any]:
        cfg = self.cfg
        student = load_model(replace(cfg.student, model=str(folder)), "student", self.device)
        if self.evaluator is None:
            tokenizer = load_tokenizer(str(folder), None, cfg.student.trust_remote_code)
            self.evaluator = build_evaluator(cfg, student, tokenizer, self.device)
            names = list(self.evaluator.prompts)
            if cfg.base.model is not None:
                check_compatible("base", cfg.base, tokenizer)
                self.base = results_of(cfg, self.evaluator, load_model(cfg.base, "base", self.device), names)
            self.teacher = teacher_results(cfg, self.evaluator)
        found = results_of(cfg, self.evaluator, student, list(self.evaluator.prompts))
        return comparison(self.base, self.teacher, found, self.evaluator.dropped, cfg.pass_k)

    def _write(self, step: int, found: dict[str, Any]) -> None:
        manifest = json.loads((self.run / "students" / files.tag_of(step) / "checkpoint.json").read_text())["manifest"]
        write_record(self.run, step, manifest, self.settings, found)


def evaluate_checkpoints(cfg: EvaluateConfig, device: torch.device) -> None:
    """Evaluate a run's checkpoints, choose one, and print the table. Raises ValueError where there is none, and while another process does the same."""
    run, folder = Path(cfg.run), Path(cfg.run_dir)
    on_main(lambda: _begin(cfg, run, folder))
    work = CheckpointEvaluation(cfg, device)
    passed_over: set[int] = set()
    while True:
        is_running = on_main(lambda: describe(run).state == "running")  # before looking for checkpoints: what it writes last is then still found
        for step in on_main(lambda: list(_steps(cfg, run))):
            if step in passed_over or (cfg.follow and on_main(lambda step=step: work.known(step)) is not None):
                continue
            if work.record(step) is None:
                passed_over.add(step)
                if is_main():
                    print(f"step {step}: deleted by the run before it could be read (checkpoint.keep): passed over")
            elif cfg.follow:
                on_main(lambda is_running=is_running: _choose(work, is_running))
        if not (cfg.follow and is_running):
            break
        time.sleep(cfg.follow_seconds)
    verdicts = on_main(lambda: _choose(work, is_running))
    if not verdicts:
        raise ValueError(f"no checkpoint of {run} could be evaluated: there is none yet, or the run deletes them sooner than they are read (checkpoint.keep)")
    if is_main():
        _show(cfg, run, verdicts)
    for verdict in verdicts:
        require_certificates(verdict.record)


def _begin(cfg: EvaluateConfig, run: Path, folder: Path) -> None:
    if not (run / "config.yaml").is_file():
        raise ValueError(f"{run} is not a folder of a run: it has no config.yaml")
    if folder.resolve() != (run / FOLDER).resolve():
        raise ValueError(f"what is found of a run's checkpoints stands in {run / FOLDER}: remove run_dir")
    if isinstance(cfg.checkpoints, list):
        tags = files.saved_tags(run / "checkpoints")
        missing = [step for step in cfg.checkpoints if files.tag_of(step) not in tags and not record_file(run, step).is_file()]
        if missing:
            there = ", ".join(str(files.step_of(tag)) for tag in tags) or "none"
            raise ValueError(f"{run} has no checkpoint of step {missing[0]}; there are {there}")
    require_own_folder(folder, "evaluate")
    folder.mkdir(exist_ok=True)
    problem = lock(folder)
    if problem is not None:
        raise ValueError(problem)
    write_config(folder, cfg, "evaluate")


def _steps(cfg: EvaluateConfig, run: Path) -> Iterator[int]:
    """The steps to evaluate, earliest first."""
    there = [files.step_of(tag) for tag in files.saved_tags(run / "checkpoints")]
    if isinstance(cfg.checkpoints, list):
        yield from sorted(set(cfg.checkpoints))
    elif cfg.checkpoints == "newest":
        yield from there[-1:]
    else:
        yield from there


def _judged(work: CheckpointEvaluation, records: dict[int, dict[str, Any]]) -> list[Verdict]:
    is_there = {step: (work.run / "checkpoints" / files.tag_of(step)).is_dir() for step in records}
    return [judge(work.cfg.accept, step, record, work.cfg.retention, is_there[step]) for step, record in records.items()]


def _choose(work: CheckpointEvaluation, is_running: bool) -> list[Verdict]:
    """Judge all checkpoints of which something is known under these settings, and write which is chosen, where all were asked for: a look at some leaves
    the choice as it is. The main rank calls it.
    """
    cfg, run = work.cfg, work.run
    records = {step: record for step in recorded_steps(run) if (record := work.known(step)) is not None}
    if cfg.checkpoints != "all":
        return _judged(work, records)
    before = read_choice(run)
    asked = before is not None and before["asked_to_end"]
    while True:
        verdicts = _judged(work, records)
        best = choose(cfg.accept, verdicts, cfg.retention)
        source = None if best is None else run / "checkpoints" / files.tag_of(best.step)
        try:
            chosen = None if best is None else {"step": best.step, "manifest": files.digest_of(source)}
        except FileNotFoundError:
            continue  # deleted between two looks
        ends = cfg.accept.end_run and is_running and best is not None and not asked
        write_choice(run, cfg.accept, verdicts, chosen, asked or ends)
        if source is None or source.is_dir():
            break  # else the run deleted it before it could know
    if ends:
        ask_to_end(run, best.step)
        print(f"step {best.step} is accepted: the run has been asked to end")
    return verdicts


def _show(cfg: EvaluateConfig, run: Path, verdicts: list[Verdict]) -> None:
    choice = read_choice(run)
    chosen = None if choice is None else choice["chosen"]
    rows = []
    for verdict in verdicts:
        record = verdict.record
        lowest = {name: domain["recovery"]["value"] for name, domain in record["domains"].items() if isinstance(domain["recovery"], dict)}
        least = min(lowest, key=lowest.get, default=None)
        closed = [domain["gap_closed"]["value"] for domain in record["domains"].values() if domain["gap_closed"] is not None]
        kept = [f"{name} {record['domains'][name]['difference']['value']:+.3f}" for name in cfg.retention if record["domains"][name]["difference"]]
        accuracy = accuracy_of(record, cfg.retention)
        mark = "chosen" if chosen is not None and chosen["step"] == verdict.step else "" if verdict.is_there else "deleted"
        passed = [_passed(record, k, cfg.retention) for k in cfg.pass_k]
        cells = ["" if accuracy is None else f"{accuracy:.3f}", *passed, "" if least is None else f"{lowest[least]:.3f} ({least})"]
        rows.append([str(verdict.step), *cells, f"{min(closed):.3f}" if closed else "", ", ".join(kept), mark, "; ".join(verdict.against)])
    header = ["step", "accuracy", *(f"pass@{k}" for k in cfg.pass_k), "lowest recovery", "least of the gap closed", "retention", "", "not accepted, since"]
    caption = "accuracy at temperature 1 over all held-out prompts of the distilled domains; retention: student less base"
    print_table("", header, rows, caption)
    wanted = chosen["step"] if chosen is not None and cfg.checkpoints == "all" else max(_steps(cfg, run), default=verdicts[-1].step)
    shown = next((verdict for verdict in verdicts if verdict.step == wanted), verdicts[-1])
    print(f"\nstep {shown.step}:")
    print_comparison(shown.record)
    if choice is None:
        print("chosen: none yet, which checkpoints=all does")
    elif chosen is None:
        print("chosen: none, since none is accepted")
    else:
        print(f"chosen: {run}@chosen is step {chosen['step']}, which the run keeps")


def _passed(record: dict[str, Any], k: int, retention: list[str]) -> str:
    """pass@k over all prompts of the graded domains that are distilled."""
    found = [domain["student"] for name, domain in record["domains"].items() if name not in retention and "pass" in domain["student"]]
    prompts = sum(domain["prompts"] for domain in found)
    return f"{sum(domain['pass'][str(k)]['value'] * domain['prompts'] for domain in found) / prompts:.3f}" if prompts else ""


def _settings_hash(cfg: EvaluateConfig) -> str:
    """sha256 of what a checkpoint is asked, teachers, graders and local prompts by their content."""
    asked = {name: getattr(cfg, name) for name in ("seed", "retention", "pass_k")}
    asked |= {name: OmegaConf.to_container(OmegaConf.structured(getattr(cfg, name)), enum_to_str=True) for name in ("base", "evaluation")}
    for name, domain in cfg.domains.items():
        path = Path(domain.held_out.path or "")
        teacher = None
        if domain.teacher.model is not None and name not in cfg.retention:
            teacher = {part: value for part, value in teacher_identity(domain.teacher, f"teacher of {name}").items() if part != "model"}
        prompts = OmegaConf.to_container(OmegaConf.structured(domain.prompts), enum_to_str=True) | {"share": None}
        content = hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else None
        asked[f"domain {name}"] = [teacher, prompts, asdict(domain.held_out), content, grader_identity(domain.grader), asdict(domain.perturbation)]
    asked["versions"] = {library: importlib.metadata.version(library) for library in ("opd", "torch", "transformers")}
    return hashlib.sha256(json.dumps(asked, sort_keys=True, default=str).encode()).hexdigest()
