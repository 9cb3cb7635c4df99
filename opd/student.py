"""The student: a transformers model, loaded or built new, with what must not train frozen by name.

A new DeepSeek-V4 comes out of transformers with its hash-routing table all zero, which would send every token of those layers to
expert 0; it is filled here with distinct experts per token. The lightning indexer of compressed sparse attention gets no gradient
from any loss on the logits (its top-k is not differentiable), so its parameters are frozen and kept out of weight decay.
"""

import copy
import random

import numpy as np
import torch
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.modeling_layers import GradientCheckpointingLayer

from opd.config import Router, StudentConfig
from opd.quant_config import ExpertFormat, QuantConfig
from opd.routing import BALANCE_BIAS, find_routers
from rollout.experts import EXPERT_WEIGHTS, copy_with_packed_experts, fake_quantized, require_quantizable
from rollout.indexer import has_quantized_indexer, quantize_indexer
from rollout.model import build_model, load_model, load_tokenizer, require_folder
from rollout.quantized_models import is_fp4, read_config
from rollout.synthetic import character_tokenizer

NO_GRADIENT = (".indexer.",)
"""Parts of parameter names whose gradient is zero by construction."""

EXPERT_COUNTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
"""Settings of model families that say how many routed experts there are."""


def seed_everything(seed: int) -> None:
    """Seed the libraries' generators. They only initialise new models; every draw of a run is keyed (DESIGN 3.8)."""
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


def load_student_tokenizer(cfg: StudentConfig) -> PreTrainedTokenizerBase:
    """The tokenizer named, the model's own, or the character tokenizer for a new model."""
    source = cfg.tokenizer or cfg.model
    if cfg.model is not None:
        require_folder(cfg.model, "student")
    if source is None:
        return character_tokenizer()
    revision = cfg.revision if cfg.tokenizer is None else None
    return load_tokenizer(source, revision, cfg.trust_remote_code)


def build_student(cfg: StudentConfig, tokenizer: PreTrainedTokenizerBase, quant: QuantConfig | None = None) -> PreTrainedModel:
    """The student on the CPU, with frozen parts marked and its indexer quantised, so that the sampler's copy has it too; that its experts can be
    quantised is verified here, and the engine does it.

    Raises ValueError where neither or both of model and architecture are given, and for a setting that the family would ignore.
    """
    if (cfg.model is None) == (not cfg.architecture):
        raise ValueError("the student needs exactly one of student.model (a folder or hub id) and student.architecture (a new model)")
    if cfg.model is not None:
        model = load_model(cfg, "student")
    else:
        model = build_model(cfg.architecture, len(tokenizer), cfg, "student")
        fill_hash_tables(model)
    if model.config.get_text_config().vocab_size < len(tokenizer):
        raise ValueError(f"the student has {model.config.get_text_config().vocab_size} vocabulary rows, fewer than the tokenizer's {len(tokenizer)}")
    prepare_training(model, cfg)
    quant = quant or QuantConfig()
    if has_quantized_indexer(model.config) and not quant.indexer:
        raise ValueError(f"the student at {cfg.model} has its indexer in FP4: set quant.indexer=true")
    if quant.indexer:
        quantize_indexer(model, "student")
    if quant.experts is ExpertFormat.mxfp4:
        _require_experts_for_fp4(model, cfg)
    return model


def prepare_training(model: PreTrainedModel, cfg: StudentConfig) -> None:
    """Have a model recompute its activations where it is asked to, and freeze what must not train; its weights need not be there.

    Raises ValueError for a setting that the family would ignore.
    """
    if cfg.gradient_checkpointing:
        if not model.supports_gradient_checkpointing:
            raise ValueError(f"{model.config.model_type} does not support gradient checkpointing: set student.gradient_checkpointing=false")
        model.gradient_checkpointing_enable({"use_reentrant": False})
        for layer in model.modules():
            if isinstance(layer, GradientCheckpointingLayer):
                layer.training = True  # the model is in evaluation mode, in which transformers would not checkpoint
    _freeze(model, cfg)


def copy_for_sampling(model: PreTrainedModel, device: torch.device, quant: QuantConfig | None = None) -> PreTrainedModel:
    """A second model of the same architecture, dtype and weights for a sampler, with its experts packed where `quant` quantises them.

    Call it before the engine wraps the first.
    """
    is_packed = quant is not None and quant.experts is ExpertFormat.mxfp4
    copied = copy_with_packed_experts(model, "student") if is_packed else copy.deepcopy(model)
    return copied.to(device).eval().requires_grad_(False)


def fill_hash_tables(model: nn.Module) -> None:
    """Give every token id distinct experts in each hash-routed layer, drawn with torch's seeded generator."""
    for name, table in model.named_buffers():
        if name.endswith("tid2eid"):
            router = model.get_submodule(name.rsplit(".", 1)[0])
            scores = torch.rand(table.shape[0], router.num_experts)
            table.copy_(scores.argsort(dim=1)[:, : table.shape[1]])


def least_length(config: PretrainedConfig) -> int:
    """Positions that a row needs for every parameter to have a gradient, 0 where one will do.

    DeepSeek-V4's compressed attention passes its compressors over while a row is shorter than their window. ZeRO reduces what has a gradient, so that
    ranks of which only some have long rows would add up the gradients of different parameters.
    """
    rates = config.to_dict().get("compress_rates")
    return max(rates.values()) if rates else 0


def _require_experts_for_fp4(model: PreTrainedModel, cfg: StudentConfig) -> None:
    """Raises ValueError where FP4 cannot be attached to the experts, or would change the weights of a checkpoint that says they are FP4 already."""
    try:
        experts = require_quantizable(model, "student")
    except ValueError as error:
        raise ValueError(f"{error}: set quant=none") from error
    if cfg.model is None or not is_fp4(read_config(cfg, "student")):
        return
    for name, module in experts.items():
        for weight in EXPERT_WEIGHTS:
            decoded = getattr(module, weight).detach()
            if not torch.equal(fake_quantized(module, decoded), decoded):
                raise ValueError(f"{name}.{weight} of the student at {cfg.model} is FP4 and changes when it is quantised to MXFP4: its blocks are not 32 long")


def _freeze(model: PreTrainedModel, cfg: StudentConfig) -> None:
    routers = find_routers(model)
    settings = model.config.get_text_config().to_dict()
    counts = [name for name in EXPERT_COUNTS if (settings.get(name) or 0) > 1]
    if counts and not routers:
        raise ValueError(f"the student ({model.config.model_type}) has {counts[0]}, but its routers are not where this version looks: not supported")
    if not routers and cfg.router is Router.train:
        raise ValueError("student.router=train needs a mixture-of-experts student; this one has no routed experts")
    if cfg.router is Router.frozen and (cfg.router_bias_speed or cfg.router_balance_loss):
        raise ValueError("student.router_bias_speed and router_balance_loss need student.router=train: a frozen router does not change")
    if cfg.router_bias_speed and not any(name.endswith(BALANCE_BIAS) for name, _ in model.named_buffers()):
        raise ValueError("student.router_bias_speed needs routers with a balance bias; this family has none: set it to 0")
    for name, parameter in model.named_parameters():
        is_router = any(name.startswith(router + ".") for router in routers)
        if any(part in name for part in NO_GRADIENT) or (is_router and cfg.router is Router.frozen):
            parameter.requires_grad_(False)
