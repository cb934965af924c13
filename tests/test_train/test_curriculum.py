"""Easy couples first, hard ones last, each once an epoch, and nothing lost in a checkpoint."""

import json
from dataclasses import replace
from statistics import fmean

import pytest

from nanopersrm import InputError
from nanopersrm.pairs import Pair, couples
from nanopersrm.train.curriculum import Couple, Curriculum

PAIR = Pair(
    *("", "", "writer", "fiction", "train", "cross_author", ("exemplar",), "", "one", "two"),
    *("writer/book", "other/book"),
)


def some_pairs(count: int, kind: str = "cross_author") -> list[Pair]:
    """So many couples of twins."""
    found = []
    for k in range(count):
        a, b = f"{kind}-{k:02d}a", f"{kind}-{k:02d}b"
        found += [replace(PAIR, id=a, twin=b, kind=kind), replace(PAIR, id=b, twin=a, kind=kind)]
    return found


def names(drawn: list[Couple]) -> list[str]:
    return [couple[0].id for couple in drawn]


def told(curriculum: Curriculum, successes: list[float]) -> None:
    """What came of all couples, in their order."""
    for couple, success in zip(curriculum.couples, successes, strict=True):
        curriculum.learn(couple, success)


# Which couples


def test_couples_are_twins_or_alone():
    """Each once, in the order of the file."""
    pairs = some_pairs(2)
    lonely = replace(PAIR, id="lonely")
    widow = replace(PAIR, id="widow", twin="of weight 0")
    found = couples([pairs[1], lonely, pairs[3], pairs[2], widow, pairs[0]])
    assert [tuple(pair.id for pair in couple) for couple in found] == [
        ("cross_author-00b", "cross_author-00a"),
        ("lonely",),
        ("cross_author-01b", "cross_author-01a"),
        ("widow",),
    ]


def test_weight_zero_is_left_out():
    pairs = some_pairs(3)
    pairs[0], pairs[1] = (replace(pair, weight=0.0) for pair in pairs[:2])
    pairs[2] = replace(pairs[2], weight=0.0)
    curriculum = Curriculum(pairs, 1, 0)
    drawn = [couple for _ in range(8) for couple in curriculum.draw(1, 0.5)]
    assert {pair.id for couple in drawn for pair in couple} == {
        "cross_author-01b",  # its twin has weight 0
        "cross_author-02a",
        "cross_author-02b",
    }
    with pytest.raises(InputError, match="a weight above 0, found 2 with 0"):
        Curriculum(pairs[:2], 1, 0)
    with pytest.raises(InputError, match="--window: expected a number from 1, got 0"):
        Curriculum(pairs, 0, 0)


# In which order


@pytest.mark.parametrize(("progress", "taken"), [(0.0, 0.9), (0.5, 0.5), (1.0, 0.4), (0.1, 0.9)])
def test_the_example_of_the_docstring(progress, taken):
    curriculum = Curriculum(some_pairs(4), 4, 0)
    told(curriculum, [0.9, 0.4, 0.7, 0.5])
    (couple,) = curriculum.draw(1, progress)
    assert curriculum.estimate(couple) == taken


def test_several_in_a_row():
    """Two of eight: places 0 and 1 at first, 3 and 4 half way, 6 and 7 at the end."""
    successes = [0.1 * k for k in range(8)]
    for progress, expected in ((0.0, [0.7, 0.6]), (0.5, [0.4, 0.3]), (1.0, [0.1, 0.0])):
        curriculum = Curriculum(some_pairs(8), 4, 3)
        told(curriculum, successes)
        drawn = curriculum.draw(2, progress)
        assert [curriculum.estimate(couple) for couple in drawn] == pytest.approx(expected)


def test_from_easy_to_hard():
    """Over a run, the mean success of what is taken falls."""
    curriculum = Curriculum(some_pairs(20), 4, 1)
    told(curriculum, [k / 19 for k in range(20)])
    taken = [curriculum.estimate(curriculum.draw(1, step / 39)[0]) for step in range(40)]
    thirds = [fmean(taken[:13]), fmean(taken[13:27]), fmean(taken[27:])]
    assert thirds[0] > thirds[1] + 0.1 > thirds[2] + 0.2


