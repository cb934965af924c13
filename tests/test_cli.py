"""judge.py as its users meet it: every mistake is one line and exit code 2, JSON is one object.

Most cases call `run` in this process with a base that is loaded once; a few start the script.
"""

import importlib.util
import io
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import tyro
from safetensors.torch import save_file
from test_answer import make_base

from nanopersrm.bases import DEFAULT_BASE, resolve
from nanopersrm.judge import Judge
from nanopersrm.judgement import Judgement

ROOT = Path(__file__).parents[1]
SCRIPT = ROOT / "judge.py"
DEMO = ROOT / "data" / "demo"
EDMUND = str(DEMO / "edmund" / "1.txt")
DRAFTS = [str(DEMO / "edmund" / "2.txt"), str(DEMO / "grubb" / "1.txt")]
FIELDS = {"candidates", "scores", "preference", "ranking", "verdict", "reasoning"}
FIELDS |= {"well_formed", "tokens", "prompt_tokens", "seconds", "replies", "notes"}

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


@pytest.fixture
def cli(monkeypatch, capsys, tiny_judge):
    """call(*arguments, stdin=…) -> (exit code, stdout, stderr), on a tiny base loaded once."""
    heard: list[tuple[list[str], list[str], str | None]] = []

    def call(*arguments: object, stdin: bytes = b"") -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "stdin", Pipe(stdin))
        monkeypatch.setattr(Judge, "load", staticmethod(lambda *a, **k: tiny_judge))
        judge = Judge.judge

        def listening(self, exemplars, candidates, question=None, *rest, **named) -> Judgement:
            heard.append((list(exemplars), list(candidates), question))
            return judge(self, exemplars, candidates, question, *rest, **named)

        with monkeypatch.context() as patch:
            patch.setattr(Judge, "judge", listening)
            code = script.run(tyro.cli(script.Config, args=[str(a) for a in arguments]))
        return code, *capsys.readouterr()

    call.heard = heard  # type: ignore[attr-defined]
    return call


@pytest.fixture
def really(monkeypatch, capsys):
    """The same with the script's own loading."""

    def call(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "stdin", Pipe(b"A draft."))
        code = script.run(tyro.cli(script.Config, args=[str(a) for a in arguments]))
        return code, *capsys.readouterr()

    return call


def refused(result: tuple[int, str, str], *parts: str) -> None:
    code, _, error = result
    assert code == 2, error
    assert error.startswith("judge.py: error:")
    assert error.count("\n") == 1
    assert error.endswith("\n")
    for part in parts:
        assert part in error, error


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


# Mistakes


def test_refused_files(cli, tmp_path):
    files = {"empty.txt": b"", "blank.txt": b" \n\n", "latin.txt": b"fine\nbl\xe4h\n"}
    files |= {"zero.txt": b"a\0b", "only.txt": b"---\n---\n", "utf16.txt": "hé".encode("utf-16")}
    for name, data in files.items():
        (tmp_path / name).write_bytes(data)
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "notes.pdf").write_bytes(b"%PDF")
    bad = [
        ("nowhere.txt", ["no such file"]),
        ("empty.txt", ["empty"]),
        ("blank.txt", ["empty"]),
        ("latin.txt", ["line 2", "UTF-8", "0xe4"]),
        ("utf16.txt", ["UTF-8"]),
        ("zero.txt", ["zero byte"]),
    ]
    for name, parts in bad:
        path = tmp_path / name
        refused(cli("--exemplar", path, "--candidates", *DRAFTS), str(path), *parts)
        refused(cli("--exemplar", EDMUND, "--candidates", *DRAFTS, path), str(path), *parts)
    for name in ("only.txt", "folder"):
        path = tmp_path / name
        refused(cli("--exemplar", path, "--candidates", *DRAFTS), str(path))
    refused(cli("--exemplar", EDMUND, "--candidates", tmp_path / "folder"), "folder")
    refused(cli("--exemplar", EDMUND, "--candidates", *DRAFTS, "--question", " "), "--question")
    empty = ("--question", tmp_path / "empty.txt")
    refused(cli("--exemplar", EDMUND, "--candidates", *DRAFTS, *empty), "empty.txt")
    assert not cli.heard


