"""Minor replacement: 3 or 4 words change, nothing else, and the exemplars tell which is whose."""

import random

import pytest

from data.drafts import Draft, Rejection, pair_and_twin
from data.kinds.minor_replacement import CHANGES, KIND, TOLD, check, choose, draft, habits
from data.kinds.synonyms import lexicon, places, swap
from data.shelf import Lengths, Shelf, shelves
from data.writings import Piece
from nanopersrm.pairs import check_twins
from nanopersrm.style.text import WORD

LENGTHS = Lengths((15, 25), (30, 45))
LINES = (
    "Perhaps the dog number{i} was often late.",
    "It was probably a large one, and very tired.",
    "They began to sing number{i} and suddenly stopped.",
    "She wanted to go, and she quickly went.",
    "It seemed to be almost empty at number{i}.",
    "He was certainly glad that it was cheap.",
)
DULL = "The cat number{i} sat on the mat and ate the fish of the man with the hat."


def shelf_of(lines: tuple[str, ...], texts: int = 6) -> Shelf:
    pieces = [
        Piece("ann", f"t{k}", None, " ".join(line.format(i=k) for line in lines * 2), "d", "Why?")
        for k in range(texts)
    ]
    return shelves(pieces, 0, (), LENGTHS)["train"]


def drafts(exemplars: int) -> list[Draft]:
    shelf = shelf_of(LINES)
    found = [draft(shelf, random.Random(seed), exemplars) for seed in range(40)]
    return [one for one in found if isinstance(one, Draft)]


@pytest.mark.parametrize("exemplars", [1, 3])
def test_a_few_words_change_and_the_exemplars_tell(exemplars: int):
    found = drafts(exemplars)
    assert len(found) > 20
    assert (TOLD, CHANGES) == (2, (3, 4))
    for one in found:
        check(one.text_1, one.text_2)
        old, new = WORD.findall(one.text_1), WORD.findall(one.text_2)
        changed = [[a, b] for a, b in zip(old, new, strict=True) if a != b]
        assert changed == one.meta["swaps"]
        assert CHANGES[0] <= len(changed) <= CHANGES[1]
        assert WORD.split(one.text_1) == WORD.split(one.text_2)
        assert len(one.exemplars_1) == len(one.exemplars_2) == exemplars
        assert (one.kind, one.from_1.split("/")[0], one.from_2) == (KIND, "ann", f"{KIND}:ann")
        assert one.question == "Why?"
        told = 0
        mine, theirs = (WORD.findall(" ".join(e)) for e in (one.exemplars_1, one.exemplars_2))
        for a, b in {(a.lower(), b.lower()) for a, b in changed}:
            lower = [word.lower() for word in mine], [word.lower() for word in theirs]
            told += a in lower[0] and b in lower[1] and b not in lower[0]
        assert told >= TOLD
        assert len(one.meta["told"]) >= TOLD
        check_twins(list(pair_and_twin(one, "x", "train")))


def test_the_exemplars_are_the_same_texts_from_other_sources():
    for one in drafts(2):
        for before, after in zip(one.exemplars_1, one.exemplars_2, strict=True):
            assert WORD.split(before) == WORD.split(after)
            assert before != after
        assert not any(one.text_1 in text for text in one.exemplars_1)


def test_the_same_draws_give_the_same_draft():
    shelf = shelf_of(LINES)
    for seed in range(5):
        first, second = (draft(shelf, random.Random(seed), 2) for _ in range(2))
        assert first == second
    assert len({str(draft(shelf, random.Random(seed), 2)) for seed in range(8)}) > 1


def test_what_does_not_fit_is_rejected_with_a_reason():
    def reason(shelf: Shelf, exemplars: int = 1) -> str:
        found = draft(shelf, random.Random(0), exemplars)
        assert isinstance(found, Rejection)
        return found.reason

    assert reason(shelf_of((DULL,))) == "too few words to swap"
    assert reason(shelf_of(LINES, 2), 2) == "too few sources by the writer"
    rng = random.Random(0)
    assert choose("It was often very large, perhaps.", ["Nothing here."], rng) == ({}, [])


def test_a_word_is_told_only_where_the_exemplars_never_use_its_replacement():
    text = "Perhaps it was often cheap, almost."
    rng = random.Random(0)
    same = ["Perhaps it was often cheap."]
    favourites, told = choose(text, same, rng)
    assert set(told) == {"perhaps", "often", "cheap"}
    assert swap(text, favourites) != text
    both = ["Perhaps it was often cheap. Maybe, possibly frequently. It was inexpensive."]
    assert choose(text, both, rng) == ({}, [])


def test_other_habits_touch_no_group_of_the_passage():
    text = "Perhaps it was often cheap."
    drawn = habits(text, random.Random(0))
    here = {place.group for place in places(text)}
    assert not here & drawn.keys()
    assert len(drawn) == len(lexicon().groups) - len(here)


@pytest.mark.parametrize(
    "after",
    [
        "It was maybe frequently cheap, tom.",  # 2 words
        "It was maybe frequently inexpensive, bob, or.",  # one more word
        "It was maybe frequently inexpensive; tom.",  # another mark
        "It was Maybe frequently inexpensive, tom.",  # another casing
        "he is maybe frequently inexpensive, tim.",  # 6 words
    ],
)
def test_a_swap_that_changes_more_is_caught(after: str):
    check("It was perhaps often cheap, tom.", "It was maybe frequently inexpensive, tom.")
    with pytest.raises(AssertionError, match="more than it should"):
        check("It was perhaps often cheap, tom.", after)


def test_a_writer_of_two_words_of_a_group_has_no_favourite_to_change():
    exemplars = ["Perhaps it was often cheap, almost certainly a large one."]
    rng = random.Random(0)
    one = choose("Perhaps it was often cheap and large, almost.", exemplars, rng)[0]
    two = choose("Perhaps it was often cheap and large, maybe almost.", exemplars, rng)[0]
    group = next(place.group for place in places("Perhaps.") if place.lemma == "perhaps")
    drawn = [choose("Perhaps it was often cheap, almost.", exemplars, rng)[0] for _ in range(9)]
    assert one
    assert group not in two
    assert any(group in favourites for favourites in drawn)
