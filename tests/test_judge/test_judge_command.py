"""judge.py: what is printed, JSON is one object, every mistake is one line and exit code 2."""

import io
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import tyro
from fixtures import make_adapter, make_base
from judge_command import DRAFTS, EDMUND, ROOT, SCRIPT, caller, script, start
from rich.console import Console
from safetensors.torch import save_file

from nanopersrm.judge.judge import Judge
from nanopersrm.judge.judgement import Judgement
from nanopersrm.model.base import DEFAULT_BASE, resolve

FIELDS = {"candidates", "scores", "preference", "ranking", "verdict", "reasoning"}
FIELDS |= {"well_formed", "tokens", "prompt_tokens", "seconds", "replies", "notes", "measured"}
TEXTS = ("--exemplar", EDMUND, "--candidates", *DRAFTS)
RUDE = "One\x1b[2J\x1b]0;owned\x07 and\ttwo\r\x9b31m.\nThree.\x7f"
SHOWN = "One[2J]0;owned and\ttwo31m.\nThree."


@pytest.fixture(scope="module")
def tiny_folder(tmp_path_factory) -> Path:
    return make_base(tmp_path_factory.mktemp("cli") / "smollm", "smollm").path


@pytest.fixture(scope="module")
def tiny_judge(tiny_folder) -> Judge:
    return Judge.load(str(tiny_folder), dtype="fp32")


@pytest.fixture
def cli(monkeypatch, capsys, tiny_judge):
    return caller(monkeypatch, capsys, tiny_judge)


@pytest.fixture
def loading(monkeypatch, capsys):
    """`call` with the script's own loading."""
    return caller(monkeypatch, capsys)


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
    keys = {"candidates", "text", "reasoning", "problem", "cut"}
    keys |= {"claims", "claims_true", "untrue"}
    assert [set(reply) for reply in found["replies"]] == [keys] * 3
    for flags, replies in ((("--mode", "pairwise"), 6), (("--samples", "2"), 6)):
        _, out, _ = cli("--exemplar", EDMUND, "--candidates", *names, *quick, *flags)
        assert len(json.loads(out)["replies"]) == replies


def test_the_table_and_the_profile(cli):
    code, out, error = cli(*TEXTS, "--think-tokens", "6")
    assert (code, error) == (0, "")
    lines = out.splitlines()
    words = len(Path(EDMUND).read_text(encoding="utf-8").split())
    assert lines[0] == f"The writer, from 1 exemplar of {words} words"
    assert 1 <= next(i for i, line in enumerate(lines) if not line) - 1 <= script.HABITS
    for name in DRAFTS:
        assert sum(name in line for line in lines) >= 2  # its reasoning and its row
    assert any(line.startswith(("closest to the writer: ", "a tie")) for line in lines)
    assert "not been trained" in out


def test_texts_come_from_files_folders_dividers_and_standard_input(cli, tmp_path):
    folder = tmp_path / "letters"
    folder.mkdir()
    (folder / "b.md").write_text("Second.\n---\n\nThird.\n")
    (folder / "a.txt").write_text("\ufeffFirst.\r\n", encoding="utf-8")
    (folder / "c.pdf").write_bytes(b"\xff")
    (tmp_path / "q.txt").write_text("Why late?\n")
    question = ("--question", tmp_path / "q.txt", "--no-think", "--json")
    typed = "One — draft.\r\n---\r\nTwo\nlines.\n---\n".encode()
    code, out, error = cli("--exemplar", folder, EDMUND, *question, stdin=typed)
    assert code == 0, error
    exemplars, candidates, asked = cli.heard[-1]
    assert exemplars[:3] == ["First.", "Second.", "Third."]
    assert candidates == ["One — draft.", "Two\nlines."]
    assert asked == "Why late?"
    assert json.loads(out)["candidates"] == ["candidate 1", "candidate 2"]


@pytest.mark.parametrize("mode", ["pointwise", "pairwise"])
def test_brackets_are_not_markup(cli, tmp_path, monkeypatch, mode):
    """Also a closing tag, which as markup is an error: a folder "[" with a file "red].txt"."""
    monkeypatch.chdir(tmp_path)
    names = ["[red]a.txt", "b [link=x].txt", "[/red].txt"]
    (tmp_path / "[").mkdir()
    for i, name in enumerate(names):
        (tmp_path / name).write_text(f"[red]No[/red] [/] draft {i} [link=x]", encoding="utf-8")
    flags = ("--think-tokens", "4", "--mode", mode)
    code, out, error = cli("--exemplar", EDMUND, "--candidates", *names, *flags)
    assert code == 0, error
    reasons, table = out.split("fits better than the next")
    for name in names:
        assert name in reasons
        assert name in table.split("closest to the writer: ")[0]


