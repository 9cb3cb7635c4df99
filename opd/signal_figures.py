"""What each teacher's signal is like on the initial student: the figures that opd/signal_check.py judges.

The student answers some prompts of each domain with the rollouts' sampler, the teachers score these answers and the data's right ones, and both models'
distributions are compared. A right answer is a reference answer, tokenised and closed by the end-of-sequence token, to which the domain's
grader gives 1. Rollouts that were graded right are no substitute: they are the student's own choice, so its likelihood of them is biased upwards.

The models are the sampler's copy of the student, whole on every rank, and the pool's teachers; so there is nothing to gather, and nothing of the
trainer is touched. Every rank answers a share of the prompts, one at least, and figures are sums over all ranks divided by counts. Random
numbers are keyed apart from those of training and evaluation.

B: rows. L: positions. N: completion tokens of a micro-batch. C: some of them. V: vocabulary. K: likeliest tokens. D: hidden size. T: tokens of a completion.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from opd.batch import MicroBatch, forward_batches
from opd.config import DistillConfig
from opd.distributed import Group, num_ranks, rank
from opd.divergence import ModelStates, full_divergence
from opd.estimators import signal_of, student_states
from opd.evaluator import Evaluator
from opd.intervals import Interval, mean
from opd.likeliest import TOP
from opd.loss_config import LossConfig
from opd.metrics import DomainTotals
from opd.rollouts import FirstRequest
from opd.teacher_answers import checked_answers
from rollout.chat import encode_answer
from rollout.grading import grade_rollout
from rollout.logits import LOGITS_AT_A_TIME, log_probabilities
from rollout.model import logit_transform
from rollout.prompts import PromptMixture
from rollout.stream import RolloutStream
from rollout.types import Prompt, Rollout, completed
from teachers.config import SignalKind
from teachers.pool import TeacherPool
from teachers.teacher import Teacher
from teachers.types import ScoredRollout, TeacherSignal

SELF_ROLLOUTS = 4
"""Rollouts of a domain, per rank, on which the student is its own teacher."""

SUMS = (
    "prompts", "tokens", "compared", "graded", "score", "truncated", "kl", "overlap", "student_entropy", "teacher_entropy", "teacher_logprob",
    "change", "moved", "gradient_squared",
    "answers", "answer_tokens", "answer_logprob", "answer_logprob_student", "gain", "gain_squared", "self_tokens", "self_kl",
    "references", "reference_tokens", "teacher_answers", "teacher_answer_tokens",
)  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class SignalFigures:
    """Of one domain; log-probabilities, entropies and divergences in nats per token, None where nothing could be measured.

    kl_per_token: KL(student || teacher) on the student's own tokens. overlap: share of the TOP likeliest tokens that both have, there.
    student_entropy, teacher_entropy, teacher_logprob: there; the latter of the student's tokens, and all that a teacher behind a server is asked for.
    truncated, accuracy: of the student's answers.
    answer_logprob, answer_logprob_student: of the data's right answers, from the teacher and from the student.
    answer_gain: teacher over student, in nats per answer, with its 95 % interval.
    self_kl: the student from itself, taken as a teacher is: one rollout at a time, without padding.
    shift_change: mean size of the divergence's change where the teacher's states are moved by one token within a micro-batch, across its rollouts, since
        completions may be of one token; None where micro-batches are.
    gradient_norm: of the divergence that the loss settings name, summed over tokens, by the student's last hidden states.
    reference_length: tokens of the data's reference answers to the same prompts, the end-of-sequence token included, right or not.
    teacher_length: tokens of the teacher's own answers, where check.teacher_answers asks for some (opd/teacher_answers.py).
    """

    kl_per_token: float | None
    overlap: float | None
    student_entropy: float | None
    teacher_entropy: float | None
    teacher_logprob: float
    truncated: float
    accuracy: float | None
    answer_logprob: float | None
    answer_logprob_student: float | None
    answer_gain: Interval | None
    self_kl: float
    shift_change: float | None
    gradient_norm: float | None
    reference_length: float | None
    teacher_length: float | None

    def numbers(self) -> dict[str, float]:
        """Those that were measured, by name; of an interval its ends too."""
        values = {name: getattr(self, name) for name in self.__slots__ if name != "answer_gain"}
        if self.answer_gain is not None:
            values |= {"answer_gain": self.answer_gain.value, "answer_gain_low": self.answer_gain.low, "answer_gain_high": self.answer_gain.high}
        return {name: value for name, value in values.items() if value is not None}


def measure_signals(cfg: DistillConfig, stream: RolloutStream, evaluator: Evaluator) -> dict[str, SignalFigures]:
    """The figures of every domain, with the weights that the stream's sampler holds; every rank calls it.

    Raises ValueError where a teacher fails, whatever teachers.on_failure is: before the first step nothing is lost by mending it.
    """
    tokenizer, model = evaluator.tokenizer, stream.sampler.model
    sampling = replace(cfg.rollout, max_new_tokens=min(cfg.rollout.max_new_tokens, evaluator.sampling.max_new_tokens))
    prompts = [prompt for number, name in enumerate(cfg.domains) for prompt in _own_prompts(name, number, cfg, stream.prompts, evaluator)]
    rollouts = stream.sampler.sample(prompts, sampling)
    answers = [answer for prompt in prompts if (answer := _right_answer(prompt, cfg, sampling.max_new_tokens, tokenizer)) is not None]
    totals = DomainTotals(list(cfg.domains))
    for rollout in rollouts:
        name, grader = rollout.prompt.domain, cfg.domains[rollout.prompt.domain].grader
        totals.add(name, prompts=1, truncated=not rollout.finished)
        if grader is not None:
            totals.add(name, graded=1, score=grade_rollout(grader, rollout, tokenizer))
    for prompt in prompts:
        if prompt.answer is not None:
            totals.add(prompt.domain, references=1, reference_tokens=len(encode_answer(prompt.answer, tokenizer)))
    pair = _Pair(model, evaluator.teachers, len(tokenizer), cfg.loss)
    own, right = (_scored(part, evaluator.teachers) for part in (rollouts, answers))
    for name, reason in evaluator.teachers.dropped.items():
        raise ValueError(f"{reason}: correct domains.{name}.teacher, or leave the domain out with '~domains.{name}'")
    for name in cfg.domains:
        for batch in pair.batches([item for item in own if item.rollout.prompt.domain == name]):
            pair.add_rollouts(totals, name, batch)
        for batch in pair.batches([item for item in right if item.rollout.prompt.domain == name]):
            pair.add_answers(totals, name, batch)
        totals.add(name, **pair.itself([rollout for rollout in rollouts if rollout.prompt.domain == name][:SELF_ROLLOUTS]))
    for answer in checked_answers(cfg, stream.prompts, evaluator):
        totals.add(answer.prompt.domain, teacher_answers=1, teacher_answer_tokens=len(answer.completion_T))
    return {name: _figures(sums) for name, sums in totals.reduced(SUMS).items()}


class _Pair:
    """The student and, micro-batch by micro-batch, the teacher that scored it."""

    def __init__(self, model: PreTrainedModel, teachers: TeacherPool, vocab_size: int, loss: LossConfig):
        self.model, self.teachers, self.vocab_size, self.loss = model, teachers, vocab_size, loss
        self.exact = LossConfig(backend=loss.backend)

    @torch.no_grad()
    def add_rollouts(self, totals: DomainTotals, name: str, batch: MicroBatch) -> None:
        """Add the figures of the student's own tokens."""
        mask_N, ones_N = batch.mask_N, torch.ones_like(batch.weight_N)
        if batch.signal is not SignalKind.hidden_states:
            totals.add(name, tokens=mask_N.sum(), teacher_logprob=_sum(batch.teacher_logprob_NK[:, 0], mask_N))
            return
        student, teacher = self._states(batch), signal_of(batch, self.teachers.head(batch.teacher))
        _, losses = full_divergence(student, teacher, ones_N, self.exact, self.vocab_size)
        moved = replace(teacher, hidden_ND=teacher.hidden_ND.roll(1, 0))
        _, other = full_divergence(student, moved, ones_N, self.exact, self.vocab_size)
        _, teacher_logprob_N, overlap_N = self._compare(student, teacher, batch.target_N)
        totals.add(
            name,
            tokens=mask_N.sum(),
            compared=mask_N.sum(),
            kl=_sum(losses.loss_N, mask_N),
            student_entropy=_sum(losses.student_entropy_N, mask_N),
            teacher_entropy=_sum(losses.teacher_entropy_N, mask_N),
            teacher_logprob=_sum(teacher_logprob_N, mask_N),
            overlap=_sum(overlap_N, mask_N),
            change=_sum((other.loss_N - losses.loss_N).abs(), mask_N),
            moved=mask_N.sum() * (len(mask_N) > 1),
            gradient_squared=self._gradient_squared(student, teacher, mask_N.to(ones_N)),
        )

    @torch.no_grad()
    def add_answers(self, totals: DomainTotals, name: str, batch: MicroBatch) -> None:
        """Add what both give to right answers."""
        student = self._states(batch)
        if batch.signal is SignalKind.hidden_states:
            student_N, teacher_N, _ = self._compare(student, signal_of(batch, self.teachers.head(batch.teacher)), batch.target_N)
        else:
            student_N, teacher_N = self._compare(student, student, batch.target_N)[0], batch.teacher_logprob_NK[:, 0]
        gain_B = torch.zeros(len(batch.rollouts), dtype=torch.float64).index_add_(0, batch.rollout_N.cpu(), (teacher_N - student_N).double().cpu())
        everything_N = torch.ones_like(batch.mask_N)
        totals.add(name, answers=len(batch.rollouts), answer_tokens=len(batch.target_N), gain=gain_B.sum(), gain_squared=gain_B.square().sum())
        totals.add(name, answer_logprob=_sum(teacher_N, everything_N), answer_logprob_student=_sum(student_N, everything_N))

    @torch.no_grad()
    def itself(self, rollouts: list[Rollout]) -> dict[str, float]:
        """The student's divergence from its own states as a teacher's: {"self_tokens", "self_kl"}."""
        hidden = Teacher("student", self.model).hidden(rollouts, 1)
        scored = [ScoredRollout(rollout=r, signal=TeacherSignal(teacher="student", hidden_TD=h)) for r, h in zip(rollouts, hidden, strict=True)]
        tokens = kl = 0.0
        for batch in self.batches(scored):
            student = self._states(batch)
            teacher = replace(student, hidden_ND=batch.teacher_hidden_ND)
            _, losses = full_divergence(student, teacher, torch.ones_like(batch.weight_N), self.exact, self.vocab_size)
            tokens, kl = tokens + len(losses.loss_N), kl + float(losses.loss_N.double().abs().sum())
        return {"self_tokens": tokens, "self_kl": kl}

    def batches(self, scored: list[ScoredRollout]) -> Iterator[MicroBatch]:
        return forward_batches(scored, self.teachers, self.model.device)

    def _states(self, batch: MicroBatch) -> ModelStates:
        return student_states(self.model, batch, logit_transform(self.model.config, "student"))

    def _compare(self, student: ModelStates, teacher: ModelStates, target_N: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """(student's log-probability of the target, teacher's, share of the likeliest tokens that both have), [N] each."""
        parts = []
        count = min(TOP, self.vocab_size)
        rows = max(1, LOGITS_AT_A_TIME // self.vocab_size)
        for start in range(0, len(target_N), rows):
            target_C1 = target_N[start : start + rows, None]
            student_CV, teacher_CV = (
                log_probabilities(states.hidden_ND[start : start + rows], states.head_VD[: self.vocab_size], states.transform) for states in (student, teacher)
            )
            ours_CK, theirs_CK = student_CV.topk(count, dim=1).indices, teacher_CV.topk(count, dim=1).indices
            shared_C = (ours_CK[:, :, None] == theirs_CK[:, None, :]).any(-1).float().mean(1)
            parts.append(torch.stack([student_CV.gather(1, target_C1)[:, 0], teacher_CV.gather(1, target_C1)[:, 0], shared_C]))
        return torch.cat(parts, dim=1).unbind(0)

    def _gradient_squared(self, student: ModelStates, teacher: ModelStates, weight_N: torch.Tensor) -> float:
        with torch.enable_grad():
            hidden_ND = student.hidden_ND.detach().clone().requires_grad_()
            loss, _ = full_divergence(replace(student, hidden_ND=hidden_ND), teacher, weight_N, self.loss, self.vocab_size)
            (gradient_ND,) = torch.autograd.grad(loss, hidden_ND)
        return float(gradient_ND.double().square().sum())


def _own_prompts(name: str, number: int, cfg: DistillConfig, mixture: PromptMixture, evaluator: Evaluator) -> list[Prompt]:
    """This rank's prompts of a domain: held-out ones where the run evaluates, else training prompts; each rank gets one, if need be the same row."""
    found = evaluator.prompts.get(name) or mixture.choose(name, cfg.check.prompts, "check", 0)
    count = max(num_ranks(Group.data), min(cfg.check.prompts, len(found)))
    first = FirstRequest.check + number * max(num_ranks(Group.data), cfg.check.prompts)
    numbered = [replace(found[index % len(found)], request=first + index) for index in range(count)]
    return numbered[rank(Group.data) :: num_ranks(Group.data)]


def _right_answer(prompt: Prompt, cfg: DistillConfig, longest: int, tokenizer: PreTrainedTokenizerBase) -> Rollout | None:
    """The reference answer as a completion, where it fits and the domain's grader gives it 1."""
    grader = cfg.domains[prompt.domain].grader
    if grader is None or prompt.answer is None:
        return None
    answer = completed(prompt, encode_answer(prompt.answer, tokenizer))
    return None if len(answer.completion_T) > longest or grade_rollout(grader, answer, tokenizer) < 1 else answer


def _scored(rollouts: list[Rollout], teachers: TeacherPool) -> list[ScoredRollout]:
    """Scored with all that each teacher has: one behind a server has no hidden states."""
    local, remote = ([rollout for rollout in rollouts if teachers.is_remote(rollout.prompt.domain) is there] for there in (False, True))
    return teachers.score(local, SignalKind.hidden_states) + teachers.score(remote, SignalKind.sampled_token)


def _sum(values_N: torch.Tensor, mask_N: torch.Tensor) -> float:
    return float((values_N * mask_N).double().sum())


def _figures(sums: dict[str, float]) -> SignalFigures:
    compared, answers = sums["compared"], sums["answers"]
    return SignalFigures(
        kl_per_token=sums["kl"] / compared if compared else None,
        overlap=sums["overlap"] / compared if compared else None,
        student_entropy=sums["student_entropy"] / compared if compared else None,
        teacher_entropy=sums["teacher_entropy"] / compared if compared else None,
        teacher_logprob=sums["teacher_logprob"] / sums["tokens"],
        truncated=sums["truncated"] / sums["prompts"],
        accuracy=sums["score"] / sums["graded"] if sums["graded"] else None,
        answer_logprob=sums["answer_logprob"] / sums["answer_tokens"] if answers else None,
        answer_logprob_student=sums["answer_logprob_student"] / sums["answer_tokens"] if answers else None,
        answer_gain=mean(sums["gain"], sums["gain_squared"], int(answers)) if answers else None,
        self_kl=sums["self_kl"] / sums["self_tokens"],
        shift_change=sums["change"] / sums["moved"] if sums["moved"] else None,
        gradient_norm=sums["gradient_squared"] ** 0.5 if compared else None,
        reference_length=sums["reference_tokens"] / sums["references"] if sums["references"] else None,
        teacher_length=sums["teacher_answer_tokens"] / sums["teacher_answers"] if sums["teacher_answers"] else None,
    )
