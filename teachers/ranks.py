"""Doing something on all ranks or on none.

What ranks exchange here are few words about their teachers. What the teachers' weights need goes through torch's FSDP2 (teachers/sharding.py).
"""

from collections.abc import Callable
from typing import TypeVar

from rollout.errors import first_sentence
from rollout.ranks import Ranks
from teachers.types import TeacherFailure

Result = TypeVar("Result")


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
