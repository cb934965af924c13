"""Sides that take turns, each in a process of its own: the clock, and both ends of the pipe.

    our end (Side)                     their end (Turns)
                      <- loaded        a side has its weights in memory
    ask()             go ->            wait()     a step begins, and with it the clock
                                       drawn(…)   the replies are there, and get their rewards
                      <- seconds       done()     the adapter has been updated
    hear()            <- the peak      ended(…)   after the last step

So two implementations that cannot live in one process without helping or disturbing each other are
still measured in interleaved rounds: whoever is not asked sleeps.

Imports nothing of ours but `bench_peers.py`, so that a side which is not ours stays free of our
settings (`kernels/process.py`).
"""

import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from typing import Any, TextIO

import torch
from torch import Tensor

from nanopersrm.bench.bench_peers import now, peak

OF_OURS = ("nanopersrm", "kernels", "data")


def reward(ids: Sequence[int]) -> float:
    """Of a reply: from 0 to 1, fixed, and hardly ever the same for two."""
    return sum(n * i for n, i in enumerate(ids, start=1)) % 1009 / 1008


class Ended(Exception):
    """A side has ended before its last step."""


class Turns:
    """Waits for its turn, and measures what is done in it."""

    def __init__(self, device: torch.device, asked: TextIO, answers: TextIO):
        self.device, self.asked, self.answers = device, asked, answers
        self.rows, self.start = 0, 0.0
        self.found: dict[str, Any] = {}

    def count(self, ids: Tensor) -> None:
        """These ids go through the model."""
        self.rows += ids.numel()

    def wait(self) -> None:
        """A step begins when a line has come."""
        if not self.asked.readline():
            raise SystemExit(1)  # nobody asks any more
        self.rows, self.start = 0, now(self.device)

    def drawn(self, replies: Sequence[Sequence[int]]) -> list[float]:
        """The replies are there -> their rewards."""
        worth = [reward(ids) for ids in replies]
        self.found = {
            "replies": [list(ids) for ids in replies],
            "rows_drawing": self.rows,
            "drawing": now(self.device) - self.start,
        }
        return worth

    def done(self) -> None:
        """The adapter has been updated."""
        self.found["seconds"] = now(self.device) - self.start
        self.found["training"] = self.found["seconds"] - self.found["drawing"]
        self.found["rows_training"] = self.rows - self.found["rows_drawing"]
        self.say(self.found)

    def say(self, found: dict[str, Any]) -> None:
        print(json.dumps(found), file=self.answers, flush=True)

    def ended(self, loaded: int, base: Sequence[Tensor], adapter: Mapping[str, Tensor]) -> None:
        """The last line: bytes, types, and how far B of the adapter has come from 0.

        loaded: bytes before the first step; adapter: its B, by name.
        """
        found: dict[str, Any] = {"loaded": loaded, "peak": peak(self.device)}
        if self.device.type == "cuda":  # with the gaps between tensors
            found["reserved"] = torch.cuda.max_memory_reserved(self.device)
        found["moved"] = min(float(B.detach().abs().max()) for B in adapter.values())
        found["base"] = sorted({str(part.dtype).removeprefix("torch.") for part in base})
        found["adapter"] = sorted({str(B.dtype).removeprefix("torch.") for B in adapter.values()})
        found["of_ours"] = sorted(name for name in sys.modules if name.split(".")[0] in OF_OURS)
        self.say(found)


def own_turns(device: torch.device) -> Turns:
    """Of this process. What others print goes to standard error from now on."""
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    return Turns(device, sys.stdin, answers)


class Side:
    """A process that takes a step when it is asked."""

    def __init__(self, name: str, command: Sequence[str], environment: Mapping[str, str]):
        self.name = name
        self.process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            encoding="utf-8",
            env=os.environ | dict(environment),
        )

    def ask(self) -> dict[str, Any]:
        """One step."""
        assert self.process.stdin is not None
        self.process.stdin.write("go\n")
        self.process.stdin.flush()
        return self.hear()

    def hear(self) -> dict[str, Any]:
        """Its next line."""
        assert self.process.stdout is not None
        if not (line := self.process.stdout.readline()):
            code = self.process.wait()
            why = "it was killed, perhaps for want of memory" if code == -9 else "see above"
            raise Ended(f"{self.name} has ended with code {code}: {why}")
        return json.loads(line)

    def end(self) -> None:
        self.process.kill()
        self.process.communicate()
