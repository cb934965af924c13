"""Files that are whole or not there: written under another name, forced to the disk, then renamed.

A process that dies, or a machine that loses power, leaves the old file or the new one, and at worst
a leftover `.name.part`. Where to read next: `checkpoint.py`, which does the same for folders.
"""

import json
import os
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from nanopersrm import InputError


def write_text(path: Path, text: str) -> None:
    """Write to a temporary name, force it to the disk, then rename."""
    part = path.with_name(f".{path.name}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(part, "w", encoding="utf-8", newline="\n") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    except OSError as error:
        raise InputError(f"{path}: cannot be written ({reason(error)})") from error
    finally:
        with suppress(OSError):  # it is gone, or never was
            part.unlink()


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """The same for a JSON object; a number that is not finite is an error."""
    write_text(path, json.dumps(value, indent=1, ensure_ascii=False, allow_nan=False) + "\n")


def reason(error: Exception) -> str:
    """Why, on one line."""
    said = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    return " ".join(said.split())
