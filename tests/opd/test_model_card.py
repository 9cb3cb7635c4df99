"""The model card: its facts are the run's, in Hugging Face's format, with nothing of this machine; what is worse or unknown is said."""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml
from huggingface_hub import ModelCard, ModelCardData
from safetensors.torch import load_file, save_file

from opd import model_card_facts
from opd.__main__ import load_config
from opd.checkpoint_files import digest_of, tag_of
from opd.checkpoint_model import model_folder
from opd.checkpoint_record import write_record
from opd.errors import PREEMPTED
from opd.evaluate import evaluate
from opd.export import export
from opd.model_card import NOT_MEASURED, model_card, refresh_card, regressions
from opd.model_card_facts import CardFacts, licence_of, read_facts, shown_name
from opd.run_state import begin_state, end_state

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
        assert f"| {name} | {digest} | " in text
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


def test_a_base_that_is_not_what_it_began_with_is_named():
    start = {"student": {"hash": "aa"}, "git": None, "hardware": {"devices": [], "cpu": "a"}, "code": "c", "ranks": 1, "versions": {}, "data": {}}
    facts = CardFacts(run=Path("run"), config={"student": {"model": "org/base"}}, starts=[start], command="distill", step=1, steps=1)
    lost = evaluation(law=result(0.4, (1.0, 0.9, 1.1), (-0.2, -0.3, -0.1)))
    text = model_card(RECORD, facts, lost | {"base": {"model": "org/other", "revision": None, "hash": "bb"}})
    assert "0.200 below that of org/other." in text
    assert "| org/other | teacher |" in text
    text = model_card(RECORD, facts, lost | {"base": {"model": "copy/of-base", "revision": None, "hash": "aa"}})
    assert "0.200 below that of the model it began with." in text
    assert "| before | teacher |" in text


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
    assert "Alarms that were active after step 10: 2." in text
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


@pytest.mark.parametrize(("stated", "expected"), [({"license": "apache-2.0"}, "apache-2.0"), ({}, None), (None, None), (OSError(), None)])
def test_a_licence_on_the_hub_is_asked_for_at_the_revision(stated, expected, monkeypatch):
    def model_info(self, model, revision, timeout):
        assert (model, revision) == ("org/law-teacher", f"at {stated}")
        if isinstance(stated, OSError):
            raise stated
        return SimpleNamespace(card_data=None if stated is None else ModelCardData(**stated))

    monkeypatch.setattr(model_card_facts.HfApi, "model_info", model_info)
    assert licence_of("org/law-teacher", f"at {stated}") == expected


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
    facts = read_facts(str(model_folder(f"{short_run}@1")))
    assert (facts.step, facts.steps, facts.run) == (1, 2, short_run)
    assert max(record["step"] for record in facts.records) == 1


def run_with_records(short_run, folder: Path) -> Path:
    """A copy of the short run in which `opd evaluate RUN` is said to have found 0.25 of the first checkpoint and 0.75 of the second."""
    run = folder / "run"
    shutil.copytree(short_run, run, ignore=shutil.ignore_patterns("evaluations", "students"))
    (run / "evaluations").mkdir()
    for step, accuracy in ((1, 0.25), (2, 0.75)):
        found = evaluation(arithmetic=result(accuracy, (1.0, 0.9, 1.1), (0.0, -0.1, 0.1)))
        write_record(run, step, digest_of(run / "checkpoints" / tag_of(step)), "asked", found, {})
    return run


def results_of_card(model: str, folder: Path, *more: str) -> str:
    export(load_config("export", [f"student.model={model}", f"run_dir={folder}", "threads=1", *more]))
    return section((folder / "student" / "README.md").read_text(), "Results")


def test_an_export_has_what_was_found_of_its_own_checkpoint(short_run, tmp_path):
    run = run_with_records(short_run, tmp_path)
    assert "| 0.250 " in results_of_card(str(model_folder(f"{run}@1")), tmp_path / "first")
    assert "| 0.750 " in results_of_card(str(run / "student"), tmp_path / "end")


def test_what_was_found_of_other_weights_is_not_said_of_these(short_run, tmp_path):
    run = run_with_records(short_run, tmp_path)
    file = run / "student" / "model.safetensors"
    save_file({name: weight * 1.01 if "experts" in name else weight for name, weight in load_file(file).items()}, file, {"format": "pt"})
    rounding = ["round_experts=true", "domain=[arithmetic]", "domains.arithmetic.held_out.rows=8", "max_new_tokens=4"]
    assert "| 0.750 " not in results_of_card(str(run / "student"), tmp_path / "rounded", *rounding)
    assert json.loads((tmp_path / "rounded" / "export.json").read_text())["experts"]["share_off_grid"] > 0
    write_record(run, 1, "another checkpoint", "asked", evaluation(arithmetic=result(0.25, (1.0, 0.9, 1.1), (0.0, -0.1, 0.1))), {})
    assert "| 0.250 " not in results_of_card(str(model_folder(f"{run}@1")), tmp_path / "other"), "a checkpoint of that step before this one"


