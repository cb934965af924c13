"""Fusion: all instruments in one number, the probability that a text is by the writer.

Each instrument gives a distance between exemplars and candidate: |z difference| of each factor
(`profile.py`), minus the character n-gram similarity and, with a model at hand, minus what reading
gives (`reading.py`). A regression on training pairs says how much each is worth:

    s(candidate)  = - Σ w · distance       w by logistic regression on s(chosen) - s(rejected)
    probability   = σ(a · s + b)           a, b on chosen and rejected texts one by one

Fusing scores rather than features is what speaker verification does (Brümmer and du Preez, Computer
Speech & Language 20, 2006). Worked example: w = (2, 1), distances (0.5, -0.8) give s = -0.2; with
a = 1, b = 0.2 that is even.

The regression. A pair has the features x = d(rejected) - d(chosen) and P(right) = σ(w · x), with no
intercept, because neither place of a pair is special. We maximise

    Σ log σ(w · x) - ½ |w|²         by Newton's steps      w += (XᵀSX + I)⁻¹ (Xᵀ(1 - p) - w)

with S = diag(p (1 - p)); a and b come from the same regression (Platt 1999).

A regression knows the pairs it was fitted on too well. So writers are dealt into FOLDS by a hash of
their name, and w is found once more without each fold. The scores of the writers left out give a
and b, and `loss`: nats a pair, 0.69 for a guess. A model that learns from the same pairs is shown
the fold without their writer, or it would trust the probability too much. A distance that a text
cannot show counts as the mean of the training pairs.
"""

import hashlib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Any

import numpy as np
from numpy.typing import NDArray
from pydantic import AllowInfNan, Field, Strict, TypeAdapter

from nanopersrm.pairs import Pair
from nanopersrm.style.features import FACTORS
from nanopersrm.style.profile import measured, ngram_similarity, reference

FACTOR_NAMES = tuple(factor.name for factor in FACTORS)
NGRAMS, READING = "n-grams", "reading"  # beside the factors
INSTRUMENTS = {*FACTOR_NAMES, NGRAMS, READING}
LEAST_UNIT = 1e-9  # of scores that are all the same
FOLDS = 5
GUESS = math.log(2)  # nats a pair
STEPS = 100  # of Newton, at most; 5 to 10 are usual
CLOSE = 1e-9  # a step this small ends the fit

Array = NDArray[np.float64]
Number = Annotated[float, Strict(), AllowInfNan(False)]
ByInstrument = Annotated[dict[str, Number], Field(min_length=1)]
# (exemplars, texts) -> the reading of each text
Readings = Callable[[Sequence[str], Sequence[str]], list[float]]


@dataclass(frozen=True)
class Fusion:
    """What each instrument is worth; all instruments that it knows, by name."""

    weights: ByInstrument  # w, of distances in their own units
    # The distance that stands in for one that cannot be measured: the mean of the training pairs.
    means: Annotated[ByInstrument, Field(alias="usual")]
    slope: Number  # a
    offset: Number  # b
    loss: Number | None = None  # nats a pair by writers held out; None: not measured
    # By fold: fitted without the pairs of its writers.
    folds: Annotated[tuple["Fusion", ...], Field(alias="apart")] = ()

    def __post_init__(self) -> None:
        if not {*self.weights} <= {*self.means} <= INSTRUMENTS:
            raise ValueError(f"expected weights and means of instruments, got {[*self.means]}")
        if len(self.folds) not in (0, FOLDS):
            raise ValueError(f"expected {FOLDS} folds or none, found {len(self.folds)}")

    def without(self, writer: str) -> "Fusion":
        """The fusion that was fitted without this writer of the training pairs."""
        return self.folds[fold_of(writer)] if self.folds else self

    def score(self, exemplars: Sequence[str], text: str, reading: float | None = None) -> float:
        """s of the docstring. reading: None where it was not measured."""
        distances = _distances(exemplars, text, reading)
        distances = {
            k: d if math.isfinite(d) else self.means.get(k, d) for k, d in distances.items()
        }
        return -sum(weight * distances[name] for name, weight in self.weights.items())

    def probability(self, score: float) -> float:
        """In percent, from 1 to 99."""
        p = 1 / (1 + math.exp(-max(-50.0, min(50.0, self.slope * score + self.offset))))
        return max(1.0, min(99.0, 100.0 * p))

    def probabilities(
        self, exemplars: Sequence[str], texts: Sequence[str], readings: Sequence[float]
    ) -> list[float]:
        """Of each text, in percent."""
        return [
            self.probability(self.score(exemplars, text, reading))
            for text, reading in zip(texts, readings, strict=True)
        ]

    def to_json(self) -> dict[str, Any]:
        """As plain numbers."""
        return SCHEMA.dump_python(self, by_alias=True, mode="json")


SCHEMA = TypeAdapter(Fusion)


def fold_of(writer: str) -> int:
    """The fold of a writer: the same on every machine."""
    return hashlib.sha256(writer.encode()).digest()[0] % FOLDS


