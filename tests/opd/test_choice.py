"""Which checkpoint is chosen, and that it is not deleted."""

import json
import os
import time
from dataclasses import asdict, replace

import pytest

from opd import checkpoint_files as files
from opd.checkpoint_record import chosen_step
from opd.choice import EVALUATIONS, ask_to_end, choose, claim, judge, release, rule_of, take_end_request, write_choice
from opd.comparison import paired_difference
from opd.evaluate_config import AcceptConfig, Prefer
from opd.run_state import begin_state, end_state, read_state


def domain(recovery: float | None, difference: float = 0.0, accuracy: float | None = 0.5, prompts: int = 100) -> dict:
    """What a comparison says of a domain, its intervals 0.02 to each side."""

    def interval(value):
        return {"value": value, "low": value - 0.02, "high": value + 0.02}

    return {
        "recovery": None if recovery is None else interval(recovery),
        "difference": interval(difference),
        "student": {"accuracy": accuracy, "prompts": prompts},
    }


def record(**domains) -> dict:
    values = [part["recovery"]["value"] for part in domains.values() if isinstance(part["recovery"], dict)]
    return {"domains": domains, "min_recovery": min(values, default=None)}


@pytest.mark.parametrize(
    ("rule", "expected"),
    [
        (AcceptConfig(), []),
        (AcceptConfig(minimum_recovery=0.94), []),
        (AcceptConfig(minimum_recovery=0.95), ["recovery of law at least 0.940 < 0.95"]),
        (AcceptConfig(minimum_recovery=0.95, confident=False), []),
        (AcceptConfig(minimum_recovery=0.97, confident=False), ["recovery of law 0.960 < 0.97"]),
        (AcceptConfig(maximum_retention_drop=0.04), []),
        (AcceptConfig(maximum_retention_drop=0.02), ["drop of old at most 0.030 > 0.02"]),
        (AcceptConfig(maximum_retention_drop=0.02, confident=False), []),
    ],
)
def test_bounds_hold_at_the_worse_end_or_for_the_figure_itself(rule, expected):
    found = record(law=domain(0.96), code=domain(0.99), old=domain(None, difference=-0.01) | {"recovery": "no teacher"})
    assert judge(rule, 10, found, ["old"], is_there=True).against == expected


@pytest.mark.parametrize(("prompts", "is_accepted"), [(16, False), (59, False), (73, True), (256, True)])
def test_what_is_retained_on_every_one_of_few_prompts_may_still_have_dropped(prompts, is_accepted):
    found = record(old=domain(None) | {"recovery": "no teacher", "difference": asdict(paired_difference([1.0] * prompts, [1.0] * prompts))})
    rule = AcceptConfig(maximum_retention_drop=0.05, prefer=Prefer.newest)
    assert (not judge(rule, 1, found, ["old"], is_there=True).against) == is_accepted
    assert not judge(replace(rule, confident=False), 1, found, ["old"], is_there=True).against


def test_what_cannot_be_judged_is_not_accepted():
    assert judge(AcceptConfig(), 1, record(law=domain(None)), [], is_there=True).against
    ungraded = record(law=domain(None, accuracy=None) | {"recovery": "not graded"})
    assert judge(AcceptConfig(), 1, ungraded, [], is_there=True).against
    assert judge(AcceptConfig(prefer=Prefer.accuracy), 1, ungraded, [], is_there=True).against
    assert not judge(AcceptConfig(prefer=Prefer.newest), 1, ungraded, [], is_there=True).against
    ungraded["domains"]["law"]["difference"] = None
    assert judge(AcceptConfig(prefer=Prefer.newest, maximum_retention_drop=0.5), 1, ungraded, ["law"], is_there=True).against


