"""judge.py: what is printed, JSON is one object, every mistake is one line and exit code 2."""

import io
import json
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
from judge_command import DRAFTS, EDMUND, ROOT, SCRIPT, caller, script
from rich.console import Console

from nanopersrm.judge.judge import Judge
from nanopersrm.judge.judgement import CandidateReading, Judgement
from nanopersrm.model.base import DEFAULT_BASE
from nanopersrm.style.phrases import Phrase, Word

FIELDS = {"candidates", "scores", "preference", "ranking", "verdict", "reasoning"}
FIELDS |= {"well_formed", "tokens", "prompt_tokens", "seconds", "replies", "notes", "measured"}
FIELDS |= {"readings"}
TEXTS = ("--exemplar", EDMUND, "--candidates", *DRAFTS)
RUDE = "One\x1b[2J\x1b]0;owned\x07 and\ttwo\r\x9b31m.\nThree.\x7f"
SHOWN = "One[2J]0;owned and\ttwo31m.\nThree."


@pytest.fixture(scope="module")
def tiny_judge(base) -> Judge:
    return Judge.load(base.path, dtype="fp32")


@pytest.fixture
def cli(monkeypatch, capsys, tiny_judge):
    return caller(monkeypatch, capsys, tiny_judge)


# What is printed


def test_json_is_one_object(cli):
    names = [*DRAFTS, EDMUND]
    arguments = ("--exemplar", EDMUND, "--candidates", *names, "--think-tokens", "4", "--json")
    for flags, replies in (((), 3), (("--mode", "pairwise"), 6), (("--samples", "2"), 6)):
        code, out, error = cli(*arguments, *flags)
        assert (code, error, out.count("\n")) == (0, "", 1)
        record = json.loads(out)
        assert set(record) == FIELDS
        assert record["candidates"] == names
        assert len(record["replies"]) == replies
        assert all(1 <= score <= 9 for score in record["scores"])


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
    assert json.loads(out)["candidates"] == ["candidate 1", "candidate 2"]


def test_nothing_printed_is_markup_or_moves_the_terminal(monkeypatch, capsys, tiny_judge, tmp_path):
    """Names, replies and notes are whole in JSON alone; "[/red]" as markup would be an error."""
    judge = Judge.judge

    def rude(*arguments: Any, **named: Any) -> Judgement:
        judgement = judge(*arguments, **named)
        first = replace(judgement.replies[0], reasoning=RUDE, problem="\x1b[1m", claims=1)
        judgement.replies[0] = replace(first, untrue=("\x1b[5m",))
        return replace(judgement, notes=[RUDE])

    monkeypatch.setattr(Judge, "judge", rude)
    monkeypatch.chdir(tmp_path)
    cli = caller(monkeypatch, capsys, tiny_judge)
    (tmp_path / "[").mkdir()
    name = "[/red]draft\x1b[3m.txt"
    (tmp_path / name).write_text("[red]A draft.[/red] [/]", encoding="utf-8")
    arguments = ("--exemplar", EDMUND, "--candidates", name, *DRAFTS, "--no-think")
    code, out, error = cli(*arguments)
    assert (code, error) == (0, "")
    assert not set(out) & {"\x1b", "\x07", "\r", "\x7f", "\x9b"}
    assert f"note: {SHOWN}".expandtabs() in out.expandtabs()
    assert out.count("[/red]draft[3m.txt") >= 2  # above the reasoning and in the table
    record = json.loads(cli(*arguments, "--json")[1])
    assert record["candidates"][0] == name
    assert record["replies"][0]["reasoning"] == record["notes"][0] == RUDE


