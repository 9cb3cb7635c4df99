"""What must be equal between student and teacher, checked at start-up: both see the same token ids and share one vocabulary.

The architectures may differ in everything else. Only config and tokenizer are read here, so that twelve large teachers are
checked in seconds; that their weights are all there is verified when they are loaded.
"""

import hashlib
import json
from pathlib import Path

from transformers import AutoConfig, PreTrainedTokenizerBase

from rollout.config import ModelConfig
from rollout.errors import first_sentence
from rollout.model import context_length, load_tokenizer, logit_transform, require_folder, require_weights


def check_teacher(domain: str, cfg: ModelConfig, tokenizer: PreTrainedTokenizerBase) -> int:
    """As `check_compatible`, for the teacher of a domain."""
    if cfg.model is None:
        raise ValueError(f"domain {domain} has no teacher: set domains.{domain}.teacher.model to a local folder or hub id, or teacher.server to an address")
    return check_compatible(f"teacher of {domain}", cfg, tokenizer)


def check_compatible(role: str, cfg: ModelConfig, tokenizer: PreTrainedTokenizerBase) -> int:
    """The positions that a model can read.

    Raises ValueError, with the model's role, where it is not there or does not read the student's tokens.
    """
    require_folder(cfg.model, role)
    if cfg.revision is not None and Path(cfg.model).is_dir():
        raise ValueError(f"the {role} is the local folder {cfg.model}, so revision={cfg.revision} would be ignored: remove it")
    require_weights(cfg.model, role)
    try:
        config = AutoConfig.from_pretrained(cfg.model, revision=cfg.revision, trust_remote_code=cfg.trust_remote_code)
        own = load_tokenizer(cfg.model, cfg.revision, cfg.trust_remote_code)
    except (OSError, ValueError) as error:
        raise ValueError(f"the {role} cannot be read from {cfg.model}: {first_sentence(error)}") from error
    require_same_tokenizer(role, cfg.model, own, tokenizer)
    if own.eos_token_id != tokenizer.eos_token_id:
        raise ValueError(f"the {role} ends a sequence with token {own.eos_token_id}, the student with {tokenizer.eos_token_id}")
    vocab_size = config.get_text_config().vocab_size
    if vocab_size < len(tokenizer):
        raise ValueError(f"the {role} has {vocab_size} vocabulary rows, fewer than the tokenizer's {len(tokenizer)}")
    logit_transform(config, role)  # raises where the divergence does not know it
    return context_length(config, role)


def require_same_tokenizer(role: str, model: str, own: PreTrainedTokenizerBase, tokenizer: PreTrainedTokenizerBase) -> None:
    """Raises ValueError where the model's own tokenizer gives ids another meaning than the student's."""
    if tokenizer_fingerprint(own) != tokenizer_fingerprint(tokenizer):
        raise ValueError(f"the {role} ({model}) has another tokenizer than the student: they must share one vocabulary")


def tokenizer_fingerprint(tokenizer: PreTrainedTokenizerBase) -> str:
    """sha256 of the vocabulary with its ids, added tokens included: equal exactly where ids mean the same strings."""
    return hashlib.sha256(json.dumps(sorted(tokenizer.get_vocab().items())).encode()).hexdigest()
