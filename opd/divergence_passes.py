"""The element-wise passes of the divergence over a block of logits, in torch: as written (eager) or compiled.

p = softmax(z) and q = softmax(z') are the student's and the teacher's distributions. Each block is passed over two or three times:

    normalise    products -> logits; per row: maximum, sum of exponentials, moments
    integrate    per row: the divergence, and E = sum_v p_v d/dp_v (left out for plain reverse KL, whose sum falls out of `normalise`)
    differentiate    weight * p_v (d/dp_v - E), the derivative by the logits, then by the products

Every kind is written by the log-ratio r = log p - log q, formed as (z - z') - (log Z - log Z'), so that equal models give 0 exactly and
nearly equal ones no cancellation of large normalisers (arXiv:2306.13649 for the kinds; derivatives are ours, tested against autograd). With
smoothing the teacher is q' = (1 - eps) q + eps p, and the derivative includes the dependence of q' on p: loss and gradient belong together.

`opd/divergence_triton.py` has the same passes for CUDA.

C: tokens of a tile. V: columns of a block. S: statistics, or scalars, of a row.
"""

import math
import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache, partial
from importlib.util import find_spec

import torch

from opd.loss_config import Backend, DivergenceKind
from rollout.compiler import has_compiler
from rollout.logits import transform_
from rollout.types import LogitTransform

COMPILE_FROM = 16384
"""Vocabulary from which `auto` compiles on a CPU: below it, start-up (seconds) is not won back."""

STATISTICS = ("maximum", "total", "moment", "difference", "teacher_maximum", "teacher_total", "teacher_moment")
"""Rows of `normalise`: with e = exp(z - maximum), `total` = sum e, `moment` = sum e (z - maximum), `difference` = sum e (z - z')."""

MAXIMUM, INVERSE, TEACHER_MAXIMUM, TEACHER_INVERSE, LOG_RATIO, EXPECTATION, WEIGHT = range(7)
"""Rows of the scalars that the later passes need: p = inverse exp(z - maximum); log_ratio = log Z - log Z'; expectation = E; weight of the token."""

NUM_SCALARS = 7


@dataclass(frozen=True, slots=True)
class Formula:
    """What is computed. The transforms include the temperature: logits are divided by it after everything else."""

    kind: DivergenceKind
    beta: float
    smoothing: float
    student: LogitTransform
    teacher: LogitTransform

    @property
    def is_plain_reverse(self) -> bool:
        return self.kind is DivergenceKind.reverse_kl and self.smoothing == 0


@dataclass(frozen=True, slots=True)
class Passes:
    """The three passes of one back end.

    normalise(student_CV, teacher_CV) -> statistics_SC: turns the products into logits in place.
    integrate(student_CV, teacher_CV, scalars_SC) -> [2, C]: divergence and E.
    differentiate(student_CV, teacher_CV, scalars_SC, dtype) -> [C, V] in dtype; may reuse student_CV.
    """

    normalise: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
    integrate: Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
    differentiate: Callable[[torch.Tensor, torch.Tensor, torch.Tensor, torch.dtype], torch.Tensor]


def choose_passes(backend: Backend, device: torch.device, vocab_size: int, formula: Formula) -> Passes:
    """The passes of a back end. Raises ValueError where it cannot run here."""
    require_backend(backend, device)
    if backend is Backend.auto:
        backend = automatic(device, vocab_size)
    if backend is Backend.triton:
        from opd.divergence_triton import triton_passes

        return triton_passes(formula)
    return compiled_passes(formula) if backend is Backend.compiled else eager_passes(formula)


def require_backend(backend: Backend, device: torch.device) -> None:
    """Raises ValueError where a back end cannot run. Triton runs without a GPU in its interpreter alone (TRITON_INTERPRET=1)."""
    if backend is Backend.compiled and device.type == "cpu" and not has_compiler():
        raise ValueError("loss.backend=compiled needs a C++ compiler: install g++ (or set CXX), or use loss.backend=eager")
    if backend is Backend.triton and not find_spec("triton"):
        raise ValueError("loss.backend=triton needs the package triton, which is not installed: use loss.backend=auto")
    if backend is Backend.triton and device.type != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
        raise ValueError(f"loss.backend=triton needs a CUDA device, and this one is {device.type}: use loss.backend=auto")


def automatic(device: torch.device, vocab_size: int) -> Backend:
    """triton on CUDA where it is installed, compiled on a CPU with a compiler and a large vocabulary, else eager."""
    if device.type == "cuda":
        return Backend.triton if find_spec("triton") else Backend.eager
    return Backend.compiled if device.type == "cpu" and vocab_size >= COMPILE_FROM and has_compiler() else Backend.eager


def eager_passes(formula: Formula) -> Passes:
    return Passes(partial(normalise, formula), partial(integrate, formula), partial(differentiate, formula))


