"""The model card: its facts are the run's, in Hugging Face's format, with nothing of this machine; what is worse or unknown is said."""

import json
import shutil
from pathlib import Path

import pytest
import yaml
from huggingface_hub import ModelCard

from opd.__main__ import load_config
from opd.evaluate import evaluate
from opd.export import export
from opd.model_card import model_card, regressions
from opd.model_card_facts import CardFacts, licence_of, read_facts, shown_name

RECORD = {
    "source": "nowhere/student", "family": "deepseek_v4", "format": "fp4", "dtype": "bfloat16", "verified": {"tensors": 89, "probe_tokens": 256},
    "sha256": {"model.safetensors": "ab12"},
}  # fmt: skip


def result(student: float, recovery: tuple[float, float, float] | str, difference: tuple[float, float, float]) -> dict:
    accuracy = {"accuracy": student, "low": student - 0.02, "high": student + 0.02}
    interval = recovery if isinstance(recovery, str) else dict(zip(("value", "low", "high"), recovery, strict=True))
    return {"student": accuracy, "recovery": interval, "difference": dict(zip(("value", "low", "high"), difference, strict=True)), "certificate": None}


def evaluation(**domains: dict) -> dict:
    return {"domains": domains}


@pytest.fixture(scope="module")
def exported(short_run, tmp_path_factory) -> Path:
    """An export of the student of a real run."""
    folder = tmp_path_factory.mktemp("runs") / "export"
    export(load_config("export", [f"student.model={short_run / 'student'}", f"run_dir={folder}", "threads=1"]))
    return folder


def test_the_card_of_an_export_is_one_that_hugging_face_reads(exported):
    card = ModelCard.load(exported / "student" / "README.md")
    assert (card.data.library_name, card.data.pipeline_tag) == ("transformers", "text-generation")
    assert {"distillation", "deepseek_v4", "mxfp4"} == set(card.data.tags)
    assert card.data.license is None, "nobody has stated one"


def test_its_facts_are_those_of_the_run(exported, short_run):
    text = (exported / "student" / "README.md").read_text()
    records = [json.loads(line) for line in (short_run / "metrics.jsonl").read_text().splitlines()]
    tokens = int(sum(record.get("step/completion_tokens", 0) for record in records))
    for fact in (f"| steps | 2 of 2 |", f"| completion tokens trained on | {tokens:,} |", "| seed | 0 |", "| routed experts trained under | mxfp4 |"):  # noqa: F541
        assert fact in text
    start = json.loads((short_run / "starts.jsonl").read_text().splitlines()[-1])
    assert f"sha256 {start['code'][:12]}" in text
    [span] = json.loads((short_run / "teachers.json").read_text())["spans"]
    for name, domain in span["domains"].items():
        assert f"| {domain['teacher']['hash'][:16]} | not stated | 1-2 |" in text
        found = start["data"][name]["prompts"]
        assert f"| {name} | synthetic:{name} | - | {found['rows']} | {found['sha256'][:16]} | 1.0 |" in text
    for name, digest in json.loads((exported / "export.json").read_text())["sha256"].items():
        assert f"| {name} | {digest} |" in text
    assert f"{records[-1]['evaluation/arithmetic/accuracy']:.3f} [" in text
    assert "Measured by the run itself while it trained" in text


def test_nothing_of_this_machine_is_in_it(exported, tmp_path):
    text = (exported / "student" / "README.md").read_text()
    assert str(Path.home()) + "/" not in text
    assert str(tmp_path.parents[1]) not in text
    settings = yaml.safe_load(text.partition("```yaml\n")[2].partition("```")[0])
    assert settings["student"]["model"].endswith("(local)")


def test_an_evaluation_of_the_exported_folder_puts_its_results_into_the_card(exported, tmp_path):
    folder = tmp_path / "export"
    shutil.copytree(exported, folder)
    settings = [f"student.model={folder / 'student'}", f"run_dir={tmp_path / 'evaluate'}", "threads=1", "domain=[arithmetic]"]
    settings += ["domains.arithmetic.held_out.rows=8", f"domains.arithmetic.teacher.model={exported / 'student'}", "evaluation.max_new_tokens=4"]
    for _ in range(2):
        evaluate(load_config("evaluate", [*settings, "evaluation.decode_width=8"]))
    found = json.loads((tmp_path / "evaluate" / "evaluation.json").read_text())["domains"]["arithmetic"]["student"]
    text = (folder / "student" / "README.md").read_text()
    assert f"{found['accuracy']:.3f} [{found['low']:.3f}, {found['high']:.3f}]" in text
    card = ModelCard.load(folder / "student" / "README.md")
    assert [(each.dataset_name, each.metric_value) for each in card.data.eval_results] == [("arithmetic", found["accuracy"])]
    assert (folder / "export.json").read_bytes() == (exported / "export.json").read_bytes()


