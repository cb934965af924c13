"""The gate: what every request passes before anybody reads it, and what every reply carries.

    401   no token, or a wrong one (where there is one; compared in constant time)
    403   a Host that is not this machine, while the server is for this machine alone
    413   a body that is too long, known by its header or counted as it comes
    408   a body that does not come

Why the Host: a page from anywhere can make its own name point to 127.0.0.1 (DNS rebinding) and
would then be of the same origin as this server. Its name gives it away. Requests from other origins
need no check: a JSON body makes the browser ask first, and nobody here says yes.

The token comes as Bearer, or as the password in http://any:TOKEN@host/get_reward: OpenRLHF knows a
URL and no headers. Nobody is asked for a password, so no browser keeps one.

Open without a token: /health, the page at / and the OpenAPI page, which hold nothing of anybody.

Errors have one form, that of OpenAI, on one line:

    {"error": {"message": "candidates[0]: expected a text, got an empty one", "type": "…"}}

What never comes here is plain text: what is no HTTP (400) and one connection too many (503), which
uvicorn refuses, and mistakes of ours (500).

Whoever is refused before all of the body was read still hears why: the rest is read and thrown away
first, within bounds (LINGER_BYTES, LINGER_SECONDS). A socket closed on unread bytes resets the
connection, and the client would lose the reply that was already on its way (RFC 9112, 9.6).

Replies are not to be kept, sniffed or framed; the page's own Content-Security-Policy allows the
script and the style that stand in it, by their hashes, and requests to this server only.
"""

import asyncio
import base64
import hashlib
import hmac
import re
import time
from collections.abc import Awaitable, Callable, Mapping, MutableMapping
from dataclasses import dataclass
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Histogram, ProcessCollector
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse

from nanopersrm.serve.wire import one_line

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[MutableMapping[str, Any], Receive, Send], Awaitable[None]]

OPEN_TO_ALL = ("/", "/health", "/docs", "/openapi.json")
OWN_NAMES = re.compile(r"(localhost|127(\.\d{1,3}){3}|\[::1\])(:\d+)?", re.ASCII | re.IGNORECASE)
BODY_SECONDS = 30.0  # for a body to come
LINGER_BYTES, LINGER_SECONDS = 16 << 20, 5.0  # of a refused body, read and thrown away
KINDS = {401: "authentication_error", 403: "permission_error", 503: "overloaded_error"}
NOTHING = "default-src 'none'; frame-ancestors 'none'"
# FastAPI's OpenAPI page fetches Swagger UI from this network.
DOCS = (
    "default-src 'none'; script-src 'unsafe-inline' https://cdn.jsdelivr.net; style-src "
    "https://cdn.jsdelivr.net 'unsafe-inline'; img-src data: https://fastapi.tiangolo.com; "
    "connect-src 'self'; frame-ancestors 'none'"
)
INLINE = re.compile(r"<(script|style)>(.*?)</\1>", re.DOTALL)
BUCKETS = (0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 100, 300)  # seconds


@dataclass(frozen=True)
class Meters:
    """What /metrics shows, see `meters`."""

    registry: CollectorRegistry
    requests: Counter
    seconds: Histogram
    judgements: Counter
    shared: Counter
    tokens: Counter


def meters() -> Meters:
    """Counters of this server, and the memory of its process."""
    registry = CollectorRegistry()
    ProcessCollector(registry=registry)
    return Meters(
        registry,
        Counter("nanopersrm_requests", "answered", ["path", "status"], registry=registry),
        Histogram(
            "nanopersrm_seconds", "per request", ["path"], registry=registry, buckets=BUCKETS
        ),
        Counter("nanopersrm_judgements", "by verdict", ["verdict"], registry=registry),
        Counter("nanopersrm_shared", "requests that shared a call", registry=registry),
        Counter("nanopersrm_tokens", "drawn", registry=registry),
    )


def refusal(status: int, line: str, headers: Mapping[str, str] | None = None) -> JSONResponse:
    """An error in the one form."""
    kind = KINDS.get(status, "invalid_request_error" if status < 500 else "server_error")
    error = {"message": one_line(line), "type": kind, "param": None, "code": None}
    return JSONResponse({"error": error}, status, headers)


def policy_of(page: str) -> str:
    """The Content-Security-Policy of a page whose script and style stand in it."""
    hashes: dict[str, list[str]] = {"script": [], "style": []}
    for kind, text in INLINE.findall(page):
        digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
        hashes[kind].append(f"'sha256-{digest}'")
    return (
        f"default-src 'none'; script-src {' '.join(hashes['script'])}; style-src "
        f"{' '.join(hashes['style'])}; connect-src 'self'; img-src data:; base-uri 'none'; "
        "form-action 'none'; frame-ancestors 'none'"
    )


