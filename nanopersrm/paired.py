"""Paired: two judges on the same pairs, pair by pair.

Two accuracies may differ clearly although their intervals overlap: what is hard for one judge is
mostly hard for the other, and that part of the chance cancels when they are compared pair by pair.
So, for the first judge of an evaluation against each of the others:

    won, lost   pairs that only the first has right, and pairs that only the other has right
    difference  share right of the first - share right of the other = (won - lost) / n, with an
                interval over authors, who are drawn as in `metrics.py`
    p           of the sign test, exact and two-sided: were either as likely to be the one that is
                right, how often would won and lost lie so far apart or further?
                p = min(1, 2 · Σ_{i ≤ min(won, lost)} C(n, i) / 2ⁿ), n = won + lost

The same for couples of twins, of which "right" means both right. Worked example: 4 won, 1 lost:
2 · (C(5,0) + C(5,1)) / 32 = 12/32 = 0.375, which is nothing to speak of; 8 and 2 give 0.109, 16 and
4 give 0.012.

What we left out. The sign test takes pairs for independent. A pair and its twin are not, so the
couples are the number to look at; couples by one author are not quite either, so the interval
stands beside. Of many comparisons one in twenty has p < 0.05 by chance.

Where to read next: `scoreboard.py`, which prints it.
"""

from collections.abc import Sequence
from math import comb
from typing import Any

from nanopersrm.metrics import RESAMPLES, Record, cluster, intervals, share


def paired(
    one: Sequence[Record], other: Sequence[Record], seed: int = 0, resamples: int = RESAMPLES
) -> dict[str, Any]:
    """{"pairs", "twins"}: {"won", "lost", "p", "difference": {"value", "low", "high"}}.

    one, other: of the same pairs in the same order. ValueError: they are not.
    """
    if [r.id for r in one] != [r.id for r in other]:
        raise ValueError("expected two judges' records of the same pairs in the same order")
    first, second = ({r.id: r.said == "right" for r in records} for records in (one, other))
    pairs = {r.id: first[r.id] - second[r.id] for r in one}
    twins = {
        r.id: (first[r.id] and first[r.twin]) - (second[r.id] and second[r.twin])
        for r in one
        if r.twin in first
    }
    gaps = {"pairs": pairs, "twins": twins}
    columns = {name: share([own.get(r.id) for r in one]) for name, own in gaps.items()}
    found = intervals(columns, [cluster(r) for r in one], seed, resamples)
    once = [twins[r.id] for r in one if r.id in twins and r.id < r.twin]  # each couple
    return {
        name: _counted(signs) | {"difference": found[name]}
        for name, signs in (("pairs", list(pairs.values())), ("twins", once))
    }


def _counted(signs: Sequence[int]) -> dict[str, int | float]:
    won, lost = signs.count(1), signs.count(-1)
    return {"won": won, "lost": lost, "p": sign_test(won, lost)}


def sign_test(won: int, lost: int) -> float:
    """The exact two-sided p of `won` against `lost`; 1 where there is nothing to compare."""
    n = won + lost
    return min(1.0, 2 * sum(comb(n, i) for i in range(min(won, lost) + 1)) / 2**n)
