"""`opd evaluate RUN`: checkpoints of a run on the held-out prompts, each once, and which of them is chosen (opd/choice.py).

It is a process of its own, beside the run or after it: it reads the run's checkpoints and writes to RUN/evaluations, where it also makes the models that it
needs, one at a time, and deletes them again. What was found of a checkpoint is taken from its file as long as the checkpoint and what it was asked are the
same, so that one that is killed goes on where it was; within a checkpoint, from the cache. The run keeps the checkpoint that is being evaluated; one that it
deletes before that is passed over with a word.

    RUN/evaluations/step-SSSSSS-HASH.json    opd/checkpoint_record.py: what was found of a checkpoint
    RUN/evaluations/choice.json, end.json, reading.json  opd/choice.py
    RUN/evaluations/config.yaml              settings of the newest `opd evaluate RUN`
    RUN/evaluations/cache/                   opd/evaluation_cache.py
    RUN/evaluations/models/                  the checkpoint that is being evaluated, as a model
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
from opd.checkpoint_record import read_all, read_record, write_record
from opd.choice import EVALUATIONS, Verdict, ask_to_end, choose, claim, judge, read_choice, release, rule_of, write_choice
from opd.comparison import DomainResult, comparison, print_comparison, require_certificates
from opd.config import EvaluateConfig
from opd.console import print_table
from opd.distributed import barrier, is_main, on_main
from opd.evaluate_config import AcceptConfig
from opd.evaluator import Evaluator
from opd.held_out import build_evaluator, results_of, teacher_results
from opd.run import begin_folder, require_own_folder
from opd.run_facts import model_facts
from opd.run_lock import lock
from opd.run_state import State, read_state
from opd.runs import describe
from opd.scores import scores_by_domain
from rollout.files import read_json
from rollout.grading import grader_identity
from rollout.model import load_model, load_tokenizer, require_folder
from teachers.compatibility import check_compatible
from teachers.config import RUNNING_SETTINGS
from teachers.fingerprint import weights_fingerprint
from teachers.manifest import teacher_identity

MODELS = "models"
"""Of RUN/evaluations."""


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
        folder = on_main(lambda: self._make(step))
        if folder is None:
            return None
        found, scores = self._measure(folder)
        barrier()
        on_main(lambda: self._write(step, folder, found, scores))
        return found

    def known(self, step: int) -> dict[str, Any] | None:
        """What the file of a checkpoint says, where it is of that checkpoint and of these settings; of one that is gone it says what there was."""
        record = read_record(self.run, step, self.settings)
        return None if record is None else record["evaluation"]

    def _make(self, step: int) -> Path | None:
        """The checkpoint's model; None where the checkpoint is gone. From here on the run keeps it, until another is made."""
        source = self.run / "checkpoints" / files.tag_of(step)
        try:
            claim(self.run, step, files.digest_of(source))
            return model_folder(f"{self.run}@{step}", self.run / EVALUATIONS / MODELS)
        except (ValueError, OSError):
            if source.is_dir():
                raise
            return None

    def _measure(self, folder: Path) -> tuple[dict[str, Any], dict[str, Any]]:
        """The evaluation of a model, and its scores (opd/scores.py)."""
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
        scores = scores_by_domain(self.evaluator.prompts, found, self.evaluator.asked())
        record = comparison(self.base, self.teacher, found, self.evaluator.dropped, cfg.pass_k)
        return record | {"base": on_main(lambda: model_facts(cfg.base))}, scores

    def _write(self, step: int, folder: Path, found: dict[str, Any], scores: dict[str, Any]) -> None:
        """Write the record of a model's checkpoint, and delete the model."""
        write_record(self.run, step, read_json(folder / "checkpoint.json")["manifest"], self.settings, found, scores)
        shutil.rmtree(folder)


def evaluate_checkpoints(cfg: EvaluateConfig, device: torch.device) -> None:
    """Evaluate a run's checkpoints, choose one, and print the table. Raises ValueError where there is none, and while another process does the same."""
    run, folder = Path(cfg.run), Path(cfg.run_dir)
    on_main(lambda: _begin(cfg, run, folder))
    work, following = CheckpointEvaluation(cfg, device), Following(cfg, run)
    passed_over: set[int] = set()
    while True:
        is_last = on_main(following.is_last)  # before looking for checkpoints: what it writes last is then still found
        on_main(lambda: _choose(work))  # among those that are known, whose rule may be another than before
        for step in on_main(lambda: list(_steps(cfg, run))):
            if step in passed_over or on_main(lambda step=step: work.known(step)) is not None:
                continue
            if work.record(step) is not None:
                on_main(lambda: _choose(work))
                continue
            passed_over.add(step)
            if is_main():
                print(f"step {step}: deleted by the run before it could be read (checkpoint.keep): passed over")
        if is_last:
            break
        time.sleep(cfg.follow_seconds)
    verdicts = on_main(lambda: _choose(work))
    on_main(lambda: release(run))
    if not verdicts:
        raise ValueError(f"no checkpoint of {run} could be evaluated: there is none yet, or the run deletes them sooner than they are read (checkpoint.keep)")
    if is_main():
        _show(work, verdicts)
    for verdict in verdicts:
        require_certificates(verdict.record)


