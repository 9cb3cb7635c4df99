"""The ranks that share a step's prompts and rollouts: few words that they exchange, as objects, seldom. What tensors need goes another way."""

from dataclasses import dataclass
from typing import Any, Protocol


class Ranks(Protocol):
    """The data-parallel ranks; `local_count` of them are processes of this machine."""

    index: int
    count: int
    local_count: int

    def gather(self, value: Any) -> list[Any]:
        """Every rank's value, in rank order; every rank calls it."""


@dataclass(frozen=True, slots=True)
class OneRank:
    """A run of a single process."""

    index: int = 0
    count: int = 1
    local_count: int = 1

    def gather(self, value: Any) -> list[Any]:
        return [value]
