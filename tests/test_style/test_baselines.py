"""Baselines find habits that were planted, and know nothing where there is nothing to know."""

import math
import random

import numpy as np
import pytest
from fixtures import PAIRS, TRAIN

from nanopersrm import InputError
from nanopersrm.evaluate.predictions import Opinion, Opinions, from_scores, key_of
from nanopersrm.pairs import Pair
from nanopersrm.style import baselines


def right(score, pairs=PAIRS) -> float:
    wins = 0
    for p in pairs:
        one, two = score(p.exemplars, p.question, (p.chosen, p.rejected))
        wins += one > two
    return wins / len(pairs)


def test_baselines_know_invented_writers():
    assert right(baselines.ngrams()) >= 0.75
    assert right(baselines.factors()) >= 0.75
    assert right(baselines.factors(TRAIN)) >= 0.75
    assert right(baselines.delta(baselines.texts_of(TRAIN, candidates=True))) >= 0.6


def test_length_knows_nothing():
    assert right(baselines.length()) == 0.5
    assert baselines.length()(["x"], "", ["one two", "one"]) == [2.0, 1.0]


def test_delta_by_hand():
    """Two words; shares (1, 0), (0, 1) and (½, ½) have the deviation √(1/6)."""
    score = baselines.delta(["the the", "of of", "the of"])
    found = score(["the the the"], "", ["the", "of", "the of"])
    assert found == pytest.approx([0, -math.sqrt(6), -math.sqrt(6) / 2])


def test_delta_pools_exemplars():
    score = baselines.delta(["the the", "of of", "the of"])
    assert score(["the", "of"], "", ["the of"]) == [0]


def test_delta_needs_texts():
    with pytest.raises(InputError, match="at least 2"):
        baselines.delta(["...", "one text"])


def test_texts_of_keeps_candidates_out_unless_asked():
    [pair, _] = PAIRS[:2]
    assert baselines.texts_of([pair, pair], candidates=False) == list(pair.exemplars)
    assert set(baselines.texts_of([pair], candidates=True)) == {
        *pair.exemplars,
        pair.chosen,
        pair.rejected,
    }


def test_logistic_by_hand():
    """Three wins of four at a gap of 1: σ(w) = 3/4, so w = log 3."""
    x = np.array([[1.0], [1.0], [1.0], [-1.0]])
    assert baselines.logistic(x, ridge=0.0) == pytest.approx([math.log(3)])
    assert 0 < baselines.logistic(x)[0] < math.log(3)


def test_logistic_is_where_the_gradient_is_zero():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(200, 5)) + np.array([1.0, 0, 0, 0, -0.5])
    w = baselines.logistic(x)
    assert x.T @ (1 / (1 + np.exp(x @ w))) - w == pytest.approx(np.zeros(5), abs=1e-8)
    assert w[0] > 0.3
    assert w[4] < 0


def test_logistic_of_nothing():
    assert baselines.logistic(np.zeros((3, 2))) == pytest.approx([0, 0])


def test_fitted_factors_use_only_what_tells():
    """Weights are for distances: who wins by being farther would get negative ones."""
    upside_down = [Pair(**{**vars(p), "chosen": p.rejected, "rejected": p.chosen}) for p in TRAIN]
    assert right(baselines.factors(upside_down)) < 0.4


def test_slope_gives_calibrated_log_odds():
    """A score that is right three times of four gets a probability of about 3/4, in any unit."""
    rng = random.Random(0)
    pairs = [PAIRS[0]] * 400
    for unit in (1.0, 1000.0):

        def score(exemplars, question, candidates, unit=unit):
            return [unit, 0.0] if rng.random() < 0.75 else [0.0, unit]

        sure = from_scores([unit, 0.0], baselines.slope_of(score, pairs)).preference
        assert sure == pytest.approx(0.75, abs=0.05)


def test_a_score_that_says_nothing_has_slope_zero():
    assert baselines.slope_of(lambda *_: [1.0, 1.0], PAIRS) == 0
    assert baselines.slope_of(lambda *_: None, PAIRS) == 0
    assert abs(baselines.slope_of(baselines.length(), PAIRS)) < 1e-9


# Opinions


def test_scores_to_opinions():
    assert from_scores([1.0, 2.0]) == Opinion(1, (1.0, 2.0))
    assert from_scores([2.0, 1.0], 0.0).preference == 0.5
    assert from_scores([1.0, 1.0]).verdict == "tie"
    assert from_scores([2.0, 1.0], math.log(3)).preference == pytest.approx(0.75)
    assert from_scores([1e9, 0.0], 1.0).preference == 1
    for bad in (None, [float("nan"), 1.0], [1.0, float("inf")]):
        found = from_scores(bad)
        assert (found.verdict, found.scores, found.preference) == ("invalid", None, None)


def test_keys_tell_everything_apart():
    texts = (["e"], "q", ["a", "b"])
    keys = [
        key_of({"judge": "x"}, *texts),
        key_of({"judge": "y"}, *texts),
        key_of({"judge": "x"}, ["e", "e"], "q", ["a", "b"]),
        key_of({"judge": "x"}, ["e"], "", ["a", "b"]),
        key_of({"judge": "x"}, ["e"], "q", ["b", "a"]),
    ]
    assert len(set(keys)) == len(keys)
    assert keys[0] == key_of({"judge": "x"}, ("e",), "q", ("a", "b"))


def test_opinions_come_back(tmp_path):
    path = tmp_path / "o.jsonl"
    said = [Opinion(0, (2.0, 1.5), 0.7, True), Opinion("invalid", problem="no"), Opinion("tie")]
    first = Opinions(path)
    for i, opinion in enumerate(said):
        first.put(str(i), "judge", "pair", opinion)
    with open(path, "a", encoding="utf-8") as file:
        file.write('{"key": "3", "jud')  # killed here
    again = Opinions(path)
    assert [again.get(str(i)) for i in range(4)] == [*said, None]
    again.put("3", "judge", "pair", said[0])
    assert len(Opinions(path)) == 4


@pytest.mark.parametrize("line", ["[]", "{}", '{"key": 1}', "nonsense", '{"key":"a","judge":"b"}'])
def test_a_strange_file_is_named(tmp_path, line):
    path = tmp_path / "o.jsonl"
    path.write_text(line + "\n")
    with pytest.raises(InputError, match=r"o\.jsonl, line 1: expected an opinion"):
        Opinions(path)
