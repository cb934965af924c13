"""Many judgements from one file: a JSON object a line in, one a line out, in the same order.

    python judge.py --batch in.jsonl --out out.jsonl              # --ray 4: by four workers of Ray

A line of the file is one of these; other fields are passed over:

    {"exemplars": ["…"], "candidates": ["…", "…"], "question": "…", "id": "…"}
    {"exemplars": ["…"], "chosen": "…", "rejected": "…", "question": "…", "id": "…"}   pairs.py
    {"exemplars": ["…"], "chosen": "…", "rejected": "…", "prompt": "…", "id": 7}       RewardBench

`question` (or `prompt`) and `id` may be left out, `exemplars` where the command names some for all.
What comes out (`right` for pairs only: is the chosen text the verdict? null for a tie):

    {"line": 1, "key": "5f0c…", "id": "…", "scores": [6.1, 3.2], "preference": [[…]], "ranking":
     [0, 1], "verdict": 0, "reasoning": ["…"], "candidates": [{"score": 6.1, "ledger": […], …}, …],
     "notes": [], "right": true}
    {"line": 2, "key": "…", "error": "line 2: expected at least one exemplar, got none"}

A bad line has a record with its error, a blank one has none. The same command goes on where a run
has ended; half a last record is cut off. The key is a hash of the line and of all that its
judgement depends on: records of another input or other settings are refused and left alone. No
clock is in a record: killed and resumed, or in one go, with Ray or without, the file is the same.
"""

import functools
import gzip
import hashlib
import importlib.util
import io
import json
import logging
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Annotated, Any

from pydantic import AliasChoices, BaseModel, BeforeValidator, Field

from nanopersrm import InputError, __version__
from nanopersrm.files import reason
from nanopersrm.judge.judgement import JudgeConfig, Judgement, check
from nanopersrm.pairs import SUFFIXES, parse_object
from nanopersrm.serve.reward_fn import Judges, Question, Text, Texts, checked, completion_of

OUT_OF_MEMORY = ("out of memory", "can't allocate memory")  # PyTorch's words for GPU and host
LEFT_OUT = ("replies", "seconds", "tokens", "prompt_tokens")  # of a judgement
FAILED = "failed"  # instead of a record: why a worker of Ray can judge nothing
LINES_AT_ONCE = 8  # that a worker of Ray takes: few, so that records come back soon
BEGIN = b'{"line": '  # of every record
Load = Callable[[], Judges]  # such as LazyJudge(…).load
Keyed = tuple[int, str, bytes]  # number, key and bytes of a line of the input
Record = dict[str, Any]  # a line of the output


@dataclass(frozen=True)
class Settings:
    """What holds for all lines."""

    exemplars: tuple[str, ...] = ()  # where a line has none
    principles: tuple[str, ...] = ()
    config: JudgeConfig = field(default_factory=JudgeConfig)
    model: str = ""  # which base and adapter judge, the latter by its contents: part of the key


class Line(BaseModel):
    """What is read of a line; candidates or a pair."""

    exemplars: Texts | None = None
    candidates: Texts | None = None
    chosen: Annotated[Text, BeforeValidator(completion_of)] | None = None
    rejected: Annotated[Text, BeforeValidator(completion_of)] | None = None
    question: Question = Field(None, validation_alias=AliasChoices("question", "prompt"))


