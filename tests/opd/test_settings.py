"""What can be set (`opd COMMAND --help`), and what is set where (`--cfg`)."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from omegaconf import OmegaConf

from opd.__main__ import split_command, split_question
from opd.composition import COMMAND_LINE, CONF, compose_config, group_choices, leaves, load_config, origins
from opd.config import SCHEMAS
from opd.errors import PREEMPTED
from opd.run import config_dict, write_config
from opd.run_state import begin_state, end_state
from opd.settings import print_config, print_help, select, settings_of

SETTINGS = {name: list(settings_of(schema)) for name, schema in SCHEMAS.items()}


def opd(*arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-m", "opd", *arguments], capture_output=True, text=True, timeout=120, check=False)


@pytest.mark.parametrize("command", SCHEMAS)
def test_every_setting_has_a_text_of_its_own(command):
    assert [setting.path for setting in SETTINGS[command] if not setting.text] == []


@pytest.mark.parametrize("command", SCHEMAS)
def test_a_composed_config_has_no_setting_that_is_not_listed(command):
    """And so the list is whole: what stands in no dataclass cannot be composed."""
    listed = {setting.path for setting in SETTINGS[command]}
    for path, value in leaves(OmegaConf.to_container(compose_config(command, []))):
        path = re.sub(r"^(stages|alarms\.rules)\.\w+\.", r"\1.NAME.", path)
        inside_mapping = [".".join(path.split(".")[:length]) for length in range(1, path.count(".") + 2)]
        assert listed & set(inside_mapping) or value == {}, path


def test_a_setting_is_described_with_type_unit_default_allowed_values_and_text():
    found = {setting.path: setting for setting in SETTINGS["distill"]}
    grace = found["launch.grace_seconds"]
    assert (grace.kind, grace.unit, grace.default) == ("number", "seconds", "120.0")
    assert "from SIGTERM or SIGUSR1 to the end of the process" in grace.text
    assert found["optim.schedule"].allowed == "constant|linear|cosine"
    assert found["rollout.prompts_per_step"].allowed == "at least 1"
    assert found["teachers.memory_gb"].kind == "number or null"
    assert found["optim.betas"].default == "[0.9,0.95]"
    assert found["domains.NAME.prompts.share"].kind.startswith("number or schedule")


@pytest.mark.parametrize(
    ("command", "path", "default", "unit"),
    [
        ("evaluate", "evaluation.prompts", "null", "prompts"),
        ("distill", "evaluation.prompts", "256", "prompts"),
        ("specialize", "rollout.prompts_per_step", "16", "prompts"),
        ("specialize", "rollout.completions_per_prompt", "8", "completions"),
        ("specialize", "examples_per_step", "128", "examples"),
    ],
)
def test_a_default_is_the_commands_own_and_a_unit_is_what_is_counted(command, path, default, unit):
    [setting] = [setting for setting in SETTINGS[command] if setting.path == path]
    assert (setting.default, setting.unit) == (default, unit)


@pytest.mark.parametrize("command", sorted(SCHEMAS))
def test_defaults_are_those_of_the_dataclass(command):
    cfg = OmegaConf.to_container(OmegaConf.structured(SCHEMAS[command]), enum_to_str=True)
    values = dict(leaves(cfg))
    for setting in SETTINGS[command]:
        if "NAME" not in setting.path:
            shown = yaml.safe_load(setting.default.replace(":", ": "))
            assert shown == values[setting.path] or setting.default == str(values[setting.path]), setting.path


@pytest.mark.parametrize(
    ("path", "override", "allowed"),
    [
        ("rollout.staleness", "rollout.staleness=2", "0 or 1"),
        ("loss.temperature", "loss.temperature=0", "above 0"),
        ("loss.beta", "loss.beta=1.5", "from 0 (forward KL) to 1 (reverse KL)"),
        ("evaluation.samples", "evaluation.samples=0", "at least 1"),
        ("launch.max_hours", "launch.max_hours=-4", "above 0"),
        ("optim.momentum", "optim.momentum=1", "from 0 to below 1"),
        ("domains.NAME.grader.tolerance", "+domains.law.grader={kind:numeric,tolerance:-1}", "at least 0"),
    ],
)
def test_the_allowed_values_are_what_is_checked(path, override, allowed):
    assert [setting.allowed for setting in SETTINGS["distill"] if setting.path == path] == [allowed]
    with pytest.raises(ValueError, match=override.lstrip("+").partition("=")[0].removeprefix("domains.law.")):
        load_config("distill", [override, "student.model=x"])


def test_the_settings_of_a_grader_stand_under_it():
    found = {setting.path.removeprefix("domains.NAME.grader"): setting for setting in select(SETTINGS["distill"], "domains.law.grader", "opd distill")}
    assert found[""].kind == "text or mapping"
    assert found[".kind"].allowed == "exact|numeric|regex|json|tool_call|backspace|python"
    assert (found[".tolerance"].unit, found[".seconds"].unit) == ("", "seconds")


def test_a_path_selects_what_stands_under_it():
    found = select(SETTINGS["distill"], "domains.law.held_out", "opd distill")
    assert {setting.path.removeprefix("domains.NAME.held_out.") for setting in found} >= {"path", "split", "rows"}
    assert all(setting.path.startswith("domains.NAME.held_out.") for setting in found)
    assert [setting.path for setting in select(SETTINGS["distill"], "optim.lr", "opd distill")] == ["optim.lr"]


def test_a_path_that_leads_nowhere_names_the_nearest():
    with pytest.raises(ValueError, match=r"opd distill has no setting 'optim.lrr' \(did you mean 'optim.lr'\?\)"):
        select(SETTINGS["distill"], "optim.lrr", "opd distill")


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["distill", "--help"], (("help", ""), ["distill"])),
        (["distill", "--help", "optim"], (("help", "optim"), ["distill"])),
        (["distill", "--cfg", "seed=3"], (("cfg", ""), ["distill", "seed=3"])),
        (["distill", "seed=3", "--cfg", "optim.lr"], (("cfg", "optim.lr"), ["distill", "seed=3"])),
        (["distill", "seed=3"], (None, ["distill", "seed=3"])),
    ],
)
def test_a_question_may_have_a_path_after_it(arguments, expected):
    assert split_question(arguments) == expected


def test_help_shows_what_the_file_of_the_command_sets_and_the_files_to_choose_from(capsys):
    print_help("distill", "about", "")
    text = capsys.readouterr().out
    assert "run_dir = runs/distill" in text
    assert "deepspeed = {zero_optimization:{stage:1}}" in text
    assert "quant=  mxfp4_experts | none   (files of conf/quant/; default none)" in text
    assert "sweep.parallel = 1   (integer; jobs; at least 1)" in text
    assert set(group_choices("distill")["optim"]) == {path.stem for path in (CONF / "optim").glob("*.yaml")}


def value_in_file(file: Path, path: str, prefix: str):
    found = OmegaConf.to_container(OmegaConf.load(file))
    for name in path.removeprefix(prefix).split("."):
        found = found[name]
    return found


@pytest.mark.parametrize("experiment", ["quickstart", "self_repair_distill", "twelve_domains_distill"])
def test_the_file_that_is_named_holds_the_value(experiment):
    overrides = [f"experiment={experiment}", "optim=adamw", "optim.lr=0.5", "student.model=x"]
    found = origins("distill", overrides)
    config = dict(leaves(OmegaConf.to_container(compose_config("distill", overrides), enum_to_str=True)))
    assert found["optim.lr"] == found["student.model"] == COMMAND_LINE
    assert len(found) > 20
    for path, origin in found.items():
        if origin == COMMAND_LINE:
            continue
        file = CONF.parent / origin
        header = file.read_text().partition("@package ")[2].partition("\n")[0]
        group = file.parent.name if file.parent != CONF else ""
        package = "" if header == "_global_" or not group else header or group
        assert value_in_file(file, path, f"{package}." if package else "") == config[path], (path, origin)


def test_a_file_that_is_merged_later_is_the_origin():
    found = origins("distill", ["experiment=quickstart", "domain=[sorting]"])
    assert found["run_dir"] == "conf/experiment/quickstart.yaml"  # conf/distill.yaml sets it too
    assert found["domains.sorting.grader"] == "conf/domain/sorting.yaml"
    assert "num_steps" in found
    assert "seed" not in found  # of the dataclass


def test_what_is_printed_is_the_composed_config_as_yaml(capsys):
    config = OmegaConf.to_container(compose_config("distill", ["experiment=quickstart"]), enum_to_str=True)
    print_config(config, {"seed": "somewhere"}, "", "distill")
    text = capsys.readouterr().out
    assert yaml.safe_load(text) == config
    assert [line.split("#")[1].strip() for line in text.splitlines() if line.startswith("seed:")] == ["somewhere"]


def test_the_commands_answer_and_run_nothing(tmp_path):
    run_dir = f"run_dir={tmp_path / 'run'}"
    shown = opd("distill", "experiment=quickstart", run_dir, "--cfg", "optim.lr")
    assert (shown.returncode, shown.stdout) == (0, "optim:\n  lr: 0.001  # conf/experiment/quickstart.yaml\n")
    wrong = opd("distill", run_dir, "num_steps=-1", "--cfg", "num_steps")
    assert (wrong.returncode, "num_steps must be at least 0" in wrong.stderr) == (2, True)
    described = opd("distill", "--help", "launch.max_hours")
    assert described.returncode == 0
    assert described.stdout.startswith("launch.max_hours = null   (number or null; hours; above 0)\n    hours after which a run saves and ends")
    assert not (tmp_path / "run").exists()


@pytest.fixture
def stored(tmp_path) -> Path:
    """The folder of a run that was begun with the quickstart's settings and others on the command line."""
    cfg = load_config("distill", ["experiment=quickstart", "optim.lr=0.5", "fresh=true", "deepspeed=zero2", "run_dir=somewhere/else"])
    folder = tmp_path / "run=1"
    folder.mkdir()
    write_config(folder, cfg, "distill")
    return folder


