"""Heartbeats: a rank that is dead, stopped or out of reach ends the whole job, by name, within launch.heartbeat_seconds and LEAVE_SECONDS, whoever launched it.

A collective alone would not: gloo sees a closed connection, but not a stopped process or a cut cable, NCCL not even the first, and none of them says whose.
So a thread of each rank, the teller, writes every heartbeat_seconds / BEATS to the store at which the ranks met (the launcher's, or rank 0's) where it
runs and how often it has written, and reads the same of rank 0 and the NEIGHBOURS ranks after it. Clocks are never compared: a rank is silent for as long as
its number stays the same on the reader's own clock, which does not run while the reader itself is stopped. A rank that fails leaves its sentence there,
so that the others end with this and with its exit code, rather than with the connection that it broke; one that ends normally says so.

A call to a store whose host is gone may never return; a second thread, the watcher, talks to nobody and ends the process when the teller is
stuck. It also ends a process that is still there LEAVE_SECONDS after another has failed, since its main thread waits for one that will not come.

A rank that has not begun is waited for as long as the ranks' meeting is (launch.timeout_minutes); once they have met, one that has written nothing is silent
too. Compute without the interpreter's lock stops no thread.

    opd/STARTS/RANK     {"host", "pid", "beats", "ended"} of a rank; STARTS: how often torchrun has started the ranks again
    opd/STARTS/failure  {"rank", "code", "sentence"}: the first failure
"""

import json
import os
import socket
import sys
import threading
import time
from dataclasses import asdict, dataclass
from types import TracebackType
from typing import Any

from opd.distributed import connect_store, has_met, is_broken_connection, is_store_of_rank_0, launched_as, start_number
from opd.errors import INTERRUPTED, USER_ERROR, Preempted, RankLost
from rollout.errors import first_sentence

BEATS = 20
"""In heartbeat_seconds."""
QUIET_BEATS = 2.5
"""After so many without a word a rank is taken for dead, where a connection is broken too."""
NEIGHBOURS = 16
POST_SECONDS = 2.0
LEAVE_SECONDS = 10.0
AGAIN = "the same command goes on from the last checkpoint"


@dataclass(frozen=True, slots=True, kw_only=True)
class Failure:
    """Why a job ends. rank: whose failure it is. code: the exit code for all. sentence: what the user reads."""

    rank: int
    code: int
    sentence: str


@dataclass(slots=True)
class Peer:
    """What is known of another rank: where it runs (empty until it has begun), how often it has written, and since how many seconds it has not."""

    where: str = ""
    beats: int = -1
    silent: float = 0.0
    has_ended: bool = False

    def hear(self, record: dict[str, Any], passed: float) -> None:
        """Take note of its record; passed: seconds since it was last read."""
        self.silent = 0.0 if record["beats"] != self.beats or record["ended"] else self.silent + passed
        self.where, self.beats, self.has_ended = f"pid {record['pid']} on {record['host']}", record["beats"], record["ended"]


