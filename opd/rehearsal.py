"""`opd distill rehearse=true`: one step of the real configuration at the largest lengths, what it took beside what `opd plan` says, and nothing left behind.

The run's own parts are built and used as opd/distill.py does: each teacher scores, one update, one evaluation batch of each domain, a checkpoint is saved,
verified and loaded again. Prompts are as long as their domain's longest (a shorter one is repeated until it is), and no token ends a completion, so that
each has rollout.max_new_tokens. W&B is off, and so are the check of the signal and a warm-up, which do not decide how much memory a step takes.

It works in a folder beside run_dir, which it removes when it ends, fails or is interrupted. A rehearsal that was killed leaves the folder; the next one
of the same run_dir removes it, since nobody holds its lock.

Memory is measured part by part as what the process has more of after a part was made, and step phases as their peak over what was there
when they began; the plan's figures are sums of the parts of the same time.
"""

import fcntl
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field, fields, replace
from pathlib import Path

import torch

from opd.checkpoint import resume, save
from opd.checkpoint_writer import settle
from opd.config import DistillConfig, PlanCommandConfig
from opd.console import print_table
from opd.distributed import Group, barrier, is_main, num_local_processes, num_ranks, on_main, start_processes
from opd.engine import Engine
from opd.evaluator import Evaluator
from opd.job_config import LoggerConfig, LoggerKind
from opd.memory import ALL, GIB, Phase
from opd.memory_meter import MemoryMeter
from opd.plan import Plan
from opd.plan_config import DeviceKind, PlanConfig
from opd.plan_models import planned_student
from opd.rollouts import build_stream, data_ranks
from opd.run import open_run
from opd.start_config import CheckConfig, OnBadSignal, WarmupConfig
from opd.student import build_student, load_student_tokenizer, seed_everything
from opd.tracker import Tracker
from opd.update import update
from rollout.prompts import PromptMixture
from rollout.types import Prompt
from teachers.pool import TeacherPool

PREFIX = ".rehearsal-"

LOOK = 16
"""Tokens of a forward without data before anything is measured."""


@dataclass(slots=True)
class Rehearsal:
    """What a rehearsal found. memory: part -> (bytes measured, bytes planned); evaluation, save and load are timed alone. seconds: of each phase. checkpoint:
    bytes on disk. completion_tokens: of this rank's step.
    """

    memory: dict[str, tuple[int, float]] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    checkpoint: int = 0
    completion_tokens: int = 0

    @contextmanager
    def timed(self, phase: str) -> Iterator[None]:
        begun = time.monotonic()
        yield
        self.seconds[phase] = time.monotonic() - begun


def rehearse(cfg: DistillConfig) -> None:
    """Rehearse a run and print what it took; every rank calls it. Raises whatever the run would raise in its first step."""
    found = run_rehearsal(cfg)
    if is_main():
        print_rehearsal(cfg, found)


def run_rehearsal(cfg: DistillConfig) -> Rehearsal:
    """Do the step in a folder of its own, which is gone afterwards; every rank calls it."""
    device = start_processes(cfg.launch.timeout_minutes)
    with ExitStack() as held:
        folder = Path(on_main(lambda: str(_make_folder(Path(cfg.run_dir), held))))
        try:
            return _run(_shortened(cfg, folder), device)
        finally:
            if is_main():
                shutil.rmtree(folder, ignore_errors=True)


