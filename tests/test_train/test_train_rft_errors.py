"""Every mistake is one line on standard error and exit code 2, and nothing is half written."""

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_train_rft import here, make_quick, script, write_given
from test_train_sft import files, short_pairs

from nanopersrm.pairs import write

ADAPTER = 5  # its place among the arguments


@pytest.fixture(autouse=True)
def quick(monkeypatch) -> None:
    make_quick(monkeypatch)


@pytest.fixture(scope="module")
def all_given(tmp_path_factory) -> list[str]:
    more = ("--steps", "1", "--eval-pairs", "0", "--reply", "6")
    return [*write_given(tmp_path_factory.mktemp("rft")), *more]


@pytest.fixture
def given(all_given, tmp_path) -> list[str]:
    """Arguments of the smallest run, into tmp_path/run."""
    return [*all_given, "--out", str(tmp_path / "run")]


@pytest.fixture
def refused(capsys) -> Callable[..., str]:
    """call(arguments, *parts of the line) -> the line."""

    def call(arguments: list[str], *parts: str) -> str:
        capsys.readouterr()
        assert here(*arguments) == 2
        error = capsys.readouterr().err
        assert error.startswith("train_rft.py: error: ")
        assert error.count("\n") == 1
        assert error.endswith("\n")
        for part in parts:
            assert part in error, error
        return error

    return call


def left(folder: Path) -> list[str]:
    """Files of a run; config.json alone is none."""
    return sorted(p.name for p in folder.rglob("*") if p.is_file() and p.name != "config.json")


def without(given: list[str], flag: str) -> list[str]:
    place = given.index(flag)
    return given[:place] + given[place + 2 :]


# The adapter


