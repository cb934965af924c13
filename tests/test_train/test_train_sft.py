"""train_sft.py from end to end on a tiny model: what a run gives, and that it survives.

Runs that are killed are processes of their own; those that they are compared with and those that
go on run here, with as many threads.
"""

import importlib.util
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import tyro
from fixtures import make_base

from data.build import demo_pairs
from nanopersrm.judge import adapter_settings, export
from nanopersrm.pairs import Pair, write
from nanopersrm.train import checkpoint, report, trial

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "train_sft.py"
STYLE, JUDGE = 5, 5  # steps of the runs that are compared
PINNED_STYLE = 2.1765  # loss_style of the first step
PINNED_JUDGE = ((7.1523, 0.8659), (7.1691, 0.8939))  # imitation, contrast of the two after it
UNSTEADY = {"tokens_per_second", "memory", "memory_peak"}

spec = importlib.util.spec_from_file_location("train_sft_script", SCRIPT)
assert spec is not None
assert spec.loader is not None
script: Any = importlib.util.module_from_spec(spec)
sys.modules["train_sft_script"] = script  # dataclasses look their module up
spec.loader.exec_module(script)


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """As the processes have; sums of several threads may differ in their last bits."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def short(text: str, words: int) -> str:
    return " ".join(text.split()[:words])


def short_pairs(kinds: tuple[str, ...] = ("cross_author",)) -> list[Pair]:
    """16 to train on and 4 others, of a sentence or two: the tiny vocabulary spells words out."""
    found = demo_pairs(0, 16, kinds)
    some = [pair for pair in found if pair.split == "train"][:16]
    some += [pair for pair in found if pair.split == "validation"][:4]
    return [
        replace(
            pair,
            exemplars=(short(pair.exemplars[0], 25),),
            chosen=short(pair.chosen, 20),
            rejected=short(pair.rejected, 20),
        )
        for pair in some
    ]


@pytest.fixture(scope="module")
def given(tmp_path_factory) -> list[str]:
    """Arguments of a small run: base, pairs, sizes."""
    folder = tmp_path_factory.mktemp("sft")
    base = make_base(folder / "smollm", "smollm", 16_384)
    write(folder / "pairs.jsonl", short_pairs())
    return [
        *("--preset", "tiny", "--base", str(base.path), "--pairs", str(folder / "pairs.jsonl")),
        *("--warmup-steps", str(STYLE), "--steps", str(JUDGE), "--save-every", "2"),
        *("--writers", "4", "--eval-every", "3", "--eval-pairs", "2"),
        *("--lesson.longest", "10000", "--lesson.rivals", "2", "--lora.rank", "4"),
    ]


def here(*arguments: object) -> int:
    """The script's exit code, run in this process."""
    return script.run(tyro.cli(script.Config, args=[str(a) for a in arguments]))


