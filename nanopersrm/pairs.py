"""Pairs: the record that everything is trained and measured on, one JSON object a line.

    {"id": "train-cross_author-00000a", "twin": "train-cross_author-00000b",
     "author": "Jane Austen", "domain": "fiction", "split": "train", "kind": "cross_author",
     "exemplars": ["…", "…"], "question": "", "chosen": "…", "rejected": "…",
     "chosen_from": "Jane Austen/Emma", "rejected_from": "Walter Scott/Waverley",
     "weight": 1.0, "meta": {}}

The exemplars are texts of one writer. `chosen` is another text of that writer, `rejected` a text of
somebody else. The *twin* has the same two texts in opposite roles and exemplars of the other
writer. Whoever does not read the exemplars gives both the same answer and is right once: 50 %.

`weight` and `meta` may be left out; fields we do not know are kept and written back. An empty
`twin` means that there is none. A wrong line is an error with file, line and field, never skipped.
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
from typing import Annotated, Any, Literal, TypeVar

from pydantic import AfterValidator, Field, Strict, StrictStr, TypeAdapter, ValidationError

from nanopersrm import InputError
from nanopersrm.files import write_text

KINDS = ("cross_author", "minor_replacement", "style_randomization", "style_mimicking", "restyle")
SPLITS = ("train", "validation", "test", "ood")
SUFFIXES = (".jsonl", ".jsonl.gz")


def _not_blank(text: str) -> str:
    if not text.strip():
        raise ValueError("expected some text")
    return text


Text = Annotated[StrictStr, AfterValidator(_not_blank)]
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
    except (ValueError, RecursionError) as error:  # UnicodeEncodeError: half a character
        reason = str(error) or "nested too deep"
        raise InputError(f"{place}: expected a JSON object, got none ({reason})") from error
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
        message = first["msg"].removeprefix("Value error, ").replace("Input should be", "expected")
        if first["type"] == "missing":
            raise InputError(f"{place}, field {path}: missing") from error
        got = json.dumps(first["input"], ensure_ascii=False, default=repr)
        raise InputError(f"{place}, field {path}: {message}, got {got:.60}") from error


def parse(record: dict[str, Any], place: str = "pair") -> Pair:
    """A checked pair of one JSON object; an error names place and field."""
    extra = {name: value for name, value in record.items() if name not in FIELDS}
    known = {name: value for name, value in record.items() if name in FIELDS}
    pair = validate(PAIR, {**known, "extra": extra}, place)
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
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise InputError(f"{path}, line {number + 1}: broken gzip data ({error})") from error
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror})") from error


def read(path: str | os.PathLike[str], empty: bool = False) -> list[Pair]:
    """The pairs of a .jsonl or .jsonl.gz file, each checked, and against its twin.

    At least one, unless the file may be `empty`, as validation.jsonl of few writers is.
    """
    path = Path(path)
    if not path.name.endswith(SUFFIXES):
        raise InputError(f"{path}: expected a .jsonl or .jsonl.gz file")
    places: dict[str, str] = {}
    pairs = []
    for place, line in lines(path):
        pair = parse(parse_object(line, place), place)
        if pair.id in places:
            raise InputError(f"{place}, field id: {pair.id!r} is also the id of {places[pair.id]}")
        places[pair.id] = place
        pairs.append(pair)
    if not pairs and not empty:
        raise InputError(f"{path}: expected pairs, got none")
    check_twins(pairs, places)
    return pairs


def check_twins(pairs: Sequence[Pair], places: dict[str, str] | None = None) -> None:
    """Every twin that is named is there and has the same two texts in opposite roles."""
    by_id = {pair.id: pair for pair in pairs}
    for pair in pairs:
        if not pair.twin:
            continue
        where = f"{places[pair.id] if places else f'pair {pair.id!r}'}, field twin"
        if (twin := by_id.get(pair.twin)) is None:
            raise InputError(f"{where}: no pair has the id {pair.twin!r}")
        faults = {
            "expected the id of another pair": twin is pair,
            f"{pair.twin!r} has another twin": twin.twin != pair.id,
            "expected the same two texts in opposite roles": (
                (twin.chosen, twin.rejected) != (pair.rejected, pair.chosen)
            ),
            f"{pair.twin!r} is in {twin.split}, this one in {pair.split}": twin.split != pair.split,
            "expected other exemplars": bool(set(twin.exemplars) & set(pair.exemplars)),
        }
        for fault, applies in faults.items():
            if applies:
                raise InputError(f"{where}: {fault}")


def dump(pair: Pair) -> str:
    """The line of a pair, without its line end. Known fields first, in their order."""
    record = {name: getattr(pair, name) for name in FIELDS}
    if both := sorted(set(record) & set(pair.extra)):
        raise InputError(f"pair {pair.id!r}, field {both[0]}: stands in extra too")
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
    """Write pairs to a .jsonl file, one a line, whole or not at all; gives how many."""
    path = Path(path)
    if path.suffix != ".jsonl":
        raise InputError(f"{path}: expected a name that ends in .jsonl")
    records = [f"{dump(pair)}\n" for pair in pairs]
    write_text(path, "".join(records))
    return len(records)


def twin_pairs(pairs: Iterable[Pair]) -> list[tuple[Pair, ...]]:
    """Pairs with their twins, each once, in the order of those that come first; a pair whose twin
    is not there stands alone."""
    by_id: dict[str, list[Pair]] = {}
    for pair in pairs:
        by_id.setdefault(pair.twin if pair.twin in by_id else pair.id, []).append(pair)
    return [tuple(twins) for twins in by_id.values()]
