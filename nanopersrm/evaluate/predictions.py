"""Predictions: what a judge says of two candidates, and a file that remembers it.

    verdict      index of the text that fits better, "tie" (equal scores), or "invalid"
    preference   P(the first fits better), where the judge has a probability; a cosine is none

The file has a line of JSON for each prediction, under a key: the SHA-256 of the judge's settings
and of all texts shown. So nothing is judged twice, and a changed setting never meets an old
prediction.
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
from nanopersrm.files import reason
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


class Line(BaseModel):
    """A line of the file."""

    key: str
    judge: str  # this and the pair for whoever reads it
    pair: str
    prediction: Prediction


def from_scores(scores: Sequence[float] | None, slope: float | None = None) -> Prediction:
    """Two scores -> a prediction. `slope` turns a gap of scores into log-odds."""
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
    return lambda *texts: from_scores(score(*texts), slope)


def key_of(settings: dict[str, Any], *texts: Any) -> str:
    """A hash of everything that a prediction may depend on."""
    return hashlib.sha256(json.dumps([settings, *texts], sort_keys=True).encode()).hexdigest()


def append(path: Path, line: Line) -> None:
    """Remember a prediction."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(path, "a", encoding="utf-8") as file:
            file.write(line.model_dump_json() + "\n")
    except OSError as error:
        raise InputError(f"{path}: cannot be written ({reason(error)})") from error


def remembered(path: Path) -> dict[str, Prediction]:
    """Key -> prediction; half a last line, which a killed run leaves, is cut off."""
    try:
        data = path.read_bytes() if path.exists() else b""
        whole = data.rfind(b"\n") + 1
        if whole < len(data):
            os.truncate(path, whole)
        lines = [Line.model_validate_json(text) for text in data[:whole].splitlines()]
    except (OSError, ValidationError) as error:
        raise InputError(
            f"{path}: expected predictions of an earlier run; delete the file or take another "
            f"--out ({reason(error)})"
        ) from error
    return {line.key: line.prediction for line in lines}