class Following:
    """Whether a run may still write checkpoints that are to be waited for. It is asked before each look for them, on the main rank."""

    def __init__(self, cfg: EvaluateConfig, run: Path):
        self.cfg, self.run, self.seen_at_work = cfg, run, time.monotonic()

    def is_last(self) -> bool:
        """Whether the look that comes is the last; says so where the run has not ended."""
        state = describe(self.run).state
        if not self.cfg.follow or state in (State.done.value, State.stopped.value):
            return True
        if state == State.running.value:
            self.seen_at_work = time.monotonic()
        is_over = time.monotonic() - self.seen_at_work > 60 * self.cfg.follow_minutes
        if is_over:
            print(f"{self.run} is {state}, and was not at work for {self.cfg.follow_minutes:g} minutes (follow_minutes): it is followed no longer")
        return is_over


def _begin(cfg: EvaluateConfig, run: Path, folder: Path) -> None:
    if not (run / "config.yaml").is_file():
        raise ValueError(f"{run} is not a folder of a run: it has no config.yaml")
    if folder.resolve() != (run / EVALUATIONS).resolve():
        raise ValueError(f"what is found of a run's checkpoints stands in {run / EVALUATIONS}: remove run_dir")
    if isinstance(cfg.checkpoints, list):
        tags = files.saved_tags(run / "checkpoints")
        missing = [step for step in cfg.checkpoints if files.tag_of(step) not in tags and not any((run / EVALUATIONS).glob(f"{files.tag_of(step)}-*.json"))]
        if missing:
            there = ", ".join(str(files.step_of(tag)) for tag in tags) or "none"
            raise ValueError(f"{run} has no checkpoint of step {missing[0]}; there are {there}")
    require_own_folder(folder, "evaluate")
    folder.mkdir(exist_ok=True)
    problem = lock(folder)
    if problem is not None:
        raise ValueError(problem)
    shutil.rmtree(folder / MODELS, ignore_errors=True)  # of one that was killed
    begin_folder(folder, cfg, "evaluate")


def _steps(cfg: EvaluateConfig, run: Path) -> Iterator[int]:
    """The steps to evaluate, in this order."""
    there = [files.step_of(tag) for tag in files.saved_tags(run / "checkpoints")]
    if isinstance(cfg.checkpoints, list):
        yield from sorted(set(cfg.checkpoints))
    elif cfg.checkpoints == "newest":
        yield from there[-1:]
    else:
        choice = read_choice(run)
        chosen = None if choice is None or choice["chosen"] is None else choice["chosen"]["step"]
        yield from sorted(there, key=lambda step: (step != chosen, step))  # what is protected is judged first, before another may take its place


def _judged(work: CheckpointEvaluation, records: dict[int, dict[str, Any]], rule: AcceptConfig) -> list[Verdict]:
    is_there = {step: (work.run / "checkpoints" / files.tag_of(step)).is_dir() for step in records}
    return [judge(rule, step, record, work.cfg.retention, is_there[step]) for step, record in records.items()]


def _choose(work: CheckpointEvaluation) -> list[Verdict]:
    """Judge all checkpoints of which something is known under these settings, and write which is chosen, where all were asked for: a look at some leaves
    the choice as it is, and is judged by its rule. The main rank calls it.
    """
    cfg, run = work.cfg, work.run
    records = {step: record["evaluation"] for step, record in read_all(run, work.settings).items()}
    before = read_choice(run)
    if cfg.checkpoints != "all":
        return _judged(work, records, cfg.accept if before is None else rule_of(before))
    if not records:
        return []
    asked = None if before is None else before["asked_to_end"]
    while True:
        verdicts = _judged(work, records, cfg.accept)
        best = choose(cfg.accept, verdicts)
        source = None if best is None else run / "checkpoints" / files.tag_of(best.step)
        try:
            chosen = None if best is None else {"step": best.step, "manifest": files.digest_of(source)}
        except FileNotFoundError:
            continue  # deleted between two looks
        write_choice(run, cfg.accept, work.settings, verdicts, chosen, asked)
        if source is None or source.is_dir():
            break  # else the run deleted it before it could know
    if cfg.accept.end_run and best is not None:
        state = read_state(run)
        if describe(run).state == State.running.value and state.begun != asked:
            ask_to_end(run, best.step, state.begun)
            write_choice(run, cfg.accept, work.settings, verdicts, chosen, state.begun)
            print(f"step {best.step} is accepted: the run has been asked to end")
    return verdicts


