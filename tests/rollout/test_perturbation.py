"""The environment that replaces sampled tokens: against a loop without cache or batch, its numbers, and what it refuses to be given."""

import collections
import hashlib

import numpy as np
import pytest
import torch

from rollout.config import PerturbationConfig, SamplingConfig
from rollout.perturbation import Perturbation, build_perturbation
from rollout.sampler import LocalSampler
from rollout.sampling import draw, uniform

EOS = 2
DIGITS = list("0123456789")
SAMPLED = SamplingConfig(temperature=1.0, max_new_tokens=12, decode_width=4)


def perturbation(tokenizer, rate: float, alphabet: list[str] = DIGITS, seed: int = 0) -> Perturbation:
    return build_perturbation(PerturbationConfig(rate=rate, alphabet=alphabet), tokenizer, [EOS], seed, "domains.law.perturbation")


@pytest.fixture(scope="module")
def prompts(make_prompt, tokenizer):
    """Six prompts of mixed lengths: two cohorts of four rows, two of them dummies."""
    generator = torch.Generator().manual_seed(0)
    lengths = (14, 9, 21, 9, 30, 17)
    return [make_prompt("law", torch.randint(3, len(tokenizer), (n,), generator=generator).tolist(), request=7 + i) for i, n in enumerate(lengths)]


@torch.no_grad()
def decode_naively(model, prompt, rate: float, alphabet: list[int]) -> tuple[list[int], list[float | None]]:
    """(tokens, log-probabilities, None where the environment wrote): one forward over everything for each token."""
    seed = int.from_bytes(hashlib.sha256(b"0/perturbation").digest()[:8], "little")
    tokens, logprobs = list(prompt.tokens), []
    while len(logprobs) < SAMPLED.max_new_tokens and (not logprobs or tokens[-1] != EOS):
        key, position = torch.tensor([prompt.request << 16]), len(tokens)
        token, logprob = draw(model(torch.tensor([tokens])).logits[0, -1:], uniform(0, key, position), SAMPLED)
        token, logprob, chance = int(token), float(logprob), float(uniform(seed, key, position))
        if token in alphabet and chance < rate:
            others = alphabet[alphabet.index(token) + 1 :] + alphabet[: alphabet.index(token)]
            token, logprob = others[int(chance / rate * len(others))], None
        tokens.append(token)
        logprobs.append(logprob)
    return tokens[len(prompt.tokens) :], logprobs


@pytest.mark.parametrize("family", ["session_v4_model", "session_qwen3_moe_model"])
def test_completions_are_those_of_a_loop_that_replaces_each_token_before_the_next_is_drawn(family, prompts, tokenizer, request):
    """An alphabet of all letters, so that random weights write it often."""
    model, letters = request.getfixturevalue(family), list("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ")
    found = LocalSampler(model, [EOS], seed=0, vocab_size=len(tokenizer)).sample_perturbed(prompts, SAMPLED, perturbation(tokenizer, 0.4, letters))
    replaced = 0
    for prompt, rollout in zip(prompts, found, strict=True):
        tokens, logprobs = decode_naively(model, prompt, 0.4, tokenizer.convert_tokens_to_ids(letters))
        assert rollout.completion_T.tolist() == tokens
        assert rollout.completion_mask_T.tolist() == [logprob is not None for logprob in logprobs]
        for one, other in zip(rollout.logprob_T.tolist(), logprobs, strict=True):
            assert np.isnan(one) if other is None else one == pytest.approx(other, abs=1e-4)
        replaced += logprobs.count(None)
    assert 5 < replaced < 60


def test_completions_begin_as_they_do_without_it_until_the_first_replacement(session_v4_model, prompts, tokenizer):
    sampler = LocalSampler(session_v4_model, [EOS], seed=0, vocab_size=len(tokenizer))
    pairs = zip(sampler.sample(prompts, SAMPLED), sampler.sample_perturbed(prompts, SAMPLED, perturbation(tokenizer, 1.0)), strict=True)
    lengths = []
    for clean, spoilt in pairs:
        lengths.append((spoilt.completion_mask_T.long().cumprod(0)).sum().item())
        assert clean.completion_T.tolist()[: lengths[-1]] == spoilt.completion_T.tolist()[: lengths[-1]]
    assert min(lengths) < SAMPLED.max_new_tokens


