"""train_rft.py from end to end on a tiny model: what a run gives, survives and refuses.

A random model never writes a verdict, so `by_letters` stands in for the rewards: it likes some
letters. Runs that are killed are processes of their own, which call `patched`.
"""

import os
import random
import shutil
import signal
import sys
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from fixtures import make_adapter
from safetensors.torch import load_file, save_file
from training_runs import ROOT, call, curve, files, load_script, mistake, short_pairs, start, until

from nanopersrm.judge import adapter_settings
from nanopersrm.pairs import write
from nanopersrm.train import validation
from nanopersrm.train.rewards import RewardConfig
from nanopersrm.train.rollout import RolloutGroup

STEPS = 6
ADAPTER = 5  # its place among the arguments
script = load_script("train_rft")
here, refused = partial(call, script), partial(mistake, script)


def by_letters(groups: Sequence[RolloutGroup], config: RewardConfig) -> None:
    """In place of `reward`: the share of letters in the first half of the alphabet."""
    for rollout in [rollout for group in groups for rollout in group.rollouts]:
        letters = [char for char in rollout.text.lower() if "a" <= char <= "z"]
        order = sum(char <= "m" for char in letters) / max(1, len(letters))
        rollout.parts, rollout.reward = {"format": 1.0, "order": order}, 0.5 + order


def make_quick(monkeypatch: Any) -> None:
    """Rewards that differ, and validation of few tokens."""
    monkeypatch.setattr(script, "reward", by_letters)
    monkeypatch.setattr(validation, "REPLY_TOKENS", 4)
    monkeypatch.setattr(validation, "REASONING", 4)


def patched(arguments: list[str]) -> int:
    """The script in a process of its own."""
    make_quick(pytest.MonkeyPatch())
    torch.set_num_threads(1)
    return here(*arguments)


