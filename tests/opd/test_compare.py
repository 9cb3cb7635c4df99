"""Comparisons: which stages an arm becomes, what is skipped, budgets, and tables from summaries alone."""

import functools
import json
import re
from dataclasses import asdict

import pytest

from opd.__main__ import load_config
from opd.compare import arm_stages, compare, joined, matched_arm, unfinished
from opd.compare_config import ArmConfig
from opd.compare_summary import Budget, arm_identity, measure, read_summaries, write_summary
from opd.compare_table import domain_table, elicited, markdown, num_floors, overview
from opd.pipeline_config import PipelineConfig, StageConfig
from opd.stages import plan


@functools.cache
def configured(*overrides: str):
    """The shipped comparison; composed once, and changed by no test."""
    return load_config("compare", ["experiment=twelve_domains", "logger=none", *overrides])


def summary(cfg, arm: str, seed: int, accuracy: dict[str, float], budget: Budget = Budget(steps=10, student_tokens=100, seconds=5.0), models=("b", "t")):  # noqa: B008
    """A summary as `compare` writes it, of a student with these accuracies beside teachers that are always right."""
    domains = {}
    for name, share in accuracy.items():
        roles = {"base": {"accuracy": 0.5, "prompts": 100}, "teacher": {"accuracy": 1.0, "prompts": 100}, "student": {"accuracy": share, "prompts": 100}}
        domains[name] = roles | {"recovery": {"value": share, "low": share, "high": share}, "certificate": {"share": share - 0.05}}
    return {
        "schema": 1, "arm": arm, "label": cfg.arms[arm].label or arm, "role": cfg.arms[arm].role.value, "seed": seed,
        "identity": arm_identity(cfg, cfg.arms[arm], seed), "budget": asdict(budget),
        "models": {"base": models[0], "teachers": {"sorting": models[1]}}, "evaluation": {"domains": domains},
    }  # fmt: skip


def stages_of(*names: str) -> dict[str, StageConfig]:
    cfg = configured()
    return {stage: found for name in names for stage, found in arm_stages(cfg, name, cfg.arms[name], 0).items()}


def test_an_arm_of_each_command_is_two_stages_whose_settings_compose():
    stages = stages_of("grpo", "ties")
    assert list(stages) == ["grpo-0", "grpo-0-evaluation", "ties-0", "ties-0-evaluation"]
    composed = {name: load_config(stage.command, stage.overrides) for name, stage in stages.items()}
    assert composed["grpo-0"].student.model == composed["ties-0"].base.model == "runs/twelve_domains/base/student"
    assert composed["ties-0-evaluation"].student.model == "runs/twelve_domains/ties-0/student"
    assert composed["ties-0"].domains["sorting"].teacher.model == "runs/twelve_domains/teacher_sorting/student"


@pytest.mark.slow
@pytest.mark.parametrize("experiment", ["twelve_domains", "off_support", "self_repair"])
def test_every_stage_of_a_shipped_comparison_composes(experiment):
    cfg = load_config("compare", [f"experiment={experiment}", "logger=none"])
    stages = dict(cfg.stages)
    for name, arm in cfg.arms.items():
        stages |= {} if arm.seconds_of else arm_stages(cfg, name, arm, 0)
    assert len(plan(PipelineConfig(run_dir=cfg.run_dir, logger=cfg.logger, stages=stages))) == len(stages)


def test_seeds_come_in_turns_so_that_every_arm_has_its_first_before_any_has_its_second(tmp_path):
    cfg = configured("only=[opd,forward_kl]")
    arms = {name: cfg.arms[name] for name in ("opd", "forward_kl")}
    assert list(unfinished(cfg, arms, tmp_path)) == [("opd", 0), ("forward_kl", 0), ("opd", 1), ("opd", 2)]


def test_an_arm_with_a_summary_of_the_same_settings_is_not_run_again(tmp_path):
    cfg = configured()
    arms = {"opd": cfg.arms["opd"]}
    write_summary(tmp_path, summary(cfg, "opd", 1, {"sorting": 1.0}))
    assert list(unfinished(cfg, arms, tmp_path)) == [("opd", 0), ("opd", 2)]
    changed = configured("settings.evaluate=['experiment=twelve_domains_evaluation','evaluation.prompts=8']")
    assert list(unfinished(changed, arms, tmp_path)) == [("opd", 0), ("opd", 1), ("opd", 2)]


