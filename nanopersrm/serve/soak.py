"""Soak: many clients at once, good requests and bad ones, and a look at what comes back.

    python -m nanopersrm.serve.serve --port 8000 --judging.no-think &
    python -m nanopersrm.serve.soak --port 8000 --requests 2000 --clients 16

Every request has an answer that is right for it: a status, and for a good one as many scores as
candidates, from 1 to 9. None may be missing. The same question must get the same scores each time,
whoever is judged with it, so an answer that went to somebody else is seen. The server's own count
of judgements must agree with what arrived. Printed are

    requests by kind and status, p50 and p99, what was lost or wrong, the server's memory

Memory is looked at before the first request and after each tenth of them. The first tenth warms up:
caches fill, and the heap becomes as large as its largest call. So two growths are printed, since
the first tenth and since half. A leak grows as much in each tenth as in the one before; a cache
that still fills, less and less. Flat is a growth since half of a few percent.

Kinds: judge, rank, stream, writer (put before), chat, reward; and bad ones: no JSON, an unknown
field, an empty text, an unknown writer, an unknown path, a body that is too long, and clients that
leave before they are answered. 503 and 504 are fair answers under load; they are counted apart.

What we chose. The server judges as it is set; without reasoning a judgement is short, and differs
by rounding at most. Only this machine is asked: a load on another is not ours to make. Exit code 1
if anything was lost or wrong.
"""

import http.client
import json
import os
import random
import re
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import tyro

from nanopersrm import InputError
from nanopersrm.command import Ending, exit_code

TOKEN = "NANOPERSRM_TOKEN"
QUESTIONS = 40  # different ones
CLOSE = 0.15  # points by which a score may differ: rounding
TEXT = "The sea was calm; nobody (or so we thought) had come home yet and I did not mind."
GOOD = ("judge", "rank", "stream", "writer", "chat", "reward")
BAD = ("no JSON", "field", "empty", "nobody", "path", "too long", "leaves")
EXPECTED = {
    "no JSON": 400,
    "field": 422,
    "empty": 422,
    "nobody": 404,
    "path": 404,
    "too long": 413,
}
UNDER_LOAD = (503, 504)
Send = Callable[[str, str, bytes], tuple[int, bytes]]  # method, path, body -> status, body


@dataclass(frozen=True)
class Config:
    """Ask a server of this machine again and again."""

    port: int = 8000  # of the server
    requests: int = 1000  # in all
    clients: int = 16  # at once
    bad: float = 0.3  # share of bad requests
    seed: int = 0  # same seed, same requests
    timeout: float = 150.0  # seconds until a request counts as lost

    def __post_init__(self) -> None:
        for name in ("requests", "clients", "timeout"):
            if not getattr(self, name) > 0:
                raise InputError(f"--{name}: expected more than 0, got {getattr(self, name)}")
        if not 0 <= self.bad <= 1:
            raise InputError(f"--bad: expected 0 to 1, got {self.bad}")


@dataclass
class Found:
    """What came back."""

    by_kind: Counter[tuple[str, str]] = field(default_factory=Counter)  # kind, status
    seconds: list[float] = field(default_factory=list)  # of good requests that were judged
    wrong: list[str] = field(default_factory=list)
    lost: list[str] = field(default_factory=list)
    scores: dict[int, list[float]] = field(default_factory=dict)  # of each question
    judged: int = 0  # judgements that arrived
    left: int = 0  # clients that did not wait
    texts: int = 0  # candidates in both
    counted: int = 0  # judgements that the server counted
    memory: dict[int, float] = field(default_factory=dict)  # MB of the server after so many


def questions(seed: int) -> list[dict[str, Any]]:
    """Bodies of /judge that differ in writers, number of candidates and texts."""
    rng = random.Random(seed)

    def text(words: int) -> str:
        return " ".join(rng.choice(TEXT.split()) for _ in range(words)) + f" {rng.random():.6f}."

    writers = [[text(30), text(20)] for _ in range(5)]
    return [
        {
            "exemplars": writers[i % len(writers)],
            "candidates": [text(15) for _ in range(1 + i % 4)],
        }
        for i in range(QUESTIONS)
    ]