def test_a_student_whose_run_was_taken_up_again_is_of_an_unknown_step(short_run, tmp_path):
    run = run_with_records(short_run, tmp_path)
    begin_state(run, "distill", 4)
    with (run / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({"step": 3, "step/completion_tokens": 10}) + "\n")
    end_state(PREEMPTED, "asked to end")
    text = model_card(RECORD | {"source": str(run / "student")}, read_facts(str(run / "student")), None)
    assert "| steps | not known: " in text
    assert NOT_MEASURED.split("`")[0] in section(text, "Results")


# What a card must not say


def section(text: str, title: str) -> str:
    return text.partition(f"## {title}\n")[2].partition("\n## ")[0]


def distilled(**fields) -> CardFacts:
    return CardFacts(**({"run": Path("run"), "command": "distill", "step": 20, "steps": 20} | fields))


def test_a_domain_without_grades_leaves_the_metadata_valid():
    ungraded = result(0.0, "not graded", (0.0, 0.0, 0.0)) | {"student": {"accuracy": None, "low": None, "high": None}, "difference": None}
    data = ModelCard(model_card(RECORD, CardFacts(), evaluation(law=ungraded, code=result(0.8, (1, 1, 1), (0, 0, 0))))).data
    assert [(each.dataset_name, each.metric_value) for each in data.eval_results] == [("code", 0.8)]


def test_what_was_measured_before_training_is_no_result_of_it():
    def measured(step: int, value: float) -> dict:
        return {"step": step} | {f"evaluation/law/accuracy{end}": value for end in ("", "_low", "_high")}

    assert "0.125" not in section(model_card(RECORD, distilled(records=[measured(0, 0.125), {"step": 20}]), None), "Results")
    text = section(model_card(RECORD, distilled(records=[measured(0, 0.125), measured(10, 0.5), {"step": 20}]), None), "Results")
    assert "0.500" in text
    assert "after step 10, and these weights are those after step 20" in text


def test_no_regression_is_denied_that_was_not_looked_for():
    alone = result(0.9, (1.0, 0.9, 1.1), (0, 0, 0)) | {"difference": None}
    facts = distilled(config={"domains": {name: {"prompts": {"path": "org/law"}} for name in ("law", "code")}})
    text = section(model_card(RECORD, facts, evaluation(law=alone)), "Known regressions and limits")
    assert "None is known" not in text
    assert "law: it was not compared with the model it began with" in text
    assert "Not evaluated: code." in text


def test_answers_that_the_evaluation_cut_are_named():
    cut = result(0.9, (1.0, 0.9, 1.1), (0, -1, 1))
    cut["student"]["truncated"] = 0.5
    assert regressions(evaluation(law=cut)) == ["law: 50.0% of its answers in the evaluation did not end."]


def test_a_branch_names_the_run_it_came_from(tmp_path):
    lineage = {"schema": 1, "from": str(tmp_path / "runs" / "first"), "step": 7, "manifest": "ab"}
    assert "| branched from | runs/first (local), after step 7 |" in model_card(RECORD, distilled(lineage=lineage), None)


def test_the_objective_is_that_of_the_settings():
    def made(**config) -> str:
        return section(model_card(RECORD, distilled(config=config), None), "How it was made")

    assert "KL(student || teacher_d), over the whole vocabulary, on the student's own answers." in made()
    other = made(loss={"kind": "jsd", "beta": 0.25, "cap": 3.0}, teachers={"signal": "top_k"}, warmup={"kind": "teacher_answers", "steps": 9})
    assert "KL(student" not in other
    for words in ("JSD(student, teacher_d), over the teacher's likeliest tokens", "loss.beta=0.25", "loss.cap=3.0", "9 updates on the teachers' own answers"):
        assert words in other


def test_a_teacher_is_credited_with_the_steps_it_scored_and_with_its_adapter():
    domains = {"law": {"teacher": {"model": "org/base", "adapter": "org/adapter", "hash": "aa", "adapter_hash": "bb"}}, "code": {"teacher": {"model": "org/t"}}}
    spans = [{"from_step": 1, "domains": domains, "dropped": {"law": {"step": 5, "reason": "gone"}}}]
    spans += [{"from_step": 11, "domains": domains, "dropped": {}}] * 2  # the first of them holds no step
    found = [line.split(" | ") for line in section(model_card(RECORD, distilled(spans=spans), None), "Teachers").splitlines()[3:]]
    assert [(row[0], row[1], row[3], row[5]) for row in found] == [
        ("| law", "org/adapter on org/base", "bb", "1-4 |"),
        ("| code", "org/t", "not recorded", "1-10 |"),
        ("| law", "org/adapter on org/base", "bb", "11-20 |"),
        ("| code", "org/t", "not recorded", "11-20 |"),
    ]


