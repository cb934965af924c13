"""Evidence: what each feature says of a text, in one unit, so that it adds up.

Each feature gives a likeness of a text to the exemplars: the reading (`reading.py`), the similarity
of character n-grams, and of each habit how much likelier its value is by the same writer than by a
stranger. With z of writer and text (`profile.py`) and the reliability r of the habit that is

    l = -½ log(1 - r²) - ½ (z_text - r z_writer)² / (1 - r²) + ½ z_text²        nats

so that a rare habit which both have says much, and what everybody does little. With weights w and
the mean likeness of the training texts, feature k gives

    e_k(c)    = w_k (likeness_k(c) - mean_k)       its weight of evidence for c, in decibans
    total(c)  = Σ_k e_k(c)
    10 log10 odds(c rather than c' is the writer's) = total(c) - total(c')

Ten decibans are ten to one for, minus ten are ten to one against, 0 says nothing (Good, Probability
and the Weighing of Evidence, 1950; the unit is Turing's). Each e_k is rounded to a tenth, so that
the lines that people see add up to the last decimal. A habit that cannot be measured gives no line.
Worked example: w = (20, 10), means (0.1, 0.5), likenesses (0.2, 0.8) give 2 + 3 = 5: three to one
beside a text of the mean.

The weights. A pair has the features x = likeness(chosen) - likeness(rejected), and P(right) is
σ(w · x), with no intercept, because neither place of a pair is special (Bradley and Terry 1952). No
weight is below 0: to be like the writer never speaks against a text. We maximise

    Σ log σ(w · x) - ½ |w|²         by Newton's steps      w += (XᵀSX + I)⁻¹ (Xᵀ(1 - p) - w)

with S = diag(p (1 - p)) and each x in units of its root mean square. A regression knows the pairs
it was fitted on too well. So writers are dealt into FOLDS by a hash of their name, and w is found
once more without each fold. The totals of writers left out then tell

    scales  what such a total and the reading count beside each other: a second regression, since
            fewer pairs are read; with it odds are as often right as they say
    loss    nats a pair; a guess has 0.69
    slope   of a text alone, which is less, because some texts are likely to be anybody's:
            10 log10 odds(c is the writer's) = slope · total(c) + offset

A model that learns from the same pairs is shown the fold without their writer, or it would trust
the evidence too much. A fold leaves its writers out of w and of the pairs that scales are fitted
on; slope and offset are of all.
"""

import hashlib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated

import numpy as np
from numpy.typing import NDArray
from pydantic import AllowInfNan, Field, Strict, TypeAdapter

from nanopersrm.files import write_json
from nanopersrm.model.base import read_json
from nanopersrm.pairs import Pair, validate
from nanopersrm.style.features import FACTORS
from nanopersrm.style.profile import measured, ngram_similarity, reference

FACTOR_NAMES = tuple(factor.name for factor in FACTORS)
NGRAMS, READING = "n-grams", "reading"  # beside the factors
FEATURES = (READING, NGRAMS, *FACTOR_NAMES)
FILE = "evidence.json"
DECIBAN = math.log(10) / 10  # nats
LEAST_UNIT = 1e-9  # of likenesses that are all the same
MOST_RELIABLE = 0.95
FOLDS = 5
GUESS = math.log(2)  # nats a pair
STEPS = 100  # of Newton, at most; 5 to 10 are usual
CLOSE = 1e-9  # a step this small ends the fit

Array = NDArray[np.float64]
Number = Annotated[float, Strict(), AllowInfNan(False)]
ByFeature = Annotated[dict[str, Number], Field(min_length=1)]
# (exemplars, texts) -> the reading of each text
Readings = Callable[[Sequence[str], Sequence[str]], list[float]]