TEXT = "\n So \x1b[2Jno[/b] machine,\nwe    saw cool."
WORDS: list[Any] = [(2, 4, 0.1), (5, 15, 2.5), (16, 24, 1.5), (25, 27, -0.6), (31, 34, 3.0, True)]
PHRASES: list[Any] = [(5, 24, TEXT[5:24], 4.0), (31, 34, "saw", 3.0, True), (25, 27, "we", -0.6)]
READ = CandidateReading(0.3, 0.1, [Word(*x) for x in WORDS], [Phrase(*x) for x in PHRASES])


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
    assert written.getvalue() == (
        '  most like the writer:  "[2Jno[/b] machine," +4.0, "saw" +3.0 (topic)\n'
        '  least like the writer: "we" -0.6\n'
        "  reading +0.20 nats a token: +0.30 after the writer's texts, +0.10 they after it\n"
        f"{text}\n\n"
    )


def test_a_long_phrase_is_listed_in_part_and_none_is_said():
    written = io.StringIO()
    long = Phrase(0, 900, "x" * 900, -9.0)
    reading = CandidateReading(0.0, 0.0, [Word(0, 900, -9.0)], [long])
    script._print_reading(Console(file=written, width=2000), reading, "x" * 900)
    lines = written.getvalue().splitlines()
    assert lines[0].split() == ["most", "like", "the", "writer:", "nothing"]
    assert lines[1].endswith(f'"{"x" * script.LONGEST}…" -9.0')
    assert lines[3] == f"[-{'x' * 900}-]"


def test_profile_reasoning_table_words_and_verdict(monkeypatch, capsys, tiny_judge):
    """In this order; and a note of the judge."""
    judge = Judge.judge

    def read(*arguments: Any, **named: Any) -> Judgement:
        return replace(judge(*arguments, **named), readings=[READ, READ])

    monkeypatch.setattr(Judge, "judge", read)
    cli = caller(monkeypatch, capsys, tiny_judge)
    code, out, error = cli(*TEXTS, "--think-tokens", "6")
    lines = out.splitlines()
    assert (code, error) == (0, "")
    count = len(Path(EDMUND).read_text(encoding="utf-8").split())
    assert lines[0] == f"The writer, from 1 exemplar of {count} words"
    assert "not been trained" in out
    for name in DRAFTS:  # its reasoning, its row and its words
        assert sum(name in line for line in lines) >= 3
    table = next(i for i, line in enumerate(lines) if "score  fits better" in line)
    units = lines.index(script.NATS)
    ends = ("closest to the writer: ", "a tie")
    verdict = next(i for i, line in enumerate(lines) if line.startswith(ends))
    phrases = [i for i, line in enumerate(lines) if line.startswith("  most like the writer: ")]
    assert table < phrases[0] < phrases[1] < units < verdict
    assert sorted(lines[i - 1] for i in phrases) == sorted(DRAFTS)
    record = json.loads(cli(*TEXTS, "--no-think", "--json")[1])
    assert record["readings"] == [asdict(READ)] * 2


def streamed(*calls: tuple[int, str, bool], names: Any = ("a.txt", "b.txt")) -> list[str]:
    written = io.StringIO()
    out = Console(file=written, soft_wrap=True)
    stream = script.Stream(out, list(names), out.status(""))
    for candidate, text, ended in calls:
        stream((candidate,), text, ended)
    return written.getvalue().split()


@pytest.mark.parametrize(
    ("calls", "shown"),
    [
        (["", "Terse", "Terse writer.", "Terse writer.\n</thi", "Terse writer."], "Terse writer."),
        (["a <", "a <b", "a <b </"], "a <b </"),
        (["half \ufffd", "half é"], "half é"),
        ([RUDE[:end] for end in range(len(RUDE) + 1)], SHOWN),
    ],
)
def test_every_word_streams_once(calls, shown):
    ends = [(0, text, i == len(calls) - 1) for i, text in enumerate(calls)]
    assert streamed(*ends, names=["[/red]a\x1b[3m.txt"]) == ["[/red]a[3m.txt", *shown.split()]


def test_the_first_candidate_streams_first():
    shown = streamed((1, "two", False), (0, "one", False), (1, "two", True), (0, "one", True))
    assert shown == ["a.txt", "one", "b.txt", "two"]


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
