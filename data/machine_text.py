"""Machine text: what gives generated or rewritten text away, whoever it imitates.

Repetition (a word, a pair of words, three words again), how well the text can be packed, variety of
words, an even rhythm of sentences, the profile of common words, the mix of marks, an end that is
none, and how unlikely its characters are to a small model of human text.

The small model is learned anew for each fold, from the human texts that the fold may learn from
(`grams.Surprise`). It is learned twice, from every second row, and the rows to learn from are
scored by the half that they are not in. Otherwise a text would look likely because it was counted,
or because the text that it is a rewrite of was. Human is what a person wrote and nobody rewrote, by
`chosen_from` and `rejected_from`.
"""

import re
import zlib
from collections import Counter
from collections.abc import Sequence
from itertools import pairwise

import numpy as np

from data.grams import Surprise
from data.logistic import Floats, Ints
from data.probes import Table
from nanopersrm.style.text import WORD, sentences

COMMON = (
    "the a an and but or of to in on at by for with from as that this which who it he she they we "
    "i you his her their my your not no is was are were be been have had has do did will would "
    "could should may can if when then so very all there what how however moreover also more than"
)
MARKS = ".,;:!?-—'\"()"
UNFINISHED = re.compile(r"[^.!?…\"'”’)\]*]\s*\Z|\b(?:the|a|an|and|or|of|to|in)\W*\Z", re.IGNORECASE)
WINDOW = 60  # words in which variety is counted, so that length does not count


def facts(text: str) -> dict[str, float]:
    """What one text shows by itself; rates are for each word."""
    words = [word.lower() for word in WORD.findall(text)]
    counts = Counter(words)
    size = max(len(words), 1)
    raw = text.encode("utf-8", "replace")
    cut = [s.split() for part in text.split("\n\n") for s in sentences(part)]
    lengths = [len(s) for s in cut]
    marks = np.array([text.count(mark) for mark in MARKS], dtype=np.float64)
    shares = marks[marks > 0] / max(marks.sum(), 1.0)
    starts = [s[0].lower() for s in cut]
    found = {
        "packed size": len(zlib.compress(raw, 6)) / max(len(raw), 1),
        "variety of words": len(set(words[:WINDOW])) / min(size, WINDOW),
        "words used once": sum(n == 1 for n in counts.values()) / size,
        "share of the commonest word": max(counts.values(), default=0) / size,
        "a word twice running": sum(a == b for a, b in pairwise(words)) / size,
        "word pairs again": _again(words, 2),
        "three words again": _again(words, 3),
        "six words again": _again(words, 6),
        "same first word of sentences": 1.0 - len(set(starts)) / max(len(starts), 1),
        "spread of sentence length": float(np.std(lengths)) if lengths else 0.0,
        "mean sentence length": float(np.mean(lengths)) if lengths else 0.0,
        "letters a word": sum(map(len, words)) / size,
        "entropy of marks": float(-(shares * np.log2(shares)).sum()),
        "marks": float(marks.sum()) / size,
        "unfinished end": float(UNFINISHED.search(text) is not None),
        "last word": float(len(words[-1])) if words else 0.0,
    }
    found |= {f"rate of {mark}": n / size for mark, n in zip(MARKS, marks.tolist(), strict=True)}
    found |= {f"rate of {word!r}": counts[word] / size for word in COMMON.split()}
    return found


def _again(words: Sequence[str], n: int) -> float:
    """Share of runs of n words that stood in the text before."""
    runs = list(zip(*(words[i:] for i in range(n)), strict=False))
    return 1.0 - len(set(runs)) / len(runs) if runs else 0.0


class Machine:
    """The facts of a text and, for each fold, its bits under the human texts of that fold."""

    def __init__(self, table: Table, surprise: Surprise, rows: Ints, human: Sequence[bool]):
        self.table, self.surprise, self.rows = table, surprise, rows
        self.human = np.array(human, dtype=bool)

    @classmethod
    def of(cls, texts: Sequence[str], rows: Ints, human: Sequence[bool]) -> "Machine":
        """rows: (N, 2), the texts i and j of each row; human: one for each text."""
        table = Table.of([facts(text) for text in texts], rows)
        return cls(table, Surprise.of(texts), rows, human)

    def part(self, rows: Ints) -> "Machine":
        """Only some rows, and only their texts."""
        texts, index = np.unique(self.rows[rows], return_inverse=True)
        return Machine(
            self.table.part(rows),
            self.surprise.part(texts),
            index.reshape(-1, 2),
            self.human[texts].tolist(),
        )

    def design(self, learn: Ints, judged: Ints, balance: Floats) -> tuple[Floats, list[str]]:
        """The table, and what the model of the rows to learn from adds."""
        first, second = self._bits(learn[::2]), self._bits(learn[1::2])
        more = np.concatenate([first[learn], 0.5 * (first[judged] + second[judged])])
        more[0 : len(learn) : 2] = second[learn[::2]]  # never by the half that they are in
        x, names = self.table.design(learn, judged, balance)
        return np.column_stack([x, more, np.sign(more)]), [
            *names,
            "bits a character",
            "bits a character",
        ]

    def _bits(self, rows: Ints) -> Floats:
        """For each row of the set the difference of bits under the human texts of some rows."""
        counted = np.zeros(len(self.human), dtype=bool)
        counted[self.rows[rows].reshape(-1)] = True
        bits = self.surprise.bits(counted & self.human)
        return bits[self.rows[:, 0]] - bits[self.rows[:, 1]]
