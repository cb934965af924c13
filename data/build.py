"""Build: from anybody's writings to train, validation, test and out-of-domain pairs with twins.

    python -m data.build --corpora my_folder --out pairs --kinds cross_author --pairs 2000

reads a folder with one folder per writer, JSON-lines files, or a JSON file of prompts and outputs
(`nanopersrm/writings.py`), and writes train.jsonl, validation.jsonl, test.jsonl (writers that are
not in train), ood.jsonl (whole domains that are not in train), summary.json and summary.md.

    read_writings -> shelves -> kind.draft -> accept.fault -> pair_and_twin -> check -> files

How it works. For each split and kind there are proposals 0, 1, 2, …, each with a random generator
of its own, seeded with its number. Proposals are made in chunks, judged in order, and counted by
the reason of their rejection. The same seed and writings give the same bytes, interrupted or not
(`shards.py`): run the same command again and it goes on.

What we chose. Cross-author pairs are half of a set, the other kinds share the rest. A pair and its
twin stand one after the other; otherwise the order is shuffled. A passage is a candidate once,
whatever the kind, unless `--reuse` says otherwise. When the writings are used up, the set is
smaller than asked for and the summary says so.

Before anything is written, `check_set` sees that every pair has its twin and that neither the first
of the two nor the person's own text has a place of its own.

A kind is a module with `draft(shelf, rng, exemplars)`. One that needs a model has `load(base, seed,
folder)` instead, which gives a function that makes many proposals at once and keeps what the model
wrote in the folder; there are at most `--model-pairs` of it.
"""

import random
import shlex
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

import tyro
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from data import shards, summary
from data.accept import Taken, fault
from data.drafts import Draft, Rejection, pair_and_twin
from data.recipe import MODULES, WORD_LIMITS, Config, Recipe, recipe, shares, span
from data.shards import Chunk
from data.shelf import Lengths, Shelf, shelves
from data.writings import Piece, read_writings
from nanopersrm import InputError, __version__
from nanopersrm.command import exit_code
from nanopersrm.model.embedded import DEFAULT_BASE
from nanopersrm.pairs import SPLITS, Pair, check_twins, write

HELD_OUT = ("court_opinions", "british_novels")  # by default, where both are there
CHUNK = 64  # proposals
PATIENCE, LEAST = 10, 7  # give up when so many chunks together gave fewer drafts: about 1 %
MADE = ("restyle:", "minor_replacement:", "model:")  # how the sources of other texts begin
DEMO = Path(__file__).parent / "demo"

Propose = Callable[[Shelf, Sequence[random.Random], Sequence[int]], Iterable[Draft | Rejection]]


def load_kind(kind: str, base: str, seed: int, pool: Path | None) -> Propose:
    """What makes the proposals of a kind; what a model writes is kept in the folder `pool`."""
    module = import_module(MODULES[kind])
    if hasattr(module, "load"):
        return module.load(base, seed, pool)

    def propose(
        shelf: Shelf, rngs: Sequence[random.Random], exemplars: Sequence[int]
    ) -> list[Draft | Rejection]:
        return [module.draft(shelf, rng, n) for rng, n in zip(rngs, exemplars, strict=True)]

    return propose


def make_chunk(
    shelf: Shelf, kind: str, number: int, wanted: int, propose: Propose, taken: Taken, asked: Recipe
) -> Chunk:
    """Proposals number x CHUNK and on, until the chunk ends or `wanted` drafts are accepted."""
    start = time.perf_counter()
    indices = range(number * CHUNK, (number + 1) * CHUNK)
    rngs = [random.Random(f"{asked.seed}/{shelf.split}/{kind}/{index}") for index in indices]
    counts = [rng.randint(*asked.exemplars) for rng in rngs]
    pairs: list[Pair] = []
    rejected: Counter[str] = Counter()
    judged = 0
    for index, draft in zip(indices, propose(shelf, rngs, counts), strict=True):
        if len(pairs) == 2 * wanted:
            break
        judged += 1
        reason = draft.reason if isinstance(draft, Rejection) else fault(draft, shelf, taken)
        if isinstance(draft, Rejection) or reason:
            rejected[str(reason)] += 1
        else:
            pairs += pair_and_twin(draft, f"{shelf.split}-{kind}-{index:06d}", shelf.split)
    return Chunk(pairs, judged, dict(rejected), time.perf_counter() - start)