@pytest.fixture(scope="module", autouse=True)
def quick() -> Iterator[None]:
    """As `patched`: one thread, since sums of several may differ in their last bits."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        make_quick(patch)
        yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def small_run(base, tmp_path_factory) -> list[str]:
    """Arguments of a small run: base, adapter, pairs, sizes."""
    folder = tmp_path_factory.mktemp("rft")
    adapter = make_adapter(
        folder / "adapter", base, evidence=False, form="pointwise", reading=False
    )
    write(folder / "pairs.jsonl", short_pairs())
    return [
        *("--preset", "tiny", "--base", str(base.path), "--adapter", str(adapter)),
        *("--pairs", str(folder / "pairs.jsonl"), "--steps", str(STEPS), "--save-every", "2"),
        *("--eval-every", "3", "--eval-pairs", "4", "--reason-pairs", "2", "--reply", "10"),
        *("--longest", "10000", "--budget", "1000", "--optim.lr", "1e-2"),
    ]


@pytest.fixture(scope="module")
def whole(small_run, tmp_path_factory) -> Path:
    """A run that nothing interrupted."""
    out = tmp_path_factory.mktemp("runs") / "whole"
    assert here(*small_run, "--out", out) == 0
    return out


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "adapter_model.safetensors")


# What a run gives


@pytest.mark.slow
def test_the_lines_of_a_run(whole):
    lines = curve(whole)
    assert [line["step"] for line in lines] == list(range(1, STEPS + 1))
    assert {line["phase"] for line in lines} == {"rft"}
    validated = [line["step"] for line in lines if "validation_reasoned" in line]
    assert validated == [3, 6]  # every third step, and the last
    names = {"reward", "right", "formed", "length", "ratio", "entropy", "lr", "groups_flat"}
    names |= {"gap_mean", "gap_p99", "gap_max", "gap_outside", "reward_order", "gradient_norm"}
    for line in lines:
        assert names <= line.keys()
        assert line["ratio"] == 1.0
        assert line["gap_max"] < 1e-3  # of log-probabilities in fp32
        assert 0 <= line["right"] == line["reward_order"] <= 1
        assert line["gradient_norm"] > 0


@pytest.mark.slow
def test_what_is_rewarded_becomes_likelier(small_run, tmp_path):
    more = ["--steps", "15", "--eval-every", "0", "--eval-pairs", "0", "--optim.lr", "1e-1"]
    more += ["--group", "8", "--reply", "6", "--save-every", "100"]
    assert here(*small_run, *more, "--out", tmp_path) == 0
    right = [line["right"] for line in curve(tmp_path)]
    assert sum(right[-5:]) / 5 > sum(right[:5]) / 5 + 0.1


@pytest.mark.slow
def test_the_files_of_a_run(whole, small_run):
    pages = sorted(path.name for path in (whole / "replies").iterdir())
    assert pages == [f"step-{step:06d}.txt" for step in range(STEPS + 1)]
    page = (whole / "replies" / "step-000006.txt").read_text()
    drawn, validated = page.split("Validation after this step")
    assert drawn.count("\n--- ") == 4 * 3  # four prompts, G = 3
    assert validated.count("<exemplar>") == 4  # of each validation pair one text
    settings = adapter_settings.read(whole / "adapter")
    assert settings is not None
    assert (settings.base, settings.form, settings.evidence) == (small_run[3], "pointwise", False)
    before, after = weights(Path(small_run[ADAPTER])), weights(whole / "adapter")
    assert before.keys() == after.keys()
    assert all(not torch.equal(before[name], after[name]) for name in before)
    assert files(whole / "adapter" / "reading") == files(Path(small_run[ADAPTER]) / "reading")


@pytest.mark.parametrize("formed", [False, True])
def test_a_step_of_flat_groups_says_so(formed, small_run, tmp_path, monkeypatch, capsys):
    """And changes nothing."""

    def alike(groups: Sequence[RolloutGroup], config: RewardConfig) -> None:
        for rollout in [rollout for group in groups for rollout in group.rollouts]:
            rollout.parts, rollout.reward = {"format": 1.0, "order": 0.5}, 1.0
            rollout.problem = None if formed else "no score"

    monkeypatch.setattr(script, "reward", alike)
    assert here(*small_run, "--steps", "1", "--eval-pairs", "0", "--out", tmp_path) == 0
    assert curve(tmp_path)[0]["groups_flat"] == 4
    out = capsys.readouterr().out
    assert "step 1 taught nothing" in out
    assert ("train_sft.py" in out.split("taught nothing")[1].split("\n")[0]) == (not formed)
    before, after = weights(Path(small_run[ADAPTER])), weights(tmp_path / "adapter")
    assert all(torch.equal(before[name], after[name]) for name in before)


# Runs that end early


@pytest.mark.slow
@pytest.mark.parametrize(
    "more",
    [(), ("--twin-pairs", "2", "--at-once", "1"), ("--dtype", "fp16", "--grpo.variant", "gdpo")],
    ids=["", "at once", "fp16 and gdpo"],
)
def test_killed_and_resumed_is_never_interrupted(more, small_run, tmp_path):
    """SIGKILL at a drawn step: the same curve and the same adapter, byte for byte."""
    small_run = [*small_run, *more]
    assert here(*small_run, "--out", tmp_path / "whole") == 0
    lines = curve(tmp_path / "whole")
    assert all(("right_at_once" in line) == ("--at-once" in more) for line in lines)
    step = random.Random("killed").randint(1, STEPS - 2)
    out = tmp_path / "run"
    code = "import sys, test_train_rft as t; sys.exit(t.patched(sys.argv[1:]))"
    places = os.pathsep.join([str(ROOT), *map(str, sys.path)])
    process = start("-c", code, *small_run, "--out", out, PYTHONPATH=places)
    until(process, out, step)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    assert len(curve(out)) < STEPS
    assert not (out / "adapter").exists()
    assert here(*small_run, "--out", out, "--resume") == 0
    assert curve(out) == lines
    assert files(out / "adapter") == files(tmp_path / "whole/adapter")
    assert files(out / "replies") == files(tmp_path / "whole/replies")


# What is refused: one line on standard error, exit code 2, nothing half written


@pytest.fixture
def smallest(small_run, tmp_path) -> list[str]:
    """Arguments of the smallest run, into tmp_path/run."""
    more = ["--steps", "1", "--eval-pairs", "0", "--reply", "6"]
    return [*small_run, *more, "--out", str(tmp_path / "run")]


WRONG = (
    "--steps 0; --eval-every -1; --eval-pairs -1; --reason-pairs -1; --twin-pairs 0; --at-once 2; "
    "--cache-mb 0; --rows 0; --reply 0; --budget 0; --save-every 0; --keep-last 0; --group 1; "
    "--temperature 0; --longest 300; --device tpu; --base nowhere/at-all/x; --adapter nowhere; "
    "--pairs nowhere.jsonl; --reward.entropy 0.1; --reward.expected --grpo.variant gdpo; "
    "--reward.expected --grpo.variant gspo; --resume"
)


@pytest.mark.parametrize("wrong", WRONG.split("; "))
def test_settings_that_make_no_sense(wrong, smallest, tmp_path, capsys):
    flag, *values = wrong.split()
    word = values[-1] if "nowhere" in wrong else flag.lstrip("-").replace("-", "_")
    error = refused(capsys, [*smallest, flag, *values])
    assert word in error.replace("-", "_") or word in error, error
    assert not any(path.is_file() for path in tmp_path.rglob("*"))


def test_the_adapter_to_go_on_from(smallest, tmp_path, monkeypatch, capsys):
    """Without --adapter runs/sft/adapter of the folder where it is called; else an error."""
    monkeypatch.chdir(tmp_path)
    bare = smallest[: ADAPTER - 1] + smallest[ADAPTER + 1 :]
    refused(capsys, bare, "train_sft.py", "--adapter")
    shutil.copytree(smallest[ADAPTER], tmp_path / "runs/sft/adapter")
    assert here(*bare) == 0
    assert "with runs/sft/adapter on cpu" in capsys.readouterr().out
    file = tmp_path / "runs/sft/adapter/adapter_model.safetensors"
    save_file({name: part[:, :-1].contiguous() for name, part in load_file(file).items()}, file)
    refused(capsys, [*bare, "--overwrite"], "adapter")


@pytest.mark.parametrize("problem", ["nan", "memory"])
def test_in_the_middle_of_a_run(problem, smallest, tmp_path, monkeypatch, capsys):
    """A loss that is no number names its pairs; memory that runs out names the flags to lower."""
    policy_loss = script.policy_loss

    def broken(*args: Any, **more: Any) -> Any:
        if problem == "memory":
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        loss, measured = policy_loss(*args, **more)
        return loss * torch.nan, measured

    monkeypatch.setattr(script, "policy_loss", broken)
    words = ("nan", "cross_author") if problem == "nan" else ("--rows", "--cache-mb", "--budget")
    refused(capsys, smallest, *words)
    assert not (tmp_path / "run" / "adapter").exists()
