"""Settings of quantisation: what trains under FP4, and how a model is exported."""

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
    indexer: also quantise queries and keys of DeepSeek-V4's lightning indexer to FP4.
    measure_every: steps between two measurements of flipped values, scale spread, and the KL that quantisation costs; 0 never.
    measure_rollouts: rollouts of each domain and rank that the KL is measured on.
    """

    experts: ExpertFormat = ExpertFormat.none
    indexer: bool = False
    measure_every: int = 10
    measure_rollouts: int = 8