def headers_of(path: str, page_policy: str) -> list[tuple[bytes, bytes]]:
    """What every reply carries."""
    policy = {"/": page_policy, "/docs": DOCS}.get(path, NOTHING)
    return [
        (b"content-security-policy", policy.encode()),
        (b"x-content-type-options", b"nosniff"),
        (b"referrer-policy", b"no-referrer"),
        (b"cache-control", b"no-store"),
    ]


def guarded(
    app: App, meters: Meters, token: str | None, body_bytes: int, own_only: bool, page_policy: str
) -> App:
    """The app behind the gate. own_only: requests must name this machine."""

    async def gate(scope: MutableMapping[str, Any], receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await app(scope, receive, send)
            return
        begin, path, seen = time.perf_counter(), scope["path"], []
        headers = dict(scope["headers"])
        body = _Body(receive, body_bytes)

        async def marked(message: Message) -> None:
            if message["type"] == "http.response.start":
                if message["status"] >= 400 and b"expect" not in headers:
                    await body.throw_away()
                seen.append(message["status"])
                more = headers_of(path, page_policy)
                message = {**message, "headers": [*message["headers"], *more]}
            await send(message)

        refused = _refused(headers, path, token, body_bytes, own_only)
        try:
            if refused is not None:
                await refused(scope, receive, marked)
            else:
                await app(scope, body.receive, marked)
        finally:
            name = _path_of(path)
            meters.requests.labels(name, str(seen[0] if seen else 500)).inc()
            meters.seconds.labels(name).observe(time.perf_counter() - begin)

    return gate


def _refused(
    headers: Mapping[bytes, bytes], path: str, token: str | None, body_bytes: int, own_only: bool
) -> JSONResponse | None:
    """Why a request is not read, or None."""
    host = headers.get(b"host", b"").decode("latin-1")
    if own_only and not OWN_NAMES.fullmatch(host):
        return refusal(403, f"Host: expected this machine, got {host!r}")
    if token is not None and path not in OPEN_TO_ALL:
        given = _token_in(headers.get(b"authorization", b""))
        if not hmac.compare_digest(given, token.encode()):
            said = "a wrong one" if given else "none"
            line = f"Authorization: expected Bearer and the token of this server, got {said}"
            return refusal(401, line, {"www-authenticate": "Bearer"})
    length = headers.get(b"content-length", b"0")
    if length.isdigit() and int(length) > body_bytes:
        return refusal(413, f"expected a body of at most {body_bytes} bytes, got {int(length)}")
    return None


def _token_in(header: bytes) -> bytes:
    """The token of `Bearer TOKEN`, or the password of Basic, which http://any:TOKEN@host sends."""
    scheme, _, given = header.partition(b" ")
    if scheme.lower() == b"bearer":
        return given.strip()
    if scheme.lower() == b"basic":
        try:
            return base64.b64decode(given.strip(), validate=True).partition(b":")[2]
        except ValueError:
            return b""
    return b""


class _Body:
    """`receive`, which ends where the body is too long or too slow."""

    def __init__(self, receive: Receive, most: int):
        self._receive, self.most = receive, most
        self.taken, self.ended, self.late = 0, False, False
        self.latest = time.monotonic() + BODY_SECONDS

    async def receive(self) -> Message:
        """The next message for the app; HTTPException 408 or 413."""
        if self.ended:  # what comes now is that the client has left
            return await self._receive()
        try:
            wait = max(0.0, self.latest - time.monotonic())
            message = await asyncio.wait_for(self._receive(), wait)
        except asyncio.TimeoutError as error:
            self.late = True
            raise HTTPException(408, f"the body did not come in {BODY_SECONDS:.0f} s") from error
        self._note(message)
        if self.taken > self.most:
            raise HTTPException(413, f"expected a body of at most {self.most} bytes, got more")
        return message

    async def throw_away(self) -> None:
        """Read what is left of a body that nobody wants, within bounds."""
        latest = time.monotonic() + LINGER_SECONDS
        while not (self.ended or self.late) and self.taken <= LINGER_BYTES:
            try:
                wait = max(0.0, latest - time.monotonic())
                self._note(await asyncio.wait_for(self._receive(), wait))
            except asyncio.TimeoutError:
                self.late = True

    def _note(self, message: Message) -> None:
        self.taken += len(message.get("body", b""))
        self.ended = not message.get("more_body", False)


def _path_of(path: str) -> str:
    """A name for metrics; there are only so many."""
    if path.startswith("/writers/"):
        return "/writers/NAME"
    known = ("/judge", "/rank", "/profile", "/writers", "/get_reward", "/metrics", "/v1/models")
    return path if path in (*OPEN_TO_ALL, *known, "/v1/chat/completions") else "other"
