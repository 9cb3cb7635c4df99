"""A few rollouts of a step with the divergence of every token, kept for people to read: RUN/samples/STEP.json, schema version 1.

    {"schema": 1, "step": number of updates done, "domains": {D: [{"place": "best" | "median" | "worst", "request", "row", "sample",
     "prompt_tokens": [ids], "prompt": text, "tokens": [ids], "pieces": [text of each token], "kl": [nats per token | null], "grade": number | null,
     "finished": true | false, "at_worst": [{"position": of the token, "student": [TOKEN, ...], "teacher": [TOKEN, ...]}, ...]}, ...]},
     "figures": {D: {"deciles": [[nats, tokens], ...ten of them], "classes": {CLASS: [nats, tokens]},
     "prompts": [{"row", "request", "kl", "text": the end of the prompt, without special tokens}, ...]}}}

TOKEN: {"token": id, "text", "logprob"}, the likeliest first, at the tokens with the highest divergence, the highest first (opd/likeliest.py).
figures: over all rollouts of the domain in the step, on all ranks, and their tokens in the loss: sums by tenth of the completion (position t of T belongs to
number 10 t // T) and by class of token (`token_class`); and the rollouts with the highest mean, the worst quarter, at most MOST_PROMPTS: of a domain with few
prompts each would else be among the worst at every step.

kl: the divergence that the run's loss settings name, as it entered the step's loss (from a sampled token an estimate, which may be negative), of the
student before the step's update; null on tokens that are not in the loss. place: by the mean over the tokens of the loss among the domain's rollouts of
the step, over all ranks, ties by request; worst is the highest. A domain with two rollouts has no median, one with one has the worst alone, and one
without, or whose teacher was dropped, is not there. Rollouts that were left out of the loss (rollout.max_mismatch), or whose loss is not finite, are never
chosen. pieces join to the completion's text, special tokens included; where a character takes several tokens, the last of them shows it.

The figures are those of the update itself: a forward of their own would cost a forward, and would show another student's. The files hold text of prompts
and stay on this machine. A resume deletes those of steps that will be done again.

N: completion tokens of a micro-batch. T: of one rollout.
"""

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from opd.batch import MicroBatch
from opd.config import DistillConfig
from opd.distributed import Group, gather_objects, is_main
from opd.likeliest import Likeliest
from opd.tiles import TokenLosses
from rollout.files import replace_text
from rollout.grading import grade_rollout
from rollout.replay import rollout_key
from rollout.types import Rollout

SCHEMA = 1
FOLDER = "samples"
MOST_PROMPTS = 8
PROMPT_LETTERS = 200
UNFINISHED = "\ufffd"
"""What a tokenizer writes for bytes that are no whole character yet."""


@dataclass(frozen=True, slots=True)
class Judged:
    """A rollout with the loss of each completion token [T], NaN where a token is not in the loss, and their mean over the others.

    at_worst: (position, the student's likeliest tokens with their log-probabilities, the teacher's), the highest loss first.
    """

    rollout: Rollout
    kl: tuple[float, ...]
    mean: float
    at_worst: tuple[tuple[int, list[tuple[int, float]], list[tuple[int, float]]], ...] = ()


