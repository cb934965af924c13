"""The judge as a server, for tools and for people.

    NANOPERSRM_TOKEN=… python -m nanopersrm.serve --adapter runs/sft/adapter
    curl -H "Authorization: Bearer …" -H "Content-Type: application/json" \\
         -d '{"exemplars": ["…"], "candidates": ["…", "…"]}' http://127.0.0.1:8000/judge

    POST /judge /rank              our own; `stream` follows the reasoning (server-sent events)
    POST /profile                  the writer's habits against many others', no model needed
    GET  /writers                  PUT, GET, DELETE /writers/NAME: exemplars under a name
    POST /v1/chat/completions      OpenAI's, see `openai_chat.py`; GET /v1/models
    POST /get_reward               OpenRLHF's remote reward, ?writer=NAME or a label for each query
    GET  /health /metrics          metrics in Prometheus' format
    GET  / /docs                   the page for people; the OpenAPI page

Errors are one line in OpenAI's form of JSON:

    400 no JSON   401 no token   403 another host   404 no such name   405 no such method
    408 the body did not come   409 no room for a writer   413 too long   422 cannot be judged
    500 the judge failed, or gave no number   503 no room in line, or stopping   504 too late

One thread runs the judge, a call at a time. A running call is finished, also when its client has
left and when the server stops. Without a token it serves this machine alone, and requests must name
it: a page from anywhere can let its own name point to 127.0.0.1 (DNS rebinding). The token comes as
Bearer, or as the password in http://any:TOKEN@host/get_reward, for OpenRLHF. There is no TLS.
"""

import asyncio
import base64
import contextlib
import hashlib
import hmac
import ipaddress
import json
import logging
import os
import re
import socket
import sys
import time
from collections.abc import AsyncIterator, Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from importlib.resources import files
from typing import Any

import prometheus_client as prometheus
import uvicorn
from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, JSONResponse, PlainTextResponse, StreamingResponse
from pydantic import ValidationError
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from kernels.process import trim
from nanopersrm import InputError, __version__
from nanopersrm.files import reason
from nanopersrm.judge.adapter_settings import DEFAULT
from nanopersrm.judge.judgement import JudgeConfig, Judgement, Judges, OnText
from nanopersrm.judge.verdict import CLOSE
from nanopersrm.model.base import DEFAULT_BASE
from nanopersrm.serve import openai_chat, schemas
from nanopersrm.serve.openai_chat import ChatRequest, Reasoning, chunk
from nanopersrm.serve.reward_fn import fault
from nanopersrm.serve.schemas import JudgeCall, JudgeRequest, Name, RewardRequest, Writer

Write = Callable[[Reasoning, Judgement | None], str]  # events of what is new, last the judgement
TOKEN, LEAST_TOKEN = "NANOPERSRM_TOKEN", 16  # characters
CONNECTIONS = 512  # at once; one more gets 503
BODY_SECONDS = 30.0  # for a body to come
BEAT_SECONDS = 10.0  # between two comments of a stream in which nothing happens
LONGEST_LINE = 400  # characters of an error
OPEN_PATHS = ("/", "/health", "/docs", "/openapi.json")  # without a token
THIS_MACHINE = re.compile(r"(localhost|127(\.\d{1,3}){3}|\[::1\])(:\d+)?", re.ASCII | re.IGNORECASE)
ERROR_TYPES = {401: "authentication_error", 403: "permission_error", 503: "overloaded_error"}
INLINE = re.compile(r"<(script|style)>(.*?)</\1>", re.DOTALL)
HEADERS = ((b"x-content-type-options", b"nosniff"), (b"referrer-policy", b"no-referrer"),
           (b"cache-control", b"no-store"))  # fmt: skip
NOTHING_ALLOWED = "default-src 'none'; frame-ancestors 'none'; form-action 'none'"
# FastAPI's OpenAPI page fetches Swagger UI from this network.
DOCS_POLICY = NOTHING_ALLOWED + (
    "; connect-src 'self'; script-src 'unsafe-inline' https://cdn.jsdelivr.net; style-src "
    "'unsafe-inline' https://cdn.jsdelivr.net; img-src data: https://fastapi.tiangolo.com"
)
log = logging.getLogger("nanopersrm")


