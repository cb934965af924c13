"""Evidence: features are weighed on pairs, add up, and are as often right as they say."""

import json
import math
from collections.abc import Callable, Collection
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
from fixtures import PAIRS, TRAIN, WEIGHED
from tiny_bases import refused

from nanopersrm.style import evidence
from nanopersrm.style.evidence import FACTOR_NAMES, NGRAMS, READING, Evidence, scales_of
from nanopersrm.style.profile import reference

FIRST = FACTOR_NAMES[0]
EXEMPLARS = ["One of these. Another one of these.", "And a third one."]


def by_hand(slope: float = 1.0, offset: float = -5.0) -> Evidence:
    return Evidence({FIRST: 20.0, NGRAMS: 10.0}, {FIRST: 0.1, NGRAMS: 0.5}, slope, offset)


def known(patch: pytest.MonkeyPatch, names: Collection[str], unit: float = 1.0, **fixed: float):
    """Only these features, and the reading, can be measured, in this unit; or they are given."""
    likeness_of = evidence.likeness_of

    def some(exemplars, text, reading):
        found = likeness_of(exemplars, text, reading)
        kept = {n: unit * x if n in names else math.nan for n, x in found.items() if n != READING}
        return kept | {READING: found[READING]} | fixed

    patch.setattr(evidence, "likeness_of", some)


def gap(pair, weighed: Evidence) -> float:
    """Decibans of the chosen text over the rejected one."""
    own, other = (weighed.total(pair.exemplars, text) for text in (pair.chosen, pair.rejected))
    return own - other


def test_the_worked_example(monkeypatch):
    known(monkeypatch, (), **{FIRST: 0.2, NGRAMS: 0.8})
    assert by_hand().ledger(EXEMPLARS, "A text.") == {FIRST: 2.0, NGRAMS: 3.0}
    assert by_hand().total(EXEMPLARS, "A text.") == 5.0
    assert by_hand().probability(5.0) == pytest.approx(50.0)
    assert [by_hand().probability(total) for total in (-1e9, 1e9)] == [1.0, 99.0]
    assert by_hand().probability(15.0) == pytest.approx(100 * 10 / 11)
    assert by_hand(offset=10 * math.log10(3)).probability(0.0) == pytest.approx(75.0)


def test_what_cannot_be_measured_or_does_not_count_gives_no_line(monkeypatch):
    known(monkeypatch, (), **{NGRAMS: 0.4999})
    weighed = by_hand()
    assert str(weighed.ledger(EXEMPLARS, "A text.")) == str({NGRAMS: 0.0})  # not -0.0
    assert str(weighed.total(EXEMPLARS, "A text.")) == "0.0"
    weights = {FIRST: 3.0, READING: 5.0, NGRAMS: 0.0}
    read = Evidence(weights, dict.fromkeys(weights, 0.25), 1.0, 0.0)
    assert read.ledger(EXEMPLARS, "A text.", reading=0.5) == {READING: 1.2}
    assert read.ledger(EXEMPLARS, "A text.") == {}
    assert read.total(EXEMPLARS, "A text.") == 0.0


def test_a_gap_of_totals_is_the_odds_of_the_regression():
    """10 log10 of p / (1 - p), p = σ(w · x), but for the rounding of each line."""
    weighed = evidence.fit(TRAIN)
    gaps = []
    for pair in PAIRS:
        own, other = (
            evidence.likeness_of(pair.exemplars, text, None)
            for text in (pair.chosen, pair.rejected)
        )
        x = {name: own[name] - other[name] for name in weighed.weights}
        if all(math.isfinite(own[n]) == math.isfinite(other[n]) for n in x):
            both = [n for n in x if math.isfinite(x[n])]
            nats = math.fsum(weighed.weights[n] * evidence.DECIBAN * x[n] for n in both)
            p = 1 / (1 + math.exp(-nats))
            gaps.append(gap(pair, weighed))
            assert gaps[-1] == pytest.approx(10 * math.log10(p / (1 - p)), abs=0.1 * len(both))
        for text in (pair.chosen, pair.rejected):
            lines = weighed.ledger(pair.exemplars, text)
            assert weighed.total(pair.exemplars, text) == pytest.approx(math.fsum(lines.values()))
            assert all(value == round(value, 1) for value in lines.values())
    assert len(gaps) > 5
    assert max(map(abs, gaps)) > 10


