"""Alarms: each fires on what it is for and is silent beside it, once an episode, for each domain by itself, and a run that is taken up goes on as it was."""

import math
import re

import pytest

from opd.alarms import CALM_STEPS, STANDARD_ALARMS, START_STEPS, Alarm, Alarms, Condition, standard_alarms
from opd.config import DistillConfig, SpecializeConfig, StudentConfig
from rollout.config import Dtype, RolloutConfig

LOOPED = Alarm(metric="domain/D/looped", condition=Condition.above, threshold=0.05, window=1, message="loops")


def lines(caplog, alarms: Alarms, steps: list[dict[str, float]], first: int = 1) -> list[str]:
    """What is logged on these steps' metrics."""
    caplog.clear()
    for step, metrics in enumerate(steps, start=first):
        alarms.observe(step, metrics)
    return [record.getMessage() for record in caplog.records if record.name == "opd.alarms"]


def constant(**figures: float) -> list[dict[str, float]]:
    """Twenty steps with the same figures of one domain."""
    return [{f"domain/law/{name}": value for name, value in figures.items()}] * 20


def rising(name: str, start: float, end: float) -> list[dict[str, float]]:
    return constant(**{name: start})[:START_STEPS] + constant(**{name: end})


CASES = [
    ("truncated", rising("truncated", 0.08, 0.17), rising("truncated", 0.08, 0.15)),
    ("truncated", rising("truncated", 0.0, 0.11), rising("truncated", 0.01, 0.09)),
    ("looped", constant(looped=0.06), constant(looped=0.04)),
    ("length_ratio", constant(length_ratio=2.1), constant(length_ratio=1.9)),
    ("length_ratio", constant(length_ratio=0.45), constant(length_ratio=0.55)),
    ("student_entropy", constant(student_entropy=0.1, teacher_entropy=0.3), constant(student_entropy=0.2, teacher_entropy=0.3)),
    ("student_entropy", constant(student_entropy=0.02, teacher_entropy=0.06), constant(student_entropy=0.001, teacher_entropy=0.04)),
    ("token_share", constant(token_share=0.1, prompt_share_asked=0.5), constant(token_share=0.15, prompt_share_asked=0.5)),
    ("token_share", constant(token_share=0.9, prompt_share_asked=0.2), constant(token_share=0.7, prompt_share_asked=0.2)),
    ("mismatch_kl", constant(mismatch_kl=2e-3), constant(mismatch_kl=5e-4)),
]


@pytest.mark.parametrize(("metric", "wrong", "sound"), CASES)
def test_an_alarm_fires_on_what_it_is_for_and_not_beside_it(metric, wrong, sound, caplog):
    [line] = lines(caplog, Alarms(standard_alarms(DistillConfig())), wrong)
    assert re.match(rf"alarm at step \d+: domain/law/{metric} is ", line)
    assert lines(caplog, Alarms(standard_alarms(DistillConfig())), sound) == []


def test_every_alarm_has_a_case(caplog):
    for alarm in standard_alarms(DistillConfig()):
        assert [case for case in CASES if lines(caplog, Alarms([alarm]), case[1])], alarm


def test_the_line_says_where_how_much_and_against_what(caplog):
    [line] = lines(caplog, Alarms(STANDARD_ALARMS), rising("truncated", 0.1, 0.3))
    assert line.startswith("alarm at step 10: domain/law/truncated is 0.3 over 5 steps, above 2 x its mean at the start (0.1): answers no longer end")
    [line] = lines(caplog, Alarms(STANDARD_ALARMS), constant(student_entropy=0.1, teacher_entropy=0.3))
    assert line.startswith("alarm at step 5: domain/law/student_entropy is 0.1 over 5 steps, below 0.5 x domain/law/teacher_entropy (0.3): the student")


def test_an_episode_is_one_line_and_ends_after_calm_steps(caplog):
    alarms, bad, good = Alarms([LOOPED]), {"domain/law/looped": 0.1}, {"domain/law/looped": 0.0}
    hovering = [bad, good, bad, good, good, bad]
    assert len(lines(caplog, alarms, hovering)) == 1
    assert lines(caplog, alarms, [good] * (CALM_STEPS - 1) + [bad]) == []
    assert alarms.observe(20, bad) == {"alarms/active": 1}
    assert lines(caplog, alarms, [good] * CALM_STEPS) == []
    assert alarms.observe(30, good) == {"alarms/active": 0}
    assert len(lines(caplog, alarms, [bad, bad])) == 1


