"""Decoding of one cohort: prompts that stand at the same position, token by token, from a transformers model's cache.

All rows of a batch are at one position, and there is no padding: DeepSeek-V4's compressed attention pools tokens in fixed windows counted from the
sequence's first token, so that pad tokens on the left would change the logits (measured: 0.26 on logits of size 0.70). A cohort starts at the
length of its shortest prompt; rows whose prompt is longer are fed their own tokens until these are consumed, and so are tokens that a row brings along
because they were logged before an interruption: replayed at the same width they give the same bits as the first time. A prompt with several
completions is read once, and its state in the cache is then copied to each of them.

Rows leave when they end: once half of the rows have, the rest goes on at half the width, down to NARROWEST. What comes out of a matrix product depends on
its number of rows in the last bits, so the same cohort always gives the same bits, whatever is replayed, while another cohort changes
a row by rounding (about 1e-6 in fp32). `fixed_width` keeps all rows, dummies in the place of those that ended.

W: rows of the cohort. P: prompts, not more than rows. L: positions read at once. V: vocabulary. M: layers with routed experts. K: experts per token.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass, field

import numpy as np
import torch
from transformers import DynamicCache, PreTrainedModel

from rollout.config import SamplingConfig
from rollout.perturbation import Perturbation
from rollout.routes import RouteListener
from rollout.sampling import draw, uniform
from rollout.types import Prompt
from rollout.wal import RECORD, completion_records, prompt_checksum

NARROWEST = 8
"""Rows below which a cohort is not narrowed: a forward of fewer takes as long."""

AppendToLog = Callable[[np.ndarray], None]
"""Makes RECORD rows durable before they are used."""

IsDone = Callable[[list[int]], bool]
"""Whether a completion ends with the last of its tokens for another reason than an end token, such as its text."""


@dataclass(slots=True)
class Completion:
    """A completion under way. tokens and logprobs may begin with what was logged before an interruption.

    logprobs: NaN of a token that an environment wrote.
    routes: of each token, [M, K], where they are recorded (rollout/routes.py); of logged tokens from when they are fed again.
    """

    prompt: Prompt
    sample: int
    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    routes: list[torch.Tensor] = field(default_factory=list)

    @property
    def given(self) -> list[tuple[int, float]]:
        """(token, log-probability) of all tokens so far."""
        return list(zip(self.tokens, self.logprobs, strict=True))

    def records(self, first: int, pairs: list[tuple[int, float]]) -> np.ndarray:
        """What the log holds of some of its tokens, from position `first` on."""
        return completion_records(self.prompt.request, self.sample, self.prompt.tokens, first, pairs)

    def is_finished(self, end_tokens: tuple[int, ...]) -> bool:
        return bool(self.tokens) and self.tokens[-1] in end_tokens

    def is_done(self, end_tokens: tuple[int, ...], cfg: SamplingConfig) -> bool:
        return len(self.tokens) >= cfg.max_new_tokens or self.is_finished(end_tokens)


@dataclass(frozen=True, slots=True)
class Policy:
    """What draws tokens: a model, the seed of its random numbers, and the tokens that end a completion.

    vocab_size: real vocabulary; rows of the head beyond it are padding and are never drawn. None: the head has no padding.
    """

    model: PreTrainedModel
    seed: int
    end_tokens: tuple[int, ...]
    vocab_size: int | None = None


@dataclass(slots=True)
class DecodingFigures:
    """What decoding did; sums, to be added up over cohorts.

    slots: rows times decode steps; sampled: tokens drawn there; fed: prompt and logged tokens fed there. What is left of the slots were dummies.
    prefilled: positions read at once, of `prefill_slots` that were computed. Seconds are wall clock; log_seconds are part of decode_seconds, but for those
        of tokens that were given.
    replaced: sampler processes that had to be replaced (rollout/service.py).
    """

    steps: int = 0
    slots: int = 0
    sampled: int = 0
    fed: int = 0
    prefilled: int = 0
    prefill_slots: int = 0
    decode_seconds: float = 0.0
    log_seconds: float = 0.0
    replaced: int = 0

    def add(self, other: "DecodingFigures") -> None:
        for name in self.__slots__:
            setattr(self, name, getattr(self, name) + getattr(other, name))

    def minus(self, other: "DecodingFigures") -> "DecodingFigures":
        return DecodingFigures(*(getattr(self, name) - getattr(other, name) for name in self.__slots__))


def end_tokens_of(policy: Policy, cfg: SamplingConfig) -> tuple[int, ...]:
    """The ids that end a completion."""
    return *policy.end_tokens, *cfg.stop_tokens


def form_cohorts(completions: list[Completion], width: int, completions_per_prompt: int) -> list[list[Completion]]:
    """Completions in cohorts of at most `width` rows, those of one prompt side by side, sorted by the length of the prompt so that little is fed.

    The same completions in the same order always form the same cohorts.
    """
    waiting = sorted(completions, key=lambda completion: len(completion.prompt.tokens))
    whole = width - width % completions_per_prompt if completions_per_prompt < width else width
    return [waiting[start : start + whole] for start in range(0, len(waiting), whole)]


class Cohort:
    """Rows, their tokens, and the model's cache."""

    def __init__(
        self, policy: Policy, rows: list[Completion], cfg: SamplingConfig, perturbation: Perturbation | None = None, is_done: IsDone | None = None
    ):
        self.policy, self.rows, self.cfg, self.perturbation, self.is_done = policy, rows, cfg, perturbation, is_done
        self.device, self.end_tokens = policy.model.device, end_tokens_of(policy, cfg)
        self.is_end_V = np.zeros(max(policy.model.config.get_text_config().vocab_size, 1 + max(self.end_tokens, default=0)), dtype=bool)
        self.is_end_V[list(self.end_tokens)] = True
        self.num_prompts = cfg.decode_width // (1 + max(row.sample for row in rows))  # read at once, where there are as many
        self.figures = DecodingFigures()
        self.listener = RouteListener(policy.model) if cfg.record_routes else None
        self.length_W = np.array([len(row.prompt.tokens) for row in rows])
        self.given_W = self.length_W + [len(row.tokens) for row in rows]
        self.limit_W = self.length_W + cfg.max_new_tokens
        self.tokens_WL = np.zeros((len(rows), int(self.limit_W.max())), dtype=np.int64)
        for row, tokens_L in zip(rows, self.tokens_WL, strict=True):
            known = [*row.prompt.tokens, *row.tokens]
            tokens_L[: len(known)] = known
        self.live_W = np.ones(len(rows), dtype=bool)
        self.key_W = np.array([(row.prompt.request << 16) + row.sample for row in rows], dtype=np.int64)
        self.prompt_W = np.array([prompt_checksum(row.prompt.tokens) for row in rows], dtype=np.uint32)

    @torch.inference_mode()
    def decode(self, append_to_log: AppendToLog | None = None) -> Iterator[int]:
        """Fill the rows' tokens; yields the number of rows under way after each decode step.

        Given tokens are logged again at the beginning, so that a segment stands alone (rollout/wal.py). Raises ValueError where the model gives NaN.
        """
        if append_to_log is not None:
            self._log(append_to_log, np.concatenate([row.records(0, row.given) for row in self.rows]))
        if self.listener is None and all(row.is_done(self.end_tokens, self.cfg) for row in self.rows):
            return
        position = int(self.length_W.min())
        cache, logits_WV = self._prefill(position)
        slot_W = self._with_dummies(np.arange(len(self.rows)), self.cfg.decode_width)
        while True:
            begun = time.monotonic()
            uniform_W = uniform(self.policy.seed, torch.from_numpy(self.key_W[slot_W]), position).to(self.device)
            token_W, logprob_W = draw(logits_WV[:, : self.policy.vocab_size], uniform_W, self.cfg)
            self._take(position, slot_W, token_W.cpu().numpy(), logprob_W.cpu().numpy(), append_to_log)
            if self.live_W.any():
                slot_W = self._narrow(cache, slot_W)
                feed_W1 = torch.from_numpy(self.tokens_WL[slot_W, position])[:, None].to(self.device)
                logits_WV = self._read(feed_W1, cache)
            self.figures.decode_seconds += time.monotonic() - begun
            yield int(self.live_W.sum())
            if not self.live_W.any():
                return
            position += 1

    def _prefill(self, length: int) -> tuple[DynamicCache, torch.Tensor]:
        """(cache, logits [W, V]) after the first `length` tokens of all rows, those of each prompt read once."""
        first = {}
        for number, row in enumerate(self.rows):
            first.setdefault(row.prompt.request, number)
        chosen_P = self._with_dummies(np.array(list(first.values())), max(len(first), self.num_prompts))
        cache = DynamicCache(config=self.policy.model.config)
        tokens_PL = torch.from_numpy(self.tokens_WL[chosen_P, :length]).to(self.device)
        logits_PV = self._read(tokens_PL, cache)
        self.figures.prefilled += len(first) * length
        self.figures.prefill_slots += tokens_PL.numel()
        place = {request: place for place, request in enumerate(first)}
        source_W = self._with_dummies(np.array([place[row.prompt.request] for row in self.rows]), self.cfg.decode_width)
        if len(chosen_P) == len(source_W) and (chosen_P == source_W).all():
            return cache, logits_PV
        keep_W = torch.from_numpy(source_W).to(self.device)
        cache.reorder_cache(keep_W)
        if self.listener is not None:
            self.listener.reorder(keep_W)
        return cache, logits_PV[keep_W]

    def _read(self, tokens_WL: torch.Tensor, cache: DynamicCache) -> torch.Tensor:
        """Logits [W, V] after the tokens, which go into the cache."""
        with nullcontext() if self.listener is None else self.listener.listening(len(tokens_WL)):
            return self.policy.model(input_ids=tokens_WL, past_key_values=cache, use_cache=True, logits_to_keep=1).logits[:, -1]

    def _narrow(self, cache: DynamicCache, slot_W: np.ndarray) -> np.ndarray:
        """Let the rows that have ended leave, where the others fit into half the width; returns which row now stands where."""
        live, width = np.flatnonzero(self.live_W), len(slot_W)
        while not self.cfg.fixed_width and width // 2 >= max(len(live), NARROWEST):
            width //= 2
        if width == len(slot_W):
            return slot_W
        place = {int(row): place for place, row in enumerate(slot_W)}  # of a dummy and its row either: they are equal
        chosen_W = self._with_dummies(live, width)
        cache.reorder_cache(torch.tensor([place[int(row)] for row in chosen_W], device=self.device))
        return chosen_W

    def _take(self, position: int, slot_W: np.ndarray, token_W: np.ndarray, logprob_W: np.ndarray, append_to_log: AppendToLog | None) -> None:
        """Log the tokens drawn at a position, give them to the rows that sample there, and see which rows end."""
        place = np.full(len(self.rows), -1)
        place[slot_W[::-1]] = np.arange(len(slot_W))[::-1]  # of a row and its dummies, the row
        in_completion_W = self.live_W & (self.length_W <= position)
        for row in np.flatnonzero(in_completion_W).tolist() if self.listener is not None else ():
            self.rows[row].routes.append(self.listener.last_WMK[place[row]])
        rows = np.flatnonzero(in_completion_W & (self.given_W <= position))
        tokens, logprobs = token_W[place[rows]], logprob_W[place[rows]]
        if not np.isfinite(logprobs).all():
            prompt = self.rows[int(rows[~np.isfinite(logprobs)][0])].prompt
            raise ValueError(f"the model gave NaN or infinity on request {prompt.request} of domain {prompt.domain}: its weights have diverged")
        if self.perturbation is not None:
            tokens, logprobs = self.perturbation.apply(self.key_W[rows], position, tokens, logprobs)
        if append_to_log is not None and len(rows):
            self._log(append_to_log, self._records(rows, position - self.length_W[rows], tokens, logprobs))
        self.tokens_WL[rows, position] = tokens
        for row, token, logprob in zip(rows.tolist(), tokens.tolist(), logprobs.tolist(), strict=True):
            self.rows[row].tokens.append(token)
            self.rows[row].logprobs.append(logprob)
        figures = self.figures
        figures.steps, figures.slots = figures.steps + 1, figures.slots + len(slot_W)
        figures.sampled, figures.fed = figures.sampled + len(rows), figures.fed + int(self.live_W.sum()) - len(rows)
        is_end_W = self.is_end_V[self.tokens_WL[:, position]] | (position + 1 >= self.limit_W)
        self.live_W &= ~(in_completion_W & is_end_W)
        for row in rows.tolist() if self.is_done is not None else ():
            self.live_W[row] &= not self.is_done(self.rows[row].tokens)

    def _with_dummies(self, chosen: np.ndarray, width: int) -> np.ndarray:
        """Fill the places of a batch that are left over with the first of those chosen."""
        return np.concatenate([chosen, np.full(width - len(chosen), chosen[0])])

    def _records(self, rows: np.ndarray, position: np.ndarray, tokens: np.ndarray, logprobs: np.ndarray) -> np.ndarray:
        records = np.empty(len(rows), dtype=RECORD)
        key = self.key_W[rows]
        records["request"], records["sample"] = key >> 16, key & 0xFFFF
        records["position"], records["token"], records["logprob"] = position, tokens, logprobs
        records["prompt"] = self.prompt_W[rows]
        return records

    def _log(self, append_to_log: AppendToLog, records: np.ndarray) -> None:
        begun = time.monotonic()
        if len(records):
            append_to_log(records)
        self.figures.log_seconds += time.monotonic() - begun
