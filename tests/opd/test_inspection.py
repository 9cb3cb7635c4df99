"""`opd inspect`: what it shows is what the step's student and teacher said, and it touches nothing."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from opd.__main__ import load_config, split_command
from opd.checkpoint_model import model_folder
from opd.console import print_table, print_tokens, visible
from opd.divergence import ModelStates
from opd.estimators import SampledToken, TopK
from opd.inspection import inspect_run, kept_steps, recurring
from opd.likeliest import LIKELIEST, WORST, likeliest_at_worst
from opd.runs_config import InspectConfig
from opd.samples import token_class


def sample(run: Path, step: int = 2) -> dict:
    return json.loads((run / "samples" / f"{step:06d}.json").read_text())


def logprobs(model: AutoModelForCausalLM, rollout: dict) -> torch.Tensor:
    """Of every completion token over the whole vocabulary, [T, V], by transformers' own forward."""
    tokens = torch.tensor([rollout["prompt_tokens"] + rollout["tokens"]])
    with torch.no_grad():
        logits = model(tokens).logits[0].double()
    return logits[len(rollout["prompt_tokens"]) - 1 : -1].log_softmax(1)


def test_the_likeliest_tokens_are_those_of_the_student_before_the_step_and_of_the_teacher(short_run):
    student = AutoModelForCausalLM.from_pretrained(model_folder(f"{short_run}@1"))
    cfg = load_config(*split_command(["check", str(short_run)]))
    compared = 0
    for name, rollouts in sample(short_run)["domains"].items():
        teacher = AutoModelForCausalLM.from_pretrained(cfg.domains[name].teacher.model)
        for rollout in rollouts:
            own, other = logprobs(student, rollout), logprobs(teacher, rollout)
            for worst in rollout["at_worst"]:
                for shown, expected in ((worst["student"], own[worst["position"]]), (worst["teacher"], other[worst["position"]])):
                    vocabulary = expected[:95]
                    vocabulary = vocabulary - vocabulary.logsumexp(0)
                    assert [token["logprob"] for token in shown] == pytest.approx(vocabulary.topk(LIKELIEST).values.tolist(), abs=2e-4)
                    assert [token["logprob"] for token in shown] == pytest.approx([float(vocabulary[token["token"]]) for token in shown], abs=2e-4)
                    compared += 1
    assert compared > 10


def test_the_tokens_that_are_looked_at_are_the_worst_in_order(short_run):
    for rollouts in sample(short_run)["domains"].values():
        for rollout in rollouts:
            places = [worst["position"] for worst in rollout["at_worst"]]
            expected = sorted(range(len(rollout["kl"])), key=lambda place: -rollout["kl"][place])[: len(places)]
            assert [rollout["kl"][place] for place in places] == pytest.approx([rollout["kl"][place] for place in expected], abs=1e-6)
            assert len(places) == min(WORST, len(rollout["kl"]))


def test_the_figures_are_sums_over_all_rollouts_of_the_step(short_run):
    record = json.loads((short_run / "metrics.jsonl").read_text().splitlines()[-1])
    for name, figures in sample(short_run)["figures"].items():
        for pairs in (figures["deciles"], list(figures["classes"].values())):
            nats, tokens = (sum(column) for column in zip(*pairs, strict=True))
            assert nats / tokens == pytest.approx(record[f"domain/{name}/kl_per_token"], rel=1e-4)
        means = [prompt["kl"] for prompt in figures["prompts"]]
        assert means == sorted(means, reverse=True)


def test_keeping_samples_changes_no_update(short_run, short_settings, tmp_path, numbers):
    from opd.distill import distill

    distill(load_config("distill", [*short_settings, f"run_dir={tmp_path / 'run'}", "samples.every=0"]))
    shown = tmp_path / "run"
    assert (shown / "student" / "model.safetensors").read_bytes() == (short_run / "student" / "model.safetensors").read_bytes()


def states(tokens: int, hidden: int, vocabulary: int) -> ModelStates:
    return ModelStates(torch.randn(tokens, hidden), torch.randn(vocabulary, hidden))


def test_a_vocabulary_of_several_blocks_is_one_distribution(monkeypatch):
    torch.manual_seed(0)
    monkeypatch.setattr("opd.likeliest.BLOCK_COLUMNS", 7)
    student, loss_N = states(6, 8, 40), torch.tensor([0.1, 0.5, -torch.inf, 0.2, 0.3, 0.4])
    found = likeliest_at_worst(student, states(6, 4, 40), loss_N, torch.tensor([0, 0, 0, 1, 1, 1]), torch.zeros(6, dtype=torch.int64), 33)
    assert found.row_R.tolist() == [1, 0, 5, 4, 3]
    expected = (student.hidden_ND @ student.head_VD[:33].T).double().log_softmax(1)[found.row_R].topk(LIKELIEST)
    assert torch.equal(found.student[0], expected.indices)
    assert torch.allclose(found.student[1].double(), expected.values, atol=1e-5)


def test_a_teacher_that_gives_less_is_shown_with_what_it_gave():
    torch.manual_seed(0)
    loss_N, rollout_N, target_N = torch.tensor([0.1, 0.5]), torch.tensor([0, 0]), torch.tensor([3, 4])
    token_NK, logprob_NK = torch.tensor([[7, 8], [9, 6]]), torch.tensor([[-2.0, -1.0], [-0.5, -3.0]])
    top = likeliest_at_worst(states(2, 8, 20), TopK(token_NK, logprob_NK), loss_N, rollout_N, target_N, 20)
    assert (top.teacher[0].tolist(), top.teacher[1].tolist()) == ([[9, 6], [8, 7]], [[-0.5, -3.0], [-1.0, -2.0]])
    one = likeliest_at_worst(states(2, 8, 20), SampledToken(torch.tensor([-1.0, -2.0])), loss_N, rollout_N, target_N, 20)
    assert (one.teacher[0].tolist(), one.teacher[1].tolist()) == ([[4], [3]], [[-2.0], [-1.0]])


