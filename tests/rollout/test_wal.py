"""The token log: what was written is read back, and nothing that is torn, damaged, of another key or of another prompt is."""

import errno
import os
import resource
import signal
import struct
import subprocess
import sys
import time
import zlib

import numpy as np
import pytest

from rollout.wal import RECORD, RolloutLog, SegmentReader, SegmentWriter, add_frames, prompt_checksum, token_key, whole_size

KEY = token_key("weights", 0, 1.0)
PROMPT = prompt_checksum((1, 5, 9))


def step_records(position: int, requests: int = 3) -> np.ndarray:
    rows = [(request, 0, position, 100 * request + position, -0.5 * position, PROMPT) for request in range(requests)]
    return np.array(rows, dtype=RECORD)


def write(path, positions, key: int = KEY) -> None:
    writer = SegmentWriter(path)
    for position in positions:
        writer.append(key, 7, step_records(position))
    writer.close()


def tokens(log: RolloutLog, key: int = KEY) -> dict:
    return {name: completion.tokens for name, completion in log.completions(0, key).items()}


@pytest.fixture
def log(tmp_path) -> RolloutLog:
    return RolloutLog(tmp_path / "log")


def test_a_segment_gives_back_what_was_appended(log):
    write(log.segment(0, "a"), range(4))
    assert tokens(log) == {(request, 0): [100 * request + position for position in range(4)] for request in range(3)}
    assert log.completions(0, KEY)[1, 0].logprobs == [0.0, -0.5, -1.0, -1.5]
    assert log.completions(0, KEY)[1, 0].prompt == PROMPT
    assert {(frame.key, frame.policy_step) for frame in SegmentReader(log.segment(0, "a")).new_frames()} == {(KEY, 7)}


def test_a_segment_cut_at_any_byte_gives_its_whole_frames(log):
    path = log.segment(0, "a")
    write(path, range(3))
    content = path.read_bytes()
    frame = len(content) // 3
    for size in range(len(content) + 1):
        path.write_bytes(content[:size])
        assert whole_size(path) == size // frame * frame


def test_a_flipped_bit_anywhere_ends_what_is_believed_before_its_frame(log):
    path = log.segment(0, "a")
    write(path, range(3))
    content = path.read_bytes()
    frame = len(content) // 3
    for place in range(frame, 2 * frame):
        path.write_bytes(content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :])
        assert tokens(log) == {(request, 0): [100 * request] for request in range(3)}


def test_a_writer_takes_up_a_segment_after_its_last_whole_frame(log):
    path = log.segment(0, "a")
    write(path, range(2))
    with path.open("ab") as file:
        file.write(b"WAL1 torn")
    write(path, range(2, 4))
    assert tokens(log)[2, 0] == [200, 201, 202, 203]


def test_tokens_of_another_key_are_not_taken_up(log):
    write(log.segment(0, "a"), range(2))
    assert tokens(log, token_key("other weights", 0, 1.0)) == {}


def test_what_two_segments_say_of_a_completion_is_never_put_together(log):
    write(log.segment(0, "a"), range(2))
    late = step_records(2)
    late["token"] += 50
    writer = SegmentWriter(log.segment(0, "b"))  # whoever wrote this was not given positions 0 and 1
    writer.append(KEY, 7, late)
    writer.close()
    assert tokens(log)[0, 0] == [0, 1]


def test_the_segment_that_holds_most_of_a_completion_is_taken(log):
    write(log.segment(0, "a"), range(2))
    write(log.segment(0, "b"), range(5))
    assert tokens(log)[1, 0] == [100, 101, 102, 103, 104]


def test_a_completion_that_is_logged_again_counts_from_its_later_beginning(log):
    path = log.segment(0, "a")
    write(path, range(3))
    write(path, range(1))
    assert tokens(log)[1, 0] == [100]


def test_a_gap_and_another_prompt_end_a_completion():
    completions = {}
    other = step_records(1)
    other["prompt"] = prompt_checksum((2, 2))
    path_frames = [step_records(0), step_records(2), other]
    for records in path_frames:
        add_frames(completions, [frame(records)], KEY)
    assert {name: completion.tokens for name, completion in completions.items()} == {(0, 0): [0], (1, 0): [100], (2, 0): [200]}


def frame(records):
    from rollout.wal import Frame

    return Frame(KEY, 7, records)


def test_a_reader_sees_only_whole_frames_of_a_segment_that_grows(log):
    path = log.segment(0, "a")
    write(path, range(3))
    content = path.read_bytes()
    reader, seen = SegmentReader(path), []
    for size in range(0, len(content) + 1, 7):
        path.write_bytes(content[:size])
        seen += [int(each.records["position"][0]) for each in reader.new_frames()]
    path.write_bytes(content)
    seen += [int(each.records["position"][0]) for each in reader.new_frames()]
    assert seen == [0, 1, 2]