def request_of(kind: str, question: dict[str, Any], number: int) -> tuple[str, bytes]:
    """Path and body of a request of this kind."""
    if kind == "no JSON":
        return "/judge", b'{"candidates": ['
    if kind == "too long":
        return "/judge", b'"' + b"x" * (2 << 20) + b'"'
    if kind == "path":
        return f"/nowhere/{number}", json.dumps(question).encode()
    path, body = "/judge", dict(question)
    if kind == "field":
        body["exemplar"] = []
    elif kind == "empty":
        body["candidates"] = [*body["candidates"], " \n"]
    elif kind in ("writer", "nobody"):
        del body["exemplars"]
        body["writer"] = f"soak-{number % 5}" if kind == "writer" else f"nobody-{number}"
    elif kind == "rank":
        path = "/rank"
    elif kind == "stream":
        body["stream"] = True
    elif kind == "chat":
        path, body = "/v1/chat/completions", {"model": "nanopersrm", "messages": []}
        body["nanopersrm"] = question
    elif kind == "reward":
        path, texts = "/get_reward", question["candidates"]
        labels = [{"exemplars": question["exemplars"]}] * len(texts)
        both = [f"<user>Go.<bot>{text}</s>" for text in texts]
        body = {"query": both, "prompts": ["<user>Go.<bot>"] * len(texts), "labels": labels}
    return path, json.dumps(body).encode()


def scores_of(kind: str, body: bytes) -> list[float] | None:
    """The scores in the answer to a good request, in the order of the candidates."""
    if kind == "stream":
        last = body.decode().rstrip().split("\n\n")[-1]
        if not last.startswith("event: judgement\ndata: "):
            return None
        return json.loads(last.removeprefix("event: judgement\ndata: "))["scores"]
    answer = json.loads(body)
    if kind == "rank":
        places = sorted(answer["ranking"] or [], key=lambda place: place["candidate"])
        return [place["score"] for place in places]
    if kind == "reward":
        return [1 + 8 * reward for reward in answer["rewards"]]
    return (answer["nanopersrm"] if kind == "chat" else answer)["scores"]