def build_part(
    shelf: Shelf,
    kind: str,
    wanted: int,
    propose: Propose,
    taken: Taken,
    asked: Recipe,
    out: Path | None = None,
    advance: Callable[[int], None] = lambda drafts: None,
) -> list[Chunk]:
    """All chunks of one kind in one split; those that are in `out` are read, not made."""
    chunks: list[Chunk] = []
    done = 0
    while done < wanted:
        last = chunks[-PATIENCE:]
        if len(last) == PATIENCE and sum(len(chunk.pairs) for chunk in last) < 2 * LEAST:
            break
        chunk = shards.load_chunk(out, shelf.split, kind, len(chunks)) if out else None
        if chunk is not None:
            for pair in chunk.pairs[::2]:
                taken.add(pair.chosen, pair.rejected)
        else:
            chunk = make_chunk(shelf, kind, len(chunks), wanted - done, propose, taken, asked)
            if out:
                shards.save_chunk(out, shelf.split, kind, len(chunks), chunk)
        chunks.append(chunk)
        done += len(chunk.pairs) // 2
        advance(len(chunk.pairs) // 2)
    return chunks


def build_sets(
    shelf_of: dict[str, Shelf],
    asked: Recipe,
    base: str = DEFAULT_BASE,
    out: Path | None = None,
    progress: Progress | None = None,
) -> tuple[dict[str, list[Pair]], list[summary.Row]]:
    """The pairs of every split, twins side by side, and a row of figures for each kind in it."""
    pool = out / "pool" if out else None
    makers = {kind: load_kind(kind, base, asked.seed, pool) for kind in asked.kinds}
    sets: dict[str, list[Pair]] = {}
    rows = []
    for split in SPLITS:
        shelf, taken = shelf_of[split], Taken(asked.reuse)
        sets[split] = []
        drafts = asked.drafts[split] * bool(shelf.sources)
        for kind, wanted in shares(drafts, asked.kinds, asked.model_drafts[split]).items():
            task = progress.add_task(f"{split} {kind}", total=wanted) if progress else None

            def advance(drafts: int, task: Any = task) -> None:
                if progress and task is not None:
                    progress.advance(task, drafts)

            chunks = build_part(shelf, kind, wanted, makers[kind], taken, asked, out, advance)
            sets[split] += [pair for chunk in chunks for pair in chunk.pairs]
            rows.append(summary.row(split, kind, wanted, chunks))
        couples = list(zip(sets[split][::2], sets[split][1::2], strict=True))
        random.Random(f"{asked.seed}/{split}/order").shuffle(couples)
        sets[split] = [pair for couple in couples for pair in couple]
    return sets, rows


def demo_pairs(
    seed: int = 0, pairs: int = 200, kinds: Sequence[str] = ("cross_author",)
) -> list[Pair]:
    """Pairs of the invented writers of data/demo, in memory: 8 to train on, 2 and 2 others."""
    drafts = {split: (pairs if split == "train" else max(20, pairs // 10)) // 2 for split in SPLITS}
    asked = Recipe(tuple(kinds), drafts, drafts, (1, 3), seed, reuse=10)
    sets, _ = build_sets(shelves(read_writings(DEMO), seed), asked)
    return [pair for split in SPLITS for pair in sets[split]]


def check_set(pairs: Sequence[Pair]) -> None:
    """Each pair stands beside its twin, and a coin decided which of the two is first.

    Then whoever does not read the exemplars is right about half of the pairs, whatever the texts
    look like and wherever they stand.
    """
    check_twins(pairs)
    human = machine = 0
    for first, second in zip(pairs[::2], pairs[1::2], strict=True):
        if (first.twin, second.twin) != (second.id, first.id):
            raise AssertionError(f"{first.id} and {second.id} stand together and are no twins")
        by_person = [
            not source.startswith(MADE) for source in (first.chosen_from, first.rejected_from)
        ]
        human += by_person == [True, False]
        machine += by_person == [False, True]
    if abs(human - machine) > 5 * (human + machine) ** 0.5:  # 5 standard deviations of fair coins
        raise AssertionError(f"a person's text is chosen first {human} times, the other {machine}")


def held_out(pieces: Sequence[Piece], asked: tuple[str, ...] | None) -> tuple[str, ...]:
    """The domains to hold out: those asked for, else the two of HELD_OUT where both are there."""
    domains = {piece.domain for piece in pieces}
    if asked is None:
        return HELD_OUT if set(HELD_OUT) <= domains else ()
    if unknown := sorted(set(asked) - domains):
        raise InputError(
            f"--hold-out: expected domains out of {', '.join(sorted(domains))}, got {unknown[0]!r}"
        )
    return tuple(sorted(set(asked)))


def main(config: Config, command: str = "") -> None:
    """Read, divide, build, write, and print what came of it."""
    asked = recipe(config)
    lengths = Lengths(
        span(config.words, "--words", *WORD_LIMITS),
        span(config.exemplar_words, "--exemplar-words", *WORD_LIMITS),
    )
    log = Console(stderr=True, highlight=False)
    pieces = read_writings(config.corpora)
    hold_out = held_out(pieces, config.hold_out)
    settings = {
        "writings": shards.digest(pieces),
        "kinds": asked.kinds,
        "pairs": config.pairs,
        "model_pairs": config.model_pairs,
        "eval_pairs": 2 * asked.drafts["test"],
        "exemplars": asked.exemplars,
        "words": lengths.candidate,
        "exemplar_words": lengths.exemplar,
        "seed": asked.seed,
        "hold_out": hold_out,
        "reuse": asked.reuse,
        "base": config.base,
        "version": __version__,
    }
    shards.open_folder(config.out, settings, config.overwrite)
    if facts := shards.finished(config.out):
        log.print(f"{config.out}: already built with these settings")
    else:
        shelf_of = shelves(pieces, asked.seed, hold_out, lengths)
        bar = (TextColumn("{task.description:32}"), BarColumn(), MofNCompleteColumn())
        columns = (*bar, TimeRemainingColumn())
        hidden = not log.is_terminal
        with Progress(*columns, console=log, transient=True, disable=hidden) as progress:
            sets, rows = build_sets(shelf_of, asked, config.base, config.out, progress)
        if not sets["train"]:
            shards.close_folder(config.out)
            raise InputError(f"{config.corpora}: no pair could be made: {summary.reasons(rows)}")
        for split in SPLITS:
            check_set(sets[split])
        for split in SPLITS:
            write(config.out / f"{split}.jsonl", sets[split])
        facts = summary.facts(settings, command, shelf_of, rows)
        shards.write_text(config.out / "summary.md", summary.page(facts))
        shards.write_text(config.out / "summary.json", summary.dump(facts))
    shards.close_folder(config.out)
    print(summary.page(facts), flush=True)


def run(config: Config, command: str = "") -> int:
    """`main` with an exit code."""
    ended = "interrupted; without --overwrite it goes on from here"
    return exit_code("data.build", lambda: main(config, command), ended)


if __name__ == "__main__":
    words = " ".join(["python -m data.build", *map(shlex.quote, sys.argv[1:])])
    sys.exit(
        run(tyro.cli(Config, prog="data.build", description=__doc__.split("How it")[0]), words)
    )
