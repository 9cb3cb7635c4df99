"""The warm-up before distillation: the student learns to answer as the teachers do, from their own answers.

Reverse KL moves only what the student itself samples. Where it never begins an answer as its teacher would, there is nothing to move, and the teacher's
opinion of what it does sample says little (opd/signal_check.py finds such domains). So each teacher answers some of its domain's training prompts, once,
with the rollouts' sampling settings, and the student is trained on these answers as `opd specialize` trains on reference answers: every
update holds as many of each domain, and each domain weighs the same, since nothing is known of loss weights before step 0. Answers are neither graded
nor filtered, because what distillation needs is the teacher's support, mistakes included.

Distillation then begins as in a run that started from the warmed-up weights: step 0, a new optimizer state and learning-rate schedule, routing
compared with that of now, and a prompt stream that has not moved (prompts and random numbers of the warm-up have keys of their own). The moments of
another objective were not kept: they would move the student for the first dozens of steps.

A warm-up that is over is saved as the checkpoint of step 0, after RUN/warmup.json, {"schema": 1, "metrics": {...}}, which holds the figures that step 0
logs. A run that is killed before that begins the warm-up anew, and one that is resumed from it has the same record of step 0.
"""

import json
import logging
import random
import time
from dataclasses import replace
from pathlib import Path

from opd.checkpoint import save
from opd.config import DistillConfig
from opd.distributed import Group, gather_objects, is_main, num_ranks, rank
from opd.engine import Engine
from opd.evaluator import Evaluator
from opd.rollouts import FirstRequest
from opd.run import is_new_run
from opd.start_config import WarmupKind
from opd.teacher_answers import sample_teacher
from opd.update import supervised_update
from rollout.files import read_json, replace_text
from rollout.grading import grade_rollout
from rollout.stream import RolloutStream
from rollout.types import Rollout

SCHEMA = 1

LOG = logging.getLogger(__name__)


def warm_up(run_dir: Path, cfg: DistillConfig, engine: Engine, stream: RolloutStream, evaluator: Evaluator, metrics: dict[str, float]) -> dict[str, float]:
    """Warm the student up where the run asks for it and has not done it; returns `metrics` with those of the warm-up. Every rank calls it at step 0."""
    if cfg.warmup.kind is WarmupKind.none:
        return metrics
    record = run_dir / "warmup.json"
    if not is_new_run(cfg):
        return read_json(record)["metrics"]
    begun = time.monotonic()
    answers, figures = teacher_answers(cfg, stream, evaluator)
    trained = _train(cfg, engine, answers)
    metrics = metrics | figures | trained | {"warmup/steps": cfg.warmup.steps, "warmup/seconds": time.monotonic() - begun}
    LOG.info("warm-up: %d updates on the teachers' answers of %s, %.0f s", cfg.warmup.steps, ", ".join(answers), time.monotonic() - begun)
    if is_main():
        replace_text(record, json.dumps({"schema": SCHEMA, "metrics": metrics}, indent=2) + "\n")
    save(run_dir, 0, engine, stream, cfg.checkpoint, evaluator.teachers)
    return metrics


def teacher_answers(cfg: DistillConfig, stream: RolloutStream, evaluator: Evaluator) -> tuple[dict[str, list[Rollout]], dict[str, float]]:
    """(all ranks' answers of each domain's teacher, in the order of the prompts; their metrics); one teacher at a time. Every rank calls it."""
    teachers, tokenizer, chosen = evaluator.teachers, evaluator.tokenizer, cfg.warmup.domains or list(cfg.domains)
    answers, metrics = {}, {}
    for name in sorted(chosen, key=lambda name: teachers.teacher_of[name]):
        first = FirstRequest.warmup + list(cfg.domains).index(name) * cfg.warmup.prompts
        prompts = stream.prompts.choose(name, cfg.warmup.prompts, "warmup", first)
        own = sample_teacher(name, prompts, cfg, evaluator)
        answers[name] = sorted((answer for part in gather_objects(own, Group.data) for answer in part), key=lambda answer: answer.prompt.request)
        metrics[f"warmup/{name}/truncated"] = sum(not answer.finished for answer in answers[name]) / len(prompts)
        metrics[f"warmup/{name}/teacher_length"] = sum(len(answer.completion_T) for answer in answers[name]) / len(prompts)
        grader = cfg.domains[name].grader
        if grader is not None:
            metrics[f"warmup/{name}/accuracy"] = sum(grade_rollout(grader, answer, tokenizer) for answer in answers[name]) / len(prompts)
    return answers, metrics


def _train(cfg: DistillConfig, engine: Engine, answers: dict[str, list[Rollout]]) -> dict[str, float]:
    """Train on the answers; returns the loss per token of each domain before the first and the last update."""
    equal = replace(cfg, domains={name: replace(cfg.domains[name], loss_weight=1.0) for name in answers})
    metrics, tokens = {}, 0
    engine.begin_schedule(cfg.warmup.steps)
    for step in range(cfg.warmup.steps):
        examples = _examples(cfg, answers, step)
        tokens += sum(example.num_loss_tokens for example in examples)
        found = supervised_update(engine, examples[rank(Group.data) :: num_ranks(Group.data)], equal)
        losses = {name.split("/")[1]: value for name, value in found.items() if name.endswith("/loss_per_token")}
        metrics = {f"warmup/{name}/first_loss": value for name, value in losses.items()} | metrics  # of the first update that has the domain
        metrics |= {f"warmup/{name}/last_loss": value for name, value in losses.items()}
    engine.begin_schedule(cfg.num_steps)
    return metrics | {"warmup/tokens": tokens}


def _examples(cfg: DistillConfig, answers: dict[str, list[Rollout]], step: int) -> list[Rollout]:
    """One update's examples over all ranks: the domains take turns, each in shuffled epochs of its own."""
    names, count = list(answers), cfg.warmup.examples_per_step or cfg.rollout.prompts_per_step
    examples = []
    for slot in range(step * count, (step + 1) * count):
        name = names[slot % len(names)]
        epoch, place = divmod(slot // len(names), len(answers[name]))
        order = random.Random(f"{cfg.seed}/warmup/{name}/{epoch}").sample(range(len(answers[name])), len(answers[name]))
        examples.append(answers[name][order[place]])
    return examples
