"""Schedules: a number, or numbers that hold from a step on."""

import math

import pytest
from omegaconf import OmegaConf

from rollout.config import schedule_value


def test_a_number_holds_at_every_step():
    assert [schedule_value(0.25, step, "share") for step in (0, 1, 1000)] == [0.25] * 3


def test_an_integer_becomes_a_float():
    assert isinstance(schedule_value(2, 0, "share"), float)


def test_a_schedule_holds_each_value_from_its_step_until_the_next():
    schedule = {10: 0.5, 0: 1.0, 20: 0}
    for step in range(40):
        assert schedule_value(schedule, step, "share") == (1.0 if step < 10 else 0.5 if step < 20 else 0.0)


def test_steps_may_be_written_as_text():
    assert schedule_value({"0": 1.0, "200": 0.5}, 200, "share") == 0.5


def test_a_schedule_of_omegaconf_reads_as_a_dictionary():
    assert schedule_value(OmegaConf.create({0: 1.0, 3: 0.5}), 4, "share") == 0.5


@pytest.mark.parametrize("value", [-0.1, math.nan, math.inf, True, "1.0", None, [1.0], {0: -1.0}, {0: None}, {0: 1.0, 5: math.nan}])
def test_anything_but_a_finite_number_from_zero_on_is_refused_by_name(value):
    with pytest.raises(ValueError, match=r"domains\.law\.prompts\.share must be a number >= 0"):
        schedule_value(value, 0, "domains.law.prompts.share")


@pytest.mark.parametrize("schedule", [{5: 1.0}, {}, {-1: 1.0, 0: 1.0}])
def test_a_schedule_that_does_not_begin_at_step_zero_is_refused(schedule):
    with pytest.raises(ValueError, match="the schedule share must begin at step 0"):
        schedule_value(schedule, 0, "share")
