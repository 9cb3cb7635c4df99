"""Self-repair: a completion in which one character takes back the one before it, as the backspace key does.

A model that is to mend its own mistakes must have seen some; one that makes them leaves them as they are (`mistyped`). `repaired_answer` writes an answer
with injected errors that are taken back at once: a wrong character, perhaps further ones after it, and as many backspaces. The wrong characters are named by
their positions, for they are to be left out of the loss: learnt is how to go on after a mistake, not to make it. (Left in, they would teach a rate of
errors; errors that are seen only when the answer is complete were rejected, since everything after the first one would have to be typed again.)
"""

import random
from dataclasses import dataclass

BACKSPACE = "<"
MOST_ERRORS = 4
"""Each adds two characters: itself and its backspace."""
ERROR_RATE = 0.2
"""Chance of an error before each character of the answer, and of each further one after an error that is not taken back yet; or in place of a character."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RepairedAnswer:
    """An answer with errors that are taken back.

    text: what is typed; with its backspaces applied, the answer.
    errors: positions in `text` of the wrong characters, in order.
    """

    text: str
    errors: tuple[int, ...]


def after_backspaces(text: str) -> str:
    """What is left of a text when each backspace has taken away the character before it; one with nothing before it does nothing."""
    kept = []
    for character in text:
        if character != BACKSPACE:
            kept.append(character)
        elif kept:
            kept.pop()
    return "".join(kept)


def repaired_answer(answer: str, alphabet: str, rng: random.Random) -> RepairedAnswer:
    """The answer, typed with 1 to MOST_ERRORS errors from the alphabet, each stretch of which is taken back before the next right character."""
    text, errors = "", []
    certain = rng.randrange(len(answer))  # no row is without an error
    for place, right in enumerate(answer):
        stretch = _error_stretch(place == certain, MOST_ERRORS - len(errors) - (place < certain), rng)
        for number in range(stretch):
            errors.append(len(text))
            text += rng.choice([wrong for wrong in alphabet if wrong != right] if number == 0 else alphabet)
        text += BACKSPACE * stretch + right
    return RepairedAnswer(text=text, errors=tuple(errors))


def mistyped(answer: str, alphabet: str, rng: random.Random) -> str:
    """The answer with wrong characters from the alphabet in the place of some, one at least, and none taken back."""
    certain = rng.randrange(len(answer))
    wrong = [place == certain or rng.random() < ERROR_RATE for place in range(len(answer))]
    return "".join(rng.choice([other for other in alphabet if other != right]) if is_wrong else right for is_wrong, right in zip(wrong, answer, strict=True))


def _error_stretch(is_certain: bool, most: int, rng: random.Random) -> int:
    """Errors in a row; one is kept back for the certain place, so that `most` is 1 at least there."""
    length = int(is_certain)
    while length < most and rng.random() < ERROR_RATE:
        length += 1
    return length