def test_steps_before_one_are_forgotten(log):
    for step in range(4):
        write(log.segment(step, "a"), range(1))
    log.trim(2)
    assert sorted(path.name for path in log.folder.iterdir()) == ["step-000002", "step-000003"]


WRITER = """
import sys
from pathlib import Path
import numpy as np
from rollout.wal import RECORD, SegmentWriter
writer = SegmentWriter(Path(sys.argv[1]))
position = 0
while True:
    writer.append(7, 0, np.array([(request, 0, position, position, 0.0, 0) for request in range(4)], dtype=RECORD))
    print(position, flush=True)
    position += 1
"""


def test_a_killed_process_loses_no_token_that_it_has_used(log):
    path = log.segment(0, "a")
    process = subprocess.Popen([sys.executable, "-c", WRITER, str(path)], stdout=subprocess.PIPE, text=True)
    used = [int(process.stdout.readline()) for _ in range(200)]
    process.send_signal(signal.SIGKILL)
    used += [int(line) for line in process.stdout.read().split("\n")[:-1]]
    process.wait()
    found = log.completions(0, 7)
    assert {len(completion.tokens) for completion in found.values()} <= {used[-1] + 1, used[-1] + 2}
    assert found[3, 0].tokens == list(range(len(found[3, 0].tokens)))


def test_a_disk_that_is_full_stops_the_writer_and_leaves_whole_frames(log):
    """A limit on the size of files stands in for a full disk: both take a part of a write and refuse the rest."""
    path = log.segment(0, "a")
    writer = SegmentWriter(path)
    writer.append(KEY, 7, step_records(0))
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (path.stat().st_size + 30, hard))
    try:
        with pytest.raises(ValueError, match=f"cannot be written \\({os.strerror(errno.EFBIG)}\\), and nothing is sampled unlogged: make room"):
            writer.append(KEY, 7, step_records(1))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, before)
    assert tokens(log) == {(request, 0): [100 * request] for request in range(3)}
    writer.append(KEY, 7, step_records(1))  # there is room again
    writer.close()
    assert tokens(log)[2, 0] == [200, 201]


def test_what_is_appended_is_durable_within_the_interval(log, monkeypatch):
    synced = []
    monkeypatch.setattr("rollout.wal.FSYNC_SECONDS", 0.02)
    monkeypatch.setattr(os, "fsync", lambda file: synced.append(os.fstat(file).st_size))
    writer = SegmentWriter(log.segment(0, "a"))
    writer.append(KEY, 7, step_records(0))
    deadline = time.monotonic() + 10
    while writer.size not in synced and time.monotonic() < deadline:
        time.sleep(0.01)
    assert writer.size in synced
    writer.close()


def test_an_error_of_making_durable_is_raised_by_the_next_append(log, monkeypatch):
    def refuse(file: int) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr("rollout.wal.FSYNC_SECONDS", 0.01)
    writer = SegmentWriter(log.segment(0, "a"))
    monkeypatch.setattr(os, "fsync", refuse)
    writer.append(KEY, 7, step_records(0))
    writer.syncer.join(timeout=10)
    with pytest.raises(ValueError, match="cannot be made durable: Input/output error"):
        writer.append(KEY, 7, step_records(1))


def test_an_error_of_making_the_last_frames_durable_is_raised_by_closing(log, monkeypatch):
    writer = SegmentWriter(log.segment(0, "a"))
    writer.append(KEY, 7, step_records(0))

    def refuse(file: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", refuse)
    with pytest.raises(ValueError, match="cannot be made durable: No space left on device"):
        writer.close()


def test_a_log_whose_folder_cannot_be_made_is_refused_by_name(log):
    log.folder.write_text("a file in the way")
    with pytest.raises(ValueError, match=r"the rollout log .*a\.wal cannot be written: (Not a directory|File exists)"):
        SegmentWriter(log.segment(0, "a"))


def test_a_frame_has_the_bytes_of_the_docstring(log):
    path = log.segment(12, "rank-000")
    writer = SegmentWriter(path)
    writer.append(0x0102030405060708, 9, np.array([(5, 1, 0, 77, -0.5, 0xAABBCCDD)], dtype=RECORD))
    writer.close()
    assert path.relative_to(log.folder).as_posix() == "step-000012/rank-000.wal"
    head = struct.pack("<4sIQI", b"WAL1", 1, 0x0102030405060708, 9)
    body = struct.pack("<QIIIfI", 5, 1, 0, 77, -0.5, 0xAABBCCDD)
    assert path.read_bytes() == head + struct.pack("<I", zlib.crc32(head + body)) + body
