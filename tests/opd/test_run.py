"""The run folder: written once everything is checked, and never shared by two configurations."""

import copy
import functools
import json
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from unittest.mock import Mock

import pytest
from omegaconf import OmegaConf

from opd import run
from opd.__main__ import load_config
from opd.config_changes import FREE, RECORDED, read_changes
from opd.run import lock, open_run, record_changes, write_config


@functools.cache
def composed(*overrides: str):
    return load_config("distill", ["domain=[arithmetic]", *overrides])


def config(folder, *overrides: str):
    """Composed once for the tests that want the same."""
    cfg = copy.deepcopy(composed(*overrides))
    cfg.run_dir = str(folder)
    return cfg


@pytest.mark.parametrize(
    ("override", "named"),
    [("optim.lr=1", "optim.lr"), ("student.dtype=bfloat16", "student.dtype"), ("+domain=tools", "domains.tools"), ("rollout.max_new_tokens=3", "rollout.max")],
)
def test_a_folder_of_another_configuration_is_refused_by_the_setting_that_differs(override, named, tmp_path):
    open_run(config(tmp_path / "run"), "distill")
    with pytest.raises(ValueError, match=named):
        open_run(config(tmp_path / "run", override), "distill")


def test_a_difference_behind_one_that_may_differ_is_seen(tmp_path):
    open_run(config(tmp_path / "run"), "distill")
    with pytest.raises(ValueError, match=r"optim\.lr was 1e-05 and is 1\.0, and 1 more"):
        open_run(config(tmp_path / "run", "checkpoint.every=7", "num_steps=9", "optim.lr=1", "seed=3"), "distill")


def test_what_may_differ_is_accepted(tmp_path):
    open_run(config(tmp_path / "run"), "distill")
    overrides = ["checkpoint.every=7", "logger=none", "threads=1", "profile.steps=[2,3]", "alarms.enabled=false"]
    overrides += ["teachers.timeout_seconds=9", "teachers.retries=9", "teachers.max_connections=9"]
    assert open_run(config(tmp_path / "run", *overrides), "distill") == tmp_path / "run"


DOMAIN_CHANGES = {
    "domains.arithmetic.teacher.model=org/other": 'domains.arithmetic.teacher.model was .* and is "org/other"',
    "domains.arithmetic.loss_weight=0.5": "domains.arithmetic.loss_weight was 2.0 and is 0.5",
    "domains.arithmetic.prompts.share=0.5": "domains.arithmetic.prompts.share was",
    "+domain=tools": "domains.tools is new",
    "domain=[tools]": "domains.arithmetic is gone",
}


@pytest.mark.parametrize("override", list(DOMAIN_CHANGES))
def test_a_changed_domain_is_refused_with_the_setting_that_allows_it(override, tmp_path):
    open_run(config(tmp_path / "run"), "distill")
    with pytest.raises(ValueError, match=DOMAIN_CHANGES[override] + r".*teachers\.allow_change=true"):
        open_run(config(tmp_path / "run", override), "distill")


@pytest.mark.parametrize("override", list(DOMAIN_CHANGES))
def test_a_changed_domain_is_accepted_where_it_is_allowed_and_nothing_is_written_yet(override, tmp_path):
    folder = open_run(config(tmp_path / "run"), "distill")
    before = (folder / "config.yaml").read_text()
    open_run(config(folder, override, "teachers.allow_change=true"), "distill")
    assert (folder / "config.yaml").read_text() == before


def test_a_change_that_is_no_domain_is_refused_though_domains_may_change(tmp_path):
    open_run(config(tmp_path / "run"), "distill")
    with pytest.raises(ValueError, match=r"teachers\.signal was .* begin anew with fresh=true$"):
        open_run(config(tmp_path / "run", "+domain=tools", "teachers.signal=top_k", "teachers.allow_change=true"), "distill")


def test_a_run_without_teachers_is_not_told_to_change_them(tmp_path):
    settings = ["domain=[arithmetic]", f"run_dir={tmp_path / 'run'}"]
    open_run(load_config("specialize", settings), "specialize")
    with pytest.raises(ValueError, match=r"domains\.tools is new.* begin anew with fresh=true$"):
        open_run(load_config("specialize", [*settings, "+domain=tools"]), "specialize")


