"""Pairs: the record that everything is trained and measured on, one JSON object a line.

    {"id": "train-cross_author-00000a", "twin": "train-cross_author-00000b",
     "author": "Jane Austen", "domain": "fiction", "split": "train", "kind": "cross_author",
     "exemplars": ["…", "…"], "question": "", "chosen": "…", "rejected": "…",
     "chosen_from": "Jane Austen/Emma", "rejected_from": "Walter Scott/Waverley",
     "weight": 1.0, "meta": {}}

The exemplars and `chosen` are by one writer. The *twin* has the same two texts in opposite roles
and exemplars of the other writer: without the exemplars one is right half of the time.
"""

import gzip
import hashlib
import json
import os
import zlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from pydantic import Field, Strict, StrictStr, TypeAdapter, ValidationError
from pydantic_core import from_json

from nanopersrm import InputError
from nanopersrm.files import reason, write_text

KINDS = ("cross_author", "minor_replacement", "style_randomization", "style_mimicking", "restyle")
SPLITS = ("train", "validation", "test", "ood")
SUFFIXES = (".jsonl", ".jsonl.gz")
Text = Annotated[StrictStr, Field(pattern=r"\S")]  # not blank
Record = TypeVar("Record")


@dataclass(frozen=True)
class Pair:
    """Exemplars of one writer, a text that is theirs and one that is not."""

    id: Text
    twin: StrictStr  # id of the twin; "" when there is none
    author: Text  # of the exemplars
    domain: Text
    split: Literal["train", "validation", "test", "ood"]
    kind: Text  # one of KINDS, or a kind of your own
    exemplars: Annotated[tuple[Text, ...], Field(min_length=1)]
    question: StrictStr  # what both texts answer; "" when there is none
    chosen: Text
    rejected: Text
    chosen_from: Text  # "author/title", "restyle:contractions+:author" or "model:BASE:persona"
    rejected_from: Text
    weight: Annotated[float, Strict(), Field(ge=0, allow_inf_nan=False)] = 1.0
    meta: dict[str, Any] = field(default_factory=dict)
    extra: dict[str, Any] = field(default_factory=dict)  # fields we do not know


FIELDS = tuple(f.name for f in fields(Pair) if f.name != "extra")
PAIR = TypeAdapter(Pair)


def parse_object(line: str, place: str) -> dict[str, Any]:
    """One JSON object of one line; anything else is an error with its place."""
    try:
        record = from_json(line, allow_inf_nan=False)
    except ValueError as error:
        raise InputError(f"{place}: expected a JSON object, got none ({error})") from error
    if not isinstance(record, dict):
        raise InputError(f"{place}: expected a JSON object, got {record!r:.40}")
    return record


def validate(schema: TypeAdapter[Record], record: dict[str, Any], place: str) -> Record:
    """A record checked by pydantic; the first fault is an InputError with place and field."""
    try:
        return schema.validate_python(record)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        path = "".join(f"[{at}]" if isinstance(at, int) else f".{at}" for at in first["loc"])[1:]
        if first["type"] == "missing":
            raise InputError(f"{place}, field {path}: missing") from error
        message = first["msg"].replace("Input should be", "expected")
        got = f"{message}, got {first['input']!r:.60}"
        raise InputError(f"{place}, field {path}: {got}") from error


def parse(record: dict[str, Any], place: str = "pair") -> Pair:
    """A checked pair of one JSON object; an error names place and field."""
    extra = {name: value for name, value in record.items() if name not in FIELDS}
    pair = validate(PAIR, {**record, "extra": extra}, place)
    if pair.chosen == pair.rejected:
        raise InputError(f"{place}, field rejected: expected another text than chosen, got it")
    return pair


def lines(path: Path) -> Iterator[tuple[str, str]]:
    """(place, line) of each line that is not blank, of a plain or gzip-packed file."""
    number = 0
    try:
        with (gzip.open if path.name.endswith(".gz") else open)(path, "rb") as file:
            for number, raw in enumerate(file, 1):
                line = raw.decode("utf-8-sig" if number == 1 else "utf-8")
                if line.strip():
                    yield f"{path}, line {number}", line
    except UnicodeDecodeError as error:
        raise InputError(f"{path}, line {number}: expected UTF-8 text ({error.reason})") from error
    except (OSError, EOFError, zlib.error) as error:
        raise InputError(f"{path}: cannot be read ({reason(error)})") from error


def read(path: str | os.PathLike[str], empty: bool = False) -> list[Pair]:
    """The pairs of a file, each checked, and against its twin; none only where `empty` is fine."""
    pairs: dict[str, Pair] = {}
    for place, line in lines(Path(path)):
        pair = parse(parse_object(line, place), place)
        if pairs.setdefault(pair.id, pair) is not pair:
            raise InputError(f"{place}, field id: {pair.id!r} is the id of an earlier pair")
    if not pairs and not empty:
        raise InputError(f"{path}: expected pairs, got none")
    check_twins(list(pairs.values()), f"{path}, ")
    return list(pairs.values())


def check_twins(pairs: Sequence[Pair], place: str = "") -> None:
    """Every twin that is named is there and has the same two texts in opposite roles."""
    by_id = {pair.id: pair for pair in pairs}
    for pair in pairs:
        if not pair.twin:
            continue
        twin = by_id.get(pair.twin)
        if twin is None:
            fault = f"no pair has the id {pair.twin!r}"
        elif (twin.twin, twin.split) != (pair.id, pair.split):
            fault = f"expected a pair of the same split whose twin is {pair.id!r}"
        elif (twin.chosen, twin.rejected) != (pair.rejected, pair.chosen):
            fault = "expected the same two texts in opposite roles"
        elif set(twin.exemplars) & set(pair.exemplars):
            fault = "expected other exemplars"
        else:
            continue
        raise InputError(f"{place}pair {pair.id!r}, field twin: {fault}")


def dump(pair: Pair) -> str:
    """The line of a pair, without its line end. Known fields first, in their order."""
    record = {name: getattr(pair, name) for name in FIELDS} | pair.extra
    try:  # what cannot be encoded raises here, not in the middle of a file
        return json.dumps(record, ensure_ascii=False, allow_nan=False).encode().decode()
    except (TypeError, ValueError) as error:
        raise InputError(f"pair {pair.id!r}: cannot be written as JSON ({error})") from error


def digest(pairs: Iterable[Pair]) -> str:
    """SHA-256 of pairs in their order: the same wherever their file lies."""
    return hashlib.sha256("".join(f"{dump(pair)}\n" for pair in pairs).encode()).hexdigest()


def write(path: str | os.PathLike[str], pairs: Iterable[Pair]) -> int:
    """Write pairs to a .jsonl file, one a line, whole or not at all; gives how many."""
    records = [f"{dump(pair)}\n" for pair in pairs]
    write_text(Path(path), "".join(records))
    return len(records)


def twin_pairs(pairs: Iterable[Pair]) -> list[tuple[Pair, ...]]:
    """Pairs with their twins, each once, in the order of those that come first."""
    by_id: dict[str, list[Pair]] = {}
    for pair in pairs:
        by_id.setdefault(pair.twin if pair.twin in by_id else pair.id, []).append(pair)
    return [tuple(twins) for twins in by_id.values()]
