"""A ledger: what each feature says of a candidate, what it was measured on, and the words behind.

A line of a ledger is one feature of `evidence.py`:

    feature   how the writer has it, how the candidate has it, its evidence in decibans, its words

    semicolons   2.7 per 100 words, 2.5, +0.7, ["cure;", "afterwards;"]
    reading      none, +0.11 nats a token, +6.1, ["cure; the chain was dry, the rear brake", …]

The words of a habit are those that show it, each with an equal share of the line's decibans. Those
of the reading are its phrases (`phrases.py`): a gain of g nats in a candidate of T tokens moves the
mean by g / T, and the reading, which is half of that and half of the other direction, by g / 2T. So
a phrase is worth weight · g / 2T decibans, and all words with what the other direction brings make
the line. The length of sentences, variety and n-grams rest on no words that could be named.

`menu` is the writer's side, as the prompt shows it: what can be looked at, each with the letter
that calls it. The two that are no habits come first, then the habits that can say most of this
writer.
"""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from string import ascii_letters
from typing import TYPE_CHECKING

from nanopersrm.style.evidence import FACTOR_NAMES, NGRAMS, READING, Evidence
from nanopersrm.style.features import COUNTED
from nanopersrm.style.phrases import Phrase, Word, phrases
from nanopersrm.style.profile import BY_NAME, figure, measured, ngram_similarity, profile
from nanopersrm.style.text import read

if TYPE_CHECKING:
    from nanopersrm.style.reading import Reading

SUM = "sum"
# The letter of a feature is the same in every prompt: r, n, then all others in order.
_OTHERS = (letter for letter in ascii_letters if letter not in "rn")
LETTERS = {READING: "r", NGRAMS: "n"} | dict(zip(FACTOR_NAMES, _OTHERS, strict=False))
# Habits that a single word does not show.
UNSHOWN = frozenset({"paragraphs", "list_lines", "conjunction_openings", "pronoun_openings"})
UNSHOWN |= {"lowercase_starts", "short_sentences", "passives"}
WORD = re.compile(r"\S+")
MOST_WORDS = 8  # of a habit that are listed
MENU = 24  # features, at most


@dataclass(frozen=True)
class Passage:
    """Words that a line rests on."""

    start: int  # characters start to end of the candidate, which are `text`
    end: int
    text: str
    decibans: float


@dataclass(frozen=True)
class Line:
    """What one feature says of a candidate."""

    feature: str
    writer: float | None  # in the unit of the feature; None: it is no property of one side
    candidate: float | None
    decibans: float  # one decimal
    words: tuple[Passage, ...] = ()


@dataclass(frozen=True)
class CandidateReading:
    """How much likelier a candidate and its words are after the writer's texts (`reading.py`)."""

    forward: float  # gain of the candidate after the writer's texts, nats a token
    back: float  # gain of the writer's texts after the candidate
    words: list[Word]  # as far as it was read
    phrases: list[Phrase]  # most like the writer first, then least; of each, those of topic last


@dataclass(frozen=True)
class Ledger:
    """All lines about one candidate."""

    lines: Mapping[str, Line]  # feature -> its line; those of the menu first, in its order
    reading: CandidateReading | None = None

    def total(self, features: Sequence[str] | None = None) -> float:
        """The sum over these features, by default over all, in decibans with one decimal."""
        names = self.lines if features is None else features
        return round(sum(self.lines[name].decibans for name in names), 1) + 0.0

    def shown(self, features: Sequence[str]) -> list[Line]:
        """The lines of these features, then their sum."""
        return [*(self.lines[f] for f in features), Line(SUM, None, None, self.total(features))]

    def moved(self, by: int) -> "Ledger":
        """The same where so many blanks stand before the candidate."""
        if not by:
            return self

        def shift(parts):  # type: ignore[no-untyped-def]
            return [replace(part, start=part.start + by, end=part.end + by) for part in parts]

        lines = {n: replace(line, words=tuple(shift(line.words))) for n, line in self.lines.items()}
        seen = self.reading
        if seen is not None:
            seen = replace(seen, words=shift(seen.words), phrases=shift(seen.phrases))
        return Ledger(lines, seen)