class Samples:
    """Collects the token losses of a step of which rollouts are kept, and writes them."""

    def __init__(self, run_dir: Path, cfg: DistillConfig, tokenizer: PreTrainedTokenizerBase):
        self.folder, self.cfg, self.tokenizer = run_dir / FOLDER, cfg, tokenizer
        self.judged: list[Judged] = []
        self.classes: dict[int, str] = {}

    def is_due(self, step: int) -> bool:
        """Whether rollouts of update number `step` (1, 2, ...) are kept: every so many, and of the last."""
        every = self.cfg.samples.every
        return every > 0 and (step % every == 0 or step == self.cfg.num_steps)

    def add(self, batch: MicroBatch, losses: TokenLosses) -> None:
        """Take up the losses of one micro-batch; a filler's count for nothing."""
        if batch.is_filler:
            return
        loss_N = losses.loss_N.double().masked_fill(~batch.mask_N, float("nan")).cpu()
        begun = 0
        for rollout, loss_T in zip(batch.rollouts, loss_N.split([len(rollout.completion_T) for rollout in batch.rollouts]), strict=True):
            inside = loss_T[rollout.completion_mask_T]
            if len(inside) and inside.isfinite().all():
                at_worst = _at_worst(losses.likeliest, begun, len(loss_T))
                self.judged.append(Judged(rollout, tuple(loss_T.tolist()), float(inside.mean()), at_worst))
            begun += len(loss_T)

    def write(self, step: int) -> None:
        """Write RUN/samples/STEP.json from what was added since the last file; every rank calls it."""
        chosen, own = self._choose(), {}
        for judged in self.judged:
            domain, key = judged.rollout.prompt.domain, rollout_key(judged.rollout)
            for place in [place for place, wanted in chosen[domain].items() if wanted == key]:
                own[domain, place] = self._record(place, judged)
        figures = self._figures()
        self.judged = []
        records = {key: record for part in gather_objects(own, Group.data) for key, record in part.items()}
        if is_main():
            domains = {domain: [records[domain, place] for place in places] for domain, places in chosen.items()}
            self.folder.mkdir(exist_ok=True)
            record = {"schema": SCHEMA, "step": step, "domains": domains, "figures": figures}
            replace_text(self.folder / f"{step:06d}.json", json.dumps(record, allow_nan=False) + "\n")

    def _choose(self) -> dict[str, dict[str, tuple[int, int]]]:
        """Domain -> place -> key of its rollout, the same on every rank."""
        own = [(judged.rollout.prompt.domain, judged.mean, rollout_key(judged.rollout)) for judged in self.judged]
        everything = sorted(item for part in gather_objects(own, Group.data) for item in part)
        chosen = {}
        for name in self.cfg.domains:
            keys = [key for domain, _, key in everything if domain == name]
            places = {"best": 0, "median": len(keys) // 2, "worst": len(keys) - 1}
            distinct = {"worst": places["worst"]} if len(keys) == 1 else places if len(keys) > 2 else {"best": 0, "worst": 1}
            if keys:
                chosen[name] = {place: keys[index] for place, index in distinct.items()}
        return chosen

    def _record(self, place: str, judged: Judged) -> dict[str, Any]:
        rollout, prompt = judged.rollout, judged.rollout.prompt
        grader = self.cfg.domains[prompt.domain].grader
        return {
            "place": place,
            "request": prompt.request,
            "row": prompt.row,
            "sample": rollout.sample,
            "prompt_tokens": list(prompt.tokens),
            "prompt": self.tokenizer.decode(prompt.tokens),
            "tokens": rollout.completion_T.tolist(),
            "pieces": pieces(rollout.completion_T.tolist(), self.tokenizer),
            "kl": [round(value, 6) if inside else None for value, inside in zip(judged.kl, rollout.completion_mask_T.tolist(), strict=True)],
            "grade": None if grader is None else grade_rollout(grader, rollout, self.tokenizer),
            "finished": rollout.finished,
            "at_worst": [{"position": place, "student": self._tokens(own), "teacher": self._tokens(other)} for place, own, other in judged.at_worst],
        }

    def _tokens(self, found: list[tuple[int, float]]) -> list[dict[str, Any]]:
        return [{"token": token, "text": self.tokenizer.decode([token]), "logprob": round(logprob, 5)} for token, logprob in found]

    def _figures(self) -> dict[str, dict[str, Any]]:
        """Of each domain with rollouts; the same on every rank."""
        own: dict[str, Any] = {}
        for judged in self.judged:
            prompt = judged.rollout.prompt
            sums = own.setdefault(prompt.domain, {"deciles": [[0.0, 0] for _ in range(10)], "classes": {}, "prompts": []})
            sums["prompts"].append((-judged.mean, prompt.request, prompt.row, prompt.tokens))
            tokens = judged.rollout.completion_T.tolist()
            for place, (token, kl) in enumerate(zip(tokens, judged.kl, strict=True)):
                if kl == kl:  # it is in the loss
                    for pair in (sums["deciles"][10 * place // len(tokens)], sums["classes"].setdefault(self._class_of(token), [0.0, 0])):
                        pair[0] += kl
                        pair[1] += 1
        for sums in own.values():
            sums["prompts"] = [(*found, self._end_of(tokens) if place < MOST_PROMPTS else "") for place, (*found, tokens) in enumerate(sorted(sums["prompts"]))]
        parts = gather_objects(own, Group.data)
        return {name: _joined([part[name] for part in parts if name in part]) for name in self.cfg.domains if any(name in part for part in parts)}

    def _end_of(self, tokens: Sequence[int]) -> str:
        """Without the template's special tokens: what opens the answer is the same for all prompts."""
        return self.tokenizer.decode(list(tokens[-PROMPT_LETTERS:]), skip_special_tokens=True)[-PROMPT_LETTERS:]  # a token has a letter, nearly always

    def _class_of(self, token: int) -> str:
        if token not in self.classes:
            self.classes[token] = token_class(token, self.tokenizer)
        return self.classes[token]


def token_class(token: int, tokenizer: PreTrainedTokenizerBase) -> str:
    """special (an end of sequence, a tag of the template), word, number, space, or sign (of punctuation, brackets, part of a character), by its text."""
    if token in tokenizer.all_special_ids:
        return "special"
    text = tokenizer.decode([token])
    if any(character.isalpha() for character in text):
        return "word"
    return "number" if any(character.isdigit() for character in text) else "sign" if text.strip() else "space"


def _at_worst(found: Likeliest | None, begun: int, length: int) -> tuple:
    """What was found of the rollout whose tokens begin at a row of the micro-batch."""
    if found is None:
        return ()
    numbers = [number for number, row in enumerate(found.row_R.tolist()) if begun <= row < begun + length]
    return tuple((int(found.row_R[number]) - begun, _pairs(found.student, number), _pairs(found.teacher, number)) for number in numbers)


def _pairs(found: tuple[torch.Tensor, torch.Tensor], number: int) -> list[tuple[int, float]]:
    return list(zip(found[0][number].tolist(), found[1][number].tolist(), strict=True))


def _joined(parts: list[dict[str, Any]]) -> dict[str, Any]:
    """The figures of several ranks as one."""
    classes = sorted({name for part in parts for name in part["classes"]})
    ordered = sorted(item for part in parts for item in part["prompts"])
    worst = ordered[: min(MOST_PROMPTS, -(-len(ordered) // 4))]
    return {
        "deciles": [_sum(part["deciles"][number] for part in parts) for number in range(10)],
        "classes": {name: _sum(part["classes"].get(name, [0.0, 0]) for part in parts) for name in classes},
        "prompts": [{"row": row, "request": request, "kl": round(-mean, 6), "text": text} for mean, request, row, text in worst],
    }


def _sum(pairs: Iterable[list]) -> list:
    nats, tokens = (sum(column) for column in zip(*pairs, strict=True))
    return [round(nats, 6), tokens]


def pieces(tokens: list[int], tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """The text of each token, so that all together are the text of the whole.

    What a token adds is what the text of a few tokens before and of it has beyond the text of those before: many tokenizers drop or join spaces in a
    token by itself. A token that leaves a character unfinished adds nothing until one completes it.
    """
    found, begun, before = [], 0, ""
    for end in range(1, len(tokens) + 1):
        text = tokenizer.decode(tokens[begun:end])
        if text.endswith(UNFINISHED) and end < len(tokens):
            found.append("")
            continue
        found.append(text[len(before) :] if text.startswith(before) else tokenizer.decode(tokens[end - 1 : end]))
        begun = end - 1
        before = tokenizer.decode(tokens[begun:end])
    return found


def forget_after(run_dir: Path, step: int) -> None:
    """Delete the files of steps after `step`, which will be done again."""
    for path in (run_dir / FOLDER).glob("*.json"):
        if path.stem.isdigit() and int(path.stem) > step:
            path.unlink()
