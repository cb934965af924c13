"""Fusion: what each instrument is worth is found in pairs, and told in points."""

import json
import math
import statistics
from dataclasses import replace

import pytest
from test_baselines import PAIRS, TRAIN

from data import course
from data.build import demo_pairs
from nanopersrm import InputError, baselines, fusion
from nanopersrm.fusion import FACTOR_NAMES, NGRAMS, STYLE, Fusion, of_facts
from nanopersrm.profile import ngram_similarity

NOTHING = [math.nan] * len(FACTOR_NAMES)
EXEMPLARS = ["One of these. Another one of these.", "And a third one."]


def by_hand(middle: float = -0.3, spread: float = 0.5) -> Fusion:
    first = FACTOR_NAMES[0]
    return Fusion({first: 2.0, NGRAMS: 1.0}, {first: 0.0, NGRAMS: 0.0}, middle, spread)


def test_the_worked_example(monkeypatch):
    monkeypatch.setattr(fusion, "factor_distances", lambda *_: [0.5, *NOTHING[1:]])
    monkeypatch.setattr(fusion, "ngram_similarity", lambda *_: 0.8)
    score = by_hand().score(EXEMPLARS, "A text.")
    assert score == pytest.approx(-0.2)
    assert by_hand().points(score) == pytest.approx(57.9260, abs=1e-4)
    assert by_hand(middle=-0.2).points(score) == pytest.approx(50.0)


def test_points_stay_on_their_scale():
    assert by_hand().points(1e9) == 99.9
    assert by_hand().points(-1e9) == 0.1


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
        assert fused.points(one) > 50 > fused.points(two)
    assert STYLE not in fusion.fit(TRAIN).weights


def lead(pairs, fusion_for) -> float:
    """Points by which the writer's text is ahead, on average."""
    gaps = []
    for pair in pairs:
        texts = [pair.chosen, pair.rejected]
        own, other = fusion_for(pair).points_of(pair.exemplars, texts, [math.nan] * 2)
        gaps.append(own - other)
    return sum(gaps) / len(gaps)


def test_points_are_percentiles_of_writers_that_are_held_out():
    """Were s spread normally, half of all texts would be below 50, a quarter below 25. Seen by the
    fit itself the lead is wider."""
    pairs = demo_pairs(0)
    fused = fusion.fit(pairs)
    points = [
        one
        for pair in pairs
        for one in fused.unseen_by(pair.author).points_of(
            pair.exemplars, [pair.chosen, pair.rejected], [math.nan] * 2
        )
    ]
    assert statistics.quantiles(points, n=4) == pytest.approx([25, 50, 75], abs=10)
    assert 0 < lead(pairs, lambda pair: fused.unseen_by(pair.author)) < lead(pairs, lambda _: fused)


def test_points_are_worth_something_of_other_writers():
    pairs, others = course.divided(demo_pairs(0), None, 0)
    fused = fusion.fit(pairs)
    assert lead(others, lambda _: fused) > 10


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
    usual = -sum(weight * fused.usual[name] for name, weight in fused.weights.items())
    assert (fused.points(usual), fused.spread) == (pytest.approx(50.0), 1.0)


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
        ({"middle": None}, "here: expected numbers as middle and spread"),
        ({"spread": math.nan}, "here: expected numbers as middle and spread"),
        ({"middle": 10**400}, "here: expected numbers as middle and spread"),
        ({"spread": 0.0}, "here: expected numbers .* the spread above 0"),
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


def test_facts_of_before_are_refused():
    told = {"slope": 1.0, "offset": 0.0, **by_hand().facts()}
    del told["middle"], told["spread"]
    with pytest.raises(InputError, match="it is of an earlier version, train again"):
        of_facts(told, "here")


def test_facts_may_have_no_folds():
    told = by_hand().facts()
    del told["apart"], told["loss"]
    assert of_facts(told, "here") == by_hand()
    assert by_hand().unseen_by("anybody") == by_hand()
