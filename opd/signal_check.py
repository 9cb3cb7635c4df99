"""Is each teacher's signal one to train on? Judged on the initial student, before the first step (opd/signal_figures.py measures).

Refused are signals that cannot teach:

    untrained     right answers get about -ln V per token (of domains without graded answers: the entropy is about ln V), as from random weights
    worse         right answers get less probability from the domain's teacher than from the student, beyond chance and MARGIN: two teachers
                  exchanged, a damaged checkpoint, prompts that look otherwise than in the teacher's training
    constant      the divergence stays as it is where the teacher's hidden states are moved by one token: whatever it reads, it says the same
    no gradient   there is a divergence, and the loss as configured has no gradient
    self          the student's own states, taken as a teacher's are, do not give a divergence of 0: what is scored is not what is trained on

Warned of is what distillation from scratch is known to fail on, since reverse KL moves only what the student itself samples (arXiv:2604.13016: the
likeliest tokens of both overlap little; a student that is never right beside a large divergence). warmup=sft is the cure, and silences it.

Domains without graded answers are judged by entropy, motion, gradient and self alone, and a note says so. A teacher that is the student
itself passes, with a note.
"""

import logging
import math
from dataclasses import dataclass, field

from opd.config import DistillConfig
from opd.distributed import broadcast_object
from opd.evaluator import Evaluator
from opd.run import is_new_run
from opd.signal_figures import SignalFigures, measure_signals
from opd.start_config import OnBadSignal
from rollout.config import Dtype
from rollout.stream import RolloutStream

SCHEMA = 1

UNTRAINED = 0.9
"""Of ln V: so unlikely are right answers, or so high is the entropy, where weights are untrained."""

MARGIN = 0.1
"""Nats per token by which a teacher may be worse than the student on right answers: a student that is distilled again may exceed its teachers a little."""

SELF_TOLERANCE = {Dtype.float32: 1e-4, Dtype.bfloat16: 1e-2}
"""Nats per token: rounding alone, which in bfloat16 differs with the shape of a batch."""

SMALLEST = 1e-5
"""Nats per token; less is rounding."""

LOW_OVERLAP, LARGE_KL = 0.5, 0.15
"""Share of the 16 likeliest tokens that are both models', and nats per token: below the one or, for a student that is never right, above the other,
distillation from scratch fails.
"""

LOG = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckReport:
    """What was found: figures per domain; refusals, warnings and notes, each a sentence.

    action: check.signal of the run; off where nothing was measured.
    """

    action: OnBadSignal
    figures: dict[str, SignalFigures] = field(default_factory=dict)
    refusals: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    def metrics(self) -> dict[str, float]:
        """Under the names of opd/metrics.py."""
        return {f"check/{domain}/{name}": value for domain, own in self.figures.items() for name, value in own.numbers().items()}

    def verdict(self) -> dict:
        """As JSON values, for the record of which teachers a run accepted."""
        sentences = {"refusals": list(self.refusals), "warnings": list(self.warnings), "notes": list(self.notes)}
        return {"schema": SCHEMA, "signal": self.action.value, **sentences, "domains": {name: own.numbers() for name, own in self.figures.items()}}

    def raise_or_warn(self) -> None:
        """Raises as `raise_if_refused`, or with check.signal=warn logs all refusals; warnings and notes are logged."""
        for sentence in self.warnings if self.action is OnBadSignal.refuse else (*self.refusals, *self.warnings):
            LOG.warning("check: %s", sentence)
        for sentence in self.notes:
            LOG.info("check: %s", sentence)
        self.raise_if_refused()

    def raise_if_refused(self) -> None:
        """Raises ValueError with the first refusal, unless check.signal=warn."""
        if self.refusals and self.action is OnBadSignal.refuse:
            more = f" ({len(self.refusals) - 1} more: see `opd check`)" if len(self.refusals) > 1 else ""
            raise ValueError(self.refusals[0] + more)


def check_new_run(cfg: DistillConfig, stream: RolloutStream, evaluator: Evaluator) -> CheckReport:
    """The check of a run that is about to begin, before it writes anything; one that goes on from a checkpoint was judged when it began.

    Raises ValueError where it refuses; every rank calls it.
    """
    report = run_checks(cfg, stream, evaluator) if broadcast_object(is_new_run(cfg)) else CheckReport(action=OnBadSignal.off)
    report.raise_or_warn()
    evaluator.teachers.manifest.record_check(report.verdict())
    return report


