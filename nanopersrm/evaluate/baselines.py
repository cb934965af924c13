"""Judges of style that need no model, to know what a model must beat.

    ngrams    mean cosine of character 3- and 4-grams (`profile.ngram_similarity`)
    factors   minus w · d(c), d the |z difference| of each factor; w by logistic regression on
              training pairs. Without such pairs minus `profile.factor_distance`, whose weights are
              the reliabilities
    fused     everything that a fusion knows

Each gives `score(exemplars, question, candidates)`: a number a candidate, more for a better fit.
"""

from collections.abc import Callable, Sequence

import numpy as np

from nanopersrm.pairs import Pair
from nanopersrm.style.fusion import Fusion, Readings, factor_distances, logistic, weigh
from nanopersrm.style.profile import factor_distance, ngram_similarity

# (exemplars, question, candidates) -> a number a candidate, or None: nothing valid was said
Score = Callable[[Sequence[str], str, Sequence[str]], list[float] | None]


def _each(score: Callable[[Sequence[str], str], float]) -> Score:
    """A judge that looks at one candidate at a time."""
    return lambda exemplars, question, candidates: [score(exemplars, c) for c in candidates]


def ngrams() -> Score:
    """Character n-gram similarity."""
    return _each(ngram_similarity)


def factors(pairs: Sequence[Pair] = ()) -> Score:
    """Distance over all factors, with weights fitted on training pairs if there are any."""
    if not pairs:
        return _each(lambda exemplars, candidate: -factor_distance(exemplars, candidate))
    table = [
        [factor_distances(pair.exemplars, text) for text in (pair.chosen, pair.rejected)]
        for pair in pairs
    ]
    weights, means = weigh(np.array(table))

    def score(exemplars: Sequence[str], candidate: str) -> float:
        d = np.array(factor_distances(exemplars, candidate))
        return -float(np.where(np.isfinite(d), d, means) @ weights)

    return _each(score)


def fused(fusion: Fusion, readings: Readings | None = None) -> Score:
    """All instruments in one number; without `readings` those that need no model."""

    def score(exemplars: Sequence[str], question: str, candidates: Sequence[str]) -> list[float]:
        read = [None] * len(candidates) if readings is None else readings(exemplars, candidates)
        return [
            fusion.score(exemplars, text, reading)
            for text, reading in zip(candidates, read, strict=True)
        ]

    return score


def slope_of(score: Score, pairs: Sequence[Pair]) -> float:
    """What turns a gap of this judge's scores into log-odds, fitted on training pairs (Platt 1999).

    Worked example: gaps 1, 1, 1 and -1 are won three times of four; without the ridge σ(w) = 3/4,
    w = 1.1.
    """
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
