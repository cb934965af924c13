"""judge.py as its users meet it: what is printed, and JSON is one object.

Most cases call `run` in this process with a base that is loaded once; a few start the script.
"""

import importlib.util
import io
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tyro
from fake_judge import FakeJudge
from fixtures import make_adapter, make_base
from rich.console import Console

from nanopersrm.judge.judge import Judge
from nanopersrm.judge.judgement import Judgement
from nanopersrm.model.base import DEFAULT_BASE, resolve

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "judge.py"
DEMO = ROOT / "data" / "demo"
EDMUND = str(DEMO / "edmund" / "1.txt")
DRAFTS = [str(DEMO / "edmund" / "2.txt"), str(DEMO / "grubb" / "1.txt")]
FIELDS = {"candidates", "scores", "preference", "ranking", "verdict", "reasoning"}
FIELDS |= {"well_formed", "tokens", "prompt_tokens", "seconds", "replies", "notes", "measured"}

spec = importlib.util.spec_from_file_location("judge_script", SCRIPT)
assert spec is not None
assert spec.loader is not None
script: Any = importlib.util.module_from_spec(spec)
sys.modules["judge_script"] = script  # dataclasses look their module up
spec.loader.exec_module(script)


class Pipe:
    """Standard input that is not a terminal."""

    def __init__(self, data: bytes):
        self.buffer = io.BytesIO(data)

    def isatty(self) -> bool:
        return False


@pytest.fixture(scope="module")
def tiny_folder(tmp_path_factory) -> Path:
    return make_base(tmp_path_factory.mktemp("cli") / "smollm", "smollm").path


@pytest.fixture(scope="module")
def tiny_judge(tiny_folder) -> Judge:
    return Judge.load(str(tiny_folder), dtype="fp32")


def caller(monkeypatch, capsys, judge: Judge) -> Any:
    """call(*arguments, stdin=…) -> (exit code, stdout, stderr), with a judge loaded before."""
    heard: list[tuple[list[str], list[str], str | None]] = []

    def call(*arguments: object, stdin: bytes = b"") -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "stdin", Pipe(stdin))
        monkeypatch.setattr(Judge, "load", staticmethod(lambda *a, **k: judge))
        judged = Judge.judge

        def listening(self, exemplars, candidates, question=None, *rest, **named) -> Judgement:
            heard.append((list(exemplars), list(candidates), question))
            return judged(self, exemplars, candidates, question, *rest, **named)

        with monkeypatch.context() as patch:
            patch.setattr(Judge, "judge", listening)
            code = script.run(tyro.cli(script.Config, args=[str(a) for a in arguments]))
        return code, *capsys.readouterr()

    call.heard = heard  # type: ignore[attr-defined]
    return call


@pytest.fixture
def cli(monkeypatch, capsys, tiny_judge):
    return caller(monkeypatch, capsys, tiny_judge)


def start(*arguments: object, stdin: str = "") -> subprocess.CompletedProcess[str]:
    """The script in a process of its own, from another folder."""
    return subprocess.run(
        [sys.executable, str(SCRIPT), *map(str, arguments)],
        input=stdin,
        capture_output=True,
        text=True,
        timeout=120,
        cwd="/",
    )


# What is printed


def test_json_is_one_object(cli):
    names = [*DRAFTS, EDMUND]
    quick = ("--think-tokens", "4", "--json")
    code, out, error = cli("--exemplar", EDMUND, "--candidates", *names, *quick)
    assert (code, error) == (0, "")
    assert out.count("\n") == 1
    found = json.loads(out)
    assert set(found) == FIELDS
    assert found["candidates"] == names
    assert [len(found[key]) for key in ("scores", "preference", "ranking")] == [3, 3, 3]
    assert all(1 <= score <= 9 for score in found["scores"])
    assert sorted(found["ranking"]) == [0, 1, 2]
    assert found["verdict"] in ("tie", 0, 1, 2)
    assert found["well_formed"] is True
    keys = {"candidates", "text", "reasoning", "problem", "cut"}
    keys |= {"claims", "claims_true", "untrue"}
    assert all(set(reply) == keys for reply in found["replies"])
    assert len(found["replies"]) == 3
    for flags, replies in ((("--mode", "pairwise"), 6), (("--samples", "2"), 6)):
        _, out, _ = cli("--exemplar", EDMUND, "--candidates", *names, *quick, *flags)
        assert len(json.loads(out)["replies"]) == replies


