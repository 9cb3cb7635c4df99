"""Micro-batches: masks, positions, weights, teachers and sizes, against loops over single rollouts."""

import itertools
from dataclasses import replace

import pytest
import torch

from opd.batch import MicroBatch, distillation_batches, supervised_batches
from opd.config import BatchConfig
from opd.metrics import DomainTotals, add_losses
from opd.tiles import TokenLosses
from rollout.types import Rollout
from teachers.config import SignalKind
from teachers.types import ScoredRollout, TeacherSignal

WEIGHTS = {"law": 0.5, "code": 0.25, "tools": 2.0}
SHAPES = [("law", 3, 4), ("code", 9, 1), ("law", 1, 6), ("tools", 4, 4), ("code", 2, 7), ("law", 5, 5)]


def sizes(max_tokens: int) -> BatchConfig:
    return BatchConfig(max_tokens_per_micro_batch=max_tokens)


def scored(rollouts: list[Rollout], teacher_of: dict[str, str]) -> list[ScoredRollout]:
    """Signals whose hidden states hold the request and the number of the token, so that each can be recognised."""
    result = []
    for rollout in rollouts:
        length = len(rollout.completion_T)
        hidden_TD = torch.stack([torch.full((length,), float(rollout.prompt.request)), torch.arange(length).float()], dim=1)
        result.append(ScoredRollout(rollout=rollout, signal=TeacherSignal(teacher=teacher_of[rollout.prompt.domain], hidden_TD=hidden_TD)))
    return result


def token_rows(batch: MicroBatch) -> list[tuple[Rollout, int]]:
    """(rollout, number of the completion token) of each of the batch's N tokens, in order."""
    return [(rollout, index) for rollout in batch.rollouts for index in range(len(rollout.completion_T))]


@pytest.mark.parametrize("max_tokens", [1, 20, 40, 1000])
def test_each_rollout_is_in_exactly_one_micro_batch(max_tokens, random_rollouts):
    batches = supervised_batches(random_rollouts(SHAPES), WEIGHTS, sizes(max_tokens))
    assert sorted(rollout.prompt.request for batch in batches for rollout in batch.rollouts) == list(range(len(SHAPES)))


def test_rows_are_prompt_and_completion_with_padding_on_the_right_only(random_rollouts):
    [batch] = supervised_batches(random_rollouts(SHAPES), WEIGHTS, sizes(1000))
    for row, rollout in enumerate(batch.rollouts):
        whole = [*rollout.prompt.tokens, *rollout.completion_T.tolist()]
        assert batch.tokens_BL[row, : len(whole)].tolist() == whole
        assert batch.real_BL[row].tolist() == [True] * len(whole) + [False] * (batch.tokens_BL.shape[1] - len(whole))


def test_positions_point_at_the_state_before_each_completion_token(random_rollouts):
    [batch] = supervised_batches(random_rollouts(SHAPES), WEIGHTS, sizes(1000))
    width = batch.tokens_BL.shape[1]
    positions, targets = [], []
    for row, rollout in enumerate(batch.rollouts):
        for index, token in enumerate(rollout.completion_T.tolist()):
            positions.append(row * width + len(rollout.prompt.tokens) + index - 1)
            targets.append(token)
    assert batch.position_N.tolist() == positions
    assert batch.target_N.tolist() == targets
    assert torch.equal(batch.tokens_BL.flatten()[batch.position_N + 1], batch.target_N)


def test_each_token_knows_its_rollout(random_rollouts):
    [batch] = supervised_batches(random_rollouts(SHAPES), WEIGHTS, sizes(1000))
    assert [batch.rollouts[index] for index in batch.rollout_N.tolist()] == [rollout for rollout, _ in token_rows(batch)]


def test_a_tokens_weight_is_that_of_its_domain_and_zero_outside_the_mask(make_rollout):
    masks = {"law": [True, False, True], "code": [False, False], "tools": [True]}
    rollouts = [make_rollout(domain, [5, 6], list(range(7, 7 + len(mask))), mask=mask) for domain, mask in masks.items()]
    [batch] = supervised_batches(rollouts, WEIGHTS, sizes(1000))
    for (rollout, index), mask, weight in zip(token_rows(batch), batch.mask_N.tolist(), batch.weight_N.tolist(), strict=True):
        assert mask == bool(rollout.completion_mask_T[index])
        assert weight == (WEIGHTS[rollout.prompt.domain] if mask else 0.0)


def test_environment_tokens_are_read_by_the_model_but_not_trained_on(make_rollout):
    [batch] = supervised_batches([make_rollout("law", [5, 6], [7, 8, 9], mask=[True, False, True])], WEIGHTS, sizes(1000))
    assert batch.tokens_BL.tolist() == [[5, 6, 7, 8, 9]]
    assert batch.real_BL.all()
    assert batch.weight_N.tolist() == [0.5, 0.0, 0.5]


