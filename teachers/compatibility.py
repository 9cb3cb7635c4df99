"""What must be equal between student and teacher, checked at start-up: both see the same token ids and share one vocabulary.

The architectures may differ in everything else. Only config, tokenizer and the headers of the weights are read here, so that twelve large teachers are
checked in seconds; that their weights are all there is verified when they are loaded.

Prompts are rendered once, by the student's chat template. A teacher with another one was trained on prompts that look otherwise, and scores
these off its distribution: refused, unless teachers.allow_other_template=true says that it is meant (an old checkpoint may lack a template), and
where all its domains are raw, since no template is used there.
"""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

from transformers import AutoConfig, PreTrainedTokenizerBase

from rollout.config import ModelConfig
from rollout.errors import first_sentence
from rollout.model import context_length, load_tokenizer, logit_transform, require_folder, require_weights
from teachers.fingerprint import require_whole_files, weights_fingerprint


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelFacts:
    """What can be said of a checkpoint before it is loaded; hashes are sha256 in hexadecimal digits.

    tokenizer, template: of the vocabulary with its ids, and of the chat template; None where there is none.
    vocab_rows: rows of the embedding and the head; those beyond the tokenizer's are padding and never count.
    context: positions it can read.
    stored_dtype: of the weights on disk, as config.json names it.
    weights: teachers/fingerprint.py.
    """

    tokenizer: str
    template: str | None
    vocab_rows: int
    context: int
    stored_dtype: str
    weights: str


def model_facts(cfg: ModelConfig, role: str) -> ModelFacts:
    """Facts of a model that `check_compatible` has accepted."""
    config = AutoConfig.from_pretrained(cfg.model, revision=cfg.revision, trust_remote_code=cfg.trust_remote_code)
    tokenizer = load_tokenizer(cfg.model, cfg.revision, cfg.trust_remote_code)
    return ModelFacts(
        tokenizer=tokenizer_fingerprint(tokenizer),
        template=template_fingerprint(tokenizer),
        vocab_rows=config.get_text_config().vocab_size,
        context=context_length(config, role),
        stored_dtype=str(config.dtype).removeprefix("torch."),
        weights=weights_fingerprint(cfg, role),
    )


def check_teacher(domain: str, cfg: ModelConfig, tokenizer: PreTrainedTokenizerBase, needs_template: bool = False) -> int:
    """As `check_compatible`, for the teacher of a domain; `needs_template` also refuses another chat template than the student's."""
    if cfg.model is None:
        raise ValueError(f"domain {domain} has no teacher: set domains.{domain}.teacher.model to a local folder or hub id, or teacher.server to an address")
    context = check_compatible(f"teacher of {domain}", cfg, tokenizer)
    if needs_template:
        own = template_fingerprint(load_tokenizer(cfg.model, cfg.revision, cfg.trust_remote_code))
        if own != template_fingerprint(tokenizer):
            what = "no chat template" if own is None else "another chat template than the student"
            raise ValueError(
                f"the teacher of {domain} ({cfg.model}) has {what}, so prompts would not look as in its training: "
                "give both the same, or accept it with teachers.allow_other_template=true"
            )
    return context


def check_compatible(role: str, cfg: ModelConfig, tokenizer: PreTrainedTokenizerBase) -> int:
    """The positions that a model can read.

    Raises ValueError, with the model's role, where it is not there or does not read the student's tokens.
    """
    require_folder(cfg.model, role)
    if cfg.revision is not None and Path(cfg.model).is_dir():
        raise ValueError(f"the {role} is the local folder {cfg.model}, so revision={cfg.revision} would be ignored: remove it")
    require_weights(cfg.model, role)
    require_whole_files(cfg, role)
    try:
        config = AutoConfig.from_pretrained(cfg.model, revision=cfg.revision, trust_remote_code=cfg.trust_remote_code)
        own = load_tokenizer(cfg.model, cfg.revision, cfg.trust_remote_code)
    except (OSError, ValueError) as error:
        raise ValueError(f"the {role} cannot be read from {cfg.model}: {first_sentence(error)}") from error
    require_same_tokenizer(role, cfg.model, own, tokenizer)
    if own.eos_token_id != tokenizer.eos_token_id:
        raise ValueError(f"the {role} ends a sequence with token {own.eos_token_id}, the student with {tokenizer.eos_token_id}")
    _require_special_tokens(role, own, tokenizer)
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


def template_fingerprint(tokenizer: PreTrainedTokenizerBase) -> str | None:
    """sha256 of the chat template (or of all, where a tokenizer has several by name); None where there is none."""
    template = tokenizer.chat_template
    return None if template is None else hashlib.sha256(json.dumps(template, sort_keys=True).encode()).hexdigest()


def _require_special_tokens(role: str, own: PreTrainedTokenizerBase, tokenizer: PreTrainedTokenizerBase) -> None:
    """Raises ValueError where the two begin a sequence, or write what is unknown, with different tokens.

    The padding token may differ: fine-tuning often adds one, and masks come from lengths. Added special tokens are in the vocabulary's hash.
    """
    for name in ("bos_token", "unk_token"):
        theirs, ours = (kind.special_tokens_map.get(name) for kind in (own, tokenizer))
        if theirs != ours:
            raise ValueError(f"the {role} has {theirs} as its {name}, the student {ours}: give both the same tokenizer files")
