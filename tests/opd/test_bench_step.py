"""`opd bench step`: everybody gets one problem, tokens are counted alike, and what goes wrong in a process is said. No timing is asserted."""

import csv
import importlib.util
import json
import statistics
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import opd.bench_step
from opd.__main__ import load_config, main
from opd.bench_step import CONTENDERS, bench_step, choose, partner, with_ratios
from opd.bench_step_crew import Crew
from opd.bench_step_problem import Outcome, bench_tokenizer, load_problem, outcome_of, write_problem
from opd.bench_step_worker import step_config
from opd.config import Router
from rollout.config import PromptsConfig
from rollout.prompts import load_prompts

SMALL = ["architectures=[qwen3_moe_tiny]", "prompts_per_step=6", "max_new_tokens=5", "mean_new_tokens=3", "repeats=1"]
END = 2


def config(folder: Path, *overrides: str):
    return load_config("bench_step", [f"run_dir={folder}", *SMALL, *overrides])


@pytest.fixture(scope="module")
def problem_folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("problem") / "qwen3_moe_tiny"
    write_problem(config(folder.parent / "run"), "qwen3_moe_tiny", folder)
    return folder


@pytest.mark.parametrize(
    ("completions", "tokens", "ended"),
    [
        ([[5, 6, END]], 3, 1),  # the end token counts
        ([[5, END, 7, END, 0]], 2, 1),  # whatever follows it does not
        ([[5, 6, 7]], 3, 0),  # the limit
        ([[END, 0, 0], [5, 0, 6]], 4, 1),  # the padding's id is a token like any other in a completion that goes on
    ],
)
def test_tokens_count_up_to_and_with_the_one_that_ends_a_completion(completions, tokens, ended):
    assert outcome_of(completions, END, loss=0.5) == Outcome(tokens=tokens, completions=len(completions), ended=ended, loss=0.5)


