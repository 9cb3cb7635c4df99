"""The same divergence as other libraries compute it, as a person would call their functions.

    trl        trl.trainer.distillation_trainer._chunked_divergence_loss: from hidden states and heads, in tiles; recomputes the logits in
               the backward (trl 1.16.0)
    liger      liger_kernel.chunked_loss.LigerFusedLinearJSDLoss with its defaults: from hidden states and heads, chunks of 1024 tokens,
               gradients in the forward, each chunk under torch.compile (liger-kernel 0.8.5); liger_128 is the same in chunks of 128 tokens, and
               liger_torch that without torch.compile
    deepspeed  deepspeed.runtime.rollout.opsd.generalized_jsd_loss: from whole logits, which its caller computes (deepspeed 0.19.8)

beta is one convention in all three: 0 is forward KL, 1 is reverse KL, between them lies the generalised JSD with the mixture
(1 - beta) p + beta q. All return the mean over tokens. Each is called with its other terms off (no hard loss, no top-k, no clipping).

N: tokens. D: hidden size, of the model that the name says. V: vocabulary.
"""

import os
from collections.abc import Callable

import torch

from opd.bench_contenders import Contender, Inputs, LossOf, from_loss
from opd.loss_config import DivergenceKind

os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")

BETA = {DivergenceKind.forward_kl: 0.0, DivergenceKind.jsd: 0.5, DivergenceKind.reverse_kl: 1.0}


def _trl(inputs: Inputs) -> Callable[[], torch.Tensor]:
    from trl.trainer.distillation_trainer import _chunked_divergence_loss

    mask_1N = torch.ones_like(inputs.weight_N)[None]

    def forward() -> torch.Tensor:
        hidden = (inputs.student_hidden_ND[None], inputs.teacher_hidden_ND[None])
        return _chunked_divergence_loss(*hidden, inputs.student_head_VD, inputs.teacher_head_VD, mask_1N, BETA[inputs.kind])[0]

    return forward


def _liger(chunk_size: int, compiled: bool = True) -> LossOf:
    """Seconds seen on 2 CPU cores (D 256, medians of 5, reverse KL; compiled or not, chunks of 128 or 1024 tokens):

    N 512, V 32768: compiled 0.24 and 0.23, not compiled 0.39 and 0.47; V 151936: compiled 1.77 and 1.41, not compiled 2.74 and 2.50;
    N 2048, V 32768: compiled 1.06 and 1.14. Compiled is the faster everywhere, and both chunk sizes are measured: the larger
    takes more memory.
    """

    def loss_of(inputs: Inputs) -> Callable[[], torch.Tensor]:
        from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss

        loss = LigerFusedLinearJSDLoss(beta=BETA[inputs.kind], weight_hard_loss=0.0, weight_soft_loss=1.0, compiled=compiled, chunk_size=chunk_size)
        labels_N = torch.zeros_like(inputs.weight_N, dtype=torch.int64)  # which tokens count; no hard loss looks at their values
        tensors = (inputs.student_hidden_ND, inputs.student_head_VD, inputs.teacher_hidden_ND, inputs.teacher_head_VD, labels_N)
        return lambda: loss(*tensors)

    return loss_of


def _deepspeed(inputs: Inputs) -> Callable[[], torch.Tensor]:
    from deepspeed.runtime.rollout.opsd import generalized_jsd_loss

    mask_1N = torch.ones_like(inputs.weight_N, dtype=torch.bool)[None]

    def forward() -> torch.Tensor:
        student_logits_NV = inputs.student_hidden_ND @ inputs.student_head_VD.T
        teacher_logits_NV = inputs.teacher_hidden_ND @ inputs.teacher_head_VD.T
        return generalized_jsd_loss(student_logits_NV[None], teacher_logits_NV[None], mask_1N, beta=BETA[inputs.kind], teacher_top_k=None).loss

    return forward


PEERS = {
    "trl": Contender(from_loss(_trl)),
    "liger": Contender(from_loss(_liger(1024))),
    "liger_128": Contender(from_loss(_liger(128))),
    "liger_torch": Contender(from_loss(_liger(128, compiled=False))),
    "deepspeed": Contender(from_loss(_deepspeed), whole_matrices=10),
}
