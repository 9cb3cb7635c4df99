"""Mistakes on the command line: exit code 2, one sentence on stderr, no traceback, and nothing written.

All mistakes are made one after another in one process of their own, since importing what a command needs takes seconds.
"""

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

SCRIPT = """
import json, os, sys, traceback

import opd.distributed
from opd.__main__ import main

opd.distributed.stop_processes = lambda: None  # DeepSpeed cannot begin anew in one process

folder, cases = sys.argv[1], json.load(open(sys.argv[2]))
results = {}
for name, arguments in cases.items():
    streams = [os.dup(1), os.dup(2)]
    for descriptor, stream in enumerate(("stdout", "stderr"), start=1):
        opened = os.open(f"{folder}/{stream}", os.O_CREAT | os.O_TRUNC | os.O_WRONLY)
        os.dup2(opened, descriptor)
        os.close(opened)
    try:
        code = main(arguments)
    except BaseException:
        traceback.print_exc()
        code = "raised"
    sys.stdout.flush()
    sys.stderr.flush()
    for descriptor, stream in enumerate(streams, start=1):
        os.dup2(stream, descriptor)
        os.close(stream)
    results[name] = [code, open(f"{folder}/stdout").read(), open(f"{folder}/stderr").read()]
json.dump(results, open(f"{folder}/results.json", "w"))
"""


@dataclass(frozen=True)
class Result:
    code: int | str
    stdout: str
    stderr: str
    run_dir: Path


MISTAKES = {
    "unknown command": "there is no command 'distil' (did you mean 'distill'?)",
    "no setting": "'quickly' is no folder of a run, and not a setting: write setting=value",
    "unknown domain": "there is no domain called 'tolls' (did you mean 'tools'?)",
    "misspelt key": "distill has no setting 'num_step' (did you mean 'num_steps'?)",
    "misspelt key with plus": "distill has no setting 'optim.lrr' (did you mean 'optim.lr'?)",
    "wrong type": "num_steps: ",
    "no domain": "no domain is selected",
    "no student": "exactly one of student.model",
    "missing student": "the student is not at ./no/student",
    "student without a tokenizer": "no tokenizer can be loaded from",
    "missing file": "there is no file ./no/prompts.jsonl",
    "empty data set": "is empty",
    "data set without prompts": "needs exactly one of prompt and messages",
    "missing column": "the data has no column 'question'; it has",
    "prompt longer than the context": "tools/prompts:1 has",
    "no room for a prompt": "leaves no room for a prompt",
    "stop token beyond the vocabulary": "rollout.stop_tokens=[95] would never be drawn: the tokenizer's ids go up to 94",
    "missing teacher": "the teacher of tools is not at ./no/teacher",
    "no teacher": "domain tools has no teacher: set domains.tools.teacher.model",
    "teacher with another tokenizer": "has another tokenizer than the student",
    "teacher with a smaller vocabulary": "90 vocabulary rows, fewer than the tokenizer's 95",
    "no prompts in a step": "rollout.prompts_per_step must be at least 1",
    "deepspeed key of ours": "deepspeed.gradient_clipping is owned by optim.clip_norm",
    "muon with clipping": "optim.clip_norm must be null",
    "packing": "batch.packing=true is not available for deepseek_v4",
    "frozen router with a bias speed": "need student.router=train",
    "no bias to move": "this family has none: set it to 0",
    "no answers to grade": "has no answer to grade against",
    "training on held-out prompts": "training row tools/prompts:0 is equal to the held-out prompt tools/held_out:0",
    "negative share": "domains.tools.prompts.share must be a number >= 0",
    "loss weight of the wrong kind": "domains.tools.loss_weight must be a number >= 0",
    "schedule without a beginning": "the schedule domains.tools.loss_weight must begin at step 0",
    "no rollouts to replay": "there are no saved rollouts at",
    "no rollouts to compare with": "there are no saved rollouts at",
    "untrained teacher": "as untrained weights do: correct domains.tools.teacher, or accept it with check.signal=warn",
    "check an untrained teacher": "as untrained weights do: correct domains.tools.teacher, or accept it with check.signal=warn",
    "check without prompts": "check.prompts must be at least 1, not 0",
    "teacher with another chat template": "has another chat template than the student, so prompts would not look as in its training",
    "truncated teacher": "it was cut off or damaged, copy it again",
    "warm-up of no domain": "warmup.domains=['law'] must name domains of the run: tools",
    "warm-up that is not asked for": "settings of warmup would be ignored without one: write warmup=sft, or remove them",
    "specialize without answers": "has no answer to learn from",
    "specialize on held-out prompts": "leave them out with domains.tools.prompts.exclude_held_out=true",
    "specialize with a long answer": "tokens with its answer, more than",
    "specialize without slips": "has no slip: set slip_rate=0",
    "specialize with a wrong slip rate": "slip_rate must be a number >= 0",
    "specialize without repaired errors": "has no repaired text, which synthetic domains with a backspace have alone: set repair_rate=0",
    "specialize with a wrong repair rate": "repair_rate must be a number >= 0",
    "specialize with more slips and repairs than examples": "slip_rate=0.6 and repair_rate=0.5 are shares of the same examples, more than all at step 9",
    "evaluate without held-out prompts": ("no domain has held-out prompts"),
    "evaluate a missing base": "the base is not at ./no/base",
    "evaluate a missing student": "./no/student",
    "evaluate no student": "there is nothing to evaluate: set student.model",
    "export nothing": "there is nothing to export: set student.model",
    "export experts that are no FP4 values": "packing would change 100.0% of their weights; train the student with quant=mxfp4_experts",
    "export a family without FP4": "qwen3_moe has no FP4 layout of its own",
    "unknown stage command": "stage base runs 'distil', which is no command of a pipeline",
    "unknown stage before": "comes after 'nothing', which is not a stage before it",
    "mistake in a stage": "there is no experiment called 'quickstart_bass'",
    "fresh over something else": "is not a folder of `opd distill`",
    "fresh pipeline over something else": "is not a folder of `opd pipeline`",
    "another configuration": "holds a run with another configuration (seed was 0 and is 1)",
}
"""What is wrong -> what the sentence says."""


