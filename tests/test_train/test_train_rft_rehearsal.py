"""The largest step of train_rft.py, tried out before the first: it is the largest, leaves no trace,
and says what to lower."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from test_memory import PLAN, SIZES, Step, peak
from test_train_rft import curve, here, make_quick, script, write_given
from test_train_sft import files

from kernels._dispatch import INTERPRETED
from nanopersrm.model.sampler import Decoder
from nanopersrm.train import rollouts
from nanopersrm.train import source as sourcing

CPU = torch.device("cpu")
ADAPTER = 5  # its place among the arguments


@pytest.fixture(autouse=True)
def quick(monkeypatch) -> None:
    make_quick(monkeypatch)


@pytest.fixture(scope="module")
def all_given(tmp_path_factory) -> list[str]:
    return [*write_given(tmp_path_factory.mktemp("rft")), "--steps", "3", "--eval-pairs", "0"]


@pytest.fixture
def given(all_given, tmp_path) -> list[str]:
    """Arguments of a small run, into tmp_path/run."""
    return [*all_given, "--out", str(tmp_path / "run")]


def forgetful(given: list[str], folder: Path) -> list[str]:
    """The same with an adapter that has dropout: its forward in training draws random numbers."""
    shutil.copytree(given[ADAPTER], folder)
    file = folder / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"lora_dropout": 0.2}))
    return [*given, "--adapter", str(folder)]


# The largest


@pytest.mark.parametrize("budget", [100_000, 1000, 1], ids=["the whole", "packs", "each alone"])
def test_no_micro_batch_is_larger(budget, given, monkeypatch):
    """Of all steps over every pair, two couples at a time."""
    sizes: list[int] = []
    make = script.packing.batch

    def watched(bundles: Any, device: torch.device) -> Any:
        found = make(bundles, device)
        sizes.append(len(found.ids))
        return found

    monkeypatch.setattr(script.packing, "batch", watched)
    more = ("--plans", "2", "--steps", "5", "--window", "1", "--budget", budget)
    assert here(*given, *more) == 0
    first, *others = sizes
    assert len(others) >= 5
    assert max(others) <= first
    if budget == 1000:  # no two trees fit into one pack, but those of other pairs might
        assert first == 1000
    else:
        assert max(others) > 0.95 * first


@pytest.mark.parametrize(("rows", "most", "draws"), [(6, 10**9, 2), (100, 10**9, 1), (100, 99, 12)])
def test_no_drawing_holds_more(rows, most, draws, given, monkeypatch):
    """Bytes of keys and values, once the replies have their room."""
    held: list[int] = []
    fork = Decoder.fork

    def watched(self: Decoder, *rest: Any) -> None:
        fork(self, *rest)
        held.append(sum(level.keys.nbytes + level.values.nbytes for level in self.cache.levels))

    monkeypatch.setattr(rollouts.Decoder, "fork", watched)
    monkeypatch.setattr(rollouts, "slots_of", lambda *_: most)
    assert here(*given, "--steps", "5", "--window", "1", "--rows", rows) == 0
    first, *others = held
    assert len(others) == 5 * draws  # of four groups of three
    assert 0.95 * first < max(others) <= first


@pytest.mark.skipif(INTERPRETED, reason="measures the CPU's own kernels")
@pytest.mark.parametrize("recompute", [False, True])
def test_it_is_as_full_as_a_whole_backward(recompute, given, monkeypatch):
    """That of the last block alone, where no block is computed again: the fullest of all."""
    peaks: list[int] = []
    rehearse = script.rehearse

    def watched(kit: Any, learner: Any, lora: Any, source: Any) -> None:
        batch = script.packing.batch(source.largest(source.longest(1), 1000), CPU)

        def whole() -> None:
            held = learner.brace()
            script.log_probs_of(kit, batch, batch.owners[:0])[0].sum().backward()
            del held

        whole()  # what the first one leaves behind
        learner.forget()
        for some in (whole, lambda: rehearse(kit, learner, lora, source)):
            monkeypatch.setattr(source, "try_out", lambda asked: None)
            peaks.append(peak(some))
            learner.forget()

    monkeypatch.setattr(script, "rehearse", watched)
    assert here(*given, "--steps", "1", "--recompute", recompute) == 0
    assert peaks[1] == pytest.approx(peaks[0], rel=0.01)


@pytest.mark.skipif(INTERPRETED, reason="measures the CPU's own kernels")
@pytest.mark.parametrize(("vocabulary", "tokens"), [(500, 600), (20_000, 300)])
def test_the_last_block_is_the_fullest(vocabulary, tokens):
    """Whichever moment it is: that of the logits or that of a block."""
    plan = replace(PLAN, tokens=tokens)
    step = Step(SIZES | {"vocab_size": vocabulary}, plan)
    last = step.lora.last_block()
    assert len(last) == len(step.lora.parameters()) / SIZES["num_hidden_layers"]
    whole = peak(step.backward)
    found = peak(lambda: step.loss().backward(inputs=last))
    assert found == pytest.approx(whole, rel=0.005)


# No trace


@pytest.mark.parametrize("beta", ["0", "0.1"])
def test_a_run_is_the_same_without_it(beta, given, tmp_path, monkeypatch):
    given = [*forgetful(given, tmp_path / "adapter"), "--grpo.beta", beta]
    before: list[Any] = []
    rehearse = script.rehearse

    def state(kit: Any, learner: Any) -> tuple[Any, ...]:
        masters = {name: part.clone() for name, part in learner.lora.tensors().items()}
        return kit.curriculum.facts(), kit.model.training, learner.names, masters

    def watched(kit: Any, learner: Any, *rest: Any) -> None:
        *told, masters = state(kit, learner)
        random = torch.get_rng_state()
        rehearse(kit, learner, *rest)
        *now, after = state(kit, learner)
        assert now == told
        assert all(torch.equal(after[name], part) for name, part in masters.items())
        assert all(part.grad is None for part in learner.lora.parameters())
        assert not learner.optimizer.state
        assert torch.equal(torch.get_rng_state(), random)
        before.append(kit.model.training)

    with monkeypatch.context() as patch:
        patch.setattr(script, "rehearse", watched)
        assert here(*given) == 0
    assert before == [True]
    monkeypatch.setattr(script, "rehearse", lambda *_: None)
    assert here(*given, "--out", tmp_path / "without") == 0
    assert curve(tmp_path / "without") == curve(tmp_path / "run")
    assert files(tmp_path / "without/adapter") == files(tmp_path / "run/adapter")


def test_a_resumed_run_rehearses_and_a_finished_one_does_not(given, tmp_path, capsys, monkeypatch):
    """Another --budget may have come with --resume."""
    after = script.Training.after

    def cut(self: Any, step: int, *rest: Any) -> None:
        after(self, step, *rest)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(script.Training, "after", cut)
        assert here(*given, "--save-every", "1") == 130
    for times in (1, 0):
        capsys.readouterr()
        assert here(*given, "--save-every", "1", "--resume") == 0
        assert capsys.readouterr().out.count("the largest step, tried out") == times


# Memory that runs out


@pytest.fixture
def refused(given, capsys) -> Callable[..., str]:
    """call(further arguments) -> the line."""

    def call(*more: str) -> str:
        capsys.readouterr()
        assert here(*given, *more) == 2
        error = capsys.readouterr().err
        assert error.count("\n") == 1
        return error.removeprefix("train_rft.py: error: out of memory: ").removesuffix("\n")

    return call


def greedy(*args: Any) -> Any:
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")


def test_drawing_runs_out(refused, tmp_path, monkeypatch):
    monkeypatch.setattr(sourcing, "try_out", greedy)
    assert refused() == (
        "drawing to the longest prompts; lower --rows (now 6) or --cache-mb (now 1024)"
    )
    assert not (tmp_path / "run" / "replies").exists()  # before any trial


def test_training_runs_out(refused, tmp_path, monkeypatch):
    monkeypatch.setattr(script, "log_probs_of", greedy)
    most = "the largest micro-batch has "
    again = ", or give --recompute True"
    assert refused() == f"{most}1000 tokens; lower --budget (now 1000){again}"
    told = refused("--recompute", "True", "--overwrite")
    assert told == f"{most}1000 tokens; lower --budget (now 1000)"
    told = refused("--budget", "9", "--overwrite")  # one prompt with its reply has more
    assert told.endswith(f" tokens; lower --longest (now 10000) or --reply (now 10){again}")
    assert int(told.removeprefix(most).split()[0]) > 100
    assert not (tmp_path / "run" / "replies").exists()
