"""A judge whose scores are known by hand, for the tests of the server.

It scores by a checksum of the candidate, remembers its calls, and fails where a text says so.
"""

import math
import threading
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from nanopersrm import InputError
from nanopersrm.judge import judgement
from nanopersrm.judge.judgement import JudgeConfig, JudgedReply, Judgement
from nanopersrm.judge.verdict import write

ADA, BEA = ("I came; I saw.",), ("lol no way!!",)


def digits_of(text: str) -> list[float]:
    """Nine probabilities that tell texts apart."""
    if text.strip() == "invalid":
        return [math.nan] * 9
    raw = [1 + zlib.crc32(f"{digit}{text.strip()}".encode()) % 97 for digit in range(9)]
    return [x / sum(raw) for x in raw]


@dataclass
class Drawn:
    digits: list[float]
    joint: None = None


class FakeJudge:
    """Scores by a checksum of the candidate; remembers its calls; fails where a text says so."""

    def __init__(self) -> None:
        self.calls: list[tuple[Sequence[str], Sequence[str]]] = []
        self.threads: set[int] = set()
        self.busy = False
        self.gate = threading.Event()  # closed: a call waits
        self.gate.set()
        self.begun = threading.Event()

    def judge(
        self,
        exemplars: Sequence[str],
        candidates: Sequence[str],
        question: str | None = None,
        principles: Sequence[str] = (),
        config: JudgeConfig | None = None,
        on_text: Callable[[tuple[int, ...], str, bool], None] | None = None,
    ) -> Judgement:
        config = config or JudgeConfig()
        judgement.check(exemplars, candidates, config, question, principles)
        assert not self.busy, "two calls at once"
        self.busy = True
        self.remember(exemplars, candidates)
        self.threads.add(threading.get_ident())
        self.begun.set()
        try:
            assert self.gate.wait(20), "nobody opened the gate"
            return self._judged(candidates, on_text)
        finally:
            self.busy = False

    def remember(self, exemplars: Sequence[str], candidates: Sequence[str]) -> None:
        self.calls.append((exemplars, candidates))

    def _judged(self, candidates: Sequence[str], on_text: Any) -> Judgement:
        for text in candidates:
            if "too long" in text:
                raise InputError("candidate: expected a text that fits")
            if "boom" in text:
                raise RuntimeError("out of memory")
            if "stop" in text:
                raise StopIteration
        unique = sorted({text.strip() for text in candidates})
        place = [unique.index(text.strip()) for text in candidates]
        thoughts = [f'It says "{text[:20]}" and no more.' for text in unique]
        if on_text is not None:
            for end in (4, 12, 999):
                for i, thought in enumerate(thoughts):
                    on_text((place.index(i),), thought[:end], end == 999)
        digits = [[Drawn(digits_of(text))] for text in unique]
        worth, square = judgement.pointwise(len(unique), [], digits)
        scores = [worth[i] for i in place]
        table = [[square[i][j] for j in place] for i in place]
        order = judgement.ranked(table, scores)
        replies = [
            JudgedReply((place.index(i),), write(t, {"A": 5}), t, None, False)
            for i, t in enumerate(thoughts)
        ]
        notes = ["not trained"]
        for i, spot in enumerate(place):
            if spot in place[:i]:
                first = place.index(spot) + 1
                notes.append(f"candidates {first} and {i + 1} are identical: a tie")
        if any("crowded" in text for text in candidates):
            notes.append("exemplar 1 was cut from 9 to 5 tokens")
        return Judgement(
            scores=scores,
            preference=table,
            ranking=order,
            verdict=judgement.verdict_of(scores, table, order),
            reasoning=[thoughts[i] for i in place],
            well_formed=True,
            tokens=10 * len(unique),
            prompt_tokens=100,
            seconds=0.0,
            replies=sorted(replies, key=lambda reply: reply.candidates),
            notes=notes,
            measured=[float(len(text.strip())) for text in candidates],
        )
