"""Synonyms: which words can be swapped, for what, and which must be left alone."""

import pytest

from data.kinds.synonyms import inflect, lexicon, opens_sentence, places, swap

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


@pytest.mark.parametrize(
    ("verb", "forms"),
    [
        ("stop", "stop stops stopped stopped stopping"),
        ("try", "try tries tried tried trying"),
        ("stay", "stay stays stayed stayed staying"),
        ("die", "die dies died died dying"),
        ("agree", "agree agrees agreed agreed agreeing"),
        ("use", "use uses used used using"),
        ("push", "push pushes pushed pushed pushing"),
        ("quip", "quip quips quipped quipped quipping"),
        ("look", "look looks looked looked looking"),
        ("show", "show shows showed showed showing"),
        ("happen", "happen happens happened happened happening"),
    ],
)
def test_regular_forms(verb: str, forms: str):
    assert inflect(verb) == tuple(forms.split())


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
    assert swap(text, favourites, frozenset({"large"})) == "Perhaps it was big; perhaps a big one."
    assert swap(text, {}) == text


def test_where_sentences_open():
    text = 'He left. "Why?" she said, and\nThen'
    assert [opens_sentence(text, text.index(w)) for w in ("He", "Why", "she", "and", "Then")] == [
        True,
        True,
        True,  # after a question mark and a quote; a small letter opens nothing
        False,
        True,
    ]