def test_what_is_to_be_expected():
    """Its own last success, else the mean of its kind, which begins with a half."""
    plain, changed = some_pairs(3), some_pairs(2, "restyle")
    curriculum = Curriculum([*plain, *changed], 1, 0)
    one, two, three, four, five = curriculum.couples
    assert [curriculum.estimate(couple) for couple in curriculum.couples] == [0.5] * 5
    curriculum.learn(one, 1.0)
    curriculum.learn(four, 0.0)
    assert curriculum.estimate(one) == 1.0
    assert curriculum.estimate(two) == pytest.approx((0.5 + 1.0) / 2)
    assert curriculum.estimate(five) == pytest.approx((0.5 + 0.0) / 2)
    curriculum.learn(one, 0.2)  # drawn again: the kind has seen both, the couple is as it was last
    assert curriculum.estimate(one) == 0.2
    assert curriculum.estimate(three) == pytest.approx((0.5 + 1.0 + 0.2) / 3)


def test_what_was_learned_moves_what_is_taken():
    """The same row of epochs: a couple that went well comes at once, one that did not, last."""
    first = Curriculum(some_pairs(4), 4, 0)
    (plain,) = first.draw(1, 0.0)  # nothing known: the first of the window
    second = Curriculum(some_pairs(4), 4, 0)
    second.learn(plain, 0.1)
    assert second.draw(1, 0.0) != [plain]
    third = Curriculum(some_pairs(4), 4, 0)
    third.learn(plain, 0.1)
    assert third.draw(1, 1.0) == [plain]


# Epochs


def test_window_one_takes_each_couple_once_an_epoch():
    curriculum = Curriculum(some_pairs(5), 1, 7)
    epochs: list[list[str]] = []
    for _ in range(3):
        epochs.append([])
        for step in range(5):
            (couple,) = curriculum.draw(1, step / 4)
            curriculum.learn(couple, step / 5)  # with a window of one it decides nothing
            epochs[-1].append(couple[0].id)
    assert all(len(set(epoch)) == 5 for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) > 1
    again = Curriculum(some_pairs(5), 1, 7)
    assert [name for epoch in epochs for name in epoch] == names(again.draw(15, 0.3))
    assert names(Curriculum(some_pairs(5), 1, 8).draw(15, 0.3)) != names(
        Curriculum(some_pairs(5), 1, 7).draw(15, 0.3)
    )


def test_a_window_goes_over_the_end_of_an_epoch():
    """Fewer couples than the window has places: two epochs in one window."""
    curriculum = Curriculum(some_pairs(3), 4, 0)
    assert len(curriculum.draw(2, 0.5)) == 2
    assert curriculum.cursor == 8
    assert len(Curriculum(some_pairs(1), 4, 0).draw(3, 1.0)) == 3


# Checkpoints


@pytest.mark.parametrize("cut", [1, 4, 9])
def test_a_resume_draws_what_would_have_come(cut):
    """Through JSON, into a curriculum that has seen nothing or something else."""

    def go(curriculum: Curriculum, steps: range) -> list[str]:
        drawn = []
        for step in steps:
            for couple in curriculum.draw(2, step / 11):
                curriculum.learn(couple, (sum(map(ord, couple[0].id)) * (step + 3)) % 11 / 10)
                drawn.append(couple[0].id)
        return drawn

    pairs = some_pairs(7) + some_pairs(4, "restyle")
    whole = Curriculum(pairs, 3, 5)
    expected = go(whole, range(12))
    first = Curriculum(pairs, 3, 5)
    begun = go(first, range(cut))
    facts = json.loads(json.dumps(first.facts()))
    for other in (Curriculum(pairs, 3, 5), whole):
        other.restore(facts)
        assert begun + go(other, range(cut, 12)) == expected
    assert len(set(expected)) > 4


def test_facts_are_a_copy():
    curriculum = Curriculum(some_pairs(2), 1, 0)
    curriculum.learn(curriculum.couples[0], 0.5)
    facts = curriculum.facts()
    before = json.dumps(facts)
    curriculum.draw(1, 0.0)
    curriculum.learn(curriculum.couples[0], 1.0)
    assert json.dumps(facts) == before != json.dumps(curriculum.facts())