@pytest.mark.parametrize(("prefer", "expected"), [("lowest_recovery", 20), ("accuracy", 30), ("earliest", 10), ("newest", 40)])
def test_the_preferred_of_the_accepted_is_chosen_and_of_equals_the_earlier(prefer, expected):
    steps = {10: (0.90, 0.5), 20: (0.95, 0.6), 30: (0.91, 0.9), 40: (0.95, 0.9), 50: (0.99, 0.99), 60: (0.99, 0.99)}
    verdicts = [judge(AcceptConfig(), step, record(law=domain(r, accuracy=a)), [], is_there=True) for step, (r, a) in steps.items()]
    verdicts[4], verdicts[5] = replace(verdicts[4], against=["bad"]), replace(verdicts[5], is_there=False)
    assert choose(AcceptConfig(prefer=Prefer(prefer)), verdicts).step == expected


def test_without_teachers_accuracy_ranks():
    found = [record(law=domain(None, accuracy=accuracy) | {"recovery": "no teacher"}) for accuracy in (0.5, 0.7, 0.6)]
    assert choose(AcceptConfig(), [judge(AcceptConfig(), step, each, [], is_there=True) for step, each in enumerate(found)]).step == 1


def test_accuracy_counts_each_prompt_of_the_distilled_domains_once():
    small = record(law=domain(1.0, accuracy=1.0, prompts=10), code=domain(1.0, accuracy=0.5, prompts=90), old=domain(1.0, accuracy=1.0, prompts=900))
    even = record(law=domain(1.0, accuracy=0.6, prompts=10), code=domain(1.0, accuracy=0.6, prompts=90), old=domain(1.0, accuracy=0.0, prompts=900))
    verdicts = [judge(AcceptConfig(), step, found, ["old"], is_there=True) for step, found in enumerate((small, even))]
    assert choose(AcceptConfig(prefer=Prefer.accuracy), verdicts).step == 1  # 0.55 against 0.60


@pytest.fixture
def checkpoints(tmp_path):
    """RUN/checkpoints with steps 1 to 6, of which 2 is chosen."""
    for step in range(1, 7):
        (tmp_path / "checkpoints" / files.tag_of(step)).mkdir(parents=True)
        (tmp_path / "checkpoints" / files.tag_of(step) / "weights").write_text(str(step))
    (tmp_path / EVALUATIONS).mkdir()
    write_choice(tmp_path, AcceptConfig(), "asked", [], {"step": 2, "manifest": None}, None)
    return tmp_path / "checkpoints"


def steps_in(checkpoints) -> list[int]:
    return [files.step_of(tag) for tag in files.saved_tags(checkpoints)]


def test_a_run_keeps_the_chosen_beside_its_newest(checkpoints):
    files.forget_older(checkpoints, 6, keep=2)
    assert steps_in(checkpoints) == [2, 5, 6]


def test_a_run_keeps_the_one_that_is_being_evaluated_as_long_as_the_evaluation_lives(checkpoints):
    claim(checkpoints.parent, 3, None)
    (checkpoints.parent / EVALUATIONS / ".lock").touch()
    files.forget_older(checkpoints, 6, keep=1)
    assert steps_in(checkpoints) == [2, 3, 6]
    claim(checkpoints.parent, 6, None)
    files.forget_older(checkpoints, 6, keep=1)
    assert steps_in(checkpoints) == [2, 6]


@pytest.mark.parametrize("ending", ["killed", "released", "written anew"])
def test_what_is_no_longer_being_evaluated_goes(checkpoints, ending):
    claim(checkpoints.parent, 3, "of another" if ending == "written anew" else None)
    lock_file = checkpoints.parent / EVALUATIONS / ".lock"
    lock_file.touch()
    if ending == "killed":
        os.utime(lock_file, (time.time() - 120,) * 2)
    if ending == "released":
        release(checkpoints.parent)
    files.forget_older(checkpoints, 6, keep=1)
    assert steps_in(checkpoints) == [2, 6]


