"""Grams: hashed n-grams of words and characters, as a bag and as a small language model.

`Grams` holds for each text the keys of its words, word pairs, and runs of 3, 4 and 5 characters. A
key is the low 18 bits of a hash, so two grams may share one; the names of the few keys that a
report shows are found again by hashing the example texts.

`Bag` turns two texts into one sparse row, log(1 + count) in text i minus that in text j. A probe
learns from the KEPT keys with the largest

    |sum of balance · x| / sqrt(sum of x² + 4)

over the rows it may learn from, which is what a word that marks the rejected texts stands out by.

`Surprise` is the language model: how unlikely each character is after the three before it, in bits,
given the texts that are counted.

All of it is numpy on bytes.
"""

import re
import zlib
from collections.abc import Sequence
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from data.logistic import Floats, Ints

Small = NDArray[np.int32]

BITS = 18
SIZE = 1 << BITS
KEPT = 400  # keys that a fit sees
SMOOTH = 4.0
WORDS = re.compile(r"\w+(?:['’]\w+)*|[^\w\s]")
RUNS = (3, 4, 5)
BLOCK = 1 << 20  # entries or characters at a time
ALPHABET = 64  # characters that could follow, for smoothing
MIX = np.uint64(0x9E3779B97F4A7C15)  # the golden ratio in 64 bits


def _mixed(hashes: NDArray[np.uint64]) -> Ints:
    """64-bit hashes -> keys; the high bits of a product are the well-mixed ones."""
    return ((hashes * MIX) >> np.uint64(64 - BITS)).astype(np.int64)


def _runs(codes: NDArray[np.uint64], n: int) -> Ints:
    """Keys of all runs of n characters."""
    hashes = np.full(max(len(codes) - n + 1, 0), n, dtype=np.uint64)
    for i in range(n):
        hashes = hashes * np.uint64(0x100000001B3) + codes[i : i + len(hashes)]
    return _mixed(hashes)


def _codes(text: str) -> NDArray[np.uint64]:
    return np.frombuffer(text.encode("utf-32-le", "replace"), dtype="<u4").astype(np.uint64)


def _words(text: str) -> tuple[list[str], NDArray[np.uint64]]:
    words = WORDS.findall(text.lower())
    hashes = [zlib.crc32(word.encode("utf-8", "replace")) for word in words]
    return words, np.array(hashes, dtype=np.uint64)


def keys(text: str) -> Ints:
    """The keys of all grams of a text."""
    _, hashes = _words(text)
    parts = [_mixed(hashes + np.uint64(7)), _mixed(hashes[:-1] * np.uint64(31) + hashes[1:])]
    codes = _codes(text)
    return np.concatenate(parts + [_runs(codes, n) for n in RUNS])


def named(texts: Sequence[str], wanted: Sequence[int]) -> dict[int, str]:
    """For each wanted key the longest word, word pair or run of characters with that key."""
    looked = set(wanted)
    found: dict[int, str] = {}
    for text in texts:
        words, hashes = _words(text)
        pairs = [f"{a} {b}" for a, b in pairwise(words)]
        runs = [text[i : i + n] for n in RUNS for i in range(len(text) - n + 1)]
        both = _mixed(hashes + np.uint64(7)), _mixed(hashes[:-1] * np.uint64(31) + hashes[1:])
        codes = _codes(text)
        every = np.concatenate([*both, *(_runs(codes, n) for n in RUNS)])
        for key, gram in zip(every.tolist(), words + pairs + runs, strict=True):
            if key in looked:
                found.setdefault(key, gram)
    return found


