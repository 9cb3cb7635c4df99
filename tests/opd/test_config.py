"""Configuration: every YAML composes and parses, every mistake is one sentence with its key, every field is documented."""

import dataclasses
import re
from pathlib import Path

import pytest
from omegaconf import OmegaConf

import opd.alarm_config
import opd.bench_config
import opd.config
import opd.evaluate_config
import opd.harness_config
import opd.job_config
import opd.plan_config
import opd.runs_config
import opd.start_config
import rollout.config
import rollout.grader_config
import teachers.config
from opd.__main__ import load_config, split_command
from opd.composition import CONF
from opd.config import SCHEMAS, DistillConfig, OptimizerKind, RunConfig, parse
from rollout.config import PerturbationConfig

GROUPS = sorted((path.parent.name, path.stem) for path in CONF.glob("*/*.yaml") if path.parent.name != "sweep")
"""All files of groups; conf/sweep is for W&B, and no group."""
MODULES = (
    opd.alarm_config, opd.bench_config, opd.config, opd.evaluate_config, opd.harness_config, opd.job_config, opd.plan_config, opd.runs_config, opd.start_config,
    rollout.config, rollout.grader_config, teachers.config,
)  # fmt: skip
SELECT = {"domain": "domain=[{}]", "pipeline": "pipeline={}"}


def commands_with(group: str) -> list[str]:
    """Commands whose defaults list has the group."""
    return [name for name in SCHEMAS if any(group in entry for entry in OmegaConf.load(CONF / f"{name}.yaml").defaults if not isinstance(entry, str))]


def refused(command: str, *overrides: str) -> str:
    with pytest.raises(ValueError) as error:  # noqa: PT011 - the tests look at the sentence
        load_config(command, list(overrides))
    return str(error.value)


@pytest.mark.parametrize("command", list(SCHEMAS))
def test_each_command_composes_by_itself_into_its_dataclass(command):
    assert type(load_config(command, [])) is SCHEMAS[command]


def test_every_file_at_the_top_is_a_command():
    assert {path.stem for path in CONF.glob("*.yaml")} == set(SCHEMAS)


@pytest.mark.parametrize(("group", "option"), [pair for pair in GROUPS if pair[0] != "experiment"])
def test_each_option_of_a_group_composes_in_every_command_that_has_the_group(group, option):
    commands = commands_with(group)
    assert commands, f"no command has the group {group}"
    for command in commands:
        cfg = load_config(command, [SELECT.get(group, group + "={}").format(option)])
        assert type(cfg) is SCHEMAS[command]


@pytest.mark.parametrize("option", [option for group, option in GROUPS if group == "experiment"])
def test_each_experiment_composes_in_a_command(option):
    mistakes = {}
    for command in commands_with("experiment"):
        try:
            load_config(command, [f"experiment={option}"])
        except ValueError as error:
            mistakes[command] = str(error)
    assert len(mistakes) < len(commands_with("experiment")), mistakes
    assert all("it is for another command" in mistake for mistake in mistakes.values()), mistakes


def test_yaml_holds_only_what_differs_from_the_dataclass():
    """A default that is repeated in YAML has two homes."""
    for command, schema in SCHEMAS.items():
        own = OmegaConf.load(CONF / f"{command}.yaml")
        default = OmegaConf.structured(schema)
        assert not [key for key in own if key != "defaults" and own[key] == default[key]], command


def test_an_experiment_comes_last_so_that_it_overrides_the_groups():
    for command in ("distill", "specialize", "evaluate"):
        defaults = list(OmegaConf.load(CONF / f"{command}.yaml").defaults)
        assert defaults[:2] == [f"{command}_schema", "_self_"]
        assert "experiment" in defaults[-1]


def test_values_become_typed():
    cfg = load_config("distill", ["optim=muon", "domain=[tools]", "num_steps=7", "optim.lr=1e-4", "optim.betas=[0.5,0.6]"])
    assert cfg.optim.kind is OptimizerKind.muon
    assert cfg.domains["tools"].grader == "exact"
    assert (cfg.num_steps, cfg.optim.lr, cfg.optim.betas) == (7, 1e-4, [0.5, 0.6])
    assert isinstance(cfg, DistillConfig)