class Heartbeat:
    """A context in which a rank tells the others that it lives, and ends when one of them does not; a single process has nobody to tell."""

    def __init__(self, seconds: float):
        self.rank, self.count = launched_as()
        self.seconds, self.pause = seconds, seconds / BEATS
        self.peers = {number: Peer() for number in {0, *((self.rank + offset) % self.count for offset in range(1, NEIGHBOURS + 1))} - {self.rank}}
        self.failure: Failure | None = None  # of any rank
        self.own: Failure | None = None  # to be left in the store
        self.beats, self.is_told, self.read_at = 0, False, time.monotonic()
        self.unheard = 0.0  # seconds since the store has answered
        self.is_ending, self.is_explaining = False, False
        self.woken, self.closed = threading.Event(), threading.Event()
        self.store = None
        self.teller = threading.Thread(target=self._tell, daemon=True)

    def __enter__(self) -> "Heartbeat":
        if self.peers:
            self.teller.start()
            threading.Thread(target=self._watch, daemon=True).start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _trace: TracebackType | None) -> None:
        """Say how this rank ends. Raises RankLost in place of the error of a connection that another rank's end has broken."""
        if not self.peers:
            return
        if is_broken_connection(error):
            failure = self._explain(error)
            self._close(failure)
            raise RankLost(failure.sentence, failure.code) from error
        if error is None or isinstance(error, Preempted):
            return self._close(None)
        code = USER_ERROR if isinstance(error, ValueError) else INTERRUPTED if isinstance(error, KeyboardInterrupt) else 1
        what = first_sentence(error) if code == USER_ERROR else "interrupted" if code == INTERRUPTED else f"{kind.__name__}: {first_sentence(error)}"
        self._close(Failure(rank=self.rank, code=code, sentence=f"rank {self.rank} (pid {os.getpid()} on {socket.gethostname()}) ended: {what}"))

    def _explain(self, error: BaseException) -> Failure:
        """Which rank has broken a connection: one that says why, else one that is silent, else one that has ended."""
        self.is_explaining = True
        begun = time.monotonic()
        while time.monotonic() - begun < (QUIET_BEATS + 3) * self.pause:
            quiet = [number for number, peer in self.peers.items() if peer.silent > QUIET_BEATS * self.pause]
            if self.failure is not None:
                return self.failure
            if quiet:
                return self._silence(quiet[0], "is gone: its connection is broken, and it")
            time.sleep(self.pause / 4)
        for number, peer in self.peers.items():
            if peer.has_ended:
                return Failure(rank=number, code=1, sentence=f"rank {number} ({peer.where}) has ended while others still waited for it; {AGAIN}")
        if self.unheard > QUIET_BEATS * self.pause:
            return self._no_store()
        return Failure(rank=self.rank, code=1, sentence=f"a connection between ranks is broken ({first_sentence(error)}); {AGAIN}")

    def _silence(self, number: int, what: str = "") -> Failure:
        peer = self.peers[number]
        where = f"rank {number} ({peer.where or 'it is not known where'}) {what}".rstrip()
        return Failure(rank=number, code=1, sentence=f"{where} has not been heard of for {peer.silent:.1f} s; {AGAIN}")

    def _no_store(self) -> Failure:
        where = f" ({self.peers[0].where})" if 0 in self.peers and self.peers[0].where else ""
        holder = f"rank 0{where}" if is_store_of_rank_0() else f"the launcher of rank 0{where}"
        sentence = f"{holder}, whose store the ranks meet at, has not been heard of for {self.unheard:.0f} s: it, its host or the network is gone"
        return Failure(rank=0, code=1, sentence=f"{sentence}; {AGAIN}")

    def _close(self, failure: Failure | None) -> None:
        """Leave the failure and the last word in the store, as far as it answers; where it ends with this process, once the others have read them."""
        if self.failure is None:
            self.own = failure
        self.is_ending = True
        begun = time.monotonic()
        self.woken.set()
        self.teller.join(POST_SECONDS)
        holds_store = self.rank == 0 and is_store_of_rank_0()
        while holds_store and not self.teller.is_alive() and time.monotonic() - begun < LEAVE_SECONDS and self._is_awaited():
            time.sleep(self.pause / 4)
            self._exchange()
        self.closed.set()

    def _is_awaited(self) -> bool:
        gone = None if self.failure is None else self.failure.rank
        return any(peer.where and not peer.has_ended and number != gone and peer.silent < QUIET_BEATS * self.pause for number, peer in self.peers.items())

    def _tell(self) -> None:
        while True:
            is_last = self.is_ending
            self._exchange()
            if is_last:
                return
            self.woken.wait(self.pause)
            self.woken.clear()

    def _exchange(self) -> None:
        """Write, and read the others; of a store that does not answer the watcher takes note."""
        try:
            self._talk()
        except RuntimeError:  # torch's errors of a connection; the next one may succeed
            self.store = None

    def _talk(self) -> None:
        if self.store is None:
            self.store = connect_store(self.seconds)
        self.beats += 1
        record = {"host": socket.gethostname(), "pid": os.getpid(), "beats": self.beats, "ended": self.is_ending}
        self.store.set(_key(self.rank), json.dumps(record))
        known = [number for number, peer in self.peers.items() if peer.where or self.store.check([_key(number)])]
        texts = self.store.multi_get([_key(number) for number in known]) if known else []
        now = time.monotonic()
        passed, self.read_at = min(now - self.read_at, 2 * self.pause), now
        for number, text in zip(known, texts, strict=True):
            self.peers[number].hear(json.loads(text), passed)
        if has_met():
            for number in self.peers.keys() - known:
                self.peers[number].silent += passed
        silent = [number for number, peer in self.peers.items() if peer.silent > self.seconds]
        if silent and self.own is None:
            self.own = self._silence(silent[0])
        if self.own is not None:
            self.store.compare_set(_key("failure"), "", json.dumps(asdict(self.own)))
        self.failure = read_failure(self.store)
        self.is_told = True

    def _watch(self) -> None:
        """End this process when the store, or a failure of another rank, leaves it nothing to wait for."""
        before, failed = time.monotonic(), 0.0
        while not self.closed.wait(self.pause):
            now = time.monotonic()
            passed, before = min(now - before, 2 * self.pause), now  # stopped, it did not wait
            is_begun = self.beats > 0 or has_met()
            self.unheard, self.is_told = 0.0 if self.is_told or not is_begun else self.unheard + passed, False
            failed = failed + passed if self.failure is not None else 0.0
            if self.is_ending or self.is_explaining:
                continue
            if self.failure is not None and (failed > LEAVE_SECONDS or self.own is not None):
                self._end(self.failure)
            if self.unheard > self.seconds:
                self._end(self._no_store())

    def _end(self, failure: Failure) -> None:
        print(f"opd: {failure.sentence}" if self.rank == 0 else f"[rank {self.rank}] opd: {failure.sentence}", file=sys.stderr, flush=True)
        os._exit(failure.code)


def read_failure(store: Any) -> Failure | None:
    """The first failure that a rank left in a store."""
    key = _key("failure")
    return Failure(**json.loads(store.get(key))) if store.check([key]) else None


def _key(name: int | str) -> str:
    return f"opd/{start_number()}/{name}"
