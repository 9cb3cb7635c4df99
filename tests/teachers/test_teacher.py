"""One teacher: its hidden states are those of each rollout alone, row t predicts completion token t, and grouping changes nothing."""

import copy
import functools
import itertools

import pytest
import torch

from rollout.config import ModelConfig
from rollout.model import backbone_of, build_model, head_of
from rollout.padding import FORWARD_COST, completion_span, group_by_length, pad_right, sequence_length
from teachers.config import SignalKind
from teachers.teacher import Teacher

SHAPES = [("law", 9, 20), ("law", 3, 1), ("law", 1, 7), ("law", 20, 12), ("law", 14, 25), ("law", 9, 20)]


@pytest.fixture(params=["session_v4_model", "session_qwen3_moe_model"], scope="module")
def model(request):
    """A copy, since a Teacher freezes its model."""
    return copy.deepcopy(request.getfixturevalue(request.param))


@pytest.fixture(scope="module")
def rollouts(random_rollouts):
    """Rollouts of mixed lengths; the longest have nine compressed entries, of which DeepSeek-V4's indexer keeps two."""
    return random_rollouts(SHAPES)


def all_tokens(rollout) -> list[int]:
    return [*rollout.prompt.tokens, *rollout.completion_T.tolist()]


@torch.no_grad()
def hidden_alone(model, rollout) -> torch.Tensor:
    """The hidden states of a forward over this rollout's tokens and nothing else, at the positions before each completion token."""
    hidden = backbone_of(model)(torch.tensor([all_tokens(rollout)]))[0][0]
    return torch.stack([hidden[position - 1] for position in range(len(rollout.prompt.tokens), hidden.shape[0])])


@pytest.mark.parametrize("max_tokens", [1, 40, 60, 100, 10000])
def test_hidden_states_are_those_of_each_rollout_alone_in_any_grouping(model, rollouts, max_tokens):
    for rollout, hidden in zip(rollouts, Teacher("law", model).hidden(rollouts, max_tokens), strict=True):
        assert hidden.shape == (len(rollout.completion_T), 64)
        alone = hidden_alone(model, rollout)
        assert (hidden - alone).norm() < 1e-6 * alone.norm()
        assert torch.allclose(hidden, alone, atol=1e-5)


def test_hidden_states_come_in_the_order_of_the_rollouts(model, rollouts):
    forwards, backwards = (Teacher("law", model).hidden(order, 60) for order in (rollouts, rollouts[::-1]))
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(forwards, backwards[::-1], strict=True))


def test_the_head_on_row_t_gives_the_distribution_of_completion_token_t(model, rollouts):
    teacher = Teacher("law", model)
    for rollout, hidden in zip(rollouts, teacher.hidden(rollouts, 10000), strict=True):
        with torch.no_grad():
            logprobs = model(torch.tensor([all_tokens(rollout)])).logits[0].log_softmax(-1)
        start = len(rollout.prompt.tokens)
        expected = [logprobs[start + t - 1, token].item() for t, token in enumerate(rollout.completion_T.tolist())]
        ours = (hidden @ teacher.head.weight_VD.T).log_softmax(-1)
        assert ours.gather(1, rollout.completion_T[:, None])[:, 0].tolist() == pytest.approx(expected, abs=1e-5)


def test_a_row_sees_the_tokens_before_its_own_and_no_others(model, make_rollout):
    tokens = list(range(10, 30))
    for changed in (0, 7, 19):
        other = [*tokens[:changed], 90, *tokens[changed + 1 :]]
        before, after = (Teacher("law", model).hidden([make_rollout("law", [1, 5, 40, 6], completion)], 100)[0] for completion in (tokens, other))
        differs = ((before - after).abs().max(dim=1).values > 1e-5).tolist()
        assert not any(differs[: changed + 1])
        assert changed + 1 == len(tokens) or differs[changed + 1]


def test_a_teacher_is_frozen_and_scores_without_gradient(qwen3_moe_model, rollouts):
    qwen3_moe_model.train()
    teacher = Teacher("law", qwen3_moe_model)
    assert not any(parameter.requires_grad for parameter in teacher.model.parameters())
    assert not any(module.training for module in teacher.model.modules())
    assert not any(hidden.requires_grad for hidden in teacher.hidden(rollouts, 1000))


