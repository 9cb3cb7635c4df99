"""An environment that spoils what a model has sampled: some tokens are replaced as soon as they are drawn, and the model has to go on from there.

A model that is asked to mend its mistakes may make none of its own, so mistakes are made for it. Of the tokens of a small alphabet, such as the digits,
each that is sampled is replaced with probability `rate` by another of that alphabet, all others being as likely. The new token is what the model sees next
and what the grader reads. It is not the model's: it stays out of the loss, and has no log-probability (NaN), so that none is taken for a sample's.

Whether a token is replaced, and how far along the alphabet its substitute stands, follows from (seed, request, position) alone, by a number beside the
one that draws the token (rollout/sampling.py). So all models that answer a prompt meet the same replacements where they write a token of the alphabet at the
same place. A generator was rejected: what one prompt meets would depend on the other prompts.

W: tokens drawn at one position. A: tokens of the alphabet.
"""

import hashlib
from collections.abc import Collection
from dataclasses import dataclass

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from rollout.config import PerturbationConfig
from rollout.sampling import uniform


@dataclass(frozen=True, slots=True, kw_only=True)
class Perturbation:
    """rate: chance of each token of the alphabet. alphabet_A: int64 ids. seed: of its numbers, which no sampling uses."""

    rate: float
    alphabet_A: np.ndarray
    seed: int

    def apply(self, key_W: np.ndarray, position: int, token_W: np.ndarray, logprob_W: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(tokens, their log-probabilities, NaN where the token is the environment's). key_W: of each completion, as in sampling."""
        uniform_W = uniform(self.seed, torch.from_numpy(key_W), position).numpy()
        place_W = (token_W[:, None] == self.alphabet_A).argmax(1)
        is_replaced_W = np.isin(token_W, self.alphabet_A) & (uniform_W < self.rate)
        count = len(self.alphabet_A)
        shift_W = 1 + np.minimum(uniform_W / self.rate * (count - 1), count - 2).astype(np.int64)  # below the rate, the number is uniform again
        other_W = self.alphabet_A[(place_W + shift_W) % count]
        return np.where(is_replaced_W, other_W, token_W), np.where(is_replaced_W, np.float32(np.nan), logprob_W)


def build_perturbation(cfg: PerturbationConfig, tokenizer: PreTrainedTokenizerBase, end_tokens: Collection[int], seed: int, name: str) -> Perturbation:
    """What a domain's settings describe. seed: the run's. name: of the settings, for messages.

    Raises ValueError for a text of the alphabet that is not one token of the tokenizer, or the token of another, and for one that ends a completion.
    """
    ids: dict[int, str] = {}
    for text in cfg.alphabet:
        tokens = tokenizer(text, add_special_tokens=False)["input_ids"]
        if len(tokens) != 1 or tokens[0] == tokenizer.unk_token_id:
            found = "unknown to it" if tokenizer.unk_token_id in tokens else f"{len(tokens)} tokens"
            raise ValueError(f"{name}.alphabet has {text!r}, which is {found} in the student's tokenizer: name texts of one token each")
        if tokens[0] in end_tokens:
            raise ValueError(f"{name}.alphabet has {text!r}, which ends a completion: an environment can replace it no more, so leave it out")
        if tokens[0] in ids:
            raise ValueError(f"{name}.alphabet has {ids[tokens[0]]!r} and {text!r}, which are the same token: leave one out")
        ids[tokens[0]] = text
    own_seed = int.from_bytes(hashlib.sha256(f"{seed}/perturbation".encode()).digest()[:8], "little")
    return Perturbation(rate=cfg.rate, alphabet_A=np.array(list(ids), dtype=np.int64), seed=own_seed)
