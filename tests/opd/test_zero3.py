"""Partitioned weights outside of training."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional

from opd.batch import supervised_batches
from opd.config import BatchConfig
from opd.zero3 import LINEAR, parts_of


def test_without_a_graph_linear_is_torchs_own_and_with_one_it_keeps_weights_out(qwen3_moe_model, make_engine, make_config, monkeypatch):
    monkeypatch.setattr(functional, "linear", LINEAR)
    make_engine(qwen3_moe_model, make_config(stage=3))
    states, weight = torch.randn(2, 3, 4), torch.randn(5, 4, requires_grad=True)
    graph = functional.linear(states, weight).grad_fn
    assert "ZeroStage3" in graph.name()
    with torch.no_grad(), torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        found = functional.linear(states, weight=weight)
    names = {event.name for event in profile.events()}
    assert "aten::linear" in names
    assert not any("ZeroStage3" in name for name in names)
    assert torch.equal(found, LINEAR(states, weight))


def test_an_engine_after_another_replaces_nothing_twice(qwen3_moe_model, make_engine, make_config, monkeypatch):
    monkeypatch.setattr(functional, "linear", LINEAR)
    make_engine(copy.deepcopy(qwen3_moe_model), make_config(stage=3))
    first = functional.linear
    make_engine(qwen3_moe_model, make_config(stage=3))
    assert functional.linear is first


@pytest.mark.parametrize("limit", [1, 40, 100, 10**6])
def test_parts_hold_all_in_order_and_no_more_than_the_limit_unless_they_are_one(limit, monkeypatch):
    monkeypatch.setattr("opd.zero3.GATHERED_BYTES", limit)
    named = [(str(size), nn.Parameter(torch.zeros(size))) for size in (1, 4, 9, 2, 30, 1, 1)]
    parts = list(parts_of(named))
    assert [pair for part in parts for pair in part] == named
    sizes = [sum(4 * parameter.numel() for _, parameter in part) for part in parts]
    assert all(size <= limit or len(part) == 1 for size, part in zip(sizes, parts, strict=True))
    assert all(size + 4 * after[0][1].numel() > limit for size, after in zip(sizes, parts[1:], strict=False))


def test_a_walk_over_the_weights_leaves_whole_what_deepspeed_keeps_whole(qwen3_moe_model, make_engine, make_config, random_rollouts):
    """DeepSpeed keeps small parameters on every rank; one that were split again would be gathered in every forward."""
    engine = make_engine(qwen3_moe_model, make_config(stage=3))
    [batch] = supervised_batches(random_rollouts([("law", 4, 8), ("law", 6, 9)]), {"law": 0.1}, BatchConfig())
    engine.backward(engine.loss(batch, None, True)[0])
    engine.step()
    kept = engine.engine.optimizer.persistent_parameters
    statuses = [parameter.ds_status for parameter in kept]
    assert {status.name for status in statuses} == {"AVAILABLE"}
    assert engine.full_weights()
    assert [parameter.ds_status for parameter in kept] == statuses
