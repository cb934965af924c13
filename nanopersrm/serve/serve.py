"""The judge as a server, for tools and for people.

    NANOPERSRM_TOKEN=… python -m nanopersrm.serve.serve --adapter runs/sft/adapter
    curl -H "Authorization: Bearer …" -H "Content-Type: application/json" \\
         -d '{"exemplars": ["…"], "candidates": ["…", "…"]}' http://127.0.0.1:8000/judge

    POST /judge /rank              our own; `stream` follows the reasoning (server-sent events)
    POST /profile                  the writer's habits against many others', no model needed
    GET  /writers                  PUT, GET, DELETE /writers/NAME: exemplars under a name
    POST /v1/chat/completions      OpenAI's, see `chat.py`; GET /v1/models
    POST /get_reward               OpenRLHF's, see `remote.py`
    GET  /health /metrics          metrics in Prometheus' format
    GET  / /docs                   the page for people; the OpenAPI page

Errors are one line and say what was expected. Nothing stands in for a score that was not given.

Without a token it serves this machine alone and refuses to start elsewhere. Ctrl-C or SIGTERM send
away who waits, and leave the judgement in progress some seconds to finish (`desk.py`). Writers are
kept in memory only, texts are not logged. A connection on which no whole head comes within
HEAD_SECONDS is closed.

What we left out: TLS, several models, several machines; a proxy in front has them. The packages are
those of `pip install 'nanopersrm[serve]'`.
"""

import asyncio
import ipaddress
import os
import socket
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import partial
from typing import Any, cast

import tyro

from kernels.process import trim
from nanopersrm import InputError
from nanopersrm.command import exit_code
from nanopersrm.judge.adapter_settings import DEFAULT
from nanopersrm.judge.judgement import JudgeConfig
from nanopersrm.model.embedded import DEFAULT_BASE

try:
    import uvicorn

    from nanopersrm.serve.desk import Desk
    from nanopersrm.serve.gate import App
    from nanopersrm.serve.routes import app_of
    from nanopersrm.serve.wire import Limits
except ModuleNotFoundError as error:
    if __name__ != "__main__":
        raise
    print(f"nanopersrm.serve: error: {error}; pip install 'nanopersrm[serve]'", file=sys.stderr)
    sys.exit(2)

TOKEN, LEAST_TOKEN = "NANOPERSRM_TOKEN", 16  # characters
CONNECTIONS = 512  # at once; one more gets 503
HEAD_SECONDS = 10.0  # for the head of a request to come; uvicorn alone would wait for ever
LOOK = 0.1  # seconds between two looks at whether to stop, and who is silent
Silence = dict[Any, tuple[Any, float]]  # connection -> its last cycle, and since when it is silent


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
    limits: Limits = field(default_factory=Limits)  # what one client may take


def token_of(given: str | None) -> str | None:
    """The token that requests must bring, from the environment; None: not set."""
    if given is None:
        return None
    if len(given) < LEAST_TOKEN or not given.isascii() or any(c.isspace() for c in given):
        raise InputError(
            f"{TOKEN}: expected at least {LEAST_TOKEN} ASCII characters without blanks, "
            f"got {len(given)} characters"
        )
    return given


def bound(host: str, port: int, token: str | None) -> tuple[socket.socket, bool]:
    """A socket that is bound and does not listen yet, and whether only this machine reaches it."""
    if not 0 <= port <= 65535:
        raise InputError(f"--port: expected 0 to 65535, got {port}")
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    except (OSError, UnicodeError) as error:
        raise InputError(f"--host: expected the name of this machine, got {host!r}") from error
    own = ipaddress.ip_address(str(address[0]).partition("%")[0]).is_loopback
    if not own and token is None:
        raise InputError(
            f"--host {host}: other machines could reach this; set {TOKEN} in the environment to a "
            "secret that requests must bring"
        )
    place = socket.socket(family, socket.SOCK_STREAM)
    place.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        place.bind(address)
    except OSError as error:
        place.close()
        raise InputError(f"--host {host} --port {port}: {error.strerror}") from error
    return place, own


def hang_up(connections: Iterable[Any], since: Silence, now: float) -> Silence:
    """Close who has had no request under way for HEAD_SECONDS -> who has none, since when.

    A cycle of uvicorn's is a request with its answer; after it, the connection has a finished one.
    """
    silent: Silence = {}
    for one in connections:
        cycle = one.cycle
        if cycle is not None and not cycle.response_complete:
            continue
        before, begin = since.get(one, (cycle, now))
        silent[one] = (cycle, begin if before is cycle else now)
        if now - silent[one][1] > HEAD_SECONDS:
            one.transport.close()
    return silent


async def serving(
    app: App, desk: Desk, place: socket.socket, seconds: float, ready: Callable[[], None]
) -> None:
    """Until a signal comes; then whoever waits is sent away, and what is being judged finishes."""
    server = uvicorn.Server(
        uvicorn.Config(
            cast(Any, app),
            log_level="warning",  # no line for each request
            lifespan="on",
            http="h11",  # always there, and `hang_up` knows its connections
            ws="none",
            server_header=False,
            limit_concurrency=CONNECTIONS,
            timeout_graceful_shutdown=int(seconds) + 5,
        )
    )

    async def watch() -> None:
        while not (server.started or server.should_exit):
            await asyncio.sleep(LOOK)
        ready()
        since: Silence = {}
        while not server.should_exit:
            since = hang_up(server.server_state.connections, since, time.monotonic())
            await asyncio.sleep(LOOK)
        desk.send_away()

    watching = asyncio.create_task(watch())
    await server.serve(sockets=[place])
    watching.cancel()


def main(config: Config) -> None:
    """Load, then serve."""
    token = token_of(os.environ.get(TOKEN))
    place, own = bound(config.host, config.port, token)

    from nanopersrm.judge.judge import Judge  # torch takes seconds

    with place:
        judge = Judge.load(config.base, config.adapter, config.device, config.dtype, say=_say)
        trim()  # loading leaves free memory of this thread's own, which the judge's never gets
        app, desk = app_of(
            judge, config.judging, config.limits, token, own_only=own and token is None
        )
        host, port = place.getsockname()[:2]
        shown = f"[{host}]" if ":" in host else host
        line = f"serving on http://{shown}:{port} ({'with' if token else 'without'} a token)"
        ready = partial(_say, line)
        asyncio.run(serving(app, desk, place, config.limits.seconds, ready))


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def run(config: Config) -> int:
    """`main` with an exit code."""
    return exit_code("nanopersrm.serve.serve", lambda: main(config), interrupted="stopped")


if __name__ == "__main__":
    about = __doc__.split("Errors are one line")[0]
    sys.exit(run(tyro.cli(Config, prog="nanopersrm.serve.serve", description=about)))
