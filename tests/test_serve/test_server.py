"""The server as its clients see it: answers, errors, limits, streams, and real clients."""

import asyncio
import base64
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import openai
import pytest
import uvicorn
from fake_judge import FakeJudge, digits_of
from starlette.testclient import TestClient

from nanopersrm import InputError
from nanopersrm.command import exit_code
from nanopersrm.judge.judgement import JudgeConfig, JudgedCandidate
from nanopersrm.judge.verdict import beats, soft_score
from nanopersrm.serve import server
from nanopersrm.serve.openai_chat import from_tags
from nanopersrm.serve.server import JudgeQueue, Limits, bind, build_app, settled
from nanopersrm.style.ledger import CandidateReading, Line, Passage
from nanopersrm.style.phrases import Phrase, Word

ROOT = Path(__file__).resolve().parents[2]
TOKEN = "a-secret-of-the-tests"
BODY = {"exemplars": ["I came; I saw."], "candidates": ["One.", "Two."]}
SMALL = Limits(waiting=2, seconds=5, body_kb=8, writers=2)
SCORES = [soft_score(digits_of(text)) for text in ("One.", "Two.")]


def client_of(judge: FakeJudge, limits: Limits = SMALL, **more: Any) -> TestClient:
    app, _ = build_app(judge, JudgeConfig(seed=4), limits, **more)
    return TestClient(app, base_url="http://127.0.0.1:8000")  # type: ignore[arg-type]


@pytest.fixture
def judge() -> FakeJudge:
    return FakeJudge()


@pytest.fixture
def client(judge) -> Iterator[TestClient]:
    with client_of(judge) as client:
        yield client


@dataclass
class Live:
    """A server in a thread."""

    judge: FakeJudge
    queue: JudgeQueue
    port: int

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"


@contextmanager
def serving(app: Any, token: str | None = None) -> Iterator[int]:
    """The port of a server in a thread."""
    bound = bind("127.0.0.1", 0, token)
    served = uvicorn.Server(uvicorn.Config(app, log_level="warning", lifespan="on", http="h11"))
    thread = threading.Thread(target=lambda: asyncio.run(served.serve(sockets=[bound])))
    thread.start()
    try:
        until(lambda: served.started)
        yield bound.getsockname()[1]
    finally:
        served.should_exit = True
        thread.join(10)
        bound.close()
    assert not thread.is_alive()


def live(limits: Limits, token: str | None = None) -> Iterator[Live]:
    judge = FakeJudge()
    app, queue = build_app(judge, limits=limits, token=token)
    with serving(app, token) as port:
        try:
            yield Live(judge, queue, port)
        finally:
            judge.gate.set()


@pytest.fixture
def running() -> Iterator[Live]:
    yield from live(Limits(seconds=20), TOKEN)


def until(true: Any) -> None:
    end = time.monotonic() + 10
    while not true():
        assert time.monotonic() < end
        time.sleep(0.01)


def refused(response: Any, status: int) -> str:
    """The one line of an error that has the one form."""
    assert response.status_code == status, response.text
    (error,) = response.json().values()
    assert set(error) == {"message", "type", "param", "code"}
    assert "\n" not in error["message"]
    return error["message"]


def send(url: str, body: Any, method: str = "POST") -> tuple[int, str]:
    """Status and text of a live server's reply. body: bytes, or what becomes JSON."""
    headers = {"Authorization": f"Bearer {TOKEN}", "Content-Type": "application/json"}
    raw = body if isinstance(body, bytes) else json.dumps(body).encode()
    try:
        request = urllib.request.Request(url, raw, headers, method=method)
        with urllib.request.urlopen(request, timeout=60) as reply:
            return reply.status, reply.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode()


def events_of(text: str) -> list[tuple[str, Any]]:
    """Server-sent events, without comments."""
    events = []
    for block in text.split("\n\n"):
        lines = dict(line.split(": ", 1) for line in block.splitlines() if line[:1] not in ":")
        if lines:
            data = lines["data"]
            events.append((lines.get("event", ""), data if data == "[DONE]" else json.loads(data)))
    return events


