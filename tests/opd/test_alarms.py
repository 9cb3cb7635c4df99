"""Alarms: each fires on what it is for and is silent beside it, once an episode, for each domain by itself, and a run that is taken up goes on as it was."""

import functools
import math
import random
import re

import pytest

from opd.__main__ import load_config
from opd.alarm_config import LEAST_HALVES, AlarmAction, AlarmCondition, AlarmRule, check_alarms, documented_metrics
from opd.alarms import CALM_STEPS, START_STEPS, Alarms, rules_of
from opd.config import DistillConfig
from opd.signal_check import refusals
from opd.signal_figures import SignalFigures

LOOPED = AlarmRule(metric="domain/D/looped", threshold=0.05, window=1, message="loops")
SHIPPED = load_config("distill", []).alarms.rules


@functools.cache
def distill_config(*overrides: str) -> DistillConfig:
    """Shared by the tests, which do not change it."""
    return load_config("distill", list(overrides))


def watch(*names: str) -> Alarms:
    """The alarms that ship, or some of them, as a run in float32 has them."""
    rules = rules_of(distill_config())
    return Alarms({name: rules[name] for name in names or rules})


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


def moving(**figures: tuple[float, float]) -> list[dict[str, float]]:
    """Ten steps, then ten others; law_accuracy=(0.5, 0.8) is domain law's in both."""
    halves = [{f"domain/{name.replace('_', '/', 1)}": values[half] for name, values in figures.items()} for half in (0, 1)]
    return halves[:1] * 10 + halves[1:] * 10


def sliding(start: float, slope: float) -> list[dict[str, float]]:
    """Twenty steps on which the overlap changes evenly."""
    return [{"domain/law/overlap": start + slope * step} for step in range(20)]


def only_wrong(steps: list[dict[str, float]]) -> list[dict[str, float]]:
    """The same, but on every second step no rollout was right."""
    return [step if number % 2 else {name: step[name] for name in step if not name.endswith("right")} for number, step in enumerate(steps)]


CASES = [
    ("truncated", rising("truncated", 0.08, 0.17), rising("truncated", 0.08, 0.15)),
    ("truncated", rising("truncated", 0.0, 0.11), rising("truncated", 0.01, 0.09)),
    ("looped", constant(looped=0.06), constant(looped=0.04)),
    ("too_long", constant(length_ratio=2.1), constant(length_ratio=1.9)),
    ("too_short", constant(length_ratio=0.45), constant(length_ratio=0.55)),
    ("entropy", constant(student_entropy=0.1, teacher_entropy=0.3), constant(student_entropy=0.2, teacher_entropy=0.3)),
    ("entropy", constant(student_entropy=0.02, teacher_entropy=0.06), constant(student_entropy=0.001, teacher_entropy=0.04)),
    ("few_tokens", constant(token_share=0.1, prompt_share_asked=0.5), constant(token_share=0.15, prompt_share_asked=0.5)),
    ("many_tokens", constant(token_share=0.9, prompt_share_asked=0.2), constant(token_share=0.7, prompt_share_asked=0.2)),
    ("mismatch", constant(mismatch_kl=2e-3), constant(mismatch_kl=5e-4)),
    ("mismatch_token", constant(mismatch_p99=1.7), constant(mismatch_p99=1.5, mismatch_max=9.0)),
    ("negative_kl", constant(kl_per_token=-1e-4), constant(kl_per_token=-1e-7)),
    ("overlap", sliding(0.8, -0.005), sliding(0.8, -0.003)),
    ("overlap", moving(law_overlap=(0.7, 0.65)), moving(law_overlap=(0.65, 0.7))),
    ("left_behind", moving(law_kl_per_sequence=(1.0, 1.6), code_kl_per_sequence=(2, 1)), moving(law_kl_per_sequence=(1.0, 1.4), code_kl_per_sequence=(2, 1))),
    ("left_behind", moving(law_kl_per_sequence=(1.0, 1.6), code_kl_per_sequence=(2, 1)), moving(law_kl_per_sequence=(1.0, 1.6), code_kl_per_sequence=(1, 2))),
    ("style_only", moving(law_kl_per_token=(0.2, 0.1), law_accuracy=(0.5, 0.505)), moving(law_kl_per_token=(0.2, 0.1), law_accuracy=(0.5, 0.6))),
    ("style_only", moving(law_kl_per_token=(0.2, 0.1), law_accuracy=(0.5, 0.505)), moving(law_kl_per_token=(0.2, 0.1), law_accuracy=(0.99, 0.99))),
    ("teacher_noise", constant(log_ratio_right=0.49, log_ratio_wrong=0.5), constant(log_ratio_right=0.4, log_ratio_wrong=0.5)),
    ("teacher_noise", constant(log_ratio_right=0.51, log_ratio_wrong=0.5), constant(log_ratio_right=0.6, log_ratio_wrong=0.5)),
    ("teacher_noise", constant(log_ratio_right=0.5, log_ratio_wrong=0.5), only_wrong(constant(log_ratio_right=0.5, log_ratio_wrong=0.5))),
    ("teacher_noise", constant(log_ratio_right=0.5, log_ratio_wrong=0.5), constant(log_ratio_right=0.005, log_ratio_wrong=0.005)),
    ("skipped", [{"optim/skipped_steps": 1.0}], [{"optim/skipped_steps": 0.0}]),
]
"""An alarm that ships, steps on which it fires, steps beside them on which it does not."""

