"""Sharded safetensors, written one shard at a time: a tensor is made when its shard is written, so that a packed model never stands beside its source."""

import json
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors.torch import save_file
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredTensor:
    """One tensor of a checkpoint, whose size is known before it is made.

    name: in the file.
    kind: what it counts as in a report: fp4, fp8 or kept.
    form: a tensor of its shape and dtype on the meta device.
    make: gives the tensor.
    """

    name: str
    kind: str
    form: torch.Tensor
    make: Callable[[], torch.Tensor]


def write_shards(folder: Path, tensors: list[StoredTensor], max_shard_size: int) -> dict[str, int]:
    """model.safetensors, or shards of it with their index, in the order of the tensors; returns the bytes written of each kind."""
    by_name = {tensor.name: tensor for tensor in tensors}
    plan = split_torch_state_dict_into_shards({name: tensor.form for name, tensor in by_name.items()}, max_shard_size=max_shard_size)
    written = Counter()
    for file, names in plan.filename_to_tensors.items():
        made = {name: by_name[name].make().detach().cpu().contiguous() for name in names}
        wrong = [name for name, tensor in made.items() if (tensor.shape, tensor.dtype) != (by_name[name].form.shape, by_name[name].form.dtype)]
        assert not wrong, f"{wrong[0]} was announced in another form"
        save_file(made, folder / file, metadata={"format": "pt"})
        for name, tensor in made.items():
            written[by_name[name].kind] += tensor.nbytes
    if plan.is_sharded:
        index = {"metadata": plan.metadata, "weight_map": plan.tensor_to_filename}
        (folder / SAFE_WEIGHTS_INDEX_NAME).write_text(json.dumps(index, indent=2) + "\n")
    return dict(written)