def test_judge_and_rank(client, judge):
    one, two = digits_of("One."), digits_of("Two.")
    best = int(SCORES[1] > SCORES[0])
    judged = client.post("/judge", json=BODY).json()
    assert judged["scores"] == pytest.approx(SCORES)
    assert judged["preference"][0][1] == pytest.approx(beats(one, two))
    assert (judged["verdict"], judged["ranking"]) == (best, [best, 1 - best])
    assert judged["notes"] == ["not trained"]
    assert judged["replies"][0]["reasoning"] == judged["reasoning"][0]
    ranked = client.post("/rank", json=BODY).json()
    assert (ranked["verdict"], judge.configs[-1].topics) == (best, False)
    assert [place["candidate"] for place in ranked["ranking"]] == [best, 1 - best]
    steps = [place["beats_next"] for place in ranked["ranking"]]
    assert steps == [pytest.approx(max(beats(one, two), beats(two, one))), None]


def test_what_is_known_of_a_candidate_is_in_a_judgement(client, judge):
    """In the order of the candidates, in every form that a judgement travels in."""
    line = Line("commas", 6.5, 50.0, -2.1, (Passage(0, 4, "One.", -2.1),))
    lines = [line, Line("sum", None, None, -2.1)]
    reading = CandidateReading(0.21, 0.08, [Word(0, 4, 1.25, True)], [Phrase(0, 4, "One.", 1.25)])
    judge.known = [JudgedCandidate(lines, 3.4, 61.2, reading), JudgedCandidate([], -1.0, 9.5, None)]
    judged = client.post("/judge", json=BODY).json()["candidates"]
    passage = {"start": 0, "end": 4, "text": "One.", "decibans": -2.1}
    known = {"feature": "commas", "writer": 6.5, "candidate": 50, "decibans": -2.1}
    assert judged[0]["ledger"][0] == known | {"words": [passage]}
    assert judged[0]["ledger"][1]["feature"] == "sum"
    phrase = {"start": 0, "end": 4, "text": "One.", "gain": 1.25, "topic": False}
    word = {"start": 0, "end": 4, "gain": 1.25, "topic": True}
    read = {"words": [word], "phrases": [phrase]}
    assert judged[0]["reading"] == read | {"forward": 0.21, "back": 0.08}
    bare = {"ledger": [], "decibans": -1, "measured": 9.5, "reading": None}
    assert judged[1] == bare | {"score": pytest.approx(SCORES[1])}
    streamed = events_of(client.post("/judge", json=BODY | {"stream": True}).text)
    assert streamed[-1][1]["candidates"] == judged
    chat = {"model": "nanopersrm", "messages": [], "nanopersrm": BODY}
    answer = client.post("/v1/chat/completions", json=chat).json()
    assert answer["nanopersrm"]["candidates"] == judged
    ranked = client.post("/rank", json=BODY).json()["ranking"]
    assert {place["candidate"]: place["measured"] for place in ranked} == {0: 61.2, 1: 9.5}


def test_an_invalid_verdict_is_no_number(client):
    body = BODY | {"candidates": ["One.", "invalid"]}
    answer = client.post("/judge", json=body)
    assert "NaN" not in answer.text
    judged = answer.json()
    assert (judged["verdict"], judged["scores"][1], judged["ranking"]) == ("invalid", None, None)
    assert judged["preference"][0][1] is None
    assert client.post("/rank", json=body).json()["ranking"] is None
    chat = {"model": "nanopersrm", "messages": [], "nanopersrm": body}
    assert "no valid score" in refused(client.post("/v1/chat/completions", json=chat), 500)
    reward = {"query": ["Hi.One.", "Hi.invalid"], "prompts": ["Hi."] * 2, "labels": [["x"]] * 2}
    assert "no valid score" in refused(client.post("/get_reward", json=reward), 500)


