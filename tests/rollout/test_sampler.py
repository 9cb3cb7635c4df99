"""LocalSampler: what a prompt is answered does not depend on its cohort, and what is recorded is what the model says.

Most tests run on both families. On DeepSeek-V4 the sequences are long enough that the indexer has to choose among the compressed entries.
"""

import copy
from dataclasses import replace

import pytest
import torch

from rollout.config import SamplingConfig
from rollout.sampler import LocalSampler, StepLog
from rollout.types import Prompt
from rollout.wal import RolloutLog, SegmentWriter

FAMILIES = ("session_v4_model", "session_qwen3_moe_model")
GREEDY = SamplingConfig(temperature=0.0, max_new_tokens=16, decode_width=4)
SAMPLED = SamplingConfig(temperature=1.0, max_new_tokens=16, decode_width=4)


@pytest.fixture(params=FAMILIES, scope="module")
def model(request):
    return request.getfixturevalue(request.param)


@pytest.fixture(scope="module")
def prompts(make_prompt, tokenizer) -> list[Prompt]:
    """Six prompts of mixed lengths, not in the order of their lengths: two cohorts of four rows, two of them dummies."""
    generator = torch.Generator().manual_seed(0)
    lengths = (14, 9, 21, 9, 30, 17)
    return [make_prompt("law", torch.randint(3, len(tokenizer), (n,), generator=generator).tolist(), request=i) for i, n in enumerate(lengths)]


@pytest.fixture(scope="module")
def sampled(model, prompts):
    return LocalSampler(model, [2], seed=0).sample(prompts, SAMPLED, completions_per_prompt=2)


@torch.no_grad()
def decode_naively(model, prompt: list[int], max_new_tokens: int, eos: int) -> list[int]:
    """The most likely token of a forward over everything so far, without a cache, one after the other."""
    tokens = list(prompt)
    while len(tokens) < len(prompt) + max_new_tokens and (len(tokens) == len(prompt) or tokens[-1] != eos):
        tokens.append(model(torch.tensor([tokens])).logits[0, -1].argmax().item())
    return tokens[len(prompt) :]


class Weights:
    """The weights of another model, as an engine gives them."""

    def __init__(self, model, policy_step: int):
        self.model, self.policy_step = model, policy_step

    def weights(self):
        return self.model.state_dict().items()


def completions(rollouts) -> list[list[int]]:
    return [rollout.completion_T.tolist() for rollout in rollouts]


def test_the_sequences_of_these_tests_have_more_compressed_entries_than_the_indexer_keeps(v4_model, prompts):
    tokens = torch.tensor([prompts[1].tokens + prompts[2].tokens])  # as long as the longest here are with their completions
    before = v4_model(tokens).logits
    for module in v4_model.modules():
        if type(module).__name__.endswith("Indexer"):
            module.index_topk = 1000
    position = SAMPLED.max_new_tokens + 9 - 1  # the end of the shortest prompt's completion
    assert not torch.allclose(before[0, position], v4_model(tokens).logits[0, position], atol=1e-4)


def test_a_mixed_batch_decodes_greedily_what_each_prompt_gives_alone_without_a_cache(model, prompts):
    together = completions(LocalSampler(model, [2], seed=0).sample(prompts, GREEDY))
    assert together == [decode_naively(model, prompt.tokens, GREEDY.max_new_tokens, eos=2) for prompt in prompts]


def test_keyed_completions_do_not_depend_on_the_other_prompts(model, prompts):
    sampler = LocalSampler(model, [2], seed=0)
    together = completions(sampler.sample(prompts, SAMPLED))
    assert [together[i] for i in (2, 4, 5)] == [completions(sampler.sample([prompts[i]], SAMPLED))[0] for i in (2, 4, 5)]
    assert together[::-1] == completions(sampler.sample(prompts[::-1], SAMPLED))


def test_sampling_the_same_prompts_again_is_bit_identical(model, prompts, sampled):
    for first, again in zip(sampled, LocalSampler(model, [2], seed=0).sample(prompts, SAMPLED, completions_per_prompt=2), strict=True):
        assert torch.equal(first.completion_T, again.completion_T)
        assert torch.equal(first.logprob_T, again.logprob_T)


def test_the_rest_of_a_cohort_changes_recorded_log_probabilities_by_rounding_alone(model, prompts, sampled):
    """Not bit for bit: routed experts multiply the rows that meet at them together."""
    sampler = LocalSampler(model, [2], seed=0)
    for prompt, accompanied in zip(prompts[1:3], sampled[2:6:2], strict=True):
        assert torch.allclose(sampler.sample([prompt], SAMPLED)[0].logprob_T, accompanied.logprob_T, atol=1e-5, rtol=0)


