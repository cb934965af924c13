"""Verbatim: between double quotes a reply can only copy from the texts that its prompt shows.

    text        We left early; the rain, which I hate, came at noon.
    reply       … one aside, "the rain, w                        and then a token of
    goes on     hich · h · hich I · …                            what stands there in a text
    not         ith · hich we · "                                no text; a quote ends with a word

A mark opens a quote freely, its words are a walk through the texts, a mark at the end of a word
closes it. All is done on bytes, since a token may be a part of a character. The texts become one
row of bytes. A *place* is all spots of it where the quote so far ends; a token is allowed if it
goes on from one of them, or closes there. What follows its mark is read on in the same way.

From each spot in a word every byte up to the word's end is a token. So from a spot n bytes before
the nearest end, n + 1 tokens surely close: the *cost* of a place. A token is allowed only if the
cost after it fits what is left of the budget, so no quote is open when a budget ends.

    "the rain, w      cost 5: h, i, c, h and the mark        a budget with 5 tokens left: allowed

A quote has at most LONGEST_QUOTE words; double quote marks within a text and angle brackets bound
what can be quoted.
"""

import math
import re
from bisect import bisect_left
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate, groupby

from nanopersrm.judge.prompts import OPENING
from nanopersrm.model.tokenizer import Tokenizer
from nanopersrm.style.text import FOLD, WORD

LONGEST_QUOTE = 12  # words
# The double quotes of FOLD, and what a next token may complete to one: all of it in UTF-8.
MARK = re.compile(rb'"|\xe2\x80[\x9c-\x9e\xb3]|\xc2[\xab\xbb]')  # " “ ” „ ″ « »
PART = re.compile(rb"(?:\xe2\x80?|\xc2)?\Z")
CLOSING = b'"'
KEPT_APOSTROPHES = {point: to for point, to in FOLD.items() if to != "'"}
BOUND = re.compile(rf'["{OPENING}\ud800-\udfff]')  # halves of surrogate pairs are no text


@dataclass(frozen=True)
class Place:
    """Where a reply stands: outside of quotes, or in one that ends at these spots of the texts."""

    part: bytes = b""  # outside: last bytes, where they may be the first of a mark
    at: tuple[int, ...] | None = None  # inside: all spots; None: outside
    words: int = 0  # inside: begun so far


OUTSIDE = Place()


class QuoteTokens:
    """The tokens of a vocabulary by how they can stand in a quote: made once, for all texts."""

    def __init__(self, token_bytes: Sequence[bytes]):
        """token_bytes: of each id, b"" where it adds nothing to a text."""
        self.token_bytes = token_bytes
        self.plain: dict[bytes, list[int]] = {}  # the bytes -> ids
        self.closing: dict[bytes, list[int]] = {}  # the bytes before the first mark -> ids
        for i, own in enumerate(token_bytes):
            if mark := MARK.search(own):
                self.closing.setdefault(own[: mark.start()], []).append(i)
            elif own and b"\n" not in own and b"  " not in own:  # else in no folded text
                self.plain.setdefault(own, []).append(i)
        self.longest = max(map(len, [*self.plain, *self.closing]), default=0)
        single = b"".join(own for own in self.plain if len(own) == 1)
        self.alphabet = frozenset(single if CLOSING in token_bytes else b"")
        self._marked: dict[bytes, list[int]] = {}

    def marked(self, part: bytes) -> list[int]:
        """Ids that bring a mark after such a part of one."""
        if part not in self._marked:
            every = enumerate(self.token_bytes)
            self._marked[part] = [i for i, own in every if MARK.search(part + own)]
        return self._marked[part]


@lru_cache(maxsize=4)
def quote_tokens(tokenizer: Tokenizer) -> QuoteTokens:
    """The tokens of a tokenizer by how they can stand in a quote; made once for each."""
    return QuoteTokens(tokenizer.token_bytes)


