"""Restyle: a rewrite moves its factor and no other; the exemplars tell which text is whose.

The texts are the invented ones of `data/demo`, sentences made up here, and mixtures of those.
"""

import json
import random
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data.corpus import read_corpora, split_corpora
from data.kinds.restyle import (
    BY_NAME,
    HOLDS,
    KIND,
    MOST,
    MOVED,
    REWRITES,
    Rewrite,
    apply_all,
    fault,
    moved,
    propose,
)
from data.proposals import Proposal, pair_and_twin
from nanopersrm.pairs import check_twins
from nanopersrm.style.features import measure
from nanopersrm.style.profile import reference
from nanopersrm.style.text import WORD

DEMO = Path(__file__).parents[2] / "data" / "demo"
TOLERANCE = 0.5  # z units that a factor without a declared side effect may move in 100 words
TEXTS = [path.read_text(encoding="utf-8").strip() for path in sorted(DEMO.glob("*/*.txt"))]
# Rewrite, text before and after; where they are alike, the rewrite must keep its hands off.
CASES = json.loads(Path(__file__).with_name("examples.json").read_text("utf-8"))["rewrites"]
MARKS_ONLY = ("semicol", "dashes", "brack", "exclamations", "ellipses", "paragraphs", "lowercase")
ADDING = ("hedges+", "boosters+", "that+", "conjunction_openings+", "sentence_length+")
DROPPING = ("hedges-", "boosters-", "that-")
SENTENCES = sorted({text for _, *pair in CASES for text in pair if "\n" not in text}) + TEXTS[::9]
mixtures = st.lists(st.sampled_from(SENTENCES), min_size=1, max_size=6).flatmap(
    lambda own: st.sampled_from([" ", "\n\n"]).map(lambda gap: gap.join(own))
)


def draws() -> random.Random:
    return random.Random("rewrites")


def words(text: str) -> list[str]:
    return [word.lower() for word in WORD.findall(text)]


def bare(own: list[str]) -> list[str]:
    """Without "a" and "an", which follow the word behind them."""
    return [word for word in own if word not in ("a", "an")]


def is_within(few: list[str], many: list[str]) -> bool:
    """Whether `few` is `many` with some left out."""
    rest = iter(many)
    return all(word in rest for word in few)


@pytest.mark.parametrize(("name", "before", "after"), CASES)
def test_an_example(name: str, before: str, after: str):
    assert BY_NAME[name].apply(before, draws()) == after


@pytest.mark.parametrize("rewrite", REWRITES, ids=lambda rewrite: rewrite.name)
def test_the_factor_moves_and_the_others_hold(rewrite: Rewrite):
    against, changed = reference(), 0
    for text in [*TEXTS, *SENTENCES]:
        after = rewrite.apply(text, draws())
        if after == text:
            continue
        changed += 1
        old, new = measure([text]), measure([after])
        was, became = old[rewrite.factor], new[rewrite.factor]
        if was is not None and became is not None:
            at_end = rewrite.factor == "british" and was == became in (0.0, 100.0)
            assert rewrite.direction * (became - was) > 0 or at_end, (text, after)
        if text not in TEXTS:
            continue  # one sentence more is half of a text of two
        for name in old.keys() - {rewrite.factor, *rewrite.also}:
            a, b = old[name], new[name]
            if a is not None and b is not None:
                assert abs(against.z(name, b) - against.z(name, a)) <= TOLERANCE, (name, text)
    assert changed >= 1


@pytest.mark.parametrize("rewrite", REWRITES, ids=lambda rewrite: rewrite.name)
def test_without_a_place_the_text_stays(rewrite: Rewrite):
    for text in ("", " \n", "- tea\n- eggs\n", "\n\n\n", "...?", "((", '"'):
        if rewrite.name not in ("ellipses-", "exclamations-"):
            assert rewrite.apply(text, draws()) == text
        rewrite.apply(text, draws())  # never raises


@settings(max_examples=40, deadline=None)
@given(mixtures)
def test_a_second_time_changes_nothing(text: str):
    for rewrite in REWRITES:
        once = rewrite.apply(text, draws())
        assert rewrite.apply(once, random.Random("other draws")) == once, rewrite.name


