"""Replay files: the format by a golden file, exact read-back, and the comparison of two runs."""

import shutil
from dataclasses import replace

import pytest
import torch

from rollout.replay import first_difference, load_rollouts, replay_file, save_rollouts
from rollout.types import Rollout


@pytest.fixture
def golden_rollouts(make_rollout) -> list[Rollout]:
    """The rollouts of tests/golden/rollouts/step-000012.jsonl: a truncated one, a masked token, the smallest normal float32, no answer."""
    law = {"request": 48, "answer": "Straße 4", "policy_step": 12}
    made = [
        make_rollout("law", [1, 5, 20, 6], [9, 40, 2], logprob=[-0.1, -10 / 3, -(2.0**-126)], **law),
        make_rollout("law", [1, 5, 20, 6], [9, 9], mask=[1, 0], logprob=[-0.1, -123.456], sample=1, finished=False, **law),
        make_rollout("code", [1], [2], logprob=[0.0], request=49, policy_step=11),
    ]
    rows = ("prompts:7", "prompts:7", "easy:0")
    return [replace(rollout, prompt=replace(rollout.prompt, row=row)) for rollout, row in zip(made, rows, strict=True)]


@pytest.fixture
def golden_routes(make_rollout) -> list[Rollout]:
    """The rollouts of tests/golden/rollouts/step-000013.jsonl: routes of few experts, of many, and none."""
    few, many = torch.tensor([[[0, 7], [255, 1]], [[3, 4], [5, 6]]], dtype=torch.uint8), torch.tensor([[[300], [2]]], dtype=torch.int16)
    made = [make_rollout("law", [1, 5], [9, 2], request=52, routes_TMK=few, policy_step=13)]
    made.append(make_rollout("code", [1], [2], request=53, routes_TMK=many, policy_step=13))
    return [*made, make_rollout("code", [1], [2], request=54, policy_step=13)]


def assert_bit_equal(left: list[Rollout], right: list[Rollout]) -> None:
    assert len(left) == len(right)
    for a, b in zip(left, right, strict=True):
        assert (a.prompt, a.sample, a.finished, a.policy_step) == (b.prompt, b.sample, b.finished, b.policy_step)
        for ours, theirs in ((a.completion_T, b.completion_T), (a.completion_mask_T, b.completion_mask_T), (a.logprob_T, b.logprob_T)):
            assert ours.dtype == theirs.dtype
            assert torch.equal(ours, theirs)
        assert (a.routes_TMK is None) == (b.routes_TMK is None)
        if a.routes_TMK is not None:
            assert a.routes_TMK.dtype == b.routes_TMK.dtype
            assert torch.equal(a.routes_TMK, b.routes_TMK)


def test_a_step_is_written_as_the_golden_file(golden_rollouts, golden_dir, tmp_path):
    save_rollouts(replay_file(tmp_path, 12), 12, golden_rollouts)
    assert replay_file(tmp_path, 12).read_bytes() == replay_file(golden_dir, 12).read_bytes()


def test_the_golden_file_reads_back_bit_equal(golden_rollouts, golden_dir):
    assert_bit_equal(load_rollouts(replay_file(golden_dir, 12)), golden_rollouts)


def test_routes_are_written_as_the_golden_file(golden_routes, golden_dir, tmp_path):
    save_rollouts(replay_file(tmp_path, 13), 13, golden_routes)
    assert replay_file(tmp_path, 13).read_bytes() == replay_file(golden_dir, 13).read_bytes()


def test_routes_read_back_bit_equal(golden_routes, golden_dir):
    assert_bit_equal(load_rollouts(replay_file(golden_dir, 13)), golden_routes)


def test_rollouts_are_written_in_request_and_sample_order(golden_rollouts, golden_dir, tmp_path):
    save_rollouts(replay_file(tmp_path, 12), 12, golden_rollouts[::-1])
    assert replay_file(tmp_path, 12).read_bytes() == replay_file(golden_dir, 12).read_bytes()


def test_every_float32_log_probability_reads_back_bit_equal(make_rollout, tmp_path):
    generator = torch.Generator().manual_seed(0)
    bits = torch.randint(0, 0x7F800000, (5000,), generator=generator, dtype=torch.int32)  # every finite float32 >= 0 is equally likely
    logprob_T = -bits.view(torch.float32)
    rollout = replace(make_rollout("law", [1], [3] * 5000), logprob_T=logprob_T)
    save_rollouts(tmp_path / "step.jsonl", 0, [rollout])
    assert torch.equal(load_rollouts(tmp_path / "step.jsonl")[0].logprob_T, logprob_T)


def test_an_answer_with_line_separators_stays_one_line(make_rollout, tmp_path):
    rollout = make_rollout("law", [1], [2], answer="a\nb\u2028c\x85d\x0ce")
    save_rollouts(tmp_path / "step.jsonl", 0, [rollout])
    assert load_rollouts(tmp_path / "step.jsonl")[0].prompt.answer == "a\nb\u2028c\x85d\x0ce"


def test_a_written_file_replaces_an_older_one_and_leaves_nothing_beside_it(golden_rollouts, tmp_path):
    path = replay_file(tmp_path, 3)
    save_rollouts(path, 3, golden_rollouts)
    save_rollouts(path, 3, golden_rollouts[:1])
    assert_bit_equal(load_rollouts(path), golden_rollouts[:1])
    assert list(path.parent.iterdir()) == [path]


def test_the_file_of_a_step_has_six_digits():
    assert str(replay_file("runs/law", 12)) == "runs/law/rollouts/step-000012.jsonl"


def test_a_missing_file_is_refused_with_the_way_to_make_it(tmp_path):
    with pytest.raises(ValueError, match=r"no saved rollouts at .*step-000003\.jsonl: make them with rollout\.save=true"):
        load_rollouts(replay_file(tmp_path, 3))


def test_a_file_of_another_schema_is_refused(golden_dir, tmp_path):
    path = tmp_path / "step.jsonl"
    shutil.copy(replay_file(golden_dir, 12), path)
    path.write_text(path.read_text().replace('"schema": 1', '"schema": 2'))
    with pytest.raises(ValueError, match="have schema 2; this version reads schema 1"):
        load_rollouts(path)


def test_equal_rollouts_have_no_difference(golden_rollouts):
    assert first_difference(golden_rollouts, list(golden_rollouts)) is None


def test_log_probabilities_are_not_compared(golden_rollouts):
    others = [replace(rollout, logprob_T=rollout.logprob_T - 1) for rollout in golden_rollouts]
    assert first_difference(golden_rollouts, others) is None


def test_the_first_differing_token_is_named(golden_rollouts):
    others = list(golden_rollouts)
    others[1] = replace(others[1], completion_T=torch.tensor([9, 8]))
    others[2] = replace(others[2], completion_T=torch.tensor([7]))
    assert first_difference(golden_rollouts, others) == "request 48 (law), completion token 1: 9 here, 8 there"


def test_a_longer_completion_is_a_difference(golden_rollouts):
    others = list(golden_rollouts)
    others[2] = replace(others[2], completion_T=torch.tensor([2, 2]))
    assert first_difference(golden_rollouts, others) == "request 49 (code) has 1 tokens here, 2 there"


def test_another_prompt_is_a_difference(golden_rollouts):
    others = list(golden_rollouts)
    others[0] = replace(others[0], prompt=replace(others[0].prompt, tokens=(1, 5, 21, 6)))
    assert first_difference(golden_rollouts, others) == "request 48 has another prompt"


def test_other_requests_are_a_difference(golden_rollouts):
    assert first_difference(golden_rollouts, golden_rollouts[:2]) == "the two runs sampled different prompts"