def test_writers_are_put_once(client, judge):
    ada = {"exemplars": ["I came; I saw.", "So be it!"], "principles": ["Be brief."]}
    assert client.put("/writers/ada", json=ada).status_code == 204
    assert client.get("/writers").json() == ["ada"]
    assert client.get("/writers/ada").json() == ada
    by_name = {"writer": "ada", "candidates": ["One."]}
    assert client.post("/judge", json=by_name).json()["verdict"] == 0
    assert judge.calls[-1][0] == tuple(ada["exemplars"])
    for more in ({"exemplars": ["So."]}, {"principles": ["Be long."]}):
        assert "writer" in refused(client.post("/judge", json=by_name | more), 422)
    assert client.put("/writers/bea", json=ada).status_code == 204
    assert "2 writers" in refused(client.put("/writers/cleo", json=ada), 409)
    assert client.put("/writers/ada", json=ada).status_code == 204  # in its own place
    assert client.delete("/writers/ada").status_code == 204
    for gone in (
        client.delete("/writers/ada"),
        client.get("/writers/ada"),
        client.post("/judge", json=by_name),
    ):
        assert "'ada'" in refused(gone, 404)
    for name in ("a%20b", "%C3%A9", "-a"):
        assert "name: " in refused(client.put(f"/writers/{name}", json=ada), 422)


def test_profile_draws_against_the_reference(client):
    body = {"exemplars": ["I came; I saw; I went. " * 12], "top": 5}
    traits = client.post("/profile", json=body).json()
    (trait,) = [trait for trait in traits if trait["factor"] == "semicolons"]
    assert len(traits) == 5
    assert trait["percentile"] > 95
    assert trait["quantiles"] == sorted(trait["quantiles"])


def test_a_followed_judgement(client):
    body = BODY | {"candidates": ["One.", "a\u2028b\u0085c é"], "stream": True}
    text = client.post("/judge", json=body).text
    assert text.isascii()  # some readers end a line at U+2028, too
    events = events_of(text)
    texts = {0: "", 1: ""}
    for name, data in events[:-1]:
        assert name == "reasoning"
        texts[data["candidates"][0]] += data["text"]
    name, last = events[-1]
    assert name == "judgement"
    assert last == client.post("/judge", json=body | {"stream": False}).json()
    assert [texts[0], texts[1]] == last["reasoning"]
    boom = BODY | {"stream": True, "candidates": ["boom"]}
    (name, data) = events_of(client.post("/judge", json=boom).text)[-1]
    assert (name, data["error"]["status"]) == ("error", 500)
    assert "RuntimeError" in data["error"]["message"]
    assert "false" in refused(client.post("/rank", json=BODY | {"stream": True}), 422)


def test_of_a_pair_the_reasoning_comes_whole():
    write = server.judge_writer()
    assert write({(0, 1): ("A is terse.\nB is not.", False)}, None) == ""
    reasoning = "A is terse. A is dry.\nB is not. B is dry."
    ((_, piece),) = events_of(write({(0, 1): (reasoning, True)}, None))
    assert piece == {"candidates": [0, 1], "text": reasoning, "ended": True}


def test_what_may_go_is_held_back():
    for text in ("Terse. </th", "Terse.\n\n<", "Terse.\ufffd"):
        assert settled(text) == "Terse."
    assert (settled("Terse. x"), settled(" </")) == ("Terse. x", "")


