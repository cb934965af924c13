"""A ledger told in sentences, by plain templates over the same numbers.

    It reads like the writer, most of all "the chain was dry" (+6.1). It has many semicolons, the
    writer has many semicolons (+0.7). Together +6.8 decibans: 4.8 to 1 for this writer.

This is the `reasoning` of a judgement: what the page shows while a reply comes, what a chat gets,
and what a base that can write free prose (`--free`) learns to imitate. Nothing in it is the model's
own wording: the model has chosen the lines and the score.
"""

from collections.abc import Sequence

from nanopersrm.style.evidence import NGRAMS, READING
from nanopersrm.style.ledger import SUM, Line
from nanopersrm.style.profile import level

LONGEST_QUOTE = 60  # characters


def sentences(lines: Sequence[Line], whom: str = "It") -> str:
    """The lines of one candidate in order; the last may be their sum."""
    return " ".join(sentence(line, whom) for line in lines)


def sentence(line: Line, whom: str = "It") -> str:
    """One line of a ledger as a sentence."""
    decibans = f"({line.decibans:+.1f})"
    if line.feature == SUM:
        together = "Together" if whom == "It" else f"Together {whom} has"
        return f"{together} {line.decibans:+.1f} decibans: {odds(line.decibans)}."
    if line.feature == READING:
        like = "like" if line.decibans >= 0 else "unlike"
        words = f', most of all "{quoted}"' if (quoted := quote(line)) else ""
        return f"{whom} reads {like} the writer{words} {decibans}."
    if line.feature == NGRAMS:
        more = "more" if line.decibans >= 0 else "fewer"
        return f"{whom} shares {more} groups of letters with the writer than usual {decibans}."
    assert line.candidate is not None, f"{line.feature}: not measured of the candidate"
    assert line.writer is not None, f"{line.feature}: not measured of the writer"
    has, writer = level(line.feature, line.candidate), level(line.feature, line.writer)
    words = f' ("{quoted}")' if (quoted := quote(line)) else ""
    return f"{whom} has {has}{words}, the writer has {writer} {decibans}."


def odds(decibans: float) -> str:
    """Decibans in everyday words: 10 is "10 to 1 for this writer"."""
    if abs(decibans) < 0.05:
        return "they say nothing either way"
    ratio = 10 ** (abs(decibans) / 10)
    number = f"{ratio:.0f}" if ratio >= 9.95 else f"{ratio:.1f}"
    return f"{number} to 1 {'for' if decibans > 0 else 'against'} this writer"


def quote(line: Line) -> str:
    """The words that speak loudest on the side of the line; "" where there are none."""
    side = [words for words in line.words if words.decibans * line.decibans > 0]
    if not side:
        return ""
    text = " ".join(max(side, key=lambda words: abs(words.decibans)).text.split())
    return text if len(text) <= LONGEST_QUOTE else ""
