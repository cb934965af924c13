"""Evaluate: how often does a judge tell the writer's text from another?

    python -m nanopersrm.evaluate --pairs test.jsonl ood.jsonl --baselines --train train.jsonl \\
                                  --out result.json

judges every pair and prints a row a judge with intervals over authors (`metrics.py`). --judges
model,style names judges of `judges.py`, --baselines adds all, --beside NAME=FOLDER another adapter
of the same base. The first judge is also set against each of the others, pair by pair.

How it works. The two texts of a pair are shown in alphabetical order, which knows nothing of the
label. What cannot be judged, such as a text longer than the context, is invalid, hence wrong. With
--out, predictions are kept in RESULT.predictions.jsonl as they come, under a hash of texts and
settings; after an interruption the same command goes on from there.
"""

import hashlib
import json
import os
import random
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ValidationError
from rich.console import Console
from rich.progress import Progress

from nanopersrm import InputError
from nanopersrm.command import exit_code
from nanopersrm.evaluate.judges import NAMES, NamedJudge, Prediction, Setup, make
from nanopersrm.evaluate.metrics import RESAMPLES, Record, compare, measure, record
from nanopersrm.evaluate.scoreboard import page
from nanopersrm.files import reason, sha256_of, write_json
from nanopersrm.judge import adapter_settings
from nanopersrm.judge.adapter_settings import DEFAULT
from nanopersrm.judge.judgement import JudgeConfig
from nanopersrm.model.base import DEFAULT_BASE
from nanopersrm.pairs import Pair, read, twin_pairs

TRAIN_PAIRS = 1000  # to fit text judges on, drawn from all of them


class Line(BaseModel):
    """A line of the file of predictions."""

    key: str
    judge: str  # this and the pair for whoever reads it
    pair: str
    prediction: Prediction


@dataclass(frozen=True)
class Config:
    """Judge pairs with twins, and say how well."""

    pairs: tuple[Path, ...]  # .jsonl or .jsonl.gz files
    base: str = DEFAULT_BASE  # the embedded default, a folder, a .gguf file, or a hub name
    adapter: str = DEFAULT  # a folder with a trained adapter; default: that of the base; or none
    baselines: bool = False  # judge with everything that judges.py knows
    judges: str = "model"  # by name, with commas between; the first gives the result
    beside: tuple[str, ...] = ()  # further adapters of the same base, each as NAME=FOLDER
    train: Path | None = None  # pairs to fit text judges on
    exemplars: int | None = None  # show exactly so many; default: all that a pair has
    limit: int | None = None  # judge at most so many pairs, drawn by the seed
    mode: Literal["pointwise", "pairwise"] = JudgeConfig.mode  # one candidate a prompt, or two
    think_lines: int = JudgeConfig.think_lines  # lines of evidence before the score, at most
    samples: int = JudgeConfig.samples  # replies a prompt, averaged
    seed: int = 0  # of samples, of --limit, of the intervals
    device: str = "auto"  # auto, cpu, cuda, cuda:N
    dtype: str = "auto"  # auto (16 bits where they are fast), bf16, fp16, fp32
    out: Path | None = None  # the .json file to write
    json: bool = False  # print the numbers as JSON in place of tables


