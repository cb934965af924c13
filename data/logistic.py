"""Logistic regression on differences, and who is judged by which fit.

A probe sees a pair as one row: the features of text i minus those of text j. The label says which
of the two is chosen. There is no intercept, so swapping the texts swaps the answer. For a row x
with `plus` pairs that chose i and `minus` pairs that chose j the loss is

    plus · log(1 + e^(-x·w)) + minus · log(1 + e^(x·w)) + ridge/2 · |w|²

A pair and its twin are the same row, once in plus and once in minus. When all twins are there, the
gradient at w = 0 is (minus - plus) · x / 2 = 0: nothing can be learned, whatever x is.

Folds are by writer. Writers are dealt into groups; a row of writers in the groups k and l is judged
by a fit that saw no row with a writer of either group, so both its writers are strangers. Nothing
is dropped: a row whose writers share group k is judged without k and k + 1. With 6 groups a fit
sees (4/6)² = 44 % of a set of two people a pair. A pair and its twin have the same two writers and
so the same fold. Connected components would not do: in a set of a few hundred pairs nearly all
writers of a domain hang together.

What we left out. A model that wrote for many people is no writer here and never held out: a
detector that knows the model is what the gate must try.
"""

import random
from collections import Counter
from collections.abc import Callable, Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
Design = Callable[[Ints, Ints, Floats], tuple[Floats, list[str]]]

GROUPS = 6  # of writers
STEPS, INNER = 8, 30  # of Newton, of conjugate gradients in each
TINY = 1e-6  # squared length of a gradient that is as good as zero
RIDGE = (3.0, 0.02)  # and so much for each pair
LEAST = 16  # rows to learn from
ROUNDS = 400  # of the bootstrap


def _times(x: Floats, w: Floats) -> Floats:
    return np.einsum("nd,d->n", x, w)


def _transposed_times(x: Floats, r: Floats) -> Floats:
    return np.einsum("nd,n->d", x, r)


def fit(x: Floats, plus: Floats, minus: Floats) -> Floats:
    """Weights (D,) of rows x (N, D) by Newton's method, steps by conjugate gradients.

    `einsum` and not `@`: the threads of a BLAS wait for each other, and where other programs want
    the same cores they waited ten times longer than they worked.
    """
    w = np.zeros(x.shape[1])
    total = plus + minus
    ridge = RIDGE[0] + RIDGE[1] * float(total.sum())
    for _ in range(STEPS):
        p = 1.0 / (1.0 + np.exp(-np.clip(_times(x, w), -30.0, 30.0)))  # (N,)
        residual = _transposed_times(x, plus - total * p) - ridge * w  # (D,) minus the gradient
        size = begun = float(residual @ residual)
        if begun < TINY:
            break
        curve = total * p * (1.0 - p)
        step, direction = np.zeros_like(w), residual
        for _ in range(INNER):
            pushed = _transposed_times(x, curve * _times(x, direction)) + ridge * direction
            length = size / float(direction @ pushed)
            step, residual = step + length * direction, residual - length * pushed
            before, size = size, float(residual @ residual)
            if size < 1e-4 * begun:
                break
            direction = residual + size / before * direction
        w = w + step
    return w


def deal(writers: Sequence[tuple[str, str]], seed: int) -> Ints:
    """(N, 2): the groups of the two writers of each row. The busiest writers are dealt first."""
    busy = Counter(writer for two in writers for writer in set(two))
    names = sorted(busy)
    random.Random(f"{seed}/groups").shuffle(names)
    names.sort(key=lambda name: -busy[name])  # stable
    load = [0] * GROUPS
    group: dict[str, int] = {}
    for name in names:
        group[name] = load.index(min(load))
        load[group[name]] += busy[name]
    return np.array([[group[a], group[b]] for a, b in writers], dtype=np.int64).reshape(-1, 2)


def folds(groups: Ints) -> Iterator[tuple[Ints, Ints]]:
    """(rows to learn from, rows to judge) for every two groups; every row is judged once."""
    low, high = groups.min(axis=1, initial=GROUPS), groups.max(axis=1, initial=-1)
    high = np.where(low == high, (low + 1) % GROUPS, high)
    low, high = np.minimum(low, high), np.maximum(low, high)
    for k in range(GROUPS):
        for m in range(k + 1, GROUPS):
            judged = np.flatnonzero((low == k) & (high == m))
            unseen = ~np.isin(groups, (k, m)).any(axis=1)
            if len(judged):
                yield np.flatnonzero(unseen), judged


def decide(
    design: Design, groups: Ints, plus: Floats, minus: Floats
) -> tuple[Floats, dict[str, float]]:
    """For each row the log-odds that text i is chosen, and the weights of all fits together.

    `design(learn, judged, balance)` gives the features of the rows `learn` and then of the rows
    `judged`, and their names; balance is plus - minus of `learn`, and it sees no other label. Rows
    that no fit can judge are NaN. A set in balance has no odds: 0 for each row.
    """
    odds = np.full(len(plus), np.nan)
    weights: Counter[str] = Counter()
    total = plus + minus
    used = total > 0
    for seen, judged in folds(groups):
        learn, judged = seen[used[seen]], judged[used[judged]]
        if len(learn) < LEAST or not len(judged):
            continue
        balance = (plus - minus)[learn]
        if not balance.any():
            odds[judged] = 0.0
            continue
        x, names = design(learn, judged, balance)
        spread = np.sqrt((x[: len(learn)] ** 2).mean(axis=0))
        kept = np.flatnonzero(spread > 1e-9)
        scaled = np.clip(x[:, kept] / spread[kept], -8.0, 8.0)
        w = fit(scaled[: len(learn)], plus[learn], minus[learn])
        odds[judged] = scaled[len(learn) :] @ w
        for i, weight in zip(kept.tolist(), w.tolist(), strict=True):
            weights[names[i]] += weight
    return odds, dict(weights)


def standard_error(right: Floats, total: Floats, writers: Ints, seed: int) -> float:
    """Of the accuracy right.sum() / total.sum(), by a bootstrap over writers.

    Each round draws writers with replacement; a row counts as often as both its writers were drawn
    (one factor when they are the same). right, total: (N,); writers: (N, 2).
    """
    names, index = np.unique(writers, return_inverse=True)
    index = index.reshape(writers.shape)
    cells, cell = np.unique(index, axis=0, return_inverse=True)
    cell = cell.reshape(-1)
    rights = np.bincount(cell, right, len(cells))
    totals = np.bincount(cell, total, len(cells))
    rng = np.random.default_rng([seed, len(right)])
    found = []
    for _ in range(ROUNDS):
        drawn = np.bincount(rng.integers(0, len(names), len(names)), minlength=len(names))
        times = drawn[cells[:, 0]] * np.where(cells[:, 0] == cells[:, 1], 1, drawn[cells[:, 1]])
        if weight := float(times @ totals):
            found.append(float(times @ rights) / weight)
    return float(np.std(found)) if len(found) > 1 else 0.0
