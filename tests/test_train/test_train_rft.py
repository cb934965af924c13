"""train_rft.py from end to end on a tiny model: what a run gives, and that it survives.

A random model never writes a verdict, so `worth` stands in for the rewards: it likes some letters.
Runs that are killed are processes of their own, which call `patched`.
"""

import importlib.util
import json
import os
import random
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import tyro
from fixtures import make_adapter, make_base
from safetensors.torch import load_file
from test_train_sft import ROOT, files, short_pairs, until

from nanopersrm.judge import adapter_settings
from nanopersrm.model.lora import Lora
from nanopersrm.pairs import write
from nanopersrm.train import checkpoint, exam, report, trial
from nanopersrm.train import source as sourcing
from nanopersrm.train.rewards import Plan, Reward, RewardConfig

STEPS = 6
UNSTEADY = {"tokens_per_second", "memory", "memory_peak", "seconds_drawing", "seconds_training"}

spec = importlib.util.spec_from_file_location("train_rft_script", ROOT / "train_rft.py")
assert spec is not None
assert spec.loader is not None
script: Any = importlib.util.module_from_spec(spec)
sys.modules["train_rft_script"] = script  # dataclasses look their module up
spec.loader.exec_module(script)


def worth(plan: Plan, config: RewardConfig) -> list[dict[str, list[Reward]]]:
    """In place of `rewards`: the share of letters in the first half of the alphabet."""

    def one(text: str) -> Reward:
        letters = [char for char in text.lower() if "a" <= char <= "z"]
        order = sum(char <= "m" for char in letters) / max(1, len(letters))
        return Reward({"format": 1.0, "order": order}, 0.5 + order, None)

    return [
        {role: [one(drawn.reply) for drawn in group] for role, group in shown.groups.items()}
        for shown in plan.shown
    ]


def make_quick(monkeypatch: Any) -> None:
    """Rewards that differ, and trials of few tokens."""
    monkeypatch.setattr(sourcing, "rewards", worth)
    monkeypatch.setattr(trial, "REPLY_TOKENS", 4)
    monkeypatch.setattr(exam, "REASONING", 4)


def patched(arguments: list[str]) -> int:
    """The script in a process of its own."""
    make_quick(pytest.MonkeyPatch())
    torch.set_num_threads(1)
    return here(*arguments)


def here(*arguments: object) -> int:
    """The script's exit code, run in this process."""
    return script.run(tyro.cli(script.Config, args=[str(a) for a in arguments]))


def start(*arguments: object) -> "subprocess.Popen[str]":
    code = "import sys, test_train_rft as t; sys.exit(t.patched(sys.argv[1:]))"
    paths = os.pathsep.join([str(ROOT / "tests"), str(ROOT)])
    return subprocess.Popen(
        [sys.executable, "-c", code, *map(str, arguments)],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "200", "PYTHONPATH": paths},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.fixture(scope="module", autouse=True)
