"""Steps of other systems for `opd bench step`, as a person would make them with what they ship.

    trl        trl.DistillationTrainer with a local teacher (trl 1.16.0): its own loop, in one process. beta 1 is reverse KL. bfloat16 and gradient
               checkpointing, its defaults, are off: the others compute in float32, and keep their activations.
    deepspeed  the loop of DeepSpeedExamples' training/opsd with the parts that deepspeed 0.19.8 ships: HybridEngineRollout over a ZeRO engine,
               ResponseTokenBatch, generalized_jsd_loss with beta 1. The teacher's logits stay in float32 and in memory, which is faster than the cache in
               bfloat16 of that example. Its rollout decodes up to the limit whatever has ended, so that all ranks make equally many forwards.

TRL with a DeepSpeed configuration does not engage DeepSpeed on a CPU, and is therefore no contender at ZeRO 2 and 3.

The time of a step is taken by the bench, from its asking to the last rank's answer. TRL's begins and ends where its trainer has updated the weights.
"""

import time
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, TrainerCallback

from opd.bench_step_problem import BETAS, CLIP_NORM, EPSILON, Problem, outcome_of
from opd.distributed import Group, num_ranks, rank, reduce_sum
from opd.engine import leave_out_shared_memory_op

if TYPE_CHECKING:
    from opd.bench_step_worker import Baton

MANY = 1000
"""Steps of an epoch: none ends while it is measured."""


def run_trl(problem: Problem, _stage: int, baton: "Baton") -> None:
    """Train until the bench has enough."""
    from trl import DistillationConfig, DistillationTrainer

    folder = Path(problem.folder)
    arguments = DistillationConfig(
        output_dir=str(folder / "run-trl"), use_cpu=True, bf16=False, gradient_checkpointing=False, report_to="none", save_strategy="no", disable_tqdm=True,
        per_device_train_batch_size=problem.prompts_per_step, max_completion_length=problem.max_new_tokens, beta=1.0, shuffle_dataset=False,
        learning_rate=problem.lr, lr_scheduler_type="constant", adam_beta1=BETAS[0], adam_beta2=BETAS[1], adam_epsilon=EPSILON,
        max_grad_norm=CLIP_NORM, max_steps=MANY, seed=problem.seed,
    )  # fmt: skip
    tokenizer = AutoTokenizer.from_pretrained(folder / "student", padding_side="left")

    class Trainer(DistillationTrainer):
        """Keeps what a step's loss was."""

        def training_step(self, *inputs, **named) -> torch.Tensor:
            self.step_loss = super().training_step(*inputs, **named)
            return self.step_loss

    trainer = Trainer(
        model=_load(folder / "student"), teacher_model=_load(folder / "teacher"), args=arguments, processing_class=tokenizer,
        train_dataset=[{"prompt": text} for text in problem.texts() * MANY],
    )  # fmt: skip
    trainer.add_callback(_TellSteps(trainer, baton, tokenizer.eos_token_id))
    trainer.train()


class _TellSteps(TrainerCallback):
    """Stops the trainer between two steps until the bench asks for one."""

    def __init__(self, trainer, baton: "Baton", end_token: int):
        self.trainer, self.baton, self.end_token = trainer, baton, end_token

    def on_train_begin(self, _arguments, _state, control, **_others) -> None:
        self.baton.ready()
        control.should_training_stop = not self.baton.wait()

    def on_step_end(self, _arguments, _state, control, **_others) -> None:
        [batch] = self.trainer._buffered_inputs
        self.baton.tell(outcome_of(batch["completion_ids"].tolist(), self.end_token, float(self.trainer.step_loss)))
        control.should_training_stop = not self.baton.wait()


def run_deepspeed(problem: Problem, stage: int, baton: "Baton") -> None:
    """Train until the bench has enough."""
    import deepspeed
    from deepspeed.runtime.rollout import HybridEngineRollout, RolloutRequest, SamplingConfig

    torch.manual_seed(problem.seed + rank(Group.data))
    leave_out_shared_memory_op()
    folder = Path(problem.folder)
    student, teacher = _load(folder / "student"), _load(folder / "teacher").eval().requires_grad_(False)
    settings = {
        "train_micro_batch_size_per_gpu": 1, "zero_allow_untested_optimizer": True, "zero_force_ds_cpu_optimizer": False, "gradient_clipping": CLIP_NORM,
        "zero_optimization": {"stage": stage},
    }  # fmt: skip
    optimizer = torch.optim.AdamW(student.parameters(), lr=problem.lr, betas=BETAS, eps=EPSILON, weight_decay=0.0)
    engine, *_ = deepspeed.initialize(model=student, optimizer=optimizer, config=settings, dist_init_required=False)
    tokenizer = AutoTokenizer.from_pretrained(folder / "student", padding_side="left")
    rollout = HybridEngineRollout(engine, tokenizer)
    sampling = SamplingConfig(max_new_tokens=problem.max_new_tokens, temperature=1.0)
    texts = problem.texts()[rank(Group.data) :: num_ranks(Group.data)]
    baton.ready()
    while baton.wait():
        begun = time.perf_counter()
        engine.eval()
        prompts = tokenizer(texts, padding=True, return_tensors="pt")
        rolled = rollout.generate(RolloutRequest(prompts["input_ids"], prompts["attention_mask"]), sampling)
        sampled = time.perf_counter() - begun
        loss = _learn(engine, teacher, rolled)
        start = int(rolled.response_start_idx[0])
        baton.tell(outcome_of(rolled.input_ids[:, start:].tolist(), tokenizer.eos_token_id, loss, sampled))


def _learn(engine, teacher: PreTrainedModel, rolled) -> float:
    """One update of DeepSpeed's engine; returns the loss, a mean over the ranks' means."""
    from deepspeed.runtime.rollout import ResponseTokenBatch, generalized_jsd_loss

    batch = ResponseTokenBatch.from_rollout(rolled)
    inputs = {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask, "use_cache": False}
    with torch.no_grad():
        teacher_logits = batch.select_causal_logits(teacher(**inputs).logits)
    engine.train()
    logits = batch.select_causal_logits(engine(**inputs).logits)
    loss = generalized_jsd_loss(logits, teacher_logits, batch.response_mask, beta=1.0).loss
    engine.backward(loss)
    engine.step()
    return float(reduce_sum(loss.detach(), Group.data)) / num_ranks(Group.data)


def _load(folder: Path) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