def test_a_run_goes_on_with_the_settings_it_was_begun_with(stored):
    command, overrides = split_command(["distill", str(stored)])
    cfg = load_config(command, overrides)
    begun = load_config("distill", ["experiment=quickstart", "optim.lr=0.5", "deepspeed=zero2", f"run_dir='{stored}'"])
    assert config_dict(cfg) == config_dict(begun)


def test_what_a_command_makes_of_a_run_is_not_said_to_be_its_files(stored):
    found = origins(*split_command(["evaluate", str(stored)]))
    assert found["seed"] == f"{stored}/config.yaml"
    assert found["evaluation.prompts"] == f"opd evaluate {stored}", "all are taken, whatever the run takes"
    assert origins(*split_command(["distill", str(stored)]))["fresh"] == f"opd distill {stored}"


def test_overrides_change_what_a_run_was_begun_with(stored):
    changes = ["domains.sorting.prompts.share=0.5", "+domain=parity", "~domains.tools", "optim=muon", "optim.lr=0.25"]
    _, overrides = split_command(["distill", str(stored), *changes])
    cfg = load_config("distill", overrides)
    assert list(cfg.domains) == ["arithmetic", "sorting", "brackets", "parity"]
    assert (cfg.domains["sorting"].prompts.share, cfg.optim.kind.value, cfg.optim.lr, cfg.num_steps) == (0.5, "muon", 0.25, 200)
    found = origins("distill", overrides)
    assert found["num_steps"] == f"{stored}/config.yaml"
    assert found["domains.parity.grader"] == "conf/domain/parity.yaml"
    assert found["optim.lr"] == COMMAND_LINE


