"""The score line of a reply, and what its digits are worth.

    <think>
    r reading +0.11, "the chain was dry": +6.1
    . sum +06.1
    </think>
    <scores>A=7</scores>

A score is one digit from 1 (another writer) to 9 (surely this writer). The model does not only draw
a digit, it has a probability for each of the nine. From these come

    the soft score        Σ d · p(d)                                  p = (0, …, 0, ½, ½): 8.5
    the preference        P(a > b) + ½ P(a = b)                       a beats b, ties half
"""

import math
from collections.abc import Sequence

OPEN, CLOSE = "<think>\n", "</think>"
SCORES, SCORES_END = "<scores>", "</scores>"
LABELS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"  # of the candidates of one prompt, in order
DIGITS = range(1, 10)


def closing(free: str) -> tuple[str, str]:
    """What was written after OPEN -> (the reasoning, what must follow up to the first digit).

    >>> closing("Terse.\\n</think>")
    ('Terse.', '\\n<scores>A=')
    >>> closing("Terse.")
    ('Terse.', '\\n</think>\\n<scores>A=')
    """
    thought, closed, after = free.partition(CLOSE)
    line = f"{SCORES}{LABELS[0]}="
    if closed:
        return thought.strip(), line if after.endswith("\n") else f"\n{line}"
    gap = "" if not free or free.endswith("\n") else "\n"
    return thought.strip(), f"{gap}{CLOSE}\n{line}"


def soft_score(digits: Sequence[float]) -> float:
    """p(1), …, p(9) -> the expected digit, from 1 to 9."""
    return math.fsum(d * p for d, p in zip(DIGITS, digits, strict=True))


def beats(first: Sequence[float], second: Sequence[float]) -> float:
    """P(a > b) + ½ P(a = b) for two independent digits.

    >>> beats([0] * 8 + [1], [0.5] + [0] * 7 + [0.5])
    0.75
    """
    return beats_jointly([[p * q for q in second] for p in first])


def beats_jointly(joint: Sequence[Sequence[float]]) -> float:
    """The same from joint[a - 1][b - 1] = p(a, b), when b's digit was written after a's."""
    wins = math.fsum(p for a, row in enumerate(joint) for b, p in enumerate(row) if a > b)
    ties = math.fsum(row[a] for a, row in enumerate(joint))
    return wins + ties / 2


def mean(rows: Sequence[Sequence[float]], count: int | None = None) -> list[float]:
    """Column sums of equally long rows over `count`, by default the number of rows."""
    count = len(rows) if count is None else count
    return [math.fsum(column) / count for column in zip(*rows, strict=True)]
