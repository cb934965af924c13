"""What stands around every training loop, so that a run survives and can be trusted.

    training = Training(out, settings, steps, …)       files, checkpoints, signals
    learner = Learner(training, "judge", model, lora, config)
    for step in range(learner.start, steps):           0, or where the checkpoint was taken
        learner.backward(loss, names)                  stops at a loss that is no number
        norm = learner.update(lr)                      one step of AdamW, new copies for the model
        training.after(step + 1, learner, …)           a line, a checkpoint when one is due

A run may die at any moment. What it needs to go on is in a checkpoint: masters, moments, random
states, and facts that cannot be computed again. What a step sees follows from its number, so that a
run that goes on makes, on a CPU bit for bit, the numbers of one that never stopped.

Checks that peers learned to want: a loss or gradient that is not finite ends the run and names the
examples of its batch; after the first step the adapter's bytes must have changed, because a loop
that trains nothing prints healthy curves; memory that runs out is one line with the flag to lower.

What we left out: saving while the next step computes.
"""

import json
import math
import time
from collections.abc import Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from kernels.process import trim
from nanopersrm import InputError
from nanopersrm.command import Ending
from nanopersrm.files import hold, write_json
from nanopersrm.judge.adapter_settings import AdapterSettings
from nanopersrm.model import lora_files
from nanopersrm.model.bases import read_json
from nanopersrm.model.lora import Lora
from nanopersrm.model.transformer import Model, ModelConfig
from nanopersrm.style.similarity import Style
from nanopersrm.train import checkpoint, optim, runlog
from nanopersrm.train.ledger import matrices
from nanopersrm.train.optim import OptimConfig
from nanopersrm.train.runlog import RunLog, Stop

MAY_CHANGE = frozenset(  # settings that a run may go on with changed: none moves a weight
    {"pairs", "validation", "adapter", "out", "resume", "overwrite"}  # their contents are hashed
    | {"eval_every", "save_every", "keep_last"}
    | {"budget", "rows", "cache_mb", "chunk_mb", "recompute", "offload"}  # but for rounding
)
FAILED = "failed_batch.json"
SPARE = 1 << 26  # bytes of disk beside checkpoints: logs, replies, the adapter


class Stopped(Ending):
    """A signal, `number`, asked to end, and everything is saved."""

    def __init__(self, number: int):
        super().__init__(128 + number, "stopped and saved; --resume goes on")
        self.number = number


class Learns(Protocol):
    """What a learner needs of an adapter: a `Lora`, or one with a head as in `scalar.py`."""

    def parameters(self) -> list[nn.Parameter]: ...
    def tensors(self) -> dict[str, Tensor]: ...
    def load_tensors(self, tensors: dict[str, Tensor]) -> None: ...
    def refresh(self) -> None: ...
    def on(self, model: Model) -> None: ...


