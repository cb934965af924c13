"""judge.py: what is printed, JSON is one object, every mistake is one line and exit code 2."""

import io
import json
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
from fixtures import fresh
from judge_command import DRAFTS, EDMUND, ROOT, SCRIPT, caller, script
from rich.console import Console

from nanopersrm.judge.judge import Judge
from nanopersrm.judge.judgement import JudgedCandidate, Judgement
from nanopersrm.model.base import DEFAULT_BASE
from nanopersrm.style.evidence import NGRAMS, READING
from nanopersrm.style.ledger import SUM, CandidateReading, Line, Passage
from nanopersrm.style.phrases import Phrase, Word

FIELDS = {"candidates", "scores", "preference", "ranking", "verdict", "reasoning", "tokens"}
FIELDS |= {"prompt_tokens", "seconds", "replies", "notes"}
TEXTS = ("--exemplar", EDMUND, "--candidates", *DRAFTS)
RUDE = "One\x1b[2J\x1b]0;owned\x07 and\ttwo\r\x9b31m.\nThree.\x7f"
SHOWN = "One[2J]0;owned and\ttwo31m.\nThree."


@pytest.fixture(scope="module")
def tiny_judge(base) -> Judge:
    return fresh(base)


@pytest.fixture
def cli(monkeypatch, capsys, tiny_judge):
    return caller(monkeypatch, capsys, tiny_judge)


# What is printed


def test_json_is_one_object(cli):
    names = [*DRAFTS, EDMUND]
    arguments = ("--exemplar", EDMUND, "--candidates", *names, "--think-lines", "2", "--json")
    pairs = ("--mode", "pairwise", "--all-evidence")
    for flags, replies in (((), 3), (pairs, 6), (("--samples", "2", "--choose", "random"), 6)):
        code, out, error = cli(*arguments, *flags)
        assert (code, error, out.count("\n")) == (0, "", 1)
        record = json.loads(out)
        assert set(record) == FIELDS
        for name, score, known in zip(names, record["scores"], record["candidates"], strict=True):
            assert {*known} == {"name", "score", "ledger", "decibans", "measured", "reading"}
            assert (known["name"], known["score"]) == (name, score)
            assert {*known["ledger"][-1]} == {"feature", "writer", "candidate", "decibans", "words"}
            assert 1 <= score <= 9
        assert len(record["replies"]) == replies


def test_texts_come_from_files_folders_dividers_and_standard_input(cli, tmp_path):
    folder = tmp_path / "letters"
    folder.mkdir()
    (folder / "b.md").write_text("Second.\n---\n\nThird.\n")
    (folder / "a.txt").write_text("\ufeffFirst.\r\n", encoding="utf-8")
    (tmp_path / "q.txt").write_text("Why late?\n")
    question = ("--question", tmp_path / "q.txt", "--no-think", "--json")
    typed = "One — draft.\r\n---\r\nTwo\nlines.\n---\n".encode()
    code, out, error = cli("--exemplar", folder, EDMUND, *question, stdin=typed)
    assert code == 0, error
    exemplars, candidates, question = cli.calls[-1]
    assert exemplars[:3] == ["First.", "Second.", "Third."]
    assert (candidates, question) == (["One — draft.", "Two\nlines."], "Why late?")
    names = [candidate["name"] for candidate in json.loads(out)["candidates"]]
    assert names == ["candidate 1", "candidate 2"]