def run_checks(cfg: DistillConfig, stream: RolloutStream, evaluator: Evaluator) -> CheckReport:
    """Measure and judge every domain's signal, with the weights that the sampler holds; every rank calls it."""
    if cfg.check.signal is OnBadSignal.off:
        return CheckReport(action=OnBadSignal.off)
    figures = measure_signals(cfg, stream, evaluator)
    vocab_size = len(evaluator.tokenizer)
    return CheckReport(
        action=cfg.check.signal,
        figures=figures,
        refusals=tuple(sentence for name, own in figures.items() for sentence in refusals(name, own, cfg, vocab_size)),
        warnings=tuple(sentence for name, own in figures.items() if not refusals(name, own, cfg, vocab_size) for sentence in warnings(name, own, cfg)),
        notes=tuple(sentence for name, own in figures.items() for sentence in _notes(name, own)),
    )


def refusals(name: str, own: SignalFigures, cfg: DistillConfig, vocab_size: int) -> list[str]:
    """Why the signal of a domain cannot teach; each a sentence with its fix."""
    found = []
    teacher, uniform = f"the teacher of {name} ({cfg.domains[name].teacher.model})", math.log(vocab_size)
    fix = f"correct domains.{name}.teacher, or accept it with check.signal=warn"
    if own.answer_logprob is not None and own.answer_logprob <= -UNTRAINED * uniform:
        guess = f"{own.answer_logprob:.2f} nats per token, where a uniform guess gives {-uniform:.2f}"
        found.append(f"{teacher} gives its domain's right answers {guess}, as untrained weights do: {fix}")
    elif own.answer_gain is not None and own.answer_gain.high < 0 and own.answer_logprob < own.answer_logprob_student - MARGIN:
        figures = f"{own.answer_logprob:.2f} against {own.answer_logprob_student:.2f} nats per token"
        found.append(f"{teacher} gives its own domain's right answers less probability than the student does ({figures}): {fix}")
    elif own.answer_logprob is None and own.teacher_entropy is not None and own.teacher_entropy >= UNTRAINED * uniform:
        found.append(f"{teacher} is as uncertain as untrained weights are ({own.teacher_entropy:.2f} nats per token of at most {uniform:.2f}): {fix}")
    if own.shift_change is not None and own.shift_change < SMALLEST:
        found.append(f"{teacher} gives the same distribution whatever it reads, so that nothing could be learnt from it: {fix}")
    elif own.kl_per_token is not None and own.kl_per_token > SMALLEST and not own.gradient_norm > 0:
        found.append(f"the loss on {name} has no gradient, and the student is {own.kl_per_token:.2g} nats per token away: change loss.cap or loss.smoothing")
    if not own.self_kl <= SELF_TOLERANCE[cfg.student.dtype]:
        found.append(
            f"the student is {own.self_kl:.2g} nats per token away from itself on {name} when it is scored as a teacher is, without padding: "
            "choose another student.attention or student.experts, or accept it with check.signal=warn"
        )
    return found


def warnings(name: str, own: SignalFigures, cfg: DistillConfig) -> list[str]:
    """What lets distillation from scratch fail; nothing for a domain that is warmed up."""
    if cfg.warmup.covers(name):
        return []
    found = []
    cure = "distillation from scratch is known to fail there: begin with warmup=sft"
    if own.overlap is not None and own.overlap < LOW_OVERLAP:
        found.append(f"of the 16 likeliest tokens {own.overlap:.0%} are both the student's and the teacher's on {name}; {cure}")
    if own.accuracy == 0 and own.kl_per_token is not None and own.kl_per_token > LARGE_KL:
        truncated = f", and {own.truncated:.0%} of its answers were cut at rollout.max_new_tokens" if own.truncated else ""
        found.append(f"the student is never right on {name} and {own.kl_per_token:.2f} nats per token away from its teacher{truncated}; {cure}")
    return found


def _notes(name: str, own: SignalFigures) -> list[str]:
    found = []
    if own.answer_gain is None:
        found.append(f"{name} has no graded answers, so whether its teacher knows more than the student was not judged")
    if own.kl_per_token is None:
        found.append(f"a server holds the teacher of {name}, so its likelihoods alone were judged")
    elif own.kl_per_token < SMALLEST:
        found.append(f"the teacher of {name} is the student itself (KL {own.kl_per_token:.1g} nats per token), so there is nothing to learn from it")
    return found
