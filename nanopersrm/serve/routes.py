"""The routes: which request becomes which question to the judge, and what is answered.

    app, desk = app_of(judge, token="…")         # an ASGI app behind its gate, and its desk

Each route is translation (`wire.py`, `chat.py`, `remote.py`), the desk, translation back. What went
wrong becomes an answer in one place, `_say_errors`:

    400 no JSON     404 no such writer, model or path     405 no such method
    409 no room for another writer
    422 cannot be judged     503 no room in line, or stopping     504 too late
    500 the judge failed, or a number was asked for and it gave none
"""

import asyncio
import contextlib
import sys
import time
from collections.abc import AsyncIterator, Sequence
from functools import partial
from importlib.resources import files
from typing import Any, TypeVar, cast

from fastapi import FastAPI, HTTPException, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, JSONResponse, PlainTextResponse, StreamingResponse
from prometheus_client import Gauge, generate_latest
from starlette.exceptions import HTTPException as AnyHTTPException
from starlette.routing import Match

from nanopersrm import InputError, __version__
from nanopersrm.judge.judgement import JudgeConfig, Judges
from nanopersrm.serve import chat, remote, stream, wire
from nanopersrm.serve.desk import Ask, Busy, Desk, Done
from nanopersrm.serve.gate import App, guarded, meters, policy_of, refusal
from nanopersrm.serve.wire import Limits

T = TypeVar("T")
EVENTS = "text/event-stream"


