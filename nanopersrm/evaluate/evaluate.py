"""Evaluate: how often does a judge tell the writer's text from another?

    python -m nanopersrm.evaluate --pairs test.jsonl ood.jsonl --baselines --train train.jsonl \\
                                  --out result.json

judges every pair and prints a row a judge with intervals over authors (`metrics.py`); --json prints
all numbers as JSON instead. --judges model,style names judges of `judges.py`, --baselines adds all,
--beside NAME=FOLDER another adapter of the same base, asked for the prompts it was trained on. The
first judge is also set against each of the others, pair by pair.

How it works. The two texts of a pair are shown in alphabetical order, which knows nothing of the
label. What cannot be judged, such as a text longer than the context, is invalid, hence wrong. With
--out, predictions are kept in RESULT.predictions.jsonl as they come; after an interruption the same
command goes on from there.

A model scores at once unless --think-tokens lets it reason, which takes many times as long.
--exemplars 3 shows exactly the first 3 and leaves out pairs with fewer; --limit draws whole twins.
"""

import json
import os
import random
import time
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Literal

from rich.console import Console
from rich.progress import Progress

from nanopersrm import InputError
from nanopersrm.command import exit_code
from nanopersrm.evaluate.judges import NAMES, NamedJudge, Setup, make
from nanopersrm.evaluate.metrics import RESAMPLES, Record, compare, measure, record
from nanopersrm.evaluate.predictions import Prediction, PredictionCache, key_of
from nanopersrm.evaluate.scoreboard import page
from nanopersrm.files import sha256_of, write_json
from nanopersrm.judge import adapter_settings
from nanopersrm.judge.adapter_settings import DEFAULT
from nanopersrm.judge.judgement import JudgeConfig
from nanopersrm.model.base import DEFAULT_BASE
from nanopersrm.pairs import Pair, read, twin_pairs

TRAIN_PAIRS = 1000  # to fit text judges on, drawn from all of them


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
    evidence: bool = JudgeConfig.evidence  # give the model measured facts about the texts
    think_tokens: int = 0  # tokens of reasoning before the score; 0: none
    samples: int = JudgeConfig.samples  # replies a prompt, averaged
    seed: int = 0  # of samples, of --limit, of the intervals
    device: str = "auto"  # auto, cpu, cuda, cuda:N
    dtype: str = "auto"  # auto (16 bits where they are fast), bf16, fp16, fp32
    out: Path | None = None  # the .json file to write
    json: bool = False  # print the numbers as JSON in place of tables


def main(config: Config, command: str = "") -> None:
    """Read, judge, measure, print, write."""
    names = judge_names(config.judges, config.baselines)
    beside = adapters_beside(config.beside)
    for flag, number, least in (
        ("--limit", config.limit, 1),
        ("--exemplars", config.exemplars, 1),
        ("--think-tokens", config.think_tokens, 0),
    ):
        if number is not None and number < least:
            raise InputError(f"{flag}: expected a number from {least}, got {number}")
    if config.out is not None and config.out.suffix != ".json":
        raise InputError(f"--out {config.out}: expected a name that ends in .json")
    judging = JudgeConfig(
        mode=config.mode,
        evidence=config.evidence,
        think=config.think_tokens > 0,
        think_tokens=config.think_tokens or JudgeConfig.think_tokens,
        samples=config.samples,
        seed=config.seed,
    )
    pairs = select(read_all(config.pairs), config.limit, config.exemplars, config.seed)
    train = read(config.train) if config.train else []
    if len(train) > TRAIN_PAIRS:
        train = random.Random(f"{config.seed}/evaluate/train").sample(train, TRAIN_PAIRS)
    train = [replace(pair, exemplars=pair.exemplars[: config.exemplars]) for pair in train]
    cache = PredictionCache(config.out.with_suffix(".predictions.jsonl") if config.out else None)
    log = Console(stderr=True, highlight=False, soft_wrap=True)
    folder = adapter_settings.resolve_adapter(config.adapter, config.base)
    adapter = None if folder is None else str(folder)
    setup = Setup(
        base=config.base,
        adapter=adapter,
        device=config.device,
        dtype=config.dtype,
        config=judging,
        train=train,
        beside=beside,
        say=log.print,
    )
    records: dict[str, list[Record]] = {}
    notes: dict[str, str] = {}  # on each judge, or why it is left out
    speed: dict[str, float | None] = {}  # None: nothing was judged in this run
    with Progress(console=log, transient=True, disable=not log.is_terminal) as progress:
        for name in [*names, *beside]:
            judge = make(name, setup)
            if isinstance(judge, str):
                notes[name] = f"left out, {judge}"
                continue
            shown = progress.track(pairs, description=name)
            records[name], speed[name], problem = judge_all(judge, name, shown, cache)
            notes[name] = judge.description + (f"; invalid, at first: {problem}" * bool(problem))
    if not records:
        raise InputError(f"--judges: nothing can judge: {next(iter(notes.values()))}")
    judges = {name: measure(some, config.seed) for name, some in records.items()}
    first, *others = records
    facts = {
        "command": command,
        "judge": first,
        "versions": {name: version(name) for name in ("numpy", "torch")},
        "base": config.base,
        "adapter": adapter,
        "device": f"{os.cpu_count()} CPU cores, --device {config.device}",
        "load": round(os.getloadavg()[0], 2),
        "seed": config.seed,
        "resamples": RESAMPLES,
        "files": {str(path): sha256_of(path) for path in (*config.pairs, config.train) if path},
        "notes": notes,
        "pairs_per_second": speed,
    }
    against = {k: compare(records[first], records[k], config.seed) for k in others}
    result = judges[first] | {"judges": judges, "against": against, "facts": facts}
    if config.out is not None:
        write_json(config.out, result)
    print(json.dumps(result, allow_nan=False) if config.json else page(result))


