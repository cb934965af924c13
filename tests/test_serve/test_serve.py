"""The server as a process and a socket: who may reach it, how it ends, and real clients."""

import asyncio
import http.client
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import openai
import pytest
import uvicorn
from fake_judge import FakeJudge, digits_of
from fixtures import make_base
from test_routes import BODY, events_of

from nanopersrm import InputError
from nanopersrm.judge.verdict import parse, soft_score
from nanopersrm.serve import serve
from nanopersrm.serve.desk import Desk
from nanopersrm.serve.routes import app_of
from nanopersrm.serve.serve import bound, token_of
from nanopersrm.serve.wire import Limits

TOKEN = "a-secret-of-the-tests"
ROOT = Path(__file__).resolve().parents[2]


@dataclass
class Live:
    """A server in a thread."""

    judge: FakeJudge
    desk: Desk
    port: int

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"


def live(limits: Limits, token: str | None = None) -> Iterator[Live]:
    judge = FakeJudge()
    app, desk = app_of(judge, limits=limits, token=token)
    place, _ = bound("127.0.0.1", 0, token)
    server = uvicorn.Server(uvicorn.Config(app, log_level="warning", lifespan="on"))  # type: ignore[arg-type]
    thread = threading.Thread(target=lambda: asyncio.run(server.serve(sockets=[place])))
    thread.start()
    try:
        end = time.monotonic() + 10
        while not server.started and time.monotonic() < end:
            time.sleep(0.01)
        yield Live(judge, desk, place.getsockname()[1])
    finally:
        judge.gate.set()
        server.should_exit = True
        thread.join(10)
        place.close()
    assert not thread.is_alive()


@pytest.fixture
def server() -> Iterator[Live]:
    yield from live(Limits(seconds=20), TOKEN)


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "127.0.0.9"])
def test_this_machine_needs_no_token(host: str):
    place, own = bound(host, 0, None)
    place.close()
    assert own


def test_other_machines_need_one():
    for host in ("0.0.0.0", "::"):
        with pytest.raises(InputError, match="other machines could reach this; set NANOPERSRM_TOK"):
            bound(host, 0, None)
    place, own = bound("0.0.0.0", 0, TOKEN)
    place.close()
    assert not own


def test_what_cannot_be_bound_is_said():
    taken = socket.create_server(("127.0.0.1", 0))
    with taken, pytest.raises(InputError, match="in use"):
        bound("127.0.0.1", taken.getsockname()[1], None)
    for host in ("no such host", "a" * 300, "", "\0"):
        with pytest.raises(InputError, match="--host: expected the name of this machine"):
            bound(host, 0, None)
    with pytest.raises(InputError, match="0 to 65535, got 70000"):
        bound("127.0.0.1", 70000, None)


def test_a_token_is_long_and_plain():
    assert token_of(None) is None
    assert token_of(TOKEN) == TOKEN
    for bad in ("", "short", "sixteen chars it is", "ÄÖÜäöüßÄÖÜäöüßÄÖÜ"):
        with pytest.raises(InputError, match="at least 16 ASCII"):
            token_of(bad)


def test_errors_of_use_end_with_2(monkeypatch, capsys):
    monkeypatch.delenv("NANOPERSRM_TOKEN", raising=False)
    assert serve.run(serve.Config(host="0.0.0.0")) == 2
    assert capsys.readouterr().err.startswith("nanopersrm.serve: error: --host 0.0.0.0: other")
    monkeypatch.setenv("NANOPERSRM_TOKEN", "short")
    assert serve.run(serve.Config()) == 2


@pytest.mark.parametrize("chunked", [False, True])
def test_who_is_refused_before_the_body_was_read_hears_why(server, chunked):
    """A socket closed on bytes that nobody read would reset the connection under the reply."""
    head = (
        "POST /judge HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n"
        f"Authorization: Bearer {TOKEN}\r\nContent-Type: application/json\r\n"
    )
    piece, pieces = b"x" * 65_536, 60  # 3.9 MB, where 1 MiB is allowed
    head += "Transfer-Encoding: chunked" if chunked else f"Content-Length: {len(piece) * pieces}"
    for _ in range(5):
        with socket.create_connection(("127.0.0.1", server.port), timeout=20) as client:
            client.sendall(f"{head}\r\n\r\n".encode())
            for i in range(pieces):
                client.sendall(b"10000\r\n" + piece + b"\r\n" if chunked else piece)
                time.sleep(0.05 if i == 20 else 0)  # the server has made up its mind meanwhile
            client.sendall(b"0\r\n\r\n" if chunked else b"")
            heard = b""
            while part := client.recv(65_536):
                heard += part
        assert heard.startswith(b"HTTP/1.1 413")
        assert b"expected a body of at most" in heard