def test_an_arm_with_anothers_seconds_gets_the_steps_that_take_as_long(tmp_path):
    cfg = configured()
    for seed, seconds in enumerate((1200.0, 900.0)):  # the first beside other work
        write_summary(tmp_path, summary(cfg, "opd", seed, {"sorting": 1.0}, Budget(steps=300, student_tokens=1, seconds=seconds)))
    write_summary(tmp_path, summary(cfg, "sft", 0, {"sorting": 1.0}, Budget(steps=300, student_tokens=1, seconds=600.0)))
    arm = matched_arm(cfg, cfg.arms["sft_seconds"], tmp_path)
    assert arm.command == "distill"
    assert arm.overrides == [*cfg.arms["sft"].overrides, "warmup.steps=300", "warmup.prompts=4800"]  # 200 and 3,200, half as much again
    with pytest.raises(ValueError, match="needs grpo to be finished"):
        matched_arm(cfg, cfg.arms["grpo_seconds"], tmp_path)


def test_the_last_override_of_a_key_counts():
    assert joined(["experiment=a", "num_steps=3", "experiment=b", "~domains.x", "num_steps=4"]) == ["experiment=b", "~domains.x", "num_steps=4"]


def test_a_budget_is_the_sum_over_the_steps_of_the_warmup_and_of_the_run(tmp_path):
    first = {"step": 0, "warmup/steps": 7, "warmup/tokens": 70, "warmup/seconds": 3.5, "seconds/step": 99.0}
    steps = [{"step": number, "step/completion_tokens": 10 * number, "seconds/rollout": 0.5, "seconds/update": 0.25, "seconds/step": 50.0} for number in (1, 2)]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in [first, *steps]))
    assert measure(tmp_path, "distill") == Budget(steps=9, student_tokens=100, seconds=5.0)


def test_the_overview_shows_each_seed_and_marks_one_seed_and_other_teachers(tmp_path):
    cfg = configured()
    for seed in range(3):
        write_summary(tmp_path, summary(cfg, "opd", seed, {"sorting": 0.98, "tools": 0.96 + 0.01 * seed}))
    write_summary(tmp_path, summary(cfg, "ties", 0, {"sorting": 0.7, "tools": 0.9}, models=("b", "other")))
    _, [first, second] = overview(read_summaries(tmp_path), ["opd", "ties"])
    assert first[:4] == ["on-policy distillation", "method", "0.960 (tools) 0.970 (tools) 0.980 (sorting)", "0.970 0.975 0.980"]
    assert first[4].startswith("0.975 [")
    assert second[0] == "TIES*†"
    assert second[2:4] == ["0.700 (sorting)", "0.800"]
    assert second[5].startswith("-0.175 [-0.2")


def test_domains_have_the_lowest_recovery_of_an_arms_seeds(tmp_path):
    cfg = configured()
    for seed, share in enumerate((0.98, 0.93, 0.97)):
        write_summary(tmp_path, summary(cfg, "opd", seed, {"sorting": share}))
    header, rows = domain_table(read_summaries(tmp_path), ["opd"])
    assert header == ["arm", "sorting"]
    assert rows == [["base, its accuracy", "0.500"], ["teachers, their accuracy", "1.000"], ["on-policy distillation", "0.930"]]
    assert markdown(header, rows).splitlines()[2] == "| base, its accuracy | 0.500 |"


def test_an_arm_whose_settings_have_changed_since_is_marked_and_run_again(tmp_path, capsys):
    cfg = configured(f"results={tmp_path}", "table_only=true")
    write_summary(tmp_path, summary(cfg, "opd", 0, {"sorting": 1.0}) | {"identity": "of before"})
    write_summary(tmp_path, summary(cfg, "ties", 0, {"sorting": 1.0}))
    compare(cfg)
    printed = capsys.readouterr().out
    assert "on-policy distillation*‡" in printed
    assert "TIES*‡" not in printed
    assert ("opd", 0) in unfinished(cfg, cfg.arms, tmp_path)


def test_the_files_of_the_experiments_that_an_arm_chooses_are_part_of_its_identity(tmp_path, monkeypatch):
    """A changed value in one that another begins with makes a finished arm unfinished, a comment does not."""
    cfg = configured()
    arm = ArmConfig(overrides=["experiment=own"])
    monkeypatch.chdir(tmp_path)
    (tmp_path / "conf/experiment").mkdir(parents=True)
    (tmp_path / "conf/experiment/own.yaml").write_text("defaults: [below, _self_]\n")
    identities = []
    for text in ("num_steps: 10\n", "num_steps: 10  # enough\n", "num_steps: 11\n"):
        (tmp_path / "conf/experiment/below.yaml").write_text(text)
        identities.append(arm_identity(cfg, arm, 0))
    assert identities[0] == identities[1] != identities[2]