@pytest.mark.parametrize(
    ("raw", "status", "word"),
    [
        (b"{", 400, "JSON"),
        (b"[]", 422, "list"),
        (b'{"a": "\xff"}', 400, "body"),
        (b"[" * 8000, 400, "body"),
        (b'{"candidates": [1], "exemplars": ["b"]}', 422, "candidates[0]"),
        (b'{"candidates": [], "exemplars": ["b"]}', 422, "1 to 26"),
        (b'{"candidates": ["a"]}', 422, "writer"),
        (b'{"candidates": ["a"], "exemplars": ["b"], "candidate": 1}', 422, "candidate: "),
        (b'{"candidates": ["\\ud800"], "exemplars": ["b"]}', 422, "candidates[0]"),
        (b'{"candidates": ["a"], "exemplars": ["\\u0000"]}', 422, "zero byte"),
        (b'{"candidates": ["a"], "exemplars": ["b"], "temperature": NaN}', 422, "temperature"),
        (b'{"candidates": ["a"], "exemplars": ["b"], "mode": "pairwise"}', 422, "2 to 26"),
        (b'{"candidates": ["a"], "exemplars": ["b"], "seed": 18446744073709551616}', 422, "seed"),
        (b'{"candidates": ["a"], "writer": "../etc"}', 422, "writer"),
        (b'{"candidates": ["a"], "writer": "nobody"}', 404, "nobody"),
        (b'{"candidates": ["too long"], "exemplars": ["b"]}', 422, "fits"),
        (b'{"candidates": ["boom"], "exemplars": ["b"]}', 500, "RuntimeError"),
        (b'{"candidates": ["' + b"a" * 9000 + b'"], "exemplars": ["b"]}', 413, "8192 bytes"),
    ],
    ids=range(18),
)
def test_bad_requests_get_one_clear_line(raw: bytes, status: int, word: str, client):
    headers = {"content-type": "application/json"}
    assert word in refused(client.post("/judge", content=raw, headers=headers), status)
    assert client.post("/judge", json=BODY).status_code == 200


def test_the_work_of_a_judgement_is_bounded(client):
    many = {"exemplars": ["So."], "candidates": [*map(str, range(26))]}
    more = many | {"samples": 16, "think_tokens": 1024, "free": True}
    assert "26 prompts x 16 samples" in refused(client.post("/judge", json=more), 422)
    pairs = many | {"mode": "pairwise", "samples": 2, "free": True}
    assert "208 prompts x 2 samples" in refused(client.post("/judge", json=pairs), 422)
    assert client.post("/judge", json=more | {"free": False}).status_code == 200


def test_only_json_is_read(client):
    """A page of another origin can send text/plain without asking, and nothing else."""
    for kind in ("text/plain", "application/x-www-form-urlencoded"):
        for path in ("/judge", "/get_reward"):
            headers = {"content-type": kind}
            refused(client.post(path, content=json.dumps(BODY), headers=headers), 422)


def test_unknown_paths_and_methods(client):
    for answer in (client.get("/nothing"), client.post("/judge/", json=BODY)):
        refused(answer, 404)
    refused(client.get("/judge"), 405)
    answer = client.post("/writers/ada", json={})
    refused(answer, 405)
    assert answer.headers["allow"] in ("PUT", "GET", "DELETE")
    text = client.get("/metrics").text
    assert 'path="other",status="404"' in text
    assert "/nothing" not in text


def test_no_room_gets_503_and_retry_after(client, judge):
    judge.gate.clear()
    with ThreadPoolExecutor(6) as threads:
        asked = [threads.submit(client.post, "/judge", json=BODY) for _ in range(6)]
        until(lambda: sum(call.done() for call in asked) == 3)  # 1 is judged, 2 wait
        early = [call.result() for call in asked if call.done()]
        judge.gate.set()
    assert sorted(call.result().status_code for call in asked) == [200] * 3 + [503] * 3
    for answer in early:
        assert "2 requests are waiting" in refused(answer, 503)
        assert int(answer.headers["retry-after"]) >= 1


def test_too_late_gets_504_and_what_had_not_begun_is_dropped(judge):
    with client_of(judge, Limits(seconds=0.2)) as client:
        judge.gate.clear()
        assert "0.2 s" in refused(client.post("/judge", json=BODY), 504)  # was being judged
        waiting = BODY | {"candidates": ["Dropped."]}
        assert "0.2 s" in refused(client.post("/judge", json=waiting), 504)
        events = events_of(client.post("/judge", json=waiting | {"stream": True}).text)
        assert events[-1][1]["error"]["status"] == 504
        judge.gate.set()
        assert client.post("/judge", json=BODY).status_code == 200
    assert all("Dropped." not in candidates for _, candidates in judge.calls)


