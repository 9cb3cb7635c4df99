"""What student and teacher would have said: of each rollout's worst tokens the five likeliest of both, and at every sixteenth token how far they agree.

The former is for reading (opd/samples.py), the latter for metrics (opd/metrics.py: overlap, log_ratio_right). Both come from the states that the loss has in
hand, so that it is the same student: the one before the step's update. They cost products of those rows with the heads, block by block of the vocabulary,
a twelfth of the loss's own time or less on a CPU; no gradient, and nothing that the update reads. The distributions are those at temperature 1, whatever
loss.temperature is. Of a teacher that gives less than its whole distribution it is what it gave.

N: completion tokens of a micro-batch. R: rows that are looked at. K: likeliest tokens. D: hidden size. V: vocabulary, of a block: its columns.
"""

import zlib
from dataclasses import dataclass

import torch

from opd.batch import MicroBatch
from opd.divergence import ModelStates
from opd.estimators import SampledToken, TopK
from opd.tiles import inside
from rollout.logits import product_into, transform_

WORST = 8
"""Tokens of a rollout that are looked at."""
LIKELIEST = 5
TOP = 16
"""Likeliest tokens whose overlap is measured, before the first step too (opd/signal_figures.py); arXiv:2604.13016 finds 97 to 99 % of both models' mass
in them.
"""
STRIDE = 16
"""Tokens of a rollout of which one is compared."""
BLOCK_COLUMNS = 8192
ROWS_AT_A_TIME = 512
"""16 MiB of float32 logits in a block."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Likeliest:
    """row_R: index of the token among those of the micro-batch. student, teacher: (tokens, log-probabilities) [R, K], likeliest first."""

    row_R: torch.Tensor
    student: tuple[torch.Tensor, torch.Tensor]
    teacher: tuple[torch.Tensor, torch.Tensor]


@dataclass(frozen=True, slots=True, kw_only=True)
class Compared:
    """Student and teacher at some tokens of a micro-batch; None what the teacher's signal does not tell.

    row_R: index of the token. overlap_R: share of the student's TOP likeliest tokens that are among the teacher's TOP; not of a top-k below TOP.
    log_ratio_R: log p_student - log p_teacher of the token itself, nats; not of a top-k.
    """

    row_R: torch.Tensor
    overlap_R: torch.Tensor | None
    log_ratio_R: torch.Tensor | None


def every_sixteenth(batch: MicroBatch) -> torch.Tensor:
    """row_R: of each rollout every STRIDE-th token that is in the loss, counted from its start_place."""
    places = [torch.arange(len(rollout.completion_T)) - start_place(rollout.prompt.request, rollout.sample) for rollout in batch.rollouts]
    is_chosen_N = torch.cat(places) % STRIDE == 0
    return (is_chosen_N.to(batch.mask_N.device) & batch.mask_N).nonzero()[:, 0]


def start_place(request: int, sample: int) -> int:
    """The first place of a rollout, below STRIDE, that is compared: the same whatever the ranks, and as good as random. One that counted on with the requests
    would show a domain the same few places for ever where its share of the requests and STRIDE have a common factor.
    """
    return zlib.crc32(f"{request}/{sample}".encode()) % STRIDE


@torch.no_grad()
def compare(student: ModelStates, signal: ModelStates | TopK | SampledToken, row_R: torch.Tensor, target_N: torch.Tensor, vocab_size: int) -> Compared:
    """Student and teacher at these rows; target_N: the sampled tokens of all rows."""
    count, target_R = min(TOP, vocab_size), target_N[row_R]
    own_RK, _, own_R = _of_states(student, row_R, target_R, vocab_size, count)
    theirs_RK = theirs_R = None
    if isinstance(signal, ModelStates):
        theirs_RK, _, theirs_R = _of_states(signal, row_R, target_R, vocab_size, count)
    elif isinstance(signal, SampledToken):
        theirs_R = signal.logprob_N[row_R].double()
    elif signal.token_NK.shape[1] >= count:
        theirs_RK = signal.token_NK[row_R].gather(1, signal.logprob_NK[row_R].topk(count, dim=1).indices)
    return Compared(
        row_R=row_R,
        overlap_R=None if theirs_RK is None else (own_RK[:, :, None] == theirs_RK[:, None, :]).any(2).double().mean(1),
        log_ratio_R=None if theirs_R is None else own_R - theirs_R,
    )


@torch.no_grad()
def likeliest_at_worst(
    student: ModelStates, signal: ModelStates | TopK | SampledToken, loss_N: torch.Tensor, rollout_N: torch.Tensor, target_N: torch.Tensor, vocab_size: int
) -> Likeliest:
    """The likeliest tokens at the WORST highest losses of each rollout. loss_N: -inf where a token is not in the loss."""
    rows = []
    for number in rollout_N.unique().tolist():
        own = (rollout_N == number).nonzero()[:, 0]
        own = own[loss_N[own] > -torch.inf]
        rows.append(own[loss_N[own].argsort(descending=True, stable=True)[:WORST]])
    row_R = torch.cat(rows) if rows else rollout_N[:0]
    student_tokens = _of_states(student, row_R, target_N[row_R], vocab_size, LIKELIEST)[:2]
    return Likeliest(row_R=row_R, student=student_tokens, teacher=_of_signal(signal, row_R, target_N, vocab_size))


def _of_signal(signal: ModelStates | TopK | SampledToken, row_R: torch.Tensor, target_N: torch.Tensor, vocab_size: int) -> tuple[torch.Tensor, torch.Tensor]:
    if isinstance(signal, ModelStates):
        return _of_states(signal, row_R, target_N[row_R], vocab_size, LIKELIEST)[:2]
    if isinstance(signal, SampledToken):
        return target_N[row_R, None], signal.logprob_N[row_R, None].float()
    logprob_RK, place_RK = signal.logprob_NK[row_R].float().topk(min(LIKELIEST, signal.logprob_NK.shape[1]), dim=1)
    return signal.token_NK[row_R].gather(1, place_RK), logprob_RK


def _of_states(
    states: ModelStates, row_R: torch.Tensor, target_R: torch.Tensor, vocab_size: int, count: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(likeliest tokens [R, K], their log-probabilities, those of target_R [R], float64); K: count, or the vocabulary where that is smaller."""
    pieces = zip(row_R.split(ROWS_AT_A_TIME), target_R.split(ROWS_AT_A_TIME), strict=True)
    token_RK, logprob_RK, target_logprob_R = zip(*[_of_rows(states, rows, targets, vocab_size, count) for rows, targets in pieces], strict=True)
    return torch.cat(token_RK), torch.cat(logprob_RK), torch.cat(target_logprob_R)


