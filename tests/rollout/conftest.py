"""A small HTTP server that speaks the part of vLLM's protocol which sampling needs, over a transformers model; for the tests of `rollout`.

What it computes is right unless a test says otherwise: `spoil` changes an event before it is sent, `on_event` is called before each with the number
sent so far.
"""

import copy
import json
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import torch
from transformers import PreTrainedModel

from rollout.config import ModelConfig, SamplingConfig
from rollout.model import load_model
from rollout.sampling import draw

LOADING = threading.Lock()
"""transformers' loader changes settings of the whole process while it works: two servers that load at one time would leave them changed."""


class DrawingServer(ThreadingHTTPServer):
    """Draws completions on a free port of this machine, and loads weights from folders."""

    daemon_threads = True
    request_queue_size = 128

    def __init__(self, model: PreTrainedModel):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.first, self.model, self.version = copy.deepcopy(model), copy.deepcopy(model), "default"
        self.max_model_len, self.is_dead, self.is_deaf, self.has_endpoints, self.is_processed = 128, False, False, True, True
        self.spoil: Callable[[dict], dict] = lambda event: event
        self.on_event: Callable[[int], None] = lambda count: None
        self.drawn: list[dict] = []
        self.asked: list[str] = []
        self.num_events, self.num_loads = 0, 0
        self.lock = threading.RLock()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def restart(self) -> None:
        """Be what a server is that was killed and started again: the weights of its command line, and no label."""
        with self.lock:
            self.model, self.version = self.first, "default"

    def answer(self, path: str, body: dict) -> tuple[int, dict]:
        self.asked.append(path)
        if path == "/v1/models":
            return 200, {"data": [{"id": "student", "max_model_len": self.max_model_len}]}
        if not self.has_endpoints and path != "/v1/completions":
            return 404, {"error": {"message": "Not Found"}}
        with self.lock:
            if path == "/collective_rpc":
                self.num_loads += 1
                if not self.is_deaf:
                    with LOADING:
                        self.model = load_model(ModelConfig(model=body["kwargs"]["weights_path"]), "served")
            if path == "/update_weight_version":
                self.version = body["new_version"]
            if path == "/v1/completions":
                return 200, {"choices": [{"prompt_logprobs": self.positions(body["prompt"])}]}
            return 200, {"weight_version": self.version, "success": True}

    @torch.no_grad()
    def positions(self, tokens: list[int]) -> list[dict | None]:
        logprobs = self.model(torch.tensor([tokens])).logits[0].log_softmax(-1)
        return [None, *({str(token): {"logprob": float(row[token]), "rank": 1}} for row, token in zip(logprobs, tokens[1:], strict=False))]

    def events(self, body: dict) -> Iterator[dict]:
        """One event a token, with the weights that are loaded when it is drawn."""
        self.drawn.append(body)
        generator = torch.Generator().manual_seed(body["seed"])
        cfg = SamplingConfig(temperature=body["temperature"], top_p=body["top_p"], top_k=body["top_k"] or None, min_p=body["min_p"])
        tokens = list(body["prompt"])
        for count in range(1, body["max_tokens"] + 1):
            with self.lock:
                self.on_event(self.num_events)
                self.num_events += 1
                if self.is_dead:
                    return
                token, logprob = self.next_token(tokens, generator, cfg, body.get("logit_bias", {}))
            tokens.append(token)
            reason = "stop" if token in body["stop_token_ids"] else "length" if count == body["max_tokens"] else None
            choice = {"token_ids": [token], "logprobs": {"token_logprobs": [logprob]}, "finish_reason": reason}
            yield self.spoil({"choices": [choice | {"prompt_token_ids": body["prompt"] if count == 1 else None}]})
            if reason is not None:
                return

    @torch.no_grad()
    def next_token(self, tokens: list[int], generator: torch.Generator, cfg: SamplingConfig, bias: dict[str, float]) -> tuple[int, float]:
        logits = self.model(torch.tensor([tokens])).logits[:, -1]
        for token, value in bias.items():
            logits[0, int(token)] += value
        token, logprob = draw(logits, torch.rand(1, dtype=torch.float64, generator=generator), cfg)
        return int(token), float(logprob) if self.is_processed else float(logits.log_softmax(-1)[0, token])


class _Handler(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self.send(self.path, {})

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if body.get("stream"):
            self.stream(body)
        else:
            self.send(self.path.split("?")[0], body)

    def stream(self, body: dict) -> None:
        if self.server.is_dead:
            return
        self.send_response(200)
        self.end_headers()
        try:
            for event in self.server.events(body):
                self.wfile.write(f"data: {json.dumps(event)}\n\n".encode())
            if not self.server.is_dead:
                self.wfile.write(b"data: [DONE]\n\n")
        except OSError:  # the client has heard enough
            return

    def send(self, path: str, body: dict) -> None:
        if self.server.is_dead:
            return
        status, answer = self.server.answer(path, body)
        content = json.dumps(answer).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *arguments) -> None:
        pass


@pytest.fixture
def new_vllm() -> Iterator[Callable[..., DrawingServer]]:
    """new_vllm(model): a server in threads of this process, which listens until the test ends."""
    servers = []

    def start(model: PreTrainedModel) -> DrawingServer:
        servers.append(DrawingServer(model))
        threading.Thread(target=servers[-1].serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        return servers[-1]

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()