TEXT = "\n So \x1b[2Jno[/b] machine,\nwe    saw cool."
WORDS: list[Any] = [(2, 4, 0.1), (5, 15, 2.5), (16, 24, 1.5), (25, 27, -0.6), (31, 34, 3.0, True)]
PHRASES: list[Any] = [(5, 24, TEXT[5:24], 4.0), (31, 34, "saw", 3.0, True), (25, 27, "we", -0.6)]
READ = CandidateReading(0.3, 0.1, [Word(*x) for x in WORDS], [Phrase(*x) for x in PHRASES])
LEDGER = [
    Line(READING, None, 0.2, 6.1, (Passage(5, 24, TEXT[5:24], 4.0), Passage(25, 27, "we", -0.6))),
    Line(NGRAMS, None, 18.52, -2.0),
    Line("semicolons", 2.7, 0.0, -3.4),
    Line("commas", 8.8, 7.5, 0.2, (Passage(0, 1, "[red]a,", 0.1), Passage(0, 1, "x" * 61, 0.1))),
    Line(SUM, None, None, 0.9),
]


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({}, "So [+[2Jno[/b] machine,+]\n[-we-]    saw … (the rest was not read)"),
        (
            {"force_terminal": True, "color_system": "standard"},
            "So \x1b[1;32m[2Jno[/b]\x1b[0m \x1b[32mmachine,\x1b[0m\n"
            "\x1b[31mwe\x1b[0m    \x1b[2msaw\x1b[0m … (the rest was not read)",
        ),
    ],
    ids=["marked", "coloured"],
)
def test_words_that_sound_like_the_writer(settings, text):
    """What was not read is not shown, and a text is neither markup nor a command."""
    written = io.StringIO()
    out = Console(file=written, soft_wrap=True, highlight=False, **settings)
    script._print_reading(out, READ, TEXT)
    assert written.getvalue() == f"{text}\n"


def test_profile_ledgers_words_table_and_verdict(monkeypatch, capsys, tiny_judge):
    """In this order; a ledger shows the numbers as they are, and what a terminal would obey is in
    JSON alone: names, replies, notes ("[/red]" as markup would be an error)."""
    judge = Judge.judge

    def known(*arguments: Any, **named: Any) -> Judgement:
        judgement = judge(*arguments, **named)
        judgement.replies[0] = replace(judgement.replies[0], features=(), reasoning=RUDE)
        candidates = [JudgedCandidate(LEDGER, 6.8, 83.4, READ)] * 2
        return replace(judgement, notes=[RUDE], candidates=candidates)

    monkeypatch.setattr(Judge, "judge", known)
    monkeypatch.setattr(script, "expand", lambda paths, flag: [Path(path) for path in paths])
    monkeypatch.setattr(script, "read_file", lambda path: TEXT)
    cli, names = caller(monkeypatch, capsys, tiny_judge), ("[/red]\x1b[3m.txt", "b.txt")
    arguments = ("--exemplar", EDMUND, "--candidates", *names, "--think-lines", "1")
    code, out, error = cli(*arguments)
    assert (code, error) == (0, "")
    assert not set(out) & {"\x1b", "\x07", "\r", "\x7f", "\x9b"}
    lines = [" ".join(line.split()) for line in out.splitlines()]
    count = len(Path(EDMUND).read_text(encoding="utf-8").split())
    assert lines[0] == f"The writer, from 1 exemplar of {count} words"
    shown = [
        'reading +0.20 +6.1 "[2Jno[/b] machine,"',
        "n-grams 18.5% -2.0",
        "semicolons 0 writer 2.7 -3.4",
        'commas 7.5 writer 8.8 +0.2 "[red]a,"',
        "sum +0.9",
        "So [+[2Jno[/b] machine,+]",
    ]
    assert [lines.count(line) for line in shown] == [2] * 6
    first = lines.index(shown[0])
    assert lines[first : first + 6] == shown
    assert {lines[first - 1], "b.txt", "[/red][3m.txt"} == {"b.txt", "[/red][3m.txt"}
    row = next(i for i, line in enumerate(lines) if line.startswith("candidate score by all ev"))
    assert all("+6.8, 83%" in line for line in lines[row + 1 : row + 3])
    ends = ("closest to the writer: ", "a tie")
    verdict = next(i for i, line in enumerate(lines) if line.startswith(ends))
    assert first < lines.index("Three.") < row < verdict
    assert f"note: {SHOWN}".expandtabs() in out.expandtabs()
    record = json.loads(cli(*arguments, "--json")[1])
    assert record["candidates"][0]["name"] == names[0]
    assert record["candidates"][0]["reading"] == asdict(READ)
    assert record["replies"][0]["reasoning"] == record["notes"][0] == RUDE


