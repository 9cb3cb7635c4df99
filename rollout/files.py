"""Small files that are whole or absent, and whose damage is named."""

import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file. Raises ValueError, naming the file, where it is missing, cut or damaged."""
    try:
        value = json.loads(path.read_text())
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise ValueError(f"{path} is damaged (it is not valid JSON): restore it, or begin anew with fresh=true") from error
    if not isinstance(value, dict):
        raise ValueError(f"{path} is damaged (it holds no JSON object): restore it, or begin anew with fresh=true")
    return value


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The objects of a file that has one in each line, none where there is no file; a line that a kill has cut is left out."""
    found = []
    for line in path.read_text().splitlines() if path.is_file() else ():
        try:
            found.append(json.loads(line))
        except ValueError:
            continue
    return found


def append_lines(path: Path, records: Iterable[dict[str, Any]]) -> None:
    """Add objects to such a file, below a line that a kill has cut."""
    with path.open("ab+") as file:
        is_cut = file.tell() > 0 and file.seek(-1, os.SEEK_END) >= 0 and file.read(1) != b"\n"
        file.write(b"\n" * is_cut + b"".join(json.dumps(record).encode() + b"\n" for record in records))


def replace_text(path: Path, text: str) -> None:
    """Write a file; until it is complete and on disk the old one, or none, stands there."""
    partial = path.with_suffix(".partial")
    with partial.open("w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)
    fsync_folder(path.parent)


def fsync_folder(folder: Path) -> None:
    """Have the names in a folder on disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
