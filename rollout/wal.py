"""The token log: every sampled token is on record before it is used, so that a killed sampler loses nothing.

    RUN/log/step-000012/NAME.wal      segment of one sampler process (NAME) for the rollouts of one training step; appended to, never changed

Format (schema version 1). A segment is a sequence of frames, one per decode step, each written by a single `write`:

    header   "<4sIQII": magic b"WAL1", number of records, key, policy step, CRC-32 of the fields before and of the records
    records  of RECORD: request, sample, position, token, log-probability, CRC-32 of the prompt's tokens (uint32)

`position` counts the completion's tokens from 0. `key` is what a token depends on besides request, sample, position and prompt: weights, seed and
sampling settings (`token_key`). A segment stands alone: a process that continues a completion logs again the tokens that it was given, so the tokens of
one completion are always read from one segment, and what a replaced process may write late never mixes with what its successor sampled.

`write` survives the process's death, in the page cache; only lost power can take it back, so a thread calls fsync every half second. Where a write
fails (a full disk) the tokens of that decode step are not used: the segment is cut back to its last whole frame and the sampler stops.

Published designs log per request (DeepSeek-V4, arXiv:2606.19348, section 5.2.3); one write for all rows of a decode step costs less. The rejected
alternative, sampling again with the same random numbers, gives the same tokens for the price of all of them.
"""

import hashlib
import os
import shutil
import struct
import threading
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from rollout.files import fsync_folder

MAGIC = b"WAL1"
HEADER = struct.Struct("<4sIQI")
CHECKSUM = struct.Struct("<I")
RECORD = np.dtype([("request", "<u8"), ("sample", "<u4"), ("position", "<u4"), ("token", "<u4"), ("logprob", "<f4"), ("prompt", "<u4")])

FSYNC_SECONDS = 0.5
"""What lost power can take back at most."""

Key = tuple[int, int]
"""Request and sample."""


@dataclass(frozen=True, slots=True)
class Frame:
    """One decode step: the key and policy step of its tokens, and its RECORD rows."""

    key: int
    policy_step: int
    records: np.ndarray


@dataclass(slots=True)
class LoggedCompletion:
    """What a segment holds of one completion, from its first token on."""

    prompt: int
    tokens: list[int]
    logprobs: list[float]


def token_key(*parts: Any) -> int:
    """64 bits of what tokens depend on: pass the weights' hash, the seed, and the sampling settings."""
    return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:8], "little")


def prompt_checksum(tokens: tuple[int, ...]) -> int:
    return zlib.crc32(np.asarray(tokens, dtype="<u4").tobytes())


def completion_records(request: int, sample: int, prompt: tuple[int, ...], first: int, pairs: list[tuple[int, float]]) -> np.ndarray:
    """RECORD rows of one completion's (token, log-probability) pairs from position `first` on."""
    records = np.empty(len(pairs), dtype=RECORD)
    records["request"], records["sample"], records["prompt"] = request, sample, prompt_checksum(prompt)
    records["position"] = np.arange(first, first + len(pairs))
    records["token"], records["logprob"] = [token for token, _ in pairs], [logprob for _, logprob in pairs]
    return records


class SegmentWriter:
    """Appends frames to one segment. Of one process and thread."""

    def __init__(self, path: Path):
        """Takes up a segment where its last whole frame ends. Raises ValueError where the file cannot be written."""
        self.path = path
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self.file = os.open(path, os.O_WRONLY | os.O_CREAT, 0o644)
            self.size = whole_size(path)
            os.ftruncate(self.file, self.size)
            os.lseek(self.file, self.size, os.SEEK_SET)
            for folder in (path.parent, path.parent.parent):  # lost power must not take the file's name with all that is in it
                fsync_folder(folder)
        except OSError as error:
            raise ValueError(f"the rollout log {path} cannot be written: {error.strerror}") from error
        self.closed, self.problem = threading.Event(), None
        self.syncer = threading.Thread(target=self._sync, daemon=True)
        self.syncer.start()

    def append(self, key: int, policy_step: int, records: np.ndarray) -> None:
        """Log one decode step; on return its tokens may be used. Raises ValueError where it could not be written: they may not."""
        self._require_durable()
        head = HEADER.pack(MAGIC, len(records), key, policy_step)
        body = records.tobytes()
        frame = head + CHECKSUM.pack(zlib.crc32(body, zlib.crc32(head))) + body
        try:
            written = os.write(self.file, frame)
            while written < len(frame):  # a disk that fills up takes a part, and refuses the rest
                written += os.write(self.file, frame[written:])
        except OSError as error:
            os.ftruncate(self.file, self.size)
            os.lseek(self.file, self.size, os.SEEK_SET)
            raise ValueError(f"the rollout log {self.path} cannot be written ({error.strerror}), and nothing is sampled unlogged: make room") from error
        self.size += len(frame)

    def close(self) -> None:
        """Make everything durable and let go of the file. Raises ValueError where that failed, now or since the last append."""
        self.closed.set()
        self.syncer.join()
        try:
            os.fsync(self.file)
        except OSError as error:
            self.problem = error.strerror
        os.close(self.file)
        self._require_durable()

    def _require_durable(self) -> None:
        if self.problem is not None:
            raise ValueError(f"the rollout log {self.path} cannot be made durable: {self.problem}")

    def _sync(self) -> None:
        synced = -1
        while not self.closed.wait(FSYNC_SECONDS):
            if self.size != synced:
                synced = self.size
                try:
                    os.fsync(self.file)
                except OSError as error:  # of another thread than the sampler's: the next append raises it, or `close`
                    self.problem = error.strerror
                    return


