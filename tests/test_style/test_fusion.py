"""Fusion: what each instrument is worth is found in pairs, and the chance is as often right."""

import json
import math
from dataclasses import replace

import pytest
from fixtures import PAIRS, TRAIN

from data.build import demo_pairs
from nanopersrm import InputError
from nanopersrm.style import baselines, fusion
from nanopersrm.style.fusion import FACTOR_NAMES, NGRAMS, STYLE, Fusion, of_facts
from nanopersrm.style.profile import ngram_similarity
from nanopersrm.train import course

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
    assert by_hand().chance(score) == pytest.approx(50.0)
    assert by_hand(offset=math.log(3) + 0.2).chance(score) == pytest.approx(75.0)


def test_a_chance_is_never_certain():
    assert by_hand().chance(1e9) == 99.0
    assert by_hand().chance(-1e9) == 1.0


def test_what_cannot_be_measured_counts_as_usual(monkeypatch):
    monkeypatch.setattr(fusion, "factor_distances", lambda *_: NOTHING)
    monkeypatch.setattr(fusion, "ngram_similarity", lambda *_: 0.0)
    weights, usual = {FACTOR_NAMES[1]: 3.0, STYLE: 5.0}, {FACTOR_NAMES[1]: 0.5, STYLE: -0.25}
    fused = Fusion(weights, usual, 1.0, 0.0)
    assert fused.score(EXEMPLARS, "A text.") == pytest.approx(-1.5 + 1.25)
    assert fused.score(EXEMPLARS, "A text.", cosine=0.5) == pytest.approx(-1.5 + 2.5)


def test_it_sees_what_either_sees(monkeypatch):
    """Where the factors tell nothing the n-grams decide, in whatever unit, and the other way."""
    with monkeypatch.context() as patch:
        patch.setattr(fusion, "factor_distances", lambda *_: NOTHING)
        for unit in (1.0, 1e-4):

            def near(exemplars, candidate, unit=unit):
                return unit * ngram_similarity(exemplars, candidate)

            patch.setattr(fusion, "ngram_similarity", near)
            both = fusion.judge(fusion.fit(TRAIN))
            for pair in PAIRS[:4]:
                texts = (pair.chosen, pair.rejected)
                one, two = both(pair.exemplars, "", texts) or []
                plain = [ngram_similarity(pair.exemplars, text) for text in texts]
                assert (one > two) == (plain[0] > plain[1])
    monkeypatch.setattr(fusion, "ngram_similarity", lambda *_: 0.5)
    whole, factors = fusion.judge(fusion.fit(TRAIN)), baselines.factors(TRAIN)
    for pair in PAIRS[:4]:
        texts = (pair.chosen, pair.rejected)
        found, wanted = whole(pair.exemplars, "", texts), factors(pair.exemplars, "", texts)
        assert found is not None
        assert wanted is not None
        assert found[0] - found[1] == pytest.approx(wanted[0] - wanted[1])


def cosines(exemplars, texts) -> list[float]:
    """An instrument that is always right about the writers of TRAIN and PAIRS."""
    own = {pair.chosen for pair in [*TRAIN, *PAIRS] if pair.exemplars == tuple(exemplars)}
    return [0.4 + 0.1 * (text in own) for text in texts]


def test_a_cosine_that_is_always_right_outweighs_the_others(monkeypatch):
    monkeypatch.setattr(fusion, "factor_distances", lambda *_: NOTHING)
    fused = fusion.fit(TRAIN, cosines)
    score = fusion.judge(fused, cosines)
    for pair in PAIRS:
        one, two = score(pair.exemplars, "", (pair.chosen, pair.rejected)) or []
        assert fused.chance(one) > 50 > fused.chance(two)
    assert STYLE not in fusion.fit(TRAIN).weights


