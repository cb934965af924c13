"""Around the loop: losses that are no number, a resume that differs, signals, memory."""

import json
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from nanopersrm import InputError
from nanopersrm.model.cache import Layout
from nanopersrm.model.lora import Lora, LoraConfig
from nanopersrm.model.transformer import Model
from nanopersrm.model.weights import load
from nanopersrm.train import checkpoint
from nanopersrm.train.optim import OptimConfig
from nanopersrm.train.runlog import Stop
from nanopersrm.train.training import Learner, Stopped, Training, disk_needed, memory_guard, named

CPU = torch.device("cpu")
IDS, PLACE = torch.tensor([5, 90, 17, 33, 2]), Layout.of([5])
SETTINGS: dict[str, Any] = {
    "seed": 0,
    "pairs": Path("pairs.jsonl"),
    "texts": "a",
    "budget": 64,
    "save_every": 2,
    "optim": {"lr": 1e-3, "clip": 1.0},
    "lora": {"rank": 4, "targets": ("q_proj", "v_proj")},
}


@pytest.fixture(scope="module")
def model(tiny_base) -> Model:
    return load(tiny_base, torch.float32, CPU).train()


def training(out: Path, resume: bool = False, overwrite: bool = False, **settings: Any) -> Training:
    every = settings.pop("save_every", 2)
    stop = settings.pop("stop", None) or Stop()
    return Training(out, {**SETTINGS, **settings}, 6, every, 2, stop, resume, overwrite, CPU)


def learner(run: Training, model: Model, phase: str = "judge", dropout: float = 0.0) -> Learner:
    config = LoraConfig(rank=4, dropout=dropout)
    return Learner(run, phase, model, Lora(model, config, 0), OptimConfig(lr=1e-2))


def loss(model: Model) -> Tensor:
    return model(IDS, PLACE).square().mean() + 0.1 * model(IDS, PLACE).mean()


def steps(run: Training, one: Learner, model: Model, last: int, seen: list[float]) -> None:
    for step in range(one.done, last):
        value = loss(model)
        seen.append(value.item())
        one.backward(value, [f"pair {step}"])
        run.after(step + 1, one, {"loss": seen[-1], "gradient_norm": one.update(1e-2)}, 5, {"a": 1})


def masters(one: Learner) -> dict[str, Tensor]:
    return {name: part.clone() for name, part in one.lora.tensors().items()}


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_a_run_goes_on_where_it_was(model, tmp_path, dropout):
    """With dropout the random state has to come back as well."""
    torch.manual_seed(1)
    whole: list[float] = []
    run = training(tmp_path / "whole")
    one = learner(run, model, dropout=dropout)
    steps(run, one, model, 6, whole)
    end = masters(one)
    torch.manual_seed(1)
    seen: list[float] = []
    run = training(tmp_path / "cut")
    steps(run, learner(run, model, dropout=dropout), model, 5, seen)
    torch.manual_seed(99)
    run = training(tmp_path / "cut", resume=True)
    assert run.in_phase("judge")
    assert not run.in_phase("style")
    assert run.saved is not None
    assert run.saved.facts["a"] == 1
    again = learner(run, model, dropout=dropout)
    assert (again.start, again.done) == (4, 4)  # saved after every second step
    assert all(key.startswith("layers.") for key in named(run.saved.tensors, "judge"))
    del seen[4:]
    steps(run, again, model, 6, seen)
    assert seen == whole
    assert len(set(whole)) == 6
    found = masters(again)
    assert all(torch.equal(found[name], end[name]) for name in end)
    logged = [json.loads(line) for line in (tmp_path / "cut/metrics.jsonl").open()]
    assert [(line["step"], line["loss"]) for line in logged] == list(enumerate(whole, 1))


def test_another_phase_starts_afresh(model, tmp_path):
    run = training(tmp_path)
    style = learner(run, model, "style")
    steps(run, style, model, 2, [])
    run = training(tmp_path, resume=True)
    fresh = learner(run, model, "judge")
    assert (fresh.start, fresh.proved) == (0, False)
    assert not any(part.any() for name, part in masters(fresh).items() if name.endswith("B"))
    assert learner(run, model, "style").start == 2


