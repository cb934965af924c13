"""Many judgements from one file: a JSON object a line in, one a line out, in the same order.

    python judge.py --batch in.jsonl --out out.jsonl

A line of the file is one of these; other fields are passed over:

    {"exemplars": ["…"], "candidates": ["…", "…"], "question": "…", "id": "…"}
    {"exemplars": ["…"], "chosen": "…", "rejected": "…", "question": "…", "id": "…"}   pairs.py
    {"exemplars": ["…"], "chosen": "…", "rejected": "…", "prompt": "…", "id": 7}       RewardBench

`question` (or `prompt`) and `id` may be left out, `exemplars` where the command names some for all.
What comes out (`right` for pairs only: is the chosen text the verdict? null for a tie):

    {"line": 1, "key": "5f0c…", "id": "…", "scores": [6.1, 3.2], "preference": [[…]], "ranking":
     [0, 1], "verdict": 0, "reasoning": ["…"], "well_formed": true, "notes": [],
     "measured": [58.2, 41.0], "right": true}
    {"line": 2, "key": "…", "error": "line 2, field exemplars: missing"}

Where a candidate got no score the verdict is "invalid", the ranking null, and no pair is right.
A bad line is one that cannot be read or judged. It is told, it has its record, and the next one is
judged. Blank lines have no record.

Going on. Each record is written when it is known, so a run that was killed goes on where the file
ends; half a last line is cut off. The key is a hash of the input line and of what its record
depends on: the settings, what a judgement holds, and all that the adapter's folder says and holds,
so the sharpness in judge.json too. If the old records do not have the keys they must have, the
input or the settings are others, and nothing is written. The clock is in no record: killed and
resumed, or in one go, the file is the same.

What we chose. The records are appended to the file itself and not to a temporary one, because what
is there already is the point. What we left out: two runs that write the same file, a base that
became another in the same place (the key has its name), lists in `chosen` and `rejected`
(RewardBench 2).
"""

import functools
import gzip
import hashlib
import io
import json
import os
import stat
import zlib
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import closing
from dataclasses import asdict, dataclass, field, fields
from itertools import chain
from pathlib import Path
from typing import Any

from nanopersrm import InputError, __version__
from nanopersrm.files import reason
from nanopersrm.judge.judgement import JudgeConfig, Judgement, check
from nanopersrm.pairs import SUFFIXES, parse_object
from nanopersrm.serve.reward_fn import Judges, completion_text, question_text, texts_of

BEGINS = b'{"line": '  # each record
NO_MEMORY = ("out of memory", "can't allocate memory")  # what PyTorch says of cards and of hosts
LEFT_OUT = ("replies", "seconds", "tokens", "prompt_tokens")  # of a judgement
Load = Callable[[], Judges]
Numbered = tuple[int, bytes]  # a line of the input that is not blank
Record = dict[str, Any]  # a line of the output


@dataclass(frozen=True)
class Asking:
    """What holds for all lines."""

    exemplars: tuple[str, ...] = ()  # where a line has none
    principles: tuple[str, ...] = ()
    config: JudgeConfig = field(default_factory=JudgeConfig)
    model: str = ""  # which base and adapter judge, the latter by its contents: part of the key


@dataclass(frozen=True)
class Line:
    """A line that can be judged."""

    exemplars: tuple[str, ...]
    candidates: tuple[str, ...]
    question: str | None
    pair: bool  # the first candidate is the chosen one


@dataclass
class Tally:
    """How far it is, and what was found."""

    lines: int = 0  # there are, without the blank ones
    judged: int = 0
    bad: int = 0
    invalid: int = 0  # of those judged: without a verdict
    kept: int = 0  # of these, from an earlier run
    pairs: int = 0  # of those judged
    right: float = 0.0  # pairs whose chosen text is the verdict; ties count half

    def add(self, record: Record) -> None:
        self.bad += "error" in record
        self.judged += "error" not in record
        self.invalid += record.get("verdict") == "invalid"
        if "right" in record:
            self.pairs += 1
            self.right += 0.5 if record["right"] is None else float(record["right"])


def one_by_one(load: Load, lines: Iterable[Numbered], asking: Asking) -> Iterator[Record]:
    """The record of each line, one after the other, in this process."""
    load = functools.cache(load)
    for number, raw in lines:
        yield record_of(load, number, raw, asking)


