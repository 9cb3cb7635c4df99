"""Requests to a server: addresses, deadlines for whole answers, and answers that are none. The servers here are sockets that send given bytes."""

import socket
import threading
import time
from collections.abc import Callable, Iterator

import pytest

from rollout.config import ServerConfig
from rollout.server import Server, ServerFailure

HEAD = b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n"


@pytest.fixture
def sender() -> Iterator[Callable[..., Server]]:
    """sender([b"HTTP/1.1 ...", b"{"], pause=0.02, retries=0): a client of a socket that answers each connection with these pieces."""
    listeners = []

    def start(pieces: list[bytes], pause: float = 0.0, **settings) -> Server:
        listener = socket.create_server(("127.0.0.1", 0))
        listeners.append(listener)

        def answer() -> None:
            while True:
                try:
                    connection, _ = listener.accept()
                    with connection:
                        connection.recv(1 << 16)
                        for piece in pieces:
                            connection.sendall(piece)
                            time.sleep(pause)
                except OSError:
                    if listener.fileno() < 0:
                        return

        threading.Thread(target=answer, daemon=True).start()
        cfg = ServerConfig(**{"retries": 0, "timeout_seconds": 5.0} | settings)
        return Server(f"http://127.0.0.1:{listener.getsockname()[1]}", "teacher of law", cfg)

    yield start
    for listener in listeners:
        listener.shutdown(socket.SHUT_RDWR)  # wakes the thread that waits in accept
        listener.close()


def test_an_answer_is_the_json_that_was_sent(sender):
    assert sender([HEAD % 12, b'{"a":', b' [1,2]}']).ask("/v1/models") == {"a": [1, 2]}


def test_an_answer_in_chunks_is_put_together(sender):
    pieces = [b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n", b"5\r\n[1,2,\r\n", b"2\r\n3]\r\n", b"0\r\n\r\n"]
    assert sender(pieces).ask("/v1/models") == [1, 2, 3]


@pytest.mark.parametrize("url", ["law", "localhost:8000", "ftp://host:1", "http://", "http://host:port", "http://user:secret@host:80", "http://host:80/?a=b"])
def test_what_is_no_address_is_refused(url):
    with pytest.raises(ValueError, match=r"the server of the teacher of law (must be|cannot be)"):
        Server(url, "teacher of law", ServerConfig())


def test_an_answer_that_trickles_is_a_failure(sender):
    """Each byte comes within a socket's timeout; the answer as a whole does not."""
    server = sender([HEAD % 1000, *[b" "] * 1000], pause=0.02, timeout_seconds=0.3)
    with pytest.raises(ServerFailure, match=r"did not answer /v1/models in 1 attempts: no whole answer within 0\.3 s"):
        server.ask("/v1/models")


def test_a_head_that_trickles_is_a_failure(sender):
    server = sender([b"HTTP/1.1 200 OK\r\n", *[b"X: 1\r\n"] * 1000], pause=0.02, timeout_seconds=0.3)
    with pytest.raises(ServerFailure, match=r"did not answer /v1/models in 1 attempts: no whole answer within 0\.3 s"):
        server.ask("/v1/models")


@pytest.mark.parametrize("pieces", [[HEAD % 1000, b"{}"], [b"HTTP/1.1 200"], [b""], [b"\x00\xff\r\n\r\n"]])
def test_an_answer_that_is_cut_off_or_no_http_is_a_failure_after_all_attempts(sender, pieces):
    with pytest.raises(ServerFailure, match=r"the teacher of law \(http.*\) did not answer /v1/models in 2 attempts"):
        sender(pieces, retries=1).ask("/v1/models")


@pytest.mark.parametrize("body", [b"<html>", b"{", b'"\xff"'])
def test_an_answer_that_is_no_json_is_a_failure(sender, body):
    with pytest.raises(ServerFailure, match="did not answer /v1/models in 1 attempts: what came is no JSON"):
        sender([HEAD % len(body), body]).ask("/v1/models")


def test_a_redirection_is_not_followed(sender):
    with pytest.raises(ServerFailure, match="refused /v1/models: status 307, no reason given"):
        sender([b"HTTP/1.1 307 Temporary Redirect\r\nLocation: http://elsewhere/\r\nContent-Length: 0\r\n\r\n"]).ask("/v1/models")


def test_the_environments_proxy_is_not_asked(sender, monkeypatch):
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    assert sender([HEAD % 2, b"{}"]).ask("/v1/models") == {}


def test_what_has_not_begun_stops_at_the_first_failure(sender):
    server, done = sender([HEAD % 2, b"{}"], max_connections=2), []

    def work(number: int) -> None:
        done.append(number)
        if number == 0:
            raise ServerFailure("the first")
        time.sleep(0.05)

    with pytest.raises(ServerFailure, match="the first"):
        server.each(work, range(1000))
    assert len(done) < 100