def test_a_grader_is_a_word_or_a_mapping_and_keeps_the_form_in_which_it_was_written():
    numeric = load_config("distill", ["domain=[tools]", "domains.tools.grader={kind: numeric, tolerance: 1e-6}"])
    assert numeric.domains["tools"].grader == {"kind": "numeric", "tolerance": 1e-6}
    assert OmegaConf.create(OmegaConf.to_yaml(OmegaConf.structured(numeric))).domains.tools.grader == {"kind": "numeric", "tolerance": 1e-6}
    assert load_config("distill", ["domain=[tools]", "domains.tools.grader=null"]).domains["tools"].grader is None
    assert refused("distill", "domain=[tools]", "domains.tools.grader={kind: json, tolerance: 1}").startswith("domains.tools.grader: kind=json has no setting")


@pytest.mark.parametrize(
    ("override", "named", "meant"),
    [
        ("num_step=7", "num_step", "num_steps"),
        ("optim.learning=1", "optim.learning", None),
        ("optim.beta=[0.9,0.9]", "optim.beta", "optim.betas"),
        ("student.modle=x", "student.modle", "student.model"),
        ("rollout.max_new_token=7", "rollout.max_new_token", "rollout.max_new_tokens"),
        ("+typo=1", "typo", None),
        ("+optim.lrr=1", "optim.lrr", "optim.lr"),
        ("domains.tools.prompts.pth=x", "domains.tools.prompts.pth", "domains.tools.prompts.path"),
        ("domains.tools.teachr.model=x", "domains.tools.teachr", "domains.tools.teacher"),
        ("evaluation.decode_witdh=4", "evaluation.decode_witdh", "evaluation.decode_width"),
    ],
)
def test_an_unknown_key_fails_with_its_name_and_the_nearest_one(override, named, meant):
    message = refused("distill", "domain=[tools]", override)
    assert f"distill has no setting {named!r}" in message
    assert meant is None or f"did you mean {meant!r}?" in message
    assert "\n" not in message


@pytest.mark.parametrize("key", ["domains.tools.prompts.columns.prompt", "student.architecture.hidden_size", "domains.tools.prompts.template_kwargs.thinking"])
def test_a_new_key_of_a_mapping_is_added_with_plus_and_the_refusal_says_so(key):
    mapping, _, name = key.rpartition(".")
    assert refused("distill", "domain=[tools]", f"{key}=question") == f"{mapping} has no key {name!r} yet: to add it, write +{key}=VALUE"
    assert load_config("distill", ["domain=[tools]", f"+{key}=question"])


@pytest.mark.parametrize(
    ("override", "key"),
    [
        ("num_steps=many", "num_steps"),
        ("optim.kind=sgd", "optim.kind"),
        ("optim.lr=fast", "optim.lr"),
        ("optim.betas=0.9", "optim.betas"),
        ("fresh=perhaps", "fresh"),
        ("domains.tools.grader=vibes", "domains.tools.grader"),
        ("domains.tools.prompts.rows=1.5", "domains.tools.prompts.rows"),
        ("student.dtype=float8", "student.dtype"),
        ("logger.kind=tensorboard", "logger.kind"),
    ],
)
def test_a_value_of_the_wrong_type_fails_with_its_key(override, key):
    message = refused("distill", "domain=[tools]", override)
    assert message.startswith(f"{key}: ")
    assert "\n" not in message


@pytest.mark.parametrize(("values", "key"), [({"num_stepps": 3}, "num_stepps"), ({"optim": {"lr": "fast"}}, "optim.lr")])
def test_parsing_names_the_key(values, key):
    with pytest.raises(ValueError, match=f"^{re.escape(key)}: "):
        parse(OmegaConf.create(values), RunConfig)


