"""Settings of quantisation-aware training: what of the student is in FP4, and what is measured of it."""

from dataclasses import dataclass
from enum import Enum


class ExpertFormat(Enum):
    """none: routed experts multiply in the student's dtype. mxfp4: with FP4 values (rollout/fp4.py), in training and in sampling."""

    none = "none"
    mxfp4 = "mxfp4"


@dataclass(slots=True)
class QuantConfig:
    """Quantisation-aware training of the student (arXiv:2606.19348, 5.2.1).

    experts: format of the routed experts; router, shared experts and everything else stay in the student's dtype.
    indexer: quantise queries and keys of DeepSeek-V4's lightning indexer to FP4.
    measure_every: steps between two measurements of flipped values, scale spread, recall, and the KL that quantised experts cost; 0 never.
    measure_rollouts: rollouts of each domain that the KL and the indexer's recall are measured on, shared among the ranks (one each at least).
    """

    experts: ExpertFormat = ExpertFormat.none
    indexer: bool = False
    measure_every: int = 10
    measure_rollouts: int = 8
