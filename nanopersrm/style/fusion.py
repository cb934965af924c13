"""Fusion: all instruments in one number, the chance that a text is by the writer.

No instrument is good everywhere: character n-grams notice that three words were swapped, factors
that sentences were joined, the style similarity which person it is. Each gives a distance between
exemplars and candidate, and a regression on training pairs says how much each is worth:

    s(candidate)  = - Σ w · distance       w by logistic regression on s(chosen) - s(rejected)
    chance        = σ(a · s + b)           a, b on chosen and rejected texts one by one

The distances are |z difference| of each factor (`profile.py`), minus the character n-gram
similarity and, with a model at hand, minus the cosine of pooled states (`style.py`). The chance is
for a reader who has seen as many texts by the writer as rejected ones; it is shown as whole
percent, 1 to 99. Fusing scores rather than features is what speaker verification does (Brümmer and
du Preez, Computer Speech & Language 20, 2006); w, a and b are the same regression twice
(`baselines.logistic`).

Worked example: w = (2, 1), distances (0.5, -0.8) give s = -0.2; with a = 1, b = 0.2 that is even.

How it works. A regression knows the pairs it was fitted on too well: of 100 pairs 95 % were right
where it was 77 % of pairs by other writers. So writers are dealt into FOLDS by a hash of their
name, and w is found once more without each fold. What these say of the writers whom they have not
seen gives a and b, and `loss`: nats a pair, 0.69 for a guess. They are kept (`apart`), since a
model that learns from the same pairs must see the chance as it is of strangers, or it trusts it too
much.

A distance that a text cannot show counts as the mean of the training pairs. `usual` holds those.

What we left out: products of instruments, and weights by kind of text. A chance alone tells less
than two side by side (0.67 nats a text, 0.4 to 0.5 a pair): it knows nothing of how hard a writer
is. Read next: `similarity.py`.
"""

import hashlib
import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from nanopersrm import InputError
from nanopersrm.evaluate.predictions import Score
from nanopersrm.pairs import Pair
from nanopersrm.style.baselines import Array, factor_distances, logistic
from nanopersrm.style.features import FACTORS
from nanopersrm.style.profile import ngram_similarity

FACTOR_NAMES = tuple(factor.name for factor in FACTORS)
NGRAMS, STYLE = "n-grams", "style"  # beside the factors
LEAST_UNIT = 1e-9  # of cosines that are all the same
FOLDS = 5
GUESS = math.log(2)  # nats a pair

# (exemplars, texts) -> the cosine of each text with the writer
Cosines = Callable[[Sequence[str], Sequence[str]], list[float]]


@dataclass(frozen=True)
class Fusion:
    """What each instrument is worth; all instruments that it knows, by name."""

    weights: dict[str, float]  # w, of distances in their own units
    usual: dict[str, float]  # the distance that stands in for one that cannot be measured
    slope: float  # a
    offset: float  # b
    loss: float | None = None  # nats a pair by writers held out; None: not measured
    apart: tuple["Fusion", ...] = ()  # by fold: without the pairs of its writers

    def unseen_by(self, writer: str) -> "Fusion":
        """The fusion that was fitted without this writer of the training pairs."""
        return self.apart[fold_of(writer)] if self.apart else self

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
        return {**vars(self), "apart": [fusion.facts() for fusion in self.apart]}


def fold_of(writer: str) -> int:
    """The fold of a writer: the same on every machine."""
    return hashlib.sha256(writer.encode()).digest()[0] % FOLDS


def of_facts(raw: object, where: str) -> Fusion:
    """The inverse of `facts`, checked; `where` names the file in errors."""
    if not isinstance(raw, dict):
        raise InputError(f"{where}: expected a table of weights, found {raw!r:.40}")
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
        raise InputError(f"{where}: expected numbers as slope and offset, found {numbers!r:.80}")
    slope, offset = map(float, numbers)  # type: ignore[arg-type]
    if (loss := raw.get("loss")) is not None and not _finite(loss):
        raise InputError(f"{where}, field loss: expected a number, found {loss!r:.40}")
    folds = raw.get("apart", [])  # adapters of before have neither
    if not isinstance(folds, list) or len(folds) not in (0, FOLDS):
        raise InputError(f"{where}, field apart: expected {FOLDS} fusions or none")
    apart = tuple(of_facts(one, f"{where}, field apart, {i + 1}") for i, one in enumerate(folds))
    return Fusion(tables["weights"], tables["usual"], slope, offset, loss, apart)


def _finite(value: object) -> bool:
    """A number that a float can hold."""
    number = isinstance(value, int | float) and not isinstance(value, bool)
    return number and abs(value) <= sys.float_info.max  # type: ignore[arg-type]


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
    author = {pair.id: pair.author for pair in pairs}
    asked = np.array([fold_of(pair.author) for pair in pairs])  # (pairs,)
    shown = np.array([fold_of(author.get(pair.twin, pair.author)) for pair in pairs])
    folds = []
    apart = np.full(table.shape[:2], np.nan)  # how far texts of writers held out are above usual
    for fold in range(FOLDS):
        known = (asked != fold) & (shown != fold)
        weights, usual = _weighed(table[known])
        folds.append((weights, usual))
        if known.any():
            held_out = np.where(np.isfinite(table), table, usual)[asked == fold]
            apart[asked == fold] = -((held_out - usual) @ weights)
    apart = apart[np.isfinite(apart[:, 0])]
    slope, middle = _sigmoid_of(apart) if len(apart) else (0.0, 0.0)
    loss = float(np.logaddexp(0, apart[:, 1] - apart[:, 0]).mean()) if len(apart) else GUESS

    def made(weights: Array, usual: Array) -> Fusion:
        offset = middle + slope * float(usual @ weights)  # s of a usual text is minus the last
        values = dict(zip(names, weights.tolist(), strict=True))
        return Fusion(values, dict(zip(names, usual.tolist(), strict=True)), slope, offset)

    return replace(made(*_weighed(table)), loss=loss, apart=tuple(made(*one) for one in folds))


def _weighed(table: Array) -> tuple[Array, Array]:
    """table (pairs, 2, k) of chosen and rejected -> w (k,) and the usual distances (k,)."""
    known = np.isfinite(table)
    usual = np.where(known, table, 0.0).sum((0, 1)) / np.maximum(known.sum((0, 1)), 1)  # (k,)
    table = np.where(known, table, usual)
    gaps = table[:, 1] - table[:, 0]  # (pairs, k)
    # z is in units already; of cosines the ridge must not see how small they are.
    unit = np.ones(table.shape[-1])
    cosine_like = slice(len(FACTOR_NAMES), None)
    if len(gaps):
        unit[cosine_like] = np.maximum(np.sqrt((gaps[:, cosine_like] ** 2).mean(0)), LEAST_UNIT)
    return logistic(gaps / unit) / unit, usual


def _sigmoid_of(scores: Array) -> tuple[float, float]:
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
