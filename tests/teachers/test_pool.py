"""TeacherPool: each rollout is scored by its domain's teacher, each teacher is fetched once, and residency changes no number."""

import copy

import pytest
import torch

from rollout.config import Dtype, Experts, ModelConfig
from rollout.model import load_model
from teachers.config import DomainConfig, SignalKind, TeacherConfig, TeachersConfig
from teachers.pool import TeacherPool
from teachers.teacher import Teacher

CPU = torch.device("cpu")


def hidden_of(pool: TeacherPool, rollouts: list) -> list[torch.Tensor]:
    """The hidden states that a pool scores rollouts with."""
    return [pool.hidden(item.signal, item.rollout) for item in pool.score(rollouts)]


def assert_equal(left: list[torch.Tensor], right: list[torch.Tensor]) -> None:
    assert len(left) == len(right)
    assert all(a.shape == b.shape and torch.allclose(a, b, atol=1e-5) for a, b in zip(left, right, strict=True))


THREE = {"law": "v4", "code": "qwen", "math": "wide"}


def test_each_rollout_gets_the_signal_of_its_domains_teacher_in_order(new_pool, rollouts, folders):
    teachers = {domain: Teacher(domain, load_model(ModelConfig(model=folders[name]), domain)) for domain, name in THREE.items()}
    pool = new_pool(THREE)
    assert [item.rollout for item in pool.score(rollouts)] == rollouts
    assert_equal(hidden_of(pool, rollouts), [teachers[rollout.prompt.domain].hidden([rollout], 1000)[0] for rollout in rollouts])


def test_a_signals_teacher_names_the_head_that_belongs_to_it(new_pool, rollouts, folders):
    pool = new_pool(THREE)
    for item in pool.score(rollouts):
        head = pool.head(item.signal.teacher)
        assert torch.equal(head.weight_VD, load_model(ModelConfig(model=folders[THREE[item.rollout.prompt.domain]]), "teacher").lm_head.weight)


def test_every_teacher_is_loaded_once_however_its_rollouts_are_mixed(new_pool, rollouts):
    pool = new_pool(THREE, max_resident=1)
    pool.score(rollouts)
    assert pool.num_loads == 3


def test_no_teacher_is_loaded_before_it_is_needed(new_pool, rollouts):
    pool = new_pool(THREE)
    assert pool.num_loads == 0
    pool.score([rollout for rollout in rollouts if rollout.prompt.domain == "law"])
    assert pool.num_loads == 1


def test_two_domains_on_one_checkpoint_share_one_teacher(new_pool, rollouts):
    pool = new_pool({"law": "qwen", "code": "qwen", "math": "wide"})
    scored = pool.score(rollouts)
    assert pool.num_loads == 2
    assert len({item.signal.teacher for item in scored if item.rollout.prompt.domain != "math"}) == 1


def test_two_domains_on_one_checkpoint_get_the_signals_of_one_domain(new_pool, rollouts, random_rollouts):
    mixed = random_rollouts([("law" if i % 2 else "code", 5 + i, 9) for i in range(6)])
    single = random_rollouts([("law", 5 + i, 9) for i in range(6)])
    both = hidden_of(new_pool({"law": "v4", "code": "v4"}), mixed)
    one = hidden_of(new_pool({"law": "v4"}), single)
    assert all(torch.equal(a, b) for a, b in zip(both, one, strict=True))


@pytest.mark.parametrize("setting", [{"dtype": Dtype.bfloat16}, {"experts": Experts.eager}])
def test_one_checkpoint_in_two_settings_is_two_teachers(folders, tokenizer, rollouts, setting):
    domains = {"law": DomainConfig(teacher=TeacherConfig(model=folders["qwen"])), "code": DomainConfig(teacher=TeacherConfig(model=folders["qwen"], **setting))}
    pool = TeacherPool(domains, TeachersConfig(), tokenizer, CPU)
    scored = pool.score([rollout for rollout in rollouts if rollout.prompt.domain != "math"])
    assert len({item.signal.teacher for item in scored}) == 2


def test_swapping_two_teachers_changes_exactly_the_rows_of_their_domains(new_pool, rollouts, folders, changed_checkpoint):
    def perturb(weights: dict) -> None:
        weights["model.norm.weight"] *= 1.5

    other = str(changed_checkpoint(folders["qwen"], perturb))
    before = hidden_of(new_pool({"law": "qwen", "code": other, "math": "wide"}), rollouts)
    after = hidden_of(new_pool({"law": other, "code": "qwen", "math": "wide"}), rollouts)
    for rollout, a, b in zip(rollouts, before, after, strict=True):
        assert torch.equal(a, b) == (rollout.prompt.domain == "math")
        if rollout.prompt.domain != "math":
            factor = 1.5 if rollout.prompt.domain == "law" else 1 / 1.5
            assert torch.allclose(b, a * factor, atol=1e-5)


