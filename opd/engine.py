"""The engine: DeepSpeed around the student and its loss. This is the only module that imports deepspeed.

The loss is part of the wrapped module (opd/trained_model.py). Micro-batches carry token weights that already divide by the step's global token count, so
DeepSpeed's own divisions are undone: no scaling by accumulation steps, and the loss is multiplied by the number of ranks over which DeepSpeed averages
gradients.

B: rows. L: positions. N: completion tokens of the micro-batch, flattened. D: hidden size. V: vocabulary.
"""

import math
import os
import pickle
import re
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from pathlib import Path

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("DS_ACCELERATOR", "cpu")  # DeepSpeed reads it when it is imported

import deepspeed
from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus
from deepspeed.utils import logger as deepspeed_logger
from torch import nn
from transformers import PreTrainedModel

from opd.batch import MicroBatch, require_packing
from opd.config import DistillConfig, OptimConfig, OptimizerKind, RunConfig, SpecializeConfig, rollout_settings
from opd.deepspeed_settings import deepspeed_settings, zero_stage
from opd.distributed import Group, is_main, num_ranks, rank, reduce_max, reduce_sum
from opd.divergence import full_divergence, with_temperature
from opd.divergence_passes import require_backend
from opd.estimators import cross_entropy
from opd.flops import model_flops
from opd.loss_config import LossConfig
from opd.optim import learning_rate_factor, parameter_groups, squared_norms
from opd.qat import ExpertQuantizer, code_metrics
from opd.quant_config import ExpertFormat
from opd.resharding import padding_loads
from opd.student import least_length
from opd.tiles import TokenLosses
from opd.trained_model import TrainedModel
from opd.zero3 import parts_of, restrict_linear_to_training
from rollout.errors import first_sentence
from rollout.indexer import indexer_recall
from rollout.model import backbone_of, head_of
from teachers.types import OutputHead


