"""Our divergence is the one that TRL, Liger and DeepSpeed compute, and our tail is DistillKit's; each is called as its own users call it.

48 tokens, 2048 outcomes. beta is one convention in all three: 0 is forward KL, 1 is reverse KL.
"""

import os
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from opd.divergence import divergence

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
