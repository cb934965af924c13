"""Evidence: features are weighed on pairs, add up, and are as often right as they say."""

import json
import math
from dataclasses import replace

import numpy as np
import pytest
from fixtures import PAIRS, TRAIN

from nanopersrm import InputError
from nanopersrm.evaluate import baselines
from nanopersrm.pairs import validate
from nanopersrm.style import evidence
from nanopersrm.style.evidence import FACTOR_NAMES, NGRAMS, READING, SCHEMA, Evidence, scales_of
from nanopersrm.style.profile import ngram_similarity

NOTHING = [math.nan] * len(FACTOR_NAMES)
EXEMPLARS = ["One of these. Another one of these.", "And a third one."]


FIRST = FACTOR_NAMES[0]


def by_hand(slope: float = 1.0, offset: float = -5.0) -> Evidence:
    return Evidence({FIRST: 20.0, NGRAMS: 10.0}, {FIRST: 0.6, NGRAMS: -0.5}, slope, offset)


def test_the_worked_example(monkeypatch):
    monkeypatch.setattr(evidence, "factor_distances", lambda *_: [0.5, *NOTHING[1:]])
    monkeypatch.setattr(evidence, "ngram_similarity", lambda *_: 0.8)
    ledger = by_hand().ledger(EXEMPLARS, "A text.")
    assert ledger == pytest.approx({FIRST: 2.0, NGRAMS: 3.0})
    assert by_hand().total(EXEMPLARS, "A text.") == sum(ledger.values())
    assert by_hand().probability(5.0) == pytest.approx(50.0)
    assert [by_hand().probability(total) for total in (-1e9, 1e9)] == [1.0, 99.0]
    assert by_hand().probability(15.0) == pytest.approx(100 * 10 / 11)
    assert by_hand(offset=10 * math.log10(3)).probability(0.0) == pytest.approx(75.0)


def test_what_cannot_be_measured_says_nothing(monkeypatch):
    monkeypatch.setattr(evidence, "factor_distances", lambda *_: NOTHING)
    monkeypatch.setattr(evidence, "ngram_similarity", lambda *_: 0.0)
    weights, means = {FIRST: 3.0, READING: 5.0}, {FIRST: 0.5, READING: -0.25}
    weighed = Evidence(weights, means, 1.0, 0.0)
    assert weighed.ledger(EXEMPLARS, "A text.") == {FIRST: 0.0, READING: 0.0}
    assert weighed.total(EXEMPLARS, "A text.", reading=0.5) == pytest.approx(1.25)


def test_it_sees_what_either_sees(monkeypatch):
    """Where the factors tell nothing the n-grams decide, in whatever unit, and the other way."""
    with monkeypatch.context() as patch:
        patch.setattr(evidence, "factor_distances", lambda *_: NOTHING)
        for unit in (1.0, 1e-4):

            def similarity(exemplars, candidate, unit=unit):
                return unit * ngram_similarity(exemplars, candidate)

            patch.setattr(evidence, "ngram_similarity", similarity)
            both = baselines.together(evidence.fit(TRAIN))
            for pair in PAIRS[:4]:
                texts = (pair.chosen, pair.rejected)
                one, two = both(pair.exemplars, "", texts) or []
                plain = [ngram_similarity(pair.exemplars, text) for text in texts]
                assert (one > two) == (plain[0] > plain[1])
    monkeypatch.setattr(evidence, "ngram_similarity", lambda *_: 0.5)
    weighed = evidence.fit(TRAIN)
    assert weighed.weights[NGRAMS] == 0
    assert sum(map(abs, weighed.weights.values())) > 1


def readings(exemplars, texts) -> list[float]:
    """An instrument that is always right about the writers of TRAIN and PAIRS."""
    by_the_writer = {pair.chosen for pair in [*TRAIN, *PAIRS] if pair.exemplars == tuple(exemplars)}
    return [0.4 + 0.1 * (text in by_the_writer) for text in texts]


