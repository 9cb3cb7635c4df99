"""Where a pattern or a function of the user's grades: `python -m rollout.grader_worker SETTINGS DESCRIPTOR`, started by rollout/grader_process.py.

SETTINGS is the JSON of what rollout/grader_config.py has for the kind, DESCRIPTOR a socket inherited from the trainer. A message is four bytes, the length,
and so many of JSON. The process first says {"ready": sha256 of the function's source file, or null} or {"refused": why}; then it answers
{"completion", "answer"} by {"score": number} or {"error": why}, until the socket is closed.

Limits of the process itself, its imports included: address space, the size of a file that it writes, no core file, and processor time, renewed for each
completion; the trainer ends it when the wall clock runs out. A limit on the number of processes is not among them: the kernel counts all of the user's,
the trainer's threads too, and none of root's. In its place an audit hook refuses to start any, which reaches what Python code does and not what a
compiled library does by itself. All of this is against accidents and against what a model's text may set off in a careless function: the function
itself runs as the user, with the user's files and network.

Nothing but the standard library is imported here, so that memory_mib is the function's.
"""

import hashlib
import importlib
import inspect
import json
import math
import numbers
import resource
import signal
import socket
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from rollout.graders import regex

MIB = 1 << 20

FILE_BYTES = 64 * MIB
"""Of a file that a function writes."""

WORDS = 300
"""Characters of an error that are passed on."""

STARTING = ("os.fork", "os.forkpty", "os.posix_spawn", "os.spawn", "os.system", "os.exec", "subprocess.Popen", "pty.spawn")
"""Audit events of starting a process."""

Score = Callable[[str, str], Any]


class Refused(Exception):  # noqa: N818 - the sentence is for users
    """A function that cannot grade."""


def send(connection: socket.socket, record: dict[str, Any]) -> None:
    """Write a message. Raises OSError where the other side is gone or, with a timeout on the socket, does not read."""
    message = json.dumps(record).encode()
    connection.sendall(len(message).to_bytes(4, "big") + message)


def receive(connection: socket.socket, until: float = math.inf) -> dict[str, Any]:
    """Read a message. until: time.monotonic() at which TimeoutError is raised. Raises EOFError where the other side is gone."""
    return json.loads(_read(connection, int.from_bytes(_read(connection, 4, until), "big"), until))


def _read(connection: socket.socket, count: int, until: float) -> bytes:
    data = bytearray()
    while len(data) < count:
        if until < math.inf:
            connection.settimeout(max(1e-3, until - time.monotonic()))
        part = connection.recv(min(count - len(data), MIB))
        if not part:
            raise EOFError
        data += part
    return bytes(data)


def main() -> None:
    """Serve the socket that the command line names."""
    settings, connection = json.loads(sys.argv[1]), socket.socket(fileno=int(sys.argv[2]))
    connection.set_inheritable(False)
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)  # a scheduler sends them to all processes of a job, and the trainer still ends its step
    _limit(settings)
    try:
        score, source_hash = _load(settings)
    except BaseException as error:
        send(connection, {"refused": _words(error)})
        return
    send(connection, {"ready": source_hash})
    while True:
        try:
            asked = receive(connection)
        except (EOFError, OSError):
            return
        _renew_processor_time(settings["seconds"])
        send(connection, _graded(score, asked["completion"], asked["answer"]))


def _graded(score: Score, completion: str, answer: str) -> dict[str, Any]:
    """What is said of one completion."""
    try:
        return {"score": _checked(score(completion, answer))}
    except BaseException as error:  # SystemExit too
        return {"error": _words(error)}


def _checked(value: Any) -> float:
    if not isinstance(value, bool | numbers.Real):
        raise Refused(f"its score is no number but {type(value).__name__}")
    if not 0 <= value <= 1:
        raise Refused(f"its score {float(value)} is not from 0 to 1")
    return float(value)


def _load(settings: dict[str, Any]) -> tuple[Score, str | None]:
    """What grades, and the sha256 of its source."""
    if "pattern" in settings:
        return partial(regex, pattern=settings["pattern"]), None
    name, _, attribute = settings["function"].partition(":")
    module = importlib.import_module(name)
    if attribute not in vars(module):
        raise Refused(f"{name} has no function {attribute}")
    function = vars(module)[attribute]
    if not callable(function):
        raise Refused(f"{attribute} of {name} is no function")
    if inspect.iscoroutinefunction(function):
        raise Refused(f"{attribute} of {name} is a coroutine function: write it without async")
    signature = inspect.signature(function)
    try:
        signature.bind("completion", "answer")
    except TypeError as error:
        raise Refused(f"{attribute}{signature} of {name} cannot be called with two arguments, completion and answer") from error
    home = sys.modules.get(inspect.unwrap(function).__module__, module) if inspect.isfunction(function) else module
    source = vars(home).get("__file__")  # a module that is part of the interpreter has none
    return function, None if source is None else hashlib.sha256(Path(source).read_bytes()).hexdigest()


def _limit(settings: dict[str, Any]) -> None:
    memory = settings["memory_mib"] * MIB
    resource.setrlimit(resource.RLIMIT_AS, (memory, memory))
    resource.setrlimit(resource.RLIMIT_FSIZE, (FILE_BYTES, FILE_BYTES))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    if not settings.get("subprocesses", False):
        sys.addaudithook(_refuse_processes)


def _refuse_processes(event: str, _arguments: tuple[Any, ...]) -> None:
    if event in STARTING:
        raise PermissionError("it may start no processes (subprocesses=true lets it)")


def _renew_processor_time(seconds: float) -> None:
    """As much as the wall clock allows one thread, and a second; several threads use it up sooner."""
    hard = resource.getrlimit(resource.RLIMIT_CPU)[1]
    resource.setrlimit(resource.RLIMIT_CPU, (math.ceil(time.process_time() + seconds) + 1, hard))


def _words(error: BaseException) -> str:
    """An error as part of a sentence: its class, unless it is one of ours, and the beginning of the first line of its message."""
    try:
        message = (str(error).strip().splitlines() or [""])[0].rstrip(".")[:WORDS]
    except Exception:  # an exception of the user's that cannot say what it is
        message = ""
    if isinstance(error, Refused):
        return message
    if isinstance(error, MemoryError):
        return "it needs more memory than memory_mib"
    return f"{type(error).__name__}: {message}" if message else type(error).__name__


if __name__ == "__main__":
    main()
