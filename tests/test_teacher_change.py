"""Twelve domains, and a resume that changes their teachers: refused unless asked for, and then on record."""

import contextlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf
from safetensors.torch import load_file, save_file

from opd import distill as distill_module
from opd.__main__ import load_config
from opd.distill import distill

NAMES = [f"domain_{number:02d}" for number in range(12)]
ADDED, REPLACED, GONE = "domain_12", "domain_03", "domain_07"
NUM_STEPS, STOPPED_AT = 3, 1
ALLOWED = "teachers.allow_change=true"
SETTINGS = [
    f"num_steps={NUM_STEPS}", "rollout.prompts_per_step=24", "rollout.max_new_tokens=4", "rollout.decode_width=24", "checkpoint.every=1", "checkpoint.keep=9",
    "optim.lr=1e-3", "logger=none", "threads=1", "teachers.max_resident=13", "check.signal=off",
]  # fmt: skip


@pytest.fixture(scope="module")
def make_teacher(saved_qwen3_moe, tmp_path_factory) -> Callable[[int], Path]:
    """make_teacher(3): folder of the tiny model with weights that only this number has."""
    root = tmp_path_factory.mktemp("teachers")

    def make(number: int) -> Path:
        folder = root / f"teacher_{number:02d}"
        if not folder.exists():
            shutil.copytree(saved_qwen3_moe, folder)
            write_weights(folder, number)
        return folder

    return make


