"""Figures of each teacher: what scoring and loading took in a step.

    teacher/T/seconds                  of scoring, without waiting for weights; of the rank that took longest
    teacher/T/loads, bytes_loaded      readings of its weights and of its head, and what they read, over all ranks; of teachers that share a base with
                                       adapters of their own, the first of the run has what concerns the base
    teacher/T/load_seconds             of reading, in the background or not; of the rank that took longest
    teacher/T/load_hidden              share of those seconds that nobody waited for; not there where nothing was read
    teacher/T/rounding_kl              KL(teacher || teacher from hidden states in teachers.hidden_dtype), nats per token, of some rollouts

T: the domains that the teacher scores, joined by +.
"""

from dataclasses import dataclass

from teachers.residency import LoadFigures


@dataclass(slots=True)
class ScoringFigures:
    """Seconds of scoring; KL that rounding of hidden states made, summed over so many tokens."""

    seconds: float = 0.0
    rounding_kl: float = 0.0
    rounded_tokens: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class TeacherFigures:
    """Of one teacher on one rank; None where there was nothing."""

    scoring: ScoringFigures | None = None
    loading: LoadFigures | None = None


def teacher_metrics(figures: dict[str, list[TeacherFigures]]) -> dict[str, float]:
    """Metrics of teachers by what they are called, from every rank's figures of them."""
    metrics: dict[str, float] = {"system/teacher_loads": 0}
    for name, ranks in figures.items():
        scoring = [rank.scoring for rank in ranks if rank.scoring is not None]
        loading = [rank.loading for rank in ranks if rank.loading is not None]
        if scoring:
            metrics[f"teacher/{name}/seconds"] = max(own.seconds for own in scoring)
            tokens = sum(own.rounded_tokens for own in scoring)
            if tokens:
                metrics[f"teacher/{name}/rounding_kl"] = sum(own.rounding_kl for own in scoring) / tokens
        metrics[f"teacher/{name}/loads"] = sum(own.loads for own in loading)
        metrics[f"teacher/{name}/bytes_loaded"] = sum(own.num_bytes for own in loading)
        metrics["system/teacher_loads"] += metrics[f"teacher/{name}/loads"]
        seconds = sum(own.seconds for own in loading)
        if seconds:
            metrics[f"teacher/{name}/load_seconds"] = max(own.seconds for own in loading)
            metrics[f"teacher/{name}/load_hidden"] = max(0.0, 1 - sum(own.waited for own in loading) / seconds)
    return metrics
