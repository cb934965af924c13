"""Chat completions: what a chat asks of the judge, and the judge's reply as a chat."""

import json
import time
from dataclasses import replace
from typing import Any

import pytest
from fake_judge import FakeJudge

from nanopersrm import InputError
from nanopersrm.judge.verdict import parse
from nanopersrm.serve import chat as chats
from nanopersrm.serve.chat import (
    ChatRequest,
    Message,
    completion,
    from_tags,
    reply_of,
    reply_so_far,
)
from nanopersrm.serve.desk import Done
from nanopersrm.serve.wire import JudgeRequest, Limits, Unknown

ASKED = JudgeRequest(["One."], ["So."])


def judge_request(body: ChatRequest) -> JudgeRequest:
    return chats.judge_request(body, Limits())


def chat(content: Any = None, **more: Any) -> ChatRequest:
    turns = [] if content is None else [Message("user", content)]
    return ChatRequest(**{"messages": turns} | more)


def test_texts_can_stand_in_tags():
    turns = [
        Message("system", "<candidate C>not of the user</candidate C>"),
        Message("user", "Look: <exemplar>\nSo.\n\nSo!\n</exemplar> <exemplar>Be it.</exemplar>"),
        Message("user", "<principle>Be brief.</principle><question>Why?</question>"),
        Message("user", [{"type": "text", "text": "<candidate A> One. </candidate A>"}]),
        Message("assistant", None),
        Message("user", "<candidate B>\n<b>Two</b>\n</candidate B>\nScore them."),
    ]
    assert judge_request(ChatRequest(turns)) == JudgeRequest(
        ["One.", "<b>Two</b>"],
        ["So.\n\nSo!", "Be it."],
        question="Why?",
        principles=["Be brief."],
    )


def test_settings_of_a_chat_are_heard_where_the_object_says_nothing():
    heard = judge_request(chat(nanopersrm=ASKED, temperature=0.5, seed=3, max_tokens=40))
    assert heard == replace(ASKED, temperature=0.5, seed=3, think_tokens=40)
    newer = chat(nanopersrm=ASKED, max_tokens=40, max_completion_tokens=50)
    assert judge_request(newer).think_tokens == 50
    own = replace(ASKED, temperature=0.0, think_tokens=9)
    assert judge_request(chat(nanopersrm=own, temperature=1.0, max_tokens=40)) == own


def test_chat_clients_ask_for_more_tokens_than_there_are():
    asked = chat(nanopersrm=ASKED, max_tokens=2048)
    assert judge_request(asked).think_tokens == 1024
    assert chats.judge_request(asked, Limits(think_tokens=70)).think_tokens == 70
    with pytest.raises(InputError, match="max_tokens: expected at least 1, got 0"):
        judge_request(chat(nanopersrm=ASKED, max_completion_tokens=0))


def test_tags_that_do_not_close_are_passed_over():
    text = "<question>a<exemplar>b<exemplar>c</exemplar><candidate A>d</candidate A><exemplar>"
    found = from_tags(text)
    assert (found.exemplars, found.candidates, found.question) == (["b<exemplar>c"], ["d"], None)


@pytest.mark.parametrize("piece", ["<exemplar>", "<candidate A>", "<exemplar></question>", "<"])
def test_a_long_message_is_read_in_one_pass(piece: str):
    """60 KB of them took 2 s of the whole server, with the square of the length."""
    begin = time.process_time()
    with pytest.raises(InputError, match="found neither"):
        from_tags(piece * (1_000_000 // len(piece)))
    assert time.process_time() - begin < 2


def test_a_model_can_name_a_writer():
    tagged = "<candidate A>One.</candidate A>"
    assert judge_request(chat(tagged, model="nanopersrm:ada")).writer == "ada"
    same = replace(ASKED, exemplars=None, writer="ada")
    assert judge_request(chat(model="nanopersrm:ada", nanopersrm=same)) == same
    for other in (ASKED, replace(same, writer="bea")):
        with pytest.raises(InputError, match="another"):
            judge_request(chat(model="nanopersrm:ada", nanopersrm=other))
    with pytest.raises(Unknown, match="got 'gpt-5'"):
        judge_request(chat(tagged, model="gpt-5"))


@pytest.mark.parametrize(
    "text",
    [
        "",
        "Which is better?",
        "<candidate A>One.",
        "<candidate B>One.</candidate B>",
        "<candidate A>One.</candidate A><candidate C>Two.</candidate C>",
        "<candidate A>One.</candidate A><candidate A>Two.</candidate A>",
        "<candidate a>One.</candidate a>",
    ],
)
def test_texts_without_candidates_in_order(text: str):
    with pytest.raises(InputError, match="expected a nanopersrm object, or messages with"):
        from_tags(text)


def test_what_else_is_refused():
    with pytest.raises(InputError, match="n: expected 1, got 2"):
        judge_request(chat(nanopersrm=ASKED, n=2))
    with pytest.raises(InputError, match="stream beside"):
        judge_request(chat(nanopersrm=replace(ASKED, stream=True)))
    two = "<question>a</question><question>b</question><candidate A>c</candidate A>"
    with pytest.raises(InputError, match="at most one"):
        from_tags(two)
    strange: list[Any] = [[{"type": "image_url"}], [{"type": "text", "text": 3}], [{}]]
    for parts in strange:
        with pytest.raises(InputError, match="parts of type text"):
            judge_request(chat(parts))


def test_the_reply_is_in_the_judges_grammar():
    judge = FakeJudge()
    for texts in (("One.",), ("One.", "Two.", "One.")):
        found = judge.judge(("So.",), texts)
        reply = reply_of(found)
        assert reply is not None
        said = parse(reply, "ABC"[: len(texts)])
        assert said.problem is None
        assert said.scores is not None
        for digit, score in zip(said.scores.values(), found.scores, strict=True):
            assert score is not None
            assert abs(digit - score) <= 0.5
    assert reply_of(judge.judge(("So.",), ("One.", "invalid"))) is None
    extreme = replace(judge.judge(("So.",), ("One.",)), scores=[8.5])
    assert (reply_of(extreme) or "").endswith("A=9</scores>")


def test_what_is_streamed_is_the_beginning_of_the_reply():
    followed: dict[tuple[int, ...], tuple[str, bool]] = {}

    def follow(which: tuple[int, ...], text: str, ended: bool) -> None:
        followed[which] = text, ended
        seen.append(reply_so_far(followed, many=True))

    seen: list[str] = []
    texts = ("Two.", "One.", "Two.")
    reply = reply_of(FakeJudge().judge(("So.",), texts, on_text=follow))
    assert reply is not None
    for earlier, later in zip(seen, [*seen[1:], reply], strict=True):
        assert later.startswith(earlier)
    assert seen[-1] + "\n</think>" == reply[: reply.index("\n<scores>")]


def test_tokens_of_a_shared_call_are_nobodys():
    found = FakeJudge().judge(("So.",), ("One.",))
    alone, shared = completion(Done(found), "nanopersrm"), completion(Done(found, 2), "nanopersrm")
    assert alone["usage"] == {"prompt_tokens": 100, "completion_tokens": 10, "total_tokens": 110}
    assert "usage" not in shared
    json.dumps([alone, shared], allow_nan=False)