@dataclass
class Tally:
    """How far it is, and what was seen."""

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
    own; 0: this process. progress(tally, error of a bad line): called after each line.
    """
    lines = _read_lines(source)
    done, end = _records_in(out, source)
    tally = Tally(lines=len(lines), kept=len(done))
    names = [f.name for f in fields(Judgement)]
    shared = json.dumps([__version__, names, asdict(settings)], sort_keys=True).encode() + b"\0"
    keys = {number: hashlib.sha256(shared + raw).hexdigest()[:16] for number, raw in lines}
    for record in done:
        if keys.get(record["line"]) != record["key"]:
            place = f"{out}, record of line {record['line']}"
            raise InputError(f"{place}: expected one of this input and settings; use another --out")
        tally.add(record)
        del keys[record["line"]]
    rest = [(number, keys[number], raw) for number, raw in lines if number in keys]
    cached = functools.cache(load)
    records: Iterator[Record] = (_record(cached, *line, settings) for line in rest)
    if workers:
        records = _records_by_ray(load, rest, settings, workers)
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
            line = json.dumps(record, ensure_ascii=False, allow_nan=False).encode() + b"\n"
            try:
                while line:  # a disk that is nearly full takes a part
                    line = line[file.write(line) :]
            except OSError as error:
                raise InputError(f"{out}: cannot be written ({reason(error)})") from error
            tally.add(record)
            if progress is not None:
                progress(tally, record.get("error"))
    return tally


def _record(load: Load, number: int, key: str, raw: bytes, settings: Settings) -> Record:
    """What is written of a line. What `load` raises is no mistake of the line."""
    place = f"line {number}"
    record: Record = {"line": number, "key": key}
    try:
        row = parse_object(raw.decode(), place)
        record |= {"id": row["id"]} if "id" in row else {}
        line = checked(Line, row, place)
        pair = (line.chosen or "", line.rejected or "")
        if (line.candidates is None) == (line.chosen is None or line.rejected is None):
            raise InputError(f"{place}: expected either candidates, or chosen and rejected")
        exemplars, candidates = line.exemplars or settings.exemplars, line.candidates or pair
        check(exemplars, candidates, settings.config, line.question, settings.principles)
    except (InputError, UnicodeDecodeError) as error:
        return record | {"error": f"{place}: {str(error).removeprefix(f'{place}: ')}"}
    judge, texts = load(), (exemplars, candidates, line.question)
    try:
        with judge.lock:
            judgement = judge.judge(*texts, settings.principles, settings.config)
    except InputError as error:
        return record | {"error": f"{place}: {error}"}
    except (MemoryError, RuntimeError) as error:  # PyTorch's is a RuntimeError
        if str(error) and not any(words in str(error) for words in OUT_OF_MEMORY):
            raise
        return record | {"error": f"{place}: memory ran out, the texts are too long for it"}
    record |= {name: x for name, x in judgement.as_dict().items() if name not in LEFT_OUT}
    if judgement.verdict == "invalid":
        record["ranking"] = None
    if line.candidates is None:
        record["right"] = None if judgement.verdict == "tie" else judgement.verdict == 0
    return record


def _read_lines(source: Path) -> list[tuple[int, bytes]]:
    """The lines that are not blank, numbered as in the file."""
    if not source.name.endswith(SUFFIXES):
        raise InputError(f"{source}: expected a .jsonl or .jsonl.gz file")
    try:
        with gzip.open(source) if source.name.endswith(".gz") else open(source, "rb") as file:
            raws = [raw.strip().removeprefix(b"\xef\xbb\xbf").strip() for raw in file]  # BOM
    except (OSError, EOFError, zlib.error) as error:
        raise InputError(f"{source}: cannot be read ({reason(error)})") from error
    return [(number, raw) for number, raw in enumerate(raws, 1) if raw]


def _records_in(out: Path, source: Path) -> tuple[list[Record], int]:
    """The whole records that are there, and the byte where they end."""
    if out.suffix != ".jsonl" or (out.exists() and (not out.is_file() or out.samefile(source))):
        raise InputError(f"{out}: expected another file than {source}, ending in .jsonl")
    *whole, half = out.read_bytes().split(b"\n") if out.exists() else [b""]
    records = [parse_object(raw.decode(errors="replace"), str(out)) for raw in whole]
    ours = all({"line", "key"} <= set(record) for record in records)
    if not ours or not half.startswith(BEGIN[: len(half)]):
        raise InputError(f"{out}: expected records of an earlier run, got another file")
    return records, sum(len(raw) + 1 for raw in whole)


def _records_by_ray(
    load: Load, lines: Sequence[Keyed], settings: Settings, workers: int
) -> Iterator[Record]:
    """In the order of the lines. Without a cluster (RAY_ADDRESS), Ray starts one on this machine;
    where it has GPUs each worker gets one."""
    if workers < 1:
        raise InputError(f"--ray: expected a number of workers from 1, got {workers}")
    if importlib.util.find_spec("ray") is None:
        raise InputError("--ray: expected the library ray: pip install 'ray[data]'")
    if not lines:
        return
    import ray
    import ray.data  # takes seconds

    if not ray.is_initialized():
        ray.init(log_to_driver=False, logging_level=logging.WARNING)
    logging.getLogger("ray.data").setLevel(logging.WARNING)
    context = ray.data.DataContext.get_current()
    context.execution_options.preserve_order = True
    context.enable_progress_bars = False
    rows = [{"number": number, "key": key, "raw": raw} for number, key, raw in lines]
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
        lines = zip(batch["number"], batch["key"], batch["raw"], strict=True)
        try:
            records = [
                _record(self.load, int(number), str(key), bytes(raw), self.settings)
                for number, key, raw in lines
            ]
        except InputError as error:  # of `load`: Ray would wrap it in errors of its own
            records = [{FAILED: str(error)}]
        return {"record": [json.dumps(record) for record in records]}
