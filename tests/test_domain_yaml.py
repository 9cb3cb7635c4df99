"""A domain added by one YAML file over a JSON-lines file and a local checkpoint, as the README says it is done."""

import json
import re

import pytest

from opd.__main__ import load_config
from opd.distill import distill
from opd.evaluate import evaluate

DOMAIN = """# @package domains.law
teacher: {{model: {teacher}}}
prompts:
  path: law.jsonl
  split: train[:50%]
  columns: {{prompt: question}}
  system_prompt: be brief
held_out: {{path: law.jsonl, split: "train[50%:]", columns: {{prompt: question}}}}
"""


@pytest.fixture
def workspace(tmp_path, saved_v4, device, monkeypatch):
    """The working directory, with conf/domain/law.yaml and its prompts; the package's own conf/ stays as it is."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "conf" / "domain").mkdir(parents=True)
    (tmp_path / "conf" / "domain" / "law.yaml").write_text(DOMAIN.format(teacher=saved_v4))
    rows = [{"question": f"may I park at gate {number}?"} for number in range(40)]
    (tmp_path / "law.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path


def test_a_domain_of_one_yaml_is_distilled_beside_a_shipped_one(workspace, saved_v4):
    distill(load_config("distill", [
        "domain=[arithmetic]", "+domain=law", f"domains.arithmetic.teacher.model={saved_v4}", f"student.model={saved_v4}",
        "domains.arithmetic.prompts.rows=50", "domains.arithmetic.held_out.rows=20", "num_steps=2", "rollout.prompts_per_step=8", "rollout.max_new_tokens=6",
        "rollout.decode_width=8", "evaluation.every=1", "evaluation.max_new_tokens=6", "run_dir=run", "logger=none", "check.signal=off",
    ]))  # fmt: skip
    records = [json.loads(line) for line in (workspace / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [record["step"] for record in records] == [0, 1, 2]
    assert records[1]["domain/law/prompt_share"] in (0.25, 0.375), "a third of eight prompts"
    assert records[1]["domain/law/kl_per_token"] == 0.0, "its teacher is the student itself"
    assert "domain/law/accuracy" not in records[1]
    assert "domain/arithmetic/accuracy" in records[1]
    assert records[0]["evaluation/law/kl_per_sequence"] == 0.0


def test_a_domain_without_a_grader_reads_not_graded(workspace, saved_v4, capsys):
    evaluate(load_config("evaluate", [
        "domain=[arithmetic,law]", f"domains.arithmetic.teacher.model={saved_v4}", f"student.model={saved_v4}",
        "domains.arithmetic.held_out.rows=20", "evaluation.max_new_tokens=6", "run_dir=run",
    ]))  # fmt: skip
    record = json.loads((workspace / "run" / "evaluation.json").read_text())
    assert record["domains"]["law"]["recovery"] == "not graded"
    assert record["not_graded"] == ["law"]
    assert record["domains"]["law"]["kl"]["student"]["per_token"]["value"] == 0.0
    assert "not graded" in capsys.readouterr().out


def test_a_teacher_is_swapped_by_one_override(workspace, saved_v4, tmp_path):
    missing = tmp_path / "elsewhere"
    with pytest.raises(ValueError, match=re.escape(str(missing))):
        distill(load_config("distill", ["domain=[law]", f"student.model={saved_v4}", f"domains.law.teacher.model={missing}", "run_dir=run"]))
    assert not (workspace / "run").exists()