def test_domains_are_selected_added_and_dropped():
    assert list(load_config("distill", []).domains) == []
    assert list(load_config("distill", ["+domain=tools"]).domains) == ["tools"]
    assert list(load_config("distill", ["domain=[tools,sorting]"]).domains) == ["tools", "sorting"]
    assert list(load_config("distill", ["domain=[tools,sorting]", "~domains.tools"]).domains) == ["sorting"]
    quickstart = list(load_config("distill", ["experiment=quickstart"]).domains)
    assert quickstart == ["arithmetic", "sorting", "brackets", "tools"]
    assert list(load_config("distill", ["experiment=quickstart", "~domains.tools"]).domains) == quickstart[:3]


@pytest.mark.parametrize("override", ["++domain=tools", "~domain"])
def test_what_hydra_cannot_do_with_domains_is_said_in_a_sentence_with_what_it_can(override):
    message = refused("distill", override)
    assert "'domain=[a,b]'" in message
    assert "+domain=NAME" in message
    assert "~domains.NAME" in message
    assert "\n" not in message


def test_an_unknown_option_fails_with_those_there_are(conf_dir):
    message = refused("distill", "domain=[tolls]")
    assert "no domain called 'tolls'" in message
    assert "did you mean 'tools'?" in message
    assert ", ".join(sorted(path.stem for path in (conf_dir / "domain").glob("*.yaml"))) in message
    assert "adamw, muon" in refused("distill", "optim=adam")


@pytest.mark.parametrize("override", ["tools", "num_steps=", "domain=[tools", "optim.lr==1"])
def test_an_override_that_cannot_be_read_is_one_sentence(override):
    message = refused("distill", override)
    assert "\n" not in message
    assert "num_steps" in message or "setting=value" in message


def test_an_experiment_of_another_command_is_refused_with_what_is_foreign():
    message = refused("distill", "experiment=quickstart_base")
    assert "examples_per_step" in message
    assert "it is for another command" in message


def test_a_conf_folder_in_the_working_directory_adds_domains(tmp_path, monkeypatch):
    (tmp_path / "conf" / "domain").mkdir(parents=True)
    (tmp_path / "conf" / "domain" / "law.yaml").write_text("# @package domains.law\nteacher: {model: org/law}\nprompts: {path: law.jsonl}\n")
    monkeypatch.chdir(tmp_path)
    cfg = load_config("distill", ["domain=[law,tools]"])
    assert cfg.domains["law"].teacher.model == "org/law"
    assert "law" in refused("distill", "domain=[lew]")


def test_a_command_comes_first_and_overrides_alone_belong_to_the_pipeline():
    assert split_command([]) == ("pipeline", [])
    assert split_command(["seed=3"]) == ("pipeline", ["seed=3"])
    assert split_command(["distill", "seed=3"]) == ("distill", ["seed=3"])
    with pytest.raises(ValueError, match="no command 'distil' \\(did you mean 'distill'\\?\\)"):
        split_command(["distil"])


def dataclasses_of(module) -> list[type]:
    return [found for found in vars(module).values() if dataclasses.is_dataclass(found) and found.__module__ == module.__name__]


@pytest.mark.parametrize("schema", [schema for module in MODULES for schema in dataclasses_of(module)])
def test_each_field_is_documented_in_its_dataclass(schema):
    documentation = " ".join(parent.__doc__ or "" for parent in schema.__mro__ if dataclasses.is_dataclass(parent))
    fields = {field.name for field in dataclasses.fields(schema)}
    assert not [name for name in fields if not re.search(rf"\b{name}\b", documentation)]
    described = {name for names in re.findall(r"^    ([a-z_, ]+): ", schema.__doc__, flags=re.MULTILINE) for name in names.split(", ")}
    assert described <= fields, "what is described has to be there"


def test_a_schema_cannot_take_an_attribute_that_is_not_a_field():
    for module in MODULES:
        for schema in dataclasses_of(module):
            with pytest.raises(AttributeError):
                schema().no_such_setting = 1


