"""Evaluate: how often does a judge tell the writer's text from another, and what does it look at?

    python -m nanopersrm.evaluate.evaluate --pairs test.jsonl ood.jsonl --baselines --train train.jsonl \\
                                  --out result.json

judges every pair, prints one row a judge and writes the numbers, with intervals over authors, to
`--out` (`metrics.py` defines each of them). `--adapter FOLDER` judges with what `train_sft.py` has
learned, `--adapter none` with the untrained base. `--baselines` adds all other judges of
`judges.py`, the base without the adapter among them; `--judges model,style` names some.
`--beside NAME=FOLDER` adds another adapter of the same base, asked for the prompts that it was
trained on. Of several judges the first is set against each of the others, pair by pair.

How it works. The two texts of a pair are shown in alphabetical order, which knows nothing of the
label; a pair and its twin are shown alike. Then both again with one neutral text in place of the
exemplars. What a base cannot judge (a text longer than its context) is invalid, hence wrong.

With --out, each opinion is also kept in RESULT.opinions.jsonl, as soon as there is one. After
Ctrl-C run the same command again: what was judged with identical settings and texts is kept.

What we chose. A model scores at once unless --think-tokens lets it reason, which takes many times
as long; `--samples 1 4 16` then shows what more replies bring. `--exemplars 3` shows exactly the
first 3 and leaves out pairs with fewer, with their twins; `--limit` draws whole twins. What we left
out: several processes; evaluation during training.
"""

import hashlib
import json
import os
import platform
import random
import shlex
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
)

from nanopersrm import InputError, __version__
from nanopersrm.command import exit_code
from nanopersrm.evaluate.judges import (
    NAMES,
    SAMPLED,
    Kit,
    Named,
    loader,
    make,
    train_pairs,
)
from nanopersrm.evaluate.metrics import GROUPS, KEYS, RESAMPLES, Record, measure, record
from nanopersrm.evaluate.paired import paired
from nanopersrm.evaluate.predictions import Opinion, Opinions, key_of
from nanopersrm.evaluate.scoreboard import page
from nanopersrm.judge import adapter_settings
from nanopersrm.judge.adapter_settings import DEFAULT
from nanopersrm.judge.judgement import JudgeConfig
from nanopersrm.model.base import DEFAULT_BASE
from nanopersrm.pairs import Pair, couples, read

NEUTRAL = (  # in place of the exemplars: it says nothing of any writer, and is the same for all
    "The room has a table and four chairs. There is a window on the left side. A book is on the "
    "table, and a coat is on one of the chairs. The door is open. It is the afternoon of a day "
    "in the middle of the week."
)


@dataclass(frozen=True)
class Config:
    """Judge pairs with twins, and say how well."""

    pairs: tuple[Path, ...]  # .jsonl or .jsonl.gz files
    base: str = DEFAULT_BASE  # the embedded default, a folder, a .gguf file, or a hub name
    adapter: str = DEFAULT  # a folder with a trained adapter; default: that of the base; or none
    baselines: bool = False  # judge with everything that judges.py knows
    judges: str = "model"  # by name, with commas between; the first gives the result
    beside: tuple[str, ...] = ()  # further adapters of the same base, each as NAME=FOLDER
    train: Path | None = None  # pairs to fit the baselines on
    exemplars: int | None = None  # show exactly so many; default: all that a pair has
    limit: int | None = None  # judge at most so many pairs, drawn by the seed
    mode: Literal["pointwise", "pairwise"] = JudgeConfig.mode  # one candidate a prompt, or two
    evidence: bool = JudgeConfig.evidence  # give the model measured facts about the texts
    think_tokens: int = 0  # tokens of reasoning before the score; 0: none
    no_think: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False  # the same as --think-tokens 0
    samples: tuple[int, ...] = (JudgeConfig.samples,)  # replies a prompt, averaged; more: more rows
    neutral: bool = True  # judge with a neutral text in place of the exemplars too
    seed: int = 0  # of samples, of --limit, of the intervals
    device: str = "auto"  # auto, cpu, cuda, cuda:N
    dtype: str = "auto"  # auto (16 bits where they are fast), bf16, fp16, fp32
    out: Path | None = None  # the .json file to write
    overwrite: bool = False  # judge anew what an earlier run has judged


