"""Graders: completion text and reference answer -> score in [0, 1]. None executes what a model wrote."""

from collections.abc import Callable

from transformers import PreTrainedTokenizerBase

from rollout.chat import decode_completion
from rollout.config import GraderKind
from rollout.types import Rollout

Grader = Callable[[str, str], float]


def exact(completion: str, answer: str) -> float:
    """1 where the two are the same string after removing white space at both ends."""
    return float(completion.strip() == answer.strip())


GRADERS: dict[GraderKind, Grader] = {GraderKind.exact: exact}


def grade(kind: GraderKind, completion: str, answer: str | None, row: str) -> float:
    """Score of one completion. Raises ValueError, naming the row, where there is no reference answer to compare with."""
    if answer is None:
        raise ValueError(f"row {row} has no answer to grade against: map the column with columns.answer, or set grader=null")
    return GRADERS[kind](completion, answer)


def grade_rollout(kind: GraderKind, rollout: Rollout, tokenizer: PreTrainedTokenizerBase) -> float:
    """Score of a rollout's completion against its prompt's reference answer. Raises ValueError as `grade` does."""
    return grade(kind, decode_completion(rollout.completion_T.tolist(), tokenizer), rollout.prompt.answer, rollout.prompt.row)
