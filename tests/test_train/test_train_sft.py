"""train_sft.py from end to end on a tiny model: what a run gives, that it survives, its errors.

Runs that are killed are processes of their own; those that they are compared with and those that
go on run here, with as many threads.
"""

import json
import shutil
import signal
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import tyro
from safetensors.torch import load_file
from training_runs import ROOT, call, curve, files, load_script, mistake, short_pairs, start, until

from nanopersrm.judge import adapter_settings
from nanopersrm.pairs import write
from nanopersrm.style import evidence
from nanopersrm.train import checkpoint
from nanopersrm.train.validation import Metrics

READING, JUDGE = 4, 5  # steps of the runs that are compared
PINNED_READING = 5.3350  # loss_reading of the first step
PINNED_JUDGE = [(2.9543, 0.00989), (3.0752, 0.00900)]
FEW = ("--reading-steps", "1", "--steps", "2", "--eval-pairs", "0", "--save-every", "1")

pytestmark = pytest.mark.usefixtures("one_thread")
script = load_script("train_sft")
here = partial(call, script)


@pytest.fixture(scope="module")
def flags(base, tmp_path_factory) -> list[str]:
    """Arguments of a small run: base, pairs, sizes."""
    folder = tmp_path_factory.mktemp("sft")
    write(folder / "pairs.jsonl", short_pairs())
    return [
        *("--preset", "tiny", "--base", str(base.path), "--pairs", str(folder / "pairs.jsonl")),
        *("--reading-steps", str(READING), "--steps", str(JUDGE), "--save-every", "2"),
        *("--writers", "4", "--candidate-tokens", "24", "--reading.exemplar-tokens", "96"),
        *("--reading.candidate-tokens", "48", "--budget", "600"),  # a step of reading in two parts
        *("--eval-every", "3", "--eval-pairs", "2"),
        *("--examples.longest", "10000", "--examples.think-lines", "3", "--lora.rank", "4"),
    ]


@pytest.fixture(scope="module")
def whole(flags, tmp_path_factory) -> Path:
    """A run that nothing interrupted."""
    out = tmp_path_factory.mktemp("runs") / "whole"
    assert here(*flags, "--out", out) == 0
    return out


@pytest.fixture
def refused(capsys) -> Callable[..., str]:
    """call(arguments, key word) -> the one line on standard error."""
    return lambda *arguments, word: mistake(script, capsys, arguments, word)


# What a run gives


def test_first_losses(flags, tmp_path):
    """Pinned: whatever moves these has changed what is learned."""
    more = ("--reading-steps", "1", "--steps", "2", "--eval-pairs", "0")
    assert here(*flags, *more, "--optim.lr", "2e-4", "--out", tmp_path) == 0
    reading, *judge = curve(tmp_path)
    assert reading["loss_reading"] == pytest.approx(PINNED_READING, abs=1e-4)
    for line, (imitation, contrast) in zip(judge, PINNED_JUDGE, strict=True):
        assert line["loss_imitation"] == pytest.approx(imitation, abs=1e-4)
        assert line["loss_contrast"] == pytest.approx(contrast, abs=1e-4)
        assert line["right"] == 1.0  # of two lists; made-up sums are in none


def test_the_files_and_lines_of_a_run(whole, flags):
    lines = curve(whole)
    assert [line["step"] for line in lines] == list(range(1, READING + JUDGE + 1))
    assert [line["phase"] for line in lines] == ["reading"] * READING + ["judge"] * JUDGE
    for name, steps in (("pairs", [3, READING]), ("accuracy", [READING + 3, READING + JUDGE])):
        assert [line["step"] for line in lines if f"validation_{name}" in line] == steps
    assert {"validation_twins", "validation_couples"} <= lines[2].keys()
    assert {"loss_reading", "accuracy", "lr", "gradient_norm"} <= lines[0].keys()
    assert {"loss_imitation", "loss_contrast", "right", "lr", "gradient_norm"} <= lines[-1].keys()
    names = {path.name for path in whole.iterdir()}
    assert {"adapter", "checkpoints", "config.json", "metrics.jsonl", "replies"} <= names
    replies = {path.name for path in (whole / "replies").iterdir()}
    assert replies == {f"step-{READING + step:06d}.txt" for step in (0, 3, JUDGE)}
    settings = adapter_settings.read(whole / "adapter")
    assert settings is not None
    assert (settings.base, settings.form, settings.free) == (flags[3], "pointwise", False)
    assert {evidence.FILE, "reading/reading.json"} <= files(whole / "adapter").keys()
    kept = {path.name for path in (whole / "checkpoints").iterdir()}
    assert kept == {"best.pt", *(f"step-{READING + JUDGE - k:06d}.pt" for k in (0, 1))}


