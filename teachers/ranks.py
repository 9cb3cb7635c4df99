"""The ranks that share a step's rollouts, and doing something on all of them or on none.

What stands here are the few words that ranks exchange about their teachers. What their weights need goes through torch's FSDP2 (teachers/sharding.py).
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

from rollout.errors import first_sentence
from teachers.types import TeacherFailure

Result = TypeVar("Result")


class Ranks(Protocol):
    """The ranks that share a step's rollouts; `local_count` of them are processes of this machine."""

    count: int
    local_count: int

    def gather(self, value: Any) -> list[Any]:
        """Every rank's value, in rank order; every rank calls it."""


@dataclass(frozen=True, slots=True)
class OneRank:
    count: int = 1
    local_count: int = 1

    def gather(self, value: Any) -> list[Any]:
        return [value]


def on_all(ranks: Ranks, attempt: Callable[[], Result]) -> Result:
    """What an attempt gives, where it succeeds on every rank; every rank calls it, so that none goes on to wait for one that has failed.

    Raises what the attempt raised here, or TeacherFailure with what it raised on another rank.
    """
    result = own = None
    try:
        result = attempt()
    except Exception as error:  # whatever it is, the other ranks have to know
        own = error
    problems = ranks.gather(None if own is None else first_sentence(own))
    if own is not None:
        raise own
    for number, problem in enumerate(problems):
        if problem is not None:
            raise TeacherFailure(f"{problem} (on rank {number})")
    return result
