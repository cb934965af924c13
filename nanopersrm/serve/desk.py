"""The desk: who is judged next, with whom, and what happens when it is too much.

    desk = Desk(judge, room=64)
    desk.open()                                  # inside a running event loop
    done = await desk.submit(ask)                # Done(judgement, together)
    await desk.close()                           # the running call finishes, who waits is sent away

A Judge is not for several threads, so exactly one thread of its own runs it, a call at a time. The
rest happens in the event loop, where nothing needs a lock.

The order. A Judge keeps the keys and values of the last few writers' exemplars, so asks of one
writer are worth keeping together: after each call, the oldest ask of the same writer goes next, up
to IN_A_ROW times while others wait; then it is the oldest's turn, whoever that is. Nobody is passed
over for ever: an ask with n before it waits for at most IN_A_ROW · (n + 1) turns. A turn is one
call, or, where a common call fails (below), one more for each who shared it.

Together. Pointwise asks that differ in their candidates alone are judged in one call, because no
prompt shows more than one candidate; each gets its own part. Their replies are those of a call of
their own, but for rounding (README, "How it works"). Where the common call fails, or had to cut an
exemplar, which may be due to one of them, each is judged alone.

Fail closed. What the judge raises goes to who asked, and the next call is made. An ask whose future
was cancelled before its turn is dropped. A call that is being made is finished.

Closing waits CLOSING seconds for what is being judged, then sends away who waits for it, so that
the judge stops, and waits as long again. A call that does not stop even then is left behind: its
thread ends with the call. After Ctrl-C Python's exit waits for that; SIGTERM ends the process.

Beside the judge a second thread does what needs no model and still counts for a while: the habits
of a writer. It has a line of its own, as long as the judge's, first come first served.

What we left out. Running asks of different writers side by side.
"""

import asyncio
import contextlib
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, TypeVar

from nanopersrm.judge import judgement
from nanopersrm.judge.judgement import JudgeConfig, Judgement, Judges, OnText
from nanopersrm.judge.verdict import LABELS

IN_A_ROW = 8  # calls for one writer while others wait
CLOSING = 10.0  # seconds that closing waits for a call
T = TypeVar("T")
CUT = "exemplar "  # how a note begins that says that an exemplar was cut


class Busy(Exception):
    """No room, or no more: the one line to say, and the seconds after which to come again."""

    def __init__(self, line: str, again: int):
        super().__init__(line)
        self.again = again


@dataclass(frozen=True)
class Ask:
    """The arguments of `Judge.judge`."""

    exemplars: tuple[str, ...]
    candidates: tuple[str, ...]
    question: str | None = None
    principles: tuple[str, ...] = ()
    config: JudgeConfig = field(default_factory=JudgeConfig)

    def check(self) -> None:
        """What cannot be judged is refused before it waits."""
        judgement.check(
            self.exemplars, self.candidates, self.config, self.question, self.principles
        )

    @property
    def writer(self) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """What all prompts begin with."""
        return self.exemplars, self.principles

    @property
    def texts(self) -> set[str]:
        """The candidates as the judge tells them apart."""
        return {candidate.strip() for candidate in self.candidates}

    def goes_with(self, other: "Ask") -> bool:
        """Whether they differ in their candidates alone, and those do not meet in a prompt."""
        return self.config.mode == "pointwise" and replace(other, candidates=()) == replace(
            self, candidates=()
        )


@dataclass(frozen=True)
class Done:
    """A judgement, and how many asks shared the call, whose tokens and seconds it gives."""

    judgement: Judgement
    together: int = 1


@dataclass(eq=False)
class Ticket:
    """An ask that waits or is judged."""

    ask: Ask
    future: "asyncio.Future[Done]"
    on_text: OnText | None


