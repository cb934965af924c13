"""Build `factor_reference.json`: what many writers do, to compare one writer with.

    python -m nanopersrm.style.reference --corpora FOLDER --out factor_reference.json

FOLDER holds `*.jsonl.gz`, one domain a file, a line being {"author", "title", "text", …}. The same
files give the same bytes.

1. At most 12 works of every author, evenly spaced, give one piece of about 150 words each, cut at a
   sentence end, and one of about 100 words (the candidate length) for step 4.
2. Every factor is measured on every piece: mean, deviation, quantiles.
3. Reliability. Values are centred in their domain. The variance between authors is the mean product
   of two pieces by one author from *different* works; pieces from one work share their subject,
   which would pass for style. Divided by the total variance that is the share that belongs to the
   person: two pieces of sentence length +4 and +2 words from their domain give a product of 8.
4. Strangers. Pairs of different authors of one file, exemplar 150 words and candidate 100, give the
   quantiles of n-gram similarity and factor distance that turn both into percentiles.

A habit shown by fewer than 5 % of the pieces gets the reliability UNSEEN, an assumption, and its
deviation is kept from being almost nothing (ROOT_SD_FLOOR).
"""

import argparse
import gzip
import json
import math
import random
import sys
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from nanopersrm import InputError
from nanopersrm.command import exit_code
from nanopersrm.files import write_text
from nanopersrm.style.features import FACTORS, measure
from nanopersrm.style.profile import (
    CANDIDATE_WORDS,
    EXEMPLAR_WORDS,
    Reference,
    Stats,
    grams,
    measured_distance,
    ngram_similarity,
)
from nanopersrm.style.text import sentences

PER_AUTHOR = 12  # pieces an author
TRIPLES = 6000  # an exemplar, another work by its author, one by a stranger
SEED = 20
POINTS = 41  # quantiles, one every 2.5 %
GRAM_COUNT = 2000  # n-grams with an idf of their own
SEEN = 0.05  # a habit shown by fewer pieces has no measured reliability
UNSEEN = 0.15  # the reliability it gets: about that of the upper third of the others
ROOT_SD_FLOOR = 0.35  # less than half of what one hit in 150 words adds to the root of a rate

Measured = dict[str, float | None]


@dataclass(frozen=True)
class Piece:
    """The opening of one text of the corpora, at both lengths."""

    domain: str
    author: str
    title: str
    exemplar: str
    candidate: str


def cut(text: str, words: int) -> str:
    """The first sentences of a text, until there are `words` words; paragraphs stay."""
    paragraphs: list[str] = []
    left = words
    for paragraph in text.split("\n\n"):
        kept = []
        for sentence in sentences(paragraph):
            if left <= 0:
                break
            kept.append(sentence)
            left -= len(sentence.split())
        if kept:
            paragraphs.append(" ".join(kept))
    return "\n\n".join(paragraphs)