def app_of(
    judge: Judges,
    judging: JudgeConfig | None = None,
    limits: Limits | None = None,
    token: str | None = None,
    own_only: bool = True,
) -> tuple[App, Desk]:
    """The whole server as an ASGI app. own_only: requests must name this machine (`gate.py`)."""
    judging, limits, meter = judging or JudgeConfig(), limits or Limits(), meters()
    page = files("nanopersrm.serve").joinpath("page.html").read_text("utf-8")
    desk = Desk(judge, limits.waiting)
    writers: dict[str, wire.Writer] = {}

    @contextlib.asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        desk.open()
        yield
        await desk.close()

    app = FastAPI(
        title="nanopersrm",
        version=__version__,
        description="How well does a text fit a writer?",
        lifespan=lifespan,
        redoc_url=None,
        redirect_slashes=False,
        responses={status: {"model": wire.ErrorReply} for status in ("4XX", "5XX")},
    )
    Gauge("nanopersrm_waiting", "in line", registry=meter.registry).set_function(
        lambda: len(desk.waiting)
    )
    _say_errors(app)

    async def judged(request: Request, asks: Sequence[Ask]) -> list[Done]:
        """All, or the first error; nothing is left in line behind. More than the line has room
        for go in turns."""
        found: list[Done] = []
        end = time.monotonic() + limits.seconds
        for begin in range(0, len(asks), limits.waiting):
            futures: list[asyncio.Future[Done]] = []
            try:
                for ask in asks[begin : begin + limits.waiting]:
                    futures.append(desk.submit(ask))
                found += await _finished(futures, end, limits.seconds, request)
            finally:
                for future in futures:
                    future.cancel()
        for done in found:
            count(done)
        return found

    def count(done: Done) -> None:
        said = done.judgement.verdict
        meter.judgements.labels("best" if isinstance(said, int) else said).inc()
        meter.shared.inc(done.together > 1)
        meter.tokens.inc(done.judgement.tokens / done.together)

    def followed(ask: Ask) -> tuple["asyncio.Future[Done]", stream.Latest]:
        latest = stream.Latest()
        future = desk.submit(ask, latest)
        future.add_done_callback(
            lambda f: None if f.cancelled() or f.exception() else count(f.result())
        )
        return future, latest

    @app.get("/", include_in_schema=False)
    async def look() -> HTMLResponse:
        return HTMLResponse(page)

    @app.get("/health")
    async def health() -> JSONResponse:
        """Whether it serves; 503 while it is stopping."""
        state = "stopping" if desk.closed else "ok"
        return JSONResponse({"status": state, "version": __version__}, 503 if desk.closed else 200)

    @app.get("/metrics")
    async def metrics() -> PlainTextResponse:
        """Counters in Prometheus' text format."""
        return PlainTextResponse(generate_latest(meter.registry).decode())

    @app.post("/judge", response_model=wire.JudgeReply)
    async def judge_one(body: wire.JudgeRequest, request: Request) -> Any:
        """Score the candidates, with reasons. `stream`: server-sent events, see `stream.py`."""
        ask = wire.ask_of(body, writers, judging, limits)
        if body.stream:
            future, latest = followed(ask)
            events = stream.judge_events(future, latest, limits.seconds)
            return StreamingResponse(events, media_type=EVENTS)
        (done,) = await judged(request, [ask])
        return wire.judge_reply(done)

    @app.post("/rank", response_model=wire.RankReply)
    async def rank(body: wire.JudgeRequest, request: Request) -> Any:
        """The candidates, best first, with the probability of each step."""
        if body.stream:
            raise InputError("stream: expected false; /judge can be followed")
        (done,) = await judged(request, [wire.ask_of(body, writers, judging, limits)])
        return wire.rank_reply(done)

    @app.post("/profile", response_model=list[wire.TraitReply])
    async def profile(body: wire.ProfileRequest, request: Request) -> Any:
        """The writer's habits, most salient first, with the reference to draw them against."""
        writer = wire.writer_of(wire.Writer(body.exemplars), limits)
        count = partial(wire.profile_reply, writer, body.top)
        future = asyncio.ensure_future(desk.aside(count))
        try:
            end = time.monotonic() + limits.seconds
            (traits,) = await _finished([future], end, limits.seconds, request)
        finally:
            future.cancel()
        return traits

    @app.get("/writers")
    async def names() -> list[str]:
        """Who was put."""
        return sorted(writers)

    # A path, so that a name with a slash is refused as a name.
    @app.put("/writers/{name:path}", status_code=204)
    async def put(name: str, body: wire.Writer) -> Response:
        """Keep exemplars under a name, until the server ends."""
        writer = wire.writer_of(body, limits)
        if wire.named(name) not in writers and len(writers) >= limits.writers:
            raise HTTPException(409, f"expected at most {limits.writers} writers; delete one")
        writers[name] = writer
        return Response(status_code=204)

    @app.get("/writers/{name:path}", response_model=wire.Writer)
    async def get(name: str) -> Any:
        """What was put."""
        return wire.known(name, writers)

    @app.delete("/writers/{name:path}", status_code=204)
    async def delete(name: str) -> Response:
        """Forget a writer."""
        wire.known(name, writers)
        del writers[name]
        return Response(status_code=204)

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        """OpenAI's list of models: the judge, and the judge for each writer."""
        ids = [chat.MODEL, *(f"{chat.MODEL}:{name}" for name in sorted(writers))]
        listed = [{"id": i, "object": "model", "created": 0, "owned_by": chat.MODEL} for i in ids]
        return {"object": "list", "data": listed}

    @app.post("/v1/chat/completions")
    async def complete(body: chat.ChatRequest, request: Request) -> Any:
        """OpenAI's chat completions, see `chat.py`."""
        ask = wire.ask_of(chat.judge_request(body, limits), writers, judging, limits)
        if body.stream:
            future, latest = followed(ask)
            events = stream.chat_events(ask, future, latest, limits.seconds, body.model)
            return StreamingResponse(events, media_type=EVENTS)
        (done,) = await judged(request, [ask])
        if chat.reply_of(done.judgement) is None:
            raise HTTPException(500, stream.INVALID)
        return chat.completion(done, body.model)

    @app.post("/get_reward", response_model=remote.RewardReply)
    async def reward(
        body: remote.RewardRequest, request: Request, writer: str | None = None
    ) -> Any:
        """OpenRLHF's remote reward, see `remote.py`."""
        asked = remote.asks_of(body, writer, writers, judging, limits)
        found = await judged(request, [ask for _, ask in asked])
        members = [members for members, _ in asked]
        reply = remote.reward_reply(len(body.query), list(zip(members, found, strict=True)))
        if reply is None:
            raise HTTPException(500, stream.INVALID)
        return reply

    behind = guarded(cast(App, app), meter, token, limits.body_kb * 1024, own_only, policy_of(page))
    return behind, desk


