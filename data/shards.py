"""Shards: what a build has done so far, so that an interrupted one goes on where it was.

    OUT/settings.json                           what was asked for, and a digest of the writings
    OUT/shards/train.cross_author.00003.json    one chunk of proposals: its pairs, its rejections

A chunk is written once, whole, under a temporary name that is then renamed; a chunk that is there
is never made again. Every proposal has a random generator of its own, so the pairs do not depend on
where a build was interrupted. When all is done, the shards are deleted.

A folder belongs to one set of settings: other settings are an error, unless `--overwrite`.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Sequence
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import Any

from data.writings import Piece
from nanopersrm import InputError
from nanopersrm.pairs import SPLITS, Pair, dump, parse

SETTINGS, SUMMARY = "settings.json", "summary.json"
FILES = (*(f"{split}.jsonl" for split in SPLITS), SUMMARY, "summary.md", SETTINGS)


@dataclass(frozen=True)
class Chunk:
    """What became of some proposals of one kind in one split."""

    pairs: list[Pair]  # each followed by its twin
    proposals: int
    rejected: dict[str, int]  # reason -> how many
    seconds: float


def digest(pieces: Sequence[Piece]) -> str:
    """SHA-256 of all pieces in their order."""
    sha = hashlib.sha256()
    for piece in pieces:
        sha.update(json.dumps(astuple(piece)).encode())
    return sha.hexdigest()


def write_text(path: Path, text: str) -> None:
    """Write to a temporary name, then rename."""
    part = path.with_name(path.name + ".part")
    try:
        part.write_text(text, encoding="utf-8")
        os.replace(part, path)
    except OSError as error:
        raise InputError(f"{path}: cannot be written ({error.strerror})") from error
    finally:
        part.unlink(missing_ok=True)


def open_folder(out: Path, settings: dict[str, Any], overwrite: bool) -> None:
    """Make the folder ready for these settings; one of other settings is an error."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        if overwrite:
            for name in FILES:
                (out / name).unlink(missing_ok=True)
            shutil.rmtree(out / "shards", ignore_errors=True)
    except OSError as error:
        raise InputError(f"{out}: cannot be written ({error.strerror})") from error
    path = out / SETTINGS
    there = [name for name in FILES if name != SETTINGS and (out / name).exists()]
    if not path.exists() and there:
        raise InputError(f"{out}: holds {there[0]} of something else; use --overwrite")
    if not there and not (out / "shards").exists():  # nothing was built here yet
        write_text(path, json.dumps(settings, indent=1, ensure_ascii=False) + "\n")
        return
    known = read_json(path)
    wanted = json.loads(json.dumps(settings))
    for name in sorted(set(known) | set(wanted)):
        if known.get(name) != wanted.get(name):
            raise InputError(
                f"{out}: was built with {name} {known.get(name)!r:.60}, now asked for "
                f"{wanted.get(name)!r:.60}; take another --out, or --overwrite"
            )


def read_json(path: Path) -> dict[str, Any]:
    """An object that a build has written; anything else is an error."""
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: cannot be read ({error}); use --overwrite") from error
    if not isinstance(record, dict):
        raise InputError(f"{path}: expected an object; use --overwrite")
    return record


def finished(out: Path) -> dict[str, Any] | None:
    """The summary of a finished build, or None."""
    if all((out / name).exists() for name in FILES):
        return read_json(out / SUMMARY)
    return None


def _path(out: Path, split: str, kind: str, number: int) -> Path:
    return out / "shards" / f"{split}.{kind}.{number:05d}.json"


def load_chunk(out: Path, split: str, kind: str, number: int) -> Chunk | None:
    """A chunk that an earlier run has written, or None."""
    path = _path(out, split, kind, number)
    if not path.exists():
        return None
    record = read_json(path)
    try:
        pairs = [parse(pair, str(path)) for pair in record["pairs"]]
        return Chunk(pairs, record["proposals"], record["rejected"], record["seconds"])
    except (KeyError, TypeError) as error:
        raise InputError(f"{path}: not a chunk of a build; use --overwrite") from error


def save_chunk(out: Path, split: str, kind: str, number: int, chunk: Chunk) -> None:
    """Write a chunk, whole or not at all."""
    record = {
        "proposals": chunk.proposals,
        "rejected": chunk.rejected,
        "seconds": chunk.seconds,
        "pairs": [json.loads(dump(pair)) for pair in chunk.pairs],
    }
    path = _path(out, split, kind, number)
    try:
        path.parent.mkdir(exist_ok=True)
    except OSError as error:
        raise InputError(f"{path.parent}: cannot be written ({error.strerror})") from error
    write_text(path, json.dumps(record, ensure_ascii=False, indent=0))


def close_folder(out: Path) -> None:
    """Delete the shards of a finished build."""
    shutil.rmtree(out / "shards", ignore_errors=True)
