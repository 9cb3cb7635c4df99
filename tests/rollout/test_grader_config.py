"""What `grader` may be in a domain's YAML, and the sentence for everything else."""

import pytest

from rollout.grader_config import SETTINGS, GraderConfig, GraderKind, read_grader

NAME = "domains.law.grader"
FUNCTION = "my_package.my_grader:score"


@pytest.mark.parametrize(("value", "cfg"), [
    (None, None),
    ("exact", GraderConfig()),
    (GraderKind.numeric, GraderConfig(kind=GraderKind.numeric)),
    ({"kind": "numeric", "tolerance": 1e-6, "relative_tolerance": 0}, GraderConfig(kind=GraderKind.numeric, tolerance=1e-6)),
    ({"kind": "regex", "pattern": "answer: (.*)$"}, GraderConfig(kind=GraderKind.regex, pattern="answer: (.*)$")),
    ({"kind": "json", "ignore_order": True}, GraderConfig(kind=GraderKind.json, ignore_order=True)),
    ({"kind": "python", "function": FUNCTION, "seconds": 2}, GraderConfig(kind=GraderKind.python, function=FUNCTION, seconds=2)),
])  # fmt: skip
def test_a_grader_is_read_from_a_word_or_a_mapping(value, cfg):
    assert read_grader(value, NAME) == cfg


@pytest.mark.parametrize(("value", "sentence"), [
    ("vibes", "domains.law.grader: there is no grader 'vibes'; the kinds are exact, numeric"),
    (7, "domains.law.grader: there is no grader 7"),
    (["exact"], "domains.law.grader: there is no grader ['exact']"),
    ({}, "domains.law.grader: a grader needs a kind, as in"),
    ({"tolerance": 1}, "domains.law.grader: a grader needs a kind, as in"),
    ({"kind": "numeric", "tolerence": 1}, "domains.law.grader: kind=numeric has no setting 'tolerence'; it has tolerance, relative_tolerance"),
    ({"kind": "exact", "seconds": 1}, "domains.law.grader: kind=exact has no setting 'seconds'; it has none"),
    ({"kind": "regex", "pattern": "a", "tolerance": 1}, "kind=regex has no setting 'tolerance'"),
    ({"kind": "numeric", "tolerance": -1}, "domains.law.grader.tolerance must be a number from 0, not -1"),
    ({"kind": "numeric", "tolerance": float("nan")}, "domains.law.grader.tolerance must be a number from 0, not nan"),
    ({"kind": "numeric", "relative_tolerance": "much"}, "domains.law.grader.relative_tolerance must be a number from 0, not 'much'"),
    ({"kind": "numeric", "tolerance": True}, "domains.law.grader.tolerance must be a number from 0, not True"),
    ({"kind": "json", "ignore_order": 1}, "domains.law.grader.ignore_order must be true or false, not 1"),
    ({"kind": "regex"}, "domains.law.grader: kind=regex needs a pattern, as in {kind: regex, pattern:"),
    ({"kind": "regex", "pattern": "(a"}, "domains.law.grader.pattern is no regular expression: missing ), unterminated subpattern"),
    ({"kind": "regex", "pattern": 7}, "domains.law.grader.pattern must be a regular expression, not 7"),
    ({"kind": "regex", "pattern": "(a)(b)"}, "domains.law.grader.pattern has 2 groups"),
    ({"kind": "python"}, "domains.law.grader: kind=python needs a function, as in {kind: python, function:"),
    ({"kind": "python", "function": "my_grader.score"}, "domains.law.grader.function must be module:function"),
    ({"kind": "python", "function": "my grader:score"}, "domains.law.grader.function must be module:function"),
    ({"kind": "python", "function": FUNCTION, "seconds": 0}, "domains.law.grader.seconds must be a number above 0, not 0"),
    ({"kind": "python", "function": FUNCTION, "seconds": float("inf")}, "domains.law.grader.seconds must be a number above 0, not inf"),
    ({"kind": "python", "function": FUNCTION, "memory_mib": 8}, "domains.law.grader.memory_mib must be a whole number from 64, not 8"),
    ({"kind": "python", "function": FUNCTION, "memory_mib": 100.5}, "domains.law.grader.memory_mib must be a whole number from 64, not 100.5"),
    ({"kind": "python", "function": FUNCTION, "subprocesses": "yes"}, "domains.law.grader.subprocesses must be true or false, not 'yes'"),
])  # fmt: skip
def test_what_is_no_grader_is_refused_in_one_sentence(value, sentence):
    with pytest.raises(ValueError, match=r"^domains\.law\.grader") as refusal:
        read_grader(value, NAME)
    assert sentence in str(refusal.value)
    assert "\n" not in str(refusal.value)


def test_every_kind_has_its_settings_and_every_setting_a_kind():
    assert set(SETTINGS) == set(GraderKind)
    assert {name for names in SETTINGS.values() for name in names} == set(GraderConfig.__dataclass_fields__) - {"kind"}
