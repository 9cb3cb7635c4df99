"""Peak memory of a model's forward and backward, found without its weights: the operations run on torch's meta device, where tensors have shapes and no data.

A dispatch mode sees every operation and notes the storage of each result with its bytes; a storage that dies is taken off again. What was alive at most is the
peak that an allocator would have to serve: what autograd keeps, what an operation needs besides, what a cache holds, whatever the family. Weights that were
there before do not count. A parameter's gradient is taken off as soon as it is complete and counted apart, since where it goes is the engine's affair.

It is the idea of opd/flops.py, and has its cost: Python's time for the operations of a model, half a minute for DeepSeek-V4-Flash. What a kernel allocates
inside has no shape that anyone could see, and neither has the allocator's fragmentation. torch's fused attention is taken for what it keeps: its
inputs, its output, and a number for each row.

Rejected: formulas from config fields (one per family, wrong in silence for the next one); a short run on the device, which has to fit into it first.

B: rows. L: positions. D: hidden size. W: rows of a cohort. P: its prompts. V: vocabulary.
"""

import weakref
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import DynamicCache, PreTrainedModel

from rollout.config import SamplingConfig
from rollout.model import backbone_of, head_of
from rollout.sampling import draw

ATTENTION = nn.functional.scaled_dot_product_attention


class LiveBytes(TorchDispatchMode):
    """Bytes of the storages that come into being inside, while they live.

    live: now. peak: at most. gradients: of complete gradients, which do not count as alive. peak_with_gradients: of both together at most.
    """

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = self.gradients = self.peak_with_gradients = 0
        self.known: weakref.WeakKeyDictionary = weakref.WeakKeyDictionary()

    def __enter__(self) -> "LiveBytes":
        nn.functional.scaled_dot_product_attention = _fused_attention  # a function mode would not be there when a backward computes again
        return super().__enter__()

    def __exit__(self, *exception: Any) -> None:
        super().__exit__(*exception)
        nn.functional.scaled_dot_product_attention = ATTENTION

    def __torch_dispatch__(self, function: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if function is torch.ops.aten._local_scalar_dense.default:
            return 1  # a model's code asks whether nothing is packed or padded: it is so
        inputs = {id(leaf.untyped_storage()) for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)}
        run = _grouped_product if function is torch.ops.aten._grouped_mm.default else function
        result = run(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, torch.Tensor) and id(leaf.untyped_storage()) not in inputs:
                self._add(leaf.untyped_storage())
        return result

    def restart(self) -> None:
        """Begin a new peak with what is alive."""
        self.peak = self.peak_with_gradients = self.live

    def drop_gradient(self, parameter: nn.Parameter) -> None:
        """To be called when a parameter's gradient is complete."""
        self.gradients += parameter.grad.nbytes
        parameter.grad = None

    def _add(self, storage: torch.UntypedStorage) -> None:
        if storage in self.known:
            return
        size = storage.nbytes()
        self.known[storage] = size
        self.live += size
        self.peak = max(self.peak, self.live)
        self.peak_with_gradients = max(self.peak_with_gradients, self.live + self.gradients)
        weakref.finalize(storage, self._remove, size)

    def _remove(self, size: int) -> None:
        self.live -= size


def _fused_attention(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *_others: Any, **_named: Any) -> torch.Tensor:
    """An attention without a [L, L] matrix, in the place of torch's, which on the meta device is made of products."""
    return _Attention.apply(query, key, value)


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        out = query.new_empty(*query.shape[:-1], value.shape[-1])
        ctx.save_for_backward(query, key, value, out, query.new_empty(query.shape[:-1], dtype=torch.float32))
        return out

    @staticmethod
    def backward(ctx, gradient: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return tuple(torch.empty_like(tensor) for tensor in ctx.saved_tensors[:3])


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingBytes:
    """A micro-batch through the backbone. forward: peak of the forward. kept: by autograd at its end. backward: peak of the backward, gradients of parameters
    left out. backward_with_gradients: the same with those that are complete.
    """

    forward: int
    kept: int
    backward: int
    backward_with_gradients: int


@dataclass(frozen=True, slots=True, kw_only=True)
class DecodingBytes:
    """A cohort. prefill: peak of reading the prompts. cache: at the longest rollout. step: peak of one more token, the cache left out."""

    prefill: int
    cache: int
    step: int


def trace_training(model: PreTrainedModel, num_rows: int, length: int) -> TrainingBytes:
    """Forward and backward over [num_rows, length] of a model on the meta device, with gradients where its parameters ask for one."""
    tokens_BL = torch.zeros(num_rows, length, dtype=torch.int64, device="meta")
    with LiveBytes() as bytes_:
        hooks = [parameter.register_post_accumulate_grad_hook(bytes_.drop_gradient) for parameter in model.parameters() if parameter.requires_grad]
        hidden_BLD = backbone_of(model)(input_ids=tokens_BL, use_cache=False)[0]
        forward, kept = bytes_.peak, bytes_.live
        bytes_.restart()
        hidden_BLD.backward(torch.empty_like(hidden_BLD))
        found = TrainingBytes(forward=forward, kept=kept, backward=bytes_.peak, backward_with_gradients=bytes_.peak_with_gradients)
    for hook in hooks:
        hook.remove()
    return found


@torch.no_grad()
def trace_scoring(model: PreTrainedModel, num_rows: int, length: int) -> int:
    """Peak of a forward over [num_rows, length] that nothing is kept for."""
    tokens_BL = torch.zeros(num_rows, length, dtype=torch.int64, device="meta")
    with LiveBytes() as bytes_:
        backbone_of(model)(input_ids=tokens_BL, use_cache=False)
        return bytes_.peak


@torch.no_grad()
def trace_decoding(model: PreTrainedModel, num_prompts: int, prompt_tokens: int, cfg: SamplingConfig) -> DecodingBytes:
    """A cohort of cfg.decode_width rows: reading the prompts, and one token at the end of the longest rollout."""
    prompts_PL = torch.zeros(num_prompts, prompt_tokens, dtype=torch.int64, device="meta")
    longest_WL = torch.zeros(cfg.decode_width, prompt_tokens + cfg.max_new_tokens - 1, dtype=torch.int64, device="meta")
    with LiveBytes() as bytes_:
        _read(model, prompts_PL, DynamicCache(config=model.config))
        prefill = bytes_.peak
    with LiveBytes() as bytes_:
        cache = DynamicCache(config=model.config)
        _read(model, longest_WL, cache)
        filled = bytes_.live
        bytes_.restart()
        logits_WV = _read(model, longest_WL[:, :1], cache)
        draw(logits_WV, torch.empty(cfg.decode_width, dtype=torch.float64, device="meta"), cfg)
        return DecodingBytes(prefill=prefill, cache=filled, step=bytes_.peak - filled)


def _read(model: PreTrainedModel, tokens_WL: torch.Tensor, cache: DynamicCache) -> torch.Tensor:
    """Logits [W, V] after the tokens, which go into the cache."""
    hidden_WLD = backbone_of(model)(input_ids=tokens_WL, past_key_values=cache, use_cache=True)[0]
    return head_of(model)(hidden_WLD[:, -1:])[:, -1]


def _grouped_product(left: torch.Tensor, right: torch.Tensor, offs: torch.Tensor | None = None, **_others: Any) -> torch.Tensor:
    """An empty result of torch's grouped product, whose meta kernel takes bfloat16 alone: rows in groups, or (for a weight's gradient) columns."""
    if left.ndim == right.ndim == 2:
        return left.new_empty(len(offs), len(left), right.shape[1])
    return left.new_empty(left.shape[-2], right.shape[-1])
