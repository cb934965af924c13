"""Accept: one sound draft, and for each rule a draft that breaks it and nothing else."""

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from data.accept import Taken, changed_words, fault, shared_share, text_fault
from data.drafts import Draft
from data.names import Names
from data.shelf import Lengths, Shelf

SHELF = Shelf("train", {}, {"d": Names(9, {"heathcliff": 1})}, Lengths((20, 30), (20, 30)))


def text(stem: str, words: int = 24, end: str = "stop.") -> str:
    return " ".join([f"{stem}{i}" for i in range(words - 1)]).capitalize() + " " + end


DRAFT = Draft(
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


def test_a_sound_draft_is_accepted():
    assert fault(DRAFT, SHELF, Taken()) is None


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"text_2": DRAFT.text_1 + " "}, "same text twice"),
        ({"text_2": text("g", 31)}, "lengths differ"),
        ({"text_1": text("f", 14), "text_2": text("g", 14)}, "too few words"),
        ({"exemplars_2": (text("c", 14),)}, "too few words"),
        ({"exemplars_2": (text("c"), text("c"))}, "same exemplar twice"),
        ({"exemplars_2": (text("c"), text("a"))}, "same exemplar twice"),
        ({"text_1": text("f", end="<b>stop</b>.")}, "markup"),
        ({"exemplars_1": (text("a", end="[name] came."),)}, "masked name"),
        ({"text_1": text("f", end="and,")}, "unfinished"),
        ({"text_2": text("g", end="stop"), "from_2": "model:base:x"}, "unfinished"),
        ({"text_1": text("f", end='said. "Then.')}, "cut quotation"),
        ({"text_1": text("f", end="by Austen.")}, "writer's name"),
        ({"exemplars_2": (text("c", end="is Scott's."),)}, "writer's name"),
        ({"exemplars_1": (text("f", 26),)}, "passage of an exemplar"),
        ({"exemplars_1": (text("g", 26),)}, "passage of an exemplar"),
        (
            {
                "exemplars_1": (text("a", end="Heathcliff."),),
                "text_1": text("f", end="Heathcliff!"),
            },
            "tell-tale name",
        ),
        (
            {
                "exemplars_2": (text("a", end="Heathcliff."),),
                "text_2": text("f", end="Heathcliff!"),
            },
            "tell-tale name",
        ),
    ],
)
def test_a_broken_rule_is_named(change: dict[str, Any], reason: str):
    assert fault(replace(DRAFT, **change), SHELF, Taken()) == reason


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
    assert fault(replace(DRAFT, **change), SHELF, Taken()) is None


def test_a_candidate_serves_once():
    taken = Taken()
    assert fault(DRAFT, SHELF, taken) is None
    assert fault(DRAFT, SHELF, taken) == "candidate already taken"
    overlap = " ".join(DRAFT.text_2.split()[:12]) + " " + text("h", 12)
    again = replace(DRAFT, text_1=text("i"), text_2=overlap)
    assert fault(again, SHELF, taken) == "candidate already taken"
    assert fault(replace(DRAFT, text_1=text("i"), text_2=text("j")), SHELF, taken) is None


def test_a_rejected_draft_takes_nothing():
    taken = Taken()
    assert fault(replace(DRAFT, exemplars_1=(text("f", 26),)), SHELF, taken) is not None
    assert fault(DRAFT, SHELF, taken) is None


def test_a_candidate_may_serve_more_often():
    taken = Taken(reuse=2)
    found = [fault(DRAFT, SHELF, taken) for _ in range(3)]
    assert found == [None, None, "candidate already taken"]
    near = replace(DRAFT, text_2=DRAFT.text_1.replace("f20", "x"))  # both hold most of it
    taken = Taken(reuse=2)
    assert [fault(near, SHELF, taken) for _ in range(2)] == [None, None]


@pytest.mark.parametrize(
    "bad",
    [
        "See [this](http://x.org).",
        "One &amp; two.",
        "# Title\nText.",
        "A ```code``` span.",
        "['A list', 'as text']",
        '["A list"]',
        "A line\\nand a line.",
        "Broken \ufffd letter.",
        "The end.<|im_end|>",
        "| a | b |\nText.",
        "Some **bold** words.",
    ],
)
def test_markup(bad: str):
    assert text_fault(bad, 0) == "markup"


@pytest.mark.parametrize("good", ["I <3 you, 2 < 3 & 4 > 1.", "A * star * here.", "#1 [sic] (b)."])
def test_no_markup(good: str):
    assert text_fault(good, 0) is None


@pytest.mark.parametrize("bad", [", and so on.", "He left the", "It was a Mon-", "He said:"])
def test_broken_off_texts_of_a_model(bad: str):
    assert text_fault(bad, 0, strict=True) == "unfinished"


def test_shared_share():
    words = [f"w{i}" for i in range(107)]
    eight = " ".join(words[:8])
    assert shared_share(" ".join(words), (f"x {eight.upper()} y",)) == 1 / 100
    assert shared_share("two words", ("two words",)) == 1.0
    assert shared_share("two words", ("one two words",)) == 0.0


@pytest.mark.parametrize(
    ("before", "after", "count"),
    [
        ("A big dog ran.", "A big dog ran.", 0),
        ("A big dog ran.", "A large dog ran.", 1),
        ("A big dog ran.", "A large dog ran away.", 3),
        ("A big dog ran.", "The dog.", 4),
        ("A  big\ndog ran.", "A big dog ran.", 0),
        ("", "Two words", 2),
    ],
)
def test_changed_words(before: str, after: str, count: int):
    assert changed_words(before, after) == count


@given(st.lists(st.integers(0, 30), unique=True, max_size=4))
def test_changed_words_counts_swaps(places: list[int]):
    words = [f"w{i}" for i in range(31)]
    swapped = [f"x{i}" if i in places else word for i, word in enumerate(words)]
    assert changed_words(" ".join(words), " ".join(swapped)) == len(places)
