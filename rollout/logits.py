"""From last hidden states to logits: the product with a head, and what a family does to it.

Logits are float32 whatever the inputs, since bf16 logits would carry an error of 0.06 at size 20. On CUDA 16-bit inputs enter the product
as they are and it accumulates in float32; elsewhere they are converted.

C: tokens. D: hidden size. V: vocabulary, or a block of it.
"""

import torch

from rollout.types import LogitTransform

LOGITS_AT_A_TIME = 1 << 24
"""Logits of one piece when log-probabilities are taken: 64 MiB of float32."""


def product_into(out_CV: torch.Tensor, hidden_CD: torch.Tensor, head_VD: torch.Tensor) -> None:
    """out = hidden times head transposed, in float32."""
    if enter_as_they_are(hidden_CD, head_VD):
        torch.mm(hidden_CD, head_VD.T, out_dtype=torch.float32, out=out_CV)
    else:
        torch.mm(hidden_CD.float(), head_VD.T.float(), out=out_CV)


def transform_(products: torch.Tensor, transform: LogitTransform) -> None:
    """Products -> logits, in place."""
    if transform.softcap is not None:
        products.mul_(transform.scale / transform.softcap).tanh_().mul_(transform.softcap)
    elif transform.scale != 1:
        products.mul_(transform.scale)


def log_probabilities(hidden_CD: torch.Tensor, head_VD: torch.Tensor, transform: LogitTransform) -> torch.Tensor:
    """logprob_CV at temperature 1, float32, of a few tokens: see LOGITS_AT_A_TIME."""
    logits_CV = torch.empty(len(hidden_CD), len(head_VD), device=hidden_CD.device)
    product_into(logits_CV, hidden_CD, head_VD)
    transform_(logits_CV, transform)
    return logits_CV.log_softmax(-1)


def enter_as_they_are(left: torch.Tensor, right: torch.Tensor) -> bool:
    """Whether a product takes both factors in their own 16-bit dtype and accumulates in float32."""
    return left.is_cuda and left.dtype == right.dtype and left.dtype in (torch.bfloat16, torch.float16)
