"""Accept: what a draft must pass before it becomes a pair and its twin. Each rule gives a reason.

    taken = Taken()
    reason = fault(draft, shelf, taken)      None: accepted, and its candidates are taken now

Rules for every text: enough words, no left-over markup, not broken off, no surname of its own
writer. Rules for the draft: two different candidates with lengths within 25 %; no exemplar twice;
no passage of an exemplar in a candidate (word 8-grams); no rare name that the exemplars of a writer
share with that writer's candidate alone. Rule for the set: no candidate that is already in it.

Worked number for passages: a candidate of 100 words has 93 8-grams. One that an exemplar has too is
1.1 % and allowed ("the Senate and House of Representatives of the United"); two are 2.2 % and
rejected.

The name rule is for topic. When exemplar and candidate both speak of Heathcliff and the other
candidate does not, no style has to be read. A name that both candidates hold tells nothing and is
allowed.

`changed_words` counts edits, for the kinds that make small ones.

What we left out. Subjects leak by common words too (ships, hymns, budgets); only other works and
strangers of the same domain help against that.
"""

import difflib
import hashlib
import re
from collections import Counter
from collections.abc import Iterator

from data.drafts import Draft, author_2
from data.names import rare_names, surname
from data.shelf import Shelf
from nanopersrm.style.text import CLOSERS, EMOJI, ENDS, SMILEY, WORD

MOST_LONGER = 1.25  # words of the longer candidate / words of the shorter
SHORTEST = 0.75  # of the least length asked for
GRAM = 8  # words
MOST_SHARED = 0.015  # of a candidate's 8-grams that are also in an exemplar
MOST_KNOWN = 0.1  # of a candidate's 8-grams that earlier candidates had
LONGEST_GREETING = 4  # words: "With all my love," may end a letter
MARKUP = re.compile(
    r"<\|?/?[a-zA-Z][^<>\n]{0,80}>|&(?:[a-z]{2,8}|#\d{2,6});|```|\{\{|\}\}|\]\(|\ufffd"
    r"|^\s{0,3}#{1,6} |^\s*\[\s*['\"]|\*\*\w|\\(?:n|t|u[0-9a-f]{4}|[a-z]+\{)|^\s*\|.*\|\s*$",
    re.MULTILINE,
)
MASKED = re.compile(r"\[name\]")
BROKEN_OFF = re.compile(r"(?:[,;:([{/&\\]|[-–—])$")
BEGINS_INSIDE = re.compile(r"^[,;:.!?)\]}/&%]")
BLANK_LINE = re.compile(r"\n\s*\n")


class Taken:
    """The 8-grams of all candidates so far; `reuse` says how often a passage may serve."""

    def __init__(self, reuse: int = 1):
        self.reuse = reuse
        self.uses: Counter[int] = Counter()

    def known(self, text: str) -> bool:
        """Whether much of this text was in candidates `reuse` times already."""
        hashes = {_hash(gram) for gram in grams(text)}
        seen = sum(self.uses[h] >= self.reuse for h in hashes)
        return seen > MOST_KNOWN * len(hashes)

    def add(self, text_1: str, text_2: str) -> None:
        """Take the candidates of one draft; what both hold counts once."""
        self.uses.update({_hash(gram) for text in (text_1, text_2) for gram in grams(text)})


def _hash(gram: str) -> int:
    return int.from_bytes(hashlib.blake2b(gram.encode(), digest_size=8).digest(), "big")


def grams(text: str) -> Iterator[str]:
    """The word 8-grams of a text in lower case; a shorter text is one gram."""
    words = [word.lower() for word in WORD.findall(text)]
    for i in range(max(1, len(words) - GRAM + 1)):
        yield " ".join(words[i : i + GRAM])


def shared_share(text: str, others: tuple[str, ...]) -> float:
    """The share of the 8-grams of `text` that are also in one of the others."""
    own = list(grams(text))
    known = {gram for other in others for gram in grams(other)}
    return sum(gram in known for gram in own) / len(own)


