"""Loading of models and tokenizers, and the two halves of a causal language model: backbone and head.

Everything else of the project sees a model as `backbone(tokens) -> last hidden states` and a head matrix, because that is
all that exact full-vocabulary distillation needs. What would break that view is refused here, by name: a head with a bias,
soft-capped or scaled logits, a setting that the family ignores, weights that the checkpoint does not hold.
"""

import json
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import SafetensorError
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from rollout.config import Dtype, ModelConfig

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
    text_config = model.config.get_text_config().to_dict()
    transforms = [name for name in LOGIT_TRANSFORMS if text_config.get(name) not in (None, 1, 1.0)]
    if transforms or head_of(model).bias is not None:
        reason = transforms[0] if transforms else "a bias in its head"
        raise ValueError(f"the {role} ({model.config.model_type}) has {reason}, which the full-vocabulary divergence does not support")
    if cfg.experts is not None:
        if not find_experts(model):
            raise ValueError(f"the {role} has no routed experts, so `experts: {cfg.experts.value}` would be ignored: remove it")
        model.set_experts_implementation(cfg.experts.value)
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
    import shutil

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


def context_length(model: PreTrainedModel) -> int:
    """Positions the model was made for."""
    return model.config.get_text_config().max_position_embeddings


def find_experts(model: nn.Module) -> dict[str, nn.Module]:
    """Modules that hold routed experts as three-dimensional weights [E, out, in], by name."""
    return {name: module for name, module in model.named_modules() if _is_experts(module)}


def _is_experts(module: nn.Module) -> bool:
    names = {name for name, _ in module.named_parameters(recurse=False)}
    return {"gate_up_proj", "down_proj"} <= names


def torch_dtype(dtype: Dtype) -> torch.dtype:
    return {Dtype.float32: torch.float32, Dtype.bfloat16: torch.bfloat16}[dtype]


def first_sentence(error: BaseException) -> str:
    """The first line of another library's message, for a message of one sentence."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")


def require_folder(path: str, role: str) -> None:
    """Raises ValueError where a path that looks local is not a model's folder; without this it would be taken for a hub id."""
    folder = Path(path).expanduser()
    if not (folder.exists() or path.startswith((".", "/", "~")) or path.count("/") > 1):
        return
    if not (folder / "config.json").is_file():
        raise ValueError(f"the {role} is not at {path}: there is no config.json in that folder")
    try:
        json.loads((folder / "config.json").read_text())
    except json.JSONDecodeError as error:
        raise ValueError(f"the config.json of the {role} at {path} is not valid JSON: {first_sentence(error)}") from error