def test_recorded_log_probabilities_are_those_of_a_full_forward(model, sampled):
    for rollout in sampled:
        tokens = torch.tensor([[*rollout.prompt.tokens, *rollout.completion_T.tolist()]])
        with torch.no_grad():
            logprobs = model(tokens).logits[0].double().log_softmax(-1)
        start = len(rollout.prompt.tokens)
        expected = [logprobs[position - 1, tokens[0, position]].item() for position in range(start, tokens.shape[1])]
        assert rollout.logprob_T.tolist() == pytest.approx(expected, abs=1e-5)


def test_recorded_log_probabilities_are_at_the_sampling_temperature(model, prompts):
    rollout = LocalSampler(model, [2], seed=0).sample(prompts[:1], SamplingConfig(temperature=0.5, max_new_tokens=4, decode_width=4))[0]
    tokens = torch.tensor([[*rollout.prompt.tokens, *rollout.completion_T.tolist()]])
    with torch.no_grad():
        logprobs = (model(tokens).logits[0] / 0.5).log_softmax(-1)
    start = len(rollout.prompt.tokens) - 1
    expected = logprobs[start:-1].gather(1, rollout.completion_T[:, None])[:, 0]
    assert torch.allclose(rollout.logprob_T, expected, atol=1e-5)


def test_rollouts_keep_the_order_of_prompts_and_samples(sampled, prompts):
    assert [(rollout.prompt, rollout.sample) for rollout in sampled] == [(prompt, sample) for prompt in prompts for sample in range(2)]


def test_completions_of_one_prompt_differ(sampled):
    for first, second in zip(sampled[::2], sampled[1::2], strict=True):
        assert first.completion_T.tolist() != second.completion_T.tolist()


def test_another_seed_gives_other_completions(model, prompts, sampled):
    others = LocalSampler(model, [2], seed=1).sample(prompts, SAMPLED)
    assert all(a != b for a, b in zip(completions(sampled[::2]), completions(others), strict=True))


def test_two_requests_with_the_same_prompt_get_different_completions(model, prompts, make_prompt):
    twins = [make_prompt("law", prompts[0].tokens, request=request) for request in (5, 6)]
    first, second = completions(LocalSampler(model, [], seed=0).sample(twins, SAMPLED))
    assert first != second


def test_a_completion_ends_where_it_is_said_to_be_done_and_the_others_go_on(model, prompts):
    sampler = LocalSampler(model, [2], seed=0)
    whole = completions(sampler.sample(prompts, GREEDY))
    found = sampler.sample(prompts, GREEDY, is_done=lambda tokens: sum(tokens) % 3 == 0)
    ends = [next((n for n in range(1, len(tokens)) if sum(tokens[:n]) % 3 == 0), len(tokens)) for tokens in whole]
    assert completions(found) == [tokens[:end] for tokens, end in zip(whole, ends, strict=True)]
    assert len(set(ends)) > 1


def test_a_completion_ends_at_its_first_end_token_or_at_the_limit(model, prompts):
    ends = set(range(3, 20))
    rollouts = LocalSampler(model, ends, seed=0).sample(prompts, SAMPLED, completions_per_prompt=2)
    assert {rollout.finished for rollout in rollouts} == {True, False}
    for rollout in rollouts:
        *body, last = rollout.completion_T.tolist()
        assert not ends & set(body)
        assert rollout.finished == (last in ends)
        assert rollout.finished or len(rollout.completion_T) == SAMPLED.max_new_tokens


def test_end_tokens_only_shorten_a_completion(model, prompts):
    """Up to the end, a completion is what it is without end tokens: rows that go on after others have ended are not disturbed."""
    unbounded = completions(LocalSampler(model, [], seed=0).sample(prompts, SAMPLED))
    ended = completions(LocalSampler(model, range(3, 20), seed=0).sample(prompts, SAMPLED))
    assert all(longer[: len(shorter)] == shorter for longer, shorter in zip(unbounded, ended, strict=True))


def test_rollouts_have_the_documented_types_and_shapes(sampled):
    for rollout in sampled:
        length = len(rollout.completion_T)
        assert 1 <= length <= SAMPLED.max_new_tokens
        assert (rollout.completion_T.dtype, rollout.completion_mask_T.dtype, rollout.logprob_T.dtype) == (torch.int64, torch.bool, torch.float32)
        assert rollout.completion_mask_T.tolist() == [True] * length
        assert rollout.logprob_T.shape == (length,)


def test_no_prompts_give_no_rollouts(model):
    assert LocalSampler(model, [2], seed=0).sample([], SAMPLED) == []


