"""Quantisation-aware training of the routed experts: FP4 values forward, straight-through backward.

The forward multiplies with fake_quantize(w), the gradient by that product is handed to w unchanged (arXiv:2606.19348, 5.2.1: FP32 masters of the
optimizer, FP4 in the forward, straight-through between them). Under bfloat16 w is the 16-bit parameter that DeepSpeed derives from its master: the
tensor whose FP4 values the sampler decodes and the export writes. Attached through transformers' registry of experts implementations
(rollout/experts.py): no parameter is renamed or replaced, so ZeRO, Muon, AdamW and checkpoints see what they always saw.

Who holds the fake-quantised copy. ZeRO 0 to 2 hold the parameter whole from one update to the next, so its FP4 values are computed once per update and
kept: one more copy of the experts in the training dtype. ZeRO-3 gathers a layer for the length of its forward and of its backward; autograd would keep
the quantised copy between the two and with it undo the partition. So what autograd is about to keep is recognised by its memory, and a note of the
parameter and the view is kept in its place: all experts at once where they are multiplied grouped, one expert where a loop multiplies them. The backward
quantises again from the parameter, which DeepSpeed has gathered by then. With gradient checkpointing nothing is kept anyway.

A master that holds decoded values stands on an edge. Where a block's largest code is 6, its largest element is exactly 6 * 2^e, and any step outwards
doubles the scale and rounds the whole block anew: of a student taken up from an export, or from another run's student folder, up to a tenth of the values
change in the first update, however small (one in 20,000 of one with ordinary masters). A resumed run keeps its masters and has no such step. The record
of the first step shows it as quant/flipped.

Rejected: torch's parametrize (renames parameters in every checkpoint, quantises on every access); stochastic rounding (training would differ from what
samples); a clipping mask in the gradient (the scale never lets a weight saturate, so it would be all ones).
"""

import logging
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass

import torch
from torch import nn
from transformers import PreTrainedModel

from opd.distributed import Group, num_ranks, rank, reduce_max, reduce_sum
from rollout.experts import EXPERT_WEIGHTS, Multiply, fake_quantized, input_last, require_quantizable, scale_spread_of_experts, substitute_weights
from rollout.fp4 import PackedFP4, dequantize, quantize

Gathered = Callable[[list[nn.Parameter]], AbstractContextManager]
"""Context in which parameters are whole: DeepSpeed's, or one that does nothing."""