def test_one_resident_teacher_gives_the_same_signals_and_heads_as_all(new_pool, rollouts):
    few, all_of_them = new_pool(THREE, max_resident=1), new_pool(THREE, max_resident=3)
    for _ in range(2):
        assert all(torch.equal(a, b) for a, b in zip(hidden_of(few, rollouts), hidden_of(all_of_them, rollouts), strict=True))
        one, three = few.score(rollouts), all_of_them.score(rollouts)
        for a, b in zip(one, three, strict=True):
            assert torch.equal(few.head(a.signal.teacher).weight_VD, all_of_them.head(b.signal.teacher).weight_VD)
        assert len(few.library.weights.names()) == 1
    assert all_of_them.num_loads == 3


def test_a_resident_teacher_is_used_before_it_makes_room(new_pool, rollouts):
    pool = new_pool(THREE, max_resident=1)
    pool.score(rollouts)
    pool.score(rollouts)
    assert pool.num_loads == 3 + 2


def test_the_least_recently_used_teacher_makes_room(new_pool, rollouts):
    pool = new_pool(THREE, max_resident=2)
    for domain in ("law", "code", "law", "math"):
        pool.score([rollout for rollout in rollouts if rollout.prompt.domain == domain])
    assert pool.library.weights.names() == [pool.teacher_of["law"], pool.teacher_of["math"]]


def test_the_head_of_a_teacher_that_made_room_needs_no_reload(new_pool, rollouts):
    pool = new_pool(THREE, max_resident=1)
    scored = pool.score(rollouts)
    for item in scored:
        pool.head(item.signal.teacher)
    assert pool.num_loads == 3


@pytest.mark.parametrize("max_tokens", [1, 30, 64])
def test_the_size_of_a_scoring_forward_changes_signals_by_rounding_alone(new_pool, rollouts, max_tokens):
    assert_equal(hidden_of(new_pool(THREE, max_tokens_per_forward=max_tokens), rollouts), hidden_of(new_pool(THREE), rollouts))


def test_no_rollouts_give_no_signals(new_pool):
    pool = new_pool(THREE)
    assert pool.score([]) == []
    assert pool.num_loads == 0


def test_a_rollout_of_an_unknown_domain_is_refused_before_any_teacher_is_loaded(new_pool, rollouts, make_rollout):
    pool = new_pool(THREE)
    with pytest.raises(ValueError, match="a rollout belongs to domain 'medicine', which has no teacher in this run"):
        pool.score([*rollouts, make_rollout("medicine", [1], [2])])
    assert pool.num_loads == 0


def test_a_teacher_that_gives_nan_is_refused_by_its_domain(new_pool, rollouts, folders, changed_checkpoint):
    def poison(weights: dict) -> None:
        weights["model.norm.weight"][3] = torch.nan

    pool = new_pool({"law": "v4", "code": "qwen", "math": str(changed_checkpoint(folders["qwen"], poison))})
    with pytest.raises(ValueError, match=r"the teacher of math \(.*\) failed twice: it gave NaN or infinity on request 3"):
        pool.score(rollouts)


def test_a_checkpoint_that_lacks_weights_is_refused_at_start_up(new_pool, folders, changed_checkpoint):
    def drop(weights: dict) -> None:
        del weights["model.layers.1.mlp.gate.weight"]

    lacking = str(changed_checkpoint(folders["qwen"], drop))
    with pytest.raises(ValueError, match=r"of the teacher of code lacks 1 of the model's weights, model\.layers\.1\.mlp\.gate\.weight first"):
        new_pool({"law": "v4", "code": lacking, "math": "wide"})


def test_every_teacher_is_checked_at_start_up(new_pool, folders, changed_checkpoint):
    too_small = str(changed_checkpoint(folders["qwen"], config={"vocab_size": 40}))
    with pytest.raises(ValueError, match="the teacher of math has 40 vocabulary rows"):
        new_pool({"law": "v4", "code": "qwen", "math": too_small})


def test_scoring_leaves_the_rollouts_as_they_are(new_pool, rollouts):
    before = copy.deepcopy(rollouts)
    new_pool(THREE).score(rollouts)
    for a, b in zip(before, rollouts, strict=True):
        assert a.prompt == b.prompt
        assert torch.equal(a.completion_T, b.completion_T)


def test_a_top_k_without_a_tail_is_refused(new_pool, tokenizer):
    with pytest.raises(ValueError, match="leaves no tail"):
        new_pool(THREE, signal=SignalKind.top_k, top_k=len(tokenizer))