def _show(work: CheckpointEvaluation, verdicts: list[Verdict]) -> None:
    cfg, run, choice = work.cfg, work.run, read_choice(work.run)
    is_other = choice is not None and choice["settings"] != work.settings
    chosen = None if choice is None or is_other else choice["chosen"]
    ks = [k for k in cfg.pass_k if k > 1]
    rows = []
    for verdict in verdicts:
        record = verdict.record
        lowest = {name: domain["recovery"]["value"] for name, domain in record["domains"].items() if isinstance(domain["recovery"], dict)}
        least = min(lowest, key=lowest.get, default=None)
        closed = [domain["gap_closed"]["value"] for domain in record["domains"].values() if domain["gap_closed"] is not None]
        kept = [f"{name} {record['domains'][name]['difference']['value']:+.3f}" for name in cfg.retention if record["domains"][name]["difference"]]
        accuracy = verdict.accuracy
        mark = "chosen" if chosen is not None and chosen["step"] == verdict.step else "" if verdict.is_there else "deleted"
        passed = [_passed(record, k, cfg.retention) for k in ks]
        cells = ["" if accuracy is None else f"{accuracy:.3f}", *passed, "" if least is None else f"{lowest[least]:.3f} ({least})"]
        rows.append([str(verdict.step), *cells, f"{min(closed):.3f}" if closed else "", ", ".join(kept), mark, "; ".join(verdict.against)])
    header = ["step", "pass@1", *(f"pass@{k}" for k in ks), "lowest recovery", "lowest gap closed", "retention", "", "not accepted, since"]
    caption = "pass@k, of which pass@1 is the accuracy, at temperature 1 over all held-out prompts of the distilled domains; retention: student less base"
    print_table("", header, rows, caption)
    wanted = chosen["step"] if chosen is not None and cfg.checkpoints == "all" else max(_steps(cfg, run), default=verdicts[-1].step)
    shown = next((verdict for verdict in verdicts if verdict.step == wanted), verdicts[-1])
    print(f"\nstep {shown.step}:")
    print_comparison(shown.record)
    if choice is None:
        print("chosen: none yet; checkpoints=all chooses one")
    elif is_other:
        print("chosen: from what was found under other settings than these, which checkpoints=all would choose by")
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
    """sha256 of what a checkpoint is asked: by which settings it is loaded, the models beside it, graders and local prompts by their content."""
    asked = {name: getattr(cfg, name) for name in ("seed", "retention", "pass_k")}
    asked |= {name: _plain(getattr(cfg, name)) for name in ("student", "evaluation")}
    asked["teachers"] = {name: value for name, value in _plain(cfg.teachers).items() if name not in RUNNING_SETTINGS}
    models = {"base": cfg.base} | {f"teacher of {name}": domain.teacher for name, domain in cfg.domains.items() if name not in cfg.retention}
    for role, model in models.items():
        if model.model is not None:
            require_folder(model.model, role)
    asked["base"] = None if cfg.base.model is None else [_plain(cfg.base) | {"model": None}, weights_fingerprint(cfg.base, "base")]
    for name, domain in cfg.domains.items():
        teacher = None
        if domain.teacher.model is not None and name not in cfg.retention:
            teacher = {part: value for part, value in teacher_identity(domain.teacher, f"teacher of {name}").items() if part != "model"}
        prompts = _plain(domain.prompts) | {"share": None}
        held_out = _plain(domain.held_out)
        asked[f"domain {name}"] = [teacher, prompts, held_out, _content(domain.held_out.path), grader_identity(domain.grader), asdict(domain.perturbation)]
    asked["versions"] = {library: importlib.metadata.version(library) for library in ("opd", "torch", "transformers")}
    return hashlib.sha256(json.dumps(asked, sort_keys=True, default=str).encode()).hexdigest()


def _plain(cfg: Any) -> dict[str, Any]:
    return OmegaConf.to_container(OmegaConf.structured(cfg), enum_to_str=True)


def _content(path: str | None) -> list[str]:
    """The sha256 of a local file of prompts, or of each in a folder; none of what is made here or comes from the hub."""
    place = Path(path or "")
    files_there = sorted(place.rglob("*")) if path and place.is_dir() else [place]
    return [f"{file.relative_to(place)} {hashlib.sha256(file.read_bytes()).hexdigest()}" for file in files_there if file.is_file()]