def start(*arguments: object) -> "subprocess.Popen[str]":
    return subprocess.Popen(
        [sys.executable, str(SCRIPT), *map(str, arguments)],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "200"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def curve(out: Path) -> list[dict[str, Any]]:
    """metrics.jsonl without what a clock or the machine decides."""
    lines = [json.loads(line) for line in (out / "metrics.jsonl").open()]
    return [{k: v for k, v in line.items() if k not in UNSTEADY} for line in lines]


def files(folder: Path) -> dict[str, bytes]:
    found = {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*.*")}
    return {name: data for name, data in found.items() if name != "."}


def until(process: "subprocess.Popen[str]", out: Path, lines: int) -> None:
    """Wait for so many steps in metrics.jsonl."""
    log = out / "metrics.jsonl"
    deadline = time.monotonic() + 120
    while not log.exists() or log.read_bytes().count(b"\n") < lines:
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.005)


@pytest.fixture(scope="module")
def whole(given, tmp_path_factory) -> Path:
    """A run that nothing interrupted."""
    out = tmp_path_factory.mktemp("runs") / "whole"
    assert here(*given, "--out", out) == 0
    return out


@pytest.fixture
def brief(monkeypatch) -> None:
    monkeypatch.setattr(trial, "REPLY_TOKENS", 4)


# What a run gives


def test_first_losses(given, tmp_path, brief):
    """Pinned: whatever moves these has changed what is learned.

    Without evidence, so that no percentile of a trained style adapter is among the tokens.
    """
    more = ("--warmup-steps", "1", "--steps", "2", "--lesson.no-evidence", "--eval-pairs", "0")
    assert here(*given, *more, "--optim.lr", "2e-4", "--out", tmp_path) == 0
    found = curve(tmp_path)
    assert found[0]["loss_style"] == pytest.approx(PINNED_STYLE, abs=1e-4)
    for line, (imitation, contrast) in zip(found[1:], PINNED_JUDGE, strict=True):
        assert line["loss_imitation"] == pytest.approx(imitation, abs=1e-4)
        assert line["loss_contrast"] == pytest.approx(contrast, abs=1e-4)


def test_the_lines_of_a_run(whole):
    found = curve(whole)
    assert [line["step"] for line in found] == list(range(1, STYLE + JUDGE + 1))
    assert [line["phase"] for line in found] == ["style"] * STYLE + ["judge"] * JUDGE
    trials = [line["step"] for line in found if "validation_accuracy" in line]
    assert trials == [8, 10]  # the third step of the second loop, and the last
    assert {"loss_style", "found", "lr", "gradient_norm"} <= found[0].keys()
    assert {"loss_imitation", "loss_contrast", "right", "lr", "gradient_norm"} <= found[-1].keys()


def test_the_files_of_a_run(whole, given):
    assert {path.name for path in whole.iterdir()} - {"best"} == {
        "adapter",
        "checkpoints",
        "config.json",
        "metrics.jsonl",
        "replies",
    }
    assert {path.name for path in (whole / "replies").iterdir()} == {
        f"step-{step:06d}.txt" for step in (5, 8, 10)
    }
    page = (whole / "replies" / "step-000010.txt").read_text()
    assert page.count("=" * 80) == 1  # between two replies, each after its prompt
    assert page.count("<exemplar>") == 2
    made_for = adapter_settings.read(whole / "adapter")
    assert made_for is not None
    assert (made_for.base, made_for.form, made_for.nf4) == (given[3], "pointwise", False)
    assert made_for.evidence
    assert made_for.style
    kept = sorted(path.name for path in (whole / "checkpoints").iterdir())
    assert kept[-1] == "step-000010"
    assert 2 <= len(kept) <= 3  # the last two, and the best


def test_peft_loads_the_adapter(whole, given):
    peft = pytest.importorskip("peft")
    import transformers

    base = transformers.AutoModelForCausalLM.from_pretrained(given[3])
    ids = torch.arange(3, 40)[None]
    before = base(ids).logits
    loaded = peft.PeftModel.from_pretrained(base, str(whole / "adapter"))
    assert not torch.equal(loaded(ids).logits, before)


def test_the_adapter_judges(whole, given, capsys):
    from judge_command import DRAFTS, EDMUND
    from judge_command import script as judge

    said = ["--adapter", str(whole / "adapter"), "--base", given[3], "--exemplar", EDMUND]
    said += ["--candidates", *DRAFTS, "--json", "--think-tokens", "4"]
    assert judge.run(tyro.cli(judge.Config, args=said)) == 0
    out, err = capsys.readouterr()
    assert len(json.loads(out)["scores"]) == 2
    assert "other weights" not in err


def test_the_run_is_drawn_and_exported(whole, tmp_path, capsys):
    assert (
        report.run(tyro.cli(report.Config, args=[str(whole), "--out", str(tmp_path / "r.html")]))
        == 0
    )
    page = (tmp_path / "r.html").read_text()
    assert "<figcaption>loss (style)" in page
    assert "<figcaption>loss (judge)" in page
    args = ["--adapter", str(whole), "--out", str(tmp_path / "merged"), "--dtype", "fp32"]
    assert export.run(tyro.cli(export.Config, args=args)) == 0
    assert list((tmp_path / "merged").glob("*.safetensors"))
    capsys.readouterr()


# Runs that end early


@pytest.mark.parametrize("phase", ["style", "judge"])
def test_killed_and_resumed_is_never_interrupted(phase, whole, given, tmp_path):
    """SIGKILL at a drawn step: the same curve and the same adapter, byte for byte."""
    drawn = random.Random(f"killed in {phase}")
    first = 1 if phase == "style" else STYLE + 1
    step = drawn.randint(first, first + (STYLE if phase == "style" else JUDGE) - 2)
    out = tmp_path / "run"
    process = start(*given, "--out", out)
    until(process, out, step)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    assert len(curve(out)) < STYLE + JUDGE
    assert not (out / "adapter").exists()
    assert here(*given, "--out", out, "--resume") == 0
    assert curve(out) == curve(whole)
    ours, theirs = files(out / "adapter"), files(whole / "adapter")
    assert ours.keys() == theirs.keys()
    assert len(ours) == 6
    assert all(ours[name] == theirs[name] for name in ours)


def test_sigterm_saves_and_says_so(whole, given, tmp_path):
    out = tmp_path / "run"
    process = start(*given, "--out", out, "--save-every", "100")
    until(process, out, 2)
    process.terminate()
    _, err = process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGTERM
    assert err == "train_sft.py: stopped and saved; --resume goes on\n"
    done = len(curve(out))
    saved = checkpoint.latest(out / "checkpoints")
    assert saved is not None
    assert saved.step == done < STYLE + JUDGE
    assert here(*given, "--out", out, "--resume") == 0
    assert curve(out) == curve(whole)
    assert files(out / "adapter") == files(whole / "adapter")


def test_a_finished_run_says_the_same_again(whole, given, capsys):
    before = files(whole / "adapter")
    capsys.readouterr()
    assert here(*given, "--out", whole, "--resume") == 0
    assert "going on after step 10 of 10" in capsys.readouterr().out
    assert files(whole / "adapter") == before


# Cheaper runs, in this process


class Power(Exception):
    """It went off."""


@pytest.mark.parametrize("more", [("--lora.dropout", "0.3"), ("--dtype", "fp16")])
def test_dropout_and_fp16_go_on_bit_for_bit(more, given, tmp_path, monkeypatch, brief):
    """Of the first the random state, of the second the loss scale has to come back."""
    given = [*given, *more, "--warmup-steps", "3", "--steps", "3"]
    assert here(*given, "--out", tmp_path / "whole") == 0
    after, steps, cuts = script.Training.after, [], [3, 5]

    def cut(self, step, *rest):
        after(self, step, *rest)
        steps.append(step)
        if step in cuts:
            cuts.remove(step)
            raise Power

    with monkeypatch.context() as patch:
        patch.setattr(script.Training, "after", cut)
        for resume in ((), ("--resume",)):
            with pytest.raises(Power):
                here(*given, "--out", tmp_path / "cut", *resume)
            torch.manual_seed(123)  # the next process knows nothing of this one
    assert here(*given, "--out", tmp_path / "cut", "--resume") == 0
    assert steps == [1, 2, 3, 3, 4, 5]  # saved after every second
    assert curve(tmp_path / "cut") == curve(tmp_path / "whole")
    assert files(tmp_path / "cut/adapter") == files(tmp_path / "whole/adapter")
    if "fp16" in more:
        saved = checkpoint.latest(tmp_path / "cut/checkpoints")
        assert saved is not None
        assert saved.facts["scaler"]["scale"] > 0


def test_a_small_budget_gives_the_same_losses(given, tmp_path, brief):
    """Gradients of many micro-batches add up to those of one."""
    given = [*given, "--warmup-steps", "1", "--steps", "2"]
    assert here(*given, "--out", tmp_path / "small", "--budget", "300") == 0
    assert here(*given, "--out", tmp_path / "large", "--budget", "100000") == 0
    keys = ("loss_style", "loss_imitation", "loss_contrast", "gradient_norm", "validation_loss")
    for one, other in zip(curve(tmp_path / "small"), curve(tmp_path / "large"), strict=True):
        for key in keys:
            if key in one:
                assert one[key] == pytest.approx(other[key], rel=2e-5), (key, one["step"])


def test_a_pair_of_weight_zero_changes_nothing(whole, given, tmp_path, brief):
    file = tmp_path / "pairs.jsonl"
    some = short_pairs()
    dead = replace(some[0], id="dead", twin="", author="nobody", weight=0.0)
    write(file, [dead, *some])
    again = [str(file) if part == given[5] else part for part in given]
    assert here(*again, "--out", tmp_path / "run") == 0
    keys = ("loss_style", "loss_imitation", "loss_contrast", "right", "validation_loss")
    for one, other in zip(curve(tmp_path / "run"), curve(whole), strict=True):
        assert [one.get(key) for key in keys] == [other.get(key) for key in keys]
    heavy = [replace(pair, weight=3.0 if i % 2 else 1.0) for i, pair in enumerate(some)]
    write(file, heavy)
    assert here(*again, "--out", tmp_path / "heavy", "--steps", "1") == 0
    step = curve(tmp_path / "heavy")[STYLE]
    assert step["loss_imitation"] != curve(whole)[STYLE]["loss_imitation"]
