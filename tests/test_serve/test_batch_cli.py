"""judge.py --batch as its users meet it: what is printed where, and the exit codes."""

import json
import shutil
from dataclasses import replace
from typing import Any

import pytest
from fixtures import make_adapter
from test_batch import GOOD, lines_of
from test_cli import EDMUND, caller, script
from test_cli import tiny_folder as tiny_folder
from test_cli import tiny_judge as tiny_judge

from nanopersrm.judge import adapter_settings
from nanopersrm.model.bases import resolve


@pytest.fixture
def cli(monkeypatch, capsys, tiny_judge):
    return caller(monkeypatch, capsys, tiny_judge)


def test_the_command(cli, tmp_path, monkeypatch):
    source, out = tmp_path / "[red]in.jsonl", tmp_path / "out.jsonl"
    source.write_bytes(lines_of(*GOOD, b"[/red]", {"candidates": ["mine"]}))
    arguments = ("--batch", source, "--out", out, "--no-think", "--no-evidence")
    code, said, error = cli(*arguments, "--exemplar", EDMUND)
    assert code == 1
    found = [json.loads(line) for line in out.read_bytes().splitlines()]
    right = sum(0.5 if one["right"] is None else one["right"] for one in found if "right" in one)
    assert said == f"{out}: 6 judged, 1 bad; {right / 3:.1%} of 3 pairs right, ties half\n"
    bad = "expected a JSON object, found none"
    assert error.startswith(f"judge.py: {source}, line 6: {bad}")
    assert error.count("\n") == 1
    assert [one["line"] for one in found] == list(range(1, 8))
    assert all(1 <= score <= 9 for one in found for score in one.get("scores", []))
    assert cli.heard[-1][1] == ["mine"]
    before = len(cli.heard)
    code, said, error = cli(*arguments, "--exemplar", EDMUND)
    assert (code, error, len(cli.heard)) == (1, "", before)
    assert said.startswith(f"{out}: 6 judged, 1 bad (7 of them before); ")
    code, _, error = cli(*arguments)
    assert (code, error.count("\n")) == (2, 1)
    assert "was made from another line or with other settings" in error
    monkeypatch.setattr(script, "SAID_EVERY", 0)
    source.write_bytes(lines_of(*GOOD))
    code, said, error = cli(*arguments[:3], tmp_path / "new.jsonl", *arguments[4:])
    assert code == 0
    assert [line.split(", ")[:2] for line in error.splitlines()] == [
        [f"{k} of 5 lines", "0 bad"] for k in range(1, 6)
    ]


def test_refused_flags(cli, tmp_path):
    source, out = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_bytes(lines_of(*GOOD))
    both = ("--batch", source, "--out", out)
    for arguments, part in (
        (both[:2], "--batch and --out: expected both"),
        (both[2:], "--batch and --out: expected both"),
        ((*both, "--candidates", EDMUND), "--candidates: expected none"),
        ((*both, "--question", "Why?"), "--question: expected none"),
        ((*both, "--json"), "--json: expected no --json"),
        (("--exemplar", EDMUND, "--ray", 2), "--batch and --out: expected both"),
        ((), "--exemplar: expected texts of the writer, got none"),
        (("--candidates", EDMUND), "--exemplar: expected texts of the writer, got none"),
        ((*both, "--exemplar", tmp_path / "none.txt"), "none.txt: no such file"),
    ):
        code, said, error = cli(*arguments)
        assert (code, said, error.count("\n")) == (2, "", 1)
        assert part in error
    assert not out.exists()


def test_ctrl_c_says_that_it_goes_on(cli, tmp_path, monkeypatch):
    def pressed(*_: Any) -> None:
        raise KeyboardInterrupt

    source, out = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_bytes(lines_of(*GOOD))
    arguments = ("--batch", source, "--out", out, "--no-think", "--no-evidence")
    with monkeypatch.context() as patch:
        patch.setattr(script._Progress, "__call__", pressed)
        code, _, error = cli(*arguments)
    assert (code, error) == (130, "judge.py: interrupted; the same command goes on from here\n")
    assert len(out.read_bytes().splitlines()) == 1
    code, said, _ = cli(*arguments)
    assert (code, "5 judged, 0 bad (1 of them before)" in said) == (0, True)


def test_an_adapter_that_changed_is_another_one(cli, tmp_path, tiny_folder):
    """A new sharpness in judge.json changes verdicts, so old records are not those of this run."""
    folder = make_adapter(tmp_path / "adapter", resolve(str(tiny_folder)))
    source, out = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_bytes(lines_of(*GOOD))
    arguments = ("--batch", source, "--out", out, "--no-think", "--no-evidence", "--adapter")
    assert cli(*arguments, folder)[0] == 0
    before = out.read_bytes()
    code, said, _ = cli(*arguments, shutil.copytree(folder, tmp_path / "moved"))  # the same one
    assert (code, "(5 of them before)" in said) == (0, True)
    made_for = adapter_settings.read(folder)
    assert made_for is not None
    replace(made_for, sharpness=2.0).save(folder)
    code, _, error = cli(*arguments, folder)
    assert (code, error.count("\n")) == (2, 1)
    assert "was made from another line or with other settings" in error
    assert cli(*arguments, "none")[0] == 2
    assert out.read_bytes() == before
