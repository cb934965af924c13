"""Predictions: from scores, and back from the file that remembers them."""

import math

import pytest

from nanopersrm import InputError
from nanopersrm.evaluate.predictions import Prediction, PredictionCache, from_scores, key_of


def test_from_scores():
    assert from_scores([1.0, 2.0]) == Prediction(1, (1.0, 2.0))
    assert from_scores([2.0, 1.0], 0.0).preference == 0.5
    assert from_scores([1.0, 1.0]).verdict == "tie"
    assert from_scores([2.0, 1.0], math.log(3)).preference == pytest.approx(0.75)
    assert from_scores([1e9, 0.0], 1.0).preference == 1
    for bad in (None, [float("nan"), 1.0], [1.0, float("inf")]):
        prediction = from_scores(bad)
        assert (prediction.verdict, prediction.scores, prediction.preference) == (
            "invalid",
            None,
            None,
        )


def test_keys_tell_everything_apart():
    keys = [
        key_of({"judge": "x"}, ["e"], "q", ["a", "b"]),
        key_of({"judge": "y"}, ["e"], "q", ["a", "b"]),
        key_of({"judge": "x"}, ["e", "e"], "q", ["a", "b"]),
        key_of({"judge": "x"}, ["e"], "", ["a", "b"]),
        key_of({"judge": "x"}, ["e"], "q", ["b", "a"]),
    ]
    assert len(set(keys)) == len(keys)
    assert keys[0] == key_of({"judge": "x"}, ("e",), "q", ("a", "b"))


def test_predictions_come_back(tmp_path):
    path = tmp_path / "p.jsonl"
    predictions = [
        Prediction(0, (2.0, 1.5), 0.7),
        Prediction("invalid", problem="no"),
        Prediction("tie"),
    ]
    first = PredictionCache(path)
    for i, prediction in enumerate(predictions):
        first.put(str(i), "judge", "pair", prediction)
    with open(path, "a", encoding="utf-8") as file:
        file.write('{"key": "3", "jud')  # killed here
    again = PredictionCache(path)
    assert [again.get(str(i)) for i in range(4)] == [*predictions, None]
    again.put("3", "judge", "pair", predictions[0])
    assert PredictionCache(path).get("3") == predictions[0]


@pytest.mark.parametrize("line", ["[]", "{}", '{"key": 1}', "nonsense", '{"key":"a","judge":"b"}'])
def test_a_strange_file_is_named(tmp_path, line):
    path = tmp_path / "p.jsonl"
    path.write_text(line + "\n")
    with pytest.raises(InputError, match="line 1"):
        PredictionCache(path)