def main(config: Config, command: str = "") -> None:
    """Read, judge, measure, print, write."""
    names = [name.strip() for name in config.judges.split(",")]
    for name in names:
        if name not in NAMES:
            raise InputError(f"--judges: expected names out of {', '.join(NAMES)}, got {name!r}")
    names = list(dict.fromkeys([*names, *(NAMES if config.baselines else ())]))
    options = (option.partition("=") for option in config.beside)
    beside = {name: folder for name, _, folder in options}
    for name, folder in beside.items():
        if not name.strip() or not folder or name in NAMES:
            raise InputError(f"--beside: expected NAME=FOLDER with a new name, got {name}={folder}")
    if config.out is not None and config.out.suffix != ".json":
        raise InputError(f"--out {config.out}: expected a name that ends in .json")
    judging = JudgeConfig(
        mode=config.mode,
        think_lines=config.think_lines,
        samples=config.samples,
        seed=config.seed,
        topics=False,
    )
    pairs = [pair for path in config.pairs for pair in read(path, empty=True)]
    for pair_id in (name for name, n in Counter(pair.id for pair in pairs).items() if n > 1):
        raise InputError(f"--pairs: the id {pair_id!r} is in two of the files")
    pairs = select(pairs, config.limit, config.exemplars, config.seed)
    train = read(config.train) if config.train else []
    if len(train) > TRAIN_PAIRS:
        train = random.Random(f"{config.seed}/evaluate/train").sample(train, TRAIN_PAIRS)
    train = [replace(pair, exemplars=pair.exemplars[: config.exemplars]) for pair in train]
    file = config.out.with_suffix(".predictions.jsonl") if config.out else None
    log = Console(stderr=True, highlight=False, soft_wrap=True)
    chosen = adapter_settings.resolve_adapter(config.adapter, config.base)
    adapter = None if chosen is None else str(chosen)
    setup = Setup(
        *(config.base, adapter, config.device, config.dtype), judging, train, beside, log.print
    )
    records: dict[str, list[Record]] = {}
    notes: dict[str, str] = {}  # on each judge, or why it is left out
    with Progress(console=log, transient=True, disable=not log.is_terminal) as progress:
        for name in [*names, *beside]:
            judge = make(name, setup)
            if isinstance(judge, str):
                notes[name] = f"left out, {judge}"
                continue
            shown = progress.track(pairs, description=name)
            records[name], problem = judge_all(judge, name, shown, file)
            notes[name] = judge.description + (f"; invalid, at first: {problem}" * bool(problem))
    if not records:
        raise InputError(f"--judges: nothing can judge: {next(iter(notes.values()))}")
    judges = {name: measure(some, config.seed) for name, some in records.items()}
    first, *others = records
    against = {k: compare(records[first], records[k], config.seed) for k in others}
    facts = {
        "command": command,
        "judge": first,
        "versions": {name: version(name) for name in ("numpy", "torch")},
        "adapter": adapter,
        "seed": config.seed,
        "resamples": RESAMPLES,
        "files": {str(path): sha256_of(path) for path in (*config.pairs, config.train) if path},
        "notes": notes,
    }
    result = judges[first] | {"judges": judges, "against": against, "facts": facts}
    if config.out is not None:
        write_json(config.out, result)
    print(json.dumps(result, allow_nan=False) if config.json else page(result))


def select(
    pairs: Sequence[Pair], limit: int | None, exemplars: int | None, seed: int
) -> list[Pair]:
    """At most `limit` pairs with at least `exemplars` exemplars, twins kept together."""
    least = 1 if exemplars is None else exemplars
    groups = [c for c in twin_pairs(pairs) if all(len(p.exemplars) >= least for p in c)]
    if not pairs:
        raise InputError("--pairs: expected pairs, found none")
    if least < 1 or not groups:
        raise InputError(f"--exemplars: expected 1 or more, in some pairs, got {least}")
    chosen: set[str] = set()
    random.Random(f"{seed}/evaluate/limit").shuffle(groups)
    for group in groups:
        if limit is None or len(chosen) + len(group) <= limit:
            chosen |= {pair.id for pair in group}
    if not chosen:
        raise InputError(f"--limit: expected room for a pair and its twin, got {limit}")
    shown = (pair for pair in pairs if pair.id in chosen)
    return [replace(pair, exemplars=pair.exemplars[:exemplars]) for pair in shown]


def judge_all(
    judge: NamedJudge, name: str, pairs: Iterable[Pair], file: Path | None
) -> tuple[list[Record], str]:
    """A record for each pair, and the first problem. `file` remembers the predictions."""
    known = remembered(file) if file else {}
    records, problem = list[Record](), ""
    for pair in pairs:
        texts = sorted((pair.chosen, pair.rejected))
        seen = json.dumps([judge.settings, pair.exemplars, pair.question, texts], sort_keys=True)
        key = hashlib.sha256(seen.encode()).hexdigest()
        prediction = known.get(key)
        if prediction is None:
            try:
                prediction = judge.predict(pair.exemplars, pair.question, texts)
            except InputError as error:
                prediction = Prediction("invalid", problem=str(error))
            if file:
                append(file, Line(key=key, judge=name, pair=pair.id, prediction=prediction))
        problem = problem or prediction.problem
        records.append(record(pair, texts.index(pair.chosen), prediction))
    return records, problem


def append(path: Path, line: Line) -> None:
    """Remember a prediction."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(path, "a", encoding="utf-8") as file:
            file.write(line.model_dump_json() + "\n")
    except OSError as error:
        raise InputError(f"{path}: cannot be written ({reason(error)})") from error


def remembered(path: Path) -> dict[str, Prediction]:
    """Key -> prediction; half a last line, which a killed run leaves, is cut off."""
    try:
        data = path.read_bytes() if path.exists() else b""
        whole = data.rfind(b"\n") + 1
        if whole < len(data):
            os.truncate(path, whole)
        lines = [Line.model_validate_json(text) for text in data[:whole].splitlines()]
    except (OSError, ValidationError) as error:
        raise InputError(
            f"{path}: expected predictions of an earlier run, take another --out ({reason(error)})"
        ) from error
    return {line.key: line.prediction for line in lines}


def run(config: Config, command: str = "") -> int:
    """`main` with an exit code."""
    note = "; the same command goes on from here" if config.out else ""
    return exit_code("nanopersrm.evaluate", lambda: main(config, command), f"interrupted{note}")
