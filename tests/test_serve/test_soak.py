"""Soak: under many clients, good and bad, nothing is lost, nothing is answered twice, and memory
stays. The long one is marked slow; with a model, `python -m nanopersrm.serve.soak` does the same.
"""

import os
import subprocess
import sys
import threading
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from test_serve import Live, live

from nanopersrm.serve import soak
from nanopersrm.serve.soak import (
    BAD,
    GOOD,
    Config,
    Found,
    client_of,
    lines_of,
    memory_lines,
    questions,
    take,
)
from nanopersrm.serve.wire import Limits

LIMITS = Limits(waiting=6, seconds=20)


@pytest.fixture
def server() -> Any:
    yield from live(LIMITS)


def run(server: Live, requests: int, clients: int, seed: int = 0) -> Found:
    config = Config(server.port, requests, clients, seed=seed, timeout=30)
    return soak.soak(config, *client_of(config))


def sound(found: Found, requests: int) -> None:
    assert found.lost == []
    assert found.wrong == []
    assert sum(found.by_kind.values()) == requests
    assert found.judged > requests / 4
    assert {kind for kind, _ in found.by_kind} == {*GOOD, *BAD}


def test_nothing_is_lost_and_nothing_answered_twice(server):
    found = run(server, 500, 16)
    sound(found, 500)
    judged = sum(len(candidates) for _, candidates in server.judge.calls)
    assert 1 <= judged <= found.texts  # nobody was judged twice
    assert len(server.judge.threads) == 1
    text = "\n".join(lines_of(found, Config(), 1.0))
    assert "lost 0, wrong 0" in text
    assert "p99" in text
    assert [*found.memory] == [50 * tenth for tenth in range(11)]
    assert min(found.memory.values()) > 10


@pytest.mark.slow
def test_memory_stays():
    """A process of its own with a judge that remembers nothing; MB after each 2500 requests."""
    program = (
        "import asyncio, sys\n"
        "from fake_judge import FakeJudge\n"
        "from nanopersrm import serve\n"
        "from nanopersrm.serve.routes import app_of\n"
        "from nanopersrm.serve.wire import Limits\n"
        "judge = FakeJudge()\n"
        "judge.remember = lambda *call: None\n"
        "app, desk = app_of(judge, limits=Limits(waiting=6))\n"
        "place, _ = serve.bound('127.0.0.1', 0, None)\n"
        "ready = lambda: print(place.getsockname()[1], flush=True)\n"
        "asyncio.run(serve.serving(app, desk, place, 20.0, ready))\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", program],
        cwd=Path(__file__).parent,
        env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])},
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    try:
        port = int(process.stdout.readline())
        sizes = []
        for seed in range(4):
            config = Config(port, 2500, 16, seed=seed, timeout=30)
            found = soak.soak(config, *client_of(config))
            sound(found, 2500)
            sizes.append(found.memory[2500])
        assert sizes[-1] - sizes[0] < 4, sizes
    finally:
        process.terminate()
        process.wait(20)
        process.stdout.close()


def test_a_leak_and_a_warm_up_look_different():
    tenths = range(100, 1001, 100)
    warm = {0: 900.0} | dict.fromkeys(tenths, 1200.0)
    assert memory_lines(warm) == [
        "memory of the server: 900 MB, by tenths " + " ".join(["1200"] * 10),
        "growth: 0 MB since the first tenth, 0 MB since half",
    ]
    leak = {n: 900.0 + n for n in (0, *tenths)}
    assert memory_lines(leak)[1] == "growth: 900 MB since the first tenth, 500 MB since half"
    assert memory_lines({0: 900.0, 1: 950.0})[1] == (
        "growth: 0 MB since the first tenth, 0 MB since half"
    )


def test_what_is_wrong_is_seen():
    body = b'{"scores": [5.0, 4.0]}'
    found = Found()
    take(found, "judge", 0, 2, 200, body, 0.1)
    assert found.wrong == []
    take(found, "judge", 0, 2, 200, b'{"scores": [5.1, 4.0]}', 0.1)  # rounding
    assert found.wrong == []
    for status, answer in ((200, b'{"scores": [7.0, 4.0]}'), (200, b'{"scores": [5.0]}')):
        take(found, "judge", 0, 2, status, answer, 0.1)
    take(found, "judge", 0, 2, 500, b"", 0.1)
    take(found, "no JSON", 0, 2, 200, body, 0.1)
    assert len(found.wrong) == 4
    take(found, "judge", 0, 2, 503, b"", 0.1)  # fair under load
    assert len(found.wrong) == 4
    assert found.judged == 3  # a wrong one has arrived too


@pytest.mark.parametrize("kind", GOOD)
@pytest.mark.parametrize(
    "body",
    [
        *(b"{}", b"[]", b"null", b"7", b"", b"<p>", b"\xff"),
        b'{"scores": [null, 5.0], "rewards": [null, 0.5], "ranking": [1, 2]}',
        b'{"scores": [NaN, 5.0], "rewards": [NaN, 0.5], "ranking": [null]}',
        b'{"scores": [50.0, 5.0], "rewards": ["x", 0.5], "ranking": {"a": 1}}',
        b'event: judgement\ndata: {"scores": [null, 5.0]}',
        b"event: judgement\ndata: {",
    ],
)
def test_an_answer_of_another_form_is_wrong(kind: str, body: bytes):
    found = Found()
    take(found, kind, 0, 2, 200, body, 0.1)
    assert len(found.wrong) == 1
    assert (found.judged, found.scores) == (0, {})


@pytest.mark.parametrize("answer", [b"{}", None])
def test_a_server_that_answers_nonsense_ends_with_1(answer: bytes | None, monkeypatch, capsys):
    """None: the client itself breaks, and its requests are missed."""

    def send(method: str, path: str, body: bytes) -> tuple[int, bytes]:
        if method != "POST":
            return (204, b"") if method == "PUT" else (200, b"")
        if answer is None:
            raise threading.BrokenBarrierError
        return 200, answer

    monkeypatch.setattr(soak, "client_of", lambda config: (send, lambda path, body: None))
    monkeypatch.setattr(threading, "excepthook", lambda _: None)
    assert soak.run(Config(requests=30, clients=3, bad=0.0)) == 1
    out = capsys.readouterr().out
    assert "lost 0, wrong 0" not in out
    wrong = "wrong 1\n  30 requests, 0 answered, 0 lost" if answer is None else "wrong 30"
    assert wrong in out


def test_the_questions_tell_answers_apart():
    asked = questions(0)
    assert len({text for one in asked for text in one["candidates"]}) == 100
    assert len({tuple(one["exemplars"]) for one in asked}) == 5
    assert Counter(len(one["candidates"]) for one in asked) == {1: 10, 2: 10, 3: 10, 4: 10}


def test_no_server_is_one_line(capsys):
    assert soak.run(Config(port=1, requests=1)) == 2
    assert "--port 1: expected a server there" in capsys.readouterr().err