def changed_words(before: str, after: str) -> int:
    """How many words were replaced, added or dropped; marks stuck to a word belong to it.

    >>> changed_words("A big dog ran.", "A large dog ran away.")
    3
    """
    a, b = before.split(), after.split()
    blocks = difflib.SequenceMatcher(None, a, b, autojunk=False).get_opcodes()
    return sum(max(i2 - i1, j2 - j1) for tag, i1, i2, j1, j2 in blocks if tag != "equal")


def unfinished(text: str, strict: bool) -> bool:
    """Whether a text is broken off at either end.

    A person may end without a mark; `strict`, for what a model wrote, asks for one.
    """
    text = text.strip()
    last = text.rpartition("\n")[2]
    greets = last.endswith(",") and len(last.split()) <= LONGEST_GREETING
    if BEGINS_INSIDE.search(text) or (BROKEN_OFF.search(text) and not (greets and not strict)):
        return True
    marked = text.rstrip(CLOSERS)[-1:] in ENDS
    tail = text[-12:]
    face = any(m.end() == len(tail) for p in (EMOJI, SMILEY) for m in p.finditer(tail))
    return strict and not (marked or face)


def cut_quotation(text: str) -> bool:
    """An odd number of quotes in a paragraph; one that opens with a quote may go on in the next."""
    return any(
        paragraph.count('"') % 2 == 1 and not paragraph.lstrip().startswith('"')
        for paragraph in BLANK_LINE.split(text)
    )


def text_fault(text: str, fewest: float, author: str = "", strict: bool = False) -> str | None:
    """What is wrong with one text by itself, or None."""
    if len(text.split()) < fewest:
        return "too few words"
    if MARKUP.search(text):
        return "markup"
    if MASKED.search(text):
        return "masked name"
    if unfinished(text, strict):
        return "unfinished"
    if cut_quotation(text):
        return "cut quotation"
    name = surname(author)
    if name and name in WORD.findall(text.replace("'s", "")):
        return "writer's name"
    return None


def lengths_differ(text_1: str, text_2: str) -> bool:
    """Whether one candidate has more than 1.25 times the words of the other."""
    short, long = sorted((len(text_1.split()), len(text_2.split())))
    return long > MOST_LONGER * short


def tell_tale_names(draft: Draft, shelf: Shelf) -> set[str]:
    """Rare names that a writer's exemplars share with that writer's candidate alone."""
    known = shelf.names[draft.domain]
    name_1, name_2 = (rare_names(text, known) for text in (draft.text_1, draft.text_2))
    shown_1, shown_2 = (
        rare_names("\n\n".join(texts), known) for texts in (draft.exemplars_1, draft.exemplars_2)
    )
    return (shown_1 & (name_1 - name_2)) | (shown_2 & (name_2 - name_1))


def fault(draft: Draft, shelf: Shelf, taken: Taken) -> str | None:
    """Why a draft is rejected. None: accepted, and its candidates are taken."""
    if " ".join(draft.text_1.split()) == " ".join(draft.text_2.split()):
        return "same text twice"
    if lengths_differ(draft.text_1, draft.text_2):
        return "lengths differ"
    if any(taken.known(text) for text in (draft.text_1, draft.text_2)):
        return "candidate already taken"
    sides = (
        (draft.text_1, draft.exemplars_1, draft.from_1, draft.author),
        (draft.text_2, draft.exemplars_2, draft.from_2, author_2(draft)),
    )
    for candidate, exemplars, written_by, author in sides:
        strict = written_by.startswith("model:")
        for text, wanted in (
            (candidate, shelf.lengths.candidate),
            *((text, shelf.lengths.exemplar) for text in exemplars),
        ):
            if reason := text_fault(text, SHORTEST * wanted[0], author, strict):
                return reason
    exemplars = (*draft.exemplars_1, *draft.exemplars_2)
    if len(set(exemplars)) < len(exemplars):
        return "same exemplar twice"
    if any(shared_share(text, exemplars) > MOST_SHARED for text in (draft.text_1, draft.text_2)):
        return "passage of an exemplar"
    if tell_tale_names(draft, shelf):
        return "tell-tale name"
    taken.add(draft.text_1, draft.text_2)
    return None