def test_the_card_of_a_merged_model_names_what_was_merged():
    domains = {"law": {"teacher": {"model": "org/law"}, "prompts": {"path": "org/data"}}}
    merged = {"kind": "ties", "chosen": {"scale": 0.4, "density": 0.2}}
    text = model_card(RECORD, CardFacts(run=Path("run"), command="merge", config={"base": {"model": "org/base"}, "domains": domains}, merged=merged), None)
    for line in ("| began with | org/base |", "| merged by | ties, scale 0.4, density 0.2 |", "| law | org/law | - | not recorded | not stated | - |"):
        assert line in text
    data = ModelCard(text).data
    assert (data.base_model, data.datasets) == ("org/base", ["org/data"])


@pytest.mark.parametrize(("base", "teacher", "expected"), [("mit", "mit", "mit"), ("mit", "cc-by-nc-4.0", None), ("mit", None, None)])
def test_a_licence_is_claimed_where_all_that_it_was_made_of_states_it(base, teacher, expected, tmp_path):
    for name, licence in (("base", base), ("teacher", teacher)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "README.md").write_text("" if licence is None else f"---\nlicense: {licence}\n---\n")
    spans = [{"from_step": 1, "domains": {"law": {"teacher": {"model": str(tmp_path / "teacher")}}}, "dropped": {}}]
    text = model_card(RECORD, distilled(config={"student": {"model": str(tmp_path / "base")}}, spans=spans), None)
    assert ModelCard(text).data.license == expected
    assert ("not all the same" in text) == (expected is None)


def test_a_teachers_broken_card_costs_no_export(tmp_path):
    (tmp_path / "README.md").write_text("---\nlicense: [mit\n---\n")
    (tmp_path / "LICENSE").write_text("x")
    assert licence_of(str(tmp_path)) == "see its LICENSE"


def test_keys_and_homes_stay_here():
    given = {"alarms": {"command": "notify SECRET1"}, "path": "https://host/rows.parquet?sig=SECRET2"}
    given |= {"log": "copy to /home/alice/private/rows", "x": "/home/alice"}
    text = model_card(RECORD, distilled(config=given), None)
    assert not [word for word in ("SECRET1", "SECRET2", "alice") if word in text]
    assert "https://host/rows.parquet" in text
    assert "private/rows (local)" in text


@pytest.fixture
def copied(exported, tmp_path) -> tuple[Path, dict]:
    """A copy of the export, and results of its two domains."""
    shutil.copytree(exported, tmp_path / "export")
    return tmp_path / "export", evaluation(arithmetic=result(0.75, (1, 1, 1), (0, 0, 0)))


def test_a_refresh_is_the_same_twice_and_changes_the_results_alone(copied):
    folder, found = copied
    card = folder / "student" / "README.md"
    before = card.read_text()
    assert refresh_card(str(folder / "student"), found) == card
    once = card.read_text()
    refresh_card(str(folder / "student"), found)
    assert card.read_text() == once
    titles = [line[3:] for line in before.splitlines() if line.startswith("## ")]
    assert [title for title in titles if section(before, title) != section(once, title)] == ["Results", "Known regressions and limits"]


@pytest.mark.parametrize("change", ["the run is gone", "someone edited it"])
def test_a_refresh_takes_no_fact_from_a_card(change, copied, caplog):
    folder, found = copied
    card = folder / "student" / "README.md"
    if change == "the run is gone":
        record = json.loads((folder / "export.json").read_text())
        (folder / "export.json").write_text(json.dumps(record | {"source": "nowhere/student"}))
    else:
        card.write_text(card.read_text().replace("## Teachers", "## Our teachers"))
    before = card.read_bytes()
    assert refresh_card(str(folder / "student"), found) is None
    assert card.read_bytes() == before
    assert "stays as it is" in caplog.text


def test_the_files_have_their_sizes(exported):
    text = (exported / "student" / "README.md").read_text()
    for name in json.loads((exported / "export.json").read_text())["sha256"]:
        line = next(line for line in text.splitlines() if line.startswith(f"| {name} |"))
        assert line.endswith(f" | {(exported / 'student' / name).stat().st_size} |")
