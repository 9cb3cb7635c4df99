"""Loading of models and tokenizers, and the two halves of a causal language model: backbone and head.

Everything else of the project sees a model as `backbone(tokens) -> last hidden states`, a head matrix, and a scale and soft-cap
of their product, because that is all that exact full-vocabulary distillation needs. What would break that view is refused here,
by name: a head with a bias, cropped logits, a setting that the family ignores, weights that the checkpoint does not hold. Scale and
soft-cap are read from the settings, and measured on every model that is loaded: a family that is not known here cannot be wrong
in silence.

B: rows. L: positions. D: hidden size. V: vocabulary.
"""

import json
import logging
import math
import shutil
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import SafetensorError
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from rollout.config import Attention, Dtype, ModelConfig
from rollout.errors import first_sentence
from rollout.experts import find_experts
from rollout.indexer import has_quantized_indexer, quantize_indexer
from rollout.quantized_models import decode_on_load, forget_quantization, quantization_of, read_config
from rollout.types import LogitTransform

transformers.utils.logging.disable_progress_bar()

SCALES = {
    "logit_scale": 1,  # Cohere
    "lm_head_multiplier": 1,  # Falcon-H1
    "logits_scaling": -1,  # Granite
    "logits_mup_width_multiplier": -1,  # Inkling, on the hidden state
}
"""Settings of model families that scale the logits: 1 multiplies, -1 divides."""

SCALES_OF_FAMILY = {("hyperclovax", "logits_scaling"): 1}
"""Families in which a setting works the other way."""

SOFTCAPS = ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")
"""Settings that bound the logits: of Gemma and others, RecurrentGemma, xLSTM."""

IGNORED = {("mpt", "logit_scale"), ("gemma3", "final_logit_softcapping")}
"""Settings that transformers' model of a family does not read (gemma3 is the one with images, gemma3_text reads it)."""

PROBE_SIZE = 128.0
"""Size of the logits at which a model's transform is measured: far above every soft-cap in use."""


def load_model(cfg: ModelConfig, role: str, device: torch.device | str = "cpu") -> PreTrainedModel:
    """The model a config names, in evaluation mode; `role` names it in errors ("student", "teacher of law").

    accelerate builds it without memory and reads the weights shard by shard straight to the device.

    Raises ValueError where it is not there, where weights are missing from the checkpoint (transformers would fill them
    with random numbers and only warn), or where a setting would be ignored.
    """
    if cfg.model is None:
        raise ValueError(f"the {role} has no model: give a local folder or a hub id")
    if cfg.revision is not None and Path(cfg.model).is_dir():
        raise ValueError(f"the {role} is the local folder {cfg.model}, so revision={cfg.revision} would be ignored: remove it")
    arguments = {"revision": cfg.revision, "trust_remote_code": cfg.trust_remote_code, "dtype": torch_dtype(cfg.dtype), "device_map": {"": device}}
    arguments["ignore_mismatched_sizes"] = True  # reported below, by name
    if cfg.attention is not None:
        arguments["attn_implementation"] = cfg.attention.value
    require_folder(cfg.model, role)
    config = decode_on_load(read_config(cfg, role), cfg, role)
    try:
        model, report = AutoModelForCausalLM.from_pretrained(cfg.model, config=config, output_loading_info=True, **arguments)
    except (OSError, ValueError, ImportError, SafetensorError) as error:
        raise ValueError(f"the {role} cannot be loaded from {cfg.model}: {first_sentence(error)}") from error
    except RuntimeError as error:
        if "conversion of the weights" not in str(error):
            raise
        raise ValueError(f"the checkpoint {cfg.model} of the {role} lacks a part of a weight that it stores in parts, as one expert of a layer") from error
    absent = sorted(report["missing_keys"]) + sorted(f"{name} (its shape differs)" for name, *_ in report["mismatched_keys"])
    if absent:
        raise ValueError(f"the checkpoint {cfg.model} of the {role} lacks {len(absent)} of the model's weights, {absent[0]} first")
    if report["unexpected_keys"]:
        surplus = sorted(report["unexpected_keys"])
        logging.getLogger(__name__).warning("the checkpoint %s of the %s holds %d unused weights, %s first", cfg.model, role, len(surplus), surplus[0])
    if quantization_of(config):
        forget_quantization(model)
    return prepare_model(model, cfg, role)


