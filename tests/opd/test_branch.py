"""A run that begins from another run's checkpoint."""

import hashlib
import json
import shutil
from pathlib import Path

import pytest

from opd.__main__ import load_config
from opd.distill import distill
from opd.run import open_run


def config(run_dir: Path, settings: list[str], *more: str):
    return load_config("distill", [*settings, f"run_dir={run_dir}", "logger=none", *more])


def test_a_branch_with_the_same_settings_does_what_the_run_did(short_run, short_settings, numbers, tmp_path):
    distill(config(tmp_path / "branch", short_settings, f"branch_from={short_run}@1"))
    assert numbers(tmp_path / "branch") == numbers(short_run)[2:]
    assert (tmp_path / "branch/student/model.safetensors").read_bytes() == (short_run / "student/model.safetensors").read_bytes()
    manifest = hashlib.sha256((short_run / "checkpoints/step-000001/manifest.json").read_bytes()).hexdigest()
    assert json.loads((tmp_path / "branch/lineage.json").read_text()) == {"schema": 1, "from": str(short_run), "step": 1, "manifest": manifest}


def test_a_branch_leaves_the_other_run_as_it_is(short_run, short_settings, tmp_path):
    def content() -> dict[str, bytes]:
        return {str(path): path.read_bytes() for path in short_run.rglob("*") if path.is_file()}

    before = content()
    run_dir = open_run(config(tmp_path / "branch", short_settings, f"branch_from={short_run}", "num_steps=3", "optim.lr=0.5"), "distill")
    assert json.loads((run_dir / "checkpoints/latest.json").read_text())["step"] == 2
    shutil.rmtree(run_dir / "checkpoints")
    assert content() == before


@pytest.mark.parametrize(
    ("source", "more", "words"),
    [
        ("{run}@7", [], "holds no checkpoint of step 7; there are 1, 2"),
        ("{run}@last", [], "must be RUN@STEP, RUN@chosen or RUN"),
        ("{run}/nowhere", [], "nowhere holds no checkpoint"),
        ("{run}/student", [], "holds no checkpoint"),
        ("{run}@2", [], "has done 2 steps and num_steps=2"),
        ("{run}@1", ["quant.experts=none"], "was shaped by quant.experts=mxfp4 and this run has none"),
        ("{run}@1", ["student.dtype=bfloat16"], "was shaped by student.dtype=float32 and this run has bfloat16"),
    ],
)
def test_a_branch_that_cannot_be_taken_up_is_refused(source, more, words, short_run, short_settings, tmp_path):
    with pytest.raises(ValueError, match=words):
        open_run(config(tmp_path / "branch", short_settings, f"branch_from={source.format(run=short_run)}", *more), "distill")


def test_a_branch_of_a_damaged_checkpoint_is_refused(short_run, short_settings, tmp_path):
    shutil.copytree(short_run, tmp_path / "damaged")
    with (tmp_path / "damaged/checkpoints/step-000001/mp_rank_00_model_states.pt").open("r+b") as file:
        file.seek(1000)
        file.write(b"damage")
    with pytest.raises(ValueError, match=r"model_states\.pt is damaged: its sha256 is another"):
        open_run(config(tmp_path / "branch", short_settings, f"branch_from={tmp_path / 'damaged'}@1"), "distill")


def test_a_branch_of_a_run_without_its_config_is_refused(short_run, short_settings, tmp_path):
    shutil.copytree(short_run / "checkpoints", tmp_path / "bare/checkpoints")
    with pytest.raises(ValueError, match=r"cannot be taken up: .*bare/config\.yaml: No such file"):
        open_run(config(tmp_path / "branch", short_settings, f"branch_from={tmp_path / 'bare'}@1"), "distill")


def test_another_origin_is_refused_when_a_branch_is_taken_up(short_run, short_settings, tmp_path):
    open_run(config(tmp_path / "branch", short_settings, f"branch_from={short_run}@1"), "distill")
    with pytest.raises(ValueError, match=r"branch_from was .*@1"):
        open_run(config(tmp_path / "branch", short_settings), "distill")
