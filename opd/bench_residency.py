"""Steps of a distillation whose teachers are read from disk, for `opd bench teachers`: the loop's own score and update, on given rollouts.

Teachers are new bfloat16 models of one architecture, each with weights of its own, and never all in memory: one stays, and one more is on its way
(teachers.max_resident=1). Rollouts are random tokens, the same for every number of teachers except for their domains; the student samples nothing,
since that takes as long with one teacher as with twelve and would only hide what differs. All contenders train one student with one engine.

With a cold page cache the operating system forgets the teachers' files before a step, and again before its update, which reads their heads.

R: rollouts. T: tokens of one rollout, or of its completion.
"""

import ctypes
import gc
import mmap
import multiprocessing
import os
import threading
import time
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from opd.bench import Run, timed
from opd.bench_config import PageCache, TeachersBenchConfig
from opd.bench_memory import status_bytes
from opd.config import DistillConfig
from opd.distributed import start_processes, stop_processes
from opd.engine import Engine
from opd.student import build_student, seed_everything
from opd.update import update
from rollout.config import Dtype
from rollout.model import save_model
from rollout.types import Prompt, Rollout
from teachers.config import DomainConfig, TeacherConfig
from teachers.pool import TeacherPool

SPECIAL_TOKENS = {"pad_token": "<pad>", "bos_token": "<bos>", "eos_token": "<eos>"}
MEMORY_STEPS = 2
"""Steps whose memory is looked at: the optimizer's state comes with the first, on top of which the second works."""

SAMPLING_SECONDS = 0.002
"""Between two looks at the memory."""


@dataclass(frozen=True, slots=True)
class Contender:
    """A number of teachers, and whether the next is read while one scores."""

    num_teachers: int
    prefetch: bool = True

    @property
    def name(self) -> str:
        return f"{self.num_teachers}" if self.prefetch else f"{self.num_teachers} without prefetch"


@dataclass(frozen=True, slots=True, kw_only=True)
class StepFigures:
    """Of one step. loads, load_seconds, num_bytes: of readings of teachers and heads; waited_seconds: of them, those that somebody waited.
    cpu_seconds: of all threads of this process. disk_bytes: fetched from the disk for this process.
    """

    score_seconds: float
    update_seconds: float
    cpu_seconds: float
    loads: float
    load_seconds: float
    waited_seconds: float
    num_bytes: float
    disk_bytes: float

    @property
    def seconds(self) -> float:
        return self.score_seconds + self.update_seconds


@dataclass(frozen=True, slots=True)
class Memory:
    """Anonymous bytes of a process: when everything was built and nothing had been scored, and at most."""

    start: int
    peak: int


def contenders_of(cfg: TeachersBenchConfig) -> list[Contender]:
    """Every number of teachers, and the largest without prefetch."""
    largest = max(cfg.num_teachers)
    return [Contender(count) for count in dict.fromkeys(cfg.num_teachers)] + ([Contender(largest, prefetch=False)] if largest > 1 else [])


