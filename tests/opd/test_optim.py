"""Learning rates over the steps, and which parameter belongs to which optimizer."""

import itertools
import math

import pytest

from opd.config import OptimConfig, OptimizerKind, Schedule
from opd.optim import learning_rate_factor, parameter_groups

NUM_STEPS = 21


def factors(schedule: Schedule, warmup_steps: int, num_steps: int = NUM_STEPS, final: float = 0.25) -> list[float]:
    cfg = OptimConfig(warmup_steps=warmup_steps, schedule=schedule, final_lr_fraction=final)
    return [learning_rate_factor(step, num_steps, cfg) for step in range(num_steps)]


@pytest.mark.parametrize("schedule", list(Schedule))
def test_the_warm_up_rises_in_equal_parts_to_the_peak(schedule):
    assert factors(schedule, warmup_steps=5)[:6] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0, 1.0])


def test_without_warm_up_the_first_step_has_the_peak():
    assert factors(Schedule.cosine, warmup_steps=0)[0] == 1.0


def test_the_constant_schedule_stays_at_the_peak():
    assert factors(Schedule.constant, warmup_steps=5)[5:] == [1.0] * (NUM_STEPS - 5)


@pytest.mark.parametrize("schedule", [Schedule.linear, Schedule.cosine])
@pytest.mark.parametrize("warmup_steps", [0, 1, 5])
def test_a_decay_ends_exactly_at_the_final_fraction_in_the_last_step(schedule, warmup_steps):
    assert factors(schedule, warmup_steps)[-1] == pytest.approx(0.25, abs=1e-12)


def test_the_linear_schedule_falls_by_equal_parts():
    decay = factors(Schedule.linear, warmup_steps=5)[5:]
    assert [a - b for a, b in itertools.pairwise(decay)] == pytest.approx([0.75 / 15] * 15)


def test_the_cosine_schedule_follows_half_a_cosine():
    decay = factors(Schedule.cosine, warmup_steps=5)[5:]
    assert decay == pytest.approx([0.25 + 0.75 * 0.5 * (1 + math.cos(math.pi * step / 15)) for step in range(16)])


@pytest.mark.parametrize("schedule", list(Schedule))
@pytest.mark.parametrize("warmup_steps", [1, 3, 10])
def test_a_run_no_longer_than_its_warm_up_keeps_to_the_warm_up(schedule, warmup_steps):
    found = factors(schedule, warmup_steps, num_steps=warmup_steps)
    assert found == pytest.approx([(step + 1) / warmup_steps for step in range(warmup_steps)])


@pytest.fixture(params=["v4", "qwen3_moe"])
def model(request, v4_model, qwen3_moe_model):
    return {"v4": v4_model, "qwen3_moe": qwen3_moe_model}[request.param]


def group_names(model, kind: OptimizerKind) -> dict[str, str]:
    """Parameter name -> group name, for parameters in a group."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    groups = parameter_groups(model, OptimConfig(kind=kind))
    return {names[id(parameter)]: group.name for group in groups for parameter in group.parameters}


@pytest.mark.parametrize("kind", list(OptimizerKind))
def test_each_trainable_parameter_is_in_exactly_one_group_and_frozen_ones_in_none(model, kind):
    members = [id(parameter) for group in parameter_groups(model, OptimConfig(kind=kind)) for parameter in group.parameters]
    assert len(members) == len(set(members))
    assert set(members) == {id(parameter) for parameter in model.parameters() if parameter.requires_grad}
    assert len(members) < len(list(model.parameters())), "the routers are frozen"


def test_muon_takes_the_matrices_between_hidden_states(model):
    muon = {name for name, group in group_names(model, OptimizerKind.muon).items() if group == "muon"}
    assert {name for name in muon if "experts" in name}
    assert {name for name in muon if "self_attn" in name}
    assert all(dict(model.named_parameters())[name].ndim in (2, 3) for name in muon)


def test_embedding_head_norms_routers_and_biases_are_never_under_muon(model):
    for parameter in model.parameters():
        parameter.requires_grad_(True)
    parts = ("embed_tokens", "lm_head", "norm", "mlp.gate.weight", "position_bias", "bias", "sinks", ".base", ".scale", "hc_base", "hc_scale")
    groups = group_names(model, OptimizerKind.muon)
    for part in parts:
        assert not [name for name, group in groups.items() if part in name and group == "muon"], part
    assert {groups[name] for name in groups if name.endswith("mlp.gate.weight")} == {"adamw"}


def test_the_gate_projections_of_expert_and_attention_are_not_taken_for_routers(model):
    groups = group_names(model, OptimizerKind.muon)
    projections = [name for name in groups if "gate_proj" in name or "gate_up_proj" in name]
    assert projections
    assert {groups[name] for name in projections} == {"muon"}


@pytest.mark.parametrize("kind", list(OptimizerKind))
def test_vectors_norms_and_position_biases_are_not_decayed(model, kind):
    decayed = {id(p) for group in parameter_groups(model, OptimConfig(kind=kind)) if group.decay for p in group.parameters}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            exempt = parameter.ndim < 2 or "position_bias" in name or "norm" in name
            assert (id(parameter) in decayed) == (not exempt), name


def test_adamw_has_no_muon_group(model):
    assert "muon" not in group_names(model, OptimizerKind.adamw).values()