def _of_rows(states: ModelStates, row_R: torch.Tensor, target_R: torch.Tensor, vocab_size: int, count: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    hidden_RD = states.hidden_ND[row_R].detach()
    target_logit_R = torch.zeros(len(row_R), device=hidden_RD.device)
    tokens, logits, totals = [], [], []
    for start in range(0, vocab_size, BLOCK_COLUMNS):
        columns = slice(start, min(start + BLOCK_COLUMNS, vocab_size))
        logits_RV = torch.empty(len(row_R), columns.stop - start, dtype=torch.float32, device=hidden_RD.device)
        product_into(logits_RV, hidden_RD, states.head_VD[columns].detach())
        transform_(logits_RV, states.transform)
        is_inside_R, local_R = inside(target_R, columns)
        target_logit_R += logits_RV.gather(1, local_R[:, None])[:, 0] * is_inside_R
        best_RK, place_RK = logits_RV.topk(min(count, logits_RV.shape[1]), dim=1)
        tokens.append(place_RK + start)
        logits.append(best_RK)
        totals.append(logits_RV.logsumexp(1).double())
    token_RK, logit_RK = torch.cat(tokens, dim=1), torch.cat(logits, dim=1)
    best_RK, place_RK = logit_RK.topk(min(count, logit_RK.shape[1]), dim=1)
    total_R = torch.stack(totals).logsumexp(0)
    return token_RK.gather(1, place_RK), (best_RK.double() - total_R[:, None]).float(), target_logit_R.double() - total_R
