"""Where a local teacher's weights come from: straight from its files where they can be mapped, else through transformers' loader.

Which of the two, and the model without memory that the weights are for, are found from the config and the files' headers alone, so that
what is missing from a large checkpoint is known before anything is read.
"""

import zlib
from contextlib import suppress
from dataclasses import dataclass, field, replace

import torch
from transformers import GenerationConfig, PreTrainedModel

from rollout.config import ModelConfig
from rollout.model import head_of, load_model
from rollout.quantized_models import plain_config, quantization_of, read_config
from teachers.checkpoint_reader import (
    CheckpointMap,
    Reading,
    Rows,
    empty_model,
    map_checkpoint,
    stores_tied_weights_apart,
    unique_weights,
    untied_config,
)
from teachers.residency import Layout, Weights


@dataclass(slots=True, kw_only=True)
class TeacherSource:
    """A teacher's checkpoint, to be read into memory as often as it is asked for.

    layout: of its weights, or of what is read of them. first_row: of what is read of a weight, where that is not its beginning.
    mapped: how its files are read; None where transformers reads them.
    checksums: of its tensors when they were first read; a later reading must find the same.
    """

    name: str
    role: str
    cfg: ModelConfig
    layout: Layout
    mapped: CheckpointMap | None
    first_row: dict[str, int] = field(default_factory=dict)
    checksums: dict[str, int] = field(default_factory=dict)

    @property
    def in_background(self) -> bool:
        """transformers' loader changes settings of the whole process while it works."""
        return self.mapped is not None

    def read(self, weights: Weights) -> Reading:
        """Fill the weights given. Raises ValueError where the files' contents have changed since they were first read."""
        if self.mapped is None:
            reading = self._read_through_transformers(weights)
        else:
            reading = self.mapped.read({name: Rows(tensor, self.first_row.get(name, 0)) for name, tensor in weights.items()})
        for name, checksum in reading.checksums.items():
            if self.checksums.setdefault(name, checksum) != checksum:
                raise ValueError(f"{name} at {self.cfg.model} is not what it was when it was first read: the checkpoint is damaged or replaced")
        return reading

    def only(self, name: str) -> "TeacherSource":
        """The same for one weight."""
        return replace(self, layout={name: self.layout[name]})

    def _read_through_transformers(self, weights: Weights) -> Reading:
        model = load_model(self.cfg, self.role)
        untied = sorted(unique_weights(model).keys() - self.layout.keys())
        if untied:
            raise ValueError(f"the checkpoint {self.cfg.model} holds {untied[0]}, which its config ties to another weight: set tie_word_embeddings=false there")
        reading, loaded = Reading(), model.state_dict()
        for name, weight in weights.items():
            weight.copy_(loaded[name])
            reading.num_bytes += weight.nbytes
            reading.checksums[name] = zlib.crc32(weight.reshape(-1).view(torch.uint8).numpy())
        return reading


def open_source(name: str, cfg: ModelConfig, role: str) -> tuple[PreTrainedModel, TeacherSource]:
    """A teacher's model without memory, and where its weights come from.

    Raises ValueError for what `map_checkpoint` refuses, and where the config cannot be read.
    """
    config = read_config(cfg, role)
    model = empty_model(plain_config(config), cfg)
    if stores_tied_weights_apart(model, cfg, role):
        model = empty_model(untied_config(plain_config(config)), cfg)
    mapped = None if quantization_of(config) else map_checkpoint(model, cfg, role)
    with suppress(OSError):  # a model need not have one
        model.generation_config = GenerationConfig.from_pretrained(cfg.model, revision=cfg.revision)
    layout = {weight: (tensor.shape, tensor.dtype) for weight, tensor in unique_weights(model).items()}
    return model, TeacherSource(name=name, role=role, cfg=cfg, layout=layout, mapped=mapped)


def head_name(model: PreTrainedModel) -> str:
    """The name of the head's weight in a layout; that of the embedding where the two are tied."""
    head = head_of(model).weight
    return next(name for name, tensor in unique_weights(model).items() if tensor is head)