def test_check_and_plan_judge_a_run_with_its_settings(stored):
    for command in ("check", "plan"):
        cfg = load_config(*split_command([command, str(stored)]))
        assert (cfg.optim.lr, list(cfg.domains)) == (0.5, ["arithmetic", "sorting", "brackets", "tools"])


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["distill", "{run}@100"], "a run goes on from its newest checkpoint"),
        (["specialize", "{run}"], "is a folder of opd distill, not of opd specialize"),
        (["distill", "./nowhere"], "is not a folder of a run: it has no config.yaml"),
        (["merge", "{run}@100"], "is of a run's teachers, which have no step: write opd merge"),
        (["report", "{run}@100"], "opd report is of a whole run: write opd report"),
        (["runs", "{run}@100"], "opd runs is of a whole run: write opd runs"),
    ],
)
def test_what_is_no_run_to_go_on_with_is_refused(stored, arguments, sentence):
    with pytest.raises(ValueError, match=sentence):
        load_config(*split_command([argument.format(run=stored) for argument in arguments]))


def test_a_run_may_stand_behind_settings():
    assert split_command(["inspect", "domain=law", "runs/a@5"]) == split_command(["inspect", "runs/a@5", "domain=law"])
    assert split_command(["evaluate", "runs/a", "seed=1"]) == split_command(["evaluate", "seed=1", "runs/a"])


def test_the_teachers_of_a_run_are_merged_on_what_it_began_from(stored):
    cfg, begun = load_config(*split_command(["merge", str(stored), "kind=ties"])), load_config(*split_command(["distill", str(stored)]))
    assert cfg.base.model == begun.student.model
    assert {name: domain.teacher for name, domain in cfg.domains.items()} == {name: domain.teacher for name, domain in begun.domains.items()}
    assert (cfg.run_dir, cfg.kind.value, cfg.rollout.max_new_tokens) == (f"{stored}/merge", "ties", begun.rollout.max_new_tokens)


def test_a_pipeline_is_not_taken_for_its_runs(stored, tmp_path):
    (tmp_path / "config.yaml").write_text("# written by opd pipeline\nseed: 0\n")
    with pytest.raises(ValueError, match=f"name one of its runs, {stored}"):
        load_config(*split_command(["distill", str(tmp_path)]))


def test_the_student_of_an_earlier_end_is_not_exported_unasked(tmp_path):
    (tmp_path / "student").mkdir()
    begin_state(tmp_path, "distill", 100)
    end_state(PREEMPTED, "ended early")
    with pytest.raises(ValueError, match="is of an earlier end of the run, which has gone on since"):
        split_command(["export", str(tmp_path)])
    assert split_command(["export", f"{tmp_path}@40"])
    begin_state(tmp_path, "distill", 100)
    end_state(0, None)
    assert split_command(["export", str(tmp_path)])


def test_an_export_finds_the_model_of_a_run_or_of_a_checkpoint():
    assert split_command(["export", "runs/a", "rest=fp8"]) == ("export", ["student.model='runs/a/student'", "run_dir='runs/a/export'", "rest=fp8"])
    assert split_command(["export", "runs/a@40"]) == ("export", ["student.model='runs/a@40'", "run_dir='runs/a/export-step-000040'"])
