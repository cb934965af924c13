"""The server as a client sees it, with a judge whose scores are known: answers, errors, limits."""

import json
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest
from fake_judge import FakeJudge, digits_of
from starlette.testclient import TestClient

from nanopersrm.judge.judgement import JudgeConfig
from nanopersrm.judge.verdict import beats, soft_score
from nanopersrm.serve.routes import app_of
from nanopersrm.serve.wire import Limits

BODY = {"exemplars": ["I came; I saw."], "candidates": ["One.", "Two."]}
SMALL = Limits(waiting=2, seconds=5, body_kb=8, text_chars=500, writers=2, queries=30)


def client_of(judge: FakeJudge, limits: Limits = SMALL, **more: Any) -> TestClient:
    app, _ = app_of(judge, JudgeConfig(seed=4), limits, **more)
    return TestClient(app, base_url="http://127.0.0.1:8000")  # type: ignore[arg-type]


@pytest.fixture
def judge() -> FakeJudge:
    return FakeJudge()


@pytest.fixture
def client(judge) -> Iterator[TestClient]:
    with client_of(judge) as client:
        yield client


def refused(response: Any, status: int) -> str:
    """The one line of an error that has the one form."""
    assert response.status_code == status, response.text
    (error,) = response.json().values()
    assert set(error) == {"message", "type", "param", "code"}
    assert "\n" not in error["message"]
    return error["message"]


def events_of(text: str) -> list[tuple[str, Any]]:
    """Server-sent events, without comments."""
    found = []
    for block in text.split("\n\n"):
        lines = dict(line.split(": ", 1) for line in block.splitlines() if line[:1] not in ":")
        if lines:
            data = lines["data"]
            name = lines.get("event", "")
            found.append((name, data if data == "[DONE]" else json.loads(data)))
    return found


def test_judge_and_rank(client):
    one, two = digits_of("One."), digits_of("Two.")
    scores = [soft_score(one), soft_score(two)]
    best = int(scores[1] > scores[0])
    judged = client.post("/judge", json=BODY).json()
    assert judged["scores"] == pytest.approx(scores)
    assert judged["preference"][0][1] == pytest.approx(beats(one, two))
    assert (judged["verdict"], judged["ranking"]) == (best, [best, 1 - best])
    assert judged["notes"] == ["not trained"]
    assert judged["together"] == 1
    ranked = client.post("/rank", json=BODY).json()
    assert ranked["verdict"] == best
    assert [place["candidate"] for place in ranked["ranking"]] == [best, 1 - best]
    assert ranked["ranking"][0]["beats_next"] == pytest.approx(
        max(beats(one, two), beats(two, one))
    )
    assert ranked["ranking"][1]["beats_next"] is None


def test_an_invalid_verdict_is_said_as_such(client):
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
    judged = client.post("/judge", json={"writer": "ada", "candidates": ["One."]})
    assert judged.json()["verdict"] == 0
    assert judge.calls[-1][0] == tuple(ada["exemplars"])
    both = BODY | {"writer": "ada"}
    assert "either exemplars or a writer, got both" in refused(
        client.post("/judge", json=both), 422
    )
    own = {"writer": "ada", "candidates": ["One."], "principles": ["Be long."]}
    assert "principles" in refused(client.post("/judge", json=own), 422)
    assert client.put("/writers/bea", json=ada).status_code == 204
    assert "at most 2 writers" in refused(client.put("/writers/cleo", json=ada), 409)
    assert client.put("/writers/ada", json=ada).status_code == 204  # in its own place
    assert client.delete("/writers/ada").status_code == 204
    for gone in (client.delete("/writers/ada"), client.get("/writers/ada")):
        assert "'ada'" in refused(gone, 404)
    gone = client.post("/judge", json={"writer": "ada", "candidates": ["One."]})
    assert "'ada'" in refused(gone, 404)
    assert "name of letters" in refused(client.put("/writers/a%20b", json=ada), 422)


def test_a_followed_judgement(client):
    text = client.post("/judge", json=BODY | {"stream": True}).text
    events = events_of(text)
    said = {0: "", 1: ""}
    for name, data in events[:-1]:
        assert name == "reasoning"
        said[data["candidates"][0]] += data["text"]
    name, last = events[-1]
    assert name == "judgement"
    plain = client.post("/judge", json=BODY).json()
    assert last == plain
    assert [said[0], said[1]] == plain["reasoning"]
    failed = events_of(
        client.post("/judge", json=BODY | {"stream": True, "candidates": ["boom"]}).text
    )
    assert failed[-1][0] == "error"
    assert failed[-1][1]["error"]["status"] == 500
    assert "RuntimeError" in failed[-1][1]["error"]["message"]
    assert "false" in refused(client.post("/rank", json=BODY | {"stream": True}), 422)