def build_model(architecture: dict[str, Any], vocab_size: int, cfg: ModelConfig, role: str) -> PreTrainedModel:
    """A new model from a transformers config: `architecture` holds `model_type` and what differs from its defaults."""
    config = architecture_config(architecture, vocab_size, role)
    try:
        attention = {} if cfg.attention is None else {"attn_implementation": cfg.attention.value}
        model = AutoModelForCausalLM.from_config(config, dtype=torch_dtype(cfg.dtype), **attention)
    except (ValueError, TypeError, ImportError) as error:
        raise ValueError(f"the {role} cannot be built from its architecture: {first_sentence(error)}") from error
    return prepare_model(model, cfg, role)


def architecture_config(architecture: dict[str, Any], vocab_size: int, role: str) -> PretrainedConfig:
    """The transformers config of an architecture, with `vocab_size` rows in embedding and head unless it says how many itself."""
    settings = {"vocab_size": vocab_size, **architecture}
    family = settings.pop("model_type", None)
    if family is None:
        raise ValueError(f"the {role}'s architecture needs a model_type, as in conf/student/deepseek_v4_tiny.yaml")
    try:
        return AutoConfig.for_model(family, **settings)
    except (ValueError, TypeError, ImportError) as error:
        raise ValueError(f"the {role} cannot be built from its architecture: {first_sentence(error)}") from error


def prepare_model(model: PreTrainedModel, cfg: ModelConfig, role: str) -> PreTrainedModel:
    """Apply the settings that are made after loading, and refuse a model whose logits are not what `logit_transform` says."""
    apply_settings(model, cfg, role)
    verify_transform(model, cfg, role)
    return model


def apply_settings(model: PreTrainedModel, cfg: ModelConfig, role: str) -> PreTrainedModel:
    """The settings that are made after loading; its weights need not be there. Raises ValueError where one would be ignored, and for an unusual head."""
    if not isinstance(head_of(model), nn.Linear):
        raise ValueError(f"the {role} ({model.config.model_type}) has no single linear head, which the full-vocabulary divergence needs")
    if head_of(model).bias is not None:
        raise ValueError(f"the {role} ({model.config.model_type}) has a bias in its head, which the full-vocabulary divergence does not support")
    if cfg.experts is not None:
        if not find_experts(model):
            raise ValueError(f"the {role} has no routed experts, so `experts: {cfg.experts.value}` would be ignored: remove it")
        model.set_experts_implementation(cfg.experts.value)
    if has_quantized_indexer(model.config):  # the checkpoint says so
        quantize_indexer(model, role)
    unify_dtypes(model, torch_dtype(cfg.dtype))
    return model.eval()


def verify_transform(model: PreTrainedModel, cfg: ModelConfig, role: str) -> None:
    """Raises ValueError where a model's logits are not what `logit_transform` says."""
    transform = logit_transform(model.config, role)
    if cfg.attention is Attention.flash_attention_2:  # a student is still on the CPU, where that does not run
        model.set_attn_implementation(Attention.eager.value)
        _verify_transform(model, transform, role)
        model.set_attn_implementation(cfg.attention.value)
    else:
        _verify_transform(model, transform, role)