@settings(max_examples=40, deadline=None)
@given(mixtures)
def test_no_word_is_lost(text: str):
    own = words(text)
    for rewrite in REWRITES:
        after = words(rewrite.apply(text, draws()))
        if rewrite.name.startswith(MARKS_ONLY):
            assert after == own, rewrite.name
        elif rewrite.name in ADDING:
            assert is_within(bare(own), bare(after)), rewrite.name
        elif rewrite.name in DROPPING:
            assert is_within(bare(after), bare(own)), rewrite.name


def test_several_are_applied_in_the_order_of_the_table():
    several = [BY_NAME[name] for name in ("lowercase_starts+", "exclamations+", "contractions-")]
    before = "It's late. I can't stay."
    for order in (several, several[::-1]):
        assert apply_all(order, before, 0) == "it is late! i cannot stay!"


@pytest.fixture(scope="module")
def found() -> list[Proposal]:
    corpus = split_corpora(read_corpora(DEMO), 0)["train"]
    proposals = [propose(corpus, random.Random(seed), 1 + seed % 3) for seed in range(40)]
    return [one for one in proposals if isinstance(one, Proposal)]


def test_the_chosen_factors_move_and_the_others_hold(found: list[Proposal]):
    assert len(found) >= 20
    assert len({name for one in found for name in one.meta["rewrites"]}) >= 8
    assert {len(one.meta["rewrites"]) for one in found} == set(range(1, MOST + 1))
    for one in found:
        rewrites = [BY_NAME[name] for name in one.meta["rewrites"]]
        sides = [(one.text_1,), (one.text_2,), one.exemplars_1, one.exemplars_2]
        before, after, mine, theirs = (measure(side) for side in sides)
        declared = {name for r in rewrites for name in (r.factor, *r.also)}
        for rewrite in rewrites:
            name = rewrite.factor
            assert moved(rewrite, before, after) >= MOVED
            assert moved(rewrite, mine, theirs) >= MOVED
            assert one.meta["before"][name] == pytest.approx(before[name], abs=0.01)
            assert one.meta["exemplars_after"][name] == pytest.approx(theirs[name], abs=0.01)
        for name in before.keys() - declared:
            a, b = before[name], after[name]
            if a is not None and b is not None:
                assert abs(reference().z(name, b) - reference().z(name, a)) <= HOLDS
        assert len({rewrite.family for rewrite in rewrites}) == len(rewrites)


def test_the_names_say_who_wrote_what(found: list[Proposal]):
    for one in found:
        kind, names, author = one.from_2.split(":")
        assert (kind, author, names.split(",")) == (KIND, one.author, one.meta["rewrites"])
        assert one.from_1.startswith(f"{one.author}/")
        assert one.text_1.split() != one.text_2.split()  # more than the layout
        texts = (*one.exemplars_1, *one.exemplars_2, one.text_1, one.text_2)
        assert len(set(texts)) == len(texts)
        check_twins(list(pair_and_twin(one, "x", "train")))


SHORT = "It's late. I can't stay. He's not here, and they're gone."
FULL = "It is late. I cannot stay. He is not here, and they are gone."
EXPAND = BY_NAME["contractions-"]


def test_what_is_wrong_is_named():
    short, full = measure([SHORT]), measure([FULL])
    assert moved(EXPAND, short, full) > MOVED > 0 > moved(BY_NAME["contractions+"], short, full)
    assert moved(BY_NAME["british+"], short, full) == 0.0  # no word with two spellings
    assert fault([EXPAND], short, full, short, full) == ""
    between, many = {**full, "contractions": 4.0}, {**short, "contractions": 40.0}
    louder = measure([FULL.replace(".", "!")])
    for measured, reason in (
        ((short, short, short, full), "a chosen factor does not move in the passage"),
        ((short, full, full, full), "a chosen factor does not move in the exemplars"),
        ((short, louder, short, full), "another factor moves"),
        ((between, full, many, between), "a candidate is no nearer to its own exemplars"),
    ):
        assert fault([EXPAND], *measured) == reason
