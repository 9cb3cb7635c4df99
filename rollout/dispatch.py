"""Completions spread over vLLM servers, until all are done or no server is left.

Each server has as many connections as the settings say, one completion on each, taken from one queue. Tokens that arrive are not believed at once: a
server that is killed and started again under its address draws from the weights of its command line. So a keeper of each server asks for its version
label again and again, and tokens count only once a label was read after they arrived that is the one of before; they are then logged
(rollout/wal.py) and belong to their completion. A server with another label loses what it gave since, and is given the weights again, once.

A completion that is cut off, whoever cut it, goes on from its last token that counts, at whichever server is free, and is never begun anew. Its random
numbers have a key of (seed, request, sample, position where it goes on): drawn with the first key again, they would repeat from there.
"""

import hashlib
import logging
import threading
from collections import deque
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass, field

import numpy as np

from rollout.cohort import AppendToLog, Completion
from rollout.config import SamplingConfig
from rollout.server import ServerFailure, ServerGone
from rollout.vllm_server import Draw, ServedWeights, StaleWeights, VllmServer

KEEP_SECONDS = 0.5
"""Between two looks at a server's version; what a killed trainer can lose of its completions at most."""

LOG = logging.getLogger(__name__)


@dataclass(slots=True, eq=False)
class Stream:
    """A completion that a server works at: what arrived and does not count yet, and whether that is the end of it, or was cut off."""

    completion: Completion
    arrived: list[tuple[int, float]] = field(default_factory=list)
    is_whole: bool = False
    is_broken: bool = False
    is_void: bool = False


@dataclass(slots=True, eq=False)
class Place:
    """One server with its streams. It takes no new ones while it is in doubt; `is_busy` while it is looked at, `gone` with the reason why."""

    server: VllmServer
    streams: list[Stream] = field(default_factory=list)
    in_doubt: bool = False
    is_busy: bool = False
    was_given_again: bool = False
    failures: int = 0
    gone: str | None = None

    @property
    def is_due(self) -> bool:
        """Whether looking at it now would let something go on."""
        return any(stream.is_broken for stream in self.streams) or (bool(self.streams) and all(stream.is_whole for stream in self.streams))