def test_the_likeness_of_a_habit(monkeypatch):
    """The worked number; no habit is wholly reliable. (test_judge_adapter.py has the density.)"""
    stats = SimpleNamespace(reliability=0.6)
    fake = SimpleNamespace(z=lambda _, value: value, factors={"x": stats})
    monkeypatch.setattr(evidence, "reference", lambda: fake)
    assert evidence.habit_likeness("x", 2.0, 2.0) == pytest.approx(1.72, abs=0.005)
    stats.reliability = 1.0
    assert math.isfinite(evidence.habit_likeness("x", 2.0, -2.0))


def test_salience_is_what_a_habit_can_say():
    usual = reference().factors["semicolons"].root_mean ** 2
    says = WEIGHED.salience({"semicolons": 2.7, "commas": None, "dashes": 9.0})
    gain = [evidence.habit_likeness("semicolons", 2.7, text) for text in (2.7, usual)]
    assert says == {"semicolons": pytest.approx(6.0 * (gain[0] - gain[1]))}
    assert says["semicolons"] > 3
    assert WEIGHED.salience({"semicolons": usual})["semicolons"] == pytest.approx(0)


# The fit


def test_it_sees_what_is_there_in_any_unit(monkeypatch):
    found = []
    for unit in (1.0, 1e-4):
        with monkeypatch.context() as patch:
            known(patch, [NGRAMS], unit)
            found.append(evidence.fit(TRAIN))
            assert all(not weight for n, weight in found[-1].weights.items() if n != NGRAMS)
    assert found[0].weights[NGRAMS] == pytest.approx(1e-4 * found[1].weights[NGRAMS]) != 0
    known(monkeypatch, FACTOR_NAMES, **{NGRAMS: 0.5})
    weighed = evidence.fit(TRAIN)
    assert weighed.weights[NGRAMS] == 0
    assert sum(weighed.weights.values()) > 1
    assert min(weighed.weights.values()) >= 0


def readings(exemplars, texts) -> list[float]:
    """An instrument that is always right about the writers of TRAIN and PAIRS."""
    by_the_writer = {pair.chosen for pair in [*TRAIN, *PAIRS] if pair.exemplars == tuple(exemplars)}
    return [0.4 + 0.1 * (text in by_the_writer) for text in texts]


def test_pairs_that_are_not_read_say_nothing_of_reading():
    asked = []

    def some(exemplars, texts) -> list[float]:
        asked.append(exemplars)
        return readings(exemplars, texts)

    few = evidence.fit(TRAIN, some, read=20)
    assert asked == [pair.exemplars for pair in TRAIN[:20]]
    assert few.weights[READING] > 0
    assert few.means[READING] == pytest.approx(0.45)
    assert few.loss is not None
    assert few.loss < evidence.GUESS == evidence.fit(TRAIN, readings, read=0).loss
    assert READING not in evidence.fit(TRAIN).weights


def chances(pair, weighed: Evidence) -> list[float]:
    """That each text is by the writer."""
    texts = (pair.chosen, pair.rejected)
    return [weighed.probability(weighed.total(pair.exemplars, text)) / 100 for text in texts]


def loss(pairs, evidence_for: Callable[..., Evidence]) -> float:
    """Nats a text, of the probability that each is by the writer."""
    rows = [chances(pair, evidence_for(pair)) for pair in pairs]
    return -float(np.mean([math.log(own) + math.log(1 - other) for own, other in rows])) / 2


def test_the_probability_is_as_often_right_of_writers_that_are_held_out():
    """Over all texts its mean is a half; seen by the fit itself it would be surer; of writers that
    no fold has seen it is worth more than a guess."""
    weighed = evidence.fit(TRAIN)
    held_out = [chances(pair, weighed.without(pair.author)) for pair in TRAIN]
    assert np.mean(held_out) == pytest.approx(0.5, abs=0.03)
    assert loss(TRAIN, lambda pair: weighed.without(pair.author)) > loss(TRAIN, lambda _: weighed)
    assert loss(PAIRS, lambda _: weighed) < 0.65 < evidence.GUESS


