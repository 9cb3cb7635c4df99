"""What partitioned weights (ZeRO-3) cost outside of training, and how that is kept small."""

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import nn

LINEAR = nn.functional.linear
"""torch's own: at ZeRO-3 DeepSpeed replaces it, in the whole process and for good."""

_BY_DEEPSPEED: list[Callable] = []

GATHERED_BYTES = 1 << 28
"""Of partitioned parameters that are made whole together."""


def restrict_linear_to_training() -> None:
    """Leave DeepSpeed's linear function, which keeps whole weights out of the graph, to what has a graph.

    Elsewhere (samplers, teachers, evaluation) it brings nothing, and takes longer to be called than a small product does.
    """
    if nn.functional.linear not in (LINEAR, linear):
        _BY_DEEPSPEED[:] = [nn.functional.linear]
        nn.functional.linear = linear


def linear(*arguments: Any, **named: Any) -> torch.Tensor:
    """DeepSpeed's function where there is a graph, else torch's."""
    return (_BY_DEEPSPEED[0] if torch.is_grad_enabled() else LINEAR)(*arguments, **named)


def parts_of(named: Iterable[tuple[str, nn.Parameter]]) -> Iterator[list[tuple[str, nn.Parameter]]]:
    """Parameters in their order, in parts of at most GATHERED_BYTES when whole, or of one."""
    part: list[tuple[str, nn.Parameter]] = []
    num_bytes = 0
    for name, parameter in named:
        size = getattr(parameter, "ds_numel", parameter.numel()) * parameter.element_size()
        if part and num_bytes + size > GATHERED_BYTES:
            yield part
            part, num_bytes = [], 0
        part.append((name, parameter))
        num_bytes += size
    if part:
        yield part