def test_the_openai_client(server):
    """The `openai` package, version 3.54."""
    client = openai.OpenAI(base_url=f"{server.url}/v1", api_key=TOKEN, max_retries=0, timeout=20)
    asked: Any = {"nanopersrm": BODY}
    turn: Any = [{"role": "user", "content": "judge"}]
    done = client.chat.completions.create(model="nanopersrm", messages=turn, extra_body=asked)
    text = done.choices[0].message.content
    assert text is not None
    said = parse(text, "AB")
    scores = [soft_score(digits_of(text)) for text in ("One.", "Two.")]
    assert said.scores == {"A": round(scores[0]), "B": round(scores[1])}
    assert said.reasoning == 'A: It says "One." and no more.\n\nB: It says "Two." and no more.'
    assert done.choices[0].finish_reason == "stop"
    assert done.usage is not None
    assert (done.usage.prompt_tokens, done.usage.completion_tokens) == (100, 20)
    assert done.model_extra is not None
    assert done.model_extra["nanopersrm"]["scores"] == pytest.approx(scores)

    chunks = list(
        client.chat.completions.create(
            model="nanopersrm", messages=turn, extra_body=asked, stream=True
        )
    )
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == text
    assert chunks[-1].choices[0].finish_reason == "stop"
    assert len({chunk.id for chunk in chunks}) == 1

    ada = urllib.request.Request(
        f"{server.url}/writers/ada",
        json.dumps({"exemplars": BODY["exemplars"]}).encode(),
        {"Authorization": f"Bearer {TOKEN}", "Content-Type": "application/json"},
        method="PUT",
    )
    assert urllib.request.urlopen(ada, timeout=10).status == 204
    assert [model.id for model in client.models.list()] == ["nanopersrm", "nanopersrm:ada"]
    tagged: Any = [
        {"role": "system", "content": "You are a judge. <candidate A>not read</candidate A>"},
        {"role": "user", "content": "<candidate A>\nOne.\n</candidate A>\n<candidate B>Two."},
        {"role": "user", "content": [{"type": "text", "text": "</candidate B>"}]},
    ]
    named = client.chat.completions.create(model="nanopersrm:ada", messages=tagged)
    assert named.choices[0].message.content == text


def test_the_openai_client_gets_errors_it_knows(server):
    client = openai.OpenAI(base_url=f"{server.url}/v1", api_key=TOKEN, max_retries=0, timeout=20)
    turn: Any = [{"role": "user", "content": "Which is better?"}]
    with pytest.raises(openai.NotFoundError, match="expected nanopersrm"):
        client.chat.completions.create(model="gpt", messages=turn)
    with pytest.raises(openai.UnprocessableEntityError, match="expected a nanopersrm object"):
        client.chat.completions.create(model="nanopersrm", messages=turn)
    bad: Any = {"nanopersrm": BODY | {"candidates": ["invalid"]}}
    with pytest.raises(openai.InternalServerError, match="no valid score"):
        client.chat.completions.create(model="nanopersrm", messages=turn, extra_body=bad)
    wrong = openai.OpenAI(base_url=f"{server.url}/v1", api_key="wrong", max_retries=0, timeout=20)
    with pytest.raises(openai.AuthenticationError, match="token"):
        wrong.models.list()


def test_what_openrlhf_sends_gets_what_it_reads(server):
    """Version 0.11.2: one query a call, over HTTP; the reply's lists are made into tensors."""
    label = json.dumps({"exemplars": ["I came; I saw."]})
    payload = {"query": ["<s>Hi?One.</s>"], "prompts": ["<s>Hi?"], "labels": [label]}
    request = urllib.request.Request(
        f"{server.url}/get_reward",
        json.dumps(payload).encode(),
        {"Authorization": f"Bearer {TOKEN}", "Content-Type": "application/json"},
    )
    found = json.load(urllib.request.urlopen(request, timeout=10))
    unit = (soft_score(digits_of("One.")) - 1) / 8
    assert found["rewards"] == found["scores"] == [pytest.approx(unit)]
    assert found["extra_logs"] == {"fits_writer": found["rewards"]}
    assert server.judge.calls == [(("I came; I saw.",), ("One.",))]


