"""The warm-up: what it trains on, that distillation then begins as if nothing had been, and that it brings a student where distillation can begin.

The teacher learnt eight rows of the tool domain by heart; the student of other random weights never answers as it does.
"""

import json
from pathlib import Path

import pytest
import torch

from opd.__main__ import load_config
from opd.distill import distill
from opd.specialize import specialize
from opd.update import supervised_update
from opd.warmup import _examples
from rollout.config import ModelConfig
from rollout.model import load_model

ROWS = 8


@pytest.fixture(scope="module")
def models(device, new_student, tokenizer, tmp_path_factory) -> dict[str, str]:
    """Folders of the teacher, and of a student that has learnt nothing."""
    folder = tmp_path_factory.mktemp("models")
    shared = ["student=qwen3_moe_tiny", "domain=[tools]", f"domains.tools.prompts.rows={ROWS}", "examples_per_step=8", "logger=none", "optim.warmup_steps=0"]
    specialize(load_config("specialize", [*shared, "num_steps=60", "optim.lr=5e-3", f"run_dir={folder / 'teacher'}"]))
    specialize(load_config("specialize", [*shared, "num_steps=0", "seed=1", f"run_dir={folder / 'student'}"]))
    return {name: str(folder / name / "student") for name in ("teacher", "student")}


@pytest.fixture
def settings(models, tmp_path) -> list[str]:
    """Settings of a short distillation of the one into the other; those of the warm-up are the tests' own."""
    chosen = ["domain=[tools]", f"domains.tools.prompts.rows={ROWS}", f"domains.tools.teacher.model={models['teacher']}", f"student.model={models['student']}"]
    chosen += ["rollout.prompts_per_step=8", "rollout.max_new_tokens=14", "rollout.decode_width=8", "logger=none", "optim.warmup_steps=0", "optim.lr=3e-3"]
    return [*chosen, f"run_dir={tmp_path / 'run'}", "check.prompts=8", "check.signal=warn", "student.router_probe_every=0"]


def weights(folder: str | Path) -> dict[str, torch.Tensor]:
    return load_model(ModelConfig(model=str(folder)), "student").state_dict()


def run(settings: list[str], tmp_path) -> list[dict]:
    distill(load_config("distill", settings))
    return records(tmp_path)


