"""RolloutStream: sampled or replayed steps, shared among ranks, resumable."""

import copy
import json
from dataclasses import dataclass, replace

import pytest
import torch

from rollout.cohort import Cohort
from rollout.config import PromptsConfig, RolloutConfig
from rollout.prompts import PromptMixture, load_prompts
from rollout.replay import load_rollouts, replay_file, rollout_key
from rollout.sampler import LocalSampler
from rollout.stream import RolloutStream
from rollout.wal import SegmentReader, _frames

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


def test_another_sampler_draws_the_rollouts_where_one_is_set(new_stream, qwen3_moe_model, new_student):
    stream, other = new_stream(), new_student("qwen3_moe_tiny", seed=1)
    own = stream.sampler
    stream.draw_with(LocalSampler(copy.deepcopy(other), [2], seed=7), num_steps=1)
    rollouts = stream.next(0, Weights(qwen3_moe_model))
    assert stream.sampler is own
    assert tokens_of(rollouts) == tokens_of(LocalSampler(qwen3_moe_model, [2], seed=7).sample([r.prompt for r in rollouts[::2]], stream.cfg, 2))


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


def test_each_rank_replays_what_it_sampled(new_stream, qwen3_moe_model, tmp_path):
    """Bit-identical training depends on it: the order in which gradients are summed is that of the ranks."""
    new_stream(run="one", save=True).next(0, Weights(qwen3_moe_model))
    for index in range(2):
        sampled = new_stream(run=f"sampling-{index}", ranks=SomeRank(index, 2)).next(0, Weights(qwen3_moe_model))
        replayed = new_stream(run="two", ranks=SomeRank(index, 2), replay=str(tmp_path / "one")).next(0, Weights(qwen3_moe_model))
        assert tokens_of(replayed) == tokens_of(sampled)


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


LOOPING = {"temperature": 0.0, "max_new_tokens": 40}
"""A model of random weights that always takes the likeliest token runs into loops."""


def test_loops_are_masked_alike_when_sampled_and_when_replayed_and_files_hold_what_was_sampled(new_stream, qwen3_moe_model, tmp_path):
    sampled = new_stream(run="one", save=True, mask_loops=True, **LOOPING).next(0, Weights(qwen3_moe_model))
    saved = load_rollouts(replay_file(tmp_path / "one", 0))
    replayed = new_stream(replay=str(tmp_path / "one"), mask_loops=True, **LOOPING).next(0, Weights(qwen3_moe_model))
    assert sum(not rollout.completion_mask_T.all() for rollout in sampled) > 2
    assert all(rollout.completion_mask_T.all() for rollout in saved)
    for ours, theirs in zip(sampled, replayed, strict=True):
        assert torch.equal(ours.completion_mask_T, theirs.completion_mask_T)
        assert torch.equal(ours.completion_T, theirs.completion_T)


def test_loops_stay_in_the_loss_unless_asked(new_stream, qwen3_moe_model):
    assert all(rollout.completion_mask_T.all() for rollout in new_stream(**LOOPING).next(0, Weights(qwen3_moe_model)))


def ahead(stream: RolloutStream, num_steps: int) -> RolloutStream:
    stream.draw_with(stream.sampler, num_steps)
    return stream


def test_one_step_ahead_each_step_has_the_weights_of_the_step_before(new_stream, new_student):
    models = [new_student("qwen3_moe_tiny", seed=seed) for seed in range(4)]
    stream = ahead(new_stream(staleness=1), num_steps=4)
    found = [stream.next(step, Weights(models[step], policy_step=step)) for step in range(4)]
    assert [{rollout.policy_step for rollout in rollouts} for rollouts in found] == [{0}, {0}, {1}, {2}]
    strict = new_stream(run="strict")
    for step, rollouts in enumerate(found):
        weights = max(0, step - 1)
        assert tokens_of(rollouts) == tokens_of(strict.next(step, Weights(models[weights], policy_step=weights)))


def test_one_step_ahead_nothing_is_sampled_after_the_last_step(new_stream, qwen3_moe_model):
    stream = ahead(new_stream(staleness=1), num_steps=2)
    for step in range(2):
        stream.next(step, Weights(qwen3_moe_model, policy_step=step))
    assert stream.pending is None
    assert sum(domain["prompts"] for domain in stream.state()["prompts"].values()) == 2 * SMALL["prompts_per_step"]