def test_metrics_count_what_was_done(client):
    client.post("/judge", json=BODY)
    client.post("/judge", json={})
    client.post("/judge", json=BODY | {"stream": True})
    text = client.get("/metrics").text
    for line in (
        'nanopersrm_requests_total{path="/judge",status="200"} 2.0',
        'nanopersrm_requests_total{path="/judge",status="422"} 1.0',
        'nanopersrm_judgements_total{verdict="best"} 2.0',
        "nanopersrm_tokens_total 40.0",
        "nanopersrm_waiting 0.0",
    ):
        assert line in text


def test_the_token(judge):
    with client_of(judge, token=TOKEN) as client:
        for path in ("/", "/health", "/docs", "/openapi.json"):
            assert client.get(path).status_code == 200
        basic = base64.b64encode(f"any:{TOKEN}".encode()).decode()
        for right in (f"bearer {TOKEN}", f"Basic {basic}"):
            headers = {"authorization": right}
            assert client.post("/judge", json=BODY, headers=headers).status_code == 200
        for wrong in ("", "Bearer", "Bearer x", f"Basic {TOKEN}", f"Basic {basic}x", TOKEN):
            headers = {"authorization": wrong} if wrong else {}
            for method, path in (("POST", "/judge"), ("GET", "/writers"), ("GET", "/metrics")):
                response = client.request(method, path, headers=headers)
                assert "token" in refused(response, 401)
                assert response.headers["www-authenticate"] == "Bearer"


def test_a_foreign_host_is_sent_away(client):
    for host in ("evil.example", "evil.example:8000", "127.0.0.1.evil.example", "", "localhost@x"):
        assert "this machine" in refused(client.get("/writers", headers={"host": host}), 403)
    for host in ("localhost", "LocalHost:9", "127.0.0.2:80", "[::1]:8000"):
        assert client.get("/writers", headers={"host": host}).status_code == 200


def test_every_reply_is_guarded(client):
    for path in ("/", "/health", "/nothing", "/docs"):
        headers = client.get(path).headers
        assert headers["x-content-type-options"] == "nosniff"
        assert "default-src 'none'" in headers["content-security-policy"]
        assert "frame-ancestors 'none'" in headers["content-security-policy"]
    page = client.get("/")
    policy = page.headers["content-security-policy"]
    assert "unsafe" not in policy
    assert policy == server.page_policy(page.text)


def test_a_body_that_does_not_come_is_not_waited_for(judge, monkeypatch):
    monkeypatch.setattr(server, "BODY_SECONDS", 0.05)
    app, _ = build_app(judge, limits=SMALL)
    sent: list[Any] = []

    async def never() -> Any:
        await asyncio.sleep(60)

    async def send(message: Any) -> None:
        sent.append(message)

    scope: Any = {"type": "http", "method": "POST", "path": "/judge", "query_string": b""}
    scope["headers"] = [(b"host", b"localhost"), (b"content-type", b"application/json")]
    asyncio.run(asyncio.wait_for(app(scope, never, send), 10))
    assert sent[0]["status"] == 408


def test_a_client_that_leaves_is_not_judged(running):
    running.judge.gate.clear()
    sockets = []
    for text in ("First.", "Gone."):
        body = json.dumps({"exemplars": [text], "candidates": [text]}).encode()
        client = socket.create_connection(("127.0.0.1", running.port))
        head = f"POST /judge HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer {TOKEN}\r\n"
        head += f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
        client.sendall(head.encode() + body)
        sockets.append(client)
        until(running.judge.begun.is_set)
    until(lambda: running.queue.waiting == 1)
    sockets[1].close()
    until(lambda: running.queue.waiting == 0)
    running.judge.gate.set()
    assert sockets[0].recv(15) == b"HTTP/1.1 200 OK"
    sockets[0].close()
    assert [candidates for _, candidates in running.judge.calls] == [("First.",)]