SECTION_8 = {
    "negative KL (top-k bug)": ("negative_kl", "domain/D/kl_per_token", "below", -1e-5, None),
    "truncation x2": ("truncated", "domain/D/truncated", "ratio_to_start", 2.0, None),
    "entropy < .5 teacher's": ("entropy", "domain/D/student_entropy", "below", 0.5, "domain/D/teacher_entropy"),
    "ratio p99 > 5": ("mismatch_token", "domain/D/mismatch_p99", "above", 1.61, None),
    "share of any domain < 1/4 target": ("few_tokens", "domain/D/token_share", "below", 0.25, "domain/D/prompt_share_asked"),
    "share of any domain > 4x target": ("many_tokens", "domain/D/token_share", "above", 4.0, "domain/D/prompt_share_asked"),
    "overlap falling for 20 updates": ("overlap", "domain/D/overlap", "falling", 0.95, None),
    "kappa rising in one domain while falling in the rest": ("left_behind", "domain/D/kl_per_sequence", "rising_alone", 1.5, None),
    "loss falls while accuracy flat": ("style_only", "domain/D/kl_per_token", "falling_while_flat", 0.8, "domain/D/accuracy"),
    "all |r| on correct/incorrect equal": ("teacher_noise", "domain/D/log_ratio_right", "equal", 0.05, "domain/D/log_ratio_wrong"),
}
"""The alarms that section 8 of the project's survey of distillation lists, and the rule that is each; "self-teacher loss > 1e-4" is a refusal at the start."""


@pytest.mark.parametrize(("name", "wrong", "sound"), CASES)
def test_an_alarm_fires_on_what_it_is_for_and_not_beside_it(name, wrong, sound, caplog):
    [line] = lines(caplog, watch(name), wrong)
    assert re.match(r"alarm at step \d+: (domain/law/|optim/)\w+ is ", line)
    assert SHIPPED[name].message in line
    assert lines(caplog, watch(name), sound) == []


def test_every_alarm_that_ships_has_a_case_and_says_what_helps():
    assert {name for name, _, _ in CASES} == set(SHIPPED)
    assert all(len(rule.message) > 40 for rule in SHIPPED.values())


def test_the_alarms_of_the_surveys_section_8_ship():
    shipped = {name: (name, rule.metric, rule.condition.value, rule.threshold, rule.relative_to) for name, rule in SHIPPED.items()}
    assert [shipped.get(row[0]) for row in SECTION_8.values()] == list(SECTION_8.values())
    assert math.log(5) == pytest.approx(SHIPPED["mismatch_token"].threshold, abs=1e-3)
    assert SHIPPED["overlap"].window == 20


