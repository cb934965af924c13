"""Build: from anybody's writings to train, validation, test and out-of-domain pairs with twins.

    python -m data.build --corpora my_folder --out pairs --kinds cross_author --pairs 2000

reads a folder with one folder per writer, JSON-lines files, or a JSON file of prompts and outputs
(`data/corpus.py`), and writes train.jsonl, validation.jsonl, test.jsonl (writers that are not in
train), ood.jsonl (whole domains that are not in train) and summary.json.

How it works. For each split and kind there are proposals 0, 1, 2, …, each with a random generator
seeded with its number. A finished chunk of them is kept in OUT/shards, so an interrupted build goes
on with the same command and comes to the same bytes. A folder belongs to one set of settings.

Cross-author pairs are half of a set, the other kinds share the rest. A pair and its twin stand one
after the other; otherwise the order is shuffled. A passage is a candidate once unless `--reuse`
allows more. When the writings are used up, the set is smaller than wanted.

A kind is a module with `propose(corpus, rng, exemplars)`. One that needs a language model has
`proposals(base, write, corpus, rngs, exemplars)` instead, which makes many at once.
"""

import hashlib
import json
import random
import shutil
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, astuple, dataclass, replace
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

import tyro
from pydantic import TypeAdapter, ValidationError

from data.corpus import Corpus, Piece, read_corpora, split_corpora
from data.kinds.model_text import load_continuer
from data.proposals import Proposal, Rejection, Taken, check_set, fault, pair_and_twin
from nanopersrm import InputError, __version__
from nanopersrm.command import exit_code
from nanopersrm.files import write_json, write_text
from nanopersrm.model.base import DEFAULT_BASE
from nanopersrm.pairs import KINDS, SPLITS, Pair, write

MODEL_KINDS = ("style_randomization", "style_mimicking")  # seconds a text, so there is a limit
HELD_OUT = ("court_opinions", "british_novels")  # by default, where both are there
MOST_EXEMPLARS = 16
CHUNK = 64  # proposals
LIGHT = 0.25  # weight of a pair of a light domain
PATIENCE, LEAST = 10, 7  # give up when so many chunks together gave fewer twin pairs: about 1 %
DEMO = Path(__file__).parent / "demo"
SETTINGS, SUMMARY = "settings.json", "summary.json"
FILES = (SETTINGS, *(f"{split}.jsonl" for split in SPLITS), SUMMARY)  # the last is written last

Propose = Callable[[Corpus, Sequence[random.Random], Sequence[int]], Iterable[Proposal | Rejection]]


@dataclass(frozen=True)
class Config:
    """Turn writings into preference pairs with twins."""

    corpora: Path  # a folder per writer, .jsonl or .jsonl.gz files, or a .json file
    out: Path  # the folder to write
    pairs: int = 12_000  # in the train split, twins counted
    eval_pairs: int | None = None  # in each other split; default: a twentieth, at least 200
    kinds: str = ",".join(KINDS)  # by name, with commas between
    exemplars: tuple[int, int] = (1, 4)  # how many a pair has, from and to
    model_pairs: int = 600  # at most, in train, of each kind that a language model writes
    seed: int = 0  # same seed, same bytes
    hold_out: tuple[str, ...] | None = None  # domains kept out of all other splits
    light: tuple[str, ...] = ()  # domains whose pairs weigh a quarter: templates, edited by others
    reuse: int = 1  # how often a passage may be a candidate
    base: str = DEFAULT_BASE  # of the kinds that a language model writes
    overwrite: bool = False  # throw away what another build left in the folder


@dataclass(frozen=True)
class Recipe:
    """What to build, checked."""

    kinds: tuple[str, ...]
    twin_pairs: dict[str, int]  # split -> how many
    model_twin_pairs: dict[str, int]  # split -> at most so many of each of MODEL_KINDS
    exemplars: tuple[int, int]
    seed: int
    reuse: int
    light: tuple[str, ...] = ()  # domains whose pairs weigh LIGHT


@dataclass(frozen=True)
class Chunk:
    """What became of some proposals of one kind in one split."""

    pairs: list[Pair]  # each followed by its twin
    proposals: int
    rejected: dict[str, int]  # reason -> how many


CHUNKS = TypeAdapter(Chunk)