@pytest.mark.parametrize("name", ["student", "teacher"])
def test_completions_end_with_about_the_probability_asked_for_whatever_came_before(name, problem_folder):
    model = AutoModelForCausalLM.from_pretrained(problem_folder / name)
    tokens = torch.randint(3, 400, (8, 12), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        probability = model(tokens).logits.softmax(-1)[..., END]
    assert float(probability.mean()) == pytest.approx(1 / 3, abs=0.1)
    assert float(probability.min()) > 0.05


def test_student_and_teacher_differ(problem_folder):
    student, teacher = (AutoModelForCausalLM.from_pretrained(problem_folder / name).state_dict() for name in ("student", "teacher"))
    assert not torch.equal(student["lm_head.weight"], teacher["lm_head.weight"])


def test_the_tokenizer_has_the_size_asked_for_and_none_is_smaller_than_the_characters():
    assert len(bench_tokenizer(400)) == 400
    with pytest.raises(ValueError, match="vocab_size must be at least 95, the characters' number, not 10"):
        bench_tokenizer(10)


def test_everybody_reads_the_same_prompt_tokens(problem_folder):
    """Peers tokenise the text; ours reads the file as raw prompts."""
    tokenizer, texts = AutoTokenizer.from_pretrained(problem_folder / "student"), load_problem(problem_folder).texts()
    domains = load_prompts({"bench": PromptsConfig(path=str(problem_folder / "prompts.jsonl"), raw=True)}, tokenizer, 100, {})
    ours = [tuple(row["tokens"]) for _, row in domains["bench"].all_rows()]
    assert ours == [tuple(tokens) for tokens in tokenizer(texts)["input_ids"]]
    assert len(set(ours)) == 6


def test_ours_trains_everything_that_the_others_train(problem_folder):
    cfg = step_config(load_problem(problem_folder), stage=2, ranks=2)
    assert cfg.student.router is Router.train
    assert (cfg.deepspeed["zero_optimization"]["stage"], cfg.rollout.decode_width, cfg.rollout.temperature) == (2, 3, 1.0)


def test_a_system_is_compared_with_ours_in_as_many_processes_at_its_stage():
    assert [partner(name) for name in CONTENDERS] == ["ours", "ours", "ours_zero2", "ours_zero2", "ours_zero3", "ours_zero3"]
    rates = {"ours": 6.0, "trl": 3.0, "ours_zero2": 8.0, "deepspeed_zero2": 2.0, "deepspeed_zero3": 1.0}
    lines = [{"contender": name, "tokens_per_second": rate, "most_tokens_per_second": 1.0, "tokens_per_cpu_second": rate} for name, rate in rates.items()]
    assert [line["ours_to_it"] for line in with_ratios(lines)] == [None, 2.0, None, 4.0, None]


@pytest.mark.parametrize(
    ("override", "sentence"),
    [
        ("contenders=[trll]", r"there is no contender 'trll' \(did you mean 'trl'\?\); there are ours, trl, ours_zero2"),
        ("contenders=[]", "contenders is empty: choose from ours, trl"),
        ("prompts_per_step=0", "prompts_per_step must be at least 1, not 0"),
        ("mean_new_tokens=1", "mean_new_tokens must be above 1, not 1.0"),
        ("vocab_size=20", "vocab_size must be at least 95"),
        ("architectures=[qwen4]", "qwen4"),
    ],
)
def test_a_mistake_is_refused_before_anything_is_written(override, sentence, tmp_path):
    with pytest.raises(ValueError, match=sentence):
        bench_step(config(tmp_path / "bench", override))
    assert not (tmp_path / "bench").exists()


def test_a_peer_that_is_not_installed_is_left_out_unless_it_was_asked_for(monkeypatch, capsys):
    monkeypatch.setattr("opd.bench_step.installed_version", lambda name: None)
    assert choose(None) == [name for name in CONTENDERS if name != "trl"]
    assert "trl is not installed" in capsys.readouterr().out
    assert choose(["ours"]) == ["ours"]
    with pytest.raises(ValueError, match=r"trl is not installed: pip install 'opd\[bench\]'"):
        choose(["ours", "trl"])


@pytest.mark.slow
def test_a_process_that_ends_is_named_with_its_last_exception(problem_folder, tmp_path):
    broken = json.loads((problem_folder / "problem.json").read_text()) | {"overrides": ["optim.lr=-1"]}
    (tmp_path / "problem.json").write_text(json.dumps(broken | {"folder": str(tmp_path)}))
    with pytest.raises(ValueError, match=r"ours has ended: ValueError: optim\.lr must be at least 0"), Crew({"ours": 1}, tmp_path, 1):
        pass


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("trl") is None, reason="TRL is not installed")
def test_a_whole_run_writes_every_column_that_the_docstring_names(tmp_path, capsys):
    folder = tmp_path / "bench"
    assert main(["bench", "step", f"run_dir={folder}", *SMALL, "contenders=[ours,trl,deepspeed_zero2]"]) == 0
    with (folder / "step.csv").open() as file:
        lines = {line["contender"]: line for line in csv.DictReader(file)}
    assert list(lines) == ["ours", "trl", "deepspeed_zero2"]
    assert not [column for column in lines["ours"] if column not in opd.bench_step.__doc__]
    for name, line in lines.items():
        assert (line["schema"], line["architecture"], line["repeats"], line["ranks"]) == ("1", "qwen3_moe_tiny", "1", str(CONTENDERS[name]))
        assert 1 <= float(line["mean_length"]) <= 5
        assert float(line["tokens_per_second"]) == pytest.approx(6 * float(line["mean_length"]) / float(line["median_seconds"]))
    assert statistics.mean(float(line["loss"]) for line in lines.values()) == pytest.approx(float(lines["trl"]["loss"]), rel=0.5)
    assert "x trl on qwen3_moe_tiny" in capsys.readouterr().out.replace("\n", " ")
