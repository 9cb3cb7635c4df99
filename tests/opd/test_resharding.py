"""Checkpoints taken up on other numbers of ranks and at other ZeRO stages go on as if nothing had changed."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from deepspeed.utils import safe_get_full_fp32_param
from safetensors.torch import load_file, save_file

from opd.__main__ import load_config
from opd.batch import supervised_batches
from opd.checkpoint import resume, save
from opd.config import BatchConfig, OptimizerKind
from opd.distill import distill
from opd.engine import Engine
from opd.job_config import CheckpointConfig
from opd.resharding import converted, fits, layout_for, layout_of
from opd.run import write_config
from opd.tracker import Tracker

ADAMW = OptimizerKind.adamw
STEPS = ["num_steps=14", "checkpoint.every=2", "checkpoint.keep=9", "optim.weight_decay=0.1", "optim.lr=1e-3", "quant=none", "evaluation.every=0"]


def on_ranks(count: int, settings: list[str]) -> str:
    """Make a run on so many ranks; returns what it wrote to stderr."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(count), "-m", "opd", "distill", *settings]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    ended = subprocess.run(command, capture_output=True, text=True, timeout=900, env=environment, check=False)
    assert ended.returncode == 0, ended.stderr[-4000:]
    return ended.stderr


GROUP_OF_TWO_NUMBERS = """
import json, sys
from pathlib import Path
from types import SimpleNamespace
import torch
from opd.batch import supervised_batches
from opd.checkpoint import resume, save
from opd.config import BatchConfig, OptimConfig, RunConfig, StudentConfig
from opd.distributed import Group, is_main, num_ranks, rank, reduce_sum, start_processes
from opd.engine import Engine
from opd.job_config import CheckpointConfig, LoggerConfig, LoggerKind
from opd.run import write_config
from opd.student import build_student, seed_everything
from opd.tracker import Tracker
from rollout.synthetic import character_tokenizer
from rollout.types import Prompt, completed

class Nothing:
    prompts = SimpleNamespace(domains={})
    state = lambda self: {}
    restore = forget_before = lambda self, value: None

device = start_processes()
seed_everything(0)
folder, cfg, tokenizer = Path(sys.argv[1]), RunConfig(**json.loads(sys.argv[2])), character_tokenizer()
cfg.optim, cfg.logger = OptimConfig(warmup_steps=0, lr=1e-2), LoggerConfig(kind=LoggerKind.none)
student = build_student(StudentConfig(architecture=json.loads(sys.argv[3])), tokenizer)
for name, parameter in student.named_parameters():
    parameter.requires_grad_(parameter.ndim > 1 or "q_norm" in name)
engine = Engine(student, len(tokenizer), cfg, device)
tracker = Tracker(folder, "test", cfg)
first = resume(folder, engine, Nothing(), tracker) if folder.joinpath("config.yaml").is_file() else 0
examples = [completed(Prompt(domain="law", tokens=tuple(range(5 + row, 9 + row)), request=row, row=f"law:{row}"), [row + 20, row + 30]) for row in range(4)]
losses = []
for step in range(first, 4):
    [batch] = supervised_batches(examples[rank(Group.data) :: num_ranks(Group.data)], {"law": 1 / 8}, BatchConfig())
    loss, _ = engine.loss(batch, None, True)
    losses.append(float(reduce_sum(loss.detach(), Group.data)))
    engine.backward(loss)
    engine.step()
    if step == 1 and first == 0:
        is_main() and write_config(folder, cfg, "test")
        save(folder, 2, engine, Nothing(), CheckpointConfig())
if is_main():
    print(json.dumps(losses))
"""


def losses(run_dir: Path) -> dict[int, float]:
    records = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return {record["step"]: record["step/loss"] for record in records if "step/loss" in record}


@pytest.fixture(scope="module")
def whole_run(short_settings, device, tmp_path_factory) -> Path:
    """14 steps on one rank at ZeRO-1, with a checkpoint after every second."""
    run_dir = tmp_path_factory.mktemp("runs") / "whole"
    distill(load_config("distill", [*short_settings, *STEPS, f"run_dir={run_dir}", "rollout.save=true"]))
    return run_dir


@pytest.fixture(scope="module")
def replay(short_settings, whole_run) -> list[str]:
    """Settings of a run on the saved rollouts."""
    return [*short_settings, *STEPS, f"rollout.replay={whole_run}"]


@pytest.fixture(scope="module")
def require_same(whole_run):
    def require(run_dir: Path, first: int) -> None:
        """Its steps from `first` on have the losses of the whole run, ten or more of them, to 1e-3."""
        found, expected = losses(run_dir), losses(whole_run)
        assert sorted(found)[-1] == 14
        assert {step: loss for step, loss in found.items() if step >= first} == pytest.approx(
            {step: loss for step, loss in expected.items() if step >= first}, rel=1e-3
        )
        assert 14 - first >= 9

    return require