def test_tokens_are_classed_by_their_text(tokenizer):
    kinds = {text: token_class(tokenizer(text, add_special_tokens=False)["input_ids"][0], tokenizer) for text in ("7", "a", "+", " ")}
    assert kinds == {"7": "number", "a": "word", "+": "sign", " ": "space"}
    assert token_class(tokenizer.eos_token_id, tokenizer) == "special"


@pytest.fixture
def written(tmp_path) -> Path:
    """A run folder with two kept steps, of a domain whose text is hostile."""
    (tmp_path / "samples").mkdir()
    (tmp_path / "config.yaml").write_text("# written by opd distill\n")
    text = [{"token": 1, "text": "[red]\x1b[31m", "logprob": -0.5}]
    rollout = {
        "place": "worst", "request": 3, "row": "prompts:7", "sample": 0, "prompt_tokens": [1], "prompt": "a\x1b[2Jb", "tokens": [1, 2],
        "pieces": ["[/x]", "\n"], "kl": [0.9, 0.1], "grade": None, "finished": False, "at_worst": [{"position": 0, "student": text, "teacher": text}],
    }  # fmt: skip
    for step, rows in ((50, [("prompts:7", 0.5), ("prompts:1", 0.4)]), (100, [("prompts:7", 0.3), ("prompts:2", 0.2)])):
        prompts = [{"row": row, "request": 1, "kl": kl, "text": f"what is {row}?"} for row, kl in rows]
        figures = {"law": {"deciles": [[1.0, 10]] + [[0.0, 0]] * 8 + [[0.5, 1]], "classes": {"word": [1.5, 11]}, "prompts": prompts}}
        record = {"schema": 1, "step": step, "domains": {"law": [rollout]}, "figures": figures}
        (tmp_path / "samples" / f"{step:06d}.json").write_text(json.dumps(record))
    return tmp_path


def test_prompts_that_recur_are_counted_over_the_kept_steps(written):
    assert recurring(kept_steps(written), "law") == [("prompts:7", 2, 0.4, [50, 100], "what is prompts:7?")]


def test_a_domain_is_shown_with_everything_that_was_kept(written, capsys):
    inspect_run(InspectConfig(run_dir=str(written), domain_name="law", step=50))
    shown = capsys.readouterr().out
    assert "worst: 0.5000 nats per token, 2 tokens, not graded, cut at its longest, row prompts:7" in shown
    assert "\u00bb[/x]\u00ab\\n" in shown, "the worst token is marked"
    assert "[red]\\x1b[31m 0.607" in shown, "neither markup nor control characters are obeyed"
    assert "\x1b" not in shown
    assert "90-100 %" in shown
    assert "33%" in shown
    assert "2 of 2" in shown


def test_an_overview_names_the_worst_of_each_domain_and_how_to_look_closer(written, capsys):
    inspect_run(InspectConfig(run_dir=str(written)))
    shown = capsys.readouterr().out
    assert "90-100 % (0.5000)" in shown
    assert "prompts:7 (2 x)" in shown
    assert f"opd inspect {written} domain=law step=100" in shown


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"domain_name": "lwa"}, r"no rollout of 'lwa' \(did you mean 'law'\?\); it has law"),
        ({"step": 60}, "has kept no rollouts of step 60; the nearest are 50, 100"),
        ({"run_dir": "nowhere"}, "nowhere is not a folder of a run"),
    ],
)
def test_what_is_not_there_is_refused_with_what_is(settings, sentence, written):
    with pytest.raises(ValueError, match=sentence):
        inspect_run(InspectConfig(**({"run_dir": str(written)} | settings)))


def test_a_run_without_rollouts_yet_is_said(tmp_path):
    (tmp_path / "config.yaml").touch()
    with pytest.raises(ValueError, match="has kept no rollouts yet"):
        inspect_run(InspectConfig(run_dir=str(tmp_path)))


def test_a_file_of_an_older_version_shows_what_it_has(written, capsys):
    for path in (written / "samples").iterdir():
        record = json.loads(path.read_text())
        del record["figures"], record["domains"]["law"][0]["at_worst"]
        path.write_text(json.dumps(record))
    inspect_run(InspectConfig(run_dir=str(written), domain_name="law"))
    inspect_run(InspectConfig(run_dir=str(written)))
    assert "was not kept" in capsys.readouterr().out


def test_the_command_looks_at_a_real_run_and_leaves_it_as_it_is(short_run, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(short_run, run)
    before = {path: (path.stat().st_mtime_ns, path.stat().st_size) for path in run.rglob("*")}
    script = "import sys; from opd.__main__ import main; code = main(sys.argv[1:]); print(code, 'torch' in sys.modules)"
    command = [sys.executable, "-c", script, "inspect", f"{run}@2", "domain=tools"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.splitlines()[-1] == "0 False", "without loading torch"
    assert "tools at step 2 of" in done.stdout
    assert "teacher would say" in done.stdout
    assert {path: (path.stat().st_mtime_ns, path.stat().st_size) for path in run.rglob("*")} == before


def test_markup_and_control_characters_are_shown_as_they_are(capsys):
    print_table("", ["a"], [["[bold]x[/bold]"]])
    print_tokens("", ["a", "b"], [None, 0.0])
    assert "[bold]x[/bold]" in capsys.readouterr().out
    assert visible("a\tb\u202e") == "a\\tb\\u202e"