def test_a_domain_that_is_worse_beyond_its_intervals_is_named_and_no_other():
    worse = result(0.9, (0.95, 0.92, 0.98), (0.1, 0.05, 0.15))
    lost = result(0.4, (1.0, 0.9, 1.1), (-0.2, -0.3, -0.1))
    near = result(0.97, (0.99, 0.97, 1.01), (0.0, -0.1, 0.1))
    found = regressions(evaluation(law=worse, code=lost, maths=near, chat=result(0.5, "not graded", (0.0, -1.0, 1.0))))
    assert [line.partition(":")[0] for line in found] == ["law", "code", "chat"]
    assert "it recovers 0.950 [0.920, 0.980]" in found[0]
    assert "0.200 below that of the model it began with" in found[1]


def test_what_is_not_known_is_said():
    text = model_card(RECORD, CardFacts(), None)
    for sentence in ("Not known: the model does not lie in the folder of a run.", "Not measured.", "was not measured", "Not recorded."):
        assert sentence in text


def test_results_of_several_domains_stay_apart():
    text = model_card(RECORD, CardFacts(), evaluation(law=result(0.9, (1, 1, 1), (0, 0, 0)), code=result(0.8, (1, 1, 1), (0, 0, 0))))
    assert [(each.dataset_name, each.metric_value) for each in ModelCard(text).data.eval_results] == [("law", 0.9), ("code", 0.8)]


def test_what_happened_in_training_is_said():
    spans = [
        {"from_step": 1, "domains": {}, "dropped": {"law": {"step": 5, "reason": "gone"}}},
        {"from_step": 8, "domains": {}, "dropped": {}},
    ]  # fmt: skip
    records = [{"step": 10, "domain/law/truncated": 0.25, "alarms/active": 2}]
    facts = CardFacts(run=Path("run"), command="distill", step=10, steps=20, spans=spans, records=records)
    text = model_card(RECORD, facts, evaluation())
    assert "law: 25.0% of the last step's answers did not end." in text
    assert "2 alarms were active" in text
    assert "law: its teacher failed, and training went on without it from step 5." in text
    assert "were changed during training, at step 8." in text
    assert "after step 10 of 20" in text


def test_text_of_the_data_breaks_neither_the_card_nor_its_metadata():
    name = "a|b\n---\n<script>"
    text = model_card(RECORD, CardFacts(), evaluation(**{name: result(0.9, (1, 1, 1), (0, 0, 0))}))
    assert "<script>" not in text.partition("\n---\n\n")[2]
    assert "| a\\|b --- &lt;script> |" in text
    assert ModelCard(text).data.eval_results[0].dataset_name == name


def test_system_prompts_and_passwords_stay_here():
    domains = {"law": {"prompts": {"path": "org/law", "system_prompt": "secret words", "share": 1.0}, "held_out": {"path": None}}}
    for upload, expected in ((False, False), (True, True)):
        config = {"logger": {"upload_text": upload}, "domains": domains, "server": "http://me:word@host:1", "run_dir": "/home/me/runs/a"}
        text = model_card(RECORD, CardFacts(run=Path("run"), command="distill", config=config), None)
        assert ("secret words" in text) == expected
        assert "word@" not in text
        assert "/home/me" not in text


@pytest.mark.parametrize(("files", "expected"), [({"README.md": "---\nlicense: mit\n---\n"}, "mit"), ({"LICENSE": "x"}, "see its LICENSE"), ({}, None)])
def test_a_licence_is_what_is_stated_and_never_guessed(files, expected, tmp_path):
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    assert licence_of(str(tmp_path)) == expected


def test_teachers_under_different_licences_are_pointed_out(tmp_path):
    domains = {}
    for name, licence in (("law", "mit"), ("code", "apache-2.0")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "README.md").write_text(f"---\nlicense: {licence}\n---\n")
        domains[name] = {"teacher": {"model": str(tmp_path / name), "hash": "ab"}}
    text = model_card(RECORD, CardFacts(run=Path("run"), spans=[{"from_step": 1, "domains": domains, "dropped": {}}], step=3), None)
    assert "| mit |" in text
    assert "licences are not all the same" in text


def test_a_local_path_is_shown_by_its_end_and_a_hub_id_as_it_is(tmp_path):
    assert shown_name(str(tmp_path / "run" / "student")) == "run/student (local)"
    assert shown_name("org/model") == "org/model"


def test_a_checkpoints_model_has_the_facts_up_to_its_step(short_run):
    from opd.checkpoint_model import model_folder

    facts = read_facts(str(model_folder(f"{short_run}@1")))
    assert (facts.step, facts.steps, facts.run) == (1, 2, short_run)
    assert max(record["step"] for record in facts.records) == 1
