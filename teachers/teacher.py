"""One frozen teacher: token sequences -> last hidden states at the completion positions.

Hidden states, not logits, are what is kept: for DeepSeek-V4 they are eighteen to thirty times smaller than the distribution they
stand for (arXiv:2606.19348, 5.2.2), and the teacher's head gives the logits back exactly, tile by tile, inside the loss.

A teacher may give less, for comparison with systems that have no more: its top-k, or the sampled token's log-probability.

D: hidden size. V: vocabulary. T: completion tokens. C: some of them. K: tokens named per position.
"""

import torch
from torch import nn
from transformers import PreTrainedModel

from rollout.logits import LOGITS_AT_A_TIME, log_probabilities
from rollout.model import backbone_of, head_of, logit_transform
from rollout.padding import completion_span, group_by_length, pad_right, sequence_length
from rollout.types import Rollout
from teachers.adapters import Adapter, AdapterSlot
from teachers.checkpoint_reader import unique_weights
from teachers.config import SignalKind
from teachers.residency import Weights
from teachers.types import OutputHead, TeacherSignal


class Teacher:
    """A frozen model that scores rollouts. Its weights may come and go: `attach` and `detach`.

    Several teachers may share a model that they use with an adapter each, or without any: `adapters` is then the model's place for them.
    """

    def __init__(self, name: str, model: PreTrainedModel, adapters: AdapterSlot | None = None, adapter: Adapter | None = None):
        self.name, self.adapters, self.adapter = name, adapters, adapter
        self.model = model.eval().requires_grad_(False)
        self.transform = logit_transform(model.config, f"teacher {name}")
        self.places = _places_of_weights(model)
        self.empty = {name: tensor.detach().to("meta") for name, tensor in unique_weights(model).items()}

    def attach(self, weights: Weights) -> None:
        """Take these tensors as the model's weights, as they are; each tied one in all its places."""
        for module, leaf, name in self.places:
            if leaf in module._parameters:
                module._parameters[leaf] = nn.Parameter(weights[name], requires_grad=False)
            else:
                module._buffers[leaf] = weights[name]

    def detach(self) -> None:
        """Let go of the weights, whose memory will be overwritten: the model cannot be run until others are attached."""
        self.attach(self.empty)

    def activate(self) -> None:
        """Make the model compute as this teacher, where it shares it. Raises ValueError where its adapter does not fit."""
        if self.adapters is not None:
            self.adapters.activate(self.adapter)

    @property
    def head(self) -> OutputHead:
        """The output projection, and what the family does to its product."""
        return OutputHead(weight_VD=head_of(self.model).weight, transform=self.transform)

    @torch.no_grad()
    def hidden(self, rollouts: list[Rollout], max_tokens: int) -> list[torch.Tensor]:
        """hidden_TD of each rollout, in order; forwards hold at most `max_tokens` padded tokens (one rollout at least)."""
        self.activate()
        result: list[torch.Tensor | None] = [None] * len(rollouts)
        for group in group_by_length([sequence_length(rollout) for rollout in rollouts], max_tokens):
            hidden_BLD = backbone_of(self.model)(input_ids=pad_right([rollouts[i] for i in group]).to(self.model.device), use_cache=False)[0]
            for row, index in enumerate(group):
                start, stop = completion_span(rollouts[index])
                result[index] = hidden_BLD[row, start:stop].clone()
        return result

    @torch.no_grad()
    def signal(self, rollout: Rollout, hidden_TD: torch.Tensor, kind: SignalKind, top_k: int, vocab_size: int) -> TeacherSignal:
        """What this teacher gives for one rollout, from its hidden states; padding beyond the vocabulary never counts."""
        if kind is SignalKind.hidden_states:
            return TeacherSignal(teacher=self.name, hidden_TD=hidden_TD)
        sampled_T1 = rollout.completion_T.to(hidden_TD.device)[:, None]
        tokens, logprobs = [], []
        rows = max(1, LOGITS_AT_A_TIME // vocab_size)
        for start in range(0, len(hidden_TD), rows):
            logprob_CV = self._logprobs(hidden_TD[start : start + rows], vocab_size)
            if kind is SignalKind.top_k:
                found = logprob_CV.topk(top_k, dim=1)
                tokens.append(found.indices)
                logprobs.append(found.values)
            else:
                tokens.append(sampled_T1[start : start + rows])
                logprobs.append(logprob_CV.gather(1, tokens[-1]))
        return TeacherSignal(teacher=self.name, kind=kind, token_TK=torch.cat(tokens), logprob_TK=torch.cat(logprobs))

    @torch.no_grad()
    def rounding_kl(self, hidden_TD: torch.Tensor, dtype: torch.dtype, vocab_size: int) -> float:
        """KL(teacher || teacher from hidden states in another dtype), summed over the tokens, in nats."""
        total, rows = 0.0, max(1, LOGITS_AT_A_TIME // vocab_size)
        for start in range(0, len(hidden_TD), rows):
            exact_CV = self._logprobs(hidden_TD[start : start + rows], vocab_size).double().log_softmax(-1)  # float32 adds up to 1 within 1e-7 only
            rounded_CV = self._logprobs(hidden_TD[start : start + rows].to(dtype), vocab_size).double().log_softmax(-1)
            total += float((exact_CV.exp() * (exact_CV - rounded_CV)).sum())
        return total

    def _logprobs(self, hidden_CD: torch.Tensor, vocab_size: int) -> torch.Tensor:
        head = self.head
        return log_probabilities(hidden_CD, head.weight_VD[:vocab_size], head.transform)


def _places_of_weights(model: PreTrainedModel) -> list[tuple[nn.Module, str, str]]:
    """(module, name in it, name among `unique_weights`) of every weight of a model."""
    names = {id(tensor): name for name, tensor in unique_weights(model).items()}
    places = []
    for name, tensor in model.state_dict(keep_vars=True).items():
        path, _, leaf = name.rpartition(".")
        places.append((model.get_submodule(path), leaf, names[id(tensor)]))
    return places
