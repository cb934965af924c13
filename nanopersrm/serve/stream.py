"""A judgement while it is made, as server-sent events.

    event: reasoning                                    event: judgement
    data: {"candidates": [0], "text": " more", …}       data: {"scores": [7.1, 3.4], …}

`text` is what was added about these candidates since the last event; `ended` says that nothing more
comes. The last event is the judgement, or `error` with the status that a plain request would have
got. While nothing happens, a comment every BEAT seconds keeps the connection open.

What we chose. The judge's thread leaves the latest text of each candidate and a reader takes what
is new since; a slow reader gets larger pieces, and nothing piles up. An ending that may become
"</think>", half a character, or blanks at the end are held back, so that what was sent stays true.
"""

import asyncio
import json
import logging
import time
import uuid
from collections.abc import AsyncIterator
from typing import Any

from nanopersrm import InputError
from nanopersrm.judge.verdict import CLOSE
from nanopersrm.serve import chat, wire
from nanopersrm.serve.desk import Ask, Busy, Done

BEAT = 10.0  # seconds
INVALID = "the judge gave no valid score"

Followed = dict[tuple[int, ...], tuple[str, bool]]  # candidates -> (reasoning so far, ended)
log = logging.getLogger("nanopersrm")


class Latest:
    """The reasoning so far, handed from the judge's thread to the event loop."""

    def __init__(self) -> None:
        self.texts: Followed = {}
        self.changed = asyncio.Event()
        self._loop = asyncio.get_running_loop()

    def __call__(self, which: tuple[int, ...], text: str, ended: bool) -> None:
        """As `Judge.judge` calls it, in its thread."""
        self._loop.call_soon_threadsafe(self._put, which, settled(text, ended), ended)

    def _put(self, which: tuple[int, ...], text: str, ended: bool) -> None:
        self.texts[which] = text, ended
        self.changed.set()


def settled(text: str, ended: bool) -> str:
    """What will stay.

    >>> settled("Terse. </th", False), settled("Terse. </th", True)
    ('Terse.', 'Terse. </th')
    """
    if ended:
        return text
    text = text.rstrip("\ufffd")  # half a character
    held = max(n for n in range(len(CLOSE)) if text.endswith(CLOSE[:n]))
    return text[: len(text) - held].rstrip()  # blanks at the end of a reasoning are cut off


def trouble(error: BaseException) -> tuple[int, str]:
    """What the judge or the desk raised -> status and line."""
    if isinstance(error, InputError):
        return 422, str(error)
    if isinstance(error, Busy):
        return 503, str(error)
    log.error("the judge failed", exc_info=error)
    return 500, f"the judge failed with {type(error).__name__}; the server's log has the rest"


def late(seconds: float) -> tuple[int, str]:
    """The same where time is up."""
    return 504, f"no answer within {seconds:g} s, waiting included"


async def _progress(
    future: "asyncio.Future[Done]", latest: Latest, seconds: float
) -> AsyncIterator[Followed]:
    """The reasoning whenever it changes, and every BEAT; ends with the judgement or the time."""
    end = time.monotonic() + seconds
    while not future.done() and (left := end - time.monotonic()) > 0:
        wake = asyncio.ensure_future(latest.changed.wait())
        either: set[asyncio.Future[Any]] = {future, wake}
        await asyncio.wait(either, timeout=min(BEAT, left), return_when=asyncio.FIRST_COMPLETED)
        wake.cancel()
        latest.changed.clear()
        yield dict(latest.texts)
    yield dict(latest.texts)  # what came with the judgement


def _outcome(future: "asyncio.Future[Done]", seconds: float) -> Done | tuple[int, str]:
    if not future.done():
        return late(seconds)
    error = future.exception()
    return future.result() if error is None else trouble(error)


def _event(data: dict[str, Any], name: str | None = None) -> str:
    first = f"event: {name}\n" if name else ""
    # In ASCII: some readers end a line at U+2028 or U+0085, too.
    return f"{first}data: {json.dumps(data, allow_nan=False)}\n\n"


def _error(status: int, line: str) -> dict[str, Any]:
    return {"error": {"message": wire.one_line(line), "type": "server_error", "status": status}}


async def judge_events(
    future: "asyncio.Future[Done]", latest: Latest, seconds: float
) -> AsyncIterator[str]:
    """POST /judge with stream."""
    sent: dict[tuple[int, ...], tuple[int, bool]] = {}
    try:
        async for texts in _progress(future, latest, seconds):
            if not texts:
                yield ": waiting\n\n"
            for which, (text, ended) in texts.items():
                known, closed = sent.get(which, (0, False))
                if len(text) > known or ended != closed:
                    piece = {"candidates": [*which], "text": text[known:], "ended": ended}
                    yield _event(piece, "reasoning")
                    sent[which] = len(text), ended
        found = _outcome(future, seconds)
        if isinstance(found, Done):
            yield _event(wire.judge_reply(found), "judgement")
        else:
            yield _event(_error(*found), "error")
    finally:
        future.cancel()  # where the reader has left, or the time is up


async def chat_events(
    ask: Ask, future: "asyncio.Future[Done]", latest: Latest, seconds: float, model: str
) -> AsyncIterator[str]:
    """OpenAI's stream of chunks. Together they are the reply that a plain request gets."""
    head = {"id": f"chatcmpl-{uuid.uuid4().hex}", "created": int(time.time()), "model": model}
    sent, many = "", len(ask.candidates) > 1
    try:
        yield _event(chat.chunk(head, {"role": "assistant", "content": ""}))
        async for texts in _progress(future, latest, seconds):
            text = chat.reply_so_far(texts, many) if ask.config.mode == "pointwise" else ""
            if len(text) > len(sent):
                yield _event(chat.chunk(head, {"content": text[len(sent) :]}))
                sent = text
            else:
                yield ": waiting\n\n"
        found = _outcome(future, seconds)
        if isinstance(found, Done):
            reply = chat.reply_of(found.judgement)
            found = (500, INVALID) if reply is None else found
            if reply is not None and not reply.startswith(sent):
                found = 500, "the reasoning came out otherwise than it was streamed"
        if isinstance(found, Done):
            yield _event(chat.chunk(head, {"content": (reply or "")[len(sent) :]}))
            last = chat.chunk(head, {}, ended=True)
            yield _event(last | {"nanopersrm": wire.judge_reply(found)})
            yield "data: [DONE]\n\n"
        else:
            yield _event(_error(*found))
    finally:
        future.cancel()
