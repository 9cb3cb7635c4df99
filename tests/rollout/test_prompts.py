"""PromptMixture: stratified counts, schedules, keyed permutations, weighted sources, resumption."""

import json
from collections import Counter

import pytest

from rollout.config import PromptsConfig, SourceConfig
from rollout.prompts import DomainPrompts, PromptMixture
from rollout.types import Prompt


def domain_of(name: str, num_rows: int, share=1.0) -> DomainPrompts:
    rows = [{"index": index, "tokens": [index], "answer": f"{name}-{index}", "slip": None} for index in range(num_rows)]
    return DomainPrompts(name=name, cfg=PromptsConfig(share=share), sources={"prompts": rows})


def mixture_of(shares: dict, prompts_per_step: int, num_rows: int = 50, seed: int = 0) -> PromptMixture:
    return PromptMixture({name: domain_of(name, num_rows, share) for name, share in shares.items()}, prompts_per_step, seed)


def domain_of_two_sources(weights: tuple[float, float], rows: tuple[int, int] = (40, 60)) -> DomainPrompts:
    cfg = PromptsConfig(sources={name: SourceConfig(path="unread", weight=weight) for name, weight in zip("ab", weights, strict=True)})
    counts = zip("ab", rows, strict=True)
    sources = {name: [{"index": index, "tokens": [index], "answer": None, "slip": None} for index in range(count)] for name, count in counts}
    return DomainPrompts(name="law", cfg=cfg, sources=sources)


def counts_of(prompts: list[Prompt]) -> Counter:
    return Counter(prompt.domain for prompt in prompts)


def rows_of(prompts: list[Prompt]) -> list[tuple[str, str]]:
    return [(prompt.domain, prompt.row) for prompt in prompts]


# Which domains a step asks


SHARES = {"law": 5.0, "code": 3.0, "math": 1.7, "rare": 0.3}


def test_a_domains_count_is_within_one_of_its_share_at_every_step():
    mixture = mixture_of(SHARES, prompts_per_step=11)
    for step in range(500):
        counts = counts_of(mixture.next(step))
        assert counts.total() == 11
        assert all(abs(counts[name] - share / 10 * 11) < 1 for name, share in SHARES.items())


def test_counts_are_right_on_average():
    mixture = mixture_of(SHARES, prompts_per_step=11)
    steps = 3000
    totals = sum((counts_of(mixture.next(step)) for step in range(steps)), Counter())
    assert {name: totals[name] / steps for name in SHARES} == pytest.approx({name: share / 10 * 11 for name, share in SHARES.items()}, abs=0.03)


def test_shares_are_divided_by_their_sum():
    assert mixture_of(SHARES, 1).asked_shares(0) == pytest.approx({"law": 0.5, "code": 0.3, "math": 0.17, "rare": 0.03})


def test_a_scheduled_share_holds_from_its_step_on():
    mixture = mixture_of({"law": {0: 1.0, 5: 0.0}, "code": {0: 0.0, 3: 1.0}}, prompts_per_step=4)
    asked = [dict(counts_of(mixture.next(step))) for step in range(8)]
    assert asked == [{"law": 4}] * 3 + [{"law": 2, "code": 2}] * 2 + [{"code": 4}] * 3


def test_a_domain_of_share_zero_is_never_asked():
    mixture = mixture_of({"law": 0.3, "never": 0.0, "code": 0.6, "also never": 0}, prompts_per_step=7)
    assert all(not {"never", "also never"} & set(counts_of(mixture.next(step))) for step in range(300))


def test_a_domain_that_is_excluded_in_the_run_is_asked_no_more_and_leaves_its_share_to_the_others():
    mixture, excluded = mixture_of(SHARES, prompts_per_step=11), {}
    mixture.excluded = excluded
    assert "law" in counts_of(mixture.next(0))
    excluded["law"] = "its teacher failed"
    consumed = mixture.state()["law"]
    assert mixture.asked_shares(1) == pytest.approx({name: share / 5 for name, share in SHARES.items() if name != "law"})
    for step in range(1, 50):
        counts = counts_of(mixture.next(step))
        assert counts.total() == 11
        assert "law" not in counts
    assert mixture.state()["law"] == consumed


def test_a_step_in_which_every_share_is_zero_is_refused():
    mixture = mixture_of({"law": {0: 1.0, 2: 0.0}}, prompts_per_step=4)
    mixture.next(1)
    with pytest.raises(ValueError, match=r"every domain's prompts\.share is 0 at step 2"):
        mixture.next(2)


def test_no_domains_are_refused():
    with pytest.raises(ValueError, match="no domain is selected"):
        PromptMixture({}, 4, seed=0)


# Which rows a step asks


def test_requests_are_numbered_through_the_run():
    mixture = mixture_of(SHARES, prompts_per_step=5)
    assert [prompt.request for step in range(4) for prompt in mixture.next(step)] == list(range(20))