@pytest.mark.parametrize(("self_kl", "is_refused"), [(2e-4, True), (5e-5, False), (math.nan, True)])
def test_a_self_teacher_loss_above_1e_4_is_refused_at_the_start(self_kl, is_refused):
    fields = dict.fromkeys(SignalFigures.__slots__) | {"self_kl": self_kl}
    found = refusals("arithmetic", SignalFigures(**fields), distill_config("domain=[arithmetic]"), 100)
    assert [("away from itself" in sentence) for sentence in found] == [True] * is_refused


def test_the_line_says_where_how_much_and_against_what(caplog):
    [line] = lines(caplog, watch(), rising("truncated", 0.1, 0.3))
    assert line.startswith("alarm at step 10: domain/law/truncated is 0.3 over 5 steps, above 2 x its mean at the start (0.1): answers no longer end")
    [line] = lines(caplog, watch(), constant(student_entropy=0.1, teacher_entropy=0.3))
    assert line.startswith("alarm at step 5: domain/law/student_entropy is 0.1 over 5 steps, below 0.5 x domain/law/teacher_entropy (0.3): the student")


def test_an_episode_is_one_line_and_ends_after_calm_steps(caplog):
    alarms, bad, good = Alarms({"looped": LOOPED}), {"domain/law/looped": 0.1}, {"domain/law/looped": 0.0}
    hovering = [bad, good, bad, good, good, bad]
    assert len(lines(caplog, alarms, hovering)) == 1
    assert lines(caplog, alarms, [good] * (CALM_STEPS - 1) + [bad]) == []
    assert alarms.observe(20, bad) == {"alarms/active": 1}
    assert lines(caplog, alarms, [good] * CALM_STEPS) == []
    assert alarms.observe(30, good) == {"alarms/active": 0}
    assert len(lines(caplog, alarms, [bad, bad])) == 1


def test_domains_are_judged_each_for_itself(caplog):
    alarms = Alarms({"looped": LOOPED})
    found = lines(caplog, alarms, [{"domain/law/looped": 0.1, "domain/code/looped": 0.0, "evaluation/code/looped": 0.9}])
    assert [line.split()[4] for line in found] == ["domain/law/looped"]
    assert alarms.observe(2, {"domain/law/looped": 0.1, "domain/code/looped": 0.2}) == {"alarms/active": 2}


def test_the_mean_of_the_window_is_judged_and_not_before_it_is_full(caplog):
    alarm = AlarmRule(metric="step/loss", threshold=1.0, window=3, message="high")
    values = [9.0, 0.0, 0.0, 0.0, 2.9, 0.2]
    means = [sum(values[index - 2 : index + 1]) / 3 for index in range(2, 6)]
    expected = [index + 3 for index, value in enumerate(means) if value > 1][:1]
    assert expected == [3]
    assert [int(line.split()[3][:-1]) for line in lines(caplog, Alarms({"high": alarm}), [{"step/loss": value} for value in values])] == expected
    assert lines(caplog, Alarms({"high": alarm}), [{"step/loss": 9.0}] * 2) == []


def test_steps_without_the_metric_are_no_steps_of_its_window(caplog):
    alarm = AlarmRule(metric="domain/D/looped", threshold=0.05, window=2, message="loops")
    assert len(lines(caplog, Alarms({"high": alarm}), [{"domain/law/looped": 0.1}, {}, {}, {"domain/law/looped": 0.1}])) == 1


def test_a_domain_that_is_asked_for_nothing_is_not_judged_by_its_share(caplog):
    assert lines(caplog, watch(), constant(token_share=0.0, prompt_share_asked=0.0)) == []


def test_a_figure_that_is_not_a_number_fires_nothing(caplog):
    assert lines(caplog, watch(), constant(looped=math.nan, mismatch_kl=math.nan, student_entropy=math.nan)) == []


def spread(steps: int, seed: int) -> list[dict[str, float]]:
    """Steps of a sound run: one domain's divergence is spread as an exponential distribution is, the other's falls a little."""
    generator = random.Random(seed)
    return [{"domain/law/kl_per_sequence": generator.expovariate(3.0), "domain/code/kl_per_sequence": 1 - step / 1e4} for step in range(steps)]


