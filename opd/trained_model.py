"""Student and loss in one module, which DeepSpeed wraps (opd/engine.py).

A partitioned model (ZeRO-3) gathers the head like any other parameter inside the wrapped forward, and its gradient returns through autograd.

B: rows. L: positions. N: completion tokens of the micro-batch, flattened. M: layers with routed experts. K: experts of a token.
"""

from dataclasses import replace

import torch
from torch import nn
from transformers import PreTrainedModel

from opd.batch import MicroBatch
from opd.config import StudentConfig
from opd.divergence import ModelStates
from opd.estimators import GradedTokens, cross_entropy, distillation_loss, grpo_loss, signal_of, student_states
from opd.grpo_config import GrpoConfig
from opd.likeliest import compare, every_sixteenth, likeliest_at_worst
from opd.loss_config import LossConfig
from opd.route_replay import RouteReplay
from opd.routing import RoutingRecorder
from opd.tiles import Targets, TokenLosses
from rollout.model import logit_transform
from teachers.types import OutputHead


class TrainedModel(nn.Module):
    """Student and loss in one module: micro-batch (and teacher head) -> weighted loss, per-token losses."""

    def __init__(
        self,
        model: PreTrainedModel,
        vocab_size: int,
        cfg: StudentConfig,
        loss: LossConfig,
        sampling_temperature: float | None,
        grpo: GrpoConfig | None = None,
    ):
        """sampling_temperature: at which the student's log-probability of its own tokens is wanted; None: it is not. grpo: for micro-batches of GRPO."""
        super().__init__()
        self.grpo = grpo
        self.model, self.vocab_size, self.loss, self.sampling_temperature = model, vocab_size, loss, sampling_temperature
        self.balance_loss, self.replay = cfg.router_balance_loss, RouteReplay(model, cfg.replay_routes)
        self.transform = logit_transform(model.config, "student")
        self.recorder = RoutingRecorder(model)

    def forward(self, batch: MicroBatch, teacher_head: OutputHead | None, balance_scale: float) -> tuple[torch.Tensor, TokenLosses]:
        signal = signal_of(batch, teacher_head)
        student = self.states(batch, replays=batch.is_sampled)
        if batch.routes_NMK is not None and batch.is_sampled:
            self.recorder.compare(batch.routes_NMK, batch.position_N, batch.mask_N & (not batch.is_filler), self.replay.own)
        if batch.advantage_N is not None:
            graded = GradedTokens(batch.target_N, batch.sampled_logprob_N, batch.advantage_N)
            loss, losses = grpo_loss(student, signal, graded, batch.weight_N, self.grpo, self.vocab_size)
        elif signal is None:
            loss, losses = cross_entropy(student, batch.target_N, batch.weight_N, self.vocab_size)
        else:
            sampled = Targets(batch.target_N, self.sampling_temperature)
            loss, losses = distillation_loss(student, signal, sampled, batch.weight_N, self.loss, self.vocab_size)
            if batch.is_inspected:
                loss_N = losses.loss_N.masked_fill(~batch.mask_N, -torch.inf)
                losses = replace(losses, likeliest=likeliest_at_worst(student, signal, loss_N, batch.rollout_N, batch.target_N, self.vocab_size))
            if batch.is_compared:
                losses = replace(losses, compared=compare(student, signal, every_sixteenth(batch), batch.target_N, self.vocab_size))
        self.recorder.count(batch.real_BL & (not batch.is_filler))  # nothing of a filler, on a rank that may have nothing else
        if self.balance_loss:
            loss = loss + self.balance_loss * balance_scale * self.recorder.balance_loss(batch.counted_BL)
        return loss, losses

    def states(self, batch: MicroBatch, replays: bool = False) -> ModelStates:
        """The student's states that predict the completion tokens, with the sampler's routes where asked to and where the run replays any."""
        self.replay.set(batch if replays else None)
        return student_states(self.model, batch, self.transform)