class Training:
    """The folder of one run: its log, its checkpoints, and what it goes on from."""

    def __init__(
        self,
        out: Path,
        settings: Mapping[str, Any],
        steps: int,
        save_every: int,
        keep_last: int,
        stop: Stop,
        resume: bool,
        overwrite: bool,
        device: torch.device,
    ):
        for name, value in (("save-every", save_every), ("keep-last", keep_last)):
            if value < 1:
                raise InputError(f"--{name}: expected a number from 1, got {value}")
        self.out, self.steps, self.device, self.stop = out, steps, device, stop
        check_folder(out, resume, overwrite)
        hold(out)
        self.save_every, self.keep_last = save_every, keep_last
        self.checkpoints = out / "checkpoints"
        if overwrite and not resume:
            checkpoint.clear(self.checkpoints)
            runlog.clear(out)
            (out / FAILED).unlink(missing_ok=True)
        lasting = {key: value for key, value in settings.items() if key not in MAY_CHANGE}
        self.settings = json.loads(json.dumps(lasting, default=str))  # as a checkpoint has them
        self.saved = checkpoint.latest(self.checkpoints) if resume else None
        if resume:
            _same(_begun_with(out, self.saved), self.settings, out)
        first = (self.saved.step if self.saved else 0) + 1
        self.log = RunLog(out, settings, first if resume else None)
        if self.saved is not None:
            self.log.note(f"going on after step {self.saved.step} of {steps}")
        self.begun = time.perf_counter()  # of the step that runs
        self.took: float | None = None  # seconds of it, once it has computed

    def in_phase(self, phase: str) -> bool:
        """True where the checkpoint was taken in this phase."""
        return self.saved is not None and self.saved.facts["phase"] == phase

    def begin(self) -> None:
        """The first step begins now; what came before is no part of its speed."""
        self.begun, self.took = time.perf_counter(), None

    def lap(self) -> None:
        """The step has computed; what follows, a trial, is no part of its speed."""
        self.took = time.perf_counter() - self.begun

    def after(
        self,
        step: int,
        learner: "Learner",
        numbers: Mapping[str, float],
        tokens: int,
        facts: Mapping[str, Any],
        others: Mapping[str, Learns] | None = None,
    ) -> None:
        """Step `step`, counted over all phases from 1, is done: a line, a checkpoint when due.

        tokens: that it computed. facts, others: what the phase cannot compute again, and adapters
        of earlier phases. Raises Stopped after a signal.
        """
        took = self.took or time.perf_counter() - self.begun
        memory, peak = runlog.memory(self.device)
        speed = tokens / max(took, 1e-9)
        self.log.step(
            step,
            self.steps,
            learner.phase,
            {**numbers, "tokens_per_second": speed, "memory": memory, "memory_peak": peak},
        )
        due = step % self.save_every == 0 or step == self.steps or facts.get("score") is not None
        if due or self.stop.asked is not None:
            self.save(step, learner, facts, others or {})
        self.obey()
        if self.device.type == "cpu":
            trim()
        self.begin()

    def obey(self) -> None:
        """Raises Stopped after a signal."""
        if self.stop.asked is not None:
            raise Stopped(self.stop.asked)

    def save(
        self, step: int, learner: "Learner", facts: Mapping[str, Any], others: Mapping[str, Learns]
    ) -> None:
        """A checkpoint."""
        tensors = {"random": torch.get_rng_state()}
        if self.device.type == "cuda":
            tensors["random_cuda"] = torch.cuda.get_rng_state(self.device)
        for phase, lora in {**others, learner.phase: learner.lora}.items():
            tensors |= {f"{phase}.{name}": part.cpu() for name, part in lora.tensors().items()}
        moments = optim.state_tensors(learner.optimizer)
        tensors |= {f"optimizer.{name}": part for name, part in moments.items()}
        record = {
            **facts,
            "phase": learner.phase,
            "phase_step": learner.done,
            "scaler": optim.scaler_numbers(learner.scaler),
            "settings": self.settings,
        }
        checkpoint.save(self.checkpoints, step, tensors, record, self.keep_last)

    def fail(self, phase: str, step: int, problem: str, names: Sequence[str]) -> InputError:
        """The end of a run that went wrong, with the examples of its batch written out."""
        file = self.out / FAILED
        facts = {"phase": phase, "step": step, "problem": problem, "examples": list(names)}
        write_json(file, facts)
        return InputError(
            f"step {step} of {phase}: {problem}; the examples of its batch are in {file}"
        )


class Learner:
    """One adapter being trained: its optimizer, loss scaling, and how far it has come."""

    def __init__(
        self, training: Training, phase: str, model: Model, lora: Learns, config: OptimConfig
    ):
        self.training, self.phase, self.model, self.lora = training, phase, model, lora
        self.config, self.start = config, 0
        half = model.norm.weight.dtype == torch.float16
        self.scaler = torch.amp.GradScaler(model.device.type, enabled=half)
        self.optimizer = optim.make(lora.parameters(), config)
        self.names: list[str] = []  # of the examples of this step
        self.proved = training.in_phase(phase)  # that a step changes the adapter
        if training.in_phase(phase):
            self._restore(training)
        self.done = self.start
        lora.on(model)

    def _restore(self, training: Training) -> None:
        saved = training.saved
        assert saved is not None
        self.lora.load_tensors(named(saved.tensors, self.phase))
        optim.load_state_tensors(self.optimizer, named(saved.tensors, "optimizer"))
        optim.load_scaler(self.scaler, saved.facts["scaler"])
        torch.set_rng_state(saved.tensors["random"])
        if "random_cuda" in saved.tensors and self.model.device.type == "cuda":
            torch.cuda.set_rng_state(saved.tensors["random_cuda"], self.model.device)
        self.start = saved.facts["phase_step"]

    def backward(self, loss: Tensor, names: Sequence[str]) -> None:
        """Add the gradient of a micro-batch's loss (); `names` are its examples."""
        self.names += names
        if not math.isfinite(value := float(loss.detach())):  # waits for the GPU
            raise self.training.fail(self.phase, self.done + 1, f"the loss is {value}", names)
        self.scaler.scale(loss).backward()

    def forget(self) -> None:
        """Drop what `backward` has added up."""
        self.optimizer.zero_grad(set_to_none=True)
        self.names = []

    def brace(self) -> list[Tensor]:
        """Hold what a later step holds beside its micro-batch: gradients, to be forgotten, and as
        many bytes as Adam's moments will take while the first update is still to come."""
        for part in self.lora.parameters():
            part.grad = torch.zeros_like(part)
        if self.optimizer.state or self.config.eight_bit:  # the latter can be paged out
            return []
        return [torch.zeros_like(part) for part in self.lora.parameters() for _ in range(2)]

    def update(self, lr: float, still: bool = False) -> float:
        """One step of AdamW. Gives the gradient's length before it was cut; 0 without examples.

        still: the step may well have no gradient, so that the adapter changes is asked of the next.
        """
        self.done += 1
        if not self.names:  # every pair of the step was too long
            return 0.0
        before = [] if self.proved else [part.detach().clone() for part in self.lora.parameters()]
        try:
            norm = optim.update(self.optimizer, self.scaler, lr, self.config.clip)
        except FloatingPointError as error:
            raise self.training.fail(self.phase, self.done, f"{error}", self.names) from error
        self.names = []
        fp16 = self.scaler.is_enabled()  # which may have to find its scale
        if not (self.proved or fp16 or (still and norm == 0)):
            after = self.lora.parameters()
            assert any(not torch.equal(a, b) for a, b in zip(before, after, strict=True)), (
                f"{self.phase}: nothing was learned: step {self.done} has not changed the adapter"
            )
            self.proved = True
        self.lora.refresh()
        self.lora.on(self.model)
        return norm


