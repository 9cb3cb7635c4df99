"""The rules of the embedded domains: what is asked, the one right answer, and the slip.

Adding a domain: three functions (question, answer, slip), an entry in `SYNTHETIC_DOMAINS` with a letter of its own, a row in the table below, and
conf/domain/NAME.yaml. What a rule has to keep to, so that a student of 0.4 M parameters learns it and its accuracy says something:
    - lower-case letters only, and no spaces: prompts are compared without regard to either (rollout/words.py);
    - at most LONGEST_ANSWER characters, each of which follows from the question and from the characters to its left. The sum is written least
      significant digit first for that;
    - nothing that is right half of the time by chance: parity asks for that of every prefix, the regular expression for the whole text;
    - the slip has the length and the characters of an answer and comes from one misconception, with a second form only where that is right by chance.
      Only in backspace are its errors at random places: a misconception is over as soon as it is known for one, and what is to be learnt there is what
      to do after an error, wherever it happens.

`difficulty` (1, the default, to 3) makes a question longer. A prompt's split does not depend on it, for that is the prompt's own hash.

    domain        asks                                              slip                                    difficulty 1, 2, 3
    arithmetic    A:89+36=      sum, least significant digit first  first carry forgotten or invented       numbers of 2, 3, 4 digits
    sorting       S:397758=     digits in order                     downwards                               6, 8, 10 digits
    brackets      B:(<[=        closing brackets                    backwards, not closed                   5-7, 8-10, 11-13 brackets
    tools         T:k1p2=       calls with arguments swapped        not swapped                             arguments of 1, 2, 3 digits
    modular       M:3|7*482=    each digit times 3, modulo 7        plus 3, modulo 7                        4, 6, 8 digits
    copying       C:kqzx+1=     the letters from offset 1, round    offset counted from one                 6, 8, 10 letters
    parity        P:3817=       parity of each prefix's sum         parity of each digit                    7, 9, 11 digits
    bases         N:3fa=        base sixteen in base four           each pair of digits backwards           4, 5, 6 digits
    json_repair   J:{k":[3,7]}= what was lost is put back           in Python's quotes                      lists of 2, 3, 4 numbers
    calendar      D:3+tsw=      weekdays three days later           the weekday itself counted as a day     5, 6, 7 weekdays
    run_length    R:aaab=       letters with their counts           counts of repeats, the first left out   4, 5, 6 runs
    regex         X:[b-e]kdb=   matches blanked                     only the ends of the range match        6, 8, 10 letters
    backspace     E:397758=     sorting; `<` takes back             some digits mistyped                    6, 8, 10 digits
"""

import random
from collections.abc import Callable
from dataclasses import dataclass

from rollout.self_repair import RepairedAnswer, mistyped, repaired_answer

DIFFICULTIES = range(1, 4)
LONGEST_ANSWER = 16
"""Characters, at any difficulty; a text with repaired errors may have a few more."""

LETTERS = "abcdefghijklmnopqrstuvwxyz"
DIGITS = "0123456789"
HEXADECIMALS = "0123456789abcdef"
CLOSING = {"(": ")", "[": "]", "{": "}", "<": ">"}
WEEKDAYS = "mtwrfsu"
"""Monday to Sunday in the letters of timetables, where Thursday is r and Sunday u."""
TEXT_LETTERS = "abcdefghij"
RUN_LETTERS = "abcdef"


@dataclass(frozen=True, slots=True, kw_only=True)
class SyntheticDomain:
    """A rule with its prompts.

    letter: begins every prompt, before a colon.
    question: draws the text between the colon and "=", at a difficulty.
    answer: the one right answer to a question.
    slip: the wrong answer that a common misconception gives, in the right format; never equal to the answer.
    repair: writes an answer with errors that are taken back (rollout/self_repair.py), where completions may do so.
    """

    letter: str
    question: Callable[[random.Random, int], str]
    answer: Callable[[str], str]
    slip: Callable[[str], str]
    repair: Callable[[str, random.Random], RepairedAnswer] | None = None


def _sum_question(rng: random.Random, difficulty: int) -> str:
    digits = difficulty + 1
    return f"{rng.randrange(10**digits):0{digits}d}+{rng.randrange(10**digits):0{digits}d}"


def _sum_answer(question: str) -> str:
    """Least significant digit first, so that each digit depends on digits to its left only."""
    left, right = question.split("+")
    return f"{int(left) + int(right):0{len(left) + 1}d}"[::-1]


def _sum_slip(question: str) -> str:
    """The carry from ones to tens is forgotten, or made where there is none."""
    left, right = question.split("+")
    has_carry = int(left[-1]) + int(right[-1]) > 9
    return f"{int(left) + int(right) + (-10 if has_carry else 10):0{len(left) + 1}d}"[::-1]


def _sort_question(rng: random.Random, difficulty: int) -> str:
    return _drawn(rng, DIGITS, 4 + 2 * difficulty)


def _sort_answer(question: str) -> str:
    return "".join(sorted(question))


