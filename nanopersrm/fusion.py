"""Fusion: all instruments in one number, the chance that a text is by the writer.

No instrument is good everywhere: character n-grams notice that three words were swapped, factors
that sentences were joined, the style similarity which person it is. Each gives a distance between
exemplars and candidate, and a regression on training pairs says how much each is worth:

    s(candidate)  = - Σ w · distance       w by logistic regression on s(chosen) - s(rejected)
    chance        = σ(a · s + b)           a, b on chosen and rejected texts one by one

The distances are |z difference| of each factor (`profile.py`), minus the n-gram cosine and, with a
model at hand, minus the cosine of pooled states (`style.py`). The chance is for a reader who has
seen as many texts by the writer as by others; it is shown as whole percent, 1 to 99. Fusing scores
rather than features is what speaker verification does (Brümmer and du Preez, Computer Speech &
Language 20, 2006); w, a and b are the same regression twice (`baselines.logistic`).

Worked example: w = (2, 1), distances (0.5, -0.8) give s = -0.2; with a = 1, b = 0.2 that is even.

A distance that a text cannot show counts as the mean of the training pairs. `usual` holds those.

What we left out: products of instruments, and weights by kind of text. Read next: `nearness.py`.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from nanopersrm import InputError
from nanopersrm.baselines import factor_distances, logistic
from nanopersrm.factors import FACTORS
from nanopersrm.opinions import Score
from nanopersrm.pairs import Pair
from nanopersrm.profile import ngram_similarity

FACTOR_NAMES = tuple(factor.name for factor in FACTORS)
NGRAMS, STYLE = "n-grams", "style"  # beside the factors
LEAST_UNIT = 1e-9  # of cosines that are all the same

# (exemplars, texts) -> the cosine of each text with the writer
Cosines = Callable[[Sequence[str], Sequence[str]], list[float]]


@dataclass(frozen=True)
class Fusion:
    """What each instrument is worth; all instruments that it knows, by name."""

    weights: dict[str, float]  # w, of distances in their own units
    usual: dict[str, float]  # the distance that stands in for one that cannot be measured
    slope: float  # a
    offset: float  # b

    def score(self, exemplars: Sequence[str], text: str, cosine: float | None = None) -> float:
        """s of the docstring. cosine: of the style similarity; None: nobody has measured it."""
        found = _distances(exemplars, text, cosine)
        known = {
            name: found[name] if math.isfinite(found[name]) else self.usual[name]
            for name in self.weights
        }
        return -sum(weight * known[name] for name, weight in self.weights.items())

    def chance(self, score: float) -> float:
        """In percent, from 1 to 99."""
        sure = 1 / (1 + math.exp(-max(-50.0, min(50.0, self.slope * score + self.offset))))
        return max(1.0, min(99.0, 100.0 * sure))

    def chances(
        self, exemplars: Sequence[str], texts: Sequence[str], cosines: Sequence[float]
    ) -> list[float]:
        """Of each text, in percent."""
        return [
            self.chance(self.score(exemplars, text, cosine))
            for text, cosine in zip(texts, cosines, strict=True)
        ]

    def facts(self) -> dict[str, object]:
        """As plain numbers."""
        return {
            "weights": self.weights,
            "usual": self.usual,
            "slope": self.slope,
            "offset": self.offset,
        }


def of_facts(raw: Mapping[str, object], where: str) -> Fusion:
    """The inverse of `facts`, checked; `where` names the file in errors."""
    known = {*FACTOR_NAMES, NGRAMS, STYLE}
    tables: dict[str, dict[str, float]] = {}
    for field in ("weights", "usual"):
        table = raw.get(field)
        if not isinstance(table, dict) or not table or not all(map(_finite, table.values())):
            raise InputError(f"{where}, field {field}: expected instruments with a number each")
        if strange := sorted({*table} - known):
            raise InputError(f"{where}, field {field}: no instrument is called {strange[0]!r}")
        tables[field] = {name: float(value) for name, value in table.items()}
    if missing := sorted({*tables["weights"]} - {*tables["usual"]}):
        raise InputError(f"{where}, field usual: expected a number for {missing[0]!r}, found none")
    numbers = [raw.get(field) for field in ("slope", "offset")]
    if not all(map(_finite, numbers)):
        raise InputError(f"{where}: expected numbers as slope and offset, found {numbers}")
    slope, offset = (float(number) for number in numbers)  # type: ignore[arg-type]
    return Fusion(tables["weights"], tables["usual"], slope, offset)


def _finite(value: object) -> bool:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    return number and math.isfinite(value)  # type: ignore[arg-type]


def fit(pairs: Sequence[Pair], cosines: Cosines | None = None) -> Fusion:
    """Weigh the instruments on training pairs; with `cosines` the style similarity is one."""
    assert pairs, "expected training pairs"
    names = [*FACTOR_NAMES, NGRAMS, *([STYLE] if cosines is not None else [])]
    table = np.empty((len(pairs), 2, len(names)))  # of chosen and rejected
    for i, pair in enumerate(pairs):
        texts = [pair.chosen, pair.rejected]
        alike = [None, None] if cosines is None else cosines(pair.exemplars, texts)
        for side, (text, cosine) in enumerate(zip(texts, alike, strict=True)):
            found = _distances(pair.exemplars, text, cosine)
            table[i, side] = [found[name] for name in names]
    known = np.isfinite(table)
    seen = np.maximum(known.sum((0, 1)), 1)
    usual = np.where(known, table, 0.0).sum((0, 1)) / seen  # (k,)
    table = np.where(known, table, usual)
    gaps = table[:, 1] - table[:, 0]  # (pairs, k)
    unit = np.ones(len(names))  # z is one already; the ridge must not see how small cosines are
    cosine_like = slice(len(FACTOR_NAMES), None)
    unit[cosine_like] = np.maximum(np.sqrt((gaps[:, cosine_like] ** 2).mean(0)), LEAST_UNIT)
    weights = logistic(gaps / unit) / unit
    slope, offset = _sigmoid_of(-(table @ weights))
    values = dict(zip(names, weights.tolist(), strict=True))
    return Fusion(values, dict(zip(names, usual.tolist(), strict=True)), slope, offset)


def _sigmoid_of(scores: NDArray[np.float64]) -> tuple[float, float]:
    """scores (pairs, 2) of chosen and rejected -> a, b with σ(a · s + b) for chosen (Platt)."""
    middle, spread = float(scores.mean()), float(scores.std()) or 1.0
    one = np.stack([(scores - middle) / spread, np.ones_like(scores)], -1)  # (pairs, 2, 2)
    slope, offset = logistic(np.concatenate([one[:, 0], -one[:, 1]]))
    return float(slope) / spread, float(offset - slope * middle / spread)


def judge(fusion: Fusion, cosines: Cosines | None = None) -> Score:
    """A judge of `opinions.py` that has nothing but the fused instruments."""

    def score(exemplars: Sequence[str], question: str, candidates: Sequence[str]) -> list[float]:
        alike = [None] * len(candidates) if cosines is None else cosines(exemplars, candidates)
        return [
            fusion.score(exemplars, text, cosine)
            for text, cosine in zip(candidates, alike, strict=True)
        ]

    return score


def _distances(exemplars: Sequence[str], text: str, cosine: float | None) -> dict[str, float]:
    """By instrument; NaN where it cannot be measured."""
    found = dict(zip(FACTOR_NAMES, factor_distances(exemplars, text), strict=True))
    found[NGRAMS] = -ngram_similarity(exemplars, text)
    found[STYLE] = math.nan if cosine is None else -cosine
    return found
