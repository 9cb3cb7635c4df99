"""One vLLM server that holds the student: it takes new weights, says which it has, and draws completions. Token ids go there, token ids come back.

New weights are a Hugging Face folder that the server reads from a path which it shares with the trainer (`reload_weights`); the server then gets a version
label, which lives and dies with its process: one that was restarted holds the weights of its command line, and a label of its own. What a label cannot
tell, whether the folder really became the model, a fixed probe does: the server's log-probabilities of it must be those that the published weights
give in the trainer's process. Where there are GPUs, vLLM also takes weights over NCCL or IPC; a folder was chosen because it needs nothing of the
two sides but a path, and weights that a run has published can be served, compared and loaded anywhere.

Completions are OpenAI's /v1/completions, streamed: what has come before a server dies is kept, and another goes on from there. Everything that a server
would otherwise take from its model's generation_config.json is sent, end tokens included. Log-probabilities are those of the distribution
that was drawn from, which takes --logprobs-mode processed_logprobs; a server in another mode is refused at the start.

P: tokens of the probe but the first.
"""

import math
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from rollout.config import SamplingConfig, VllmConfig
from rollout.server import Server, ServerFailure, ServerGone

NO_PENALTIES = {"repetition_penalty": 1.0, "presence_penalty": 0.0, "frequency_penalty": 0.0}
"""Sent all the same: a server takes what it is not told from generation_config.json."""

ROUNDING = 1e-3
"""By which a log-probability may exceed 0."""

NO_PROBABILITY = -9999.0
"""What vLLM sends for a log-probability of -inf."""

NEVER = -100.0
"""Bias of a logit that must not be drawn, the largest that the protocol has."""

PROCESSED = "start it with --logprobs-mode processed_logprobs"

NAN = "Out of range float"
"""What vLLM says when it should send NaN."""

HINTS = {
    "status 404": "start it with VLLM_SERVER_DEV_MODE=1, on a private network, and from a vLLM that has /collective_rpc and /update_weight_version",
    NAN: "its model gives NaN or infinity",
}
"""What vLLM says when it refuses, and what that means here."""


