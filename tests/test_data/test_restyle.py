"""Restyle: the chosen factors move, the others hold, and the exemplars tell which is whose."""

import random
from pathlib import Path

import pytest

from data.drafts import Draft, Rejection, pair_and_twin
from data.kinds.restyle import HOLDS, KIND, MOST, MOVED, draft, fault, moved, pick
from data.kinds.rewrites import BY_NAME, REWRITES
from data.shelf import Shelf, shelves
from data.writings import Piece, read_writings
from nanopersrm.pairs import check_twins
from nanopersrm.style.features import measure
from nanopersrm.style.profile import reference

DEMO = Path(__file__).parents[2] / "data" / "demo"


@pytest.fixture(scope="module")
def shelf() -> Shelf:
    return shelves(read_writings(DEMO), 0)["train"]


@pytest.fixture(scope="module")
def found(shelf: Shelf) -> list[Draft]:
    proposals = [draft(shelf, random.Random(seed), 1 + seed % 3) for seed in range(40)]
    return [one for one in proposals if isinstance(one, Draft)]


def z(name: str, value: float | None) -> float:
    assert value is not None
    return reference().z(name, value)


def test_many_proposals_are_accepted_with_many_rewrites(found: list[Draft]):
    assert len(found) >= 20
    assert len({name for one in found for name in one.meta["rewrites"]}) >= 8
    assert {len(one.meta["rewrites"]) for one in found} == set(range(1, MOST + 1))


def test_the_chosen_factors_move_and_the_others_hold(found: list[Draft]):
    for one in found:
        rewrites = [BY_NAME[name] for name in one.meta["rewrites"]]
        sides = [(one.text_1,), (one.text_2,), one.exemplars_1, one.exemplars_2]
        before, after, mine, theirs = (measure(side) for side in sides)
        declared = {name for r in rewrites for name in (r.factor, *r.also)}
        for rewrite in rewrites:
            name = rewrite.factor
            assert rewrite.direction * (z(name, after[name]) - z(name, before[name])) >= MOVED
            assert rewrite.direction * (z(name, theirs[name]) - z(name, mine[name])) >= MOVED
            assert one.meta["before"][name] == pytest.approx(before[name], abs=0.01)
            assert one.meta["exemplars_after"][name] == pytest.approx(theirs[name], abs=0.01)
        for name in before.keys() - declared:
            if before[name] is not None and after[name] is not None:
                assert abs(z(name, after[name]) - z(name, before[name])) <= HOLDS
        assert len({rewrite.family for rewrite in rewrites}) == len(rewrites)


def test_the_names_say_who_wrote_what(found: list[Draft]):
    for one in found:
        kind, names, author = one.from_2.split(":")
        assert (kind, author, names.split(",")) == (KIND, one.author, one.meta["rewrites"])
        assert one.from_1.startswith(f"{one.author}/")
        assert one.text_1.split() != one.text_2.split()  # more than the layout
        texts = (*one.exemplars_1, *one.exemplars_2, one.text_1, one.text_2)
        assert len(set(texts)) == len(texts)
        check_twins(list(pair_and_twin(one, "x", "train")))


def test_the_same_draws_give_the_same_draft(shelf: Shelf):
    for seed in range(4):
        assert draft(shelf, random.Random(seed), 2) == draft(shelf, random.Random(seed), 2)


def test_too_few_sources_are_rejected():
    pieces = [Piece("ann", "t", None, "It's late. I can't stay. We're off.", "d")]
    lonely = shelves(pieces, 0)["train"]
    rejection = draft(lonely, random.Random(0), 1)
    assert rejection == Rejection(KIND, "too few sources by the writer")


def test_texts_without_a_place_are_rejected():
    pieces = [Piece("ann", f"t{k}", None, "MILK 42", "d") for k in range(3)]
    bare = shelves(pieces, 0)["train"]
    rejection = draft(bare, random.Random(0), 1)
    assert isinstance(rejection, Rejection)
    assert rejection.reason.startswith("no rewrite shows")


SHORT = "It's late. I can't stay. He's not here, and they're gone."
FULL = "It is late. I cannot stay. He is not here, and they are gone."
EXPAND = BY_NAME["contractions-"]


def test_a_move_has_a_direction():
    short, full = measure([SHORT]), measure([FULL])
    assert moved(EXPAND, short, full) > MOVED
    assert moved(BY_NAME["contractions+"], short, full) < -MOVED
    assert moved(BY_NAME["british+"], short, full) == 0.0  # no word with two spellings


def test_what_is_wrong_is_named():
    short, full = measure([SHORT]), measure([FULL])
    assert fault([EXPAND], short, full, short, full) == ""
    assert fault([EXPAND], short, short, short, full) == (
        "a chosen factor does not move in the passage"
    )
    assert fault([EXPAND], short, full, full, full) == (
        "a chosen factor does not move in the exemplars"
    )
    louder = measure([FULL.replace(".", "!")])
    assert fault([EXPAND], short, louder, short, full) == "another factor moves"
    between = {**full, "contractions": 4.0}
    assert fault([EXPAND], between, full, {**short, "contractions": 40.0}, between) == (
        "a candidate is no nearer to its own exemplars"
    )


def test_picked_rewrites_show_and_do_not_touch_each_other():
    text = "It's late! I can't stay! They're gone; he's here; we're off! It was - well - good."
    for seed in range(12):
        order = random.Random(seed).sample(REWRITES, len(REWRITES))
        chosen = pick(order, MOST, text, [text, text], seed)
        assert 1 <= len(chosen) <= MOST
        for one in chosen:
            assert one.apply(text, random.Random(seed)) != text
            for other in chosen:
                if one is not other:
                    assert one.factor not in {other.factor, *other.also}
    silent = [one for one in REWRITES if one.name == "exclamations-"]
    assert pick(silent, 1, text, ["No mark here."], 0) == []
