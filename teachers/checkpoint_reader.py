"""From the tensors of a safetensors checkpoint to the weights of a model, without transformers' loader: whole, or some rows of each weight.

A teacher is read anew in every step that it does not stay resident for, so reading has to be what it costs to move the bytes: straight from the
files into memory that is there already. What stands between the two is that transformers renames and fuses tensors when it loads (DeepSeek-V4's
experts are stored one by one and multiplied as one tensor). It also knows the way back, for saving. A model without memory is sent that way: each
tensor that comes out is a view of one weight, and says where in it the stored tensor of that name belongs. An operation that computes rather
than moves gives something that is no view of any weight; such a checkpoint, a quantised one, and one whose names are not the family's own, are
left to transformers (`map_checkpoint` returns None).

Names and shapes are compared with the files' headers when the map is made: every weight is filled once, in full. Contents have a checksum (CRC-32
of what is read of each tensor), with which a later reading is compared.
"""

import copy
import math
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from safetensors import safe_open
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion

from rollout.config import ModelConfig
from rollout.model import torch_dtype, unify_dtypes
from rollout.quantized_models import open_weights, weight_files

FLOATS = ("F64", "F32", "F16", "BF16")
"""safetensors' names of the dtypes that a weight in a floating-point dtype is read from; others must be equal."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Piece:
    """A stored tensor and its place in a weight of the model.

    stored, file: its name and where it is. weight: the model's name.
    size, stride, offset: the view of the weight that it fills, in elements.
    first_row, num_rows: rows of the weight (its first dimension) that the view lies in.
    """

    stored: str
    file: Path
    weight: str
    size: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int
    first_row: int
    num_rows: int


@dataclass(frozen=True, slots=True)
class Rows:
    """Some rows of a weight: `tensor` holds rows `first` to `first + len(tensor)`; with first=0 and all of them, the weight itself."""

    tensor: torch.Tensor
    first: int = 0


@dataclass(slots=True)
class Reading:
    """What one reading of a checkpoint was.

    num_bytes: read from the files. checksums: CRC-32 of what was read of each stored tensor.
    """

    num_bytes: int = 0
    checksums: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class CheckpointMap:
    """Where the tensors of a checkpoint belong in the model's weights."""

    pieces: tuple[Piece, ...]

    def read(self, weights: Mapping[str, Rows]) -> Reading:
        """Fill the weights given, and no others, with their rows; a stored tensor outside them is not touched.

        Raises OSError or safetensors' SafetensorError where a file cannot be read.
        """
        reading = Reading()
        by_file: dict[Path, list[Piece]] = {}
        for piece in self.pieces:
            if piece.weight in weights:
                by_file.setdefault(piece.file, []).append(piece)
        for file, pieces in by_file.items():
            with safe_open(file, framework="pt") as opened:
                for piece in pieces:
                    _read_piece(opened, piece, weights[piece.weight], reading)
        return reading


def _read_piece(opened: safe_open, piece: Piece, rows: Rows, reading: Reading) -> None:
    size, skip, first = piece.size, 0, rows.first
    if rows.tensor.ndim:
        begin, end = max(piece.first_row, first), min(piece.first_row + piece.num_rows, first + len(rows.tensor))
        if begin >= end:
            return
        if end - begin < piece.num_rows:
            size, skip = (end - begin, *piece.size[1:]), begin - piece.first_row
    source = opened.get_tensor(piece.stored) if size == piece.size else opened.get_slice(piece.stored)[skip : skip + size[0]]
    place = rows.tensor.storage_offset() + piece.offset + (skip - first) * math.prod(rows.tensor.shape[1:])
    rows.tensor.as_strided(size, piece.stride, place).copy_(source)
    reading.num_bytes += source.nbytes
    reading.checksums[piece.stored] = zlib.crc32(source.contiguous().reshape(-1).view(torch.uint8).numpy())


def empty_model(config: PretrainedConfig, cfg: ModelConfig) -> PreTrainedModel:
    """A frozen model whose parameters have shapes and no memory; its buffers are real."""
    arguments = {} if cfg.attention is None else {"attn_implementation": cfg.attention.value}
    with init_empty_weights():
        model = AutoModelForCausalLM.from_config(config, dtype=torch_dtype(cfg.dtype), trust_remote_code=cfg.trust_remote_code, **arguments)
    model.tie_weights()
    unify_dtypes(model, torch_dtype(cfg.dtype))
    return model.eval().requires_grad_(False)


