"""The small verifiable domains that ship with the project, and the character tokenizer they are written in.

A domain is a rule from a prompt to its one right answer, so a completion can be graded by comparing strings, and data is
made on the spot: nothing is downloaded. Every prompt begins with its domain's letter, so that the domain can be told
from the prompt (one student can then hold several skills without interference).

Each domain also knows a *slip*: the well-formed answer that a common misconception gives. A base model trained on answers and,
more often, slips has the skill latent and unreliable, which is the state a language model is in before post-training; and
since the same wrong rule is behind every slip, its most likely answer is the wrong one, so that sharpening what it prefers
does not make it right. Random mistakes were rejected for that: they leave the right answer the most likely one.

Train and held-out prompts are disjoint by construction: a prompt belongs to the held-out split if and only if its own
hash says so, at whatever difficulty it was drawn: sources of several difficulties may be mixed. The rules themselves, what difficulty means to each, and how
a domain is added: rollout/synthetic_rules.py.
"""

import hashlib
import random
from collections.abc import Iterator
from typing import Any

from rollout.synthetic_rules import DIFFICULTIES, SYNTHETIC_DOMAINS, SyntheticDomain

HELD_OUT_BUCKETS, BUCKETS = 4, 16
"""A prompt is held out when its hash falls into 4 of 16 buckets: a quarter of all prompts."""

SPECIAL_TOKENS = {"pad_token": "<pad>", "bos_token": "<bos>", "eos_token": "<eos>"}
ROLE_TOKENS = ("<system>", "<user>", "<assistant>", "<tool>")
CHARACTERS = "0123456789abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ +-*/=:;.,()[]{}<>!?_|\"'\n"

CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}<{{ message['role'] }}>{{ message['content'] }}"
    "{% if message['role'] == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


def synthetic_rows(name: str, split: str, rows: int, difficulty: int = 1) -> list[dict[str, Any]]:
    """The first `rows` distinct rows of a split ("train" or "held_out"), always the same for the same name and difficulty.

    Returns dicts with "prompt", "answer" and "slip" (see the module docstring), and "repaired", a `RepairedAnswer`, where the domain has a backspace.
    Raises ValueError for an unknown domain, split or difficulty, and where the domain has fewer distinct prompts than asked.
    """
    if name not in SYNTHETIC_DOMAINS:
        raise ValueError(f"no synthetic domain is called {name!r}; there are: {', '.join(SYNTHETIC_DOMAINS)}")
    if split not in ("train", "held_out"):
        raise ValueError(f"synthetic domains have the splits train and held_out, not {split!r}")
    if difficulty not in DIFFICULTIES:
        raise ValueError(f"synthetic domains have the difficulties {DIFFICULTIES[0]} to {DIFFICULTIES[-1]}, not {difficulty}")
    found, seen, misses = [], set(), 0
    for row in _draws(SYNTHETIC_DOMAINS[name], f"{name}/{split}" if difficulty == 1 else f"{name}/{split}/{difficulty}", difficulty):
        if row["prompt"] in seen or is_held_out(row["prompt"]) != (split == "held_out"):
            misses += 1
            if misses > 50 * (len(seen) + 1000):
                raise ValueError(f"synthetic domain {name!r} has only {len(found)} distinct {split} prompts; ask for fewer than {rows}")
            continue
        seen.add(row["prompt"])
        found.append(row)
        if len(found) == rows:
            return found
    raise AssertionError("the generator of draws never ends")


def is_held_out(prompt: str) -> bool:
    """Whether a prompt belongs to the held-out split: a property of its text alone."""
    return hashlib.sha256(prompt.encode()).digest()[0] % BUCKETS < HELD_OUT_BUCKETS


def _draws(domain: SyntheticDomain, key: str, difficulty: int) -> Iterator[dict[str, Any]]:
    rng = random.Random(key)
    while True:
        question = domain.question(rng, difficulty)
        prompt, answer = f"{domain.letter}:{question}=", domain.answer(question)
        row = {"prompt": prompt, "answer": answer, "slip": domain.slip(question)}
        yield row if domain.repair is None else row | {"repaired": domain.repair(answer, random.Random(f"repaired/{prompt}"))}


def character_tokenizer():
    """A tokenizer with one token per printable character, role tokens and a chat template: `PreTrainedTokenizerFast`."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    tokens = [*SPECIAL_TOKENS.values(), "<unk>", *ROLE_TOKENS, *CHARACTERS]
    backend = Tokenizer(models.WordLevel({token: index for index, token in enumerate(tokens)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), behavior="isolated")
    backend.decoder = decoders.Fuse()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, unk_token="<unk>", extra_special_tokens=list(ROLE_TOKENS), **SPECIAL_TOKENS
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer
