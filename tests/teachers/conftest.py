"""Fixtures of the tests of `teachers`: three teachers on disk, a pool of them, rollouts of three domains; and a small HTTP server.

The server speaks the part of vLLM's protocol that scoring needs, over a transformers model. What it computes is right unless a test says otherwise:
`spoil` changes an answer before it is sent, `statuses` are sent first, one a request.
"""

import json
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from rollout.config import ModelConfig
from rollout.model import load_model, load_tokenizer, save_model
from teachers.config import DomainConfig, TeacherConfig, TeachersConfig
from teachers.pool import TeacherPool

CPU = torch.device("cpu")


class ServedModel(ThreadingHTTPServer):
    """Answers /v1/models, /tokenize, /detokenize and /v1/completions on a free port of this machine."""

    daemon_threads = True
    request_queue_size = 64

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, name: str = "law", root: str = "models/law"):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.model, self.tokenizer, self.name, self.root = model, tokenizer, name, root
        self.max_model_len, self.max_logprobs = 128, 200
        self.spoil: Callable[[dict], dict] = lambda answer: answer
        self.statuses: list[int] = []
        self.delay = 0.0
        self.asked: list[dict] = []
        self.lock = threading.Lock()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def answer(self, path: str, body: dict | None) -> tuple[int, dict]:
        if path == "/v1/models":
            return 200, {"data": [{"id": self.name, "root": self.root, "max_model_len": self.max_model_len}]}
        if path == "/tokenize":
            return 200, {"tokens": self.tokenizer(body["prompt"], add_special_tokens=body["add_special_tokens"])["input_ids"]}
        if path == "/detokenize":
            return 200, {"prompt": self.tokenizer.decode(body["tokens"])}
        return self.completion(body)

    def completion(self, body: dict) -> tuple[int, dict]:
        with self.lock:
            self.asked.append(body)
            status = self.statuses.pop(0) if self.statuses else 200
        time.sleep(self.delay)
        if status != 200:
            return status, {"error": {"message": "the engine is not well"}}
        count = body["prompt_logprobs"]
        if count > self.max_logprobs:
            return 400, {"error": {"message": f"Requested prompt logprobs of {count}, which is greater than max allowed: {self.max_logprobs}"}}
        choice = {"prompt_token_ids": body["prompt"], "prompt_logprobs": self.positions(body["prompt"], count)}
        return 200, self.spoil({"model": self.name, "choices": [choice]})

    @torch.no_grad()
    def positions(self, tokens: list[int], count: int) -> list[dict | None]:
        """One dictionary per position: the `count` likeliest tokens, and the one that stands there with its own rank."""
        with self.lock:
            logprobs = self.model(torch.tensor([tokens])).logits[0].float().log_softmax(-1)
        found = []
        for row, token in zip(logprobs, tokens[1:], strict=False):
            own = {str(token): {"logprob": float(row[token]), "rank": int((row >= row[token]).sum())}}
            top = row.topk(count)
            ranked = enumerate(zip(top.indices.tolist(), top.values.tolist(), strict=True), 1)
            found.append(own | {str(other): {"logprob": logprob, "rank": rank} for rank, (other, logprob) in ranked})
        return [None, *found]


class _Handler(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self.send(*self.server.answer(self.path, None))

    def do_POST(self) -> None:
        self.send(*self.server.answer(self.path, json.loads(self.rfile.read(int(self.headers["Content-Length"])))))

    def send(self, status: int, answer: dict) -> None:
        content = json.dumps(answer).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *arguments) -> None:
        pass


@pytest.fixture
def new_server(tokenizer) -> Iterator[Callable[..., ServedModel]]:
    """new_server(model, name="law"): a server in threads of this process, which listens until the test ends."""
    servers = []

    def start(model: PreTrainedModel, **fields) -> ServedModel:
        servers.append(ServedModel(model, tokenizer, **fields))
        threading.Thread(target=servers[-1].serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        return servers[-1]

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


def serve_and_hang(folder: str, hangs_on: int) -> None:
    """What `new_server_process` runs: prints the server's address, and "hanging" before it hangs on so many tokens."""
    server = ServedModel(load_model(ModelConfig(model=folder), "server's model"), load_tokenizer(folder))

    def hang(answer: dict) -> dict:
        if len(answer["choices"][0]["prompt_token_ids"]) == hangs_on:
            print("hanging", flush=True)
            time.sleep(600)
        return answer

    server.spoil = hang
    print(server.url, flush=True)
    server.serve_forever()


@pytest.fixture
def new_server_process() -> Iterator[Callable[[str, int], tuple[subprocess.Popen, str]]]:
    """new_server_process(folder, hangs_on=20): (a process of its own that serves the model of a folder, its address); its next line says that it hangs."""
    processes = []

    def start(folder: str, hangs_on: int) -> tuple[subprocess.Popen, str]:
        script = f"import runpy; runpy.run_path({__file__!r})['serve_and_hang']({folder!r}, {hangs_on})"
        processes.append(subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True))
        return processes[-1], processes[-1].stdout.readline().strip()

    yield start
    for process in processes:
        process.kill()
        process.wait()


@pytest.fixture(scope="session")
def folders(saved_v4, saved_qwen3_moe, new_student, tokenizer, tmp_path_factory) -> dict[str, str]:
    """Three teachers by name; `wide` has another hidden size than the others."""
    wide = new_student("qwen3_moe_tiny", seed=1, hidden_size=48)
    folder = tmp_path_factory.mktemp("saved") / "wide"
    save_model(folder, wide, tokenizer, wide.state_dict())
    return {"v4": str(saved_v4), "qwen": str(saved_qwen3_moe), "wide": str(folder)}


@pytest.fixture(scope="session")
def rollouts(random_rollouts):
    """Rollouts of three domains in mixed order."""
    return random_rollouts([("law", 9, 12), ("code", 5, 8), ("law", 4, 20), ("math", 7, 7), ("code", 12, 15), ("math", 3, 1), ("law", 9, 12)])


@pytest.fixture
def new_pool(folders, tokenizer):
    """new_pool({"law": "v4", ...}, max_resident=1): a pool whose domains have the teachers of `folders`."""

    def make(teachers: dict[str, str], **settings) -> TeacherPool:
        domains = {name: DomainConfig(teacher=TeacherConfig(model=folders.get(teacher, teacher))) for name, teacher in teachers.items()}
        return TeacherPool(domains, TeachersConfig(**{"max_resident": 3, "prefetch": False} | settings), tokenizer, CPU)

    return make
