"""The shelf: the pieces of one split, by domain, author and title, and how texts are cut from them.

    pieces -> divide -> {author: split} -> shelves -> {"train": Shelf, …}
    kind:  writer = draw_writer(shelf, rng); source = rng.choice(shelf.sources[writer])
           text = cut(source.text, words, rng); others = draw_exemplars(shelf, rng, source, 3)

Splits are by author. Some whole domains can be held out ("ood"); of the writers of each other
domain about 9.5 % go to test and 5.5 % to validation, at least two each (a pair needs two), none
where there are fewer than eight writers. Worked number: of 77 writers of one domain 7 are for test,
4 for validation, 66 for training. Writers with one work only come last: exemplars from the book of
the candidate share its subject, and a test should be of style. A writer of several domains is in
one split only.

A *source* is a piece, or part of a piece that is longer than LONGEST words; two texts of one draft
never come from the same source. Texts are cut at ends of sentences, from a random sentence on,
to the length nearest to the wanted one; what lies between is kept to the letter.

What we left out. `cut` counts words by blanks. Scripts without blanks come out as too short.
"""

import random
import re
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache

from data.names import Names, count_names, unsigned
from data.writings import Piece
from nanopersrm import InputError
from nanopersrm.pairs import SPLITS
from nanopersrm.style.profile import CANDIDATE_WORDS, EXEMPLAR_WORDS
from nanopersrm.style.text import BULLET, CLOSERS, ENDS, sentences

TEST_SHARE, VALIDATION_SHARE = 0.095, 0.055  # of the writers of a domain
FEWEST_TO_DIVIDE = 8  # a domain with fewer writers is all for training
LONGEST = 700  # words; longer pieces become several sources
SOURCE_WORDS = 450  # about this many words each
NEAR = 0.1  # a cut may miss the wanted length by this share where the text allows it
PARAGRAPH = re.compile(r"\n[^\S\n]*\n\s*")
LINE = re.compile(r"\n")
TOKEN = re.compile(r"\S+")

Writer = tuple[str, str]  # domain, author


@dataclass(frozen=True)
class Lengths:
    """How many words candidates and exemplars have, from and to."""

    candidate: tuple[int, int] = (CANDIDATE_WORDS - 20, CANDIDATE_WORDS + 20)
    exemplar: tuple[int, int] = (EXEMPLAR_WORDS - 30, EXEMPLAR_WORDS + 30)


@dataclass(frozen=True)
class Source:
    """A piece of writing that at most one text of a draft is cut from."""

    domain: str
    author: str
    title: str
    year: int | None
    text: str
    question: str
    number: int  # over all pieces

    @property
    def label(self) -> str:
        """Who wrote it, as `Pair.chosen_from` says it."""
        return f"{self.author}/{self.title}"


@dataclass(frozen=True)
class Shelf:
    """The sources of one split."""

    split: str
    sources: dict[Writer, list[Source]]
    names: dict[str, Names]  # of each domain
    lengths: Lengths = Lengths()

    @property
    def writers(self) -> list[Writer]:
        """All writers, in a fixed order."""
        return list(self.sources)

    def of_domain(self, domain: str) -> list[Writer]:
        """The writers of one domain."""
        return [writer for writer in self.sources if writer[0] == domain]


def divide(pieces: Sequence[Piece], seed: int, hold_out: Sequence[str] = ()) -> dict[str, str]:
    """author -> split. The same writers, seed and held-out domains give the same answer."""
    domains: dict[str, set[str]] = defaultdict(set)
    works: dict[str, set[str]] = defaultdict(set)
    for piece in pieces:
        domains[piece.domain].add(piece.author)
        works[piece.author].add(piece.title)
    splits = {author: "ood" for domain in hold_out for author in domains[domain]}
    for domain in sorted(set(domains) - set(hold_out)):
        authors = sorted(domains[domain] - set(splits))
        test, validation = quotas(len(authors))
        random.Random(f"{seed}/split/{domain}").shuffle(authors)
        authors.sort(key=lambda author: len(works[author]) == 1)  # stable
        for i, author in enumerate(authors):
            split = "test" if i < test else "validation" if i < test + validation else "train"
            splits[author] = split
    return splits


def quotas(writers: int) -> tuple[int, int]:
    """How many of so many writers are for test and for validation.

    >>> quotas(77), quotas(12), quotas(7)
    ((7, 4), (2, 2), (0, 0))
    """
    if writers < FEWEST_TO_DIVIDE:
        return 0, 0
    return max(2, round(writers * TEST_SHARE)), max(2, round(writers * VALIDATION_SHARE))


def shelves(
    pieces: Sequence[Piece],
    seed: int,
    hold_out: Sequence[str] = (),
    lengths: Lengths | None = None,
) -> dict[str, Shelf]:
    """One shelf a split, each with the writers and titles in a fixed order."""
    splits = divide(pieces, seed, hold_out)
    names = count_names(pieces)
    found: dict[str, dict[Writer, list[Source]]] = {split: {} for split in SPLITS}
    number = 0
    for piece in sorted(pieces, key=lambda p: (p.domain, p.author, p.title)):  # stable
        split = splits[piece.author]
        if split == "ood" and piece.domain not in hold_out:
            continue  # this writer is held out, here too
        for text in parts(unsigned(piece.text, piece.author)):
            source = Source(
                piece.domain, piece.author, piece.title, piece.year, text, piece.question, number
            )
            found[split].setdefault((piece.domain, piece.author), []).append(source)
            number += 1
    return {
        split: Shelf(split, sources, names, lengths or Lengths())
        for split, sources in found.items()
    }


