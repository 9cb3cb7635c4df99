"""Graders: completion and reference answer to a score in [0, 1]."""

import pytest

from rollout.grader_config import GraderKind
from rollout.grading import GRADERS, grade


@pytest.mark.parametrize(("completion", "score"), [("42", 1.0), (" 42\n", 1.0), ("4 2", 0.0), ("420", 0.0), ("", 0.0)])
def test_exact_compares_the_strings_without_outer_white_space(completion, score):
    assert grade(GraderKind.exact, completion, "42", "law:0") == score


def test_an_answer_with_outer_white_space_is_stripped_too():
    assert grade(GraderKind.exact, "42", " 42 ", "law:0") == 1.0


def test_a_row_without_answer_is_refused_by_name():
    with pytest.raises(ValueError, match="row law/prompts:7 has no answer"):
        grade(GraderKind.exact, "42", None, "law/prompts:7")


def test_every_grader_that_can_be_configured_exists():
    assert set(GRADERS) == set(GraderKind)
