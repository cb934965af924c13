"""Judges whose scores are known by hand, for the tests of this room."""

import math
import threading
import zlib
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

from nanopersrm import InputError
from nanopersrm.judge import judgement
from nanopersrm.judge.judgement import JudgeConfig, JudgedCandidate, JudgedReply, Judgement

WRITER = ("I came home late; no supper.", "So be it!")
OTHER = ("lol no food",)
CONTEXT = 60  # characters that a RuleJudge can read
LONG = "long " * 20  # more than that


def digits_of(text: str) -> list[float]:
    """Nine probabilities that tell texts apart."""
    if text.strip() == "invalid":
        return [math.nan] * 9
    raw = [1 + zlib.crc32(f"{digit}{text.strip()}".encode()) % 97 for digit in range(9)]
    return [x / sum(raw) for x in raw]


class FakeJudge:
    """Scores by a checksum of the candidate; remembers its calls; fails where a text says so."""

    def __init__(self) -> None:
        self.calls: list[tuple[Sequence[str], Sequence[str]]] = []
        self.configs: list[JudgeConfig] = []
        self.known: list[JudgedCandidate] | None = None  # that every judgement brings
        self.busy = False
        self.gate = threading.Event()  # closed: a call waits
        self.gate.set()
        self.begun = threading.Event()

    def judge(
        self, exemplars, candidates, question=None, principles=(), config=None, on_text=None
    ) -> Judgement:
        self.configs.append(config or JudgeConfig())
        judgement.check(exemplars, candidates, self.configs[-1], question, principles)
        assert not self.busy, "two calls at once"
        self.busy = True
        self.calls.append((exemplars, candidates))
        self.begun.set()
        try:
            assert self.gate.wait(20), "nobody opened the gate"
            return self._judged(candidates, on_text)
        finally:
            self.busy = False

    def _judged(self, candidates: Sequence[str], on_text: Any) -> Judgement:
        for text in candidates:
            if "too long" in text:
                raise InputError("candidate: expected a text that fits")
            if "boom" in text:
                raise RuntimeError("out of memory")
        thoughts = [f'It says "{text.strip()[:20]}" and no more.' for text in candidates]
        for end in (4, 12, 999) if on_text is not None else ():
            for i, thought in enumerate(thoughts):
                on_text((i,), thought[:end], end == 999)
        drawn: Any = [[SimpleNamespace(digits=digits_of(text), joint=None)] for text in candidates]
        scores, table = judgement.pointwise(len(drawn), [], drawn)
        order = judgement.ranked(table, scores)
        verdict = judgement.verdict_of(scores, table, order)
        known = self.known or [JudgedCandidate([], 0.0, float(len(t)), None) for t in candidates]
        replies = [JudgedReply((i,), (), thought, False) for i, thought in enumerate(thoughts)]
        rest: Any = (10 * len(drawn), 100, 0.0, replies, ["not trained"])
        return Judgement(scores, table, order, verdict, thoughts, known, *rest)


class RuleJudge:
    """Gives the digit a text ends with, and 5 to any other; "?" is not a number."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.calls: list[tuple[tuple[str, ...], list[str], str | None, tuple[str, ...]]] = []

    def judge(
        self, exemplars, candidates, question=None, principles=(), config=None, on_text=None
    ) -> Judgement:
        assert self.lock.locked()
        judgement.check(exemplars, candidates, config or JudgeConfig(), question, principles)
        for text in candidates:
            if len(text) > CONTEXT:
                raise InputError("candidate 1: expected a text that fits")
        self.calls.append((tuple(exemplars), list(candidates), question, tuple(principles)))
        digits = [digit_after(text) for text in candidates]
        scores = [score if math.isfinite(score) else None for score in digits]
        table = [[0.5 + (a - b) / 16 for b in digits] for a in digits]
        order = judgement.ranked(table, scores)
        verdict = judgement.verdict_of(scores, table, order)
        known = [JudgedCandidate([], 0.0, 50.0, None)] * len(scores)
        return Judgement(scores, table, order, verdict, [""] * len(scores), known, 0, 0, 0.0, [])


def digit_after(text: str) -> float:
    end = text.strip()[-1]
    return math.nan if end == "?" else float(end) if end.isdigit() else 5.0
