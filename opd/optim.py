"""Which optimizer moves which parameter, and the learning rate over the steps.

Muon (arXiv:2606.19348, 2.4) takes matrices that map hidden states to hidden states. Embedding, head, norms, router, biases
and gating vectors stay with AdamW; of those only embedding and head are decayed. DeepSpeed's Muon is used as it is,
with two consequences: it orthogonalises before it clips, so a clip norm would shrink the update rather than the gradient (refused), and
under ZeRO-1 in bfloat16 it would not orthogonalise at all (refused in opd/engine.py).
"""

import math
from dataclasses import dataclass

from torch import nn

from opd.config import OptimConfig, OptimizerKind, Schedule

NOT_FOR_MUON = ("embed", "lm_head", "gate.weight", "router", "position_bias", "norm")


@dataclass(frozen=True, slots=True, kw_only=True)
class ParameterGroup:
    """name: for the log. use_muon: else AdamW. decay: whether weight decay applies."""

    name: str
    use_muon: bool
    decay: bool
    parameters: list[nn.Parameter]


def parameter_groups(model: nn.Module, cfg: OptimConfig) -> list[ParameterGroup]:
    """The trainable parameters in groups; each is in exactly one, and empty groups are left out.

    Shapes are read from the whole parameter, so call this before ZeRO-3 partitions it.
    """
    members: dict[str, list[nn.Parameter]] = {"muon": [], "adamw": [], "adamw_no_decay": []}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            members[_group_of(name, parameter, cfg)].append(parameter)
    return [
        ParameterGroup(name=name, use_muon=name == "muon", decay=name != "adamw_no_decay", parameters=parameters)
        for name, parameters in members.items()
        if parameters
    ]


def _group_of(name: str, parameter: nn.Parameter, cfg: OptimConfig) -> str:
    is_matrix = parameter.ndim >= 2 and "position_bias" not in name and "norm" not in name
    if not is_matrix:
        return "adamw_no_decay"
    if cfg.kind is OptimizerKind.muon and not any(part in name for part in NOT_FOR_MUON):
        return "muon"
    return "adamw"


def learning_rate_factor(step: int, num_steps: int, cfg: OptimConfig) -> float:
    """Learning rate of step 0, 1, ... as a fraction of the peak: linear warm-up, then the schedule to its final fraction."""
    if step < cfg.warmup_steps:
        return (step + 1) / cfg.warmup_steps
    if cfg.schedule is Schedule.constant:
        return 1.0
    progress = (step - cfg.warmup_steps) / max(1, num_steps - 1 - cfg.warmup_steps)
    remaining = 1 - progress if cfg.schedule is Schedule.linear else (1 + math.cos(math.pi * progress)) / 2
    return cfg.final_lr_fraction + (1 - cfg.final_lr_fraction) * remaining