def test_halves_that_differ_by_chance_fire_a_tenth_as_often_as_their_means_pass_the_threshold_or_less(caplog):
    fired, passed = 0, 0
    for seed in range(5):
        steps = spread(500, seed)
        values = [step["domain/law/kl_per_sequence"] for step in steps]
        halves = [(sum(values[end - 20 : end - 10]), sum(values[end - 10 : end])) for end in range(20, 501)]
        is_past = [after > 1.5 * before for before, after in halves]
        passed += sum(now and not any(is_past[max(0, index - CALM_STEPS) : index]) for index, now in enumerate(is_past))
        fired += len([line for line in lines(caplog, watch("left_behind"), steps) if "/law/" in line])
    assert passed > 50
    assert fired <= passed / 10


@pytest.mark.parametrize(
    "worse",
    [
        pytest.param(lambda step: 3.0 if step else 1.0, id="leaps"),
        pytest.param(lambda step: 1 + 0.1 * step, id="evenly"),
        pytest.param(lambda step: 1.1**step, id="slowly_ever_faster"),
        pytest.param(lambda step: 3.0**step, id="ever_faster"),
        pytest.param(lambda step: 1e40**step if step < 8 else math.inf, id="beyond_numbers"),
    ],
)
def test_a_domain_that_becomes_worse_by_more_than_its_noise_is_told(worse, caplog):
    generator = random.Random(0)
    values = [0.3 * worse(max(0, step - 30)) * generator.gauss(1.0, 0.2) for step in range(70)]
    steps = [{"domain/law/kl_per_sequence": value, "domain/code/kl_per_sequence": 1 - step / 1e4} for step, value in enumerate(values)]
    [line] = lines(caplog, watch("left_behind"), steps)
    assert 30 < int(line.split()[3][:-1]) <= 42


def test_the_shortest_window_of_halves_is_long_enough_for_a_steady_rise(caplog):
    rule = AlarmRule(metric="domain/D/overlap", condition=AlarmCondition.falling, threshold=0.9, window=LEAST_HALVES, message="falls")
    steps = [{"domain/law/overlap": 1 - 0.05 * step} for step in range(LEAST_HALVES)]
    assert len(lines(caplog, Alarms({"falls": rule}), steps)) == 1


def test_the_line_of_halves_has_the_later_mean_and_the_domains_own_other_metric(caplog):
    [line] = lines(caplog, watch("style_only"), moving(law_kl_per_token=(0.2, 0.1), law_accuracy=(0.5, 0.505)))
    words = r"step (\d+): domain/law/kl_per_token is ([\d.]+) over 10 of 20 steps, down from 0.2 while domain/law/accuracy stays at 0.50"
    step, value = re.search(words, line).groups()
    new = int(step) - 10  # of the later ten
    assert float(value) == pytest.approx((0.1 * new + 0.2 * (10 - new)) / 10, abs=1e-3)


@pytest.mark.parametrize(
    ("metric", "written", "other"),
    [
        ("teacher/T/gradient_share", "teacher/law+code/gradient_share", "teacher/law+code/entropy"),
        ("conflict/T/U/gradient_cosine", "conflict/law/code/gradient_cosine", "conflict/law/gradient_cosine"),
        ("router/layer_LL/dead_experts", "router/layer_03/dead_experts", "router/layer_03/load_entropy"),
        ("seconds/PHASE", "seconds/score", "seconds/step"),
        ("balance/PHASE", "balance/update", "balance/update_positions"),
    ],
)
def test_each_letter_stands_for_whatever_is_in_its_place(metric, written, other, caplog):
    alarms = Alarms({"high": AlarmRule(metric=metric, threshold=0.5, window=1, message="high")})
    assert [line.split()[4] for line in lines(caplog, alarms, [{written: 1.0, other: 1.0}])] == [written]


def test_a_letter_is_the_same_in_what_a_metric_is_held_against(caplog):
    rule = AlarmRule(metric="teacher/T/entropy", relative_to="teacher/T/kl_per_token", threshold=1.0, window=1, message="high")
    metrics = {"teacher/law/entropy": 1.0, "teacher/law/kl_per_token": 2.0, "teacher/code/entropy": 1.0, "teacher/code/kl_per_token": 0.5}
    assert [line.split()[4] for line in lines(caplog, Alarms({"high": rule}), [metrics])] == ["teacher/code/entropy"]


