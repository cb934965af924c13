"""The baselines find habits that were planted, and know nothing where there is nothing to know."""

import math
import random

import pytest
from fixtures import PAIRS

from nanopersrm.evaluate import baselines


def right(score, pairs=PAIRS) -> float:
    wins = 0
    for p in pairs:
        one, two = score(p.exemplars, p.question, (p.chosen, p.rejected))
        wins += one > two
    return wins / len(pairs)


def test_baselines_know_invented_writers():
    assert right(baselines.ngrams) >= 0.75
    assert right(baselines.factors) >= 0.75


def test_slope_gives_calibrated_log_odds():
    """A score that is right three times of four gets a probability of about 3/4, in any unit."""
    rng = random.Random(0)
    pairs = [PAIRS[0]] * 400
    for unit in (1.0, 1000.0):

        def score(exemplars, question, candidates, unit=unit):
            return [unit, 0.0] if rng.random() < 0.75 else [0.0, unit]

        odds = math.exp(unit * baselines.slope_of(score, pairs))
        assert odds / (1 + odds) == pytest.approx(0.75, abs=0.05)


def test_a_score_that_says_nothing_has_slope_zero():
    assert baselines.slope_of(lambda *_: [1.0, 1.0], PAIRS) == 0
    assert baselines.slope_of(lambda *_: None, PAIRS) == 0
