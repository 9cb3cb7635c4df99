"""Samplers turn prompts into rollouts. `LocalSampler` decodes with a transformers model in this process.

Cohorts. All rows of a batch stand at the same position, and there is no padding: DeepSeek-V4's compressed attention pools
tokens in fixed windows counted from the sequence's first token, so that pad tokens on the left would change the logits
(measured: 0.26 on logits of size 0.70). A cohort starts at the length of its shortest prompt; rows whose prompt is longer
are fed their own tokens until these are consumed. Prompts are sorted by length, so that few steps are spent that way.

Fixed width. A cohort always has `decode_width` rows: where there are fewer prompts, copies of the first fill it up. The last
bits of a matrix product depend on the number of rows, so the same cohort gives the same bits only at one width. Another cohort
changes a row by rounding alone (about 1e-6 in fp32): routed experts multiply whatever rows were sent to them together.

The sampler has a model of its own and copies the trainer's weights into it (`refresh`), so that a partitioned trainer gathers its
weights once per rollout phase and decodes without any communication. Where the student trains under FP4, that model holds its routed experts
packed (rollout/experts.py) and multiplies with what they decode to: the numbers of the trainer's forward.

B: rows of a cohort (decode_width). L: prompt positions. V: vocabulary. T: completion tokens.
"""

import inspect
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Protocol

import torch
from transformers import DynamicCache, PreTrainedModel

from rollout.config import SamplingConfig
from rollout.experts import find_packed, is_packed_buffer, pack_weight
from rollout.sampling import draw, uniform
from rollout.types import Prompt, Rollout


class WeightSource(Protocol):
    """Where a sampler's weights come from: the trainer's engine."""

    policy_step: int
    """Number of optimizer steps the weights have seen."""

    def weights(self) -> Iterable[tuple[str, torch.Tensor]]:
        """Full, unpartitioned parameters and persistent buffers by name, as the trainer's forward multiplies them: quantised experts with their FP4
        values. Every rank has to call it.
        """


class Sampler(Protocol):
    """What draws completions: here a model in this process, later a server."""

    def refresh(self, source: WeightSource) -> None:
        """Take over the weights of a source; rollouts sampled afterwards carry its `policy_step`."""

    def sample(self, prompts: list[Prompt], cfg: SamplingConfig, completions_per_prompt: int = 1) -> list[Rollout]:
        """One rollout per prompt and completion, in the order of the prompts. Raises ValueError where the model gives NaN."""


@dataclass(slots=True)
class _Row:
    prompt: Prompt
    sample: int
    order: int
    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    finished: bool = False


class LocalSampler:
    """Decode with a transformers model, cohort by cohort."""

    def __init__(self, model: PreTrainedModel, eos_token_ids: Iterable[int], seed: int, vocab_size: int | None = None):
        """vocab_size: real vocabulary; rows of the head beyond it are padding and are never drawn. None: the head has no padding.

        Raises ValueError for a model that cannot continue from a cache: it would see one token at a time.
        """
        if "past_key_values" not in inspect.signature(model.forward).parameters:
            raise ValueError(f"{model.config.model_type} takes no past_key_values, so it cannot be sampled from token by token: this family is not supported")
        self.vocab_size = vocab_size
        self.model, self.eos_token_ids, self.seed = model.eval(), tuple(eos_token_ids), seed
        self.policy_step = 0

    def refresh(self, source: WeightSource) -> None:
        own, packed = self.model.state_dict(keep_vars=True), find_packed(self.model)
        remaining = {name for name in own if not is_packed_buffer(name)} | set(packed)
        with torch.no_grad():
            for name, tensor in source.weights():
                if name in packed:
                    pack_weight(*packed[name], tensor.to(self.model.device))
                else:
                    own[name].data.copy_(tensor)
                remaining.discard(name)
        tied = {name for name in remaining if name in own and any(own[name] is own[other] for other in set(own) - remaining)}
        assert remaining == tied, f"the trainer gave no weights for {sorted(remaining - tied)}"
        self.policy_step = source.policy_step

    @torch.inference_mode()
    def sample(self, prompts: list[Prompt], cfg: SamplingConfig, completions_per_prompt: int = 1) -> list[Rollout]:
        rows = [_Row(prompt=prompt, sample=sample, order=0) for prompt in prompts for sample in range(completions_per_prompt)]
        for order, row in enumerate(rows):
            row.order = order
        waiting = sorted(rows, key=lambda row: (len(row.prompt.tokens), row.order))
        for start in range(0, len(waiting), cfg.decode_width):
            self._decode(waiting[start : start + cfg.decode_width], cfg)
        return [self._rollout(row) for row in rows]

    def _decode(self, rows: list[_Row], cfg: SamplingConfig) -> None:
        """Fill the tokens of one cohort, in place."""
        device = self.model.device
        filled = rows + [rows[0]] * (cfg.decode_width - len(rows))
        lengths = [len(row.prompt.tokens) for row in filled]
        shortest, last = min(lengths), max(lengths) + cfg.max_new_tokens
        request_B = torch.tensor([row.prompt.request for row in filled])
        stream_B = torch.tensor([row.sample for row in filled])
        cache = DynamicCache(config=self.model.config)
        feed_BL = torch.tensor([row.prompt.tokens[:shortest] for row in filled], device=device)
        for position in range(shortest, last):
            output = self.model(input_ids=feed_BL, past_key_values=cache, use_cache=True, logits_to_keep=1)
            uniform_B = uniform(self.seed, (request_B << 16) + stream_B, position).to(device)
            token_B, logprob_B = draw(output.logits[:, -1, : self.vocab_size], uniform_B, cfg.temperature)
            feed_BL = self._append(rows, token_B.tolist(), logprob_B.tolist(), position, cfg)
            if all(row.finished or len(row.tokens) == cfg.max_new_tokens for row in rows):
                return
            feed_BL = torch.tensor(feed_BL + feed_BL[:1] * (cfg.decode_width - len(rows)), device=device)[:, None]

    def _append(self, rows: list[_Row], tokens: list[int], logprobs: list[float], position: int, cfg: SamplingConfig) -> list[int]:
        """Take each row's token at `position`: its own while the prompt lasts, else the sampled one. Returns what to feed next."""
        feed = []
        for row, token, logprob in zip(rows, tokens, logprobs, strict=False):
            if position < len(row.prompt.tokens):
                token = row.prompt.tokens[position]
            elif not row.finished and len(row.tokens) < cfg.max_new_tokens:
                row.tokens.append(token)
                row.logprobs.append(logprob)
                row.finished = token in self.eos_token_ids
            feed.append(token)
        return feed

    def _rollout(self, row: _Row) -> Rollout:
        logprob_T = torch.tensor(row.logprobs, dtype=torch.float32)
        if not logprob_T.isfinite().all():
            raise ValueError(f"the model gave NaN or infinity on request {row.prompt.request} of domain {row.prompt.domain}: its weights have diverged")
        return Rollout(
            prompt=row.prompt,
            completion_T=torch.tensor(row.tokens),
            completion_mask_T=torch.ones(len(row.tokens), dtype=torch.bool),
            logprob_T=logprob_T,
            sample=row.sample,
            finished=row.finished,
            policy_step=self.policy_step,
        )

