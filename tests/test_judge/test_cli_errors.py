"""Every mistake is one line on standard error and exit code 2."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import tyro
from fixtures import make_adapter, make_base
from safetensors.torch import save_file
from test_cli import DRAFTS, EDMUND, ROOT, SCRIPT, Pipe, caller, script, start

from nanopersrm.judge.judge import Judge
from nanopersrm.model.base import DEFAULT_BASE, resolve


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
def really(monkeypatch, capsys):
    """`call` with the script's own loading."""

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


@pytest.mark.parametrize(
    ("arguments", "given", "part"),
    [
        (["--candidates", *DRAFTS[:1] * 27], "", "got 27"),
        ([], "\n---\n".join(f"Draft {i}." for i in range(27)), "got 27"),
        (["--mode", "pairwise", "--candidates", DRAFTS[0]], "", "got 1"),
    ],
)
def test_numbers_of_candidates_are_refused_before_torch(arguments, given, part):
    code = (
        f"import runpy, sys; sys.argv[1:] = {['--exemplar', EDMUND, *arguments]!r}\n"
        f"try: runpy.run_path({str(SCRIPT)!r}, run_name='__main__')\n"
        "except SystemExit as error: print(error.code, 'torch' in sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        input=given,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.stdout.splitlines()[-1] == "2 False", done.stderr
    refused((2, "", done.stderr), part)


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
    refused(really(*drafts, "--adapter", "runs/mine"), "runs/mine", "no such folder")
    refused(really(*drafts, "--adapter", tmp_path), str(tmp_path), "adapter_config.json")
    refused(really(*drafts, "--device", "nonsense"), "nonsense")
    refused(really(*drafts, "--device", "mps"), "mps")
    refused(really(*drafts, "--dtype", "int3"), "int3")


def test_an_adapter_of_another_base_says_which(really, tiny_folder, tmp_path):
    base = resolve(str(tiny_folder))
    made = make_adapter(tmp_path, base)
    result = really("--exemplar", EDMUND, "--candidates", *DRAFTS, "--adapter", made)
    refused(result, str(made), f"--base {tiny_folder}")


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


@pytest.fixture(params=["long", "loop", "locked"])
def unreachable(request, tmp_path) -> Iterator[tuple[Path, str]]:
    """A folder about whose contents nothing can be known, and why."""
    place = tmp_path / ("n" * 300 if request.param == "long" else request.param)
    if request.param == "loop":
        place.symlink_to(place)
    elif request.param == "locked":
        place.mkdir(mode=0)
        if os.access(place, os.R_OK):
            pytest.skip("root reads everything")
    said = {"long": "File name too long", "loop": "Too many levels of", "locked": "Permission den"}
    yield place, said[request.param]
    if request.param == "locked":
        place.chmod(0o700)


@pytest.mark.parametrize("flag", ["exemplar", "candidates", "adapter", "base", "batch", "out"])
def test_what_cannot_be_looked_up_is_a_line(really, unreachable, tmp_path, flag):
    place, reason = unreachable
    lines = tmp_path / "in.jsonl"
    lines.write_text(json.dumps({"candidates": ["A draft."]}) + "\n")
    given: dict[str, object] = {"exemplar": EDMUND}
    if flag in ("batch", "out"):
        given |= {"batch": lines, "out": tmp_path / "out.jsonl", flag: place / "x.jsonl"}
    else:
        given |= {"candidates": DRAFTS[0], flag: place / "inside"}
    arguments = [part for name, value in given.items() for part in (f"--{name}", value)]
    refused(really(*arguments), str(place), reason)
    if flag in ("adapter", "base"):  # with --batch too, where the adapter is hashed
        more = ("--batch", lines, "--out", tmp_path / "out.jsonl", f"--{flag}", place / "inside")
        refused(really("--exemplar", EDMUND, *more), str(place), reason)


def test_an_empty_name_is_not_the_current_folder(cli, tmp_path, monkeypatch):
    """As of a shell variable that is not set."""
    (tmp_path / "mine.txt").write_text("Not what was meant.")
    monkeypatch.chdir(tmp_path)
    drafts = ("--candidates", *DRAFTS)
    empty = "expected a file or a folder, got an empty name"
    refused(cli("--exemplar", "", *drafts), f"--exemplar: {empty}")
    refused(cli("--exemplar", EDMUND, "", *drafts), f"--exemplar: {empty}")
    refused(cli("--exemplar", EDMUND, "--candidates", ""), f"--candidates: {empty}")
    assert not cli.heard
    assert cli("--exemplar", ".", "--candidates", ".", "--no-think")[0] == 0
    assert cli.heard[0][0] == cli.heard[0][1] == ["Not what was meant."]


def test_an_adapter_without_a_name(really):
    """Not the current folder, and not the shipped one."""
    result = really("--exemplar", EDMUND, "--candidates", DRAFTS[0], "--adapter", "")
    refused(result, "--adapter: expected a folder, got an empty name")


def test_streams_that_are_closed_or_full(tmp_path):
    """As a shell gives them; the tiny base is not needed for it."""
    draft = tmp_path / "draft.txt"
    draft.write_text("A draft.")
    command = f"{sys.executable} {SCRIPT} --exemplar {EDMUND}"
    for more, said in (
        ("--json <&-", "standard input: closed, expected candidates"),
        ("--json 0>/dev/null", "standard input: cannot be read (Bad file descriptor)"),
        (f"--candidates {draft} >/dev/full", "standard output: cannot be written (No space left"),
    ):
        done = subprocess.run(
            f"{command} {more}", shell=True, cwd=ROOT, capture_output=True, text=True, timeout=60
        )
        refused((done.returncode, done.stdout, done.stderr), said)


def test_unknown_flags_fail():
    with pytest.raises(SystemExit) as caught:
        tyro.cli(script.Config, args=["--exemplar", EDMUND, "--colour", "red"])
    assert caught.value.code == 2
