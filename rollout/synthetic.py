"""The small verifiable domains that ship with the project, and the character tokenizer they are written in.

A domain is a rule from a prompt to its one right answer, so a completion can be graded by comparing strings, and data is
made on the spot: nothing is downloaded. Every prompt begins with its domain's letter, so that the domain can be told
from the prompt (one student can then hold several skills without interference).

Each domain also knows a *slip*: the well-formed answer that a common misconception gives. A base model trained on answers and,
more often, slips has the skill latent and unreliable, which is the state a language model is in before post-training; and
since the same wrong rule is behind every slip, its most likely answer is the wrong one, so that sharpening what it prefers
does not make it right. Random mistakes were rejected for that: they leave the right answer the most likely one.

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
    slip: the wrong answer that a common misconception gives, in the right format; never equal to the answer.
    """

    letter: str
    question: Callable[[random.Random], str]
    answer: Callable[[str], str]
    slip: Callable[[str], str]


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
        yield f"{domain.letter}:{question}=", domain.answer(question), domain.slip(question)


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


def _sum_slip(question: str) -> str:
    """The carry from ones to tens is forgotten, or made where there is none."""
    left, right = question.split("+")
    has_carry = int(left[1]) + int(right[1]) > 9
    return f"{int(left) + int(right) + (-10 if has_carry else 10):03d}"[::-1]


def _sort_question(rng: random.Random) -> str:
    return "".join(rng.choice("0123456789") for _ in range(6))


def _sort_answer(question: str) -> str:
    return "".join(sorted(question))


def _sort_slip(question: str) -> str:
    """Sorted downwards; where that is the same (six equal digits), with another last digit."""
    downwards = "".join(sorted(question, reverse=True))
    return downwards if downwards != _sort_answer(question) else downwards[:-1] + _next(downwards[-1], "0123456789")


CLOSING = {"(": ")", "[": "]", "{": "}", "<": ">"}


def _bracket_question(rng: random.Random) -> str:
    return "".join(rng.choice(list(CLOSING)) for _ in range(rng.randrange(5, 8)))


def _bracket_answer(question: str) -> str:
    return "".join(CLOSING[bracket] for bracket in reversed(question))


def _bracket_slip(question: str) -> str:
    """The opening brackets backwards, not closed."""
    return question[::-1]


def _call_question(rng: random.Random) -> str:
    first, second = rng.choice(LETTERS), rng.choice(LETTERS)
    return f"{first}{rng.randrange(10)}{second}{rng.randrange(10)}"


def _call_answer(question: str) -> str:
    """`k1p2` asks for two calls, in the opposite order and each with the other's argument: `{p(1);k(2)}`."""
    first, first_argument, second, second_argument = question
    return f"{{{second}({first_argument});{first}({second_argument})}}"


def _call_slip(question: str) -> str:
    """Each call keeps its own argument; where that is the same (equal arguments), the second one's is another."""
    first, first_argument, second, second_argument = question
    if first_argument == second_argument:
        second_argument = _next(second_argument, "0123456789")
    return f"{{{second}({second_argument});{first}({first_argument})}}"


def _next(character: str, alphabet: str) -> str:
    return alphabet[(alphabet.index(character) + 1) % len(alphabet)]


LETTERS = "abcdefghijklmnopqrstuvwxyz"

SYNTHETIC_DOMAINS = {
    "arithmetic": SyntheticDomain(letter="A", question=_sum_question, answer=_sum_answer, slip=_sum_slip),
    "sorting": SyntheticDomain(letter="S", question=_sort_question, answer=_sort_answer, slip=_sort_slip),
    "brackets": SyntheticDomain(letter="B", question=_bracket_question, answer=_bracket_answer, slip=_bracket_slip),
    "tools": SyntheticDomain(letter="T", question=_call_question, answer=_call_answer, slip=_call_slip),
}
