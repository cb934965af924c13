"""Faithful: is what a reply says of the texts true? Quotes verbatim, factors by measurement.

    report = check(reply, exemplars, {"A": candidate})
    report.quotes, report.quotes_true        # spans in "double quotes", and those that are verbatim
    report.claims, report.claims_true        # of the writer or a candidate, and those that hold
    report.flaws                             # what is wrong, and where

How it works. What counts as a claim, and how each is recomputed from the texts, is in `claims.py`;
of whom it speaks, in `subjects.py`.

What we chose. `check` is total: any text gives a report, never an error. A word that is no claim in
this vocabulary ("a stately voice") is not counted, neither for nor against: whoever rewards the
share of true claims should ask for some claims too. A quote is verbatim when it is a substring of
an exemplar or a candidate that begins and ends at word ends, white space and quote marks folded as
in `reading.py`; longer than LONGEST_QUOTE words it is copying, and does not count as true. `placed`
says whether it is from the text that the sentence speaks of.

What we left out. Irony, and whether what is said matters.
Read next: `data/replies.py`, which writes replies that pass.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache

from nanopersrm.judge.claims import Claim, claims_of
from nanopersrm.judge.subjects import Scene, scene_of
from nanopersrm.judge.verdict import CLOSE, OPEN
from nanopersrm.style.text import FOLD

LONGEST_QUOTE = 12  # words
LONGEST_REPLY = 8_000  # characters that are read; a reply has some 800

QUOTE = re.compile(r'"([^"\n]*)"')


@dataclass(frozen=True)
class Quote:
    """A span in double quotes, without them."""

    start: int
    text: str
    subject: str | None
    verbatim: bool
    placed: bool  # in the text of the subject


@dataclass(frozen=True)
class Flaw:
    """Something untrue, and where the sentence with it begins."""

    start: int
    sentence: int
    message: str


@dataclass(frozen=True)
class Report:
    """What was found in a reply."""

    found_quotes: tuple[Quote, ...]
    found_claims: tuple[Claim, ...]
    flaws: tuple[Flaw, ...]  # in the order of the reply

    @property
    def quotes(self) -> int:
        return len(self.found_quotes)

    @property
    def quotes_true(self) -> int:
        return sum(quote.verbatim for quote in self.found_quotes)

    @property
    def quotes_placed(self) -> int:
        return sum(quote.placed for quote in self.found_quotes)

    @property
    def claims(self) -> int:
        return len(self.found_claims)

    @property
    def claims_true(self) -> int:
        return sum(claim.holds for claim in self.found_claims)


def fold(text: str) -> str:
    """White space to single blanks, quote marks to straight ones."""
    return " ".join(text.translate(FOLD).split())


@lru_cache(maxsize=256)
def _folded(text: str) -> str:
    return fold(text)


def contains(text: str, quote: str) -> bool:
    """Whether the quote stands in the text, from the beginning of a word to the end of one."""
    inside, wanted = _folded(text), fold(quote)
    if not wanted or len(wanted.split()) > LONGEST_QUOTE:
        return False
    at = inside.find(wanted)
    while at >= 0:
        before, after = inside[at - 1 : at], inside[at + len(wanted) : at + len(wanted) + 1]
        cut_left = before.isalnum() and wanted[0].isalnum()
        if not cut_left and not (after.isalnum() and wanted[-1].isalnum()):
            return True
        at = inside.find(wanted, at + 1)
    return False


def check(reply: str, exemplars: Sequence[str], candidates: Mapping[str, str]) -> Report:
    """Every quote and every claim of a reply (or of its reasoning alone), checked on the texts.

    candidates: label -> text, as the prompt showed them.
    """
    text, offset, whole = _reasoning(reply)
    masked = QUOTE.sub(lambda m: '"' + " " * len(m[1]) + '"', text)
    scene = scene_of(masked, exemplars, candidates)
    quotes = [_quote(scene, match.start(), match[1], offset) for match in QUOTE.finditer(text)]
    claims = claims_of(scene)
    flaws = [(q.start - offset, f'"{q.text}" is in no text') for q in quotes if not q.verbatim]
    flaws += [(c.start, f"{c.subject}, untrue: {c.text}") for c in claims if not c.holds]
    last = QUOTE.sub(lambda m: "." * len(m[0]), text).find('"')
    if last >= 0 and whole:
        flaws.append((last, "a quote is not closed"))
        quotes.append(Quote(last + offset, text[last + 1 : last + 40], None, False, False))
    return Report(
        tuple(quotes),
        tuple(Claim(**{**vars(claim), "start": claim.start + offset}) for claim in claims),
        tuple(
            Flaw(at + offset, max(s for s in [0, *scene.starts] if s <= at) + offset, message)
            for at, message in sorted(flaws)
        ),
    )


def _reasoning(reply: str) -> tuple[str, int, bool]:
    """The part between the tags, curly quotes made straight, where it begins, and whether it was
    read to its end."""
    whole, reply = len(reply) <= LONGEST_REPLY, reply[:LONGEST_REPLY]
    begin = reply.find(OPEN.strip())
    begin = begin + len(OPEN.strip()) if begin >= 0 else 0
    end = reply.find(CLOSE, begin)
    inside = reply[begin : end if end >= 0 else len(reply)]
    straight = re.sub("[“”„«»″]", '"', inside).replace("’", "'")
    return straight, begin, whole or end >= 0


def _quote(scene: Scene, start: int, quote: str, offset: int) -> Quote:
    everything = [*scene.exemplars, *scene.candidates.values()]
    subject = scene.subject(start, start + len(quote) + 2)
    of_subject = [t for texts in scene.texts(subject) for t in texts] if subject else []
    return Quote(
        start + offset,
        quote,
        subject,
        any(contains(text, quote) for text in everything),
        any(contains(text, quote) for text in of_subject),
    )
