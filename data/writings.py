"""Writings: what people wrote, in the three forms in which they have it, as a list of pieces.

1. A folder with one folder per writer, `anna/letter.txt`, `.txt` or `.md`. The domain is the name
   of the outer folder. A file is a title; lines of three dashes part several texts in it.
2. A `.jsonl` or `.jsonl.gz` file, or a folder of them. A line is
   {"author": "Jane Austen", "title": "Emma", "year": 1815, "text": "…"}, with a "question" if the
   text answers one. The domain is the name of the file. `year` may be null or missing.
3. A `.json` file {author: [{"prompt": "…", "output": "…"}, …]}, as the code of PersRM-R1 has it:
   the prompt is the question, the output is the text, each item a title of its own.

The title is the work that a piece was cut from: exemplars are taken from other works than the
candidate, so that style and subject can be told apart.

What we left out. Nothing is cleaned here and nothing is skipped for what it says: `data/accept.py`
judges texts. Loose files beside the writers' folders are not read.
"""

import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nanopersrm import InputError
from nanopersrm.judge import texts
from nanopersrm.pairs import SUFFIXES, lines, parse_object

FORMS = "one folder per writer, .jsonl or .jsonl.gz files, or a .json file"


@dataclass(frozen=True)
class Piece:
    """One text of one writer."""

    author: str
    title: str
    year: int | None
    text: str
    domain: str
    question: str = ""


def read_writings(path: str | os.PathLike[str]) -> list[Piece]:
    """All pieces of a folder or file in one of the three forms, in a fixed order."""
    path = Path(path)
    if os.path.isdir(path):
        return _folder(path)
    if path.name.endswith(SUFFIXES):
        return _json_lines(path)
    if path.suffix == ".json":
        return _prompts_and_outputs(path)
    if not os.path.exists(path):
        raise InputError(f"{path}: no such file or folder")
    raise InputError(f"{path}: expected {FORMS}")


def _folder(path: Path) -> list[Piece]:
    try:
        inside = sorted(path.iterdir())
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror})") from error
    inside = [entry for entry in inside if not entry.name.startswith(".")]
    files = [entry for entry in inside if entry.name.endswith(SUFFIXES) and entry.is_file()]
    writers = [entry for entry in inside if entry.is_dir() and _text_files(entry)]
    if files and writers:
        raise InputError(
            f"{path}: expected {FORMS}, found both {files[0].name} and {writers[0].name}/"
        )
    if not files and not writers:
        raise InputError(f"{path}: expected {FORMS}, found none")
    domains: dict[str, Path] = {}
    for file in files:
        other = domains.setdefault(_stem(file), file)
        if other is not file:
            raise InputError(f"{file}: the domain {_stem(file)!r} is also in {other}")
    pieces = [piece for file in files for piece in _json_lines(file)]
    for writer in writers:
        pieces += _writer(writer, path.resolve().name)
    return pieces


def _text_files(folder: Path) -> list[Path]:
    try:
        inside = sorted(folder.iterdir())
    except OSError as error:
        raise InputError(f"{folder}: cannot be read ({error.strerror})") from error
    return [file for file in inside if file.suffix.lower() in texts.SUFFIXES and file.is_file()]


def _writer(folder: Path, domain: str) -> Iterable[Piece]:
    for file in texts.expand([folder]):
        for text in texts.read_texts([file]):
            yield Piece(folder.name, file.stem, None, text, domain)


def _stem(file: Path) -> str:
    return file.name.removesuffix(".gz").removesuffix(".jsonl")


def _field(record: dict[str, Any], name: str, place: str, default: str | None = None) -> str:
    value = record.get(name, default)
    if value is None:
        raise InputError(f"{place}, field {name}: missing")
    if not isinstance(value, str) or not (value.strip() or default is not None):
        raise InputError(f"{place}, field {name}: expected some text, got {value!r:.40}")
    return value


def _json_lines(file: Path) -> list[Piece]:
    pieces = []
    for place, line in lines(file):
        record = parse_object(line, place)
        year = record.get("year")
        if year is not None and (not isinstance(year, int) or isinstance(year, bool)):
            raise InputError(f"{place}, field year: expected a whole number, got {year!r:.40}")
        author, title = (_field(record, name, place) for name in ("author", "title"))
        text, question = _field(record, "text", place), _field(record, "question", place, "")
        pieces.append(Piece(author, title, year, text, _stem(file), question))
    if not pieces:
        raise InputError(f"{file}: expected a text a line, found none")
    return pieces


def _prompts_and_outputs(file: Path) -> list[Piece]:
    record = parse_object(texts.read_file(file), str(file))
    pieces = []
    for author, items in record.items():
        place = f"{file}, author {author!r}"
        if not author.strip() or not isinstance(items, list):
            raise InputError(f"{place}: expected a name and a list of items")
        for number, item in enumerate(items, 1):
            where = f"{place}, item {number}"
            if not isinstance(item, dict):
                raise InputError(f"{where}: expected an object with prompt and output")
            question, text = _field(item, "prompt", where, ""), _field(item, "output", where)
            pieces.append(Piece(author, str(number), None, text, file.stem, question))
    if not pieces:
        raise InputError(f"{file}: expected texts, found none")
    return pieces