def test_one_that_is_chosen_while_it_is_deleted_comes_back(checkpoints, monkeypatch):
    def is_chosen(checkpoint, tag):  # step 3 is chosen after the run has looked for the last time before renaming it
        return tag == files.tag_of(3 if (checkpoints / f"{files.tag_of(3)}{files.GOING}").exists() else 2)

    monkeypatch.setattr(files, "_is_kept", is_chosen)
    files.forget_older(checkpoints, 6, keep=2)
    assert 3 in steps_in(checkpoints)
    assert not list(checkpoints.glob(f"*{files.GOING}"))


def test_what_a_kill_left_half_deleted_goes_or_comes_back(checkpoints):
    for step in (1, 2):
        (checkpoints / files.tag_of(step)).rename(checkpoints / f"{files.tag_of(step)}{files.GOING}")
    files.forget_older(checkpoints, 6, keep=2)
    assert steps_in(checkpoints) == [2, 5, 6]
    assert not list(checkpoints.glob(f"*{files.GOING}"))


def test_nothing_is_deleted_where_nobody_knows_what_is_chosen(checkpoints, caplog):
    (checkpoints.parent / EVALUATIONS / "choice.json").write_text("{")
    files.forget_older(checkpoints, 6, keep=2)
    assert steps_in(checkpoints) == [1, 2, 3, 4, 5, 6]
    assert "no older checkpoint is deleted" in caplog.text


def test_a_run_is_asked_to_end_once(tmp_path):
    (tmp_path / EVALUATIONS).mkdir()
    begin_state(tmp_path, "distill", 100)
    assert take_end_request(tmp_path) is None
    ask_to_end(tmp_path, 40, read_state(tmp_path).begun)
    assert take_end_request(tmp_path) == 40
    assert take_end_request(tmp_path) is None
    end_state(0, None)


def test_another_start_of_the_run_does_not_heed_it(tmp_path):
    (tmp_path / EVALUATIONS).mkdir()
    begin_state(tmp_path, "distill", 100)
    ask_to_end(tmp_path, 40, read_state(tmp_path).begun)
    end_state(0, None)
    begin_state(tmp_path, "distill", 200)
    assert take_end_request(tmp_path) is None
    assert not list((tmp_path / EVALUATIONS).iterdir())
    end_state(0, None)


def test_a_checkpoint_that_was_written_again_is_not_the_chosen_one(checkpoints):
    (checkpoints / files.tag_of(2) / files.MANIFEST).write_text("{}")
    with pytest.raises(ValueError, match="step 2 was written again since it was chosen"):
        chosen_step(checkpoints.parent)
    files.forget_older(checkpoints, 6, keep=2)
    assert steps_in(checkpoints) == [5, 6]


def test_steps_of_seven_digits_are_newer_than_those_of_six(checkpoints):
    (checkpoints / files.tag_of(1_000_000)).mkdir()
    assert steps_in(checkpoints)[-1] == 1_000_000
    files.forget_older(checkpoints, 1_000_000, keep=1)
    assert steps_in(checkpoints) == [2, 1_000_000]


def test_a_choice_names_its_rule(checkpoints):
    rule = AcceptConfig(minimum_recovery=0.9, prefer=Prefer.earliest)
    write_choice(checkpoints.parent, rule, "asked", [], None, None)
    assert rule_of(json.loads((checkpoints.parent / EVALUATIONS / "choice.json").read_text())) == rule


def test_the_chosen_is_named_and_refused_where_there_is_none(checkpoints, tmp_path):
    assert chosen_step(checkpoints.parent) == 2
    write_choice(checkpoints.parent, AcceptConfig(), "asked", [], None, None)
    with pytest.raises(ValueError, match="no checkpoint met the rule"):
        chosen_step(checkpoints.parent)
    (checkpoints.parent / EVALUATIONS / "choice.json").write_text(json.dumps({"schema": 9}))
    with pytest.raises(ValueError, match="schema 9"):
        chosen_step(checkpoints.parent)
    with pytest.raises(ValueError, match="no checkpoint was chosen yet"):
        chosen_step(tmp_path / "other")
