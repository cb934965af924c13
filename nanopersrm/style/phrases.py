"""Words and phrases: which parts of a text sound like the writer.

`reading.py` says how much likelier each token becomes after the writer's texts than after nothing:
its gain in nats. People read words, so the gains of the tokens of a word are added up:

    The    machine    has    since    failed    twice.
    0.1    2.0        1.5    3.0      -1.0      -2.0

A *phrase* is a run of 1 to 8 neighbouring words of one sentence. Its gain G is the sum of theirs,
its strength |G| - MARGIN · words: a further word must bring more than the margin, so that phrases
stay short. Phrases are taken one after the other, the strongest first, none over another:

    machine has since        6.5 - 3 · 0.5 = 5.0    taken, most like the writer
    The machine has since    6.6 - 4 · 0.5 = 4.6    overlaps
    failed twice.            3.0 - 2 · 0.5 = 2.0    taken, least like the writer
    twice.                   2.0 - 1 · 0.5 = 1.5    overlaps

A word can also be likely because of what the writer wrote about. Where it stands in one exemplar
alone and its gain vanishes when that exemplar is left out, it was copied, and says the *topic*, not
the style. What stands in two exemplars, a name too, is a habit. Topic comes after style.

A word is a run of characters without white space. It keeps its marks, because they are often what
gains: "supper;". Scripts without blanks between words have few, long words.
"""

import re
from bisect import bisect_left
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from nanopersrm.style import text as cutting
from nanopersrm.style.lexicon import LISTS

MOST_WORDS = 8  # of a phrase
MARGIN = 0.5  # nats that a word must bring
LEAST_GAIN = 1.0  # nats, of a phrase that is shown, and of a word that may be topic
STYLE_SHARE = 0.25  # of its gain that a word of style keeps without the exemplar it stands in
WORD = re.compile(r"\S+")


@dataclass(frozen=True)
class Word:
    """A run of characters without white space, and what its tokens gain."""

    start: int  # characters start to end of the text
    end: int
    gain: float  # nats: log of how much likelier it is after the writer's texts than after nothing
    topic: bool = False  # says what the text is about, not whose it is


@dataclass(frozen=True)
class Phrase:
    """A few neighbouring words that sound like the writer (gain above 0) or do not (below)."""

    start: int  # characters start to end of the text, which are `text`
    end: int
    text: str
    gain: float  # nats, of all its words
    topic: bool = False  # more than half of the gain is of topic words


def words_of(text: str, spans: Sequence[tuple[int, int]], gains: Sequence[float]) -> list[Word]:
    """The words of a text, as far as it was read, and the gain of each.

    spans and gains: of the tokens. A token counts for the word that it ends in, one of blanks for
    the word that follows, which some tokenizers have before numbers; a line break for none. A word
    that was read in part is left out.
    """
    places = [match.span() for match in WORD.finditer(text)]
    starts = [start for start, _ in places]
    totals = [0.0] * len(places)
    for (start, end), gain in zip(spans, gains, strict=True):
        token = text[start:end]
        word = bisect_left(starts, start + len(token.rstrip())) - 1
        if not token.strip():
            word = len(places) if "\n" in token else bisect_left(starts, end)
        if word < len(places):
            totals[word] += gain
    read = spans[-1][1] if spans else 0
    return [
        Word(start, end, round(total, 4))
        for (start, end), total in zip(places, totals, strict=True)
        if end <= read
    ]


def only_exemplars(text: str, words: Sequence[Word], exemplars: Sequence[str]) -> dict[int, int]:
    """Words that may be topic, because one exemplar alone has them: word -> exemplar, by number.

    Common words, and those that gain little, are none.
    """
    vocabularies = [_vocabulary(exemplar) for exemplar in exemplars]
    only = {}
    for i, word in enumerate(words):
        parts = _vocabulary(text[word.start : word.end]) if word.gain >= LEAST_GAIN else set()
        having = [e for e, vocabulary in enumerate(vocabularies) if parts & vocabulary]
        if len(having) == 1:
            only[i] = having[0]
    return only


def _vocabulary(text: str) -> set[str]:
    """The words with a letter that are not common, in lower case, without marks."""
    words = cutting.WORD.findall(text.translate(cutting.FOLD).lower())
    return {word for word in words if any(map(str.isalpha, word))} - LISTS["common"]


def with_topics(
    words: Sequence[Word], without: Sequence[Word], only: Mapping[int, int], exemplar: int
) -> list[Word]:
    """The words; those that one exemplar alone has are topic if their gain vanishes without it.

    without: the same words, their gains where this exemplar is left out. only: `only_exemplars`.
    """
    return [
        replace(word, topic=True)
        if only.get(i) == exemplar and left.gain < STYLE_SHARE * word.gain
        else word
        for i, (word, left) in enumerate(zip(words, without, strict=True))
    ]


def phrases(words: Sequence[Word], text: str, count: int = 3) -> list[Phrase]:
    """The `count` phrases most like the writer, then the `count` least like the writer.

    Of either kind the greatest gain first, those of topic last.
    """
    runs = []
    for first, end in _sentences(words, text):
        for i in range(first, end):
            gain = topic_gain = 0.0
            for j in range(i, min(i + MOST_WORDS, end)):
                gain += words[j].gain
                topic_gain += words[j].gain * words[j].topic
                strength = abs(gain) - MARGIN * (j + 1 - i)
                if strength > 0 and abs(gain) >= LEAST_GAIN:
                    runs.append((gain > 0 and topic_gain > gain / 2, -strength, i, j, gain))
    taken: set[int] = set()
    kinds: dict[bool, list[Phrase]] = {True: [], False: []}
    for topic, _, i, j, gain in sorted(runs):  # style before topic, the strongest first
        kind = kinds[gain > 0]
        if len(kind) < count and taken.isdisjoint(range(i, j + 1)):
            taken.update(range(i, j + 1))
            start, end = words[i].start, words[j].end
            kind.append(Phrase(start, end, text[start:end], round(gain, 4), topic))
    for kind in kinds.values():
        kind.sort(key=lambda phrase: (phrase.topic, -abs(phrase.gain)))
    return kinds[True] + kinds[False]


def _sentences(words: Sequence[Word], text: str) -> Iterator[tuple[int, int]]:
    """The first word of each sentence, and the first after it; paragraphs end sentences too."""
    first = 0
    for i, word in enumerate(words, 1):
        if i < len(words):
            token, following = (
                text[w.start : w.end].translate(cutting.FOLD) for w in (word, words[i])
            )
            gap = text[word.end : words[i].start]
            blank_line = max(gap.count("\n"), gap.count("\r")) > 1
            if not blank_line and not cutting.ends_sentence(token, following):
                continue
        yield first, i
        first = i
