"""Many judgements from one file: a JSON object a line in, one a line out, in the same order.

    python judge.py --batch in.jsonl --out out.jsonl              # --ray 4: by four workers of Ray

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

A bad line has a record with its error, and the next one is judged. Blank lines have no record.

The same command goes on where a run has ended. Lines that have a record are skipped; half a last
record is cut off. The key is a hash of the line and of all that its judgement depends on, so that
records of another input or other settings are refused and left alone. No clock is in a record:
killed and resumed, or in one go, with Ray or without, the file is the same.
"""

import functools
import gzip
import hashlib
import importlib.util
import io
import json
import logging
import os
import stat
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from nanopersrm import InputError, __version__
from nanopersrm.files import reason
from nanopersrm.judge.judgement import JudgeConfig, Judgement, check
from nanopersrm.pairs import SUFFIXES, parse_object
from nanopersrm.serve.reward_fn import Judges, completion_text, question_text, texts_of

OUT_OF_MEMORY = ("out of memory", "can't allocate memory")  # PyTorch's words for GPU and host
LEFT_OUT = ("replies", "seconds", "tokens", "prompt_tokens")  # of a judgement
FAILED = "failed"  # instead of a record: why a worker of Ray can judge nothing
LINES_AT_ONCE = 8  # that a worker of Ray takes: few, so that records come back soon
Load = Callable[[], Judges]  # such as LazyJudge(…).load
Numbered = tuple[int, bytes]  # a line of the input that is not blank
Record = dict[str, Any]  # a line of the output


@dataclass(frozen=True)
class Settings:
    """What holds for all lines."""

    exemplars: tuple[str, ...] = ()  # where a line has none
    principles: tuple[str, ...] = ()
    config: JudgeConfig = field(default_factory=JudgeConfig)
    model: str = ""  # which base and adapter judge, the latter by its contents: part of the key


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


def run(
    load: Load,
    source: Path,
    out: Path,
    settings: Settings,
    workers: int = 0,
    progress: Callable[[Tally, str | None], None] | None = None,
) -> Tally:
    """Judge every line of `source` that has no record in `out` yet.

    load: gives the judge, called when a line needs it. workers: of Ray, each with a judge of its
    own; 0: this process. progress(tally, error): called after each line, with the error of a bad
    one.
    """
    _check_files(source, out)
    tally = Tally(lines=sum(1 for _ in _read_lines(source)))
    lines = _read_lines(source)
    end, begun = _skip_done(out, lines, settings, tally)
    rest = (line for part in (begun, lines) for line in part)
    if workers:
        records = _records_by_ray(load, rest, settings, workers)
    else:
        load = functools.cache(load)
        records = (_record(load, number, raw, settings) for number, raw in rest)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        # Without a buffer: closing it would write once more what a full disk has refused.
        file = io.FileIO(out, "r+" if out.exists() else "x")
    except OSError as error:
        raise InputError(f"{out}: cannot be written ({reason(error)})") from error
    with file:
        file.truncate(end)
        file.seek(end)
        for record in records:
            _append(file, record, out)
            tally.add(record)
            if progress is not None:
                progress(tally, record.get("error"))
    return tally


def _record(load: Load, number: int, raw: bytes, settings: Settings) -> Record:
    """What is written of a line. What `load` raises is no mistake of the line."""
    place = f"line {number}"
    record: Record = {"line": number, "key": _key(raw, settings)}
    try:
        row = parse_object(_decoded(raw, place), place)
        record |= {"id": row["id"]} if "id" in row else {}
        exemplars, candidates, question = _parsed(row, place, settings)
    except InputError as error:
        return record | {"error": str(error)}
    judge = load()
    try:
        with judge.lock:
            judgement = judge.judge(
                exemplars, candidates, question, settings.principles, settings.config
            )
    except InputError as error:
        return record | {"error": f"{place}: {error}"}
    except (MemoryError, RuntimeError) as error:  # PyTorch's is a RuntimeError
        if isinstance(error, RuntimeError) and not any(
            words in str(error) for words in OUT_OF_MEMORY
        ):
            raise
        return record | {"error": f"{place}: memory ran out, the texts are too long for it"}
    record |= {name: x for name, x in judgement.as_dict().items() if name not in LEFT_OUT}
    if judgement.verdict == "invalid":
        record["ranking"] = None
    if "chosen" in row:
        record["right"] = None if judgement.verdict == "tie" else judgement.verdict == 0
    return record


def _parsed(
    row: Record, place: str, settings: Settings
) -> tuple[tuple[str, ...], tuple[str, ...], str | None]:
    """Exemplars, candidates and question of a line; an error names place and field."""
    pair = "chosen" in row or "rejected" in row
    if pair == ("candidates" in row):
        raise InputError(
            f"{place}: expected either candidates or chosen and rejected, got the fields "
            f"{list(row)!r:.100}"
        )
    if "question" in row and "prompt" in row:
        raise InputError(f"{place}: expected either question or prompt, got both")
    if row.get("exemplars") is not None:
        exemplars = texts_of(row["exemplars"], f"{place}, field exemplars")
    elif settings.exemplars:
        exemplars = settings.exemplars
    else:
        raise InputError(f"{place}, field exemplars: missing, and there is no --exemplar")
    if pair:
        candidates = tuple(_pair_text(row, name, place) for name in ("chosen", "rejected"))
    else:
        candidates = texts_of(row["candidates"], f"{place}, field candidates")
    name = "prompt" if "prompt" in row else "question"
    asks = row.get(name)
    question = None if asks is None else question_text(asks, f"{place}, field {name}")
    if any("\0" in text for text in (*exemplars, *candidates, question or "")):
        raise InputError(f"{place}: expected texts, got a zero byte in one")
    try:
        check(exemplars, candidates, settings.config, question, settings.principles)
    except InputError as error:
        raise InputError(f"{place}: {error}") from error
    return exemplars, candidates, question