def test_nothing_printed_moves_the_terminal(monkeypatch, capsys, tiny_judge, tmp_path):
    """Replies, problems and notes with what a terminal would obey are whole in JSON alone."""
    judged = Judge.judge

    def rude(*given: Any, **named: Any) -> Judgement:
        found = judged(*given, **named)
        first = replace(found.replies[0], reasoning=RUDE, problem="\x1b[1m", claims=1)
        found.replies[0] = replace(first, untrue=("\x1b[5m",))
        return replace(found, notes=[RUDE])

    monkeypatch.setattr(Judge, "judge", rude)
    cli = caller(monkeypatch, capsys, tiny_judge)
    named = tmp_path / "draft\x1b[3m.txt"
    named.write_text("A draft.", encoding="utf-8")
    arguments = ("--exemplar", EDMUND, "--candidates", named, *DRAFTS, "--no-think")
    code, out, error = cli(*arguments)
    assert (code, error) == (0, "")
    assert not set(out) & {"\x1b", "\x07", "\r", "\x7f", "\x9b"}
    assert f"note: {SHOWN}".expandtabs() in out.expandtabs()
    assert out.count("draft[3m.txt") >= 2  # above the reasoning and in the table
    found = json.loads(cli(*arguments, "--json")[1])
    assert found["candidates"][0] == str(named)
    assert found["replies"][0]["reasoning"] == found["notes"][0] == RUDE


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
        (["[red]x", "[red]x[/red] y"], "[red]x[/red] y"),
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


@pytest.mark.base
def test_the_real_base_in_a_process_of_its_own():
    resolve(DEFAULT_BASE)
    arguments = ("--exemplar", EDMUND, "--no-think", "--no-evidence", "--json")
    done = start(*arguments, stdin="Come at once, sir.\n---\nlol ok")
    assert (done.returncode, done.stderr) == (0, "")
    found = json.loads(done.stdout)
    assert set(found) == FIELDS
    assert (found["tokens"], found["well_formed"]) == (2, True)


# Mistakes


def refused(result: tuple[int, str, str], *parts: str) -> None:
    code, _, error = result
    assert code == 2, error
    assert error.startswith("judge.py: error:")
    assert error.count("\n") == 1
    assert error.endswith("\n")
    for part in parts:
        assert part in error, error


@pytest.mark.parametrize(
    ("arguments", "stdin", "part"),
    [
        (["--exemplar", "nowhere.txt"], b"A draft.", "nowhere.txt"),
        (["--exemplar", ""], b"A draft.", "--exemplar"),
        ([], b"A draft.", "--exemplar"),
        (["--exemplar", EDMUND], b" \n", "found none"),
        (["--exemplar", EDMUND], b"\xff", "UTF-8"),
        (["--exemplar", EDMUND], b"\n---\n".join([b"Draft."] * 27), "27"),
        (["--exemplar", EDMUND, "--candidates", ""], b"", "--candidates"),
        (["--exemplar", EDMUND, "--candidates", *DRAFTS[:1] * 27], b"", "27"),
        (["--exemplar", EDMUND, "--candidates", DRAFTS[0], "--mode", "pairwise"], b"", "got 1"),
        ([*TEXTS, "--question", " "], b"", "--question"),
        ([*TEXTS, "--question", "no/such/question.txt"], b"", "no such file"),
        ([*TEXTS, "--samples", "0"], b"", "samples"),
        ([*TEXTS, "--think-tokens", "-3"], b"", "think_tokens"),
        ([*TEXTS, "--temperature", "nan"], b"", "temperature"),
        (["--batch", "in.jsonl"], b"", "--out"),
        (["--batch", "in.jsonl", "--out", "out.jsonl", "--json"], b"", "--json"),
        (["--batch", "in.jsonl", "--out", "o.jsonl", "--candidates", EDMUND], b"", "--candidates"),
        ([*TEXTS, "--base", "no-such-base"], b"", DEFAULT_BASE),
        ([*TEXTS, "--base", str(ROOT / "data")], b"", "config.json"),
        ([*TEXTS, "--adapter", "runs/mine"], b"", "no such folder"),
        ([*TEXTS, "--adapter", str(ROOT / "data")], b"", "adapter_config.json"),
        ([*TEXTS, "--adapter", ""], b"", "--adapter"),
        ([*TEXTS, "--device", "nonsense"], b"", "nonsense"),
        ([*TEXTS, "--dtype", "int3"], b"", "int3"),
    ],
)
def test_mistakes(loading, tmp_path, monkeypatch, arguments, stdin, part):
    monkeypatch.chdir(tmp_path)
    refused(loading(*arguments, stdin=stdin), part)
    assert not loading.heard


