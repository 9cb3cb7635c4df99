"""Ways to compute one divergence with both of its gradients, forward and backward, from hidden states and heads.

A contender is prepared on inputs and is then a function without arguments that does everything once: it returns the loss and
the gradients by the student's hidden states and head. Every token weighs 1 / N, so that ours is the mean which the peers return.

    products        the four matrix products of the loss and nothing else, each into new memory: what is left if all else were free
    products_into   the same into memory that is there already
    ours            opd/divergence.py as a run uses it (backend auto); ours_eager is its backend eager
    naive           log_softmax over the whole [N, V] logits, with autograd

What the peers compute is in opd/bench_peers.py. A contender is held to the naive formula in float32 before it is timed.

N: tokens. D: hidden size, of the model that the name says. V: vocabulary.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from opd.divergence import divergence
from opd.loss_config import Backend, DivergenceKind
from rollout.config import Dtype

REFERENCE_TOKENS = 64
"""Tokens of one slice of the reference, which must not need more memory than the contenders."""

TORCH_DTYPE = {Dtype.float32: torch.float32, Dtype.bfloat16: torch.bfloat16}
"""Here too, since importing rollout/model.py would add three seconds to every measurement of memory."""

TOLERANCE = {Dtype.float32: 1e-4, Dtype.bfloat16: 3e-2}
"""Relative difference from the reference that a loss and a gradient (its Frobenius norm) may have."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Problem:
    """Which numbers to compute on. Inputs are drawn from the seed: hidden states N(0, 1), heads N(0, 1 / D), so that logits are N(0, 1)."""

    num_tokens: int
    vocab_size: int
    hidden: int
    teacher_hidden: int
    dtype: Dtype
    kind: DivergenceKind
    seed: int
    device: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Inputs:
    """Tensors of a problem; those of the student take gradients."""

    student_hidden_ND: torch.Tensor
    student_head_VD: torch.Tensor
    teacher_hidden_ND: torch.Tensor
    teacher_head_VD: torch.Tensor
    weight_N: torch.Tensor
    kind: DivergenceKind


@dataclass(frozen=True, slots=True)
class Outcome:
    """loss: None where a contender has none. The gradients are by the student's hidden states and head."""

    loss: torch.Tensor | None
    hidden_gradient_ND: torch.Tensor
    head_gradient_VD: torch.Tensor


Run = Callable[[], Outcome]
LossOf = Callable[[Inputs], Callable[[], torch.Tensor]]


@dataclass(frozen=True, slots=True)
class Contender:
    """prepare: from inputs to the function that does everything once.

    whole_matrices: float32 [N, V] matrices that it holds at its peak; 0 where it works tile by tile.
    devices: where it takes part unless it is asked for by name.
    """

    prepare: Callable[[Inputs], Run]
    whole_matrices: int = 0
    devices: tuple[str, ...] = ("cpu", "cuda")


def make_inputs(problem: Problem) -> Inputs:
    """The tensors of a problem; the same on every machine, for they are drawn on the CPU."""
    generator = torch.Generator().manual_seed(problem.seed)
    dtype, device = TORCH_DTYPE[problem.dtype], torch.device(problem.device)

    def draw(rows: int, columns: int, scale: float) -> torch.Tensor:
        return (torch.randn(rows, columns, generator=generator) * scale).to(device, dtype)

    return Inputs(
        student_hidden_ND=draw(problem.num_tokens, problem.hidden, 1.0).requires_grad_(),
        student_head_VD=draw(problem.vocab_size, problem.hidden, problem.hidden**-0.5).requires_grad_(),
        teacher_hidden_ND=draw(problem.num_tokens, problem.teacher_hidden, 1.0),
        teacher_head_VD=draw(problem.vocab_size, problem.teacher_hidden, problem.teacher_hidden**-0.5),
        weight_N=torch.full((problem.num_tokens,), 1 / problem.num_tokens, device=device),
        kind=problem.kind,
    )


def from_loss(loss_of: LossOf) -> Callable[[Inputs], Run]:
    """A contender's `prepare` from a function that prepares the forward; the backward is autograd's, into tensors without gradients."""

    def prepare(inputs: Inputs) -> Run:
        forward = loss_of(inputs)
        hidden_ND, head_VD = inputs.student_hidden_ND, inputs.student_head_VD

        def run() -> Outcome:
            loss = forward()
            loss.backward()
            outcome = Outcome(loss.detach(), hidden_ND.grad, head_VD.grad)
            hidden_ND.grad = head_VD.grad = None
            return outcome

        return run

    return prepare


def _products(inputs: Inputs) -> Run:
    @torch.no_grad()
    def run() -> Outcome:
        logits_NV = inputs.student_hidden_ND @ inputs.student_head_VD.T
        torch.mm(inputs.teacher_hidden_ND, inputs.teacher_head_VD.T)
        return Outcome(None, logits_NV @ inputs.student_head_VD, logits_NV.T @ inputs.student_hidden_ND)

    return run


