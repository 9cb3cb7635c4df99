"""A checkpoint's folder on disk: whole, durable and checked, or not there.

Tree (schema version 2):

    RUN/checkpoints/latest.json     {"schema": 2, "step": S, "tag": "step-SSSSSS"}: the checkpoint in force
    RUN/checkpoints/step-SSSSSS/    files of opd/checkpoint.py and manifest.json, {"schema": 2, "files": {NAME: {"bytes": N, "sha256": HEX}}}, which
                                    names every other file of the folder
    RUN/checkpoints/partial/        one that is being written, or that a kill left
    RUN/checkpoints/step-SSSSSS.going/  one that is being deleted
    RUN/checkpoints/parts/          opd/checkpoint_writer.py

Order of writing: every rank writes its files under `partial`, has them on disk (fsync) and hashes them; the main rank writes the manifest, renames the
folder and replaces the pointer, each durable before the next; the ranks read the new folder again before an older one goes. A kill between any two
leaves the older checkpoint in force. Order of reading: the pointer's checkpoint, else, saying why, the newest that is whole.
"""

import hashlib
import json
import logging
import os
import re
import shutil
from dataclasses import dataclass
from pathlib import Path

from opd.choice import kept_checkpoints
from rollout.files import fsync_folder, read_json, replace_text

SCHEMA = 2
READABLE = (1, 2)
"""Schema versions that are read; version 1 has no manifest, and its files are taken as they are."""

TAG = re.compile(r"step-\d{6,}")
MANIFEST = "manifest.json"
PARTIAL = "partial"
GOING = ".going"
"""Ends the name of a checkpoint that is being deleted."""
LOG = logging.getLogger(__name__)
PIECE = 1 << 22
"""Bytes that are hashed at a time."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidates:
    """Checkpoints to try, best first, and why the pointer's is not the first of them (None: it is)."""

    tags: tuple[str, ...]
    problem: str | None = None


def tag_of(step: int) -> str:
    return f"step-{step:06d}"


def begin_partial(folder: Path) -> None:
    """An empty RUN/checkpoints/partial; the main rank calls it before any rank writes there."""
    shutil.rmtree(folder / PARTIAL, ignore_errors=True)
    (folder / PARTIAL).mkdir(parents=True)


def seal(folder: Path, names: list[str]) -> dict[str, dict]:
    """Have files on disk, whatever happens to the machine, and return what the manifest says of them."""
    return {name: _describe(folder / name, durable=True) for name in names}


def commit(folder: Path, step: int, files: dict[str, dict]) -> None:
    """Make `partial`, which holds these files, the checkpoint in force; the main rank calls it when all ranks have sealed theirs.

    Raises ValueError where the folder holds other files than the ranks wrote, and where the disk refuses.
    """
    partial, final = folder / PARTIAL, folder / tag_of(step)
    strange = sorted(set(files) ^ set(_names(partial)))
    if strange:
        raise ValueError(f"the checkpoint of step {step} is not saved: {partial / strange[0]} is {'missing' if strange[0] in files else 'of no rank'}")
    try:
        replace_text(partial / MANIFEST, json.dumps({"schema": SCHEMA, "files": files}))
        fsync_folder(partial)
        shutil.rmtree(final, ignore_errors=True)
        partial.rename(final)
        fsync_folder(folder)
    except OSError as error:
        raise ValueError(f"the checkpoint of step {step} cannot be written: {error.strerror}") from error


def point_to(folder: Path, step: int) -> None:
    """Replace the pointer."""
    replace_text(folder / "latest.json", json.dumps({"schema": SCHEMA, "step": step, "tag": tag_of(step)}))


def forget_older(folder: Path, step: int, keep: int) -> None:
    """Delete all but the newest `keep` checkpoints (one at least) up to a step; a later one was left by a kill before its pointer.

    The chosen one and the one that is being evaluated (opd/choice.py) stay beside these. `opd evaluate` may choose it meanwhile, so that one is renamed
    first, and comes back where it is to stay by then: who chooses looks whether it is there after having chosen.
    """
    try:
        kept_checkpoints(folder.parent)
    except ValueError as error:
        LOG.warning("no older checkpoint is deleted, since nobody knows which is chosen: %s", error)
        return
    for left in folder.glob(f"step-*{GOING}"):
        _delete(left, folder)
    for old in [tag for tag in saved_tags(folder) if step_of(tag) <= step][: -max(1, keep)]:
        if not _is_kept(folder / old, old):
            _delete((folder / old).rename(folder / f"{old}{GOING}"), folder)


