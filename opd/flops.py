"""Floating-point operations of a model's forward, counted rather than derived from its settings; and how many a device can do.

A model of the same class and settings is built without memory (torch's meta device) and run there at a few lengths, while torch's FlopCounterMode adds up
2 m k n for every product [m, k] x [k, n]: projections, the experts that a token is sent to, attention, and DeepSeek-V4's compressors, indexer and mHC mixing,
whatever the family. What is no matrix product (norms, softmax, Sinkhorn rounds, table look-ups) counts nothing. Four forwards fix the two formulas

    sequence(L) = a L + b L^2     the backbone over L positions at once, as in scoring and training. All pairs of positions count, also those that are masked,
                                  as in most published figures (Chowdhery et al. 2022, appendix B)
    cached(p) = c + d p           the backbone over one position that sees p, itself included, through a cache: of DeepSeek-V4's attention what the cache
                                  keeps, so that windows shorter than MOST_POSITIONS are in c

and a position's logits are 2 D V. Both are exact where products grow with L or p as the formula says; a compressor's rate rounds down, which moves
sequences of a few windows by about a per cent. Products of an adapter and of quantisation are left out.

Formulas from config fields were rejected: they would be one per family, and wrong in silence for the next one. Counting on the real weights was, too: ZeRO-3
partitions them, teachers' come and go, and neither grouped products nor attention on a CPU are known to the counter there.

Cost: no memory, and Python's time for the operations of a model, once for each architecture in a process: about half a second for the three layers of
conf/student/deepseek_v4_tiny.yaml, one for a Qwen3-MoE of 24 layers, and a quarter of a minute for DeepSeek-V4-Flash's 43. The student is counted when the
engine is made, a teacher of another architecture in the first update.

D: hidden size. V: vocabulary. L: positions of a sequence.
"""

import copy
import functools
import json
import logging
import time
from dataclasses import dataclass

import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import DynamicCache, PreTrainedModel

from rollout.errors import first_sentence
from rollout.experts import find_experts
from rollout.model import backbone_of, context_length, head_of

MOST_POSITIONS = 1024
"""Length of the shorter probe, where the context is long enough for it."""

NO_SHAPE = ("_name_or_path", "architectures", "dtype", "transformers_version", "quantization_config")
"""Settings in which two models may differ that multiply the same."""

LARGEST_MATRIX = 8192
LONG_ENOUGH = 0.02
"""Seconds of one product from which on the clock, and starting the product, count for nothing."""

LOG = logging.getLogger(__name__)

_KNOWN: dict[tuple[type, str], "ModelFlops | None"] = {}
"""What was counted in this process, by class and settings."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelFlops:
    """Forward FLOPs of one model, in the letters of the module's formulas: a, b, c, d; and 2 D V."""

    per_position: float
    per_pair: float
    per_cached: float
    per_seen: float
    logits: float

    def sequence(self, length: int) -> float:
        """The backbone over a whole sequence."""
        return self.per_position * length + self.per_pair * length**2

    def completion(self, prompt: int, tokens: int) -> float:
        """Drawing `tokens` after a prompt that has been read: logits for each, and the backbone over each but the last, which nothing follows."""
        positions = tokens - 1
        seen = positions * (prompt + 1) + positions * (positions - 1) / 2
        return self.per_cached * positions + self.per_seen * seen + self.logits * tokens


def model_flops(model: PreTrainedModel) -> ModelFlops | None:
    """What a forward of this model takes; its weights need not be there. None, with a warning, for a family that cannot run without data."""
    settings = {name: value for name, value in model.config.to_dict().items() if name not in NO_SHAPE}
    key = (type(model), json.dumps(settings, sort_keys=True, default=str))
    if key not in _KNOWN:
        _KNOWN[key] = _count(model)
    return _KNOWN[key]


@functools.cache
def measured_matmul_rate(dtype: torch.dtype, device: torch.device) -> float:
    """FLOPs per second of a large square product on a device, the best of a few; measured once in a process.

    The matrices grow until one product takes LONG_ENOUGH, so that it is a fraction of a second on any device. A rate in a data sheet would be of a
    machine that nobody shares, at a clock that it does not hold.
    """
    size = 256
    while True:
        size *= 2
        left, right = torch.randn(2, size, size, device=device).to(dtype)
        seconds = min(_product_seconds(left, right) for _ in range(4))
        if seconds >= LONG_ENOUGH or size == LARGEST_MATRIX:
            return 2.0 * size**3 / seconds


def _product_seconds(left: torch.Tensor, right: torch.Tensor) -> float:
    _finish(left.device)
    begun = time.perf_counter()
    left @ right
    _finish(left.device)
    return time.perf_counter() - begun


def _finish(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _count(model: PreTrainedModel) -> ModelFlops | None:
    try:
        short = max(1, min(MOST_POSITIONS, context_length(model.config, "model") // 4))
        skeleton = _skeleton(model)
        (first, first_cached), (second, second_cached) = (_probe(skeleton, length) for length in (short, 2 * short))
    except Exception as error:  # whatever a family's code raises where it looks at values
        LOG.warning("no model FLOP utilisation for %s, which cannot run without data: %s", model.config.model_type, first_sentence(error))
        return None
    per_pair = (second - 2 * first) / (2 * short**2)
    per_seen = (second_cached - first_cached) / short
    return ModelFlops(
        per_position=first / short - per_pair * short,
        per_pair=per_pair,
        per_cached=first_cached - per_seen * (short + 1),
        per_seen=per_seen,
        logits=2.0 * head_of(skeleton).weight.numel(),
    )


def _skeleton(model: PreTrainedModel) -> PreTrainedModel:
    """A model without memory whose products the counter knows: attention as plain products, and those of the chosen experts one by one."""
    config = copy.deepcopy(model.config)
    config._attn_implementation = config._experts_implementation = "eager"
    with torch.device("meta"):
        skeleton = type(model)(config).eval().requires_grad_(False)
    if find_experts(skeleton):
        skeleton.set_experts_implementation("batched_mm")
    return skeleton


@torch.no_grad()
def _probe(skeleton: PreTrainedModel, length: int) -> tuple[int, int]:
    """FLOPs of the backbone over a sequence, and over one more position after it."""
    tokens_1L, cache = torch.zeros(1, length, dtype=torch.int64, device="meta"), DynamicCache(config=skeleton.config)
    counts = []
    for part_1L in (tokens_1L, tokens_1L[:, :1]):
        with FlopCounterMode(display=False) as counter:
            backbone_of(skeleton)(input_ids=part_1L, past_key_values=cache, use_cache=True)
        counts.append(counter.get_total_flops())
    return counts[0], counts[1]
