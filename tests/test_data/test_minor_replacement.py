"""Minor replacement: 3 or 4 words change, nothing else, and the exemplars tell which is whose."""

import json
import random
from pathlib import Path

import pytest

from data.corpus import Corpus, Lengths, Piece, split_corpora
from data.kinds.minor_replacement import CHANGES, SHOWN, choose, lexicon, places, propose, swap
from data.proposals import Proposal, Rejection, pair_and_twin
from nanopersrm.pairs import check_twins
from nanopersrm.style.text import WORD

EXAMPLES = json.loads(Path(__file__).with_name("examples.json").read_text("utf-8"))
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


def corpus_of(lines: tuple[str, ...], texts: int = 6) -> Corpus:
    pieces = [
        Piece("ann", f"t{k}", None, " ".join(line.format(i=k) for line in lines * 2), "d", "Why?")
        for k in range(texts)
    ]
    return split_corpora(pieces, 0, (), LENGTHS)["train"]


def test_a_few_words_change_and_the_exemplars_tell():
    corpus, exemplars = corpus_of(LINES), 2
    drawn = [propose(corpus, random.Random(seed), exemplars) for seed in range(40)]
    found = [one for one in drawn if isinstance(one, Proposal)]
    assert len(found) > 20
    for one in found:
        old, new = WORD.findall(one.text_1), WORD.findall(one.text_2)
        changed = [[a, b] for a, b in zip(old, new, strict=True) if a != b]
        assert changed == one.meta["swaps"]
        assert CHANGES[0] <= len(changed) <= CHANGES[1]
        assert WORD.split(one.text_1) == WORD.split(one.text_2)  # marks and blanks
        assert all(a[0].isupper() == b[0].isupper() for a, b in changed)
        assert len(one.exemplars_1) == len(one.exemplars_2) == exemplars
        assert one.kind == "minor_replacement"
        assert (one.from_1.split("/")[0], one.from_2) == ("ann", "minor_replacement:ann")
        assert one.question == "Why?"
        told = 0
        mine, theirs = (WORD.findall(" ".join(e)) for e in (one.exemplars_1, one.exemplars_2))
        for a, b in {(a.lower(), b.lower()) for a, b in changed}:
            lower = [word.lower() for word in mine], [word.lower() for word in theirs]
            told += a in lower[0] and b in lower[1] and b not in lower[0]
        assert told >= SHOWN
        assert len(one.meta["told"]) >= SHOWN
        check_twins(list(pair_and_twin(one, "x", "train")))


def test_what_does_not_fit_is_rejected_with_a_reason():
    rng = random.Random(0)
    assert propose(corpus_of((DULL,)), rng, 1) == Rejection("too few words to swap")
    assert propose(corpus_of(LINES, 2), rng, 2) == Rejection("too few sources by the writer")
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
    two = "Perhaps it was often cheap and large, maybe almost."  # of one group: no favourite
    favourites, _ = choose(two, ["Perhaps it was often cheap, almost certainly large."], rng)
    assert not {place.group for place in places("Perhaps.")} & set(favourites)


@pytest.mark.parametrize(("text", "offers"), EXAMPLES["word offers"])
def test_what_a_word_can_become(text: str, offers: dict[str, list[str]]):
    assert {text[p.start : p.end]: sorted(p.options.values()) for p in places(text)} == offers


def test_what_is_left_alone():
    for text in EXAMPLES["nothing to swap"]:  # nouns, names, fixed phrases, other meanings
        assert places(text) == (), text


def test_the_groups_are_many_and_disjoint():
    known = lexicon()
    words = [word for group in known.groups for word in group.words]
    assert len(known.groups) >= 250
    assert len(words) == len(set(words))
    assert all(word.isalpha() and word.islower() for word in words)
    verbs = {word for group in known.groups if group.kind == "verbs" for word in group.words}
    assert known.nouns <= verbs
    assert known.forms["begin"] == ("begin", "begins", "began", "begun", "beginning")


def test_a_swap_is_of_all_places_at_once():
    groups = {place.lemma: place.group for place in places("Perhaps it was large, it was big.")}
    favourites = {groups["perhaps"]: "maybe", groups["large"]: "big"}
    text = "Perhaps it was large; perhaps a big one."
    assert swap(text, favourites) == "Maybe it was big; maybe a big one."
    assert swap(text, {}) == text
