"""Counter-based sampling: a token is a function of (seed, request, position, logits) and of nothing else.

There is no generator whose state would have to be saved: the uniform number for a token is hashed from its key, so that a
completion does not depend on what else is in the batch, on the number of ranks, or on an interruption. The token is then
read off the cumulative distribution (one uniform number per token, where Gumbel noise would need one per vocabulary entry).

B: rows. V: vocabulary.
"""

import math

import numpy as np
import torch

from rollout.config import SamplingConfig


def uniform(seed: int, request_B: torch.Tensor, position: int) -> torch.Tensor:
    """Uniform numbers in [0, 1), float64 [B] on the CPU: the top 53 bits of a 64-bit mix of (seed, request, position).

    In numpy: a dozen operations on a few numbers, at every decode step, which torch takes ten times as long to dispatch.
    """
    request = request_B.cpu().numpy().astype(np.uint64)
    with np.errstate(over="ignore"):  # of a single number it would warn
        state = _mix(_mix(request + _wrap(0x9E3779B97F4A7C15 * (seed + 1))) + _wrap(0xD1B54A32D192ED03 * (position + 1)))
        return torch.from_numpy((_mix(state) >> np.uint64(11)).astype(np.float64) * 2.0**-53)


def draw(logits_BV: torch.Tensor, uniform_B: torch.Tensor, cfg: SamplingConfig) -> tuple[torch.Tensor, torch.Tensor]:
    """One token per row by inverting the cumulative distribution, and its log-probability under the distribution it was drawn from.

    Temperature first, then min_p, top_k and top_p, each on what the one before left. Returns (token_B int64, logprob_B float32); at temperature 0
    the most likely token, with its log-probability at temperature 1.
    """
    logits_BV = logits_BV.float()
    if cfg.temperature == 0:
        logprob_BV = torch.log_softmax(logits_BV, dim=-1)
        token_B = logits_BV.argmax(dim=-1)
        return token_B, logprob_BV.gather(1, token_B[:, None])[:, 0]
    logprob_BV = torch.log_softmax(logits_BV / cfg.temperature, dim=-1)
    if cfg.truncates:
        logprob_BV = torch.log_softmax(_truncated(logprob_BV, cfg), dim=-1)
    cumulative_BV = logprob_BV.double().exp().cumsum(dim=-1)
    target_B1 = (uniform_B * cumulative_BV[:, -1])[:, None]
    token_B = torch.searchsorted(cumulative_BV, target_B1, right=True)[:, 0].clamp_(max=logits_BV.shape[-1] - 1)
    return token_B, logprob_BV.gather(1, token_B[:, None])[:, 0]


def _truncated(logprob_BV: torch.Tensor, cfg: SamplingConfig) -> torch.Tensor:
    """Log-probabilities with -inf for the tokens that min_p, top_k and top_p leave out; the likeliest token always stays."""
    sorted_BV, order_BV = logprob_BV.sort(dim=-1, descending=True, stable=True)
    kept_BV = torch.ones_like(sorted_BV, dtype=torch.bool)
    if cfg.min_p > 0:
        kept_BV &= sorted_BV >= sorted_BV[:, :1] + math.log(cfg.min_p)
    if cfg.top_k is not None:
        kept_BV[:, cfg.top_k :] = False
    if cfg.top_p < 1:
        probability_BV = sorted_BV.masked_fill(~kept_BV, -math.inf).double().softmax(dim=-1)
        kept_BV &= probability_BV.cumsum(dim=-1) - probability_BV < cfg.top_p  # the smallest set whose mass reaches top_p
    kept_BV[:, 0] = True
    return logprob_BV.masked_fill(~torch.zeros_like(kept_BV).scatter(1, order_BV, kept_BV), -math.inf)


def _mix(value: np.ndarray) -> np.ndarray:
    """The finaliser of SplitMix64 (Steele et al. 2014), in uint64 arithmetic, which wraps."""
    value = (value ^ (value >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    value = (value ^ (value >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return value ^ (value >> np.uint64(31))


def _wrap(value: int) -> np.uint64:
    return np.uint64(value & ((1 << 64) - 1))