def arguments_of(folder: Path, models: dict[str, Path], data: dict[str, Path]) -> dict[str, list[str]]:
    """The command line of each mistake; every one but the first three writes to a folder of its own name, if at all."""
    tools = ["domain=[tools]", "domains.tools.prompts.rows=8", "domains.tools.held_out.rows=8", f"domains.tools.teacher.model={models['teacher']}"]
    short = ["num_steps=1", "logger=none", "rollout.prompts_per_step=4", "rollout.max_new_tokens=4", "rollout.decode_width=4"]
    student = f"student.model={models['student']}"
    distill = ["distill", *tools, *short, student, "check.signal=off"]
    specialize = ["specialize", *tools, "num_steps=1", "logger=none", "examples_per_step=4", student]
    evaluate = ["evaluate", *tools, student, "evaluation.max_new_tokens=4", "evaluation.decode_width=4"]

    def prompts(name: str) -> list[str]:
        return [f"domains.tools.prompts.path={data[name]}", "domains.tools.prompts.rows=null"]

    cases = {
        "unknown command": ["distil"],
        "no setting": ["distill", "quickly"],
        "unknown domain": ["distill", "domain=[tolls]"],
        "misspelt key": [*distill, "num_step=3"],
        "misspelt key with plus": [*distill, "+optim.lrr=3"],
        "wrong type": [*distill, "num_steps=many"],
        "no domain": ["distill", *short, student],
        "no student": [*distill, "student.model=null"],
        "missing student": [*distill, "student.model=./no/student"],
        "student without a tokenizer": [*distill, f"student.model={models['without_tokenizer']}"],
        "missing file": [*distill, "domains.tools.prompts.path=./no/prompts.jsonl"],
        "empty data set": [*distill, *prompts("empty")],
        "data set without prompts": [*distill, *prompts("other")],
        "missing column": [*distill, *prompts("good"), "+domains.tools.prompts.columns.prompt=question"],
        "prompt longer than the context": [*distill, *prompts("long")],
        "no room for a prompt": [*distill, "rollout.max_new_tokens=256"],
        "stop token beyond the vocabulary": [*distill, "rollout.stop_tokens=[7,95]"],
        "missing teacher": [*distill, "domains.tools.teacher.model=./no/teacher"],
        "no teacher": [*distill, "domains.tools.teacher.model=null"],
        "teacher with another tokenizer": [*distill, f"domains.tools.teacher.model={models['other_tokenizer']}"],
        "teacher with a smaller vocabulary": [*distill, f"domains.tools.teacher.model={models['small_vocabulary']}"],
        "no prompts in a step": [*distill, "rollout.prompts_per_step=0"],
        "deepspeed key of ours": [*distill, "+deepspeed.gradient_clipping=1"],
        "muon with clipping": [*distill, "optim=muon", "optim.clip_norm=1"],
        "packing": [*distill, "batch.packing=true"],
        "frozen router with a bias speed": [*distill, "student.router_bias_speed=0.1"],
        "no bias to move": [*distill, f"student.model={models['qwen3_moe']}", "student.router=train", "student.router_bias_speed=0.1"],
        "no answers to grade": [*distill, *prompts("unanswered")],
        "training on held-out prompts": [*distill, "domains.tools.held_out.split=train"],
        "negative share": [*distill, "domains.tools.prompts.share=-1"],
        "loss weight of the wrong kind": [*distill, "domains.tools.loss_weight=much"],
        "schedule without a beginning": [*distill, "domains.tools.loss_weight={5: 1.0}"],
        "no rollouts to replay": [*distill, "rollout.replay=./no/run"],
        "no rollouts to compare with": [*distill, "rollout.compare=./no/run"],
        "untrained teacher": [*distill, "check.signal=refuse", "rollout.max_new_tokens=12", f"domains.tools.teacher.model={models['qwen3_moe']}"],
        "check an untrained teacher": ["check", *tools, *short, student, "rollout.max_new_tokens=12", f"domains.tools.teacher.model={models['qwen3_moe']}"],
        "check without prompts": [*distill, "check.prompts=0"],
        "teacher with another chat template": [*distill, f"domains.tools.teacher.model={models['other_template']}"],
        "truncated teacher": [*distill, f"domains.tools.teacher.model={models['truncated']}"],
        "warm-up of no domain": [*distill, "warmup=sft", "warmup.domains=[law]"],
        "warm-up that is not asked for": [*distill, "warmup.steps=3"],
        "specialize without answers": [*specialize, *prompts("unanswered")],
        "specialize on held-out prompts": [*specialize, "domains.tools.held_out.split=train"],
        "specialize with a long answer": [*specialize, *prompts("good"), "max_tokens=12"],
        "specialize without slips": [*specialize, *prompts("good"), "slip_rate=1.0"],
        "specialize with a wrong slip rate": [*specialize, "slip_rate=often"],
        "specialize without repaired errors": [*specialize, *prompts("good"), "repair_rate=1.0"],
        "specialize with a wrong repair rate": [*specialize, "repair_rate=often"],
        "specialize with more slips and repairs than examples": [*specialize, "slip_rate={0: 0.0, 9: 0.6}", "repair_rate=0.5"],
        "evaluate without held-out prompts": [*evaluate, "domains.tools.held_out.path=null"],
        "evaluate a missing base": [*evaluate, "base.model=./no/base"],
        "evaluate a missing student": [*evaluate, "student.model=./no/student"],
        "evaluate no student": [*evaluate, "student.model=null"],
        "export nothing": ["export"],
        "export experts that are no FP4 values": ["export", student],
        "export a family without FP4": ["export", f"student.model={models['qwen3_moe']}", "format=fp4"],
        "unknown stage command": ["stages.base.command=distil"],
        "unknown stage before": ["pipeline", "stages.base.after=[nothing]"],
        "mistake in a stage": ["pipeline", "stages.base.overrides=['experiment=quickstart_bass']"],
        "fresh over something else": [*distill, "fresh=true"],
        "fresh pipeline over something else": ["fresh=true"],
        "another configuration": [*distill, "seed=1"],
    }
    unrunnable = {"unknown command", "no setting"}
    return {name: arguments + ([] if name in unrunnable else [f"run_dir={folder / name.replace(' ', '_')}"]) for name, arguments in cases.items()}