def load_tokenizer(path: str, revision: str | None = None, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """The tokenizer of a model folder or hub id. Raises ValueError where there is none or it has no end-of-sequence token."""
    require_folder(path, "tokenizer")
    try:
        tokenizer = AutoTokenizer.from_pretrained(path, revision=revision, trust_remote_code=trust_remote_code)
    except (OSError, ValueError, ImportError, KeyError, TypeError) as error:
        raise ValueError(f"no tokenizer can be loaded from {path}: {first_sentence(error)}") from error
    if len(tokenizer) <= len(tokenizer.all_special_ids):  # what some families give where the files are missing
        raise ValueError(f"no tokenizer can be loaded from {path}: the one there has no tokens but special ones")
    if tokenizer.eos_token_id is None:
        raise ValueError(f"the tokenizer of {path} has no end-of-sequence token, so completions could not end")
    return tokenizer


def save_model(folder: Path, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, weights: dict[str, torch.Tensor]) -> None:
    """A Hugging Face folder with the given full weights, in place of whatever stood there; complete or absent, never half."""
    partial = folder.with_name(folder.name + ".partial")
    write_model(partial, model, tokenizer, weights)
    replace_folder(partial, folder)


def write_model(folder: Path, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, weights: dict[str, torch.Tensor], shard_size: str = "50GB") -> None:
    """Write a Hugging Face folder file by file; `shard_size` at most for each file of weights."""
    model.save_pretrained(folder, state_dict=weights, max_shard_size=shard_size)
    tokenizer.save_pretrained(folder)


def replace_folder(new: Path, folder: Path) -> None:
    """Rename `new` to `folder`, moving an older one out of the way first."""
    if folder.exists():
        old = folder.with_name(folder.name + ".old")
        shutil.rmtree(old, ignore_errors=True)
        folder.rename(old)
        new.rename(folder)
        shutil.rmtree(old)
    else:
        new.rename(folder)


def backbone_of(model: PreTrainedModel) -> nn.Module:
    """The part that maps tokens to last hidden states, after the final norm."""
    return model.base_model


def head_of(model: PreTrainedModel) -> nn.Linear:
    """The output projection [V, D]."""
    return model.get_output_embeddings()


def context_length(config: PretrainedConfig, role: str) -> int:
    """Positions a model was made for. Raises ValueError for a family that does not say."""
    positions = config.get_text_config().to_dict().get("max_position_embeddings")
    if positions is None:
        raise ValueError(f"the config of the {role} ({config.model_type}) has no max_position_embeddings: this family is not supported")
    return positions


def logit_transform(config: PretrainedConfig, role: str) -> LogitTransform:
    """What a family does to the product of head and hidden state. Raises ValueError where that is more than a scale and a soft-cap."""
    text_config = config.get_text_config()
    settings = {name: value for name, value in text_config.to_dict().items() if value is not None and (config.model_type, name) not in IGNORED}
    if settings.get("unpadded_vocab_size", text_config.vocab_size) < text_config.vocab_size:
        raise ValueError(f"the {role} ({config.model_type}) crops its logits to unpadded_vocab_size, which the full-vocabulary divergence does not support")
    scale = math.prod(settings[name] ** SCALES_OF_FAMILY.get((config.model_type, name), power) for name, power in SCALES.items() if name in settings)
    if "dim_model_base" in settings:  # MiniCPM divides the hidden state by its width over the width that the settings were tuned at
        scale *= settings["dim_model_base"] / settings["hidden_size"]
    return LogitTransform(float(scale), next((settings[name] for name in SOFTCAPS if name in settings), None))


def end_tokens(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """Tokens that end a completion: the tokenizer's, and those of the model's generation config."""
    configured = model.generation_config.eos_token_id if model.generation_config is not None else None
    listed = configured if isinstance(configured, list) else [configured]
    return {tokenizer.eos_token_id, *(token for token in listed if token is not None)}


def unify_dtypes(model: nn.Module, dtype: torch.dtype) -> None:
    """Parameters in one dtype, floating-point buffers in float32: what DeepSpeed makes of a trained model, so that student, sampler and
    a teacher with the same weights compute the same. transformers keeps some small parameters of DeepSeek-V4 in float32 otherwise.
    """
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
    for buffer in model.buffers():
        if buffer.is_floating_point():
            buffer.data = buffer.data.float()


@torch.no_grad()
def _verify_transform(model: PreTrainedModel, transform: LogitTransform, role: str) -> None:
    """Raises ValueError where the model's own logits are not `transform` of head times hidden state.

    Two equal rows are run. In the second, what the head gives is made as large as PROBE_SIZE: a soft-cap of 30 moves the small logits
    of a new model by less than rounding does. In the first it is left, so that a term added to the logits is seen as well.
    A model that gives zeros or NaN passes; the latter is reported where it is used.
    """
    head, tokens_BL = head_of(model), torch.arange(4, device=model.device).expand(2, 4)
    unknown = ValueError(
        f"the {role} ({model.config.model_type}) computes its logits in a way the full-vocabulary divergence does not know: "
        "add its scale or soft cap to SCALES or SOFTCAPS of rollout/model.py"
    )
    hidden_BLD = backbone_of(model)(input_ids=tokens_BL, use_cache=False)[0]
    if hidden_BLD.shape != (*tokens_BL.shape, head.in_features):
        raise unknown
    product_BLV = head(hidden_BLD.to(head.weight.dtype))
    gain = torch.exp2((PROBE_SIZE / product_BLV.abs().max()).log2().round())  # a power of two rounds nothing
    gain_B11 = torch.stack([torch.ones_like(gain), gain])[:, None, None]
    hook = head.register_forward_hook(lambda module, inputs, product_BLV: product_BLV * gain_B11)
    try:
        logits_BLV = model(input_ids=tokens_BL, use_cache=False).logits.float()
    finally:
        hook.remove()
    expected_BLV = transform.scale * (product_BLV * gain_B11).float()
    if transform.softcap is not None:
        expected_BLV = transform.softcap * torch.tanh(expected_BLV / transform.softcap)
    if logits_BLV.shape != expected_BLV.shape:
        raise unknown
    error_B, size_B = (logits_BLV - expected_BLV).abs().amax((1, 2)), expected_BLV.abs().amax((1, 2))
    tolerance = 2e-2 if head.weight.dtype == torch.bfloat16 else 1e-3  # of the largest logit; room for TF32
    if (error_B > tolerance * size_B).any():
        raise unknown


def torch_dtype(dtype: Dtype) -> torch.dtype:
    return {Dtype.float32: torch.float32, Dtype.bfloat16: torch.bfloat16}[dtype]


def require_folder(path: str, role: str) -> None:
    """Raises ValueError where a path that looks local is not a model's folder; without this it would be taken for a hub id."""
    if path.startswith("~"):
        raise ValueError(f"the {role} is at {path}: write the folder without ~, which is not expanded in a config")
    folder = Path(path)
    if not (folder.exists() or path.startswith((".", "/")) or path.count("/") > 1):
        return
    if not (folder / "config.json").is_file():
        raise ValueError(f"the {role} is not at {path}: there is no config.json in that folder")
    try:
        json.loads((folder / "config.json").read_text())
    except json.JSONDecodeError as error:
        raise ValueError(f"the config.json of the {role} at {path} is not valid JSON: {first_sentence(error)}") from error


def require_weights(path: str, role: str) -> None:
    """Raises ValueError where a local folder lacks a file of weights; what is in them is verified when they are loaded."""
    folder = Path(path)
    if not folder.is_dir():
        return
    indices = list(folder.glob("*.index.json"))
    named = {name for index in indices for name in json.loads(index.read_text())["weight_map"].values()}
    absent = sorted(name for name in named if not (folder / name).is_file())
    if absent or not (named or any(folder.glob("*.safetensors")) or any(folder.glob("*.bin"))):
        raise ValueError(f"the {role} at {path} has no {absent[0] if absent else 'weights (*.safetensors)'}")
