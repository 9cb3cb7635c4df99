"""`opd report`: the page of a real small run, what it says of runs with less, that text stays text, and what is uploaded."""

import json
import re
import shutil
import time
from pathlib import Path

import pytest
from wandb.proto.wandb_internal_pb2 import Record

from opd.__main__ import load_config, split_command
from opd.checkpoint_record import write_record
from opd.choice import Verdict, write_choice
from opd.evaluate_config import AcceptConfig
from opd.report import FILE, report
from opd.report_compare import changed_midway
from opd.report_reader import NO_TEXT, read_run
from opd.run_state import begin_state, end_state

EVIL = "<script>document.title = 'run'</script>"


@pytest.fixture
def run_copy(short_run, tmp_path) -> Path:
    """The short run's files that a report reads, to be changed."""
    folder = tmp_path / "run"
    shutil.copytree(short_run, folder, ignore=shutil.ignore_patterns("checkpoints", "wandb", "log", "*.safetensors"))
    return folder


def page_of(folder: Path, *overrides: str) -> str:
    report(load_config("report", [f"run_dir={folder}", *overrides]))
    return (folder / FILE).read_text()


def change_json(path: Path, change) -> None:
    value = json.loads(path.read_text())
    change(value)
    path.write_text(json.dumps(value))


def test_the_page_of_a_distillation_has_its_curves_conflict_rollouts_teachers_and_settings(run_copy):
    page = page_of(run_copy)
    for title in ("KL to the teacher, per token", "Entropy of the student", "Length of completions", "Seconds of a step, by phase", "Quantisation gap"):
        assert f"<h3>{title}</h3>" in page
    assert "Cosine of the teachers" in page
    assert page.count('class="text prompt"') == sum(len(kept) for kept in json.loads((run_copy / "samples/000002.json").read_text())["domains"].values())
    digest = json.loads((run_copy / "teachers.json").read_text())["spans"][-1]["domains"]["tools"]["teacher"]["hash"]
    assert digest[:16] in page
    assert "max_new_tokens: 8" in page


def test_what_changed_midway_is_told_without_the_text_of_prompts_where_that_must_stay(run_copy):
    change = {"schema": 1, "step": 1, "setting": "domains.tools.prompts.system_prompt", "before": None, "after": "secret words"}
    (run_copy / "changes.jsonl").write_text(json.dumps(change) + "\n")
    assert [row.after for row in changed_midway(run_copy)] == ['"secret words"']
    assert [(row.step, row.after) for row in changed_midway(run_copy, with_text=False)] == [(2, json.dumps(NO_TEXT))]
    page = page_of(run_copy)
    assert '<th>domains.tools.prompts.system_prompt</th><td data-label="from step">2</td>' in page


def test_each_figure_has_a_title_two_named_axes_a_legend_and_a_caption(run_copy):
    figures = re.findall(r"<figure>.*?</figure>", page_of(run_copy), flags=re.DOTALL)
    assert len(figures) > 12
    for figure in figures:
        assert re.search(r"<h3>[^<]+</h3>", figure)
        assert len(re.findall(r'<text class="axis middle"[^>]*>[^<]+</text>', figure)) == 2
        assert len(re.search(r"<figcaption>(.*?)</figcaption>", figure, flags=re.DOTALL)[1].split()) > 6
        assert re.search(r'<ul class="legend"[^>]*><li>', figure)


def test_nothing_on_the_page_is_loaded_from_elsewhere(run_copy):
    page = page_of(run_copy)
    assert not re.findall(r"""(?:src|href)\s*=\s*["'](?!#|data:,)""", page)
    assert not re.findall(r"url\(|@import|fetch\(|XMLHttpRequest|WebSocket", page)
    assert "default-src 'none'" in page


def test_text_of_models_and_files_is_text(run_copy):
    def poison(content):
        for kept in content["domains"].values():
            for item in kept:
                item["prompt"], item["row"], item["pieces"][0] = EVIL, EVIL, EVIL

    change_json(run_copy / "samples/000002.json", poison)
    change_json(run_copy / "teachers.json", lambda content: content["spans"][-1]["domains"]["tools"]["teacher"].update(model=EVIL))
    page = page_of(run_copy)
    assert "&lt;script&gt;document.title" in page
    assert page.count("<script>") == 1, "the page's own"


def test_curves_are_those_of_the_records(run_copy):
    records = [json.loads(line) for line in (run_copy / "metrics.jsonl").read_text().splitlines()]
    wanted = ";".join(f"{record['step']},{record['domain/tools/kl_per_token']:.4g}" for record in records if "domain/tools/kl_per_token" in record)
    figure = re.search(r"<h3>KL to the teacher, per token</h3>.*?</figure>", page_of(run_copy), flags=re.DOTALL)[0]
    assert re.search(r'data-name="tools" data-points="([^"]*)"', figure)[1] == wanted


