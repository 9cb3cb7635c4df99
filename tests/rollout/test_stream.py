"""RolloutStream: sampled or replayed steps, shared among ranks, resumable."""

import json
from dataclasses import dataclass, replace

import pytest
import torch

from rollout.config import PromptsConfig, RolloutConfig
from rollout.prompts import PromptMixture, load_prompts
from rollout.replay import load_rollouts, replay_file, rollout_key
from rollout.sampler import LocalSampler
from rollout.stream import RolloutStream

SMALL = {"prompts_per_step": 5, "max_new_tokens": 6, "decode_width": 5, "completions_per_prompt": 2}


@dataclass
class Weights:
    """The weights of a model, as an engine gives them after `policy_step` steps."""

    model: torch.nn.Module
    policy_step: int = 0

    def weights(self):
        return self.model.state_dict().items()


@dataclass
class SomeRank:
    """One of several ranks, of a run that does not gather."""

    index: int
    count: int


@pytest.fixture(scope="module")
def domains(tokenizer):
    cfgs = {name: PromptsConfig(path=f"synthetic:{name}", rows=30, share=share) for name, share in (("sorting", {0: 0.5, 2: 0.0}), ("brackets", 0.5))}
    return load_prompts(cfgs, tokenizer, longest=30)


@pytest.fixture
def new_stream(domains, qwen3_moe_model, tmp_path):
    """new_stream(save=True, run="one"): a stream at its beginning, with a run folder of its own."""

    def make(run: str = "run", ranks=None, **settings) -> RolloutStream:
        prompts = PromptMixture({name: replace(domain, consumed={}) for name, domain in domains.items()}, SMALL["prompts_per_step"], seed=0)
        return RolloutStream(prompts, LocalSampler(qwen3_moe_model, [2], seed=0), RolloutConfig(**SMALL | settings), str(tmp_path / run), ranks)

    return make


def tokens_of(rollouts) -> list[tuple]:
    return [(rollout.prompt, rollout.sample, tuple(rollout.completion_T.tolist())) for rollout in rollouts]


def test_a_step_holds_every_completion_of_every_prompt_in_order(new_stream, qwen3_moe_model):
    rollouts = new_stream().next(3, Weights(qwen3_moe_model))
    assert [rollout_key(rollout) for rollout in rollouts] == [(request, sample) for request in range(15, 20) for sample in range(2)]


def test_a_step_is_sampled_with_the_sources_present_weights(new_stream, qwen3_moe_model, new_student):
    stream, trained = new_stream(), new_student("qwen3_moe_tiny", seed=1)
    before = stream.next(0, Weights(qwen3_moe_model, policy_step=0))
    stream.restore({"prompts": {}})
    after = stream.next(0, Weights(trained, policy_step=9))
    assert [rollout.prompt for rollout in before] == [rollout.prompt for rollout in after]
    assert tokens_of(before) != tokens_of(after)
    assert {rollout.policy_step for rollout in before} == {0}
    assert {rollout.policy_step for rollout in after} == {9}
    assert tokens_of(after) == tokens_of(LocalSampler(trained, [2], seed=0).sample([r.prompt for r in after[::2]], stream.cfg, 2))


@pytest.mark.parametrize("count", [2, 3, 5])
def test_the_ranks_together_sample_what_one_rank_samples(new_stream, qwen3_moe_model, count):
    whole = new_stream().next(1, Weights(qwen3_moe_model))
    parts = [new_stream(ranks=SomeRank(index, count)).next(1, Weights(qwen3_moe_model)) for index in range(count)]
    assert all(parts)
    assert tokens_of(sorted((rollout for part in parts for rollout in part), key=rollout_key)) == tokens_of(whole)


def test_a_step_with_fewer_prompts_than_ranks_is_refused(new_stream):
    with pytest.raises(ValueError, match=r"rollout\.prompts_per_step=5 is less than the 6 ranks"):
        new_stream(ranks=SomeRank(0, 6))