def _products_into(inputs: Inputs) -> Run:
    hidden_ND, head_VD = inputs.student_hidden_ND.detach(), inputs.student_head_VD.detach()
    logits_NV = hidden_ND.new_empty(len(hidden_ND), len(head_VD))
    teacher_logits_NV = torch.empty_like(logits_NV)
    outcome = Outcome(None, torch.empty_like(hidden_ND), torch.empty_like(head_VD))

    @torch.no_grad()
    def run() -> Outcome:
        torch.mm(hidden_ND, head_VD.T, out=logits_NV)
        torch.mm(inputs.teacher_hidden_ND, inputs.teacher_head_VD.T, out=teacher_logits_NV)
        torch.mm(logits_NV, head_VD, out=outcome.hidden_gradient_ND)
        torch.mm(logits_NV.T, hidden_ND, out=outcome.head_gradient_VD)
        return outcome

    return run


def _ours(backend: Backend) -> LossOf:
    def loss_of(inputs: Inputs) -> Callable[[], torch.Tensor]:
        tensors = (inputs.student_hidden_ND, inputs.student_head_VD, inputs.teacher_hidden_ND, inputs.teacher_head_VD, inputs.weight_N)
        return lambda: divergence(*tensors, kind=inputs.kind, backend=backend)[0]

    return loss_of


def _naive(inputs: Inputs) -> Callable[[], torch.Tensor]:
    def forward() -> torch.Tensor:
        student_logits_NV = inputs.student_hidden_ND @ inputs.student_head_VD.T
        return (inputs.weight_N * naive_divergence(student_logits_NV, inputs.teacher_hidden_ND @ inputs.teacher_head_VD.T, inputs.kind)).sum()

    return forward


def naive_divergence(student_logits_NV: torch.Tensor, teacher_logits_NV: torch.Tensor, kind: DivergenceKind) -> torch.Tensor:
    """The divergence of each token as its formula stands, in float32; jsd with beta 0.5."""
    log_p_NV = student_logits_NV.float().log_softmax(-1)
    log_q_NV = teacher_logits_NV.float().log_softmax(-1)
    if kind is DivergenceKind.reverse_kl:
        return (log_p_NV.exp() * (log_p_NV - log_q_NV)).sum(-1)
    if kind is DivergenceKind.forward_kl:
        return (log_q_NV.exp() * (log_q_NV - log_p_NV)).sum(-1)
    p_NV, q_NV = log_p_NV.exp(), log_q_NV.exp()
    log_middle_NV = ((p_NV + q_NV) / 2).log()
    return (p_NV * (log_p_NV - log_middle_NV) + q_NV * (log_q_NV - log_middle_NV)).sum(-1) / 2


def reference(inputs: Inputs) -> Outcome:
    """What every contender has to find: the naive formula in float32, slice of tokens by slice."""
    hidden_ND, head_VD = (tensor.detach().float().requires_grad_() for tensor in (inputs.student_hidden_ND, inputs.student_head_VD))
    teacher_hidden_ND, teacher_head_VD = inputs.teacher_hidden_ND.float(), inputs.teacher_head_VD.float()
    total = torch.zeros((), device=hidden_ND.device)
    for start in range(0, len(hidden_ND), REFERENCE_TOKENS):
        rows = slice(start, start + REFERENCE_TOKENS)
        found_N = naive_divergence(hidden_ND[rows] @ head_VD.T, teacher_hidden_ND[rows] @ teacher_head_VD.T, inputs.kind)
        loss = (inputs.weight_N[rows] * found_N).sum()
        loss.backward()
        total += loss.detach()
    return Outcome(total, hidden_ND.grad, head_VD.grad)


def require_agreement(name: str, found: Outcome, expected: Outcome, dtype: Dtype) -> None:
    """Raises ValueError where a contender's loss or gradients are not the reference's. Without a loss there is nothing to compare."""
    if found.loss is None:
        return
    pairs = {
        "loss": (found.loss, expected.loss),
        "gradient by the hidden states": (found.hidden_gradient_ND, expected.hidden_gradient_ND),
        "gradient by the head": (found.head_gradient_VD, expected.head_gradient_VD),
    }
    for what, (value, right) in pairs.items():
        difference = float((value.float() - right).norm() / right.norm())
        if not difference <= TOLERANCE[dtype]:
            raise ValueError(
                f"{name} is not timed: its {what} differs from the naive formula's by {difference:.1e} relative, more than {TOLERANCE[dtype]:.0e};"
                f" leave it out with contenders=[...]"
            )


OWN = {
    "products": Contender(_products, whole_matrices=2),
    "products_into": Contender(_products_into, whole_matrices=2),
    "ours": Contender(from_loss(_ours(Backend.auto))),
    "ours_eager": Contender(from_loss(_ours(Backend.eager)), devices=("cpu",)),
    "naive": Contender(from_loss(_naive), whole_matrices=7),
}
