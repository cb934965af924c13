"""Cross-author: two people of one domain and period, and the twin that asks for the other one."""

import random

import pytest

from data.drafts import Draft, Rejection, author_2, pair_and_twin
from data.kinds.cross_author import PERIOD, draft
from data.shelf import Lengths, Shelf, shelves
from data.writings import Piece
from nanopersrm.pairs import check_twins

LENGTHS = Lengths((20, 30), (30, 40))


def prose(stem: str) -> str:
    return " ".join(f"{stem}{i} went away again." for i in range(30))


def shelf_of(pieces: list[Piece]) -> Shelf:
    return shelves(pieces, 0, (), LENGTHS)["train"]


def works(author: str, year: int | None, domain: str = "d", question: str = "") -> list[Piece]:
    return [
        Piece(author, f"t{k}", year, prose(f"{author}{k}x"), domain, question) for k in range(3)
    ]


def drafts(shelf: Shelf, exemplars: int = 2) -> list[Draft]:
    found = [draft(shelf, random.Random(seed), exemplars) for seed in range(60)]
    return [one for one in found if isinstance(one, Draft)]


def test_a_draft_is_of_two_writers_with_their_own_exemplars():
    shelf = shelf_of([*works("ann", None), *works("bob", None), *works("cy", None, "e")])
    found = drafts(shelf)
    assert found  # cy has nobody to be set against
    for one in found:
        assert {one.author, author_2(one)} == {"ann", "bob"}
        sides = (
            (one.author, one.text_1, one.exemplars_1, one.from_1),
            (
                author_2(one),
                one.text_2,
                one.exemplars_2,
                one.from_2,
            ),
        )
        for author, text, exemplars, written_by in sides:
            work = text[: text.index("x")]
            assert written_by == f"{author}/t{work[-1]}"
            assert len(exemplars) == 2
            assert all(e.startswith(author) and not e.startswith(work) for e in exemplars)
            assert 18 <= len(text.split()) <= 32


def test_a_writer_alone_is_rejected():
    alone = draft(shelf_of(works("ann", None)), random.Random(0), 1)
    assert alone == Rejection("cross_author", "no other writer in the domain")


def test_too_few_exemplars_are_a_rejection():
    shelf = shelf_of([*works("ann", None), *works("bob", None)])
    assert draft(shelf, random.Random(0), 2) != draft(shelf, random.Random(0), 3)
    assert draft(shelf, random.Random(0), 3) == Rejection("cross_author", "too few other texts")


def test_writers_of_one_period_are_preferred():
    shelf = shelf_of([*works("ann", 1800), *works("bob", 1830), *works("cy", 1900)])
    couples = {frozenset((one.author, author_2(one))) for one in drafts(shelf)}
    # cy is 70 years from the nearest, and asked for all the same
    assert couples == {frozenset(("ann", "bob")), frozenset(("bob", "cy"))}
    assert 1830 - 1800 <= PERIOD < 1900 - 1830


def test_an_unknown_year_fits_all():
    shelf = shelf_of([*works("ann", 1800), *works("bob", None), *works("cy", 1900)])
    couples = {frozenset((one.author, author_2(one))) for one in drafts(shelf)}
    assert couples == {frozenset(("ann", "bob")), frozenset(("bob", "cy"))}


@pytest.mark.parametrize(("other", "kept"), [("Why?", "Why?"), ("How?", "")])
def test_a_question_stays_when_both_answer_it(other: str, kept: str):
    shelf = shelf_of([*works("ann", 1, question="Why?"), *works("bob", 1, question=other)])
    assert {one.question for one in drafts(shelf)} == {kept}


def test_pair_and_twin_are_twins():
    one = drafts(shelf_of([*works("ann", 1800), *works("bob", 1830)]))[0]
    pair, twin = pair_and_twin(one, "x-1", "test")
    check_twins([pair, twin])
    assert (pair.id, pair.split, pair.author, pair.exemplars) == (
        "x-1a",
        "test",
        one.author,
        one.exemplars_1,
    )
    assert (twin.id, twin.split, twin.author, twin.exemplars) == (
        "x-1b",
        "test",
        author_2(one),
        one.exemplars_2,
    )
    assert (pair.chosen, pair.chosen_from) == (one.text_1, one.from_1)
    assert (twin.chosen, twin.chosen_from) == (one.text_2, one.from_2)
