"""What travels from the sampler to the trainer. All tensors are on the CPU.

T: tokens of one completion. M: layers with routed experts. K: experts per token.
"""

from dataclasses import dataclass

import torch


@dataclass(frozen=True, slots=True, kw_only=True)
class Prompt:
    """One prompt of the mixture.

    domain: whose teacher scores it.
    request: number of the prompt in the run; the key of its random numbers.
    row: name of the data row, "SOURCE:INDEX", for messages.
    tokens: ids given to the student, BOS included where the tokenizer has one.
    answer: reference answer, None where the domain has none.
    """

    domain: str
    request: int
    row: str
    tokens: tuple[int, ...]
    answer: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Rollout:
    """One prompt with one completion.

    completion_T: int64 ids, the end-of-sequence token included when it was sampled.
    completion_mask_T: bool; True on tokens that enter the loss (environment tokens of an agent are False).
    logprob_T: float32 log-probability of each token under the policy and temperature that sampled it; NaN where it was put in place of the sampled one
        (rollout/perturbation.py).
    routes_TMK: uint8 or int16, the experts chosen in each layer for the state that predicted each token (rollout/routes.py); None: not recorded.
    sample: index among the completions of the same prompt.
    finished: the completion ended with an end-of-sequence token; False is a truncated one.
    policy_step: the step whose weights sampled it.
    """

    prompt: Prompt
    completion_T: torch.Tensor
    completion_mask_T: torch.Tensor
    logprob_T: torch.Tensor
    sample: int
    finished: bool
    policy_step: int
    routes_TMK: torch.Tensor | None = None

    @property
    def num_loss_tokens(self) -> int:
        return int(self.completion_mask_T.sum())


def completed(prompt: Prompt, tokens: list[int], is_left_out: list[bool] | None = None) -> Rollout:
    """A prompt with a completion that no one sampled, such as its reference answer; every token enters the loss, but those that is_left_out says."""
    completion_T = torch.tensor(tokens)
    mask_T = torch.ones_like(completion_T, dtype=torch.bool) if is_left_out is None else ~torch.tensor(is_left_out)
    return Rollout(
        prompt=prompt,
        completion_T=completion_T,
        completion_mask_T=mask_T,
        logprob_T=torch.zeros(len(tokens)),
        sample=0,
        finished=True,
        policy_step=0,
    )


@dataclass(frozen=True, slots=True)
class LogitTransform:
    """From products to logits: softcap * tanh(scale * product / softcap), or scale * product where there is no soft cap.

    product: head times last hidden state.
    """

    scale: float = 1.0
    softcap: float | None = None

    @property
    def is_identity(self) -> bool:
        return self.scale == 1 and self.softcap is None


IDENTITY = LogitTransform()
"""Of most families: logits are head times hidden state."""
