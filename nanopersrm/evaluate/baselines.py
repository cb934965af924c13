"""Judges of style that need no model, to know what a model must beat.

    ngrams    mean cosine of character 3- and 4-grams (`profile.ngram_similarity`)
    factors   minus `profile.factor_distance`, whose weights are the reliabilities
    together  everything that an `Evidence` knows, in decibans

Each gives `score(exemplars, question, candidates)`: a number a candidate, more for a better fit.
"""

import math
from collections.abc import Callable, Sequence

import numpy as np

from nanopersrm.pairs import Pair
from nanopersrm.style.evidence import Evidence, Readings, scales_of
from nanopersrm.style.profile import factor_distance, ngram_similarity

# (exemplars, question, candidates) -> a number a candidate, or None: nothing valid was said
Score = Callable[[Sequence[str], str, Sequence[str]], list[float] | None]


def _each(score: Callable[[Sequence[str], str], float]) -> Score:
    """A judge that looks at one candidate at a time."""
    return lambda exemplars, question, candidates: [score(exemplars, c) for c in candidates]


ngrams = _each(ngram_similarity)
factors = _each(lambda exemplars, candidate: -factor_distance(exemplars, candidate))


def together(evidence: Evidence, readings: Readings | None = None) -> Score:
    """All features in one number; without `readings` those that need no model."""

    def score(exemplars: Sequence[str], question: str, candidates: Sequence[str]) -> list[float]:
        read = [None] * len(candidates) if readings is None else readings(exemplars, candidates)
        return [
            evidence.total(exemplars, text, reading)
            for text, reading in zip(candidates, read, strict=True)
        ]

    return score


def slope_of(score: Score, pairs: Sequence[Pair]) -> float:
    """What turns a gap of this judge's scores into log-odds, fitted on training pairs (Platt 1999);
    0 for one that is more often wrong. Three wins of four at a gap of 1: σ(w) = 3/4, w = 1.1.
    """
    gaps = []
    for pair in pairs:
        scores = score(pair.exemplars, pair.question, (pair.chosen, pair.rejected))
        if scores is not None and all(map(math.isfinite, scores)):
            gaps.append(scores[0] - scores[1])
    return float(scales_of(np.array(gaps)[:, None])[0])