class Quotable:
    """What replies to one prompt can quote. Keeps what it has found out about places."""

    def __init__(self, texts: Sequence[str], tokens: QuoteTokens):
        """texts: the exemplars and candidates that the prompt shows."""
        self.tokens, self._costs = tokens, dict[Place, dict[int, float]]()
        self._after = dict[int, float]()  # closing id -> the cost after it
        runs = [run for text in texts for run in _runs(text, tokens.alphabet)]
        starts: list[int] = []
        self.ends: list[int] = []  # in ascending order
        row = bytearray(CLOSING)  # between two runs, where no token without a mark can go on
        for run in dict.fromkeys(runs):
            offsets = [*accumulate((len(c.encode()) for c in run), initial=len(row))]
            begins, closes = _cuts(run)
            starts += [offsets[i] for i in begins]
            self.ends += [offsets[i] for i in closes]
            row += run.encode() + CLOSING
        self.row, self._is_end = bytes(row), frozenset(self.ends)
        self.opened = Place(at=tuple(starts))

    def read(self, place: Place, own: bytes) -> Place | None:
        """The place after a token's bytes; None: what then stands in the quote is in no text."""
        while True:
            before = place.part + own
            mark = MARK.search(before)
            if place.at is None:
                if mark is None:
                    found = PART.search(before)
                    return Place(found[0] if found else b"")
                place = self.opened
            else:
                quoted = before[: mark.start()] if mark else before
                at = tuple(
                    spot + len(quoted)
                    for spot in (place.at if quoted in self.row else ())
                    if self.row.startswith(quoted, spot)
                )
                words = max(place.words, 1) + quoted.count(b" ") if quoted else place.words
                if not at or words > LONGEST_QUOTE:
                    return None
                if mark is None:
                    return Place(at=at, words=words)
                if not words or self._is_end.isdisjoint(at):
                    return None
                place = OUTSIDE
            own = before[mark.end() :]

    def after(self, place: Place, i: int) -> Place:
        """The place after a token that was a choice; ids past the vocabulary add nothing."""
        known = self.tokens.token_bytes
        found = self.read(place, known[i] if i < len(known) else b"")
        assert found is not None, f"token {i}, {known[i]!r}, quotes what is in no text"
        return found

    def cost(self, place: Place | None) -> float:
        """Tokens that surely close the quote: none outside, infinitely many where none can."""
        if place is None:
            return math.inf
        if place.at is None:
            return 0
        return min((self._to_close(spot, not place.words) for spot in place.at), default=math.inf)

    def choices(self, place: Place, left: int) -> tuple[bool, list[int]]:
        """What can be drawn if `left` tokens, this one included, are left of the budget.

        Inside a quote (True, only these ids), outside (False, all but these). Of a place that was
        reached by such choices there is always something to draw.
        """
        if place not in self._costs:
            self._costs[place] = dict(self._steps(place))
        inside = place.at is not None
        costs = self._costs[place].items()
        return inside, [i for i, cost in costs if (cost < left) == inside]

    def _steps(self, place: Place) -> Iterator[tuple[int, float]]:
        """Ids and the cost after each: of all that can go on inside, of all with a mark outside."""
        tokens = self.tokens
        if place.at is None:
            for i in tokens.marked(place.part):
                yield i, self.cost(self.read(place, tokens.token_bytes[i]))
            return
        found: dict[int, float] = {}
        for spot in place.at:
            bound = min(self.row.index(CLOSING, spot), spot + tokens.longest)
            for end in range(spot, bound + 1):
                quoted = self.row[spot:end]
                if max(place.words, 1) + quoted.count(b" ") > LONGEST_QUOTE:
                    break
                for i in tokens.plain.get(quoted, ()):
                    found[i] = min(found.get(i, math.inf), self._to_close(end))
                if end in self._is_end and (quoted or place.words):
                    found |= {i: self._after_closing(i) for i in tokens.closing.get(quoted, ())}
        yield from found.items()

    def _after_closing(self, i: int) -> float:
        """The cost after a token whose first mark has closed a quote."""
        if i not in self._after:
            own = self.tokens.token_bytes[i]
            mark = MARK.search(own)
            assert mark is not None, f"token {i}, {own!r}, has no mark"
            self._after[i] = self.cost(self.read(OUTSIDE, own[mark.end() :]))
        return self._after[i]

    def _to_close(self, spot: int, empty: bool = False) -> int:
        """Bytes to the nearest end, of a quote that is not empty, and the mark."""
        return self.ends[bisect_left(self.ends, spot + empty)] - spot + 1


def _runs(text: str, alphabet: frozenset[int]) -> Iterator[str]:
    """What stands between bounds, white space folded; with curly apostrophes and without."""
    for run in BOUND.split(text.translate(KEPT_APOSTROPHES)):
        for usable, words in groupby(run.split(), lambda word: alphabet.issuperset(word.encode())):
            if usable:
                kept = " ".join(words)
                yield kept
                yield kept.translate(FOLD)


def _cuts(run: str) -> tuple[list[int], list[int]]:
    """Between which characters a quote can begin, and where it can end.

    >>> _cuts("(I don't)")
    ([0, 1, 3], [1, 2, 8, 9])
    """
    words = [match.span() for match in WORD.finditer(run.translate(FOLD))]  # of the same length
    begins, inner = {a for a, _ in words}, {i for a, b in words for i in range(a + 1, b)}
    around = f" {run} "  # before gap i stands around[i], after it around[i + 1]
    gaps = [i for i in range(len(run) + 1) if i not in inner]
    starts = [i for i in gaps if around[i + 1] != " " and (i in begins or around[i] == " ")]
    return starts, [i for i in gaps if around[i] != " "]