def cut_after(run_dir: Path, step: int, target: Path) -> Path:
    """A copy of a run as a kill after its checkpoint of a step would leave it."""
    shutil.copytree(run_dir, target)
    for path in target.glob("checkpoints/step-*"):
        if int(path.name.removeprefix("step-")) > step:
            shutil.rmtree(path)
    (target / "checkpoints/latest.json").unlink()
    shutil.rmtree(target / "student")
    return target


@pytest.mark.slow
@pytest.mark.multi
def test_a_run_is_widened_to_two_ranks_and_narrowed_again(whole_run, replay, require_same, tmp_path):
    wide = tmp_path / "wide"
    words = on_ranks(2, [*replay, f"run_dir={wide}", f"branch_from={whole_run}@2"])
    assert "was saved by ZeRO 1 or 2 on 1 rank and is converted for ZeRO 1 or 2 on 2 ranks" in words
    require_same(wide, 3)
    narrow = cut_after(wide, 4, tmp_path / "narrow")
    distill(load_config("distill", [*replay, f"run_dir={narrow}", f"branch_from={whole_run}@2"]))
    require_same(narrow, 5)


@pytest.mark.multi
@pytest.mark.slow
@pytest.mark.parametrize("stage", ["zero1", "zero2", "zero3"])
def test_a_run_is_widened_to_four_ranks(stage, whole_run, replay, require_same, tmp_path):
    on_ranks(4, [*replay, f"run_dir={tmp_path / 'run'}", f"branch_from={whole_run}@2", f"deepspeed={stage}"])
    require_same(tmp_path / "run", 3)


@pytest.mark.multi
@pytest.mark.slow
@pytest.mark.parametrize("stage", [1, 2])
def test_a_rank_may_hold_nothing_but_padding(stage, architecture, tmp_path):
    """Of a group of two numbers, which is divided with two each."""
    settings = json.dumps({"num_steps": 4, "deepspeed": {"zero_optimization": {"stage": stage}}, "run_dir": str(tmp_path)})
    arguments = [str(tmp_path), settings, json.dumps(architecture("qwen3_tiny", num_hidden_layers=1, head_dim=2))]
    (tmp_path / "script.py").write_text(GROUP_OF_TWO_NUMBERS)
    found = []
    for ranks in (1, 2):
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(ranks), str(tmp_path / "script.py"), *arguments]
        ended = subprocess.run(command, capture_output=True, text=True, timeout=300, env=os.environ | {"OMP_NUM_THREADS": "1"}, check=False)
        assert ended.returncode == 0, ended.stderr[-4000:]
        found.append(json.loads(ended.stdout.splitlines()[-1]))
    assert found[1] == pytest.approx(found[0][2:], rel=1e-5)


def test_a_run_goes_from_zero_1_to_zero_3_and_back(whole_run, replay, require_same, tmp_path):
    third, back = tmp_path / "third", tmp_path / "back"
    distill(load_config("distill", [*replay, f"run_dir={third}", f"branch_from={whole_run}@2", "deepspeed=zero3"]))
    require_same(third, 3)
    distill(load_config("distill", [*replay, f"run_dir={back}", f"branch_from={third}@4", "deepspeed=zero1"]))
    require_same(back, 5)
    assert list(back.glob("checkpoints/partial*")) == []


class Nothing:
    """A stream without a state."""

    prompts = SimpleNamespace(domains={})

    def state(self) -> dict:
        return {}

    def restore(self, state: dict) -> None:
        pass

    def forget_before(self, step: int) -> None:
        pass


def masters(engine: Engine) -> dict[str, torch.Tensor]:
    """float32 weights of what trains, whole."""
    return {name: safe_get_full_fp32_param(parameter).clone() for name, parameter in engine.model.named_parameters() if parameter.requires_grad}


