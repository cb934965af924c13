"""judge.py for the tests, called in this process."""

import io
import sys
from types import SimpleNamespace
from typing import Any

import tyro
from training_runs import ROOT, load_script

from nanopersrm.judge.judge import Judge
from nanopersrm.judge.judgement import Judgement

SCRIPT = ROOT / "judge.py"
DEMO = ROOT / "data" / "demo"
EDMUND = str(DEMO / "edmund" / "1.txt")
DRAFTS = [str(DEMO / "edmund" / "2.txt"), str(DEMO / "grubb" / "1.txt")]

script = load_script("judge")


def caller(monkeypatch, capsys, judge: Judge | None = None) -> Any:
    """call(*arguments, stdin=…) -> (exit code, stdout, stderr); without a judge, judge.py loads."""
    calls: list[tuple[list[str], list[str], str | None]] = []
    judge_texts = Judge.judge

    def recorded(self, exemplars, candidates, question=None, *rest, **named) -> Judgement:
        calls.append((list(exemplars), list(candidates), question))
        return judge_texts(self, exemplars, candidates, question, *rest, **named)

    def call(*arguments: object, stdin: bytes = b"") -> tuple[int, str, str]:
        pipe = SimpleNamespace(buffer=io.BytesIO(stdin), isatty=lambda: False)
        with monkeypatch.context() as patch:
            patch.setattr(sys, "stdin", pipe)
            patch.setattr(Judge, "judge", recorded)
            if judge is not None:
                patch.setattr(Judge, "load", staticmethod(lambda *_, **__: judge))
            code = script.run(tyro.cli(script.Config, args=[str(a) for a in arguments]))
        return code, *capsys.readouterr()

    call.calls = calls  # type: ignore[attr-defined]
    return call