def _sort_slip(question: str) -> str:
    """Sorted downwards; where that is the same (all digits equal), with another last digit."""
    return _unlike(_sort_answer(question), "".join(sorted(question, reverse=True)), DIGITS)


def _sort_mistyped(question: str) -> str:
    """Wrong digits in the place of some, which the question alone decides."""
    return mistyped(_sort_answer(question), DIGITS, random.Random(f"mistyped/{question}"))


def _sort_repair(answer: str, rng: random.Random) -> RepairedAnswer:
    return repaired_answer(answer, DIGITS, rng)


def _bracket_question(rng: random.Random, difficulty: int) -> str:
    shortest = 2 + 3 * difficulty
    return "".join(rng.choice(list(CLOSING)) for _ in range(rng.randrange(shortest, shortest + 3)))


def _bracket_answer(question: str) -> str:
    return "".join(CLOSING[bracket] for bracket in reversed(question))


def _bracket_slip(question: str) -> str:
    """The opening brackets backwards, not closed."""
    return question[::-1]


def _call_question(rng: random.Random, difficulty: int) -> str:
    first, second = rng.choice(LETTERS), rng.choice(LETTERS)
    return f"{first}{rng.randrange(10**difficulty):0{difficulty}d}{second}{rng.randrange(10**difficulty):0{difficulty}d}"


def _calls(question: str) -> tuple[str, str, str, str]:
    half = len(question) // 2
    return question[0], question[1:half], question[half], question[half + 1 :]


def _call_answer(question: str) -> str:
    """`k1p2` asks for two calls, in the opposite order and each with the other's argument: `{p(1);k(2)}`."""
    first, first_argument, second, second_argument = _calls(question)
    return f"{{{second}({first_argument});{first}({second_argument})}}"


def _call_slip(question: str) -> str:
    """Each call keeps its own argument; where that is the same (equal arguments), the second one's is another."""
    first, first_argument, second, second_argument = _calls(question)
    return f"{{{second}({_unlike(first_argument, second_argument, DIGITS)});{first}({first_argument})}}"


def _modular_question(rng: random.Random, difficulty: int) -> str:
    """The factor and the modulus come first, so that each digit's product can be known where the digit stands."""
    modulus = rng.choice([5, 7])
    return f"{rng.randrange(2, modulus)}|{modulus}*{_drawn(rng, DIGITS, 2 + 2 * difficulty)}"


def _modular_parts(question: str) -> tuple[list[int], int, int]:
    return [int(digit) for digit in question[4:]], int(question[0]), int(question[2])


def _modular_answer(question: str) -> str:
    digits, factor, modulus = _modular_parts(question)
    return "".join(str(digit * factor % modulus) for digit in digits)


def _modular_slip(question: str) -> str:
    """Added instead of multiplied; where that is the same, with another last digit."""
    digits, factor, modulus = _modular_parts(question)
    return _unlike(_modular_answer(question), "".join(str((digit + factor) % modulus) for digit in digits), DIGITS[:modulus])


def _copy_question(rng: random.Random, difficulty: int) -> str:
    """Different letters, so that each but the first is found by the one before it."""
    size = 4 + 2 * difficulty
    return f"{''.join(rng.sample(LETTERS, size))}+{rng.randrange(1, size)}"


def _copy_answer(question: str) -> str:
    text, offset = question[:-2], int(question[-1])
    return text[offset:] + text[:offset]


def _copy_slip(question: str) -> str:
    """The offset counted from one; the letters are different, so that no two offsets give the same."""
    return _copy_answer(f"{question[:-1]}{int(question[-1]) - 1}")


def _parity_question(rng: random.Random, difficulty: int) -> str:
    return _drawn(rng, DIGITS, 5 + 2 * difficulty)


def _parity_answer(question: str) -> str:
    return "".join(str(sum(int(digit) for digit in question[: end + 1]) % 2) for end in range(len(question)))


def _parity_slip(question: str) -> str:
    """Each digit's own parity; where that is the same (all digits but the last are even), with another last one."""
    return _unlike(_parity_answer(question), "".join(str(int(digit) % 2) for digit in question), "01")


def _base_question(rng: random.Random, difficulty: int) -> str:
    return _drawn(rng, HEXADECIMALS, 3 + difficulty)


def _base_answer(question: str) -> str:
    return "".join(f"{int(digit, 16) // 4}{int(digit, 16) % 4}" for digit in question)


def _base_slip(question: str) -> str:
    """Remainder before quotient; where that is the same (the two are equal in every digit), with another last digit."""
    return _unlike(_base_answer(question), "".join(f"{int(digit, 16) % 4}{int(digit, 16) // 4}" for digit in question), "0123")


def _json_question(rng: random.Random, difficulty: int) -> str:
    """An object without one of its braces, square brackets, quotes or its colon; a comma's place could not be told."""
    text = f'{{"{rng.choice(LETTERS)}":[{",".join(rng.choice(DIGITS) for _ in range(1 + difficulty))}]}}'
    lost = rng.choice([place for place, character in enumerate(text) if character in '{}[]":'])
    return text[:lost] + text[lost + 1 :]