@dataclass(frozen=True)
class _Span:
    """A sentence of a text, and whether the text may be cut before and after it."""

    start: int
    end: int
    words: int
    may_begin: bool
    may_end: bool


@lru_cache(maxsize=20_000)
def _spans(text: str) -> tuple[_Span, ...]:
    """The sentences of a text.

    A passage may begin after an end mark or where a paragraph does, though not in a list, and end
    at an end mark; neither inside a quotation that was opened in the same paragraph.
    """
    spans: list[_Span] = []
    after_mark = True
    for first, last in _blocks(text):
        tokens = list(TOKEN.finditer(text, first, last))
        at = quotes = 0
        for sentence in sentences(text[first:last]):
            words = len(sentence.split())
            opens = at == 0 and not BULLET.match(text, first)
            begins = not spans or opens or (after_mark and quotes % 2 == 0)
            start, end = tokens[at].start(), tokens[at + words - 1].end()
            at += words
            quotes += sentence.count('"')
            after_mark = sentence.rstrip(CLOSERS)[-1:] in ENDS
            ends = after_mark and (quotes % 2 == 0 or at == len(tokens))
            spans.append(_Span(start, end, words, begins, ends))
    return tuple(spans)


def _blocks(text: str) -> Iterator[tuple[int, int]]:
    """Where paragraphs and list lines begin and end."""
    cuts = [(m.start(), m.end()) for m in PARAGRAPH.finditer(text)]
    cuts += [(m.start(), m.end()) for m in LINE.finditer(text) if BULLET.match(text, m.end())]
    first = 0
    for start, end in sorted(cuts):
        if start >= first:
            yield first, start
            first = end
    yield first, len(text)


def parts(text: str) -> list[str]:
    """The whole text, or, when it is very long, even parts that end where sentences end."""
    words = len(text.split())
    if words <= LONGEST:
        return [text.strip()]
    spans = _spans(text)
    number = round(words / SOURCE_WORDS)
    found: list[str] = []
    begin, read = spans[0].start, 0
    for span, following in zip(spans, (*spans[1:], None), strict=True):
        read += span.words
        if following is None or read >= words * (len(found) + 1) / number:
            found.append(text[begin : span.end])
            begin = following.start if following else span.end
    return found


def cut(text: str, words: int, rng: random.Random) -> str:
    """A run of whole sentences of about `words` words, from a random sentence on.

    It ends with an end mark wherever there is one in reach; else where the text ends, as a person
    may end it. A shorter text comes back whole.
    """
    spans = _spans(text)
    total = sum(span.words for span in spans)
    if total <= words:
        return text.strip()
    runs: list[tuple[int, int, int]] = []  # how far from the wanted length, start, end
    for first, span in enumerate(spans):
        if not span.may_begin:
            continue
        read, ends = 0, []
        for i, later in enumerate(spans[first:], first):
            read += later.words
            if later.may_end or i + 1 == len(spans):
                ends.append((abs(read - words), span.start, later.end))
            if ends and read > 2 * words:
                break
        runs.append(min(ends))
    near = [run for run in runs if run[0] <= NEAR * words] or [min(runs)]
    _, start, end = rng.choice(near)
    return text[start:end]


def draw_writer(shelf: Shelf, rng: random.Random) -> Writer:
    """Any writer, all equally likely."""
    if not shelf.sources:
        raise InputError(f"the split {shelf.split} has no writers")
    return rng.choice(shelf.writers)


def draw_exemplars(
    shelf: Shelf, rng: random.Random, source: Source, number: int, besides: Sequence[Source] = ()
) -> tuple[str, ...] | None:
    """Texts by the writer of `source` from other sources; None when there are too few.

    Other works are taken wherever the writer has several, each work once before any twice.
    """
    sources = draw_sources(shelf, rng, source, number, besides)
    if sources is None:
        return None
    return tuple(cut(s.text, rng.randint(*shelf.lengths.exemplar), rng) for s in sources)


def draw_sources(
    shelf: Shelf, rng: random.Random, source: Source, number: int, besides: Sequence[Source] = ()
) -> list[Source] | None:
    """`draw_exemplars` before cutting, for who needs the whole sources."""
    own = shelf.sources[source.domain, source.author]
    taken = {source.number, *(other.number for other in besides)}
    if any(other.title != source.title for other in own):
        left = [other for other in own if other.title != source.title]
    else:
        left = own
    left = [other for other in left if other.number not in taken]
    if len(left) < number:
        return None
    rng.shuffle(left)
    seen: Counter[str] = Counter()
    turns = []
    for other in left:
        turns.append(seen[other.title])
        seen[other.title] += 1
    order = sorted(range(len(left)), key=lambda i: turns[i])  # stable
    return [left[i] for i in order[:number]]