def test_the_adapter_judges(whole, flags, capsys):
    judge = load_script("judge")
    exemplar = str(ROOT / "data/demo/zoe/1.txt")
    arguments = ["--adapter", str(whole / "adapter"), "--base", flags[3], "--exemplar", exemplar]
    arguments += ["--candidates", exemplar, str(ROOT / "data/demo/zoe/4.txt")]
    arguments += ["--json", "--think-lines", "2"]
    assert judge.run(tyro.cli(judge.Config, args=arguments)) == 0
    out, err = capsys.readouterr()
    judgement = json.loads(out)
    assert len(judgement["scores"]) == 2
    assert judgement["candidates"][0]["ledger"]
    assert "other weights" not in err


@pytest.mark.slow
@pytest.mark.parametrize("free", [False, True], ids=["ledgers", "free"])
def test_reinforcement_goes_on_from_it(free, whole, flags, tmp_path):
    """Its first validation is the last one here; what measures stays beside the adapter."""
    rft, adapter = load_script("train_rft"), whole / "adapter"
    if free:
        more = ("--examples.free", "--eval-pairs", "0")
        assert here(*flags, *FEW, *more, "--out", tmp_path / "sft") == 0
        adapter = tmp_path / "sft/adapter"
    shared = [*flags[: flags.index("--reading-steps")], "--longest", "10000", "--steps", "1"]
    shared += ["--think-lines", "3", "--think-tokens", "6", "--eval-pairs", "0" if free else "2"]
    assert call(rft, *shared, "--adapter", adapter, "--out", tmp_path / "rft") == 0
    after, before = files(tmp_path / "rft/adapter"), files(adapter)
    assert {evidence.FILE, "reading/reading.json"} <= before.keys() == after.keys()
    changed = {name for name in before if after[name] != before[name]}
    assert changed == {"adapter_model.safetensors"}
    settings = adapter_settings.read(tmp_path / "rft/adapter")
    assert settings is not None
    assert settings.free == free
    state = checkpoint.load_latest(tmp_path / "rft/checkpoints")
    assert state is not None
    numbers = Metrics(**state["validation"][0]).numbers()
    assert free or numbers.items() <= curve(whole)[-1].items()
    page = (tmp_path / "rft/replies/step-000001.txt").read_text()
    assert (". sum " in page) != free
    assert curve(tmp_path / "rft")[0]["gap_max"] < 1e-3


# Runs that end early


@pytest.mark.slow
@pytest.mark.parametrize(("lines", "number"), [(3, 9), (READING + 3, 9), (2, 15)])
def test_stopped_and_resumed_is_never_interrupted(lines, number, whole, flags, tmp_path):
    """SIGKILL while reading or judging is learned, and SIGTERM: the same curve and the same
    adapter, byte for byte."""
    out, save = tmp_path / "run", "2" if number == signal.SIGKILL else "100"
    process = start(ROOT / "train_sft.py", *flags, "--out", out, "--save-every", save)
    until(process, out, lines)
    process.send_signal(number)
    _, err = process.communicate(timeout=60)
    if number == signal.SIGKILL:
        assert process.returncode == -number
    else:
        assert process.returncode == 128 + number
        assert err.endswith("train_sft.py: stopped and saved; --resume goes on\n")
    assert len(curve(out)) < READING + JUDGE
    assert not (out / "adapter").exists()
    assert here(*flags, "--out", out, "--resume") == 0
    assert curve(out) == curve(whole)
    assert files(out / "adapter") == files(whole / "adapter")
    assert files(out / "replies") == files(whole / "replies")