def run(
    load: Load,
    source: Path,
    out: Path,
    asking: Asking,
    told: Callable[[Tally, str | None], None] | None = None,
    work: Callable[[Load, Iterable[Numbered], Asking], Iterator[Record]] = one_by_one,
) -> Tally:
    """Judge every line of `source` that has no record in `out` yet.

    load: gives the judge, called when a line needs it. told(tally, error): after every line of this
    run, with the error if it is bad. work: who makes the records, in the order of the lines.
    """
    _check_names(source, out)
    tally = Tally(lines=sum(1 for _ in _lines(source)))
    with closing(_lines(source)) as lines:
        end, begun = _earlier(out, lines, asking, tally)
        with closing(_opened(out, end)) as file:
            for record in work(load, chain(begun, lines), asking):
                _append(file, record, out)
                tally.add(record)
                if told is not None:
                    told(tally, record.get("error"))
    return tally


def record_of(load: Load, number: int, raw: bytes, asking: Asking) -> Record:
    """What is written of a line. What `load` raises is no mistake of the line."""
    place = f"line {number}"
    record: Record = {"line": number, "key": _key(raw, asking)}
    try:
        given = parse_object(_decoded(raw, place), place)
        record |= {"id": given["id"]} if "id" in given else {}
        line = parsed(given, place, asking)
    except InputError as error:
        return record | {"error": str(error)}
    judge = load()
    try:
        return record | _judged(judge, line, asking)
    except InputError as error:
        return record | {"error": f"{place}: {error}"}
    except (MemoryError, RuntimeError) as error:  # PyTorch's is a RuntimeError
        if isinstance(error, RuntimeError) and not any(word in str(error) for word in NO_MEMORY):
            raise
        return record | {"error": f"{place}: memory ran out, the texts are too long for it"}


def parsed(record: Record, place: str, asking: Asking) -> Line:
    """What a line asks; an error names place and field."""
    pair = "chosen" in record or "rejected" in record
    if pair == ("candidates" in record):
        raise InputError(
            f"{place}: expected either candidates or chosen and rejected, got the fields "
            f"{list(record)!r:.100}"
        )
    if "question" in record and "prompt" in record:
        raise InputError(f"{place}: expected either question or prompt, got both")
    exemplars = asking.exemplars
    if record.get("exemplars") is not None:
        exemplars = _texts(record, "exemplars", place)
    elif not exemplars:
        raise InputError(f"{place}, field exemplars: missing, and there is no --exemplar")
    if pair:
        candidates = tuple(_text(record, name, place) for name in ("chosen", "rejected"))
    else:
        candidates = _texts(record, "candidates", place)
    name = "prompt" if "prompt" in record else "question"
    asked = record.get(name)
    question = None if asked is None else question_text(asked, f"{place}, field {name}")
    _no_zero(question or "", f"{place}, field {name}")
    try:
        check(exemplars, candidates, asking.config, question, asking.principles)
    except InputError as error:
        raise InputError(f"{place}: {error}") from error
    return Line(exemplars, candidates, question, pair)


def _texts(record: Record, name: str, place: str) -> tuple[str, ...]:
    texts = texts_of(record[name], f"{place}, field {name}")
    for i, text in enumerate(texts, 1):
        _no_zero(text, f"{place}, field {name}, text {i}")
    return texts


def _no_zero(text: str, place: str) -> None:
    """Refuse what files may not have either."""
    if "\0" in text:
        raise InputError(f"{place}: expected a text, found a zero byte")


def _text(record: Record, name: str, place: str) -> str:
    if record.get(name) is None:
        raise InputError(f"{place}, field {name}: missing")
    text = completion_text(record[name], f"{place}, field {name}")
    if not text.strip():
        raise InputError(f"{place}, field {name}: expected some text, got an empty one")
    _no_zero(text, f"{place}, field {name}")
    return text


def _judged(judge: Judges, line: Line, asking: Asking) -> Record:
    """What a record says of a judgement."""
    with judge.lock:
        found = judge.judge(
            line.exemplars, line.candidates, line.question, asking.principles, asking.config
        )
    record = {name: value for name, value in found.as_dict().items() if name not in LEFT_OUT}
    if found.verdict == "invalid":
        record["ranking"] = None
    if line.pair:
        record["right"] = None if found.verdict == "tie" else found.verdict == 0
    return record


# Reading