def save_adapter(folder: Path, made_for: AdapterSettings, lora: Lora, style: Style | None) -> None:
    """The folder that judge.py loads, written beside it and renamed when whole."""
    part = checkpoint.fresh(folder.with_name(f".{folder.name}.part"))
    lora_files.save(part, lora, made_for.base)
    if style is not None:
        style.save(checkpoint.fresh(part / "style"), made_for.base)
    made_for.save(part)
    checkpoint.replace_folder(part, folder)


def named(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """Those of a checkpoint that begin with "prefix.", without it."""
    own = f"{prefix}."
    return {name[len(own) :]: part for name, part in tensors.items() if name.startswith(own)}


@contextmanager
def memory_guard(advice: str):  # type: ignore[no-untyped-def]
    """Memory that runs out inside becomes one line with the advice."""
    try:
        yield
    except (torch.OutOfMemoryError, MemoryError) as error:
        raise InputError(f"out of memory: {advice}") from error
    except RuntimeError as error:
        if "can't allocate memory" in str(error) or "out of memory" in str(error):
            raise InputError(f"out of memory: {advice}") from error
        raise


def check_folder(out: Path, resume: bool, overwrite: bool) -> None:
    """Before anything slow: is there a run to go on with, or none that would be lost?"""
    there = (out / "config.json").exists()
    if resume and not there:
        raise InputError(f"--resume: expected a run in {out}, found none")
    if there and not resume and not overwrite:
        raise InputError(
            f"{out} holds another run: --resume goes on with it, --overwrite replaces it, "
            "another --out keeps it"
        )


def check_numbers(config: object, least: Mapping[str, int]) -> None:
    """Numbers of a script's flags, or None where the preset decides, from these on."""
    for name, lowest in least.items():
        number = getattr(config, name)
        if number is not None and number < lowest:
            flag = name.replace("_", "-")
            raise InputError(f"--{flag}: expected a number from {lowest}, got {number}")


def disk_needed(config: ModelConfig, rank: int, keep_last: int) -> int:
    """Bytes of checkpoints, one more being written: two adapters and moments; of two results."""
    numbers = rank * config.layers * sum(map(sum, matrices(config)))
    return (keep_last + 2) * numbers * 4 * 4 + 2 * numbers * 2 * 4 + SPARE


def _begun_with(out: Path, saved: checkpoint.Checkpoint | None) -> dict[str, Any]:
    """The settings of a run, from its checkpoint or, before there is one, from config.json."""
    if saved is not None:
        return dict(saved.facts["settings"])
    settings = read_json(out / "config.json").get("config")
    if not isinstance(settings, dict):
        raise InputError(f"{out / 'config.json'}: expected an object as config")
    return {key: value for key, value in settings.items() if key not in MAY_CHANGE}


def _same(before: Mapping[str, Any], now: Mapping[str, Any], out: Path) -> None:
    """A run goes on with the settings it began with."""
    was, is_now = _flat(before), _flat(now)
    for key in sorted({*was, *is_now}):
        if was.get(key) != is_now.get(key):
            raise InputError(
                f"--resume: {out} was begun with {key} = {was.get(key)!r}, this call has "
                f"{is_now.get(key)!r}; give the same settings, or another --out"
            )


def _flat(settings: Mapping[str, Any], above: str = "") -> dict[str, Any]:
    """{"optim": {"lr": 1}} -> {"optim.lr": 1}, as flags are written."""
    found: dict[str, Any] = {}
    for key, value in settings.items():
        if isinstance(value, dict):
            found |= _flat(value, f"{above}{key}.")
        else:
            found[above + key] = value
    return found