class Desk:
    """A line, and the thread in which the judge works; another of each for what needs no judge."""

    def __init__(self, judge: Judges, room: int = 64):
        """room: how many asks may wait, and how many others beside them."""
        assert room >= 1, f"expected room for at least 1 ask, got {room}"
        self.judge, self.room = judge, room
        self.waiting: list[Ticket] = []  # oldest first
        self.judging: list[Ticket] = []
        self.closed = False
        self.beside = 0  # what needs no judge: waiting, or being done
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="judge")
        self._other = ThreadPoolExecutor(1, thread_name_prefix="beside")
        self._turn = asyncio.Lock()  # to use the other thread
        self._wake = asyncio.Event()
        self._last: object = None  # writer of the last call
        self._row = 0  # calls for that writer
        self._work: asyncio.Task[None] | None = None

    def open(self) -> None:
        """Begin to work."""
        self._work = asyncio.create_task(self._serve())

    def submit(self, ask: Ask, on_text: OnText | None = None) -> "asyncio.Future[Done]":
        """Wait in line. `on_text` is called from the judge's thread. Raises InputError or Busy."""
        ask.check()
        self._drop()
        self._admit(len(self.waiting))
        ticket = Ticket(ask, asyncio.get_running_loop().create_future(), on_text)
        self.waiting.append(ticket)
        self._wake.set()
        return ticket.future

    async def aside(self, work: Callable[[], T]) -> T:
        """`work` in the other thread, when it is its turn. Raises Busy, or what `work` raises."""
        self._admit(self.beside - 1)  # one of them is being done
        self.beside += 1
        try:
            async with self._turn:
                self._admit(0)  # it may be closed by now
                return await asyncio.get_running_loop().run_in_executor(self._other, work)
        finally:
            self.beside -= 1

    def _admit(self, waiting: int) -> None:
        """Busy where it is closed, or so many who wait are enough."""
        if self.closed:
            raise Busy("the server is stopping", again=5)
        if waiting >= self.room:
            raise Busy(f"{self.room} requests are waiting, no room for more", again=2)

    def send_away(self) -> None:
        """Nothing new is taken, and who waits is told; what is being judged goes on."""
        self.closed = True
        for ticket in self.waiting:
            if not ticket.future.done():
                ticket.future.set_exception(Busy("the server is stopping", again=5))
        self.waiting = []
        self._wake.set()

    async def close(self) -> None:
        """`send_away`, and wait for what is being judged, up to twice CLOSING."""
        self.send_away()
        if self._work is not None:
            await asyncio.wait([self._work], timeout=CLOSING)
            for ticket in self.judging:  # nobody is left when the work is done
                _answer(ticket, None, Busy("the server is stopping", again=5))
            await asyncio.wait([self._work], timeout=CLOSING)
            if self._work.done():
                self._work.result()  # raises what went wrong
            self._work.cancel()
        for thread in (self._thread, self._other):
            thread.shutdown(wait=False)

    def _drop(self) -> None:
        """Forget who has given up waiting."""
        self.waiting = [ticket for ticket in self.waiting if not ticket.future.done()]

    def _take(self) -> list[Ticket]:
        """Who is judged in the next call; nobody when nobody waits."""
        self._drop()
        if not self.waiting:
            return []
        same = [ticket for ticket in self.waiting if ticket.ask.writer == self._last]
        first = same[0] if same and self._row < IN_A_ROW else self.waiting[0]
        self._row = self._row + 1 if first.ask.writer == self._last else 1
        self._last = first.ask.writer
        taken, texts = [first], first.ask.texts
        for ticket in self.waiting if first.on_text is None else ():
            if ticket is first or ticket.on_text or not first.ask.goes_with(ticket.ask):
                continue
            if len(texts | ticket.ask.texts) <= len(LABELS):
                taken.append(ticket)
                texts |= ticket.ask.texts
        self.waiting = [ticket for ticket in self.waiting if ticket not in taken]
        return taken

    async def _serve(self) -> None:
        """The line, until the desk is closed."""
        while not self.closed:
            self.judging = self._take()
            if self.judging:
                await self._judge(self.judging)
                self.judging = []
            else:
                self._wake.clear()
                await self._wake.wait()

    async def _judge(self, tickets: list[Ticket]) -> None:
        """One call for all, or one for each where that does not do."""
        if len(tickets) > 1:
            asks = [ticket.ask for ticket in tickets]
            shared = partial(together, self.judge, asks, _follow(tickets))
            found, error = await self._call(shared)
            if error is None and not any(note.startswith(CUT) for note in found[0].notes):
                for ticket, part in zip(tickets, found, strict=True):
                    _answer(ticket, Done(part, len(tickets)), None)
                return
        for ticket in tickets:
            if not ticket.future.done():
                found, error = await self._call(partial(_alone, self.judge, ticket))
                _answer(ticket, found and Done(found), error)

    async def _call(self, work: Callable[[], Any]) -> tuple[Any, BaseException | None]:
        """Run in the judge's thread -> (its result, None) or (None, what it raised)."""
        loop, ended = asyncio.get_running_loop(), asyncio.Event()

        def tell(_: object) -> None:
            with contextlib.suppress(RuntimeError):  # the loop was closed meanwhile
                loop.call_soon_threadsafe(ended.set)

        done = self._thread.submit(work)
        done.add_done_callback(tell)
        await ended.wait()
        error = done.exception()
        if isinstance(error, StopIteration):  # which no asyncio future takes
            error = RuntimeError("the judge raised StopIteration")
        return (None, error) if error is not None else (done.result(), None)