def test_a_token_with_the_id_of_the_padding_counts_like_any_other(make_rollout):
    rollouts = [make_rollout("law", [0, 5], [6, 0, 0]), make_rollout("law", [5], [7])]
    [batch] = supervised_batches(rollouts, WEIGHTS, sizes(1000))
    padded, whole = batch.rollouts.index(rollouts[1]), batch.rollouts.index(rollouts[0])
    assert batch.real_BL[whole].tolist() == [True] * 5
    assert batch.real_BL[padded].tolist() == [True, True, False, False, False]
    assert (batch.weight_N == 0.5).all()
    assert len(batch.target_N) == 4


@pytest.mark.parametrize("max_tokens", [12, 25, 60])
def test_rows_times_width_stays_below_max_tokens_unless_one_row_alone_is_longer(max_tokens, random_rollouts):
    batches = supervised_batches(random_rollouts([*SHAPES, ("law", 20, 20)]), WEIGHTS, sizes(max_tokens))
    assert all(batch.tokens_BL.numel() <= max_tokens or len(batch.rollouts) == 1 for batch in batches)
    assert any(len(batch.rollouts) > 1 for batch in batches) or max_tokens == 12


def test_each_micro_batch_has_one_teacher_and_its_domains_signals(random_rollouts):
    teacher_of = {"law": "a", "code": "b", "tools": "a"}
    batches = distillation_batches(scored(random_rollouts(SHAPES), teacher_of), WEIGHTS, sizes(30))
    assert len(batches) > 2
    for batch in batches:
        assert {teacher_of[rollout.prompt.domain] for rollout in batch.rollouts} == {batch.teacher}
        expected = [[float(rollout.prompt.request), float(index)] for rollout, index in token_rows(batch)]
        assert batch.teacher_hidden_ND.tolist() == expected


@pytest.mark.parametrize("kind", [SignalKind.top_k, SignalKind.sampled_token])
def test_tokens_and_log_probabilities_of_a_signal_stay_with_their_completion_token(kind, random_rollouts):
    items = []
    for item in scored(random_rollouts(SHAPES), dict.fromkeys(WEIGHTS, "a")):
        named_TK = item.signal.hidden_TD
        items.append(replace(item, signal=TeacherSignal(teacher="a", kind=kind, token_TK=named_TK.long(), logprob_TK=-named_TK)))
    batches = distillation_batches(items, WEIGHTS, sizes(30))
    assert len(batches) > 1
    for batch in batches:
        expected = [[rollout.prompt.request, index] for rollout, index in token_rows(batch)]
        assert batch.teacher_token_NK.tolist() == expected
        assert (-batch.teacher_logprob_NK).tolist() == expected
        assert (batch.signal, batch.teacher_hidden_ND) == (kind, None)


def test_micro_batches_of_one_teacher_follow_each_other(random_rollouts):
    teacher_of = {"law": "a", "code": "b", "tools": "c"}
    order = [batch.teacher for batch in distillation_batches(scored(random_rollouts(SHAPES), teacher_of), WEIGHTS, sizes(12))]
    assert len(order) > 3
    assert sum(left != right for left, right in itertools.pairwise(order)) == 2, "each teacher is fetched once"


def test_a_supervised_batch_has_no_teacher(random_rollouts):
    [batch] = supervised_batches(random_rollouts(SHAPES), WEIGHTS, sizes(1000))
    assert batch.teacher is None
    assert batch.teacher_hidden_ND is None


def test_a_step_without_rollouts_on_a_rank_is_refused():
    with pytest.raises(ValueError, match="at least one prompt per rank"):
        supervised_batches([], WEIGHTS, sizes(1000))


def test_a_filler_counts_for_nothing_in_the_metrics(random_rollouts):
    [batch] = supervised_batches(random_rollouts(SHAPES), WEIGHTS, sizes(1000))
    filler = replace(batch, weight_N=torch.zeros_like(batch.weight_N), is_filler=True)
    losses = TokenLosses(torch.ones(len(batch.target_N)), torch.ones(len(batch.target_N)), None)
    for one, is_counted in [(batch, True), (filler, False)]:
        totals = DomainTotals(list(WEIGHTS))
        add_losses(totals, one, losses)
        assert any(totals.totals.values()) == is_counted


def test_a_batch_on_a_device_keeps_what_it_holds(random_rollouts):
    [batch] = supervised_batches(random_rollouts(SHAPES), WEIGHTS, sizes(1000))
    moved = batch.to(torch.device("meta"))
    assert moved.tokens_BL.device.type == moved.weight_N.device.type == "meta"
    assert moved.teacher_hidden_ND is None
    assert moved.rollouts == batch.rollouts
