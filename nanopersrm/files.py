"""Files that are whole or not there: written under another name, forced to the disk, then renamed.

A process that dies, or a machine that loses power, leaves the old file or the new one, and at worst
a leftover `.name.part`. What is fetched gets its name only with the right SHA-256 (`put`).
"""

import hashlib
import json
import os
import secrets
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import IO, Any

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


def blocks(file: IO[bytes]) -> Iterator[bytes]:
    """What is left to read of an open file, a MiB at a time."""
    while block := file.read(1 << 20):
        yield block


def blocks_of(paths: Iterable[Path]) -> Iterator[bytes]:
    """The bytes of some files, one after the other."""
    for path in paths:
        with path.open("rb") as file:
            yield from blocks(file)


def sha256_of(*paths: Path) -> str:
    """Of the bytes of some files, one after the other. Raises OSError."""
    digest = hashlib.sha256()
    for block in blocks_of(paths):
        digest.update(block)
    return digest.hexdigest()


def put(source: Iterable[bytes], target: Path, sha256: str) -> str:
    """Write under a temporary name; only the right bytes get the real one. Returns the SHA-256."""
    digest = hashlib.sha256()
    part = temporary(target)
    try:
        with part.open("xb") as file:
            for block in source:
                digest.update(block)
                file.write(block)
        if digest.hexdigest() == sha256:
            os.replace(part, target)
    finally:
        part.unlink(missing_ok=True)
    return digest.hexdigest()


def temporary(target: Path) -> Path:
    """A name beside the target that no other process has."""
    return target.with_name(f".{target.name}.{os.getpid()}.{secrets.token_hex(4)}.part")


def last_words(text: object) -> str:
    """The last 300 characters of a message on one line."""
    return " ".join(str(text).split())[-300:]


def reason(error: Exception) -> str:
    """Why, on one line."""
    strerror = error.strerror if isinstance(error, OSError) else None
    return " ".join((strerror or str(error)).split())
