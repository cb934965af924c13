"""The reply's grammar, and what its digits are worth.

A reply is free reasoning and one line of scores, nothing else:

    <think>
    Short sentences, "no idea" twice. A keeps to that; B does not.
    </think>
    <scores>A=7 B=3</scores>

A score is one digit from 1 (another writer) to 9 (surely this writer). `parse` is *total*: any text
gives a `Verdict`, with scores or with the reason why not. The model does not only write a digit, it
has a probability for each of the nine. From these come

    the soft score        Σ d · p(d)                                  p = (0, …, 0, ½, ½): 8.5
    the preference        P(a > b) + ½ P(a = b)                       a beats b, ties half
"""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass

OPEN, CLOSE = "<think>\n", "</think>"
SCORES, SCORES_END = "<scores>", "</scores>"
LABELS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"  # of the candidates of one prompt, in order
DIGITS = range(1, 10)


@dataclass(frozen=True)
class Verdict:
    """What a reply says: scores by label, or why there are none."""

    reasoning: str  # the text between <think> and </think>, stripped; "" when there is none
    scores: dict[str, int] | None
    problem: str | None  # None: well formed


def parse(reply: str, labels: Sequence[str]) -> Verdict:
    """Read a reply that must score exactly these labels, in this order.

    >>> parse("<think>\\nTerse.\\n</think>\\n<scores>A=7 B=3</scores>", "AB").scores
    {'A': 7, 'B': 3}
    >>> parse("A is better.", "AB").problem
    'no <think>'
    """
    text = reply.strip()
    if not text.startswith("<think>"):
        return Verdict("", None, "no <think>")
    reasoning, closed, line = text.removeprefix("<think>").partition(CLOSE)
    reasoning, line = reasoning.strip(), line.strip()
    if not closed:
        return Verdict(reasoning, None, f"no {CLOSE}")
    digits = r"\s+".join(f"{label}=([1-9])" for label in labels)
    match = re.fullmatch(rf"{SCORES}\s*{digits}\s*{SCORES_END}", line)
    if match is None:
        return Verdict(reasoning, None, f"no {SCORES} of {''.join(labels)} only: {line[:40]!r}")
    return Verdict(reasoning, dict(zip(labels, map(int, match.groups()), strict=True)), None)


def write(reasoning: str, scores: dict[str, int]) -> str:
    """The reply that `parse` reads back: the form to imitate."""
    line = " ".join(f"{label}={digit}" for label, digit in scores.items())
    return f"{OPEN}{reasoning.strip()}\n{CLOSE}\n{SCORES}{line}{SCORES_END}"


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