def test_the_order_of_the_domains_is_part_of_the_configuration(tmp_path):
    """It decides which prompts a step draws (rollout/prompts.py)."""
    open_run(config(tmp_path / "run", "domain=[arithmetic,tools]"), "distill")
    with pytest.raises(ValueError, match=r"domains were arithmetic, tools and are tools, arithmetic, in this order.*teachers\.allow_change=true"):
        open_run(config(tmp_path / "run", "domain=[tools,arithmetic]"), "distill")


def test_a_teachers_server_may_move(tmp_path):
    """That it holds the same model is seen later (teachers/manifest.py)."""
    open_run(config(tmp_path / "run", "domains.arithmetic.teacher.server=http://a:8000"), "distill")
    assert open_run(config(tmp_path / "run", "domains.arithmetic.teacher.server=http://b:9000"), "distill") == tmp_path / "run"


def test_the_servers_that_draw_the_rollouts_may_change(tmp_path):
    settings = [config(tmp_path / "run", "rollout.sampler=vllm", f"rollout.vllm.servers={servers}") for servers in ("[http://a:1]", "[http://b:2,http://c:3]")]
    assert [open_run(cfg, "distill") for cfg in settings] == [tmp_path / "run"] * 2


def test_a_settled_config_is_what_a_run_with_it_would_have_written(tmp_path):
    settings = ["domain=[tools,sorting]", "domains.tools.loss_weight={0: 1.0, 5: 0.5}", "domains.sorting.teacher.dtype=bfloat16", "checkpoint.every=3"]
    folder = open_run(config(tmp_path / "run"), "distill")
    other = config(folder, *settings, "teachers.allow_change=true")
    record_changes(folder, other, 4)
    (tmp_path / "other").mkdir()
    write_config(tmp_path / "other", other, "distill")
    assert (folder / "config.yaml").read_text() == (tmp_path / "other" / "config.yaml").read_text()


def test_what_is_recorded_stands_in_the_folder_and_what_is_free_is_said(tmp_path):
    folder = open_run(config(tmp_path / "run", "num_steps=9", "checkpoint.every=3"), "distill")
    found = record_changes(folder, config(folder, "num_steps=20", "checkpoint.every=5", "evaluation.prompts=null"), 4)
    assert [str(change) for change in found] == ["checkpoint.every was 3 and is 5", "evaluation.prompts was 256 and is null", "num_steps was 9 and is 20"]
    assert [json.loads(line) for line in (folder / "changes.jsonl").read_text().splitlines()] == [
        {"schema": 1, "step": 4, "start": 0, "setting": "evaluation.prompts", "before": 256, "after": None},
        {"schema": 1, "step": 4, "start": 0, "setting": "num_steps", "before": 9, "after": 20},
    ]
    assert record_changes(folder, config(folder, "num_steps=20", "checkpoint.every=5", "evaluation.prompts=null"), 6) == []


@pytest.mark.parametrize("later", ["num_steps=9", "num_steps=30"])
def test_a_change_that_a_kill_kept_from_holding_is_no_change(later, tmp_path, monkeypatch):
    folder = open_run(config(tmp_path / "run", "num_steps=9"), "distill")
    record_changes(folder, config(folder, "num_steps=10"), 2)
    (folder / "starts.jsonl").write_text("{}\n")
    with monkeypatch.context() as patch:
        patch.setattr(run, "replace_text", Mock(side_effect=InterruptedError))
        with pytest.raises(InterruptedError):
            record_changes(folder, config(folder, "num_steps=20"), 4)
    record_changes(folder, config(folder, later), 4)
    record_changes(folder, config(folder, later), 4)
    expected = [(2, 0, 9, 10), (4, 1, 10, int(later.partition("=")[2]))]
    assert [(change["step"], change["start"], change["before"], change["after"]) for change in read_changes(folder)] == expected


@pytest.mark.parametrize("domains", ["[tools,arithmetic]", "[tools]", "[arithmetic,tools,sorting]"])
def test_a_change_of_domains_that_held_is_not_forgotten(domains, tmp_path):
    folder = open_run(config(tmp_path / "run", "domain=[arithmetic,tools]"), "distill")
    other = config(folder, f"domain={domains}", "teachers.allow_change=true")
    record_changes(folder, other, 4)
    recorded = read_changes(folder)
    assert recorded
    record_changes(folder, other, 4)  # of the start after one that was killed before its own record
    assert read_changes(folder) == recorded