def test_what_was_not_measured_is_a_sentence_with_its_setting_and_no_frame(run_copy):
    lines = (run_copy / "metrics.jsonl").read_text().splitlines()
    gone = ("conflict/", "teacher/", "quant/", "evaluation/")
    kept = [{name: value for name, value in json.loads(line).items() if not name.startswith(gone)} for line in lines]
    (run_copy / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in kept))
    shutil.rmtree(run_copy / "samples")
    page = page_of(run_copy)
    for setting in ("teachers.gradient_share_every=N", "quant.measure_every=N", "evaluation.every=N"):
        assert setting in page
    assert "No rollouts to show" in page
    assert "No accuracies are known" in page
    assert "<h3>Quantisation gap</h3>" not in page


def test_a_run_without_an_evaluation_shows_its_own_and_one_with_shows_that(run_copy):
    assert "From the run\u2019s own evaluations" in page_of(run_copy)
    interval = {"value": 0.5, "low": 0.25, "high": 0.75}
    role = {"accuracy": 0.5, "low": 0.25, "high": 0.75, "greedy": 0.5, "prompts": 77, "truncated": 0.0}
    certificate = {"floor": 0.123, "low": 0.0321, "share": 0.2, "holds": False}
    domain = {"teacher": role, "student": role, "recovery": interval, "certificate": certificate, "kl": {"student": {"per_sequence": interval}}}
    kept = {"base": role, "student": role, "recovery": "no teacher", "certificate": None}
    (run_copy / "evaluation.json").write_text(json.dumps({"schema": 1, "domains": {"arithmetic": domain, "old": kept, "hard": kept | {"recovery": None}}}))
    page = page_of(run_copy)
    assert "From the run\u2019s own evaluations" not in page
    assert re.search(r'class="bad"><span>0.123 <small>0.032 at the least', page), "a certificate that does not hold stands out"
    assert "<h3>Recovery of the teacher</h3>" in page
    assert "<h3>Accuracy of base, teacher and student</h3>" in page
    assert "perturbed" not in page
    change_json(run_copy / "evaluation.json", lambda record: record["domains"]["arithmetic"].update(perturbed={"student": role | {"accuracy": 0.0625}}))
    assert re.search(r"arithmetic, perturbed.*?0\.062 <small>", page_of(run_copy), re.DOTALL)


def test_checkpoints_that_were_evaluated_are_listed_and_the_chosen_one_is_the_result(run_copy):
    assert "<h2 id=\"checkpoints\">" not in page_of(run_copy)
    (run_copy / "evaluations").mkdir()
    (run_copy / "checkpoints/step-000002").mkdir(parents=True)
    verdicts = []
    for step, accuracy, against in ((1, 0.25, []), (2, 0.75, ["recovery of arithmetic 0.750 < 0.9"])):
        role = {"accuracy": accuracy, "low": 0.125, "high": 0.875, "greedy": 0.5, "prompts": 77, "truncated": 0.0}
        domain = {"student": role, "recovery": {"value": accuracy, "low": 0.1, "high": 0.9}, "certificate": None}
        write_record(run_copy, step, None, "asked", {"schema": 1, "domains": {"arithmetic": domain}, "min_recovery": accuracy}, {})
        verdicts.append(Verdict(step=step, record={}, accuracy=accuracy, against=against, is_there=True))
    write_choice(run_copy, AcceptConfig(minimum_recovery=0.9), "asked", verdicts, {"step": 1, "manifest": None}, None)
    page = page_of(run_copy)
    rows = re.findall(r"<tr><th>(\d+)</th>.*?<span>([\d.]+) .*?recovery\">([\d.]+)</td>.*?rule\">(.*?)</td>", page)
    assert rows == [("1", "0.250", "0.250", "chosen, deleted since"), ("2", "0.750", "0.750", "recovery of arithmetic 0.750 &lt; 0.9")]
    assert "<h2 id=\"result\">Result after step 1</h2>" in page
    assert "step-000001-asked.json. Accuracy" in page


def test_a_line_that_is_being_written_is_left_out_and_one_that_is_damaged_is_named(run_copy):
    whole = (run_copy / "metrics.jsonl").read_text()
    (run_copy / "metrics.jsonl").write_text(whole + '{"schema": 1, "step": 3, "step/lo')
    assert read_run(run_copy).steps == 2
    (run_copy / "metrics.jsonl").write_text('{"schema": 1, "ste\n' + whole)
    with pytest.raises(ValueError, match=r"line 1 of .*metrics\.jsonl is damaged"):
        read_run(run_copy)


def test_the_state_is_the_runs_own_with_why_it_ended_early(run_copy):
    assert read_run(run_copy).state == "done"
    begin_state(run_copy, "distill", 9)
    assert read_run(run_copy).state == "running"
    end_state(1, "a rank died")
    assert read_run(run_copy).state == "failed: a rank died"


