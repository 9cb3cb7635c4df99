"""How much each teacher pulls: the norm of its part of the step's gradient, as a share of the norms of all.

The loss is a sum over teachers, and so is its gradient; norms are not, so that shares say who dominates and not how parts cancel. Measured before the
step's own backward, with a forward and backward of each micro-batch of its own, and one gradient in memory at a time. Not under ZeRO-3, whose
hooks take every backward for the step's own.
"""

from dataclasses import replace

import torch

from opd.batch import MicroBatch, with_hidden
from opd.distributed import Group, gather_objects, reduce_max, reduce_sum
from opd.engine import Engine
from teachers.config import SignalKind
from teachers.pool import TeacherPool


def gradient_shares(engine: Engine, batches: list[MicroBatch], teachers: TeacherPool) -> dict[str, float]:
    """teacher/T/gradient_share for every teacher of the step; every rank calls it with its micro-batches."""
    own = [batch for batch in batches if not batch.is_filler]
    present = sorted({name for names in gather_objects([batch.teacher for batch in own], Group.data) for name in names})
    norms = {name: _gradient_norm(engine, [batch for batch in own if batch.teacher == name], batches[0], teachers) for name in present}
    total = sum(norms.values())
    return {f"teacher/{teachers.label(name)}/gradient_share": norm / total for name, norm in norms.items()} if total else {}


def _gradient_norm(engine: Engine, batches: list[MicroBatch], any_batch: MicroBatch, teachers: TeacherPool) -> float:
    """Norm of the sum of the micro-batches' gradients over all ranks, each of which does the same number of passes."""
    passes = int(reduce_max(torch.tensor(len(batches)), Group.data))
    filler = replace(any_batch, weight_N=torch.zeros_like(any_batch.weight_N), is_filler=True)
    total: list[torch.Tensor] | None = None
    for batch in batches + [filler] * (passes - len(batches)):
        batch, head = with_hidden(batch, teachers, keep=True), None
        if batch.signal is SignalKind.hidden_states:
            head = teachers.head(batch.teacher)
        gradient = engine.gradient(batch.to(engine.device), head)
        total = gradient if total is None else [before + more for before, more in zip(total, gradient, strict=True)]
    square = sum(reduce_sum(gradient.float(), Group.data).double().square().sum() for gradient in total)
    return float(square.sqrt())