def fit(pairs: Sequence[Pair], readings: Readings | None = None, read: int | None = None) -> Fusion:
    """Weigh the instruments on training pairs; with `readings` the reading is one.

    Reading is slow and the other instruments are many. So only the first `read` pairs are read. The
    others have no gap in the reading, and say nothing of its weight; a, b and `loss` are of pairs
    that were read.
    """
    assert pairs, "expected training pairs"
    read = len(pairs) if read is None else read
    names = [*FACTOR_NAMES, NGRAMS, *([READING] if readings is not None else [])]
    table = np.empty((len(pairs), 2, len(names)))  # of chosen and rejected
    for i, pair in enumerate(pairs):
        texts = [pair.chosen, pair.rejected]
        scores = readings(pair.exemplars, texts) if readings and i < read else [None, None]
        for side, (text, reading) in enumerate(zip(texts, scores, strict=True)):
            distances = _distances(pair.exemplars, text, reading)
            table[i, side] = [distances[name] for name in names]
    authors = {pair.id: pair.author for pair in pairs}
    fold = np.array([fold_of(pair.author) for pair in pairs])  # (pairs,)
    twin_fold = np.array([fold_of(authors.get(pair.twin, pair.author)) for pair in pairs])
    fits = []
    held_out = np.full(table.shape[:2], np.nan)  # s of writers held out, less that of means
    for k in range(FOLDS):
        others = (fold != k) & (twin_fold != k)
        weights, means = weigh(table[others])
        fits.append((weights, means))
        if others.any():
            rows = np.where(np.isfinite(table), table, means)[fold == k]
            held_out[fold == k] = -((rows - means) @ weights)
    held_out = held_out[:read][np.isfinite(held_out[:read, 0])]
    slope, middle, loss = 0.0, 0.0, GUESS
    if len(held_out):
        slope, middle = _platt(held_out)
        loss = float(np.logaddexp(0, held_out[:, 1] - held_out[:, 0]).mean())

    def fusion(weights: Array, means: Array) -> Fusion:
        offset = middle + slope * float(means @ weights)  # s of a mean text is minus the last
        values = dict(zip(names, weights.tolist(), strict=True))
        return Fusion(values, dict(zip(names, means.tolist(), strict=True)), slope, offset)

    folds = tuple(fusion(*fitted) for fitted in fits)
    return replace(fusion(*weigh(table)), loss=loss, folds=folds)


def weigh(table: Array) -> tuple[Array, Array]:
    """Distances (pairs, 2, k) of chosen and rejected -> w (k,) and the mean distances (k,)."""
    known = np.isfinite(table)
    means = np.where(known, table, 0.0).sum((0, 1)) / np.maximum(known.sum((0, 1)), 1)  # (k,)
    table = np.where(known, table, means)
    gaps = table[:, 1] - table[:, 0]  # (pairs, k)
    # z is in units already; of scores the ridge must not see how small they are.
    unit = np.ones(table.shape[-1])
    score_like = slice(len(FACTOR_NAMES), None)
    if len(gaps):
        unit[score_like] = np.maximum(np.sqrt((gaps[:, score_like] ** 2).mean(0)), LEAST_UNIT)
    return logistic(gaps / unit) / unit, means


def logistic(x: Array, ridge: float = 1.0) -> Array:
    """x (pairs, k), the features of each winner less those of its loser -> weights (k,)."""
    w = np.zeros(x.shape[1])
    for _ in range(STEPS):
        p = 1 / (1 + np.exp(-np.clip(x @ w, -500, 500)))  # (pairs,)
        gradient = x.T @ (1 - p) - ridge * w
        hessian = (x.T * (p * (1 - p))) @ x + ridge * np.eye(len(w))
        step = np.linalg.solve(hessian, gradient)
        w += step
        if np.abs(step).max(initial=0.0) < CLOSE:
            break
    return w


def _platt(scores: Array) -> tuple[float, float]:
    """scores (pairs, 2) of chosen and rejected -> a, b with σ(a · s + b) for chosen."""
    middle, spread = float(scores.mean()), float(scores.std()) or 1.0
    rows = np.stack([(scores - middle) / spread, np.ones_like(scores)], -1)  # (pairs, 2, 2)
    slope, offset = logistic(np.concatenate([rows[:, 0], -rows[:, 1]]))
    return float(slope) / spread, float(offset - slope * middle / spread)


def factor_distances(exemplars: Sequence[str], candidate: str) -> list[float]:
    """|z difference| of each factor, NaN where one side cannot be judged on it."""
    against = reference()
    writer, other = measured(tuple(exemplars)), measured((candidate,))
    distances = []
    for factor in FACTORS:
        a, b = writer[factor.name], other[factor.name]
        if a is None or b is None:
            distances.append(math.nan)
        else:
            distances.append(abs(against.z(factor.name, a) - against.z(factor.name, b)))
    return distances


def _distances(exemplars: Sequence[str], text: str, reading: float | None) -> dict[str, float]:
    """By instrument; NaN where it cannot be measured."""
    distances = dict(zip(FACTOR_NAMES, factor_distances(exemplars, text), strict=True))
    distances[NGRAMS] = -ngram_similarity(exemplars, text)
    distances[READING] = math.nan if reading is None else -reading
    return distances
