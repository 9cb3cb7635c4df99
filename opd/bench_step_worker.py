"""One contender of `opd bench step`, in processes of its own: `python -m opd.bench_step_worker FOLDER CONTENDER SOCKET`, under torchrun where it has ranks.

Every rank connects to the bench's socket, says who it is, builds everything, says `ready`, and then does one step whenever it gets a line, which it
answers with what came of it. It ends when the connection does, so that none outlives the bench.

Ours is the loop of opd/distill.py without evaluation and checkpoints, in the default settings of `opd distill`: tokens are logged, metrics are
computed and written.
"""

import json
import socket
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path

import torch

from opd.bench_step_problem import BETAS, CLIP_NORM, EPSILON, Outcome, Problem, load_problem, outcome_of
from opd.config import DistillConfig
from opd.distributed import Group, num_ranks, rank, start_processes, stop_processes
from opd.engine import Engine
from opd.metrics import rollout_metrics
from opd.rollouts import build_stream, data_ranks
from opd.student import build_student, load_student_tokenizer, seed_everything
from opd.tracker import Tracker
from opd.update import update
from rollout.config import PromptsConfig
from teachers.config import DomainConfig, TeacherConfig
from teachers.pool import TeacherPool

DOMAIN = "bench"


class Baton:
    """The bench's end of a worker: who holds it does a step."""

    def __init__(self, address: str, contender: str):
        connection = socket.socket(socket.AF_UNIX)
        connection.connect(address)
        self.lines = connection.makefile("rw")
        self._send({"contender": contender, "rank": rank(Group.data)})

    def wait(self) -> bool:
        """Until the bench asks for a step; False where it has ended."""
        is_asked = bool(self.lines.readline())
        self.begun = time.process_time()
        return is_asked

    def ready(self) -> None:
        """Everything is built."""
        self._send({"ready": True})

    def tell(self, outcome: Outcome) -> None:
        """Answer with what came of a step, and the processor's seconds that it took in all threads of this process."""
        self._send(asdict(replace(outcome, cpu_seconds=time.process_time() - self.begun)))

    def _send(self, record: dict) -> None:
        self.lines.write(json.dumps(record) + "\n")
        self.lines.flush()


def run_ours(problem: Problem, stage: int, baton: Baton) -> None:
    """Steps of our own loop until the bench has enough."""
    cfg = step_config(problem, stage, num_ranks(Group.data))
    device = torch.device("cpu")
    seed_everything(cfg.seed)
    tokenizer = load_student_tokenizer(cfg.student)
    student = build_student(cfg.student, tokenizer)
    teachers = TeacherPool(cfg.domains, cfg.teachers, tokenizer, device, data_ranks())
    stream = build_stream(cfg, student, tokenizer, device)
    engine = Engine(student, len(tokenizer), cfg, device)
    run_dir = Path(cfg.run_dir)
    run_dir.mkdir(parents=True, exist_ok=True)
    with Tracker(run_dir, "step", cfg) as tracker:
        baton.ready()
        step = 0
        while baton.wait():
            begun = time.perf_counter()
            with tracker.timer("rollout"):
                rollouts = stream.next(step, engine)
            sampled = time.perf_counter() - begun
            with tracker.timer("score"):
                scored = teachers.score(rollouts)
            with tracker.timer("update"):
                metrics = update(engine, teachers, scored, cfg)
            metrics |= rollout_metrics(rollouts, stream, cfg, tokenizer)
            tracker.log(step + 1, metrics)
            step += 1
            baton.tell(outcome_of([rollout.completion_T.tolist() for rollout in rollouts], tokenizer.eos_token_id, metrics["step/loss"], sampled))
    teachers.store.close()


def step_config(problem: Problem, stage: int, ranks: int) -> DistillConfig:
    """Settings of `opd distill`: those of the problem that all contenders share, and else the defaults."""
    from opd.composition import load_config

    folder = Path(problem.folder)
    own = [f"student.model={folder / 'student'}", f"deepspeed=zero{stage}", "logger=none", f"seed={problem.seed}", "num_steps=1000000"]
    own += [f"rollout.prompts_per_step={problem.prompts_per_step}", f"rollout.max_new_tokens={problem.max_new_tokens}"]
    own += [f"rollout.decode_width={-(-problem.prompts_per_step // ranks)}", f"run_dir={folder / f'run-zero{stage}-{ranks}'}"]
    own += [f"optim.lr={problem.lr}", f"optim.betas=[{','.join(map(str, BETAS))}]", f"optim.eps={EPSILON}", f"optim.clip_norm={CLIP_NORM}"]
    own += ["optim.warmup_steps=0", f"threads={problem.threads}"]
    own += ["student.router=train"] if problem.has_experts else []  # as everywhere else
    cfg = load_config("distill", [*own, *problem.overrides])
    prompts = PromptsConfig(path=str(folder / "prompts.jsonl"), raw=True)
    return replace(cfg, domains={DOMAIN: DomainConfig(teacher=TeacherConfig(model=str(folder / "teacher")), prompts=prompts)})


def main(folder: str, contender: str, address: str) -> None:
    """Do the steps of a contender, as NAME or NAME_zeroSTAGE, until the bench has enough."""
    from opd.bench_step_peers import run_deepspeed, run_trl

    problem = load_problem(Path(folder))
    torch.set_num_threads(problem.threads)
    start_processes()
    system, _, stage = contender.partition("_zero")
    run = {"ours": run_ours, "trl": run_trl, "deepspeed": run_deepspeed}[system]
    run(problem, int(stage or 0), Baton(address, contender))
    stop_processes()


if __name__ == "__main__":
    main(*sys.argv[1:])
