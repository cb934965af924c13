"""Fusion: what each instrument is worth is found in pairs, and the chance is as often right."""

import json
import math

import pytest
from test_baselines import PAIRS, TRAIN

from nanopersrm import InputError, baselines, fusion
from nanopersrm.fusion import FACTOR_NAMES, NGRAMS, STYLE, Fusion, of_facts
from nanopersrm.profile import ngram_similarity

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


def test_the_chance_is_as_often_right():
    """Over all texts the mean chance is a half, and that of the chosen ones is higher."""
    fused = fusion.fit(TRAIN)
    chances = [
        fused.chance(fused.score(pair.exemplars, text))
        for pair in TRAIN
        for text in (pair.chosen, pair.rejected)
    ]
    assert sum(chances) / len(chances) == pytest.approx(50, abs=3)
    assert sum(chances[::2]) - sum(chances[1::2]) > 5 * len(TRAIN)


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
    ],
)
def test_odd_facts_are_refused(wrong, said):
    with pytest.raises(InputError, match=said):
        of_facts(by_hand().facts() | wrong, "here")