class Engine:
    """Forward, backward and update of the student under DeepSpeed; also the samplers' WeightSource."""

    def __init__(self, student: PreTrainedModel, vocab_size: int, cfg: RunConfig, device: torch.device):
        self.cfg, self.device = cfg, device
        self.model = student.to(device)
        model_flops(student)  # counts once, and not in the first step, whose seconds it would change
        loss, rollout = cfg.loss if isinstance(cfg, DistillConfig) else LossConfig(), rollout_settings(cfg)
        require_backend(loss.backend, device)
        temperature = None if rollout is None else rollout.comparable_temperature
        self.trained = TrainedModel(self.model, vocab_size, cfg.student, loss, temperature, cfg.grpo if isinstance(cfg, SpecializeConfig) else None)
        self.recorder = self.trained.recorder
        self.least_length = least_length(student.config)
        if cfg.batch.packing:
            require_packing(student.config.model_type)
        settings = deepspeed_settings(cfg, next(student.parameters()).dtype)
        self.zero_stage = zero_stage(cfg)
        is_quantized = cfg.quant.experts is ExpertFormat.mxfp4
        self.quantizer = ExpertQuantizer(self.model, self.zero_stage, cfg.student.gradient_checkpointing) if is_quantized else None
        groups = parameter_groups(self.model, cfg.optim)
        if not groups:
            raise ValueError("nothing in the student can be trained: every parameter is frozen")
        self.peak_rates = [cfg.optim.muon_lr if group.use_muon else cfg.optim.lr for group in groups]
        deepspeed_logger.setLevel("WARNING")
        leave_out_shared_memory_op()
        self.engine, *_ = deepspeed.initialize(model=self.trained, optimizer=_optimizer(groups, cfg.optim), config=settings, dist_init_required=False)
        if self.zero_stage == 3:
            restrict_linear_to_training()
            deepspeed.zero.register_external_parameter(self.trained, head_of(self.model).weight)
        self.groups = [group.parameters for group in groups]
        self.policy_step = 0
        self.set_schedule(cfg.num_steps)
        self.num_skipped, self.skipped_in_a_row = 0, 0

    def set_schedule(self, num_steps: int, first: int = 0, factor: float = 1.0) -> None:
        """Have the learning rates of the settings, times a factor, go through their schedule in the `num_steps` updates from policy_step `first` on."""
        self.num_steps, self.first_step, self.rate_factor = num_steps, first, factor

    def begin_schedule(self, num_steps: int, first: int = 0, factor: float = 1.0) -> None:
        """Forget all updates but for what they did to the weights: optimizer state 0, policy_step `first`, a learning-rate schedule (`set_schedule`) that
        begins, and routing to be compared with that of now.
        """
        for state in self.engine.optimizer.state.values():
            for name, value in state.items():
                state[name] = value.zero_() if isinstance(value, torch.Tensor) else 0
        self.policy_step = first
        self.set_schedule(num_steps, first, factor)
        self.num_skipped, self.skipped_in_a_row = 0, 0
        self.recorder.forget()

    def loss(self, batch: MicroBatch, teacher_head: OutputHead | None, is_last: bool, balance_scale: float = 0.0) -> tuple[torch.Tensor, TokenLosses]:
        """Weighted loss of one micro-batch (a scalar that carries gradients) and its per-token losses.

        is_last: this is the step's last micro-batch on this rank, whose backward reduces the gradients.
        balance_scale: 1 / (sequences of the step over all ranks), for the balance loss.
        """
        self.engine.set_gradient_accumulation_boundary(is_last)
        return self.engine(batch, teacher_head, balance_scale)

    def backward(self, loss: torch.Tensor) -> None:
        self.engine.backward(loss * num_ranks(Group.data), scale_wrt_gas=False)

    def step(self) -> dict[str, float]:
        """One optimizer update; returns learning rate, gradient norm before clipping, whether it was clipped, and update-to-weight ratio.

        Where the gradient is not finite, on any rank, all of them skip the update, which counts as a step: weights and optimizer state stay as they are, and
        `skipped_in_a_row` is above 0.
        """
        factor = self.rate_factor * learning_rate_factor(self.policy_step - self.first_step, self.num_steps, self.cfg.optim)
        for group, peak in zip(self.engine.optimizer.param_groups, self.peak_rates, strict=True):
            group["lr"] = peak * factor
        every = self.cfg.optim.update_ratio_every
        before = [tensor.clone() for tensor in self._master_weights()] if every and self.policy_step % every == 0 else None
        packed = self.quantizer.pack_share(self._gathered) if self.quantizer is not None and self.is_quantization_due() else None
        norm = self._update()
        is_skipped = not math.isfinite(norm)
        self.policy_step += 1
        self.num_skipped, self.skipped_in_a_row = self.num_skipped + is_skipped, self.skipped_in_a_row + 1 if is_skipped else 0
        metrics = {"optim/lr": self.cfg.optim.lr * factor} | ({"optim/skipped_steps": self.num_skipped} if self.cfg.optim.max_skipped_steps else {})
        if is_skipped:
            return metrics
        if self.quantizer is not None:
            self.quantizer.weights_changed()
        if packed is not None:
            metrics |= code_metrics(packed, self.quantizer.pack_share(self._gathered))
        if before is not None:
            metrics["optim/update_to_weight"] = self._update_to_weight(before)
        if self.cfg.optim.kind is OptimizerKind.muon:
            return metrics | {"optim/muon_lr": self.cfg.optim.muon_lr * factor}
        clip = self.cfg.optim.clip_norm
        return metrics | {"optim/grad_norm": norm, "optim/clipped": float(clip is not None and norm > clip)}

    def weights(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Full parameters and persistent buffers by name, as the forward multiplies them (quantised experts with their FP4 values), of which at most
        GATHERED_BYTES (or one) are gathered at a time; every rank has to walk it to the end.
        """
        for part in parts_of(self.model.named_parameters()):
            with self._gathered([parameter for _, parameter in part]):
                for name, parameter in part:
                    yield name, parameter.data if self.quantizer is None else self.quantizer.forward_value(name, parameter.data)
        parameters = {name for name, _ in self.model.named_parameters(remove_duplicate=False)}
        for name, tensor in self.model.state_dict(keep_vars=True).items():
            if name not in parameters:
                yield name, tensor.data

    def full_weights(self) -> dict[str, torch.Tensor]:
        """A copy of all weights on the CPU; every rank has to call it."""
        return {name: tensor.detach().to("cpu", copy=True) for name, tensor in self.weights()}

    def is_quantization_due(self) -> bool:
        """Whether the present step is one whose quantisation is measured."""
        every = self.cfg.quant.measure_every
        return (self.quantizer is not None or self.cfg.quant.indexer) and every > 0 and self.policy_step % every == 0

    def gradient(self, batch: MicroBatch, teacher_head: OutputHead | None) -> list[torch.Tensor]:
        """Gradient of one micro-batch's weighted loss on this rank by the trained parameters, zeros where one has none, apart from the optimizer's own.
        Not under ZeRO-3.
        """
        assert self.zero_stage < 3, "DeepSpeed's hooks would take it for the step's own backward"
        parameters = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        loss, _ = self.trained(batch, teacher_head, 0.0)
        found = torch.autograd.grad(loss, parameters, allow_unused=True)
        return [torch.zeros_like(parameter) if gradient is None else gradient for parameter, gradient in zip(parameters, found, strict=True)]

    @torch.no_grad()
    def expert_kl(self, batch: MicroBatch) -> torch.Tensor:
        """KL(student with unquantised experts || student) of each completion token of a micro-batch [N], in nats; every rank has to call it."""
        quantized = self.trained.states(batch)
        with self.quantizer.off():
            plain = self.trained.states(batch)
        with self._gathered([plain.head_VD]):
            exact = LossConfig(backend=self.trained.loss.backend)
            _, losses = full_divergence(plain, quantized, torch.ones_like(batch.weight_N), exact, self.trained.vocab_size)
        return losses.loss_N

    @torch.no_grad()
    def target_logprob(self, batch: MicroBatch) -> torch.Tensor:
        """The student's log-probability of each completion token [N] at the temperature that sampled it; every rank has to call it."""
        student = self.trained.states(batch, replays=True)
        student = replace(student, transform=with_temperature(student.transform, self.trained.sampling_temperature))
        with self._gathered([student.head_VD]):
            _, losses = cross_entropy(student, batch.target_N, batch.weight_N, self.trained.vocab_size)
        return -losses.loss_N

    @torch.no_grad()
    def indexer_matches(self, batch: MicroBatch) -> torch.Tensor:
        """int64 [2] on the CPU: entries that the FP4 indexer keeps as the unquantised one would, and their number (rollout/indexer.py); every rank has to
        call it.
        """
        with indexer_recall(self.model, batch.real_BL) as matches:
            self.trained.states(batch)
        return matches.cpu()

    def probe_routing(self, batch: MicroBatch) -> dict[str, float]:
        """Share of routing decisions unchanged since the first call (opd/routing.py); every rank has to call it."""
        self.trained.replay.set(None)
        return self.recorder.probe(backbone_of(self.model), batch.tokens_BL.to(self.device), batch.real_BL)

    def save(self, folder: Path, tag: str) -> list[str]:
        """DeepSpeed's checkpoint of weights, optimizer and routing under `folder/tag`; every rank has to call it. Returns the names of this rank's files."""
        buffers = {name: tensor.clone() for name, tensor in self.model.named_buffers()}
        state = {"policy_step": self.policy_step, "skipped": (self.num_skipped, self.skipped_in_a_row), "routing": self.recorder.state(), "buffers": buffers}
        self.engine.save_checkpoint(str(folder), tag=tag, client_state={"opd": state}, save_latest=False)
        ranks = {path.name: re.search(r"pp_rank_(\d+)_", path.name) for path in (folder / tag).iterdir()}  # a file of all ranks is the main one's
        return sorted(name for name, found in ranks.items() if rank(Group.data) == (int(found[1]) if found else 0))

    def checkpoint_bytes(self) -> int:
        """What this rank's files of a checkpoint take, but for their headers and what is small."""
        masters = sum(4 * weights.numel() for weights in self._master_weights())
        if self.zero_stage == 0:
            return 3 * masters if is_main() else 0
        if self.zero_stage == 3:
            weights = [parameter.ds_tensor for parameter in self.model.parameters() if not parameter.requires_grad]
        else:
            weights = list(self.model.parameters()) if is_main() else []
        return 3 * masters + sum(weight.numel() * weight.element_size() for weight in weights)

    def load(self, folder: Path, tag: str, is_universal: bool = False) -> None:
        """Restore what `save` wrote, or what opd/resharding.py made of it; the optimizer's settings stay this run's.

        Raises ValueError where there is nothing to load.
        """
        settings = [{name: value for name, value in group.items() if name != "params"} for group in self.engine.optimizer.param_groups]
        self.engine._config.load_universal_checkpoint = is_universal  # of a checkpoint, but DeepSpeed takes it from the config it began with
        is_there = any((folder / tag).glob("*model_states.pt"))
        try:
            with padding_loads(self.groups if is_universal and self.zero_stage < 3 else []):
                path, client_state = self.engine.load_checkpoint(str(folder), tag=tag) if is_there else (None, None)
        except (OSError, RuntimeError, EOFError, KeyError, pickle.UnpicklingError) as error:
            raise ValueError(f"the checkpoint {folder / tag} is damaged ({first_sentence(error)}): begin anew with fresh=true") from error
        if path is None:
            raise ValueError(f"the checkpoint {folder / tag} cannot be loaded: it is missing or incomplete")
        for group, own in zip(self.engine.optimizer.param_groups, settings, strict=True):
            group.update(own)
        if self.zero_stage > 0:
            self.engine.optimizer.clip_grad = self.cfg.optim.clip_norm or 0.0
        for moments in self.engine.optimizer.state.values() if is_universal else ():
            moments["step"] = moments["step"].clone()  # at ZeRO-3 DeepSpeed gives all of them one tensor, which each then counts up
        state = client_state["opd"]
        self.policy_step = state["policy_step"]
        self.num_skipped, self.skipped_in_a_row = state.get("skipped", (0, 0))
        self.recorder.restore(state["routing"])
        for name, buffer in self.model.named_buffers():
            buffer.copy_(state["buffers"][name])
        for name, value in state.get("frozen", {}).items():
            self._set_frozen(self.trained.get_parameter(name), value)
        if self.quantizer is not None:
            self.quantizer.weights_changed()

    def _set_frozen(self, parameter: nn.Parameter, value: torch.Tensor) -> None:
        with deepspeed.zero.GatheredParameters([parameter], modifier_rank=0, enabled=self.zero_stage == 3):
            if self.zero_stage < 3 or is_main():
                parameter.data.copy_(value)

    def _gathered(self, parameters: list[nn.Parameter]) -> AbstractContextManager:
        """Context in which parameters are whole, on all ranks; those that DeepSpeed keeps whole stay so afterwards."""
        partitioned = [parameter for parameter in parameters if self.zero_stage == 3 and parameter.ds_status is not ZeroParamStatus.AVAILABLE]
        return deepspeed.zero.GatheredParameters(partitioned) if partitioned else nullcontext()

    def _master_weights(self) -> list[torch.Tensor]:
        """This rank's share of the float32 weights that the optimizer moves."""
        if self.zero_stage == 3:  # between two steps the optimizer's own groups are empty
            return [weights.data for weights in self.engine.optimizer.fp32_partitioned_groups_flat]  # they ask for gradients: no graph over them
        return [parameter.data for group in self.engine.optimizer.param_groups for parameter in group["params"]]

    def _update_to_weight(self, before: list[torch.Tensor]) -> float:
        """Norm of the update over norm of the weights, over all ranks' shares."""
        sums = squared_norms(self._master_weights(), before)
        if self.zero_stage > 0:
            sums = reduce_sum(sums, Group.data)
        return float((sums[0] / sums[1]).sqrt())

    def _update(self) -> float:
        """Update the weights unless the gradient's norm is not finite, and return that norm (with muon: of the orthogonalised update)."""
        if self.zero_stage == 3 and self.cfg.optim.kind is OptimizerKind.muon:
            self._spoil_unless_finite()
        if self.zero_stage > 0:
            self.engine.step()  # skips the update by itself
            return float(self.engine.get_global_grad_norm())
        gradients = [p.grad for group in self.engine.optimizer.param_groups for p in group["params"] if p.grad is not None]
        norm = float(torch.stack([gradient.double().norm() for gradient in gradients]).norm())
        if math.isfinite(norm):
            self.engine.step()
        else:
            self.engine.zero_grad()
        return norm

    def _spoil_unless_finite(self) -> None:
        """Make a gradient NaN all over where it is so anywhere: Muon at ZeRO-3 adds what is finite to its momentum before the step is skipped."""
        parts = [gradient for group in self.engine.optimizer.averaged_gradients.values() for gradient in group]
        is_bad = torch.tensor(float(any(not bool(gradient.isfinite().all()) for gradient in parts)))
        if float(reduce_max(is_bad, Group.data)):
            for gradient in parts:
                gradient.fill_(math.nan)


def _optimizer(groups: list, cfg: OptimConfig) -> torch.optim.Optimizer:
    betas = tuple(cfg.betas)
    if cfg.kind is OptimizerKind.adamw:
        return torch.optim.AdamW(
            [{"params": group.parameters, "weight_decay": cfg.weight_decay if group.decay else 0.0} for group in groups],
            lr=cfg.lr, betas=betas, eps=cfg.eps,
        )  # fmt: skip
    from deepspeed.runtime.zero.muon.muon_optimizer import MuonWithAuxAdam  # importing it compiles kernels

    settings = []
    for group in groups:
        for parameter in group.parameters:
            parameter.use_muon = group.use_muon
        decay = cfg.weight_decay if group.decay else 0.0
        shared = {"params": group.parameters, "use_muon": group.use_muon, "weight_decay": decay}
        own = {"lr": cfg.muon_lr, "momentum": cfg.momentum, "ns_method": "standard"} if group.use_muon else {"lr": cfg.lr, "betas": betas, "eps": cfg.eps}
        settings.append(shared | own)
    return MuonWithAuxAdam(settings)


def leave_out_shared_memory_op() -> None:
    """DeepSpeed compiles a shared-memory all-reduce for CPU inference at start-up; training never calls it."""
    import deepspeed.ops

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
