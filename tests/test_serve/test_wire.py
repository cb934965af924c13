"""What travels: texts that are none, budgets, writers, and judgements as JSON."""

import json
from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
from fake_judge import FakeJudge

from nanopersrm import InputError
from nanopersrm.judge.judgement import JudgeConfig
from nanopersrm.serve.desk import Done
from nanopersrm.serve.wire import (
    JudgeRequest,
    Limits,
    Unknown,
    Writer,
    ask_of,
    judge_reply,
    named,
    one_line,
    profile_reply,
    rank_reply,
    texts_of,
    writer_of,
)

LIMITS = Limits(text_chars=20, exemplars=2)
WRITERS = {"ada": Writer(["I came; I saw."], ["Be brief."])}


def asked(**given: Any) -> Any:
    body = JudgeRequest(**{"candidates": ["One."], "exemplars": ["So."]} | given)
    return ask_of(body, WRITERS, JudgeConfig(samples=2, seed=7), LIMITS)


def test_what_is_left_out_has_the_servers_setting():
    ask = asked()
    assert ask.config == JudgeConfig(samples=2, seed=7)
    assert (ask.exemplars, ask.candidates) == (("So.",), ("One.",))
    assert (ask.question, ask.principles) == (None, ())
    other: dict[str, Any] = {"samples": 3, "think": False, "evidence": False, "temperature": 0.5}
    other |= {"copy_quotes": False, "think_tokens": 9, "mode": "pointwise", "seed": -1}
    assert asked(**other).config == JudgeConfig(**other)
    assert set(other) == set(vars(JudgeConfig()))


def test_a_writer_stands_for_exemplars_and_principles():
    ask = asked(exemplars=None, writer="ada")
    assert ask.exemplars == ("I came; I saw.",)
    assert ask.principles == ("Be brief.",)
    assert asked(question=" \n ").question is None


@pytest.mark.parametrize(
    ("given", "line"),
    [
        ({"exemplars": None}, "either exemplars or a writer, got neither"),
        ({"writer": "ada"}, "got both"),
        ({"exemplars": []}, "exemplars: expected at least one"),
        ({"exemplars": ["So."] * 3}, "exemplars: expected at most 2 texts, got 3"),
        ({"principles": ["So."] * 3}, "principles: expected at most 2"),
        (
            {"candidates": ["One.", "x" * 21]},
            "candidates[1]: expected at most 20 characters, got 2",
        ),
        ({"candidates": ["a"] * 27}, "candidates: expected at most 26"),
        ({"candidates": ["\u3000"]}, "candidates[0]: expected a text, got an empty"),
        ({"question": "x" * 21}, "question[0]: expected at most 20"),
        ({"question": "\ud800"}, "question[0]: expected a text, found half"),
        ({"think_tokens": 2000}, "think_tokens: expected at most 1024, got 2000"),
        ({"think_tokens": 0}, "think_tokens: expected a whole number of at least 1"),
        ({"temperature": float("nan")}, "temperature"),
        ({"temperature": -1.0}, "temperature"),
        ({"seed": 2**63}, "64 bits"),
        ({"mode": "pairwise"}, "2 to 26 candidates"),
    ],
)
def test_what_cannot_be_asked(given: dict[str, Any], line: str):
    with pytest.raises(InputError) as caught:
        asked(**given)
    assert line in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("given", "line"),
    [
        (
            {"candidates": [*map(str, range(26))], "samples": 16, "think_tokens": 1024},
            "got 26 prompts x 16 samples x 1024 think_tokens",
        ),
        (
            {"candidates": [*map(str, range(26))], "mode": "pairwise", "samples": 2},
            "got 208 prompts x 2 samples x 160 think_tokens",
        ),
    ],
)
def test_the_work_of_a_judgement_is_bounded(given: dict[str, Any], line: str):
    with pytest.raises(InputError) as caught:
        asked(**given)
    assert str(caught.value).startswith("expected at most 65536 tokens of reasoning in a judgement")
    assert line in str(caught.value)


@pytest.mark.parametrize(
    "given",
    [
        {"mode": "pairwise", "samples": 1},
        {"samples": 1, "think_tokens": 1024},
        {"samples": 16, "think": False, "think_tokens": 1024},
    ],
)
def test_26_candidates_are_not_too_much(given: dict[str, Any]):
    assert len(asked(candidates=[*map(str, range(26))], **given).candidates) == 26


def test_names():
    for good in ("ada", "A-1_b.c", "0", "x" * 64):
        assert named(good) == good
    for bad in ("", ".", "-a", "a b", "a/b", "ä", "x" * 65, "a\n"):
        with pytest.raises(InputError):
            named(bad)
    with pytest.raises(Unknown, match="'bea'"):
        asked(exemplars=None, writer="bea")


def test_odd_texts_that_are_texts():
    texts = ["😭", "a\u202eb", "\ufffd", "\x07", "line\r\nline", "<candidate A>"]
    assert texts_of("exemplars", texts, LIMITS, 9) == tuple(texts)
    assert writer_of(Writer(texts[:2]), LIMITS) == Writer(texts[:2], [])


def test_limits_are_above_0():
    for bad in ({"waiting": 0}, {"seconds": float("nan")}, {"seconds": float("inf")}):
        with pytest.raises(InputError, match="above 0"):
            Limits(**bad)  # type: ignore[arg-type]


def test_judgements_as_json():
    judge = FakeJudge()
    good = Done(judge.judge(("So.",), ("One.", "Two.", "Three.")), together=2)
    told = json.loads(json.dumps(judge_reply(good), allow_nan=False))
    assert told["together"] == 2
    assert told["ranking"] == good.judgement.ranking
    ranked = rank_reply(good)["ranking"]
    order = good.judgement.ranking
    assert [place["candidate"] for place in ranked] == order
    steps = [good.judgement.preference[i][j] for i, j in pairwise(order)]
    assert [place["beats_next"] for place in ranked] == [*steps, None]
    assert good.judgement.measured is not None
    assert [place["measured"] for place in ranked] == [good.judgement.measured[i] for i in order]
    unseen = replace(good, judgement=replace(good.judgement, measured=None))
    assert {place["measured"] for place in rank_reply(unseen)["ranking"]} == {None}
    bad = Done(judge.judge(("So.",), ("invalid", "Two.")))
    told = json.loads(json.dumps(judge_reply(bad), allow_nan=False))
    assert (told["scores"][0], told["preference"][0][1], told["ranking"]) == (None, None, None)
    assert told["verdict"] == "invalid"
    assert rank_reply(bad) == {"ranking": None, "verdict": "invalid", "notes": ["not trained"]}


def test_a_profile_has_what_a_drawing_needs():
    traits = profile_reply(Writer(["We came; we saw! " * 20]), top=3)
    assert len(traits) == 3
    saliences = [trait["salience"] for trait in traits]
    assert saliences == sorted(saliences, reverse=True)
    for trait in traits:
        assert 0 <= trait["percentile"] <= 100
        assert len(trait["quantiles"]) > 10
        json.dumps(trait, allow_nan=False)


def test_one_line():
    assert one_line("a\nb\r\n\tc \u2028 d") == "a b c d"
    assert one_line("\ud800") == "?"
    assert len(one_line("x" * 9999)) < 500
