"""What is particular about a writer, against many others, in numbers and in words.

With the table that `reference.py` has measured on some 250 authors a number gets a meaning:

    z           = (root of the value - root_mean) / root_sd, cut at 4 on both sides
    reliability = variance between authors / total variance, both inside one domain
    salience    = |z| x reliability: how far from the others, times how far that can be trusted

Worked number: 2.25 semicolons per 100 words has root 1.5; with root_mean 0.45 and root_sd 0.55 that
is z = 1.9. Two texts are compared by `factor_distance`, the mean |difference of z| weighted by
reliability, and by `ngram_similarity`, the cosine of 3- and 4-grams inside words, (1 + log count) x
idf. Texts are cut into even pieces, because the cosine grows with the length.
"""

import json
import math
from bisect import bisect_left, bisect_right
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from importlib.resources import files

from nanopersrm.style.features import COUNTED, FACTORS, PER_100, SENTENCE_SHARE, Factor, measure
from nanopersrm.style.text import FOLD

Z_LIMIT = 4.0  # one odd text must not drown all other factors
EXEMPLAR_WORDS = 150  # lengths for which the percentiles against strangers hold
CANDIDATE_WORDS = 100
GRAMS = (3, 4)
FIXED_CUTS = {"british": (34.0, 66.0)}  # where the quarters of the reference are no middle
# "few" is at least below the first number, "many" at least the second, whatever the reference says:
# where nobody uses a mark, one in a page is not yet many.
FLOORS = {PER_100: (0.35, 1.0), SENTENCE_SHARE: (5.0, 15.0)}
BY_NAME: dict[str, Factor] = {factor.name: factor for factor in FACTORS}


@dataclass(frozen=True)
class Stats:
    """One factor over the pieces of the reference."""

    mean: float
    sd: float
    root_mean: float  # mean and deviation of the square root, the scale of z
    root_sd: float
    seen: float  # share of pieces where the value is above 0
    reliability: float  # 0 to 1
    quantiles: Sequence[float]  # evenly spaced from the least to the greatest


@dataclass(frozen=True, eq=False)
class Reference:
    """What many writers do, and how alike two strangers of one domain are."""

    factors: dict[str, Stats]
    similarity: Sequence[float]  # quantiles of ngram_similarity between strangers
    distance: Sequence[float]  # quantiles of factor_distance between strangers
    idf: dict[str, float]  # of the commonest n-grams
    rare: float  # idf of all others

    def z(self, name: str, value: float) -> float:
        """How many deviations a value lies from the mean, on the root scale, cut at Z_LIMIT."""
        stats = self.factors[name]
        z = (math.sqrt(max(value, 0.0)) - stats.root_mean) / stats.root_sd
        return max(-Z_LIMIT, min(Z_LIMIT, z))


@dataclass(frozen=True)
class Trait:
    """One factor of a writer, set against the reference."""

    factor: str
    value: float
    z: float
    percentile: float  # among the writers of the reference
    salience: float
    phrase: str


@lru_cache(maxsize=1)
def reference() -> Reference:
    """The table shipped with the package."""
    raw = json.loads(files("nanopersrm.style").joinpath("factor_reference.json").read_text("utf-8"))
    return Reference(
        factors={name: Stats(**stats) for name, stats in raw["factors"].items()},
        similarity=raw["similarity"],
        distance=raw["distance"],
        idf=dict(zip(raw["grams"], raw["idf"], strict=True)),
        rare=raw["rare"],
    )


def percentile(quantiles: Sequence[float], value: float) -> float:
    """Percent of the reference below `value`; equals count half, linear between points."""
    steps = len(quantiles) - 1
    left, right = bisect_left(quantiles, value), bisect_right(quantiles, value)
    if left < right:  # on a point, or on a row of equal points
        return 50.0 * (left + right - 1) / steps
    if left == 0 or left == len(quantiles):
        return 0.0 if left == 0 else 100.0
    below, above = quantiles[left - 1], quantiles[left]
    return 100.0 * (left - 1 + (value - below) / (above - below)) / steps


def figure(value: float) -> str:
    """A value in a few characters: 0, 0.4, 2.7, 37."""
    if 0 < value < 0.05:
        return "under 0.1"
    return f"{value:.0f}" if value >= 9.95 or value == 0 else f"{value:.1f}"


