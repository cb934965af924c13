"""Fusion finds in pairs what each instrument is worth, and its probability is as often right."""

import json
import math
from dataclasses import replace

import numpy as np
import pytest
from fixtures import PAIRS, TRAIN

from nanopersrm import InputError
from nanopersrm.evaluate import baselines
from nanopersrm.pairs import validate
from nanopersrm.style import fusion
from nanopersrm.style.fusion import FACTOR_NAMES, NGRAMS, READING, SCHEMA, Fusion
from nanopersrm.style.profile import ngram_similarity

NOTHING = [math.nan] * len(FACTOR_NAMES)
EXEMPLARS = ["One of these. Another one of these.", "And a third one."]


def by_hand(slope: float = 1.0, offset: float = 0.2) -> Fusion:
    first = FACTOR_NAMES[0]
    return Fusion({first: 2.0, NGRAMS: 1.0}, {first: 0.0, NGRAMS: 0.0}, slope, offset)


def test_the_worked_example(monkeypatch):
    monkeypatch.setattr(fusion, "factor_distances", lambda *_: [0.5, *NOTHING[1:]])
    monkeypatch.setattr(fusion, "ngram_similarity", lambda *_: 0.8)
    score = by_hand().score(EXEMPLARS, "A text.")
    assert score == pytest.approx(-0.2)
    assert by_hand().probability(score) == pytest.approx(50.0)
    assert by_hand(offset=math.log(3) + 0.2).probability(score) == pytest.approx(75.0)


def test_what_cannot_be_measured_counts_as_the_mean(monkeypatch):
    monkeypatch.setattr(fusion, "factor_distances", lambda *_: NOTHING)
    monkeypatch.setattr(fusion, "ngram_similarity", lambda *_: 0.0)
    weights, means = {FACTOR_NAMES[1]: 3.0, READING: 5.0}, {FACTOR_NAMES[1]: 0.5, READING: -0.25}
    fused = Fusion(weights, means, 1.0, 0.0)
    assert fused.score(EXEMPLARS, "A text.") == pytest.approx(-1.5 + 1.25)
    assert fused.score(EXEMPLARS, "A text.", reading=0.5) == pytest.approx(-1.5 + 2.5)


def test_it_sees_what_either_sees(monkeypatch):
    """Where the factors tell nothing the n-grams decide, in whatever unit, and the other way."""
    with monkeypatch.context() as patch:
        patch.setattr(fusion, "factor_distances", lambda *_: NOTHING)
        for unit in (1.0, 1e-4):

            def similarity(exemplars, candidate, unit=unit):
                return unit * ngram_similarity(exemplars, candidate)

            patch.setattr(fusion, "ngram_similarity", similarity)
            both = baselines.fused(fusion.fit(TRAIN))
            for pair in PAIRS[:4]:
                texts = (pair.chosen, pair.rejected)
                one, two = both(pair.exemplars, "", texts) or []
                plain = [ngram_similarity(pair.exemplars, text) for text in texts]
                assert (one > two) == (plain[0] > plain[1])
    monkeypatch.setattr(fusion, "ngram_similarity", lambda *_: 0.5)
    whole, factors = baselines.fused(fusion.fit(TRAIN)), baselines.factors(TRAIN)
    for pair in PAIRS[:4]:
        texts = (pair.chosen, pair.rejected)
        found, wanted = whole(pair.exemplars, "", texts), factors(pair.exemplars, "", texts)
        assert found is not None
        assert wanted is not None
        assert found[0] - found[1] == pytest.approx(wanted[0] - wanted[1])


def readings(exemplars, texts) -> list[float]:
    """An instrument that is always right about the writers of TRAIN and PAIRS."""
    own = {pair.chosen for pair in [*TRAIN, *PAIRS] if pair.exemplars == tuple(exemplars)}
    return [0.4 + 0.1 * (text in own) for text in texts]


def test_a_reading_that_is_always_right_outweighs_the_others(monkeypatch):
    monkeypatch.setattr(fusion, "factor_distances", lambda *_: NOTHING)
    fused = fusion.fit(TRAIN, readings)
    score = baselines.fused(fused, readings)
    for pair in PAIRS:
        one, two = score(pair.exemplars, "", (pair.chosen, pair.rejected)) or []
        assert fused.probability(one) > 50 > fused.probability(two)
    assert READING not in fusion.fit(TRAIN).weights


