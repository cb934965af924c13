"""Probes: what can be told of two candidates without reading the exemplars.

    length     how long the texts, their words and sentences are
    position   where and how the pair is stored: place in the file, id, twin first or second
    format     line ends, blanks, quotes, brackets, lists, markup, capitals, odd characters
    n-grams    which words and runs of characters they have (`grams.py`)
    machine    what generated text looks like (`machine_text.py`)

A probe gives features of a text; a row is text i minus text j, and the sign of each difference
beside it, so that "always one character longer" is seen as well as "on average".

Position is about pairs, not texts, so its rows are pairs. Storage alone cannot say which of two
texts is meant, but storage and an order can: "in pairs with an even id the text that sorts first".
So each feature is a fact of storage (+1 or -1) times whether text i comes first in some order
(alphabet, length, name of the source). Twins do not help against it: when every first record of a
couple has the human text as chosen, whoever keeps every second record has a set with a leak.

What we left out. Fields of `meta`: no judge is shown them. Read next: `leakgate.py`.
"""

import re
import unicodedata
from collections.abc import Sequence

import numpy as np

from data.logistic import Floats, Ints
from nanopersrm.pairs import Pair
from nanopersrm.style.text import WORD, sentences

FORMAT = {
    "line breaks": r"\n",
    "blank lines": r"\n\s*\n",
    "carriage returns": r"\r",
    "tabs": r"\t",
    "double blanks": r"(?<=\S)  +",
    "leading blanks": r"\A\s+",
    "trailing blanks": r"\s+\Z",
    "blanks at line ends": r"[ \t]+$",
    "begins with a quote": r"\A\s*[\"'“‘«]",
    "ends with a quote": r"[\"'”’»]\s*\Z",
    "straight double quotes": r'"',
    "curly double quotes": r"[“”]",
    "straight apostrophes": r"'",
    "curly apostrophes": r"[‘’]",
    "a list's string": r"\A\s*\[\s*['\"]|['\"]\s*\]\s*\Z",
    "square brackets": r"[\[\]]",
    "round brackets": r"[()]",
    "braces": r"[{}]",
    "written-out escapes": r"\\[nrtux\"']",
    "backslashes": r"\\",
    "list marks": r"^\s*(?:[-*+•]|\d{1,2}[.)])\s",
    "headings": r"^\s*#+ ",
    "stars": r"\*",
    "underscores": r"_",
    "tags": r"</?[A-Za-z|][^<>\n]*>",
    "entities": r"&\w+;",
    "code fences": r"```",
    "pipes": r"\|",
    "links": r"https?:|www\.",
    "labels": r"\A\s*[\w ]{1,20}:",
    "long dashes": r"[–—]|--",
    "ellipses": r"…|\.\.\.",
    "words in capitals": r"\b[A-Z]{2,}\b",
    "begins with a capital": r"\A\W*[A-Z]",
    "begins with a letter": r"\A[^\W\d_]",
    "capitals": r"[A-Z]",
    "ends a sentence": r"[.!?…][\"'”’)\]]*\s*\Z",
    "digits": r"\d",
    "letters beyond ASCII": r"[^\x00-\x7f]",
    "broken characters": "\ufffd|Ã.|â€",
    "odd blanks": r"[\u00a0\u2000-\u200f\u2028-\u202f\ufeff\u00ad\x00-\x08\x0b-\x1f]",
}
PATTERNS = {name: re.compile(pattern, re.MULTILINE) for name, pattern in FORMAT.items()}


def length(text: str) -> dict[str, float]:
    """How long a text and its parts are."""
    words = WORD.findall(text)
    lengths = [len(s.split()) for line in text.split("\n\n") for s in sentences(line)]
    return {
        "characters": len(text),
        "characters, log": float(np.log1p(len(text))),
        "words": len(words),
        "blank-parted words": len(text.split()),
        "sentences": len(lengths),
        "letters a word": sum(map(len, words)) / max(len(words), 1),
        "words a sentence": sum(lengths) / max(len(lengths), 1),
        "longest sentence": max(lengths, default=0),
        "shortest sentence": min(lengths, default=0),
        "bytes": len(text.encode("utf-8", "replace")),
    }


def layout(text: str) -> dict[str, float]:
    """How often each thing of FORMAT stands in a text."""
    found = {name: float(len(pattern.findall(text))) for name, pattern in PATTERNS.items()}
    found["loose accents"] = len(text) - len(unicodedata.normalize("NFC", text))
    return found


class Table:
    """Dense rows with a name for each column."""

    def __init__(self, x: Floats, names: list[str]):
        self.x, self.names = x, names

    @classmethod
    def of(cls, facts: Sequence[dict[str, float]], rows: Ints) -> "Table":
        """The differences of the facts of two texts, and their signs."""
        names = list(facts[0])
        values = np.array([list(fact.values()) for fact in facts], dtype=np.float64)
        x = values[rows[:, 0]] - values[rows[:, 1]]
        return cls(np.hstack([x, np.sign(x)]), names + names)

    def part(self, rows: Ints) -> "Table":
        """Only some rows."""
        return Table(self.x[rows], self.names)

    def design(self, learn: Ints, judged: Ints, balance: Floats) -> tuple[Floats, list[str]]:
        """What `logistic.decide` asks for."""
        return self.x[np.concatenate([learn, judged])], self.names


def position(pairs: Sequence[Pair]) -> Table:
    """A row for each pair; text i is its chosen text."""
    index = {pair.id: i for i, pair in enumerate(pairs)}
    half = len(pairs) / 2
    middle = float(np.median([pair.weight for pair in pairs]))
    rows = []
    for i, pair in enumerate(pairs):
        twin = index.get(pair.twin)
        last = pair.id[-1:]
        storage = {
            "any pair": 1,
            "even place in the file": 1 - 2 * (i % 2),
            "first half of the file": 1 if i < half else -1,
            "place in the file": 1 - i / half,
            "even end of the id": 1 - 2 * (ord(last) % 2),
            "id before its twin's": (pair.id < pair.twin) - (pair.id > pair.twin),
            "written before its twin": 0 if twin is None else (i < twin) - (i > twin),
            "more exemplars than one": 1 if len(pair.exemplars) > 1 else -1,
            "even number of exemplars": 1 - 2 * (len(pair.exemplars) % 2),
            "heavier than the median": int(pair.weight > middle) - int(pair.weight < middle),
        }
        orders = {
            "sorts first": _sign(pair.rejected, pair.chosen),
            "has more characters": _sign(len(pair.chosen), len(pair.rejected)),
            "has more words": _sign(len(pair.chosen.split()), len(pair.rejected.split())),
            "has the source that sorts first": _sign(pair.rejected_from, pair.chosen_from),
            "has a source of a person": _sign(
                is_person(pair.chosen_from), is_person(pair.rejected_from)
            ),
        }
        rows.append(
            {
                f"{fact}: chosen {order}": float(a * b)
                for fact, a in storage.items()
                for order, b in orders.items()
            }
        )
    return Table(np.array([list(row.values()) for row in rows]), list(rows[0]))


def _sign(a: str | int, b: str | int) -> int:
    return (a > b) - (a < b)  # type: ignore[operator]


def is_person(source: str) -> bool:
    """Whether a source names a passage: "author/title", where a rewrite or a model has a colon."""
    return ":" not in source.split("/")[0]
