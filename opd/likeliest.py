"""What student and teacher would have said at the tokens where they differ most: of each rollout's worst tokens the five likeliest of both.

For reading only (opd/samples.py), from the states that the loss has in hand, so that it is the same student: the one before the step's update. It costs
a product of WORST rows per rollout with the heads, block by block of the vocabulary; no gradient, and nothing that the update reads. The
distributions are those at temperature 1, whatever loss.temperature is. Of a teacher that gives less than its whole distribution it is what it gave.

N: completion tokens of a micro-batch. R: rows that are looked at. K: likeliest tokens. D: hidden size. V: vocabulary, of a block: its columns.
"""

from dataclasses import dataclass

import torch

from opd.divergence import ModelStates
from opd.estimators import SampledToken, TopK
from rollout.logits import product_into, transform_

WORST = 8
"""Tokens of a rollout that are looked at."""
LIKELIEST = 5
BLOCK_COLUMNS = 8192


@dataclass(frozen=True, slots=True, kw_only=True)
class Likeliest:
    """row_R: index of the token among those of the micro-batch. student, teacher: (tokens, log-probabilities) [R, K], likeliest first."""

    row_R: torch.Tensor
    student: tuple[torch.Tensor, torch.Tensor]
    teacher: tuple[torch.Tensor, torch.Tensor]


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
    return Likeliest(row_R=row_R, student=_of_states(student, row_R, vocab_size), teacher=_of_signal(signal, row_R, target_N, vocab_size))


def _of_signal(signal: ModelStates | TopK | SampledToken, row_R: torch.Tensor, target_N: torch.Tensor, vocab_size: int) -> tuple[torch.Tensor, torch.Tensor]:
    if isinstance(signal, ModelStates):
        return _of_states(signal, row_R, vocab_size)
    if isinstance(signal, SampledToken):
        return target_N[row_R, None], signal.logprob_N[row_R, None].float()
    logprob_RK, place_RK = signal.logprob_NK[row_R].float().topk(min(LIKELIEST, signal.logprob_NK.shape[1]), dim=1)
    return signal.token_NK[row_R].gather(1, place_RK), logprob_RK


def _of_states(states: ModelStates, row_R: torch.Tensor, vocab_size: int) -> tuple[torch.Tensor, torch.Tensor]:
    hidden_RD = states.hidden_ND[row_R].detach()
    tokens, logits, totals = [], [], []
    for start in range(0, vocab_size, BLOCK_COLUMNS):
        columns = slice(start, min(start + BLOCK_COLUMNS, vocab_size))
        logits_RV = torch.empty(len(row_R), columns.stop - start, dtype=torch.float32, device=hidden_RD.device)
        product_into(logits_RV, hidden_RD, states.head_VD[columns].detach())
        transform_(logits_RV, states.transform)
        best_RK, place_RK = logits_RV.topk(min(LIKELIEST, logits_RV.shape[1]), dim=1)
        tokens.append(place_RK + start)
        logits.append(best_RK)
        totals.append(logits_RV.double().logsumexp(1))
    token_RK, logit_RK = torch.cat(tokens, dim=1), torch.cat(logits, dim=1)
    best_RK, place_RK = logit_RK.topk(min(LIKELIEST, logit_RK.shape[1]), dim=1)
    total_R = torch.stack(totals).logsumexp(0)
    return token_RK.gather(1, place_RK), (best_RK.double() - total_R[:, None]).float()