def test_pairs_that_are_not_read_say_nothing_of_reading():
    asked = []

    def some(exemplars, texts) -> list[float]:
        asked.append(exemplars)
        return readings(exemplars, texts)

    few = fusion.fit(TRAIN, some, read=20)
    assert asked == [pair.exemplars for pair in TRAIN[:20]]
    assert few.weights[READING] > 0
    assert few.means[READING] == pytest.approx(-0.45)
    assert few.loss is not None
    assert few.loss < fusion.GUESS == fusion.fit(TRAIN, readings, read=0).loss


def loss(pairs, fusion_for) -> float:
    """Nats a text, of the probability that each is by the writer."""
    total = 0.0
    for pair in pairs:
        fused = fusion_for(pair)
        own, other = fused.probabilities(
            pair.exemplars, [pair.chosen, pair.rejected], [math.nan] * 2
        )
        total -= math.log(own / 100) + math.log(1 - other / 100)
    return total / 2 / len(pairs)


def test_the_probability_is_as_often_right_of_writers_that_are_held_out():
    """Over all texts its mean is a half; seen by the fit itself it would be surer."""
    fused = fusion.fit(TRAIN)
    probabilities = [
        fused.without(pair.author).probabilities(pair.exemplars, texts, [math.nan] * 2)
        for pair in TRAIN
        for texts in [[pair.chosen, pair.rejected]]
    ]
    assert sum(map(sum, probabilities)) / (2 * len(probabilities)) == pytest.approx(50, abs=3)
    assert loss(TRAIN, lambda pair: fused.without(pair.author)) > loss(TRAIN, lambda _: fused)


def test_the_probability_is_worth_something_of_other_writers():
    """Few writers and many instruments: a and b of the pairs that w was fitted on would cost more
    than the 0.69 of a guess."""
    fused = fusion.fit(TRAIN)
    assert loss(PAIRS, lambda _: fused) < 0.65


def test_no_fold_has_seen_its_writers(monkeypatch):
    """w of a fold is the same whatever its writers do."""
    monkeypatch.setattr(fusion, "fold_of", lambda writer: int(writer in ("cole", "ray")))
    before = fusion.fit(TRAIN).folds[1]
    moved = [
        replace(pair, rejected=pair.chosen) if {"cole", "ray"} & {*pair.id.split("-")} else pair
        for pair in TRAIN
    ]
    assert fusion.fit(moved).folds[1].weights == before.weights
    assert fusion.fit(moved).weights != fusion.fit(TRAIN).weights


def test_json_and_back():
    fused = fusion.fit(TRAIN, readings)
    assert SCHEMA.validate_python(json.loads(json.dumps(fused.to_json()))) == fused
    record = by_hand().to_json()
    assert {"usual", "apart"} < record.keys()  # as adapters on disk have them
    del record["apart"], record["loss"]  # an adapter of before
    assert SCHEMA.validate_python(record) == by_hand()
    assert by_hand().without("anybody") == by_hand()


@pytest.mark.parametrize(
    ("wrong", "where"),
    [
        ({"weights": {}}, "weights"),
        ({"usual": {NGRAMS: "3"}}, "usual"),
        ({"weights": {"voodoo": 1.0}}, "voodoo|instruments"),
        ({"usual": {NGRAMS: 1.0}}, "means of"),
        ({"offset": math.nan}, "offset"),
        ({"loss": "low"}, "loss"),
        ({"apart": [by_hand().to_json()] * 2}, "5 folds"),
    ],
)
def test_odd_records_are_refused(wrong, where):
    with pytest.raises(InputError, match=f"here.*{where}"):
        validate(SCHEMA, by_hand().to_json() | wrong, "here")


def test_logistic_by_hand():
    """Three wins of four at a gap of 1: σ(w) = 3/4, so w = log 3."""
    x = np.array([[1.0], [1.0], [1.0], [-1.0]])
    assert fusion.logistic(x, ridge=0.0) == pytest.approx([math.log(3)])
    assert 0 < fusion.logistic(x)[0] < math.log(3)


def test_logistic_is_where_the_gradient_is_zero():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(200, 5)) + np.array([1.0, 0, 0, 0, -0.5])
    w = fusion.logistic(x)
    assert x.T @ (1 / (1 + np.exp(x @ w))) - w == pytest.approx(np.zeros(5), abs=1e-8)
    assert w[0] > 0.3
    assert w[4] < 0
    assert fusion.logistic(np.zeros((3, 2))) == pytest.approx([0, 0])
