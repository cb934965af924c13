"""Continuing: rounds, cuts, batches, cache, with a scripted model; one test with the base."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

import data.kinds.continuing
from data.kinds.continuing import BATCH, ROUNDS, SYSTEM, Ask, Prompt, compose, continuer
from nanopersrm import InputError

TURNS = (("It was a day in May.", "The sun was out."),)
LINES = [f"Number {i} said that it was word{i} for him{i}. " for i in range(99)]


def ask(opening: str = "The men went home.", words: int = 30, temperature: float = 0.8) -> Ask:
    return Ask(opening, TURNS, words, temperature, 50)


class Script:
    """Says the next line of a script to each prompt, and keeps what it was asked."""

    def __init__(self, *replies: tuple[str, bool]):
        self.replies, self.asked = replies, []  # type: tuple[tuple[str, bool], ...], list

    def __call__(
        self,
        prompts: Sequence[Prompt],
        tests: Sequence[Callable[[str], bool]],
        temperature: float,
        top_k: int,
        budget: int,
    ) -> list[tuple[str, bool]]:
        reply = self.replies[min(len(self.asked), len(self.replies) - 1)]
        self.asked.append((list(prompts), list(tests), temperature, budget))
        return [reply for _ in prompts]


def test_a_reply_is_cut_at_the_sentence_end_nearest_to_the_length():
    script = Script(("".join(LINES[:6]) + "And then", False))  # nine words a sentence
    assert compose([ask(words=30)], script) == ["".join(LINES[:3]).strip()]
    assert len(script.asked) == 1


def test_the_model_sees_the_turns_and_the_opening():
    script = Script(("".join(LINES[:5]), False))
    compose([ask()], script)
    ((messages, said),) = script.asked[0][0]
    assert said == ""
    assert [m["role"] for m in messages] == ["system", "user", "assistant", "user"]
    assert [m["content"] for m in messages] == [SYSTEM, *TURNS[0], "The men went home."]


def test_an_early_end_goes_on_after_a_blank_line_in_one_paragraph():
    script = Script((LINES[0], True), ("".join(LINES[1:5]), False))
    assert compose([ask(words=27)], script) == ["".join(LINES[:3]).strip()]
    assert [prompts[0][1] for prompts, *_ in script.asked] == ["", LINES[0].strip() + "\n\n"]


def test_a_loop_is_cut_back_and_drawn_again_from_there():
    script = Script((LINES[0] + LINES[0] + "So", False), (" " + "".join(LINES[2:6]), False))
    assert compose([ask(words=27)], script) == [(LINES[0] + LINES[2] + LINES[3]).strip()]
    assert script.asked[1][0][0][1] == LINES[0].strip()


def test_rounds_are_limited_and_only_for_what_is_unfinished():
    stuck = Script(("", True))
    assert compose([ask()], stuck) == [""]
    assert len(stuck.asked) == ROUNDS

    class Uneven(Script):
        def __call__(self, prompts, tests, temperature, top_k, budget):
            super().__call__(prompts, tests, temperature, top_k, budget)
            fast = [messages[-1]["content"] == "Fast one." for messages, _ in prompts]
            return [("".join(LINES[:5]) if quick else "No", False) for quick in fast]

    uneven = Uneven(("", False))
    done = compose([ask("Fast one."), ask("Slow one.")], uneven)
    assert done == ["".join(LINES[:3]).strip(), ""]
    assert [len(prompts) for prompts, *_ in uneven.asked] == [2] + [1] * (ROUNDS - 1)


def test_a_text_that_is_long_and_has_no_end_is_given_up():
    script = Script(("and so " + " ".join(f"w{i}" for i in range(50)), False))
    assert compose([ask(words=30)], script) == [""]
    assert len(script.asked) == 1


def test_every_round_may_draw_some_tokens():
    script = Script((LINES[0] + " ".join(f"w{i}" for i in range(25)), False))
    compose([ask(words=30)], script)
    assert len(script.asked) == 2
    assert all(budget >= 32 for *_, budget in script.asked)


def test_styles_with_other_temperatures_are_drawn_apart():
    script = Script(("".join(LINES[:5]), False))
    compose(
        [ask("a", temperature=0.5), ask("b", temperature=0.9), ask("c", temperature=0.5)], script
    )
    assert [(len(prompts), t) for prompts, _, t, _ in script.asked] == [(2, 0.5), (1, 0.9)]


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
    compose([ask(words=31)], script)
    _, (test,), _, budget = script.asked[0]
    assert test(reply) is enough
    assert budget >= 31 * 1.4


def write_with(script: Script, monkeypatch, folder: Path | None, base: str = "b", seed: int = 0):
    monkeypatch.setattr(data.continuing, "drawer", lambda base, seed: script)
    return continuer(base, seed, folder)


def test_batches_are_cached_and_what_is_there_is_not_drawn(tmp_path, monkeypatch):
    asks = [ask(f"Opening {i}.") for i in range(BATCH + 3)]
    first = Script(("".join(LINES[:5]), False))
    texts = write_with(first, monkeypatch, tmp_path / "pool")(asks)
    assert [len(prompts) for prompts, *_ in first.asked] == [BATCH, 3]
    files = sorted((tmp_path / "pool").iterdir())
    assert len(files) == 2
    assert [json.loads(line)["text"] for f in files for line in f.read_text().splitlines()] == texts
    nothing = Script(("", True))
    assert write_with(nothing, monkeypatch, tmp_path / "pool")(asks) == texts
    assert nothing.asked == []
    files[0].unlink()  # interrupted before this one was written
    again = Script(("".join(LINES[:5]), False))
    assert write_with(again, monkeypatch, tmp_path / "pool")(asks) == texts
    assert len(again.asked) == 1


@pytest.mark.parametrize("change", ["base", "seed", "words", "turns", "opening"])
def test_other_settings_are_not_read_from_the_cache(change: str, tmp_path, monkeypatch):
    write_with(Script(("".join(LINES[:5]), False)), monkeypatch, tmp_path)([ask()])
    script = Script(("".join(LINES[5:9]), False))
    base, seed = ("c" if change == "base" else "b"), int(change == "seed")
    one = {
        "words": ask(words=29),
        "turns": Ask("The men went home.", (), 30, 0.8, 50),
        "opening": ask("The women went home."),
    }.get(change, ask())
    assert write_with(script, monkeypatch, tmp_path, base, seed)([one])[0].startswith("Number 5")


@pytest.mark.parametrize("damage", ["", "{}\n", '{"text": 3}\n', "no json\n"])
def test_a_damaged_file_is_named(damage: str, tmp_path, monkeypatch):
    write = write_with(Script(("".join(LINES[:5]), False)), monkeypatch, tmp_path)
    write([ask()])
    (file,) = tmp_path.iterdir()
    file.write_text(damage)
    with pytest.raises(InputError, match=f"{file.name}.*delete it"):
        write([ask()])


@pytest.mark.base
def test_the_embedded_base_continues_and_repeats_itself(tmp_path):
    asks = [
        ask(f"The {thing} was sold in the spring of that year.", 12) for thing in ("mill", "cow")
    ]
    texts = continuer("smollm2-135m-instruct", 1)(asks)
    assert texts == continuer("smollm2-135m-instruct", 1, tmp_path)(asks)
    assert texts != continuer("smollm2-135m-instruct", 2)(asks)
    assert texts[0] != texts[1]
    assert any(texts)
    assert all(text == "" or text.rstrip("\"')")[-1] in ".!?" for text in texts)
