"""A real vLLM server for the tests beside this file. They need OPD_VLLM_PYTHON=PATH, the Python of an environment made from requirements.txt here."""

import os
import signal
import socket
import subprocess
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

START = Path(__file__).parent / "start_server.sh"
START_SECONDS = 300


@pytest.fixture(scope="module")
def start(tmp_path_factory) -> Iterator[Callable[..., tuple[subprocess.Popen, str]]]:
    """start(folder, port, "--served-model-name", "law"): (a server in a session of its own, its address), once it is ready."""
    processes = []

    def run(folder: Path, port: int | None = None, *options: str) -> tuple[subprocess.Popen, str]:
        port = port or free_port()
        log = tmp_path_factory.mktemp("server") / "log"
        environment = os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "VLLM_SERVER_DEV_MODE": "1"}
        environment.pop("PYTHONPATH", None)  # the server's environment is another
        arguments = [str(START), str(folder), str(port), "--max-model-len", "128", "--max-num-seqs", "16", *options]
        with log.open("w") as output:
            processes.append(subprocess.Popen(arguments, stdout=output, stderr=subprocess.STDOUT, env=environment, start_new_session=True))
        url, deadline = f"http://127.0.0.1:{port}", time.monotonic() + START_SECONDS
        while not is_ready(url):
            assert processes[-1].poll() is None, log.read_text()[-4000:]
            assert time.monotonic() < deadline, log.read_text()[-4000:]
            time.sleep(0.5)
        return processes[-1], url

    yield run
    for process in processes:
        kill(process)


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def is_ready(url: str) -> bool:
    try:
        with urllib.request.urlopen(f"{url}/health", timeout=5) as response:
            return response.status == 200
    except OSError:
        return False


@pytest.fixture(scope="session")
def end() -> Callable[[subprocess.Popen], None]:
    """end(process): SIGKILL to the server and the processes that it started."""
    return kill


def kill(process: subprocess.Popen) -> None:
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
