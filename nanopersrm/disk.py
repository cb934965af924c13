"""Files that are whole or not there: written under another name, forced to the disk, then renamed.

A process that dies, or a machine that loses power, leaves the old file or the new one, and at worst
a leftover `.name.part`. `hold` keeps a second process out of a folder.

Where to read next: `checkpoint.py`, which does the same for folders.
"""

import json
import os
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from nanopersrm import InputError

try:
    import fcntl
except ImportError:  # not POSIX: nobody is kept out
    fcntl = None  # type: ignore[assignment]

_held: dict[tuple[int, int], int] = {}  # folders that this process holds, and how


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


def hold(folder: Path) -> None:
    """Keep other processes out of the folder until this one ends.

    The lock is the system's, on the folder itself: no file tells of it, and it goes with its
    process, however that ends. A process does not keep itself out.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        place = os.open(folder, os.O_RDONLY) if fcntl is not None else None
    except OSError as error:
        raise InputError(f"{folder}: cannot be written ({reason(error)})") from error
    if place is None:
        return
    about = os.fstat(place)
    if (about.st_dev, about.st_ino) in _held:
        os.close(place)
        return
    try:
        fcntl.flock(place, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        os.close(place)
        raise InputError(
            f"{folder}: another process is still writing there; wait for it or take another --out"
        ) from error
    _held[about.st_dev, about.st_ino] = place  # open, so locked, until the process ends


def reason(error: Exception) -> str:
    """Why, on one line."""
    said = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    return " ".join(said.split())
