"""A run that goes on without a domain: what is trained on and evaluated is as if the domain had never been there, on every rank."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from opd.config import DistillConfig, EvaluationConfig
from opd.evaluator import Evaluator, evaluation_metrics
from opd.loss_config import DivergenceKind, LossConfig
from opd.update import update
from rollout.config import HeldOutConfig, PromptsConfig
from rollout.model import save_model
from rollout.replay import replay_file, save_rollouts
from rollout.sampler import LocalSampler
from rollout.types import Rollout
from teachers.config import DomainConfig, OnFailure, TeacherConfig, TeachersConfig
from teachers.pool import TeacherPool

PLAIN_ADAM = {"lr": 1.0, "eps": 1.0, "clip_norm": None}
"""With eps 1 the first update is g / (|g| + 1), a smooth function of the gradient, so that equal updates mean equal gradients."""


@pytest.fixture(scope="session")
def nan_teacher(new_student, tokenizer, tmp_path_factory) -> str:
    model = new_student("qwen3_moe_tiny", seed=2)
    with torch.no_grad():
        model.model.norm.weight.fill_(torch.nan)
    folder = tmp_path_factory.mktemp("nan") / "model"
    save_model(folder, model, tokenizer, model.state_dict())
    return str(folder)


@pytest.fixture
def domains(teacher_folders, nan_teacher) -> dict[str, DomainConfig]:
    """law and math with sound teachers, code with one that gives NaN; two held-out prompts each."""
    sources = {"prompts": PromptsConfig(path="synthetic:tools", rows=8), "held_out": HeldOutConfig(path="synthetic:tools", split="held_out", rows=2)}
    models = {"law": teacher_folders["v4"], "code": nan_teacher, "math": teacher_folders["qwen3_moe"]}
    weights = {"law": 0.5, "code": 0.3, "math": 0.2}
    return {name: DomainConfig(teacher=TeacherConfig(model=str(models[name])), loss_weight=weights[name], **sources) for name in models}


@pytest.fixture
def new_pool(tokenizer, device) -> Callable[..., TeacherPool]:
    def make(domains: dict[str, DomainConfig]) -> TeacherPool:
        return TeacherPool(domains, TeachersConfig(on_failure=OnFailure.drop, max_resident=2), tokenizer, device)

    return make


@pytest.fixture
def rollouts(random_rollouts) -> list[Rollout]:
    return random_rollouts([("law", 3, 9), ("code", 9, 2), ("math", 6, 4), ("code", 2, 12), ("law", 12, 1), ("math", 5, 5), ("code", 4, 3)])


def without_code(domains: dict[str, DomainConfig]) -> dict[str, DomainConfig]:
    return {name: domain for name, domain in domains.items() if name != "code"}


def trained(engine, pool: TeacherPool, rollouts: list[Rollout], cfg: DistillConfig) -> tuple[dict[str, float], dict[str, torch.Tensor]]:
    return update(engine, pool, pool.score(rollouts), cfg), engine.full_weights()


@pytest.mark.parametrize("kind", [DivergenceKind.reverse_kl, DivergenceKind.forward_kl])
def test_the_update_is_that_of_a_run_without_the_domain(kind, v4_model, new_pool, make_engine, make_config, domains, rollouts):
    found = []
    for chosen in (domains, without_code(domains)):
        cfg = make_config(chosen, optim=PLAIN_ADAM, max_tokens=40, loss=LossConfig(kind=kind))
        found.append(trained(make_engine(v4_model, cfg), new_pool(chosen), [r for r in rollouts if r.prompt.domain in chosen], cfg))
    (metrics, weights), (expected, other_weights) = found
    assert metrics["step/loss"] == expected["step/loss"]
    assert [metrics[f"domain/{name}/loss_weight"] for name in domains] == pytest.approx([0.5 / 0.7, 0.0, 0.2 / 0.7])
    assert "domain/code/kl_per_token" not in metrics
    assert all(torch.equal(weights[name], other_weights[name]) for name in weights)


def test_evaluation_goes_on_without_the_divergence_of_a_dropped_domain(session_v4_model, new_pool, domains, rollouts, tokenizer):
    """Its accuracy is the student's own and stays."""
    cfg = DistillConfig(domains=domains, evaluation=EvaluationConfig(every=1, max_new_tokens=4, decode_width=2))
    pool = new_pool(domains)
    evaluator = Evaluator(cfg, session_v4_model, tokenizer, pool)
    sampler = LocalSampler(session_v4_model, [tokenizer.eos_token_id], 0, len(tokenizer))
    for _ in range(2):  # once where the teacher fails in the evaluation, once where it has failed before
        metrics = evaluation_metrics(evaluator.evaluate(sampler))
        assert {name for name in domains if f"evaluation/{name}/kl_per_token" in metrics} == {"law", "math"}
        assert all(f"evaluation/{name}/truncated" in metrics for name in domains)
    assert list(pool.dropped) == ["code"]