def test_odds_between_two_texts_are_as_often_right_of_writers_that_are_held_out(monkeypatch):
    """A factor more would make them no better; `loss` is what they cost. Some texts cannot show
    the first factors."""
    likeness_of = evidence.likeness_of

    def some(exemplars, text, reading):
        shown = {NGRAMS, *(() if len(text) % 3 else FACTOR_NAMES[:9])}
        found = likeness_of(exemplars, text, reading)
        return {name: x if name in shown else math.nan for name, x in found.items()}

    monkeypatch.setattr(evidence, "likeness_of", some)
    weighed = evidence.fit(TRAIN)
    gaps = [evidence.DECIBAN * gap(pair, weighed.without(pair.author)) for pair in TRAIN]
    assert weighed.loss == pytest.approx(np.logaddexp(0, -np.array(gaps)).mean(), abs=0.01)
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
    """Its means and the shares of its weights are the same whatever its writers do."""
    own, folds = {"cole", "ray"}, {"dolores": 0, "cole": 1, "ray": 1, "imre": 2, "otto": 3}
    monkeypatch.setattr(evidence, "fold_of", lambda writer: folds.get(writer, 4))
    before, whole = evidence.fit(TRAIN).folds[1], evidence.fit(TRAIN)
    moved = [
        replace(pair, rejected=pair.chosen) if own & {*pair.id.split("-")} else pair
        for pair in TRAIN
    ]
    after = evidence.fit(moved)
    assert after.folds[1].means == before.means
    first, second = (np.array([*x.weights.values()]) for x in (before, after.folds[1]))
    assert first / first.sum() == pytest.approx(second / second.sum())
    assert after.means != whole.means
    assert whole.without("ray") == whole.folds[1] != whole
    assert by_hand().without("ray") == by_hand()


def test_a_reading_is_scaled_on_other_writers(monkeypatch):
    """And a pair whose reading is no number says nothing of it."""
    known(monkeypatch, (), **{NGRAMS: 0.5})
    own = {"cole", "ray"}
    monkeypatch.setattr(evidence, "fold_of", lambda writer: int(writer in own))

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


# The file


def test_what_is_saved_is_loaded(tmp_path):
    for weighed in (evidence.fit(TRAIN, readings), by_hand()):
        weighed.save(tmp_path)
        assert Evidence.load(tmp_path) == weighed
    assert [file.name for file in tmp_path.iterdir()] == ["evidence.json"]
    record = json.loads((tmp_path / "evidence.json").read_text())
    del record["folds"], record["loss"]
    (tmp_path / "evidence.json").write_text(json.dumps(record))
    assert Evidence.load(tmp_path) == by_hand()


@pytest.mark.parametrize(
    ("wrong", "where"),
    [
        ({"weights": {}}, "weights"),
        ({"means": {NGRAMS: "3"}}, "means"),
        ({"weights": {"voodoo": 1.0}, "means": {"voodoo": 1.0}}, "voodoo"),
        ({"means": {NGRAMS: 1.0}}, "means of"),
        ({"offset": None}, "offset"),
        ({"loss": "low"}, "loss"),
        ({"folds": 2}, "5 folds"),
    ],
)
def test_odd_records_are_refused(tmp_path, wrong, where):
    by_hand().save(tmp_path)
    file = tmp_path / "evidence.json"
    record = json.loads(file.read_text())
    if "folds" in wrong:
        wrong = {"folds": [record] * wrong["folds"]}
    file.write_text(json.dumps(record | wrong))
    refused(lambda: Evidence.load(tmp_path), str(file), where)


def test_logistic_is_where_the_gradient_is_zero():
    """Three wins of four at a gap of 1: σ(w) = 3/4, so w = log 3."""
    x = np.array([[1.0], [1.0], [1.0], [-1.0]])
    assert evidence.logistic(x, ridge=0.0) == pytest.approx([math.log(3)])
    rng = np.random.default_rng(0)
    x = rng.normal(size=(200, 5)) + np.array([1.0, 0, 0, 0, -0.5])
    w = evidence.logistic(x)
    assert x.T @ (1 / (1 + np.exp(x @ w))) - w == pytest.approx(np.zeros(5), abs=1e-8)
    assert evidence.logistic(np.zeros((3, 2))) == pytest.approx([0, 0])
