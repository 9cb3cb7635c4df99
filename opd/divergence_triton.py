"""The element-wise passes of the divergence as Triton kernels: one program per row, float32 statistics, one reading of the logits a pass.

The matrix products stay with torch (cuBLAS): at D = 4096 they are nine tenths of the work, and a kernel that fused them would have to beat it.
What a kernel adds to torch's own passes is that a row is read once to normalise and once to differentiate, and that the gradient
leaves in the dtype in which the next product wants it. The formulas are those of opd/divergence_passes.py; the same tests run on both.

Without a GPU the kernels run in Triton's interpreter (TRITON_INTERPRET=1, set before triton is imported).

C: tokens of a tile. V: columns of a block. S: statistics, or scalars, of a row.
"""

import math

import torch
import triton
import triton.language as tl

from opd.divergence_passes import STATISTICS, Formula, Passes
from opd.loss_config import DivergenceKind

BLOCK = 4096
"""Columns that a program holds at a time."""

WARPS = 8
"""16 columns for each of 256 threads, so that a row's numbers stay in registers."""

REVERSE, FORWARD = tl.constexpr(0), tl.constexpr(1)
KINDS = {DivergenceKind.reverse_kl: 0, DivergenceKind.forward_kl: 1, DivergenceKind.jsd: 2}