class Bag:
    """Sparse rows: the differences of the grams of two texts."""

    def __init__(self, row: Small, columns: Small, values: NDArray[np.float32], size: int):
        self.row, self.columns, self.values, self.size = row, columns, values, size

    @classmethod
    def of(cls, texts: Sequence[str], rows: Ints) -> "Bag":
        """rows: (N, 2), the texts i and j of each row."""
        counted = [np.unique(keys(text).astype(np.int32), return_counts=True) for text in texts]
        counted = [(found, np.log1p(counts)) for found, counts in counted]
        columns, values = [np.zeros(0, np.int32)], [np.zeros(0, np.float32)]
        for i, j in rows.tolist():
            (k1, v1), (k2, v2) = counted[i], counted[j]
            merged, inverse = np.unique(np.concatenate([k1, k2]), return_inverse=True)
            x = np.bincount(inverse.reshape(-1), np.concatenate([v1, -v2]), len(merged))
            kept = np.abs(x) > 1e-9
            columns.append(merged[kept])
            values.append(x[kept].astype(np.float32))
        sizes = [len(column) for column in columns[1:]]
        row = np.repeat(np.arange(len(rows), dtype=np.int32), sizes)
        return cls(row, np.concatenate(columns), np.concatenate(values), len(rows))

    def part(self, rows: Ints) -> "Bag":
        """Only some rows."""
        if len(rows) == self.size:
            return self
        place = _places(rows, self.size)[self.row]
        hit = place >= 0
        return Bag(place[hit], self.columns[hit], self.values[hit], len(rows))

    def design(self, learn: Ints, judged: Ints, balance: Floats) -> tuple[Floats, list[str]]:
        """The KEPT most telling keys as a dense matrix, named by their keys."""
        weight = np.zeros(self.size)
        weight[learn] = balance
        rows = np.concatenate([learn, judged])
        to = _places(rows, self.size)
        told, seen = np.zeros(SIZE), np.full(SIZE, SMOOTH)
        blocks = []
        for start in range(0, len(self.row), BLOCK):  # in blocks, for memory
            block = slice(start, start + BLOCK)
            wanted = np.flatnonzero(to[self.row[block]] >= 0)
            row, column = self.row[block][wanted], self.columns[block][wanted]
            x = self.values[block][wanted]
            blocks.append((to[row], column, x))
            told += np.bincount(column, weight[row] * x, SIZE)
            seen += np.bincount(column, np.abs(weight[row]) * x * x, SIZE)
        some = np.flatnonzero(told)
        strength = np.abs(told[some]) / np.sqrt(seen[some])
        best = some[np.argsort(-strength, kind="stable")[:KEPT]]
        at = _places(best, SIZE)
        dense = np.zeros((len(rows), len(best)))
        for row, column, x in blocks:
            hit = np.flatnonzero(at[column] >= 0)
            dense[row[hit], at[column[hit]]] = x[hit]
        return dense, [str(key) for key in best.tolist()]


def _places(wanted: Ints, size: int) -> Small:
    """(size,): where each number stands in `wanted`, -1 where it does not."""
    place = np.full(size, -1, dtype=np.int32)
    place[wanted] = np.arange(len(wanted), dtype=np.int32)
    return place


class Surprise:
    """Bits for each character of each text under a model of some of the texts."""

    def __init__(self, lengths: Ints, keys: list[Small]):
        self.lengths, self.keys = lengths, keys
        self.text = np.repeat(np.arange(len(lengths), dtype=np.int32), lengths)

    @classmethod
    def of(cls, texts: Sequence[str]) -> "Surprise":
        """Hash the runs of four characters of each text, and of the three before the last."""
        every = [_codes(text) for text in texts]
        quads = [_runs(codes, 4) for codes in every]
        triples = [_runs(codes[:-1], 3) for codes in every]
        lengths = np.array([len(quad) for quad in quads], dtype=np.int64)
        return cls(lengths, [_joined(quads), _joined(triples)])

    def part(self, texts: Ints) -> "Surprise":
        """Only some texts, in rising order."""
        if len(texts) == len(self.lengths):
            return self
        asked = np.isin(np.arange(len(self.lengths)), texts)
        kept = np.repeat(asked, self.lengths)
        return Surprise(self.lengths[asked], [of_text[kept] for of_text in self.keys])

    def bits(self, counted: NDArray[np.bool_]) -> Floats:
        """(texts,): mean bits of each text under the texts that are counted."""
        inside = np.repeat(counted, self.lengths)
        tables = [np.bincount(of_text[inside], minlength=SIZE) for of_text in self.keys]
        total = np.zeros(len(self.lengths))
        for i in range(0, len(inside), BLOCK):
            block = slice(i, i + BLOCK)
            quads, triples = (
                table[of_text[block]] for table, of_text in zip(tables, self.keys, strict=True)
            )
            lost = np.log2((triples + 0.5 * ALPHABET) / (quads + 0.5))
            total += np.bincount(self.text[block], lost, len(total))
        return total / np.maximum(self.lengths, 1)


def _joined(parts: list[Ints]) -> Small:
    return np.concatenate([np.zeros(0, np.int64), *parts]).astype(np.int32)