def test_profile_draws_against_the_reference(client):
    text = "I came; I saw; I went. " * 12
    traits = client.post("/profile", json={"exemplars": [text], "top": 5}).json()
    assert len(traits) == 5
    (found,) = [trait for trait in traits if trait["factor"] == "semicolons"]
    assert found["label"] == "semicolons"
    assert found["percentile"] > 95
    assert found["quantiles"] == sorted(found["quantiles"])
    assert "at least one" in refused(client.post("/profile", json={"exemplars": []}), 422)


@pytest.mark.parametrize(
    ("raw", "status", "line"),
    [
        (b"{", 400, "expected JSON"),
        (b'{"a" 1}', 400, "delimiter, at character 5"),
        (b"", 422, "body: expected a JSON object, got nothing"),
        (b"[]", 422, "body: expected a JSON object, got list"),
        (b"\xff\xfe", 400, "JSON"),
        (b'{"a": "\xff"}', 400, "expected JSON in UTF-8, found another byte at 7"),
        (b"[" * 8000, 400, "expected JSON that is not nested too deeply"),
        (
            b'{"candidates": ["a"], "exemplars": ["b"], "seed": ' + b"9" * 5000 + b"}",
            400,
            "expected numbers of at most 4300 digits",
        ),
        (b'{"candidates": "a", "exemplars": ["b"]}', 422, "candidates"),
        (b'{"candidates": [1], "exemplars": ["b"]}', 422, "candidates[0]"),
        (b'{"candidates": [], "exemplars": ["b"]}', 422, "1 to 26 candidates"),
        (b'{"candidates": ["  "], "exemplars": ["b"]}', 422, "candidates[0]: expected a text"),
        (b'{"candidates": ["a"], "exemplars": []}', 422, "at least one text"),
        (b'{"candidates": ["a"]}', 422, "neither"),
        (b'{"candidates": ["a"], "exemplars": ["b"], "candidate": 1}', 422, "candidate: "),
        (b'{"candidates": ["\\ud800"], "exemplars": ["b"]}', 422, "surrogate"),
        (b'{"candidates": ["a"], "exemplars": ["\\u0000"]}', 422, "zero byte"),
        (b'{"candidates": ["a"], "exemplars": ["b"], "temperature": NaN}', 422, "temperature"),
        (b'{"candidates": ["a"], "exemplars": ["b"], "temperature": "1"}', 422, "temperature"),
        (b'{"candidates": ["a"], "exemplars": ["b"], "samples": true}', 422, "samples"),
        (b'{"candidates": ["a"], "exemplars": ["b"], "samples": 17}', 422, "at most 16"),
        (b'{"candidates": ["a"], "exemplars": ["b"], "samples": 0}', 422, "at least 1"),
        (b'{"candidates": ["a"], "exemplars": ["b"], "think_tokens": 9999}', 422, "at most 1024"),
        (b'{"candidates": ["a"], "exemplars": ["b"], "mode": "pairwise"}', 422, "2 to 26"),
        (b'{"candidates": ["a"], "exemplars": ["b"], "mode": "best"}', 422, "mode"),
        (
            b'{"candidates": ["a"], "exemplars": ["b"], "seed": 18446744073709551616}',
            422,
            "64 bits",
        ),
        (b'{"candidates": ["a"], "writer": "../etc"}', 422, "name of letters"),
        (b'{"candidates": ["a"], "writer": "x\\ny"}', 422, "name of letters"),
        (b'{"candidates": ["too long"], "exemplars": ["b"]}', 422, "a text that fits"),
        (b'{"candidates": ["boom"], "exemplars": ["b"]}', 500, "RuntimeError"),
        (b'{"candidates": ["' + b"a" * 501 + b'"], "exemplars": ["b"]}', 422, "at most 500 char"),
        (b'{"candidates": ["' + b"a" * 9000 + b'"], "exemplars": ["b"]}', 413, "8192 bytes"),
    ],
)
def test_bad_requests_get_one_clear_line(raw: bytes, status: int, line: str, client):
    kind = {"content-type": "application/json"}
    assert line in refused(client.post("/judge", content=raw, headers=kind), status)
    assert client.post("/judge", json=BODY).status_code == 200


