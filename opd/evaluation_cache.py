"""Results of evaluations, kept by what they depend on, so that a base and its teachers are evaluated once for all students that are held against them.

A result follows from the model's weights and settings, the prompts with their answers, the grader, how completions are drawn, the seed, and, for the
divergence, the teacher's weights: whatever the key below says. A file is named by the hash of its key and holds both; the folder may be shared and deleted.

    CACHE/HASH.json    {"schema": 1, "key": {...}, "result": a DomainResult of opd/comparison.py}

The number of ranks is not in the key: it changes completions by rounding alone.
"""

import hashlib
import importlib.metadata
import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from opd.comparison import DomainResult, PerturbedResult
from opd.distributed import broadcast_object, is_main
from opd.intervals import Interval
from rollout.files import read_json, replace_text
from rollout.grading import grader_identity
from rollout.sampler import LocalSampler
from rollout.weights import hash_tensors
from teachers.manifest import teacher_identity

if TYPE_CHECKING:
    from opd.evaluator import Evaluator

SCHEMA = 1
INTERVALS = ("accuracy", "greedy", "kl_per_token", "kl_per_sequence")


class EvaluationCache:
    """The folder, or none: then every result is measured."""

    def __init__(self, folder: str | None):
        self.folder = None if folder is None else Path(folder)

    def results(self, evaluator: "Evaluator", sampler: LocalSampler, names: list[str], with_kl: bool = True) -> dict[str, DomainResult]:
        """The sampler's model on the named domains; every rank calls it. Raises ValueError for a file of the cache that is none."""
        model = None if self.folder is None else {"weights": hash_tensors(sampler.model.state_dict().items()), "config": _config_hash(sampler)}
        return {name: self._result(evaluator, sampler, name, with_kl, model) for name in names}

    def _result(self, evaluator: "Evaluator", sampler: LocalSampler, name: str, with_kl: bool, model: dict[str, str] | None) -> DomainResult:
        if model is None:
            return evaluator.evaluate_domain(name, sampler, with_kl)
        key = model | _key(evaluator, sampler, name, with_kl)
        path = self.folder / f"{hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()}.json"
        stored = broadcast_object(read_json(path) if is_main() and path.is_file() else None)
        if stored is not None and stored["key"] == key:
            return _from_record(stored["result"])
        result = evaluator.evaluate_domain(name, sampler, with_kl)
        if is_main():
            self.folder.mkdir(parents=True, exist_ok=True)
            replace_text(path, json.dumps({"schema": SCHEMA, "key": key, "result": asdict(result)}) + "\n")
        return result


def _key(evaluator: "Evaluator", sampler: LocalSampler, name: str, with_kl: bool) -> dict[str, Any]:
    """What a result depends on besides the model."""
    prompts = hashlib.sha256(json.dumps([(prompt.request, prompt.tokens, prompt.answer) for prompt in evaluator.prompts[name]]).encode()).hexdigest()
    domain, policy = evaluator.domains[name], sampler.policy
    has_teacher = evaluator.teachers is not None and name in evaluator.teachers.teacher_of
    teacher = teacher_identity(domain.teacher, f"teacher of {name}") if with_kl and evaluator.cfg.kl and has_teacher else None
    return {
        "domain": name,
        "prompts": prompts,
        "grader": grader_identity(domain.grader),
        "perturbation": asdict(domain.perturbation),
        "sampling": asdict(evaluator.sampling),
        "samples": evaluator.cfg.samples,
        "policy": [policy.seed, sorted(policy.end_tokens), policy.vocab_size],
        "device": sampler.model.device.type,
        "teacher": None if teacher is None else {part: value for part, value in teacher.items() if part != "model"},
        "versions": {library: importlib.metadata.version(library) for library in ("opd", "torch", "transformers")},
    }


def _config_hash(sampler: LocalSampler) -> str:
    settings = {name: value for name, value in sampler.model.config.to_dict().items() if name != "_name_or_path"}
    return hashlib.sha256(json.dumps(settings, sort_keys=True, default=str).encode()).hexdigest()


def _from_record(record: dict[str, Any]) -> DomainResult:
    intervals = {name: None if record[name] is None else Interval(**record[name]) for name in INTERVALS}
    lists = {name: None if record[name] is None else tuple(record[name]) for name in ("scores", "right")}
    perturbed = record["perturbed"] and PerturbedResult(**record["perturbed"] | {"accuracy": Interval(**record["perturbed"]["accuracy"])})
    return DomainResult(**record | intervals | lists | {"perturbed": perturbed})
