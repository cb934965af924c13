"""Baselines: judges of style that need no model, to know what a model must beat.

    ngrams    mean cosine of character 3- and 4-grams (`profile.ngram_similarity`)
    delta     Burrows' Delta (Burrows 2002): minus the mean |z difference| of the 150 words that are
              most frequent in a reference, most of them function words
    factors   minus w · d(c), where d holds |z difference| of each factor of factors.py between
              exemplars and candidate c; w by logistic regression on training pairs. Without such
              pairs, `profile.factor_distance`, whose weights are the reliabilities
    length    the number of words: knows nothing of the writer, so 50 % on whole twins

The regression. The pair (c, r) has the features x = d(r) - d(c) and P(c fits better) = σ(w · x).
There is no intercept, because neither place of a pair is special. We maximise

    Σ log σ(w · x) - ½ |w|²         by Newton's steps      w += (XᵀSX + I)⁻¹ (Xᵀ(1 - p) - w)

with S = diag(p (1 - p)). With one column, the gap of any judge's scores, the same regression gives
the slope that turns gaps into log-odds (Platt 1999): so a cosine gets a probability. Worked
example: gaps 1, 1, 1 and -1 are won three times of four; without the ridge σ(w) = 3/4, w = 1.1.

What we chose. Counts of all exemplars are pooled. A factor that a text cannot show has the mean
distance of the training pairs. The reference of Delta is the texts of the training pairs, each
once; without these, the exemplars of the evaluated pairs, never their candidates.

What we left out: support vector machines, and n-grams of tags. Read next: `evaluate.py`.
"""

from collections import Counter
from collections.abc import Callable, Sequence
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from nanopersrm import InputError
from nanopersrm.evaluate.predictions import Score
from nanopersrm.pairs import Pair
from nanopersrm.style.features import FACTORS, measure
from nanopersrm.style.profile import factor_distance, ngram_similarity, reference
from nanopersrm.style.text import read

FREQUENT = 150  # words of Delta
LEAST_TEXTS = 2  # of its reference: fewer have no deviation
STEPS = 100  # of Newton, at most; 5 to 10 are usual
CLOSE = 1e-9  # a step this small ends the fit

Array = NDArray[np.float64]
One = Callable[[Sequence[str], str], float]  # (exemplars, candidate) -> score


def _each(one: One) -> Score:
    """A judge that looks at one candidate at a time."""
    return lambda exemplars, question, candidates: [one(exemplars, c) for c in candidates]


def ngrams() -> Score:
    """Character n-gram similarity."""
    return _each(ngram_similarity)


def length() -> Score:
    """The longer text wins: a judge that should be at chance."""
    return _each(lambda exemplars, candidate: float(len(candidate.split())))


def delta(texts: Sequence[str]) -> Score:
    """Burrows' Delta with word frequencies and deviations of `texts`."""
    counts = [_words((text,)) for text in texts]
    counts = [count for count in counts if count]
    if len(counts) < LEAST_TEXTS:
        raise InputError(
            f"Burrows' Delta: expected at least {LEAST_TEXTS} texts with words, got {len(counts)}"
        )
    total: Counter[str] = Counter()
    for count in counts:
        total.update(count)
    words = [w for w, _ in sorted(total.items(), key=lambda item: (-item[1], item[0]))[:FREQUENT]]
    rates = np.array([_rates(count, words) for count in counts])  # (texts, words)
    spread = rates.std(0)
    spread = np.where(spread > 0, spread, np.inf)  # a word that all use alike tells nothing

    def one(exemplars: Sequence[str], candidate: str) -> float:
        writer, other = (
            _rates(_words(t), words) / spread for t in (tuple(exemplars), (candidate,))
        )
        return -float(np.abs(writer - other).mean())

    return _each(one)


@lru_cache(maxsize=256)
def _words(texts: tuple[str, ...]) -> Counter[str]:
    return read(texts).counts


def _rates(count: Counter[str], words: Sequence[str]) -> Array:
    """(words,) the share of each word."""
    return np.array([count[word] for word in words]) / max(1, count.total())


def factors(pairs: Sequence[Pair] = ()) -> Score:
    """Distance over all factors, with weights fitted on training pairs if there are any."""
    if not pairs:
        return _each(lambda exemplars, candidate: -factor_distance(exemplars, candidate))
    return _fitted(pairs, factor_distances)


def _fitted(pairs: Sequence[Pair], distances: Callable[[Sequence[str], str], list[float]]) -> Score:
    """Minus a sum of distances (NaN where a text cannot show one), weighted by `logistic`."""
    rows = np.array(
        [[distances(p.exemplars, text) for text in (p.chosen, p.rejected)] for p in pairs]
    )  # (pairs, 2, k)
    known = np.isfinite(rows)
    seen = np.maximum(known.sum((0, 1)), 1)
    usual = np.where(known, rows, 0).sum((0, 1)) / seen  # (k,)
    rows = np.where(known, rows, usual)
    weights = logistic(rows[:, 1] - rows[:, 0])

    def one(exemplars: Sequence[str], candidate: str) -> float:
        d = np.array(distances(exemplars, candidate))
        return -float(np.where(np.isfinite(d), d, usual) @ weights)

    return _each(one)


def factor_distances(exemplars: Sequence[str], candidate: str) -> list[float]:
    """|z difference| of each factor, NaN where one side cannot be judged on it."""
    against = reference()
    writer, other = _measured(tuple(exemplars)), _measured((candidate,))
    found = []
    for factor in FACTORS:
        a, b = writer[factor.name], other[factor.name]
        if a is None or b is None:
            found.append(float("nan"))
        else:
            found.append(abs(against.z(factor.name, a) - against.z(factor.name, b)))
    return found


@lru_cache(maxsize=256)
def _measured(texts: tuple[str, ...]) -> dict[str, float | None]:
    return measure(texts)


def logistic(x: Array, ridge: float = 1.0) -> Array:
    """x (pairs, k), the features of each winner less those of its loser -> weights (k,)."""
    w = np.zeros(x.shape[1])
    for _ in range(STEPS):
        p = 1 / (1 + np.exp(-np.clip(x @ w, -500, 500)))  # (pairs,)
        slope = x.T @ (1 - p) - ridge * w
        bend = (x.T * (p * (1 - p))) @ x + ridge * np.eye(len(w))
        step = np.linalg.solve(bend, slope)
        w += step
        if np.abs(step).max(initial=0.0) < CLOSE:
            break
    return w


def slope_of(score: Score, pairs: Sequence[Pair]) -> float:
    """What turns a gap of this judge's scores into log-odds, fitted on training pairs."""
    gaps = []
    for pair in pairs:
        scores = score(pair.exemplars, pair.question, (pair.chosen, pair.rejected))
        if scores is not None:
            gaps.append(scores[0] - scores[1])
    x = np.array(gaps)
    size = float(np.sqrt((x**2).mean())) if len(x) else 0.0
    if not np.isfinite(size) or size == 0:
        return 0.0
    return float(logistic(x[:, None] / size)[0]) / size  # the ridge knows no unit


def texts_of(pairs: Sequence[Pair], candidates: bool) -> list[str]:
    """The exemplars of some pairs, and their candidates if asked for, each once, in order."""
    found: dict[str, None] = {}
    for pair in pairs:
        found.update(dict.fromkeys(pair.exemplars))
        if candidates:
            found.update(dict.fromkeys((pair.chosen, pair.rejected)))
    return list(found)