def print_rehearsal(cfg: DistillConfig, found: Rehearsal) -> None:
    """What was measured beside the plan, and the whole run's time and disk from it."""
    rows = [[name, f"{measured / GIB:.3f}", f"{planned / GIB:.3f}", f"{planned / measured - 1:+.0%}"] for name, (measured, planned) in found.memory.items()]
    print_table("memory of this rank over its baseline, in GiB", ["part", "measured", "planned", "difference"], rows)
    step = sum(found.seconds[name] for name in ("rollout", "score", "update"))
    evaluations = 1 + cfg.num_steps // cfg.evaluation.every if cfg.evaluation.every else 1  # one before the first step
    saves = -(-cfg.num_steps // cfg.checkpoint.every) if cfg.checkpoint.every else 1
    batches = -(-cfg.evaluation.prompts // (cfg.rollout.decode_width * num_ranks(Group.data)))
    total = step * cfg.num_steps + found.seconds.get("evaluation", 0.0) * batches * evaluations + found.seconds["save"] * saves
    disk = found.checkpoint * (cfg.checkpoint.keep + 1)
    caption = [f"{found.completion_tokens} completion tokens of this rank, all completions at rollout.max_new_tokens"]
    counts = f"{cfg.num_steps} steps, {saves} checkpoints and {evaluations} evaluations of {batches} times the one here"
    caption += [f"the whole run at these lengths: {total / 3600:.2f} hours for {counts}"]
    caption += [f"disk: {found.checkpoint / GIB:.3g} GiB for a checkpoint, {disk / GIB:.3g} GiB at most"]
    print_table("seconds", ["phase", "seconds"], [[name, f"{seconds:.2f}"] for name, seconds in found.seconds.items()], "\n".join(caption))


class LongestPrompts(PromptMixture):
    """Prompts of every domain, each as long as its domain's longest."""

    def next(self, step: int) -> list[Prompt]:
        """A step's prompts; where a domain would have none, it takes the place of one of another."""
        prompts = super().next(step)
        absent = [name for name in self.domains if name not in self.excluded and name not in {prompt.domain for prompt in prompts}]
        for slot, name in enumerate(absent[: len(prompts)]):
            prompts[slot] = self.draw(name, prompts[slot].request)[0]
        return [self._lengthened(prompt) for prompt in prompts]

    def _lengthened(self, prompt: Prompt) -> Prompt:
        longest = self.domains[prompt.domain].longest
        repeats = -(-longest // len(prompt.tokens))
        return replace(prompt, tokens=(prompt.tokens * repeats)[:longest])


def _run(cfg: DistillConfig, device: torch.device) -> Rehearsal:
    """Build the run's parts, measuring each, and do its step."""
    found = Rehearsal()
    seed_everything(cfg.seed)
    tokenizer = load_student_tokenizer(cfg.student)
    planned_student(cfg.student).training(1, LOOK)  # whatever its code brings in when it is first called belongs to the baseline
    torch.compile(torch.nn.Identity())  # as DeepSpeed does for its Muon, with any optimizer: 40 MB of code, and nothing is compiled
    meter = MemoryMeter(device)
    student = build_student(cfg.student, tokenizer, cfg.quant)
    of_student = meter.resident()
    teachers = TeacherPool(cfg.domains, cfg.teachers, tokenizer, device, data_ranks())
    stream = build_stream(cfg, student, tokenizer, device)
    teachers.require_context(stream.longest_rollouts)
    stream.prompts = LongestPrompts(stream.prompts.domains, cfg.rollout.prompts_per_step, cfg.seed, stream.prompts.excluded)
    stream.sampler.policy = replace(stream.sampler.policy, end_tokens=())
    planned = Plan(_plan_config(cfg, device, max(domain.longest for domain in stream.prompts.domains.values())))
    evaluator = Evaluator(cfg, student, tokenizer, teachers)
    before = meter.resident()
    found.memory["student"] = (max(1, of_student), planned.whole_student)
    found.memory["sampler"] = (max(1, before - of_student), planned.of("sampler weights"))
    engine = Engine(student, len(tokenizer), cfg, device)
    made = sum(part.num_bytes for part in planned.parts if part.phases == ALL and not part.on_host) - planned.of("student weights")
    found.memory["engine"] = (max(1, meter.resident() - before), made - planned.of("sampler weights"))
    run_dir = open_run(cfg, "distill")
    with Tracker(run_dir, "rehearsal", cfg) as tracker:
        resume(run_dir, engine, stream, tracker, teachers)
        _step(found, meter, planned, (engine, stream, teachers, evaluator, cfg))
        with found.timed("save"):
            save(run_dir, 1, engine, stream, cfg.checkpoint, teachers)
            settle()
        found.checkpoint = sum(path.stat().st_size for path in (run_dir / "checkpoints").rglob("*") if path.is_file())
        with found.timed("load"):
            taken_up = resume(run_dir, engine, stream, tracker, teachers)
        if taken_up != 1:
            raise RuntimeError(f"the checkpoint of the rehearsed step was not taken up: resumed at step {taken_up}")
    barrier()
    return found


def _step(found: Rehearsal, meter: MemoryMeter, planned: Plan, parts: tuple) -> None:
    """One step and one evaluation batch, each phase with its peak over what was there before, and the plan's figure for it."""
    engine, stream, teachers, evaluator, cfg = parts
    moments = planned.of("optimizer moments")  # they come with the first update
    there = sum(part.num_bytes for part in planned.parts if part.phases == ALL and not part.on_host) + planned.of("teachers") + planned.of("teachers' heads")
    figures = {
        "rollout": planned.alone(Phase.rollout),
        "score": planned.alone(Phase.score) + planned.of("teachers"),
        "update": max(planned.phase_bytes(Phase.backward) - moments, planned.phase_bytes(Phase.update)) - there,
    }
    peak = 0

    @contextmanager
    def phase(name: str) -> Iterator[None]:
        nonlocal peak
        with meter.watched(), found.timed(name):
            yield
        peak = max(peak, meter.peak)
        found.memory[name] = (max(1, meter.peak - meter.before), figures[name])

    with phase("rollout"):
        rollouts = stream.next(0, engine)
    with phase("score"):
        scored = teachers.score(rollouts)
    with phase("update"):
        update(engine, teachers, scored, cfg)
    found.memory["peak"] = (peak, max(planned.phase_bytes(of) - moments * (of in (Phase.rollout, Phase.score, Phase.backward)) for of in ALL))
    found.completion_tokens = sum(len(rollout.completion_T) for rollout in rollouts)
    if cfg.evaluation.every:
        with found.timed("evaluation"):
            evaluator.evaluate(stream.sampler, engine)


def _shortened(cfg: DistillConfig, folder: Path) -> DistillConfig:
    """The configuration with the rehearsal's folder and one step."""
    evaluation = replace(cfg.evaluation, every=min(1, cfg.evaluation.every), prompts=cfg.rollout.decode_width * num_ranks(Group.data))
    return replace(
        cfg, run_dir=str(folder), num_steps=1, fresh=False, branch_from=None, evaluation=evaluation, logger=LoggerConfig(kind=LoggerKind.none),
        check=CheckConfig(signal=OnBadSignal.off), warmup=WarmupConfig(),
    )  # fmt: skip


def _plan_config(cfg: DistillConfig, device: torch.device, prompt_tokens: int) -> PlanCommandConfig:
    own = PlanConfig(
        ranks=num_ranks(Group.data), ranks_per_node=num_local_processes(), device=DeviceKind(device.type), memory_gib=None, prompt_tokens=prompt_tokens
    )
    return PlanCommandConfig(**{item.name: getattr(cfg, item.name) for item in fields(DistillConfig)}, plan=own)


def _make_folder(run_dir: Path, held: ExitStack) -> Path:
    """A new folder beside run_dir, locked until `held` closes; those that killed rehearsals left are removed. Raises ValueError where none can be made."""
    try:
        run_dir.parent.mkdir(parents=True, exist_ok=True)
        with ExitStack() as meanwhile:  # a folder is made and locked before another rehearsal looks at it
            _lock(run_dir.parent, meanwhile, waits=True)
            for old in run_dir.parent.glob(f"{PREFIX}{run_dir.name}-*"):
                _remove_dead(old)
            made = Path(tempfile.mkdtemp(prefix=f"{PREFIX}{run_dir.name}-", dir=run_dir.parent))
            _lock(made, held)
            return made
    except OSError as error:
        raise ValueError(f"run_dir={run_dir}: a rehearsal needs a folder beside it ({error.strerror})") from error


def _remove_dead(folder: Path) -> None:
    """Remove a folder whose lock nobody holds."""
    with ExitStack() as held, suppress(BlockingIOError):
        _lock(folder, held)
        shutil.rmtree(folder, ignore_errors=True)


def _lock(folder: Path, held: ExitStack, waits: bool = False) -> None:
    """Lock a folder until `held` closes, or this process ends however it does. Raises BlockingIOError where another has it and this must not wait."""
    handle = os.open(folder, os.O_RDONLY)
    held.callback(os.close, handle)
    fcntl.flock(handle, fcntl.LOCK_EX | (0 if waits else fcntl.LOCK_NB))