def test_a_client_that_leaves_is_not_judged(server):
    server.judge.gate.clear()
    sockets = []
    for text in ("First.", "Gone."):
        body = json.dumps({"exemplars": [text], "candidates": [text]}).encode()
        place = socket.create_connection(("127.0.0.1", server.port))
        head = f"POST /judge HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer {TOKEN}\r\n"
        head += f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
        place.sendall(head.encode() + body)
        sockets.append(place)
        end = time.monotonic() + 10
        while not server.judge.calls and time.monotonic() < end:
            time.sleep(0.01)
    while not server.desk.waiting:
        time.sleep(0.01)
    sockets[1].close()
    end = time.monotonic() + 10
    while not all(ticket.future.done() for ticket in server.desk.waiting):
        assert time.monotonic() < end
        time.sleep(0.01)
    server.judge.gate.set()
    assert sockets[0].recv(15) == b"HTTP/1.1 200 OK"
    sockets[0].close()
    assert [candidates for _, candidates in server.judge.calls] == [("First.",)]


SILENT = """
import asyncio
from fake_judge import FakeJudge
from nanopersrm.serve import serve
from nanopersrm.serve.routes import app_of
serve.HEAD_SECONDS = 1.0
app, desk = app_of(FakeJudge())
place, _ = serve.bound("127.0.0.1", 0, None)
ready = lambda: print(place.getsockname()[1], flush=True)
asyncio.run(serve.serving(app, desk, place, 5.0, ready))
"""


def test_who_says_nothing_is_hung_up_on():
    """Nor half a head, nor half a head after a whole request; who asks now and then stays."""
    command = [sys.executable, "-c", SILENT]
    env = os.environ | {"PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"}
    process = subprocess.Popen(command, env=env, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    try:
        port = int(process.stdout.readline())
        whole = b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n"
        places = []
        for said in (b"", b"GET / HT", whole + b"GET / HT"):
            places.append(socket.create_connection(("127.0.0.1", port), timeout=10))
            places[-1].sendall(said)
        busy = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
        busy.connect()
        busy.auto_open = 0  # no second connection
        for _ in range(6):
            busy.request("GET", "/health")
            assert json.load(busy.getresponse())["status"] == "ok"
            time.sleep(0.25)
        busy.close()
        for place, begin in zip(places, (b"", b"", b"HTTP/1.1 200"), strict=True):
            with place:
                heard = b"".join(iter(partial(place.recv, 4096), b""))  # until it is closed
            assert heard.startswith(begin)
            assert bool(heard) == bool(begin)
    finally:
        process.terminate()
        process.wait(20)
        process.stdout.close()


def test_a_real_server_judges_and_ends_in_good_order(tmp_path):
    """A tiny random model, a process of its own, SIGTERM while it judges."""
    make_base(tmp_path / "base", "smollm")
    env = os.environ | {"NANOPERSRM_TOKEN": TOKEN, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "nanopersrm.serve.serve", "--base", str(tmp_path / "base")]
    command += ["--port", "0", "--device", "cpu", "--dtype", "fp32"]
    process = subprocess.Popen(command, cwd=ROOT, env=env, stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    try:
        line = process.stderr.readline()
        found = re.fullmatch(r"serving on (http://127\.0\.0\.1:\d+) \(with a token\)\n", line)
        assert found, line
        answers: list[Any] = []

        def judge(tokens: int, samples: int) -> None:
            body = BODY | {"think_tokens": tokens, "samples": samples, "temperature": 1.0}
            request = urllib.request.Request(
                f"{found[1]}/judge",
                json.dumps(body).encode(),
                {"Authorization": f"Bearer {TOKEN}", "Content-Type": "application/json"},
            )
            answers.append(json.load(urllib.request.urlopen(request, timeout=60)))

        judge(4, 1)
        assert all(1 <= score <= 9 for score in answers[0]["scores"])
        assert answers[0]["verdict"] in (0, 1)
        streamed = BODY | {"stream": True, "think_tokens": 80, "temperature": 1.5, "seed": 5}
        request = urllib.request.Request(
            f"{found[1]}/judge",
            json.dumps(streamed).encode(),
            {"Authorization": f"Bearer {TOKEN}", "Content-Type": "application/json"},
        )
        said = ["", ""]
        *pieces, (name, last) = events_of(
            urllib.request.urlopen(request, timeout=60).read().decode()
        )
        for _, piece in pieces:
            said[piece["candidates"][0]] += piece["text"]
        assert name == "judgement"
        assert len(pieces) > 4
        assert [text.strip() for text in said] == last["reasoning"]  # odd bytes and all
        slow = threading.Thread(target=judge, args=(600, 2))
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
