"""The small verifiable domains that ship with the project, and the character tokenizer they are written in.

A domain is a rule from a prompt to its one right answer, so a completion can be graded by comparing strings, and data is
made on the spot: nothing is downloaded. Every prompt begins with its domain's letter, so that the domain can be told
from the prompt (one student can then hold several skills without interference).

Each domain also knows a *slip*: a well-formed answer that is wrong, as somebody would give who has the format but not the
rule. A base model trained on a mixture of answers and slips has the skill latent and unreliable, which is the state a
language model is in before post-training. Training it from scratch on right answers only would leave nothing to distil.

Train and held-out prompts are disjoint by construction: a prompt belongs to the held-out split if and only if its own
hash says so. Adding a domain: one rule, one slip, one entry in `SYNTHETIC_DOMAINS`.
"""

import hashlib
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass

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


@dataclass(frozen=True, slots=True, kw_only=True)
class SyntheticDomain:
    """A rule with its prompts.

    question: draws the text between the domain's letter and "=".
    answer: the one right answer to a question.
    slip: a wrong answer in the right format; drawn, so that slips differ.
    """

    letter: str
    question: Callable[[random.Random], str]
    answer: Callable[[str], str]
    slip: Callable[[str, random.Random], str]


def synthetic_rows(name: str, split: str, rows: int) -> list[dict[str, str]]:
    """The first `rows` distinct rows of a split ("train" or "held_out"), always the same for the same name.

    Returns dicts with "prompt", "answer" and "slip" (see the module docstring).
    Raises ValueError for an unknown domain or split, and where the domain has fewer distinct prompts than asked.
    """
    if name not in SYNTHETIC_DOMAINS:
        raise ValueError(f"no synthetic domain is called {name!r}; there are: {', '.join(SYNTHETIC_DOMAINS)}")
    if split not in ("train", "held_out"):
        raise ValueError(f"synthetic domains have the splits train and held_out, not {split!r}")
    found, seen, misses = [], set(), 0
    for prompt, answer, slip in _draws(SYNTHETIC_DOMAINS[name], f"{name}/{split}"):
        if prompt in seen or is_held_out(prompt) != (split == "held_out"):
            misses += 1
            if misses > 50 * (len(seen) + 1000):
                raise ValueError(f"synthetic domain {name!r} has only {len(found)} distinct {split} prompts; ask for fewer than {rows}")
            continue
        seen.add(prompt)
        found.append({"prompt": prompt, "answer": answer, "slip": slip})
        if len(found) == rows:
            return found
    raise AssertionError("the generator of draws never ends")


def is_held_out(prompt: str) -> bool:
    """Whether a prompt belongs to the held-out split: a property of its text alone."""
    return hashlib.sha256(prompt.encode()).digest()[0] % BUCKETS < HELD_OUT_BUCKETS


def _draws(domain: SyntheticDomain, key: str) -> Iterator[tuple[str, str, str]]:
    rng = random.Random(key)
    while True:
        question = domain.question(rng)
        answer = domain.answer(question)
        slip = answer
        while slip == answer:
            slip = domain.slip(question, rng)
        yield f"{domain.letter}:{question}=", answer, slip


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


def _sum_question(rng: random.Random) -> str:
    return f"{rng.randrange(100):02d}+{rng.randrange(100):02d}"


def _sum_answer(question: str) -> str:
    """Least significant digit first, so that each digit depends on digits to its left only."""
    left, right = question.split("+")
    return f"{int(left) + int(right):03d}"[::-1]


def _sum_slip(question: str, rng: random.Random) -> str:
    digits = list(_sum_answer(question))
    place = rng.randrange(2)
    digits[place] = str((int(digits[place]) + rng.randrange(1, 10)) % 10)
    return "".join(digits)


def _sort_question(rng: random.Random) -> str:
    return "".join(rng.choice("0123456789") for _ in range(6))


def _sort_answer(question: str) -> str:
    return "".join(sorted(question))


def _sort_slip(question: str, rng: random.Random) -> str:
    """Two digits exchanged; a question of six equal digits cannot be sorted wrongly, so there one digit is."""
    digits = list(_sort_answer(question))
    if len(set(digits)) == 1:
        digits[rng.randrange(6)] = rng.choice("0123456789")
    left, right = rng.sample(range(6), 2)
    digits[left], digits[right] = digits[right], digits[left]
    return "".join(digits)


CLOSING = {"(": ")", "[": "]", "{": "}", "<": ">"}


def _bracket_question(rng: random.Random) -> str:
    return "".join(rng.choice(list(CLOSING)) for _ in range(rng.randrange(5, 8)))


def _bracket_answer(question: str) -> str:
    return "".join(CLOSING[bracket] for bracket in reversed(question))


def _bracket_slip(question: str, rng: random.Random) -> str:
    closers = list(_bracket_answer(question))
    for place in rng.sample(range(len(closers)), 2):
        closers[place] = rng.choice(list(CLOSING.values()))
    return "".join(closers)


def _call_question(rng: random.Random) -> str:
    first, second = rng.choice(LETTERS), rng.choice(LETTERS)
    return f"{first}{rng.randrange(10)}{second}{rng.randrange(10)}"


def _call_answer(question: str) -> str:
    """`k1p2` asks for two calls, in the opposite order and each with the other's argument: `{p(1);k(2)}`."""
    first, first_argument, second, second_argument = question
    return f"{{{second}({first_argument});{first}({second_argument})}}"


def _call_slip(question: str, rng: random.Random) -> str:
    return _call_answer("".join(rng.choice([part, other]) for part, other in zip(question, _call_question(rng), strict=True)))


LETTERS = "abcdefghijklmnopqrstuvwxyz"

SYNTHETIC_DOMAINS = {
    "arithmetic": SyntheticDomain(letter="A", question=_sum_question, answer=_sum_answer, slip=_sum_slip),
    "sorting": SyntheticDomain(letter="S", question=_sort_question, answer=_sort_answer, slip=_sort_slip),
    "brackets": SyntheticDomain(letter="B", question=_bracket_question, answer=_bracket_answer, slip=_bracket_slip),
    "tools": SyntheticDomain(letter="T", question=_call_question, answer=_call_answer, slip=_call_slip),
}