@pytest.fixture(scope="module")
def models(new_student, tokenizer, saved_v4, saved_qwen3_moe, teacher_folders, tmp_path_factory) -> dict[str, Path]:
    """Model folders, good ones and such as must be refused."""
    import shutil

    from rollout.model import save_model

    folder = tmp_path_factory.mktemp("models")
    without = shutil.copytree(saved_v4, folder / "without_tokenizer")
    for path in without.glob("token*"):
        path.unlink()
    other = shutil.copytree(saved_v4, folder / "other_tokenizer")
    content = json.loads((other / "tokenizer.json").read_text())
    vocabulary = content["model"]["vocab"]
    vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]
    (other / "tokenizer.json").write_text(json.dumps(content))
    template = shutil.copytree(saved_v4, folder / "other_template")
    (template / "chat_template.jinja").write_text("{{ messages[0]['content'] }}")
    truncated = shutil.copytree(saved_v4, folder / "truncated")
    with (truncated / "model.safetensors").open("r+b") as file:
        file.truncate(100_000)
    small = new_student("qwen3_moe_tiny")
    small.resize_token_embeddings(90)
    save_model(folder / "small_vocabulary", small, tokenizer, small.state_dict())
    good = {"student": saved_v4, "qwen3_moe": saved_qwen3_moe, "teacher": teacher_folders["v4"]}
    bad = {"without_tokenizer": without, "other_tokenizer": other, "small_vocabulary": folder / "small_vocabulary"}
    return good | bad | {"other_template": template, "truncated": truncated}


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> dict[str, Path]:
    """Prompt files, good ones and such as must be refused."""
    rows = {
        "good": [{"prompt": f"T:a{n}=", "answer": "abcdefgh"} for n in range(8)],
        "unanswered": [{"prompt": f"T:a{n}="} for n in range(8)],
        "other": [{"text": "something"}],
        "long": [{"prompt": "T:a1=", "answer": "a"}, {"prompt": "T" * 300, "answer": "a"}],
        "empty": [],
    }
    folder = tmp_path_factory.mktemp("data")
    for name, content in rows.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in content))
    return {name: folder / f"{name}.jsonl" for name in rows}