def records(tmp_path) -> list[dict]:
    return [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.slow
def test_a_student_that_distillation_alone_does_not_bring_anywhere_is_right_after_a_warmup(settings, tmp_path, device):
    """Distillation from scratch fails where the student's own answers never look like the teacher's; the same number of updates in all."""
    cold = run([*settings, "num_steps=44", "warmup=none"], tmp_path)
    warm = run([*settings, "num_steps=8", "warmup=sft", "warmup.steps=36", "warmup.prompts=8", "fresh=true"], tmp_path)
    assert cold[0]["check/tools/accuracy"] == warm[0]["check/tools/accuracy"] == 0.0
    last_cold, last_warm = (sum(record["domain/tools/accuracy"] for record in found[-8:]) / 8 for found in (cold, warm))  # of 64 rollouts each
    assert last_cold < 0.15
    assert last_warm > 0.45
    assert warm[1]["domain/tools/kl_per_token"] < 0.2 * cold[1]["domain/tools/kl_per_token"]


def test_the_record_of_step_0_says_what_the_warmup_did(settings, tmp_path, device):
    [first, *_] = run([*settings, "num_steps=1", "warmup=sft", "warmup.steps=20", "warmup.prompts=8"], tmp_path)
    assert first["warmup/tools/accuracy"] >= 0.75
    assert first["warmup/tools/truncated"] <= 0.25
    assert first["warmup/tools/teacher_length"] == pytest.approx(13, abs=2)  # twelve characters and the end of sequence
    assert first["warmup/tools/last_loss"] < 0.5 * first["warmup/tools/first_loss"]
    assert {"check/tools/overlap", "data/tools/rows"} <= set(first)


def test_a_run_of_no_step_after_its_warmup_ends_with_the_warmed_up_student(settings, models, numbers, tmp_path, device, kill_at):
    """Fine-tuning on the teachers' answers and nothing else; the same command again finds it done."""
    warmup = ["warmup=sft", "warmup.steps=3", "warmup.prompts=4"]
    [only] = run([*settings, *warmup, "num_steps=0"], tmp_path)
    assert only["step"] == 0
    ended = weights(tmp_path / "run" / "student")
    initial = weights(models["student"])
    assert any(not torch.equal(ended[name], initial[name]) for name in ended)
    before = numbers(tmp_path / "run")
    kill_at("opd.warmup.teacher_answers", call=1)
    run([*settings, *warmup, "num_steps=0"], tmp_path)
    assert numbers(tmp_path / "run") == before
    assert all(torch.equal(one, ended[name]) for name, one in weights(tmp_path / "run" / "student").items())


def test_the_learning_rate_of_distillation_begins_anew(settings, tmp_path, device):
    schedule = ["num_steps=4", "optim.warmup_steps=2", "optim.schedule=linear", "optim.final_lr_fraction=0.5"]
    warm = run([*settings, *schedule, "warmup=sft", "warmup.steps=3", "warmup.prompts=4"], tmp_path)
    assert [record["optim/lr"] for record in warm[1:]] == pytest.approx([1.5e-3, 3e-3, 3e-3, 1.5e-3])


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_update_after_the_schedule_begins_anew_is_that_of_a_new_engine(stage, dtype, qwen3_moe_model, make_config, make_engine, random_rollouts, device):
    """Optimizer state, bias correction and learning rate: nothing of what was before is left but the weights."""
    if dtype is torch.bfloat16 and stage == 0:
        pytest.skip("bfloat16 needs ZeRO 1 or more")
    examples, cfg = random_rollouts([("law", 4, 6)] * 4), make_config(stage=stage, optim={"lr": 1e-2, "warmup_steps": 3, "clip_norm": None})
    model = qwen3_moe_model.to(dtype)
    trained = make_engine(model, cfg)
    for _ in range(4):
        supervised_update(trained, examples, cfg)
    model.load_state_dict({name: tensor.to(dtype) for name, tensor in trained.full_weights().items()})
    new = make_engine(model, cfg)
    trained.begin_schedule(cfg.num_steps)
    supervised_update(trained, examples, cfg)
    supervised_update(new, examples, cfg)
    before, after, expected = model.state_dict(), trained.full_weights(), new.full_weights()
    moved = {name for name, tensor in expected.items() if not torch.equal(tensor, before[name])}
    assert len(moved) > 10
    if dtype is torch.float32:  # in bfloat16 the float32 masters keep digits that the new engine does not have
        assert all(torch.allclose(after[name], expected[name], atol=1e-6) for name in expected)
    else:
        distance = sum(float((after[name].float() - expected[name].float()).abs().sum()) for name in moved)
        assert distance < 0.5 * sum(float((before[name].float() - expected[name].float()).abs().sum()) for name in moved)


def test_a_warmup_that_is_over_is_not_repeated(settings, numbers, tmp_path, device, monkeypatch, kill_at):
    """The run is killed after its first step, whose checkpoint is that of step 0: what is there is taken up, the record of step 0 included."""
    chosen = [*settings, "num_steps=2", "warmup=sft", "warmup.steps=3", "warmup.prompts=4", "checkpoint.every=0"]
    run(chosen, tmp_path)
    (tmp_path / "run").rename(tmp_path / "whole")
    kill_at("opd.distill.update", call=2)
    with pytest.raises(KeyboardInterrupt):
        distill(load_config("distill", chosen))
    monkeypatch.undo()
    kill_at("opd.warmup.teacher_answers", call=1)
    run(chosen, tmp_path)
    assert numbers(tmp_path / "run") == numbers(tmp_path / "whole")


def test_a_warmup_that_was_cut_off_begins_anew(settings, numbers, tmp_path, device, monkeypatch, kill_at):
    chosen = [*settings, "num_steps=2", "warmup=sft", "warmup.steps=3", "warmup.prompts=4"]
    run(chosen, tmp_path)
    (tmp_path / "run").rename(tmp_path / "whole")
    kill_at("opd.warmup.supervised_update", call=2)
    with pytest.raises(KeyboardInterrupt):
        distill(load_config("distill", chosen))
    monkeypatch.undo()
    run(chosen, tmp_path)
    assert numbers(tmp_path / "run") == numbers(tmp_path / "whole")




def test_only_the_domains_asked_for_are_warmed_up(settings, models, tmp_path, device):
    both = ["domain=[tools,arithmetic]", "domains.arithmetic.prompts.rows=8", f"domains.arithmetic.teacher.model={models['teacher']}"]
    [first, *_] = run([*settings, *both, "num_steps=1", "warmup=sft", "warmup.domains=[tools]", "warmup.steps=2", "warmup.prompts=4"], tmp_path)
    assert "warmup/tools/last_loss" in first
    assert not [name for name in first if name.startswith("warmup/arithmetic")]


def test_every_update_holds_the_domains_in_equal_parts_and_each_answer_once_an_epoch(make_rollout, make_config):
    cfg = make_config()
    cfg.warmup.examples_per_step = 6
    answers = {name: [make_rollout(name, [5], [number], request=number) for number in range(4)] for name in ("law", "code")}
    steps = [_examples(cfg, answers, step) for step in range(4)]
    for examples in steps:
        assert sorted(example.prompt.domain for example in examples) == ["code"] * 3 + ["law"] * 3
    order = [example.prompt.request for examples in steps for example in examples if example.prompt.domain == "law"]
    assert all(sorted(order[start : start + 4]) == [0, 1, 2, 3] for start in (0, 4, 8))
    assert order[:4] != order[4:8] or order[4:8] != order[8:]