@pytest.mark.slow
def test_fp16_goes_on_bit_for_bit(flags, tmp_path, monkeypatch):
    """The loss scale has to come back; the instruments are not weighed again."""
    flags = [*flags, "--dtype", "fp16", "--reading-steps", "3", "--steps", "3"]
    assert here(*flags, "--out", tmp_path / "whole") == 0
    finish, steps, cuts = script.Run.finish_step, [], [3, 5]

    def cut(self: Any, step: int, *rest: Any) -> None:
        finish(self, step, *rest)
        steps.append(step)
        if step in cuts:
            cuts.remove(step)
            raise EOFError

    with monkeypatch.context() as patch:
        patch.setattr(script.Run, "finish_step", cut)
        for resume in ((), ("--resume",)):
            with pytest.raises(EOFError):
                here(*flags, "--out", tmp_path / "cut", *resume)
            torch.manual_seed(123)  # the next process knows nothing of this one
    monkeypatch.setattr(evidence, "fit", lambda *_: pytest.fail("weighed again"))
    assert here(*flags, "--out", tmp_path / "cut", "--resume") == 0
    assert steps == [1, 2, 3, 3, 4, 5]  # saved after every second
    assert curve(tmp_path / "cut") == curve(tmp_path / "whole")
    assert files(tmp_path / "cut/adapter") == files(tmp_path / "whole/adapter")


# Settings


@pytest.mark.slow
def test_going_on_from_an_adapter(whole, flags, tmp_path, capsys, refused):
    """The first validation is the last one of the run before; its reading and rank stay."""
    adapter, out = shutil.copytree(whole / "adapter", tmp_path / "adapter"), tmp_path / "more"
    flags = flags[: flags.index("--lora.rank")]
    steps = flags.index("--reading-steps")
    kept = [*flags[:steps], *flags[steps + 2 :]]
    assert here(*kept, "--adapter", adapter, "--out", out) == 0
    assert "a tenth of --optim.lr may be enough" in capsys.readouterr().err
    state = checkpoint.load_latest(out / "checkpoints")
    assert state is not None
    numbers = Metrics(**state["validation"][0]).numbers()
    names = ("validation_accuracy", "validation_loss")
    assert [numbers[name] for name in names] == [curve(whole)[-1][name] for name in names]
    before, after = files(adapter), files(out / "adapter")
    for name in ("reading/adapter_model.safetensors", "reading/reading.json", evidence.FILE):
        assert before[name] == after[name]
    assert before["adapter_config.json"] == after["adapter_config.json"]
    assert before["adapter_model.safetensors"] != after["adapter_model.safetensors"]
    file = adapter / "judge.json"
    file.write_text(file.read_text() + "\n")  # a resumed run goes on from the same adapter
    refused(*kept, "--adapter", adapter, "--out", out, "--resume", word="adapters")
    read, slow = tmp_path / "read", ("--reading-lr", "1e-9")
    assert here(*flags, *slow, "--adapter", adapter, "--out", read) == 0
    name = "reading/adapter_model.safetensors"
    old, new = load_file(adapter / name), load_file(read / "adapter" / name)
    assert files(read / "adapter")[name] != before[name]
    for key, tensor in old.items():  # from where it stood
        torch.testing.assert_close(new[key], tensor, rtol=0, atol=1e-7)
    sizes = ("--reading.candidate-tokens", "32")
    assert here(*kept, *sizes, "--adapter", adapter, "--out", tmp_path / "x") == 2
    assert "leave it out" in capsys.readouterr().err


# Errors