def quick() -> Iterator[None]:
    """As `patched`, and with one thread."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        make_quick(patch)
        yield
    torch.set_num_threads(before)


def curve(out: Path) -> list[dict[str, Any]]:
    """metrics.jsonl without what a clock or the machine decides."""
    lines = [json.loads(line) for line in (out / "metrics.jsonl").open()]
    return [{k: v for k, v in line.items() if k not in UNSTEADY} for line in lines]


def write_given(folder: Path) -> list[str]:
    """Arguments of a small run: base, adapter, pairs, sizes."""
    base = make_base(folder / "smollm", "smollm", 16_384)
    facts = {"evidence": False, "form": "pointwise", "style": False}
    adapter = make_adapter(folder / "adapter", base, **facts)
    write(folder / "pairs.jsonl", short_pairs())
    return [
        *("--preset", "tiny", "--base", str(base.path), "--adapter", str(adapter)),
        *("--pairs", str(folder / "pairs.jsonl"), "--steps", str(STEPS), "--save-every", "2"),
        *("--eval-every", "3", "--eval-pairs", "4", "--reason-pairs", "2", "--reply", "10"),
        *("--longest", "10000", "--budget", "1000", "--optim.lr", "1e-2"),
    ]


@pytest.fixture(scope="module")
def given(tmp_path_factory) -> list[str]:
    return write_given(tmp_path_factory.mktemp("rft"))


@pytest.fixture(scope="module")
def whole(given, tmp_path_factory) -> Path:
    """A run that nothing interrupted."""
    out = tmp_path_factory.mktemp("runs") / "whole"
    assert here(*given, "--out", out) == 0
    return out


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "adapter_model.safetensors")


# What a run gives


def test_the_lines_of_a_run(whole):
    found = curve(whole)
    assert [line["step"] for line in found] == list(range(1, STEPS + 1))
    assert {line["phase"] for line in found} == {"rft"}
    trials = [line["step"] for line in found if "validation_accuracy" in line]
    assert trials == [3, 6]  # every third step, and the last
    named = {"reward", "right", "formed", "length", "flat", "gap", "ratio", "entropy", "lr"}
    named |= {"gap_p99", "gap_max", "gap_outside", "reward_order", "gradient_norm", "clip_high"}
    for line in found:
        assert named <= line.keys()
        assert line["ratio"] == 1.0
        assert line["gap_max"] < 1e-3  # of log-probabilities in fp32
        assert 0 <= line["right"] == line["reward_order"] <= 1
        assert line["gradient_norm"] > 0
    assert "validation_reasoned" in found[-1]
    assert not any(name.startswith("kl_") for name in found[0])


def test_what_is_rewarded_becomes_likelier(given, tmp_path):
    more = ["--steps", "15", "--eval-every", "0", "--eval-pairs", "0", "--optim.lr", "1e-1"]
    more += ["--group", "8", "--reply", "6", "--save-every", "100", "--window", "1"]
    assert here(*given, *more, "--out", tmp_path) == 0
    right = [line["right"] for line in curve(tmp_path)]
    assert sum(right[-5:]) / 5 > sum(right[:5]) / 5 + 0.1


def test_the_files_of_a_run(whole, given):
    names = {path.name for path in whole.iterdir()}
    assert names - {"best"} == {"adapter", "checkpoints", "config.json", "metrics.jsonl", "replies"}
    pages = sorted(path.name for path in (whole / "replies").iterdir())
    assert pages == [f"step-{step:06d}.txt" for step in range(STEPS + 1)]
    page = (whole / "replies" / "step-000006.txt").read_text()
    drawn, told = page.split("The trial after this step")
    assert drawn.count("\n--- ") == 4 * 3  # four prompts, G = 3
    assert drawn.count("order 0.") + drawn.count("order 1.") == 4 * 3
    assert told.count("<exemplar>") == 4  # of each validation pair one text
    made_for = adapter_settings.read(whole / "adapter")
    assert made_for is not None
    assert (made_for.base, made_for.form, made_for.nf4) == (given[3], "pointwise", False)
    assert (made_for.evidence, made_for.style) == (False, False)
    kept = sorted(path.name for path in (whole / "checkpoints").iterdir())
    assert kept[-1] == "step-000006"
    assert 2 <= len(kept) <= 3  # the last two, and the best


def test_the_adapter_has_learned_and_the_style_has_not(whole, given):
    before, after = weights(Path(given[5])), weights(whole / "adapter")
    assert before.keys() == after.keys()
    assert all(not torch.equal(before[name], after[name]) for name in before)
    assert files(whole / "adapter" / "style") == files(Path(given[5]) / "style")


def test_the_run_is_drawn(whole, tmp_path, capsys):
    args = [str(whole), "--out", str(tmp_path / "report.html")]
    assert report.run(tyro.cli(report.Config, args=args)) == 0
    page = (tmp_path / "report.html").read_text()
    assert "reward" in page
    capsys.readouterr()


@pytest.mark.base
def test_the_preset_tiny_needs_nothing(tmp_path, capsys):
    """No adapter, no pairs: a random model, the demo writers."""
    more = ("--steps", "2", "--eval-pairs", "2", "--reason-pairs", "1", "--reply", "6")
    assert here("--preset", "tiny", "--out", tmp_path / "run", *more) == 0
    out = capsys.readouterr().out
    assert "before: " in out
    assert "All of it runs." in out
    assert len(curve(tmp_path / "run")) == 2
    B = [part for name, part in weights(tmp_path / "run/adapter").items() if "lora_B" in name]
    assert any(part.any() for part in B)


# Runs that end early


def test_killed_and_resumed_is_never_interrupted(whole, given, tmp_path):
    """SIGKILL at a drawn step: the same curve and the same adapter, byte for byte."""
    step = random.Random("killed").randint(1, STEPS - 2)
    out = tmp_path / "run"
    process = start(*given, "--out", out)
    until(process, out, step)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    assert len(curve(out)) < STEPS
    assert not (out / "adapter").exists()
    assert here(*given, "--out", out, "--resume") == 0
    assert curve(out) == curve(whole)
    ours, theirs = files(out / "adapter"), files(whole / "adapter")
    assert len(ours) == 6
    assert ours == theirs
    assert files(out / "replies") == files(whole / "replies")


def test_sigterm_saves_and_says_so(whole, given, tmp_path):
    out = tmp_path / "run"
    process = start(*given, "--out", out, "--save-every", "100")
    until(process, out, 1)
    process.terminate()
    _, err = process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGTERM
    assert err.endswith("train_rft.py: stopped and saved; --resume goes on\n")
    assert "Traceback" not in err
    done = len(curve(out))
    saved = checkpoint.latest(out / "checkpoints")
    assert saved is not None
    assert saved.step == done < STEPS
    assert here(*given, "--out", out, "--resume") == 0
    assert curve(out) == curve(whole)
    assert files(out / "adapter") == files(whole / "adapter")


def test_a_finished_run_says_the_same_again(whole, given, capsys):
    before, lines = files(whole / "adapter"), curve(whole)
    capsys.readouterr()
    assert here(*given, "--out", whole, "--resume") == 0
    out = capsys.readouterr().out
    assert "going on after step 6 of 6" in out
    assert out.count("before: ") == out.count("after:  ") == 1
    assert files(whole / "adapter") == before
    assert curve(whole) == lines


class Power(Exception):
    """It went off."""


def cut_and_resumed(given: list[str], out: Path, monkeypatch: Any) -> list[int]:
    """The power goes at step 3; saved after every second. The steps that were computed."""
    after, steps = script.Training.after, []

    def cut(self, step, *rest):
        after(self, step, *rest)
        steps.append(step)
        if len(steps) == 3:
            raise Power

    with monkeypatch.context() as patch:
        patch.setattr(script.Training, "after", cut)
        with pytest.raises(Power):
            here(*given, "--out", out)
        torch.manual_seed(123)  # the next process knows nothing of this one
        assert here(*given, "--out", out, "--resume") == 0
    return steps


@pytest.mark.parametrize(
    "more",
    [
        ("--epochs", "2"),
        ("--dtype", "fp16"),
        ("--resample", "2", "--group-by", "plan", "--grpo.variant", "gdpo"),
        ("--form", "pairwise", "--window", "2", "--grpo.importance-cap", "2"),
    ],
)
def test_every_kind_of_run_goes_on_bit_for_bit(more, given, tmp_path, monkeypatch):
    given = [*given, *more, "--steps", "4", "--eval-pairs", "0"]
    assert here(*given, "--out", tmp_path / "whole") == 0
    assert cut_and_resumed(given, tmp_path / "cut", monkeypatch) == [1, 2, 3, 3, 4]
    found = curve(tmp_path / "cut")
    assert found == curve(tmp_path / "whole")
    assert files(tmp_path / "cut/adapter") == files(tmp_path / "whole/adapter")
    saved = checkpoint.latest(tmp_path / "cut/checkpoints")
    assert saved is not None
    assert saved.facts["phase_step"] == (8 if "--epochs" in more else 4)  # updates
    assert all(line["ratio"] == 1.0 for line in found)  # of the first epoch


def test_the_reference_is_the_adapter_as_it_came(given, tmp_path, monkeypatch):
    """With a beta: no distance at first, and after a resume not the distance to the checkpoint."""
    given = [*given, "--grpo.beta", "0.1", "--steps", "4", "--eval-pairs", "0"]
    assert here(*given, "--out", tmp_path / "whole") == 0
    found = curve(tmp_path / "whole")
    assert found[0]["kl_k1"] == found[0]["kl_k3"] == 0.0
    assert all(line["kl_k3"] > 1e-6 for line in found[1:])
    adapters = script.starting.adapters
    seen: list[Lora] = []

    def watched(*args):
        lora, reference = adapters(*args)
        seen.append(reference)
        return lora, reference

    monkeypatch.setattr(script.starting, "adapters", watched)
    cut_and_resumed(given, tmp_path / "cut", monkeypatch)
    assert curve(tmp_path / "cut") == found
    assert len(seen) == 2
    came = sorted(weights(Path(given[5])).values(), key=lambda part: float(part.sum()))
    for reference in seen:  # of both parts, when all is over
        assert not any(part.requires_grad for part in reference.parameters())
        own = sorted(reference.tensors().values(), key=lambda part: float(part.sum()))
        assert all(torch.equal(one, other) for one, other in zip(own, came, strict=True))


def test_without_a_beta_no_reference_is_loaded(given, tmp_path, monkeypatch):
    load, loaded = script.starting.load_lora, []

    def watched(folder: Path, model: Any) -> Lora:
        loaded.append(folder)
        return load(folder, model)

    monkeypatch.setattr(script.starting, "load_lora", watched)
    given = [*given, "--steps", "1", "--eval-pairs", "0", "--overwrite"]
    for beta, times in (("0", 1), ("0.1", 2)):
        loaded.clear()
        assert here(*given, "--grpo.beta", beta, "--out", tmp_path) == 0
        assert loaded.count(Path(given[5])) == times