def word_tokenizer(vocab_size: int) -> PreTrainedTokenizerBase:
    """A tokenizer of so many tokens. Raises ValueError for a vocabulary without words."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    tokens = [*SPECIAL_TOKENS.values(), "<unk>"]
    if vocab_size <= len(tokens):
        raise ValueError(f"vocab_size must be above {len(tokens)}, not {vocab_size}: so many are special tokens")
    tokens += [f"word{index}" for index in range(vocab_size - len(tokens))]
    backend = Tokenizer(models.WordLevel({token: index for index, token in enumerate(tokens)}, unk_token="<unk>"))
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>", **SPECIAL_TOKENS)


def base_config(cfg: TeachersBenchConfig, architecture: str) -> DistillConfig:
    """What the steps of all contenders have in common, with a student of this architecture, an option of the group `student`."""
    from opd.composition import load_config

    own = [f"student={architecture}", "student.dtype=bfloat16", "student.router_probe_every=0", "optim.update_ratio_every=0", "logger=none"]
    return load_config("distill", [*own, "teachers.max_resident=1", f"seed={cfg.seed}", *cfg.overrides])


def step_config(base: DistillConfig, contender: Contender, folder: Path) -> DistillConfig:
    """The settings under which a contender scores and trains; its teachers are the folders of `save_teachers`."""
    domains = {name: DomainConfig(teacher=TeacherConfig(model=str(folder / name), dtype=Dtype.bfloat16)) for name in domains_of(contender.num_teachers)}
    return replace(base, domains=domains, teachers=replace(base.teachers, prefetch=contender.prefetch))


def domains_of(num_teachers: int) -> list[str]:
    return [f"domain{number:02d}" for number in range(num_teachers)]


def save_teachers(cfg: TeachersBenchConfig, folder: Path) -> int:
    """Write as many teachers as the largest number, one folder for each domain; returns the parameters of one."""
    base, tokenizer = base_config(cfg, cfg.teacher_architecture), word_tokenizer(cfg.vocab_size)
    num_parameters = 0
    for number, domain in enumerate(domains_of(max(cfg.num_teachers)), start=1):
        seed_everything(cfg.seed + number)
        teacher = build_student(base.student, tokenizer)
        num_parameters = sum(parameter.numel() for parameter in teacher.parameters())
        save_model(folder / domain, teacher, tokenizer, teacher.state_dict())
    for path in weight_files(folder):
        with path.open("rb+") as file:
            os.fsync(file.fileno())
    return num_parameters


def weight_files(folder: Path) -> list[Path]:
    return sorted(folder.glob("*/*.safetensors"))


def make_rollouts(cfg: TeachersBenchConfig) -> list[Rollout]:
    """Random rollouts of `tokens_per_step` tokens, a third of each its prompt; their domains are those of the largest number of teachers.

    Raises ValueError where they would be shorter than four tokens.
    """
    if not 0 <= cfg.length_spread < 1:
        raise ValueError(f"length_spread must be from 0 to below 1, not {cfg.length_spread}")
    domains, generator = domains_of(max(cfg.num_teachers)), torch.Generator().manual_seed(cfg.seed)
    count = len(domains) * cfg.rollouts_per_teacher
    place_R = torch.linspace(-1, 1, count)[torch.randperm(count, generator=generator)] if count > 1 else torch.zeros(1)
    bound_R = (cfg.tokens_per_step / count * (1 + cfg.length_spread * place_R)).cumsum(0).round().long().tolist()
    lengths = [end - begin for begin, end in zip([0, *bound_R], [*bound_R[:-1], cfg.tokens_per_step], strict=False)]
    if min(lengths) < 4:
        raise ValueError(f"tokens_per_step={cfg.tokens_per_step} makes rollouts of {min(lengths)} tokens, which is too short: use at least {12 * count}")
    rollouts = []
    for request, length in enumerate(lengths):
        token_T = torch.randint(len(SPECIAL_TOKENS) + 1, cfg.vocab_size, (length,), generator=generator)
        prompt = Prompt(domain=domains[request % len(domains)], request=request, row=f"random:{request}", tokens=tuple(token_T[: length // 3].tolist()))
        completion_T = token_T[length // 3 :]
        known = {"logprob_T": torch.zeros(len(completion_T)), "sample": 0, "finished": True, "policy_step": 0}
        rollouts.append(Rollout(prompt=prompt, completion_T=completion_T, completion_mask_T=torch.ones_like(completion_T, dtype=torch.bool), **known))
    return rollouts


def relabelled(rollouts: list[Rollout], num_teachers: int) -> list[Rollout]:
    """The same rollouts as those of so many domains, in turns."""
    domains = domains_of(num_teachers)
    return [replace(each, prompt=replace(each.prompt, domain=domains[each.prompt.request % num_teachers])) for each in rollouts]


@dataclass(slots=True)
class Workplace:
    """One student and its engine, and per contender settings, teachers and rollouts."""

    folder: Path
    engine: Engine
    settings: dict[Contender, DistillConfig]
    pools: dict[Contender, TeacherPool]
    rollouts: dict[Contender, list[Rollout]]
    num_parameters: int = field(init=False)

    def __post_init__(self) -> None:
        self.num_parameters = sum(parameter.numel() for parameter in self.engine.model.parameters())

    def step(self, contender: Contender, cache: PageCache) -> StepFigures:
        """Score and update once, as the loop does."""
        pool, settings, counted = self.pools[contender], self.settings[contender], [0.0, 0.0]
        scored, score_seconds = self._timed(lambda: pool.score(self.rollouts[contender]), cache, counted)
        metrics, update_seconds = self._timed(lambda: update(self.engine, pool, scored, settings), cache, counted)
        return step_figures(metrics, score_seconds=score_seconds, update_seconds=update_seconds, cpu_seconds=counted[0], disk_bytes=counted[1])

    def close(self) -> None:
        """Remove the stores of hidden states."""
        for pool in self.pools.values():
            pool.store.close()

    def _timed(self, run: Run, cache: PageCache, counted: list[float]) -> tuple[Any, float]:
        """(outcome, seconds) with the files where `cache` says; seconds of the processor and bytes from the disk are added to `counted`."""
        for path in weight_files(self.folder):
            drop_from_cache(path) if cache is PageCache.cold else path.read_bytes()
        before = time.process_time(), _disk_bytes()
        found = timed(run, self.engine.device.type)
        counted[0] += time.process_time() - before[0]
        counted[1] += _disk_bytes() - before[1]
        return found


def build_workplace(cfg: TeachersBenchConfig, contenders: list[Contender], folder: Path, device: torch.device) -> Workplace:
    """What steps need; the teachers of `save_teachers` are not loaded yet. Raises ValueError for what settings and teachers are refused for."""
    base, tokenizer = base_config(cfg, cfg.student_architecture), word_tokenizer(cfg.vocab_size)
    settings = {contender: step_config(base, contender, folder) for contender in contenders}
    seed_everything(cfg.seed)
    engine = Engine(build_student(base.student, tokenizer), len(tokenizer), base, device)
    pools = {contender: TeacherPool(each.domains, each.teachers, tokenizer, device) for contender, each in settings.items()}
    rollouts = make_rollouts(cfg)
    return Workplace(folder, engine, settings, pools, {contender: relabelled(rollouts, contender.num_teachers) for contender in contenders})


def step_figures(metrics: dict[str, float], **measured: float) -> StepFigures:
    """With what was measured, what the metrics of a step say of loading, summed over teachers."""
    seconds = {name.split("/")[1]: value for name, value in metrics.items() if name.endswith("/load_seconds")}
    return StepFigures(
        loads=metrics["system/teacher_loads"],
        load_seconds=sum(seconds.values()),
        waited_seconds=sum(value * (1 - metrics[f"teacher/{teacher}/load_hidden"]) for teacher, value in seconds.items()),
        num_bytes=sum(value for name, value in metrics.items() if name.endswith("/bytes_loaded")),
        **measured,
    )


def measure_memory(cfg: TeachersBenchConfig, contender: Contender, folder: Path, threads: int) -> Memory:
    """Anonymous memory of a contender's steps, in a process of its own. Raises ValueError where that is killed, as for want of memory."""
    with ProcessPoolExecutor(max_workers=1, mp_context=multiprocessing.get_context("spawn")) as pool:
        try:
            return pool.submit(_measure_memory, cfg, contender, folder, threads).result()
        except BrokenProcessPool as error:
            raise ValueError(f"{contender.name} teachers: the process was killed, probably for want of memory: lower tokens_per_step") from error


