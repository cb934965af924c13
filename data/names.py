"""Names: words that tell who wrote a text without any reading for style.

Two kinds. The writer's own name, which `unsigned` takes off the end of a letter and `surname` finds
elsewhere. And *rare names*: characters, towns, products, words in capitals that few writers of a
domain use. When exemplar and candidate both speak of Heathcliff, nobody has to know how Emily
Bronte wrote. `accept.py` rejects such drafts.

    name    a word that stands in capitals inside sentences more often than in lower case
    rare    at most a fifth of the writers of the domain use it, in any place

They are counted over all splits of a domain, for they decide nothing but what is thrown away.
"I'm", days and months are no names; a word in capitals of more than 5 letters is a raised voice.

What we left out. Capitals have to mean names: in German they do not.
"""

import re
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

from data.writings import Piece
from nanopersrm.style.text import WORD

RARE_SHARE = 0.2  # of the writers of a domain
LONGEST_ACRONYM = 5  # letters
LONGEST_SIGNATURE = 4  # words
EVERYDAY = frozenset(
    re.findall(
        r"\w+",
        "monday tuesday wednesday thursday friday saturday sunday mondays tuesdays wednesdays "
        "thursdays fridays saturdays sundays january february march april may june july august "
        "september october november december mr mrs ms dr am pm i",
    )
)  # in capitals, and no topic
TITLES = frozenset({"jr", "sr", "ii", "iii", "iv", "phd", "md"})
INSIDE = re.compile(r"(?<=[\w,] )(?=[^\W\d_a-z])[^\W_]+(?:'[^\W_]+)*")  # capital, after a word


@dataclass(frozen=True)
class Names:
    """The rare names of a domain, in lower case, and how many writers use each."""

    writers: int
    rare: dict[str, int]


def count_names(pieces: Sequence[Piece]) -> dict[str, Names]:
    """For each domain its rare names."""
    users: dict[str, dict[str, set[str]]] = defaultdict(lambda: defaultdict(set))
    balance: dict[str, Counter[str]] = defaultdict(Counter)  # in capitals minus in lower case
    writers: dict[str, set[str]] = defaultdict(set)
    for piece in pieces:
        writers[piece.domain].add(piece.author)
        used, counts = users[piece.domain], balance[piece.domain]
        for word, times in Counter(WORD.findall(piece.text)).items():
            if word.islower():
                counts[word] -= times
            elif word[0].isupper():
                used[_plain(word)].add(piece.author)
        for word in INSIDE.findall(piece.text):
            if len(word) <= LONGEST_ACRONYM or not word.isupper():
                counts[_plain(word)] += 1
    return {
        domain: Names(
            len(who),
            {
                word: len(by)
                for word, by in users[domain].items()
                if balance[domain][word] > 0
                and len(by) <= max(1, int(RARE_SHARE * len(who)))
                and word not in EVERYDAY
                and not word.startswith("i'")
            },
        )
        for domain, who in writers.items()
    }


def _plain(word: str) -> str:
    return word.lower().removesuffix("'s")


def rare_names(text: str, names: Names) -> set[str]:
    """The rare names of a text: "Mr. Darcy's hat." has {"darcy"} where few writers name him."""
    plain = {_plain(word) for word in WORD.findall(text) if word[0].isupper()}
    return {word for word in plain if word in names.rare}


def surname(author: str) -> str:
    """The last word of a name with a capital: "ed-mullen" gives "Mullen"; "" when too short."""
    words = [word for word in WORD.findall(author) if word.lower() not in TITLES]
    return words[-1][:1].upper() + words[-1][1:] if words and len(words[-1]) > 2 else ""


def unsigned(text: str, author: str) -> str:
    """A text without the writer's name in its last line: "Thanks,\\nTessa" ends with "Thanks,".

    Letters are signed; a judge that reads signatures learns nothing of style.
    """
    body, line_end, last = text.strip().rpartition("\n")
    names = {word.lower() for word in WORD.findall(author) if len(word) > 2}
    found = WORD.findall(last)
    if len(found) > LONGEST_SIGNATURE or names.isdisjoint(word.lower() for word in found):
        return text
    last = WORD.sub(lambda word: "" if word[0].lower() in names else word[0], last).strip()
    return f"{body}{line_end}{last}".strip() if WORD.search(last) else body.strip()
