"""Build: from anybody's writings to train, validation, test and out-of-domain pairs with twins.

    python -m data.build --corpora my_folder --out pairs --kinds cross_author --pairs 2000

reads a folder with one folder per writer, JSON-lines files, or a JSON file of prompts and outputs
(`data/corpus.py`), and writes train.jsonl, validation.jsonl, test.jsonl (writers that are not in
train), ood.jsonl (whole domains that are not in train), summary.json and summary.md.

How it works. For each split and kind there are proposals 0, 1, 2, …, each with a random generator
of its own, seeded with its number. They are made in chunks, judged in order, and counted by the
reason of their rejection. A finished chunk is kept in OUT/shards, so an interrupted build goes on
with the same command and comes to the same bytes. A folder belongs to one set of settings.

Cross-author pairs are half of a set, the other kinds share the rest. A pair and its twin stand one
after the other; otherwise the order is shuffled. A passage is a candidate once, whatever the kind,
unless `--reuse` allows more. When the writings are used up, the set is smaller than wanted and the
summary says so.

A kind is a module with `propose(corpus, rng, exemplars)`. One that needs a language model has
`load(base, seed)` instead, which gives a function that makes many proposals at once; there are at
most `--model-pairs` of it.
"""

import hashlib
import json
import platform
import random
import shlex
import shutil
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, astuple, dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import tyro
from pydantic import TypeAdapter, ValidationError

from data.corpus import Corpus, Lengths, Piece, read_corpora, split_corpora
from data.proposals import Proposal, Rejection, Taken, check_set, fault, pair_and_twin
from nanopersrm import InputError, __version__
from nanopersrm.command import exit_code
from nanopersrm.files import write_json, write_text
from nanopersrm.model.base import DEFAULT_BASE
from nanopersrm.pairs import KINDS, SPLITS, Pair, write

MODEL_KINDS = ("style_randomization", "style_mimicking")  # seconds a text, so there is a limit
HELD_OUT = ("court_opinions", "british_novels")  # by default, where both are there
MOST_EXEMPLARS = 16
WORD_LIMITS = (20, 400)
CHUNK = 64  # proposals
PATIENCE, LEAST = 10, 7  # give up when so many chunks together gave fewer twin pairs: about 1 %
DEMO = Path(__file__).parent / "demo"
SETTINGS, SUMMARY = "settings.json", "summary.json"
FILES = (*(f"{split}.jsonl" for split in SPLITS), SUMMARY, "summary.md", SETTINGS)

Propose = Callable[[Corpus, Sequence[random.Random], Sequence[int]], Iterable[Proposal | Rejection]]


@dataclass(frozen=True)
class Config:
    """Turn writings into preference pairs with twins."""

    corpora: Path  # a folder per writer, .jsonl or .jsonl.gz files, or a .json file
    out: Path  # the folder to write
    pairs: int = 12_000  # in the train split, twins counted
    eval_pairs: int | None = None  # in each other split; default: a twentieth, at least 200
    kinds: str = ",".join(KINDS)  # by name, with commas between
    exemplars: str = "1-4"  # how many a pair has, from and to
    words: str = "80-120"  # of a candidate
    exemplar_words: str = "120-180"  # of an exemplar
    model_pairs: int = 600  # at most, in train, of each kind that a language model writes
    seed: int = 0  # same seed, same bytes
    hold_out: tuple[str, ...] | None = None  # domains kept out of all other splits
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


@dataclass(frozen=True)
class Chunk:
    """What became of some proposals of one kind in one split."""

    pairs: list[Pair]  # each followed by its twin
    proposals: int
    rejected: dict[str, int]  # reason -> how many
    seconds: float


CHUNKS = TypeAdapter(Chunk)


@dataclass(frozen=True)
class Row:
    """The figures of one kind in one split."""

    split: str
    kind: str
    wanted: int  # pairs, twins counted
    pairs: int
    authors: int  # whose exemplars are shown
    proposals: int
    accepted: float  # share of the proposals
    rejected: dict[str, int]  # reason -> proposals, the commonest first
    seconds: float


def number_range(text: str, flag: str, least: int, most: int) -> tuple[int, int]:
    """Two numbers of "80-120", or twice the one of "100"."""
    first, _, last = text.partition("-")
    try:
        low, high = int(first), int(last or first)
    except ValueError:
        low, high = 0, 0
    if not least <= low <= high <= most:
        raise InputError(f"{flag}: expected A-B with {least} <= A <= B <= {most}, got {text!r}")
    return low, high


