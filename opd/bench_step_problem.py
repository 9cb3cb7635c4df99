"""What `opd bench step` gives to every contender: a student, a teacher, prompts, and how what came of a step is counted.

Student and teacher are new models of one architecture, saved as Hugging Face folders, so that each system loads them as it loads any. New weights would
hardly ever draw the one token in hundreds that ends a completion: one dimension of the embedding is therefore given the same large value for every token,
which the residual stream carries to the head, and the end token's row of the head reads that dimension alone, scaled so that it is drawn with the
probability asked for, whatever came before. Lengths are then geometric up to the limit.

A step answers each prompt once. Completion tokens count up to the first that ends the completion, itself included, whatever a system decodes after it.

B: rows. L: positions. D: hidden size. V: vocabulary.
"""

import json
import math
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from opd.bench_config import StepBenchConfig
from opd.student import build_student, seed_everything
from rollout.experts import find_experts
from rollout.model import backbone_of, head_of, save_model
from rollout.synthetic import character_tokenizer, synthetic_rows

DOMAINS = ("arithmetic", "sorting", "brackets", "tools")
"""Those of the quickstart, whose prompts are timed: further embedded ones would make it another problem."""

LOUD = 8.0
"""Size of the embedding's common dimension; that of the others is 1."""

SHARPNESS = 2.0
"""By which the other rows of the head are multiplied, so that the teacher's distribution differs from the student's by more than rounding."""

BETAS, EPSILON, CLIP_NORM = (0.9, 0.95), 1e-8, 1.0
"""Of AdamW, and the gradient's norm at most; everybody's."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Problem:
    """What a contender has to do. folder: holds student/, teacher/, prompts.jsonl and this. has_experts: the student is a mixture of experts.
    overrides: settings of `opd distill`, for ours.
    """

    folder: str
    prompts_per_step: int
    max_new_tokens: int
    lr: float
    seed: int
    threads: int
    has_experts: bool
    overrides: list[str]

    def texts(self) -> list[str]:
        """The prompts of every step."""
        return [json.loads(line)["prompt"] for line in (Path(self.folder) / "prompts.jsonl").read_text().splitlines()]


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """Of one step on one rank: completion tokens, completions, how many of these ended before the limit, loss, seconds until all were sampled (None:
    not known), and seconds of the processor.
    """

    tokens: int
    completions: int
    ended: int
    loss: float
    rollout_seconds: float | None = None
    cpu_seconds: float = 0.0


def load_problem(folder: Path) -> Problem:
    return Problem(**json.loads((folder / "problem.json").read_text()))


def outcome_of(completions: list[list[int]], end_token: int, loss: float, rollout_seconds: float | None = None) -> Outcome:
    """Count completions, in which anything may follow the end token."""
    lengths = [row.index(end_token) + 1 if end_token in row else len(row) for row in completions]
    ended = sum(end_token in row for row in completions)
    return Outcome(tokens=sum(lengths), completions=len(completions), ended=ended, loss=loss, rollout_seconds=rollout_seconds)


def write_problem(cfg: StepBenchConfig, architecture: str, folder: Path) -> int:
    """Write a problem; returns the parameters of the student. Raises ValueError for an architecture that is not there, and sizes that do not fit."""
    from opd.composition import load_config

    if not cfg.mean_new_tokens > 1:
        raise ValueError(f"mean_new_tokens must be above 1, not {cfg.mean_new_tokens}")
    folder.mkdir(parents=True)
    tokenizer = bench_tokenizer(cfg.vocab_size)
    texts = prompt_texts(cfg.prompts_per_step, tokenizer)
    settings = load_config("distill", [f"student={architecture}"]).student
    for number, name in enumerate(("teacher", "student")):
        seed_everything(2 * cfg.seed + number)
        model = build_student(settings, tokenizer)
        set_end_probability(model, torch.tensor(tokenizer(texts[:1])["input_ids"]), tokenizer.eos_token_id, 1 / cfg.mean_new_tokens)
        save_model(folder / name, model, tokenizer, model.state_dict())
    (folder / "prompts.jsonl").write_text("".join(json.dumps({"prompt": text}) + "\n" for text in texts))
    problem = Problem(
        folder=str(folder), prompts_per_step=cfg.prompts_per_step, max_new_tokens=cfg.max_new_tokens, lr=cfg.lr, seed=cfg.seed, threads=cfg.threads or 1,
        has_experts=bool(find_experts(model)), overrides=cfg.overrides,
    )  # fmt: skip
    (folder / "problem.json").write_text(json.dumps(asdict(problem)))
    return sum(parameter.numel() for parameter in model.parameters())


def bench_tokenizer(vocab_size: int) -> PreTrainedTokenizerBase:
    """The character tokenizer with further tokens, which no prompt holds, up to a size. Raises ValueError where it is larger than that."""
    tokenizer = character_tokenizer()
    if vocab_size < len(tokenizer):
        raise ValueError(f"vocab_size must be at least {len(tokenizer)}, the characters' number, not {vocab_size}")
    tokenizer.add_tokens([f"<extra{number}>" for number in range(vocab_size - len(tokenizer))])
    return tokenizer


def prompt_texts(count: int, tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """Prompts of the quickstart's domains in turns, rendered by the chat template."""
    share = -(-count // len(DOMAINS))
    rows = zip(*(synthetic_rows(name, "train", share) for name in DOMAINS), strict=True)
    questions = [row["prompt"] for turn in rows for row in turn][:count]
    return [tokenizer.apply_chat_template([{"role": "user", "content": text}], tokenize=False, add_generation_prompt=True) for text in questions]


@torch.no_grad()
def set_end_probability(model: PreTrainedModel, tokens_BL: torch.Tensor, end_token: int, probability: float) -> None:
    """Change embedding and head so that the end token has about this probability after any tokens; measured after those given."""
    embedding_VD, head_VD = model.get_input_embeddings().weight, head_of(model).weight
    embedding_VD.div_(embedding_VD.std())
    embedding_VD[:, 0] = LOUD
    head_VD.mul_(SHARPNESS)
    head_VD[:, 0] = 0.0
    head_VD[end_token] = 0.0
    hidden_BLD = backbone_of(model)(input_ids=tokens_BL, use_cache=False)[0]
    logits_BLV = hidden_BLD @ head_VD.T
    logits_BLV[..., end_token] = -math.inf
    wanted = logits_BLV.logsumexp(-1).mean() + math.log(probability / (1 - probability))
    head_VD[end_token, 0] = wanted / hidden_BLD[..., 0].mean()