@pytest.mark.parametrize(
    ("host", "port", "token", "word"),
    [
        ("0.0.0.0", 0, None, "NANOPERSRM_TOKEN"),
        ("no such host", 0, None, "--host"),
        ("127.0.0.1", 70000, None, "--port"),
        ("127.0.0.1", 0, "short", "at least 16"),
        ("127.0.0.1", 0, "ÄÖÜäöüßÄÖÜäöüßÄÖÜ", "ASCII"),
    ],
)
def test_errors_of_use_end_with_2(host, port, token, word, monkeypatch, capsys):
    monkeypatch.delenv("NANOPERSRM_TOKEN", raising=False)
    if token is not None:
        monkeypatch.setenv("NANOPERSRM_TOKEN", token)
    assert exit_code("x", lambda: server.main(server.Config(host=host, port=port))) == 2
    error = capsys.readouterr().err
    assert word in error
    assert error.count("\n") == 1


def test_where_it_can_be_reached():
    bind("0.0.0.0", 0, TOKEN).close()
    taken = socket.create_server(("127.0.0.1", 0))
    with taken, pytest.raises(InputError, match="in use"):
        bind("127.0.0.1", taken.getsockname()[1], None)


def test_the_openai_client(running):
    client = openai.OpenAI(base_url=f"{running.url}/v1", api_key=TOKEN, max_retries=0, timeout=20)
    body: Any = {"nanopersrm": BODY}
    turn: Any = [{"role": "user", "content": "judge"}]
    ask: Any = {"model": "nanopersrm", "messages": turn, "extra_body": body}
    done = client.chat.completions.create(**ask)
    text = done.choices[0].message.content
    thoughts = 'A: It says "One." and no more.\n\nB: It says "Two." and no more.'
    digits = f"A={round(SCORES[0])} B={round(SCORES[1])}"
    assert text == f"<think>\n{thoughts}\n</think>\n<scores>{digits}</scores>"
    assert done.choices[0].finish_reason == "stop"
    assert (done.usage.prompt_tokens, done.usage.completion_tokens) == (100, 20)
    assert done.model_extra["nanopersrm"]["scores"] == pytest.approx(SCORES)
    chunks = list(client.chat.completions.create(**ask, stream=True))
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == text
    assert chunks[-1].choices[0].finish_reason == "stop"
    assert len({chunk.id for chunk in chunks}) == 1

    ada = {"exemplars": BODY["exemplars"]}
    assert send(f"{running.url}/writers/ada", ada, "PUT") == (204, "")
    assert [model.id for model in client.models.list()] == ["nanopersrm", "nanopersrm:ada"]
    tagged: Any = [
        {"role": "system", "content": "You are a judge. <candidate A>not read</candidate A>"},
        {"role": "user", "content": "<candidate A>\nOne.\n</candidate A>\n<candidate B>Two."},
        {"role": "user", "content": [{"type": "text", "text": "</candidate B>"}]},
    ]
    named = client.chat.completions.create(model="nanopersrm:ada", messages=tagged)
    assert named.choices[0].message.content == text

    with pytest.raises(openai.NotFoundError, match="expected nanopersrm"):
        client.chat.completions.create(model="gpt", messages=turn)
    invalid: Any = {"nanopersrm": BODY | {"candidates": ["invalid"]}}
    with pytest.raises(openai.InternalServerError, match="no valid score"):
        client.chat.completions.create(model="nanopersrm", messages=turn, extra_body=invalid)
    with pytest.raises(openai.AuthenticationError, match="token"):
        client.with_options(api_key="wrong").models.list()