@dataclass(frozen=True)
class Measurer:
    """Measures candidates against a writer: the evidence, and what reads where there is one."""

    evidence: Evidence
    reading: "Reading | None" = None

    def menu(self, exemplars: Sequence[str]) -> dict[str, str]:
        """Feature -> how the writer has it, for the prompt; at most MENU of those that count."""
        weights = self.evidence.weights
        menu = {READING: "reading"} if self.reading is not None and weights.get(READING) else {}
        menu |= {NGRAMS: "n-grams"} if weights.get(NGRAMS) else {}
        traits = {trait.factor: trait for trait in profile(exemplars)}
        salience = self.evidence.salience({name: trait.value for name, trait in traits.items()})
        for name in sorted(salience, key=lambda name: -salience[name])[: MENU - len(menu)]:
            trait = traits[name]
            label, value = BY_NAME[name].label, figure(trait.value)
            menu[name] = f"{label} {value} ({trait.percentile:.0f}%)"
        return menu

    def ledgers(
        self,
        exemplars: Sequence[str],
        candidates: Sequence[str],
        writer: str | None = None,
        topics: bool = True,
    ) -> list[Ledger]:
        """Of each candidate, whose white space around is not counted.

        writer: of exemplars that are trained on; the weights are then those that were fitted
        without this writer. topics: mark words that only say the topic, for people, which takes a
        forward for each exemplar; no line depends on it.
        """
        evidence = self.evidence if writer is None else self.evidence.without(writer)
        texts, menu = [text.strip() for text in candidates], self.menu(exemplars)
        seen: list[CandidateReading | None] = [None] * len(texts)
        tokens, passages = [1] * len(texts), [list[Phrase]() for _ in texts]
        if self.reading is not None:
            read = self.reading.read(exemplars, texts)
            if all(math.isfinite(r.score) for r in read):
                words = self.reading.words(exemplars, texts, read, topics)
                plain = self.reading.words(exemplars, texts, read, False) if topics else words
                passages = [phrases(some, text) for some, text in zip(plain, texts, strict=True)]
                tokens = [len(r.gains) for r in read]
                seen = [
                    CandidateReading(round(r.forward, 4), round(r.back, 4), w, phrases(w, text))
                    for r, w, text in zip(read, words, texts, strict=True)
                ]
        ledgers = []
        for text, reading, n, spoken in zip(texts, seen, tokens, passages, strict=True):
            score = None if reading is None else (reading.forward + reading.back) / 2
            values = evidence.ledger(exemplars, text, score)
            lines = {
                name: _habit_line(name, exemplars, text, values[name])
                for name in dict.fromkeys([*menu, *values])
                if name in values and name in BY_NAME
            }
            if NGRAMS in values:
                alike = round(100 * ngram_similarity(exemplars, text), 2)
                lines = {NGRAMS: Line(NGRAMS, None, alike, values[NGRAMS])} | lines
            if READING in values and reading is not None and score is not None:
                nats = evidence.weights[READING] / 2 / n  # decibans for a nat
                words_read = tuple(
                    Passage(p.start, p.end, p.text, round(nats * p.gain, 1)) for p in spoken
                )
                line = Line(READING, None, round(score, 4), values[READING], words_read)
                lines = {READING: line} | lines
            ledgers.append(Ledger(lines, reading))
        return ledgers


def _habit_line(name: str, exemplars: Sequence[str], text: str, decibans: float) -> Line:
    """The line of a habit, with the words that show it, as far as single words do."""
    writer, candidate = measured(tuple(exemplars))[name], measured((text,))[name]
    assert writer is not None, f"{name}: not measured of the writer"
    assert candidate is not None, f"{name}: not measured of the candidate"
    places = [m.span() for m in WORD.finditer(text) if name in habits_of(m[0])]
    share = round(decibans / max(1, len(places)), 2)
    words = tuple(Passage(a, b, text[a:b], share) for a, b in places[:MOST_WORDS])
    return Line(name, round(writer, 4), round(candidate, 4), decibans, words)


@lru_cache(maxsize=16384)
def habits_of(word: str) -> frozenset[str]:
    """The habits that are counted in a word, whatever stands around it.

    A word that shows nothing follows, because an emoji or a dash alone is no text of words, and the
    number of a list no habit.
    """
    cut = read([f"{word} x"])
    return frozenset(
        name
        for name, factor in BY_NAME.items()
        if factor.words == COUNTED and name not in UNSHOWN and factor.measure(cut)
    )
