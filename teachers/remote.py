"""RemoteTeacher: a teacher that a running vLLM server holds. Token ids go there, log-probabilities of the likeliest tokens come back.

A request is a whole rollout, prompt and completion, with `prompt_logprobs: k`; what the server would sample after it is thrown away. Only ids
cross the wire, since text tokenized again need not give the ids that the student saw. The server has no hidden states to give, so the signal is the
top-k with its tail (or the sampled token's log-probability); the rows that are no tokens (padding of the vocabulary) count as tail.

Nothing that comes back is believed unseen. At start-up: which model the server holds, its context, that it decodes every id as the student's
tokenizer does (or that the folder `teacher.model`, which it must report, has the same tokenizer), and that it gives log-probabilities at all: the k
likeliest of V tokens have at least k / V of the mass and at most 1, which logits (--logprobs-mode raw_logits) do not. In every answer: the model, the ids,
the number of positions, k tokens of rank 1 to k, finite numbers. After every scoring, before any of it is used: the same model card, and the
same log-probabilities of a fixed probe, since a server restarted or reloaded with other weights under the same name looks the same otherwise.

vLLM gives log-probabilities at temperature 1 for prompt tokens whatever the request says, today; the settings of sampling are sent in their neutral values
all the same, because a server takes those it is not told from the model's generation_config.json.

T: completion tokens. K: tokens named per position. P: tokens of the probe but the first.
"""

import math
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from rollout.config import ModelConfig, ServerConfig
from rollout.model import load_tokenizer, require_folder
from rollout.server import Server, ServerFailure
from rollout.types import Rollout
from rollout.vllm_server import NO_PENALTIES
from teachers.compatibility import require_same_tokenizer
from teachers.config import SignalKind, TeacherConfig, TeachersConfig
from teachers.types import TeacherFailure, TeacherSignal

NEUTRAL = {"temperature": 1.0, "top_p": 1.0, "top_k": 0, "min_p": 0.0} | NO_PENALTIES
"""Sampling that changes no distribution."""

PROBE = "A:12+34= The quick brown fox {jumps: [0, 1]} over Größe, naïve café; 你好, мир!\nfor i in range(10): print(i ** 2)\n"
"""Text of the probe, in several scripts."""

PROBE_TOKENS = 48
"""Tokens of the probe at most."""

FEW = 5
"""Tokens that show whether log-probabilities are some, where the run asks for no top-k; any server gives as many."""

IDS_AT_A_TIME = 4096
"""Ids whose text is compared in one request."""

HINTS = {
    "prompt logprobs": "start it with --max-logprobs {count} or more, or lower teachers.top_k",
    "Out of range float": "its model gives NaN or infinity",
}
"""What vLLM says when it refuses to score, and what that means here."""

ROUNDING = 1e-3
"""By which the probabilities of a top-k may exceed 1; the loss allows as much (opd/estimators.py)."""

NO_PROBABILITY = -9999.0
"""What vLLM sends for a log-probability of -inf."""


class TeacherServer(Server):
    """A server whose failures are a teacher's."""

    def ask(self, path: str, body: dict[str, Any] | None = None, retries: int | None = None) -> Any:
        try:
            return super().ask(path, body, retries)
        except ServerFailure as failure:
            raise TeacherFailure(str(failure)) from failure