def test_refused_numbers_of_candidates(cli):
    for nothing in (b"", b" \n", b"---\n---\n"):
        refused(cli("--exemplar", EDMUND, stdin=nothing), "standard input", "found none")
    refused(cli("--exemplar", EDMUND, stdin=b"\xff"), "standard input, line 1", "UTF-8")
    many = "\n---\n".join(f"Draft {i}." for i in range(27)).encode()
    refused(cli("--exemplar", EDMUND, stdin=many), "27")
    refused(cli("--exemplar", EDMUND, "--candidates", *DRAFTS[:1] * 27), "27")
    pairs = ("--mode", "pairwise", "--candidates", DRAFTS[0])
    refused(cli("--exemplar", EDMUND, *pairs), "expected 2", "got 1")


def test_refused_settings(cli):
    for flag, value in (
        ("--samples", "0"),
        ("--think-tokens", "-3"),
        ("--temperature", "-1"),
        ("--temperature", "nan"),
    ):
        name = flag.strip("-").replace("-", "_")
        refused(cli("--exemplar", EDMUND, "--candidates", *DRAFTS, flag, value), name)


def test_refused_by_the_loader(really, tmp_path):
    drafts = ("--exemplar", EDMUND, "--candidates", *DRAFTS)
    refused(really(*drafts, "--base", "no-such-base"), "'no-such-base'", DEFAULT_BASE)
    refused(really(*drafts, "--base", tmp_path), str(tmp_path), "config.json")
    refused(really(*drafts, "--adapter", "runs/mine"), "runs/mine")
    refused(really(*drafts, "--device", "nonsense"), "nonsense")
    refused(really(*drafts, "--device", "mps"), "mps")
    refused(really(*drafts, "--dtype", "int3"), "int3")


def test_refused_folders(really, tiny_folder, tmp_path):
    def call(change: str) -> tuple[int, str, str]:
        return really("--exemplar", EDMUND, "--base", tmp_path / change)

    def copied(name: str) -> Path:
        (tmp_path / name).mkdir()
        for file in tiny_folder.iterdir():
            (tmp_path / name / file.name).write_bytes(file.read_bytes())
        return tmp_path / name

    shard = copied("cut") / "model.safetensors"
    shard.write_bytes(shard.read_bytes()[:-1000])
    refused(call("cut"), str(shard))
    config = copied("family") / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"model_type": "gpt2"}))
    refused(call("family"), str(config), "'gpt2'")
    config = copied("broken") / "config.json"
    config.write_text("{")
    refused(call("broken"), str(config), "line 1")
    copied("weightless").joinpath("model.safetensors").unlink()
    refused(call("weightless"), "weightless", "safetensors")
    copied("speechless").joinpath("tokenizer.json").unlink()
    refused(call("speechless"), "speechless", "tokenizer.json")
    save_file({"x": torch.ones(2)}, copied("other") / "model.safetensors")
    refused(call("other"), "other", "x")


@pytest.mark.base
def test_refused_gguf_files(really, smollm, tmp_path):
    """Cut short, cut in the header, a damaged header, another family, and no GGUF at all."""
    data = smollm.path.read_bytes()[: 8 << 20]
    family = data.index(b"llama")
    for name, content in (
        ("short", data),
        ("header", data[:5000]),
        ("damaged", data[:24] + b"\xff" * 8 + data[32:]),
        ("mamba", data[:family] + b"mamba" + data[family + 5 :]),
        ("text", b"not a model"),
        ("nothing", b""),
    ):
        path = tmp_path / f"{name}.gguf"
        path.write_bytes(content)
        refused(really("--exemplar", EDMUND, "--base", path), str(path))


def test_a_mistake_in_a_process_of_its_own():
    done = start("--exemplar", "/nowhere.txt", stdin="A draft.")
    refused((done.returncode, done.stdout, done.stderr), "/nowhere.txt")
    assert "Traceback" not in done.stderr


def test_unknown_flags_fail():
    with pytest.raises(SystemExit) as caught:
        tyro.cli(script.Config, args=["--exemplar", EDMUND, "--colour", "red"])
    assert caught.value.code == 2
    with pytest.raises(SystemExit) as caught:
        tyro.cli(script.Config, args=["--candidates", EDMUND])  # no exemplar
    assert caught.value.code == 2


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
    for flag in ("think", "think-tokens", "temperature", "seed", "json", "base", "adapter"):
        assert f"--{flag}" in done.stdout
    for flag in ("device", "dtype", "no-think", "no-evidence"):
        assert f"--{flag}" in done.stdout
    assert len(script.Config.__dataclass_fields__) == 16  # a new flag belongs above


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