def test_a_signal_does_not_keep_the_padded_forward_in_memory(model, rollouts):
    for hidden in Teacher("law", model).hidden(rollouts, 10000):
        assert hidden.untyped_storage().nbytes() == hidden.numel() * 4


def test_the_head_is_the_output_matrix(model):
    assert Teacher("law", model).head.weight_VD is head_of(model).weight


def test_the_completion_span_begins_at_the_prompts_last_token_and_has_a_position_per_completion_token(make_rollout):
    assert completion_span(make_rollout("law", [1, 5, 6], [7, 8])) == (2, 4)
    assert completion_span(make_rollout("law", [1], [7])) == (0, 1)


def test_padding_stands_on_the_right(make_rollout):
    padded = pad_right([make_rollout("law", [1, 5], [7]), make_rollout("law", [1], [8, 9, 10, 2])])
    assert padded.tolist() == [[1, 5, 7, 0, 0], [1, 8, 9, 10, 2]]


def test_a_sequence_is_prompt_and_completion(make_rollout):
    assert sequence_length(make_rollout("law", [1, 5], [7, 8, 9])) == 5


LENGTHS = [5, 90, 7, 30, 30, 31, 1, 64, 5]


@pytest.mark.parametrize("max_tokens", [1, 30, 64, 90, 200, 10000])
def test_groups_hold_every_index_once_and_at_most_max_tokens_or_one_row(max_tokens):
    groups = group_by_length(LENGTHS, max_tokens)
    assert sorted(itertools.chain(*groups)) == list(range(len(LENGTHS)))
    assert all(len(group) == 1 or len(group) * max(LENGTHS[i] for i in group) <= max_tokens for group in groups)


def test_groups_are_in_order_of_length():
    groups = group_by_length(LENGTHS, 64)
    assert [LENGTHS[i] for i in itertools.chain(*groups)] == sorted(LENGTHS)


CASES = [(LENGTHS, 10000), (LENGTHS, 200), ([20] * 6 + [300] * 5, 10000), ([20] * 60 + [300] * 5, 10000), ([1000] * 9, 4000)]


@pytest.mark.parametrize(("lengths", "max_tokens"), CASES)
def test_groups_cost_least(lengths, max_tokens):
    """Of all ways to cut the sorted rows."""

    def cost_of(groups: list[list[int]]) -> int:
        return sum(len(group) * max(group) + FORWARD_COST for group in groups)

    @functools.cache
    def least(begin: int) -> float:
        rest = [ordered[begin:end] for end in range(begin + 1, len(ordered) + 1)]
        return min((cost_of([group]) + least(begin + len(group)) for group in rest if len(group) == 1 or len(group) * group[-1] <= max_tokens), default=0)

    ordered = sorted(lengths)
    assert cost_of([[lengths[i] for i in group] for group in group_by_length(lengths, max_tokens)]) == least(0)


def test_a_few_long_rows_do_not_pad_many_short_ones():
    assert [len(group) for group in group_by_length([20] * 60 + [300] * 5, 100000)] == [60, 5]


def test_a_forward_is_not_split_to_save_little_padding():
    assert len(group_by_length(LENGTHS, 90 * len(LENGTHS))) == 1


# What a teacher gives beside hidden states

VOCAB_PADDING = 28
"""Rows of the padded heads beyond the tokenizer's vocabulary; they are made to win every position if they were looked at."""


def padded_teacher(name: str, new_student, vocab_size: int) -> Teacher:
    """A tiny teacher whose head has rows beyond the vocabulary with large logits; gemma2's logits reach its soft cap."""
    torch.manual_seed(3)
    if name == "gemma2":
        settings = {"hidden_size": 48, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 24}
        model = build_model({"model_type": "gemma2", "final_logit_softcapping": 5.0, "tie_word_embeddings": False, **settings}, vocab_size, ModelConfig(), name)
        with torch.no_grad():
            model.get_output_embeddings().weight.mul_(40)
    else:
        model = new_student(name, seed=3)
    model.resize_token_embeddings(vocab_size + VOCAB_PADDING, mean_resizing=False)
    with torch.no_grad():
        head_of(model).weight[vocab_size:] = 20 * head_of(model).weight[:1]
        head_of(model).weight[vocab_size + 1 :] *= -1
    return Teacher("law", model)


