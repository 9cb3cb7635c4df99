"""JSON over HTTP to a running server: requests side by side, each with a deadline, a bounded number of attempts, and failures in one sentence.

Teachers that score behind a server (teachers/remote.py) and samplers that draw behind one (rollout/vllm_server.py) ask in the same way.

A request is tried again where that may help: no connection, one that broke, no whole answer in time or one that cannot be read, status 429
or 5xx. What the server refuses (4xx) is not. The worst case of one request is twice timeout_seconds for each attempt (to connect, to be answered) and the
pauses between, after which the run stops by name.
Connections go straight to the address, whatever proxy the environment names: such a server is a private one. An answer that comes event by event
(`events`) has the deadline between two events, and is not asked for again: what came of it is already with the caller, who knows how to go on.

The standard library does it. A client library was rejected: the trainer would gain a dependency and a second policy of retries.
"""

import http.client
import json
import socket
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import Any, TypeVar
from urllib.parse import urlsplit

from rollout.config import ServerConfig
from rollout.errors import first_sentence

FIRST_PAUSE_SECONDS = 0.5
"""Before the second attempt; each later pause is twice the one before."""

Item = TypeVar("Item")
Result = TypeVar("Result")


class ServerFailure(ValueError):  # noqa: N818 - the word of the field
    """A server gave no right answer; the message names it and says what happened."""


class ServerGone(ServerFailure):
    """A server gave no answer at all: another may give it."""


class Server:
    """One server by its address; `role` names what it is for in messages."""

    def __init__(self, url: str, role: str, cfg: ServerConfig):
        """Raises ValueError for what is no address."""
        self.url, self.role, self.cfg = url, f"{role} ({url})", cfg
        if "@" in url:
            raise ValueError(f"the server of the {role} must be an address without a name or a password (or an @), which would be in logs and in config.yaml")
        try:
            parts = urlsplit(url)
            self.address, self.prefix = (parts.hostname, parts.port), parts.path.rstrip("/")
        except ValueError as error:
            raise ValueError(f"the server of the {role} cannot be {url}: {first_sentence(error)}") from error
        if parts.scheme not in ("http", "https") or not parts.hostname or parts.query or parts.fragment:
            raise ValueError(f"the server of the {role} must be an address such as http://host:8000, not {url}")
        self.is_encrypted = parts.scheme == "https"

    def each(self, work: Callable[[Item], Result], items: Iterable[Item]) -> list[Result]:
        """work(item) of every item in order, `max_connections` at a time; the first failure stops what has not begun."""
        with ThreadPoolExecutor(self.cfg.max_connections) as executor:
            futures = [executor.submit(work, item) for item in items]
            try:
                return [future.result() for future in futures]
            finally:
                executor.shutdown(cancel_futures=True)

    def ask(self, path: str, body: dict[str, Any] | None = None, retries: int | None = None) -> Any:
        """The answer to a GET, or to a POST of `body`; `retries` in place of the settings'.

        Raises ServerFailure where the server refuses, with what it said, and ServerGone where no answer came.
        """
        content = None if body is None else json.dumps(body).encode()
        problem, attempts = "", 1 + (self.cfg.retries if retries is None else retries)
        for attempt in range(attempts):
            if attempt:
                time.sleep(FIRST_PAUSE_SECONDS * 2 ** (attempt - 1))
            try:
                status, answer = self._exchange(path, content)
                if status == 200:
                    return json.loads(answer)
            except (OSError, http.client.HTTPException) as error:
                problem = f"{first_sentence(error)} ({type(error).__name__})"
                continue
            except ValueError:
                problem = "what came is no JSON, so it may be no vLLM server"
                continue
            problem = f"status {status}, {_said(answer)}"
            if status != 429 and status < 500:
                raise ServerFailure(f"the {self.role} refused {path}: {problem}")
        raise ServerGone(f"the {self.role} did not answer {path} in {attempts} attempts: {problem}")

    def events(self, path: str, body: dict[str, Any]) -> Iterator[Any]:
        """What a POST is answered with as server-sent events, one JSON value each, up to the end that the server announces.

        Raises ServerFailure where the server refuses or sends an error, and ServerGone where the events break off or none comes for
        timeout_seconds. To stop reading closes the connection, which ends the request at the server.
        """
        kind = http.client.HTTPSConnection if self.is_encrypted else http.client.HTTPConnection
        connection = kind(*self.address, timeout=self.cfg.timeout_seconds)
        try:
            connection.request("POST", self.prefix + path, json.dumps(body).encode(), {"Content-Type": "application/json", "Connection": "close"})
            response = connection.getresponse()
            if response.status != 200:
                kind_of_failure = ServerGone if response.status == 429 or response.status >= 500 else ServerFailure
                raise kind_of_failure(f"the {self.role} refused {path}: status {response.status}, {_said(response.read())}")
            for line in response:
                if line.strip() == b"data: [DONE]":
                    return
                if line.startswith(b"data: "):
                    yield json.loads(line.removeprefix(b"data: "))
            raise ServerGone(f"the {self.role} broke off its answer to {path}")
        except (OSError, http.client.HTTPException) as error:
            raise ServerGone(f"the {self.role} broke off its answer to {path}: {first_sentence(error)} ({type(error).__name__})") from error
        except json.JSONDecodeError as error:
            raise ServerFailure(f"the {self.role} answers {path} with what is no JSON, so it may be no vLLM server") from error
        finally:
            connection.close()

    def _exchange(self, path: str, content: bytes | None) -> tuple[int, bytes]:
        """(status, body). A socket's own timeout holds for each read, so against a server that sends a byte now and then the connection is cut."""
        kind = http.client.HTTPSConnection if self.is_encrypted else http.client.HTTPConnection
        connection, expired = kind(*self.address, timeout=self.cfg.timeout_seconds), threading.Event()
        connection.connect()
        timer = threading.Timer(self.cfg.timeout_seconds, _cut, [connection.sock, expired])
        timer.start()
        try:
            headers = {"Content-Type": "application/json", "Connection": "close"}
            connection.request("GET" if content is None else "POST", self.prefix + path, content, headers)
            response = connection.getresponse()
            status, answer = response.status, response.read()
        except (OSError, http.client.HTTPException):
            if not expired.is_set():
                raise
        finally:
            timer.cancel()
            connection.close()
        if expired.is_set():  # what was cut off may look like an answer that is whole
            raise TimeoutError(f"no whole answer within {self.cfg.timeout_seconds:g} s")
        return status, answer


def _cut(connection: socket.socket, expired: threading.Event) -> None:
    """End a connection from another thread, so that who reads from it goes on."""
    expired.set()
    with suppress(OSError):  # it has ended itself
        connection.shutdown(socket.SHUT_RDWR)


def _said(answer: bytes) -> str:
    """What a server gives as the reason of an error: vLLM's message, or the beginning of whatever it sent."""
    text = answer.decode(errors="replace")
    with suppress(ValueError, KeyError, TypeError):
        text = json.loads(text)["error"]["message"]
    return " ".join(str(text).split())[:300].rstrip(".") or "no reason given"
