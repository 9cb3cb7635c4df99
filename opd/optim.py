"""Which optimizer moves which parameter, and the learning rate over the steps.

Muon (arXiv:2606.19348, 2.4) takes matrices that map hidden states to hidden states. Embeddings, head, norms, routers, biases
and gating vectors stay with AdamW; of those the matrices (embeddings, head, routers) are decayed. DeepSpeed's Muon is used as it
is, with two consequences: it orthogonalises before it clips, so a clip norm would shrink the update rather than the gradient,
and under ZeRO-1 in bfloat16 it would not orthogonalise at all; both are refused in opd/deepspeed_settings.py.
Its Newton-Schulz iteration runs in bfloat16; measured in float32 models, ZeRO-3 agrees with ZeRO 0 to 2 to 1e-4 in the loss, not to 1e-5.

N: numbers of a tensor that are taken together.
"""

import math
from dataclasses import dataclass

import torch
from torch import nn
from transformers import PreTrainedModel

from opd.config import OptimConfig, OptimizerKind, Schedule
from opd.routing import find_routers
from rollout.model import head_of

NOT_A_MATRIX = ("position_bias", "norm")
"""Parts of names of parameters that are vectors in meaning whatever their shape."""

NUMBERS_AT_A_TIME = 1 << 22
"""Whose squares are summed together, in at most 16 bytes for each."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ParameterGroup:
    """name: for the log. use_muon: else AdamW. decay: whether weight decay applies."""

    name: str
    use_muon: bool
    decay: bool
    parameters: list[nn.Parameter]


def parameter_groups(model: PreTrainedModel, cfg: OptimConfig) -> list[ParameterGroup]:
    """The trainable parameters in groups; each is in exactly one, and empty groups are left out.

    Shapes are read from the whole parameter, so call this before ZeRO-3 partitions it.
    """
    members: dict[str, list[nn.Parameter]] = {"muon": [], "adamw": [], "adamw_no_decay": []}
    never_muon = {id(head_of(model).weight)}
    never_muon |= {id(parameter) for router in find_routers(model).values() for parameter in router.parameters()}
    never_muon |= {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        if parameter.ndim < 2 or any(part in name for part in NOT_A_MATRIX):
            group = "adamw_no_decay"
        else:
            group = "muon" if cfg.kind is OptimizerKind.muon and id(parameter) not in never_muon else "adamw"
        members[group].append(parameter)
    return [
        ParameterGroup(name=name, use_muon=name == "muon", decay=name != "adamw_no_decay", parameters=parameters)
        for name, parameters in members.items()
        if parameters
    ]


def learning_rate_factor(step: int, num_steps: int, cfg: OptimConfig) -> float:
    """Learning rate of step 0, 1, ... as a fraction of the peak: linear warm-up, then the schedule to its final fraction."""
    if step < cfg.warmup_steps:
        return (step + 1) / cfg.warmup_steps
    if cfg.schedule is Schedule.constant:
        return 1.0
    progress = (step - cfg.warmup_steps) / max(1, num_steps - 1 - cfg.warmup_steps)
    remaining = 1 - progress if cfg.schedule is Schedule.linear else (1 + math.cos(math.pi * progress)) / 2
    return cfg.final_lr_fraction + (1 - cfg.final_lr_fraction) * remaining


def squared_norms(new: list[torch.Tensor], old: list[torch.Tensor]) -> torch.Tensor:
    """float64 [2]: squared norm of new - old, and of old, over all tensors together (as many in both, of the same sizes)."""
    sums = torch.zeros(2, dtype=torch.float64, device=old[0].device)
    for one, other in zip(new, old, strict=True):
        for new_N, old_N in zip(one.view(-1).split(NUMBERS_AT_A_TIME), other.view(-1).split(NUMBERS_AT_A_TIME), strict=True):
            sums[0] += (new_N - old_N).double().square_().sum()
            sums[1] += old_N.double().square_().sum()
    return sums
