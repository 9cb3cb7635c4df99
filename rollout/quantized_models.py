"""Quantised checkpoints: read for training in the dtype asked for, and refused where transformers would read them wrongly without a word.

DeepSeek's layout is `quant_method: fp8`: FP8 (E4M3) matrices with a scale for each block, and in V4 routed experts in MXFP4. gpt-oss's is `mxfp4`: routed
experts alone. Values times powers of two are exact in float32 and bfloat16, so that a decoded model is what the checkpoint says. transformers decodes
while it loads; it does not look at what a damaged or misnamed scale does: zeroed scales leave a fluent, worse model, and sizes that are no multiple of a
block are cut into other blocks. Both are looked for here, in the files, before they are loaded.

A decoded model forgets that it was quantised: saved, it is a plain model in its dtype.
"""

import copy
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from transformers import AutoConfig, PretrainedConfig, PreTrainedModel
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, cached_file
from transformers.utils.hub import get_checkpoint_shard_files

from rollout.config import ModelConfig
from rollout.errors import first_sentence
from rollout.fp4 import BLOCK

READABLE = ("fp8", "mxfp4")
"""Values of quant_method that are decoded when a model is loaded."""

PACKED, FP8 = "I8", "F8_E4M3"
"""safetensors' names of the dtypes of quantised matrices: two FP4 codes to a byte; one FP8 value."""

GPT_OSS = "_blocks"
"""Ending of gpt-oss's names of FP4 codes, whose scales end in _scales."""

VERIFIED: set[tuple] = set()
"""What `require_whole_scales` has read in this process: path, size and time of change of each file, with the size of a block."""


def read_config(cfg: ModelConfig, role: str) -> PretrainedConfig:
    """The config of a model folder or hub id. Raises ValueError where it cannot be read, and for a quantisation that is not decoded here."""
    try:
        config = AutoConfig.from_pretrained(cfg.model, revision=cfg.revision, trust_remote_code=cfg.trust_remote_code)
    except (OSError, ValueError, ImportError, KeyError) as error:
        raise ValueError(f"the {role} cannot be loaded from {cfg.model}: {first_sentence(error)}") from error
    quantization = quantization_of(config)
    if quantization and quantization.get("quant_method") not in READABLE:
        method = quantization.get("quant_method", "a method that its config does not name")
        raise ValueError(f"the {role} at {cfg.model} is quantised with {method}, which is not read here: dequantise it offline and save it in bfloat16")
    return config


def quantization_of(config: PretrainedConfig) -> dict[str, Any]:
    """A config's quantisation as a mapping; empty for a plain model."""
    found = config.to_dict().get("quantization_config") or config.get_text_config().to_dict().get("quantization_config") or {}
    return {name: getattr(value, "value", value) for name, value in found.items()}


def is_fp4(config: PretrainedConfig) -> bool:
    """Whether a checkpoint's routed experts are FP4, as `read_config` sees it; a model that is loaded has forgotten it."""
    quantization = quantization_of(config)
    return "fp4" in (config.to_dict().get("expert_dtype"), quantization.get("expert_dtype")) or quantization.get("quant_method") == "mxfp4"


def decode_on_load(config: PretrainedConfig, cfg: ModelConfig, role: str) -> PretrainedConfig:
    """The config with which transformers decodes a quantised checkpoint while it loads, a changed copy; a plain model's own.

    Raises ValueError, naming the weight, for what `require_whole_scales` refuses.
    """
    quantization = quantization_of(config)
    if quantization:
        require_whole_scales(weight_files(cfg), quantization.get("weight_block_size"), role)
        config = copy.deepcopy(config)
        config.quantization_config = quantization | {"dequantize": True}
    return config


def forget_quantization(model: PreTrainedModel) -> None:
    """Make a decoded model a plain one. transformers would go on to call it FP4 in its config, and to fail when it saves it."""
    for config in {id(config): config for config in (model.config, model.config.get_text_config())}.values():
        _forget(config)
    model._weight_conversions = None  # how it was loaded, decoding included; transformers finds the plain conversions by itself


def plain_config(config: PretrainedConfig) -> PretrainedConfig:
    """The config of a quantised checkpoint once it is decoded, a changed copy; a plain model's own."""
    if not quantization_of(config):
        return config
    config = copy.deepcopy(config)
    _forget(config)
    _forget(config.get_text_config())
    return config


def _forget(config: PretrainedConfig) -> None:
    for name in ("quantization_config", "expert_dtype"):
        if name in vars(config):
            delattr(config, name)


