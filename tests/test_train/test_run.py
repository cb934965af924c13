"""Around the loop: a resume bit for bit, losses that are no number, signals, the log, memory."""

import json
import math
import os
import signal
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from fixtures import CPU, WEIGHED, make_adapter, moved
from torch import Tensor

from nanopersrm import InputError
from nanopersrm.judge import adapter_settings
from nanopersrm.judge.adapter_settings import AdapterSettings
from nanopersrm.model.cache import Layout
from nanopersrm.model.lora import Lora, LoraConfig, load_lora
from nanopersrm.model.tokenizer import Tokenizer
from nanopersrm.model.transformer import Model
from nanopersrm.model.weights import load
from nanopersrm.style.ledger import Measurer
from nanopersrm.train import checkpoint, run
from nanopersrm.train.optim import OptimConfig
from nanopersrm.train.run import Learner, Run, Stopped, memory_guard, save_adapter, save_final
from nanopersrm.train.setup import load_measurer

IDS, LAYOUT = torch.tensor([5, 90, 17, 33, 2]), Layout.of([5])
SETTINGS: dict[str, Any] = {"seed": 0, "texts": "a", "budget": 64, "save_every": 2}
SETTINGS |= {"optim": {"lr": 1e-3, "clip": 1.0}}
SETTINGS |= {"lora": {"rank": 4, "targets": ("q_proj", "v_proj")}}


@pytest.fixture(scope="module")
def model(tiny_base) -> Model:
    return load(tiny_base, torch.float32, CPU).train()


def run_in(out: Path, resume: bool = False, overwrite: bool = False, **settings: Any) -> Run:
    flags = {"out": out, "resume": resume, "overwrite": overwrite, "keep_last": 2}
    config = SimpleNamespace(**flags, save_every=settings.pop("save_every", 2))
    return Run(config, SETTINGS | settings, 6, CPU)


def learner_of(run: Run, model: Model, phase: str = "judge") -> Learner:
    return Learner(run, phase, model, Lora(model, LoraConfig(rank=4), 0), OptimConfig(lr=1e-2))


def loss_of(model: Model) -> Tensor:
    hidden = model(IDS, LAYOUT)
    return hidden.square().mean() + 0.1 * hidden.mean()


def train(learner: Learner, last: int, losses: list[float], **facts: Any) -> None:
    """Steps up to `last`, whose losses are appended."""
    for step in range(learner.done, last):
        loss = loss_of(learner.model)
        losses.append(loss.item())
        learner.backward(loss, [f"pair {step}"])
        numbers = {"loss": losses[-1], "lr": 1e-2, "gradient_norm": learner.update(1e-2)}
        learner.run.finish_step(step + 1, learner, numbers, 5, facts)


def masters(learner: Learner) -> dict[str, Tensor]:
    return {name: part.clone() for name, part in learner.lora.tensors().items()}


def test_a_run_goes_on_where_it_was(model, tmp_path):
    whole: list[float] = []
    learner = learner_of(run_in(tmp_path / "whole"), model)
    train(learner, 6, whole)
    end = masters(learner)
    losses: list[float] = []
    train(learner_of(run_in(tmp_path / "cut"), model), 5, losses, place=7)
    again = run_in(tmp_path / "cut", resume=True)
    assert again.resumed_in("judge")
    assert not again.resumed_in("reading")
    assert again.resumed is not None
    assert again.resumed["place"] == 7
    learner = learner_of(again, model)
    assert (learner.first_step, learner.done) == (4, 4)  # saved after every second step
    del losses[4:]
    train(learner, 6, losses)
    assert losses == whole
    assert len(set(whole)) == 6
    assert all(torch.equal(part, end[name]) for name, part in masters(learner).items())
    lines = [json.loads(line) for line in (tmp_path / "cut/metrics.jsonl").open()]
    assert [(line["step"], line["loss"]) for line in lines] == list(enumerate(whole, 1))


# What goes wrong


def test_a_loss_or_gradient_that_is_no_number_moves_nothing(model, tmp_path):
    learner = learner_of(run_in(tmp_path), model)
    before = masters(learner)
    with pytest.raises(InputError, match=r"step 1 of judge.*pair 7, pair 8$"):
        learner.backward(loss_of(model) * math.nan, ["pair 7", "pair 8"])
    learner.backward(loss_of(model), ["pair 1"])
    slope = learner.lora.parameters()[0].grad
    assert slope is not None
    slope[0, 0] = math.nan
    with pytest.raises(InputError, match="pair 1"):
        learner.update(1e-2)
    assert all(torch.equal(part, before[name]) for name, part in masters(learner).items())


def test_a_signal_saves_and_stops(model, tmp_path):
    with run_in(tmp_path, save_every=100) as stopped:
        learner = learner_of(stopped, model)
        train(learner, 1, [])
        assert checkpoint.load_latest(stopped.checkpoints) is None
        os.kill(os.getpid(), signal.SIGTERM)
        with pytest.raises(Stopped) as raised:
            train(learner, 3, [])
    assert raised.value.code == 143
    state = checkpoint.load_latest(stopped.checkpoints)
    assert state is not None
    assert state["step"] == len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 2
    with run_in(tmp_path, resume=True):
        os.kill(os.getpid(), signal.SIGINT)
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)