def test_a_reading_that_is_always_right_outweighs_the_others(monkeypatch):
    monkeypatch.setattr(evidence, "factor_distances", lambda *_: NOTHING)
    weighed = evidence.fit(TRAIN, readings)
    score = baselines.together(weighed, readings)
    for pair in PAIRS:
        one, two = score(pair.exemplars, "", (pair.chosen, pair.rejected)) or []
        assert weighed.probability(one) > 50 > weighed.probability(two)
    assert READING not in evidence.fit(TRAIN).weights


def test_pairs_that_are_not_read_say_nothing_of_reading():
    asked = []

    def some(exemplars, texts) -> list[float]:
        asked.append(exemplars)
        return readings(exemplars, texts)

    few = evidence.fit(TRAIN, some, read=20)
    assert asked == [pair.exemplars for pair in TRAIN[:20]]
    assert few.weights[READING] > 0
    assert few.means[READING] == pytest.approx(-0.45)
    assert few.loss is not None
    assert few.loss < evidence.GUESS == evidence.fit(TRAIN, readings, read=0).loss


def loss(pairs, evidence_for) -> float:
    """Nats a text, of the probability that each is by the writer."""
    total = 0.0
    for pair in pairs:
        texts = [pair.chosen, pair.rejected]
        own, other = evidence_for(pair).probabilities(pair.exemplars, texts, [math.nan] * 2)
        total -= math.log(own / 100) + math.log(1 - other / 100)
    return total / 2 / len(pairs)


def test_the_probability_is_as_often_right_of_writers_that_are_held_out():
    """Over all texts its mean is a half; seen by the fit itself it would be surer."""
    weighed = evidence.fit(TRAIN)
    probabilities = [
        weighed.without(pair.author).probabilities(pair.exemplars, texts, [math.nan] * 2)
        for pair in TRAIN
        for texts in [[pair.chosen, pair.rejected]]
    ]
    assert sum(map(sum, probabilities)) / (2 * len(probabilities)) == pytest.approx(50, abs=3)
    assert loss(TRAIN, lambda pair: weighed.without(pair.author)) > loss(TRAIN, lambda _: weighed)


def test_the_probability_is_worth_something_of_other_writers():
    """Few writers and many instruments: a and b of the pairs that w was fitted on would cost more
    than the 0.69 of a guess."""
    weighed = evidence.fit(TRAIN)
    assert loss(PAIRS, lambda _: weighed) < 0.65


def test_odds_between_two_texts_are_as_often_right_of_writers_that_are_held_out(monkeypatch):
    """A factor more would make them no better; `loss` is what they cost. Some texts cannot show
    the first factors."""
    distances = evidence.factor_distances

    def some(exemplars, text):
        return [math.nan if len(text) % 3 else d for d in distances(exemplars, text)[:9]] + NOTHING[
            9:
        ]

    monkeypatch.setattr(evidence, "factor_distances", some)
    weighed = evidence.fit(TRAIN)
    gaps = []
    for pair in TRAIN:
        fold, texts = weighed.without(pair.author), (pair.chosen, pair.rejected)
        own, other = (fold.total(pair.exemplars, text) for text in texts)
        gaps.append(evidence.DECIBAN * (own - other))
    assert weighed.loss == pytest.approx(np.logaddexp(0, -np.array(gaps)).mean())
    assert scales_of(np.array(gaps)[:, None]) == pytest.approx([1], abs=0.2)


def test_what_two_numbers_count_beside_each_other():
    """A feature that is another one again is worth half, one that misleads nothing."""
    gaps = np.random.default_rng(3).normal(1.0, 1.0, (500, 1))
    (alone,) = scales_of(gaps)
    assert scales_of(np.hstack([gaps, 10 * gaps])) == pytest.approx(
        [alone / 2, alone / 20], rel=0.05
    )
    assert scales_of(np.hstack([gaps, -gaps[::-1]]))[1] == 0
    assert scales_of(np.zeros((0, 2))) == pytest.approx([0, 0])
    noise = np.random.default_rng(4).normal(0.0, 1.0, (500, 1))
    less = scales_of(np.hstack([gaps + noise, noise - 0.5 * gaps]))
    assert less == pytest.approx([*scales_of(gaps + noise), 0])  # fitted without what misleads