@pytest.mark.parametrize("order", [1, -1])
def test_one_resident_teacher_gives_the_update_of_all_whatever_the_order_of_the_rollouts(
    order, v4_model, make_engine, make_config, domains, rollouts, tokenizer, device
):
    sound = [rollout for rollout in rollouts if rollout.prompt.domain != "code"][::order]
    found = []
    for settings in ({"max_resident": 1, "prefetch": False}, {"max_resident": 1}, {"max_resident": 2}):
        cfg = make_config(without_code(domains), optim=PLAIN_ADAM, max_tokens=20)
        pool = TeacherPool(without_code(domains), TeachersConfig(**settings), tokenizer, device)
        found.append(trained(make_engine(v4_model, cfg), pool, sound, cfg))
    for metrics, weights in found[:-1]:
        assert metrics["step/loss"] == found[-1][0]["step/loss"]
        assert all(torch.equal(weights[name], found[-1][1][name]) for name in weights)


SCRIPT = """
import json, sys
from pathlib import Path

from opd.config import BatchConfig, DistillConfig, EvaluationConfig, OptimConfig, StudentConfig
from opd.job_config import LoggerConfig, LoggerKind
from opd.distributed import start_processes
from opd.engine import Engine
from opd.evaluator import Evaluator, evaluation_metrics
from opd.loss_config import DivergenceKind, LossConfig
from opd.rollouts import data_ranks
from opd.student import build_student
from opd.update import update
from rollout.config import HeldOutConfig, ModelConfig, PromptsConfig
from rollout.model import load_model, load_tokenizer
from rollout.replay import load_rollouts
from rollout.sampler import LocalSampler
from teachers.config import DomainConfig, OnFailure, TeacherConfig, TeachersConfig
from teachers.pool import TeacherPool

given = json.load(open(sys.argv[1]))
device, ranks = start_processes(2.0), data_ranks()
tokenizer = load_tokenizer(given["student"])
sources = dict(prompts=PromptsConfig(path="synthetic:tools", rows=8), held_out=HeldOutConfig(path="synthetic:tools", split="held_out", rows=1))
domains = {name: DomainConfig(teacher=TeacherConfig(model=model), loss_weight=given["weights"][name], **sources) for name, model in given["teachers"].items()}
rollouts = load_rollouts(Path(given["rollouts"]))
own = [[r for r in rollouts if r.prompt.domain != "code"], [r for r in rollouts if r.prompt.domain == "code"]][ranks.index]
for stage in (1, 3):
    cfg = DistillConfig(
        domains=domains, deepspeed={"zero_optimization": {"stage": stage}}, optim=OptimConfig(warmup_steps=0, lr=1e-3),
        batch=BatchConfig(max_tokens_per_micro_batch=40), logger=LoggerConfig(kind=LoggerKind.none), loss=LossConfig(kind=DivergenceKind.forward_kl),
        evaluation=EvaluationConfig(every=1, max_new_tokens=4, decode_width=2),
    )
    student = build_student(StudentConfig(model=given["student"]), tokenizer)
    sampler = LocalSampler(load_model(ModelConfig(model=given["student"]), "student"), [tokenizer.eos_token_id], 0, len(tokenizer))
    cfg.teachers = TeachersConfig(on_failure=OnFailure.drop, max_resident=1, gradient_share_every=1)
    pool = TeacherPool(domains, cfg.teachers, tokenizer, device, ranks)
    evaluator = Evaluator(cfg, student, tokenizer, pool)
    engine = Engine(student, len(tokenizer), cfg, device)
    metrics = update(engine, pool, pool.score(own), cfg)
    evaluated = evaluation_metrics(evaluator.evaluate(sampler))
    names = [name for name in sorted(metrics | evaluated) if "code" in name]
    Path(f"zero{stage}_rank{ranks.index}.json").write_text(json.dumps([metrics["step/loss"], metrics["optim/grad_norm"], list(pool.dropped), names]))
"""


@pytest.mark.slow
@pytest.mark.multi
def test_two_ranks_drop_a_domain_together_though_one_has_nothing_else(
    v4_model, saved_v4, new_pool, make_engine, make_config, domains, rollouts, tmp_path
):
    """The rank that has only the domain's rollouts never hangs the other, which does not see it fail; nor in an evaluation with fewer prompts than ranks."""
    file = replay_file(str(tmp_path), 0)
    save_rollouts(file, 0, rollouts)
    given = {"student": str(saved_v4), "teachers": {name: domain.teacher.model for name, domain in domains.items()}, "rollouts": str(file)}
    (tmp_path / "given.json").write_text(json.dumps(given | {"weights": {name: domain.loss_weight for name, domain in domains.items()}}))
    (tmp_path / "script.py").write_text(SCRIPT)
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "script.py", "given.json"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[2])}
    result = subprocess.run(launcher, capture_output=True, text=True, cwd=tmp_path, env=environment, timeout=1200)
    assert result.returncode == 0, result.stderr[-3000:]
    cfg = make_config(without_code(domains), optim={"lr": 1e-3}, max_tokens=40, loss=LossConfig(kind=DivergenceKind.forward_kl))
    alone = without_code(domains)
    expected, _ = trained(make_engine(v4_model, cfg), new_pool(alone), [r for r in rollouts if r.prompt.domain != "code"], cfg)
    found = [json.loads(file.read_text()) for file in tmp_path.glob("zero*.json")]
    assert len(found) == 4
    for loss, norm, dropped, names in found:
        assert loss == pytest.approx(expected["step/loss"], rel=1e-5)
        assert norm == pytest.approx(expected["optim/grad_norm"], rel=1e-4)
        assert dropped == ["code"]
        assert not [name for name in names if "kl_per" in name or "gradient_share" in name]
