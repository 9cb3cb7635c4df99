"""Loops: found where a definition spelt out token by token finds them, not in sound short answers, and out of the loss only from there on."""

import random

import pytest
import torch

from rollout.repetition import COPIES, LONGEST_PERIOD, SHORTEST, WINDOW, loop_end, mask_loops
from rollout.synthetic import SYNTHETIC_DOMAINS, synthetic_rows


def naive_loop_end(tokens: list[int]) -> int | None:
    """The smallest number of first tokens whose last ones are three copies of something within a window of 64, 16 tokens at least."""
    for end in range(1, len(tokens) + 1):
        for period in range(1, 64 // 3 + 1):
            length = max(3 * period, 16)
            stretch = tokens[end - length : end]
            if end >= length and all(stretch[index] == stretch[index % period] for index in range(length)):
                return end
    return None


def planted(rng: random.Random, period: int, length: int) -> list[int]:
    """Tokens before, `length` tokens of a period, tokens after."""
    block = [rng.randrange(50) for _ in range(period)]
    before, after = ([rng.randrange(50) for _ in range(rng.randrange(30))] for _ in range(2))
    return before + [block[index % period] for index in range(length)] + after


@pytest.mark.parametrize("seed", range(4))
def test_loops_are_those_of_the_definition(seed):
    rng = random.Random(seed)
    cases = [[rng.randrange(alphabet) for _ in range(rng.randrange(90))] for alphabet in (1, 2, 2, 3, 4) for _ in range(10)]
    cases += [planted(rng, rng.randrange(1, 25), rng.randrange(10, 80)) for _ in range(50)]
    found = [loop_end(torch.tensor(tokens, dtype=torch.int64)) for tokens in cases]
    assert found == [naive_loop_end(tokens) for tokens in cases]
    assert None in found
    assert len(set(found)) > 10


@pytest.mark.parametrize("period", range(1, LONGEST_PERIOD + 1))
def test_a_loop_is_recognised_at_its_third_copy_unless_copies_are_short(period):
    length = max(COPIES * period, SHORTEST)
    tokens = [100, 101, *(index % period for index in range(length))]
    assert loop_end(torch.tensor(tokens)) == 2 + length
    assert loop_end(torch.tensor(tokens[:-1])) is None
    assert length <= WINDOW


def test_a_period_that_does_not_fit_three_times_into_the_window_is_none():
    assert loop_end(torch.tensor(list(range(LONGEST_PERIOD + 1)) * 6)) is None


def test_the_first_loop_counts():
    assert loop_end(torch.tensor([*range(5), *[7] * 20, *range(5), *[8] * 40])) == 5 + SHORTEST


@pytest.mark.parametrize("name", list(SYNTHETIC_DOMAINS))
def test_right_answers_of_the_embedded_domains_have_none(name, tokenizer):
    answers = tokenizer([row["answer"] for row in synthetic_rows(name, "train", 300)], add_special_tokens=False)["input_ids"]
    assert not [answer for answer in answers if loop_end(torch.tensor(answer)) is not None]


@pytest.mark.parametrize("text", ["1000000000", "((((((((", "ha ha ha ha", "|---|---|---|", "1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12"])
def test_sound_short_repetitions_are_none(text, tokenizer):
    assert loop_end(torch.tensor(tokenizer(text, add_special_tokens=False)["input_ids"])) is None


def test_an_empty_completion_has_none():
    assert loop_end(torch.tensor([], dtype=torch.int64)) is None


def test_tokens_after_the_recognition_leave_the_loss_and_those_before_stay(make_rollout):
    looped = make_rollout("law", [5], [1, 2, 3] + [4] * 30, mask=[False] + [True] * 32)
    [masked] = mask_loops([looped])
    assert masked.completion_mask_T.tolist() == [False] + [True] * (2 + SHORTEST) + [False] * (30 - SHORTEST)
    assert torch.equal(masked.completion_T, looped.completion_T)
    assert looped.num_loss_tokens == 32, "the sampled rollout stays as it was"


def test_a_rollout_without_a_loop_stays_as_it_is(make_rollout):
    sound = make_rollout("law", [5], list(range(40)))
    assert mask_loops([sound])[0] is sound


def test_masking_twice_is_masking_once(make_rollout):
    once = mask_loops([make_rollout("law", [5], [1, 2] * 20)])
    twice = mask_loops(once)
    assert torch.equal(twice[0].completion_mask_T, once[0].completion_mask_T)
