"""The exact divergence between student and teacher over the whole vocabulary, from hidden states and heads.

With student logits z = W h, teacher logits z' = W' h', p = softmax(z), q = softmax(z'), per token and in nats:

    reverse KL   sum_v p_v (log p_v - log q_v)      DeepSeek-V4's choice (arXiv:2606.19348, 5.1.2)
    forward KL   sum_v q_v (log q_v - log p_v)
    jsd          (1 - beta) KL(p || m) + beta KL(q || m),   m = (1 - beta) p + beta q

beta goes from forward (0) to reverse (1), the convention of TRL, Liger and DeepSpeed, which give the plain divergences at its ends, where
the formula itself is 0. A temperature divides both models' logits; no factor T^2 is put in its place.

Neither [tokens, vocabulary] matrix exists: opd/tiles.py walks both models' products tile by tile, opd/divergence_passes.py (torch) and
opd/divergence_triton.py (CUDA) hold the element-wise part. Row statistics of the blocks are joined in float64, so that the difference of two
large normalisers costs no digits; what is left is the rounding of the blocks' float32 sums, about 1e-7 of the logits' differences and of either sign
(0 if the logits are equal). Terms that cannot cancel would need one more pass for plain reverse KL, for digits that no mean over tokens shows.

The k1 estimate as a loss and partial top-k sums are refused by construction: opd/estimators.py says why and has what stands in their place.

N: tokens. C: tokens of a tile. D: hidden size. V: vocabulary, of a block: its columns. S: statistics, or scalars, of a row. B: blocks.
"""

import math
from dataclasses import dataclass, replace

import torch

from opd.divergence_passes import EXPECTATION, NUM_SCALARS, WEIGHT, Formula, Passes, choose_passes
from opd.loss_config import Backend, DivergenceKind, LossConfig
from opd.tiles import Targets, TokenLosses, join_blocks, tiled_loss, with_targets
from rollout.logits import product_into
from rollout.types import IDENTITY, LogitTransform