def test_domains_are_judged_each_for_itself(caplog):
    alarms = Alarms([LOOPED])
    found = lines(caplog, alarms, [{"domain/law/looped": 0.1, "domain/code/looped": 0.0, "evaluation/code/looped": 0.9}])
    assert [line.split()[4] for line in found] == ["domain/law/looped"]
    assert alarms.observe(2, {"domain/law/looped": 0.1, "domain/code/looped": 0.2}) == {"alarms/active": 2}


def test_the_mean_of_the_window_is_judged_and_not_before_it_is_full(caplog):
    alarm = Alarm(metric="step/loss", condition=Condition.above, threshold=1.0, window=3, message="high")
    values = [9.0, 0.0, 0.0, 0.0, 2.9, 0.2]
    means = [sum(values[index - 2 : index + 1]) / 3 for index in range(2, 6)]
    expected = [index + 3 for index, value in enumerate(means) if value > 1][:1]
    assert expected == [3]
    assert [int(line.split()[3][:-1]) for line in lines(caplog, Alarms([alarm]), [{"step/loss": value} for value in values])] == expected
    assert lines(caplog, Alarms([alarm]), [{"step/loss": 9.0}] * 2) == []


def test_steps_without_the_metric_are_no_steps_of_its_window(caplog):
    alarm = Alarm(metric="domain/D/looped", condition=Condition.above, threshold=0.05, window=2, message="loops")
    assert len(lines(caplog, Alarms([alarm]), [{"domain/law/looped": 0.1}, {}, {}, {"domain/law/looped": 0.1}])) == 1


def test_a_domain_that_is_asked_for_nothing_is_not_judged_by_its_share(caplog):
    assert lines(caplog, Alarms(STANDARD_ALARMS), constant(token_share=0.0, prompt_share_asked=0.0)) == []


def test_a_figure_that_is_not_a_number_fires_nothing(caplog):
    assert lines(caplog, Alarms(standard_alarms(DistillConfig())), constant(looped=math.nan, mismatch_kl=math.nan, student_entropy=math.nan)) == []


@pytest.mark.parametrize("cut", [1, 3, 7, 9, 12, 20])
def test_a_run_that_is_taken_up_logs_and_counts_as_one_that_was_not(cut, caplog):
    steps = rising("truncated", 0.1, 0.5) + constant(truncated=0.0, looped=0.2)
    whole = Alarms(STANDARD_ALARMS)
    expected = [[*lines(caplog, whole, [metrics], step), whole.observe(0, {})] for step, metrics in enumerate(steps, start=1)]
    resumed = Alarms(STANDARD_ALARMS)
    caplog.clear()
    resumed.replay([{"step": 0}, *({"step": step, **metrics} for step, metrics in enumerate(steps[:cut], start=1))])
    assert not caplog.records
    found = [[*lines(caplog, resumed, [metrics], step), resumed.observe(0, {})] for step, metrics in enumerate(steps[cut:], start=cut + 1)]
    assert found == expected[cut:]
    assert sum(len(part) - 1 for part in expected) == 2


@pytest.mark.parametrize(("dtype", "staleness", "threshold"), [(Dtype.float32, 0, 1e-3), (Dtype.bfloat16, 0, 1e-2), (Dtype.float32, 1, 1e-2)])
def test_how_far_sampler_and_trainer_may_differ_follows_from_the_run(dtype, staleness, threshold):
    cfg = DistillConfig(student=StudentConfig(dtype=dtype), rollout=RolloutConfig(staleness=staleness))
    [alarm] = [alarm for alarm in standard_alarms(cfg) if alarm.metric == "domain/D/mismatch_kl"]
    assert alarm.threshold == threshold


@pytest.mark.parametrize("cfg", [DistillConfig(rollout=RolloutConfig(replay="runs/other")), SpecializeConfig()])
def test_rollouts_that_this_student_did_not_sample_have_no_alarm_for_it(cfg):
    assert not [alarm for alarm in standard_alarms(cfg) if alarm.metric == "domain/D/mismatch_kl"]
