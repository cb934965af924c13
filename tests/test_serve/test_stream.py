"""Events: what was streamed stays true, and is one line for every reader of lines."""

import asyncio
import json
from collections.abc import AsyncIterator
from dataclasses import replace
from typing import Any

import pytest
from fake_judge import ADA, FakeJudge

from nanopersrm.judge.judgement import JudgedReply
from nanopersrm.judge.verdict import closing, write
from nanopersrm.serve.desk import Ask, Done
from nanopersrm.serve.stream import Latest, chat_events, judge_events, settled

THOUGHT = "Terse. \u2028 So it is.\x85 Is 1 < 2?"


def told(thought: str, chat: bool) -> list[str]:
    """The events while the model writes a thought, a character at a time, and its ending."""
    found = FakeJudge().judge(ADA, ("One.",))
    reply = JudgedReply((0,), write(thought, {"A": 5}), thought, None, False)
    done = Done(replace(found, reasoning=[thought], replies=[reply]))

    async def events() -> list[str]:
        future: asyncio.Future[Done] = asyncio.get_running_loop().create_future()
        latest = Latest()
        kind: AsyncIterator[str] = (
            chat_events(Ask(ADA, ("One.",)), future, latest, 5, "nanopersrm")
            if chat
            else judge_events(future, latest, 5)
        )

        async def work() -> None:
            written = f"{thought} \n\n</think>"
            for end in range(1, len(written) + 1):
                so_far, _ = closing(written[:end])
                latest((0,), so_far, end == len(written))
                for _ in range(3):
                    await asyncio.sleep(0)
            future.set_result(done)

        working = asyncio.create_task(work())
        seen = [event async for event in kind]
        await working
        return seen

    return asyncio.run(events())


def data_of(event: str) -> Any:
    data = event.split("data: ", 1)[1].strip()
    return data if data == "[DONE]" else json.loads(data)


@pytest.mark.parametrize(
    ("text", "stays"),
    [
        ("Terse. </th", "Terse."),
        ("Terse.\n\n<", "Terse."),
        ("Terse. ", "Terse."),
        ("Terse. x", "Terse. x"),
        ("Terse \ufffd", "Terse"),
        (" </", ""),
    ],
)
def test_what_may_go_is_held_back(text: str, stays: str):
    assert settled(text, False) == stays
    assert settled(text, True) == text


def test_what_was_streamed_is_the_beginning_of_what_is_said():
    events = told(THOUGHT, chat=False)
    *pieces, last = [data_of(event) for event in events if not event.startswith(":")]
    assert len(pieces) > 9
    assert "".join(piece["text"] for piece in pieces) == THOUGHT == last["reasoning"][0]


def test_a_chat_that_is_streamed_is_the_reply():
    events = told(THOUGHT, chat=True)
    chunks = [data_of(event) for event in events if not event.startswith(":")]
    assert chunks[-1] == "[DONE]", chunks[-1]
    said = "".join(chunk["choices"][0]["delta"].get("content", "") for chunk in chunks[:-1])
    assert THOUGHT in said


@pytest.mark.parametrize("chat", [False, True])
def test_an_event_is_one_line_for_every_reader(chat: bool):
    events = told(THOUGHT, chat)
    for event in events:
        assert event.splitlines() == event.split("\n")[:-1]
        assert event.isascii()