def applied(spoiling: Perturbation, tokens: list[int], first_request: int = 0, position: int = 5) -> np.ndarray:
    """What becomes of tokens of so many requests at one position."""
    keys = np.arange(first_request, first_request + len(tokens)) << 16
    return spoiling.apply(keys, position, np.array(tokens), np.zeros(len(tokens), dtype=np.float32))[0]


def test_tokens_of_the_alphabet_are_replaced_at_the_rate_by_any_other_as_often(tokenizer):
    """20000 draws: the rate within five standard errors, each of nine substitutes too."""
    spoiling, five = perturbation(tokenizer, 0.1), tokenizer.convert_tokens_to_ids("5")
    counts = collections.Counter(applied(spoiling, [five] * 20000).tolist())
    assert 20000 - counts.pop(five) == pytest.approx(2000, abs=5 * 43)
    assert set(counts) == {tokenizer.convert_tokens_to_ids(digit) for digit in DIGITS if digit != "5"}
    assert all(count == pytest.approx(2000 / 9, abs=5 * 15) for count in counts.values())


def test_at_rate_1_every_token_of_the_alphabet_becomes_another_and_no_other_token_changes(tokenizer):
    digits, others = tokenizer.convert_tokens_to_ids(DIGITS), tokenizer.convert_tokens_to_ids(["a", "<", "+", "<eos>"])
    spoilt = applied(perturbation(tokenizer, 1.0), digits * 50)
    assert all(one != other and one in digits for one, other in zip(spoilt.tolist(), digits * 50, strict=True))
    assert applied(perturbation(tokenizer, 1.0), others * 50).tolist() == others * 50


def test_what_is_replaced_depends_on_the_request_and_the_place_and_not_on_the_token(tokenizer):
    spoiling = perturbation(tokenizer, 0.5)
    fives, sevens = (applied(spoiling, [token] * 400) != token for token in tokenizer.convert_tokens_to_ids(["5", "7"]))
    assert (fives == sevens).all()
    assert 120 < (fives != (applied(spoiling, [tokenizer.convert_tokens_to_ids("5")] * 400, position=6) != tokenizer.convert_tokens_to_ids("5"))).sum() < 280
    assert 120 < (fives != (applied(perturbation(tokenizer, 0.5, seed=1), [tokenizer.convert_tokens_to_ids("5")] * 400)
                            != tokenizer.convert_tokens_to_ids("5"))).sum() < 280  # fmt: skip


def test_a_seed_of_the_run_gives_numbers_that_do_not_go_with_those_of_sampling(tokenizer):
    keys = torch.arange(4000) << 16
    ours, sampling = uniform(perturbation(tokenizer, 0.1).seed, keys, 5), uniform(0, keys, 5)
    assert abs(float(torch.corrcoef(torch.stack([ours, sampling]))[0, 1])) < 5 / 4000**0.5


@pytest.mark.parametrize(
    ("alphabet", "message"),
    [
        (["1", "23"], r"domains\.law\.perturbation\.alphabet has '23', which is 2 tokens in the student's tokenizer"),
        (["1", "é"], r"has 'é', which is unknown to it in the student's tokenizer"),
        (["1", "<eos>"], r"has '<eos>', which ends a completion"),
        (["1", "1"], r"has '1' and '1', which are the same token"),
        (["", "1"], r"has '', which is 0 tokens"),
    ],
)
def test_texts_that_are_no_token_of_their_own_are_refused(alphabet, message, tokenizer):
    with pytest.raises(ValueError, match=message):
        perturbation(tokenizer, 0.1, alphabet)
