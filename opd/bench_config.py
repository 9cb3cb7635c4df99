"""Typed settings of `opd bench`: what every subject has, and each subject's own. They measure, and know nothing of runs."""

from dataclasses import dataclass, field

from opd.loss_config import DivergenceKind
from rollout.config import Dtype


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
