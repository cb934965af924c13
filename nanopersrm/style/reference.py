"""Build `factor_reference.json`: what many writers do, to compare one writer with.

    python -m nanopersrm.style.reference --corpora FOLDER --out factor_reference.json

FOLDER holds `*.jsonl.gz`, one domain a file, a line being {"author", "title", "text", …}. Every
author gives at most 12 pieces, evenly spaced, at the lengths of an exemplar and a candidate.

    reliability = variance between authors / total variance        centred in each domain

The variance between authors is the mean product of two pieces by one author from *different* works:
pieces of one work share their subject, which would pass for style. Sentence lengths of +4 and +2
words give a product of 8. Pieces of strangers give the quantiles that turn n-gram similarity and
factor distance into percentiles.
"""

import json
import math
import random
import sys
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import tyro

from nanopersrm import InputError
from nanopersrm.command import exit_code
from nanopersrm.files import write_text
from nanopersrm.pairs import lines, parse_object
from nanopersrm.style import profile
from nanopersrm.style.features import FACTORS, measure
from nanopersrm.style.text import sentences

PER_AUTHOR = 12  # pieces an author
PAIRS = 6000  # of an exemplar and a candidate by a stranger
SEED = 20
POINTS = 41  # quantiles, one every 2.5 %
GRAM_COUNT = 2000  # n-grams with an idf of their own
SEEN = 0.05  # a habit shown by fewer pieces has no measured reliability
UNSEEN = 0.15  # the reliability it gets: about that of the upper third of the others
ROOT_SD_FLOOR = 0.35  # less than half of what one hit in 150 words adds to the root of a rate


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
    for paragraph in text.split("\n\n"):
        kept = []
        for sentence in sentences(paragraph):
            if words > 0:
                kept.append(sentence)
                words -= len(sentence.split())
        if kept:
            paragraphs.append(" ".join(kept))
    return "\n\n".join(paragraphs)