def _level_word(name: str, value: float, against: Reference) -> str:
    """The word of a level: below the lower quarter, between, or from the upper quarter on."""
    factor, quantiles = BY_NAME[name], against.factors[name].quantiles
    counted = factor.words == COUNTED
    if counted and value == 0:
        return factor.words[0]
    quarter = (len(quantiles) - 1) // 4
    low, high = FIXED_CUTS.get(name, (quantiles[quarter], quantiles[-1 - quarter]))
    if counted:
        floors = FLOORS.get(factor.unit, (0.0, 0.0))
        low, high = max(low, floors[0]), max(high, floors[1])
    return factor.words[-3 if value < low else -1 if value >= high else -2]


def level(name: str, value: float) -> str:
    """A value in words, true against the reference: "long sentences, about 31 words"."""
    factor = BY_NAME[name]
    words = f"{_level_word(name, value, reference())} {factor.noun or factor.label}"
    return words if factor.words == COUNTED else f"{words}, about {figure(value)} {factor.unit}"


def profile(texts: Sequence[str], top: int | None = None) -> list[Trait]:
    """The traits of a writer, most salient first; `top` keeps only so many."""
    against = reference()
    traits = []
    for name, value in measured(tuple(texts)).items():
        if value is None:
            continue
        factor, stats, z = BY_NAME[name], against.factors[name], against.z(name, value)
        phrase = level(name, value)
        if factor.words == COUNTED and value > 0:
            phrase += f" ({figure(value)} {factor.unit})"
        rank = percentile(stats.quantiles, value)
        traits.append(Trait(name, value, z, rank, abs(z) * stats.reliability, phrase))
    return sorted(traits, key=lambda trait: -trait.salience)[:top]


def grams(text: str) -> Counter[str]:
    """The 3- and 4-grams of the tokens of a text, each token with a blank on either side."""
    folded = text.translate(FOLD).lower().replace("—", " - ").replace("–", " - ")
    counts: Counter[str] = Counter()
    for token, times in Counter(folded.split()).items():
        padded = f" {token} "
        for n in GRAMS:
            for i in range(len(padded) - n + 1):
                counts[padded[i : i + n]] += times
    return counts


@lru_cache(maxsize=128)
def _direction(texts: tuple[str, ...], words: int, against: Reference) -> dict[str, float]:
    """Mean of the unit n-gram vectors of the texts, cut into even pieces of about `words` words.

    The dot product of two such means is the mean cosine over all pairs of pieces.
    """
    pieces: list[str] = []
    for text in texts:
        tokens = text.split()
        n = max(1, round(len(tokens) / words))
        pieces += [
            " ".join(tokens[i * len(tokens) // n : (i + 1) * len(tokens) // n]) for i in range(n)
        ]
    total: dict[str, float] = {}
    for piece in pieces:
        weights = {
            gram: (1.0 + math.log(count)) * against.idf.get(gram, against.rare)
            for gram, count in grams(piece).items()
        }
        norm = math.sqrt(sum(w * w for w in weights.values()))
        for gram, weight in weights.items():
            total[gram] = total.get(gram, 0.0) + weight / norm / len(pieces)
    return total


@lru_cache(maxsize=256)
def measured(texts: tuple[str, ...]) -> dict[str, float | None]:
    """`measure`, remembered: the exemplars of a call are measured once."""
    return measure(texts)


def ngram_similarity(
    exemplars: Sequence[str], candidate: str, against: Reference | None = None
) -> float:
    """Mean cosine of character n-grams between exemplars and candidate, 0 to 1."""
    against = against or reference()
    writer = _direction(tuple(exemplars), EXEMPLAR_WORDS, against)
    other = _direction((candidate,), CANDIDATE_WORDS, against)
    cosine = sum(weight * writer[gram] for gram, weight in other.items() if gram in writer)
    return min(1.0, max(0.0, cosine))


def measured_distance(
    writer: dict[str, float | None], other: dict[str, float | None], against: Reference
) -> float:
    """`factor_distance` of two measured texts; without a common factor, the median of strangers."""
    total = weights = 0.0
    for name, stats in against.factors.items():
        a, b = writer[name], other[name]
        if a is not None and b is not None:
            total += stats.reliability * abs(against.z(name, a) - against.z(name, b))
            weights += stats.reliability
    return total / weights if weights else against.distance[len(against.distance) // 2]


def factor_distance(exemplars: Sequence[str], candidate: str) -> float:
    """Reliability-weighted mean |z difference| over the factors both sides can be judged on."""
    return measured_distance(measured(tuple(exemplars)), measured((candidate,)), reference())