@pytest.mark.parametrize("written", ["+experiment=own", "experiment=own.yaml", "experiment='own'", "experiment=[twelve_domains_base,own]"])
def test_an_experiment_is_found_however_it_is_chosen(written, tmp_path, monkeypatch):
    cfg = configured()
    monkeypatch.chdir(tmp_path)
    (tmp_path / "conf/experiment").mkdir(parents=True)
    identities = []
    for text in ("# nothing\n", "num_steps: 11\n"):
        (tmp_path / "conf/experiment/own.yaml").write_text(text)
        identities.append(arm_identity(cfg, ArmConfig(overrides=[written]), 0))
    assert identities[0] != identities[1]
    with pytest.raises(ValueError, match=r"there is no conf/experiment/none\.yaml"):
        arm_identity(cfg, ArmConfig(overrides=["experiment=none"]), 0)


def test_the_folder_of_a_comparison_is_not_part_of_an_arms_identity():
    here, there = configured(), configured("run_dir=elsewhere/of_mine")
    assert there.base_model == "elsewhere/of_mine/base/student"
    assert arm_identity(here, here.arms["opd"], 0) == arm_identity(there, there.arms["opd"], 0)


def test_an_arm_with_anothers_seconds_is_marked_with_the_arm_that_it_is_like(tmp_path, capsys):
    cfg = configured(f"results={tmp_path}", "table_only=true")
    for name in ("opd", "sft"):
        write_summary(tmp_path, summary(cfg, name, 0, {"sorting": 1.0}))
    found = summary(cfg, "sft_seconds", 0, {"sorting": 1.0})
    write_summary(tmp_path, found | {"identity": arm_identity(cfg, matched_arm(cfg, cfg.arms["sft_seconds"], tmp_path), 0)})
    compare(cfg)
    assert "seconds of OPD*‡" not in capsys.readouterr().out
    write_summary(tmp_path, summary(cfg, "sft", 0, {"sorting": 1.0}) | {"identity": "of before"})
    compare(cfg)
    assert "seconds of OPD*‡" in capsys.readouterr().out


def test_what_is_to_be_scaled_must_be_written(tmp_path):
    cfg = configured()
    for name in ("opd", "sft"):
        write_summary(tmp_path, summary(cfg, name, 0, {"sorting": 1.0}))
    arm = ArmConfig(like="sft", seconds_of="opd", scaled=["warmup.steps", "rollout.prompts_per_step"])
    with pytest.raises(ValueError, match=r"more of rollout\.prompts_per_step, which is not among that arm's overrides"):
        matched_arm(cfg, arm, tmp_path)


