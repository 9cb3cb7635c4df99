"""The hash of a checkpoint's weights: equal for copies, another for every change it is meant to see; files that are not whole are refused."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from rollout.config import ModelConfig
from teachers.fingerprint import SAMPLE_BYTES, SAMPLES, require_whole_files, weights_fingerprint


def fingerprint(folder) -> str:
    return weights_fingerprint(ModelConfig(model=str(folder)), "teacher of law")


def test_a_copy_has_the_same_hash_whatever_its_config(saved_qwen3_moe, changed_checkpoint):
    assert fingerprint(changed_checkpoint(saved_qwen3_moe, config={"rope_theta": 5.0})) == fingerprint(saved_qwen3_moe)


def test_a_small_step_of_all_weights_changes_it(saved_qwen3_moe, changed_checkpoint):
    def step(weights: dict) -> None:
        for weight in weights.values():
            weight.mul_(1 + 1e-6)

    assert fingerprint(changed_checkpoint(saved_qwen3_moe, step)) != fingerprint(saved_qwen3_moe)


@pytest.mark.parametrize("change", ["name", "shape", "dtype"])
def test_another_name_shape_or_dtype_of_the_same_bytes_changes_it(saved_qwen3_moe, changed_checkpoint, change):
    folder = changed_checkpoint(saved_qwen3_moe)
    weights = load_file(folder / "model.safetensors")
    name = "model.norm.weight"
    weight = weights.pop(name)
    changed = {"name": {"model.other.weight": weight}, "shape": {name: weight[None]}, "dtype": {name: weight.view(torch.int32)}}
    save_file(weights | changed[change], folder / "model.safetensors", metadata={"format": "pt"})
    assert fingerprint(folder) != fingerprint(saved_qwen3_moe)


def test_only_samples_of_a_large_file_are_read(tmp_path):
    """A flipped byte between two samples passes, as the docstring says; in a sample it is seen."""
    weights = {"weight": torch.zeros(4 * SAMPLES * SAMPLE_BYTES, dtype=torch.uint8)}
    save_file(weights, tmp_path / "model.safetensors")
    before, size = fingerprint(tmp_path), (tmp_path / "model.safetensors").stat().st_size
    second = (size - SAMPLE_BYTES) // (SAMPLES - 1)

    def flip(place: int) -> str:
        with (tmp_path / "model.safetensors").open("r+b") as file:
            file.seek(place)
            file.write(b"\x01")
        return fingerprint(tmp_path)

    assert flip(second - 1) == before
    assert flip(second) != before


@pytest.fixture
def sharded(new_student, tokenizer, tmp_path):
    """A checkpoint of several files with an index."""
    folder = tmp_path / "sharded"
    new_student("qwen3_moe_tiny").save_pretrained(folder, max_shard_size="400KB")
    assert len(list(folder.glob("*.safetensors"))) > 2
    return folder


def test_every_file_of_a_sharded_checkpoint_counts_and_only_those_of_its_index(sharded, tmp_path):
    before = fingerprint(sharded)
    (sharded / "leftover.safetensors").write_bytes(b"damaged")
    assert fingerprint(sharded) == before
    last = sorted(json.loads((sharded / "model.safetensors.index.json").read_text())["weight_map"].values())[-1]
    weights = load_file(sharded / last)
    save_file({name: weight + 1 for name, weight in weights.items()}, sharded / last, metadata={"format": "pt"})
    assert fingerprint(sharded) != before


@pytest.mark.parametrize("size", [0, 5, 100, -1])
def test_a_truncated_file_is_refused_by_name(sharded, size):
    path = sorted(sharded.glob("*.safetensors"))[-1]
    with path.open("r+b") as file:
        file.truncate(size if size >= 0 else path.stat().st_size - 1)
    with pytest.raises(ValueError, match=rf"{path.name} of the teacher of law .*: it was cut off or damaged, copy it again"):
        require_whole_files(ModelConfig(model=str(sharded)), "teacher of law")


def test_a_file_that_is_too_long_is_refused(saved_qwen3_moe, changed_checkpoint):
    folder = changed_checkpoint(saved_qwen3_moe)
    with (folder / "model.safetensors").open("ab") as file:
        file.write(b"more")
    with pytest.raises(ValueError, match=r"has \d+ bytes and its header says \d+"):
        require_whole_files(ModelConfig(model=str(folder)), "teacher of law")


def test_a_hub_id_is_known_by_the_commit_of_its_cached_revision(saved_qwen3_moe, tmp_path, monkeypatch):
    """The cache of the hub, as huggingface_hub lays it out: refs/REVISION names a commit, snapshots/COMMIT holds its files."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("transformers.utils.hub.constants.HF_HUB_CACHE", str(tmp_path))
    hashes = []
    for commit in ("a" * 40, "b" * 40):
        repository = tmp_path / "models--org--law"
        shutil.copytree(saved_qwen3_moe, repository / "snapshots" / commit)
        (repository / "refs").mkdir(exist_ok=True)
        (repository / "refs" / "main").write_text(commit)
        hashes.append(fingerprint("org/law"))
    assert hashes[0] != hashes[1]
    assert weights_fingerprint(ModelConfig(model="org/law", revision="a" * 40), "teacher of law") == hashes[0]