@dataclass(frozen=True)
class Limits:
    """What clients may take."""

    waiting: int = 64  # requests in line; one more gets 503
    seconds: float = 120.0  # that a request may take, waiting included; then 504
    body_kb: int = 1024  # of a request
    writers: int = 256  # that can be put

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            if not 0 < value < float("inf"):
                raise InputError(f"limits.{name}: expected a number above 0, got {value}")


@dataclass(frozen=True)
class Config:
    """Serve the judge to this machine, or with a token to others."""

    base: str = DEFAULT_BASE  # the embedded default, a folder, a .gguf file, or a hub name
    adapter: str = DEFAULT  # a folder with a trained adapter; default: that of the base; or none
    device: str = "auto"  # auto, cpu, cuda, cuda:N
    dtype: str = "auto"  # auto (16 bits where they are fast), bf16, fp16, fp32
    host: str = "127.0.0.1"  # for other machines 0.0.0.0, with NANOPERSRM_TOKEN set
    port: int = 8000  # 0: any that is free
    judging: JudgeConfig = field(default_factory=JudgeConfig)  # where a request says nothing
    limits: Limits = field(default_factory=Limits)  # what clients may take


class Meters:
    """What /metrics shows."""

    def __init__(self) -> None:
        self.registry = prometheus.CollectorRegistry()
        prometheus.ProcessCollector(registry=self.registry)
        options: dict[str, Any] = {"namespace": "nanopersrm", "registry": self.registry}
        self.requests = prometheus.Counter("requests", "answered", ["path", "status"], **options)
        self.judgements = prometheus.Counter("judgements", "by verdict", ["verdict"], **options)
        self.tokens = prometheus.Counter("tokens", "drawn", **options)
        self.waiting = prometheus.Gauge("waiting", "in line", **options)
        options["buckets"] = (0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 100, 300)
        self.seconds = prometheus.Histogram("seconds", "per request", ["path"], **options)

    def count(self, future: "asyncio.Future[Judgement]") -> None:
        """A judgement that was asked for."""
        if not future.cancelled() and not future.exception():
            verdict = future.result().verdict
            self.judgements.labels("best" if isinstance(verdict, int) else verdict).inc()
            self.tokens.inc(future.result().tokens)