@pytest.mark.parametrize(("before", "after"), [(1, 3), *(pytest.param(*stages, marks=pytest.mark.slow) for stages in [(1, 2), (2, 1), (3, 1), (3, 2)])])
def test_in_bfloat16_masters_and_moments_are_those_of_the_checkpoint(before, after, new_student, make_engine, make_config, random_rollouts, tmp_path):
    """Where ZeRO-1 is another optimizer of DeepSpeed's. Without the moments a step would move most weights by the learning rate, 1e-3."""
    student = new_student("qwen3_moe_tiny", num_hidden_layers=1).bfloat16()
    engine, other = (make_engine(student, make_config(stage=stage)) for stage in (before, after))
    write_config(tmp_path, engine.cfg, "test")

    def step(trained: Engine, number: int) -> None:
        [batch] = supervised_batches(random_rollouts([("law", 3, 4), ("law", 2, 6)], seed=number), {"law": 0.1}, BatchConfig())
        trained.backward(trained.loss(batch, None, True)[0])
        trained.step()

    for number in range(3):
        step(engine, number)
    save(tmp_path, 3, engine, Nothing(), CheckpointConfig())
    assert resume(tmp_path, other, Nothing(), Tracker(tmp_path, "test", other.cfg)) == 3
    expected, found = masters(engine), masters(other)
    assert found.keys() == expected.keys()
    assert [name for name, tensor in found.items() if not torch.equal(tensor, expected[name])] == []
    for trained in (engine, other):
        step(trained, 3)
    moved, wanted = masters(other), masters(engine)
    assert max(float((moved[name] - wanted[name]).abs().max()) for name in wanted) < 5e-5
    assert max(float((wanted[name] - expected[name]).abs().max()) for name in wanted) > 5e-4


@pytest.mark.parametrize(("before", "after"), [("zero1", "zero3"), pytest.param("zero3", "zero1", marks=pytest.mark.slow)])
def test_weights_that_do_not_train_come_from_the_checkpoint(before, after, short_settings, replay, tmp_path):
    """Here the student's folder has other values in them by the time that the run is taken up."""
    student = tmp_path / "student"
    shutil.copytree(next(setting.partition("=")[2] for setting in short_settings if setting.startswith("student.model=")), student)
    settings = [*replay, f"student.model={student}", "num_steps=3"]
    distill(load_config("distill", [*settings, f"run_dir={tmp_path / 'run'}", "num_steps=2", f"deepspeed={before}"]))
    weights = load_file(student / "model.safetensors")
    frozen = next(name for name in weights if name.endswith("gate.weight"))
    save_file(weights | {frozen: weights[frozen] + 1}, student / "model.safetensors", {"format": "pt"})
    distill(load_config("distill", [*settings, f"run_dir={tmp_path / 'branch'}", f"branch_from={tmp_path / 'run'}@2", f"deepspeed={after}"]))
    assert torch.equal(load_file(tmp_path / "branch/student/model.safetensors")[frozen], weights[frozen])


def test_zero_0_and_the_other_stages_are_not_converted_into_each_other():
    for written, wanted in ((0, 1), (3, 0)):
        with pytest.raises(ValueError, match="ZeRO 0 is not converted; keep deepspeed"):
            fits(layout_for(written, 1), layout_for(wanted, 1), ADAMW)


def test_what_any_number_of_ranks_reads_is_not_converted():
    assert fits(layout_for(0, 1), layout_for(0, 4), ADAMW)
    assert fits(layout_for(1, 2), layout_for(2, 2), ADAMW)
    assert not fits(layout_for(1, 2), layout_for(1, 4), ADAMW)
    assert not fits(layout_for(1, 2), layout_for(3, 2), ADAMW)


def test_the_layout_is_read_off_the_files(whole_run):
    assert layout_of(whole_run / "checkpoints/step-000002", 1) == layout_for(1, 1)


def test_what_muon_trained_is_not_converted():
    assert fits(layout_for(1, 2), layout_for(1, 2), OptimizerKind.muon)
    with pytest.raises(ValueError, match=r"ZeRO 1 or 2 on 2 ranks cannot be taken up at ZeRO 3 on 2 ranks: optim\.kind=muon cannot be converted"):
        fits(layout_for(1, 2), layout_for(3, 2), OptimizerKind.muon)


@pytest.mark.parametrize("settings", [["branch_from={run}@2"], []])
def test_what_cannot_be_taken_up_is_refused_before_teachers_are_looked_at(settings, whole_run, replay, tmp_path):
    """A branch, and the run itself."""
    run_dir = tmp_path / "run"
    if not settings:
        shutil.copytree(whole_run, run_dir)
    changed = [setting.format(run=whole_run) for setting in settings]
    with pytest.raises(ValueError, match="ZeRO 0 is not converted"):
        distill(load_config("distill", [*replay, *changed, f"run_dir={run_dir}", "deepspeed=zero0", "domains.tools.teacher.model=nowhere"]))


def test_a_checkpoint_that_cannot_be_converted_is_refused(whole_run, tmp_path):
    shutil.copytree(whole_run / "checkpoints/step-000002", tmp_path / "step-000002")
    (tmp_path / "step-000002/zero_pp_rank_0_mp_rank_00_optim_states.pt").write_bytes(b"")
    refused = pytest.raises(ValueError, match=r"step-000002 cannot be converted for other ranks or another ZeRO stage \(.+\)")
    with refused, converted(tmp_path, "step-000002"):
        pass
