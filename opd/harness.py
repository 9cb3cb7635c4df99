"""A model of ours as EleutherAI's evaluation harness (lm_eval) asks for one: the tasks, prompts and metrics are the harness's, the numbers our own.

The harness's own class for transformers models pads the prompts of a batch on the left before it generates. DeepSeek-V4's compressed attention pools
tokens in windows counted from the first one, pad tokens included, so that its answers would be those of another model (rollout/cohort.py), and nothing would
say so. Here answers come from the sampler that training and evaluation have, whose rows stand at one position without padding, and log-probabilities from
forwards that are padded on the right.

An answer is greedy unless the task asks for a temperature. It is drawn to its end and cut where the first of the task's stop strings begins, which gives what
stopping there would. Prompts longer than the model's context less the answer lose their beginning, as in the harness's own classes; how many did is
in the record. Contexts and answers are encoded as the harness does it.

    {"version", "tasks": {TASK: {"version", "num_fewshot", "samples", "metrics": {"NAME,FILTER": {"value", "stderr"}}}}, "limit", "chat_template", "shortened"}

B: rows. L: positions. N: completion tokens. V: vocabulary. D: hidden size.
"""

import importlib.metadata
import itertools
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from opd.console import print_table
from opd.harness_config import HarnessConfig
from rollout.config import SamplingConfig
from rollout.logits import transform_
from rollout.model import backbone_of, context_length, end_tokens, head_of, logit_transform
from rollout.padding import completion_span, group_by_length, pad_right, sequence_length
from rollout.sampler import LocalSampler
from rollout.types import Prompt, Rollout, completed

try:
    from lm_eval import simple_evaluate
    from lm_eval.api.model import TemplateLM
    from lm_eval.models.utils import normalize_gen_kwargs
    from lm_eval.tasks import TaskManager
    from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
except ImportError as error:
    raise ValueError("lm_eval.tasks needs EleutherAI's harness: pip install -e '.[eval]'") from error

POSITIONS_PER_FORWARD = 4096
TOKENS_PER_TILE = 256
"""Whose logits over the whole vocabulary are in memory at a time."""

SAMPLING = ("temperature", "top_p", "top_k", "min_p")
"""Of a task's generation settings, those that our sampler has."""


def evaluate_tasks(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, cfg: HarnessConfig, seed: int) -> dict[str, Any]:
    """The record (module docstring) of one model on the tasks. Raises ValueError for a task that is not there, or asks for what the sampler does not do."""
    manager = TaskManager(include_path=cfg.include_path)
    unknown = [name for name in cfg.tasks if name not in manager.all_tasks]
    if unknown:
        raise ValueError(f"lm_eval has no task {unknown[0]!r}: see `lm-eval ls tasks`, or set lm_eval.include_path to the folder of your own task files")
    adapter = HarnessModel(model, tokenizer, cfg, seed)
    found = simple_evaluate(
        model=adapter,
        tasks=list(cfg.tasks),
        num_fewshot=cfg.num_fewshot,
        limit=cfg.limit,
        task_manager=manager,
        apply_chat_template=cfg.apply_chat_template,
        log_samples=False,
        random_seed=seed,
        numpy_random_seed=seed,
        torch_random_seed=seed,
        fewshot_random_seed=seed,
    )
    return {
        "version": importlib.metadata.version("lm_eval"),
        "tasks": {name: _task_record(name, found) for name in found["results"]},
        "limit": cfg.limit,
        "chat_template": cfg.apply_chat_template,
        "shortened": adapter.shortened,
    }


