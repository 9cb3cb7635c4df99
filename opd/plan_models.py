"""The models of a plan, without weights, and what working with them takes: traced at two depths and drawn on to the model's own.

A figure of a deep stack is a line in its number of layers, since layers of one kind take the same; the first few may differ (dense or hash-routed ones), and
kinds may alternate. So two models of DEPTHS layers are traced (opd/memory_trace.py) and the line through them is read at the real depth; a
shallower model is traced as it is. DeepSeek-V4-Pro, of 61 layers, takes half a minute in place of two.
"""

import copy
from collections.abc import Callable
from dataclasses import dataclass, fields

import torch
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from opd.config import PlanCommandConfig, StudentConfig
from opd.memory_trace import DecodingBytes, TrainingBytes, trace_decoding, trace_scoring, trace_training
from opd.student import load_student_tokenizer, prepare_training
from rollout.config import Dtype, ModelConfig
from rollout.model import architecture_config, require_folder, torch_dtype, unify_dtypes
from rollout.quantized_models import plain_config, read_config
from teachers.checkpoint_reader import unique_weights
from teachers.residency import size_of

DEPTHS = (6, 10)
"""Layers of the two traced models; their difference holds whole periods of 1, 2 and 4 alternating kinds, and the first has all that begin a model."""


@dataclass(frozen=True, slots=True)
class PlannedModel:
    """A model by its config; `settings` say how it is loaded."""

    config: PretrainedConfig
    settings: ModelConfig

    def build(self, num_layers: int | None = None) -> PreTrainedModel:
        """The model without weights, of fewer layers where it is asked to be."""
        config = self.config if num_layers is None else _shortened(self.config, num_layers)
        attention = {} if self.settings.attention is None else {"attn_implementation": self.settings.attention.value}
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, dtype=torch_dtype(self.settings.dtype), **attention)
        unify_dtypes(model, torch_dtype(self.settings.dtype))
        return model.eval().requires_grad_(not self.is_frozen)

    def frozen(self) -> "PlannedModel":
        """The same as a model that does not train, as the sampler's is."""
        return PlannedModel(self.config, ModelConfig(dtype=self.settings.dtype, attention=self.settings.attention))

    @property
    def is_frozen(self) -> bool:
        return not isinstance(self.settings, StudentConfig)

    @property
    def vocab_size(self) -> int:
        return self.config.get_text_config().vocab_size

    @property
    def hidden_size(self) -> int:
        return self.config.get_text_config().hidden_size

    @property
    def weight_bytes(self) -> int:
        return torch_dtype(self.settings.dtype).itemsize

    @property
    def num_bytes(self) -> int:
        """Of its weights in memory."""
        return size_of({name: (tensor.shape, tensor.dtype) for name, tensor in unique_weights(self.build()).items()})

    def training(self, num_rows: int, length: int) -> TrainingBytes:
        """A micro-batch through it."""

        def trace(model: PreTrainedModel) -> TrainingBytes:
            prepare_training(model, self.settings)
            return trace_training(model, num_rows, length)

        return self._at_depth(trace)

    def scoring(self, num_rows: int, length: int) -> int:
        """Peak of a forward that nothing is kept for."""
        return self._at_depth(lambda model: _Peak(trace_scoring(model, num_rows, length))).peak

    def decoding(self, cfg: PlanCommandConfig) -> DecodingBytes:
        """A cohort at the longest rollout."""
        prompts = max(1, cfg.rollout.decode_width // cfg.rollout.completions_per_prompt)
        return self._at_depth(lambda model: trace_decoding(model, prompts, cfg.plan.prompt_tokens, cfg.rollout))

    def _at_depth(self, trace: Callable[[PreTrainedModel], TrainingBytes | DecodingBytes]):
        depth = self.config.get_text_config().num_hidden_layers
        if depth <= DEPTHS[1]:
            return trace(self.build())
        first, second = (trace(self.build(num_layers)) for num_layers in DEPTHS)
        return type(first)(**{field.name: _on_line(getattr(first, field.name), getattr(second, field.name), depth) for field in fields(first)})


@dataclass(frozen=True, slots=True)
class _Peak:
    peak: int


def planned_student(cfg: StudentConfig) -> PlannedModel:
    """The student of a config. Raises ValueError where it is not given, or its config cannot be read."""
    if (cfg.model is None) == (not cfg.architecture):
        raise ValueError("the student needs exactly one of student.model (a folder or hub id) and student.architecture (a new model)")
    if cfg.model is not None:
        return PlannedModel(_read(cfg, "student"), cfg)
    rows = cfg.architecture.get("vocab_size") or len(load_student_tokenizer(cfg))
    return PlannedModel(architecture_config(cfg.architecture, rows, "student"), cfg)


def planned_teachers(cfg: PlanCommandConfig, student: PlannedModel) -> dict[str, PlannedModel]:
    """The teachers that are held here, by name: one for each checkpoint of the domains, or so many of the student's architecture."""
    if cfg.plan.teachers is not None:
        return {f"teacher {number + 1}": PlannedModel(student.config, ModelConfig(dtype=Dtype.bfloat16)) for number in range(cfg.plan.teachers)}
    found: dict[str, PlannedModel] = {}
    for name, domain in cfg.domains.items():
        teacher = domain.teacher
        if teacher.server is None:
            if teacher.model is None:
                raise ValueError(f"the teacher of {name} has no model: give a local folder or a hub id, or plan with plan.teachers=N of the student's shape")
            found.setdefault(f"{teacher.model}@{teacher.revision} {teacher.dtype.value}", PlannedModel(_read(teacher, f"teacher of {name}"), teacher))
    return found


def _read(cfg: ModelConfig, role: str) -> PretrainedConfig:
    require_folder(cfg.model, role)
    return plain_config(read_config(cfg, role))


def _shortened(config: PretrainedConfig, num_layers: int) -> PretrainedConfig:
    """The config with its first layers alone; lists with an entry for each layer are cut."""
    config = copy.deepcopy(config)
    text = config.get_text_config()
    depth = text.num_hidden_layers
    for name, value in vars(text).items():
        if isinstance(value, list) and len(value) == depth:
            setattr(text, name, value[:num_layers])
    text.num_hidden_layers = num_layers
    return config


def _on_line(first: int, second: int, depth: int) -> int:
    return second + (second - first) * (depth - DEPTHS[1]) // (DEPTHS[1] - DEPTHS[0])
