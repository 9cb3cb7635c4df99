"""Samplers turn prompts into rollouts. `LocalSampler` decodes with a transformers model in this process, cohort by cohort (rollout/cohort.py).

It has a model of its own and copies the trainer's weights into it (`refresh`), so that a partitioned trainer gathers its weights once per
rollout phase and decodes without any communication: ranks whose completions differ in length do not wait for each other, token by token. Where the
student trains under FP4, that model holds its routed experts packed (rollout/experts.py) and multiplies with what they decode to: the numbers of the
trainer's forward.

With a log every token is on record before it is used, and what a killed process had logged under the same weights is taken up again.
"""

import inspect
from collections.abc import Iterable, Iterator
from contextlib import closing, contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from importlib.metadata import version
from typing import Protocol

import torch
from transformers import PreTrainedModel

from rollout.cohort import AppendToLog, Cohort, Completion, DecodingFigures, IsDone, Policy, end_tokens_of, form_cohorts
from rollout.config import SamplingConfig
from rollout.experts import find_packed, is_packed_buffer, pack_weight
from rollout.perturbation import Perturbation
from rollout.types import Prompt, Rollout
from rollout.wal import Key, LoggedCompletion, RolloutLog, SegmentWriter, prompt_checksum, token_key
from rollout.weights import hash_tensors


class WeightSource(Protocol):
    """Where a sampler's weights come from: the trainer's engine."""

    policy_step: int
    """Number of optimizer steps the weights have seen."""

    def weights(self) -> Iterable[tuple[str, torch.Tensor]]:
        """Full, unpartitioned parameters and persistent buffers by name, as the trainer's forward multiplies them: quantised experts with their FP4
        values. Every rank has to call it.
        """


@dataclass(frozen=True, slots=True)
class StepLog:
    """Where the tokens of one training step are logged: the run's log, the step, and this process's name in it."""

    log: RolloutLog
    step: int
    name: str

    @contextmanager
    def opened(self, completions: list[Completion], key: int, policy_step: int) -> Iterator[AppendToLog]:
        """Give completions the tokens that are logged for them under a key; what this yields logs those that are drawn inside.

        Raises ValueError where the log cannot be written.
        """
        take_up(completions, self.log.completions(self.step, key))
        with closing(SegmentWriter(self.log.segment(self.step, self.name))) as writer:
            yield partial(writer.append, key, policy_step)


class Sampler(Protocol):
    """What draws completions: a model in this process, other processes, or servers."""

    policy_step: int
    """Of the weights that it samples with."""

    figures: DecodingFigures | None
    """What the last call of `sample` took, in a sampler that knows."""

    def refresh(self, source: WeightSource) -> None:
        """Take over the weights of a source; rollouts sampled afterwards carry its `policy_step`."""

    def sample(self, prompts: list[Prompt], cfg: SamplingConfig, completions_per_prompt: int = 1, log: StepLog | None = None) -> list[Rollout]:
        """One rollout per prompt and completion, in the order of the prompts, no two of which have one request. Raises ValueError where the model gives NaN."""

    def take_up_weights(self, policy_step: int) -> bool:
        """Sample with weights that were published earlier; False where they are not there any more. Every rank calls it."""

    def protect(self, policy_step: int) -> None:
        """Keep the weights of a step published, in place of those named before, for a run that is taken up from its last checkpoint."""

    def close(self) -> None:
        """Let go of processes and connections."""