def test_settings_of_a_chat_are_heard_where_the_object_says_nothing(judge):
    with client_of(judge) as client:
        for chat, more, expected in (
            ({"temperature": 0.5, "seed": 3, "max_tokens": 40}, {}, (0.5, 3, 40)),
            ({"max_tokens": 40, "max_completion_tokens": 50}, {}, (None, 4, 50)),
            ({"max_tokens": 9999}, {}, (None, 4, 1024)),
            ({"temperature": 1, "max_tokens": 40}, {"temperature": 0.0}, (0.0, 4, 40)),
        ):
            body: Any = {"messages": [], "nanopersrm": BODY | more} | chat
            assert client.post("/v1/chat/completions", json=body).status_code == 200
            config = judge.configs[-1]
            assert (config.temperature, config.seed, config.think_tokens) == expected
        for bad, word in (
            ({"n": 2}, "n:"),
            ({"max_tokens": 0}, "think_tokens"),
            ({"model": "nanopersrm:ada"}, "writer"),
            ({"messages": [{"role": "user", "content": [{}]}], "nanopersrm": None}, "object"),
        ):
            body = {"messages": [], "nanopersrm": BODY} | bad
            assert word in refused(client.post("/v1/chat/completions", json=body), 422)


def test_texts_in_tags():
    text = "<exemplar>b<question>c</exemplar><candidate A>d</candidate A></question>"
    assert from_tags(text) == {"exemplars": ["b<question>c"], "candidates": ["d"]}
    for bad in (
        "Which is better?",
        "<candidate A>One.",
        "<candidate B>One.</candidate B>",
        "<candidate A>One.</candidate A><candidate A>Two.</candidate A>",
        "<candidate A>a</candidate A><question>a</question><question>b</question>",
    ):
        with pytest.raises(InputError):
            from_tags(bad)


# OpenRLHF

PROMPT = "<|im_start|>user\nWrite to me.<|im_end|>\n<|im_start|>assistant\n"


def reward_body(*replies: str, labels: Any = None) -> dict[str, Any]:
    queries = [f"{PROMPT}{reply}<|im_end|>\n" for reply in replies]
    return {"query": queries, "prompts": [PROMPT] * len(queries), "labels": labels}


def test_rewards_stand_in_the_order_of_the_queries(client, judge):
    client.put("/writers/ada", json={"exemplars": ["I came; I saw."]})
    ada = {"writer": "ada", "exemplars": None}
    labels = [ada, ["So."], '{"writer": "ada"}', ada]
    body = reward_body("One.", "Two.", "", "Three.", labels=labels)
    reply = client.post("/get_reward", json=body).json()
    units = [(soft_score(digits_of(text)) - 1) / 8 for text in ("One.", "Two.", "Three.")]
    assert reply["rewards"] == pytest.approx([units[0], units[1], 0, units[2]])
    assert not judge.configs[-1].topics
    assert reply["scores"] == reply["rewards"]
    assert reply["extra_logs"] == {"fits_writer": reply["rewards"]}
    assert [candidates for _, candidates in judge.calls] == [("One.", "Three."), ("Two.",)]
    labels = [{"question": f"Question {i}?", "answer": 4} for i in range(7)]
    body = reward_body(*map(str, range(7)), labels=labels)  # more groups than the line has room
    rewards = client.post("/get_reward?writer=ada", json=body).json()["rewards"]
    assert rewards == pytest.approx([(soft_score(digits_of(str(i))) - 1) / 8 for i in range(7)])


@pytest.mark.parametrize(
    ("changed", "status", "word"),
    [
        ({"query": [], "prompts": []}, 422, "query"),
        ({"prompts": ["a", "b"]}, 422, "as many"),
        ({"labels": None}, 422, "labels[0]"),
        ({"labels": [{"writer": ["ada"]}]}, 422, "labels[0]"),
        ({"query": [f"{PROMPT}A."], "labels": [{"writer": "bea"}]}, 404, "'bea'"),
        ({"query": ["a"] * 129, "prompts": [""] * 129}, 422, "128"),
    ],
)
def test_rewards_that_cannot_be_given(changed, status, word, client):
    body = reward_body("", labels=["So."]) | changed
    assert word in refused(client.post("/get_reward", json=body), status)


