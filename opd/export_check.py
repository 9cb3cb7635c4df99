"""An exported folder is loaded again, as any program would load it, and must be the very model it was made from.

Every tensor is compared bit for bit, packed experts by the values they decode to, and so are the logits of one fixed token tensor of the same shape, dtype
and device: the two models then multiply the same numbers in the same way. Decoding step by step would differ in rounding and prove less.

B: rows. L: positions.
"""

from dataclasses import replace
from pathlib import Path

import torch
from transformers import PreTrainedModel

from rollout.config import ModelConfig
from rollout.model import context_length, load_model

PROBE_TOKENS = 256
"""Length of the probe, where the model reads as many: two blocks of DeepSeek-V4's coarsest compression."""


@torch.no_grad()
def require_equal(folder: Path, model: PreTrainedModel, source: ModelConfig) -> dict[str, int]:
    """What was compared, in numbers: tensors, and tokens of which the logits were.

    source: how the given model was loaded; the folder is loaded in the same way.

    Raises ValueError, naming the tensor, where the model in the folder is not the given one bit for bit.
    """
    loaded = load_model(replace(source, model=str(folder), revision=None), "exported model")
    ours, theirs = model.state_dict(), loaded.state_dict()
    different = [name for name in ours if name not in theirs or not _same_bits(ours[name], theirs[name])] + [name for name in theirs if name not in ours]
    if different:
        raise ValueError(f"{folder} does not load as the model it was made from: {different[0]} is another one; it stays there to be looked at")
    tokens_BL = probe_tokens(model)
    if not torch.equal(model(input_ids=tokens_BL, use_cache=False).logits, loaded(input_ids=tokens_BL, use_cache=False).logits):
        raise ValueError(f"{folder} loads with equal weights and computes other logits than the model it was made from; it stays there to be looked at")
    return {"tensors": len(ours), "probe_tokens": tokens_BL.numel()}


def probe_tokens(model: PreTrainedModel) -> torch.Tensor:
    """tokens_BL of one row, spread over the vocabulary; the same for every model of these sizes."""
    length = min(PROBE_TOKENS, context_length(model.config, "exported model"))
    return (torch.arange(length) * 7919 % model.config.get_text_config().vocab_size)[None]


def _same_bits(ours: torch.Tensor, theirs: torch.Tensor) -> bool:
    """Equal in dtype, shape and every bit: the sign of zero counts."""
    return ours.dtype == theirs.dtype and ours.shape == theirs.shape and torch.equal(_bytes(ours), _bytes(theirs))


def _bytes(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8)
