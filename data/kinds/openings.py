"""Openings: a sentence of a person's writing, and what that person wrote after it.

    opening = draw_opening(source, words, rng)
    opening.text     "The ships lay in the bay until March."         the question of the pair
    opening.rest     "Nobody had paid the crews. The captain ..."    the person's own continuation

A model continues the same opening, and sees nothing of the rest. Where the writing answers a
question of its own (`Source.question`), that is the opening, and the whole writing the rest.

`first_words` cuts a text after the end of a sentence, the one nearest to a wanted length, and keeps
what lies before to the letter. It cuts both texts of a pair: the model's where it is finished, and
then the person's to the length of the model's, so that neither is the longer one by habit.

What we chose. An opening has 6 to 40 words, stands outside quotations and ends with a mark. After
it the author's text can be cut within 15 % of the wanted length and passes the rules of `accept.py`
for a single text, so that no model writes beside a text that is rejected anyway.

What we left out. An opening may lean on what stood before it ("This was why he left."); the person
then knows more than the model.
"""

import random
import re
from dataclasses import dataclass

from data.accept import text_fault
from data.shelf import Source, cut
from nanopersrm.style.text import BULLET, CLOSERS, ENDS, sentences

LEAST, MOST = 6, 40  # words of an opening
ROOM = 1.25  # words after an opening, for each that is wanted
NEAR = 0.15  # the text after it may miss the wanted length by this share
TRIES = 6  # passages looked at before a source is given up
BLOCK = re.compile(r"\n[^\S\n]*\n\s*")
TOKEN = re.compile(r"\S+")


@dataclass(frozen=True)
class Opening:
    """What two writers continue, and how its author did."""

    source: Source
    text: str
    rest: str


def sentence_ends(text: str) -> list[tuple[int, int]]:
    """(words so far, place) after each sentence that a text may be cut after, in order."""
    tokens = list(TOKEN.finditer(text))
    found = []
    read = 0
    for block in BLOCK.split(text.strip()):
        quotes = 0
        for sentence in sentences(block):
            read += len(sentence.split())
            quotes += sentence.count('"')
            if sentence.rstrip(CLOSERS)[-1:] in ENDS and quotes % 2 == 0:
                found.append((read, tokens[read - 1].end()))
    return found


def first_words(text: str, words: int) -> str:
    """The beginning of a text up to the sentence end nearest to `words`; "" when there is none.

    >>> first_words("I came. I saw the river. I left", 4)
    'I came. I saw the river.'
    """
    ends = sentence_ends(text)
    if not ends:
        return ""
    _, place = min(ends, key=lambda end: (abs(end[0] - words), end[0]))
    return text[:place].strip()


def draw_opening(source: Source, words: int, rng: random.Random) -> Opening | None:
    """An opening of this source after which a good text of about `words` words can be cut."""
    if source.question:
        opening = Opening(source, source.question.strip(), source.text)
        return opening if _continues_well(opening, words) else None
    for _ in range(TRIES):
        passage = cut(source.text, round(ROOM * words) + MOST, rng)
        first = next(sentences(BLOCK.split(passage)[0]), "")
        size = len(first.split())
        plain = first.count('"') % 2 == 0 and not BULLET.match(passage)
        if LEAST <= size <= MOST and plain and first.rstrip(CLOSERS)[-1:] in ENDS:
            at = list(TOKEN.finditer(passage))[size - 1].end()
            opening = Opening(source, first, passage[at:].strip())
            if _continues_well(opening, words):
                return opening
    return None


def _continues_well(opening: Opening, words: int) -> bool:
    """Whether the author's own text would be accepted; asked before a model spends time on it."""
    text = first_words(opening.rest, words)
    near = abs(len(text.split()) - words) <= NEAR * words
    return near and text_fault(text, 1, opening.source.author) is None