def map_checkpoint(model: PreTrainedModel, cfg: ModelConfig, role: str) -> CheckpointMap | None:
    """The map of a teacher's checkpoint onto an `empty_model`, from its files' headers alone; None where transformers has to load it.

    Raises ValueError, naming the weight, where the checkpoint lacks one that the model has, or holds it in another shape.
    """
    stored = _stored_tensors(cfg, role)
    views = _views_of_weights(model)
    if views is None or not stored or not set(stored) <= set(views):
        return None
    names_of: dict[tuple, list[str]] = {}  # of one place; a tied head has two
    for name, view in views.items():
        names_of.setdefault((view.weight, view.offset, view.size, view.stride), []).append(name)
    chosen = [next((name for name in names if name in stored), None) for names in names_of.values()]
    absent = sorted(names[0] for names, name in zip(names_of.values(), chosen, strict=True) if name is None)
    absent += [f"{name} (its shape differs)" for name in chosen if name is not None and tuple(stored[name][1].get_shape()) != views[name].size]
    if absent:
        raise ValueError(f"the checkpoint {cfg.model} of the {role} lacks {len(absent)} of the model's weights, {absent[0]} first")
    if any(views[name].is_floating != (stored[name][1].get_dtype() in FLOATS) for name in chosen):
        return None
    filled: dict[str, int] = {}
    for name in chosen:
        filled[views[name].weight] = filled.get(views[name].weight, 0) + math.prod(views[name].size)
    if any(filled.get(weight) != tensor.numel() for weight, tensor in unique_weights(model).items()):
        return None
    return CheckpointMap(tuple(_piece(name, stored[name][0], views[name]) for name in chosen))


def stores_tied_weights_apart(model: PreTrainedModel, cfg: ModelConfig, role: str) -> bool:
    """Whether a checkpoint holds a tensor for each place of a weight that its config ties; where they differ, transformers does not tie them."""
    stored, places = _stored_tensors(cfg, role), model.state_dict(keep_vars=True)
    tensors = [id(tensor) for name, tensor in places.items() if name in stored]
    return len(set(tensors)) < len(tensors)


def untied_config(config: PretrainedConfig) -> PretrainedConfig:
    """The config of a model whose head is a weight of its own, a changed copy."""
    config = copy.deepcopy(config)
    config.tie_word_embeddings = config.get_text_config().tie_word_embeddings = False
    return config


def _stored_tensors(cfg: ModelConfig, role: str) -> dict[str, tuple[Path, Any]]:
    """File and slice of each tensor of a checkpoint, by name; reads the files' headers."""
    files = [(file, open_weights(file, role)) for file in weight_files(cfg)]
    return {name: (file, opened.get_slice(name)) for file, opened in files for name in opened.keys()}  # noqa: SIM118


@dataclass(frozen=True, slots=True)
class _View:
    """What `Piece` says of a place in a weight; shape: of the weight."""

    weight: str
    shape: tuple[int, ...]
    size: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int
    is_floating: bool


class _Traced(torch.Tensor):
    """A tensor whose copies are itself: transformers makes the parts that it cuts out of a weight contiguous, which would hide where they come from."""

    @classmethod
    def __torch_function__(cls, func: Callable, types: tuple, args: tuple = (), kwargs: dict | None = None):
        if func in (torch.Tensor.contiguous, torch.Tensor.clone):
            return args[0]
        return super().__torch_function__(func, types, args, kwargs or {})


def _views_of_weights(model: PreTrainedModel) -> dict[str, _View] | None:
    """By stored name, the place of each tensor of the model's checkpoints; None where one is computed from weights, or lies across rows."""
    weights = unique_weights(model)
    name_of = {tensor.untyped_storage()._cdata: name for name, tensor in weights.items()}
    views = {}
    for name, tensor in revert_weight_conversion(model, {name: tensor.as_subclass(_Traced) for name, tensor in model.state_dict().items()}).items():
        weight = name_of.get(tensor.untyped_storage()._cdata)
        if weight is None:
            return None
        shape = tuple(weights[weight].shape)
        view = _View(weight, shape, tuple(tensor.shape), tensor.stride(), tensor.storage_offset(), tensor.is_floating_point())
        if _num_rows(view) > 1 and (len(view.size) != len(shape) or view.stride[0] != math.prod(shape[1:])):
            return None
        views[name] = view
    return views


def unique_weights(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    """Parameters and persistent buffers by name, tied ones once."""
    found: dict[int, tuple[str, torch.Tensor]] = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        found.setdefault(id(tensor), (name, tensor))
    return dict(found.values())


def _num_rows(view: _View) -> int:
    """Rows of the weight that a view reaches into."""
    if not view.shape:
        return 1
    row, last = math.prod(view.shape[1:]), view.offset + sum((size - 1) * stride for size, stride in zip(view.size, view.stride, strict=True))
    return last // row - view.offset // row + 1


def _piece(name: str, file: Path, view: _View) -> Piece:
    first_row = view.offset // math.prod(view.shape[1:]) if view.shape else 0
    place = {"size": view.size, "stride": view.stride, "offset": view.offset, "first_row": first_row, "num_rows": _num_rows(view)}
    return Piece(stored=name, file=file, weight=view.weight, **place)