def test_a_resume_with_other_settings(model, tmp_path):
    train(learner_of(run_in(tmp_path), model), 2, [])
    for changed, word in (
        ({"optim": {"lr": 2e-3, "clip": 1.0}}, r"optim\.lr 0\.001 \(now 0\.002\)"),
        ({"lora": {"rank": 4, "targets": ("q_proj",)}}, "lora.targets"),
        ({"new": 3, "texts": "b"}, "new None.*texts 'a'"),
    ):
        with pytest.raises(InputError, match=word) as raised:
            run_in(tmp_path, resume=True, **changed)
        assert "\n" not in str(raised.value)
    assert run_in(tmp_path, resume=True, budget=8, save_every=3).resumed is not None  # these may


def test_which_runs_may_begin(model, tmp_path):
    with pytest.raises(InputError, match="found none"):
        run_in(tmp_path / "none", resume=True)
    train(learner_of(run_in(tmp_path, save_every=5), model), 3, [])
    resumed = run_in(tmp_path, resume=True)  # before the first checkpoint
    assert resumed.resumed is None
    assert (tmp_path / "metrics.jsonl").read_text() == ""
    with pytest.raises(InputError, match="holds another run"):
        run_in(tmp_path)
    train(learner_of(run_in(tmp_path, overwrite=True), model), 2, [])
    run_in(tmp_path, overwrite=True)
    assert checkpoint.load_latest(tmp_path / "checkpoints") is None
    assert not (tmp_path / "metrics.jsonl").exists()


@pytest.mark.parametrize("score", [0.9, 0.5, None])
def test_the_best_is_kept_where_it_is_better_than_the_start(model, tmp_path, score):
    learner = learner_of(run_in(tmp_path), model)
    start = {"pairs": 4, "accuracy": 0.5}
    train(learner, 3, [], score=score, validation=[start])
    best = masters(learner)
    train(learner, 6, [], score=None, validation=[start])
    settings = AdapterSettings("b", None, False, "fp32", "pointwise")
    end = masters(learner)
    line = save_final(learner.run, "judge", settings, learner.lora, Measurer(WEIGHED))
    kept = load_lora(tmp_path / "adapter", model).tensors()
    assert all(torch.equal(part, end[name]) for name, part in kept.items())
    assert (tmp_path / "best").exists() == (score == 0.9) == ("step 3" in line)
    if score == 0.9:
        kept = load_lora(tmp_path / "best", model).tensors()
        assert all(torch.equal(part, best[name]) for name, part in kept.items())


def test_an_adapter_is_saved_whole(base, tmp_path):
    """Evidence and reading come back as they were; those of another adapter there go."""
    model, tokenizer = load(base, torch.float32, CPU), Tokenizer.load(base)
    made, out = make_adapter(tmp_path / "made", base), tmp_path / "out"
    settings, lora = AdapterSettings("b", None, False, "fp32", "pointwise", True), moved(model, 3)
    save_adapter(out, settings, lora, load_measurer(made, model, tokenizer))
    for part in ("reading/adapter_model.safetensors", "evidence.json"):
        assert (out / part).read_bytes() == (made / part).read_bytes()
    assert adapter_settings.read(out) == settings
    save_adapter(out, settings, lora, Measurer(WEIGHED))
    assert not (out / "reading").exists()


# The log


def test_the_line_and_the_file_of_a_step(model, tmp_path, capsys):
    with run_in(tmp_path) as logged:
        numbers = {"loss_reading": 1.25, "reward_twin": 0.5, "bad": math.nan, "lr": 2e-4}
        logged.finish_step(1, learner_of(logged, model), numbers, 5)
        logged.write_replies(1, "text")
    line = capsys.readouterr().out.splitlines()[-1]
    for part in ("judge", "1/6", "reading 1.25", "lr 0.0002", "tok/s", "GB", "left"):
        assert part in line
    assert "twin" not in line
    record = json.loads((tmp_path / "metrics.jsonl").read_text())
    assert record["bad"] is None
    assert {"step": 1, "phase": "judge", "reward_twin": 0.5}.items() <= record.items()
    assert (tmp_path / "replies/step-000001.txt").read_text() == "text"
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["config"]["optim"] == {"lr": 1e-3, "clip": 1.0}
    assert config["versions"]["torch"] == torch.__version__


def test_tensorboard_where_it_is_installed(model, tmp_path, monkeypatch):
    events = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    with run_in(tmp_path) as logged:
        logged.finish_step(1, learner_of(logged, model), {"loss": 1.25}, 5)
    accumulator = events.EventAccumulator(str(tmp_path))
    accumulator.Reload()
    assert accumulator.Scalars("judge/loss")[0].value == 1.25
    monkeypatch.setitem(run.sys.modules, "torch.utils.tensorboard", None)
    assert run_in(tmp_path / "without").board is None


def test_memory_that_runs_out_is_advice():
    for error in (torch.OutOfMemoryError("CUDA"), RuntimeError("can't allocate memory: you")):
        with pytest.raises(InputError, match="--budget"), memory_guard("lower --budget"):
            raise error
    with pytest.raises(RuntimeError, match="shapes"), memory_guard("lower --budget"):
        raise RuntimeError("shapes do not match")
