"""The desk: one thread, a fair order, shared calls that change nothing, errors that stay apart."""

import asyncio
import threading
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
import torch
from fake_judge import ADA, BEA, FakeJudge, digits_of
from fixtures import make_base

from nanopersrm import InputError
from nanopersrm.judge.judge import Judge
from nanopersrm.judge.judgement import JudgeConfig, Judgement
from nanopersrm.judge.verdict import soft_score
from nanopersrm.model.tokenizer import Tokenizer
from nanopersrm.model.weights import load
from nanopersrm.serve.desk import IN_A_ROW, Ask, Busy, Desk, Done, together


def ask(*candidates: str, exemplars: tuple[str, ...] = ADA, **more: Any) -> Ask:
    return Ask(exemplars, candidates, **more)


def at_desk(
    work: Callable[[Desk, FakeJudge], Awaitable[None]],
    judge: FakeJudge | None = None,
    room: int = 8,
) -> FakeJudge:
    """Run `work` beside an open desk, then close it."""
    judge = judge or FakeJudge()

    async def run() -> None:
        desk = Desk(judge, room)
        desk.open()
        try:
            await asyncio.wait_for(work(desk, judge), 20)
        finally:
            judge.gate.set()
            await desk.close()

    asyncio.run(run())
    return judge


async def held(desk: Desk, judge: FakeJudge, first: Ask) -> "asyncio.Future[Done]":
    """A call that stays in the judge until the gate opens."""
    judge.gate.clear()
    judge.begun.clear()
    future = desk.submit(first)
    while not judge.begun.is_set():
        await asyncio.sleep(0.001)
    return future


def plain(found: Judgement) -> dict[str, Any]:
    """What must not depend on who else was judged."""
    shared = ("tokens", "prompt_tokens", "seconds")
    return {key: value for key, value in found.as_dict().items() if key not in shared}


def test_a_judgement_is_that_of_the_judge():
    async def work(desk: Desk, judge: FakeJudge) -> None:
        done = await desk.submit(ask("One.", "Two.", question="Why?"))
        assert done.together == 1
        assert done.judgement.as_dict() == FakeJudge().judge(ADA, ("One.", "Two.")).as_dict()

    judge = at_desk(work)
    assert len(judge.threads) == 1
    assert judge.threads != {threading.get_ident()}


def test_who_waits_with_other_candidates_shares_a_call_and_gets_the_same():
    asks = [ask("One.", "Two."), ask("Two.", "Three.", " Two. "), ask("Four.")]

    async def work(desk: Desk, judge: FakeJudge) -> None:
        first = await held(desk, judge, ask("Zero.", exemplars=BEA))
        futures = [desk.submit(one) for one in asks]
        other = desk.submit(ask("One.", question="Why?"))  # another prompt: not with them
        judge.gate.set()
        found = [await future for future in futures]
        assert [done.together for done in found] == [3, 3, 3]
        for one, done in zip(asks, found, strict=True):
            alone = FakeJudge().judge(one.exemplars, one.candidates)
            assert plain(done.judgement) == plain(alone)
        assert (await other).together == (await first).together == 1

    judge = at_desk(work)
    assert [len(candidates) for _, candidates in judge.calls] == [1, 4, 1]


def test_pairs_and_followed_judgements_share_no_call():
    config = JudgeConfig(mode="pairwise")
    a, b = ask("One.", "Two.", config=config), ask("Two.", "Three.", config=config)
    assert not a.goes_with(b)

    async def work(desk: Desk, judge: FakeJudge) -> None:
        await held(desk, judge, ask("Zero."))
        seen: list[str] = []
        follow = desk.submit(ask("One."), lambda which, text, ended: seen.append(text))
        plainly = desk.submit(ask("Two."))
        judge.gate.set()
        assert (await follow).together == (await plainly).together == 1
        assert seen[-1] == 'It says "One." and no more.'

    at_desk(work)


def test_a_shared_call_holds_26_candidates_at_most():
    async def work(desk: Desk, judge: FakeJudge) -> None:
        await held(desk, judge, ask("Zero.", exemplars=BEA))
        futures = [desk.submit(ask(*(f"{i} {j}" for j in range(10)))) for i in range(5)]
        judge.gate.set()
        assert [(await future).together for future in futures] == [2, 2, 2, 2, 1]

    judge = at_desk(work)
    assert [len(candidates) for _, candidates in judge.calls] == [1, 20, 20, 10]


def test_shared_calls_of_a_real_judge_give_what_each_would_get(tmp_path):
    base = make_base(tmp_path / "base", "smollm")

    def fresh() -> Judge:
        return Judge(load(base, torch.float32, torch.device("cpu")), Tokenizer.load(base))

    config = JudgeConfig(think_tokens=6, samples=2, seed=3)
    exemplars = ("I came home late. No supper; no letters.", "So be it! We shall see.")
    asks = [
        Ask(exemplars, ("We arrived late.", "lol no food"), "Was there supper?", ("Be brief.",)),
        Ask(exemplars, ("It is what it is.", "lol no food "), "Was there supper?", ("Be brief.",)),
    ]
    asks = [Ask(a.exemplars, a.candidates, a.question, a.principles, config) for a in asks]
    assert asks[0].goes_with(asks[1])
    for one, found in zip(asks, together(fresh(), asks), strict=True):
        alone = fresh().judge(one.exemplars, one.candidates, one.question, one.principles, config)
        assert found.scores == pytest.approx(alone.scores, abs=1e-4)
        assert [r.text for r in found.replies] == [r.text for r in alone.replies]
        assert [r.candidates for r in found.replies] == [r.candidates for r in alone.replies]
        assert (found.ranking, found.verdict, found.notes, found.reasoning) == (
            alone.ranking,
            alone.verdict,
            alone.notes,
            alone.reasoning,
        )