def test_each_epoch_is_another_permutation_of_the_rows():
    mixture = mixture_of({"law": 1.0}, prompts_per_step=10, num_rows=30)
    epochs = [[prompt.row for step in range(epoch * 3, epoch * 3 + 3) for prompt in mixture.next(step)] for epoch in range(3)]
    assert all(sorted(epoch) == sorted(f"prompts:{index}" for index in range(30)) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2] != epochs[0]
    assert epochs[0] != [f"prompts:{index}" for index in range(30)]


def test_two_domains_of_the_same_size_are_shuffled_differently():
    mixture = mixture_of({"law": 1.0, "code": 1.0}, prompts_per_step=60, num_rows=30)
    prompts = mixture.next(0)
    assert [p.row for p in prompts if p.domain == "law"] != [p.row for p in prompts if p.domain == "code"]


def test_a_prompt_is_the_row_it_names():
    for prompt, row in mixture_of(SHARES, prompts_per_step=20).next_rows(0):
        index = int(prompt.row.removeprefix("prompts:"))
        assert prompt.tokens == (index,) == tuple(row["tokens"])
        assert prompt.answer == f"{prompt.domain}-{index}" == row["answer"]


def test_the_stream_is_a_function_of_its_seed():
    streams = [[rows_of(mixture.next(step)) for step in range(5)] for mixture in (mixture_of(SHARES, 20, seed=seed) for seed in (0, 0, 1))]
    assert streams[0] == streams[1] != streams[2]


@pytest.mark.parametrize("stopped_at", [1, 4, 9])
def test_a_stream_resumed_from_its_state_equals_an_uninterrupted_one(stopped_at):
    def new_mixture():
        return PromptMixture({"law": domain_of_two_sources((3.0, 1.0)), "code": domain_of("code", 13)}, prompts_per_step=8, seed=0)

    uninterrupted, stopped, resumed = new_mixture(), new_mixture(), new_mixture()
    expected = [uninterrupted.next(step) for step in range(12)]
    for step in range(stopped_at):
        stopped.next(step)
    resumed.restore(json.loads(json.dumps(stopped.state())))
    assert [resumed.next(step) for step in range(stopped_at, 12)] == expected[stopped_at:]


def test_a_state_is_a_copy_that_later_steps_do_not_change():
    mixture = mixture_of({"law": 1.0}, prompts_per_step=4)
    mixture.next(0)
    state = mixture.state()
    mixture.next(1)
    assert state == {"law": {"prompts": 4}}


def test_a_domain_that_joins_at_a_resume_starts_from_its_first_row():
    old = mixture_of({"law": 1.0}, prompts_per_step=4)
    old.next(0)
    mixture = mixture_of({"law": 1.0, "code": 1.0}, prompts_per_step=4)
    mixture.restore(old.state())
    assert mixture.state() == {"law": {"prompts": 4}, "code": {}}
    fresh = mixture_of({"code": 1.0}, prompts_per_step=1)
    assert next(prompt.row for prompt in mixture.next(1) if prompt.domain == "code") == fresh.next(0)[0].row


def test_a_domain_that_leaves_at_a_resume_and_comes_back_goes_on_where_it_was():
    both = mixture_of({"law": 1.0, "code": 1.0}, prompts_per_step=4)
    both.next(0)
    alone = mixture_of({"law": 1.0}, prompts_per_step=4)
    alone.restore(both.state())
    alone.next(1)
    together = mixture_of({"law": 1.0, "code": 1.0}, prompts_per_step=4)
    together.restore(json.loads(json.dumps(alone.state())))
    assert together.state() == {"law": {"prompts": 6}, "code": {"prompts": 2}}


def test_sources_are_drawn_by_their_weights():
    mixture = PromptMixture({"law": domain_of_two_sources((3.0, 1.0))}, prompts_per_step=4000, seed=0)
    drawn = Counter(prompt.row.split(":")[0] for prompt in mixture.next(0))
    assert drawn["a"] / 4000 == pytest.approx(0.75, abs=0.025)


def test_a_source_of_weight_zero_is_never_drawn():
    mixture = PromptMixture({"law": domain_of_two_sources((1.0, 0.0))}, prompts_per_step=500, seed=0)
    assert {prompt.row.split(":")[0] for prompt in mixture.next(0)} == {"a"}


def test_each_source_goes_through_all_its_rows_before_it_repeats_one():
    mixture = PromptMixture({"law": domain_of_two_sources((1.0, 1.0))}, prompts_per_step=1000, seed=0)
    drawn = [prompt.row for prompt in mixture.next(0)]
    for source, rows in (("a", 40), ("b", 60)):
        own = [row for row in drawn if row.startswith(source)]
        assert all(len(set(own[start : start + rows])) == rows for start in range(0, len(own) - rows, rows))