def _answer(ticket: Ticket, done: Done | None, error: BaseException | None) -> None:
    """Tell who asked, unless they have gone."""
    if ticket.future.done():
        return
    if error is not None:
        ticket.future.set_exception(error)
    else:
        assert done is not None, "neither a judgement nor an error"
        ticket.future.set_result(done)


def _follow(tickets: Sequence[Ticket]) -> OnText | None:
    """What the judge calls at each token, in its thread; None where nobody reads along."""
    reading = [ticket.on_text for ticket in tickets if ticket.on_text is not None]

    def follow(which: tuple[int, ...], text: str, ended: bool) -> None:
        for on_text in reading:
            on_text(which, text, ended)

    return follow if reading else None


def _alone(judge: Judges, ticket: Ticket) -> Judgement:
    """One ask in a call of its own; runs in the judge's thread."""
    ask = ticket.ask
    asked = ask.exemplars, ask.candidates, ask.question, ask.principles, ask.config
    return judge.judge(*asked, _follow([ticket]))


def together(
    judge: Judges,
    asks: Sequence[Ask],
    on_text: OnText | None = None,
) -> list[Judgement]:
    """One pointwise call about all candidates of asks that `goes_with` each other -> one each."""
    one = asks[0]
    texts = list(dict.fromkeys(text.strip() for ask in asks for text in ask.candidates))
    asked = one.exemplars, texts, one.question, one.principles, one.config
    found = judge.judge(*asked, on_text)
    return [_part(found, [texts.index(text.strip()) for text in ask.candidates]) for ask in asks]


def _part(whole: Judgement, place: list[int]) -> Judgement:
    """The judgement of an ask whose candidate i is place[i] of the whole."""
    scores = [whole.scores[i] for i in place]
    table = [[whole.preference[i][j] for j in place] for i in place]
    order = judgement.ranked(table, scores)
    notes = list(whole.notes)
    for i, spot in enumerate(place):
        if spot in place[:i]:
            notes.append(f"candidates {place.index(spot) + 1} and {i + 1} are identical: a tie")
    replies = [
        replace(reply, candidates=(place.index(i),))
        for i in dict.fromkeys(place)
        for reply in whole.replies
        if reply.candidates == (i,)
    ]
    return replace(
        whole,
        scores=scores,
        preference=table,
        ranking=order,
        verdict=judgement.verdict_of(scores, table, order),
        reasoning=[whole.reasoning[i] for i in place],
        well_formed=all(reply.problem is None for reply in replies),
        replies=replies,
        notes=notes,
        measured=None if whole.measured is None else [whole.measured[i] for i in place],
    )
