"""One table: loss and gradient of a step on saved rollouts, however it is cut (DESIGN section 5, property 1).

The oracle is the formula, rollout by rollout, from whole logits. A gradient g is read off the update: with AdamW's eps at 1 and everything else off, the
first one is -g / (|g| + 1). The rows with two ranks are computed by this file, run as a script by two processes.
"""

import itertools
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from opd.config import BatchConfig, DistillConfig, OptimConfig, StudentConfig
from opd.distributed import is_main, start_processes, stop_processes
from opd.engine import Engine
from opd.job_config import LoggerConfig, LoggerKind
from opd.rollouts import data_ranks
from opd.update import update
from rollout.config import ModelConfig
from rollout.model import load_model, load_tokenizer
from rollout.replay import load_rollouts, replay_file, save_rollouts
from teachers.config import DomainConfig, TeacherConfig, TeachersConfig
from teachers.pool import TeacherPool

LENGTH = 14
"""Tokens of every rollout in step 0; those of step 1 differ in length."""
EQUAL, UNEQUAL = 0, 1
WEIGHTS = {"law": 0.75, "code": 0.25}


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """Of the table. size: rollouts in a micro-batch at most, on one rank."""

    family: str
    step: int
    size: int
    stage: int = 1
    packing: bool = False
    ranks: int = 1

    def __str__(self) -> str:
        kind = "packed" if self.packing else "padded" if self.step == UNEQUAL else "equal"
        return f"{self.family}-{kind}-{self.size}-zero{self.stage}-{self.ranks}"


SIZES = [Row(family=family, step=step, size=size) for family in ("v4", "qwen3_moe") for step in (EQUAL, UNEQUAL) for size in (1, 2, 8)]
PACKED = [Row(family="qwen3_moe", step=UNEQUAL, size=size, packing=True) for size in (1, 2, 8)]
STAGES = [Row(family="v4", step=UNEQUAL, size=2, stage=stage) for stage in (0, 2, 3)]
TABLE = [pytest.param(row, marks=[] if row.size == 2 and row.step == UNEQUAL else pytest.mark.slow) for row in (*SIZES, *PACKED, *STAGES)]
TWICE = [
    *(Row(family="v4", step=UNEQUAL, size=size, stage=stage, ranks=2) for size, stage in itertools.product((1, 8), range(4))),
    *(Row(family="qwen3_moe", step=UNEQUAL, size=2, packing=True, stage=stage, ranks=2) for stage in (1, 3)),
]  # fmt: skip


def step_of(row: Row, folder: Path, device: torch.device) -> tuple[float, dict[str, torch.Tensor]]:
    """(loss, change of every weight) of one step as a row of the table has it; all ranks call it."""
    model = load_model(ModelConfig(model=str(folder / row.family)), "student")
    tokenizer = load_tokenizer(str(folder / row.family))
    rollouts = load_rollouts(replay_file(folder, row.step))
    ranks = data_ranks()
    own = rollouts[ranks.index :: ranks.count]
    cfg = DistillConfig(
        domains={name: DomainConfig(loss_weight=weight, teacher=TeacherConfig(model=str(folder / name))) for name, weight in WEIGHTS.items()},
        deepspeed={"zero_optimization": {"stage": row.stage}},
        optim=OptimConfig(warmup_steps=0, lr=1.0, eps=1.0, clip_norm=None),
        student=StudentConfig(),
        batch=BatchConfig(max_tokens_per_micro_batch=row.size * LENGTH, packing=row.packing),
        logger=LoggerConfig(kind=LoggerKind.none),
    )
    pool = TeacherPool(cfg.domains, TeachersConfig(), tokenizer, device)
    engine = Engine(model, len(tokenizer), cfg, device)
    before = engine.full_weights()
    metrics = update(engine, pool, pool.score(own), cfg)
    after = engine.full_weights()
    trained = [name for name, parameter in engine.model.named_parameters() if parameter.requires_grad]
    return metrics["step/loss"], {name: after[name] - before[name] for name in trained}