def test_a_fresh_comparison_forgets_before_it_runs(tmp_path, monkeypatch):
    """So that what is cut off goes on without `fresh`, arms with another's seconds included; nothing of a folder that is not a comparison's."""
    cfg = configured(f"results={tmp_path / 'results'}", f"run_dir={tmp_path / 'run'}", "fresh=true", "only=[opd,sft,sft_seconds]")
    for name in ("opd", "sft", "sft_seconds", "ties"):
        write_summary(tmp_path / "results", summary(cfg, name, 0, {"sorting": 1.0}))
    (tmp_path / "run/sft_seconds-0").mkdir(parents=True)
    with pytest.raises(ValueError, match="is not a folder of `opd compare`"):
        compare(cfg)
    assert (tmp_path / "run/sft_seconds-0").exists()
    (tmp_path / "run/config.yaml").write_text("# written by opd compare\n")

    def cut_off(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("opd.compare.run_stages", cut_off)
    with pytest.raises(KeyboardInterrupt):
        compare(cfg)
    assert [path.name for path in (tmp_path / "results").iterdir()] == ["ties-0.json"]
    assert not (tmp_path / "run/sft_seconds-0").exists()


def test_the_interval_of_three_seeds_on_the_same_prompts_is_that_of_one(tmp_path):
    cfg = configured()
    write_summary(tmp_path, summary(cfg, "ties", 0, {"sorting": 0.8}))
    for seed in range(3):
        write_summary(tmp_path, summary(cfg, "opd", seed, {"sorting": 0.8}))
    _, [three, one] = overview(read_summaries(tmp_path), ["opd", "ties"])
    assert three[4] == one[4]


def test_a_domain_without_a_grader_has_no_column(tmp_path):
    cfg = configured()
    found = summary(cfg, "opd", 0, {"sorting": 0.9, "prose": 0.5})
    for role in ("base", "teacher", "student"):
        found["evaluation"]["domains"]["prose"][role]["accuracy"] = None
    found["evaluation"]["domains"]["prose"] |= {"recovery": "not graded", "certificate": None}
    write_summary(tmp_path, found)
    summaries = read_summaries(tmp_path)
    assert domain_table(summaries, ["opd"])[0] == ["arm", "sorting"]
    _, [row] = overview(summaries, ["opd"])
    assert row[2:4] == ["0.900 (sorting)", "0.900"]
    assert row[4].startswith("0.900 [")


def test_a_recovery_that_is_not_defined_makes_the_lowest_undefined_too(tmp_path):
    cfg = configured()
    found = summary(cfg, "opd", 0, {"sorting": 0.9, "tools": 0.8})
    found["evaluation"]["domains"]["sorting"]["recovery"] = None
    write_summary(tmp_path, found)
    _, [row] = overview(read_summaries(tmp_path), ["opd"])
    assert row[2:4] == ["nan", "nan"]


def test_a_perturbed_domain_also_shows_the_accuracies_under_it_of_every_seed(tmp_path):
    cfg = configured()
    for seed, share in enumerate((0.9, 0.8)):
        found = summary(cfg, "opd", seed, {"sorting": 1.0})
        found["evaluation"]["domains"]["sorting"]["perturbed"] = {role: {"accuracy": share} for role in ("base", "teacher", "student")}
        write_summary(tmp_path, found)
    header, rows = domain_table(read_summaries(tmp_path), ["opd"])
    assert header[2] == "sorting, accuracy perturbed"
    assert [row[2] for row in rows] == ["0.900", "0.900", "0.900 0.800"]


def test_a_control_is_named_with_the_domains_that_it_recovers_or_with_none(tmp_path):
    cfg = configured()
    write_summary(tmp_path, summary(cfg, "constant_penalty", 0, {"sorting": 0.95, "tools": 0.4}))
    write_summary(tmp_path, summary(cfg, "wrong_teacher", 0, {"sorting": 0.1, "tools": 0.2}))
    recovered, none = elicited(read_summaries(tmp_path), ["constant_penalty", "wrong_teacher"])
    assert recovered.startswith("constant penalty, a control, recovers sorting 0.950: ")
    assert none.endswith("recovers no domain to 0.9 (at most 0.200, tools): none is merely elicited by it")


def test_a_floor_counts_from_nine_tenths_of_the_teacher():
    cfg = configured()
    assert num_floors(summary(cfg, "opd", 0, {"a": 0.96, "b": 0.94, "c": 1.0})["evaluation"]) == 2


def test_a_table_is_made_of_summaries_alone(tmp_path, capsys):
    cfg = configured(f"results={tmp_path}", "table_only=true")
    write_summary(tmp_path, summary(cfg, "opd", 0, {"sorting": 1.0}))
    compare(cfg)
    printed = capsys.readouterr().out
    assert "on-policy distillation*" in printed
    assert "not finished: opd-1, opd-2, sft-0" in printed
    assert "| on-policy distillation* | method | 1.000 (sorting) |" in (tmp_path / "table.md").read_text()


def test_a_file_that_is_no_summary_is_refused(tmp_path):
    (tmp_path / "opd-0.json").write_text('{"schema": 2}')
    with pytest.raises(ValueError, match="is no summary of a comparison"):
        read_summaries(tmp_path)


@pytest.mark.parametrize(
    ("overrides", "sentence"),
    [
        (["only=[none]"], "only names none, which is no arm: there are opd, sft"),
        (["+arms={mine: {command: export}}"], "arms.mine runs 'export': use distill, specialize, merge"),
        (["+arms={mine: {seconds_of: opd}}"], "arms.mine needs both seconds_of and like, or neither"),
        (["+arms={mine: {seconds_of: opd, like: sft_seconds}}"], "arms.mine names sft_seconds, which is not an arm with steps of its own"),
        (["+arms={a-b: {command: distill}}"], "arm 'a-b' cannot name a stage"),
        (["arms.opd.seeds=0"], "arms.opd.seeds must be at least 1"),
        (["+settings.export=[]"], "settings.export is of no command of a comparison"),
    ],
)
def test_arms_that_cannot_be_run_are_refused(overrides, sentence):
    with pytest.raises(ValueError, match=re.escape(sentence)):
        configured(*overrides)


def test_without_a_comparison_there_is_nothing_to_compare():
    with pytest.raises(ValueError, match="choose a comparison, as in `opd compare experiment=twelve_domains`"):
        compare(load_config("compare", []))

