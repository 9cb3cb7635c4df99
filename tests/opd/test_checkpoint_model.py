"""A checkpoint's weights as a model folder: RUN@STEP."""

import json
import os
import shutil

import pytest
import torch
from safetensors.torch import load_file

from opd.__main__ import load_config, split_command
from opd.checkpoint_model import model_folder, resolve_models
from opd.distill import distill


@pytest.fixture(scope="module")
def run(short_run, tmp_path_factory):
    """A copy of the short run, whose folders of models stay from test to test."""
    folder = tmp_path_factory.mktemp("runs") / "run"
    shutil.copytree(short_run, folder)
    return folder


@pytest.fixture
def own_run(run, tmp_path):
    """One that a test may spoil."""
    shutil.copytree(run, tmp_path / "run")
    return tmp_path / "run"


def require_equal_files(folder, expected) -> None:
    found, wanted = load_file(folder / "model.safetensors"), load_file(expected / "model.safetensors")
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)


def test_the_last_checkpoint_gives_the_student_that_the_run_wrote(run):
    require_equal_files(model_folder(f"{run}@2"), run / "student")


@pytest.mark.parametrize("more", [["deepspeed=zero0"], ["deepspeed=zero3", "student.dtype=bfloat16"]], ids=["zero0", "zero3 bfloat16"])
def test_so_it_does_at_other_stages(more, short_settings, device, tmp_path):
    settings = ["num_steps=1", "logger=none", "check.signal=off", "evaluation.every=0"]
    distill(load_config("distill", [*short_settings, *settings, *more, f"run_dir={tmp_path / 'run'}"]))
    require_equal_files(model_folder(f"{tmp_path / 'run'}@1"), tmp_path / "run/student")


def test_an_earlier_checkpoint_gives_earlier_weights(run):
    first, last = (load_file(model_folder(f"{run}@{step}") / "model.safetensors") for step in (1, 2))
    assert any(not torch.equal(first[name], last[name]) for name in last)


def test_the_folder_is_made_once_for_each_checkpoint(run):
    folder = model_folder(f"{run}@2")
    written = (folder / "model.safetensors").stat()
    assert model_folder(f"{run}@2") == folder
    assert (folder / "model.safetensors").stat().st_mtime_ns == written.st_mtime_ns
    record = json.loads((folder / "checkpoint.json").read_text())
    (folder / "checkpoint.json").write_text(json.dumps(record | {"manifest": "of another"}))
    model_folder(f"{run}@2")
    assert json.loads((folder / "checkpoint.json").read_text()) == record


def test_every_model_of_a_config_can_be_named_so(run, short_settings):
    cfg = load_config("distill", [*short_settings, f"student.model={run}@1", f"domains.tools.teacher.model={run}@2"])
    resolve_models(cfg)
    assert cfg.student.model == str(run / "students/step-000001")
    assert cfg.domains["tools"].teacher.model == str(run / "students/step-000002")


def test_the_model_of_an_export_can_be_named_so(run):
    cfg = load_config(*split_command(["export", f"{run}@1"]))
    resolve_models(cfg)
    assert cfg.student.model == str(run / "students/step-000001")


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("{run}@7", "there is no checkpoint of step 7; there are 1, 2"),
        ("{run}/student@2", "student is not a folder of a run"),
        ("{run}/nowhere@2", "nowhere is not a folder of a run"),
    ],
)
def test_what_is_not_there_is_refused(name, words, run):
    with pytest.raises(ValueError, match=words):
        model_folder(name.format(run=run))


def test_a_damaged_checkpoint_is_refused(own_run):
    shutil.rmtree(own_run / "students", ignore_errors=True)
    path = own_run / "checkpoints/step-000001/mp_rank_00_model_states.pt"
    os.truncate(path, 1000)
    with pytest.raises(ValueError, match=r"@1 cannot be read: .*model_states\.pt is cut"):
        model_folder(f"{own_run}@1")


def test_a_folder_that_was_made_stays_when_its_checkpoint_goes(own_run):
    folder = model_folder(f"{own_run}@1")
    shutil.rmtree(own_run / "checkpoints/step-000001")
    assert model_folder(f"{own_run}@1") == folder
