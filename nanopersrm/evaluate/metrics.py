"""Metrics: from one record a pair to numbers with intervals.

A record says how a judge did on one pair: right, wrong, tie or invalid. Over all records:

    pair_accuracy         share of right; a tie and an invalid are wrong (strict)
    lenient_accuracy      a tie is half right, an invalid is left out
    twin_accuracy         share of couples of twins of which both are right; chance is 25 %
    swap_gap              mean of [p right] - [twin of p wrong] over couples; see below
    no_exemplar_accuracy  share of right when a neutral text takes the place of the exemplars
    order_consistency     share of pairs where both orders named the same text; pairwise only
    invalid_rate, tie_rate
    ece                   10 bins of confidence c = max(p, 1 - p): Σ |Σ c - Σ right| / n
    brier                 mean of (1 - p)², p the probability given to the chosen text: 0.25 at ½
    length_correlation    Pearson's r of score gap and length gap, each pair taken both ways round

**The swap.** A pair p under the exemplars of its twin is exactly the twin: same two texts, other
writer, opposite label. So p's label is "right" under swapped exemplars whenever the twin was judged
wrong, and swap_gap = accuracy with the right exemplars - accuracy with the wrong ones. It is 1 for
an oracle and 0 for whoever does not read the exemplars: what it gets right on p it gets wrong on
the twin. On whole twins without ties and invalids it is 2 · pair_accuracy - 1.

**No exemplar.** Pair and twin then get the same verdict, so on whole twins the number is 50 % for
any judge, less what was tied or invalid. Anything else means that twins are missing.

**Intervals.** Pairs by one author are not independent, so whole authors are drawn with replacement,
1,000 times, and the middle 95 % is reported. A pair belongs to the author of its exemplars. A
couple may be of two authors; it counts once, with the pair whose id comes first: under both it
would be drawn as if it were two. Authors are few, and the interval is rather too narrow: of 400
simulated sets of independent couples, half of them between authors, it missed the truth in 11 %
with 100 couples of ten authors and in 10 % with 80 of twenty, where 5 % is meant (with each couple
under both authors in 17 and 14 %). That an author comes again in other couples is not modelled.
Each metric is a function of sums over records, so a draw of authors is one product of counts with
the authors' sums. Worked example: author x has 2 of 2 right, y has 1 of 4. Accuracy is 3/6; drawing
(x, x) gives 4/4, (y, y) gives 2/8.

What we left out. The weight of a pair is for training; here every pair counts once. Probabilities
of invalid opinions do not exist, so ece and brier are of the others; invalid_rate stands beside.
What cannot be computed is None.
"""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from nanopersrm.evaluate.predictions import Opinion
from nanopersrm.pairs import Pair

RESAMPLES = 1000
BINS = 10  # of confidence, from 0.5 to 1
MIDDLE = (2.5, 97.5)  # percent
KEYS = (  # of a result, in this order, before the groups
    "pair_accuracy",
    "twin_accuracy",
    "swap_gap",
    "no_exemplar_accuracy",
    "order_consistency",
    "invalid_rate",
    "ece",
    "brier",
    "n",
)
MORE = ("lenient_accuracy", "tie_rate", "length_correlation")
GROUPS = ("kind", "domain", "exemplars")

Said = Literal["right", "wrong", "tie", "invalid"]
Array = NDArray[np.float64]
Value = Callable[[Array], Array]  # (..., k) sums -> (...) values
Column = tuple[Array, Value]  # (n, k) what to sum over records, and the function of the sums


@dataclass(frozen=True)
class Record:
    """How a judge did on one pair."""

    id: str
    twin: str
    author: str  # of the exemplars
    domain: str
    kind: str
    exemplars: int  # that were shown
    said: Said
    length_gap: float  # words of the chosen - words of the rejected
    score_gap: float | None = None  # score of the chosen - score of the rejected
    preference: float | None = None  # P(the chosen fits better)
    agrees: bool | None = None  # both orders named the same text
    neutral: Said | None = None  # with a neutral text in place of the exemplars


def said_of(opinion: Opinion, chosen: int) -> Said:
    """What an opinion is worth when the text of index `chosen` is the right one."""
    if opinion.verdict in ("tie", "invalid"):
        return "tie" if opinion.verdict == "tie" else "invalid"
    return "right" if opinion.verdict == chosen else "wrong"


def record(
    pair: Pair, chosen: int, exemplars: int, opinion: Opinion, neutral: Opinion | None = None
) -> Record:
    """An opinion of the two texts of a pair, `chosen` being the index of the right one."""
    gap = preference = None
    if opinion.scores is not None:
        gap = opinion.scores[chosen] - opinion.scores[1 - chosen]
    if opinion.preference is not None:
        preference = opinion.preference if chosen == 0 else 1 - opinion.preference
    return Record(
        id=pair.id,
        twin=pair.twin,
        author=pair.author,
        domain=pair.domain,
        kind=pair.kind,
        exemplars=exemplars,
        said=said_of(opinion, chosen),
        length_gap=len(pair.chosen.split()) - len(pair.rejected.split()),
        score_gap=gap,
        preference=preference,
        agrees=opinion.agrees,
        neutral=None if neutral is None else said_of(neutral, chosen),
    )


