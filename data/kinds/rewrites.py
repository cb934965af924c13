"""Rewrites: the same text by somebody with another habit, one habit at a time.

A rewrite moves one factor of `nanopersrm/factors.py` up (+) or down (-) and is a plain function:
`apply(text, rng)` gives a text; where there is no place for it, the same text. A second time
changes nothing. What else it moves of necessity is declared in `also` (cutting sentences changes
how they open); everything else holds, see TOLERANCE.

    apply_all([BY_NAME["contractions-"], BY_NAME["exclamations+"]], "It's late.", rng)
    # "It is late!"

Rewrites of one family want the same places of a text, so a writer has at most one of a family
(`data/restyle.py`). The table stands in the order in which rewrites are applied: what adds or
removes words before what cuts sentences, capitals last. What we left out. The rewrites know no
grammar beyond word lists, so they act where they are sure and nowhere else.
"""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from data.kinds import contractions, punctuation, sentence_shape, spelling, wording

# Without declared side effects a factor may move by so much (z units), per rewrite and text of
# 100 words: a sentence more or less changes every share of sentences a little.
TOLERANCE = 0.5
SHAPE = (
    "sentence_length sentence_spread short_sentences clauses opening_variety pronoun_openings "
    "conjunction_openings"
)


@dataclass(frozen=True)
class Rewrite:
    """One habit: which factor it moves, which way, and what else it moves of necessity."""

    name: str  # the factor, then + or -
    factor: str
    direction: int  # +1 or -1
    apply: Callable[[str, random.Random], str]
    family: str  # a writer has at most one rewrite of a family
    also: tuple[str, ...] = ()


def _both(
    factor: str,
    more: Callable[[str, random.Random], str],
    less: Callable[[str, random.Random], str],
    family: str = "",
    also: str = "",
) -> tuple[Rewrite, Rewrite]:
    family = family or factor
    names = tuple(name for name in also.split() if name != factor)
    return (
        Rewrite(f"{factor}+", factor, 1, more, family, names),
        Rewrite(f"{factor}-", factor, -1, less, family, names),
    )


REWRITES: tuple[Rewrite, ...] = (
    *_both("british", spelling.to_british, spelling.to_american),
    *_both(
        "word_length",
        wording.longer_words,
        wording.shorter_words,
        also="long_words latinate adverbs hedges boosters variety negations duties passives "
        "conjunction_openings "
        "opening_variety british",
    ),
    *_both("digits", wording.number_digits, wording.number_words, also="word_length capitals"),
    *_both("that", wording.bring_that, wording.drop_that, also="variety clauses"),
    *_both(
        "hedges",
        wording.soften,
        wording.sharpen,
        family="openings",
        also=f"first_person adverbs variety commas word_length long_words {SHAPE}",
    ),
    *_both(
        "boosters", wording.boost, wording.calm, also=f"adverbs variety passives commas {SHAPE}"
    ),
    *_both(
        "contractions",
        contractions.contract,
        contractions.expand,
        also="be negations first_person we second_person third_person word_length passives "
        "pronoun_openings that sentence_length variety duties opening_variety short_sentences "
        "informal clauses",
    ),
    *_both(
        "conjunction_openings",
        sentence_shape.open_with_and,
        sentence_shape.open_without_and,
        family="openings",
        also="and but pronoun_openings opening_variety commas variety sentence_length adverbs "
        "short_sentences",
    ),
    *_both(
        "sentence_length",
        sentence_shape.join_sentences,
        sentence_shape.split_sentences,
        family="sentences",
        also=f"{SHAPE} semicolons commas colons dashes and but which variety first_person we "
        "third_person lowercase_starts",
    ),
    *_both(
        "semicolons",
        punctuation.bring_semicolons,
        punctuation.drop_semicolons,
        family="sentences",
        also=f"{SHAPE} commas dashes",
    ),
    *_both(
        "dashes",
        punctuation.bring_dashes,
        punctuation.drop_dashes,
        family="sentences",
        also="commas semicolons ellipses",
    ),
    *_both(
        "brackets",
        punctuation.bring_brackets,
        punctuation.drop_brackets,
        family="sentences",
        also="commas dashes",
    ),
    *_both(
        "exclamations",
        punctuation.bring_exclamations,
        punctuation.drop_exclamations,
        family="ends",
        also=f"commas lowercase_starts {SHAPE}",
    ),
    *_both(
        "ellipses",
        punctuation.bring_ellipses,
        punctuation.drop_ellipses,
        family="ends",
        also=f"commas lowercase_starts {SHAPE}",
    ),
    *_both("paragraphs", sentence_shape.break_paragraphs, sentence_shape.join_paragraphs),
    *_both(
        "lowercase_starts",
        sentence_shape.small_starts,
        sentence_shape.capital_starts,
        family="case",
    ),
)
BY_NAME: dict[str, Rewrite] = {rewrite.name: rewrite for rewrite in REWRITES}


def apply_all(rewrites: Sequence[Rewrite], text: str, rng: random.Random) -> str:
    """All rewrites in the order of the table, whatever order they are given in."""
    for rewrite in sorted(rewrites, key=REWRITES.index):
        text = rewrite.apply(text, rng)
    return text