@pytest.mark.parametrize("name", [*FREE, *RECORDED])
def test_every_setting_with_a_rule_is_one(name, tmp_path):
    cfg = load_config("specialize", []) if name.startswith("grpo") else config(tmp_path)
    value = OmegaConf.structured(cfg)
    for key in name.split("."):
        assert key in value
        value = value[key]


def test_fresh_deletes_a_run_folder_and_nothing_else(tmp_path):
    folder = open_run(config(tmp_path / "run"), "distill")
    (folder / "metrics.jsonl").write_text("{}")
    (folder / "profile").mkdir()
    (folder / "profile" / "rank-0-steps-1-2.json.gz").touch()
    open_run(config(folder, "fresh=true"), "distill")
    assert not (folder / "metrics.jsonl").exists()
    assert not (folder / "profile").exists()
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter.tex").write_text("years of work")
    with pytest.raises(ValueError, match="not a folder of `opd distill`"):
        open_run(config(tmp_path / "thesis", "fresh=true"), "distill")
    assert (tmp_path / "thesis" / "chapter.tex").exists()


def test_fresh_leaves_what_the_run_did_not_write(tmp_path):
    folder = open_run(config(tmp_path / "run"), "distill")
    (folder / "notes.txt").write_text("mine")
    open_run(config(folder, "fresh=true"), "distill")
    assert (folder / "notes.txt").read_text() == "mine"


def test_fresh_leaves_a_folder_to_which_an_evaluation_writes(tmp_path):
    open_run(config(tmp_path / "run"), "distill")
    (tmp_path / "run/evaluations").mkdir()
    with another_process(tmp_path / "run/evaluations") as answer:
        assert answer == "locked"
        with pytest.raises(ValueError, match="to which an opd evaluate writes: end that first"):
            open_run(config(tmp_path / "run", "fresh=true"), "distill")
    open_run(config(tmp_path / "run", "fresh=true"), "distill")
    assert not (tmp_path / "run/evaluations").exists()


def test_fresh_refuses_to_delete_what_the_run_reads(tmp_path):
    folder = open_run(config(tmp_path / "run"), "distill")
    teacher = f"domains.arithmetic.teacher.model={folder / 'student'}"
    with pytest.raises(ValueError, match="which the run reads"):
        open_run(config(folder, "fresh=true", teacher), "distill")


def test_a_folder_of_another_command_is_refused(tmp_path):
    open_run(config(tmp_path / "run"), "distill")
    with pytest.raises(ValueError, match="not a folder of `opd specialize`"):
        open_run(config(tmp_path / "run"), "specialize")


def test_a_folder_with_nothing_but_a_lock_file_can_be_taken(tmp_path):
    """What a run leaves that was killed between its lock and its configuration."""
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / ".lock").touch()
    assert (open_run(config(tmp_path / "run"), "distill") / "config.yaml").is_file()


LOCK = """
import fcntl, sys
file = open(sys.argv[1], "w")
try:
    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    print("locked", flush=True)
except BlockingIOError:
    print("refused", flush=True)
sys.stdin.read()
"""
"""What opd.run.lock does, without the seconds that its imports take."""


@contextmanager
def another_process(folder: Path) -> Iterator[str]:
    """A process that asks for the folder's lock, and keeps it for the block; gives what came of it."""
    process = subprocess.Popen([sys.executable, "-c", LOCK, str(folder / ".lock")], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    yield process.stdout.readline().strip()
    process.communicate()


def test_two_processes_do_not_write_to_one_folder(tmp_path):
    ours, theirs = tmp_path / "ours", tmp_path / "theirs"
    with another_process(open_run(config(ours), "distill")) as outcome:
        assert outcome == "refused"
    theirs.mkdir()
    with another_process(theirs) as outcome:
        assert outcome == "locked"
        assert "another process is writing" in lock(theirs)
    assert lock(theirs) is None, "it has ended"


@pytest.mark.parametrize("path", ["file", "file/below"])
def test_a_run_dir_that_cannot_be_one_is_refused(path, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="cannot be used"):
        open_run(config(tmp_path / path), "distill")