def test_a_stream_resumed_from_its_state_equals_an_uninterrupted_one(new_stream, qwen3_moe_model):
    uninterrupted, stopped, resumed = new_stream(), new_stream(), new_stream()
    expected = [tokens_of(uninterrupted.next(step, Weights(qwen3_moe_model))) for step in range(4)]
    for step in range(2):
        stopped.next(step, Weights(qwen3_moe_model))
    resumed.restore(json.loads(json.dumps(stopped.state())))
    assert [tokens_of(resumed.next(step, Weights(qwen3_moe_model))) for step in (2, 3)] == expected[2:]


def test_asked_shares_are_those_of_the_step(new_stream, qwen3_moe_model):
    stream = new_stream()
    stream.next(0, Weights(qwen3_moe_model))
    assert stream.asked_shares == {"sorting": 0.5, "brackets": 0.5}
    stream.next(2, Weights(qwen3_moe_model))
    assert stream.asked_shares == {"sorting": 0.0, "brackets": 1.0}


def test_a_saved_step_is_the_step(new_stream, qwen3_moe_model, tmp_path):
    rollouts = new_stream(run="one", save=True).next(0, Weights(qwen3_moe_model))
    saved = load_rollouts(replay_file(tmp_path / "one", 0))
    assert tokens_of(saved) == tokens_of(rollouts)
    assert all(torch.equal(a.logprob_T, b.logprob_T) for a, b in zip(saved, rollouts, strict=True))


def test_nothing_is_saved_unless_asked(new_stream, qwen3_moe_model, tmp_path):
    new_stream(run="one").next(0, Weights(qwen3_moe_model))
    assert not (tmp_path / "one" / "rollouts").exists()


def test_a_replayed_step_is_the_saved_one_whatever_the_weights(new_stream, qwen3_moe_model, new_student, tmp_path):
    saving, trained = new_stream(run="one", save=True), new_student("qwen3_moe_tiny", seed=1)
    saved = [tokens_of(saving.next(step, Weights(qwen3_moe_model))) for step in range(2)]
    replaying = new_stream(run="two", replay=str(tmp_path / "one"))
    assert [tokens_of(replaying.next(step, Weights(trained))) for step in range(2)] == saved


def test_the_ranks_together_replay_every_rollout_once(new_stream, qwen3_moe_model, tmp_path):
    saved = new_stream(run="one", save=True).next(0, Weights(qwen3_moe_model))
    parts = [new_stream(ranks=SomeRank(index, 3), replay=str(tmp_path / "one")).next(0, Weights(qwen3_moe_model)) for index in range(3)]
    assert tokens_of(sorted((rollout for part in parts for rollout in part), key=rollout_key)) == tokens_of(saved)


def test_replaying_a_step_that_was_not_saved_is_refused(new_stream, qwen3_moe_model, tmp_path):
    with pytest.raises(ValueError, match="no saved rollouts at"):
        new_stream(replay=str(tmp_path / "nowhere")).next(0, Weights(qwen3_moe_model))


def test_a_run_compared_with_itself_shows_no_difference(new_stream, qwen3_moe_model, tmp_path):
    new_stream(run="one", save=True).next(0, Weights(qwen3_moe_model))
    again = new_stream(run="two", compare=str(tmp_path / "one"))
    again.next(0, Weights(qwen3_moe_model))
    assert again.difference is None


def test_the_first_difference_from_another_run_is_kept(new_stream, qwen3_moe_model, new_student, tmp_path):
    saving = new_stream(run="one", save=True)
    for step in range(3):
        saving.next(step, Weights(qwen3_moe_model))
    comparing, trained = new_stream(run="two", compare=str(tmp_path / "one")), new_student("qwen3_moe_tiny", seed=1)
    comparing.next(0, Weights(qwen3_moe_model))
    differing = comparing.next(1, Weights(trained))
    comparing.next(2, Weights(trained))
    saved = load_rollouts(replay_file(tmp_path / "one", 1))
    first = next(ours for ours, theirs in zip(differing, saved, strict=True) if ours.completion_T.tolist() != theirs.completion_T.tolist())
    assert comparing.difference.startswith(f"step 1: request {first.prompt.request} ({first.prompt.domain})")


@pytest.mark.parametrize("setting", [{"save": True}, {"compare": "runs/other"}])
def test_replaying_refuses_what_needs_sampling(setting, tmp_path):
    with pytest.raises(ValueError, match="would be ignored"):
        RolloutStream(None, None, RolloutConfig(replay="runs/saved", **setting), str(tmp_path))