@pytest.mark.slow
def test_nothing_is_lost_under_load():
    """200 requests of all kinds, eight at once: each has its own score or error, none is lost."""

    def sent(k: int) -> tuple[str, Any, int, str]:
        """Request k: path and body; the status and the word that are expected."""
        text, writer = f"Text {k}.", {"exemplars": ["I came; I saw."]}
        body = writer | {"candidates": [text]}
        kinds: list[tuple[str, Any, int, str]] = [
            ("/judge", body, 200, text),
            ("/rank", body, 200, text),
            ("/v1/chat/completions", {"messages": [], "nanopersrm": body}, 200, text),
            ("/get_reward", {"query": [text], "prompts": [""], "labels": [["So."]]}, 200, text),
            ("/judge", b"{", 400, "JSON"),
            ("/judge", {"writer": f"w{k}", "candidates": [text]}, 404, f"'w{k}'"),
            ("/judge", writer | {"candidates": ["a" * 9000]}, 413, "8192 bytes"),
        ]
        return kinds[k % len(kinds)]

    def score_in(path: str, reply: Any) -> float:
        if path == "/get_reward":
            return 1 + 8 * reply["rewards"][0]
        place = reply["ranking"][0] if path == "/rank" else None
        return place["score"] if place else reply.get("nanopersrm", reply)["scores"][0]

    for here in live(Limits(waiting=8, seconds=20, body_kb=8)):

        def ask(k: int, url: str = here.url) -> None:
            path, body, status, word = sent(k)
            got, raw = send(url + path, body)
            assert got == status, raw
            reply = json.loads(raw)
            if status == 200:
                assert score_in(path, reply) == pytest.approx(soft_score(digits_of(word)))
            else:
                assert word in reply["error"]["message"]

        with ThreadPoolExecutor(8) as clients:
            assert len(list(clients.map(ask, range(200)))) == 200
        judged = [tuple(texts) for _, texts in here.judge.calls]
        assert sorted(judged) == sorted((f"Text {k}.",) for k in range(200) if k % 7 < 4)


@pytest.mark.slow
def test_a_real_server_judges_and_ends_in_good_order(base):
    """A tiny random model, a process of its own, SIGTERM while it judges."""
    env = os.environ | {"NANOPERSRM_TOKEN": TOKEN, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "nanopersrm.serve", "--base", str(base.path)]
    command += ["--port", "0", "--device", "cpu", "--dtype", "fp32"]
    process = subprocess.Popen(command, cwd=ROOT, env=env, stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    try:
        line = process.stderr.readline()
        url = re.fullmatch(r"serving on (http://127\.0\.0\.1:\d+) \(with a token\)\n", line)
        assert url, line
        answers: list[Any] = []

        def post(**more: Any) -> str:
            return send(f"{url[1]}/judge", BODY | more)[1]

        def judge(**more: Any) -> None:
            answers.append(json.loads(post(samples=2, temperature=1.0, **more)))

        judge(think_lines=2)
        assert all(1 <= score <= 9 for score in answers[0]["scores"])
        assert all(len(known["ledger"]) <= 3 for known in answers[0]["candidates"])
        prose = {"free": True, "think_tokens": 80, "temperature": 1.5, "seed": 5}
        *pieces, (name, last) = events_of(post(stream=True, **prose))
        texts = ["", ""]
        for _, piece in pieces:
            texts[piece["candidates"][0]] += piece["text"]
        assert name == "judgement"
        assert len(pieces) > 4
        assert [text.strip() for text in texts] == last["reasoning"]  # odd bytes and all
        slow = threading.Thread(target=judge, kwargs={"free": True, "think_tokens": 200})
        slow.start()
        time.sleep(0.3)
        process.send_signal(signal.SIGTERM)
        slow.join(60)
        assert len(answers) == 2  # what was being judged was finished
        assert answers[1]["tokens"] > answers[0]["tokens"]
        assert process.wait(30) in (0, -signal.SIGTERM)
        rest = process.stderr.read()
        assert "Traceback" not in rest, rest
    finally:
        process.kill()
        process.wait()
        process.stderr.close()
