"""Typed settings of the loss. Divergence and estimators are used without the commands too, so these stand apart from opd/config.py."""

from dataclasses import dataclass
from enum import Enum


class DivergenceKind(Enum):
    """reverse_kl: KL(student || teacher). forward_kl: KL(teacher || student). jsd: generalised Jensen-Shannon divergence."""

    reverse_kl = "reverse_kl"
    forward_kl = "forward_kl"
    jsd = "jsd"


class Backend(Enum):
    """Who computes the element-wise part of the divergence; the matrix products are torch's.

    auto: triton on CUDA where it is installed, compiled on a CPU with a C++ compiler and a vocabulary of 16,384 or more, else eager.
    """

    auto = "auto"
    eager = "eager"
    compiled = "compiled"
    triton = "triton"


@dataclass(slots=True)
class LossConfig:
    """How a token's distance from its teacher is measured; what the teacher gives for it is teachers.signal.

    kind: the divergence.
    beta: of jsd, from forward KL (0) to reverse KL (1).
    temperature: divides the logits of student and teacher before they are compared; exact divergence only.
    smoothing: mixes this much of the student into the teacher, so that reverse KL is at most -log(smoothing); 0 does not.
    cap: a token's loss is at most this, in nats, and a token beyond it gives no gradient (policy gradient: the advantage's size is at most
        this); null has no cap.
    policy_gradient: reverse KL by the sampled token alone, with the exact reverse KL as baseline; for comparison with the exact gradient.
    constant_penalty: a control in which no teacher speaks: with teachers.signal=sampled_token, the advantage is -1 where the student gave the sampled token
        less than half, else 0. A domain that it improves was merely elicited: its skill was the student's already (arXiv:2608.31046).
    backend: who computes the element-wise part.
    """

    kind: DivergenceKind = DivergenceKind.reverse_kl
    beta: float = 0.5
    temperature: float = 1.0
    smoothing: float = 0.0
    cap: float | None = None
    policy_gradient: bool = False
    constant_penalty: bool = False
    backend: Backend = Backend.auto