@dataclass(frozen=True)
class Evidence:
    """What each feature is worth."""

    weights: ByFeature  # w, decibans for a unit of likeness
    means: ByFeature  # likeness of the training texts
    slope: Number  # of a text alone
    offset: Number  # decibans
    loss: Number | None = None  # nats a pair by writers held out; None: not measured
    # By fold: fitted without the pairs of its writers.
    folds: tuple["Evidence", ...] = ()

    def __post_init__(self) -> None:
        if not self.weights.keys() == self.means.keys() <= {*FEATURES}:
            raise ValueError(f"expected weights and means of features, got {[*self.means]}")
        if len(self.folds) not in (0, FOLDS):
            raise ValueError(f"expected {FOLDS} folds or none, found {len(self.folds)}")

    def without(self, writer: str) -> "Evidence":
        """What was fitted without this writer of the training pairs."""
        return self.folds[fold_of(writer)] if self.folds else self

    def ledger(
        self, exemplars: Sequence[str], text: str, reading: float | None = None
    ) -> dict[str, float]:
        """e_k of each feature that counts and can be measured, in decibans with one decimal.

        reading: None where it was not measured.
        """
        likeness = likeness_of(exemplars, text, reading)
        return {
            name: round(weight * (likeness[name] - self.means[name]), 1) + 0.0  # never -0.0
            for name, weight in self.weights.items()
            if weight and math.isfinite(likeness[name])
        }

    def salience(self, writer: Mapping[str, float | None]) -> dict[str, float]:
        """Of each habit that counts and the writer can be judged on, what it can say: the decibans
        between a text that has it as the writer and one as most people. writer: by habit."""
        against = reference().factors
        return {
            name: weight * (habit_likeness(name, value, value) - habit_likeness(name, value, usual))
            for name, weight in self.weights.items()
            if weight and (value := writer.get(name)) is not None
            for usual in [against[name].root_mean ** 2]
        }

    def total(self, exemplars: Sequence[str], text: str, reading: float | None = None) -> float:
        """The sum of `ledger`, in decibans."""
        return round(sum(self.ledger(exemplars, text, reading).values()), 1) + 0.0

    def probability(self, total: float) -> float:
        """That a text with this total is the writer's, in percent, from 1 to 99."""
        odds = DECIBAN * (self.slope * total + self.offset)
        return max(1.0, min(99.0, 100 / (1 + math.exp(-max(-50.0, min(50.0, odds))))))

    def save(self, folder: Path) -> None:
        """Write evidence.json."""
        write_json(folder / FILE, SCHEMA.dump_python(self, mode="json"))

    @staticmethod
    def load(folder: Path) -> "Evidence":
        """The inverse of `save`."""
        return validate(SCHEMA, read_json(folder / FILE), str(folder / FILE))


SCHEMA = TypeAdapter(Evidence)


def fold_of(writer: str) -> int:
    """The fold of a writer: the same on every machine."""
    return hashlib.sha256(writer.encode()).digest()[0] % FOLDS