def test_a_refreshed_sampler_is_bit_equal_to_the_source(new_student, prompts):
    trained = new_student("deepseek_v4_tiny", seed=1)
    sampler = LocalSampler(new_student("deepseek_v4_tiny", seed=0), [2], seed=0)
    sampler.refresh(Weights(trained, policy_step=17))
    for ours, theirs in zip(sampler.sample(prompts, SAMPLED), LocalSampler(trained, [2], seed=0).sample(prompts, SAMPLED), strict=True):
        assert torch.equal(ours.completion_T, theirs.completion_T)
        assert torch.equal(ours.logprob_T, theirs.logprob_T)
        assert ours.policy_step == 17


def test_a_refresh_copies_so_that_later_training_does_not_reach_the_sampler(v4_model, prompts):
    sampler = LocalSampler(copy.deepcopy(v4_model), [2], seed=0)
    sampler.refresh(Weights(v4_model, policy_step=0))
    before = completions(sampler.sample(prompts[:2], GREEDY))
    with torch.no_grad():
        for parameter in v4_model.parameters():
            parameter.mul_(1.5)
    assert completions(sampler.sample(prompts[:2], GREEDY)) == before


def test_a_refresh_that_lacks_weights_is_refused(qwen3_moe_model):
    class Partial(Weights):
        def weights(self):
            return [(name, tensor) for name, tensor in super().weights() if name != "model.norm.weight"]

    with pytest.raises(AssertionError, match=r"model\.norm\.weight"):
        LocalSampler(copy.deepcopy(qwen3_moe_model), [2], seed=0).refresh(Partial(qwen3_moe_model, policy_step=0))


def test_a_tied_head_needs_no_weights_of_its_own(new_student, prompts):
    trained, own = (new_student("qwen3_moe_tiny", seed=seed, tie_word_embeddings=True) for seed in (1, 0))

    class Untied(Weights):
        def weights(self):
            return self.model.named_parameters()  # each shared parameter once

    sampler = LocalSampler(own, [2], seed=0)
    sampler.refresh(Untied(trained, policy_step=1))
    assert completions(sampler.sample(prompts[:2], GREEDY)) == completions(LocalSampler(trained, [2], seed=0).sample(prompts[:2], GREEDY))


def test_a_student_that_gives_nan_is_refused(qwen3_moe_model, prompts):
    with torch.no_grad():
        qwen3_moe_model.lm_head.weight[5] = torch.nan
    with pytest.raises(ValueError, match="NaN or infinity on request 1 of domain law"):
        LocalSampler(qwen3_moe_model, [2], seed=0).sample(prompts, SAMPLED)


def test_padded_rows_of_the_vocabulary_are_never_drawn(new_student, make_prompt):
    """A head with more rows than the tokenizer: the rows beyond it get no training, and a sampled one would mean nothing."""
    model = new_student("qwen3_moe_tiny")
    with torch.no_grad():
        model.lm_head.weight[40:] *= 0.0
        model.lm_head.weight[:40] *= 0.01
    requests = [make_prompt("law", [1, 5, 6], request) for request in range(16)]
    cfg = SamplingConfig(max_new_tokens=8, decode_width=16)
    free = LocalSampler(model, [2], seed=0).sample(requests, cfg)
    held = LocalSampler(model, [2], seed=0, vocab_size=40).sample(requests, cfg)
    assert max(int(rollout.completion_T.max()) for rollout in free) >= 40
    assert max(int(rollout.completion_T.max()) for rollout in held) < 40


def test_a_family_that_cannot_continue_from_a_cache_is_refused():
    from transformers import AutoConfig, AutoModelForCausalLM

    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("rwkv", vocab_size=32, hidden_size=16, attention_hidden_size=16, num_hidden_layers=2))
    with pytest.raises(ValueError, match="past_key_values"):
        LocalSampler(model, [2], seed=0)