def test_an_adapter_of_another_base_says_which(loading, tiny_folder, tmp_path):
    made = make_adapter(tmp_path, resolve(str(tiny_folder)))
    refused(loading(*TEXTS, "--adapter", made), str(made), f"--base {tiny_folder}")


def test_refused_folders(loading, tiny_folder, tmp_path):
    def copied(name: str) -> Path:
        (tmp_path / name).mkdir()
        for file in tiny_folder.iterdir():
            (tmp_path / name / file.name).write_bytes(file.read_bytes())
        return tmp_path / name

    shard = copied("cut") / "model.safetensors"
    shard.write_bytes(shard.read_bytes()[:-1000])
    config = copied("family") / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"model_type": "gpt2"}))
    (copied("broken") / "config.json").write_text("{")
    copied("weightless").joinpath("model.safetensors").unlink()
    copied("speechless").joinpath("tokenizer.json").unlink()
    save_file({"x": torch.ones(2)}, copied("other") / "model.safetensors")
    parts = {"cut": "model.safetensors", "family": "'gpt2'", "broken": "line 1"}
    parts |= {"weightless": "safetensors", "speechless": "tokenizer.json", "other": "x"}
    for name, part in parts.items():
        refused(loading(*TEXTS, "--base", tmp_path / name), name, part)


@pytest.fixture(params=["long", "loop"])
def unreachable(request, tmp_path) -> Path:
    """A folder about whose contents nothing can be known."""
    place = tmp_path / ("n" * 300 if request.param == "long" else request.param)
    if request.param == "loop":
        os.symlink(place, place)
    return place


@pytest.mark.parametrize("flag", ["exemplar", "candidates", "adapter", "base", "batch", "out"])
def test_what_cannot_be_looked_up_is_a_line(loading, unreachable, tmp_path, flag):
    lines = tmp_path / "in.jsonl"
    lines.write_text(json.dumps({"candidates": ["A draft."]}) + "\n")
    given: dict[str, object] = {"exemplar": EDMUND}
    if flag in ("batch", "out"):
        given |= {"batch": lines, "out": tmp_path / "out.jsonl", flag: unreachable / "x.jsonl"}
    else:
        given |= {"candidates": DRAFTS[0], flag: unreachable / "inside"}
    arguments = [part for name, value in given.items() for part in (f"--{name}", value)]
    refused(loading(*arguments), str(unreachable))


def test_an_empty_batch_and_a_bad_line(cli, tmp_path):
    source, out = tmp_path / "in\x1b[2J.jsonl", tmp_path / "out\x1b[2J.jsonl"
    source.write_text('{"candidates": 7}\n')
    code, result, error = cli("--batch", source, "--out", out, "--exemplar", EDMUND)
    assert code == 1
    assert error.startswith(f"judge.py: {tmp_path}/in[2J.jsonl, line 1")
    assert result == f"{tmp_path}/out[2J.jsonl: 0 judged, 1 bad\n"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("streams", "part"),
    [
        ("--json <&-", "standard input: closed"),
        ("--json 0>/dev/null", "standard input: cannot be read"),
    ],
)
def test_standard_input_that_is_closed(streams, part):
    command = f"{sys.executable} {SCRIPT} --exemplar {EDMUND} {streams}"
    done = subprocess.run(command, shell=True, cwd=ROOT, capture_output=True, text=True)
    refused((done.returncode, done.stdout, done.stderr), part)
    assert "Traceback" not in done.stderr


def test_unknown_flags_fail():
    with pytest.raises(SystemExit) as caught:
        tyro.cli(script.Config, args=["--exemplar", EDMUND, "--colour", "red"])
    assert caught.value.code == 2