class Dispatch:
    """One call of a sampler: its completions, the servers, and what has come of them."""

    def __init__(self, servers: list[VllmServer], weights: ServedWeights, cfg: SamplingConfig, seed: int, end_tokens: tuple[int, ...]):
        self.places = [Place(server) for server in servers]
        self.weights, self.cfg, self.seed, self.end_tokens = weights, cfg, seed, end_tokens
        self.changed = threading.Condition()
        self.waiting: deque[Completion] = deque()
        self.remaining = 0
        self.problem: Exception | None = None
        self.append: AppendToLog | None = None

    def run(self, completions: list[Completion], append: AppendToLog | None = None) -> None:
        """Fill the completions. Raises ServerFailure where a server's answer cannot be right or all are gone, and ValueError where the log fails."""
        self.append = append
        if append is not None:
            given = [completion.records(0, completion.given) for completion in completions]
            if any(map(len, given)):
                append(np.concatenate(given))
        self.waiting.extend(completion for completion in completions if not completion.is_done(self.end_tokens, self.cfg))
        self.remaining = len(self.waiting)
        for place in self.places:
            count = min(place.server.server.cfg.max_connections, self.remaining)
            for work in [self._keep] + [self._work] * count:
                threading.Thread(target=self._guarded, args=(work, place), daemon=True).start()  # one that waits for a hung server is left behind
        with self.changed:
            self.changed.wait_for(lambda: self._is_over and not any(place.is_busy for place in self.places))
        if self.problem is not None:
            raise self.problem

    @property
    def _is_over(self) -> bool:
        return self.remaining == 0 or self.problem is not None

    def _guarded(self, work: Callable[[Place], None], place: Place) -> None:
        try:
            work(place)
        except Exception as error:  # of another thread than the caller's: `run` raises it
            with self.changed:
                self.problem, place.is_busy = self.problem or error, False
                self.changed.notify_all()

    def _work(self, place: Place) -> None:
        """One connection: take a completion, read what the server sends, and again."""
        while True:
            with self.changed:
                self.changed.wait_for(lambda: self._is_over or place.gone is not None or (self.waiting and not place.in_doubt))
                if self._is_over or place.gone is not None:
                    return
                stream = Stream(self.waiting.popleft())
                place.streams.append(stream)
            try:
                with closing(place.server.draw(self._draw(stream.completion))) as events:
                    for arrived in events:
                        with self.changed:
                            if stream.is_void or self._is_over:
                                break
                            stream.arrived += arrived
                self._end(place, stream, is_whole=True)
            except ServerGone as failure:
                LOG.warning("%s", failure)
                self._end(place, stream, is_whole=False)

    def _end(self, place: Place, stream: Stream, is_whole: bool) -> None:
        with self.changed:
            if not stream.is_void:
                stream.is_whole, stream.is_broken = is_whole, not is_whole
                place.in_doubt |= not is_whole
            self.changed.notify_all()

    def _keep(self, place: Place) -> None:
        """Look at a server's version now and then, and have what arrived before count, or not."""
        while True:
            with self.changed:
                self.changed.wait_for(lambda: self._is_over or place.is_due, timeout=KEEP_SECONDS)
                if self._is_over:
                    return
                seen = [(stream, len(stream.arrived), stream.is_whole) for stream in place.streams]
            if not any(count or is_whole or stream.is_broken for stream, count, is_whole in seen):
                continue
            version = self._find_version(place)
            with self.changed:
                if self._is_over or place.gone is not None:
                    return
                place.is_busy = True
            if version != place.server.version:
                self._restore(place, version)
            with self.changed:
                self._count(place, [(stream, count, is_whole) for stream, count, is_whole in seen if not stream.is_void])
                place.in_doubt = place.is_busy = False
                self.changed.notify_all()
                if place.gone is not None:
                    return

    def _find_version(self, place: Place) -> str | None:
        """The server's version; None where it is gone. While a server does not answer, others may go on with its completions."""
        try:
            return place.server.find_version(retries=0)
        except ServerGone as failure:
            self._void(place)
            if self._fails_too_often(place, 0):
                return self._leave(place, failure)
        try:
            return place.server.find_version()
        except ServerGone as failure:
            return self._leave(place, failure)

    def _count(self, place: Place, seen: list[tuple[Stream, int, bool]]) -> None:
        """What was seen of a server's streams before its version was: log it, and give it to the completions. Raises ServerFailure where nothing comes."""
        if self.append is not None and seen:
            records = [stream.completion.records(len(stream.completion.tokens), stream.arrived[:count]) for stream, count, _ in seen]
            self.append(np.concatenate(records))
        for stream, count, is_whole in seen:
            stream.completion.tokens += [token for token, _ in stream.arrived[:count]]
            stream.completion.logprobs += [logprob for _, logprob in stream.arrived[:count]]
            del stream.arrived[:count]
            if is_whole:
                assert stream.completion.is_done(self.end_tokens, self.cfg), "the server was asked for what is missing"
                self.remaining -= 1
        broken = [stream for stream, _, _ in seen if stream.is_broken]
        if broken and self._fails_too_often(place, sum(count for _, count, _ in seen)):
            raise ServerFailure(f"the {place.server.role} breaks off every completion: look at its log")
        self._give_back(broken)
        over = [*broken, *(stream for stream, _, is_whole in seen if is_whole)]
        place.streams = [stream for stream in place.streams if stream not in over]

    def _fails_too_often(self, place: Place, num_counted: int) -> bool:
        """Note that a server failed once more, with so many tokens that count; whether it did more often than the settings allow without any."""
        place.failures = 0 if num_counted else place.failures + 1
        return place.failures > place.server.server.cfg.retries

    def _restore(self, place: Place, version: str) -> None:
        """Give a server that has lost the weights these again, once; where another rank has done so, take its version over."""
        self._void(place)
        try:
            if version.startswith(self.weights.label + "."):
                place.server.version = version
                place.server.require_probe(self.weights)
                return
            if place.was_given_again:
                raise StaleWeights(f"the {place.server.role} has lost the weights of step {self.weights.policy_step} twice: see what restarts it")
            LOG.warning("the %s was started again: it is given the weights of step %d", place.server.role, self.weights.policy_step)
            place.was_given_again = True
            place.server.give(self.weights)
        except ServerGone as failure:
            self._leave(place, failure)

    def _void(self, place: Place) -> None:
        """Forget what a server has given and does not count."""
        with self.changed:
            for stream in place.streams:
                stream.is_void = True
            self._give_back(place.streams)
            place.streams, place.in_doubt = [], True
            self.changed.notify_all()

    def _give_back(self, streams: list[Stream]) -> None:
        self.waiting.extendleft(stream.completion for stream in reversed(streams))

    def _leave(self, place: Place, failure: ServerGone) -> None:
        """Go on without a server. Raises ServerGone, naming all, where it was the last."""
        with self.changed:
            place.gone = str(failure)
            self.changed.notify_all()
            if all(other.gone is not None for other in self.places):
                raise ServerGone(f"no vLLM server is left that could draw: {'; '.join(other.gone for other in self.places)}")
        LOG.warning("%s: going on without it in this step", failure)

    def _draw(self, completion: Completion) -> Draw:
        tokens = [*completion.prompt.tokens, *completion.tokens]
        missing = self.cfg.max_new_tokens - len(completion.tokens)
        key = f"{self.seed} {completion.prompt.request} {completion.sample} {len(completion.tokens)}"
        seed = int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "little") >> 1
        return Draw(tokens=tokens, max_tokens=missing, seed=seed, sampling=self.cfg, end_tokens=self.end_tokens)