class LocalSampler:
    """Decode with a transformers model, cohort by cohort."""

    def __init__(self, model: PreTrainedModel, eos_token_ids: Iterable[int], seed: int, vocab_size: int | None = None):
        """vocab_size: real vocabulary; rows of the head beyond it are padding and are never drawn. None: the head has no padding.

        Raises ValueError for a model that cannot continue from a cache: it would see one token at a time.
        """
        if "past_key_values" not in inspect.signature(model.forward).parameters:
            raise ValueError(
                f"{model.config.model_type} of transformers {version('transformers')} takes no past_key_values, so it cannot be sampled from token by token: "
                "this family is not supported, or this version of transformers is none of those in pyproject.toml"
            )
        self.model = model.eval()
        self.policy = Policy(self.model, seed, tuple(eos_token_ids), vocab_size)
        self.policy_step = 0
        self.figures = DecodingFigures()

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

    def sample(
        self,
        prompts: list[Prompt],
        cfg: SamplingConfig,
        completions_per_prompt: int = 1,
        log: StepLog | None = None,
        is_done: IsDone | None = None,
    ) -> list[Rollout]:
        """As the protocol says; `figures` are then those of this call. is_done: ends a completion besides its end tokens; it counts as not finished then.

        Raises ValueError also where the log cannot be written.
        """
        completions = [Completion(prompt, sample) for prompt in prompts for sample in range(completions_per_prompt)]
        with nullcontext() if log is None else log.opened(completions, self._key(cfg), self.policy_step) as append:
            self._decode(form_cohorts(completions, cfg.decode_width, completions_per_prompt), cfg, append=append, is_done=is_done)
        return [rollout_of(completion, end_tokens_of(self.policy, cfg), self.policy_step) for completion in completions]

    def sample_perturbed(self, prompts: list[Prompt], cfg: SamplingConfig, perturbation: Perturbation) -> list[Rollout]:
        """As `sample`, with an environment that replaces tokens: its own have NaN for a log-probability, and stay out of the rollout's mask."""
        completions = [Completion(prompt, 0) for prompt in prompts]
        self._decode(form_cohorts(completions, cfg.decode_width, 1), cfg, perturbation)
        rollouts = [rollout_of(completion, end_tokens_of(self.policy, cfg), self.policy_step) for completion in completions]
        return [replace(rollout, completion_mask_T=~rollout.logprob_T.isnan()) for rollout in rollouts]

    def take_up_weights(self, policy_step: int) -> bool:
        """It publishes none."""
        return False

    def protect(self, policy_step: int) -> None:
        """It publishes none."""

    def close(self) -> None:
        """It has nothing to let go of."""

    def _decode(
        self,
        cohorts: list[list[Completion]],
        cfg: SamplingConfig,
        perturbation: Perturbation | None = None,
        append: AppendToLog | None = None,
        is_done: IsDone | None = None,
    ) -> None:
        self.figures = DecodingFigures()
        for rows in cohorts:
            cohort = Cohort(self.policy, rows, cfg, perturbation, is_done)
            for _ in cohort.decode(append):
                pass
            self.figures.add(cohort.figures)

    def _key(self, cfg: SamplingConfig) -> int:
        return sampling_key(hash_tensors(self.model.state_dict().items()), self.policy, cfg)


def sampling_key(weights: str, policy: Policy, cfg: SamplingConfig) -> int:
    """What a token depends on besides its request, sample, position and prompt: the weights' hash, the seed, and how it is drawn."""
    return token_key(weights, policy.seed, cfg.temperature, cfg.top_p, cfg.top_k, cfg.min_p, sorted(end_tokens_of(policy, cfg)), policy.vocab_size)


def take_up(completions: list[Completion], logged: dict[Key, LoggedCompletion]) -> None:
    """Give completions the tokens that are logged for them; those of another prompt under the same request are passed over."""
    for completion in completions:
        found = logged.get((completion.prompt.request, completion.sample))
        if found is not None and found.prompt == prompt_checksum(completion.prompt.tokens):
            completion.tokens, completion.logprobs = list(found.tokens), list(found.logprobs)


def rollout_of(completion: Completion, end_tokens: tuple[int, ...], policy_step: int) -> Rollout:
    """A completion that is done, as what travels to the trainer."""
    return Rollout(
        prompt=completion.prompt,
        completion_T=torch.tensor(completion.tokens),
        completion_mask_T=torch.ones(len(completion.tokens), dtype=torch.bool),
        logprob_T=torch.tensor(completion.logprobs, dtype=torch.float32),
        sample=completion.sample,
        finished=completion.is_finished(end_tokens),
        policy_step=policy_step,
        routes_TMK=torch.stack(completion.routes) if completion.routes else None,
    )
