"""What strangers wrote moves no terminal: control characters are in the JSON and nowhere else."""

import io
import json
from dataclasses import replace
from typing import Any

import pytest
from rich.console import Console
from test_cli import DRAFTS, EDMUND, caller, script
from test_cli import tiny_folder as tiny_folder
from test_cli import tiny_judge as tiny_judge

from nanopersrm.judge.judge import Judge
from nanopersrm.judge.judgement import Judgement

RUDE = "One\x1b[2J\x1b]0;owned\x07 and\ttwo\r\x9b31m.\nThree.\x7f"
SHOWN = "One[2J]0;owned and\ttwo31m.\nThree."


@pytest.fixture
def cli(monkeypatch, capsys, tiny_judge):
    """A judge whose replies, problems and notes have what a terminal would obey."""
    judged = Judge.judge

    def rude(*given: Any, **named: Any) -> Judgement:
        found = judged(*given, **named)
        first = replace(found.replies[0], reasoning=RUDE, problem="\x1b[1m", claims=1)
        found.replies[0] = replace(first, untrue=("\x1b[5m",))
        return replace(found, notes=[RUDE])

    monkeypatch.setattr(Judge, "judge", rude)
    return caller(monkeypatch, capsys, tiny_judge)


def test_nothing_printed_moves_the_terminal(cli, tmp_path):
    named = tmp_path / "draft\x1b[3m.txt"
    named.write_text("A draft.", encoding="utf-8")
    arguments = ("--exemplar", EDMUND, "--candidates", named, *DRAFTS, "--no-think")
    code, out, error = cli(*arguments)
    assert (code, error) == (0, "")
    assert not set(out) & {"\x1b", "\x07", "\r", "\x7f", "\x9b"}
    assert SHOWN.expandtabs() in out.expandtabs()
    assert f"note: {SHOWN}".expandtabs() in out.expandtabs()
    assert out.count("draft[3m.txt") >= 2  # above the reasoning and in the table
    code, out, _ = cli(*arguments, "--json")
    found = json.loads(out)
    assert code == 0
    assert found["candidates"][0] == str(named)
    assert found["replies"][0]["reasoning"] == found["notes"][0] == RUDE


def test_what_streams_moves_no_terminal():
    """Nor does what is dropped shift what comes after it."""
    written = io.StringIO()
    out = Console(file=written, soft_wrap=True)
    follow = script._Follower(out, ["a\x1b[3m.txt"], out.status(""))
    for end in range(len(RUDE) + 1):
        follow((0,), RUDE[:end], end == len(RUDE))
    said = written.getvalue().expandtabs()
    assert said.split() == f"a[3m.txt\n{SHOWN}".split()


def test_a_bad_line_and_the_end_of_a_batch(cli, tmp_path):
    source, out = tmp_path / "in\x1b[2J.jsonl", tmp_path / "out\x1b[2J.jsonl"
    source.write_text('{"candidates": 7}\n')
    code, said, error = cli("--batch", source, "--out", out, "--exemplar", EDMUND)
    assert code == 1
    assert error.startswith(f"judge.py: {tmp_path}/in[2J.jsonl, line 1")
    assert said == f"{tmp_path}/out[2J.jsonl: 0 judged, 1 bad\n"