@pytest.fixture(params=["deepseek_v4_tiny", "qwen3_moe_tiny", "gemma2"], scope="module")
def padded(request, new_student, tokenizer) -> Teacher:
    return padded_teacher(request.param, new_student, len(tokenizer))


@torch.no_grad()
def own_logprobs(teacher: Teacher, rollout, vocab_size: int) -> torch.Tensor:
    """log_softmax of the model's own logits over the real vocabulary, at the positions before each completion token."""
    logits = teacher.model(torch.tensor([all_tokens(rollout)])).logits[0]
    return logits[len(rollout.prompt.tokens) - 1 : -1, :vocab_size].double().log_softmax(-1)


def signals(teacher: Teacher, rollouts, kind: SignalKind, top_k: int, vocab_size: int):
    hidden = teacher.hidden(rollouts, 10000)
    return [teacher.signal(rollout, hidden_TD, kind, top_k, vocab_size) for rollout, hidden_TD in zip(rollouts, hidden, strict=True)]


@pytest.mark.parametrize("top_k", [1, 5])
def test_a_top_k_signal_is_the_likeliest_tokens_of_the_models_own_logits(top_k, padded, rollouts, tokenizer):
    for rollout, signal in zip(rollouts, signals(padded, rollouts, SignalKind.top_k, top_k, len(tokenizer)), strict=True):
        expected = own_logprobs(padded, rollout, len(tokenizer)).topk(top_k, dim=1)
        assert signal.token_TK.tolist() == expected.indices.tolist()
        torch.testing.assert_close(signal.logprob_TK.double(), expected.values, rtol=0, atol=2e-5)
        assert (signal.kind, signal.hidden_TD, signal.logprob_TK.dtype) == (SignalKind.top_k, None, torch.float32)


def test_a_sampled_token_signal_is_the_models_log_probability_of_each_completion_token(padded, rollouts, tokenizer):
    for rollout, signal in zip(rollouts, signals(padded, rollouts, SignalKind.sampled_token, 5, len(tokenizer)), strict=True):
        expected = own_logprobs(padded, rollout, len(tokenizer)).gather(1, rollout.completion_T[:, None])
        assert signal.token_TK.tolist() == rollout.completion_T[:, None].tolist()
        torch.testing.assert_close(signal.logprob_TK.double(), expected, rtol=0, atol=2e-5)


def test_a_hidden_states_signal_is_the_hidden_states(padded, rollouts, tokenizer):
    hidden = padded.hidden(rollouts, 10000)
    for rollout, hidden_TD in zip(rollouts, hidden, strict=True):
        signal = padded.signal(rollout, hidden_TD, SignalKind.hidden_states, 5, len(tokenizer))
        assert signal.hidden_TD is hidden_TD
        assert signal.token_TK is signal.logprob_TK is None


def test_rows_of_the_head_beyond_the_vocabulary_never_appear(padded, rollouts, tokenizer):
    vocab_size = len(tokenizer)
    with torch.no_grad():
        logits = torch.cat([padded.model(torch.tensor([all_tokens(rollout)])).logits[0] for rollout in rollouts])
    assert (logits.argmax(-1) >= vocab_size).float().mean() > 0.5, "the padding has to win, or the test shows nothing"
    for signal in signals(padded, rollouts, SignalKind.top_k, vocab_size - 1, vocab_size):
        assert signal.token_TK.max() < vocab_size


@pytest.mark.parametrize("kind", [SignalKind.top_k, SignalKind.sampled_token])
@pytest.mark.parametrize("logits_at_a_time", [1, 3 * 97])
def test_logits_in_pieces_give_the_signal_of_all_at_once(logits_at_a_time, kind, padded, rollouts, tokenizer, monkeypatch):
    whole = signals(padded, rollouts, kind, 4, len(tokenizer))
    monkeypatch.setattr("teachers.teacher.LOGITS_AT_A_TIME", logits_at_a_time)
    for one, other in zip(signals(padded, rollouts, kind, 4, len(tokenizer)), whole, strict=True):
        assert torch.equal(one.token_TK, other.token_TK)
        torch.testing.assert_close(one.logprob_TK, other.logprob_TK, rtol=0, atol=1e-5)