def test_only_json_is_read(client):
    """A page of another origin can send text/plain without asking, and nothing else."""
    raw = json.dumps(BODY)
    for kind in ("text/plain", "application/x-www-form-urlencoded"):  # the second is curl's own
        for path in ("/judge", "/get_reward"):
            answer = client.post(path, content=raw, headers={"content-type": kind})
            assert refused(answer, 422) == f"Content-Type: expected application/json, got {kind}"
    answer = client.post("/judge", content=raw)
    assert refused(answer, 422) == "Content-Type: expected application/json, got none"


@pytest.mark.parametrize("name", ["a/b", "a%2Fb", "%C3%A9", ""])
def test_no_name_of_a_writer(name: str, client):
    ada = {"exemplars": ["I came; I saw."]}
    path = f"/writers/{name}"
    for answer in (client.put(path, json=ada), client.get(path), client.delete(path)):
        assert "expected a name of letters" in refused(answer, 422)


def test_unknown_paths_and_methods(client):
    for answer in (client.get("/nothing"), client.post("/judge/", json=BODY)):
        line = refused(answer, 404)
        assert line.startswith("path: expected one of /health, /metrics, /judge, ")
        assert line.endswith(f", got '{answer.request.url.path}'")
    assert refused(client.get("/judge"), 405) == "method: expected POST for '/judge', got GET"
    refused(client.options("/judge"), 405)
    answer = client.post("/writers/ada", json={})
    assert "expected DELETE, GET, PUT" in refused(answer, 405)
    assert answer.headers["allow"] == "DELETE, GET, PUT"
    text = client.get("/metrics").text
    assert 'path="other",status="404"' in text
    assert "/nothing" not in text


def test_no_room_gets_503_and_retry_after(client, judge):
    judge.gate.clear()
    answers: list[Any] = []

    def send(i: int) -> None:
        body = BODY | {"exemplars": [f"Writer {i}."]}
        answers.append(client.post("/judge", json=body))

    threads = [threading.Thread(target=send, args=(i,)) for i in range(6)]
    for thread in threads:
        thread.start()
    end = time.monotonic() + 10
    while len(answers) < 3 and time.monotonic() < end:  # 1 is judged, 2 wait
        time.sleep(0.01)
    judge.gate.set()
    for thread in threads:
        thread.join(10)
    assert sorted(answer.status_code for answer in answers) == [200] * 3 + [503] * 3
    for answer in answers:
        if answer.status_code == 503:
            assert "2 requests are waiting" in refused(answer, 503)
            assert int(answer.headers["retry-after"]) >= 1


def test_more_groups_than_the_line_has_room_for_go_in_turns(client, judge):
    """As many questions as queries: each is a group of its own."""
    client.put("/writers/ada", json={"exemplars": ["I came; I saw."]})
    queries = [f"Hi? {i}." for i in range(7)]
    labels = [{"question": f"Question {i}?"} for i in range(7)]
    body = {"query": queries, "prompts": ["Hi? "] * 7, "labels": labels}
    found = client.post("/get_reward?writer=ada", json=body).json()["rewards"]
    scores = [soft_score(digits_of(f"{i}.")) for i in range(7)]
    assert found == pytest.approx([(score - 1) / 8 for score in scores])
    assert len(judge.calls) == 7


def test_too_late_gets_504_and_what_had_not_begun_is_dropped():
    judge = FakeJudge()
    with client_of(judge, Limits(seconds=0.2)) as client:
        judge.gate.clear()
        assert "0.2 s" in refused(client.post("/judge", json=BODY), 504)  # was being judged
        waiting = BODY | {"candidates": ["Dropped."]}
        assert "0.2 s" in refused(client.post("/judge", json=waiting), 504)
        followed = events_of(client.post("/judge", json=waiting | {"stream": True}).text)
        assert followed[-1][1]["error"]["status"] == 504
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
        "process_resident_memory_bytes",
    ):
        assert line in text


def test_the_schemas_are_there(client):
    schema = client.get("/openapi.json").json()
    asked = schema["components"]["schemas"]["JudgeRequest"]
    assert asked["additionalProperties"] is False
    assert asked["required"] == ["candidates"]
    assert set(schema["paths"]["/judge"]["post"]["responses"]) == {"200", "4XX", "5XX"}
    assert {"/judge", "/rank", "/get_reward", "/v1/chat/completions"} <= set(schema["paths"])
