"""Paired: two judges on the same pairs, pair by pair.

Two accuracies may differ clearly although their intervals overlap: what is hard for one judge is
mostly hard for the other, and that part of the chance cancels when they are compared pair by pair.
So, for the first judge of an evaluation against each of the others:

    won, lost   pairs that only the first has right, and pairs that only the other has right; a tie
                or an invalid opinion is not right
    difference  share right of the first - share right of the other = (won - lost) / n, with an
                interval over authors, who are drawn as in `metrics.py`
    p           of the sign test, exact and two-sided: were either as likely to be the one that is
                right, how often would won and lost lie so far apart or further?
                p = min(1, 2 · Σ_{i ≤ min(won, lost)} C(n, i) / 2ⁿ), n = won + lost

The same for couples of twins, of which "right" means both right. Worked example: 4 won, 1 lost:
2 · (C(5,0) + C(5,1)) / 32 = 12/32 = 0.375, which is nothing to speak of; 8 and 2 give 0.109, 16 and
4 give 0.012.

Which to believe. The sign test takes what it counts for independent. A pair and its twin are not,
so the couples are the number to look at. The interval knows that authors differ, but authors are
few, so it is rather too narrow, and where one side won nothing it cannot reach past zero. Where the
two disagree, what was found is not sure. Of many comparisons of equal judges up to one in twenty
has p < 0.05.

What we left out. Tests that use how far scores lie apart.
"""

from collections.abc import Sequence
from typing import Any

from nanopersrm.evaluate.metrics import RESAMPLES, Record, cluster, intervals, share


def paired(
    one: Sequence[Record], other: Sequence[Record], seed: int = 0, resamples: int = RESAMPLES
) -> dict[str, Any]:
    """{"pairs", "twins"}: {"won", "lost", "p", "difference": {"value", "low", "high"}}.

    p and the difference are None where nothing was compared, such as couples without twins.
    one, other: of the same pairs in the same order. ValueError: they are not.
    """
    if [r.id for r in one] != [r.id for r in other]:
        raise ValueError("expected two judges' records of the same pairs in the same order")
    first, second = ({r.id: r.said == "right" for r in records} for records in (one, other))
    gaps: dict[str, list[int | None]] = {
        "pairs": [first[r.id] - second[r.id] for r in one],
        "twins": [  # each couple once
            (first[r.id] and first[r.twin]) - (second[r.id] and second[r.twin])
            if r.id < r.twin and r.twin in first
            else None
            for r in one
        ],
    }
    columns = {name: share(own) for name, own in gaps.items()}
    found = intervals(columns, [cluster(r) for r in one], seed, resamples)
    counted = {name: _counted(own) for name, own in gaps.items()}
    return {name: counted[name] | {"difference": found[name]} for name in gaps}


def _counted(gaps: Sequence[int | None]) -> dict[str, int | float | None]:
    won, lost = gaps.count(1), gaps.count(-1)
    none = all(gap is None for gap in gaps)
    return {"won": won, "lost": lost, "p": None if none else sign_test(won, lost)}


def sign_test(won: int, lost: int) -> float:
    """The exact two-sided p of `won` against `lost`; 1 where there is nothing to compare."""
    n = won + lost
    ways = total = 1  # C(n, i), and the sum of them so far
    for i in range(1, min(won, lost) + 1):
        ways = ways * (n - i + 1) // i
        total += ways
    return min(1.0, 2 * total / 2**n)
