"""`opd report RUN RUN`: only what differs, the right place of each point on each axis, differences prompt by prompt, and text that stays text."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from opd.__main__ import split_command
from opd.checkpoint_record import write_record
from opd.choice import write_choice
from opd.evaluate_config import AcceptConfig
from opd.job_config import ReportConfig
from opd.report import report
from opd.report_compare import Midway, changed_midway, differences, paired_table, positions, render_comparison
from opd.scores import read_scores


@pytest.fixture
def make_run(tmp_path):
    """make_run("a", scores=[1, 0], prompts="x", lr=0.1): a folder as a run leaves it."""

    def make(name: str, scores: list[float] | None = None, prompts: str = "x", seed: int = 0, **optim) -> Path:
        folder = tmp_path / name
        folder.mkdir()
        config = {"run_dir": name, "seed": seed, "optim": {"lr": 0.5} | optim, "logger": {"group": name}}
        (folder / "config.yaml").write_text("# written by opd distill\n" + yaml.safe_dump(config))
        records = [{"schema": 1, "step": step, "step/loss": 1.0 / (step + 1), "step/completion_tokens": 10 * step, "seconds/step": 2.0} for step in range(4)]
        (folder / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
        if scores is not None:
            record = {"schema": 1, "step": 3, "domains": {"law": {"prompts": prompts, "scores": scores}}}
            (folder / "scores.json").write_text(json.dumps(record))
        return folder

    return make


def test_only_what_differs_is_listed(make_run):
    folders = {"a": make_run("a"), "b": make_run("b", lr=0.25, clip_norm=1.0)}
    assert differences(folders) == [("optim.lr", ["0.5", "0.25"]), ("optim.clip_norm", ["-", "1.0"])]


def test_code_teachers_and_data_differ_by_their_hashes_and_an_old_run_has_not_recorded_them(short_run, tmp_path):
    shutil.copytree(short_run, tmp_path / "other")
    start = json.loads((short_run / "starts.jsonl").read_text().splitlines()[-1])
    start["code"], start["data"]["tools"]["prompts"]["sha256"] = "0" * 64, "1" * 64
    (tmp_path / "other" / "starts.jsonl").write_text(json.dumps(start) + "\n")
    found = dict(differences({"a": short_run, "b": tmp_path / "other"}))
    assert set(found) == {"code", "data of tools, prompts"}
    assert found["code"][1] == "0" * 12
    (tmp_path / "other" / "starts.jsonl").unlink()
    assert dict(differences({"a": short_run, "b": tmp_path / "other"}))["code"][1] == "not recorded"


def test_what_changed_midway_stands_on_the_page_with_its_step(make_run):
    one, two = make_run("a"), make_run("b")
    changes = [(0, "num_steps", 5, 6), (40, "domains.law.prompts.share", 1.0, 0.25), (50, "domains.math", None, {"grader": "exact"})]
    lines = [json.dumps(dict(zip(("schema", "step", "setting", "before", "after"), (1, *change), strict=True))) for change in changes]
    (two / "changes.jsonl").write_text("\n".join([*lines, '{"schema": 1, "st']))
    assert changed_midway(two) == [
        Midway(41, "domains.law.prompts.share", "1.0", "0.25"),
        Midway(51, "domains.math", "null", "settings of its own"),
    ], "a change before the first step held for all of them"
    page = render_comparison([one, two])
    assert "<th>domains.law.prompts.share</th><td>b</td><td>41</td><td>1.0</td><td>0.25</td>" in page
    assert "changed midway" not in render_comparison([one, make_run("c")])


def test_other_code_and_another_teacher_from_a_step_on_are_changes_midway(short_run, tmp_path):
    start = json.loads((short_run / "starts.jsonl").read_text().splitlines()[-1])
    starts = [start, start | {"step": 7, "code": "0" * 64}, start | {"step": 9, "code": "0" * 64}]
    (tmp_path / "starts.jsonl").write_text("".join(json.dumps(begun) + "\n" for begun in starts))
    domains = [{name: {"teacher": {"hash": letter * 64}} for name in ("law", "tools")} for letter in "ab"]
    drop = {"tools": {"step": 8, "reason": "gone"}}
    spans = [{"from_step": step, "domains": own, "dropped": drop} for step, own in zip((1, 12), domains, strict=True)]
    (tmp_path / "teachers.json").write_text(json.dumps({"schema": 1, "spans": spans}))
    assert changed_midway(tmp_path) == [
        Midway(8, "code", start["code"][:12], "0" * 12),
        Midway(8, "teacher of tools", "in use", "dropped: gone"),
        *(Midway(12, f"teacher of {name}", "a" * 16, "b" * 16) for name in ("law", "tools")),
    ]


@pytest.mark.parametrize(
    ("starts", "expected"),
    [
        ([(0, "a"), (10, "b"), (10, "a")], []),
        ([(0, "a"), (10, "b"), (10, "c")], [(11, "a", "c")]),
        ([(0, "a"), (20, "b"), (10, "c"), (30, "a")], [(11, "a", "c"), (31, "c", "a")]),
        ([(0, "a"), (20, "b"), (10, "b")], [(11, "a", "b")]),
        ([(0, "a"), (10, "b"), (0, "a"), (10, "a")], []),
        ([(0, "a"), (10, "b"), (20, "b"), (20, "c")], [(11, "a", "b"), (21, "b", "c")]),
    ],
)
def test_starts_whose_steps_were_all_done_again_changed_nothing(starts, expected, short_run, tmp_path):
    facts = json.loads((short_run / "starts.jsonl").read_text().splitlines()[-1])
    (tmp_path / "starts.jsonl").write_text("".join(json.dumps(facts | {"step": step, "code": code}) + "\n" for step, code in starts))
    assert [(row.step, row.before, row.after) for row in changed_midway(tmp_path)] == expected
    code_of = {}  # the oracle: who did each step last, each start going on as far as the next one says, or further
    for step, code in starts:
        code_of = {done: own for done, own in code_of.items() if done <= step} | dict.fromkeys(range(step + 1, 41), code)
    changes = [(step, code_of[step - 1], code_of[step]) for step in range(2, 41) if code_of[step] != code_of[step - 1]]
    assert changes == expected


@pytest.mark.parametrize(
    ("starts", "changes", "expected"),
    [
        ([0, 10, 10], [(10, "x", 1, 2), (10, "x", 2, 1)], []),
        ([0, 10, 10], [(10, "x", 1, 2), (10, "y", 5, 6), (10, "x", 2, 3)], [(11, "x", "1", "3"), (11, "y", "5", "6")]),
        ([0, 20, 10], [(20, "x", 1, 2)], [(11, "x", "1", "2")]),
        ([0, 20, 10], [(20, "x", 1, 2), (10, "x", 2, 1)], []),
        ([0, 20, 10, 30], [(20, "x", 1, 2), (10, "x", 2, 3), (30, "x", 3, 1)], [(11, "x", "1", "3"), (31, "x", "3", "1")]),
        ([0, 10, 20, 0], [(10, "x", 1, 2), (20, "x", 2, 1)], []),
        ([0, 10, 20, 15], [(10, "x", 1, 2), (20, "x", 2, 1)], [(11, "x", "1", "2"), (16, "x", "2", "1")]),
        ([], [(10, "x", 1, 2), (20, "y", 1, 2), (15, "y", 2, 1)], [(11, "x", "1", "2")]),
        ([0, 20, 10, 20], [(20, "x", 1, 2, 1)], [(11, "x", "1", "2")]),
        ([0, 20, 10, 20], [(20, "x", 1, 2, 3)], [(21, "x", "1", "2")]),
        ([0, 20], [(20, "x", 1, 2, 2)], [(21, "x", "1", "2")]),
    ],
)
def test_settings_that_held_for_no_step_that_counts_are_no_changes(starts, changes, expected, short_run, tmp_path):
    facts = json.loads((short_run / "starts.jsonl").read_text().splitlines()[-1])
    (tmp_path / "starts.jsonl").write_text("".join(json.dumps(facts | {"step": step}) + "\n" for step in starts))
    lines = [dict(zip(("step", "setting", "before", "after", "start"), change, strict=False)) for change in changes]  # an earlier version wrote no start
    (tmp_path / "changes.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert [(row.step, row.what, row.before, row.after) for row in changed_midway(tmp_path)] == expected


def test_other_held_out_prompts_under_the_same_path_are_a_difference(short_run, tmp_path):
    shutil.copytree(short_run, tmp_path / "other")
    start = json.loads((short_run / "starts.jsonl").read_text().splitlines()[-1])
    config = yaml.safe_load((short_run / "config.yaml").read_text())["domains"]["tools"]["held_out"]
    assert {name: start["held_out"]["tools"][name] for name in ("path", "rows")} == {"path": config["path"], "rows": 16}
    start["held_out"]["tools"]["sha256"] = "1" * 64
    (tmp_path / "other" / "starts.jsonl").write_text(json.dumps(start) + "\n")
    assert [what for what, _ in differences({"a": short_run, "b": tmp_path / "other"})] == ["held-out data of tools"]
    del start["held_out"]  # as of a run of an earlier version
    (tmp_path / "other" / "starts.jsonl").write_text(json.dumps(start) + "\n")
    assert dict(differences({"a": short_run, "b": tmp_path / "other"}))["held-out data of tools"][1] == "not recorded"


def interval_of_eight(differences: list[float]) -> list[float]:
    """Their mean, and the wider of the normal interval and that of eight that are alike."""
    mean, unseen = sum(differences) / 8, 1 - 0.025 ** (1 / 8)
    half = 1.96 * (sum((value - mean) ** 2 for value in differences) / 7 / 8) ** 0.5
    return [mean, min(mean - half, mean - unseen * (mean + 1)), max(mean + half, mean + unseen * (1 - mean))]


def test_differences_are_paired_prompt_by_prompt(make_run):
    ours, theirs = [1, 0, 1, 1, 0, 1, 1, 0], [1, 1, 1, 1, 0, 1, 1, 1]
    [row] = paired_table({"a": make_run("a", ours), "b": make_run("b", theirs)})
    each = [their - our for our, their in zip(ours, theirs, strict=True)]
    shown = [float(number) for number in re.findall(r"[+-]\d\.\d+", row["difference"])]
    assert shown == pytest.approx(interval_of_eight(each), abs=0.001)
    assert (row["first"], row["other"], row["prompts"], row["note"]) == ("0.625", "0.875", 8, "")


def set_scores(folder: Path, **domains: tuple[str, list[float]]) -> None:
    """set_scores(folder, law=("hash of its prompts", [1, 0])): what the newest evaluation found."""
    found = {name: {"prompts": prompts, "scores": scores} for name, (prompts, scores) in domains.items()}
    (folder / "scores.json").write_text(json.dumps({"schema": 1, "step": 3, "domains": found}))


def test_domains_of_all_runs_are_listed_and_a_row_is_of_all_prompts_that_both_answered(make_run):
    folders = {name: make_run(name) for name in "abc"}
    set_scores(folders["a"], law=("x", [1, 0, 0]), math=("y", [0, 0, 1, 0, 1]), code=("z", [1, 1]))
    set_scores(folders["b"], math=("y", [1, 0, 1, 1, 1]), code=("other", [0, 0]), law=("x", [1, 1, 1]), tools=("v", [1, 0]))
    rows = paired_table(folders)
    notes = {(row["domain"], row["run"]): row["note"] for row in rows}
    assert list(notes) == [(domain, run) for domain in ("law", "math", "code") for run in "bc"] + [("tools", "b"), ("all", "b")]
    assert notes["tools", "b"].startswith("no scores of a:")
    assert notes["law", "c"].startswith("no scores of c:")
    each = [0, 1, 1, 1, 0, 0, 1, 0]
    row = rows[-1]
    assert [float(number) for number in re.findall(r"[+-]\d\.\d+", row["difference"])] == pytest.approx(interval_of_eight(each), abs=0.001)
    assert (row["first"], row["other"], row["prompts"], row["note"]) == ("0.375", "0.875", 8, "of law, math")


def test_checkpoints_that_were_evaluated_are_paired_where_all_runs_have_some(make_run):
    folders = {"a": make_run("a", [1, 0, 0, 0]), "b": make_run("b", [0, 0, 0, 0])}
    write_record(make_folder(folders["b"]), 2, None, "asked", {}, {"law": {"prompts": "all", "scores": [1, 1, 1, 1, 1, 0]}})
    [row] = paired_table(folders)
    assert (row["first"], row["other"]) == ("0.250", "0.000"), "only one of them was evaluated so"
    for step, scores in ((1, [1, 1, 0, 0, 0, 0]), (2, [0, 0, 0, 0, 0, 0])):
        write_record(make_folder(folders["a"]), step, None, "asked", {}, {"law": {"prompts": "all", "scores": scores}})
    write_choice(folders["a"], AcceptConfig(), "asked", [], {"step": 1, "manifest": None}, None)
    [row] = paired_table(folders)
    assert (row["first"], row["other"], row["prompts"]) == ("0.333", "0.833", 6), "of the chosen one against the newest"
    assert "a step 1, b step 2" in render_comparison(list(folders.values()))


def make_folder(run: Path) -> Path:
    (run / "evaluations").mkdir(exist_ok=True)
    return run


def test_runs_that_answered_other_prompts_are_not_paired(make_run):
    folders = {"a": make_run("a", [1, 0]), "b": make_run("b", [1, 0], prompts="y"), "c": make_run("c"), "d": make_run("d", [1, 1], seed=1)}
    found = {row["run"]: (row["difference"] != "", row["note"]) for row in paired_table(folders)}
    assert found["b"] == (False, "it answered other prompts")
    assert found["c"][1].startswith("no scores")
    assert found["d"][0]
    assert "another seed" in found["d"][1]


ASKED = {"samples_per_prompt": 1, "max_new_tokens": 32, "decode_width": 64, "dtype": "float32", "seed": 0, "grader": "exact"}
OTHER_SEED = "another seed, so other random numbers: the interval is still of the same prompts"


@pytest.mark.parametrize(
    ("asked", "note"),
    [
        (ASKED, ""),
        (None, ""),
        (ASKED | {"samples_per_prompt": 4, "max_new_tokens": 64}, "asked otherwise: samples_per_prompt 1 and 4, max_new_tokens 32 and 64"),
        (ASKED | {"grader": {"kind": "regex", "pattern": "(.*)"}}, "asked otherwise: another grader"),
        (ASKED | {"seed": 1}, OTHER_SEED),
        (ASKED | {"dtype": "bfloat16", "seed": 1}, f"asked otherwise: dtype float32 and bfloat16; {OTHER_SEED}"),
    ],
)
def test_prompts_that_were_asked_otherwise_are_paired_with_a_note(asked, note, make_run):
    folders = {"a": make_run("a"), "b": make_run("b")}
    scores = {"a": ([1, 0, 1], ASKED), "b": ([1, 1, 1], asked)}
    for name, (own, how) in scores.items():
        domains = {domain: {"prompts": domain, "scores": own} for domain in ("law", "math")}
        domains["law"] |= {} if how is None else {"asked": how}
        (folders[name] / "scores.json").write_text(json.dumps({"schema": 1, "step": 3, "domains": domains}))
    law, math, both = paired_table(folders)
    assert (law["note"], math["note"]) == (note, "")
    assert both["note"] == ("asked otherwise" if note.startswith("asked") else "")
    assert law["difference"] == math["difference"] != ""


def test_tokens_and_seconds_are_added_up_over_the_steps():
    steps = [(0, 9.0, 4), (1, 2.0, 5), (2, 3.0, 7)]
    records = [{"step": step, "seconds/step": seconds, "step/completion_tokens": tokens} for step, seconds, tokens in steps]
    assert positions(records, "steps") == [0.0, 1.0, 2.0]
    assert positions(records, "tokens") == [0.0, 5.0, 12.0]
    assert positions(records, "seconds") == [0.0, 2.0, 5.0]


def test_a_run_without_tokens_and_seconds_is_left_out_of_their_axes_and_the_page_says_so(make_run):
    runs = [make_run(name) for name in ("a", "b", "supervised")]
    for folder in runs:
        counted = {} if folder.name == "supervised" else {"step/completion_tokens": 10, "seconds/step": 2.0}
        records = [{"schema": 1, "step": step, "step/loss": 1.0} | (counted if step else {}) for step in range(150)]
        (folder / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    for folders, drawn in ((runs, {"steps": 3, "tokens": 2, "seconds": 2}), (runs[1:], {"steps": 2, "tokens": 0, "seconds": 0})):
        page = render_comparison(folders)
        for axis, metric in (("steps", None), ("tokens", "step/completion_tokens"), ("seconds", "seconds/step")):
            section = page.partition(f">Over {axis}</h2>")[2].partition("</section>")[0]
            assert section.count("data-points=") == drawn[axis]
            assert ("supervised is left out: " in section) == (metric is not None)
            assert metric is None or f"no {metric} to add up" in section


def test_the_page_has_every_run_and_axis_and_needs_no_network(make_run):
    page = render_comparison([make_run("a", [1, 0]), make_run("b", [1, 1], lr=0.1)])
    assert [title for title in ("Over steps", "Over tokens", "Over seconds") if f">{title}</h2>" in page] == ["Over steps", "Over tokens", "Over seconds"]
    assert page.count('class="line c0') + page.count('class="line c1') >= 6
    assert not re.findall(r"(?:src|href)=\"(?!#|data:)", page)
    assert "optim.lr" in page


def test_text_of_a_run_is_text(make_run):
    page = render_comparison([make_run("a"), make_run("<script>alert(1)</script>".replace("/", "_"))])
    assert "<script>alert" not in page
    assert "&lt;script&gt;alert" in page


def test_runs_of_one_name_are_told_apart_by_their_folders(make_run):
    (make_run("x").parent / "p").mkdir()
    first = make_run("y")
    second = first.parent / "p" / "y"
    shutil.copytree(first, second)
    page = render_comparison([first, second])
    assert f"<h1>{first.parent.name}/y | p/y</h1>" in page


def make_pipeline(make_run, name: str, **optim) -> Path:
    """A folder as `opd pipeline` leaves it, with a stage that trains and one that distils."""
    folder = make_run(name)
    (folder / "metrics.jsonl").unlink()
    stages = {"base": {"command": "specialize"}, "distill": {"command": "distill", "overrides": [f"student.model={name}/base/student"]}}
    config = {"run_dir": name, "seed": 0, "stages": stages}
    (folder / "config.yaml").write_text("# written by opd pipeline\n" + yaml.safe_dump(config))
    stage = make_run(f"{name}/distill", **optim)
    settings = yaml.safe_load((stage / "config.yaml").read_text()) | {"student": {"model": f"{name}/base/student"}}
    (stage / "config.yaml").write_text("# written by opd distill\n" + yaml.safe_dump(settings))
    return folder


def test_of_pipelines_the_stages_that_distil_are_compared(make_run):
    one, two = make_pipeline(make_run, "p"), make_pipeline(make_run, "q", lr=0.125)
    assert differences({"p": one, "q": two}) == [("optim.lr", ["0.5", "0.125"])], "a path inside of each folder is no difference"
    page = render_comparison([one, two])
    assert "<h1>p | q</h1>" in page
    assert page.count('class="line c1') >= 3
    assert "optim.lr" in render_comparison([one, make_run("a", lr=0.25)]), "and a run beside a pipeline"


def test_a_folder_with_nothing_to_draw_is_refused(make_run):
    empty = make_run("b")
    (empty / "metrics.jsonl").unlink()
    with pytest.raises(ValueError, match=r"b has no records of training .* nothing to draw"):
        render_comparison([make_run("a"), empty])
    pipeline = make_pipeline(make_run, "p")
    shutil.rmtree(pipeline / "distill")
    with pytest.raises(ValueError, match=r"no stage of the pipeline in .*p has begun to train"):
        render_comparison([make_run("c"), pipeline])


@pytest.mark.parametrize(("names", "sentence"), [(["a", "nowhere"], "is not a folder of a run"), (["a", "a"], "named twice")])
def test_what_cannot_be_compared_is_refused(names, sentence, make_run, tmp_path):
    make_run("a")
    with pytest.raises(ValueError, match=sentence):
        render_comparison([tmp_path / name for name in names])


def test_several_runs_behind_the_command_are_a_comparison(make_run):
    one, two = make_run("a"), make_run("b")
    assert split_command(["report", str(one), str(two), "out=x.html"]) == ("report", [f"run_dir='{one}'", f"others=['{two}']", "out=x.html"])
    assert split_command(["report", "out=x.html", str(one), str(two)]) == split_command(["report", str(one), str(two), "out=x.html"])
    assert split_command(["report", str(one)]) == ("report", [f"run_dir='{one}'"])
    with pytest.raises(ValueError, match="belongs to no W&B run"):
        report(ReportConfig(run_dir=str(one), others=[str(two)], upload=True))


def test_a_step_of_a_run_is_refused_among_several_runs_as_it_is_alone(make_run):
    one, two = make_run("a"), make_run("b")
    sentences = []
    for runs in ([f"{one}@3"], [f"{one}@3", str(two)], [str(two), f"{one}@3"]):
        with pytest.raises(ValueError, match="opd report is of a whole run") as refused:
            split_command(["report", *runs])
        sentences.append(str(refused.value))
    assert len(set(sentences)) == 1


def test_a_run_keeps_the_scores_of_its_newest_evaluation(short_run):
    record = read_scores(short_run)
    last = json.loads((short_run / "metrics.jsonl").read_text().splitlines()[-1])
    assert (record["step"], set(record["domains"])) == (2, {"arithmetic"})
    scores = record["domains"]["arithmetic"]["scores"]
    assert sum(scores) / len(scores) == pytest.approx(last["evaluation/arithmetic/accuracy"])
    cfg = yaml.safe_load((short_run / "config.yaml").read_text())
    asked = record["domains"]["arithmetic"]["asked"]
    evaluation = {name: cfg["evaluation"][name] or cfg["rollout"][name] for name in ("max_new_tokens", "decode_width")}
    own = {"samples_per_prompt": cfg["evaluation"]["samples"], "dtype": cfg["student"]["dtype"], "seed": cfg["seed"]}
    assert asked == evaluation | own | {"grader": cfg["domains"]["arithmetic"]["grader"]}


def test_the_command_writes_the_page_and_touches_no_run(short_run, tmp_path):
    for name in ("one", "two"):
        shutil.copytree(short_run, tmp_path / name)
    before = {path: path.stat().st_mtime_ns for name in ("one", "two") for path in (tmp_path / name).rglob("*")}
    command = [sys.executable, "-m", "opd", "report", "one", "two", "out=page.html"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120, check=False)
    assert (done.returncode, done.stdout.strip()) == (0, "page.html"), done.stderr
    assert "Nothing that was recorded" in (tmp_path / "page.html").read_text()
    assert {path: path.stat().st_mtime_ns for name in ("one", "two") for path in (tmp_path / name).rglob("*")} == before