def check_recipe(config: Config) -> Recipe:
    """Check the flags that say what is built."""
    names = set(config.kinds.split(","))
    if names - set(KINDS):
        got = repr(config.kinds)
        raise InputError(f"--kinds: expected names out of {','.join(KINDS)}, got {got}")
    others = max(200, config.pairs // 40 * 2) if config.eval_pairs is None else config.eval_pairs
    for flag, number, least in (
        ("--pairs", config.pairs, 2),
        ("--eval-pairs", others, 0),
        ("--model-pairs", config.model_pairs, 0),
    ):
        if number < least or number % 2:
            raise InputError(f"{flag}: expected an even number from {least}, got {number}")
    if config.reuse < 1:
        raise InputError(f"--reuse: expected a number from 1, got {config.reuse}")
    if not 1 <= config.exemplars[0] <= config.exemplars[1] <= MOST_EXEMPLARS:
        got = f"{MOST_EXEMPLARS}, got {config.exemplars}"
        raise InputError(f"--exemplars: expected A B with 1 <= A <= B <= {got}")
    return Recipe(
        kinds=tuple(kind for kind in KINDS if kind in names),
        twin_pairs={s: (config.pairs if s == "train" else others) // 2 for s in SPLITS},
        model_twin_pairs={s: config.model_pairs // (2 if s == "train" else 10) for s in SPLITS},
        exemplars=config.exemplars,
        seed=config.seed,
        reuse=config.reuse,
        light=config.light,
    )


def shares(total: int, kinds: Sequence[str], most_of_model: int) -> dict[str, int]:
    """How many of each kind: half cross_author, the others the rest, evenly, but what a model
    writes `most_of_model` at most, where there is something else.
    """
    counts = dict.fromkeys(kinds, 0)
    if "cross_author" in counts:
        counts["cross_author"] = (total + 1) // 2 if len(kinds) > 1 else total
    others = [kind for kind in kinds if kind != "cross_author"]
    left = total - sum(counts.values())
    unlimited = [kind for kind in others if kind not in MODEL_KINDS]
    for kind in others if unlimited else ():
        if kind in MODEL_KINDS:
            counts[kind] = min(left // len(others), most_of_model)
    rest, sharing = left - sum(counts[kind] for kind in others), unlimited or others
    for i, kind in enumerate(sharing):
        counts[kind] = rest // len(sharing) + (i < rest % len(sharing))
    return counts


def load_kind(kind: str, base: str, seed: int) -> Propose:
    """What makes the proposals of a kind."""
    module = import_module(f"data.kinds.{kind}")
    if kind in MODEL_KINDS:  # nothing is loaded yet
        return partial(module.proposals, base, load_continuer(base, seed))
    return lambda corpus, rngs, exemplars: [
        module.propose(corpus, rng, n) for rng, n in zip(rngs, exemplars, strict=True)
    ]


def make_chunk(
    corpus: Corpus,
    kind: str,
    number: int,
    wanted: int,
    propose: Propose,
    taken: Taken,
    recipe: Recipe,
) -> Chunk:
    """Proposals number x CHUNK and on, until the chunk ends or `wanted` are accepted."""
    indices = range(number * CHUNK, (number + 1) * CHUNK)
    rngs = [random.Random(f"{recipe.seed}/{corpus.split}/{kind}/{index}") for index in indices]
    counts = [rng.randint(*recipe.exemplars) for rng in rngs]
    pairs: list[Pair] = []
    rejected: Counter[str] = Counter()
    judged = 0
    for index, result in zip(indices, propose(corpus, rngs, counts), strict=True):
        if len(pairs) == 2 * wanted:
            break
        judged += 1
        if isinstance(result, Rejection):
            rejected[result.reason] += 1
        elif reason := fault(result, corpus, taken):
            rejected[reason] += 1
        else:
            both = pair_and_twin(result, f"{corpus.split}-{kind}-{index:06d}", corpus.split)
            weight = LIGHT if result.domain in recipe.light else 1.0
            pairs += [replace(pair, weight=weight) for pair in both]
    return Chunk(pairs, judged, dict(rejected))


def build_kind(
    corpus: Corpus,
    kind: str,
    wanted: int,
    propose: Propose,
    taken: Taken,
    recipe: Recipe,
    out: Path | None = None,
) -> list[Chunk]:
    """All chunks of one kind in one split; those that are in `out` are read, not made."""
    chunks: list[Chunk] = []
    done = 0
    while done < wanted:
        last = chunks[-PATIENCE:]
        if len(last) == PATIENCE and sum(len(chunk.pairs) for chunk in last) < 2 * LEAST:
            break
        shard = out and out / "shards" / f"{corpus.split}.{kind}.{len(chunks):05d}.json"
        if shard and shard.exists():
            chunk = read_chunk(shard)
            for pair in chunk.pairs[::2]:
                taken.add(pair.chosen, pair.rejected)
        else:
            chunk = make_chunk(corpus, kind, len(chunks), wanted - done, propose, taken, recipe)
            if shard:
                write_text(shard, CHUNKS.dump_json(chunk).decode())
        chunks.append(chunk)
        done += len(chunk.pairs) // 2
    return chunks


def read_chunk(shard: Path) -> Chunk:
    """A chunk that an earlier run has written."""
    try:
        return CHUNKS.validate_json(shard.read_bytes())
    except (OSError, ValidationError) as error:
        raise InputError(f"{shard}: expected a chunk of a build; use --overwrite") from error


def build_sets(
    corpora: dict[str, Corpus], recipe: Recipe, base: str = DEFAULT_BASE, out: Path | None = None
) -> tuple[dict[str, list[Pair]], list[dict[str, Any]]]:
    """The pairs of every split, twins side by side, and the figures of each kind in it."""
    propose = {kind: load_kind(kind, base, recipe.seed) for kind in recipe.kinds}
    sets: dict[str, list[Pair]] = {}
    rows = []
    for split in SPLITS:
        corpus, taken = corpora[split], Taken(recipe.reuse)
        twins: list[tuple[Pair, Pair]] = []
        total, most_of_model = recipe.twin_pairs[split], recipe.model_twin_pairs[split]
        for kind, wanted in shares(total, recipe.kinds, most_of_model).items():
            chunks = []
            if corpus.sources:
                chunks = build_kind(corpus, kind, wanted, propose[kind], taken, recipe, out)
            pairs = [pair for chunk in chunks for pair in chunk.pairs]
            twins += zip(pairs[::2], pairs[1::2], strict=True)
            rejected = sum((Counter(chunk.rejected) for chunk in chunks), Counter())
            row = {
                "split": split,
                "kind": kind,
                "wanted": 2 * wanted,  # twins counted
                "pairs": len(pairs),
                "authors": len({pair.author for pair in pairs}),
                "proposals": sum(chunk.proposals for chunk in chunks),
                "rejected": dict(sorted(rejected.items(), key=lambda item: (-item[1], item[0]))),
            }
            rows.append(row)
            if out:
                print(" ".join(f"{name}: {value}" for name, value in row.items()), flush=True)
        random.Random(f"{recipe.seed}/{split}/order").shuffle(twins)
        sets[split] = [pair for both in twins for pair in both]
        check_set(sets[split])
    return sets, rows


def demo_pairs(
    seed: int = 0, pairs: int = 200, kinds: Sequence[str] = ("cross_author",)
) -> list[Pair]:
    """Pairs of the invented writers of data/demo, in memory: 8 to train on, 2 and 2 others."""
    counts = {split: (pairs if split == "train" else max(20, pairs // 10)) // 2 for split in SPLITS}
    recipe = Recipe(tuple(kinds), counts, counts, (1, 3), seed, reuse=10)
    sets, _ = build_sets(split_corpora(read_corpora(DEMO), seed), recipe)
    return [pair for split in SPLITS for pair in sets[split]]


def held_out(pieces: Sequence[Piece], domains: tuple[str, ...] | None) -> tuple[str, ...]:
    """The domains to hold out: those of the flag, else the two of HELD_OUT where both are there."""
    known = {piece.domain for piece in pieces}
    if domains is None:
        return HELD_OUT if set(HELD_OUT) <= known else ()
    if unknown := set(domains) - known:
        raise InputError(f"--hold-out: expected some of {sorted(known)}, got {min(unknown)!r}")
    return tuple(sorted(set(domains)))


def open_folder(out: Path, settings: dict[str, Any], overwrite: bool) -> None:
    """Make the folder ready for these settings; one of other settings is an error."""
    if overwrite:
        for name in FILES:
            (out / name).unlink(missing_ok=True)
        shutil.rmtree(out / "shards", ignore_errors=True)
    begun = [name for name in (*FILES[1:], "shards") if (out / name).exists()]
    if not begun:
        write_json(out / SETTINGS, settings)
        return
    try:
        known = json.loads((out / SETTINGS).read_bytes())
    except (OSError, ValueError):
        known = {}
    wanted = json.loads(json.dumps(settings))
    if other := [name for name in wanted if known.get(name) != wanted[name]]:
        fault = f"holds {begun[0]} of other settings ({', '.join(other)})"
        raise InputError(f"{out}: {fault}; take another --out, or --overwrite")


def main(config: Config) -> None:
    """Read, divide, build, write, and print what came of it."""
    recipe, out = check_recipe(config), config.out
    pieces = read_corpora(config.corpora)
    hold_out = held_out(pieces, config.hold_out)
    domains = {piece.domain for piece in pieces}
    if unknown := set(config.light) - domains:
        raise InputError(f"--light: expected some of {sorted(domains)}, got {min(unknown)!r}")
    writings = hashlib.sha256("".join(json.dumps(astuple(piece)) for piece in pieces).encode())
    settings = {
        "writings": writings.hexdigest(),
        **asdict(recipe),
        "hold_out": hold_out,
        "base": config.base,
        "version": __version__,
    }
    corpora = split_corpora(pieces, recipe.seed, hold_out)
    if not corpora["train"].sources:
        raise InputError(f"{config.corpora}: no writer is left to train on")
    open_folder(out, settings, config.overwrite)
    if (out / SUMMARY).exists():
        print(f"{out}: already built with these settings", file=sys.stderr)
        return
    sets, rows = build_sets(corpora, recipe, config.base, out)
    if sets["train"]:
        for split in SPLITS:
            write(out / f"{split}.jsonl", sets[split])
        write_json(out / SUMMARY, {"settings": settings, "sets": rows})
    shutil.rmtree(out / "shards", ignore_errors=True)
    if not sets["train"]:
        raise InputError(f"{config.corpora}: no pair could be made")


def run(config: Config) -> int:
    """`main` with an exit code."""
    ended = "interrupted; without --overwrite it goes on from here"
    return exit_code("data.build", lambda: main(config), ended)


if __name__ == "__main__":
    about = __doc__.split("How it")[0]
    sys.exit(run(tyro.cli(Config, prog="python -m data.build", description=about)))
