"""What a checkpoint's weights are, in one hash that is cheap for a terabyte; and whether its files are whole.

Of a local folder: sha256 over each file of weights, by name: its size, its safetensors header (names, dtypes, shapes and places of all tensors) and
SAMPLES pieces of it, evenly spread with both ends. Another training run, step, dtype, precision, layout or order of tensors gives another hash. What a change
has to touch to be seen: one of the pieces. A fine-tuned model differs nearly everywhere, so that one piece is enough; a single flipped byte, or a
change of a few small tensors in a file of gigabytes, can pass. It tells checkpoints apart and is no checksum of their content.

Of a hub id: sha256 over its name and the commit that the revision stands for, which fixes every byte; nothing is read. The hash therefore
differs from that of a local copy.

Each file of safetensors says in its header where its last tensor ends, so one that was cut off is found without reading it.
"""

import hashlib
import json
from pathlib import Path

from transformers.utils import cached_file

from rollout.config import ModelConfig

SAMPLES, SAMPLE_BYTES = 32, 4096
LONGEST_HEADER = 100_000_000
"""Bytes of a header at most, as in the format's definition: a larger number is damage."""


def weights_fingerprint(cfg: ModelConfig, role: str) -> str:
    """The hash, in hexadecimal digits; `role` names the model in errors. Raises ValueError as `require_whole_files` does."""
    if not Path(cfg.model).is_dir():
        config = cached_file(cfg.model, "config.json", revision=cfg.revision)  # .../snapshots/COMMIT/config.json
        return hashlib.sha256(f"hub {cfg.model} {Path(config).parent.name}".encode()).hexdigest()
    require_whole_files(cfg, role)
    digest = hashlib.sha256()
    for path in _weight_files(Path(cfg.model)):
        size = path.stat().st_size
        digest.update(f"{path.name} {size}\n".encode())
        if path.suffix == ".safetensors":
            digest.update(_header(path, role))
        last = max(0, size - SAMPLE_BYTES)
        with path.open("rb") as file:
            for offset in sorted({last * number // (SAMPLES - 1) for number in range(SAMPLES)}):
                file.seek(offset)
                digest.update(file.read(SAMPLE_BYTES))
    return digest.hexdigest()


def require_whole_files(cfg: ModelConfig, role: str) -> None:
    """Raises ValueError for a local file of safetensors that is not as long as its header says, or has none."""
    folder = Path(cfg.model)
    for path in _weight_files(folder) if folder.is_dir() else ():
        if path.suffix != ".safetensors":
            continue
        header = _header(path, role)
        tensors = [tensor for name, tensor in json.loads(header).items() if name != "__metadata__"]
        expected = 8 + len(header) + max((tensor["data_offsets"][1] for tensor in tensors), default=0)
        if path.stat().st_size != expected:
            raise ValueError(f"{path} of the {role} has {path.stat().st_size} bytes and its header says {expected}: it was cut off or damaged, copy it again")


def _weight_files(folder: Path) -> list[Path]:
    """The files that a loader takes: those that an index names, else all of one kind."""
    for suffix in ("safetensors", "bin"):
        indices = sorted(folder.glob(f"*.{suffix}.index.json"))
        named = {name for index in indices for name in json.loads(index.read_text())["weight_map"].values()}
        files = sorted(folder / name for name in named) or sorted(folder.glob(f"*.{suffix}"))
        if files:
            return files
    return []


def _header(path: Path, role: str) -> bytes:
    """The header of a file of safetensors: its length as eight bytes, then JSON."""
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        header = file.read(length) if 0 < length <= LONGEST_HEADER else b""
    try:
        json.loads(header)
    except ValueError as error:
        raise ValueError(f"{path} of the {role} has no whole header: it was cut off or damaged, copy it again") from error
    return header
