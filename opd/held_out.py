"""The models of `opd evaluate` on held-out prompts: student and base on every domain, each teacher on its own; from the cache what was measured before."""

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from opd.comparison import DomainResult
from opd.config import EvaluateConfig
from opd.evaluation_cache import EvaluationCache
from opd.evaluator import Evaluator
from opd.rollouts import data_ranks
from rollout.model import end_tokens
from rollout.sampler import LocalSampler
from teachers.pool import TeacherPool


def build_evaluator(cfg: EvaluateConfig, student: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, device: torch.device) -> Evaluator:
    """With the teachers of the domains that have one and are not in `retention`. Raises ValueError where no domain could be evaluated."""
    with_teacher = {name: domain for name, domain in cfg.domains.items() if name not in cfg.retention}
    if cfg.run is not None:  # one that a run made its teacher of has none
        with_teacher = {name: domain for name, domain in with_teacher.items() if domain.teacher.model is not None}
    teachers = TeacherPool(with_teacher, cfg.teachers, tokenizer, device, data_ranks()) if with_teacher else None
    if teachers is not None:
        teachers.require_whole(teachers.configs)
    evaluator = Evaluator(cfg, student, tokenizer, teachers)
    if not evaluator.prompts:
        raise ValueError("no domain has held-out prompts: set domains.NAME.held_out.path")
    return evaluator


def results_of(cfg: EvaluateConfig, evaluator: Evaluator, model: PreTrainedModel, names: list[str], with_kl: bool = True) -> dict[str, DomainResult]:
    """A model on the named domains; every rank calls it."""
    sampler = LocalSampler(model, end_tokens(model, evaluator.tokenizer), cfg.seed, len(evaluator.tokenizer))
    return EvaluationCache(cfg.cache).results(evaluator, sampler, names, with_kl)


def teacher_results(cfg: EvaluateConfig, evaluator: Evaluator) -> dict[str, DomainResult]:
    """Each teacher on its domains; every rank calls it."""
    found, teachers = {}, evaluator.teachers
    for name in evaluator.prompts if teachers is not None else ():
        if name in teachers.teacher_of:
            found |= results_of(cfg, evaluator, teachers.get(teachers.teacher_of[name]).model, [name], with_kl=False)
    return found