def write_weights(folder: Path, number: int) -> None:
    weights = load_file(folder / "model.safetensors")
    save_file({name: tensor * (1 + (number + 1) / 50) for name, tensor in weights.items()}, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.fixture(scope="module")
def workplace(make_teacher, tmp_path_factory) -> Path:
    """A working directory in which each domain is a file, as a user writes them."""
    folder = tmp_path_factory.mktemp("workplace")
    (folder / "conf" / "domain").mkdir(parents=True)
    for number, name in enumerate([*NAMES, ADDED]):
        text = f"# @package domains.{name}\nteacher: {{model: {make_teacher(number)}}}\nprompts: {{path: 'synthetic:arithmetic', rows: 20}}\n"
        (folder / "conf" / "domain" / f"{name}.yaml").write_text(text)
    return folder


@pytest.fixture(scope="module")
def run(saved_qwen3_moe, workplace, device) -> Callable[..., None]:
    """run(run_dir, *overrides): `opd distill` of the twelve domains, given in the working directory."""

    def start(run_dir: Path, *overrides: str) -> None:
        with contextlib.chdir(workplace):
            cfg = load_config("distill", [*SETTINGS, f"domain=[{','.join(NAMES)}]", f"student.model={saved_qwen3_moe}", f"run_dir={run_dir}", *overrides])
        distill(cfg)

    return start


@pytest.fixture(scope="module")
def run_until(run) -> Callable[..., None]:
    """run_until(3, run_dir, *overrides): a run that is killed after it has saved step 3."""

    def start(last: int, run_dir: Path, *overrides: str) -> None:
        save = distill_module.save

        def save_and_die(run_dir, step, *others):
            save(run_dir, step, *others)
            if step == last:
                raise KeyboardInterrupt

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(distill_module, "save", save_and_die)
            with pytest.raises(KeyboardInterrupt):
                run(run_dir, *overrides)

    return start


@pytest.fixture(scope="module")
def one_override(make_teacher) -> dict[str, str]:
    """Each change of the twelve domains."""
    return {ADDED: f"+domain={ADDED}", REPLACED: f"domains.{REPLACED}.teacher.model={make_teacher(20)}", GONE: f"~domains.{GONE}"}


@pytest.fixture(scope="module")
def twelve(make_teacher) -> dict[str, str]:
    """Teacher by domain."""
    return {name: str(make_teacher(number)) for number, name in enumerate(NAMES)}


@pytest.fixture(scope="module")
def changed(twelve, make_teacher) -> dict[str, str]:
    """The twelve with one added, one replaced and one gone."""
    others = {name: folder for name, folder in twelve.items() if name != GONE}
    return others | {REPLACED: str(make_teacher(20)), ADDED: str(make_teacher(12))}


@pytest.fixture(scope="module")
def stopped(run_until, tmp_path_factory) -> Path:
    """Folder of a run of the twelve that was killed at a step; a test that goes on with it copies it."""
    run_dir = tmp_path_factory.mktemp("runs") / "stopped"
    run_until(STOPPED_AT, run_dir)
    return run_dir


@pytest.fixture
def run_dir(stopped, tmp_path) -> Path:
    return shutil.copytree(stopped, tmp_path / "run")


@pytest.fixture(scope="module")
def continued(stopped, run, one_override, tmp_path_factory) -> Path:
    """Folder of the run that went on with the changed teachers and finished."""
    run_dir = shutil.copytree(stopped, tmp_path_factory.mktemp("runs") / "continued")
    run(run_dir, *one_override.values(), ALLOWED)
    return run_dir


@pytest.fixture(scope="module")
def killed_after_change(stopped, run_until, one_override, tmp_path_factory) -> Path:
    """Folder of the run that went on with the changed teachers and was killed a step later."""
    run_dir = shutil.copytree(stopped, tmp_path_factory.mktemp("runs") / "killed")
    run_until(STOPPED_AT + 1, run_dir, *one_override.values(), ALLOWED)
    return run_dir


def spans(run_dir: Path) -> list[dict]:
    return json.loads((run_dir / "teachers.json").read_text())["spans"]


def opd_json(run_dir: Path, step: int) -> Path:
    return run_dir / "checkpoints" / f"step-{step:06d}" / "opd.json"


def models(span: dict) -> dict[str, str]:
    return {name: described["teacher"]["model"] for name, described in span["domains"].items()}


def records(run_dir: Path) -> list[dict]:
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def domains_of(record: dict) -> set[str]:
    return {name.split("/")[1] for name in record if name.startswith("domain/") and name.endswith("/kl_per_token")}


@pytest.mark.parametrize("name", [pytest.param(ADDED, marks=pytest.mark.slow), REPLACED, pytest.param(GONE, marks=pytest.mark.slow)])
def test_a_resume_with_one_domain_changed_is_refused_by_its_name(name, run_dir, run, one_override):
    with pytest.raises(ValueError, match=rf"domains\.{name}.*teachers\.allow_change=true"):
        run(run_dir, one_override[name])


def test_a_run_whose_teachers_change_resumes_where_it_was_and_finishes(continued, stopped):
    assert [record["step"] for record in records(continued)] == list(range(NUM_STEPS + 1))
    assert records(continued)[: STOPPED_AT + 1] == records(stopped)
    assert (continued / "student" / "model.safetensors").is_file()


def test_the_manifest_says_which_teachers_scored_which_steps(continued, twelve, changed):
    before, after = spans(continued)
    assert (before["from_step"], after["from_step"]) == (1, STOPPED_AT + 1)
    assert (models(before), models(after)) == (twelve, changed)


def test_each_checkpoint_has_the_manifest_of_its_steps(continued):
    found = {step: json.loads(opd_json(continued, step).read_text())["teachers"]["spans"] for step in range(1, NUM_STEPS + 1)}
    assert found == {step: spans(continued)[: 1 if step <= STOPPED_AT else 2] for step in found}


def test_a_domain_that_is_gone_has_no_metrics_any_more_and_a_new_one_has(continued, twelve, changed):
    assert [domains_of(record) for record in records(continued)[1:]] == [set(twelve)] * STOPPED_AT + [set(changed)] * (NUM_STEPS - STOPPED_AT)


def test_config_yaml_gets_the_settings_of_the_run_that_went_on(continued, stopped, changed):
    now, before = (OmegaConf.to_container(OmegaConf.load(folder / "config.yaml")) for folder in (continued, stopped))
    assert {name: found["teacher"]["model"] for name, found in now.pop("domains").items()} == changed
    del before["domains"]
    before["run_dir"], before["teachers"]["allow_change"] = now["run_dir"], True
    assert now == before


@pytest.mark.parametrize("asked_again", [(), pytest.param((ALLOWED,), marks=pytest.mark.slow)])
def test_a_run_killed_after_its_change_goes_on_whether_that_stays_allowed_or_not(
    asked_again, run, killed_after_change, continued, one_override, numbers, tmp_path
):
    run_dir = shutil.copytree(killed_after_change, tmp_path / "run")
    run(run_dir, *one_override.values(), *asked_again)
    assert numbers(run_dir) == numbers(continued)
    assert spans(run_dir) == spans(continued)


def test_a_change_that_no_checkpoint_holds_is_forgotten_with_its_steps(run, killed_after_change, tmp_path, twelve):
    """Whoever goes back to the old teachers, from the checkpoint before, has the old history."""
    run_dir = shutil.copytree(killed_after_change, tmp_path / "run")
    shutil.rmtree(opd_json(run_dir, STOPPED_AT + 1).parent)
    pointer = {"schema": 1, "step": STOPPED_AT, "tag": f"step-{STOPPED_AT:06d}"}
    (run_dir / "checkpoints" / "latest.json").write_text(json.dumps(pointer))
    run(run_dir, ALLOWED)
    assert [models(span) for span in spans(run_dir)] == [twelve]


@pytest.fixture
def swap_weights(make_teacher):
    """swap_weights(5): other numbers in the files of teacher 5, until the test ends."""
    before = {}

    def swap(number: int) -> None:
        path = make_teacher(number) / "model.safetensors"
        before[path] = path.read_bytes()
        write_weights(path.parent, 30)

    yield swap
    for path, content in before.items():
        path.write_bytes(content)


def test_a_checkpoint_swapped_under_its_path_is_refused_before_anything_is_written(run, run_dir, swap_weights):
    swap_weights(5)
    before = {path: path.read_bytes() for path in run_dir.rglob("*") if path.is_file()}
    with pytest.raises(ValueError, match=r"\(domain_05: teacher\.hash was \w{12} and is \w{12}\).*teachers\.allow_change=true"):
        run(run_dir)
    assert {path: path.read_bytes() for path in run_dir.rglob("*") if path.is_file()} == before


def test_a_checkpoint_of_before_there_were_manifests_is_taken_up_and_the_record_begins_there(run, run_dir, twelve):
    state = json.loads(opd_json(run_dir, STOPPED_AT).read_text())
    del state["teachers"]
    opd_json(run_dir, STOPPED_AT).write_text(json.dumps(state | {"schema": 1}))
    (opd_json(run_dir, STOPPED_AT).parent / "manifest.json").unlink()
    run(run_dir)
    [span] = spans(run_dir)
    assert (span["from_step"], models(span)) == (STOPPED_AT + 1, twelve)


@pytest.mark.slow
def test_a_resume_without_a_change_equals_a_run_that_nobody_disturbed(run, run_dir, numbers, tmp_path):
    run(run_dir)
    run(tmp_path / "whole")
    assert numbers(run_dir) == numbers(tmp_path / "whole")
    assert (run_dir / "student" / "model.safetensors").read_bytes() == (tmp_path / "whole" / "student" / "model.safetensors").read_bytes()
    assert spans(run_dir) == spans(tmp_path / "whole")


@pytest.mark.slow
def test_a_run_goes_on_without_a_dropped_domain_though_its_teacher_cannot_be_read_any_more(run, run_until, make_teacher, numbers, tmp_path):
    broken = shutil.copytree(make_teacher(7), tmp_path / "broken")
    weights = load_file(broken / "model.safetensors")
    weights["model.norm.weight"].fill_(torch.nan)
    save_file(weights, broken / "model.safetensors", metadata={"format": "pt"})
    settings = (f"domains.{GONE}.teacher.model={broken}", "teachers.on_failure=drop")
    run(tmp_path / "whole", *settings)
    run_until(STOPPED_AT, tmp_path / "run", *settings)
    os.truncate(broken / "model.safetensors", 1000)
    run(tmp_path / "run", *settings)
    assert numbers(tmp_path / "run") == numbers(tmp_path / "whole")
    assert spans(tmp_path / "run") == spans(tmp_path / "whole")
    assert list(spans(tmp_path / "run")[0]["dropped"]) == [GONE]
