"""Predictions: what a judge says of two candidates, and a file that remembers it.

    verdict      index of the text that fits better, "tie" (equal scores), or "invalid"
    preference   P(the first fits better), where the judge has a probability; a cosine is none

An invalid prediction has no scores and no preference. `PredictionCache` appends each prediction to
a file of JSON lines under a key, the SHA-256 of the judge's settings and of all texts shown: after
an interruption nothing is judged twice, and a changed setting never meets an old prediction. Half a
last line, which a killed run leaves behind, is cut off.
"""

import hashlib
import json
import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ValidationError

from nanopersrm import InputError
from nanopersrm.style.baselines import Score


@dataclass(frozen=True)
class Prediction:
    """What a judge says of two candidates."""

    verdict: int | Literal["tie", "invalid"]  # 0 or 1: the index of the text that fits better
    scores: tuple[float, float] | None = None  # None: invalid
    preference: float | None = None  # P(the first fits better); None: no probability
    problem: str = ""  # why it is invalid


# (exemplars, question, the two candidates) -> prediction
Predict = Callable[[Sequence[str], str, Sequence[str]], Prediction]


class CacheLine(BaseModel):
    """A line of the file; `judge` and `pair` are for whoever reads it."""

    key: str
    judge: str
    pair: str
    prediction: Prediction


def from_scores(scores: Sequence[float] | None, slope: float | None = None) -> Prediction:
    """Two scores -> a prediction. `slope` turns a gap of scores into log-odds.

    >>> from_scores([0.5, 0.25], slope=0.0).preference
    0.5
    """
    if scores is None or not all(map(math.isfinite, scores)):
        return Prediction("invalid", problem="no finite scores")
    first, second = scores
    verdict: int | Literal["tie"] = "tie" if first == second else int(second > first)
    if slope is None:
        return Prediction(verdict, (first, second))
    odds = max(-700.0, slope * (first - second))
    return Prediction(verdict, (first, second), 1 / (1 + math.exp(-odds)))


def predict_by(score: Score, slope: float | None = None) -> Predict:
    """A function that scores candidates -> one that predicts."""
    return lambda exemplars, question, candidates: from_scores(
        score(exemplars, question, candidates), slope
    )


def key_of(
    settings: dict[str, Any], exemplars: Sequence[str], question: str, candidates: Sequence[str]
) -> str:
    """The key of a prediction: a hash of everything that it may depend on."""
    parts = [settings, list(exemplars), question, list(candidates)]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


class PredictionCache:
    """Predictions by key, in memory and, with a path, in a file that grows by a line each."""

    def __init__(self, path: Path | None = None):
        self.path, self._predictions = path, dict[str, Prediction]()
        if path is not None and path.exists():
            self._read(path)

    def get(self, key: str) -> Prediction | None:
        return self._predictions.get(key)

    def put(self, key: str, judge: str, pair: str, prediction: Prediction) -> None:
        self._predictions[key] = prediction
        if self.path is None:
            return
        line = CacheLine(key=key, judge=judge, pair=pair, prediction=prediction)
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with open(self.path, "a", encoding="utf-8") as file:
                file.write(line.model_dump_json() + "\n")
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
        for number, text in enumerate(data[:whole].splitlines(), 1):
            try:
                line = CacheLine.model_validate_json(text)
            except ValidationError as error:
                raise InputError(
                    f"{path}, line {number}: expected a prediction of an earlier run; delete the "
                    "file or take another --out"
                ) from error
            self._predictions[line.key] = line.prediction