def _pair_text(row: Record, name: str, place: str) -> str:
    if row.get(name) is None:
        raise InputError(f"{place}, field {name}: missing")
    text = completion_text(row[name], f"{place}, field {name}")
    if not text.strip():
        raise InputError(f"{place}, field {name}: expected some text, got an empty one")
    return text


def _key(raw: bytes, settings: Settings) -> str:
    """A hash of a line and of what else its judgement depends on."""
    return hashlib.sha256(_settings_json(settings) + b"\0" + raw).hexdigest()[:16]


@functools.lru_cache(1)
def _settings_json(settings: Settings) -> bytes:
    names = [f.name for f in fields(Judgement)]
    return json.dumps([__version__, names, asdict(settings)], sort_keys=True).encode()


# Files


def _check_files(source: Path, out: Path) -> None:
    """Both are read from the start and more than once, so a pipe will not do."""
    if not source.name.endswith(SUFFIXES):
        raise InputError(f"{source}: expected a .jsonl or .jsonl.gz file")
    if out.suffix != ".jsonl":
        raise InputError(f"{out}: expected a name that ends in .jsonl")
    for path, verb in ((source, "read"), (out, "written")):
        try:
            if not stat.S_ISREG(os.stat(path).st_mode):
                raise InputError(f"{path}: expected a file, got a folder, a pipe or a device")
        except FileNotFoundError as error:
            if path is source:
                raise InputError(f"{path}: no such file") from error
        except OSError as error:
            raise InputError(f"{path}: cannot be {verb} ({reason(error)})") from error
    if out.exists() and out.samefile(source):
        raise InputError(f"{out}: expected another file than the one that is read")


def _read_lines(source: Path) -> Iterator[Numbered]:
    """The lines that are not blank, numbered as in the file."""
    number = 0
    try:
        with gzip.open(source) if source.name.endswith(".gz") else open(source, "rb") as file:
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


def _skip_done(
    out: Path, lines: Iterator[Numbered], settings: Settings, tally: Tally
) -> tuple[int, list[Numbered]]:
    """Pass over the lines that have a record -> the byte where these end, and the line whose record
    was begun, which is to be judged again."""
    end = 0
    try:
        with open(out, "rb") as file:
            for number, raw in enumerate(file, 1):
                line, text = next(lines, (0, b""))
                begin = json.dumps({"line": line, "key": _key(text, settings)}).encode()[:-1]
                if not raw.startswith(begin) and not begin.startswith(raw):
                    raise InputError(
                        f"{out}, line {number}: expected the record of a line of the input with "
                        "these settings, got another; give another --out"
                    )
                if not raw.endswith(b"\n"):
                    return end, [(line, text)]  # half a record
                tally.add(parse_object(_decoded(raw, f"{out}, line {number}"), str(out)))
                tally.kept += 1
                end += len(raw)
    except FileNotFoundError:
        pass
    except OSError as error:
        raise InputError(f"{out}: cannot be read ({reason(error)})") from error
    return end, []


def _append(file: io.FileIO, record: Record, out: Path) -> None:
    rest = json.dumps(record, ensure_ascii=False, allow_nan=False).encode() + b"\n"
    try:
        while rest:  # a disk that is nearly full takes a part
            rest = rest[file.write(rest) :]
    except OSError as error:
        raise InputError(f"{out}: cannot be written ({reason(error)})") from error


# Ray


def _records_by_ray(
    load: Load, lines: Iterable[Numbered], settings: Settings, workers: int
) -> Iterator[Record]:
    """The records in the order of the lines. Without a cluster (RAY_ADDRESS), Ray starts one on
    this machine; where it has GPUs each worker gets one."""
    if workers < 1:
        raise InputError(f"--ray: expected a number of workers from 1, got {workers}")
    if importlib.util.find_spec("ray") is None:
        raise InputError("--ray: expected the library ray: pip install 'ray[data]'")
    rows = [{"number": number, "raw": raw} for number, raw in lines]
    if not rows:
        return
    import ray
    import ray.data  # takes seconds

    if not ray.is_initialized():
        ray.init(log_to_driver=False, logging_level=logging.WARNING)
    logging.getLogger("ray.data").setLevel(logging.WARNING)
    context = ray.data.DataContext.get_current()
    context.execution_options.preserve_order = True
    context.enable_progress_bars = False
    blocks = -(-len(rows) // LINES_AT_ONCE)
    records = ray.data.from_items(rows, override_num_blocks=blocks).map_batches(
        RayWorker,
        fn_constructor_args=(load, settings),
        batch_size=LINES_AT_ONCE,
        compute=ray.data.ActorPoolStrategy(size=workers),
        num_gpus=1 if ray.cluster_resources().get("GPU") else 0,
    )
    for row in records.iter_rows():
        record = json.loads(row["record"])
        if FAILED in record:
            raise InputError(record[FAILED])
        yield record


class RayWorker:
    """A process of Ray with a judge of its own."""

    def __init__(self, load: Load, settings: Settings):
        self.load, self.settings = functools.cache(load), settings

    def __call__(self, batch: dict[str, Any]) -> dict[str, list[str]]:
        lines = zip(batch["number"], batch["raw"], strict=True)
        try:
            records = [_record(self.load, int(k), bytes(raw), self.settings) for k, raw in lines]
        except InputError as error:  # of `load`: Ray would wrap it in errors of its own
            records = [{FAILED: str(error)}]
        return {"record": [json.dumps(record) for record in records]}