def test_data_files_only_are_in_conf():
    """And the batch script, which is SLURM's settings; summaries of comparisons stand apart, with the tables that are made of them."""
    summaries = {path for path in (CONF / "compared").rglob("*") if path.is_file()}
    assert {path.suffix for path in summaries} == {".json", ".md"}
    assert {path.suffix for path in Path(CONF).rglob("*") if path.is_file() and path not in summaries} == {".yaml", ".sbatch"}
    assert not [path for path in CONF.rglob("*.yaml") if "_target_" in path.read_text()]


@pytest.mark.parametrize(
    ("override", "sentence"),
    [
        ("rollout.completions_per_prompt=65537", r"rollout\.completions_per_prompt must be at most 65536, not 65537"),
        ("rollout.completions_per_prompt=0", r"rollout\.completions_per_prompt must be at least 1, not 0"),
        ("rollout.temperature=-3", r"rollout\.temperature must be at least 0, not -3"),
        ("rollout.temperature=inf", r"rollout\.temperature must be finite, and 0 \(greedy\) or at least 1e-05, not inf"),
        ("rollout.temperature=1e-40", r"rollout\.temperature must be finite, and 0 \(greedy\) or at least 1e-05, not 1e-40"),
        ("optim.lr=nan", r"optim\.lr must be at least 0"),
        ("optim.betas=[0.9]", r"optim\.betas must be two numbers"),
        ("threads=-1", r"threads must be at least 1"),
        ("rollout.vllm.tolerance=0", r"rollout\.vllm\.tolerance must be above 0"),
        ("rollout.staleness=2", r"rollout\.staleness must be 0 .* or 1"),
        ("rollout.staleness=1", r"rollout\.staleness=1 samples while the trainer trains, which its own process cannot"),
        ("rollout.service.processes=2", r"rollout\.service would be ignored with rollout\.sampler=local"),
        ("rollout.top_p=0", r"rollout\.top_p must be above 0 and at most 1, not 0"),
        ("rollout.min_p=1", r"rollout\.min_p must be from 0 to below 1, not 1"),
        ("rollout.stop_tokens=[-1]", r"rollout\.stop_tokens must be at least 0, not -1"),
        ("rollout.sampler=vllm", r"rollout\.sampler=vllm needs servers: write rollout\.vllm\.servers="),
        ("rollout.vllm.servers=[http://a:1]", r"rollout\.vllm would be ignored with rollout\.sampler=local"),
    ],
)
def test_a_number_out_of_its_range_is_refused_by_name(override, sentence):
    with pytest.raises(ValueError, match=sentence):
        load_config("distill", [override])


@pytest.mark.parametrize(
    ("overrides", "sentence"),
    [
        (["domains.backspace.perturbation.rate=-0.1"], r"domains\.backspace\.perturbation\.rate must be from 0 to 1, not -0\.1"),
        (["domains.backspace.perturbation.rate=1.5"], r"perturbation\.rate must be from 0 to 1, not 1\.5"),
        (["domains.backspace.perturbation.alphabet=['1']"], r"alphabet=\['1'\] has no token to replace another by"),
        (["domains.backspace.grader=null"], r"domains\.backspace\.perturbation would be ignored without a grader, .*\.rate=0"),
    ],
)
@pytest.mark.parametrize("command", ["evaluate", "distill"])
def test_a_perturbation_that_cannot_be_is_refused(command, overrides, sentence):
    with pytest.raises(ValueError, match=sentence):
        load_config(command, ["domain=[backspace]", *overrides])


def test_a_perturbation_can_be_written_into_a_domain_and_taken_out():
    written = load_config("evaluate", ["domain=[sorting]", "domains.sorting.perturbation={rate: 0.2, alphabet: [0, 1]}"]).domains["sorting"]
    assert written.perturbation == PerturbationConfig(rate=0.2, alphabet=["0", "1"])
    assert load_config("evaluate", ["domain=[backspace]", "domains.backspace.perturbation.rate=0", "domains.backspace.grader=null"]).domains
