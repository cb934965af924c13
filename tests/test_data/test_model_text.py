"""Model text: openings, rounds and cuts with a scripted model, and every way to fail."""

import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from data.corpus import Source
from data.kinds.model_text import (
    MOST,
    SYSTEM,
    Prompt,
    Request,
    Style,
    compose,
    draw_opening,
    first_words,
    load_continuer,
    model_fault,
    packed,
    sentence_ends,
    tidy,
    without_loop,
)

EXAMPLES = json.loads(Path(__file__).with_name("examples.json").read_text("utf-8"))
TEXT = " ".join(f"Ship {i} lay in the bay until March. Then it went {i}." for i in range(30))


def source(text: str, question: str = "") -> Source:
    return Source("d", "Ann", "t", None, text, question, 7)


def test_an_opening_is_a_sentence_and_the_rest_follows_it():
    found = {draw_opening(source(TEXT), 60, random.Random(seed)) for seed in range(60)}
    for opening in found - {None}:
        assert opening is not None
        assert opening.text.endswith("lay in the bay until March.")  # the other is too short
        assert f"{opening.text} {opening.rest}" in TEXT
        assert 60 <= len(opening.rest.split()) <= 60 + MOST + 10
    assert len(found - {None}) > 5
    asked = draw_opening(source(TEXT, " Why? "), 60, random.Random(0))
    assert asked is not None
    assert (asked.text, asked.rest) == ("Why?", TEXT)


def test_what_cannot_open_is_refused():
    short = "No. Not I. Never so. " * 20
    listed = "- one thing that I should like to have.\n- another thing that I want."
    quoted = '"I went to the market with my brother. We ate." So he said it. ' * 9
    endless = "so we went on " * 60
    for text in (short, listed, endless):
        assert draw_opening(source(text), 60, random.Random(0)) is None
    for seed in range(30):
        opening = draw_opening(source(quoted), 60, random.Random(seed))
        assert opening is None or opening.text.count('"') % 2 == 0


def test_first_words_ends_where_a_sentence_does():
    text = 'One two.  Three four five!\n\nSix (seven?) "Eight. Nine." Ten'
    assert [words for words, _ in sentence_ends(text)] == [2, 5, 7, 9]
    assert first_words(text, 1) == "One two."
    assert first_words(text, 5) == "One two.  Three four five!"
    assert first_words(text, 99) == text.removesuffix(" Ten")
    assert first_words("no end", 5) == ""


TURNS = (("It was a day in May.", "The sun was out."),)
LINES = [f"Number {i} said that it was word{i} for him{i}. " for i in range(99)]


def request(opening: str = "The men went home.", words: int = 30) -> Request:
    return Request(opening, Style(TURNS, 0.8, 50), words)


class Script:
    """Says the next line of a script to each prompt, and keeps its calls."""

    def __init__(self, *replies: tuple[str, bool]):
        self.replies, self.calls = replies, []  # type: tuple[tuple[str, bool], ...], list

    def __call__(self, prompts: Sequence[Prompt], *rest: Any) -> list[tuple[str, bool]]:
        reply = self.replies[min(len(self.calls), len(self.replies) - 1)]
        self.calls.append((list(prompts), *rest))
        return [reply for _ in prompts]


def test_a_reply_is_cut_at_the_sentence_end_nearest_to_the_length():
    script = Script(("".join(LINES[:6]) + "And then", False))  # nine words a sentence
    assert compose([request(words=30)], script) == ["".join(LINES[:3]).strip()]
    assert len(script.calls) == 1


def test_the_model_sees_the_turns_and_the_opening():
    script = Script(("".join(LINES[:5]), False))
    compose([request()], script)
    ((messages, reply),) = script.calls[0][0]
    assert reply == ""
    assert [m["role"] for m in messages] == ["system", "user", "assistant", "user"]
    assert [m["content"] for m in messages] == [SYSTEM, *TURNS[0], "The men went home."]


def test_an_early_end_goes_on_after_a_blank_line_in_one_paragraph():
    script = Script((LINES[0], True), ("".join(LINES[1:5]), False))
    assert compose([request(words=27)], script) == ["".join(LINES[:3]).strip()]
    assert [prompts[0][1] for prompts, *_ in script.calls] == ["", LINES[0].strip() + "\n\n"]


def test_a_loop_is_cut_back_and_drawn_again_from_there():
    script = Script((LINES[0] + LINES[0] + "So", False), (" " + "".join(LINES[2:6]), False))
    assert compose([request(words=27)], script) == [(LINES[0] + LINES[2] + LINES[3]).strip()]
    assert script.calls[1][0][0][1] == LINES[0].strip()


@pytest.mark.parametrize(
    ("reply", "enough"),
    [
        ("".join(LINES[:2]), False),  # too few words
        ("".join(LINES[:4]), True),
        ("".join(LINES[:4]) + "And now", False),  # inside a sentence
        ("so on " * 20, True),  # far too long, and a loop
        ("he had no men. " * 3, True),  # a loop
    ],
)
def test_when_a_reply_is_stopped(reply: str, enough: bool):
    script = Script(("".join(LINES[:5]), False))
    compose([request(words=31)], script)
    _, (test,), *_, budget = script.calls[0]
    assert test(reply) is enough
    assert budget >= 31 * 1.4


@pytest.mark.base
@pytest.mark.slow
def test_the_embedded_base_continues_and_repeats_itself():
    requests = [request("The mill was sold in the spring.", 12), request("The cow was sold.", 12)]
    texts = load_continuer("smollm2-135m-instruct", 1)(requests)
    assert texts == load_continuer("smollm2-135m-instruct", 1)(requests)
    assert texts != load_continuer("smollm2-135m-instruct", 2)(requests)
    assert texts[0] != texts[1]
    assert any(texts)
    assert all(text == "" or text.rstrip("\"')")[-1] in ".!?" for text in texts)


GOOD = (
    "The men had gone by noon, and the yard was quiet. A dog slept near the gate. Nobody could say "
    "where the key was, so we climbed in at the back window and made tea. It rained until six."
)


def test_tidy():
    for reply, text in EXAMPLES["tidy"]:
        assert tidy(reply) == text == tidy(text)


def test_without_loop():
    for text, kept in EXAMPLES["loops"]:
        assert without_loop(text) == kept == without_loop(kept)


@pytest.mark.parametrize(("text", "reason"), EXAMPLES["model faults"])
def test_reasons(text: str, reason: str | None):
    shown = ["In those years the ships lay in the bay until the spring came."]
    assert model_fault(text.replace("<good>", GOOD), 20, 90, shown, ["clerk"]) == reason
    assert packed("the sun and the sea and " * 9) < 0.45 < packed(GOOD)
