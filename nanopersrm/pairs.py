"""Pairs: the record that everything is trained and measured on, one JSON object a line.

    {"id": "train-cross_author-00000a", "twin": "train-cross_author-00000b",
     "author": "Jane Austen", "domain": "fiction", "split": "train", "kind": "cross_author",
     "exemplars": ["…", "…"], "question": "", "chosen": "…", "rejected": "…",
     "chosen_from": "Jane Austen/Emma", "rejected_from": "Walter Scott/Waverley",
     "weight": 1.0, "meta": {}}

The exemplars are texts of one writer; `chosen` is another text of that writer, `rejected` a text of
somebody else. The *twin* has the same two texts in opposite roles and exemplars of the other
writer. Whoever does not read the exemplars gives both the same answer and is right once: 50 %,
whatever the texts look like.

`chosen_from` and `rejected_from` say who wrote: "author/title" for a passage of a person,
"restyle:contractions+:author" for a rewrite, "model:BASE:persona" for a model.

What we chose. `weight` and `meta` may be left out; fields we do not know are kept and written back.
An empty `twin` means that there is none; a twin that is named must be in the file. A wrong line is
an error with file, line and field, never skipped.

What we left out. The texts of a pair stand in its line and again in its twin's; a table of texts
would halve the file and could not be read by eye.
"""

import gzip
import hashlib
import json
import math
import os
import zlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from nanopersrm import InputError

KINDS = (
    "cross_author",
    "minor_replacement",
    "style_randomization",
    "style_mimicking",
    "restyle",
)
SPLITS = ("train", "validation", "test", "ood")
NAMES = ("id", "author", "domain", "kind", "chosen", "rejected", "chosen_from", "rejected_from")
MAY_BE_EMPTY = ("twin", "question")
SUFFIXES = (".jsonl", ".jsonl.gz")


@dataclass(frozen=True)
class Pair:
    """Exemplars of one writer, a text that is theirs and one that is not."""

    id: str
    twin: str  # id of the twin; "" when there is none
    author: str  # of the exemplars
    domain: str
    split: str  # one of SPLITS
    kind: str  # one of KINDS, or a kind of your own
    exemplars: tuple[str, ...]
    question: str  # what both texts answer; "" when there is none
    chosen: str
    rejected: str
    chosen_from: str
    rejected_from: str
    weight: float = 1.0
    meta: dict[str, Any] = field(default_factory=dict)
    extra: dict[str, Any] = field(default_factory=dict)  # fields we do not know


KNOWN = tuple(f.name for f in fields(Pair) if f.name != "extra")


def _kind_of(value: object) -> str:
    """A value in the words of JSON, for messages."""
    if isinstance(value, str):
        return f"the text {value[:40]!r}" if value.strip() else "an empty text"
    if isinstance(value, bool) or value is None:
        return json.dumps(value)
    if isinstance(value, (int, float)):
        return f"the number {value}"
    return "a list" if isinstance(value, list) else "an object"


def _text(value: object, place: str, empty: bool = False) -> str:
    if not isinstance(value, str) or not (empty or value.strip()):
        raise InputError(
            f"{place}: expected {'a' if empty else 'some'} text, got {_kind_of(value)}"
        )
    return value


def _finite(number: str) -> float:
    """json would turn 1e999 and NaN into numbers that cannot be written back."""
    value = float(number)
    if not math.isfinite(value):
        raise ValueError(f"a number is not finite: {number}")
    return value


def parse_object(line: str, place: str) -> dict[str, Any]:
    """One JSON object of one line; anything else is an error with its place."""
    try:
        record = json.loads(line, parse_float=_finite, parse_constant=_finite)
        line.encode() if "\\u" not in line else json.dumps(record, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        raise InputError(f"{place}: expected text, found half a character (\\ud800)") from error
    except (ValueError, RecursionError) as error:
        said = str(error) or "nested too deep"
        raise InputError(f"{place}: expected a JSON object, found none ({said})") from error
    if not isinstance(record, dict):
        raise InputError(f"{place}: expected a JSON object, got {_kind_of(record)}")
    return record


def parse(record: dict[str, Any], place: str = "pair") -> Pair:
    """A checked pair of one JSON object; an error names place and field."""
    rest = dict(record)
    values: dict[str, Any] = {}
    for name in KNOWN:
        where = f"{place}, field {name}"
        if name not in rest:
            if name in ("weight", "meta"):
                continue
            raise InputError(f"{where}: missing")
        value = rest.pop(name)
        if name in NAMES or name in MAY_BE_EMPTY:
            value = _text(value, where, name in MAY_BE_EMPTY)
        elif name == "split":
            if value not in SPLITS:
                raise InputError(
                    f"{where}: expected one of {', '.join(SPLITS)}, got {_kind_of(value)}"
                )
        elif name == "exemplars":
            if not isinstance(value, (list, tuple)) or not value:
                got = "an empty list" if value == [] else _kind_of(value)
                raise InputError(f"{where}: expected a list of texts, got {got}")
            value = tuple(_text(text, f"{where}[{i}]") for i, text in enumerate(value))
        elif name == "weight":
            number = isinstance(value, (int, float)) and not isinstance(value, bool)
            if not number or not 0 <= value < math.inf:
                raise InputError(f"{where}: expected a number from 0, got {_kind_of(value)}")
            value = float(value)
        elif not isinstance(value, dict):
            raise InputError(f"{where}: expected an object, got {_kind_of(value)}")
        values[name] = value
    if values["chosen"] == values["rejected"]:
        raise InputError(
            f"{place}, field rejected: expected another text than chosen, got the same"
        )
    return Pair(**values, extra=rest)


def lines(path: Path) -> Iterator[tuple[str, str]]:
    """(place, line) of each line that is not blank, of a plain or gzip-packed file."""
    opened = gzip.open if path.name.endswith(".gz") else open
    number = 0
    try:
        with opened(path, "rb") as file:
            for number, raw in enumerate(file, 1):
                line = raw.decode("utf-8-sig" if number == 1 else "utf-8")
                if line.strip():
                    yield f"{path}, line {number}", line
    except UnicodeDecodeError as error:
        raise InputError(f"{path}, line {number}: expected UTF-8 text ({error.reason})") from error
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise InputError(f"{path}, line {number + 1}: broken gzip data ({error})") from error
    except FileNotFoundError as error:
        raise InputError(f"{path}: no such file") from error
    except IsADirectoryError as error:
        raise InputError(f"{path}: expected a file, found a folder") from error
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror})") from error


