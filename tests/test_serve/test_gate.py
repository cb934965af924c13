"""The gate: tokens, hosts, bodies that are too long or never come, and what every reply carries."""

import asyncio
import base64
from collections.abc import Iterator
from typing import Any

import pytest
from fake_judge import FakeJudge
from starlette.testclient import TestClient
from test_routes import BODY, SMALL, client_of, refused

from nanopersrm.serve import gate
from nanopersrm.serve.routes import app_of

TOKEN = "a-secret-of-the-tests"


@pytest.fixture
def client() -> Iterator[TestClient]:
    with client_of(FakeJudge()) as client:
        yield client


def test_a_body_without_length_is_counted_as_it_comes(client):
    pieces = (b"x" * 1000 for _ in range(100))
    kind = {"content-type": "application/json"}
    assert "8192" in refused(client.post("/judge", content=pieces, headers=kind), 413)


def test_the_token():
    with client_of(FakeJudge(), token=TOKEN, own_only=False) as client:
        for path in ("/", "/health", "/docs", "/openapi.json"):
            assert client.get(path).status_code == 200
        basic = base64.b64encode(f"any:{TOKEN}".encode()).decode()
        for right in (f"bearer {TOKEN}", f"Basic {basic}"):
            told = client.post("/judge", json=BODY, headers={"authorization": right})
            assert told.status_code == 200
        for wrong in (
            None,
            "Bearer",
            "Bearer x",
            f"Basic {TOKEN}",
            f"Basic {basic}x",
            "Basic =",
            TOKEN,
        ):
            headers = {} if wrong is None else {"authorization": wrong}
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
    assert policy == gate.policy_of(page.text)


def test_a_body_that_does_not_come_is_not_waited_for(monkeypatch):
    monkeypatch.setattr(gate, "BODY_SECONDS", 0.05)
    app, _ = app_of(FakeJudge(), limits=SMALL)
    sent: list[Any] = []

    async def never() -> Any:
        await asyncio.sleep(60)

    async def send(message: Any) -> None:
        sent.append(message)

    scope = {
        "type": "http",
        "method": "POST",
        "path": "/judge",
        "raw_path": b"/judge",
        "query_string": b"",
        "headers": [(b"host", b"localhost"), (b"content-type", b"application/json")],
        "http_version": "1.1",
        "scheme": "http",
        "server": ("localhost", 80),
        "client": ("127.0.0.1", 5),
        "root_path": "",
    }
    asyncio.run(asyncio.wait_for(app(scope, never, send), 10))  # type: ignore[arg-type]
    assert sent[0]["status"] == 408