def fit(
    pairs: Sequence[Pair], readings: Readings | None = None, read: int | None = None
) -> Evidence:
    """Weigh the features on training pairs. With `readings` the first `read` pairs are read; scales
    and loss come from these."""
    assert pairs, "expected training pairs"
    read = len(pairs) if read is None else read
    names, texts = [*FACTOR_NAMES, NGRAMS], [(pair.chosen, pair.rejected) for pair in pairs]
    table = np.empty((len(pairs), 2, len(names)))  # of chosen and rejected
    for i, pair in enumerate(pairs):
        for side, text in enumerate(texts[i]):
            likeness = likeness_of(pair.exemplars, text, None)
            table[i, side] = [likeness[name] for name in names]
    authors = {pair.id: pair.author for pair in pairs}
    fold = np.array([fold_of(pair.author) for pair in pairs])  # (pairs,)
    twin_fold = np.array([fold_of(authors.get(pair.twin, pair.author)) for pair in pairs])
    fits = []
    parts = np.full((*table.shape[:2], 1), np.nan)  # totals of writers held out, in nats
    for k in range(FOLDS):
        others = (fold != k) & (twin_fold != k)
        fits.append(weigh(table[others]))
        if others.any():
            weights, means = fits[k]
            known = np.where(np.isfinite(table), table, means)[fold == k]
            parts[fold == k, :, 0] = (known - means) @ weights
    parts = parts[:read]
    if readings is not None:
        names.append(READING)
        rows = [readings(pair.exemplars, texts[i]) for i, pair in enumerate(pairs[:read])]
        parts = np.concatenate([parts, np.reshape(rows, (-1, 2, 1))], -1)  # (read, 2, n)
    sound = np.isfinite(parts).all((1, 2))
    parts, fold, twin_fold = parts[sound], fold[:read][sound], twin_fold[:read][sound]
    middle = parts[..., 1:].mean((0, 1)) if len(parts) else np.zeros(parts.shape[-1] - 1)
    parts[..., 1:] -= middle
    slope, offset, loss = 0.0, 0.0, GUESS
    gaps = parts[:, 0] - parts[:, 1]  # (read, n)
    scales, held_out = [scales_of(gaps)], np.full(parts.shape[:2], np.nan)
    for k in range(FOLDS):
        others = (fold != k) & (twin_fold != k)
        scales.append(scales_of(gaps[others]))
        if others.any():
            held_out[fold == k] = parts[fold == k] @ scales[-1]
    held_out = held_out[np.isfinite(held_out[:, 0])]
    if len(held_out):
        slope, offset = _platt(held_out)
        loss = float(np.logaddexp(0, held_out[:, 1] - held_out[:, 0]).mean())

    def evidence(fitted: tuple[Array, Array], scale: Array) -> Evidence:
        weights = np.concatenate([scale[0] * fitted[0], scale[1:]]) / DECIBAN
        means = np.concatenate([fitted[1], middle])
        w, mean = (dict(zip(names, row.tolist(), strict=True)) for row in (weights, means))
        return Evidence(w, mean, slope, offset / DECIBAN)

    folds = tuple(map(evidence, fits, scales[1:]))
    return replace(evidence(weigh(table), scales[0]), loss=loss, folds=folds)


def weigh(table: Array) -> tuple[Array, Array]:
    """Likeness (pairs, 2, k) of chosen and rejected -> w (k,) in nats, the means (k,)."""
    known = np.isfinite(table)
    means = np.where(known, table, 0.0).sum((0, 1)) / np.maximum(known.sum((0, 1)), 1)  # (k,)
    table = np.where(known, table, means)
    return scales_of(table[:, 0] - table[:, 1]), means


def scales_of(gaps: Array) -> Array:
    """Gaps (pairs, n) of winners over losers -> what each counts (n,) in log-odds.

    A number that would count less than 0 is left out, and the others are fitted without it.
    """
    used = np.ones(gaps.shape[1], bool)
    while True:
        scales = np.zeros(len(used))
        scales[used] = in_any_unit(gaps[:, used])
        if (scales >= 0).all():
            return scales
        used = scales > 0


def in_any_unit(gaps: Array) -> Array:
    """`logistic` of gaps (pairs, n) that does not see how small their units are."""
    size = np.maximum(np.sqrt((gaps**2).sum(0) / max(1, len(gaps))), LEAST_UNIT)
    return logistic(gaps / size) / size


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


def habit_likeness(name: str, writer: float, text: float) -> float:
    """l of a habit, in nats, from its value of the writer and of the text.

    With r = 0.6, z = 2 of both: 0.223 - ½ (0.8)² / 0.64 + 2 = 1.72, a factor of 5.6.
    """
    z, r = reference().z, min(MOST_RELIABLE, reference().factors[name].reliability)
    rest = 1 - r * r
    of_writer, of_text = z(name, writer), z(name, text)
    return -0.5 * math.log(rest) - 0.5 * (of_text - r * of_writer) ** 2 / rest + 0.5 * of_text**2


def likeness_of(exemplars: Sequence[str], text: str, reading: float | None) -> dict[str, float]:
    """By feature; NaN where one side cannot be judged on it."""
    writer, other = measured(tuple(exemplars)), measured((text,))
    likeness = {
        name: math.nan if a is None or b is None else habit_likeness(name, a, b)
        for name in FACTOR_NAMES
        for a, b in [(writer[name], other[name])]
    }
    likeness[NGRAMS] = ngram_similarity(exemplars, text)
    likeness[READING] = math.nan if reading is None else reading
    return likeness
