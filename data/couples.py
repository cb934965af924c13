"""Couples: a set of pairs as rows of two different texts, for probes that see two texts at a time.

A pair and its twin have the same two texts and share a row: text i and text j, numbered as they
first came. `sign` says for each pair which of the two is chosen. Position probes look at records
and not at texts, so there a row is a pair, and text i is the chosen one.

Each row has two writers, the person behind either text. For a rewrite or a model's text that is the
person whose writings it came from.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from data.logistic import Floats, Ints, deal
from data.probes import is_person
from nanopersrm.pairs import Pair

MOST = 8000  # couples; of more, a sample


@dataclass(frozen=True)
class Rows:
    """Which pairs are which rows, and whose rows they are."""

    row_of: Ints  # for each pair
    sign: Floats  # for each pair: 1 when text i is chosen, else -1
    groups: Ints  # (N, 2) of each row's writers, for the folds
    writers: Ints  # (N, 2) numbers of each row's writers

    def balance(self, used: Floats) -> tuple[Floats, Floats]:
        """For each row, how many of the used pairs chose text i, and how many text j."""
        size = len(self.writers)
        plus = np.bincount(self.row_of, used * (self.sign > 0), size)
        minus = np.bincount(self.row_of, used * (self.sign < 0), size)
        return plus.astype(np.float64), minus.astype(np.float64)


@dataclass(frozen=True)
class Couples:
    """A set for the probes."""

    pairs: list[Pair]
    places: Ints  # of each pair in the set
    texts: list[str]
    human: list[bool]  # for each text: a person wrote it and nobody rewrote it
    two: Ints  # (N, 2) texts i and j of each row
    by_texts: Rows
    by_pairs: Rows
    half: Floats  # for each pair: 1 for the one of its row that a set without twins would have


def _other_writer(pair: Pair, twin: Pair | None) -> str:
    """The person behind the text that the writer of the exemplars did not write."""
    if twin is not None:
        return twin.author
    if isinstance(said := pair.meta.get("author_2"), str):
        return said
    return pair.rejected_from.split("/")[0] if is_person(pair.rejected_from) else pair.author


def _couple(pair: Pair) -> str:
    return min(pair.id, pair.twin or pair.id)


def couples(pairs: Sequence[Pair], seed: int) -> Couples:
    """Number the texts and the rows, and deal the writers into groups."""
    by_id = {pair.id: pair for pair in pairs}
    names = sorted({_couple(pair) for pair in pairs})
    if len(names) > MOST:
        names = random.Random(f"{seed}/sample").sample(names, MOST)
    kept = set(names)
    places = [i for i, pair in enumerate(pairs) if _couple(pair) in kept]
    used = [pairs[i] for i in places]

    texts: dict[str, int] = {}
    human: list[bool] = []
    row_at: dict[tuple[int, int], int] = {}
    writers: list[tuple[str, str]] = []
    row_of, sign = [], []
    for pair in used:
        for text, source in ((pair.chosen, pair.chosen_from), (pair.rejected, pair.rejected_from)):
            if text not in texts:
                texts[text] = len(texts)
                human.append(is_person(source))
        chosen, rejected = texts[pair.chosen], texts[pair.rejected]
        two = min(chosen, rejected), max(chosen, rejected)
        if two not in row_at:
            row_at[two] = len(row_at)
            writers.append((pair.author, _other_writer(pair, by_id.get(pair.twin))))
        row_of.append(row_at[two])
        sign.append(1.0 if chosen < rejected else -1.0)

    number = {name: n for n, name in enumerate(sorted({name for two in writers for name in two}))}
    numbered = np.array([[number[a], number[b]] for a, b in writers], dtype=np.int64)
    groups = deal(writers, seed)
    at = np.array(row_of, dtype=np.int64)
    return Couples(
        pairs=used,
        places=np.array(places, dtype=np.int64),
        texts=list(texts),
        human=human,
        two=np.array(list(row_at), dtype=np.int64),
        by_texts=Rows(at, np.array(sign), groups, numbered),
        by_pairs=Rows(np.arange(len(used)), np.ones(len(used)), groups[at], numbered[at]),
        half=_half(used, row_of),
    )


def _half(pairs: Sequence[Pair], row_of: Sequence[int]) -> Floats:
    """One pair of each row: where a person's own text is chosen, else the one with the first id."""
    first: dict[int, tuple[bool, str]] = {}
    for pair, row in zip(pairs, row_of, strict=True):
        rank = (not is_person(pair.chosen_from), pair.id)
        first[row] = min(rank, first.get(row, rank))
    found = [first[row][1] == pair.id for pair, row in zip(pairs, row_of, strict=True)]
    return np.array(found, dtype=np.float64)
