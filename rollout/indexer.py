"""DeepSeek-V4's lightning indexer with queries and keys in FP4.

Compressed sparse attention lets a query attend to the index_topk compressed entries s with the highest scores
sum_h w_h ReLU(q_h . k_s). DeepSeek trains and serves with q and k in FP4 (arXiv:2606.19348, 5.2.1; inference/model.py):

    q, k  ->  RoPE  ->  Hadamard rotation times width^-0.5  ->  FP4 in blocks of 32 (rollout/fp4.py)

The rotation is orthogonal, so that it changes no score by itself, and spreads a large element over its blocks, so that it does not set the scale for
small ones. It is a butterfly of float32 sums rather than a matrix product: additions in a fixed order give the same bits for one entry as for many, on
every device. A forward and step-by-step decoding, whose cache holds the keys unquantised, therefore quantise equal entries to equal values.

transformers computes the scores in a module of its own, `scorer(q, k, hidden)`, after RoPE. A forward pre-hook there quantises its first two inputs; the
model is not edited, and a copy of it keeps the hook, which is a plain function. A model so changed computes something else without it, so its config
says `indexer_dtype: fp4`, which travels with a saved folder and is followed when the folder is loaded (rollout/model.py).

There is no straight-through gradient: the indices of a top-k have none, with or without FP4. NaN passes through, to be reported with the loss: looking
for it here would wait for the device twice a layer.

B: rows. L: positions. T: compressed entries. K: entries kept (index_topk).
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel

from rollout.fp4 import BLOCK, fake_quantize_activation

PARTS = {"scorer", "q_b_proj", "kv_norm"}
"""Children that tell a lightning indexer over compressed entries from other modules."""

SETTING, FORMAT = "indexer_dtype", "fp4"
"""What a model's config says when its indexer is quantised."""


def quantize_indexer(model: PreTrainedModel, role: str) -> None:
    """Have a model choose its compressed entries by FP4 queries and keys, and say so in its config. A second call changes nothing.

    Raises ValueError for a model without compressed sparse attention, and for a width of its indexer that cannot be rotated or cut into blocks.
    """
    indexers = find_indexers(model)
    if not indexers:
        raise ValueError(
            f"an indexer in FP4 needs a DeepSeek-V4 model with compressed sparse attention; the {role} ({model.config.model_type}) has no such indexer"
        )
    width = model.config.index_head_dim
    if width < BLOCK or width & (width - 1):
        raise ValueError(f"an indexer in FP4 needs an index_head_dim that is a power of two and at least {BLOCK}; that of the {role} is {width}")
    for indexer in indexers.values():
        if _quantize_inputs not in indexer.scorer._forward_pre_hooks.values():
            indexer.scorer.register_forward_pre_hook(_quantize_inputs)
    setattr(model.config, SETTING, FORMAT)


def has_quantized_indexer(config: PretrainedConfig) -> bool:
    """Whether a config says that the model's indexer is quantised. Raises ValueError for a format that is not known here."""
    found = config.to_dict().get(SETTING)
    if found not in (None, FORMAT):
        raise ValueError(f"the model's config has {SETTING}={found}: this version knows {FORMAT}, or none")
    return found == FORMAT


def find_indexers(model: nn.Module) -> dict[str, nn.Module]:
    """Lightning indexers over compressed entries, by name."""
    return {name: module for name, module in model.named_modules() if {child for child, _ in module.named_children()} >= PARTS}


@contextmanager
def indexer_recall(model: PreTrainedModel, real_BL: torch.Tensor) -> Iterator[torch.Tensor]:
    """How many of the entries that the unquantised indexer would keep the quantised one keeps, in the forwards run inside.

    Gives int64 [2], (matched, total), on the device of `real_BL`, which the forwards fill: to be added up over micro-batches and ranks, then divided.
    Both indexers of a layer see the same hidden states, those of the quantised model. Counted are queries where `real_BL` holds that see more entries
    than the indexer keeps; the others keep all. Run no backward inside: with gradient checkpointing it would count again.
    """
    sums = torch.zeros(2, dtype=torch.int64, device=real_BL.device)
    unquantized = {}

    def keep(scorer: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
        unquantized[scorer] = inputs

    @torch.no_grad()
    def count(indexer: nn.Module, inputs: tuple, chosen_BLK: torch.Tensor) -> None:
        _hidden, _query, position_ids, *_cache = inputs
        scores_BLT = indexer.scorer.forward(*unquantized.pop(indexer.scorer))  # its own formula, without the hooks
        sums.add_(_matches(chosen_BLK, scores_BLT, (position_ids + 1) // indexer.compress_rate, real_BL))

    handles = []
    for indexer in find_indexers(model).values():
        handles.append(indexer.scorer.register_forward_pre_hook(keep, prepend=True))
        handles.append(indexer.register_forward_hook(count))
    try:
        yield sums
    finally:
        for handle in handles:
            handle.remove()


def rotate(values: torch.Tensor) -> torch.Tensor:
    """The last dimension, a power of two, times the Hadamard matrix (Sylvester's order) and width^-0.5; in float32, given back in the input's dtype."""
    width = values.shape[-1]
    rotated, stride = values.float(), 1
    while stride < width:
        low, high = rotated.unflatten(-1, (-1, 2, stride)).unbind(-2)
        rotated = torch.stack([low + high, low - high], dim=-2).flatten(-3)
        stride *= 2
    return (rotated * width**-0.5).to(values.dtype)


@torch.no_grad()
def _quantize_inputs(scorer: nn.Module, inputs: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
    query, key, hidden_BLD = inputs
    return fake_quantize_activation(rotate(query)), fake_quantize_activation(rotate(key)), hidden_BLD


def _matches(chosen_BLK: torch.Tensor, scores_BLT: torch.Tensor, visible_BL: torch.Tensor, real_BL: torch.Tensor) -> torch.Tensor:
    """int64 [2]: entries among `chosen_BLK` that have the K highest scores of the visible ones, and their number."""
    kept, num_entries = chosen_BLK.shape[-1], scores_BLT.shape[-1]
    is_future_BLT = torch.arange(num_entries, device=scores_BLT.device) >= visible_BL[..., None]
    best_BLK = scores_BLT.masked_fill(is_future_BLT, float("-inf")).topk(kept, dim=-1).indices
    is_best_BLT = torch.zeros_like(scores_BLT, dtype=torch.bool).scatter_(-1, best_BLK, True)
    counts_BL = real_BL & (visible_BL > kept)
    is_matched_BLK = is_best_BLT.gather(-1, chosen_BLK.clamp(min=0))  # -1 stands where fewer than K are visible, which does not count
    return torch.stack([(is_matched_BLK & counts_BL[..., None]).sum(), counts_BL.sum() * kept])
