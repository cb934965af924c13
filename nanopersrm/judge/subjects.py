"""Subjects: of whom a phrase in a reply speaks, the writer or one of the candidates.

    "The writer has many dashes; A has none, few commas in B."
     many dashes -> writer        none -> A        few commas -> B

How it works. A phrase speaks of the subject that follows at once ("in A"), else of
the last one named before it in its sentence, else of the first "in A" after it, else of the last
one named at all. Subjects are "the writer", "the exemplars", "A", "candidate B", "both candidates"
and, where there is one candidate, "the text". A name after "than", "like", "unlike", "with", "to"
or "as" is compared with, and does not become the subject. Single letters are hard: "A" is an
article before anything but a verb or a mark.

What we left out. Who is meant by "it" or "they", and lists in which the subject comes last.
Read next: `faithful.py`.
"""

import re
from bisect import bisect_left, bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache

WRITER = "writer"
EVERY = "every candidate"
SENTENCE_END = re.compile(r"[.!?](?=\s|$)|\n")


def words_of(text: str) -> frozenset[str]:
    """A word list."""
    return frozenset(text.split())


# Words after "A" at the beginning of a sentence that make it a label and not an article.
VERBS = words_of(
    "has have had is was uses keeps shows lacks breaks matches fits stays comes goes does "
    "stands differs shares sits opens reads sounds writes gives runs follows departs leans "
    "holds falls meets agrees also too alone never only still mostly with at on in by and or "
    "but scores puts misses drops turns moves carries prefers avoids against looks works brings "
    "offers makes beats over belongs leads could would may might must should gets probably "
    "leaves returns fails wins loses remains seems appears mixes leaning agreeing clearly "
    "surely "
)
AHEAD = 8  # names looked at after a phrase
AT_ONCE = re.compile(
    r"\)?(?:, about [\d.]+[\w% ]{0,20})?(?: \([^()]{0,80}\))?,? (?:in|for|from|by)(?: the| this)? "
)
LATER = re.compile(r"\b(?:in|for|from)(?: the| this)? $")
THAN = (" ", " the ", " this ", " in ", " in the ")
COMPARED = r"(?:than|unlike|like|with|to|as)(?: in| for)?(?: the| this)? $"


@dataclass(frozen=True)
class Mention:
    start: int
    end: int
    subject: str | None  # None: somebody we do not know
    compared: bool


@lru_cache(maxsize=32)
def _names(labels: tuple[str, ...]) -> re.Pattern[str]:
    one = r"|(?P<one>\b(?:[Tt]he|[Tt]his) (?:candidate|text|draft)\b)"
    some = f"[{''.join(labels)}]" if labels else "(?!)"  # without any: nothing
    return re.compile(
        r"(?P<writer>\b(?:[Ww]riter|[Aa]uthor|[Ee]xemplars?)\b)"
        r"|(?P<every>\b(?:[Bb]oth|[Ee]ach|[Aa]ll) (?:candidates?|texts?)\b)"
        rf"|(?:\b(?:[Tt]he |[Tt]his )?(?:[Cc]andidate|[Tt]ext|[Dd]raft) "
        rf"(?P<named>{some})\b)" + one + rf"|(?P<label>\b{some}\b)"
    )


def mentions(text: str, starts: Sequence[int], labels: tuple[str, ...]) -> list[Mention]:
    """Who is named, in order. `starts` are the beginnings of the sentences."""
    found = []
    for match in _names(labels).finditer(text):
        kind, subject = match.lastgroup, match[0]
        if kind == "label" and subject in "AI" and not _is_label(text, match, starts):
            continue
        who: str | None = match[kind] if kind in ("named", "label") else None
        if kind == "writer":
            who = WRITER
        elif kind == "every":
            who = EVERY
        elif kind == "one" and len(labels) == 1:
            who = labels[0]
        before = text[max(0, match.start() - 24) : match.start()]
        compared = bool(re.search(rf"\b{COMPARED}", before, re.IGNORECASE))
        found.append(Mention(match.start(), match.end(), who, compared))
    return found


def _is_label(text: str, match: re.Match[str], starts: Sequence[int]) -> bool:
    """ "A" in the midst of a sentence, or before a verb or a mark; an article otherwise."""
    after = text[match.end() : match.end() + 16]
    if match[0] == "I":
        return False
    if match.start() not in starts or not after[:1].isspace():
        return True
    return after.split()[:1] != [] and after.split()[0].strip(",.;:") in VERBS


@dataclass(frozen=True)
class Scene:
    """The reply with its quotes blanked, and what it speaks of."""

    text: str
    starts: list[int]
    mentions: list[Mention]
    exemplars: Sequence[str]
    candidates: Mapping[str, str]

    def sentence(self, at: int) -> tuple[int, int]:
        """Where the sentence around a place begins and ends."""
        place = bisect_right(self.starts, at)
        begin = self.starts[place - 1] if place else 0
        return begin, self.starts[place] if place < len(self.starts) else len(self.text)

    def following(self, at: int) -> Mention | None:
        """The next one named from a place on."""
        place = bisect_left(self.mentions, at, key=lambda mention: mention.start)
        return self.mentions[place] if place < len(self.mentions) else None

    def subject(self, start: int, end: int) -> str | None:
        """Whom a phrase from `start` to `end` speaks of; the rule is in the docstring above."""
        begin, stop = self.sentence(start)
        after = self.following(end)
        if after and after.start < stop and AT_ONCE.fullmatch(self.text[end : after.start]):
            return after.subject
        earlier = None  # the last one named before, in this sentence or another
        for place in range(bisect_right(self.mentions, start, key=lambda m: m.end) - 1, -1, -1):
            if not self.mentions[place].compared:
                earlier = self.mentions[place]
                break
        if earlier and earlier.start >= begin:
            return earlier.subject
        for _ in range(AHEAD):
            if after is None or after.start >= stop:
                break
            if LATER.search(self.text[max(0, after.start - 10) : after.start]):
                return after.subject
            after = self.following(after.end)
        return earlier.subject if earlier else None

    def within(self, start: int, end: int) -> str | None:
        """Who is named inside a phrase."""
        mention = self.following(start)
        return mention.subject if mention and mention.start < end else None

    def compared(self, end: int) -> str | None:
        """Whom "than" at the end of a phrase compares with."""
        mention = self.following(end)
        if mention and self.text[end : mention.start] in THAN:
            return mention.subject
        return None

    def texts(self, subject: str) -> list[tuple[str, ...]]:
        """The texts of a subject; several entries for "both candidates"."""
        if subject == WRITER:
            return [tuple(self.exemplars)]
        if subject == EVERY:
            return [(text,) for text in self.candidates.values()]
        return [(self.candidates[subject],)]


def scene_of(text: str, exemplars: Sequence[str], candidates: Mapping[str, str]) -> Scene:
    """A reply with its quotes blanked, cut into sentences, with all who are named in it."""
    starts = [0, *(match.end() for match in SENTENCE_END.finditer(text))]
    starts = [at + len(text[at:]) - len(text[at:].lstrip()) for at in starts]
    return Scene(text, starts, mentions(text, starts, tuple(candidates)), exemplars, candidates)