def _check_names(source: Path, out: Path) -> None:
    if not source.name.endswith(SUFFIXES):
        raise InputError(f"{source}: expected a .jsonl or .jsonl.gz file")
    read = _file(source, "read")
    if read is None:
        raise InputError(f"{source}: no such file")
    if out.suffix != ".jsonl":
        raise InputError(f"{out}: expected a name that ends in .jsonl")
    written = _file(out, "written")
    if written is not None and os.path.samestat(written, read):
        raise InputError(f"{out}: expected another file than the one that is read")


def _file(path: Path, verb: str) -> os.stat_result | None:
    """What the system knows of a file, None: there is none. Both files are read from the start and
    more than once, so a pipe will not do, and a device may have no end."""
    try:
        found = os.stat(path)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise InputError(f"{path}: cannot be {verb} ({reason(error)})") from error
    if not stat.S_ISREG(found.st_mode):
        kind = "folder" if stat.S_ISDIR(found.st_mode) else "pipe or a device"
        raise InputError(f"{path}: expected a file, found a {kind}")
    return found


def _lines(source: Path) -> Generator[Numbered, None, None]:
    """The lines that are not blank, numbered as in the file."""
    packed = source.name.endswith(".gz")
    number = 0
    try:
        with gzip.open(source, "rb") if packed else open(source, "rb") as file:
            for number, raw in enumerate(file, 1):
                if number == 1:
                    raw = raw.removeprefix(b"\xef\xbb\xbf")  # a byte-order mark
                if raw.strip():
                    yield number, raw.strip()
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise InputError(f"{source}, line {number + 1}: broken gzip data ({error})") from error
    except OSError as error:
        raise InputError(f"{source}: cannot be read ({reason(error)})") from error


def _decoded(raw: bytes, place: str) -> str:
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise InputError(f"{place}: expected UTF-8 text ({error.reason})") from error


def _earlier(
    out: Path, lines: Iterator[Numbered], asking: Asking, tally: Tally
) -> tuple[int, list[Numbered]]:
    """Count the records of an earlier run and pass over their lines; gives where they end, and the
    line whose record was begun, which is to be judged again."""
    end, other = 0, "give another --out"
    try:
        with open(out, "rb") as file:
            for number, raw in enumerate(file, 1):
                place = f"{out}, line {number}"
                if not raw.startswith(BEGINS) and not BEGINS.startswith(raw):
                    raise InputError(f"{place}: expected a record of this command; {other}")
                line, given = next(lines, (0, b""))
                if not line:
                    raise InputError(f"{place}: a record more than there are lines; {other}")
                begins = json.dumps({"line": line, "key": _key(given, asking)}).encode()[:-1]
                if not raw.startswith(begins) and not begins.startswith(raw):
                    raise InputError(
                        f"{place}: was made from another line or with other settings; {other}"
                    )
                if not raw.endswith(b"\n"):
                    return end, [(line, given)]  # half a record
                tally.add(parse_object(_decoded(raw, place), place))
                tally.kept += 1
                end += len(raw)
    except FileNotFoundError:
        return 0, []
    except OSError as error:
        raise InputError(f"{out}: cannot be read ({reason(error)})") from error
    return end, []


# Writing


def _opened(out: Path, end: int) -> io.FileIO:
    """The file, ready for the next record, without a buffer: closing it would write once more what
    a full disk has refused."""
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        file = io.FileIO(out, "r+" if out.exists() else "x")
        file.seek(end)
        file.truncate()
    except OSError as error:
        raise InputError(f"{out}: cannot be written ({reason(error)})") from error
    return file


def _append(file: io.FileIO, record: Record, out: Path) -> None:
    line = json.dumps(record, ensure_ascii=False, allow_nan=False)
    rest = line.encode() + b"\n"
    try:
        while rest:  # a disk that is nearly full takes a part
            rest = rest[file.write(rest) :]
    except OSError as error:
        raise InputError(f"{out}: cannot be written ({reason(error)})") from error


def _key(raw: bytes, asking: Asking) -> str:
    """A hash of a line and of what else its judgement depends on."""
    return hashlib.sha256(_settings(asking) + b"\0" + raw).hexdigest()[:16]


@functools.lru_cache(1)
def _settings(asking: Asking) -> bytes:
    told = [one.name for one in fields(Judgement)]
    return json.dumps([__version__, told, asdict(asking)], sort_keys=True).encode()
