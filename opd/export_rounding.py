"""What an export rounds: routed experts to their FP4 values, and if asked the other matrices that DeepSeek quantises to FP8.

Rounding happens in the loaded model, before anything is written: afterwards every value of the model is one that the exported folder can hold, so writing
is lossless and the folder must give back exactly this model. Experts that trained under FP4 are on its grid already, and rounding them changes nothing;
others are refused unless rounding was asked for, since their loss of quality would come as a surprise.

Two more things are looked for that an engine would get wrong without a word: a scale byte of zero over weights that are not zero, and scales that lie so
far apart in a 128 x 128 block that no FP8 value with one scale holds them all (arXiv:2606.19348, 5.2.1).
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import nn
from transformers import PreTrainedModel

from opd.deepseek_layout import FP8_MODULES, may_be_fp8
from opd.fp8 import dequantize_blocks, quantize_blocks
from rollout.experts import EXPERT_WEIGHTS, input_last, scale_spread_of_experts
from rollout.fp4 import BLOCK, MAX_SPREAD, PackedFP4, dequantize, quantize


@dataclass(slots=True)
class ExpertFigures:
    """Of all routed experts together.

    weights, off_grid: their number, and how many are no FP4 values before rounding.
    zero_scale_blocks: blocks of 32 zeros, whose scale is zero.
    spread: number of 128 x 128 blocks by the spread of their scales, from 0.
    """

    weights: int = 0
    off_grid: int = 0
    zero_scale_blocks: int = 0
    spread: list[int] = field(default_factory=lambda: [0] * (MAX_SPREAD + 1))

    @property
    def share_off_grid(self) -> float:
        return self.off_grid / self.weights


@torch.no_grad()
def round_experts(experts: dict[str, nn.Module], is_packed: bool, may_change: bool) -> ExpertFigures:
    """Put the experts on FP4's grid; `is_packed`: they will be stored as FP4, so that scales matter and values off the grid are no option.

    Raises ValueError, naming the weight, for NaN, infinity and scales that would be stored wrongly, and for experts that are not on the grid and may not
    change.
    """
    figures = ExpertFigures()
    for name, module in experts.items():
        for weight in EXPERT_WEIGHTS:
            own = input_last(module, getattr(module, weight))
            with _naming(f"{name}.{weight}"):
                packed = quantize(own)
                if is_packed:
                    _require_no_lost_block(own, packed)
            values = dequantize(packed, own.dtype)
            figures.weights += own.numel()
            figures.off_grid += int((values != own).sum())
            if may_change:
                own.copy_(values)
                packed = quantize(own)
            if is_packed:
                with _naming(f"{name}.{weight}"):
                    _count_scales(figures, weight, packed)
    if is_packed and figures.off_grid and not may_change:
        raise ValueError(
            f"the routed experts are not FP4 values: packing would change {figures.share_off_grid:.1%} of their weights; "
            "train the student with quant=mxfp4_experts, or set round_experts=true to round them, or format=plain to leave them as they are"
        )
    return figures


@torch.no_grad()
def round_matrices(model: PreTrainedModel) -> set[str]:
    """Put every matrix that DeepSeek releases in FP8, and that is made of whole blocks, on FP8's grid; returns their names.

    Raises ValueError where there is none, and for NaN and infinity, naming the weight.
    """
    rounded = set()
    for name, parameter in model.named_parameters():
        if may_be_fp8(name, parameter, model.config):
            with _naming(name):
                parameter.copy_(dequantize_blocks(*quantize_blocks(parameter), parameter.dtype))
            rounded.add(name)
    if not rounded:
        raise ValueError(f"none of {', '.join(FP8_MODULES)} is made of whole 128 x 128 blocks in this model, so rest=fp8 would convert nothing: set rest=keep")
    return rounded


@contextmanager
def _naming(weight: str) -> Iterator[None]:
    """Raises the ValueErrors from within with the weight's name before them."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{weight}: {error}") from error


def _require_no_lost_block(own: torch.Tensor, packed: PackedFP4) -> None:
    is_zero = packed.scale == 0
    if is_zero.any() and (is_zero & (own.unflatten(-1, (-1, BLOCK)) != 0).any(-1)).any():
        raise ValueError("a block of weights is so small (below 2^-124) that FP4 stores it as zeros: retrain it, or set format=plain")


def _count_scales(figures: ExpertFigures, weight: str, packed: PackedFP4) -> None:
    figures.zero_scale_blocks += int((packed.scale == 0).sum())
    counts = scale_spread_of_experts(weight, packed).long().bincount(minlength=len(figures.spread)).tolist()
    if len(counts) > len(figures.spread):
        raise ValueError(
            f"the scales of a 128 x 128 block differ by 2^{len(counts) - 1}, more than the 2^{MAX_SPREAD} that an engine can hold in FP8: "
            "train it further under FP4, or set format=plain"
        )
    figures.spread = [total + count for total, count in zip(figures.spread, counts, strict=True)]