class ExpertQuantizer:
    """Fake-quantises the routed experts of one model, in every forward."""

    def __init__(self, model: PreTrainedModel, zero_stage: int, gradient_checkpointing: bool):
        """Attach to all routed experts. Raises ValueError as `rollout.experts.require_quantizable`."""
        self.experts = require_quantizable(model, "student")
        self.keeps_copies = zero_stage < 3
        self.recomputes = zero_stage == 3 and not gradient_checkpointing
        self.copies: dict[str, torch.Tensor] = {}
        self.is_on = True
        self._names = {module: name for name, module in self.experts.items()}
        substitute_weights(model, self._product)
        logging.getLogger(__name__).info("MXFP4 attached to the routed experts of %d layers: %s", len(self.experts), ", ".join(self.experts))

    def weights_changed(self) -> None:
        """Forget the FP4 values of the weights as they were; to be called after every update and every loading of a checkpoint."""
        self.copies = {}

    @contextmanager
    def off(self) -> Iterator[None]:
        """Forwards inside multiply with the weights as they are: the student with unquantised experts."""
        self.is_on = False
        try:
            yield
        finally:
            self.is_on = True

    def forward_value(self, name: str, parameter: torch.Tensor) -> torch.Tensor:
        """What the forward multiplies with in place of a (whole) parameter of that name: FP4 values of an expert's matrix, else itself."""
        module, _, weight = name.rpartition(".")
        if module not in self.experts or weight not in EXPERT_WEIGHTS:
            return parameter
        return self._fp4_values(name, self.experts[module], parameter)

    def _product(self, module: nn.Module, multiply: Multiply) -> torch.Tensor:
        if not self.is_on:
            return multiply({})
        name = self._names[module]
        values = {weight: self._fp4_values(f"{name}.{weight}", module, getattr(module, weight)) for weight in EXPERT_WEIGHTS}
        substitutes = {weight: _StraightThrough.apply(getattr(module, weight), tensor) for weight, tensor in values.items()}
        if not (self.recomputes and torch.is_grad_enabled()):
            return multiply(substitutes)
        weight_at = {tensor.untyped_storage().data_ptr(): weight for weight, tensor in values.items()}

        def keep(tensor: torch.Tensor) -> "torch.Tensor | _Recomputed":
            weight = weight_at.get(tensor.untyped_storage().data_ptr())
            return tensor if weight is None else _Recomputed(module, weight, tensor.shape, tensor.stride(), tensor.storage_offset())

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda kept: kept.compute() if isinstance(kept, _Recomputed) else kept):
            return multiply(substitutes)

    def _fp4_values(self, name: str, module: nn.Module, parameter: torch.Tensor) -> torch.Tensor:
        """FP4 values of a whole parameter, kept until the weights change where copies are: the sampler asks before the forward does."""
        if name in self.copies:
            return self.copies[name]
        with torch.inference_mode(False), torch.no_grad():  # a copy that is kept may meet a forward with gradients later
            values = fake_quantized(module, parameter.detach())
        if self.keeps_copies:
            self.copies[name] = values
        return values

    def pack_share(self, gathered: Gathered) -> dict[str, PackedFP4]:
        """This rank's share of the experts, packed, by the parameters' names; every rank has to call it."""
        share = slice(rank(Group.data), None, num_ranks(Group.data))
        packed = {}
        for name, module in self.experts.items():
            for weight in EXPERT_WEIGHTS:
                parameter = getattr(module, weight)
                with gathered([parameter]):
                    packed[f"{name}.{weight}"] = quantize(input_last(module, parameter.data)[share])
        return packed


def code_metrics(before: dict[str, PackedFP4], after: dict[str, PackedFP4]) -> dict[str, float]:
    """Share of the FP4 values (code times scale) that an update changed, and the largest scale spread, from this rank's `pack_share` before and after
    it; over all ranks, each of which has to call it.
    """
    changed, total, spread = 0, 0, 0
    for name, packed in after.items():
        changed += int((dequantize(packed, torch.float32) != dequantize(before[name], torch.float32)).sum())
        total += 2 * packed.codes.numel()
        spread = max([spread, *scale_spread_of_experts(name.rpartition(".")[2], packed).tolist()])
    changed, total = reduce_sum(torch.tensor([changed, total], dtype=torch.float64), Group.data).tolist()
    return {"quant/flipped": changed / total, "quant/scale_spread": float(reduce_max(torch.tensor(spread), Group.data))}


class _StraightThrough(torch.autograd.Function):
    """FP4 values forward; backward, their gradient is the weight's."""

    @staticmethod
    def forward(ctx, weight: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
        return values.detach()

    @staticmethod
    def backward(ctx, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
        return gradient, None


@dataclass(frozen=True, slots=True)
class _Recomputed:
    """A view of an expert weight's FP4 values, noted as the parameter it comes from: all experts [E, ...], or one of them."""

    module: nn.Module
    weight: str
    shape: torch.Size
    stride: tuple[int, ...]
    offset: int

    def compute(self) -> torch.Tensor:
        parameter = getattr(self.module, self.weight).detach()
        if len(self.shape) == parameter.ndim:
            return fake_quantized(self.module, parameter).as_strided(self.shape, self.stride, self.offset)
        expert, offset = divmod(self.offset, parameter[0].numel())
        return fake_quantized(self.module, parameter[expert]).as_strided(self.shape, self.stride, offset)
