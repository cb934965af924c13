"""The curriculum: which pairs a step of reinforcement draws replies to, from easy to hard.

A group of replies teaches where some do better than others. What is far too hard gives eight wrong
ones, what is far too easy eight right ones. So the first steps take what the model already does
best, and the last ones what it does worst:

    window     the next W · n couples (a pair and its twin) of the epoch, which is shuffled
    estimate   of each: its own success when it was last drawn, else the mean of its kind so far,
               beginning at a half
    taken      of the window, the easiest first, n in a row: from place t · (W · n - n), rounded,
               where t goes from 0 at the first step to 1 at the last

Worked example: W = 4, n = 1, estimates 0.9 0.4 0.7 0.5. At the first step 0.9 is taken, half way
0.5 (place 1.5 rounds to 2 of 0.9 0.7 0.5 0.4), at the last 0.4. The others are passed over until
the next epoch. With W = 1 every couple comes as it stands.

Success is the mean reward for the right order, 0.5 by chance, however the couple was judged last.
What is drawn depends on it, and it on the replies; so it belongs to the checkpoint, with the place
in the row of epochs (`facts`). A couple that was found too long for a prompt does not come again.
"""

import math
import random
from collections.abc import Mapping, Sequence
from typing import Any

from nanopersrm import InputError
from nanopersrm.pairs import Pair, couples

Couple = tuple[Pair, ...]  # a pair, and its twin if it is there


class Curriculum:
    """The couples of the training pairs, and how well each was done."""

    def __init__(self, pairs: Sequence[Pair], window: int, seed: int):
        if window < 1:
            raise InputError(f"--window: expected a number from 1, got {window}")
        self.couples = couples([pair for pair in pairs if pair.weight > 0])
        if not self.couples:
            raise InputError(
                f"pairs: expected some with a weight above 0, found {len(pairs)} with 0"
            )
        self.window, self.seed = window, seed
        self.cursor = 0  # couples of the row of epochs that were looked at
        self.own: dict[str, float] = {}  # id of the first pair -> success when last drawn
        self.kinds: dict[str, tuple[float, int]] = {}  # sum of successes, couples
        self.out: set[str] = set()  # ids of the first pairs of couples that are too long
        self._epoch, self._order = -1, list[int]()

    def draw(self, count: int, progress: float) -> list[Couple]:
        """The next `count` couples, at `progress` 0 (first step) to 1 (last)."""
        assert len(self.out) < len(self.couples), "every couple was left out"
        look = [self._next() for _ in range(count * self.window)]
        look.sort(key=lambda couple: -self.estimate(couple))  # stable
        first = math.floor(progress * (len(look) - count) + 0.5)
        return look[first : first + count]

    def estimate(self, couple: Couple) -> float:
        """The share of right answers that is to be expected, 0 to 1."""
        total, seen = self.kinds.get(couple[0].kind, (0.0, 0))
        return self.own.get(couple[0].id, (total + 0.5) / (seen + 1))

    def learn(self, couple: Couple, success: float) -> None:
        """What came of a couple that was drawn: the mean reward for the right order."""
        total, seen = self.kinds.get(couple[0].kind, (0.0, 0))
        self.kinds[couple[0].kind] = (total + success, seen + 1)
        self.own[couple[0].id] = success

    def leave_out(self, couple: Couple) -> None:
        """Never draw this couple again. When none is left, `draw` must not be called."""
        self.out.add(couple[0].id)

    def facts(self) -> dict[str, Any]:
        """For a checkpoint."""
        kinds = {kind: list(both) for kind, both in self.kinds.items()}
        out = sorted(self.out)
        return {"cursor": self.cursor, "own": dict(self.own), "kinds": kinds, "out": out}

    def restore(self, facts: Mapping[str, Any]) -> None:
        """The inverse of `facts`."""
        self.cursor, self.own = facts["cursor"], dict(facts["own"])
        self.out = set(facts["out"])
        self.kinds = {kind: (total, seen) for kind, (total, seen) in facts["kinds"].items()}

    def _next(self) -> Couple:
        while True:
            epoch, place = divmod(self.cursor, len(self.couples))
            if epoch != self._epoch:
                self._epoch, self._order = epoch, list(range(len(self.couples)))
                random.Random(f"{self.seed}/couples/{epoch}").shuffle(self._order)
            self.cursor += 1
            couple = self.couples[self._order[place]]
            if couple[0].id not in self.out:
                return couple
