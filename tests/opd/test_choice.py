"""Which checkpoint is chosen, and that it is not deleted."""

import json
from dataclasses import replace

import pytest

from opd import checkpoint_files as files
from opd.choice import FOLDER, Verdict, ask_to_end, choose, chosen_step, judge, take_end_request, write_choice
from opd.evaluate_config import AcceptConfig, Prefer


def domain(recovery: float | None, difference: float = 0.0, accuracy: float = 0.5, prompts: int = 100) -> dict:
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


def test_what_cannot_be_judged_is_not_accepted():
    assert judge(AcceptConfig(), 1, record(law=domain(None)), [], is_there=True).against
    ungraded = record(law=domain(None) | {"recovery": "not graded"})
    assert judge(AcceptConfig(), 1, ungraded, [], is_there=True).against
    assert not judge(AcceptConfig(prefer=Prefer.newest), 1, ungraded, [], is_there=True).against
    ungraded["domains"]["law"]["difference"] = None
    assert judge(AcceptConfig(prefer=Prefer.newest, maximum_retention_drop=0.5), 1, ungraded, ["law"], is_there=True).against


@pytest.mark.parametrize(("prefer", "expected"), [("lowest_recovery", 20), ("accuracy", 30), ("earliest", 10), ("newest", 40)])
def test_the_preferred_of_the_accepted_is_chosen_and_of_equals_the_earlier(prefer, expected):
    steps = {10: (0.90, 0.5), 20: (0.95, 0.6), 30: (0.91, 0.9), 40: (0.95, 0.9), 50: (0.99, 0.99), 60: (0.99, 0.99)}
    verdicts = [Verdict(step=step, record=record(law=domain(r, accuracy=a)), against=[], is_there=True) for step, (r, a) in steps.items()]
    verdicts[4], verdicts[5] = replace(verdicts[4], against=["bad"]), replace(verdicts[5], is_there=False)
    assert choose(AcceptConfig(prefer=Prefer(prefer)), verdicts, []).step == expected


def test_accuracy_counts_each_prompt_of_the_distilled_domains_once():
    small = record(law=domain(1.0, accuracy=1.0, prompts=10), code=domain(1.0, accuracy=0.5, prompts=90), old=domain(1.0, accuracy=1.0, prompts=900))
    even = record(law=domain(1.0, accuracy=0.6, prompts=10), code=domain(1.0, accuracy=0.6, prompts=90), old=domain(1.0, accuracy=0.0, prompts=900))
    verdicts = [Verdict(step=step, record=found, against=[], is_there=True) for step, found in enumerate((small, even))]
    assert choose(AcceptConfig(prefer=Prefer.accuracy), verdicts, ["old"]).step == 1  # 0.55 against 0.60


@pytest.fixture
def checkpoints(tmp_path):
    """RUN/checkpoints with steps 1 to 6, of which 2 is chosen."""
    for step in range(1, 7):
        (tmp_path / "checkpoints" / files.tag_of(step)).mkdir(parents=True)
        (tmp_path / "checkpoints" / files.tag_of(step) / "weights").write_text(str(step))
    (tmp_path / FOLDER).mkdir()
    write_choice(tmp_path, AcceptConfig(), [], {"step": 2, "manifest": None}, False)
    return tmp_path / "checkpoints"


def steps_in(checkpoints) -> list[int]:
    return [files.step_of(tag) for tag in files.saved_tags(checkpoints)]


def test_a_run_keeps_the_chosen_beside_its_newest(checkpoints):
    files.forget_older(checkpoints, 6, keep=2)
    assert steps_in(checkpoints) == [2, 5, 6]


def test_one_that_is_chosen_while_it_is_deleted_comes_back(checkpoints, monkeypatch):
    asked = []

    def chosen(folder):  # step 3 is chosen after the run has looked for the last time before renaming it
        asked.append(folder)
        return files.tag_of(3 if (checkpoints / f"{files.tag_of(3)}{files.GOING}").exists() else 2)

    monkeypatch.setattr(files, "_chosen", chosen)
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
    (checkpoints.parent / FOLDER / "choice.json").write_text("{")
    files.forget_older(checkpoints, 6, keep=2)
    assert steps_in(checkpoints) == [1, 2, 3, 4, 5, 6]
    assert "no older checkpoint is deleted" in caplog.text


def test_a_run_is_asked_to_end_once(tmp_path):
    (tmp_path / FOLDER).mkdir()
    assert take_end_request(tmp_path) is None
    ask_to_end(tmp_path, 40)
    assert take_end_request(tmp_path) == 40
    assert take_end_request(tmp_path) is None


def test_the_chosen_is_named_and_refused_where_there_is_none(checkpoints, tmp_path):
    assert chosen_step(checkpoints.parent) == 2
    write_choice(checkpoints.parent, AcceptConfig(), [], None, False)
    with pytest.raises(ValueError, match="no checkpoint met the rule"):
        chosen_step(checkpoints.parent)
    (checkpoints.parent / FOLDER / "choice.json").write_text(json.dumps({"schema": 9}))
    with pytest.raises(ValueError, match="schema 9"):
        chosen_step(checkpoints.parent)
    with pytest.raises(ValueError, match="no checkpoint was chosen yet"):
        chosen_step(tmp_path / "other")