def divergence(
    student_hidden_ND: torch.Tensor,
    student_head_VD: torch.Tensor,
    teacher_hidden_ND: torch.Tensor,
    teacher_head_VD: torch.Tensor,
    weight_N: torch.Tensor,
    *,
    kind: DivergenceKind | str = DivergenceKind.reverse_kl,
    temperature: float = 1.0,
    beta: float = 0.5,
    smoothing: float = 0.0,
    cap: float | None = None,
    vocab_size: int | None = None,
    student_transform: LogitTransform = IDENTITY,
    teacher_transform: LogitTransform = IDENTITY,
    backend: Backend | str = Backend.auto,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(loss, kl_N): loss = sum(weight_N * kl_N) carries gradients to the student's hidden states and head; kl_N, in nats, is detached.

    Hidden sizes and dtypes of student and teacher may differ; statistics and kl_N are float32.

    kind, beta: which divergence (module docstring); beta is jsd's.
    temperature: divides the logits of both.
    smoothing: the teacher is (1 - smoothing) q + smoothing p, so that reverse KL is at most -log(smoothing).
    cap: kl_N is at most this; a token beyond it gives no gradient.
    vocab_size: real vocabulary; rows of a head beyond it are padding and never count. None: both heads have it exactly.
    student_transform, teacher_transform: scale and soft cap of families that have them.
    backend: see opd.loss_config.Backend.

    Raises ValueError for shapes that do not fit and settings out of their range.
    """
    if vocab_size is None and len(student_head_VD) != len(teacher_head_VD):
        raise ValueError(f"the heads have {len(student_head_VD)} and {len(teacher_head_VD)} rows: give vocab_size")
    student = ModelStates(student_hidden_ND, student_head_VD, student_transform)
    teacher = ModelStates(teacher_hidden_ND, teacher_head_VD, teacher_transform)
    if not isinstance(kind, DivergenceKind) and kind not in {known.value for known in DivergenceKind}:
        raise ValueError(f"there is no divergence {kind!r}; there are {', '.join(known.value for known in DivergenceKind)}")
    cfg = LossConfig(DivergenceKind(kind), beta, temperature, smoothing, cap, backend=Backend(backend))
    size = len(student_head_VD) if vocab_size is None else vocab_size
    loss, losses = full_divergence(student, teacher, weight_N, cfg, size)
    return loss, losses.loss_N


@dataclass(frozen=True, slots=True)
class ModelStates:
    """What a model's distributions are made of: last hidden states [N, D], head [V, D], and what is done to their product."""

    hidden_ND: torch.Tensor
    head_VD: torch.Tensor
    transform: LogitTransform = IDENTITY


def make_formula(cfg: LossConfig, student: LogitTransform, teacher: LogitTransform) -> Formula:
    """What to compute. Raises ValueError for a setting out of its range."""
    kind, beta, smoothing, temperature = cfg.kind, cfg.beta, cfg.smoothing, cfg.temperature
    if not temperature > 0 or not math.isfinite(temperature):
        raise ValueError(f"the temperature of the divergence must be above 0, not {temperature}")
    if not 0 <= smoothing < 1:
        raise ValueError(f"smoothing must be from 0 to below 1, not {smoothing}")
    if not 0 <= beta <= 1:
        raise ValueError(f"beta must be from 0 (forward KL) to 1 (reverse KL), not {beta}")
    if cfg.cap is not None and not cfg.cap > 0:
        raise ValueError(f"the cap of a token's divergence must be above 0, not {cfg.cap}")
    if kind is DivergenceKind.jsd and beta in (0, 1):
        kind = DivergenceKind.reverse_kl if beta == 1 else DivergenceKind.forward_kl
    beta = beta if kind is DivergenceKind.jsd else 0.5
    return Formula(kind, float(beta), float(smoothing), with_temperature(student, temperature), with_temperature(teacher, temperature))


def full_divergence(
    student: ModelStates, teacher: ModelStates, weight_N: torch.Tensor, cfg: LossConfig, vocab_size: int, targets: Targets | None = None
) -> tuple[torch.Tensor, TokenLosses]:
    """As `divergence`, with the entropies of both distributions and, where wanted, the sampled token's log-probability beside the divergence of each token."""
    shape, head_shape = list(teacher.hidden_ND.shape), list(teacher.head_VD.shape)
    if len(shape) != 2 or len(head_shape) != 2 or shape != [len(student.hidden_ND), head_shape[1]] or head_shape[0] < vocab_size:
        wanted = f"{len(student.hidden_ND)} tokens and a vocabulary of {vocab_size}"
        raise ValueError(f"the teacher's hidden states {shape} and head {head_shape} do not fit {wanted}")
    formula = make_formula(cfg, student.transform, teacher.transform)
    passes = choose_passes(cfg.backend, student.hidden_ND.device, vocab_size, formula)
    objective = with_targets(_Divergence(teacher, formula, passes, cfg.cap), targets, cfg.temperature)
    return tiled_loss(student.hidden_ND, student.head_VD, weight_N, vocab_size, objective)


class _Divergence:
    """The Objective of opd/tiles.py: a teacher's products beside the student's."""

    def __init__(self, teacher: ModelStates, formula: Formula, passes: Passes, cap: float | None):
        self.teacher, self.formula, self.passes, self.cap = teacher, formula, passes, cap
        self.buffers: dict[int, torch.Tensor] = {}

    def start(self, rows: slice) -> None:
        self.hidden_CD = self.teacher.hidden_ND[rows]
        self.statistics: list[torch.Tensor] = []
        self.blocks: list[tuple[torch.Tensor, torch.Tensor]] = []

    def measure(self, columns: slice, logits_CV: torch.Tensor) -> None:
        if columns.start not in self.buffers:
            self.buffers[columns.start] = torch.empty_like(logits_CV)  # no later tile has more rows
        teacher_CV = self._teacher(columns)
        product_into(teacher_CV, self.hidden_CD, self.teacher.head_VD[columns])
        self.statistics.append(self.passes.normalise(logits_CV, teacher_CV))
        self.blocks.append((logits_CV, teacher_CV))

    def finish(self) -> TokenLosses:
        joined = _Joined(torch.stack(self.statistics).double())
        self.scalars_SC = joined.scalars()
        self.log_total_C = joined.maximum_C + joined.total_C.log()
        if self.formula.is_plain_reverse:
            loss_C = expectation_C = joined.reverse_kl_C
        else:
            sums = [self.passes.integrate(student_CV, teacher_CV, self.scalars_SC) for student_CV, teacher_CV in self.blocks]
            loss_C, expectation_C = torch.stack(sums).double().sum(0)
        self.scalars_SC[EXPECTATION] = expectation_C
        self.is_capped_C = None if self.cap is None else loss_C > self.cap
        loss_C = loss_C if self.cap is None else loss_C.clamp(max=self.cap)
        return TokenLosses(loss_C, joined.student_entropy_C, joined.teacher_entropy_C, capped_N=self.is_capped_C)

    def gradient(self, columns: slice, logits_CV: torch.Tensor, weight_C: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        weight_C = weight_C if self.is_capped_C is None else weight_C * ~self.is_capped_C
        self.scalars_SC[WEIGHT] = weight_C
        return self.passes.differentiate(logits_CV, self._teacher(columns), self.scalars_SC, dtype)

    def _teacher(self, columns: slice) -> torch.Tensor:
        return self.buffers[columns.start][: len(self.hidden_CD)]


class _Joined:
    """Statistics of a tile's rows over the whole vocabulary, from those of its blocks; float64."""

    def __init__(self, statistics_BSC: torch.Tensor):
        maximum, total, moment, difference, teacher_maximum, teacher_total, teacher_moment = statistics_BSC.unbind(1)
        self.maximum_C, self.total_C, moment_C, factor = join_blocks(maximum, total, moment)
        self.teacher_maximum_C, self.teacher_total_C, teacher_moment_C, _ = join_blocks(teacher_maximum, teacher_total, teacher_moment)
        self.log_ratio_C = (self.maximum_C - self.teacher_maximum_C) + (self.total_C / self.teacher_total_C).log()
        self.reverse_kl_C = (difference * factor).sum(0) / self.total_C - self.log_ratio_C
        self.student_entropy_C = self.total_C.log() - moment_C / self.total_C
        self.teacher_entropy_C = self.teacher_total_C.log() - teacher_moment_C / self.teacher_total_C

    def scalars(self) -> torch.Tensor:
        """What the later passes need, [S, C], float32, in the order of opd/divergence_passes.py; expectation and weight are still 0."""
        rows = [self.maximum_C, 1 / self.total_C, self.teacher_maximum_C, 1 / self.teacher_total_C, self.log_ratio_C]
        rows += [torch.zeros_like(self.maximum_C)] * (NUM_SCALARS - len(rows))
        return torch.stack(rows).float()


def with_temperature(transform: LogitTransform, temperature: float) -> LogitTransform:
    """The transform followed by a division by a temperature."""
    softcap = transform.softcap
    return replace(transform, scale=transform.scale / temperature, softcap=softcap and softcap / temperature)