def _placed(path: str | os.PathLike[str]) -> Iterator[tuple[str, Pair]]:
    path = Path(path)
    if not path.name.endswith(SUFFIXES):
        raise InputError(f"{path}: expected a .jsonl or .jsonl.gz file")
    first: dict[str, str] = {}
    for place, line in lines(path):
        pair = parse(parse_object(line, place), place)
        if pair.id in first:
            raise InputError(f"{place}, field id: {pair.id!r} is also the id of {first[pair.id]}")
        first[pair.id] = place
        yield place, pair


def iterate(path: str | os.PathLike[str]) -> Iterator[Pair]:
    """The pairs of a file one by one, each checked on its own."""
    return (pair for _, pair in _placed(path))


def read(path: str | os.PathLike[str], empty: bool = False) -> list[Pair]:
    """The pairs of a .jsonl or .jsonl.gz file, each checked, and against its twin.

    At least one, unless it may be `empty`, as what few writers leave to validate on is.
    """
    placed = list(_placed(path))
    if not placed and not empty:
        raise InputError(f"{os.fspath(path)}: expected pairs, found none")
    pairs = [pair for _, pair in placed]
    check_twins(pairs, [place for place, _ in placed])
    return pairs


def check_twins(pairs: Sequence[Pair], places: Sequence[str] | None = None) -> None:
    """Every twin that is named is there and has the same two texts in opposite roles."""
    by_id = {pair.id: pair for pair in pairs}
    for i, pair in enumerate(pairs):
        if not pair.twin:
            continue
        where = f"{places[i] if places else f'pair {pair.id!r}'}, field twin"
        twin = by_id.get(pair.twin)
        if twin is None:
            raise InputError(f"{where}: no pair has the id {pair.twin!r}")
        if twin is pair:
            raise InputError(f"{where}: expected the id of another pair, got its own")
        if twin.twin != pair.id:
            raise InputError(
                f"{where}: the twin of {pair.twin!r} is {twin.twin!r}, not {pair.id!r}"
            )
        if (twin.chosen, twin.rejected) != (pair.rejected, pair.chosen):
            raise InputError(
                f"{where}: expected {pair.twin!r} to have the same two texts in opposite roles"
            )
        if twin.split != pair.split:
            raise InputError(f"{where}: {pair.twin!r} is in {twin.split}, this one in {pair.split}")
        if set(twin.exemplars) & set(pair.exemplars):
            raise InputError(f"{where}: expected {pair.twin!r} to have other exemplars")


def dump(pair: Pair) -> str:
    """The line of a pair, without its line end. Known fields first, in their order."""
    record = {name: getattr(pair, name) for name in KNOWN}
    if mixed := sorted(set(record) & set(pair.extra)):
        raise InputError(f"pair {pair.id!r}, field {mixed[0]}: stands in extra too")
    try:
        line = json.dumps({**record, **pair.extra}, ensure_ascii=False, allow_nan=False)
        line.encode()
    except (TypeError, ValueError) as error:  # UnicodeEncodeError is a ValueError
        raise InputError(f"pair {pair.id!r}: cannot be written as JSON ({error})") from error
    return line


def digest(pairs: Iterable[Pair]) -> str:
    """SHA-256 of pairs in their order: the same wherever their file lies."""
    sha = hashlib.sha256()
    for pair in pairs:
        sha.update(dump(pair).encode() + b"\n")
    return sha.hexdigest()


def write(path: str | os.PathLike[str], pairs: Iterable[Pair]) -> int:
    """Write pairs, one a line, to a temporary name, then rename; gives how many.

    The same pairs give the same bytes, in a .gz file too: no time and no name are stored in it.
    """
    path = Path(path)
    if not path.name.endswith(SUFFIXES):
        raise InputError(f"{path}: expected a name that ends in .jsonl or .jsonl.gz")
    part = path.with_name(path.name + ".part")
    count = 0
    try:
        with open(part, "wb") as raw:
            packed = (
                gzip.GzipFile("", "wb", fileobj=raw, mtime=0) if path.name.endswith(".gz") else raw
            )
            for pair in pairs:
                packed.write(f"{dump(pair)}\n".encode())
                count += 1
            if packed is not raw:
                packed.close()
        os.replace(part, path)
    except OSError as error:
        raise InputError(f"{path}: cannot be written ({error.strerror})") from error
    finally:
        part.unlink(missing_ok=True)
    return count


def couples(pairs: Iterable[Pair]) -> list[tuple[Pair, ...]]:
    """Pairs with their twins, each once, in the order of those that come first; a pair whose twin
    is not there stands alone."""
    found: dict[str, list[Pair]] = {}
    for pair in pairs:
        found.setdefault(pair.twin if pair.twin in found else pair.id, []).append(pair)
    return [tuple(couple) for couple in found.values()]
