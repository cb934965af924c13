"""Baselines of reading: the rules by hand, and what is read against `Reading` itself."""

import numpy as np
import pytest
from fixtures import CANDIDATES, COHORT, EXEMPLARS, fresh

from nanopersrm.evaluate.cohorts import BASELINES, Couple, cohort_of, measure, rows_of
from nanopersrm.pairs import Pair
from nanopersrm.style.reading import Reading, ReadingConfig

COUPLE = Couple(
    after=np.array([[-3.0, -2.9], [-3.4, -2.8]]),  # text 1 is likelier after anybody's
    blank=np.array([-3.6, -3.1]),
    cohort=np.array([[-3.3, -3.2, -3.4, -3.5, -3.6], [-2.9, -3.0, -2.8, -2.7, -3.1]]),
    back=np.array([[-3.0, -3.2], [-3.3, -3.1]]),
    back_cohort=np.array([[-3.2, -3.3, -3.4, -3.2, -3.3], [-3.3, -3.2, -3.4, -3.2, -3.3]]),
)


def pair(author: str, chosen: str) -> Pair:
    texts = (tuple(EXEMPLARS), "", chosen, CANDIDATES[0], "", "")
    return Pair(f"{author}a", "", author, "letters", "train", "cross_author", *texts)


def test_the_rules_by_hand():
    assert BASELINES["blank"](COUPLE) == pytest.approx(np.array([[0.6, 0.2], [0.2, 0.3]]))
    assert BASELINES["mean"](COUPLE) == pytest.approx(np.array([[0.4, 0.0], [0.0, 0.1]]))
    spread = np.sqrt(0.025)  # of both cohorts
    z = np.array([[0.4, 0.0], [0.0, 0.1]]) / spread
    assert BASELINES["z"](COUPLE) == pytest.approx(z)
    top = BASELINES["mean, nearest"](COUPLE)  # -3.35 and -2.85 without the least
    assert top == pytest.approx(np.array([[0.35, -0.05], [-0.05, 0.05]]))
    back = np.array([[0.28, 0.08], [-0.02, 0.18]]) / np.sqrt(0.007)
    assert BASELINES["symmetric"](COUPLE) == pytest.approx((z + back) / 2)
    rows = rows_of([COUPLE], with_symmetric=False)
    assert [row[0] for row in rows[1:]] == [*BASELINES][:-1]
    assert rows[1] == ["none", "50.0", "0.0"]
    assert rows[3] == ["mean", "100.0", "100.0"]


def test_what_is_read(base):
    judge, config = fresh(base), ReadingConfig(exemplar_tokens=60, candidate_tokens=24)
    reading = Reading(judge.model, judge.tokenizer, config, COHORT)
    twins = [pair("ann", CANDIDATES[0]), pair("bea", CANDIDATES[1])]
    couple = measure(reading, twins, also_back=True)
    gains = [one.gain for one in reading.read(EXEMPLARS, CANDIDATES[:2])]
    assert BASELINES["mean"](couple) == pytest.approx(np.array([gains, gains]), abs=1e-5)
    (after,) = reading.log_probs([CANDIDATES[1]], [reading.candidate("\n\n".join(EXEMPLARS))[0]])
    assert couple.back[0, 1] == pytest.approx(float(after[1:].sum()) / len(after), abs=1e-5)


def test_others_are_not_judged():
    some = [pair("ann", "One."), pair("bea", "Two."), pair("bea", "Three.")]
    assert cohort_of(some, [pair("ann", "Four.")], 0) == ["Two."]