def main(config: Config, command: str = "") -> None:
    """Read, judge, measure, print, write."""
    names = judge_names(config)
    judging = judge_config(config)
    for flag, number in (("--limit", config.limit), ("--exemplars", config.exemplars)):
        if number is not None and number < 1:
            raise InputError(f"{flag}: expected a number from 1, got {number}")
    if config.out is not None and config.out.suffix != ".json":
        raise InputError(f"--out {config.out}: expected a name that ends in .json")
    pairs, files = read_all(config.pairs)
    chosen = select(pairs, config.limit, config.exemplars, config.seed)
    train = train_pairs(read(config.train), config.seed) if config.train else []
    remembered = _opinions(config)
    log = Console(stderr=True, highlight=False, soft_wrap=True)
    folder = adapter_settings.resolve_adapter(config.adapter, config.base)
    adapter = None if folder is None else str(folder)
    load = loader(config.base, adapter, config.device, config.dtype, say=log.print)
    kit = Kit(
        config.base,
        adapter,
        config.device,
        config.dtype,
        judging,
        chosen,
        [shown(pair, config.exemplars) for pair in train],
        load,
        further(config.beside),
        tuple(replace(judging, samples=n) for n in config.samples[1:]),
        log.print,
    )
    names += [*kit.beside, *(f"{SAMPLED}{n}" for n in config.samples[1:])]
    judges: dict[str, dict[str, Any]] = {}
    records: dict[str, list[Record]] = {}
    left_out: dict[str, str] = {}
    problems: dict[str, str] = {}  # the first of each judge
    speed: dict[str, float | None] = {}
    said: dict[str, str] = {}
    bar = (TextColumn("{task.description:12}"), BarColumn(), MofNCompleteColumn())
    hidden = not log.is_terminal
    with Progress(*bar, TimeRemainingColumn(), console=log, transient=True, disable=hidden) as show:
        for name in names:
            judge = make(name, kit)
            if isinstance(judge, str):
                left_out[name] = judge
                continue
            said[name] = judge.said
            own, speed[name], problem = judge_all(judge, kit, remembered, config.neutral, show)
            records[name], judges[name] = own, measure(own, config.seed)
            if problem:
                problems[name] = problem
    if not judges:
        raise InputError(f"--judges: nothing can judge: {next(iter(left_out.values()))}")
    first = next(iter(judges))
    against = {k: paired(records[first], records[k], config.seed) for k in judges if k != first}
    facts = {
        "command": command,
        "judge": first,
        "versions": versions(),
        "base": config.base,
        "adapter": adapter,
        "device": _device(),
        "load": round(os.getloadavg()[0], 2),
        "seed": config.seed,
        "resamples": RESAMPLES,
        "exemplars": config.exemplars,
        "pairs_in_files": len(pairs),
        "files": files,
        "train": None if config.train is None else {str(config.train): sha256(config.train)},
        "neutral": NEUTRAL if config.neutral else None,
        "judges": said,
        "pairs_per_second": speed,  # None: nothing was judged in this run
        "left_out": left_out,
        "problems": problems,
    }
    result = {key: judges[first][key] for key in (*KEYS, *(f"by_{group}" for group in GROUPS))}
    result |= {"judges": judges, "against": against, "facts": facts}
    if config.out is not None:
        write_result(config.out, result)
    print(page(result))


def judge_names(config: Config) -> list[str]:
    """The judges asked for, each once."""
    named = [name.strip() for name in config.judges.split(",") if name.strip()]
    if unknown := [name for name in named if name not in NAMES]:
        raise InputError(f"--judges: expected names out of {', '.join(NAMES)}, got {unknown[0]!r}")
    if not named:
        raise InputError(f"--judges: expected names out of {', '.join(NAMES)}, got none")
    return list(dict.fromkeys([*named, *(NAMES if config.baselines else ())]))


def further(given: Sequence[str]) -> dict[str, str]:
    """("sft=runs/sft/adapter",) -> {"sft": "runs/sft/adapter"}"""
    found: dict[str, str] = {}
    for one in given:
        name, is_there, folder = one.partition("=")
        if not is_there or not name.strip() or not folder:
            raise InputError(f"--beside: expected NAME=FOLDER, got {one!r}")
        if name in NAMES or name in found or name.startswith(SAMPLED):
            raise InputError(f"--beside: {name!r} is the name of another judge")
        found[name] = folder
    return found


def judge_config(config: Config) -> JudgeConfig:
    """How the model judges. Thinking is off unless tokens are given for it."""
    if config.think_tokens < 0:
        raise InputError(f"--think-tokens: expected a number from 0, got {config.think_tokens}")
    think = config.think_tokens > 0 and not config.no_think
    if not config.samples or len(set(config.samples)) < len(config.samples):
        raise InputError(f"--samples: expected different numbers, got {config.samples}")
    if not think and len(config.samples) > 1:
        raise InputError("--samples: more than one number needs --think-tokens: all would be alike")
    return JudgeConfig(
        mode=config.mode,
        evidence=config.evidence,
        think=think,
        think_tokens=config.think_tokens if think else JudgeConfig.think_tokens,
        samples=config.samples[0],
        seed=config.seed,
    )


def read_all(paths: Sequence[Path]) -> tuple[list[Pair], dict[str, Any]]:
    """The pairs of all files, and what the files were."""
    found: dict[str, Path] = {}
    pairs: list[Pair] = []
    files: dict[str, Any] = {}
    for path in paths:
        own = read(path, empty=True)
        for pair in own:
            if pair.id in found:
                raise InputError(f"{path}: the id {pair.id!r} is also in {found[pair.id]}")
            found[pair.id] = path
        pairs += own
        files[str(path)] = {"sha256": sha256(path), "pairs": len(own)}
    return pairs, files


