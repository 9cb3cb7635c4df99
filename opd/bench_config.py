"""Typed settings of `opd bench`, subject by subject."""

from dataclasses import dataclass, field
from enum import Enum

from opd.loss_config import DivergenceKind
from rollout.config import Dtype


class PageCache(Enum):
    """Where teachers' files are when a step begins: in the operating system's page cache (warm), or on the disk alone (cold)."""

    warm = "warm"
    cold = "cold"


@dataclass(slots=True)
class BenchConfig:
    """What every subject of `opd bench` has.

    run_dir: folder for SUBJECT.csv and the resolved configuration.
    repeats: measured rounds, after a first call that is not counted.
    threads: CPU threads; null chooses.
    seed: key of the random inputs.
    """

    run_dir: str = "runs/bench"
    repeats: int = 7
    threads: int | None = None
    seed: int = 0


@dataclass(slots=True)
class DivergenceBenchConfig(BenchConfig):
    """`opd bench divergence`: time and memory of a loss, forward and backward, beside other ways and other libraries.

    num_tokens, vocab_sizes: sizes to measure, each with each.
    hidden, teacher_hidden: width of the student's and the teacher's hidden states; null takes the student's.
    dtype: of hidden states and heads.
    kind: the divergence; jsd stands half-way (beta 0.5).
    contenders: who takes part; null takes everyone who is installed and fits.
    memory: also the peak memory, each in a process of its own.
    """

    num_tokens: list[int] = field(default_factory=lambda: [512])
    vocab_sizes: list[int] = field(default_factory=lambda: [32768, 151936])
    hidden: int = 256
    teacher_hidden: int | None = None
    dtype: Dtype = Dtype.float32
    kind: DivergenceKind = DivergenceKind.reverse_kl
    contenders: list[str] | None = None
    memory: bool = True


@dataclass(slots=True)
class QatBenchConfig(BenchConfig):
    """`opd bench qat`: what FP4 experts cost, alone and in a step of the quickstart's distillation, and what they save.

    shape: of the bfloat16 weights: experts, outputs, inputs.
    tokens_per_expert: tokens that each expert multiplies in the product which the rest is compared with.
    steps: measured optimizer steps with and without FP4, after one that is not counted; 0 leaves them out.
    overrides: settings of `opd distill` on top of the quickstart's, for those steps.
    """

    run_dir: str = "runs/bench_qat"
    shape: list[int] = field(default_factory=lambda: [16, 1024, 1024])
    tokens_per_expert: int = 128
    steps: int = 40
    overrides: list[str] = field(default_factory=list)


@dataclass(slots=True)
class TeachersBenchConfig(BenchConfig):
    """`opd bench teachers`: steps with many teachers against steps with one, on the same tokens: time, loading that is hidden, memory.

    num_teachers: numbers of teachers to compare; the first is what the others are compared with.
    tokens_per_step: prompts and completions of one step together.
    rollouts_per_teacher: with the largest number of teachers; all numbers of teachers score the same rollouts.
    length_spread: the longest rollout is (1 + it) times as long as the average one, the shortest (1 - it) times.
    caches: where the teachers' files are when a step begins.
    teacher_architecture, student_architecture: of the new models: options of the group `student`.
    vocab_size: tokens of the tokenizer that all share.
    teacher_folder: teachers are written into a temporary folder in it; null takes the run's own.
    memory: also the peak of anonymous memory, each in a process of its own.
    overrides: settings of `opd distill`.
    """

    run_dir: str = "runs/bench_teachers"
    repeats: int = 3
    num_teachers: list[int] = field(default_factory=lambda: [1, 12])
    tokens_per_step: int = 16384
    rollouts_per_teacher: int = 3
    length_spread: float = 0.0
    caches: list[PageCache] = field(default_factory=lambda: [PageCache.warm, PageCache.cold])
    teacher_architecture: str = "deepseek_v4_50m"
    student_architecture: str = "deepseek_v4_50m"
    vocab_size: int = 8192
    teacher_folder: str | None = None
    memory: bool = True
    overrides: list[str] = field(default_factory=list)


@dataclass(slots=True)
class RolloutBenchConfig(BenchConfig):
    """`opd bench rollout`: what the token log costs, and what it brings that rows leave a cohort when they end.

    requests: prompts, of one completion each.
    decode_width: rows decoded together.
    prompt_tokens, max_new_tokens: of each prompt, and of a completion at most.
    num_end_tokens: ids that end a completion: the more, the shorter completions are.
    architecture: of the new model: an option of the group `student`.
    overrides: settings of `opd distill` for it.
    """

    run_dir: str = "runs/bench_rollout"
    repeats: int = 5
    requests: int = 256
    decode_width: int = 256
    prompt_tokens: int = 16
    max_new_tokens: int = 64
    num_end_tokens: int = 4
    architecture: str = "deepseek_v4_tiny"
    overrides: list[str] = field(default_factory=list)


@dataclass(slots=True)
class StepBenchConfig(BenchConfig):
    """`opd bench step`: whole optimizer steps, from prompts to updated weights, beside other systems, on the CPU.

    architectures: of new students and teachers: options of the group `student`, of families that all contenders know.
    contenders: who takes part; null takes everyone who is installed.
    prompts_per_step: the same in every step, over all ranks, with one completion each.
    max_new_tokens: completion tokens at most.
    mean_new_tokens: a completion ends after each token with a probability of 1 over this, at the beginning of training.
    vocab_size: tokens of the tokenizer that all share.
    lr: of AdamW; everybody's.
    threads: CPU threads of each process; null takes one.
    overrides: settings of `opd distill` for ours.
    """

    run_dir: str = "runs/bench_step"
    repeats: int = 15
    architectures: list[str] = field(default_factory=lambda: ["qwen3_tiny", "qwen3_moe_tiny"])
    contenders: list[str] | None = None
    prompts_per_step: int = 128
    max_new_tokens: int = 64
    mean_new_tokens: float = 24.0
    vocab_size: int = 400
    lr: float = 1e-4
    overrides: list[str] = field(default_factory=list)