class StaleWeights(ServerFailure):
    """A server holds other weights than it was given."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ServedWeights:
    """Weights that servers are asked to load.

    folder: a Hugging Face folder, under the name by which the servers know it.
    label: of these weights and this run; the version labels of servers that were given them begin with it.
    weights: their hash (rollout/weights.py).
    policy_step: number of optimizer steps they have seen.
    probe, logprob_P: fixed tokens, and the log-probabilities that these weights give to all but the first.
    tolerance: mean difference from these above which a server holds other weights.
    """

    folder: str
    label: str
    weights: str
    policy_step: int
    probe: tuple[int, ...]
    logprob_P: tuple[float, ...]
    tolerance: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Draw:
    """One completion, or what is missing of it.

    tokens: prompt, and what is there of the completion.
    max_tokens: to be drawn at most.
    """

    tokens: list[int]
    max_tokens: int
    seed: int
    sampling: SamplingConfig
    end_tokens: tuple[int, ...]


class VllmServer:
    """A server by its address, and the version of the weights that it was last given or found to have."""

    def __init__(self, url: str, cfg: VllmConfig, vocab_size: int, num_rows: int):
        """vocab_size: ids that may be drawn; the model's head has num_rows rows, and those beyond are padding."""
        self.server, self.vocab_size = Server(url, "vLLM server", cfg), vocab_size
        self.never = {str(row): NEVER for row in range(vocab_size, num_rows)}
        self.version: str | None = None

    @property
    def role(self) -> str:
        return self.server.role

    def require_fit(self, longest: int, probe: tuple[int, ...]) -> None:
        """Ask with a probe whether the server can draw rollouts of so many tokens. Raises ServerFailure where it cannot: too short, without the
        endpoints for new weights, or with log-probabilities of another distribution.
        """
        answer = self.server.ask("/v1/models")
        try:
            context = int(answer["data"][0]["max_model_len"])
        except (KeyError, IndexError, TypeError) as error:
            raise ServerFailure(f"the {self.role} describes its models otherwise than vLLM does") from error
        if context < longest:
            raise ServerFailure(f"the {self.role} reads {context} positions, and rollouts have up to {longest}: start it with --max-model-len {longest}")
        self.find_version()
        one = Draw(tokens=list(probe), max_tokens=1, seed=0, sampling=SamplingConfig(top_k=1), end_tokens=())
        [(_, logprob)] = [pair for arrived in self.draw(one) for pair in arrived]
        if abs(logprob) > ROUNDING:  # of the only token that top_k=1 leaves
            raise ServerFailure(f"the {self.role} gives log-probabilities of a distribution that it does not draw from: {PROCESSED}")

    def give(self, weights: ServedWeights) -> None:
        """Have the server load weights. Raises ServerFailure where it cannot, and StaleWeights where it has others all the same.

        Keys and values that it keeps of the old weights are found by no new request, whose `cache_salt` is the version.
        """
        version = f"{weights.label}.{uuid.uuid4().hex[:12]}"
        self._ask("/collective_rpc", {"method": "reload_weights", "kwargs": {"weights_path": weights.folder}})
        self._ask("/reset_prefix_cache?reset_running_requests=true", {})
        self._ask("/update_weight_version", {"new_version": version})
        self.version = version
        self.require_probe(weights)

    def find_version(self, retries: int | None = None) -> str:
        """The version label that the server's process has now."""
        answer = self._ask("/weight_info", retries=retries)
        if not isinstance(answer, dict) or not isinstance(answer.get("weight_version"), str):
            raise ServerFailure(f"the {self.role} does not say which weights it has (weight_version)")
        return answer["weight_version"]

    def require_probe(self, weights: ServedWeights) -> None:
        """Raises StaleWeights where the probe's log-probabilities are not those of the weights."""
        body = self._body(Draw(tokens=list(weights.probe), max_tokens=1, seed=0, sampling=SamplingConfig(), end_tokens=()))
        answer = self._ask("/v1/completions", body | {"prompt_logprobs": 0, "stream": False})
        try:
            positions = answer["choices"][0]["prompt_logprobs"][1:]
            found_P = [float(position[str(token)]["logprob"]) for position, token in zip(positions, weights.probe[1:], strict=True)]
        except (KeyError, IndexError, TypeError, ValueError) as error:
            raise ServerFailure(f"the {self.role} answers in another form than vLLM's prompt_logprobs") from error
        distance = sum(abs(found - expected) for found, expected in zip(found_P, weights.logprob_P, strict=True)) / len(found_P)
        if not distance <= weights.tolerance:
            raise StaleWeights(
                f"the {self.role} does not hold the weights of step {weights.policy_step} in {weights.folder}: the log-probabilities of a probe "
                f"differ by {distance:.2g} (rollout.vllm.tolerance is {weights.tolerance:g})"
            )

    def draw(self, draw: Draw) -> Iterator[list[tuple[int, float]]]:
        """Tokens with their log-probabilities, as they come. Raises ServerGone where they break off, and ServerFailure for an answer that cannot be right."""
        count, last, reason = 0, None, None
        for event in self.server.events("/v1/completions", self._body(draw)):
            if isinstance(event, dict) and event.get("choices") == []:  # --enable-force-include-usage adds one at the end
                continue
            self._require(reason is None, "goes on after the end")
            arrived, reason = self._read(event, draw if count == 0 else None)
            if arrived:
                count, last = count + len(arrived), arrived[-1][0]
                ended = [token in draw.end_tokens for token, _ in arrived]
                self._require(count <= draw.max_tokens and True not in ended[:-1], "gave tokens after the end of a completion")
                self._require(reason is not None or not ended[-1], "goes on after an end token")
                yield arrived
        if reason not in ("stop", "length"):  # aborted, as by a pause
            raise ServerGone(f"the {self.role} broke off a completion ({reason})")
        is_right = last in draw.end_tokens if reason == "stop" else count == draw.max_tokens
        self._require(is_right, f"ended a completion of {count} tokens with {last} and calls that {reason}")

    def _body(self, draw: Draw) -> dict[str, Any]:
        cfg = draw.sampling
        body = {"prompt": draw.tokens, "max_tokens": draw.max_tokens, "min_tokens": 0, "n": 1, "stream": True, "return_token_ids": True, "logprobs": 0}
        body |= {"temperature": cfg.temperature, "top_p": cfg.top_p, "top_k": cfg.top_k or 0, "min_p": cfg.min_p, "seed": draw.seed} | NO_PENALTIES
        body |= {"stop": [], "stop_token_ids": list(draw.end_tokens), "ignore_eos": True}  # the student's end tokens, not those of the server's folder
        body |= {"skip_special_tokens": False, "add_special_tokens": False}
        body |= {"logit_bias": self.never} if self.never else {}
        return body | ({"cache_salt": self.version} if self.version is not None else {})

    def _read(self, event: Any, first_of: Draw | None) -> tuple[list[tuple[int, float]], str | None]:
        """(tokens with log-probabilities, finish reason) of one event, every value checked."""
        if isinstance(event, dict) and "error" in event:
            said = event["error"] if isinstance(event["error"], dict) else {"message": event["error"]}
            message = self._with_hint(f"the {self.role} ends a completion with an error: {' '.join(str(said.get('message')).split())[:300].rstrip('.')}")
            raise (ServerGone if said.get("code") == 500 and NAN not in message else ServerFailure)(message)  # 500: its engine has died
        try:
            [choice] = event["choices"]
            tokens, reason = choice["token_ids"], choice["finish_reason"]
            logprobs = choice["logprobs"]["token_logprobs"] if tokens else []
            prompt = choice.get("prompt_token_ids")
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise ServerFailure(f"the {self.role} answers in another form than vLLM's completions with return_token_ids and logprobs") from error
        self._require(first_of is None or prompt == first_of.tokens, "read another prompt than it was sent")
        self._require(isinstance(tokens, list) and isinstance(logprobs, list) and len(tokens) == len(logprobs), "gives no log-probability for each token")
        for token, logprob in zip(tokens, logprobs, strict=True):
            self._require(isinstance(token, int) and 0 <= token < self.vocab_size, f"drew {token}, which is no token of the student")
            self._require(isinstance(logprob, int | float) and math.isfinite(logprob), "gave NaN or infinity")
            self._require(logprob <= ROUNDING, f"does not give log-probabilities: {PROCESSED}")
            self._require(logprob > NO_PROBABILITY, "drew a token of probability 0")
        return list(zip(tokens, logprobs, strict=True)), reason

    def _ask(self, path: str, body: dict[str, Any] | None = None, retries: int | None = None) -> Any:
        try:
            return self.server.ask(path, body, retries)
        except ServerGone:
            raise
        except ServerFailure as failure:
            raise ServerFailure(self._with_hint(str(failure))) from failure

    def _with_hint(self, message: str) -> str:
        hint = next((hint for said, hint in HINTS.items() if said in message), None)
        return message if hint is None else f"{message}: {hint}"

    def _require(self, is_right: bool, what: str) -> None:
        if not is_right:
            raise ServerFailure(f"the {self.role} {what}")