def test_the_brace_is_theirs(model, tmp_path):
    """To the byte, until they are there. Gradients are there, of zero, and are added to."""
    one = learner(training(tmp_path), model)
    held = sum(part.nbytes for part in one.brace())
    assert all(p.grad is not None and not p.grad.any() for p in one.lora.parameters())
    one.backward(loss(model), ["a"])
    one.update(1e-2)
    states = one.optimizer.state.values()
    assert held == sum(state["exp_avg"].nbytes + state["exp_avg_sq"].nbytes for state in states) > 0
    assert one.brace() == []


def test_adapters_of_earlier_phases_are_kept(model, tmp_path):
    run = training(tmp_path)
    style, judge = Lora(model, LoraConfig(rank=2), 5), learner(run, model)
    judge.backward(loss(model), ["a"])
    judge.update(1e-2)
    run.after(2, judge, {}, 5, {}, {"style": style})
    saved = checkpoint.latest(tmp_path / "checkpoints")
    assert saved is not None
    found = named(saved.tensors, "style")
    assert {name: part.shape for name, part in found.items()} == {
        name: part.shape for name, part in style.tensors().items()
    }
    assert (saved.step, saved.facts["phase_step"]) == (2, 1)
    assert learner(training(tmp_path, resume=True), model).start == 1  # of its own phase


def test_a_step_reaches_the_model(tiny_base, tmp_path):
    """In 16 bits the model computes with copies: after a step they are those of the masters."""
    model = load(tiny_base, torch.bfloat16, CPU).train()
    one = learner(training(tmp_path), model)
    one.backward(loss(model), ["a"])
    assert one.update(1e-2) > 0
    assert isinstance(one.lora, Lora)
    for name, (A, B) in one.lora.masters.items():
        on = one.lora.places[name].adapter
        assert on is not None
        assert torch.equal(on.A, A.bfloat16())
        assert torch.equal(on.B, B.bfloat16())
        assert B.any()


# What goes wrong


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_loss_that_is_no_number_names_its_batch(model, tmp_path, value):
    run = training(tmp_path)
    one = learner(run, model)
    steps(run, one, model, 1, [])
    one.backward(loss(model), ["fine"])
    with pytest.raises(InputError) as raised:
        one.backward(loss(model) * value, ["pair 7", "pair 8"])
    file = tmp_path / "failed_batch.json"
    assert str(file) in str(raised.value)
    assert "\n" not in str(raised.value)
    assert json.loads(file.read_text()) == {
        "phase": "judge",
        "step": 2,
        "problem": f"the loss is {value}",
        "examples": ["pair 7", "pair 8"],
    }


def test_a_gradient_that_is_no_number_names_the_step(model, tmp_path):
    run = training(tmp_path)
    one = learner(run, model)
    before = masters(one)
    one.backward(loss(model), ["pair 1"])
    one.backward(loss(model), ["pair 2"])
    slope = one.lora.parameters()[0].grad
    assert slope is not None
    slope[0, 0] = float("nan")
    with pytest.raises(InputError, match="step 1 of judge: a gradient of length nan"):
        one.update(1e-2)
    found = json.loads((tmp_path / "failed_batch.json").read_text())
    assert found["examples"] == ["pair 1", "pair 2"]
    assert all(torch.equal(part, before[name]) for name, part in masters(one).items())


def test_nothing_learned_is_an_error(model, tmp_path):
    one = learner(training(tmp_path), model)
    one.backward(loss(model) * 0, ["a"])
    with pytest.raises(AssertionError, match="judge: nothing was learned: step 1"):
        one.update(1e-2)


def test_a_step_that_may_have_no_gradient(model, tmp_path):
    """All groups were flat, and the policy still is the reference: KL has no slope there."""
    one = learner(training(tmp_path), model)
    one.backward(loss(model) * 0, ["a"])
    assert one.update(1e-2, still=True) == 0.0
    assert not one.proved
    one.backward(loss(model), ["a"])
    assert one.update(1e-2, still=True) > 0
    assert one.proved


