"""Baselines of reading: the rules by hand, and what is read against `Reading` itself."""

from dataclasses import replace

import numpy as np
import pytest
from fixtures import CANDIDATES, EXEMPLARS, fresh

from data.build import DEMO
from nanopersrm.evaluate.cohorts import BASELINES, Couple, demo_cohort, measure, rows_of
from nanopersrm.pairs import Pair
from nanopersrm.style.reading import Reading, ReadingConfig, context_ids

COHORT = ("It was a bright day, and nobody came.", "ok so. we went out again", "One waits.")
COUPLE = Couple(
    after=np.array([[-3.0, -2.9], [-3.4, -2.8]]),  # text 1 is likelier after anybody's
    alone=np.array([-3.6, -3.1]),
    cohort=np.array([[-3.3, -3.2, -3.4, -3.5, -3.6], [-2.9, -3.0, -2.8, -2.7, -3.1]]),
    back=np.array([[0.5, 0.3], [0.2, 0.4]]),
    back_cohort=np.array([[0.3, 0.2, 0.1, 0.3, 0.2], [0.2, 0.3, 0.1, 0.3, 0.2]]),
)


def pair(author: str, exemplars: list[str], chosen: str) -> Pair:
    texts = (tuple(exemplars), "", chosen, CANDIDATES[0], "", "")
    return Pair(f"{author}a", "", author, "letters", "train", "cross_author", *texts)


def test_the_rules_by_hand():
    assert BASELINES["forward"](COUPLE) == pytest.approx(np.array([[0.6, 0.2], [0.2, 0.3]]))
    assert BASELINES["mean"](COUPLE) == pytest.approx(np.array([[0.4, 0.0], [0.0, 0.1]]))
    spread = np.sqrt(0.025)  # of both cohorts
    z = np.array([[0.4, 0.0], [0.0, 0.1]]) / spread
    assert BASELINES["z"](COUPLE) == pytest.approx(z)
    top = BASELINES["nearest"](COUPLE)  # -3.35 and -2.85 without the least
    assert top == pytest.approx(np.array([[0.35, -0.05], [-0.05, 0.05]]))
    back = np.array([[0.28, 0.08], [-0.02, 0.18]]) / np.sqrt(0.007)
    assert BASELINES["s-norm"](COUPLE) == pytest.approx(z + back)
    reading = np.array([[1.1, 0.5], [0.4, 0.7]])
    assert BASELINES["reading"](COUPLE) == pytest.approx(reading)
    assert BASELINES["nearest + back"](COUPLE) == pytest.approx(top + COUPLE.back)
    assert [row[0] for row in rows_of([COUPLE])[1:]] == [*BASELINES]
    rows = rows_of([replace(COUPLE, back_cohort=np.full((2, 5), np.nan))])
    assert [row[0] for row in rows[1:]] == [*BASELINES][:-1]
    assert rows[1] == ["none", "50.0", "0.0"]
    assert rows[3] == ["mean", "100.0", "100.0"]


def test_what_is_read(base):
    judge, config = fresh(base), ReadingConfig(60, 30, 24)
    reading = Reading(judge.model, judge.tokenizer, config)
    twins = [pair("ann", EXEMPLARS, CANDIDATES[0]), pair("bea", CANDIDATES[2:], CANDIDATES[1])]
    contexts = [context_ids(judge.tokenizer, [text], 60) for text in COHORT]
    couple = measure(reading, reading.roots(contexts), twins, also_back=True)
    scores = [reading.scores(texts, CANDIDATES[:2]) for texts in (EXEMPLARS, CANDIDATES[2:])]
    assert BASELINES["reading"](couple) == pytest.approx(2 * np.array(scores), abs=1e-5)
    ids, writer = reading.candidate(CANDIDATES[1])[0], reading.exemplar_ids(CANDIDATES[2:])
    for table, text, alone in ((couple.cohort, ids, 0.0), (couple.back_cohort, writer, 1.0)):
        ((after,),) = reading.under(reading.roots(contexts[2:]), [text])
        gains = after - alone * reading.alone([text])[0]
        assert table[1, 2] == pytest.approx(float(gains[1:].sum()) / len(gains), abs=1e-5)


def test_the_cohort_is_a_stretch_of_each_demo_writer():
    cohort, folders = demo_cohort(), sorted(path for path in DEMO.iterdir() if path.is_dir())
    assert demo_cohort() == cohort
    for folder, text in zip(folders, cohort, strict=True):
        assert any(text in path.read_text("utf-8") for path in folder.glob("*.txt"))
        assert 100 <= len(text.split()) <= 130