class HarnessModel(TemplateLM):
    """One model behind the harness's interface."""

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, cfg: HarnessConfig, seed: int):
        super().__init__()
        self.model, self.tokenizer, self.cfg = model.eval(), tokenizer, cfg
        self.max_length = context_length(model.config, "student")
        self.transform = logit_transform(model.config, "student")
        self.sampler = LocalSampler(model, end_tokens(model, tokenizer), seed, len(tokenizer))
        self.next_request = itertools.count()
        self.shortened = 0

    @property
    def eot_token_id(self) -> int:
        return self.tokenizer.eos_token_id

    @property
    def prefix_token_id(self) -> int:
        return self.tokenizer.eos_token_id if self.tokenizer.bos_token_id is None else self.tokenizer.bos_token_id

    @property
    def tokenizer_name(self) -> str:
        return self.tokenizer.name_or_path.replace("/", "__")

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        """Ids of a text; without word of special tokens, those that the tokenizer adds, unless the text (of a chat template) begins with one already."""
        bos = self.tokenizer.bos_token
        if add_special_tokens is None:
            add_special_tokens = not (bos and string.startswith(bos))
        return self.tokenizer(string, add_special_tokens=add_special_tokens)["input_ids"]

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        own = {"tokenize": False, "add_generation_prompt": add_generation_prompt, "continue_final_message": not add_generation_prompt}
        return self.tokenizer.apply_chat_template(chat_history, **own)

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        """The answers, without their stop strings. Raises ValueError for settings that the sampler does not have."""
        answers: list[str] = [""] * len(requests)
        asked: dict[str, list[int]] = {}
        for number, request in enumerate(requests):
            asked.setdefault(repr(sorted(request.args[1].items())), []).append(number)
        for numbers in asked.values():
            sampling, until = _generation(requests[numbers[0]].args[1], self.cfg)
            room = self.max_length - sampling.max_new_tokens
            if room < 1:
                raise ValueError(f"a task asks for answers of {sampling.max_new_tokens} tokens, and the context is {self.max_length}: lower max_gen_toks")
            prompts = [self._prompt(self._last(self.tok_encode(requests[number].args[0]), room)) for number in numbers]
            for number, rollout in zip(numbers, self.sampler.sample(prompts, sampling), strict=True):
                answers[number] = before_stop(self.tokenizer.decode(rollout.completion_T.tolist(), skip_special_tokens=True), until)
        return answers

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:
        """Log-probability of whole texts, in windows of the context's length that overlap by one token."""
        pairs, texts = [], []
        for number, request in enumerate(requests):
            tokens = self.tok_encode(request.args[0], add_special_tokens=False)
            windows = get_rolling_token_windows(token_list=tokens, prefix_token=self.prefix_token_id, max_seq_len=self.max_length - 1, context_len=1)
            for window in windows:
                context, continuation = make_disjoint_window(window)
                pairs.append((("", ""), context, continuation))
                texts.append(number)
        totals = [0.0] * len(requests)
        for number, (logprob, _) in zip(texts, self._loglikelihood_tokens(pairs), strict=True):
            totals[number] += logprob
        return totals

    @torch.inference_mode()
    def _loglikelihood_tokens(self, requests: list[tuple[Any, list[int], list[int]]], **kwargs: Any) -> list[tuple[float, bool]]:
        """(log-probability of the continuation, whether each of its tokens is the likeliest) of each request."""
        rollouts = []
        for _, context, continuation in requests:
            if len(continuation) >= self.max_length:
                raise ValueError(f"a task's answer has {len(continuation)} tokens, and the model's context is {self.max_length}: leave the task out")
            rollouts.append(completed(self._prompt(self._last(context, self.max_length - len(continuation))), continuation))
        found: list[tuple[float, bool]] = [(0.0, True)] * len(rollouts)
        for group in group_by_length([sequence_length(rollout) for rollout in rollouts], POSITIONS_PER_FORWARD):
            own = [rollouts[number] for number in group]
            tokens_BL = pad_right(own).to(self.model.device)
            hidden_BLD = backbone_of(self.model)(input_ids=tokens_BL, use_cache=False)[0]
            for number, rollout, hidden_LD in zip(group, own, hidden_BLD, strict=True):
                found[number] = self._judged(rollout, hidden_LD)
        return found

    def _judged(self, rollout: Rollout, hidden_LD: torch.Tensor) -> tuple[float, bool]:
        begin, end = completion_span(rollout)
        total, is_greedy = 0.0, True
        for hidden_ND, target_N in zip(hidden_LD[begin:end].split(TOKENS_PER_TILE), rollout.completion_T.split(TOKENS_PER_TILE), strict=True):
            logits_NV = head_of(self.model)(hidden_ND)[:, : len(self.tokenizer)].float()
            transform_(logits_NV, self.transform)
            target_N = target_N.to(logits_NV.device)
            total += float(logits_NV.log_softmax(-1).gather(1, target_N[:, None]).double().sum())
            is_greedy &= bool((logits_NV.argmax(-1) == target_N).all())
        return total, is_greedy

    def _prompt(self, tokens: list[int]) -> Prompt:
        return Prompt(domain="lm_eval", request=next(self.next_request), row="lm_eval", tokens=tuple(tokens))

    def _last(self, tokens: list[int], room: int) -> list[int]:
        """A context's end that fits; one without a token gets the one that begins a text."""
        self.shortened += len(tokens) > room
        return tokens[-room:] or [self.prefix_token_id]


def before_stop(text: str, until: list[str]) -> str:
    """A text up to where the first of the stop strings begins."""
    places = [text.find(stop) for stop in until if stop and stop in text]
    return text[: min(places)] if places else text


def print_tasks(role: str, record: dict[str, Any]) -> None:
    """The table of one model's tasks."""
    rows = []
    for name, task in record["tasks"].items():
        for metric, value in task["metrics"].items():
            error = "" if value["stderr"] is None else f"{value['stderr']:.4f}"
            rows.append([name, metric, f"{value['value']:.4f}", error, str(task["samples"]), "" if task["num_fewshot"] is None else str(task["num_fewshot"])])
    notes = [f"lm_eval {record['version']}"] + ([f"limited to {record['limit']} documents of each task: no result"] if record["limit"] else [])
    notes += [f"{record['shortened']} contexts were too long and lost their beginning"] if record["shortened"] else []
    print_table(f"{role}, lm_eval", ["task", "metric", "value", "standard error", "samples", "examples before"], rows, "; ".join(notes))


def _generation(settings: dict[str, Any], cfg: HarnessConfig) -> tuple[SamplingConfig, list[str]]:
    """(how to draw, where to stop) of a task's generation settings."""
    own = normalize_gen_kwargs(settings, cfg.max_gen_toks)
    until = own.pop("until")
    most, samples = own.pop("max_gen_toks"), own.pop("do_sample", False)
    drawn = {name: own.pop(name) for name in SAMPLING if name in own}
    if own:
        raise ValueError(f"a task sets {next(iter(own))} for its generation, which opd's sampler does not have: take it out of the task file")
    temperature = drawn.pop("temperature", 0.0) if samples or "temperature" in drawn else 0.0
    return SamplingConfig(temperature=temperature, max_new_tokens=most, decode_width=cfg.decode_width, **(drawn if temperature else {})), until


def _task_record(name: str, found: dict[str, Any]) -> dict[str, Any]:
    metrics = {}
    for key, value in found["results"][name].items():
        metric, _, filtered = key.partition(",")
        if not isinstance(value, float | int) or isinstance(value, bool) or metric.endswith("_stderr") or not filtered:
            continue
        error = found["results"][name].get(f"{metric}_stderr,{filtered}")
        metrics[key] = {"value": float(value), "stderr": float(error) if isinstance(error, float | int) else None}
    samples = found.get("n-samples", {}).get(name, {}).get("effective")
    return {"version": found["versions"].get(name), "num_fewshot": found["n-shot"].get(name), "samples": samples, "metrics": metrics}