def test_one_writer_goes_on_but_not_for_ever():
    """Asks that cannot share a call: the order of the calls is seen."""

    async def work(desk: Desk, judge: FakeJudge) -> None:
        await held(desk, judge, ask("Zero."))
        futures = [desk.submit(ask("Now?", exemplars=BEA))]
        futures += [desk.submit(ask("One.", question=f"Q{i}")) for i in range(12)]
        judge.gate.set()
        await asyncio.gather(*futures)

    judge = at_desk(work, room=99)
    writers = [exemplars for exemplars, _ in judge.calls]
    assert writers == [ADA] * IN_A_ROW + [BEA] + [ADA] * 5


def test_without_a_common_writer_it_is_first_come_first_served():
    async def work(desk: Desk, judge: FakeJudge) -> None:
        await held(desk, judge, ask("Zero."))
        futures = [desk.submit(ask("One.", exemplars=(f"Writer {i}.",))) for i in range(6)]
        judge.gate.set()
        await asyncio.gather(*futures)

    judge = at_desk(work)
    assert [exemplars for exemplars, _ in judge.calls[1:]] == [(f"Writer {i}.",) for i in range(6)]


@pytest.mark.parametrize(("bad", "error"), [("too long", InputError), ("boom", RuntimeError)])
def test_an_error_goes_to_who_caused_it(bad: str, error: type[Exception]):
    """Nobody else who was in the call."""

    async def work(desk: Desk, judge: FakeJudge) -> None:
        await held(desk, judge, ask("Zero."))
        good, wrong = desk.submit(ask("One.")), desk.submit(ask(bad))
        judge.gate.set()
        with pytest.raises(error):
            await wrong
        assert (await good).judgement.scores == [soft_score(digits_of("One."))]
        assert (await desk.submit(ask("Next."))).together == 1

    at_desk(work)


def test_what_had_to_cut_an_exemplar_is_judged_alone():
    async def work(desk: Desk, judge: FakeJudge) -> None:
        await held(desk, judge, ask("Zero."))
        small, large = desk.submit(ask("One.")), desk.submit(ask("crowded"))
        judge.gate.set()
        assert (await small).judgement.notes == ["not trained"]
        assert (await large).judgement.notes[-1].startswith("exemplar 1 was cut")
        assert (await small).together == (await large).together == 1

    judge = at_desk(work)
    assert [len(candidates) for _, candidates in judge.calls] == [1, 2, 1, 1]


def test_even_a_stop_iteration_does_not_stop_the_line():
    async def work(desk: Desk, judge: FakeJudge) -> None:
        with pytest.raises(RuntimeError, match="StopIteration"):
            await desk.submit(ask("stop"))
        assert (await desk.submit(ask("One."))).judgement.verdict == 0

    at_desk(work)


def test_no_room_and_room_again():
    async def work(desk: Desk, judge: FakeJudge) -> None:
        await held(desk, judge, ask("Zero."))
        futures = [desk.submit(ask(f"{i}")) for i in range(3)]
        with pytest.raises(Busy, match="3 requests are waiting") as caught:
            desk.submit(ask("One more."))
        assert caught.value.again > 0
        futures[1].cancel()
        futures.append(desk.submit(ask("In its place.")))
        judge.gate.set()
        await asyncio.gather(futures[0], futures[2], futures[3])

    judge = at_desk(work, room=3)
    judged = [text for _, candidates in judge.calls for text in candidates]
    assert judged == ["Zero.", "0", "2", "In its place."]  # "1" had given up


def test_bad_asks_never_wait():
    async def work(desk: Desk, judge: FakeJudge) -> None:
        for bad in (ask(), ask("One.", exemplars=()), ask(" "), ask(*map(str, range(27)))):
            with pytest.raises(InputError):
                desk.submit(bad)
        assert desk.waiting == []

    assert at_desk(work).calls == []


def test_closing_finishes_the_running_call_and_sends_the_others_away():
    async def work(desk: Desk, judge: FakeJudge) -> None:
        running = await held(desk, judge, ask("Zero."))
        waiting = desk.submit(ask("One.", exemplars=BEA))
        desk.send_away()
        with pytest.raises(Busy, match="stopping"):
            await waiting
        with pytest.raises(Busy, match="stopping"):
            desk.submit(ask("Late."))
        assert not running.done()
        judge.gate.set()
        assert (await running).judgement.verdict == 0

    assert len(at_desk(work).calls) == 1