def naive_step(row: Row, folder: Path) -> tuple[float, dict[str, torch.Tensor]]:
    """The same by the formula."""
    student = load_model(ModelConfig(model=str(folder / row.family)), "student")
    teachers = {name: load_model(ModelConfig(model=str(folder / name)), "teacher") for name in WEIGHTS}
    vocab_size = len(load_tokenizer(str(folder / row.family)))
    rollouts = load_rollouts(replay_file(folder, row.step))
    tokens = {name: sum(rollout.num_loss_tokens for rollout in rollouts if rollout.prompt.domain == name) for name in WEIGHTS}
    loss = torch.zeros(())
    for rollout in rollouts:
        name, ids = rollout.prompt.domain, torch.tensor([[*rollout.prompt.tokens, *rollout.completion_T.tolist()]])
        first = len(rollout.prompt.tokens) - 1
        log_p_TV = student(input_ids=ids).logits[0, first:-1, :vocab_size].log_softmax(-1)
        with torch.no_grad():
            log_q_TV = teachers[name](input_ids=ids).logits[0, first:-1, :vocab_size].log_softmax(-1)
        loss = loss + WEIGHTS[name] / tokens[name] * (log_p_TV.exp() * (log_p_TV - log_q_TV)).sum(-1)[rollout.completion_mask_T].sum()
    parameters = dict(student.named_parameters())
    found = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True)
    gradients = {name: torch.zeros_like(p) if g is None else g for (name, p), g in zip(parameters.items(), found, strict=True)}
    return float(loss), {name: -g / (g.abs() + 1) for name, g in gradients.items()}


@pytest.fixture(scope="module")
def folder(session_v4_model, session_qwen3_moe_model, teacher_folders, saved_v4, saved_qwen3_moe, random_rollouts, tmp_path_factory) -> Path:
    """Students, teachers and the rollouts of two steps, of eight each."""
    folder = tmp_path_factory.mktemp("same")
    sources = {"v4": saved_v4, "qwen3_moe": saved_qwen3_moe, "law": teacher_folders["v4"], "code": teacher_folders["qwen3_moe"]}
    for name, source in sources.items():
        (folder / name).symlink_to(source)
    names, lengths = ["law", "code"] * 4, [(3, 9), (9, 2), (6, 4), (2, 12), (12, 1), (5, 5), (1, 7), (4, 3)]  # the last is shorter than V4's window of 8
    equal = random_rollouts([(name, before, LENGTH - before) for name, (before, _) in zip(names, lengths, strict=True)])
    unequal = random_rollouts([(name, *length) for name, length in zip(names, lengths, strict=True)])
    unequal[0].completion_mask_T[2:5] = False
    save_rollouts(replay_file(folder, EQUAL), EQUAL, equal)
    save_rollouts(replay_file(folder, UNEQUAL), UNEQUAL, unequal)
    return folder


@pytest.fixture(scope="module")
def naive(folder):
    found = {}

    def of(row: Row):
        if (row.family, row.step) not in found:
            found[row.family, row.step] = naive_step(row, folder)
        return found[row.family, row.step]

    return of


@pytest.fixture(scope="module")
def on_two_ranks(folder) -> dict[str, tuple]:
    """The rows with two ranks, by name."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", __file__, str(folder)]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=1200, env=os.environ | {"OMP_NUM_THREADS": "1"}, check=False)
    assert ended.returncode == 0, ended.stderr[-4000:]
    return torch.load(folder / "two_ranks.pt")


def require_same(found: tuple[float, dict], expected: tuple[float, dict]) -> None:
    assert found[0] == pytest.approx(expected[0], rel=1e-5)
    assert max(change.abs().max() for change in expected[1].values()) > 1e-2, "nothing moved, so the comparison shows nothing"
    assert {name for name, change in expected[1].items() if change.abs().max() > 1e-4} <= found[1].keys()  # what is not there is frozen, and hardly matters
    for name, change in found[1].items():
        torch.testing.assert_close(change, expected[1][name], rtol=0, atol=1e-5, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("row", TABLE, ids=str)
def test_loss_and_gradient_are_those_of_the_formula(row, folder, naive, device):
    require_same(step_of(row, folder, device), naive(row))


@pytest.mark.multi
@pytest.mark.parametrize("row", TWICE, ids=str)
def test_loss_and_gradient_on_two_ranks_are_those_of_the_formula(row, naive, on_two_ranks):
    require_same(on_two_ranks[str(row)], naive(row))


def main(folder: Path) -> None:
    device = start_processes()
    torch.set_num_threads(1)
    found = {str(row): step_of(row, folder, device) for row in TWICE}
    if is_main():
        torch.save(found, folder / "two_ranks.pt")
    stop_processes()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