@pytest.fixture(scope="module")
def results(models, data, tmp_path_factory) -> dict[str, Result]:
    """What each mistake led to."""
    folder, runs = tmp_path_factory.mktemp("mistakes"), tmp_path_factory.mktemp("runs")
    cases = arguments_of(runs, models, data)
    for name in ("fresh over something else", "fresh pipeline over something else"):
        (runs / name.replace(" ", "_")).mkdir()
        (runs / name.replace(" ", "_") / "thesis.tex").write_text("do not delete me")
    first = [f"run_dir={runs / 'another_configuration'}" if a.startswith("run_dir=") else a for a in cases["another configuration"] if a != "seed=1"]
    (folder / "cases.json").write_text(json.dumps({"a good run": first} | cases))
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    subprocess.run([sys.executable, "-c", SCRIPT, str(folder), str(folder / "cases.json")], check=True, env=environment, cwd=folder)
    found = json.loads((folder / "results.json").read_text())
    assert found["a good run"][0] == 0, found["a good run"]
    return {name: Result(*found[name], runs / name.replace(" ", "_")) for name in cases}


def test_every_mistake_is_made(models, data, tmp_path):
    assert set(arguments_of(tmp_path, models, data)) == set(MISTAKES)


@pytest.mark.parametrize("name", list(MISTAKES))
def test_a_mistake_is_one_sentence_with_exit_code_2(name, results):
    result = results[name]
    assert result.stderr.startswith("opd: ")
    assert MISTAKES[name] in result.stderr
    assert result.stderr.count("\n") == 1
    assert "Traceback" not in result.stdout + result.stderr
    assert result.code == 2


KEPT = {"fresh over something else": ["thesis.tex"], "fresh pipeline over something else": ["thesis.tex"]}


@pytest.mark.parametrize("name", [name for name in MISTAKES if name != "another configuration"])
def test_a_mistake_writes_nothing_and_deletes_nothing(name, results):
    run_dir = results[name].run_dir
    assert [path.name for path in sorted(run_dir.rglob("*"))] == KEPT.get(name, [])
    assert run_dir.exists() == (name in KEPT)


def test_a_run_of_another_configuration_is_left_as_it_is(results):
    run_dir = results["another configuration"].run_dir
    assert "seed: 0" in (run_dir / "config.yaml").read_text()
    assert (run_dir / "student" / "config.json").is_file()


def test_the_command_itself_ends_with_the_code_and_the_sentence(tmp_path):
    arguments = ["distill", "student=qwen3_moe_tiny", "domain=[tools]", "domains.tools.teacher.model=./no/teacher", f"run_dir={tmp_path / 'run'}"]
    result = subprocess.run([sys.executable, "-m", "opd", *arguments], capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert result.returncode == 2
    assert result.stderr == "opd: the teacher of tools is not at ./no/teacher: there is no config.json in that folder\n"
    assert result.stdout == ""
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("word", ["-h", "--help", "help"])
def test_help_lists_the_commands(word, capsys):
    from opd.__main__ import COMMANDS, main

    assert main([word]) == 0
    printed = capsys.readouterr().out
    assert all(command in printed for command in COMMANDS)