def judge_names(names: str, baselines: bool) -> list[str]:
    """The judges asked for, each once."""
    named = [name.strip() for name in names.split(",") if name.strip()]
    unknown = [name for name in named if name not in NAMES]
    if unknown or not named:
        wrong = repr(unknown[0]) if unknown else "none"
        raise InputError(f"--judges: expected names out of {', '.join(NAMES)}, got {wrong}")
    return list(dict.fromkeys([*named, *(NAMES if baselines else ())]))


def adapters_beside(options: Sequence[str]) -> dict[str, str]:
    """("sft=runs/sft/adapter",) -> {"sft": "runs/sft/adapter"}"""
    folders: dict[str, str] = {}
    for option in options:
        name, _, folder = option.partition("=")
        if not name.strip() or not folder:
            raise InputError(f"--beside: expected NAME=FOLDER, got {option!r}")
        if name in NAMES or name in folders:
            raise InputError(f"--beside: {name!r} is the name of another judge")
        folders[name] = folder
    return folders


def read_all(paths: Sequence[Path]) -> list[Pair]:
    """The pairs of all files."""
    pairs = [pair for path in paths for pair in read(path, empty=True)]
    for pair_id, count in Counter(pair.id for pair in pairs).items():
        if count > 1:
            raise InputError(f"--pairs: the id {pair_id!r} is in two of the files")
    return pairs


def select(
    pairs: Sequence[Pair], limit: int | None, exemplars: int | None, seed: int
) -> list[Pair]:
    """At most `limit` pairs with at least `exemplars` exemplars, twins kept together."""
    least = exemplars or 1
    groups = [c for c in twin_pairs(pairs) if all(len(p.exemplars) >= least for p in c)]
    if not pairs:
        raise InputError("--pairs: expected pairs, found none")
    if not groups:
        raise InputError(f"--exemplars: expected pairs with {least} or more, found none")
    chosen: set[str] = set()
    random.Random(f"{seed}/evaluate/limit").shuffle(groups)
    for group in groups:
        if limit is None or len(chosen) + len(group) <= limit:
            chosen |= {pair.id for pair in group}
    if not chosen:
        raise InputError(f"--limit: expected room for a pair and its twin, got {limit}")
    shown = [pair for pair in pairs if pair.id in chosen]
    return [replace(pair, exemplars=pair.exemplars[:exemplars]) for pair in shown]


def judge_all(
    judge: NamedJudge, name: str, pairs: Iterable[Pair], cache: PredictionCache
) -> tuple[list[Record], float | None, str]:
    """A record for each pair, pairs a second of those judged now, and the first problem."""
    records: list[Record] = []
    seconds, judged, problem = 0.0, 0, ""
    for pair in pairs:
        texts = sorted((pair.chosen, pair.rejected))
        key = key_of(judge.settings, pair.exemplars, pair.question, texts)
        prediction = cache.get(key)
        if prediction is None:
            start = time.perf_counter()
            try:
                prediction = judge.predict(pair.exemplars, pair.question, texts)
            except InputError as error:
                prediction = Prediction("invalid", problem=str(error))
            seconds, judged = seconds + time.perf_counter() - start, judged + 1
            cache.put(key, name, pair.id, prediction)
        problem = problem or prediction.problem
        records.append(record(pair, texts.index(pair.chosen), prediction))
    return records, judged / seconds if seconds else None, problem


def run(config: Config, command: str = "") -> int:
    """`main` with an exit code."""
    note = "; the same command goes on from here" if config.out else ""
    return exit_code("nanopersrm.evaluate", lambda: main(config, command), f"interrupted{note}")
