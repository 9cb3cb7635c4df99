"""Loading of models and tokenizers, and the two halves of a causal language model: backbone and head.

Everything else of the project sees a model as `backbone(tokens) -> last hidden states` and a head matrix, because that is
all that exact full-vocabulary distillation needs. What would break that view is refused here, by name: a head with a bias,
soft-capped or scaled logits, a setting that the family ignores, weights that the checkpoint does not hold.
"""

import json
import shutil
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import SafetensorError
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from rollout.config import Dtype, ModelConfig
from rollout.errors import first_sentence

transformers.utils.logging.disable_progress_bar()

LOGIT_TRANSFORMS = (
    "final_logit_softcapping",
    "logits_soft_cap",
    "output_logit_soft_cap",
    "logit_scale",
    "logits_scaling",
    "lm_head_multiplier",
    "logits_mup_width_multiplier",
)
"""Settings of model families whose logits are not simply head times hidden state."""


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
    try:
        model, report = AutoModelForCausalLM.from_pretrained(cfg.model, output_loading_info=True, **arguments)
    except (OSError, ValueError, ImportError, SafetensorError) as error:
        raise ValueError(f"the {role} cannot be loaded from {cfg.model}: {first_sentence(error)}") from error
    absent = sorted(report["missing_keys"]) + sorted(f"{name} (its shape differs)" for name, *_ in report["mismatched_keys"])
    if absent:
        raise ValueError(f"the checkpoint {cfg.model} of the {role} lacks {len(absent)} of the model's weights, {absent[0]} first")
    return prepare_model(model, cfg, role)


def build_model(architecture: dict[str, Any], vocab_size: int, cfg: ModelConfig, role: str) -> PreTrainedModel:
    """A new model from a transformers config: `architecture` holds `model_type` and what differs from its defaults."""
    settings = dict(architecture)
    family = settings.pop("model_type", None)
    if family is None:
        raise ValueError(f"the {role}'s architecture needs a model_type, as in conf/student/deepseek_v4_tiny.yaml")
    try:
        config = AutoConfig.for_model(family, vocab_size=vocab_size, **settings)
        attention = {} if cfg.attention is None else {"attn_implementation": cfg.attention.value}
        model = AutoModelForCausalLM.from_config(config, dtype=torch_dtype(cfg.dtype), **attention)
    except (ValueError, TypeError, ImportError) as error:
        raise ValueError(f"the {role} cannot be built from its architecture: {first_sentence(error)}") from error
    return prepare_model(model, cfg, role)


def prepare_model(model: PreTrainedModel, cfg: ModelConfig, role: str) -> PreTrainedModel:
    """Apply the settings that are made after loading, and refuse a model whose logits are not head times hidden state."""
    refuse_logit_transforms(model.config, role)
    if head_of(model).bias is not None:
        raise ValueError(f"the {role} ({model.config.model_type}) has a bias in its head, which the full-vocabulary divergence does not support")
    if cfg.experts is not None:
        if not find_experts(model):
            raise ValueError(f"the {role} has no routed experts, so `experts: {cfg.experts.value}` would be ignored: remove it")
        model.set_experts_implementation(cfg.experts.value)
    _unify_dtypes(model, torch_dtype(cfg.dtype))
    return model.eval()


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
    model.save_pretrained(partial, state_dict=weights)
    tokenizer.save_pretrained(partial)
    replace_folder(partial, folder)


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


def refuse_logit_transforms(config: PretrainedConfig, role: str) -> None:
    """Raises ValueError for a family whose logits are not simply head times hidden state."""
    settings = config.get_text_config().to_dict()
    transforms = [name for name in LOGIT_TRANSFORMS if settings.get(name) not in (None, 1, 1.0)]
    if transforms:
        raise ValueError(f"the {role} ({config.model_type}) has {transforms[0]}, which the full-vocabulary divergence does not support")


def end_tokens(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """Tokens that end a completion: the tokenizer's, and those of the model's generation config."""
    configured = model.generation_config.eos_token_id if model.generation_config is not None else None
    listed = configured if isinstance(configured, list) else [configured]
    return {tokenizer.eos_token_id, *(token for token in listed if token is not None)}


def find_experts(model: nn.Module) -> dict[str, nn.Module]:
    """Modules that hold routed experts as three-dimensional weights [E, out, in], by name."""
    return {name: module for name, module in model.named_modules() if _is_experts(module)}


def _unify_dtypes(model: nn.Module, dtype: torch.dtype) -> None:
    """Parameters in one dtype, floating-point buffers in float32: what DeepSpeed makes of a trained model, so that student, sampler and
    a teacher with the same weights compute the same. transformers keeps some small parameters of DeepSeek-V4 in float32 otherwise.
    """
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
    for buffer in model.buffers():
        if buffer.is_floating_point():
            buffer.data = buffer.data.float()


def _is_experts(module: nn.Module) -> bool:
    names = {name for name, _ in module.named_parameters(recurse=False)}
    return {"gate_up_proj", "down_proj"} <= names


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