class JudgeQueue:
    """A bounded line, and the one thread in which the judge works."""

    def __init__(self, judge: Judges, room: int, meters: Meters):
        self.judge, self.room, self.closed, self.count = judge, room, False, meters.count
        meters.waiting.set_function(lambda: self.waiting)
        self.thread = ThreadPoolExecutor(1, thread_name_prefix="judge")
        self.calls: set[Future[Judgement]] = set()  # that wait, and the running one

    @property
    def waiting(self) -> int:
        return sum(not call.running() for call in list(self.calls))

    def submit(self, call: JudgeCall, on_text: OnText | None = None) -> "asyncio.Future[Judgement]":
        """Wait in line. Who cancels the future leaves it. Raises HTTPException (503)."""
        if self.closed or self.waiting >= self.room:
            line = "the server is stopping" if self.closed else f"{self.room} requests are waiting"
            raise HTTPException(503, line, {"retry-after": "2"})
        future = self.thread.submit(partial(self.judge.judge, **vars(call), on_text=on_text))
        self.calls.add(future)
        future.add_done_callback(self.calls.discard)
        judged = asyncio.wrap_future(future)
        judged.add_done_callback(self.count)
        return judged

    async def judged(self, call: JudgeCall, seconds: float, request: Request) -> Judgement:
        """HTTPException where it fails, comes too late, or the client leaves."""
        future = self.submit(call)
        gone = asyncio.ensure_future(request.receive())  # the body was read: next is that it leaves
        either: set[asyncio.Future[Any]] = {future, gone}
        try:
            await asyncio.wait(either, timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
            return outcome(future, seconds)
        finally:
            gone.cancel()
            future.cancel()  # nothing is left in line behind

    def close(self) -> None:
        """Nothing new is taken, who waits is sent away, and the running call goes on."""
        self.closed = True
        self.thread.shutdown(wait=False, cancel_futures=True)


def outcome(future: "asyncio.Future[Judgement]", seconds: float) -> Judgement:
    """What came within so many seconds. Raises HTTPException."""
    if not future.done():  # or the client has left, and nobody reads this
        raise HTTPException(504, f"no answer within {seconds:g} s, waiting included")
    if future.cancelled():
        raise HTTPException(503, "the server is stopping", {"retry-after": "2"})
    error = future.exception()
    if isinstance(error, InputError):
        raise HTTPException(422, str(error))
    if error is not None:
        log.error("the judge failed", exc_info=error)
        line = f"the judge failed with {type(error).__name__}; the server's log has the rest"
        raise HTTPException(500, line)
    return future.result()


def followed(
    queue: JudgeQueue, call: JudgeCall, seconds: float, write: Write, error_name: str | None
) -> StreamingResponse:
    """Server-sent events of a call: what `write` makes of the reasoning whenever it changes, then
    of the judgement; or an error with the status that a plain request gets, an event of this name.
    A slow reader gets larger pieces, and nothing piles up."""
    loop, changed, reasoning = asyncio.get_running_loop(), asyncio.Event(), Reasoning()

    def on_text(which: tuple[int, ...], text: str, ended: bool) -> None:
        """As the judge calls it, in its thread."""
        reasoning[which] = ((text if ended else settled(text)).strip(), ended)
        loop.call_soon_threadsafe(changed.set)

    future = queue.submit(call, on_text)
    future.add_done_callback(lambda _: changed.set())

    async def events() -> AsyncIterator[str]:
        end = time.monotonic() + seconds
        try:
            while not future.done() and (left := end - time.monotonic()) > 0:
                with contextlib.suppress(asyncio.TimeoutError):
                    await asyncio.wait_for(changed.wait(), min(BEAT_SECONDS, left))
                changed.clear()
                yield write(dict(reasoning), None) or ": waiting\n\n"
            judgement = outcome(future, seconds)
            yield write(dict(reasoning), judgement)
        except HTTPException as error:
            content = {"message": one_line(error.detail), "type": "server_error"}
            yield event({"error": content | {"status": error.status_code}}, error_name)
        finally:
            future.cancel()  # where the reader has left

    return StreamingResponse(events(), media_type="text/event-stream")


def settled(text: str) -> str:
    """What will stay: an ending that may become "</think>", half a character and blanks may not.

    >>> settled("Terse. </th")
    'Terse.'
    """
    text = text.rstrip("\ufffd")
    held = max(n for n in range(len(CLOSE)) if text.endswith(CLOSE[:n]))
    return text[: len(text) - held].rstrip()


def event(data: dict[str, Any], name: str | None = None) -> str:
    """A server-sent event, in ASCII: some readers end a line at U+2028 or U+0085, too."""
    return f"event: {name}\n" * bool(name) + f"data: {json.dumps(data, allow_nan=False)}\n\n"


def judge_writer() -> Write:
    """POST /judge with `stream`: pieces of reasoning, then the judgement, or `error`.

    event: reasoning                                    event: judgement
    data: {"candidates": [0], "text": " more", …}       data: {"scores": [7.1, 3.4], …}

    Of a pair the text comes in one piece: a line of evidence adds a sentence about each candidate.
    """
    sent: Reasoning = {}

    def write(reasoning: Reasoning, judgement: Judgement | None) -> str:
        events = ""
        for which, (text, ended) in reasoning.items():
            before = sent.get(which, ("", False))
            if (text, ended) != before and (ended or len(which) == 1):
                piece = {"candidates": [*which], "text": text[len(before[0]) :], "ended": ended}
                events += event(piece, "reasoning")
                sent[which] = text, ended
        if judgement is not None:
            events += event(schemas.judge_reply(judgement), "judgement")
        return events

    return write


def chat_writer(call: JudgeCall, model: str) -> Write:
    """OpenAI's stream of chunks. Together they are the reply that a plain request gets."""
    head = openai_chat.head("chat.completion.chunk", model)
    many, pointwise = len(call.candidates) > 1, call.config.mode == "pointwise"
    sent: str | None = None

    def write(reasoning: Reasoning, judgement: Judgement | None) -> str:
        nonlocal sent
        text = openai_chat.reply_so_far(reasoning, many) if pointwise else ""
        if judgement is not None:
            text = openai_chat.reply_text(judgement)
        events = event(chunk(head, {"role": "assistant", "content": ""})) if sent is None else ""
        if more := text[len(sent or "") :]:
            events += event(chunk(head, {"content": more}))
        sent = (sent or "") + more
        if judgement is not None:
            end = chunk(head, {}, ended=True) | {"nanopersrm": schemas.judge_reply(judgement)}
            events += event(end) + "data: [DONE]\n\n"
        return events

    return write


def one_line(text: str) -> str:
    """Fit for an error: no line ends, no half characters, not for ever."""
    line = " ".join(text.encode("utf-8", "replace").decode("utf-8").split())
    return line if len(line) <= LONGEST_LINE else f"{line[:LONGEST_LINE]} …"


async def answer_error(_: Any, error: Exception) -> JSONResponse:
    """What the guard, the router, the reader of bodies or a route raised, in OpenAI's form."""
    status, line, headers = 422, str(error), None
    if isinstance(error, HTTPException):
        status, line, headers = error.status_code, error.detail, error.headers
    elif isinstance(error, RequestValidationError | ValidationError):
        first = error.errors()[0]
        status, line = 400 if first["type"] == "json_invalid" else 422, fault(first)
    kind = "invalid_request_error" if status < 500 else "server_error"
    content = {"message": one_line(line), "type": ERROR_TYPES.get(status, kind)}
    return JSONResponse({"error": content | {"param": None, "code": None}}, status, headers)


def page_policy(page: str) -> str:
    """The Content-Security-Policy of a page whose script and style stand in it: their hashes."""
    policy = NOTHING_ALLOWED + "; connect-src 'self'; img-src data:; base-uri 'none'"
    for kind, text in INLINE.findall(page):
        digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
        policy += f"; {kind}-src 'sha256-{digest}'"
    return policy


def guarded(app: ASGIApp, meters: Meters, token: str | None, longest: int, page: str) -> ASGIApp:
    """The app behind token, host and length; replies are not to be kept, sniffed or framed."""
    policies = {"/": page_policy(page), "/docs": DOCS_POLICY}

    async def guard(scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await app(scope, receive, send)
            return
        begin, status, length, whole = time.monotonic(), 500, 0, False
        policy = policies.get(scope["path"], NOTHING_ALLOWED)

        async def receive_limited() -> Message:
            nonlocal length, whole
            if whole:
                return await receive()  # that the client has left
            try:
                left = begin + BODY_SECONDS - time.monotonic()
                message = await asyncio.wait_for(receive(), max(0.0, left))
            except asyncio.TimeoutError:
                line = f"the body did not come in {BODY_SECONDS:.0f} s"
                raise HTTPException(408, line) from None
            length, whole = length + len(message.get("body", b"")), not message.get("more_body")
            if length > longest:
                raise HTTPException(413, f"expected a body of at most {longest} bytes, got more")
            return message

        async def send_guarded(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                more = [(b"content-security-policy", policy.encode()), *HEADERS]
                message = {**message, "headers": [*message["headers"], *more]}
            await send(message)

        try:
            refusal = _refusal(scope, token)
            inner = app if refusal is None else await answer_error(None, refusal)
            await inner(scope, receive_limited, send_guarded)
        finally:
            path = getattr(scope.get("route"), "path", "other")
            meters.requests.labels(path, str(status)).inc()
            meters.seconds.labels(path).observe(time.monotonic() - begin)

    return guard


def _refusal(scope: Scope, token: str | None) -> HTTPException | None:
    """Why a request is refused, or None. Without a token it must name this machine."""
    headers = dict(scope["headers"])
    host = headers.get(b"host", b"").decode("latin-1")
    if token is None and not THIS_MACHINE.fullmatch(host):
        return HTTPException(403, f"Host: expected this machine, got {host!r}")
    if token is not None and scope["path"] not in OPEN_PATHS:
        scheme, _, rest = headers.get(b"authorization", b"").partition(b" ")
        brought = rest.strip() if scheme.lower() == b"bearer" else b""
        if scheme.lower() == b"basic":
            with contextlib.suppress(ValueError):
                brought = base64.b64decode(rest, validate=True).partition(b":")[2]
        if not hmac.compare_digest(brought, token.encode()):
            line = "Authorization: expected Bearer and the token of this server"
            return HTTPException(401, line, {"www-authenticate": "Bearer"})
    return None


def build_app(
    judge: Judges,
    judging: JudgeConfig | None = None,
    limits: Limits | None = None,
    token: str | None = None,
) -> tuple[ASGIApp, JudgeQueue]:
    """The whole server as an ASGI app, and its queue."""
    judging, limits, meters = judging or JudgeConfig(), limits or Limits(), Meters()
    page = files("nanopersrm.serve").joinpath("page.html").read_text("utf-8")
    queue = JudgeQueue(judge, limits.waiting, meters)
    writers: dict[str, Writer] = {}
    seconds = limits.seconds
    call_of = partial(schemas.judge_call, writers=writers, defaults=judging)

    @contextlib.asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        yield
        queue.close()

    app = FastAPI(
        title="nanopersrm", version=__version__, description="How well does a text fit a writer?",
        lifespan=lifespan, redoc_url=None, redirect_slashes=False,
    )  # fmt: skip
    for kind in (HTTPException, RequestValidationError, ValidationError, InputError):
        app.add_exception_handler(kind, answer_error)

    @app.get("/", include_in_schema=False)
    async def index() -> HTMLResponse:
        return HTMLResponse(page)

    @app.get("/health")
    async def health() -> JSONResponse:
        """Whether it serves; 503 while it is stopping."""
        status, code = ("stopping", 503) if queue.closed else ("ok", 200)
        return JSONResponse({"status": status, "version": __version__}, code)

    @app.get("/metrics")
    async def metrics() -> PlainTextResponse:
        """Counters in Prometheus' text format."""
        return PlainTextResponse(prometheus.generate_latest(meters.registry).decode())

    @app.post("/judge", responses={200: {"model": Judgement}})
    async def judge_candidates(body: JudgeRequest, request: Request) -> Response:
        """Score the candidates, with reasons. `stream`: server-sent events."""
        call = call_of(body)
        if body.stream:
            return followed(queue, call, seconds, judge_writer(), "error")
        return JSONResponse(schemas.judge_reply(await queue.judged(call, seconds, request)))

    @app.post("/rank")
    async def rank(body: JudgeRequest, request: Request) -> dict[str, Any]:
        """The candidates, best first, with the probability of each step."""
        if body.stream:
            raise InputError("stream: expected false; /judge can be followed")
        call = call_of(body)
        call = replace(call, config=replace(call.config, topics=False))  # no words are shown
        return schemas.rank_reply(await queue.judged(call, seconds, request))

    @app.post("/profile")
    def profile(body: schemas.ProfileRequest) -> list[dict[str, Any]]:
        """The writer's habits, most salient first, with the reference to draw them against."""
        return schemas.profile_reply(body.exemplars, body.top)  # in a thread of starlette's

    @app.get("/writers")
    async def list_writers() -> list[str]:
        """Who was put."""
        return sorted(writers)

    @app.put("/writers/{name}", status_code=204)
    async def put_writer(name: Name, body: Writer) -> Response:
        """Keep exemplars under a name, until the server ends."""
        if name not in writers and len(writers) >= limits.writers:
            raise HTTPException(409, f"expected at most {limits.writers} writers; delete one")
        writers[name] = body
        return Response(status_code=204)

    @app.get("/writers/{name}")
    async def get_writer(name: Name) -> Writer:
        """What was put."""
        return schemas.writer_named(name, writers)

    @app.delete("/writers/{name}", status_code=204)
    async def delete_writer(name: Name) -> Response:
        """Forget a writer."""
        schemas.writer_named(name, writers)
        del writers[name]
        return Response(status_code=204)

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        """OpenAI's list of models: the judge, and the judge for each writer."""
        names = ["nanopersrm", *(f"nanopersrm:{name}" for name in sorted(writers))]
        more = {"object": "model", "created": 0, "owned_by": "nanopersrm"}
        return {"object": "list", "data": [{"id": name} | more for name in names]}

    @app.post("/v1/chat/completions")
    async def complete(body: ChatRequest, request: Request) -> Any:
        """OpenAI's chat completions."""
        call = call_of(openai_chat.judge_request(body))
        if body.stream:
            return followed(queue, call, seconds, chat_writer(call, body.model), None)
        return openai_chat.completion(await queue.judged(call, seconds, request), body.model)

    @app.post("/get_reward")
    async def get_reward(body: RewardRequest, request: Request, writer: str | None = None) -> Any:
        """OpenRLHF's remote reward, from 0 to 1."""
        end, results = time.monotonic() + seconds, []
        for members, call in schemas.reward_calls(body, writer, writers, judging):
            left = end - time.monotonic()
            results.append((members, await queue.judged(call, left, request)))
        return schemas.reward_reply(len(body.query), results)

    return guarded(app, meters, token, limits.body_kb * 1024, page), queue


def bind(host: str, port: int, token: str | None) -> socket.socket:
    """A socket that is bound and does not listen yet; without a token, to this machine alone."""
    if token is not None and not (len(token) >= LEAST_TOKEN and re.fullmatch(r"[!-~]+", token)):
        raise InputError(f"{TOKEN}: expected at least {LEAST_TOKEN} ASCII characters, no blanks")
    if not 0 <= port <= 65535:  # or it would be taken modulo 65536
        raise InputError(f"--port: expected 0 to 65535, got {port}")
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        bound = socket.socket(family, socket.SOCK_STREAM)
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind(address)
    except (OSError, UnicodeError) as error:
        raise InputError(f"--host {host} --port {port}: {reason(error)}") from error
    loopback = ipaddress.ip_address(str(address[0]).partition("%")[0]).is_loopback
    if not loopback and token is None:
        bound.close()
        raise InputError(f"--host {host}: other machines could reach this; set {TOKEN} to a secret")
    return bound


async def serve(app: ASGIApp, queue: JudgeQueue, bound: socket.socket, seconds: float) -> None:
    """Until a signal comes; then who waits is sent away, and the running call finishes."""
    config = uvicorn.Config(
        app, http="h11", ws="none", log_level="warning",  # no line for each request
        limit_concurrency=CONNECTIONS, timeout_graceful_shutdown=int(seconds) + 5,
    )  # fmt: skip
    server = uvicorn.Server(config)

    async def close_at_exit() -> None:
        while not server.should_exit:
            await asyncio.sleep(0.1)
        queue.close()

    await asyncio.gather(server.serve(sockets=[bound]), close_at_exit())


def main(config: Config) -> None:
    """Load, then serve."""
    token, say = os.environ.get(TOKEN), partial(print, file=sys.stderr, flush=True)
    with bind(config.host, config.port, token) as bound:
        from nanopersrm.judge.judge import Judge  # torch takes seconds

        judge = Judge.load(config.base, config.adapter, config.device, config.dtype, say=say)
        trim()  # loading leaves free memory of this thread's own, which the judge's never gets
        app, queue = build_app(judge, config.judging, config.limits, token)
        bound.listen()
        host, port = bound.getsockname()[:2]
        host = f"[{host}]" if ":" in host else host
        say(f"serving on http://{host}:{port} ({'with' if token else 'without'} a token)")
        asyncio.run(serve(app, queue, bound, config.limits.seconds))
