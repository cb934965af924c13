"""judge.py for the tests, called in this process."""

import importlib.util
import io
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import tyro

from nanopersrm.judge.judge import Judge
from nanopersrm.judge.judgement import Judgement

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "judge.py"
DEMO = ROOT / "data" / "demo"
EDMUND = str(DEMO / "edmund" / "1.txt")
DRAFTS = [str(DEMO / "edmund" / "2.txt"), str(DEMO / "grubb" / "1.txt")]

spec = importlib.util.spec_from_file_location("judge_script", SCRIPT)
assert spec is not None
assert spec.loader is not None
script: Any = importlib.util.module_from_spec(spec)
sys.modules["judge_script"] = script  # dataclasses look their module up
spec.loader.exec_module(script)


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
