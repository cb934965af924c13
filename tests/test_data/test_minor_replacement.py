"""Minor replacement: 3 or 4 words change, nothing else, and the exemplars tell which is whose."""

import random

import pytest

from data.corpus import Corpus, Lengths, Piece, split_corpora
from data.kinds.minor_replacement import (
    CHANGES,
    KIND,
    SHOWN,
    check,
    choose,
    lexicon,
    places,
    propose,
    swap,
)
from data.proposals import Proposal, Rejection, pair_and_twin
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


def corpus_of(lines: tuple[str, ...], texts: int = 6) -> Corpus:
    pieces = [
        Piece("ann", f"t{k}", None, " ".join(line.format(i=k) for line in lines * 2), "d", "Why?")
        for k in range(texts)
    ]
    return split_corpora(pieces, 0, (), LENGTHS)["train"]


def proposals_of(exemplars: int) -> list[Proposal]:
    corpus = corpus_of(LINES)
    found = [propose(corpus, random.Random(seed), exemplars) for seed in range(40)]
    return [one for one in found if isinstance(one, Proposal)]


def test_a_few_words_change_and_the_exemplars_tell():
    found, exemplars = proposals_of(2), 2
    assert len(found) > 20
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
        assert told >= SHOWN
        assert len(one.meta["told"]) >= SHOWN
        check_twins(list(pair_and_twin(one, "x", "train")))


def test_what_does_not_fit_is_rejected_with_a_reason():
    def reason(corpus: Corpus, exemplars: int = 1) -> str:
        found = propose(corpus, random.Random(0), exemplars)
        assert isinstance(found, Rejection)
        return found.reason

    assert reason(corpus_of((DULL,))) == "too few words to swap"
    assert reason(corpus_of(LINES, 2), 2) == "too few sources by the writer"
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
    two = "Perhaps it was often cheap and large, maybe almost."  # of one group: no favourite
    favourites, _ = choose(two, ["Perhaps it was often cheap, almost certainly large."], rng)
    assert not {place.group for place in places("Perhaps.")} & set(favourites)


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
    with pytest.raises(AssertionError):
        check("It was perhaps often cheap, tom.", after)


# What each text offers: word as written -> what it can become
OFFERS = [
    ("They began the work.", {"began": {"started", "commenced"}}),
    ("It had begun at noon.", {"begun": {"started", "commenced"}}),
    ("She begins to sing.", {"begins": {"starts", "commences"}}),
    ("He was beginning to sing.", {"beginning": {"starting", "commencing"}}),
    ("They spoke to him.", {"spoke": {"talked"}}),
    ("He had spoken to her.", {"spoken": {"talked"}}),
    ("He talked to her.", {"talked": {"spoke"}}),  # the past, not "spoken"
    ("It was talked of.", {"talked": {"spoken"}}),
    ("Perhaps it rained.", {"Perhaps": {"Maybe", "Possibly"}}),
    ("It was a large house.", {"large": {"big"}}),
    ("It was an enormous house.", {"enormous": {"immense"}}),  # not "an huge"
    ("It was a huge house.", {"huge": {"vast"}}),
    ("We want to go.", {"want": {"wish", "desire"}}),
    ("She told him that it rained.", {"told": {"informed"}}),
    ("It was, however, late.", {"however": {"nevertheless", "nonetheless"}}),
]
NOTHING = [
    "In the beginning was the word.",  # a noun
    "We want a dog.",  # "want" without "to"
    "The quiet of the evening.",  # an adjective that stands like a noun
    "He went to Little Dorrit and Large.",  # names
    "A large-scale plan, 'tis BIG.",  # hyphen, capitals
    "However late it was.",  # not the adverb between commas
    "The start. A look. His attempt.",  # nouns that are verbs elsewhere
    "As soon as he came, very much so.",  # fixed phrases
    "She told him a story.",
]


@pytest.mark.parametrize(("text", "offers"), OFFERS)
def test_what_a_word_can_become(text: str, offers: dict[str, set[str]]):
    found = {text[p.start : p.end]: set(p.options.values()) for p in places(text)}
    assert found == offers


@pytest.mark.parametrize("text", NOTHING)
def test_what_is_left_alone(text: str):
    assert places(text) == ()


def test_the_groups_are_many_and_disjoint():
    known = lexicon()
    words = [word for group in known.groups for word in group.words]
    assert len(known.groups) >= 250
    assert len(words) == len(set(words))
    assert all(len(group.words) > 1 for group in known.groups)
    assert all(word.isalpha() and word.islower() for word in words)
    verbs = {word for group in known.groups if group.kind == "verbs" for word in group.words}
    assert known.nouns <= verbs
    assert known.forms["begin"] == ("begin", "begins", "began", "begun", "beginning")
    assert known.forms["admit"][2] == "admitted"


def test_every_group_works_somewhere():
    """Each word stands where its group wants it, and can be swapped there."""
    for group in lexicon().groups:
        before = sorted(group.after)[0] if group.after else "had" if group.kind == "verbs" else "so"
        if group.kind == "verbs" and not group.after:
            before = "to"
        after = sorted(group.before)[0] if group.before else "." if group.stop else "house"
        then = sorted(group.then)[0] if group.then else "it"
        for word in group.words:
            text = f"Then {before} {word} {after} {then}.".replace(" .", ".")
            if {before} & group.not_after:
                text = text.replace(f" {before} ", " mostly ")
            if group.kind == "verbs" and {before} & group.not_after:
                continue
            assert any(p.lemma == word for p in places(text)), text


def test_a_swap_is_of_all_places_at_once():
    groups = {place.lemma: place.group for place in places("Perhaps it was large, it was big.")}
    favourites = {groups["perhaps"]: "maybe", groups["large"]: "big"}
    text = "Perhaps it was large; perhaps a big one."
    assert swap(text, favourites) == "Maybe it was big; maybe a big one."
    assert swap(text, {}) == text