def _measure_memory(cfg: TeachersBenchConfig, contender: Contender, folder: Path, threads: int) -> Memory:
    """In the process of its own."""
    torch.set_num_threads(threads)
    workplace = build_workplace(with_equal_batches(cfg), [contender], folder, start_processes())
    memory = memory_of_steps(workplace, contender)
    workplace.close()
    stop_processes()
    return memory


def with_equal_batches(cfg: TeachersBenchConfig) -> TeachersBenchConfig:
    """Settings under which all contenders run forwards of one size, that of a teacher's share of the tokens. Otherwise the larger forwards of few teachers
    would need more memory than the weights of many.
    """
    share = -(-cfg.tokens_per_step // max(cfg.num_teachers))
    sizes = [f"{name}={share}" for name in ("teachers.max_tokens_per_forward", "batch.max_tokens_per_micro_batch")]
    return replace(cfg, overrides=[*cfg.overrides, *sizes])


def memory_of_steps(workplace: Workplace, contender: Contender) -> Memory:
    """Anonymous memory of the first steps of a workplace."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    start = status_bytes("RssAnon")
    with AnonymousPeak() as peak:
        for _ in range(MEMORY_STEPS):
            workplace.step(contender, PageCache.warm)
    return Memory(start, peak.bytes)


class AnonymousPeak:
    """The most anonymous memory that this process has while the context lasts, as a thread sees it that looks every few milliseconds."""

    def __enter__(self) -> "AnonymousPeak":
        self.bytes, self.ended = status_bytes("RssAnon"), threading.Event()
        self.thread = threading.Thread(target=self._look, daemon=True)
        self.thread.start()
        return self

    def __exit__(self, *_exception) -> None:
        self.ended.set()
        self.thread.join()

    def _look(self) -> None:
        while not self.ended.wait(SAMPLING_SECONDS):
            self.bytes = max(self.bytes, status_bytes("RssAnon"))


def drop_from_cache(path: Path) -> None:
    """Have the operating system forget a file that has been written to the disk. Files that a process has mapped stay, and those of a tmpfs."""
    with path.open("rb") as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def cached_share(path: Path) -> float:
    """Share of a file's pages that are in the page cache."""
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY) as mapped:
        pages = (ctypes.c_ubyte * -(-len(mapped) // mmap.PAGESIZE))()
        begin = ctypes.c_char.from_buffer(mapped)
        failed = ctypes.CDLL(None, use_errno=True).mincore(ctypes.c_void_p(ctypes.addressof(begin)), ctypes.c_size_t(len(mapped)), pages)
        del begin
        if failed:
            raise OSError(ctypes.get_errno(), "mincore")
        return sum(page & 1 for page in pages) / len(pages)


def require_cold(folder: Path) -> None:
    """Raises ValueError where the teachers' files cannot be dropped from memory."""
    for path in weight_files(folder):
        drop_from_cache(path)
    if max(cached_share(path) for path in weight_files(folder)) > 0.05:
        raise ValueError(f"files in {folder.parent} stay in memory whatever one does, as on a tmpfs: set teacher_folder to one on a disk, or caches=[warm]")


def _disk_bytes() -> int:
    [line] = [line for line in Path("/proc/self/io").read_text().splitlines() if line.startswith("read_bytes:")]
    return int(line.split()[1])
