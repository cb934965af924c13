"""Metrics: from one record a pair to numbers with intervals over writers; two judges compared.

    pair_accuracy     share of right; a tie and an invalid verdict are wrong
    twin_accuracy     share of twin pairs of which both are right; chance is 25 %
    couple_accuracy   share of twin pairs whose margins add up to more than 0; chance is 50 %
    swap_gap          pair accuracy, less that of pairs judged with the exemplars of their twins
    invalid_rate
    ece               10 bins of confidence c = max(p, 1 - p): Σ |Σ c - Σ right| / n
    brier             mean of (1 - p)², p the probability of the chosen text: 0.25 at ½

A pair with the exemplars of its twin is the twin, with the opposite label. So swap_gap is the mean
of [right] - [twin wrong]: 1 for an oracle, 0 for who does not read the exemplars.

A margin is the score of the chosen text less that of the other. Margins of twins add up to s[1,1] +
s[2,2] - s[1,2] - s[2,1]: what a text is scored whoever wrote the exemplars cancels. So the distance
of pair accuracy to couple accuracy is what a better baseline could still win.

**Intervals.** Pairs of one author are not independent, so whole authors are drawn with replacement,
1,000 times, and the middle 95 % is reported. A pair belongs to the author of its exemplars, twin
pairs to the author of the one whose id comes first. Each metric is a function of sums over records,
so a draw is one product of counts and the authors' sums. With few authors intervals are narrow.

**Two judges** are compared pair by pair, since what is hard for one is mostly hard for the other.
won and lost are pairs that only the first, or only the second, has right; p is that of the exact
two-sided sign test: 4 and 1 give 2 · (1 + 5) / 2⁵. Twins are not independent: count them as one.
"""

import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from nanopersrm.evaluate.judges import Prediction
from nanopersrm.pairs import Pair

RESAMPLES = 1000
BINS = 10  # of confidence, from 0.5 to 1
MIDDLE = (2.5, 97.5)  # percent
GROUPS: dict[str, Callable[[Pair], str]] = {
    "kind": lambda pair: pair.kind,
    "domain": lambda pair: pair.domain,
    "exemplars": lambda pair: str(len(pair.exemplars)),  # that were shown
}

Outcome = Literal["right", "wrong", "tie", "invalid"]
Array = NDArray[np.float64]
Metric = tuple[Array, Callable[[Array], Array]]  # (n, k) summands; (..., k) sums -> (...) values


@dataclass(frozen=True)
class Record:
    """How a judge did on one pair."""

    pair: Pair
    outcome: Outcome
    preference: float | None = None  # P(the chosen fits better)
    margin: float | None = None  # the score of the chosen less that of the other


def record(pair: Pair, chosen: int, prediction: Prediction) -> Record:
    """A prediction for the two texts of a pair; `chosen` is the index of the right one."""
    p, verdict = prediction.preference, prediction.verdict
    right: Outcome = "right" if verdict == chosen else "wrong"
    outcome = right if isinstance(verdict, int) else verdict
    margin = None
    if prediction.scores is not None:
        margin = prediction.scores[chosen] - prediction.scores[1 - chosen]
    return Record(pair, outcome, p if p is None or chosen == 0 else 1 - p, margin)


def measure(records: Sequence[Record], seed: int = 0, resamples: int = RESAMPLES) -> dict[str, Any]:
    """All metrics of all records, and again of each group, as {"value", "low", "high"} each."""
    metrics, authors = _metrics(records), _authors(records)
    result = intervals(metrics, authors, seed, resamples) | {"n": len(records)}
    for group, value_of in GROUPS.items():
        values = np.array([value_of(r.pair) for r in records])
        result[f"by_{group}"] = by_value = {}
        for value in sorted(set(values.tolist())):
            here = values == value
            some = {name: (x[here], of_sums) for name, (x, of_sums) in metrics.items()}
            numbers = intervals(some, authors[here], seed, resamples)
            by_value[value] = numbers | {"n": int(here.sum())}
    return result


def compare(
    first: Sequence[Record], second: Sequence[Record], seed: int = 0, resamples: int = RESAMPLES
) -> dict[str, Any]:
    """{"pairs", "twins"}: {"won", "lost", "p", "difference": {"value", "low", "high"}}.

    Of two judges' records of the same pairs in the same order; None: there is nothing to compare.
    """
    if [r.pair.id for r in first] != [r.pair.id for r in second]:
        raise ValueError("expected two judges' records of the same pairs in the same order")
    gaps = {
        name: [None if x is None or y is None else x - y for x, y in zip(ours, theirs, strict=True)]
        for (name, ours), theirs in zip(_right(first).items(), _right(second).values(), strict=True)
    }
    means = {name: _mean(gap) for name, gap in gaps.items()}
    differences = intervals(means, _authors(first), seed, resamples)
    return {
        name: {
            "won": (won := gap.count(1)),
            "lost": (lost := gap.count(-1)),
            "p": None if all(g is None for g in gap) else sign_test(won, lost),
            "difference": differences[name],
        }
        for name, gap in gaps.items()
    }


