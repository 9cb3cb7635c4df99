"""Small files that are whole or absent, and whose damage is named."""

import json
import os
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