@pytest.mark.slow
def test_another_run_is_not_touched(flags, refused, tmp_path):
    flags = [*flags, *FEW, "--out", str(tmp_path / "run")]
    assert here(*flags) == 0
    before = files(tmp_path / "run")
    refused(*flags, word="--overwrite")
    write(tmp_path / "other.jsonl", short_pairs()[2:])
    refused(*flags, "--resume", "--seed", "5", word="seed 0 (now 5)")
    refused(*flags, "--resume", "--pairs", tmp_path / "other.jsonl", word="texts")
    assert files(tmp_path / "run") == before
    assert here(*flags, "--resume", "--recompute", "True", "--budget", "100") == 0
    assert here(*flags, "--overwrite") == 0


@pytest.mark.parametrize(
    ("change", "word"),
    [
        (lambda pairs: [replace(pair, author="one", twin="") for pair in pairs], "two authors"),
        (lambda pairs: [replace(pair, split="test") for pair in pairs], "'train'"),
        (lambda pairs: [replace(pair, weight=0.0) for pair in pairs], "weight"),
        (lambda pairs: [], "got none"),
    ],
)
def test_pairs_that_teach_nothing(change, word, flags, refused, tmp_path):
    write(tmp_path / "few.jsonl", change(short_pairs()))
    refused(*flags, "--pairs", tmp_path / "few.jsonl", "--out", tmp_path / "run", word=word)
    assert not (tmp_path / "run" / "adapter").exists()


@pytest.mark.slow
def test_some_pairs_too_long_do_no_harm(flags, tmp_path):
    some = short_pairs()
    giants = [replace(p, id=f"{p.id}!", twin="", chosen="Well. " * 3000) for p in some[:3]]
    write(tmp_path / "some.jsonl", [*giants, *some[8:12], *some[-4:]])
    few = ("--pairs", tmp_path / "some.jsonl", "--out", tmp_path / "run")
    assert here(*flags, *FEW, "--steps", "6", "--batch-pairs", "1", *few) == 0
    judged = [line for line in curve(tmp_path / "run") if line["phase"] == "judge"]
    nothing = [line for line in judged if line["loss_imitation"] is None]
    assert 0 < len(nothing) < len(judged)
    assert all(line["gradient_norm"] == 0 for line in nothing)


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        (["--resume"], "found none"),
        (["--budget", "0"], "--budget"),
        (["--save-every", "0"], "--save-every"),
        (["--writers", "1"], "--writers"),
        (["--candidate-tokens", "0"], "--candidate-tokens"),
        (["--reading-from", "nowhere"], "nowhere/reading.json"),
        (["--device", "tpu"], "--device"),
        (["--optim.eight-bit"], "GPU"),
        (["--evidence-pairs", "-1"], "--evidence-pairs"),
        (["--validation", "none.jsonl"], "none.jsonl"),
        (["--adapter", "nowhere"], "nowhere"),
        (["--adapter", "default"], "no adapter comes with"),
        (["--adapter", ""], "empty name"),
        (["--out", "/proc/nanopersrm"], "/proc/nanopersrm"),
    ],
)
def test_errors_of_use(arguments, word, flags, refused, tmp_path):
    refused(*flags, *FEW, "--out", tmp_path / "run", *arguments, word=word)
    assert not (tmp_path / "run" / "adapter").exists()


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        (["--invented", "2"], "--invented"),
        (["--weight.pair", "-1"], "numbers from 0"),
        (["--reading.temperature", "0"], "a temperature above 0"),
    ],
)
def test_flags_that_tyro_refuses(arguments, word, flags, capsys):
    with pytest.raises(SystemExit) as raised:
        here(*flags, *arguments)
    assert raised.value.code == 2
    error = " ".join(capsys.readouterr().err.replace("│", " ").split())
    assert word in error
    assert "Traceback" not in error


def test_memory_that_runs_out_names_a_flag(flags, refused, tmp_path, monkeypatch):
    def full(*_: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA")

    monkeypatch.setattr(script, "loss_sums", full)
    refused(*flags, *FEW, "--eval-pairs", "0", "--out", tmp_path / "run", word="--budget")
    assert not (tmp_path / "run" / "adapter").exists()