def load(folder: Path) -> list[Piece]:
    """Evenly spaced pieces of every author of every file, in a fixed order."""
    pieces: list[Piece] = []
    for path in sorted(folder.glob("*.jsonl.gz")):
        works: dict[str, list[tuple[str, str]]] = defaultdict(list)
        for place, line in lines(path):
            record = parse_object(line, place)
            if missing := {"author", "title", "text"} - record.keys():
                raise InputError(f"{place}: expected a text with its author, no {min(missing)}")
            works[str(record["author"])].append((str(record["title"]), str(record["text"])))
        for author, texts in sorted(works.items()):
            n = min(PER_AUTHOR, len(texts))
            for title, text in (texts[i * len(texts) // n] for i in range(n)):
                parts = (cut(text, profile.EXEMPLAR_WORDS), cut(text, profile.CANDIDATE_WORDS))
                pieces.append(Piece(path.name, author, title, *parts))
    if not pieces:
        raise InputError(f"{folder}: expected a folder with *.jsonl.gz files, found no text")
    return pieces


def short(value: float) -> float:  # four digits
    return float(f"{value:.4g}")


def quantiles(values: Sequence[float]) -> tuple[float, ...]:
    """POINTS evenly spaced quantiles, linear between neighbours."""
    places = np.arange(POINTS) * (len(values) - 1) / (POINTS - 1)
    return tuple(map(short, np.interp(places, np.arange(len(values)), np.sort(values))))


def reliability(pieces: Sequence[Piece], values: Sequence[float | None]) -> float:
    """Variance between authors over total variance, inside domains and across works (see above)."""
    domains: dict[str, dict[str, list[tuple[str, float]]]] = {}
    for piece, value in zip(pieces, values, strict=True):
        if value is not None:
            authors = domains.setdefault(piece.domain, {})
            authors.setdefault(piece.author, []).append((piece.title, value))
    between, total = [], []  # of each author
    for authors in domains.values():
        centre = np.mean([np.mean([v for _, v in own]) for own in authors.values()])
        for own in authors.values():
            titles, centred = np.array([t for t, _ in own]), np.array([v for _, v in own]) - centre
            total.append(np.mean(centred**2))
            products = np.outer(centred, centred)[titles[:, None] != titles]
            if products.size:
                between.append(np.mean(products))
    if not between or np.mean(total) == 0:
        return 0.0
    return float(min(1.0, max(0.0, np.mean(between)) / np.mean(total)))


def stats(pieces: Sequence[Piece], values: Sequence[float | None]) -> profile.Stats:
    """One line of the table: a factor over all pieces that can be judged on it."""
    known = np.array([value for value in values if value is not None] or [0.0])
    roots, seen = np.sqrt(known), np.mean(known > 0)
    spread = roots.std()
    common = seen >= SEEN and spread > 0
    trust = reliability(pieces, [None if v is None else math.sqrt(v) for v in values])
    return profile.Stats(
        mean=short(known.mean()),
        sd=short(max(known.std(), ROOT_SD_FLOOR**2)),
        root_mean=short(roots.mean()),
        root_sd=short(spread if common else max(spread, ROOT_SD_FLOOR)),
        seen=short(float(seen)),
        reliability=short(trust if common else UNSEEN),
        quantiles=quantiles(known.tolist()),
    )


def strangers(pieces: Sequence[Piece]) -> list[tuple[int, int]]:
    """(an exemplar by an author of several works, a candidate by a stranger of its domain)."""
    rng = random.Random(SEED)
    fits = []
    for i, a in enumerate(pieces):
        others = [(j, b) for j, b in enumerate(pieces) if b.domain == a.domain]
        same = [j for j, b in others if b.author == a.author and b.title != a.title]
        if same and (apart := [j for j, b in others if b.author != a.author]):
            fits.append((i, same, apart))
    if not fits:
        raise InputError("expected a file with several authors and several works by one author")
    drawn = [rng.choice(fits) for _ in range(PAIRS)]
    # The draw of a second work is not used; without it the shipped table would be another.
    return [(i, (rng.choice(same), rng.choice(apart))[1]) for i, same, apart in drawn]


def build(pieces: Sequence[Piece]) -> profile.Reference:
    """The reference: the factors, the idf, and how far strangers are apart."""
    exemplars = [measure([piece.exemplar]) for piece in pieces]
    candidates = [measure([piece.candidate]) for piece in pieces]
    table = {f.name: stats(pieces, [m[f.name] for m in exemplars]) for f in FACTORS}
    documents = Counter(gram for piece in pieces for gram in profile.grams(piece.exemplar))
    common = sorted(documents.items(), key=lambda item: (-item[1], item[0]))[:GRAM_COUNT]
    # +1: an n-gram that is in every piece keeps a little weight, so tiny corpora work too.
    idf = {gram: short(math.log((len(pieces) + 1) / count)) for gram, count in common}
    rare = min(idf.values()) if len(common) < GRAM_COUNT else max(idf.values())
    draft = profile.Reference(table, (0.0,), (0.0,), idf, rare)
    near, far = [], []
    for i, j in strangers(pieces):
        near.append(profile.ngram_similarity([pieces[i].exemplar], pieces[j].candidate, draft))
        far.append(profile.measured_distance(exemplars[i], candidates[j], draft))
    return replace(draft, similarity=quantiles(near), distance=quantiles(far))


def make(corpora: Path, out: Path) -> None:
    """Read *.jsonl.gz of a folder, build, write: one factor a line, to be read in a diff."""
    pieces = load(corpora)
    built = build(pieces)
    rows = [f"  {json.dumps(n)}: {json.dumps(vars(row))}" for n, row in built.factors.items()]
    rest = {
        "pieces": len(pieces),
        "authors": len({(piece.domain, piece.author) for piece in pieces}),
        "similarity": built.similarity,
        "distance": built.distance,
        "rare": built.rare,
        "grams": list(built.idf),
        "idf": list(built.idf.values()),
    }
    tail = ",\n".join(f"{json.dumps(key)}: {json.dumps(value)}" for key, value in rest.items())
    write_text(out, '{"factors": {\n' + ",\n".join(rows) + "\n},\n" + tail + "}\n")
    print(f"{out}: {len(pieces)} pieces")


def main(arguments: Sequence[str] | None = None) -> int:
    """`make` with an exit code."""
    name = "nanopersrm.style.reference"
    return exit_code(name, lambda: tyro.cli(make, prog=name, args=arguments))


if __name__ == "__main__":
    sys.exit(main())
