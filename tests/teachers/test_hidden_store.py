"""The store of hidden states: what is taken is what was put, once; what is lost or damaged is said to be; and nothing is left behind."""

import gc
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import psutil
import pytest
import torch

from teachers.hidden_store import PREFIX, SHARED_MEMORY, HiddenLostError, HiddenStore, StoredHidden

each_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
each_place = pytest.mark.parametrize("memory_gb", [1.0, 0.0], ids=["shared memory", "files"])

needs_shared_memory = pytest.mark.skipif(not SHARED_MEMORY.is_dir(), reason="there is no shared memory folder here")


@pytest.fixture
def new_store(tmp_path):
    """new_store(memory_gb=0.0): a store whose files are in tmp_path; closed at the end."""
    stores = []

    def make(memory_gb: float | None = 0.0) -> HiddenStore:
        stores.append(HiddenStore(memory_gb, str(tmp_path)))
        return stores[-1]

    yield make
    for store in stores:
        store.close()


def hidden(tokens: int = 7, width: int = 16, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    return torch.randn(tokens, width, generator=torch.Generator().manual_seed(seed)).to(dtype)


@each_place
@each_dtype
def test_what_is_taken_is_what_was_put_bit_for_bit_and_then_it_is_gone(dtype, memory_gb, new_store):
    store = new_store(memory_gb)
    states = [hidden(tokens, dtype=dtype, seed=tokens) for tokens in (1, 5, 64)]
    stored = [store.put(state) for state in states]
    for state, entry in zip(states[::-1], stored[::-1], strict=True):
        found = store.take(entry)
        assert found.dtype == dtype
        assert torch.equal(found, state)
        assert not entry.path.exists()
        with pytest.raises(HiddenLostError, match="is lost"):
            store.take(entry)


def test_what_was_taken_stays_when_its_file_is_gone_and_others_are_written(new_store):
    store, states = new_store(1.0), hidden(300)
    found = store.take(store.put(states))
    for seed in range(1, 9):
        store.put(hidden(300, seed=seed))
    store.close()
    assert torch.equal(found, states)


def test_a_look_leaves_the_entry_in_place(new_store):
    store, states = new_store(), hidden()
    stored = store.put(states)
    assert torch.equal(store.look(stored), states)
    assert torch.equal(store.take(stored), states)


def test_states_that_are_a_part_or_a_transpose_of_others_are_stored_in_their_own_order(new_store):
    store, states = new_store(), hidden(20, 30)
    assert torch.equal(store.take(store.put(states[3:9])), states[3:9])
    assert torch.equal(store.take(store.put(states.T)), states.T)


def test_a_completion_without_tokens_has_states_of_no_rows(new_store):
    store = new_store()
    assert store.take(store.put(torch.empty(0, 16, dtype=torch.bfloat16))).shape == (0, 16)


def test_nothing_is_made_before_it_is_needed(new_store, tmp_path):
    new_store()
    assert list(tmp_path.iterdir()) == []


@needs_shared_memory
def test_shared_memory_is_used_up_to_its_limit_and_given_back_by_what_is_taken(new_store, tmp_path):
    store = new_store(3 * hidden().nbytes / 1e9)
    stored = [store.put(hidden(seed=seed)) for seed in range(5)]
    on_disk = [tmp_path in entry.path.parents for entry in stored]
    assert on_disk == [False, False, False, True, True]
    assert [torch.equal(store.take(stored[number]), hidden(seed=number)) for number in (0, 3)] == [True, True]
    assert tmp_path not in store.put(hidden(seed=7)).path.parents
    assert tmp_path in store.put(hidden(seed=8)).path.parents


@needs_shared_memory
def test_an_entry_that_is_dropped_twice_gives_its_memory_back_once(new_store, tmp_path):
    store = new_store(2 * hidden().nbytes / 1e9)
    first, _ = store.put(hidden()), store.put(hidden())
    for _ in range(3):
        store.drop(first)
    assert tmp_path not in store.put(hidden()).path.parents
    assert tmp_path in store.put(hidden()).path.parents


def flip_a_bit(stored: StoredHidden) -> None:
    content = bytearray(stored.path.read_bytes())
    content[len(content) // 2] ^= 1
    stored.path.write_bytes(content)


def cut_off(stored: StoredHidden) -> None:
    stored.path.write_bytes(stored.path.read_bytes()[:-1])


def lengthen(stored: StoredHidden) -> None:
    stored.path.write_bytes(stored.path.read_bytes() + b"0000")


def delete(stored: StoredHidden) -> None:
    stored.path.unlink()


@each_place
@each_dtype
@pytest.mark.parametrize("damage", [flip_a_bit, cut_off, lengthen, delete])
def test_an_entry_that_is_not_what_was_written_is_lost(damage, dtype, memory_gb, new_store):
    store = new_store(memory_gb)
    stored, other = store.put(hidden(dtype=dtype)), store.put(hidden(dtype=dtype, seed=1))
    damage(stored)
    with pytest.raises(HiddenLostError):
        store.take(stored)
    assert torch.equal(store.take(other), hidden(dtype=dtype, seed=1))


def test_a_folder_that_somebody_removed_is_made_again_for_what_is_put_later(new_store):
    store = new_store()
    lost = store.put(hidden())
    lost.path.unlink()
    (lost.path.parent / ".lock").unlink()
    lost.path.parent.rmdir()
    assert torch.equal(store.take(store.put(hidden(seed=1))), hidden(seed=1))
    with pytest.raises(HiddenLostError):
        store.take(lost)


def test_a_folder_that_cannot_be_made_is_refused_by_the_settings_name(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match=r"teachers\.hidden_folder: .*file cannot be written to"):
        HiddenStore(0.0, str(tmp_path / "file")).put(hidden())


@pytest.mark.skipif(os.geteuid() != 0 and not Path("/proc/self/ns/user").exists(), reason="needs a mount of its own")
def test_a_disk_that_is_full_is_refused_with_the_setting_that_helps(tmp_path):
    """On a file system of 64 KiB, mounted where no other process sees it."""
    script = "import torch; from teachers.hidden_store import HiddenStore; store = HiddenStore(0.0, 'full')\n"
    script += "first = store.put(torch.ones(1000, 4))\n"
    script += "try:\n    store.put(torch.ones(20_000, 4))\nexcept ValueError as error:\n    print(error)\n"
    script += "print(store.take(first).sum().item(), store.take(store.put(torch.ones(1000, 4))).sum().item())"
    (tmp_path / "full").mkdir()
    mount = "mount -t tmpfs -o size=64k none full && exec $0 -c \"$1\""
    result = subprocess.run(
        ["unshare", "--map-root-user", "--mount", "sh", "-c", mount, sys.executable, script], cwd=tmp_path, capture_output=True, text=True, env=environment()
    )
    if "unshare" in result.stderr or "mount:" in result.stderr:
        pytest.skip("this system lets nobody mount")
    assert result.stdout.splitlines() == [
        "a teacher's hidden states do not fit into full: set teachers.hidden_folder to a larger disk",
        "4000.0 4000.0",
    ]


def environment() -> dict[str, str]:
    return os.environ | {"PYTHONPATH": str(Path(__file__).parents[2]), "OMP_NUM_THREADS": "1"}


HOLD = """
import signal, sys, torch
from teachers.hidden_store import HiddenStore
store = HiddenStore(float(sys.argv[2]), sys.argv[1])
print(store.put(torch.ones(4, 8)).path, flush=True)
signal.pause()
"""


def start(folder: Path, memory_gb: float) -> tuple[subprocess.Popen, Path]:
    """A process that puts something and then waits for its end, and the file that it made."""
    child = subprocess.Popen([sys.executable, "-c", HOLD, str(folder), str(memory_gb)], stdout=subprocess.PIPE, text=True, env=environment())
    return child, Path(child.stdout.readline().strip())


def kill(child: subprocess.Popen) -> None:
    child.kill()
    child.wait()


@each_place
def test_what_a_killed_process_left_is_removed_by_the_next_and_what_a_living_one_holds_is_not(memory_gb, new_store, tmp_path):
    killed, left = start(tmp_path, memory_gb)
    living, held = start(tmp_path, memory_gb)
    try:
        kill(killed)
        assert left.exists()
        new_store(memory_gb).put(hidden())
        assert not left.parent.exists()
        assert held.exists()
    finally:
        kill(living)


def test_a_process_that_ends_by_an_error_leaves_nothing(tmp_path):
    script = "import torch; from teachers.hidden_store import HiddenStore; stores = [HiddenStore(limit, '.') for limit in (1.0, 0.0)]\n"
    script += "print(*[store.put(torch.ones(2, 2)).path.absolute() for store in stores], sep='\\n')\nraise KeyboardInterrupt"
    result = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True, env=environment())
    paths = result.stdout.splitlines()
    assert len(paths) == 2
    assert all(PREFIX in path for path in paths)
    assert not any(Path(path).parent.exists() for path in paths)


def test_a_store_that_nobody_holds_any_more_leaves_nothing(tmp_path):
    path = HiddenStore(0.0, str(tmp_path)).put(hidden()).path
    gc.collect()
    assert not path.parent.exists()


FORK = """
import os, sys, torch
from teachers.hidden_store import HiddenStore
store = HiddenStore(0.0, sys.argv[1])
stored = store.put(torch.ones(4, 8))
if os.fork() == 0:
    store.close()
    os._exit(0)
os.wait()
assert torch.equal(store.take(stored), torch.ones(4, 8))
"""


def test_a_process_that_is_forked_off_removes_nothing(tmp_path):
    """In a process of its own, since that of the tests may hold too much memory to be forked."""
    subprocess.run([sys.executable, "-c", FORK, str(tmp_path)], check=True, env=environment())


@each_place
def test_memory_of_the_process_and_files_do_not_grow_with_what_was_put_and_taken(memory_gb, new_store):
    store, states, process = new_store(memory_gb), hidden(1024, 256), psutil.Process()
    sizes, files = [], []
    for _ in range(4):
        for _ in range(50):
            store.take(store.put(states))
        sizes.append(process.memory_full_info().uss)
        files.append(process.num_fds())
    assert sizes[-1] - sizes[0] < 4 * states.nbytes  # of 150 that were put between the two
    assert files[-1] == files[0]


def test_the_systems_folder_for_temporary_files_is_taken_where_none_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    store = HiddenStore(0.0)
    stored = store.put(hidden())
    assert tmp_path in stored.path.parents
    store.close()
    assert list(tmp_path.iterdir()) == []
