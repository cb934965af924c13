"""train_rft.py from end to end on a tiny model: what a run gives, survives and refuses."""

import random
import shutil
import signal
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

STEPS = 6
ADAPTER = 5  # its place among the arguments
PINNED = {  # of the first two steps
    "reward": (0.7726523, 0.7850),
    "lines": (26 / 12, 29 / 12),
    "entropy": (1.100, 1.116),
    "gradient_norm": (1.027, 0.7526),
}
NOTHING = ("--reward.order", "0", "--reward.twin", "0", "--reward.calibration", "0")
pytestmark = pytest.mark.usefixtures("one_thread")
script = load_script("train_rft")
here, refused = partial(call, script), partial(mistake, script)


@pytest.fixture(scope="module")
def small_run(base, tmp_path_factory) -> list[str]:
    """Arguments of a small run: base, adapter, pairs, sizes."""
    folder = tmp_path_factory.mktemp("rft")
    adapter = make_adapter(folder / "adapter", base, form="pointwise")
    write(folder / "pairs.jsonl", short_pairs())
    return [
        *("--preset", "tiny", "--base", str(base.path), "--adapter", str(adapter)),
        *("--pairs", str(folder / "pairs.jsonl"), "--steps", str(STEPS), "--save-every", "2"),
        *("--eval-every", "3", "--eval-pairs", "2", "--think-lines", "3"),
        *("--longest", "10000", "--budget", "4000", "--optim.lr", "1e-2"),
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


def test_first_numbers(small_run, tmp_path):
    """Pinned: whatever moves these has changed what is learned."""
    assert here(*small_run, "--steps", "2", "--eval-pairs", "0", "--out", tmp_path) == 0
    numbers = [[line[name] for name in PINNED] for line in curve(tmp_path)]
    assert numbers == [pytest.approx(some, rel=1e-3) for some in zip(*PINNED.values(), strict=True)]


@pytest.mark.slow
def test_the_lines_of_a_run(whole):
    lines = curve(whole)
    assert [line["step"] for line in lines] == list(range(1, STEPS + 1))
    assert {line["phase"] for line in lines} == {"rft"}
    validated = [line["step"] for line in lines if "validation_loss" in line]
    assert validated == [3, 6]  # every third step, and the last
    names = {"reward", "right", "lines", "ratio", "entropy", "lr", "groups_flat", "gradient_norm"}
    names |= {"gap_mean", "gap_p99", "gap_max", "gap_outside", "reward_order", "reward_brevity"}
    for line in lines:
        assert names <= line.keys()
        assert line["ratio"] == 1.0
        assert line["gap_max"] < 1e-4  # of log-probabilities in fp32
        assert 0 <= line["right"] == line["reward_order"] <= 1
        assert 0 <= line["lines"] == pytest.approx(3 - 3 * line["reward_brevity"])
        assert line["gradient_norm"] > 0


@pytest.mark.slow
@pytest.mark.parametrize("expected", ["--reward.expected", "--reward.no-expected"])
def test_what_is_rewarded_becomes_likelier(expected, small_run, tmp_path):
    """Few lines: of three that there may be."""
    more = ["--steps", "10", "--eval-every", "0", "--eval-pairs", "0", "--optim.lr", "5e-2"]
    more += [*NOTHING, "--reward.brevity", "1", "--save-every", "100", expected]
    assert here(*small_run, *more, "--out", tmp_path) == 0
    lines = [line["lines"] for line in curve(tmp_path)]
    assert sum(lines[-3:]) / 3 < sum(lines[:3]) / 3 - 0.5


@pytest.mark.slow
def test_the_files_of_a_run(whole, small_run):
    pages = sorted(path.name for path in (whole / "replies").iterdir())
    assert pages == [f"step-{step:06d}.txt" for step in range(STEPS + 1)]
    page = (whole / "replies" / "step-000006.txt").read_text()
    drawn, validated = page.split("Validation after this step")
    assert drawn.count("\n--- ") == drawn.count("chance of 1 to 9") == 4 * 3  # four prompts, G = 3
    assert validated.count(". sum ") == 2 * 2
    settings = adapter_settings.read(whole / "adapter")
    assert settings is not None
    assert (settings.base, settings.form, settings.free) == (small_run[3], "pointwise", False)
    begun = Path(small_run[ADAPTER])
    before, after = weights(begun), weights(whole / "adapter")
    assert before.keys() == after.keys()
    assert all(not torch.equal(before[name], after[name]) for name in before)
    assert files(whole / "adapter" / "reading") == files(begun / "reading")
    assert (whole / "adapter/evidence.json").read_bytes() == (begun / "evidence.json").read_bytes()


def test_a_step_of_flat_groups_says_so(small_run, tmp_path, capsys):
    """And changes nothing."""
    more = ("--steps", "1", "--eval-pairs", "0", *NOTHING, "--reward.brevity", "0")
    assert here(*small_run, *more, "--out", tmp_path) == 0
    assert curve(tmp_path)[0]["groups_flat"] == 4
    assert "step 1 taught nothing" in capsys.readouterr().out
    before, after = weights(Path(small_run[ADAPTER])), weights(tmp_path / "adapter")
    assert all(torch.equal(before[name], after[name]) for name in before)


# Runs that end early


@pytest.mark.slow
@pytest.mark.parametrize(
    "more",
    [(), ("--dtype", "fp16", "--grpo.variant", "gdpo", "--reward.no-expected")],
    ids=["", "fp16 and gdpo"],
)
def test_killed_and_resumed_is_never_interrupted(more, small_run, tmp_path):
    """SIGKILL at a drawn step: the same curve and the same adapter, byte for byte."""
    small_run = [*small_run, *more]
    assert here(*small_run, "--out", tmp_path / "whole") == 0
    step = random.Random("killed").randint(1, STEPS - 2)
    out = tmp_path / "run"
    process = start(ROOT / "train_rft.py", *small_run, "--out", out)
    until(process, out, step)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    assert len(curve(out)) < STEPS
    assert not (out / "adapter").exists()
    assert here(*small_run, "--out", out, "--resume") == 0
    assert curve(out) == curve(tmp_path / "whole")
    assert files(out / "adapter") == files(tmp_path / "whole/adapter")
    assert files(out / "replies") == files(tmp_path / "whole/replies")


# What is refused: one line on standard error, exit code 2, nothing half written


@pytest.fixture
def smallest(small_run, tmp_path) -> list[str]:
    """Arguments of the smallest run, into tmp_path/run."""
    return [*small_run, "--steps", "1", "--eval-pairs", "0", "--out", str(tmp_path / "run")]


WRONG = (
    "--steps 0; --eval-every -1; --eval-pairs -1; --twin-pairs 0; --cache-mb 0; --rows 0; "
    "--budget 0; --save-every 0; --keep-last 0; --group 1; --think-lines 0; --think-tokens 0; "
    "--temperature 0; --longest 300; --device tpu; --base nowhere/at-all/x; --adapter nowhere; "
    "--pairs nowhere.jsonl; --reward.entropy 0.1 --reward.no-expected; --grpo.variant gdpo; "
    "--grpo.variant gspo; --resume"
)


@pytest.mark.parametrize("wrong", WRONG.split("; "))
def test_settings_that_make_no_sense(wrong, smallest, tmp_path, capsys):
    flag, *values = wrong.split()
    word = values[-1] if "nowhere" in wrong else flag.lstrip("-").replace("-", "_")
    error = refused(capsys, [*smallest, flag, *values])
    assert word in error.replace("-", "_") or word in error, error
    assert not any(path.is_file() for path in tmp_path.rglob("*"))


def test_the_adapter_to_go_on_from(smallest, base, tmp_path, monkeypatch, capsys):
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
    pairwise = make_adapter(tmp_path / "pairwise", base, form="pairwise")
    refused(capsys, [*bare, "--overwrite", "--adapter", pairwise], "pointwise")


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