def sign_test(won: int, lost: int) -> float:
    """The exact two-sided p of `won` against `lost`; 1 where there is nothing to compare."""
    n = won + lost
    return min(1.0, 2 * sum(math.comb(n, i) for i in range(min(won, lost) + 1)) / 2**n)


def intervals(
    metrics: dict[str, Metric], authors: NDArray[Any], seed: int, resamples: int
) -> dict[str, Any]:
    """{"value", "low", "high"} of each metric, None where there is nothing to average. authors (n,)
    are those of the records, drawn for all metrics alike."""
    names, author = np.unique(authors, return_inverse=True)
    A = len(names)
    rng = np.random.default_rng(random.Random(f"{seed}/evaluate/bootstrap").getrandbits(64))
    counts = rng.multinomial(A, np.full(A, 1 / A), resamples) if A > 1 else np.zeros((0, A))
    result: dict[str, Any] = {}
    for metric, (x, of_sums) in metrics.items():
        sums = np.zeros((A, x.shape[1]))
        np.add.at(sums, author, x)
        with np.errstate(invalid="ignore", divide="ignore"):
            number, draws = float(of_sums(x.sum(0))), of_sums(counts @ sums)  # (resamples,)
        edges: list[float | None] = [None, None]
        if math.isfinite(number) and len(draws := draws[np.isfinite(draws)]):
            edges = np.percentile(draws, MIDDLE).tolist()
        value = number if math.isfinite(number) else None
        result[metric] = {"value": value, "low": edges[0], "high": edges[1]}
    return result


def _authors(records: Sequence[Record]) -> NDArray[Any]:
    """An author of the same name in another domain is another."""
    return np.array([f"{r.pair.domain}\0{r.pair.author}" for r in records])


def _right(records: Sequence[Record]) -> dict[str, list[float | None]]:
    """Whether each pair is right, and whether it and its twin are: once, None at the other."""
    right = {r.pair.id: float(r.outcome == "right") for r in records}
    names = [(r.pair.id, r.pair.twin) for r in records]
    twins = [right[a] * right[b] if a < b and b in right else None for a, b in names]
    return {"pairs": [*right.values()], "twins": twins}


def _metrics(records: Sequence[Record]) -> dict[str, Metric]:
    """For each metric what to sum, and the function of the sums."""
    right = _right(records)
    worth = {r.pair.id: {"right": 0.5, "wrong": -0.5}.get(r.outcome, 0.0) for r in records}
    swaps = [
        None if both is None else worth[r.pair.id] + worth[r.pair.twin]
        for r, both in zip(records, right["twins"], strict=True)
    ]
    preferences = [r.preference for r in records]
    margins = {r.pair.id: r.margin for r in records}
    couples = [
        None if a is None or b is None or r.pair.id > r.pair.twin else float(a + b > 0)
        for r in records
        for a, b in [(r.margin, margins.get(r.pair.twin))]
    ]
    return {
        "pair_accuracy": _mean(right["pairs"]),
        "twin_accuracy": _mean(right["twins"]),
        "couple_accuracy": _mean(couples),
        "swap_gap": _mean(swaps),
        "invalid_rate": _mean([r.outcome == "invalid" for r in records]),
        "ece": (np.array([_bins(p) for p in preferences]).reshape(-1, BINS + 1), _error_of_bins),
        "brier": _mean([None if p is None else (1 - p) ** 2 for p in preferences]),
    }


def _mean(values: Sequence[float | bool | None]) -> Metric:
    """The mean of those that are there: sums of value and of one."""
    rows = [(0.0, 0.0) if v is None else (float(v), 1.0) for v in values]
    return np.array(rows, dtype=np.float64).reshape(-1, 2), lambda sums: sums[..., 0] / sums[..., 1]


def _bins(p: float | None) -> list[float]:
    """(BINS + 1,) confidence minus right in the bin of p, and 1; zeros where there is no p."""
    row = [0.0] * (BINS + 1)
    if p is not None:
        confidence = max(p, 1 - p)
        index = min(BINS - 1, int((confidence - 0.5) * 2 * BINS))
        row[index] = confidence - (0.5 if p == 0.5 else float(p > 0.5))
        row[BINS] = 1.0
    return row


def _error_of_bins(sums: Array) -> Array:
    return np.abs(sums[..., :BINS]).sum(-1) / sums[..., BINS]
