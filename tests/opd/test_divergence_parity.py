"""Our divergence is the one that TRL, Liger and DeepSpeed compute, and our tail is DistillKit's; each is called as its own users call it.

48 tokens, 2048 outcomes. beta is one convention in all three: 0 is forward KL, 1 is reverse KL.
"""

import math
import os
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from opd.divergence import ModelStates, divergence
from opd.estimators import TopK, top_k_divergence
from opd.loss_config import DivergenceKind, LossConfig

os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")

N, V, D, K = 48, 2048, 64, 32
BETAS = {"forward_kl": 0.0, "jsd": 0.5, "reverse_kl": 1.0}


@pytest.fixture
def tensors() -> list[Tensor]:
    """Student's hidden states and head (both with gradients), teacher's hidden states and head; logits N(0, 4)."""
    generator = torch.Generator().manual_seed(0)
    found = []
    for _ in range(2):
        found += [torch.randn(N, D, generator=generator), 2 * D**-0.5 * torch.randn(V, D, generator=generator)]
    return [found[0].requires_grad_(), found[1].requires_grad_(), *found[2:]]


def trl(hidden_ND: Tensor, head_VD: Tensor, teacher_hidden_ND: Tensor, teacher_head_VD: Tensor, beta: float) -> Tensor:
    trainer = pytest.importorskip("trl.trainer.distillation_trainer")
    return trainer._chunked_divergence_loss(hidden_ND[None], teacher_hidden_ND[None], head_VD, teacher_head_VD, torch.ones(1, N), beta)[0]


def liger(hidden_ND: Tensor, head_VD: Tensor, teacher_hidden_ND: Tensor, teacher_head_VD: Tensor, beta: float) -> Tensor:
    losses = pytest.importorskip("liger_kernel.chunked_loss")
    loss = losses.LigerFusedLinearJSDLoss(beta=beta, weight_hard_loss=0.0, weight_soft_loss=1.0, compiled=False, chunk_size=16)
    return loss(hidden_ND, head_VD, teacher_hidden_ND, teacher_head_VD, torch.zeros(N, dtype=torch.int64))


def deepspeed(hidden_ND: Tensor, head_VD: Tensor, teacher_hidden_ND: Tensor, teacher_head_VD: Tensor, beta: float) -> Tensor:
    opsd = pytest.importorskip("deepspeed.runtime.rollout.opsd")
    logits_NV, teacher_logits_NV = hidden_ND @ head_VD.T, teacher_hidden_ND @ teacher_head_VD.T
    return opsd.generalized_jsd_loss(logits_NV[None], teacher_logits_NV[None], torch.ones(1, N, dtype=torch.bool), beta=beta, teacher_top_k=None).loss


def relative(found: Tensor, expected: Tensor) -> float:
    return float((found.detach().double() - expected.detach().double()).norm() / expected.detach().double().norm())


@pytest.mark.parametrize("kind", BETAS)
@pytest.mark.parametrize("peer", [trl, liger, deepspeed], ids=["trl", "liger", "deepspeed"])
def test_loss_and_both_gradients_are_the_peers(tensors, peer: Callable[..., Tensor], kind):
    expected = peer(*tensors, BETAS[kind])
    loss, _ = divergence(*tensors, torch.full((N,), 1 / N), kind=kind)
    assert relative(loss, expected) <= 1e-5
    for found, right in zip(torch.autograd.grad(loss, tensors[:2]), torch.autograd.grad(expected, tensors[:2]), strict=True):
        assert relative(found, right) <= 1e-5


@pytest.mark.parametrize("beta", [0.2, 0.8])
@pytest.mark.parametrize("peer", [trl, liger, deepspeed], ids=["trl", "liger", "deepspeed"])
def test_beta_mixes_as_the_peers_do(tensors, peer: Callable[..., Tensor], beta):
    loss, _ = divergence(*tensors, torch.full((N,), 1 / N), kind="jsd", beta=beta)
    assert relative(loss, peer(*tensors, beta)) <= 1e-5


@pytest.mark.parametrize("kind", BETAS)
def test_the_tail_is_the_mass_that_distillkit_spreads_uniformly(tensors, kind):
    """DistillKit's SYMMETRIC_UNIFORM gives every outcome outside the top-k an equal share of what is left over, for teacher and student alike."""
    hidden_ND, head_VD, teacher_hidden_ND, teacher_head_VD = tensors
    log_p_NV = (hidden_ND.detach().double() @ head_VD.detach().double().T).log_softmax(-1)
    log_q_NV = (teacher_hidden_ND.double() @ teacher_head_VD.double().T).log_softmax(-1)
    logprob_NK, token_NK = log_q_NV.topk(K)

    def spread(logprob_NV: Tensor) -> Tensor:
        kept_NK = logprob_NV.gather(1, token_NK)
        share_N1 = (1 - kept_NK.exp().sum(1, keepdim=True)) / (V - K)
        return share_N1.log().expand(N, V).scatter(1, token_NK, kept_NK)

    p_NV, q_NV = spread(log_p_NV), spread(log_q_NV)
    middle_NV = torch.logaddexp(p_NV, q_NV) - math.log(2)
    expected_N = {
        "forward_kl": q_NV.exp() * (q_NV - p_NV),
        "reverse_kl": p_NV.exp() * (p_NV - q_NV),
        "jsd": (p_NV.exp() * (p_NV - middle_NV) + q_NV.exp() * (q_NV - middle_NV)) / 2,
    }[kind].sum(1)
    cfg = LossConfig(kind=DivergenceKind(kind))
    _, losses = top_k_divergence(ModelStates(hidden_ND, head_VD), TopK(token_NK, logprob_NK), torch.ones(N), cfg, V)
    assert relative(losses.loss_N, expected_N) <= 1e-6
