"""Proposals: for each rule one that breaks it and nothing else; pair and twin; a coin's order."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from data.corpus import Corpus, Lengths
from data.proposals import Proposal, Taken, check_set, fault, pair_and_twin, text_fault
from nanopersrm import InputError
from nanopersrm.pairs import Pair

CORPUS = Corpus("train", {}, {"d": frozenset({"heathcliff"})}, Lengths((20, 30), (20, 30)))


def text(stem: str, words: int = 24, end: str = "stop.") -> str:
    return " ".join([f"{stem}{i}" for i in range(words - 1)]).capitalize() + " " + end


PROPOSAL = Proposal(
    kind="cross_author",
    domain="d",
    author="Jane Austen",
    exemplars_1=(text("a"), text("b")),
    exemplars_2=(text("c"), text("e")),
    text_1=text("f"),
    text_2=text("g"),
    from_1="Jane Austen/Emma",
    from_2="Walter Scott/Waverley",
    meta={"author_2": "Walter Scott"},
)
NAMED = {"exemplars_2": (text("a", end="Heathcliff."),), "text_2": text("f", end="Heathcliff!")}


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"text_2": PROPOSAL.text_1 + " "}, "same text twice"),
        ({"text_2": text("g", 31)}, "lengths differ"),
        ({"text_1": text("f", 14), "text_2": text("g", 14)}, "too few words"),
        ({"exemplars_2": (text("c", 14),)}, "too few words"),
        ({"exemplars_2": (text("c"), text("a"))}, "same exemplar twice"),
        ({"text_1": text("f", end="<b>stop</b>.")}, "markup"),
        ({"exemplars_1": (text("a", end="[name] came."),)}, "masked name"),
        ({"text_1": text("f", end="and,")}, "unfinished"),
        ({"text_2": text("g", end="stop"), "from_2": "model:base:x"}, "unfinished"),
        ({"text_1": text("f", end='said. "Then.')}, "cut quotation"),
        ({"text_1": text("f", end="by Austen.")}, "writer's name"),
        ({"exemplars_2": (text("c", end="is Scott's."),)}, "writer's name"),
        ({"exemplars_1": (text("f", 26),)}, "passage of an exemplar"),
        (NAMED, "tell-tale name"),
    ],
)
def test_a_broken_rule_is_named(change: dict[str, Any], reason: str):
    assert fault(replace(PROPOSAL, **change), CORPUS, Taken()) == reason


@pytest.mark.parametrize(
    "change",
    [
        {"text_2": text("g", 30)},  # 25 % longer
        {"text_1": text("f", end="without a mark")},  # a person may
        {"text_1": text("f") + "\nWith love,"},
        {"text_2": text("g", end="done 🎉"), "from_2": "model:base:x"},
        {"text_1": text("f", end="by Scott.")},  # somebody else's name
        {  # a name that both candidates hold
            "exemplars_1": (text("a", end="Heathcliff."),),
            "text_1": text("f", end="Heathcliff!"),
            "text_2": text("g", end="Heathcliff."),
        },
        {"text_1": '"Why not?" ' + text("f", end='"So?"') + '\n\n"It goes on.'},
    ],
)
def test_what_looks_wrong_and_is_not(change: dict[str, Any]):
    assert fault(replace(PROPOSAL, **change), CORPUS, Taken()) is None


def test_a_candidate_serves_once():
    taken = Taken()
    assert fault(replace(PROPOSAL, exemplars_1=(text("f", 26),)), CORPUS, taken) is not None
    assert fault(PROPOSAL, CORPUS, taken) is None  # what was rejected has taken nothing
    assert fault(PROPOSAL, CORPUS, taken) == "candidate already taken"
    overlap = " ".join(PROPOSAL.text_2.split()[:12]) + " " + text("h", 12)
    again = replace(PROPOSAL, text_1=text("i"), text_2=overlap)
    assert fault(again, CORPUS, taken) == "candidate already taken"
    assert fault(replace(PROPOSAL, text_1=text("i"), text_2=text("j")), CORPUS, taken) is None


def test_a_candidate_may_serve_more_often():
    taken = Taken(reuse=2)
    found = [fault(PROPOSAL, CORPUS, taken) for _ in range(3)]
    assert found == [None, None, "candidate already taken"]
    near = replace(PROPOSAL, text_2=PROPOSAL.text_1.replace("f20", "x"))  # both hold most of it
    taken = Taken(reuse=2)
    assert [fault(near, CORPUS, taken) for _ in range(2)] == [None, None]


def test_markup():
    for plain in ("I <3 you, 2 < 3 & 4 > 1.", "A * star * here.", "#1 [sic] (b)."):
        assert text_fault(plain, 0) is None
    examples = json.loads(Path(__file__).with_name("examples.json").read_text("utf-8"))
    for marked in examples["markup"]:
        assert text_fault(marked, 0) == "markup"


def test_pair_and_twin_have_the_same_texts_in_opposite_roles():
    pair, twin = sorted(pair_and_twin(PROPOSAL, "x-1", "test"), key=lambda p: p.author)
    assert (pair.author, twin.author) == ("Jane Austen", "Walter Scott")
    assert (pair.exemplars, twin.exemplars) == (PROPOSAL.exemplars_1, PROPOSAL.exemplars_2)
    assert (twin.rejected, twin.rejected_from) == (PROPOSAL.text_1, PROPOSAL.from_1)
    assert (pair.chosen, pair.chosen_from) == (PROPOSAL.text_1, PROPOSAL.from_1)
    assert (twin.chosen, twin.chosen_from) == (PROPOSAL.text_2, PROPOSAL.from_2)
    assert {pair.id, twin.id} == {"x-1a", "x-1b"}
    assert (pair.twin, twin.twin, pair.split) == (twin.id, pair.id, "test")


def set_of(number: int) -> list[Pair]:
    model = replace(PROPOSAL, from_2="model:base:x", meta={})
    return [pair for i in range(number) for pair in pair_and_twin(model, f"{i}", "train")]


def test_a_coin_decides_the_order_of_twins():
    pairs = set_of(200)
    check_set(pairs)
    person_first = sum(pair.chosen_from == PROPOSAL.from_1 for pair in pairs[::2])
    assert 70 < person_first < 130
    for first, second in zip(pairs[::2], pairs[1::2], strict=True):
        assert first.id < second.id


def test_a_set_that_tells_by_position_is_caught():
    pairs = set_of(40)
    both = zip(pairs[::2], pairs[1::2], strict=True)
    ordered = [sorted(twins, key=lambda pair: pair.chosen_from) for twins in both]
    with pytest.raises(AssertionError):
        check_set([pair for twins in ordered for pair in twins])
    with pytest.raises(AssertionError):
        check_set([*pairs[:1], *pairs[2:], pairs[1]])
    with pytest.raises(InputError, match="twin"):
        check_set(pairs[:-1])