def measure(records: Sequence[Record], seed: int = 0, resamples: int = RESAMPLES) -> dict[str, Any]:
    """All metrics of all records, and again of each group, as {"value", "low", "high"} each."""
    columns = _columns(records)
    clusters = np.array([cluster(r) for r in records])
    result = _numbers(columns, clusters, seed, resamples)
    for group in GROUPS:
        names = np.array([str(getattr(r, group)) for r in records])
        result[f"by_{group}"] = {
            str(name): _numbers(
                {metric: (x[names == name], value) for metric, (x, value) in columns.items()},
                clusters[names == name],
                seed,
                resamples,
            )
            for name in sorted(set(names.tolist()))
        }
    return result


def cluster(record: Record) -> str:
    """Whose pair it is: what is drawn for the intervals."""
    return f"{record.domain}\0{record.author}"


def share(values: Sequence[float | bool | None]) -> Column:
    """The mean of those that are there: sums of value and of one."""
    rows = [(0.0, 0.0) if v is None else (float(v), 1.0) for v in values]
    return np.array(rows, dtype=np.float64).reshape(-1, 2), _ratio


def _columns(records: Sequence[Record]) -> dict[str, Column]:
    """For each metric what to sum, and the function of the sums."""
    by_id = {r.id: r for r in records}
    twins = [by_id.get(r.twin) if r.id < r.twin else None for r in records]  # each couple once

    lenient = {"right": 1.0, "tie": 0.5, "wrong": 0.0, "invalid": None}
    couples = list(zip(records, twins, strict=True))
    sure = [r.preference for r in records]
    gaps = [(r.score_gap, r.length_gap) for r in records]
    products = [(0.0, 0.0, 0.0) if g is None else (g * n, g * g, n * n) for g, n in gaps]
    return {
        "pair_accuracy": share([r.said == "right" for r in records]),
        "twin_accuracy": share(
            [None if t is None else r.said == t.said == "right" for r, t in couples]
        ),
        "swap_gap": share(
            [None if t is None else (_swap(r, t) + _swap(t, r)) / 2 for r, t in couples]
        ),
        "no_exemplar_accuracy": share(
            [None if r.neutral is None else r.neutral == "right" for r in records]
        ),
        "order_consistency": share([r.agrees for r in records]),
        "invalid_rate": share([r.said == "invalid" for r in records]),
        "ece": (np.array([_binned(p) for p in sure]).reshape(-1, BINS + 1), _calibration_error),
        "brier": share([None if p is None else (1 - p) ** 2 for p in sure]),
        "lenient_accuracy": share([lenient[r.said] for r in records]),
        "tie_rate": share([r.said == "tie" for r in records]),
        "length_correlation": (np.array(products).reshape(-1, 3), _correlation),
    }


def _swap(pair: Record, twin: Record) -> int:
    """Right with the right exemplars, less right with those of the twin."""
    return (pair.said == "right") - (twin.said == "wrong")


def _binned(p: float | None) -> list[float]:
    """(BINS + 1,) confidence minus right in the bin of p, and 1; zeros where there is no p."""
    row = [0.0] * (BINS + 1)
    if p is not None:
        confidence = max(p, 1 - p)
        place = min(BINS - 1, int((confidence - 0.5) * 2 * BINS))
        row[place] = confidence - (0.5 if p == 0.5 else float(p > 0.5))
        row[BINS] = 1.0
    return row


def _ratio(sums: Array) -> Array:
    return sums[..., 0] / sums[..., 1]


def _calibration_error(sums: Array) -> Array:
    return np.abs(sums[..., :BINS]).sum(-1) / sums[..., BINS]


def _correlation(sums: Array) -> Array:
    return sums[..., 0] / np.sqrt(sums[..., 1] * sums[..., 2])


def _numbers(
    columns: dict[str, Column], clusters: NDArray[Any], seed: int, resamples: int
) -> dict[str, Any]:
    """The metrics of some records, in order, and their number."""
    found = intervals(columns, clusters, seed, resamples) | {"n": len(clusters)}
    return {key: found[key] for key in (*KEYS, *MORE)}


def intervals(
    columns: dict[str, Column], clusters: Sequence[str] | NDArray[Any], seed: int, resamples: int
) -> dict[str, Any]:
    """{"value", "low", "high"} of each; the records' clusters (n,) are drawn alike for all."""
    names, owner = np.unique(clusters, return_inverse=True)
    C = len(names)
    rng = np.random.default_rng(random.Random(f"{seed}/evaluate/bootstrap").getrandbits(64))
    counts = rng.multinomial(C, np.full(C, 1 / C), resamples) if C > 1 else None  # (resamples, C)
    found: dict[str, Any] = {}
    for metric, (x, value) in columns.items():
        sums = np.zeros((C, x.shape[1]))
        np.add.at(sums, owner, x)
        with np.errstate(invalid="ignore", divide="ignore"):
            drawn = None if counts is None else value(counts @ sums)
            found[metric] = _interval(float(value(x.sum(0))), drawn)
    return found


def _interval(value: float, drawn: Array | None) -> dict[str, float | None]:
    """What cannot be computed is None; a draw of authors that has nothing to average is skipped."""
    low = high = None
    if np.isfinite(value) and drawn is not None and np.isfinite(drawn).any():
        low, high = (float(x) for x in np.percentile(drawn[np.isfinite(drawn)], MIDDLE))
    return {"value": value if np.isfinite(value) else None, "low": low, "high": high}