def load(folder: Path) -> list[Piece]:
    """Evenly spaced pieces of every author of every file, in a fixed order."""
    paths = sorted(folder.glob("*.jsonl.gz"))
    if not paths:
        raise InputError(f"{folder}: expected a folder with *.jsonl.gz files, found none")
    pieces = []
    for path in paths:
        works: dict[str, list[tuple[str, str]]] = defaultdict(list)
        with gzip.open(path, "rt", encoding="utf-8") as lines:
            for number, line in enumerate(lines, 1):
                try:
                    record = json.loads(line)
                    works[str(record["author"])].append((str(record["title"]), str(record["text"])))
                except (ValueError, KeyError, TypeError) as error:
                    raise InputError(
                        f"{path}:{number}: not a text with its author: {error}"
                    ) from error
        for author, texts in sorted(works.items()):
            n = min(PER_AUTHOR, len(texts))
            for title, text in (texts[i * len(texts) // n] for i in range(n)):
                exemplar, candidate = cut(text, EXEMPLAR_WORDS), cut(text, CANDIDATE_WORDS)
                pieces.append(Piece(path.name, author, title, exemplar, candidate))
    return pieces


def quantiles(values: Sequence[float]) -> tuple[float, ...]:
    """POINTS evenly spaced quantiles, linear between neighbours."""
    ordered = sorted(values)
    out = []
    for i in range(POINTS):
        place = (len(ordered) - 1) * i / (POINTS - 1)
        low = math.floor(place)
        high = min(low + 1, len(ordered) - 1)
        out.append(_short(ordered[low] + (place - low) * (ordered[high] - ordered[low])))
    return tuple(out)


def _short(value: float) -> float:
    return float(f"{value:.4g}")


def reliability(pieces: Sequence[Piece], values: Sequence[float | None]) -> float:
    """Variance between authors over total variance, inside domains and across works (see above)."""
    domains: dict[str, dict[str, dict[str, list[float]]]] = {}
    for piece, value in zip(pieces, values, strict=True):
        if value is not None:
            authors = domains.setdefault(piece.domain, {})
            authors.setdefault(piece.author, {}).setdefault(piece.title, []).append(value)
    between: list[float] = []  # one author each
    total: list[float] = []
    for authors in domains.values():
        means = [_mean([v for work in works.values() for v in work]) for works in authors.values()]
        centre = _mean(means)
        for works in authors.values():
            centred = [[v - centre for v in work] for work in works.values()]
            total.append(_mean([v * v for work in centred for v in work]))
            sums, sizes = [sum(work) for work in centred], [len(work) for work in centred]
            pairs = sum(sizes) ** 2 - sum(size * size for size in sizes)
            if pairs:
                between.append((sum(sums) ** 2 - sum(s * s for s in sums)) / pairs)
    if not between or _mean(total) == 0:
        return 0.0
    return min(1.0, max(0.0, _mean(between)) / _mean(total))


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else 0.0


def _deviation(values: Sequence[float]) -> float:
    mean = _mean(values)
    return math.sqrt(_mean([(v - mean) ** 2 for v in values]))


def stats(pieces: Sequence[Piece], values: Sequence[float | None]) -> Stats:
    """One line of the table: a factor over all pieces that can be judged on it."""
    known = [value for value in values if value is not None] or [0.0]
    roots = [math.sqrt(value) for value in known]
    seen = sum(value > 0 for value in known) / len(known)
    spread = _deviation(roots)
    common = seen >= SEEN and spread > 0
    trust = reliability(pieces, [None if v is None else math.sqrt(v) for v in values])
    return Stats(
        mean=_short(_mean(known)),
        sd=_short(max(_deviation(known), ROOT_SD_FLOOR**2)),
        root_mean=_short(_mean(roots)),
        root_sd=_short(spread if common else max(spread, ROOT_SD_FLOOR)),
        seen=_short(seen),
        reliability=_short(trust if common else UNSEEN),
        quantiles=quantiles(known),
    )


def gram_table(pieces: Sequence[Piece]) -> tuple[dict[str, float], float]:
    """idf of the commonest n-grams, log(pieces / pieces with it); one idf for all the others."""
    documents: Counter[str] = Counter()
    for piece in pieces:
        documents.update(grams(piece.exemplar).keys())
    common = sorted(documents.items(), key=lambda item: (-item[1], item[0]))[:GRAM_COUNT]
    # +1: an n-gram that is in every piece keeps a little weight, so tiny corpora work too.
    idf = {gram: _short(math.log((len(pieces) + 1) / count)) for gram, count in common}
    return idf, min(idf.values()) if len(common) < GRAM_COUNT else idf[common[-1][0]]


def triples(pieces: Sequence[Piece]) -> list[tuple[int, int, int]]:
    """(exemplar, another work by its author, a work by a stranger of the same domain), drawn."""
    rng = random.Random(SEED)
    domains: dict[str, list[int]] = defaultdict(list)
    for i, piece in enumerate(pieces):
        domains[piece.domain].append(i)
    fits = []
    for i, a in enumerate(pieces):
        others = [(j, pieces[j]) for j in domains[a.domain]]
        same = [j for j, b in others if b.author == a.author and b.title != a.title]
        strangers = [j for j, b in others if b.author != a.author]
        if same and strangers:
            fits.append((i, same, strangers))
    if not fits:
        raise InputError("expected a file with several authors and several works by one author")
    drawn = [rng.choice(fits) for _ in range(TRIPLES)]
    return [(i, rng.choice(same), rng.choice(strangers)) for i, same, strangers in drawn]


def build(pieces: Sequence[Piece]) -> tuple[Reference, str]:
    """The reference, and a line that says how often an author is closer than a stranger."""
    exemplars: list[Measured] = [measure([piece.exemplar]) for piece in pieces]
    candidates: list[Measured] = [measure([piece.candidate]) for piece in pieces]
    idf, rare = gram_table(pieces)
    table = {f.name: stats(pieces, [m[f.name] for m in exemplars]) for f in FACTORS}
    draft = Reference(table, (0.0,), (0.0,), idf, rare)
    drawn = triples(pieces)

    def far(i: int, j: int) -> float:
        return -ngram_similarity([pieces[i].exemplar], pieces[j].candidate, draft)

    def unlike(i: int, j: int) -> float:
        return measured_distance(exemplars[i], candidates[j], draft)

    rates = []
    strangers: dict[str, list[float]] = {}
    for name, distance in (("n-grams", far), ("factors", unlike)):
        same = [distance(i, j) for i, j, _ in drawn]
        strangers[name] = [distance(i, k) for i, _, k in drawn]
        right = _mean([float(a < b) for a, b in zip(same, strangers[name], strict=True)])
        rates.append(f"{name} {100 * right:.1f} %")
    reference = replace(
        draft,
        similarity=quantiles([-value for value in strangers["n-grams"]]),
        distance=quantiles(strangers["factors"]),
    )
    return reference, f"author closer than stranger: {', '.join(rates)} of {len(drawn)}"


def dump(reference: Reference, pieces: Sequence[Piece]) -> str:
    """The table as JSON, one factor a line, so that a change can be read in a diff."""
    lines = [
        f"  {json.dumps(name)}: {json.dumps(vars(row))}" for name, row in reference.factors.items()
    ]
    authors = len({(piece.domain, piece.author) for piece in pieces})
    rest = {
        "pieces": len(pieces),
        "authors": authors,
        "similarity": reference.similarity,
        "distance": reference.distance,
        "rare": reference.rare,
        "grams": list(reference.idf),
        "idf": list(reference.idf.values()),
    }
    tail = ",\n".join(f"{json.dumps(key)}: {json.dumps(value)}" for key, value in rest.items())
    return '{"factors": {\n' + ",\n".join(lines) + "\n},\n" + tail + "}\n"


def make(corpora: Path, out: Path) -> None:
    """Read, build, write."""
    try:
        pieces = load(corpora)
    except (OSError, EOFError) as error:  # a .gz file that is cut short is an EOFError
        raise InputError(f"{error}") from error
    reference, summary = build(pieces)
    write_text(out, dump(reference, pieces))
    print(f"{out}: {len(pieces)} pieces; {summary}")


def main(arguments: Sequence[str] | None = None) -> int:
    """Parse the two flags and make the reference; the exit code of the command."""
    parser = argparse.ArgumentParser(
        prog="nanopersrm.style.reference", description="Build the factor reference."
    )
    parser.add_argument("--corpora", type=Path, required=True, help="folder with *.jsonl.gz")
    parser.add_argument("--out", type=Path, required=True, help="the JSON file to write")
    flags = parser.parse_args(arguments)
    return exit_code("nanopersrm.style.reference", lambda: make(flags.corpora, flags.out))


if __name__ == "__main__":
    sys.exit(main())