def loss(pairs, fusion_for) -> float:
    """Nats a text, of the chance that each is by the writer."""
    total = 0.0
    for pair in pairs:
        fused = fusion_for(pair)
        own, other = fused.chances(pair.exemplars, [pair.chosen, pair.rejected], [math.nan] * 2)
        total -= math.log(own / 100) + math.log(1 - other / 100)
    return total / 2 / len(pairs)


def test_the_chance_is_as_often_right_of_writers_that_are_held_out():
    """Over all texts its mean is a half; seen by the fit itself it would be surer."""
    fused = fusion.fit(TRAIN)
    chances = [
        fused.unseen_by(pair.author).chances(pair.exemplars, texts, [math.nan] * 2)
        for pair in TRAIN
        for texts in [[pair.chosen, pair.rejected]]
    ]
    assert sum(map(sum, chances)) / (2 * len(chances)) == pytest.approx(50, abs=3)
    assert loss(TRAIN, lambda pair: fused.unseen_by(pair.author)) > loss(TRAIN, lambda _: fused)


def test_the_chance_is_worth_something_of_other_writers():
    """Few writers and many instruments: a and b of the pairs that w was fitted on cost 0.78 nats a
    text here, where a guess has 0.69."""
    pairs, others = course.divided(demo_pairs(0), None, 0)
    fused = fusion.fit(pairs)
    assert loss(others, lambda _: fused) < 0.6


def test_no_fold_has_seen_its_writers(monkeypatch):
    """w of a fold is the same whatever its writers do."""
    monkeypatch.setattr(fusion, "fold_of", lambda writer: int(writer in ("cole", "ray")))
    before = fusion.fit(TRAIN).apart[1]
    moved = [
        replace(pair, rejected=pair.chosen) if {"cole", "ray"} & {*pair.id.split("-")} else pair
        for pair in TRAIN
    ]
    assert fusion.fit(moved).apart[1].weights == before.weights
    assert fusion.fit(moved).weights != fusion.fit(TRAIN).weights


def test_a_single_writer_tells_nothing_of_others():
    alone = [pair for pair in TRAIN if {"cole", "ray"} >= {*pair.id.split("-")[:2]}]
    for pair in alone:
        assert fusion.fold_of(pair.author) == fusion.fold_of("cole")
    fused = fusion.fit(alone)
    assert fused.loss == fusion.GUESS
    assert fused.chance(100.0) == 50.0


def test_facts_and_back():
    fused = fusion.fit(TRAIN, cosines)
    assert of_facts(json.loads(json.dumps(fused.facts())), "here") == fused


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"weights": {}}, "here, field weights: expected instruments with a number each"),
        ({"usual": {NGRAMS: "3"}}, "here, field usual: expected instruments with a number each"),
        ({"weights": {"voodoo": 1.0}}, "here, field weights: no instrument is called 'voodoo'"),
        ({"usual": {NGRAMS: 1.0}}, "here, field usual: expected a number for .* found none"),
        ({"slope": None}, "here: expected numbers as slope and offset"),
        ({"offset": math.nan}, "here: expected numbers as slope and offset"),
        ({"slope": 10**400}, "here: expected numbers as slope and offset"),
        ({"loss": "low"}, "here, field loss: expected a number, found 'low'"),
        ({"apart": {}}, "here, field apart: expected 5 fusions or none"),
        ({"apart": [3] * 5}, "here, field apart, 1: expected a table of weights, found 3"),
    ],
)
def test_odd_facts_are_refused(wrong, said):
    with pytest.raises(InputError, match=said):
        of_facts(by_hand().facts() | wrong, "here")


@pytest.mark.parametrize("odd", [3, [], "weights", None])
def test_what_is_no_table_is_refused(odd):
    with pytest.raises(InputError, match="here: expected a table of weights, found"):
        of_facts(odd, "here")


def test_facts_of_before_have_no_folds():
    told = by_hand().facts()
    del told["apart"], told["loss"]
    assert of_facts(told, "here") == by_hand()
    assert by_hand().unseen_by("anybody") == by_hand()
