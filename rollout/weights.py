"""Publication of a student's weights to processes that sample with them, and the hash by which weights are known.

    RUN/weights/000012/      the weights after 12 updates: weights-00000.safetensors, ... and manifest.json
    manifest.json            {"schema": 1, "policy_step": 12, "weights": HASH, "files": {NAME: SHA-256}}

Tensors stand under the names and in the dtype they have in the model, as its forward multiplies them (quantised experts with their FP4 values), so that
reading them back is a copy. A folder is written under another name and renamed when it is durable: who sees it sees all of it. The reader
checks every file against the manifest.

A Hugging Face folder, which servers read, is written by `save_model`; it holds the same numbers, some under other names.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from rollout.files import read_json

SCHEMA = 1

SHARD_BYTES = 4 << 30
"""Bytes of one file at most, or one tensor."""

WORDS_AT_A_TIME = 1 << 20
"""32-bit words that are hashed together, in two integers of 8 bytes each."""


class PublishedWeights:
    """Weights that `publish` wrote; a WeightSource."""

    def __init__(self, folder: Path):
        """Raises ValueError where the folder is not complete or of another schema."""
        self.folder, self.manifest = folder, read_json(folder / "manifest.json")
        if self.manifest.get("schema") != SCHEMA:
            raise ValueError(f"the weights in {folder} have schema {self.manifest.get('schema')}; this version reads schema {SCHEMA}")
        self.policy_step: int = self.manifest["policy_step"]
        self.hash: str = self.manifest["weights"]

    def weights(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Raises ValueError for a file that is not as it was written."""
        for name, expected in self.manifest["files"].items():
            if _sha256(self.folder / name) != expected:
                raise ValueError(f"the weights in {self.folder / name} are damaged: their SHA-256 is not that of the manifest")
            with safe_open(self.folder / name, "pt") as file:
                for key in file.keys():  # noqa: SIM118, it is no dictionary
                    yield key, file.get_tensor(key)


def publish(folder: Path, policy_step: int, weights: Iterable[tuple[str, torch.Tensor]]) -> PublishedWeights:
    """Write the weights after `policy_step` updates to `folder/POLICY_STEP`, in place of an older attempt."""
    final = weights_folder(folder, policy_step)
    partial = final.with_suffix(".partial")
    for path in (partial, final):
        shutil.rmtree(path, ignore_errors=True)
    partial.mkdir(parents=True)
    shard: dict[str, torch.Tensor] = {}
    files: dict[str, str] = {}
    hashes: list[str] = []
    size = 0
    for name, tensor in weights:
        copied = tensor.detach().to("cpu", copy=True).contiguous()
        hashes.append(hash_tensors([(name, copied)]))
        if shard and size + copied.nbytes > SHARD_BYTES:
            _write_shard(partial, shard, files)
            shard, size = {}, 0
        shard[name], size = copied, size + copied.nbytes
    _write_shard(partial, shard, files)
    manifest = {"schema": SCHEMA, "policy_step": policy_step, "weights": hashlib.sha256("".join(hashes).encode()).hexdigest(), "files": files}
    (partial / "manifest.json").write_text(json.dumps(manifest))
    for path in (partial / "manifest.json", partial):
        _make_durable(path)
    partial.rename(final)
    return PublishedWeights(final)


def weights_folder(folder: Path, policy_step: int) -> Path:
    return folder / f"{policy_step:06d}"


def hash_tensors(tensors: Iterable[tuple[str, torch.Tensor]]) -> str:
    """A hash of named tensors: names, dtypes, shapes and every bit; as fast as the memory is read, on any device.

    Each tensor's 32-bit words are multiplied with odd numbers that depend on their place, and summed modulo 2^64. It is meant to tell apart weights that
    differ by accident or by an update, not to withstand an attack.
    """
    digest = hashlib.sha256()
    for name, tensor in tensors:
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)} {_sum_of_words(tensor)}".encode())
    return digest.hexdigest()


def _sum_of_words(tensor: torch.Tensor) -> int:
    flat = tensor.detach().contiguous().view(-1)
    content = flat.view(torch.uint8)
    are_words = len(content) % 4 == 0 and content.storage_offset() % 4 == 0
    padded = (content if are_words else torch.nn.functional.pad(content, (0, -len(content) % 4))).view(torch.int32)  # to pad is to copy
    total = 0
    for start in range(0, len(padded), WORDS_AT_A_TIME):
        words = padded[start : start + WORDS_AT_A_TIME].to(torch.int64).add_(1)
        factor = torch.arange(start, start + len(words), device=words.device).mul_(0x9E3779B97F4A7C1).bitwise_or_(1)
        total += int(words.mul_(factor).sum())
    return total & ((1 << 64) - 1)


def _write_shard(folder: Path, shard: dict[str, torch.Tensor], files: dict[str, str]) -> None:
    path = folder / f"weights-{len(files):05d}.safetensors"
    save_file(shard, path)
    _make_durable(path)
    files[path.name] = _sha256(path)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _make_durable(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    os.fsync(handle)
    os.close(handle)