def test_no_adapter_to_go_on_from(given, refused, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    refused(
        without(given, "--adapter"),
        "expected a trained adapter in runs/sft/adapter, found none",
        "run `python train_sft.py` first, or name another one with --adapter",
    )
    refused([*given, "--adapter", "nowhere"], "nowhere")
    (tmp_path / "empty").mkdir()
    refused([*given, "--adapter", "empty"], "empty")
    assert left(tmp_path) == []


def test_what_train_sft_left_is_found(given, tmp_path, monkeypatch, capsys):
    """Without --adapter: runs/sft/adapter of the folder where it is called."""
    shutil.copytree(given[ADAPTER], tmp_path / "runs/sft/adapter")
    monkeypatch.chdir(tmp_path)
    assert here(*without(given, "--adapter")) == 0
    assert "with runs/sft/adapter on cpu" in capsys.readouterr().out


def test_an_adapter_of_another_base(given, refused, tmp_path):
    folder = tmp_path / "adapter"
    shutil.copytree(given[ADAPTER], folder)
    file = folder / "adapter_model.safetensors"
    save_file({name: part[:, :-1].contiguous() for name, part in load_file(file).items()}, file)
    refused([*given, "--adapter", str(folder)], str(folder))
    assert left(tmp_path / "run") == []


def test_other_weights_than_the_adapters_are_said(given, tmp_path, capsys):
    """It may be meant: a base in another file."""
    folder = tmp_path / "adapter"
    shutil.copytree(given[ADAPTER], folder)
    said = (folder / "judge.json").read_text()
    changed = said.replace(f'"base": "{given[3]}"', '"base": "another"')
    assert changed != said
    (folder / "judge.json").write_text(changed)
    assert here(*given, "--adapter", folder) == 0
    assert "other weights" in capsys.readouterr().err


# --out and --resume


def test_another_run_is_not_touched(given, refused, tmp_path):
    assert here(*given) == 0
    out = tmp_path / "run"
    before = files(out)
    refused(given, f"{out} holds another run", "--resume", "--overwrite", "another --out")
    some = tmp_path / "other.jsonl"
    write(some, [replace(pair, weight=2.0) for pair in short_pairs()])
    for changed, said in (
        (["--seed", "5"], "seed = 0, this call has 5"),
        (["--optim.lr", "0.5"], "optim.lr = 0.01, this call has 0.5"),
        (["--reward.twin", "0"], "reward.twin = 0.5, this call has 0"),
        (["--grpo.variant", "dapo"], "grpo.variant = 'grpo', this call has 'dapo'"),
        (["--group", "4"], "group = 3, this call has 4"),
        (["--window", "1"], "window = 4, this call has 1"),
        (["--epochs", "2"], "epochs = 1, this call has 2"),
        (["--pairs", str(some)], "texts = "),
    ):
        refused([*given, "--resume", *changed], "--resume: ", said)
    assert files(out) == before
    memory = (
        "--rows",
        "2",
        "--cache-mb",
        "1",
        "--budget",
        "300",
        "--recompute",
        "True",
    )  # it may have run out
    assert here(*given, "--resume", *memory) == 0
    moved = shutil.copytree(given[ADAPTER], tmp_path / "moved")  # the same adapter
    assert here(*given, "--resume", "--adapter", moved) == 0
    assert here(*given, "--overwrite") == 0


def test_an_adapter_that_has_changed(given, refused, tmp_path):
    """A run that began with it cannot go on: a beta would mean another reference."""
    folder = tmp_path / "adapter"
    shutil.copytree(given[ADAPTER], folder)
    assert here(*given, "--adapter", folder) == 0
    file = folder / "adapter_model.safetensors"
    save_file({name: 1.5 * part for name, part in load_file(file).items()}, file)
    refused([*given, "--adapter", str(folder), "--resume"], "was begun with adapter_sha256 = ")


def test_a_resume_of_nothing(given, refused, tmp_path):
    refused([*given, "--resume"], "--resume: expected a run in", "found none")
    assert left(tmp_path / "run") == []


# Pairs, numbers and names


def test_pairs_too_long(given, refused, tmp_path):
    """Said before there is a run, so that the next try needs no --overwrite."""
    refused([*given, "--longest", "300"], "within 300, found none", "raise --longest")
    assert list((tmp_path / "run").iterdir()) == []
    assert here(*given) == 0


def test_pairs_that_teach_nothing(given, refused, tmp_path):
    file = tmp_path / "few.jsonl"
    write(file, [replace(pair, weight=0.0) for pair in short_pairs()])
    refused([*given, "--pairs", str(file)], "a weight above 0")
    assert left(tmp_path / "run") == []


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["--steps", "0"], "--steps: expected a number from 1, got 0"),
        (["--epochs", "0"], "--epochs: expected a number from 1, got 0"),
        (["--eval-every", "-1"], "--eval-every: expected a number from 0, got -1"),
        (["--eval-pairs", "-1"], "--eval-pairs: expected a number from 0, got -1"),
        (["--reason-pairs", "-1"], "--reason-pairs: expected a number from 0, got -1"),
        (["--resample", "-1"], "resample: expected a number from 0, got -1"),
        (["--plans", "0"], "--plans: expected a number from 1, got 0"),
        (["--cache-mb", "0"], "--cache-mb: expected a number from 1, got 0"),
        (["--rows", "0"], "--rows: expected a number from 1, got 0"),
        (["--reply", "0"], "--reply: expected a number from 1, got 0"),
        (["--budget", "0"], "--budget: expected a number from 1, got 0"),
        (["--window", "0"], "--window: expected a number from 1, got 0"),
        (["--save-every", "0"], "--save-every: expected a number from 1, got 0"),
        (["--keep-last", "0"], "--keep-last: expected a number from 1, got 0"),
        (["--group", "1"], "group: expected a number from 2, got 1"),
        (["--temperature", "0"], "temperature: expected a number above 0, got 0"),
        (["--longest", "0"], "longest: expected at least 1, got 0"),
        (["--offload", "True"], "--offload True: only with --recompute True"),
        (["--device", "tpu"], "--device tpu: expected auto, cpu, cuda"),
        (["--base", "nowhere/at-all/x"], "nowhere/at-all/x"),
    ],
)
def test_settings_that_make_no_sense(more, said, given, refused, tmp_path):
    refused([*given, *more], said)
    assert left(tmp_path / "run") == []


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["--bogus"], "--bogus"),
        (["--form", "both"], "both"),
        (["--group-by", "pair"], "pair"),
        (["--grpo.beta", "-1"], "beta: expected a number from 0"),
        (["--reward.order", "-1"], "order: expected a weight from 0"),
    ],
)
def test_flags_that_do_not_exist(more, said, given, capsys, tmp_path):
    """tyro says these, in a box."""
    with pytest.raises(SystemExit) as raised:
        here(*given, *more)
    assert raised.value.code == 2
    error = " ".join(capsys.readouterr().err.replace("│", " ").split())
    assert said in error
    assert "Traceback" not in error
    assert not (tmp_path / "run").exists()


# In the middle of a run


def test_a_loss_that_is_no_number(given, refused, tmp_path, monkeypatch):
    """The run ends at once, and says which pairs it was."""
    policy_loss = script.policy_loss

    def broken(*args: Any, **more: Any) -> Any:
        loss, measured = policy_loss(*args, **more)
        return loss * torch.nan, measured

    monkeypatch.setattr(script, "policy_loss", broken)
    refused(given, "step 1 of rft: the loss is nan", "failed_batch.json")
    assert (tmp_path / "run" / "failed_batch.json").exists()
    assert not (tmp_path / "run" / "adapter").exists()


def test_memory_runs_out(given, refused, monkeypatch):
    """Later than in the rehearsal, say because somebody else has taken some of it."""

    def greedy(*args: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    monkeypatch.setattr(script, "learn", greedy)
    refused(
        given,
        "out of memory: lower --rows (now 6), --cache-mb (now 1024) or --budget (now 1000), or "
        "--recompute True",
    )