def require_whole_scales(files: list[Path], block_size: list[int] | None, role: str) -> None:
    """Raises ValueError, naming the weight, where a quantised matrix has no scale, one of another shape, or one that is zero or NaN under other weights.

    The scales of a set of files are read once in a process, as long as the files stay as they are: a teacher may be loaded at every step.
    """
    opened = {file: open_weights(file, role) for file in files}
    versions = tuple((file.resolve(), file.stat().st_size, file.stat().st_mtime_ns) for file in files)
    if (versions, str(block_size)) in VERIFIED:
        return
    where: dict[str, safe_open] = {}
    for file in opened.values():
        where |= dict.fromkeys(file.keys(), file)
    for name in where:
        _require_whole_scale(name, where, block_size, role)
    VERIFIED.add((versions, str(block_size)))


def _require_whole_scale(name: str, where: dict[str, safe_open], block_size: list[int] | None, role: str) -> None:
    """`require_whole_scales` for one tensor; `where`: the open file of each."""
    stored = where[name].get_slice(name)
    dtype, shape = stored.get_dtype(), stored.get_shape()
    is_packed = dtype == PACKED
    if dtype == "U8" and name.endswith(GPT_OSS):  # [..., out, blocks, 16]
        is_packed, shape = True, [*shape[:-2], shape[-2] * shape[-1]]
    if not (is_packed or dtype == FP8) or len(shape) < 2:
        return
    scale_name = next((candidate for candidate in _scale_names(name) if candidate in where), None)
    if scale_name is None:
        raise ValueError(f"{name} of the {role} is stored in {dtype} without its scale: the checkpoint is incomplete")
    scale = where[scale_name].get_tensor(scale_name)
    block = (1, BLOCK // 2) if is_packed else tuple(block_size or shape[-2:])
    if scale.numel() > 1 and not _fits(shape, scale.shape, block):
        raise ValueError(
            f"{name} of the {role} has sizes {shape} and scales {tuple(scale.shape)}, which are not blocks of {block[0]} x {block[1]}: dequantise it offline"
        )
    is_zero = _zero_scales(scale, f"{name} of the {role}")
    if is_zero.any() and _is_used(where[name].get_tensor(name).view(torch.uint8).reshape(shape), is_zero, is_packed):
        raise ValueError(
            f"the scales of {name} of the {role} are zero where its weights are not: the checkpoint is damaged, or they were lost under another name"
        )


def _zero_scales(scale: torch.Tensor, name: str) -> torch.Tensor:
    """Which scales are zero: byte 0 of E8M0, or the number. Raises ValueError where one is NaN."""
    is_byte = scale.element_size() == 1
    number = scale.view(torch.uint8) if is_byte else scale.float()
    if ((number == 255) if is_byte else ~number.isfinite()).any():
        raise ValueError(f"the scales of {name} hold NaN: the checkpoint is damaged")
    return (number == 0).reshape(scale.shape if scale.ndim > 1 else (1, 1))


def _is_used(codes: torch.Tensor, is_zero: torch.Tensor, is_packed: bool) -> bool:
    """Whether a code under a zero scale is other than zero, whatever its sign."""
    for dimension in (-2, -1):
        is_zero = is_zero.repeat_interleave(codes.shape[dimension] // is_zero.shape[dimension], dimension)
    return bool((is_zero & ((codes & (0x77 if is_packed else 0x7F)) != 0)).any())


def _fits(shape: list[int], scale: torch.Size, block: tuple[int, ...]) -> bool:
    """Whether scales divide matrices into the blocks that the config names, as transformers will: by size over number."""
    if len(scale) != len(shape) or list(scale[:-2]) != shape[:-2]:
        return False
    return all(size == count * length or (count == 1 and size <= length) for size, count, length in zip(shape[-2:], scale[-2:], block, strict=True))


def _scale_names(weight: str) -> tuple[str, ...]:
    if weight.endswith(GPT_OSS):
        return (weight.removesuffix(GPT_OSS) + "_scales",)
    return (weight.removesuffix("weight") + "scale", f"{weight}_scale_inv")


def open_weights(file: Path, role: str) -> safe_open:
    """A safetensors file, opened. Raises ValueError where it is damaged or cut off."""
    try:
        return safe_open(file, framework="pt")
    except (OSError, SafetensorError) as error:
        raise ValueError(f"the {role} cannot be loaded from {file}: {first_sentence(error)}") from error


def weight_files(cfg: ModelConfig) -> list[Path]:
    """The safetensors files of a model, fetched where it is a hub id."""
    absent = {"revision": cfg.revision, "_raise_exceptions_for_missing_entries": False}
    index = cached_file(cfg.model, SAFE_WEIGHTS_INDEX_NAME, **absent)
    if index is None:
        single = cached_file(cfg.model, SAFE_WEIGHTS_NAME, **absent)
        return [] if single is None else [Path(single)]
    return [Path(file) for file in get_checkpoint_shard_files(cfg.model, index, revision=cfg.revision)[0]]