class RemoteTeacher:
    """A frozen model behind a server; it scores rollouts as Teacher does (teachers/teacher.py), without hidden states and head."""

    def __init__(self, name: str, domain: str, cfg: TeacherConfig, settings: TeachersConfig, tokenizer: PreTrainedTokenizerBase):
        """Asks the server what it holds. Raises ValueError, with the domain's name, where that does not fit or cannot be told."""
        require_served(domain, cfg, settings.signal)
        self.name, self.settings = name, settings
        self.server = TeacherServer(cfg.server, f"teacher of {domain}", server_config(settings))
        self.vocab_size, self.num_spare = len(tokenizer), 0
        self.card = self._find_card(cfg.model)
        self.context = self.card["max_model_len"] - 1  # vLLM samples one token at least
        self.probe = tokenizer(PROBE, add_special_tokens=False)["input_ids"][: min(PROBE_TOKENS, self.context)]
        if cfg.model is not None and Path(cfg.model).is_dir():
            require_folder(cfg.model, f"teacher of {domain}")
            require_same_tokenizer(f"teacher of {domain}", cfg.model, load_tokenizer(cfg.model, None, cfg.trust_remote_code), tokenizer)
        else:
            self._require_same_text(tokenizer)
        self._signal(self.probe, 1, SignalKind.top_k, settings.top_k if settings.signal is SignalKind.top_k else FEW)  # fails here, not in the first step
        self.fingerprint_P = self._fingerprint()
        self._require_steady()

    def score(self, rollouts: list[Rollout], kind: SignalKind, top_k: int, vocab_size: int) -> list[TeacherSignal]:
        """The signal of each rollout, in order. Raises TeacherFailure for anything but a right answer in time, and where the model is another now."""
        assert kind is not SignalKind.hidden_states, "a server has none"
        assert vocab_size == self.vocab_size, "the tokenizer is another than at start-up"

        def signal_of(rollout: Rollout) -> TeacherSignal:
            tokens = [*rollout.prompt.tokens, *rollout.completion_T.tolist()]
            token_TK, logprob_TK = self._signal(tokens, len(rollout.prompt.tokens), kind, top_k)
            return TeacherSignal(teacher=self.name, kind=kind, token_TK=token_TK, logprob_TK=logprob_TK)

        signals = self.server.each(signal_of, rollouts)
        self._require_same_model()
        return signals

    def identity(self) -> dict[str, Any]:
        """What a manifest keeps of this teacher, and compares (teachers/manifest.py)."""
        return {"server": self.server.url, "model": self.card["id"], "root": self.card["root"], "fingerprint": self.fingerprint_P.tolist()}

    def _find_card(self, wanted: str | None) -> dict[str, Any]:
        """The server's description of the model (vLLM's ModelCard), with the context filled in for an adapter."""
        answer = self.server.ask("/v1/models")
        try:
            cards = [{"id": card["id"], "root": card["root"], "max_model_len": card["max_model_len"]} for card in answer["data"]]
        except (KeyError, TypeError) as error:
            raise TeacherFailure(f"the {self.server.role} describes its models otherwise than vLLM does") from error
        names = ", ".join(str(card["id"]) for card in cards) or "nothing"
        found = [card for card in cards if wanted is None or wanted in (card["id"], card["root"])]
        if not found:
            raise TeacherFailure(f"the {self.server.role} serves {names}, and teacher.model is {wanted}: correct it, or set it to null")
        if len(found) > 1:
            raise TeacherFailure(f"the {self.server.role} serves several models ({names}): set teacher.model to one of them")
        lengths = [card["max_model_len"] for card in (*found, *cards) if card["max_model_len"] is not None]
        if not lengths:
            raise TeacherFailure(f"the {self.server.role} does not say how many positions its model reads (max_model_len)")
        return found[0] | {"max_model_len": lengths[0]}

    def _require_same_text(self, tokenizer: PreTrainedTokenizerBase) -> None:
        """Every id has to be the same text for the server, and the probe the same ids."""
        role, model = self.server.role, self.card["id"]
        answer = self.server.ask("/tokenize", {"model": model, "prompt": PROBE, "add_special_tokens": False})
        ids = tokenizer(PROBE, add_special_tokens=False)["input_ids"]
        another = "another tokenizer than the student: they must share one vocabulary (or set teacher.model to the folder of its tokenizer)"
        if not isinstance(answer, dict) or answer.get("tokens") != ids:
            raise TeacherFailure(f"the {role} has {another}")

        def is_same(first: int) -> bool:
            some = list(range(first, min(first + IDS_AT_A_TIME, len(tokenizer))))
            answer = self.server.ask("/detokenize", {"model": model, "tokens": some})
            return isinstance(answer, dict) and answer.get("prompt") == tokenizer.decode(some)

        firsts = range(0, len(tokenizer), IDS_AT_A_TIME)
        for first, same in zip(firsts, self.server.each(is_same, firsts), strict=True):
            if not same:
                raise TeacherFailure(f"the {role} reads ids from {first} on as other text, so it has {another}")

    def _signal(self, tokens: list[int], start: int, kind: SignalKind, top_k: int) -> tuple[torch.Tensor, torch.Tensor]:
        """(token_TK, logprob_TK) of the tokens from `start` on, as teachers/types.py describes them."""
        if kind is SignalKind.sampled_token:
            rows = self._rows(tokens, 0)[start:]
            logprob_TK = torch.tensor([[row[token][1]] for row, token in zip(rows, tokens[start:], strict=True)])
            self._require(bool((logprob_TK > NO_PROBABILITY).all()), "gives probability 0 to a token that the student sampled")
            self._require(bool((logprob_TK <= ROUNDING).all()), "does not give log-probabilities: start it with --logprobs-mode raw_logprobs")
            return torch.tensor(tokens[start:])[:, None], logprob_TK
        while True:
            asked = top_k + self.num_spare
            ranked = [self._ranked(row, asked) for row in self._rows(tokens, asked)[start:]]
            inside = [[(token, logprob) for token, logprob in row if token < self.vocab_size][:top_k] for row in ranked]
            missing = top_k - min(len(row) for row in inside)
            if missing == 0:
                break
            self.num_spare += missing  # rows of the head that are no tokens were among the likeliest
        token_TK = torch.tensor([[token for token, _ in row] for row in inside])
        logprob_TK = torch.tensor([[logprob for _, logprob in row] for row in inside])
        mass_T = torch.tensor([[logprob for _, logprob in row] for row in ranked]).double().exp().sum(1)
        is_distribution = bool(((mass_T <= 1 + ROUNDING) & (mass_T >= asked / (2 * self.vocab_size))).all())
        self._require(is_distribution, "does not give log-probabilities over its vocabulary: start it with --logprobs-mode raw_logprobs")
        return token_TK, logprob_TK

    def _rows(self, tokens: list[int], num_ranked: int) -> list[dict[int, tuple[int, float]]]:
        """Per position {id: (rank, log-probability)}, the position's own token included; the first, which nothing precedes, is empty."""
        body = NEUTRAL | {"model": self.card["id"], "prompt": tokens, "max_tokens": 1, "prompt_logprobs": num_ranked, "return_token_ids": True}
        try:
            answer = self.server.ask("/v1/completions", body)
        except TeacherFailure as failure:
            hint = next((hint for said, hint in HINTS.items() if said in str(failure)), None)
            if hint is None:
                raise
            raise TeacherFailure(f"{failure}: {hint.format(count=num_ranked)}") from failure
        try:
            model, choice = answer["model"], answer["choices"][0]
            ids, positions = choice["prompt_token_ids"], choice["prompt_logprobs"]
            rows = [{int(token): (found["rank"], float(found["logprob"])) for token, found in (position or {}).items()} for position in positions]
        except (KeyError, IndexError, TypeError, ValueError, AttributeError) as error:
            raise TeacherFailure(f"the {self.server.role} answers in another form than vLLM's prompt_logprobs with return_token_ids") from error
        self._require(model == self.card["id"], f"answers as {model}, and was {self.card['id']} at start-up")
        self._require(ids == tokens, "scored other tokens than it was sent")
        self._require(len(rows) == len(tokens), f"gave {len(rows)} positions for {len(tokens)} tokens")
        self._require(all(token in row for token, row in zip(tokens[1:], rows[1:], strict=True)), "left out tokens that it was sent")
        self._require(all(math.isfinite(logprob) for row in rows for _, logprob in row.values()), "gave NaN or infinity")
        return rows

    def _ranked(self, row: dict[int, tuple[int, float]], count: int) -> list[tuple[int, float]]:
        """(id, log-probability) of the `count` likeliest tokens; a token that is there because it was sent has a higher rank."""
        ranked = sorted((rank, token, logprob) for token, (rank, logprob) in row.items() if rank <= count)
        self._require([rank for rank, _, _ in ranked] == list(range(1, count + 1)), f"did not name {count} different tokens at each position")
        return [(token, logprob) for _, token, logprob in ranked]

    def _require(self, is_right: bool, what: str) -> None:
        if not is_right:
            raise TeacherFailure(f"the {self.server.role} {what}")

    def _fingerprint(self) -> torch.Tensor:
        """Log-probability of each token of the probe but the first."""
        return self._signal(self.probe, 1, SignalKind.sampled_token, 1)[1][:, 0].double()

    def _require_steady(self) -> None:
        """Raises TeacherFailure where the probe among others differs from itself alone by so much that other weights would not be told from it."""
        together = self.server.each(lambda _: self._fingerprint(), range(self.settings.max_connections))
        noise = max(_distance(self.fingerprint_P, one_P) for one_P in together)
        if noise > self.settings.probe_tolerance / 2:
            raise TeacherFailure(
                f"the {self.server.role} answers one probe in numbers that differ by {noise:.2g}, so other weights would not be noticed: "
                f"set teachers.probe_tolerance to {4 * noise:.2g} or more"
            )

    def _require_same_model(self) -> None:
        card = self._find_card(self.card["id"])
        self._require(card == self.card, f"serves {card['root']} as {card['id']} now, and it was {self.card['root']} at start-up")
        distance, tolerance = _distance(self.fingerprint_P, self._fingerprint()), self.settings.probe_tolerance
        difference = f"the log-probabilities of a probe differ by {distance:.2g} (teachers.probe_tolerance={tolerance:g})"
        self._require(distance <= tolerance, f"has other weights than at start-up: {difference}")


def server_config(settings: TeachersConfig) -> ServerConfig:
    return ServerConfig(timeout_seconds=settings.timeout_seconds, retries=settings.retries, max_connections=settings.max_connections)


def require_served(domain: str, cfg: TeacherConfig, signal: SignalKind) -> None:
    """Raises ValueError for settings that a server would ignore, and for a signal that none can give."""
    if signal is SignalKind.hidden_states:
        raise ValueError(f"the teacher of {domain} is a server, which gives log-probabilities and no hidden states: set teachers.signal=top_k")
    default = ModelConfig()
    asked = {"revision": cfg.revision, "attention": cfg.attention, "experts": cfg.experts, "adapter": cfg.adapter, "adapter_revision": cfg.adapter_revision}
    ignored = [name for name, value in asked.items() if value is not None] + ["dtype"] * (cfg.dtype is not default.dtype)
    if ignored:
        raise ValueError(f"the teacher of {domain} is a server, so domains.{domain}.teacher.{ignored[0]} would be ignored: remove it")


def _distance(left_P: torch.Tensor, right_P: torch.Tensor) -> float:
    return float((left_P - right_P).abs().mean())