def test_no_fold_has_seen_its_writers(monkeypatch):
    """w of a fold is the same whatever its writers do, but for the one factor."""
    monkeypatch.setattr(evidence, "fold_of", lambda writer: int(writer in ("cole", "ray")))
    monkeypatch.setattr(evidence, "scales_of", lambda gaps: np.ones(gaps.shape[1]))
    before = evidence.fit(TRAIN).folds[1]
    moved = [
        replace(pair, rejected=pair.chosen) if {"cole", "ray"} & {*pair.id.split("-")} else pair
        for pair in TRAIN
    ]
    assert evidence.fit(moved).folds[1].weights == before.weights
    assert evidence.fit(moved).weights != evidence.fit(TRAIN).weights


def test_a_reading_is_scaled_on_other_writers(monkeypatch):
    """And a pair whose reading is no number says nothing of it."""
    monkeypatch.setattr(evidence, "factor_distances", lambda *_: NOTHING)
    monkeypatch.setattr(evidence, "ngram_similarity", lambda *_: 0.5)
    monkeypatch.setattr(evidence, "fold_of", lambda writer: int(writer in ("cole", "ray")))
    own = {"cole", "ray"}

    def noisy(shift: float):
        """Of a pair by `own` it is shifted to the rejected text."""
        side = {pair.exemplars: shift * (pair.author in own) for pair in TRAIN}
        rng = np.random.default_rng(2)
        return lambda exemplars, texts: [1.0 + rng.normal(), side[exemplars] + rng.normal()]

    weighed, other = (evidence.fit(TRAIN, noisy(shift)) for shift in (0.0, 9.0))
    assert weighed.folds[1].weights == pytest.approx(other.folds[1].weights)
    assert weighed.weights[READING] > other.weights[READING] >= 0
    drawn = np.random.default_rng(2).normal([1.0, 0.0], size=(len(TRAIN), 2))
    rows = iter([[math.nan, 1.0], *drawn[1:].tolist()])
    with_nan = evidence.fit(TRAIN, lambda *_: next(rows))
    expected = scales_of((drawn[1:, 0] - drawn[1:, 1])[:, None])
    assert with_nan.weights[READING] * evidence.DECIBAN == pytest.approx(expected[0])


def test_json_and_back():
    weighed = evidence.fit(TRAIN, readings)
    assert SCHEMA.validate_python(json.loads(json.dumps(weighed.to_json()))) == weighed
    record = by_hand().to_json()
    del record["folds"], record["loss"]
    assert SCHEMA.validate_python(record) == by_hand()
    assert by_hand().without("anybody") == by_hand()


@pytest.mark.parametrize(
    ("wrong", "where"),
    [
        ({"weights": {}}, "weights"),
        ({"means": {NGRAMS: "3"}}, "means"),
        ({"weights": {"voodoo": 1.0}, "means": {"voodoo": 1.0}}, "voodoo"),
        ({"means": {NGRAMS: 1.0}}, "means of"),
        ({"offset": math.nan}, "offset"),
        ({"loss": "low"}, "loss"),
        ({"folds": [by_hand().to_json()] * 2}, "5 folds"),
    ],
)
def test_odd_records_are_refused(wrong, where):
    with pytest.raises(InputError, match=f"here.*{where}"):
        validate(SCHEMA, by_hand().to_json() | wrong, "here")


def test_logistic_by_hand():
    """Three wins of four at a gap of 1: σ(w) = 3/4, so w = log 3."""
    x = np.array([[1.0], [1.0], [1.0], [-1.0]])
    assert evidence.logistic(x, ridge=0.0) == pytest.approx([math.log(3)])
    assert 0 < evidence.logistic(x)[0] < math.log(3)


def test_logistic_is_where_the_gradient_is_zero():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(200, 5)) + np.array([1.0, 0, 0, 0, -0.5])
    w = evidence.logistic(x)
    assert x.T @ (1 / (1 + np.exp(x @ w))) - w == pytest.approx(np.zeros(5), abs=1e-8)
    assert w[0] > 0.3
    assert w[4] < 0
    assert evidence.logistic(np.zeros((3, 2))) == pytest.approx([0, 0])
