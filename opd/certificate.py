"""The recovery certificate: an accuracy that a student cannot fall below, from its divergence alone.

Student and teacher answer the same prompts at temperature 1 up to the same length, and the sequence divergence kappa = E_student[sum_t KL(p_t || q_t)] is
measured over the whole vocabulary on the student's own completions (chain rule: it is KL(student || teacher) of whole completions). Whatever a grader
accepts is an event of a completion, and no event tells two distributions better apart than the completions themselves (data-processing inequality;
a score between 0 and 1 is an event with a coin of its own):

    kl(a_S || a_T) <= kappa,     kl(a || b) = a log(a / b) + (1 - a) log((1 - a) / (1 - b))

with a_S, a_T the two accuracies. The floor is the smallest a_S for which that holds. It is a theorem, so that a measured accuracy which contradicts it,
beyond the errors of all three figures, is a bug (a mask, a temperature, other prompts), and never a property of the student. It says nothing of greedy
answers, and completions cut at max_new_tokens count as they are graded.
"""

import math
from dataclasses import dataclass

from opd.intervals import Interval, Z, proportion

STANDARD_ERRORS = 3.0
"""Of each figure, before a contradiction is called one."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Certificate:
    """What a domain's divergence says of its accuracy.

    floor: the smallest accuracy that the measured divergence and the teacher's measured accuracy allow. A teacher that was right on every prompt
        counts as wrong on half of one: it would else guarantee everything, whatever the divergence.
    low: the same at the upper end of the divergence's 95 % interval and the lower end of the teacher's accuracy.
    share: low over the teacher's measured accuracy, what is guaranteed of it; None where that is 0.
    holds: whether the measured accuracy is in keeping with it.
    """

    floor: float
    low: float
    share: float | None
    holds: bool


def certify(student: Interval, teacher: Interval, prompts: int, kl_per_sequence: Interval) -> Certificate:
    """student, teacher: accuracies on the same prompts, of which there are `prompts`; kl_per_sequence: KL(student || teacher) in nats per completion."""
    low = accuracy_floor(teacher.low, kl_per_sequence.high)
    return Certificate(
        floor=accuracy_floor(min(teacher.value, 1 - 0.5 / prompts), kl_per_sequence.value),
        low=low,
        share=low / teacher.value if teacher.value > 0 else None,
        holds=_least_kl(student.value, teacher.value, prompts) <= kl_per_sequence.value + STANDARD_ERRORS * (kl_per_sequence.high - kl_per_sequence.value) / Z,
    )


def binary_kl(one: float, other: float) -> float:
    """KL of two coins with these chances of heads, in nats; infinite where the first can show what the second cannot."""
    total = 0.0
    for p, q in ((one, other), (1 - one, 1 - other)):
        if p > 0:
            total += p * math.log(p / q) if q > 0 else math.inf
    return total


def accuracy_floor(teacher: float, kl: float) -> float:
    """The smallest a with kl(a || teacher) <= kl, to 1e-12; `teacher` itself where kl is 0 or less."""
    low, high = 0.0, teacher
    if kl <= 0 or binary_kl(low, teacher) <= kl:
        return high if kl <= 0 else low
    while high - low > 1e-12:
        middle = (low + high) / 2
        low, high = (middle, high) if binary_kl(middle, teacher) > kl else (low, middle)
    return high


def _least_kl(student: float, teacher: float, prompts: int) -> float:
    """The smallest kl(a_S || a_T) of accuracies within their errors; 0 where these overlap."""
    ours, theirs = (proportion(accuracy * prompts, prompts, STANDARD_ERRORS) for accuracy in (student, teacher))
    if ours.high < theirs.low:
        return binary_kl(ours.high, theirs.low)
    return binary_kl(ours.low, theirs.high) if theirs.high < ours.low else 0.0