def test_a_step_without_examples_moves_nothing(model, tmp_path):
    """All of its pairs were too long; that the adapter changes is asked of the next."""
    one = learner(training(tmp_path), model)
    before = masters(one)
    assert one.update(1e-2) == 0.0
    assert all(torch.equal(part, before[name]) for name, part in masters(one).items())
    assert (one.done, one.proved) == (1, False)
    one.backward(loss(model), ["a"])
    assert one.update(1e-2) > 0
    assert (one.done, one.proved) == (2, True)


def test_what_is_logged_before_a_signal_is_saved(model, tmp_path):
    stop = Stop()
    run = training(tmp_path, save_every=100, stop=stop)
    one = learner(run, model)
    steps(run, one, model, 1, [])
    assert checkpoint.latest(run.checkpoints) is None
    stop.asked = int(signal.SIGTERM)
    with pytest.raises(Stopped) as raised:
        steps(run, one, model, 3, [])
    assert raised.value.number == 15
    saved = checkpoint.latest(run.checkpoints)
    assert saved is not None
    assert saved.step == len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 2


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"seed": 1}, "seed = 0, this call has 1"),
        ({"texts": "b"}, "texts = 'a', this call has 'b'"),
        ({"optim": {"lr": 2e-3, "clip": 1.0}}, "optim.lr = 0.001, this call has 0.002"),
        ({"lora": {"rank": 4, "targets": ("q_proj",)}}, "lora.targets = ['q_proj', 'v_proj']"),
        ({"new": 3}, "new = None, this call has 3"),
    ],
)
def test_a_resume_with_other_settings_is_one_line(model, tmp_path, changed, said):
    run = training(tmp_path)
    steps(run, learner(run, model), model, 2, [])
    with pytest.raises(InputError) as raised:
        training(tmp_path, resume=True, **changed)
    assert said in str(raised.value)
    assert "\n" not in str(raised.value)
    assert training(tmp_path, resume=True, budget=8, save_every=3).saved is not None  # these may


def test_a_resume_without_a_run(tmp_path):
    with pytest.raises(InputError, match=r"--resume: expected a run in .*, found none"):
        training(tmp_path / "none", resume=True)


def test_a_resume_before_the_first_checkpoint_starts_at_one(model, tmp_path):
    run = training(tmp_path, save_every=5)
    steps(run, learner(run, model), model, 3, [])
    run = training(tmp_path, resume=True)
    assert run.saved is None
    assert (tmp_path / "metrics.jsonl").read_text() == ""


def test_overwrite_throws_away_and_nothing_else_does(model, tmp_path):
    run = training(tmp_path)
    steps(run, learner(run, model), model, 2, [])
    with pytest.raises(InputError, match="holds another run"):
        training(tmp_path)
    assert checkpoint.latest(run.checkpoints) is not None
    training(tmp_path, overwrite=True)
    assert checkpoint.latest(run.checkpoints) is None
    assert not (tmp_path / "metrics.jsonl").exists()


# Memory and disk


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
        MemoryError(),
        RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried"),
    ],
)
def test_memory_that_runs_out_is_advice(error):
    said = pytest.raises(InputError, match=r"^out of memory: lower --budget$")
    with said, memory_guard("lower --budget"):
        raise error


def test_other_errors_pass():
    with pytest.raises(RuntimeError, match="shapes"), memory_guard("lower --budget"):
        raise RuntimeError("shapes do not match")
    with memory_guard("lower --budget"):
        pass


def test_a_real_allocation_that_fails():
    with pytest.raises(InputError, match="out of memory"), memory_guard("lower --budget"):
        torch.empty(1 << 50, dtype=torch.uint8)


def test_the_disk_that_is_asked_for_is_enough(model, tmp_path):
    run = training(tmp_path)
    one = learner(run, model)
    steps(run, one, model, 2, [])
    files = [path for path in (tmp_path / "checkpoints").rglob("*") if path.is_file()]
    size = sum(path.stat().st_size for path in files)
    assert isinstance(one.lora, Lora)
    rank = one.lora.config.rank
    two, three = (disk_needed(model.config, rank, keep) for keep in (2, 3))
    assert two > 4 * size  # two, the best, and one being written
    assert three - two > 0.8 * size