@pytest.mark.parametrize("num_companions", [0, 6, 63])
def test_a_completion_is_the_same_alone_and_among_seven_and_among_sixty_four(model, make_prompt, tokenizer, sampled_alone, num_companions):
    prompt, expected = sampled_alone
    generator = torch.Generator().manual_seed(num_companions)
    lengths = torch.randint(4, 25, (num_companions,), generator=generator).tolist()
    companions = [make_prompt("law", torch.randint(3, len(tokenizer), (n,), generator=generator).tolist(), request=100 + i) for i, n in enumerate(lengths)]
    rollouts = LocalSampler(model, [2], seed=0).sample([*companions[: num_companions // 2], prompt, *companions[num_companions // 2 :]], WIDE)
    found = next(rollout for rollout in rollouts if rollout.prompt == prompt)
    assert found.completion_T.tolist() == expected.completion_T.tolist()
    assert torch.allclose(found.logprob_T, expected.logprob_T, atol=1e-5, rtol=0)


WIDE = SamplingConfig(max_new_tokens=16, decode_width=64)


@pytest.fixture(scope="module")
def sampled_alone(model, prompts):
    return prompts[2], LocalSampler(model, [2], seed=0).sample([prompts[2]], WIDE)[0]


@pytest.mark.parametrize("fixed_width", [True, False])
def test_rows_that_have_ended_leave_unless_they_are_to_stay(model, prompts, tokenizer, fixed_width):
    """The widths of the forwards, read off the model's input; completions are the same."""
    ends = list(range(3, 3 + len(tokenizer) // 4))
    cfg = SamplingConfig(max_new_tokens=16, decode_width=32, stop_tokens=ends, fixed_width=fixed_width)
    requests = [replace(prompts[0], request=number) for number in range(32)]
    widths = []
    hook = model.register_forward_pre_hook(lambda module, inputs, named: widths.append(len(named["input_ids"])), with_kwargs=True)
    rollouts = LocalSampler(model, [2], seed=0).sample(requests, cfg)
    hook.remove()
    live = [sum(len(rollout.completion_T) > step for rollout in rollouts) for step in range(1, len(widths))]
    assert widths[1:] == [32 if fixed_width else max(8, 1 << (count - 1).bit_length()) for count in live]
    assert min(live) < 8 < max(live)
    assert completions(rollouts) == completions(LocalSampler(model, [2], seed=0).sample(requests, replace(cfg, fixed_width=not fixed_width)))


def test_decoding_ends_with_the_longest_completion(model, prompts):
    sampler = LocalSampler(model, [2], seed=0)
    cfg = SamplingConfig(max_new_tokens=16, decode_width=8, stop_tokens=list(range(3, 30)))
    rollouts = sampler.sample(prompts, cfg)
    ends = [len(rollout.prompt.tokens) + len(rollout.completion_T) for rollout in rollouts]
    assert sampler.figures.steps == max(ends) - min(len(prompt.tokens) for prompt in prompts)
    assert max(ends) < max(len(prompt.tokens) for prompt in prompts) + cfg.max_new_tokens, "or it would end at the limit anyway"


def test_figures_count_every_slot_once(model, prompts):
    sampler = LocalSampler(model, [2], seed=0)
    cfg = SamplingConfig(max_new_tokens=16, decode_width=8, fixed_width=True)
    rollouts = sampler.sample(prompts, cfg)
    shortest = min(len(prompt.tokens) for prompt in prompts)
    figures = sampler.figures
    assert figures.sampled == sum(len(rollout.completion_T) for rollout in rollouts)
    assert figures.fed == sum(len(prompt.tokens) - shortest for prompt in prompts)
    assert figures.slots == 8 * figures.steps
    assert (figures.prefilled, figures.prefill_slots) == (len(prompts) * shortest, 8 * shortest)


def test_completions_of_one_prompt_share_its_reading(model, prompts):
    sampler = LocalSampler(model, [2], seed=0)
    rollouts = sampler.sample(prompts[:2], replace(SAMPLED, decode_width=8), completions_per_prompt=4)
    assert sampler.figures.prefilled == 2 * len(prompts[1].tokens)
    alone = [LocalSampler(model, [2], seed=0).sample([prompt], replace(SAMPLED, decode_width=8), completions_per_prompt=4) for prompt in prompts[:2]]
    assert completions(rollouts) == completions(alone[0] + alone[1])


def test_a_stop_token_ends_a_completion_and_stays_in_it(model, prompts):
    stops = list(range(3, 40))
    for rollout in LocalSampler(model, [2], seed=0).sample(prompts, replace(SAMPLED, stop_tokens=stops)):
        tokens = rollout.completion_T.tolist()
        assert not any(token in stops for token in tokens[:-1])
        assert rollout.finished == (tokens[-1] in [2, *stops])


def test_a_token_that_could_not_be_logged_is_not_used(model, prompts, tmp_path, monkeypatch):
    """The third frame is refused: what was logged is what the next run takes up, and it ends with the same completions."""
    expected = completions(LocalSampler(model, [2], seed=0).sample(prompts, SAMPLED))
    log, append, frames = StepLog(RolloutLog(tmp_path), 0, "rank-000"), SegmentWriter.append, []

    def refuse_the_third(self, key, policy_step, records):
        frames.append(records)
        if len(frames) == 3:
            raise ValueError("no room")
        append(self, key, policy_step, records)

    with monkeypatch.context() as patched:
        patched.setattr(SegmentWriter, "append", refuse_the_third)
        with pytest.raises(ValueError, match="no room"):
            LocalSampler(model, [2], seed=0).sample(prompts, SAMPLED, log=log)
    sampler = LocalSampler(model, [2], seed=0)
    assert completions(sampler.sample(prompts, SAMPLED, log=log)) == expected
    assert sampler.figures.sampled == sum(map(len, expected)) - len(frames[0]) - len(frames[1])
