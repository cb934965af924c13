"""Opinions: what a judge says of two candidates, and a file that remembers it.

Every judge is a function `score(exemplars, question, candidates)` that gives a number a candidate,
more for a better fit, or None. `opine` turns the numbers into an *opinion*:

    verdict      index of the text that fits better, "tie" (equal scores), or "invalid" (None)
    preference   P(the first fits better), where the judge has a probability; a cosine is none

Nothing stands in for what was not said: an invalid opinion has no scores and no preference.

A run over thousands of pairs takes hours and can be interrupted. `Opinions` appends each opinion to
a JSON-lines file under a key, the SHA-256 of the judge's settings and of all texts shown. What was
judged before with identical settings and texts is not judged again, in whatever order the pairs
come, and a changed setting can never meet an old opinion. Half a last line, which a killed run
leaves behind, is cut off.

What we left out: two runs that write the same file at once.
"""

import hashlib
import json
import math
import os
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from nanopersrm import InputError

# (exemplars, question, candidates) -> a number a candidate, or None: nothing valid was said
Score = Callable[[Sequence[str], str, Sequence[str]], list[float] | None]


@dataclass(frozen=True)
class Opinion:
    """What a judge says of two candidates."""

    verdict: int | Literal["tie", "invalid"]  # 0 or 1: the index of the text that fits better
    scores: tuple[float, float] | None = None  # None: invalid
    preference: float | None = None  # P(the first fits better); None: no probability
    agrees: bool | None = None  # both orders named the same text; None: the judge knows no order
    problem: str = ""  # why it is invalid


# (exemplars, question, the two candidates) -> opinion
Opine = Callable[[Sequence[str], str, Sequence[str]], Opinion]


def from_scores(scores: Sequence[float] | None, slope: float | None = None) -> Opinion:
    """Two scores -> an opinion. `slope` turns a gap of scores into log-odds.

    >>> from_scores([0.5, 0.25], slope=0.0).preference
    0.5
    """
    if scores is None or not all(map(math.isfinite, scores)):
        return Opinion("invalid", problem="no finite scores")
    first, second = scores
    verdict: int | Literal["tie"] = "tie" if first == second else int(second > first)
    sure = None if slope is None else 1 / (1 + math.exp(-max(-700.0, slope * (first - second))))
    return Opinion(verdict, (first, second), sure)


def opine(score: Score, slope: float | None = None) -> Opine:
    """A judge that gives scores -> one that gives opinions."""
    return lambda exemplars, question, candidates: from_scores(
        score(exemplars, question, candidates), slope
    )


def key_of(
    settings: dict[str, Any], exemplars: Sequence[str], question: str, candidates: Sequence[str]
) -> str:
    """The name under which an opinion is remembered: of everything it may depend on."""
    asked = [settings, list(exemplars), question, list(candidates)]
    return hashlib.sha256(json.dumps(asked, sort_keys=True).encode()).hexdigest()


class Opinions:
    """Opinions by key, in memory and, with a path, in a file that grows by a line each."""

    def __init__(self, path: Path | None = None):
        self.path, self._known = path, dict[str, Opinion]()
        if path is not None and path.exists():
            self._read(path)

    def __len__(self) -> int:
        return len(self._known)

    def get(self, key: str) -> Opinion | None:
        return self._known.get(key)

    def put(self, key: str, judge: str, pair: str, opinion: Opinion) -> None:
        """Remember; `judge` and `pair` are for whoever reads the file."""
        self._known[key] = opinion
        if self.path is None:
            return
        record = {"key": key, "judge": judge, "pair": pair, **asdict(opinion)}
        try:
            with open(self.path, "a", encoding="utf-8") as file:
                file.write(json.dumps(record, ensure_ascii=False, allow_nan=False) + "\n")
        except OSError as error:
            raise InputError(f"{self.path}: cannot be written ({error.strerror})") from error

    def _read(self, path: Path) -> None:
        try:
            data = path.read_bytes()
            whole = data.rfind(b"\n") + 1
            if whole < len(data):
                os.truncate(path, whole)
        except OSError as error:
            raise InputError(f"{path}: cannot be read ({error.strerror})") from error
        for number, line in enumerate(data[:whole].splitlines(), 1):
            try:
                record = json.loads(line)
                key = record.pop("key")
                del record["judge"], record["pair"]
                scores = record["scores"]
                record["scores"] = None if scores is None else (scores[0], scores[1])
                self._known[key] = Opinion(**record)
            except (ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
                raise InputError(
                    f"{path}, line {number}: expected an opinion of an earlier run; take another "
                    "--out, or --overwrite"
                ) from error
