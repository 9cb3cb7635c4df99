"""The run folder: written once everything is checked, and never shared by two configurations."""

import pytest

from opd.__main__ import load_config
from opd.run import open_run


def config(folder, *overrides: str):
    return load_config("distill", ["domain=[arithmetic]", f"run_dir={folder}", *overrides])


@pytest.mark.parametrize(
    ("override", "named"),
    [("optim.lr=1", "optim.lr"), ("student.dtype=bfloat16", "student.dtype"), ("+domain=tools", "domains.tools"), ("rollout.max_new_tokens=3", "rollout.max")],
)
def test_a_folder_of_another_configuration_is_refused_by_the_setting_that_differs(override, named, tmp_path):
    open_run(config(tmp_path / "run"))
    with pytest.raises(ValueError, match=named):
        open_run(config(tmp_path / "run", override))


def test_a_difference_behind_one_that_may_differ_is_seen(tmp_path):
    open_run(config(tmp_path / "run"))
    with pytest.raises(ValueError, match=r"student\.router_probe_every"):
        open_run(config(tmp_path / "run", "checkpoint.every=7", "logger.project=other", "student.router_probe_every=3"))


def test_what_may_differ_is_accepted(tmp_path):
    open_run(config(tmp_path / "run"))
    assert open_run(config(tmp_path / "run", "checkpoint.every=7", "logger=none", "threads=1")) == tmp_path / "run"


def test_fresh_deletes_a_run_folder_and_nothing_else(tmp_path):
    folder = open_run(config(tmp_path / "run"))
    (folder / "metrics.jsonl").write_text("{}")
    open_run(config(folder, "fresh=true"))
    assert not (folder / "metrics.jsonl").exists()
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter.tex").write_text("years of work")
    with pytest.raises(ValueError, match="not a run folder"):
        open_run(config(tmp_path / "thesis", "fresh=true"))
    assert (tmp_path / "thesis" / "chapter.tex").exists()