def test_nothing_of_the_run_is_changed_but_for_the_report(run_copy):
    before = {path: path.read_bytes() for path in run_copy.rglob("*") if path.is_file()}
    page_of(run_copy)
    after = {path: path.read_bytes() for path in run_copy.rglob("*") if path.is_file()}
    assert set(after) - set(before) == {run_copy / FILE}
    assert all(after[path] == content for path, content in before.items())


def test_the_command_takes_the_folder_as_a_word_and_prints_the_path(run_copy, capsys):
    assert split_command(["report", "runs/it's", "upload=true"]) == ("report", ["run_dir='runs/it\\'s'", "upload=true"])
    assert load_config(*split_command(["report", "runs/it's [2]"])).run_dir == "runs/it's [2]"
    report(load_config(*split_command(["report", str(run_copy)])))
    assert capsys.readouterr().out.strip() == str(run_copy / FILE)


@pytest.mark.parametrize(
    ("files", "sentence"),
    [
        ({}, "has no config.yaml"),
        ({"config.yaml": "# written by opd export\nrun_dir: x\n"}, "of which there is no report"),
        ({"config.yaml": "# written by opd pipeline\nstages: {}\n"}, "nothing to report yet"),
    ],
)
def test_a_folder_that_is_no_run_is_refused_in_a_sentence(files, sentence, tmp_path):
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=sentence):
        report(load_config("report", [f"run_dir={tmp_path}"]))


def test_without_a_run_it_says_how_to_name_one():
    with pytest.raises(ValueError, match="opd report RUN"):
        report(load_config("report", []))


def uploaded(folder: Path) -> list[Record]:
    """The artifacts in W&B's offline files of a run, which a process of its own writes; waits until there is one."""
    deadline = time.monotonic() + 60
    while not (found := artifacts_in(folder)) and time.monotonic() < deadline:
        time.sleep(0.1)
    return found


def artifacts_in(folder: Path) -> list[Record]:
    """What its files hold by now: LevelDB logs of length-prefixed blocks."""
    found = []
    for file in folder.glob("wandb/offline-run-*/run-*.wandb"):
        for payload in blocks(file.read_bytes()[7:]):
            record = Record()
            record.ParseFromString(payload)
            if record.HasField("request") and record.request.HasField("log_artifact"):
                found.append(record.request.log_artifact.artifact)
            elif record.HasField("artifact"):
                found.append(record.artifact)
    return found


def blocks(data: bytes) -> list[bytes]:
    """Records of a LevelDB log: header of checksum (4), length (2) and kind (1: whole, 2: first, 3: middle, 4: last), in blocks of 32 KiB."""
    found, place, parts = [], 7, []
    data = b"\0" * 7 + data
    while place + 7 <= len(data):
        if place % 32768 > 32768 - 7:
            place += 32768 - place % 32768
            continue
        length, kind = int.from_bytes(data[place + 4 : place + 6], "little"), data[place + 6]
        parts.append(data[place + 7 : place + 7 + length])
        place += 7 + length
        if kind in (1, 4):
            found.append(b"".join(parts))
            parts = []
    return found


def test_an_upload_holds_the_same_bytes_and_no_text_of_prompts(short_run, tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_DATA_DIR", str(tmp_path / "staging"))
    folder = tmp_path / "run"
    shutil.copytree(short_run, folder, ignore=shutil.ignore_patterns("checkpoints", "wandb", "log", "*.safetensors"))
    config = (folder / "config.yaml").read_text()
    (folder / "config.yaml").write_text(config.replace("system_prompt: null", "system_prompt: the secret instruction", 1))
    assert "the secret instruction" in page_of(folder)
    page = page_of(folder, "upload=true")
    assert "the secret instruction" not in page
    assert NO_TEXT in page
    assert "Left out: this page was made for upload" in page
    assert 'class="text prompt"' not in page
    [artifact] = uploaded(folder)
    [entry] = artifact.manifest.contents
    assert artifact.type == "report"
    assert Path(entry.local_path).read_bytes() == (folder / FILE).read_bytes()


def test_with_upload_text_the_uploaded_page_has_the_rollouts(run_copy, tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_DATA_DIR", str(tmp_path / "staging"))
    config = (run_copy / "config.yaml").read_text()
    (run_copy / "config.yaml").write_text(config.replace("upload_text: false", "upload_text: true"))
    assert 'class="text prompt"' in page_of(run_copy, "upload=true")


def test_an_upload_of_a_run_without_w_and_b_is_refused(run_copy):
    config = (run_copy / "config.yaml").read_text()
    (run_copy / "config.yaml").write_text(config.replace("kind: offline", "kind: none"))
    with pytest.raises(ValueError, match="leave upload=true out"):
        page_of(run_copy, "upload=true")
    assert not (run_copy / FILE).exists()