def soak(config: Config, send: Send, leave: Callable[[str, bytes], None]) -> Found:
    """Ask all, in threads. send: a request; leave: one that is not waited for."""
    asked, found, lock = questions(config.seed), Found(), threading.Lock()
    for i in range(5):
        writer = json.dumps({"exemplars": asked[i]["exemplars"]}).encode()
        status, body = send("PUT", f"/writers/soak-{i}", writer)
        if status != 204:
            raise InputError(f"PUT /writers: expected 204, got {status} {body[:200]!r}")
    before = metrics(send)
    found.memory[0] = before["memory"] / 1e6
    numbers, over = iter(range(config.requests)), 0  # over: answered or lost
    tenths = {config.requests * tenth // 10 for tenth in range(1, 10)}

    def client() -> None:
        nonlocal over
        while True:
            with lock:
                number = next(numbers, None)
            if number is None:
                return
            ask(number)
            with lock:
                over = done = over + 1
            if done in tenths:
                with suppress(OSError, http.client.HTTPException, InputError):  # one look less
                    found.memory[done] = metrics(send)["memory"] / 1e6

    def ask(number: int) -> None:
        rng = random.Random(f"{config.seed} {number}")
        kind = rng.choice(BAD if rng.random() < config.bad else GOOD)
        which = rng.randrange(QUESTIONS)
        # writers were put in the order of the questions, so question i is of writer i % 5
        path, body = request_of(kind, asked[which], which if kind == "writer" else number)
        begin = time.perf_counter()
        try:
            if kind == "leaves":
                leave(path, body)
                status, answer = 0, b""
            else:
                status, answer = send("POST", path, body)
        except (OSError, http.client.HTTPException) as error:
            with lock:
                found.lost.append(f"{kind}: {type(error).__name__} {error}")
            return
        took = time.perf_counter() - begin
        with lock:
            take(found, kind, which, len(asked[which]["candidates"]), status, answer, took)

    threads = [threading.Thread(target=client) for _ in range(config.clients)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    answered, lost = sum(found.by_kind.values()), len(found.lost)
    if answered + lost != config.requests:
        found.wrong.append(f"{config.requests} requests, {answered} answered, {lost} lost")
    after = metrics(send)
    found.counted = round(after["judgements"] - before["judgements"])
    found.memory[config.requests] = after["memory"] / 1e6
    if not found.judged <= found.counted <= found.judged + found.left:
        found.wrong.append(f"{found.counted} judgements counted, {found.judged} arrived")
    return found


def take(
    found: Found, kind: str, which: int, n: int, status: int, body: bytes, took: float
) -> None:
    """Look at one answer."""
    if kind == "leaves":
        found.left += 1
        found.texts += n
        found.by_kind[kind, "-"] += 1
        return
    late = kind == "stream" and status == 200 and b'"status": 50' in body[-300:]
    found.by_kind[kind, "in stream" if late else str(status)] += 1
    if kind in EXPECTED:
        if status != EXPECTED[kind]:
            found.wrong.append(f"{kind}: status {status}, {body[:200]!r}")
        return
    if status in UNDER_LOAD or late:
        return
    try:
        scores = scores_of(kind, body) if status == 200 else None
        sound = scores is not None and len(scores) == n and all(1 <= s <= 9 for s in scores)
    except (KeyError, TypeError, ValueError):  # another form, or null in place of a score
        sound = False
    if not sound or scores is None:
        found.wrong.append(f"{kind}: expected {n} scores, got {status} {body[:200]!r}")
        return
    found.judged += 1
    found.texts += n
    found.seconds.append(took)
    known = found.scores.setdefault(which, scores)
    if any(abs(a - b) > CLOSE for a, b in zip(known, scores, strict=True)):
        found.wrong.append(f"{kind}: question {which} got {scores} and {known}")


def metrics(send: Send) -> dict[str, float]:
    """Judgements and memory, as the server counts them."""
    status, body = send("GET", "/metrics", b"")
    if status != 200:
        raise InputError(f"GET /metrics: expected 200, got {status} {body[:200]!r}")
    counts = re.findall(rb"^nanopersrm_judgements_total\{.*\} (\S+)$", body, re.MULTILINE)
    memory = re.search(rb"^process_resident_memory_bytes (\S+)$", body, re.MULTILINE)
    return {"judgements": sum(map(float, counts)), "memory": float(memory[1]) if memory else 0.0}


def client_of(config: Config) -> tuple[Send, Callable[[str, bytes], None]]:
    """Requests to this machine, a connection each."""
    headers = {"Content-Type": "application/json", "Connection": "close"}
    if token := os.environ.get(TOKEN):
        headers["Authorization"] = f"Bearer {token}"

    def opened() -> http.client.HTTPConnection:
        return http.client.HTTPConnection("127.0.0.1", config.port, timeout=config.timeout)

    def send(method: str, path: str, body: bytes) -> tuple[int, bytes]:
        connection = opened()
        try:
            with suppress(BrokenPipeError):  # refused before it was read: the answer is there
                connection.request(method, path, body, headers)
            answer = connection.getresponse()
            return answer.status, answer.read()
        finally:
            connection.close()

    def leave(path: str, body: bytes) -> None:
        connection = opened()
        connection.request("POST", path, body, headers)
        connection.close()

    return send, leave


def lines_of(found: Found, config: Config, seconds: float) -> list[str]:
    """The figures."""
    lines = [f"{config.requests} requests, {config.clients} clients at once, {seconds:.1f} s"]
    for kind in (*GOOD, *BAD):
        said = [f"{n} x {s}" for (k, s), n in sorted(found.by_kind.items()) if k == kind]
        lines.append(f"  {kind:<10}{', '.join(said) or '-'}")
    ordered = sorted(found.seconds)
    if ordered:
        p50, p99 = (ordered[int(share * (len(ordered) - 1))] for share in (0.5, 0.99))
        lines.append(f"judged: p50 {1000 * p50:.0f} ms, p99 {1000 * p99:.0f} ms")
    lines.append(f"judgements: {found.judged} arrived, {found.counted} counted by the server")
    lines += memory_lines(found.memory)
    lines.append(f"lost {len(found.lost)}, wrong {len(found.wrong)}")
    return lines + [f"  {line}" for line in [*found.lost, *found.wrong][:10]]


def memory_lines(sizes: dict[int, float]) -> list[str]:
    """The server's memory before and by tenths, and its growth after the warm-up."""
    (_, first), *later = sorted(sizes.items())
    end, warm = later[-1][1], later[0][1]
    half = [size for count, size in later if count <= later[-1][0] / 2] or [warm]
    return [
        f"memory of the server: {first:.0f} MB, by tenths {' '.join(f'{s:.0f}' for _, s in later)}",
        f"growth: {end - warm:.0f} MB since the first tenth, {end - half[-1]:.0f} MB since half",
    ]


def main(config: Config) -> None:
    """Ask, look, print."""
    begin = time.perf_counter()
    try:
        found = soak(config, *client_of(config))
    except ConnectionError as error:
        raise InputError(f"--port {config.port}: expected a server there, {error}") from error
    print("\n".join(lines_of(found, config, time.perf_counter() - begin)))
    if found.lost or found.wrong:
        raise Ending(1, "something was lost or wrong")


def run(config: Config) -> int:
    """`main` with an exit code."""
    return exit_code("nanopersrm.serve.soak", lambda: main(config))


if __name__ == "__main__":
    about = __doc__.split("Every request")[0]
    sys.exit(run(tyro.cli(Config, prog="nanopersrm.serve.soak", description=about)))
