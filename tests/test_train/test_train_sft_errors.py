"""Every mistake is one line on standard error and exit code 2, and nothing is half written."""

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import tyro
from fixtures import make_base
from test_train_sft import curve, here, script, short_pairs

from nanopersrm.pairs import Pair, write
from nanopersrm.train import checkpoint


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> str:
    return str(make_base(tmp_path_factory.mktemp("sft") / "smollm", "smollm", 16_384).path)


@pytest.fixture(scope="module")
def pairs(tmp_path_factory) -> Path:
    file = tmp_path_factory.mktemp("sft") / "pairs.jsonl"
    write(file, short_pairs())
    return file


@pytest.fixture
def given(base, pairs, tmp_path) -> list[str]:
    """Arguments of the smallest run, into tmp_path/run."""
    return [
        *(
            "--preset",
            "tiny",
            "--base",
            base,
            "--pairs",
            str(pairs),
            "--out",
            str(tmp_path / "run"),
        ),
        *("--warmup-steps", "1", "--steps", "1", "--writers", "3", "--eval-pairs", "0"),
        *("--lesson.longest", "10000", "--lesson.rivals", "1", "--lora.rank", "2"),
    ]


@pytest.fixture
def refused(capsys) -> Callable[..., str]:
    """call(arguments, *parts of the line) -> the line."""

    def call(arguments: list[str], *parts: str) -> str:
        capsys.readouterr()
        assert here(*arguments) == 2
        error = capsys.readouterr().err
        assert error.startswith("train_sft.py: error: ")
        assert error.count("\n") == 1
        assert error.endswith("\n")
        for part in parts:
            assert part in error, error
        return error

    return call


def left(folder: Path) -> list[str]:
    """Files of a run; config.json alone is none."""
    return sorted(p.name for p in folder.rglob("*") if p.is_file() and p.name != "config.json")


# --out and --resume


def test_another_run_is_not_touched(given, refused, tmp_path):
    assert here(*given) == 0
    out = tmp_path / "run"
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    refused(given, f"{out} holds another run", "--resume", "--overwrite", "another --out")
    other = tmp_path / "other.jsonl"
    write(other, [replace(pair, weight=2.0) for pair in short_pairs()])
    for changed, said in (
        (["--seed", "5"], "seed = 0, this call has 5"),
        (["--optim.lr", "0.5"], "optim.lr = 0.002, this call has 0.5"),
        (["--lora.rank", "4"], "lora.rank = 2, this call has 4"),
        (["--pairs", str(other)], "texts = "),
        (["--lesson.no-evidence"], "lesson.evidence = True, this call has False"),
        (["--steps", "3"], "steps = 1, this call has 3"),
    ):
        refused([*given, "--resume", *changed], "--resume: ", said)
    after = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    assert after == before
    assert (
        here(*given, "--resume", "--eval-every", "3", "--recompute", "True", "--budget", "100") == 0
    )
    moved = shutil.copy(given[5], tmp_path / "moved.jsonl")  # the same pairs
    assert here(*given, "--resume", "--pairs", str(moved)) == 0
    assert here(*given, "--overwrite") == 0


def test_a_resume_of_nothing(given, refused, tmp_path):
    refused(
        [*given, "--resume"], "--resume: expected a run in", str(tmp_path / "run"), "found none"
    )
    assert left(tmp_path / "run") == []


def test_a_file_in_place_of_the_folder(given, refused, tmp_path):
    (tmp_path / "run").write_text("mine")
    refused(given, str(tmp_path / "run"))
    assert (tmp_path / "run").read_text() == "mine"
    refused([*given, "--out", str(tmp_path / "run" / "below")], "below")


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="needs Linux's /proc")
def test_a_folder_that_cannot_be_written(given, refused):
    refused([*given, "--out", "/proc/nanopersrm"], "/proc/nanopersrm: cannot be written")


def test_too_little_disk(given, refused, tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)._replace(free=1 << 20)
    monkeypatch.setattr(checkpoint.shutil, "disk_usage", lambda path: usage)
    refused(given, "GB of free disk, found 0.00 GB")
    assert left(tmp_path / "run") == []


def test_a_disk_that_fills_up_in_the_middle(given, refused, tmp_path, monkeypatch):
    """The checkpoint cannot be written: one line, and what was there goes on."""
    save, saved = checkpoint.save_file, []

    def full(*given: Any) -> None:
        saved.append(1)
        if len(saved) == 2:
            raise OSError(28, "No space left on device")
        save(*given)

    monkeypatch.setattr(checkpoint, "save_file", full)
    many = [*given, "--save-every", "1", "--steps", "3"]
    refused(many, "step-000002: cannot be written (No space left on device)")
    assert not (tmp_path / "run" / "adapter").exists()
    kept = [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()]
    assert kept == ["step-000001"]
    assert here(*many, "--resume") == 0


# Pairs


def one_author(some: list[Pair]) -> list[Pair]:
    return [replace(pair, author="one", twin="") for pair in some]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (one_author, "expected at least 2 authors"),
        (lambda some: [replace(pair, weight=0.0) for pair in some], "a weight above 0"),
        (lambda some: [replace(pair, split="test") for pair in some], "of the split 'train'"),
        (lambda some: [], "few.jsonl: expected pairs, found none"),
    ],
)
def test_pairs_that_teach_nothing(change, said, given, refused, tmp_path):
    write(tmp_path / "few.jsonl", change(short_pairs()))
    refused([*given, "--pairs", str(tmp_path / "few.jsonl")], said)
    assert left(tmp_path / "run") == []