def select(
    pairs: Sequence[Pair], limit: int | None, exemplars: int | None, seed: int
) -> list[Pair]:
    """At most `limit` pairs with at least `exemplars` exemplars, twins kept together."""
    by_id = {pair.id: pair for pair in pairs}
    least = exemplars or 1
    groups = [c for c in couples(pairs) if all(len(p.exemplars) >= least for p in c)]
    if not groups:
        raise InputError(
            f"--exemplars: expected pairs with {least} or more, found none"
            if pairs
            else "--pairs: expected pairs, found none"
        )
    kept: set[str] = set()
    random.Random(f"{seed}/evaluate/limit").shuffle(groups)
    for group in groups:
        if limit is None or len(kept) + len(group) <= limit:
            kept |= {pair.id for pair in group}
    if not kept:
        raise InputError(f"--limit: expected room for a pair and its twin, got {limit}")
    return [shown(by_id[name], exemplars) for name in by_id if name in kept]


def shown(pair: Pair, exemplars: int | None) -> Pair:
    """The pair with its first exemplars only."""
    return replace(pair, exemplars=pair.exemplars[:exemplars])


def judge_all(
    judge: Named, kit: Kit, remembered: Opinions, neutral: bool, show: Progress
) -> tuple[list[Record], float | None, str]:
    """A record for each pair, pairs a second of those judged now, and the first problem."""
    records: list[Record] = []
    seconds, judged, problem = 0.0, 0, ""
    task = show.add_task(judge.name, total=len(kit.pairs))
    for pair in kit.pairs:
        texts = sorted((pair.chosen, pair.rejected))

        def ask(exemplars: Sequence[str], pair: Pair = pair, texts: list[str] = texts) -> Opinion:
            nonlocal seconds, judged
            key = key_of(judge.settings, exemplars, pair.question, texts)
            known = remembered.get(key)
            if known is not None:
                return known
            start = time.perf_counter()
            try:
                found = judge.opine(exemplars, pair.question, texts)
            except InputError as error:
                found = Opinion("invalid", problem=str(error))
            if exemplars is pair.exemplars:
                seconds, judged = seconds + time.perf_counter() - start, judged + 1
            remembered.put(key, judge.name, pair.id, found)
            return found

        opinion = ask(pair.exemplars)
        without = ask((NEUTRAL,)) if neutral else None
        problem = problem or opinion.problem
        chosen = texts.index(pair.chosen)
        records.append(record(pair, chosen, len(pair.exemplars), opinion, without))
        show.advance(task)
    show.remove_task(task)
    return records, judged / seconds if seconds else None, problem


def _opinions(config: Config) -> Opinions:
    """What was judged before, beside the result; in memory without --out."""
    if config.out is None:
        return Opinions()
    path = config.out.with_suffix(".opinions.jsonl")
    try:
        config.out.parent.mkdir(parents=True, exist_ok=True)
        if config.overwrite:
            path.unlink(missing_ok=True)
    except OSError as error:
        raise InputError(f"{config.out}: cannot be written ({error.strerror})") from error
    return Opinions(path)


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def versions() -> dict[str, str]:
    """Of what was imported."""
    found = {"nanopersrm": __version__, "python": platform.python_version()}
    packages = {name: sys.modules.get(name) for name in ("numpy", "torch")}
    return found | {name: module.__version__ for name, module in packages.items() if module}


def _device() -> str:
    torch = sys.modules.get("torch")
    cores = f"{os.cpu_count()} CPU cores"
    return cores if torch is None else f"{cores}, {torch.cuda.device_count()} CUDA devices"


def write_result(path: Path, result: dict[str, Any]) -> None:
    """Write to a temporary name, then rename."""
    part = path.with_name(path.name + ".part")
    try:
        part.write_text(json.dumps(result, indent=1, allow_nan=False) + "\n", encoding="utf-8")
        os.replace(part, path)
    except OSError as error:
        raise InputError(f"{path}: cannot be written ({error.strerror})") from error
    finally:
        part.unlink(missing_ok=True)


def run(config: Config, command: str = "") -> int:
    """`main` with an exit code."""
    kept = "; the same command goes on from here" if config.out else ""
    return exit_code(
        "nanopersrm.evaluate.evaluate", lambda: main(config, command), f"interrupted{kept}"
    )


if __name__ == "__main__":
    words = " ".join(["python -m nanopersrm.evaluate.evaluate", *map(shlex.quote, sys.argv[1:])])
    about = __doc__.split("How it works")[0]
    sys.exit(run(tyro.cli(Config, prog="nanopersrm.evaluate.evaluate", description=about), words))