def test_help_is_quick_and_complete():
    code = (
        "import runpy, sys, time; start = time.process_time(); sys.argv[1:] = ['--help']\n"
        f"try: runpy.run_path({str(SCRIPT)!r}, run_name='__main__')\n"
        "except SystemExit as error: assert not error.code\n"
        "print('torch' in sys.modules, time.process_time() - start, file=sys.stderr)"
    )
    environment = {"PATH": "", "COLUMNS": "200", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=environment, timeout=60
    )
    assert done.returncode == 0, done.stderr
    has_torch, seconds = done.stderr.split()
    assert has_torch == "False"
    assert float(seconds) < 3
    for field in script.Config.__dataclass_fields__:
        flag = "json" if field == "as_json" else field.replace("_", "-")
        assert f"--{flag}" in done.stdout


# Mistakes


@pytest.mark.parametrize(
    ("arguments", "stdin", "part"),
    [
        (["--exemplar", "nowhere.txt"], b"A draft.", "nowhere.txt"),
        (["--exemplar", "n" * 300], b"A draft.", "cannot be read"),
        ([], b"A draft.", "--exemplar"),
        (["--exemplar", EDMUND], b" \n", "found none"),
        (["--exemplar", EDMUND], b"\n---\n".join([b"Draft."] * 27), "27"),
        (["--exemplar", EDMUND, "--candidates", ""], b"", "--candidates"),
        (["--exemplar", EDMUND, "--candidates", DRAFTS[0], "--mode", "pairwise"], b"", "got 1"),
        ([*TEXTS, "--question", "no/such/question.txt"], b"", "No such file"),
        ([*TEXTS, "--samples", "0"], b"", "samples"),
        (["--batch", "in.jsonl"], b"", "--out"),
        (["--batch", "n" * 300, "--out", "out.jsonl"], b"", "n" * 300),
        (["--batch", "in.jsonl", "--out", "out.jsonl", "--json"], b"", "--json"),
        (["--batch", "in.jsonl", "--out", "o.jsonl", "--candidates", EDMUND], b"", "--candidates"),
        ([*TEXTS, "--base", "no-such-base"], b"", DEFAULT_BASE),
        ([*TEXTS, "--base", str(ROOT / "data")], b"", "config.json"),
        ([*TEXTS, "--adapter", "runs/mine"], b"", "runs/mine"),
        ([*TEXTS, "--adapter", str(ROOT / "data")], b"", "adapter_config.json"),
        ([*TEXTS, "--adapter", ""], b"", "--adapter"),
        ([*TEXTS, "--device", "nonsense"], b"", "nonsense"),
        ([*TEXTS, "--dtype", "int3"], b"", "int3"),
    ],
)
def test_mistakes(monkeypatch, capsys, tmp_path, arguments, stdin, part):
    monkeypatch.chdir(tmp_path)
    code, _, error = caller(monkeypatch, capsys)(*arguments, stdin=stdin)
    assert (code, error.count("\n")) == (2, 1), error
    assert error.startswith("judge.py: error:")
    assert part in error


def test_an_empty_batch_and_a_bad_line(cli, tmp_path):
    source, out = tmp_path / "in\x1b[2J.jsonl", tmp_path / "out\x1b[2J.jsonl"
    source.write_text('{"candidates": 7}\n')
    code, result, error = cli("--batch", source, "--out", out, "--exemplar", EDMUND)
    assert code == 1
    assert error.startswith(f"judge.py: {tmp_path}/in[2J.jsonl, line 1")
    assert result == f"{tmp_path}/out[2J.jsonl: 0 judged, 1 bad\n"
