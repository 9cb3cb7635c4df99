"""Tasks of EleutherAI's lm_eval (`opd evaluate lm_eval.tasks=[...]`), answered by the models that `opd evaluate` has loaded.

lm_eval's own adapter for transformers is not used: it pads the prompts of a batch on the left, and attention that compresses tokens in windows counted from
the sequence's first token, DeepSeek-V4's, gives other logits then, without an error (of a tiny student, 3 of 12 greedy answers at a batch of 8 are those of a
batch of 1). Here completions come from the sampler that has no padding
(rollout/cohort.py), and log-probabilities from forwards padded on the right, taken from last hidden states and head in pieces, so that there is no [tokens,
vocabulary] matrix. Tasks, prompts, few-shot examples, filters and metrics are the harness's, with its default seeds.

Texts are read as in training: with the tokenizer's beginning-of-sequence token, never twice, and without one where a chat template has written the text.
What does not fit into the context is cut from the left, as the harness does, and counted (`cut`). Of a whole text (loglikelihood_rolling)
the first token follows the beginning- or end-of-sequence token, which is not itself scored.

Every rank runs the harness whole, since building prompts is cheap, and answers a share of its requests.

B: rows. L: padded positions. N: scored tokens, flattened. D: hidden size. V: vocabulary. C: tokens of a piece.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from jinja2 import TemplateError
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import normalize_gen_kwargs
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from transformers import PreTrainedTokenizerBase

from opd.distributed import Group, gather_objects, num_ranks, rank
from opd.rollouts import FirstRequest
from rollout.chat import decode_completion, encode_text
from rollout.config import SamplingConfig
from rollout.errors import first_sentence
from rollout.logits import LOGITS_AT_A_TIME, log_probabilities
from rollout.model import backbone_of, context_length, head_of, logit_transform
from rollout.padding import group_by_length
from rollout.sampler import LocalSampler
from rollout.types import Prompt

DRAWN = ("temperature", "top_p", "top_k", "min_p")
"""Settings of a task's generation that are the sampler's too."""


@dataclass(frozen=True, slots=True, kw_only=True)
class HarnessLimits:
    """max_new_tokens: of tasks that do not say. decode_width: rows decoded together. tokens_per_forward: padded, where likelihoods are taken."""

    max_new_tokens: int = 256
    decode_width: int = 64
    tokens_per_forward: int = 16384


class HarnessModel(TemplateLM):
    """A model as lm_eval asks for it; `cut` counts the texts that did not fit."""

    def __init__(self, sampler: LocalSampler, tokenizer: PreTrainedTokenizerBase, limits: HarnessLimits, is_chat: bool = False):
        """is_chat: texts come out of the chat template. Raises ValueError where the tokenizer has none."""
        super().__init__()
        if is_chat and tokenizer.chat_template is None:
            raise ValueError("the tokenizer has no chat template: remove lm_eval.apply_chat_template")
        self.sampler, self.tokenizer, self.limits, self.is_chat = sampler, tokenizer, limits, is_chat
        self.model = sampler.model
        self.transform = logit_transform(self.model.config, "model")
        self.max_length = context_length(self.model.config, "model")
        self.cut = 0
        self._device = self.model.device

    @property
    def eot_token_id(self) -> int:
        return self.tokenizer.eos_token_id

    @property
    def prefix_token_id(self) -> int:
        """What stands before a text that has no context."""
        return self.tokenizer.eos_token_id if self.tokenizer.bos_token_id is None else self.tokenizer.bos_token_id

    @property
    def tokenizer_name(self) -> str:
        return self.tokenizer.name_or_path.replace("/", "__")

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_kwargs) -> list[int]:
        wants_special = not self.is_chat if add_special_tokens is None else add_special_tokens
        return encode_text(string, self.tokenizer) if wants_special else self.tokenizer(string, add_special_tokens=False)["input_ids"]

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """Raises ValueError where the template refuses the conversation."""
        settings = {"add_generation_prompt": add_generation_prompt, "continue_final_message": not add_generation_prompt}
        try:
            return self.tokenizer.apply_chat_template(chat_history, tokenize=False, **settings)
        except TemplateError as error:
            raise ValueError(f"the chat template refuses a prompt of lm_eval: {first_sentence(error)}") from error

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """The completion of each request up to the earliest of its stop strings; every rank calls it.

        Raises ValueError for a setting of the task's generation that the sampler does not have.
        """
        return self._shared(list(enumerate(request.args for request in requests)), self._generate)

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """Log-probability of each whole text, in windows of the context's length in which every token is predicted once; every rank calls it."""
        windows, owners = [], []
        for number, (text,) in enumerate(request.args for request in requests):
            tokens = self.tok_encode(text, add_special_tokens=False)
            for pair in get_rolling_token_windows(tokens, self.prefix_token_id, self.max_length, context_len=1):
                windows.append((None, *make_disjoint_window(pair)))
                owners.append(number)
        totals = [0.0] * len(requests)
        for owner, (logprob, _) in zip(owners, self._loglikelihood_tokens(windows), strict=True):
            totals[owner] += logprob
        return totals

    def _loglikelihood_tokens(self, requests: list[tuple[Any, list[int], list[int]]], disable_tqdm: bool = False, **_kwargs) -> list[tuple[float, bool]]:
        """(log-probability of each continuation, whether every token of it is the likeliest); every rank calls it."""
        return self._shared(requests, self._score)

    def _shared(self, requests: list, answer: Callable[[list], list]) -> list:
        """Answers to all requests, of which each rank gives a share: rank r of n has r, r + n, r + 2 n, ..."""
        count = num_ranks(Group.data)
        cut, self.cut = self.cut, 0
        answers = answer(requests[rank(Group.data) :: count])
        shares = gather_objects((answers, self.cut), Group.data)
        self.cut = cut + sum(number for _, number in shares)
        return [shares[number % count][0][number // count] for number in range(len(requests))]

    def _generate(self, numbered: list[tuple[int, tuple[str, dict[str, Any]]]]) -> list[str]:
        by_settings: dict[str, list[int]] = {}
        for index, (_, (_, settings)) in enumerate(numbered):
            by_settings.setdefault(repr(settings), []).append(index)
        answers = [""] * len(numbered)
        for indices in by_settings.values():
            sampling, until = self._sampling(numbered[indices[0]][1][1])
            prompts = [self._prompt(numbered[index][0], numbered[index][1][0], sampling) for index in indices]
            stop = _StopText(self.tokenizer, until)
            for index, rollout in zip(indices, self.sampler.sample(prompts, sampling, is_done=stop.is_reached if until else None), strict=True):
                answers[index] = stop.cut(decode_completion(rollout.completion_T.tolist(), self.tokenizer))
        return answers

    def _sampling(self, settings: dict[str, Any]) -> tuple[SamplingConfig, list[str]]:
        """How a task's completions are drawn, and its stop strings; one that is a single special token is stopped at as a token."""
        found = dict(normalize_gen_kwargs(settings, self.limits.max_new_tokens))
        until, length, is_sampled = found.pop("until"), found.pop("max_gen_toks"), found.pop("do_sample")
        unknown = sorted(name for name, value in found.items() if name not in DRAWN and value is not None)
        if unknown:
            raise ValueError(f"a task generates with {unknown[0]}={found[unknown[0]]!r}, which opd's sampler does not have; it has {', '.join(DRAWN)}")
        if not 0 < length < self.max_length:
            raise ValueError(f"a task asks for {length} tokens of a model that reads {self.max_length}: there would be no room for its prompt")
        drawn = {name: value for name, value in found.items() if name in DRAWN and value is not None} if is_sampled else {"temperature": 0.0}
        special = {token: number for token, number in self.tokenizer.get_added_vocab().items() if number in self.tokenizer.all_special_ids}
        stop_tokens = [special[text] for text in until if text in special]
        cfg = SamplingConfig(max_new_tokens=length, decode_width=self.limits.decode_width, stop_tokens=stop_tokens, **drawn)
        return cfg, [text for text in until if text and text not in special]

    def _prompt(self, number: int, text: str, sampling: SamplingConfig) -> Prompt:
        tokens = self.tok_encode(text) or [self.prefix_token_id]
        room = self.max_length - sampling.max_new_tokens
        self.cut += len(tokens) > room
        return Prompt(domain="lm_eval", request=FirstRequest.harness + number, row=f"lm_eval:{number}", tokens=tuple(tokens[-room:]))

    @torch.inference_mode()
    def _score(self, requests: list[tuple[Any, list[int], list[int]]]) -> list[tuple[float, bool]]:
        """Requests that differ in their last token alone are read once."""
        rows: dict[tuple[int, ...], list[int]] = {}
        for index, (_, context, continuation) in enumerate(requests):
            if not 0 < len(continuation) <= self.max_length:
                raise ValueError(f"lm_eval asks for the likelihood of {len(continuation)} tokens, and the model reads 1 to {self.max_length}")
            tokens = [*(context or [self.prefix_token_id]), *continuation]
            self.cut += len(tokens) > self.max_length + 1
            rows.setdefault(tuple(tokens[-self.max_length - 1 : -1]), []).append(index)
        inputs = list(rows)
        found: list[tuple[float, bool]] = [(0.0, False)] * len(requests)
        for group in group_by_length([len(tokens) for tokens in inputs], self.limits.tokens_per_forward):
            scored = [(row, index) for row, number in enumerate(group) for index in rows[inputs[number]]]
            continuations = [requests[index][2] for _, index in scored]
            logprob_N, is_likeliest_N = self._forward([inputs[number] for number in group], [row for row, _ in scored], continuations)
            lengths = [len(continuation) for continuation in continuations]
            for (_, index), logprobs, likeliest in zip(scored, logprob_N.split(lengths), is_likeliest_N.split(lengths), strict=True):
                found[index] = float(logprobs.sum()), bool(likeliest.all())
        return found

    def _forward(self, inputs: list[tuple[int, ...]], row_of: list[int], continuations: list[list[int]]) -> tuple[torch.Tensor, torch.Tensor]:
        """(log-probability, whether it is the likeliest) [N] of the continuations' tokens, one after another, each predicted at the end of its row; CPU."""
        longest = max(map(len, inputs))
        tokens_BL = torch.tensor([[*tokens, *[0] * (longest - len(tokens))] for tokens in inputs], device=self.device)
        places = [(row, len(inputs[row]) - len(tokens) + i) for row, tokens in zip(row_of, continuations, strict=True) for i in range(len(tokens))]
        row_N, position_N = torch.tensor(places, device=self.device).unbind(1)
        target_N = torch.tensor([token for tokens in continuations for token in tokens], device=self.device)
        hidden_ND = backbone_of(self.model)(input_ids=tokens_BL, use_cache=False)[0][row_N, position_N]
        head_VD = head_of(self.model).weight[: len(self.tokenizer)]
        at_a_time = max(1, LOGITS_AT_A_TIME // len(head_VD))
        logprobs, likeliest = [], []
        for hidden_CD, target_C in zip(hidden_ND.split(at_a_time), target_N.split(at_a_time), strict=True):
            logprob_CV = log_probabilities(hidden_CD, head_VD, self.transform)
            logprobs.append(logprob_CV.gather(1, target_C[:, None])[:, 0].double())
            likeliest.append(logprob_CV.argmax(1) == target_C)
        logprob_N = torch.cat(logprobs).cpu()
        if not logprob_N.isfinite().all():
            raise ValueError("the model gave NaN or infinity on a request of lm_eval: its weights have diverged")
        return logprob_N, torch.cat(likeliest).cpu()


class _StopText:
    """Stop strings, looked for in the text of completions."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, until: list[str]):
        self.tokenizer, self.until = tokenizer, until
        self.window = 8 + max((len(text.encode()) for text in until), default=0)

    def is_reached(self, tokens: list[int]) -> bool:
        """Whether the text of a completion has one; its end is looked at first, which is cheaper. What that misses is cut all the same."""
        return self._has_one(tokens[-self.window :]) and self._has_one(tokens)

    def cut(self, text: str) -> str:
        """The text before the first of them."""
        return text[: min(text.find(stop) if stop in text else len(text) for stop in self.until)] if self.until else text

    def _has_one(self, tokens: list[int]) -> bool:
        text = decode_completion(tokens, self.tokenizer)
        return any(stop in text for stop in self.until)