class SegmentReader:
    """Reads what a process appends to its segment, as it comes."""

    def __init__(self, path: Path):
        self.path, self.offset = path, 0

    def new_frames(self) -> list[Frame]:
        """Whole frames that were appended since the last call; a torn or damaged one, and all after it, are not there."""
        try:
            with self.path.open("rb") as file:
                file.seek(self.offset)
                data = file.read()
        except FileNotFoundError:
            return []
        frames = list(_frames(data))
        self.offset += _end_of(frames)
        return [frame for frame, _ in frames]


def whole_size(path: Path) -> int:
    """Bytes of a segment up to the end of its last whole frame."""
    return _end_of(list(_frames(path.read_bytes())))


def add_frames(completions: dict[Key, LoggedCompletion], frames: list[Frame], key: int) -> None:
    """Add one segment's frames to what is known from it. Frames of another key are passed over.

    A process that took up a completion again in the same segment logs it again from its beginning: the later one counts.
    """
    for frame in frames:
        if frame.key != key:
            continue
        for request, sample, position, token, logprob, prompt in frame.records.tolist():
            if position == 0:
                completions[request, sample] = LoggedCompletion(prompt, [token], [logprob])
                continue
            known = completions.get((request, sample))
            if known is not None and known.prompt == prompt and position == len(known.tokens):
                known.tokens.append(token)
                known.logprobs.append(logprob)


class RolloutLog:
    """The segments of a run, by training step."""

    def __init__(self, folder: Path):
        self.folder = folder

    def segment(self, step: int, name: str) -> Path:
        return self.folder / f"step-{step:06d}" / f"{name}.wal"

    def completions(self, step: int, key: int) -> dict[Key, LoggedCompletion]:
        """What is logged for a step under a key: of each completion the segment that holds most of it."""
        found: dict[Key, LoggedCompletion] = {}
        for path in sorted(self.segment(step, "any").parent.glob("*.wal")):
            of_segment: dict[Key, LoggedCompletion] = {}
            add_frames(of_segment, SegmentReader(path).new_frames(), key)
            for name, completion in of_segment.items():
                if name not in found or len(completion.tokens) > len(found[name].tokens):
                    found[name] = completion
        return found

    def trim(self, step: int) -> None:
        """Delete the segments of the steps before one, which will not be asked for again."""
        for path in self.folder.glob("step-*"):
            if int(path.name.removeprefix("step-")) < step:
                shutil.rmtree(path, ignore_errors=True)


def _end_of(frames: list[tuple[Frame, int]]) -> int:
    return frames[-1][1] if frames else 0


def _frames(data: bytes) -> Iterator[tuple[Frame, int]]:
    """Whole frames from the beginning of some bytes, each with where it ends, up to the first that is none."""
    begin = 0
    while begin + HEADER.size + CHECKSUM.size <= len(data):
        magic, count, key, policy_step = HEADER.unpack_from(data, begin)
        body = begin + HEADER.size + CHECKSUM.size
        end = body + count * RECORD.itemsize
        if magic != MAGIC or end > len(data):
            return
        (checksum,) = CHECKSUM.unpack_from(data, begin + HEADER.size)
        if zlib.crc32(data[body:end], zlib.crc32(data[begin : begin + HEADER.size])) != checksum:
            return
        yield Frame(key, policy_step, np.frombuffer(data, RECORD, count, body)), end
        begin = end