def test_an_empty_file_to_validate_on_is_none(given, tmp_path, capsys):
    """What data.build leaves of few writers."""
    write(tmp_path / "none.jsonl", [])
    assert here(*given, "--validation", tmp_path / "none.jsonl") == 0
    assert "no validation pairs to judge" in capsys.readouterr().out


def test_pairs_too_long(given, refused, tmp_path):
    refused([*given, "--lesson.longest", "100"], "at most 100 tokens", "raise --lesson.longest")
    assert not (tmp_path / "run" / "adapter").exists()


def test_some_pairs_too_long_do_no_harm(given, tmp_path, capsys):
    """The pairs with the most text are left out of every step, and of the rehearsal."""
    some = short_pairs()
    giants = [
        replace(p, id=f"giant {i}", twin="", chosen=f"{p.chosen} Well. " * 500)
        for i, p in enumerate(some[:3])
    ]
    write(tmp_path / "some.jsonl", [*giants, *some[8:12], *some[-4:]])
    assert here(*given, "--pairs", tmp_path / "some.jsonl", "--steps", "6", "--bundles", "1") == 0
    judged = [line for line in curve(tmp_path / "run") if line["phase"] == "judge"]
    nothing = [line["step"] for line in judged if line["loss_imitation"] is None]
    assert 0 < len(nothing) < len(judged)
    said = capsys.readouterr().out
    for line in judged:
        told = f"step {line['step']}: every pair is longer than --lesson.longest" in said
        assert told == (line["step"] in nothing) == (line["gradient_norm"] == 0)


@pytest.mark.parametrize(
    ("line", "parts"),
    [
        ('{"id": 3', ["line 2", "expected a JSON object"]),
        ('{"id": "a"}', ["line 2", "field twin", "missing"]),
        ('{"id": 7}', ["line 2", "field id"]),
    ],
)
def test_a_broken_line(line, parts, given, pairs, refused, tmp_path):
    first = pairs.read_text().splitlines()[0]
    (tmp_path / "broken.jsonl").write_text(f"{first}\n{line}\n")
    refused([*given, "--pairs", str(tmp_path / "broken.jsonl")], "broken.jsonl", *parts)
    refused([*given, "--validation", str(tmp_path / "broken.jsonl")], "broken.jsonl", *parts)
    refused([*given, "--pairs", str(tmp_path / "none.jsonl")], "none.jsonl: no such file")
    assert not (tmp_path / "run").exists()


# Numbers and names


@pytest.mark.parametrize(
    ("more", "parts"),
    [
        (["--budget", "0"], ["--budget: expected a number from 1, got 0"]),
        (["--steps", "0"], ["--steps: expected a number from 1, got 0"]),
        (["--warmup-steps", "-1"], ["--warmup-steps: expected a number from 1, got -1"]),
        (["--bundles", "0"], ["--bundles: expected a number from 1, got 0"]),
        (["--save-every", "0"], ["--save-every: expected a number from 1, got 0"]),
        (["--keep-last", "0"], ["--keep-last: expected a number from 1, got 0"]),
        (["--writers", "1"], ["--writers: expected a number from 2, got 1"]),
        (["--device", "tpu"], ["--device tpu: expected auto, cpu, cuda"]),
        (["--base", "nowhere/at-all/x"], ["nowhere/at-all/x"]),
        (["--optim.eight-bit"], ["--optim.eight-bit needs a GPU"]),
    ],
)
def test_settings_that_make_no_sense(more, parts, given, refused, tmp_path):
    refused([*given, *more], *parts)
    assert left(tmp_path / "run") == []


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["--bogus"], "--bogus"),
        (["--lora.rank", "0"], "rank: expected a number from 1, got 0"),
        (["--lesson.form", "triple"], "triple"),
        (["--optim.lr", "-1"], "lr: expected a number above 0"),
        (["--weight.pair", "-1"], "expected numbers from 0"),
        (["--steps", "many"], "many"),
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
    sums = script.sums

    def broken(*args: Any) -> Any:
        found = sums(*args)
        return (
            replace(found, contrast=found.contrast * torch.nan)
            if torch.is_grad_enabled()
            else found
        )

    rehearsed: list[object] = []
    rehearse = script.rehearse

    def rehearsing(*args: Any) -> None:
        rehearse(*args)
        rehearsed.append(1)
        monkeypatch.setattr(script, "sums", broken)

    monkeypatch.setattr(script, "rehearse", rehearsing)
    refused(given, "step 1 of judge: the loss is nan", "failed_batch.json")
    assert rehearsed
    assert (tmp_path / "run" / "failed_batch.json").exists()
    assert not (tmp_path / "run" / "adapter").exists()


def test_memory_runs_out_at_the_start(given, refused, monkeypatch):
    def greedy(*args: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    monkeypatch.setattr(script, "sums", greedy)
    refused(given, "out of memory: the largest micro-batch has", "lower --budget (now 2048)")


def test_ctrl_c_twice_is_a_line(given, capsys, monkeypatch):
    def pressed(*args: Any) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr(script, "learn_style", pressed)
    assert script.run(tyro.cli(script.Config, args=given)) == 130
    assert capsys.readouterr().err.count("\n") == 1
