"""How much each teacher pulls, and which teachers pull against each other: the norms and the pairwise cosines of the parts of the step's gradient.

The loss is a sum over teachers, and so is its gradient; norms are not, so that shares say who dominates and not how parts cancel, which the cosines say:
-1 where one teacher undoes what another does, 0 where they do not meet. Measured before the step's own backward, with a forward and backward of each
micro-batch of its own, and one gradient in memory at a time. Not under ZeRO-3, whose hooks take every backward for the step's own.

A cosine needs two gradients. What is kept of each is a sketch of SKETCH numbers on the host: the gradient, summed over the ranks, is cut into stretches
of SKETCH numbers, each of which is multiplied by random signs, turned by a random distance, and added up (seeded: the same for all teachers, ranks and
steps). One stretch is the gradient itself but for order and signs, so that up to SKETCH (2^20) trained parameters the cosines are exact. Beyond, two
numbers of different stretches meet with probability 1 / SKETCH and with a random sign, so that an inner product is unbiased and a cosine c has a standard
error of at most sqrt((1 + c^2) / SKETCH), 0.0014. Whole gradients on the host would be exact at any size; twelve of a model of 10^10 parameters would
take 480 GB of it, where the sketches of twelve teachers take 50 MB.
"""

from collections.abc import Iterable
from dataclasses import replace
from itertools import combinations

import torch

from opd.batch import MicroBatch, with_hidden
from opd.distributed import Group, gather_objects, reduce_max, reduce_sum
from opd.engine import Engine
from teachers.config import SignalKind
from teachers.pool import TeacherPool

SKETCH = 1 << 20


class Sketch:
    """A long vector in SKETCH float32 numbers, and its exact squared norm (module docstring); of vectors that were added in the same pieces."""

    def __init__(self, size: int = SKETCH):
        self.size, self.position, self.square = size, 0, 0.0
        self.sums = torch.zeros(size)

    def add(self, piece: torch.Tensor) -> None:
        """Append a piece of the vector, of any shape and on any device."""
        flat = piece.detach().reshape(-1).float()
        self.square += float(flat.double().square().sum())
        while len(flat):
            stretch, start = divmod(self.position, self.size)
            part, flat = flat[: self.size - start], flat[self.size - start :]
            generator = torch.Generator().manual_seed(stretch)
            turn = int(torch.randint(self.size, (), generator=generator))
            signs = torch.randint(2, (self.size,), generator=generator, dtype=torch.int8)[start : start + len(part)] * 2 - 1
            places = (torch.arange(start, start + len(part)) + turn) % self.size
            self.sums[places] += part.cpu() * signs
            self.position += len(part)

    def cosine(self, other: "Sketch") -> float:
        """With a vector of the same length; neither may be 0."""
        product = float(self.sums.double() @ other.sums.double())
        return max(-1.0, min(1.0, product / (self.square * other.square) ** 0.5))


def gradient_shares(engine: Engine, batches: list[MicroBatch], teachers: TeacherPool) -> dict[str, float]:
    """teacher/T/gradient_share of every teacher of the step and conflict/T/U/gradient_cosine of every two; every rank calls it with its micro-batches."""
    own = [batch for batch in batches if not batch.is_filler]
    present = sorted({name for names in gather_objects([batch.teacher for batch in own], Group.data) for name in names})
    sketches = {}
    for name in present:
        parts = _summed_gradient(engine, [batch for batch in own if batch.teacher == name], batches[0], teachers)
        sketches[teachers.label(name)] = sketch = Sketch()
        for part in parts:
            sketch.add(part)
    norms = {label: sketch.square**0.5 for label, sketch in sketches.items()}
    total = sum(norms.values())
    metrics = {f"teacher/{label}/gradient_share": norm / total for label, norm in norms.items()} if total else {}
    pulling = [label for label, norm in norms.items() if norm > 0]
    return metrics | {f"conflict/{one}/{other}/gradient_cosine": sketches[one].cosine(sketches[other]) for one, other in combinations(pulling, 2)}


def _summed_gradient(engine: Engine, batches: list[MicroBatch], any_batch: MicroBatch, teachers: TeacherPool) -> Iterable[torch.Tensor]:
    """Sum of the micro-batches' gradients over all ranks, each of which does the same number of passes, parameter by parameter."""
    passes = int(reduce_max(torch.tensor(len(batches)), Group.data))
    filler = replace(any_batch, weight_N=torch.zeros_like(any_batch.weight_N), is_filler=True)
    total: list[torch.Tensor] | None = None
    for batch in batches + [filler] * (passes - len(batches)):
        batch, head = with_hidden(batch, teachers, keep=True), None
        if batch.signal is SignalKind.hidden_states:
            head = teachers.head(batch.teacher)
        gradient = engine.gradient(batch.to(engine.device), head)
        total = gradient if total is None else [before + more for before, more in zip(total, gradient, strict=True)]
    return (reduce_sum(gradient.float(), Group.data) for gradient in total)