@lru_cache
def compiled_passes(formula: Formula) -> Passes:
    """The same functions through torch.compile; the first call takes seconds (kept on disk by torch's own cache).

    Formulas share the functions' code, on which torch counts compilations, and beyond its limit (8) it would run them eagerly.
    """
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, 128)

    def compiled_normalise(student_CV: torch.Tensor, teacher_CV: torch.Tensor) -> torch.Tensor:
        return normalise(formula, student_CV, teacher_CV)

    def compiled_integrate(student_CV: torch.Tensor, teacher_CV: torch.Tensor, scalars_SC: torch.Tensor) -> torch.Tensor:
        return integrate(formula, student_CV, teacher_CV, scalars_SC)

    def compiled_differentiate(student_CV: torch.Tensor, teacher_CV: torch.Tensor, scalars_SC: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        return differentiate(formula, student_CV, teacher_CV, scalars_SC, dtype)

    return Passes(*(torch.compile(one, dynamic=True) for one in (compiled_normalise, compiled_integrate, compiled_differentiate)))


def normalise(formula: Formula, student_CV: torch.Tensor, teacher_CV: torch.Tensor) -> torch.Tensor:
    """STATISTICS of a block's rows, [S, C]; the products become logits in place."""
    transform_(student_CV, formula.student)
    transform_(teacher_CV, formula.teacher)
    maximum_C1, teacher_maximum_C1 = student_CV.amax(1, keepdim=True), teacher_CV.amax(1, keepdim=True)
    centred_CV = teacher_CV - teacher_maximum_C1
    power_CV = centred_CV.exp()
    teacher = [teacher_maximum_C1[:, 0], power_CV.sum(1), centred_CV.mul_(power_CV).sum(1)]
    torch.sub(student_CV, maximum_C1, out=centred_CV)
    torch.exp(centred_CV, out=power_CV)
    student = [maximum_C1[:, 0], power_CV.sum(1), centred_CV.mul_(power_CV).sum(1)]
    torch.sub(student_CV, teacher_CV, out=centred_CV)
    return torch.stack([*student, centred_CV.mul_(power_CV).sum(1), *teacher])


def integrate(formula: Formula, student_CV: torch.Tensor, teacher_CV: torch.Tensor, scalars_SC: torch.Tensor) -> torch.Tensor:
    """Divergence and E of a block's rows, [2, C]."""
    p_CV, q_CV = _student(student_CV, scalars_SC), _teacher(teacher_CV, scalars_SC)
    value_CV, slope_CV = divergence_terms(p_CV, q_CV, _log_ratio(student_CV, teacher_CV, scalars_SC), formula)
    return torch.stack([value_CV.sum(1), slope_CV.sum(1)])


def differentiate(formula: Formula, student_CV: torch.Tensor, teacher_CV: torch.Tensor, scalars_SC: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """weight times the derivative of the divergence by the products; float32 is written into student_CV."""
    expectation_C1, weight_C1 = scalars_SC[EXPECTATION][:, None], scalars_SC[WEIGHT][:, None]
    p_CV, ratio_CV = _student(student_CV, scalars_SC), _log_ratio(student_CV, teacher_CV, scalars_SC)
    if formula.is_plain_reverse:
        gradient_CV = p_CV.mul_(ratio_CV.sub_(expectation_C1)).mul_(weight_C1)
    else:
        _, slope_CV = divergence_terms(p_CV, _teacher(teacher_CV, scalars_SC), ratio_CV, formula)
        gradient_CV = (slope_CV - p_CV * expectation_C1).mul_(weight_C1)
    if not formula.student.is_identity:
        gradient_CV.mul_(transform_slope(student_CV, formula.student))
    return student_CV.copy_(gradient_CV) if dtype is torch.float32 else gradient_CV.to(dtype)


def divergence_terms(p: torch.Tensor, q: torch.Tensor, ratio: torch.Tensor, formula: Formula) -> tuple[torch.Tensor, torch.Tensor]:
    """(what each outcome adds to the divergence, p times its derivative by p up to a constant), given ratio = log p - log q.

    A constant added to d/dp changes nothing, since p d/dp - p E is what enters the gradient. Nothing overflows where p or q is 0.
    """
    smoothing, beta = formula.smoothing, formula.beta
    if smoothing:
        ratio = -log_add(math.log(smoothing), math.log1p(-smoothing) - ratio)  # log p - log((1 - eps) q + eps p)
        q = (1 - smoothing) * q + smoothing * p
    if formula.kind is DivergenceKind.reverse_kl:
        value = p * ratio
        return value, value - p * (ratio + math.log(smoothing)).exp() if smoothing else value
    if formula.kind is DivergenceKind.forward_kl:
        return -q * ratio, -q - smoothing * p * ratio if smoothing else -q
    from_student = -log_add(math.log1p(-beta), math.log(beta) - ratio)  # log p - log m, m = (1 - beta) p + beta q
    from_teacher = -log_add(math.log(beta), math.log1p(-beta) + ratio)  # log q - log m
    slope = p * ((1 - beta) * from_student + beta * smoothing * from_teacher)
    return (1 - beta) * p * from_student + beta * q * from_teacher, slope


def log_add(constant: float, values: torch.Tensor) -> torch.Tensor:
    """log(exp(constant) + exp(values)) without overflow."""
    return values.clamp(min=constant) + torch.log1p(torch.exp(-(values - constant).abs()))


def transform_slope(logits: torch.Tensor, transform: LogitTransform) -> torch.Tensor | float:
    """Derivative of the logits by the products."""
    if transform.softcap is not None:
        return transform.scale * (1 - (logits / transform.softcap) ** 2)
    return transform.scale


def _student(student_CV: torch.Tensor, scalars_SC: torch.Tensor) -> torch.Tensor:
    return (student_CV - scalars_SC[MAXIMUM][:, None]).exp_().mul_(scalars_SC[INVERSE][:, None])


def _teacher(teacher_CV: torch.Tensor, scalars_SC: torch.Tensor) -> torch.Tensor:
    return (teacher_CV - scalars_SC[TEACHER_MAXIMUM][:, None]).exp_().mul_(scalars_SC[TEACHER_INVERSE][:, None])


def _log_ratio(student_CV: torch.Tensor, teacher_CV: torch.Tensor, scalars_SC: torch.Tensor) -> torch.Tensor:
    return (student_CV - teacher_CV).sub_(scalars_SC[LOG_RATIO][:, None])
