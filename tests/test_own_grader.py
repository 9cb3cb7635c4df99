"""A domain whose grader is a function of the user's, in a file beside the data: graded, failing by name, and held to its source at a resume."""

import json
from pathlib import Path

import pytest

from opd.__main__ import load_config
from opd.distill import distill
from opd.evaluate import evaluate
from rollout.grader_process import end_processes

DOMAIN = """# @package domains.law
teacher: {{model: {teacher}}}
prompts: {{path: law.jsonl, split: "train[:50%]"}}
held_out: {{path: law.jsonl, split: "train[50%:]"}}
grader: {{kind: python, function: "law_grader:score", seconds: 60}}
"""

GRADER = """
def score(completion, answer):
    assert isinstance(completion, str)
    return {"yes": 0.25, "no": 0.75}[answer]
"""


@pytest.fixture
def workspace(tmp_path, saved_v4, device, monkeypatch):
    """The working directory, with conf/domain/law.yaml, its prompts and its grader."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "conf" / "domain").mkdir(parents=True)
    (tmp_path / "conf" / "domain" / "law.yaml").write_text(DOMAIN.format(teacher=saved_v4))
    rows = [{"prompt": f"may I park at gate {number}?", "answer": "no" if number % 4 else "yes"} for number in range(32)]
    (tmp_path / "law.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "law_grader.py").write_text(GRADER)
    yield tmp_path
    end_processes()


def evaluated(student: Path) -> dict:
    evaluate(load_config("evaluate", ["domain=[law]", f"student.model={student}", "evaluation.max_new_tokens=6", "evaluation.decode_width=16", "run_dir=eval"]))
    return json.loads(Path("eval/evaluation.json").read_text())["domains"]["law"]


def trained(student: Path, *settings: str) -> list[dict]:
    """As a new process would: the grader's process is another one."""
    end_processes()
    distill(load_config("distill", [
        "domain=[law]", f"student.model={student}", "rollout.prompts_per_step=4", "rollout.max_new_tokens=4", "rollout.decode_width=4", "run_dir=run",
        "logger=none", "check.signal=off", "checkpoint.every=1", *settings,
    ]))  # fmt: skip
    return [json.loads(line) for line in Path("run/metrics.jsonl").read_text().splitlines()]


def test_accuracy_is_the_mean_of_the_functions_scores(workspace, saved_v4):
    """Four of the sixteen held-out answers are yes."""
    law = evaluated(saved_v4)
    assert law["student"]["accuracy"] == law["student"]["greedy"] == law["teacher"]["accuracy"] == (4 * 0.25 + 12 * 0.75) / 16


def test_a_function_that_fails_stops_the_evaluation_by_domain_row_and_reason(workspace, saved_v4):
    with (workspace / "law.jsonl").open("a") as file:
        file.write('{"prompt": "and here?", "answer": "perhaps"}\n')
    with pytest.raises(ValueError, match=r"^the grader \(law_grader:score\) failed on a completion of row law/held_out:\d+: KeyError: 'perhaps'$"):
        evaluated(saved_v4)
    assert not (workspace / "eval/evaluation.json").exists()


def test_a_run_is_taken_up_with_the_same_function_and_not_with_another_of_its_name(workspace, saved_v4):
    assert trained(saved_v4, "num_steps=1")[1]["domain/law/accuracy"] in [(0.25 * yes + 0.75 * (4 - yes)) / 4 for yes in range(5)]
    (workspace / "law_grader.py").write_text(GRADER.replace("0.75", "1.0"))
    with pytest.raises(ValueError, match=r"law: grader\.source_hash was [0-9a-f]{12} and is [0-9a-f]{12}\): restore them"):
        trained(saved_v4, "num_steps=2")
    (workspace / "law_grader.py").write_text(GRADER)
    assert [record["step"] for record in trained(saved_v4, "num_steps=2")] == [0, 1, 2]


CHANGEABLE = """
calls = 0

def score(completion, answer):
    global calls
    calls += 1
    return calls <= 32
"""


def test_an_evaluation_whose_figures_contradict_each_other_fails(workspace, saved_v4):
    """Student and teacher are one model here, whose completions the grader accepts at first and not later."""
    (workspace / "law_grader.py").write_text(CHANGEABLE)
    with pytest.raises(ValueError, match=r"law: no student can have an accuracy of 1\.000 at .* nats per completion from a teacher with 0\.000"):
        evaluated(saved_v4)
    assert json.loads(Path("eval/evaluation.json").read_text())["domains"]["law"]["certificate"]["holds"] is False
