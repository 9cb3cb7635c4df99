"""What must be equal between student and teacher, checked at start-up: both see the same token ids and share one vocabulary.

The architectures may differ in everything else. Only config and tokenizer are read here, so that twelve large teachers are
checked in seconds; that their weights are all there is verified when they are loaded.
"""

import hashlib
import json

from transformers import AutoConfig, PreTrainedTokenizerBase

from rollout.config import ModelConfig
from rollout.errors import first_sentence
from rollout.model import context_length, load_tokenizer, refuse_logit_transforms, require_folder, require_weights


def check_teacher(domain: str, cfg: ModelConfig, tokenizer: PreTrainedTokenizerBase) -> int:
    """The positions that the teacher can read.

    Raises ValueError, with the domain's name, for a teacher that is not there or does not read the student's tokens.
    """
    if cfg.model is None:
        raise ValueError(f"domain {domain} has no teacher: set domains.{domain}.teacher.model to a local folder or hub id")
    require_folder(cfg.model, f"teacher of {domain}")
    require_weights(cfg.model, f"teacher of {domain}")
    try:
        config = AutoConfig.from_pretrained(cfg.model, revision=cfg.revision, trust_remote_code=cfg.trust_remote_code)
        own = load_tokenizer(cfg.model, cfg.revision, cfg.trust_remote_code)
    except (OSError, ValueError) as error:
        raise ValueError(f"the teacher of {domain} cannot be read from {cfg.model}: {first_sentence(error)}") from error
    if tokenizer_fingerprint(own) != tokenizer_fingerprint(tokenizer):
        raise ValueError(f"the teacher of {domain} ({cfg.model}) has another tokenizer than the student: they must share one vocabulary")
    if own.eos_token_id != tokenizer.eos_token_id:
        raise ValueError(f"the teacher of {domain} ends a sequence with token {own.eos_token_id}, the student with {tokenizer.eos_token_id}")
    vocab_size = config.get_text_config().vocab_size
    if vocab_size < len(tokenizer):
        raise ValueError(f"the teacher of {domain} has {vocab_size} vocabulary rows, fewer than the tokenizer's {len(tokenizer)}")
    refuse_logit_transforms(config, f"teacher of {domain}")
    return context_length(config, f"teacher of {domain}")


def tokenizer_fingerprint(tokenizer: PreTrainedTokenizerBase) -> str:
    """sha256 of the vocabulary with its ids, added tokens included: equal exactly where ids mean the same strings."""
    return hashlib.sha256(json.dumps(sorted(tokenizer.get_vocab().items())).encode()).hexdigest()