@pytest.mark.parametrize("cut", [1, 3, 7, 9, 12, 20])
def test_a_run_that_is_taken_up_logs_and_counts_as_one_that_was_not(cut, caplog):
    steps = rising("truncated", 0.1, 0.5) + constant(truncated=0.0, looped=0.2)
    whole = watch()
    expected = [[*lines(caplog, whole, [metrics], step), whole.observe(0, {})] for step, metrics in enumerate(steps, start=1)]
    resumed = watch()
    caplog.clear()
    resumed.replay([{"step": 0}, *({"step": step, **metrics} for step, metrics in enumerate(steps[:cut], start=1))])
    assert not caplog.records
    found = [[*lines(caplog, resumed, [metrics], step), resumed.observe(0, {})] for step, metrics in enumerate(steps[cut:], start=cut + 1)]
    assert found == expected[cut:]
    assert sum(len(part) - 1 for part in expected) == 2


@pytest.mark.parametrize(
    ("overrides", "threshold"), [([], 1e-3), (["student.dtype=bfloat16"], 1e-2), (["rollout.staleness=1", "rollout.sampler=service"], 1e-2)]
)
def test_how_far_sampler_and_trainer_may_differ_follows_from_the_run(overrides, threshold):
    assert rules_of(distill_config(*overrides))["mismatch"].threshold == threshold


def test_rollouts_that_this_student_did_not_sample_have_no_alarm_for_it():
    for cfg in (distill_config("rollout.replay=runs/other"), load_config("specialize", [])):
        assert not {"mismatch", "mismatch_token"} & set(rules_of(cfg))


def test_an_estimate_of_a_divergence_may_be_negative():
    assert "negative_kl" not in rules_of(distill_config("teachers.signal=sampled_token"))


def test_a_rule_is_changed_dropped_and_added_on_the_command_line():
    own = "+alarms.rules.slow={metric: seconds/step, threshold: 60.0, message: slow}"
    rules = distill_config("alarms.rules.looped.action=stop", "~alarms.rules.truncated", own).alarms.rules
    assert (rules["looped"].action, "truncated" in rules, rules["slow"].threshold) == (AlarmAction.stop, False, 60.0)
    assert distill_config("alarms=none").alarms.enabled is False
    assert rules_of(distill_config("alarms.enabled=false")) == {}


@pytest.mark.parametrize(
    ("override", "sentence"),
    [
        ("alarms.rules.looped.metric=domain/D/loped", r"alarms.rules.looped.metric='domain/D/loped' is no metric \(did you mean 'domain/D/looped'\?\)"),
        ("alarms.rules.looped.window=0", "alarms.rules.looped.window must be at least 1, not 0"),
        ("alarms.rules.left_behind.window=9", "alarms.rules.left_behind.window must be at least 10, not 9"),
        ("alarms.rules.looped.threshold=null", "alarms.rules.looped has no threshold"),
        ("alarms.rules.looped.action=explode", "alarms.rules.looped.action"),
        ("alarms.rules.looped.metric=check/D/accuracy", "is measured before the first step alone"),
        ("alarms.rules.style_only.relative_to=teacher/T/entropy", r"has a letter that domain/D/kl_per_token has not \(T\)"),
        ("alarms.rules.style_only.relative_to=null", "needs relative_to, the metric that ought to rise"),
        ("alarms.rules.teacher_noise.relative_to=null", "needs relative_to, the metric that ought to differ"),
        ("alarms.command=\"'say\"", "is no command"),
    ],
)
def test_a_rule_that_could_not_fire_is_refused(override, sentence):
    with pytest.raises(ValueError, match=sentence):
        distill_config(override)


def test_every_metric_that_a_run_writes_may_be_watched(golden_dir):
    written = [line.strip() for name in ("metrics_names.txt", "metrics_names_grpo.txt") for line in (golden_dir / name).read_text().splitlines() if "/" in line]
    letters = {re.sub(r"/layer_\w+/", "/layer_LL/", name) for name in written}
    missing = [name for name in letters if name not in documented_metrics() and not re.search(r"_(low|high)$|/PHASE$|^(seconds|balance)/", name)]
    assert missing == []
    check_alarms(distill_config().alarms)