def test_the_table_and_the_profile(cli):
    code, out, error = cli("--exemplar", EDMUND, "--candidates", *DRAFTS, "--think-tokens", "6")
    assert (code, error) == (0, "")
    lines = out.splitlines()
    words = len(Path(EDMUND).read_text(encoding="utf-8").split())
    assert lines[0] == f"The writer, from 1 exemplar of {words} words"
    assert 1 <= next(i for i, line in enumerate(lines) if not line) - 1 <= script.HABITS
    for name in DRAFTS:
        assert sum(name in line for line in lines) >= 2  # its reasoning and its row
    assert any(line.startswith(("closest to the writer: ", "a tie")) for line in lines)
    assert "tokens drawn" in lines[-1]
    assert "not been trained" in out


def test_an_adapter_in_a_process_of_its_own(tiny_folder, tmp_path):
    made = make_adapter(tmp_path, resolve(str(tiny_folder)))
    done = start(
        *("--exemplar", EDMUND, "--candidates", *DRAFTS, "--no-think"),
        *("--base", tiny_folder, "--adapter", made, "--dtype", "fp32"),
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert "not been trained" not in done.stdout
    assert "note:" not in done.stdout


def test_exemplars_from_files_folders_and_dividers(cli, tmp_path):
    folder = tmp_path / "letters"
    folder.mkdir()
    (folder / "b.md").write_text("Second.\n---\n\nThird.\n")
    (folder / "a.txt").write_text("\ufeffFirst.\r\n", encoding="utf-8")
    (folder / "c.pdf").write_bytes(b"\xff")
    (tmp_path / "more.txt").write_text("Fourth.\n  ---  \nFifth.")
    code, _, error = cli(
        "--exemplar", folder, tmp_path / "more.txt", "--candidates", *DRAFTS, "--no-think"
    )
    assert code == 0, error
    exemplars, candidates, _ = cli.heard[-1]
    assert exemplars == ["First.", "Second.", "Third.", "Fourth.", "Fifth."]
    assert candidates == [Path(path).read_text(encoding="utf-8") for path in DRAFTS]


def test_candidates_from_standard_input(cli):
    typed = "One — draft.\r\n---\r\nTwo\nlines.\n---\n".encode()
    code, out, error = cli("--exemplar", EDMUND, "--no-think", "--json", stdin=typed)
    assert code == 0, error
    assert cli.heard[-1][1] == ["One — draft.", "Two\nlines."]
    assert json.loads(out)["candidates"] == ["candidate 1", "candidate 2"]


def test_a_question_as_text_or_file(cli, tmp_path):
    (tmp_path / "q.txt").write_text("Why late?\n")
    for given, expected in (
        (tmp_path / "q.txt", "Why late?"),
        ("Why, sir?", "Why, sir?"),
        ("Why?\nReally.", "Why?\nReally."),
        ("long " * 100, ("long " * 100).strip()),
    ):
        arguments = ("--exemplar", EDMUND, "--candidates", DRAFTS[0], "--no-think")
        code, _, error = cli(*arguments, "--question", given)
        assert code == 0, error
        assert cli.heard[-1][2] == expected


def test_brackets_in_texts_are_not_markup(cli, tmp_path):
    (tmp_path / "x.txt").write_text("[red]No[/red] [/] markup [link=x]", encoding="utf-8")
    code, out, error = cli(
        "--exemplar", tmp_path / "x.txt", "--candidates", tmp_path / "x.txt", "--think-tokens", "5"
    )
    assert code == 0, error
    assert str(tmp_path / "x.txt") in out


@pytest.mark.parametrize("mode", ["pointwise", "pairwise"])
def test_brackets_in_names_are_not_markup(cli, tmp_path, monkeypatch, mode):
    """Also a closing tag, which as markup is an error: a folder "[" with a file "red].txt"."""
    monkeypatch.chdir(tmp_path)
    names = ["[red]a.txt", "b [link=x].txt", "[/red].txt"]
    (tmp_path / "[").mkdir()
    for i, name in enumerate(names):
        (tmp_path / name).write_text(f"Draft {i}, as it stands.", encoding="utf-8")
    flags = ("--think-tokens", "4", "--mode", mode)
    code, out, error = cli("--exemplar", EDMUND, "--candidates", *names, *flags)
    assert code == 0, error
    reasons, table = out.split("fits better than the next")
    for name in names:
        assert name in reasons
        assert name in table.split("closest to the writer: ")[0]
    assert any(
        line == f"closest to the writer: {name}" for name in names for line in table.split("\n")
    )


def test_brackets_in_names_are_not_markup_while_streaming():
    written = io.StringIO()
    out = Console(file=written, soft_wrap=True)
    follow = script._Follower(out, ["[red]a.txt", "[/red].txt"], out.status(""))
    follow((0,), "One.", True)
    follow((1,), "Two.", True)
    assert written.getvalue().split() == ["[red]a.txt", "One.", "[/red].txt", "Two."]


@pytest.mark.parametrize("measured", [None, [91.27, 3.0]])
def test_what_is_measured_stands_beside_the_score(measured):
    found = FakeJudge().judge(("It rained; I stayed.",), ("Rain; I read.", "lol rain"))
    written = io.StringIO()
    script._print_judgement(
        Console(file=written, width=100),
        replace(found, measured=measured, ranking=[1, 0]),
        ["a.txt", "b.txt"],
        True,
    )
    said = written.getvalue()
    assert ("by measurement alone" in said) == (measured is not None)
    rows = [line.split() for line in said.splitlines() if "b.txt" in line or "a.txt" in line]
    assert [row[3:4] == ["3.0%"] for row in rows[:1]] == [measured is not None]
    assert ("91.3%" in said) == (measured is not None)


def test_help_is_quick_and_complete():
    code = (
        "import runpy, sys, time; start = time.perf_counter(); sys.argv[1:] = ['--help']\n"
        f"try: runpy.run_path({str(SCRIPT)!r}, run_name='__main__')\n"
        "except SystemExit as error: assert not error.code\n"
        "print('torch' in sys.modules, time.perf_counter() - start, file=sys.stderr)"
    )
    environment = {"PATH": "", "COLUMNS": "200", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=environment, timeout=60
    )
    assert done.returncode == 0, done.stderr
    has_torch, seconds = done.stderr.split()
    assert has_torch == "False"
    assert float(seconds) < 3
    for flag in ("exemplar", "candidates", "question", "principle", "mode", "evidence", "samples"):
        assert f"--{flag}" in done.stdout
    for flag in ("think", "think-tokens", "temperature", "seed", "json", "base", "adapter", "ray"):
        assert f"--{flag}" in done.stdout
    for flag in ("device", "dtype", "no-think", "no-evidence", "no-copy-quotes", "batch", "out"):
        assert f"--{flag}" in done.stdout
    assert len(script.Config.__dataclass_fields__) == 20  # a new flag belongs above


@pytest.mark.base
def test_the_real_base_in_a_process_of_its_own():
    resolve(DEFAULT_BASE)
    arguments = ("--exemplar", EDMUND, "--no-think", "--no-evidence", "--json")
    done = start(*arguments, stdin="Come at once, sir.\n---\nlol ok")
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    found = json.loads(done.stdout)
    assert set(found) == FIELDS
    assert found["tokens"] == 2
    assert found["well_formed"] is True
