"""The cache of evaluations: what is measured again, and what is not."""

from dataclasses import replace

import pytest
import torch

from opd.config import DistillConfig, EvaluationConfig
from opd.evaluation_cache import EvaluationCache
from opd.evaluator import Evaluator
from rollout.config import HeldOutConfig, PerturbationConfig, PromptsConfig
from rollout.sampler import LocalSampler
from teachers.config import DomainConfig, TeacherConfig, TeachersConfig
from teachers.pool import TeacherPool


@pytest.fixture
def cfg(teacher_folders) -> DistillConfig:
    domains = {
        name: DomainConfig(
            teacher=TeacherConfig(model=str(teacher_folders["v4"])),
            prompts=PromptsConfig(path="synthetic:tools", rows=8),
            held_out=HeldOutConfig(path="synthetic:tools", split="held_out", rows=6),
            grader=grader,
        )
        for name, grader in (("law", "exact"), ("code", None))
    }
    return DistillConfig(domains=domains, evaluation=EvaluationConfig(every=1, max_new_tokens=3, decode_width=8))


@pytest.fixture
def make(session_v4_model, tokenizer, device):
    """make(cfg): an evaluator that counts what it measures, and a sampler."""

    def build(cfg: DistillConfig, seed: int = 0):
        evaluator = Evaluator(cfg, session_v4_model, tokenizer, TeacherPool(cfg.domains, TeachersConfig(), tokenizer, device))
        evaluator.measured = []
        original = evaluator.evaluate_domain

        def counted(name, *arguments):
            evaluator.measured.append(name)
            return original(name, *arguments)

        evaluator.evaluate_domain = counted
        return evaluator, LocalSampler(session_v4_model, [tokenizer.eos_token_id], seed, len(tokenizer))

    return build


NAMES = ["law", "code"]


def test_what_was_measured_is_the_same_from_the_cache_and_not_measured_again(cfg, make, tmp_path):
    evaluator, sampler = make(cfg)
    first = EvaluationCache(str(tmp_path)).results(evaluator, sampler, NAMES)
    assert evaluator.measured == NAMES
    assert EvaluationCache(str(tmp_path)).results(evaluator, sampler, NAMES) == first
    assert evaluator.measured == NAMES
    assert first["law"].kl_per_sequence.value > 0
    assert first["code"].accuracy is None


def test_what_a_perturbation_leaves_is_the_same_from_the_cache(cfg, make, tmp_path):
    domain = replace(cfg.domains["law"], perturbation=PerturbationConfig(rate=0.5, alphabet=["1", "2"]))
    evaluator, sampler = make(replace(cfg, domains={"law": domain}))
    first = EvaluationCache(str(tmp_path)).results(evaluator, sampler, ["law"])
    assert first["law"].perturbed.rate == 0.5
    assert EvaluationCache(str(tmp_path)).results(evaluator, sampler, ["law"]) == first


def test_without_a_folder_everything_is_measured(cfg, make):
    evaluator, sampler = make(cfg)
    for _ in range(2):
        EvaluationCache(None).results(evaluator, sampler, NAMES)
    assert evaluator.measured == NAMES * 2


@pytest.mark.parametrize("changed", ["weights", "seed", "prompts", "grader", "length", "teacher", "divergence", "perturbation"])
def test_whatever_a_result_follows_from_makes_it_measured_again(cfg, make, tmp_path, changed, teacher_folders, session_v4_model):
    evaluator, sampler = make(cfg)
    EvaluationCache(str(tmp_path)).results(evaluator, sampler, ["law"])
    domain, evaluation, seed = cfg.domains["law"], cfg.evaluation, int(changed == "seed")
    if changed == "prompts":
        domain = replace(domain, held_out=replace(domain.held_out, rows=5))
    elif changed == "grader":
        domain = replace(domain, grader="backspace")
    elif changed == "perturbation":
        domain = replace(domain, perturbation=PerturbationConfig(rate=0.5, alphabet=["1", "2"]))
    elif changed == "teacher":
        domain = replace(domain, teacher=TeacherConfig(model=str(teacher_folders["qwen3_moe"])))
    elif changed == "length":
        evaluation = replace(evaluation, max_new_tokens=4)
    other, other_sampler = make(replace(cfg, domains={"law": domain}, evaluation=evaluation), seed)
    weight = session_v4_model.get_output_embeddings().weight
    before = weight.detach().clone()
    try:
        if changed == "weights":
            with torch.no_grad():
                weight[0, 0] += 1
        EvaluationCache(str(tmp_path)).results(other, other_sampler, ["law"], with_kl=changed != "divergence")
    finally:
        with torch.no_grad():
            weight.copy_(before)
    assert other.measured == ["law"]
