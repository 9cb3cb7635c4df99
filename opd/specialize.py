"""Supervised fine-tuning on reference answers, then GRPO on grades (opd/grpo.py): one domain makes that domain's teacher, several together a base model.

The same engine, micro-batches and per-domain loss as distillation; the objective of the fine-tuning is the negative log-likelihood of the answer's tokens
and the closing end-of-sequence token. Steps are counted on from stage to stage, and checkpoints hold both. `slip_rate` trains a share of the examples on
the row's wrong answer instead, which is how the quickstart makes a base model that has a skill but not reliably (rollout/synthetic.py). `repair_rate`
trains a share on the answer with errors that are taken back (rollout/self_repair.py); the errors are context and leave the loss, so that the model learns
what comes after a mistake and not to make one. One random number decides for each example: no example is both, and the two rates add up to 1 at most.
"""

import random

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from opd.checkpoint import is_due, resume, save
from opd.config import SpecializeConfig
from opd.distributed import Group, num_ranks, rank, start_processes
from opd.engine import Engine
from opd.evaluator import Evaluator, evaluation_metrics
from opd.grpo import Grpo
from opd.metrics import data_metrics
from opd.run import finish_run, open_run
from opd.stopping import StopRequest
from opd.student import build_student, copy_for_sampling, load_student_tokenizer, seed_everything
from opd.tracker import Tracker
from opd.update import supervised_update
from rollout.chat import encode_answer, encode_repaired
from rollout.config import schedule_value, schedule_values
from rollout.model import context_length, end_tokens
from rollout.prompts import PromptMixture, load_prompts, require_answers, require_no_overlap
from rollout.sampler import LocalSampler
from rollout.types import Prompt, Rollout, completed


def specialize(cfg: SpecializeConfig) -> None:
    """Fine-tune one model on the reference answers of the selected domains, then train it on the grades of its own."""
    device = start_processes(cfg.launch.timeout_minutes)
    seed_everything(cfg.seed)
    tokenizer = load_student_tokenizer(cfg.student)
    student = build_student(cfg.student, tokenizer, cfg.quant)
    stages = Stages(cfg, student, tokenizer, device)
    evaluator = Evaluator(cfg, student, tokenizer, teachers=None)
    engine = Engine(student, len(tokenizer), cfg, device)
    run_dir = open_run(cfg, "specialize")

    with Tracker(run_dir, "specialize", cfg) as tracker, StopRequest(cfg) as stop:
        first = resume(run_dir, engine, stages, tracker)
        if first == 0:
            tracker.log(0, data_metrics(stages.prompts) | evaluation_metrics(evaluator.evaluate(stages.sampler, engine)))
        for step in range(first, cfg.total_steps):
            if step < cfg.num_steps:
                with tracker.timer("data"):
                    batch = stages.examples.next(step)
                with tracker.timer("update"):
                    metrics = supervised_update(engine, batch, cfg)
            else:
                metrics = stages.grpo.step(step, engine, tracker)
            if is_due(step + 1, cfg.evaluation.every):
                metrics |= evaluation_metrics(evaluator.evaluate(stages.sampler, engine))
            tracker.log(step + 1, metrics)
            if stop.is_due(step + 1) or is_due(step + 1, cfg.checkpoint.every, cfg.total_steps):
                save(run_dir, step + 1, engine, stages, cfg.checkpoint)
                stop.leave(step + 1)
    finish_run(run_dir, engine, tokenizer)


class Stages:
    """What the two stages learn from, resumable together.

    examples: of the fine-tuning; None where the run is GRPO alone. grpo: None where the run has none. sampler: for evaluation, and the rollouts of GRPO
    unless others draw them. prompts: those that the run begins with.
    """

    def __init__(self, cfg: SpecializeConfig, student: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, device: torch.device):
        """Raises ValueError for what either stage would refuse."""
        is_grpo_alone = cfg.num_steps == 0 and cfg.grpo.num_steps > 0
        self.examples = None if is_grpo_alone else ExampleStream(cfg, tokenizer, context_length(student.config, "student"))
        self.grpo = Grpo(cfg, student, tokenizer, device) if cfg.grpo.num_steps else None
        if self.grpo is None:
            self.sampler = LocalSampler(copy_for_sampling(student, device, cfg.quant), end_tokens(student, tokenizer), cfg.seed, len(tokenizer))
        else:
            self.sampler = self.grpo.stream.sampler
        self.prompts = self.grpo.stream.prompts if is_grpo_alone else self.examples.mixture

    def state(self) -> dict:
        parts = [part for part in (self.examples, self.grpo) if part is not None]
        return {name: value for part in parts for name, value in part.state().items()}

    def restore(self, state: dict) -> None:
        """Raises ValueError where GRPO has begun already, and this run would fine-tune."""
        if self.grpo is not None:
            self.grpo.restore(state)
        elif "grpo" in state:
            raise ValueError("the checkpoint is from the midst of GRPO, which this run does not do: set grpo.num_steps, or name its weights in student.model")
        if self.examples is not None:
            self.examples.restore(state)

    def forget_before(self, step: int) -> None:
        if self.grpo is not None:
            self.grpo.forget_before(step)


