"""Words and phrases: which parts of a text sound like the writer."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Word:
    """A run of characters without white space, and what its tokens gain."""

    start: int  # characters start to end of the text
    end: int
    gain: float  # nats: log of how much likelier it is after the writer's texts than after others'
    topic: bool = False  # says what the text is about, not whose it is


@dataclass(frozen=True)
class Phrase:
    """A few neighbouring words that sound like the writer (gain above 0) or do not (below)."""

    start: int  # characters start to end of the text, which are `text`
    end: int
    text: str
    gain: float  # nats, of all its words
    topic: bool = False  # more than half of the gain is of topic words
