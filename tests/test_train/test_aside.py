"""What needs no judge: one at a time in a thread of its own, in a line with an end."""

import asyncio
import threading
import time
from collections.abc import Awaitable, Callable
from functools import partial
from typing import Any

import pytest
from fake_judge import FakeJudge
from test_desk import ask, at_desk, held
from test_routes import BODY, SMALL, client_of, refused

from nanopersrm.serve import wire
from nanopersrm.serve.desk import Busy, Desk
from nanopersrm.serve.wire import Limits

PROFILE = {"exemplars": ["I came; I saw; I went. " * 12]}


class Work:
    """Work that waits until the gate opens; says what was begun, where, and how many at once."""

    def __init__(self) -> None:
        self.gate, self.begun = threading.Event(), list[Any]()
        self.threads, self.now, self.most = set[int](), 0, 0

    def do(self, name: Any) -> Any:
        self.begun.append(name)
        self.threads.add(threading.get_ident())
        self.now += 1
        self.most = max(self.most, self.now)
        assert self.gate.wait(20), "nobody opened the gate"
        self.now -= 1
        return name


def beside(work: Callable[[Desk, Work], Awaitable[None]], room: int = 2) -> Work:
    """Run `work` at an open desk with room for so many."""
    done = Work()

    async def run(desk: Desk, judge: FakeJudge) -> None:
        try:
            await work(desk, done)
        finally:
            done.gate.set()

    at_desk(run, room=room)
    return done


async def begun(desk: Desk, work: Work, *names: Any) -> list["asyncio.Task[Any]"]:
    """Tasks of these names, the first of which is being done."""
    tasks = [asyncio.ensure_future(desk.aside(partial(work.do, name))) for name in names]
    while not work.begun:
        await asyncio.sleep(0.001)
    return tasks


def test_one_at_a_time_in_order_in_one_thread():
    async def run(desk: Desk, work: Work) -> None:
        tasks = await begun(desk, work, 0, 1, 2)
        work.gate.set()
        assert await asyncio.gather(*tasks) == [0, 1, 2]

    work = beside(run)
    assert work.begun == [0, 1, 2]
    assert work.most == len(work.threads) == 1
    assert work.threads != {threading.get_ident()}


def test_it_does_not_wait_for_the_judge():
    async def run(desk: Desk, judge: FakeJudge) -> None:
        judging = await held(desk, judge, ask("One."))
        assert await asyncio.wait_for(desk.aside(lambda: 7), 10) == 7
        assert not judging.done()

    at_desk(run)


def test_no_room_and_room_again():
    async def run(desk: Desk, work: Work) -> None:
        tasks = await begun(desk, work, 0, 1, 2)  # one is done, two wait
        with pytest.raises(Busy, match="2 requests are waiting"):
            await desk.aside(partial(work.do, "too many"))
        tasks[1].cancel()
        await asyncio.sleep(0.01)
        more = asyncio.ensure_future(desk.aside(partial(work.do, 3)))
        await asyncio.sleep(0.01)
        work.gate.set()
        assert await asyncio.gather(tasks[0], tasks[2], more) == [0, 2, 3]
        assert desk.beside == 0

    assert beside(run).begun == [0, 2, 3]


def test_who_leaves_while_it_is_done_starts_no_second_one_beside_it():
    async def run(desk: Desk, work: Work) -> None:
        (first,) = await begun(desk, work, 0)
        first.cancel()
        others = [asyncio.ensure_future(desk.aside(partial(work.do, n))) for n in (1, 2)]
        await asyncio.sleep(0.05)
        assert work.begun == [0]
        others[0].cancel()
        await asyncio.sleep(0.01)
        work.gate.set()
        assert await others[1] == 2

    work = beside(run)
    assert work.begun == [0, 2]
    assert work.most == 1


def test_what_it_raises_goes_to_who_asked():
    async def run(desk: Desk, work: Work) -> None:
        with pytest.raises(ZeroDivisionError):
            await desk.aside(lambda: 1 // 0)
        assert await desk.aside(lambda: 1) == 1

    beside(run)


def test_closing_sends_away_who_waits():
    async def run(desk: Desk, work: Work) -> None:
        first, second = await begun(desk, work, 0, 1)
        desk.send_away()
        work.gate.set()
        assert await first == 0
        with pytest.raises(Busy, match="stopping"):
            await second
        with pytest.raises(Busy, match="stopping"):
            await desk.aside(lambda: 2)

    assert beside(run).begun == [0]


# The route


@pytest.fixture
def slow(monkeypatch) -> Work:
    """/profile waits for the gate of this."""
    work, plainly = Work(), wire.profile_reply
    monkeypatch.setattr(wire, "profile_reply", lambda *a: (work.do("profile"), plainly(*a))[1])
    return work


def test_profiles_beyond_the_line_get_503(slow):
    answers: list[Any] = []
    with client_of(FakeJudge()) as client:
        threads = [
            threading.Thread(target=lambda: answers.append(client.post("/profile", json=PROFILE)))
            for _ in range(6)
        ]
        for thread in threads:
            thread.start()
        end = time.monotonic() + 10
        while len(answers) < 3 and time.monotonic() < end:  # 1 is counted, SMALL.waiting wait
            time.sleep(0.01)
        assert SMALL.waiting == 2
        assert client.post("/judge", json=BODY).status_code == 200  # the judge has nothing to do
        assert "at least one" in refused(client.post("/profile", json={"exemplars": []}), 422)
        slow.gate.set()
        for thread in threads:
            thread.join(10)
    assert sorted(answer.status_code for answer in answers) == [200] * 3 + [503] * 3
    (line,) = {refused(answer, 503) for answer in answers if answer.status_code == 503}
    assert "2 requests are waiting" in line
    assert slow.most == 1


def test_a_profile_that_takes_too_long_gets_504(slow):
    with client_of(FakeJudge(), Limits(seconds=0.2)) as client:
        assert "0.2 s" in refused(client.post("/profile", json=PROFILE), 504)
        slow.gate.set()
        assert client.post("/profile", json=PROFILE).status_code == 200


def test_a_profile_keeps_the_limits_of_texts(slow):
    many, long = ["Text."] * 33, ["a" * 501]
    with client_of(FakeJudge()) as client:
        for exemplars, line in ((many, "at most 32 texts"), (long, "at most 500 characters")):
            assert line in refused(client.post("/profile", json={"exemplars": exemplars}), 422)
    assert slow.begun == []