def triton_passes(formula: Formula) -> Passes:
    """The passes for a formula. The kernels know the rows of statistics and scalars by their numbers in opd/divergence_passes.py."""
    beta, smoothing = formula.beta, formula.smoothing
    terms = {
        "KIND": KINDS[formula.kind],
        "BETA": beta,
        "LOG_BETA": math.log(beta),
        "LOG_REST": math.log1p(-beta),
        "SMOOTHING": smoothing,
        "LOG_SMOOTHING": math.log(smoothing) if smoothing else 0.0,
        "LOG_KEPT": math.log1p(-smoothing),
    }
    student, teacher = formula.student, formula.teacher
    transforms = {"SCALE": student.scale, "CAP": student.softcap or 0.0, "TEACHER_SCALE": teacher.scale, "TEACHER_CAP": teacher.softcap or 0.0}

    def normalise(student_CV: torch.Tensor, teacher_CV: torch.Tensor) -> torch.Tensor:
        rows, columns = student_CV.shape
        statistics_SC = torch.empty(len(STATISTICS), rows, device=student_CV.device)
        _normalise[(rows,)](student_CV, teacher_CV, statistics_SC, rows, columns, BLOCK=_block(columns), num_warps=WARPS, **transforms)
        return statistics_SC

    def integrate(student_CV: torch.Tensor, teacher_CV: torch.Tensor, scalars_SC: torch.Tensor) -> torch.Tensor:
        rows, columns = student_CV.shape
        sums_2C = torch.empty(2, rows, device=student_CV.device)
        _integrate[(rows,)](student_CV, teacher_CV, scalars_SC, sums_2C, rows, columns, BLOCK=_block(columns), num_warps=WARPS, **terms)
        return sums_2C

    def differentiate(student_CV: torch.Tensor, teacher_CV: torch.Tensor, scalars_SC: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        rows, columns = student_CV.shape
        gradient_CV = student_CV if dtype is torch.float32 else torch.empty_like(student_CV, dtype=dtype)
        block = _block(columns)
        grid = (rows, triton.cdiv(columns, block))
        slope = {"SCALE": student.scale, "CAP": student.softcap or 0.0}
        _differentiate[grid](student_CV, teacher_CV, scalars_SC, gradient_CV, rows, columns, BLOCK=block, num_warps=WARPS, **slope, **terms)
        return gradient_CV

    return Passes(normalise, integrate, differentiate)


def _block(columns: int) -> int:
    return min(BLOCK, max(16, triton.next_power_of_2(columns)))


@triton.jit
def _logits(products, SCALE: tl.constexpr, CAP: tl.constexpr):
    if CAP != 0.0:
        x = products * (SCALE / CAP)
        y = x * x
        near = x * (1.0 - y * (1.0 / 3 - y * (2.0 / 15 - y * (17.0 / 315 - y * (62.0 / 2835)))))  # tanh near 0, where the other form cancels
        return CAP * tl.where(y < 0.04, near, 1.0 - 2.0 / (tl.exp(2.0 * x) + 1.0))
    else:
        return products * SCALE


@triton.jit
def _log_add(constant, values):
    return tl.maximum(values, constant) + tl.log(1.0 + tl.exp(-tl.abs(values - constant)))


@triton.jit
def _terms(
    p, q, ratio, KIND: tl.constexpr, BETA: tl.constexpr, LOG_BETA: tl.constexpr, LOG_REST: tl.constexpr,
    SMOOTHING: tl.constexpr, LOG_SMOOTHING: tl.constexpr, LOG_KEPT: tl.constexpr,
):  # fmt: skip
    """opd.divergence_passes.divergence_terms."""
    if SMOOTHING != 0.0:
        ratio = -_log_add(LOG_SMOOTHING, LOG_KEPT - ratio)
        q = (1.0 - SMOOTHING) * q + SMOOTHING * p
    if KIND == REVERSE:
        value = p * ratio
        slope = value
        if SMOOTHING != 0.0:
            slope = value - p * tl.exp(ratio + LOG_SMOOTHING)
    elif KIND == FORWARD:
        value = -q * ratio
        slope = -q - SMOOTHING * p * ratio
    else:
        from_student = -_log_add(LOG_REST, LOG_BETA - ratio)
        from_teacher = -_log_add(LOG_BETA, LOG_REST + ratio)
        value = (1.0 - BETA) * p * from_student + BETA * q * from_teacher
        slope = p * ((1.0 - BETA) * from_student + BETA * SMOOTHING * from_teacher)
    return value, slope


@triton.jit
def _take_in(maximum, total, moment, values, inside):
    """Statistics of a row with further values: (maximum, sum e, sum e (z - maximum), factor to the new maximum, e of the values)."""
    new = tl.maximum(maximum, tl.max(tl.where(inside, values, -float("inf")), axis=0))
    factor = tl.exp(maximum - new)
    power = tl.where(inside, tl.exp(values - new), 0.0)
    moment = (moment + (maximum - new) * total) * factor + tl.sum(power * (values - new), axis=0)
    return new, total * factor + tl.sum(power, axis=0), moment, factor, power


@triton.jit
def _normalise(
    student_ptr, teacher_ptr, statistics_ptr, rows, columns, BLOCK: tl.constexpr,
    SCALE: tl.constexpr, CAP: tl.constexpr, TEACHER_SCALE: tl.constexpr, TEACHER_CAP: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0)
    start = row.to(tl.int64) * columns
    maximum, teacher_maximum = -1e30, -1e30  # finite, so that 0 times it is 0
    total, moment, difference, teacher_total, teacher_moment = 0.0, 0.0, 0.0, 0.0, 0.0
    for first in range(0, columns, BLOCK):
        column = first + tl.arange(0, BLOCK)
        inside = column < columns
        z = _logits(tl.load(student_ptr + start + column, mask=inside, other=0.0), SCALE, CAP)
        other = _logits(tl.load(teacher_ptr + start + column, mask=inside, other=0.0), TEACHER_SCALE, TEACHER_CAP)
        if CAP != 0.0 or SCALE != 1.0:
            tl.store(student_ptr + start + column, z, mask=inside)
        if TEACHER_CAP != 0.0 or TEACHER_SCALE != 1.0:
            tl.store(teacher_ptr + start + column, other, mask=inside)

        maximum, total, moment, factor, power = _take_in(maximum, total, moment, z, inside)
        difference = difference * factor + tl.sum(power * (z - other), axis=0)
        teacher_maximum, teacher_total, teacher_moment, _, _ = _take_in(teacher_maximum, teacher_total, teacher_moment, other, inside)
    tl.store(statistics_ptr + row, maximum)
    tl.store(statistics_ptr + rows + row, total)
    tl.store(statistics_ptr + 2 * rows + row, moment)
    tl.store(statistics_ptr + 3 * rows + row, difference)
    tl.store(statistics_ptr + 4 * rows + row, teacher_maximum)
    tl.store(statistics_ptr + 5 * rows + row, teacher_total)
    tl.store(statistics_ptr + 6 * rows + row, teacher_moment)


@triton.jit
def _distributions(student_ptr, teacher_ptr, scalars_ptr, row, rows, column, columns, inside):
    """(student's logits, p, q, log p - log q) of one row's columns."""
    offset = row.to(tl.int64) * columns + column
    z = tl.load(student_ptr + offset, mask=inside, other=0.0)
    other = tl.load(teacher_ptr + offset, mask=inside, other=0.0)
    p = tl.exp(z - tl.load(scalars_ptr + row)) * tl.load(scalars_ptr + rows + row)
    q = tl.exp(other - tl.load(scalars_ptr + 2 * rows + row)) * tl.load(scalars_ptr + 3 * rows + row)
    return z, p, q, (z - other) - tl.load(scalars_ptr + 4 * rows + row)


@triton.jit
def _integrate(
    student_ptr, teacher_ptr, scalars_ptr, sums_ptr, rows, columns, BLOCK: tl.constexpr, KIND: tl.constexpr, BETA: tl.constexpr,
    LOG_BETA: tl.constexpr, LOG_REST: tl.constexpr, SMOOTHING: tl.constexpr, LOG_SMOOTHING: tl.constexpr, LOG_KEPT: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0)
    value_sum, slope_sum = 0.0, 0.0
    for first in range(0, columns, BLOCK):
        column = first + tl.arange(0, BLOCK)
        inside = column < columns
        _, p, q, ratio = _distributions(student_ptr, teacher_ptr, scalars_ptr, row, rows, column, columns, inside)
        value, slope = _terms(p, q, ratio, KIND, BETA, LOG_BETA, LOG_REST, SMOOTHING, LOG_SMOOTHING, LOG_KEPT)
        value_sum += tl.sum(tl.where(inside, value, 0.0), axis=0)
        slope_sum += tl.sum(tl.where(inside, slope, 0.0), axis=0)
    tl.store(sums_ptr + row, value_sum)
    tl.store(sums_ptr + rows + row, slope_sum)


@triton.jit
def _differentiate(
    student_ptr, teacher_ptr, scalars_ptr, gradient_ptr, rows, columns, BLOCK: tl.constexpr, SCALE: tl.constexpr, CAP: tl.constexpr,
    KIND: tl.constexpr, BETA: tl.constexpr, LOG_BETA: tl.constexpr, LOG_REST: tl.constexpr, SMOOTHING: tl.constexpr,
    LOG_SMOOTHING: tl.constexpr, LOG_KEPT: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < columns
    z, p, q, ratio = _distributions(student_ptr, teacher_ptr, scalars_ptr, row, rows, column, columns, inside)
    expectation, weight = tl.load(scalars_ptr + 5 * rows + row), tl.load(scalars_ptr + 6 * rows + row)
    if KIND == REVERSE and SMOOTHING == 0.0:
        gradient = p * (ratio - expectation) * weight
    else:
        _, slope = _terms(p, q, ratio, KIND, BETA, LOG_BETA, LOG_REST, SMOOTHING, LOG_SMOOTHING, LOG_KEPT)
        gradient = (slope - p * expectation) * weight
    if CAP != 0.0:
        gradient *= SCALE * (1.0 - (z / CAP) * (z / CAP))
    else:
        gradient *= SCALE
    tl.store(gradient_ptr + row.to(tl.int64) * columns + column, gradient.to(gradient_ptr.dtype.element_ty), mask=inside)