def _delete(going: Path, folder: Path) -> None:
    """Delete a checkpoint that was renamed for it, unless it is to stay."""
    tag = going.name.removesuffix(GOING)
    if _is_kept(going, tag) and not (folder / tag).exists():
        going.rename(folder / tag)
    else:
        shutil.rmtree(going)


def _is_kept(checkpoint: Path, tag: str) -> bool:
    """Whether a checkpoint is one of those that stay; not one that was written anew under that step."""
    kept = [one for one in kept_checkpoints(checkpoint.parents[1]) if tag == tag_of(one["step"])]
    return any(digest_of(checkpoint) == one["manifest"] for one in kept)


def find(folder: Path) -> Candidates:
    """The checkpoints to try. Raises ValueError for a pointer of a schema that is not read."""
    tags, pointer = saved_tags(folder)[::-1], folder / "latest.json"
    if not pointer.exists():
        return Candidates(tags=tags, problem=f"{pointer} is missing" if tags else None)
    try:
        record = read_json(pointer)
    except ValueError as error:
        return Candidates(tags=tags, problem=str(error).partition(":")[0])
    if record.get("schema") not in READABLE:
        raise ValueError(f"{pointer} has schema {record.get('schema')}; this version reads schema {READABLE[-1]}")
    tag = record.get("tag")
    if not isinstance(tag, str) or not TAG.fullmatch(tag):
        return Candidates(tags=tags, problem=f"{pointer} is damaged (it names no checkpoint)")
    if tag not in tags:
        return Candidates(tags=(tag, *tags))
    return Candidates(tags=tuple(other for other in tags if step_of(other) <= step_of(tag)))


def problem_of(folder: Path, index: int = 0, count: int = 1) -> str | None:
    """What is wrong with a checkpoint, in words; None where it is whole. Of its files, rank `index` of `count` reads its share."""
    if not folder.is_dir():
        return f"{folder} is missing"
    if not (folder / "opd.json").is_file():
        return f"{folder} has no opd.json"
    try:
        if not (folder / MANIFEST).is_file():
            return None if read_json(folder / "opd.json").get("schema") == 1 else f"{folder} has no {MANIFEST}"
        files = read_json(folder / MANIFEST)["files"]
        if any(Path(name).is_absolute() or ".." in Path(name).parts for name in files):
            return f"{folder / MANIFEST} is damaged: it names files outside of its folder"
        for name in sorted(files)[index::count]:
            if not (folder / name).is_file():
                return f"{folder / name} is missing"
            if (folder / name).stat().st_size != files[name]["bytes"]:
                return f"{folder / name} is cut: {(folder / name).stat().st_size} of {files[name]['bytes']} bytes"
            if _describe(folder / name) != files[name]:
                return f"{folder / name} is damaged: its sha256 is another"
    except (KeyError, TypeError, AttributeError):
        return f"{folder / MANIFEST} is damaged: it is not a manifest"
    except ValueError as error:
        return str(error).partition(":")[0]
    except OSError as error:
        return f"{folder} cannot be read: {error.strerror}"
    return None


def digest_of(folder: Path) -> str | None:
    """sha256 of a checkpoint's manifest, and so of all its files; None for one of schema version 1, which has none."""
    return hashlib.sha256((folder / MANIFEST).read_bytes()).hexdigest() if (folder / MANIFEST).is_file() else None


def step_of(tag: str) -> int:
    return int(tag.removeprefix("step-"))


def saved_tags(folder: Path) -> tuple[str, ...]:
    """The checkpoints in RUN/checkpoints, by step."""
    return tuple(sorted((path.name for path in folder.glob("step-*") if path.is_dir() and TAG.fullmatch(path.name)), key=step_of))


def _names(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file() and path.name != MANIFEST)


def _describe(path: Path, durable: bool = False) -> dict:
    digest, num_bytes = hashlib.sha256(), 0
    with path.open("rb") as file:
        if durable:
            os.fsync(file.fileno())
        while piece := file.read(PIECE):
            digest.update(piece)
            num_bytes += len(piece)
    return {"bytes": num_bytes, "sha256": digest.hexdigest()}