def check_recipe(config: Config) -> Recipe:
    """Check the flags that say what is built."""
    names = [name.strip() for name in config.kinds.split(",") if name.strip()]
    if not names or set(names) - set(KINDS):
        got = repr(config.kinds)
        raise InputError(f"--kinds: expected names out of {', '.join(KINDS)}, got {got}")
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
    return Recipe(
        kinds=tuple(kind for kind in KINDS if kind in names),
        twin_pairs={s: (config.pairs if s == "train" else others) // 2 for s in SPLITS},
        model_twin_pairs={s: config.model_pairs // (2 if s == "train" else 10) for s in SPLITS},
        exemplars=number_range(config.exemplars, "--exemplars", 1, MOST_EXEMPLARS),
        seed=config.seed,
        reuse=config.reuse,
    )


def shares(total: int, kinds: Sequence[str], most_of_model: int) -> dict[str, int]:
    """How many of each kind: half cross_author, the others the rest, evenly, but what a model
    writes `most_of_model` at most, where there is something else.

    >>> shares(8, ("cross_author", "minor_replacement", "restyle"), 1)
    {'cross_author': 4, 'minor_replacement': 2, 'restyle': 2}
    >>> shares(8, ("cross_author", "style_mimicking", "restyle"), 1)
    {'cross_author': 4, 'style_mimicking': 1, 'restyle': 3}
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
    if kind in MODEL_KINDS:
        return module.load(base, seed)
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
    start = time.perf_counter()
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
            pairs += pair_and_twin(result, f"{corpus.split}-{kind}-{index:06d}", corpus.split)
    return Chunk(pairs, judged, dict(rejected), time.perf_counter() - start)


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
) -> tuple[dict[str, list[Pair]], list[Row]]:
    """The pairs of every split, twins side by side, and a row of figures for each kind in it."""
    propose = {kind: load_kind(kind, base, recipe.seed) for kind in recipe.kinds}
    sets: dict[str, list[Pair]] = {}
    rows = []
    for split in SPLITS:
        corpus, taken = corpora[split], Taken(recipe.reuse)
        pairs: list[Pair] = []
        total, most_of_model = recipe.twin_pairs[split], recipe.model_twin_pairs[split]
        for kind, wanted in shares(total, recipe.kinds, most_of_model).items():
            chunks = []
            if corpus.sources:
                chunks = build_kind(corpus, kind, wanted, propose[kind], taken, recipe, out)
            pairs += [pair for chunk in chunks for pair in chunk.pairs]
            rows.append(summarize(split, kind, wanted, chunks))
            if out:
                print(f"{split} {kind}: {rows[-1].pairs} pairs", file=sys.stderr, flush=True)
        twins = list(zip(pairs[::2], pairs[1::2], strict=True))
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
    if unknown := sorted(set(domains) - known):
        raise InputError(
            f"--hold-out: expected domains out of {', '.join(sorted(known))}, got {unknown[0]!r}"
        )
    return tuple(sorted(set(domains)))


def summarize(split: str, kind: str, wanted: int, chunks: Sequence[Chunk]) -> Row:
    """The figures of all chunks of a kind in a split; `wanted` counts twins once."""
    pairs = [pair for chunk in chunks for pair in chunk.pairs]
    proposals = sum(chunk.proposals for chunk in chunks)
    rejected: Counter[str] = Counter()
    for chunk in chunks:
        rejected.update(chunk.rejected)
    return Row(
        split=split,
        kind=kind,
        wanted=2 * wanted,
        pairs=len(pairs),
        authors=len({pair.author for pair in pairs}),
        proposals=proposals,
        accepted=round(len(pairs) / 2 / proposals, 4) if proposals else 0.0,
        rejected=dict(sorted(rejected.items(), key=lambda item: (-item[1], item[0]))),
        seconds=round(sum(chunk.seconds for chunk in chunks), 1),
    )


def reasons(row: Row) -> str:
    """ "candidate already taken 52, markup 4"."""
    return ", ".join(f"{reason} {n}" for reason, n in row.rejected.items()) or "no proposals"


def summary_page(facts: Mapping[str, Any]) -> str:
    """summary.md: a table of the sets and one of the writers."""
    settings = facts["settings"]
    lines = [
        f"# Pairs\n\n`{facts['command']}`\n",
        f"seed {settings['seed']}, writings {settings['writings'][:12]}, nanopersrm "
        f"{settings['version']}, Python {platform.python_version()}\n",
        "| split | kind | pairs | wanted | writers | proposals | accepted | seconds | rejected |",
        "| --- | --- | ---: | ---: | ---: | ---: | ---: | ---: | --- |",
    ]
    for row in (Row(**row) for row in facts["sets"]):
        cells = [row.split, row.kind, row.pairs, row.wanted, row.authors, row.proposals]
        cells += [f"{row.accepted:.0%}", f"{row.seconds:.0f}", reasons(row)]
        lines.append(f"| {' | '.join(map(str, cells))} |")
    lines.append("\n| writers | domains |\n| --- | --- |")
    for split, counts in facts["writers"].items():
        domains = ", ".join(f"{domain} {number}" for domain, number in counts.items())
        lines.append(f"| {split} | {domains or 'none'} |")
    return "\n".join(lines) + "\n"


def open_folder(out: Path, settings: dict[str, Any], overwrite: bool) -> None:
    """Make the folder ready for these settings; one of other settings is an error."""
    if overwrite:
        for name in FILES:
            (out / name).unlink(missing_ok=True)
        shutil.rmtree(out / "shards", ignore_errors=True)
    path = out / SETTINGS
    started = [n for n in (*FILES, "shards") if n != SETTINGS and (out / n).exists()]
    if not started:
        write_json(path, settings)
        return
    if not path.exists():
        raise InputError(f"{out}: holds {started[0]} of something else; use --overwrite")
    known, wanted = read_json(path), json.loads(json.dumps(settings))
    for name in sorted(known | wanted):
        if known.get(name) != wanted.get(name):
            raise InputError(
                f"{out}: was built with {name} {known.get(name)!r:.60}, now got "
                f"{wanted.get(name)!r:.60}; take another --out, or --overwrite"
            )


def read_json(path: Path) -> dict[str, Any]:
    """An object that a build has written."""
    try:
        return TypeAdapter(dict[str, Any]).validate_json(path.read_bytes())
    except (OSError, ValidationError) as error:
        raise InputError(f"{path}: expected what a build has written; use --overwrite") from error


def main(config: Config, command: str = "") -> None:
    """Read, divide, build, write, and print what came of it."""
    recipe = check_recipe(config)
    lengths = Lengths(
        number_range(config.words, "--words", *WORD_LIMITS),
        number_range(config.exemplar_words, "--exemplar-words", *WORD_LIMITS),
    )
    pieces = read_corpora(config.corpora)
    hold_out = held_out(pieces, config.hold_out)
    sha = hashlib.sha256()
    for piece in pieces:
        sha.update(json.dumps(astuple(piece)).encode())
    settings = {
        "writings": sha.hexdigest(),
        **asdict(recipe),
        "words": lengths.candidate,
        "exemplar_words": lengths.exemplar,
        "hold_out": hold_out,
        "base": config.base,
        "version": __version__,
    }
    out = config.out
    corpora = split_corpora(pieces, recipe.seed, hold_out, lengths)
    if not corpora["train"].sources:
        raise InputError(f"{config.corpora}: no writer is left to train on")
    open_folder(out, settings, config.overwrite)
    if all((out / name).exists() for name in FILES):
        print(f"{out}: already built with these settings", file=sys.stderr)
        facts = read_json(out / SUMMARY)
    else:
        sets, rows = build_sets(corpora, recipe, config.base, out)
        if not sets["train"]:
            shutil.rmtree(out / "shards", ignore_errors=True)
            why = "; ".join(f"{row.kind}: {reasons(row)}" for row in rows if row.split == "train")
            raise InputError(f"{config.corpora}: no pair could be made: {why}")
        facts = {
            "command": command,
            "settings": settings,
            "writers": {
                split: dict(sorted(Counter(domain for domain, _ in corpus.sources).items()))
                for split, corpus in corpora.items()
            },
            "sets": [asdict(row) for row in rows],
        }
        for split in SPLITS:
            write(out / f"{split}.jsonl", sets[split])
        write_text(out / "summary.md", summary_page(facts))
        write_json(out / SUMMARY, facts)
    shutil.rmtree(out / "shards", ignore_errors=True)
    print(summary_page(facts), flush=True)


def run(config: Config, command: str = "") -> int:
    """`main` with an exit code."""
    ended = "interrupted; without --overwrite it goes on from here"
    return exit_code("data.build", lambda: main(config, command), ended)


if __name__ == "__main__":
    words = " ".join(["python -m data.build", *map(shlex.quote, sys.argv[1:])])
    sys.exit(
        run(tyro.cli(Config, prog="data.build", description=__doc__.split("How it")[0]), words)
    )