def _say_errors(app: FastAPI) -> None:
    """Every error in one form, on one line."""

    async def refuse(request: Request, error: Exception) -> JSONResponse:
        if isinstance(error, AnyHTTPException):
            return refusal(error.status_code, *_plain(error, request))
        if isinstance(error, RequestValidationError):
            return refusal(*_invalid(error, request.headers.get("content-type")))
        if isinstance(error, Busy):
            return refusal(503, str(error), {"retry-after": str(error.again)})
        return refusal(404 if isinstance(error, wire.Unknown) else 422, str(error))

    for kind in (AnyHTTPException, RequestValidationError, Busy, wire.Unknown, InputError):
        app.add_exception_handler(kind, refuse)


def _plain(error: AnyHTTPException, request: Request) -> tuple[str, dict[str, str]]:
    """The line of an error, and headers. What the router and the reader of bodies say in two words
    is said in full here."""
    headers, cause = {**(error.headers or {})}, error.__cause__
    came, routes = request.scope["path"], cast(Sequence[Any], request.app.routes)
    if (error.status_code, error.detail) == (404, "Not Found"):
        shown = [route.path_format for route in routes if route.include_in_schema]
        there = ", ".join(dict.fromkeys(shown))
        return f"path: expected one of {there} (see /docs), got {came!r}", headers
    if error.status_code == 405:
        match = [route for route in routes if route.matches(request.scope)[0] is not Match.NONE]
        allowed = ", ".join(sorted({method for route in match for method in route.methods}))
        line = f"method: expected {allowed} for {came!r}, got {request.method}"
        return line, headers | {"Allow": allowed}
    if error.status_code != 400 or cause is None:
        return str(error.detail), headers
    if isinstance(cause, UnicodeDecodeError):
        return f"body: expected JSON in UTF-8, found another byte at {cause.start}", headers
    if isinstance(cause, RecursionError):
        return "body: expected JSON that is not nested too deeply, got it nested deeper", headers
    if isinstance(cause, ValueError):  # the one that json has left
        most = sys.get_int_max_str_digits()
        return f"body: expected numbers of at most {most} digits, got a longer one", headers
    return "body: expected all of it, got a part", headers


def _invalid(error: RequestValidationError, kind: str | None) -> tuple[int, str]:
    """The first thing that does not fit the schema, and where. kind: the Content-Type."""
    first, *others = error.errors()
    _, *place = first["loc"]
    if first["type"] == "json_invalid":
        return 400, f"body: expected JSON: {first['ctx']['error']}, at character {place[0]}"
    came = type(first["input"]).__name__
    if not place and isinstance(first["input"], bytes):  # not read at all
        return 422, f"Content-Type: expected application/json, got {kind or 'none'}"
    if not place:
        came = "nothing" if first["input"] is None else came
        return 422, f"body: expected a JSON object, got {came}"
    where = "".join(f"[{key}]" if isinstance(key, int) else f".{key}" for key in place)
    more = f" (and {len(others)} more)" if others else ""
    return 422, f"{where.lstrip('.')}: {first['msg']}, got {came}{more}"


async def _finished(
    futures: Sequence["asyncio.Future[T]"], end: float, seconds: float, request: Request
) -> list[T]:
    """All of them, unless one fails, `end` has come after so many seconds, or the client left."""

    async def left() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    gone = asyncio.ensure_future(left())
    try:
        while waiting := [future for future in futures if not future.done()]:
            either: set[asyncio.Future[Any]] = {*waiting, gone}
            await asyncio.wait(
                either, timeout=end - time.monotonic(), return_when=asyncio.FIRST_COMPLETED
            )
            error = next((f.exception() for f in futures if f.done() and f.exception()), None)
            if isinstance(error, InputError | Busy):
                raise error
            if error is not None:
                raise HTTPException(*stream.trouble(error))
            if gone.done():
                raise HTTPException(499, "the client has left")
            if time.monotonic() >= end:
                raise HTTPException(*stream.late(seconds))
    finally:
        gone.cancel()
    return [future.result() for future in futures]