class ExampleStream:
    """Prompts with their answers as completions, step by step; resumable like a rollout stream."""

    def __init__(self, cfg: SpecializeConfig, tokenizer: PreTrainedTokenizerBase, context: int):
        """Raises ValueError for what `load_prompts` refuses, rows that overlap with held-out prompts, a row without an answer (or slip, or repaired text)
        that fits, and errors that are no whole tokens.
        """
        self.cfg, self.tokenizer = cfg, tokenizer
        self.longest = min(cfg.max_tokens, context)
        held_out = {name: domain.held_out for name, domain in cfg.domains.items()}
        prompts = load_prompts({name: domain.prompts for name, domain in cfg.domains.items()}, tokenizer, self.longest - 1, held_out)
        require_no_overlap(prompts)
        require_answers(prompts, prompts, "learn from")
        for field in ["answer"] + ["slip"] * any(schedule_values(cfg.slip_rate)) + ["repaired"] * any(schedule_values(cfg.repair_rate)):
            for name, domain in prompts.items():
                for source, rows in domain.sources.items():
                    self._check(rows, field, f"{name}/{source}")
        self.mixture = PromptMixture(prompts, cfg.examples_per_step, cfg.seed)

    def next(self, step: int) -> list[Rollout]:
        """This rank's examples of a step."""
        rows = self.mixture.next_rows(step)[rank(Group.data) :: num_ranks(Group.data)]
        slip_rate = schedule_value(self.cfg.slip_rate, step, "slip_rate")
        repair_rate = schedule_value(self.cfg.repair_rate, step, "repair_rate")
        return [self._example(prompt, row, slip_rate, repair_rate) for prompt, row in rows]

    def state(self) -> dict:
        return {"prompts": self.mixture.state()}

    def restore(self, state: dict) -> None:
        self.mixture.restore(state["prompts"])

    def forget_before(self, step: int) -> None:
        """Nothing is kept: the examples of a step follow from its number."""

    def _check(self, rows: list[dict], field: str, where: str) -> None:
        missing = [row["index"] for row in rows if row.get(field) is None]
        if missing and field == "repaired":
            raise ValueError(f"row {where}:{missing[0]} has no repaired text, which synthetic domains with a backspace have alone: set repair_rate=0")
        if missing:
            raise ValueError(f"row {where}:{missing[0]} has no {field}: set slip_rate=0, or map the column with prompts.columns.{field}")
        if field == "repaired":
            for row in rows:
                encode_repaired(row[field], self.tokenizer, f"{where}:{row['index']}")
        texts = [row[field].text if field == "repaired" else row[field] for row in rows]
        encoded = self.tokenizer(texts, add_special_tokens=False)["input_ids"]
        for row, tokens in zip(rows, encoded, strict=True):
            length = len(row["tokens"]) + len(tokens) + 1
            if length > self.longest:
                name = "repaired text" if field == "repaired" else field
                raise ValueError(f"row {where}:{row['index']} has {length} tokens with its {name}, more than {self.longest}: raise max_tokens or shorten it")

    def _example(self, prompt: Prompt, row: dict, slip_rate: float, repair_rate: float) -> Rollout:
        chance = random.Random(f"{self.cfg.seed}/slip/{prompt.request}").random()
        if slip_rate <= chance < slip_rate + repair_rate:
            return completed(prompt, *encode_repaired(row["repaired"], self.tokenizer, f"{prompt.domain}/{prompt.row}"))
        return completed(prompt, encode_answer(row["slip"] if chance < slip_rate else row["answer"], self.tokenizer))