def _json_repaired(question: str, quote: str) -> str:
    key = next(character for character in question if character in LETTERS)
    numbers = [character for character in question if character in DIGITS]
    return f"{{{quote}{key}{quote}:[{','.join(numbers)}]}}"


def _json_answer(question: str) -> str:
    return _json_repaired(question, '"')


def _json_slip(question: str) -> str:
    """As Python prints it, which is no JSON."""
    return _json_repaired(question, "'")


def _calendar_question(rng: random.Random, difficulty: int) -> str:
    return f"{rng.randrange(1, 7)}+{_drawn(rng, WEEKDAYS, 4 + difficulty)}"


def _weekdays_later(question: str, counted_from: int) -> str:
    days = int(question[0]) - counted_from
    return "".join(WEEKDAYS[(WEEKDAYS.index(weekday) + days) % 7] for weekday in question[2:])


def _calendar_answer(question: str) -> str:
    """`3+ts` asks for the days that are three after a Tuesday and after a Saturday."""
    return _weekdays_later(question, counted_from=0)


def _calendar_slip(question: str) -> str:
    """The weekday itself counted as the first day, so that every answer is one day early."""
    return _weekdays_later(question, counted_from=1)


def _run_question(rng: random.Random, difficulty: int) -> str:
    """Different letters, so that a run's length is how often its letter occurs."""
    return "".join(letter * rng.randrange(1, 4) for letter in rng.sample(RUN_LETTERS, 3 + difficulty))


def _run_answer(question: str) -> str:
    return "".join(f"{letter}{question.count(letter)}" for letter in dict.fromkeys(question))


def _run_slip(question: str) -> str:
    """Repeats are counted, without the first."""
    return "".join(f"{letter}{question.count(letter) - 1}" for letter in dict.fromkeys(question))


def _regex_question(rng: random.Random, difficulty: int) -> str:
    """A range of three to six letters, one of those between its ends in the text, so that the slip is wrong."""
    size = rng.randrange(3, 7)
    low = rng.randrange(len(TEXT_LETTERS) - size + 1)
    letters = TEXT_LETTERS[low : low + size]
    text = [rng.choice(TEXT_LETTERS) for _ in range(4 + 2 * difficulty)]
    if not set(text) & set(letters[1:-1]):
        text[rng.randrange(len(text))] = rng.choice(letters[1:-1])
    return f"[{letters[0]}-{letters[-1]}]{''.join(text)}"


def _regex_answer(question: str) -> str:
    low, high = question[1], question[3]
    return "".join("_" if low <= letter <= high else letter for letter in question[5:])


def _regex_slip(question: str) -> str:
    """The hyphen is taken literally: only the two ends match."""
    return "".join("_" if letter in (question[1], question[3]) else letter for letter in question[5:])


def _drawn(rng: random.Random, alphabet: str, length: int) -> str:
    return "".join(rng.choice(alphabet) for _ in range(length))


def _unlike(answer: str, slip: str, alphabet: str) -> str:
    """The slip, with the alphabet's next character at its end where it would be the answer."""
    return slip if slip != answer else slip[:-1] + alphabet[(alphabet.index(slip[-1]) + 1) % len(alphabet)]


SYNTHETIC_DOMAINS = {
    "arithmetic": SyntheticDomain(letter="A", question=_sum_question, answer=_sum_answer, slip=_sum_slip),
    "sorting": SyntheticDomain(letter="S", question=_sort_question, answer=_sort_answer, slip=_sort_slip),
    "brackets": SyntheticDomain(letter="B", question=_bracket_question, answer=_bracket_answer, slip=_bracket_slip),
    "tools": SyntheticDomain(letter="T", question=_call_question, answer=_call_answer, slip=_call_slip),
    "modular": SyntheticDomain(letter="M", question=_modular_question, answer=_modular_answer, slip=_modular_slip),
    "copying": SyntheticDomain(letter="C", question=_copy_question, answer=_copy_answer, slip=_copy_slip),
    "parity": SyntheticDomain(letter="P", question=_parity_question, answer=_parity_answer, slip=_parity_slip),
    "bases": SyntheticDomain(letter="N", question=_base_question, answer=_base_answer, slip=_base_slip),
    "json_repair": SyntheticDomain(letter="J", question=_json_question, answer=_json_answer, slip=_json_slip),
    "calendar": SyntheticDomain(letter="D", question=_calendar_question, answer=_calendar_answer, slip=_calendar_slip),
    "run_length": SyntheticDomain(letter="R", question=_run_question, answer=_run_answer, slip=_run_slip),
    "regex": SyntheticDomain(letter="X", question=_regex_question, answer=_regex_answer, slip=_regex_slip),
    "backspace": SyntheticDomain(letter="E", question=_sort_question, answer=_sort_answer, slip=_sort_mistyped, repair=_sort_repair),
}
