"""From comparisons of two to a ranking of many: whom to compare, and Bradley-Terry.

Bradley and Terry (Biometrika, 1952) give each candidate a strength s and say

    P(i beats j) = s[i] / (s[i] + s[j])

The strengths that explain the given preferences best are found by repeating (Hunter, Annals of
Statistics, 2004)

    s[i] <- wins[i] / Σ_j 1 / (s[i] + s[j])        wins[i] = Σ_j P(i beats j)

with sums over the pairs that were compared.

Worked example: two candidates, P = 0.75. Strengths in the ratio 3 : 1 reproduce it exactly (the
reference below draws them a little closer).

What we chose: up to 8 candidates every pair is compared. Above, candidate i meets i ± 1, 2, 4, 8, …
around a circle, N · ⌈log2 N⌉ pairs at most, which keeps everyone within a few steps of everyone
else. A half-weight draw against a reference of strength 1 keeps a candidate that always wins from
running away to infinity.
"""

import math

ALL_PAIRS_UP_TO = 8
PRIOR = 0.5  # weight of the draw against the reference
ROUNDS, CLOSE_ENOUGH = 2000, 1e-12


def schedule(n: int) -> list[tuple[int, int]]:
    """The pairs (i < j) to compare among n candidates, in a fixed order.

    >>> schedule(3)
    [(0, 1), (0, 2), (1, 2)]
    """
    if n <= ALL_PAIRS_UP_TO:
        return [(i, j) for i in range(n) for j in range(i + 1, n)]
    steps = [1 << k for k in range(n.bit_length()) if 1 << k <= n // 2]
    pairs = {(min(i, j), max(i, j)) for i in range(n) for j in ((i + step) % n for step in steps)}
    return sorted(pairs)


def bradley_terry(n: int, preferences: dict[tuple[int, int], float]) -> list[float]:
    """preferences[i, j] = P(i beats j), each pair once -> log strengths, around 0.

    >>> a, b = bradley_terry(2, {(0, 1): 0.5})
    >>> a == b
    True
    """
    wins = [PRIOR / 2] * n
    rivals: list[list[int]] = [[] for _ in range(n)]
    for (i, j), p in preferences.items():
        wins[i] += p
        wins[j] += 1 - p
        rivals[i].append(j)
        rivals[j].append(i)
    strengths = [1.0] * n
    for _ in range(ROUNDS):
        new = [
            wins[i]
            / (
                math.fsum(1 / (strengths[i] + strengths[j]) for j in rivals[i])
                + PRIOR / (strengths[i] + 1)
            )
            for i in range(n)
        ]
        moved = max(abs(math.log(a / b)) for a, b in zip(new, strengths, strict=True))
        strengths = new
        if moved < CLOSE_ENOUGH:
            break
    return [math.log(s) for s in strengths]


def preference(one: float, two: float) -> float:
    """P(one beats two) from log strengths."""
    return 1 / (1 + math.exp(two - one))