def test_one_step_ahead_the_state_is_that_before_the_prompts_of_the_next_step(new_stream, qwen3_moe_model):
    stream = ahead(new_stream(staleness=1), num_steps=9)
    stream.next(0, Weights(qwen3_moe_model))
    stream.next(1, Weights(qwen3_moe_model, policy_step=1))
    state = stream.state()
    strict = new_stream(run="strict")
    for step in range(2):
        strict.next(step, Weights(qwen3_moe_model))
    assert state == strict.state() | {"policy_step": 1}


def test_a_stream_taken_up_one_step_ahead_says_where_the_old_weights_are_gone(new_stream, qwen3_moe_model, caplog):
    stream = ahead(new_stream(staleness=1), num_steps=9)
    stream.restore({"prompts": {}, "policy_step": 4})
    rollouts = stream.next(5, Weights(qwen3_moe_model, policy_step=5))
    assert {rollout.policy_step for rollout in rollouts} == {5}
    assert "the weights after 4 updates are no longer published: step 5 is sampled with those after 5" in caplog.text


class PublishingSampler(LocalSampler):
    """One that notes which weights are to stay published."""

    protected: int | None = None

    def protect(self, policy_step: int) -> None:
        self.protected = policy_step


def test_weights_that_a_stream_was_taken_up_with_stay_published_until_the_next_checkpoint(new_stream, qwen3_moe_model):
    """A second kill before it takes the run back to the same checkpoint, which needs them again."""
    stream = new_stream(staleness=1)
    stream.draw_with(PublishingSampler(qwen3_moe_model, [2], seed=0), num_steps=9)
    stream.restore({"prompts": {}, "policy_step": 4})
    stream.next(5, Weights(qwen3_moe_model, policy_step=5))
    stream.next(6, Weights(qwen3_moe_model, policy_step=6))
    assert stream.rollout_sampler.protected == 4
    stream.forget_before(8)
    assert stream.rollout_sampler.protected == 7


def test_what_goes_wrong_one_step_ahead_is_raised_when_its_step_is_asked_for(new_stream, qwen3_moe_model):
    stream = ahead(new_stream(staleness=1), num_steps=9)
    stream.next(0, Weights(qwen3_moe_model))
    with torch.no_grad():
        broken = copy.deepcopy(qwen3_moe_model)
        broken.lm_head.weight.fill_(torch.nan)
    stream.next(1, Weights(broken, policy_step=1))
    with pytest.raises(ValueError, match="its weights have diverged"):
        stream.next(2, Weights(qwen3_moe_model, policy_step=2))


def test_a_stream_that_is_taken_up_samples_no_logged_token_again(new_stream, qwen3_moe_model, monkeypatch):
    weights, drawn = Weights(qwen3_moe_model), []
    expected = new_stream().next(0, weights)
    segment = SegmentReader(new_stream().log.segment(0, "rank-000"))
    kept = sum(len(frame.records) for frame in segment.new_frames()[:5])
    cut = segment.path.read_bytes()
    sizes = [end for _, end in _frames(cut)]
    segment.path.write_bytes(cut[: sizes[4] + 3])
    monkeypatch.setattr(Cohort, "_log", lambda self, append, records: (drawn.append(len(records)), append(records))[1])
    again = new_stream()
    assert tokens_of(again.next(0, weights)) == tokens_of(expected)
    total = sum(len(rollout.completion_T) for rollout in expected)
    assert again.sampler.figures.sampled == total - kept
    assert sum(drawn) == total, "what was given is logged again, and nothing else twice"


def test_other_weights_seeds_and_settings_take_nothing_up(new_stream, qwen3_moe_model, new_student):
    new_stream().next(0, Weights(qwen3_moe_model))
    reseeded = new_stream()
    reseeded.draw_with(LocalSampler(qwen3_moe_model, [2], seed=1), num_steps=1)
    for stream, model in [
        (new_stream(), new_student("qwen3_moe_tiny", seed=1)),
        (new_stream(temperature=0.9), qwen3_moe_model),
        (new_stream(top_p=0.9), qwen3_moe_model),
        (reseeded, qwen3_moe_model),
    ]:
        rollouts = stream.next(0, Weights(model))
        assert stream.figures.sampled == sum(len(rollout.completion_T) for rollout in rollouts)


def test_steps_that_a_checkpoint_holds_are_forgotten_in_the_log(new_stream, qwen3_moe_model, tmp_path):
    stream = new_stream()
    for step in range(3):
        stream.next(step, Weights(qwen3_moe_model))
    stream.forget_before(2)
    assert [path.name for path in (tmp_path / "run" / "log").iterdir()] == ["step-000002"]
