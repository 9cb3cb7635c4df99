"""Files of one JSON object per line: what a kill cuts costs no other line."""

import json

import pytest

from rollout.files import append_lines, read_lines


def test_lines_are_read_as_they_were_added(tmp_path):
    append_lines(tmp_path / "f.jsonl", [{"a": 1}, {"b": "é\n"}])
    append_lines(tmp_path / "f.jsonl", [])
    append_lines(tmp_path / "f.jsonl", [{"c": None}])
    assert read_lines(tmp_path / "f.jsonl") == [{"a": 1}, {"b": "é\n"}, {"c": None}]


def test_of_no_file_there_are_no_lines(tmp_path):
    assert read_lines(tmp_path / "f.jsonl") == []


@pytest.mark.parametrize("length", range(1, len(json.dumps({"b": {"c": 1}})) + 2))
def test_a_line_that_is_cut_anywhere_costs_neither_those_before_nor_those_after(length, tmp_path):
    whole = json.dumps({"b": {"c": 1}}) + "\n"
    (tmp_path / "f.jsonl").write_text('{"a": 1}\n' + whole[:length])
    expected = [{"a": 1}] + [{"b": {"c": 1}}] * (length >= len(whole) - 1)
    assert read_lines(tmp_path / "f.jsonl") == expected
    append_lines(tmp_path / "f.jsonl", [{"d": 2}])
    assert read_lines(tmp_path / "f.jsonl") == [*expected, {"d": 2}]
