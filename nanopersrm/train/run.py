"""One training run: its folder, a log line a step, checkpoints, and a stop between two steps.

    RUN/config.json      every setting, the command, the git commit, versions, the device
        metrics.jsonl    {"step": 12, "phase": "judge", "loss_imitation": 1.2, …}, an object a line
        events.out.*     the same for TensorBoard, where it is installed
        replies/         step-000120.txt: replies as readable text
        checkpoints/     what --resume needs (checkpoint.py)
        adapter/  best/  what comes out, for judge.py --adapter

    with Run(config, settings, steps, …) as run:       Ctrl-C and SIGTERM end it between steps
        learner = Learner(run, "judge", model, lora, config)
        for step in range(learner.first_step, steps):  0, or where the checkpoint was taken
            learner.backward(loss, names)              stops at a loss that is no number
            norm = learner.update(lr)                  one step of AdamW, new copies for the model
            run.finish_step(step + 1, learner, …)      a line, a checkpoint when one is due

A checkpoint holds masters, moments, random states and what cannot be computed again; what a step
sees follows from its number. So a run that goes on makes, on a CPU bit for bit, the numbers of one
that never stopped, if it has the settings that it began with.
"""

import json
import math
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections import deque
from collections.abc import Mapping, Sequence
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from statistics import fmean
from types import FrameType
from typing import Any

import torch
from torch import Tensor

from kernels.process import trim
from nanopersrm import InputError, __version__
from nanopersrm.command import Ending
from nanopersrm.files import reason, write_json, write_text
from nanopersrm.judge.adapter_settings import AdapterSettings
from nanopersrm.model.lora import Lora, save_lora
from nanopersrm.model.transformer import Model
from nanopersrm.style.ledger import Measurer
from nanopersrm.train import checkpoint, optim
from nanopersrm.train.optim import OptimConfig
from nanopersrm.train.presets import check_numbers

MAY_CHANGE = frozenset(  # settings that a run may go on with changed: none moves a weight
    {"pairs", "validation", "out", "resume", "overwrite", "eval_every", "save_every", "keep_last"}
    | {"budget", "rows", "cache_mb", "chunk_mb", "recompute"}  # but for rounding
)
FILE_ONLY = ("validation_", "reward_", "gap_", "kl_", "clip_", "seconds_", "groups_")
TAIL = ("tokens_per_second", "memory_peak")  # at the end of the line


class Stopped(Ending):
    """A signal asked to end, and everything is saved."""

    def __init__(self, number: int):
        super().__init__(128 + number, "stopped and saved; --resume goes on")


class Run:
    """The folder of one run. Steps are counted from 1, over all phases.

    config: of a script, with out, resume, overwrite, save_every and keep_last. settings: a resumed
    run must have the same, but MAY_CHANGE. resumed: the checkpoint that it goes on from, or None.
    """

    def __init__(self, config: Any, settings: Mapping[str, Any], steps: int, device: torch.device):
        check_numbers(vars(config), {"save_every": 1, "keep_last": 1})
        out, resume = config.out, config.resume
        check_out(out, resume, config.overwrite)
        self.out, self.steps, self.device = out, steps, device
        self.save_every, self.keep_last = config.save_every, config.keep_last
        self.checkpoints, self.metrics = out / "checkpoints", out / "metrics.jsonl"
        if config.overwrite and not resume:
            _clear(out)
        self.settings = json.loads(json.dumps(settings, default=str))
        self.resumed = checkpoint.load_latest(self.checkpoints) if resume else None
        if resume:
            _check_same(self.settings, out)
            _keep_lines_before(self.metrics, (self.resumed["step"] if self.resumed else 0) + 1)
        write_json(out / "config.json", {"config": self.settings, **_environment(device)})
        try:
            from torch.utils.tensorboard import SummaryWriter

            self.board: Any = SummaryWriter(str(out))
        except ImportError:  # TensorBoard is not installed
            self.board = None
        self.seconds: deque[float] = deque(maxlen=20)  # of the last steps
        self.signal: int | None = None  # that asked to stop
        self.handlers: dict[int, Any] = {}  # of signals, as they were before
        self.start_clock()
        if self.resumed is not None:
            self.note(f"going on after step {self.resumed['step']} of {steps}")

    def resumed_in(self, phase: str) -> bool:
        """True where the checkpoint was taken in this phase."""
        return self.resumed is not None and self.resumed["phase"] == phase

    def start_clock(self) -> None:
        """The next step begins now; what came before is no part of its speed."""
        self.begun = time.perf_counter()
        self.computed = self.begun  # once `Learner.update` is done; validation is no part of it

    def finish_step(
        self,
        step: int,
        learner: "Learner",
        numbers: Mapping[str, float],
        tokens: int,
        facts: Mapping[str, Any] | None = None,
        others: Mapping[str, Lora] | None = None,
    ) -> None:
        """Log `step`, save a checkpoint when one is due. Raises Stopped after a signal.

        tokens: that the step computed. facts: what its phase cannot compute again; a "score" makes
        it a candidate for the best. others: adapters of earlier phases.
        """
        self.seconds.append(time.perf_counter() - self.begun)
        speed = tokens / max(self.computed - self.begun, 1e-9)
        line = {"tokens_per_second": speed, "memory_peak": peak_memory(self.device)}
        self._log(step, learner.phase, {**numbers, **line})
        facts = facts or {}
        due = step % self.save_every == 0 or step == self.steps or facts.get("score") is not None
        if due or self.signal is not None:
            self._save(step, learner, facts, others or {})
        self.check_signal()
        if self.device.type == "cpu":
            trim()
        self.start_clock()

    def check_signal(self) -> None:
        """Raises Stopped after a signal."""
        if self.signal is not None:
            raise Stopped(self.signal)

    def note(self, text: str) -> None:
        """Print a line that is no step."""
        print(text, flush=True)

    def write_replies(self, step: int, text: str) -> None:
        """Keep replies of this step as readable text."""
        write_text(self.out / "replies" / f"step-{step:06d}.txt", text)

    def _log(self, step: int, phase: str, numbers: Mapping[str, float]) -> None:
        """To metrics.jsonl (null: not finite), to TensorBoard, and as a line."""
        finite = {k: float(v) if math.isfinite(v) else None for k, v in numbers.items()}
        try:
            with open(self.metrics, "a", encoding="utf-8", newline="\n") as file:
                file.write(json.dumps({"step": step, "phase": phase, **finite}) + "\n")
        except OSError as error:
            raise InputError(f"{self.metrics}: cannot be written ({reason(error)})") from error
        if self.board is not None:
            for name, number in finite.items():
                if number is not None:
                    self.board.add_scalar(f"{phase}/{name}", number, step)
        left = timedelta(seconds=round((self.steps - step) * fmean(self.seconds)))
        shown = [
            f"{name.removeprefix('loss_')} {value:<9.4g}"
            for name, value in numbers.items()
            if not name.startswith((*FILE_ONLY, *TAIL))
        ]
        speed, memory = numbers["tokens_per_second"], numbers["memory_peak"] / 1e9
        shown += [f"{speed:,.0f} tok/s  {memory:.2f} GB  {left} left"]
        self.note(" ".join([f"{phase:<6}{step:>5}/{self.steps} ", *shown]))

    def _save(
        self, step: int, learner: "Learner", facts: Mapping[str, Any], others: Mapping[str, Lora]
    ) -> None:
        adapters = {**others, learner.phase: learner.lora}
        state = {
            **facts,
            "step": step,
            "phase": learner.phase,
            "phase_step": learner.done,
            "adapters": {phase: lora.tensors() for phase, lora in adapters.items()},
            "optimizer": learner.optimizer.state_dict(),
            "scaler": dict(learner.scaler.state_dict()),
            "random": torch.get_rng_state(),
        }
        if self.device.type == "cuda":
            state["random_cuda"] = torch.cuda.get_rng_state(self.device)
        checkpoint.save(self.checkpoints, state, self.keep_last)

    def __enter__(self) -> "Run":
        for number in (signal.SIGINT, signal.SIGTERM):
            self.handlers[number] = signal.signal(number, self._on_signal)
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self.handlers.items():
            signal.signal(number, handler)
        if self.board is not None:
            self.board.close()

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and self.signal == number:
            raise KeyboardInterrupt
        self.signal = number
        # Not print: the handler may have interrupted one.
        os.write(2, b"\nstopping after this step; Ctrl-C again stops at once\n")


class Learner:
    """One adapter being trained: its optimizer, loss scaling, and how far it has come."""

    def __init__(self, run: Run, phase: str, model: Model, lora: Lora, config: OptimConfig):
        self.run, self.phase, self.model, self.lora = run, phase, model, lora
        self.config, self.first_step = config, 0
        half = model.norm.weight.dtype == torch.float16
        self.scaler = torch.amp.GradScaler(model.device.type, enabled=half)
        self.optimizer = optim.make(lora.parameters(), config)
        self.names: list[str] = []  # of the examples of this step
        if (state := run.resumed) is not None and run.resumed_in(phase):
            lora.load_tensors(state["adapters"][phase])
            self.optimizer.load_state_dict(state["optimizer"])
            self.scaler.load_state_dict(state["scaler"])
            torch.set_rng_state(state["random"])
            if "random_cuda" in state and model.device.type == "cuda":
                torch.cuda.set_rng_state(state["random_cuda"], model.device)
            self.first_step = state["phase_step"]
        self.done = self.first_step
        lora.on(model)

    def backward(self, loss: Tensor, names: Sequence[str]) -> None:
        """Add the gradient of a micro-batch's loss (); `names` are its examples."""
        self.names += names
        if not math.isfinite(value := float(loss.detach())):  # waits for the GPU
            raise self._failure(self.done + 1, f"the loss is {value}", names)
        self.scaler.scale(loss).backward()

    def update(self, lr: float) -> float:
        """One step of AdamW. Gives the gradient's length before it was cut; 0 without examples."""
        self.done, norm = self.done + 1, 0.0
        if self.names:  # else every pair of the step was too long
            try:
                norm = optim.update(self.optimizer, self.scaler, lr, self.config.clip)
            except FloatingPointError as error:
                raise self._failure(self.done, str(error), self.names) from error
            self.names = []
            self.lora.refresh()
            self.lora.on(self.model)
        self.run.computed = time.perf_counter()
        return norm

    def _failure(self, step: int, problem: str, names: Sequence[str]) -> InputError:
        return InputError(
            f"step {step} of {self.phase}: {problem}; its examples: {', '.join(names)}"
        )


def save_adapter(folder: Path, settings: AdapterSettings, lora: Lora, measurer: Measurer) -> None:
    """The folder that judge.py loads, written beside it and renamed when whole."""
    part = checkpoint.empty_folder(folder.with_name(f".{folder.name}.part"))
    save_lora(part, lora, settings.base)
    measurer.evidence.save(part)
    if measurer.reading is not None:
        measurer.reading.save(checkpoint.empty_folder(part / "reading"), settings.base)
    settings.save(part)
    checkpoint.replace_folder(part, folder)


def save_final(
    run: Run, phase: str, settings: AdapterSettings, lora: Lora, measurer: Measurer
) -> str:
    """Write RUN/adapter, and RUN/best where validation was better after an earlier step.

    Gives a line about the best, or "". The best of few validation pairs is partly the luckiest.
    """
    save_adapter(run.out / "adapter", settings, lora, measurer)
    state = checkpoint.load_best(run.checkpoints)
    if state is None or state["step"] == run.steps or state["phase"] != phase:
        return ""
    before = state["validation"][0]
    if before["pairs"] and before["accuracy"] >= state["score"]:
        return f"no step was better than the start; the best was {state['score']:.1%}\n"
    lora.load_tensors(state["adapters"][phase])
    save_adapter(run.out / "best", settings, lora, measurer)
    return f"{run.out}/best is step {state['step']}, best on validation ({state['score']:.1%})\n"


@contextmanager
def memory_guard(advice: str):  # type: ignore[no-untyped-def]
    """Memory that runs out inside becomes one line with the advice."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        memory = isinstance(error, (MemoryError, torch.OutOfMemoryError))
        if memory or "can't allocate memory" in str(error):
            raise InputError(f"out of memory: {advice}") from error
        raise


def check_out(out: Path, resume: bool, overwrite: bool) -> None:
    """Before anything slow: is there a run to go on with, or none that would be lost?"""
    try:
        out.mkdir(parents=True, exist_ok=True)
        exists = (out / "config.json").exists()
    except OSError as error:
        raise InputError(f"{out}: cannot be written ({reason(error)})") from error
    if resume and not exists:
        raise InputError(f"--resume: expected a run in {out}, found none")
    if exists and not resume and not overwrite:
        raise InputError(f"{out} holds another run: say --resume, --overwrite or another --out")


def peak_memory(device: torch.device) -> int:
    """Bytes at the highest so far: of tensors on a GPU, else of this process (0 on Windows)."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if sys.platform == "win32":
        return 0
    import resource

    highest = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return highest * (1 if sys.platform == "darwin" else 1024)


def _clear(out: Path) -> None:
    """Remove what an earlier run left that this one would mix with, and nothing else."""
    for name in ("checkpoints", "replies", "best"):
        shutil.rmtree(out / name, ignore_errors=True)
    try:
        for path in (*out.glob("events.out.*"), out / "metrics.jsonl"):
            path.unlink(missing_ok=True)
    except OSError as error:
        raise InputError(f"{out}: cannot be cleared ({reason(error)})") from error


def _check_same(now: Mapping[str, Any], out: Path) -> None:
    """A run goes on with the settings it began with; all that differ are named."""
    file = out / "config.json"
    try:
        flat_before, flat_now = _flat(json.loads(file.read_bytes())["config"]), _flat(now)
    except (OSError, ValueError, KeyError) as error:
        raise InputError(f"{file}: expected settings ({reason(error)})") from error
    changed = [
        f"{key} {flat_before.get(key)!r} (now {flat_now.get(key)!r})"
        for key in sorted({*flat_before, *flat_now} - MAY_CHANGE)
        if flat_before.get(key) != flat_now.get(key)
    ]
    if changed:
        raise InputError(f"--resume: {out} was begun with {', '.join(changed)}")


def _flat(settings: Mapping[str, Any], above: str = "") -> dict[str, Any]:
    """{"optim": {"lr": 1}} -> {"optim.lr": 1}, as flags are written."""
    flat: dict[str, Any] = {}
    for key, value in settings.items():
        nested = isinstance(value, dict)
        flat |= _flat(value, f"{above}{key}.") if nested else {above + key: value}
    return flat


def _keep_lines_before(metrics: Path, step: int) -> None:
    """Drop the lines of steps that will be logged again, and half a line of a killed run."""
    lines = metrics.read_text("utf-8").splitlines(keepends=True) if metrics.exists() else []
    whole = [line for line in lines if line.endswith("\n")]
    write_text(metrics, "".join(line for line in whole if json.loads(line)["step"] < step))


def _environment(device: torch.device) -> dict[str, Any]:
    """The command, the commit, versions and the device of a run."""
    cuda = device.type == "cuda"
    return {
        "command": shlex.join(["python", *sys.argv]),
        "commit": _commit(),
        "versions": {"nanopersrm": __version__, "python": sys.version, "torch": torch.__version__},
        "device": torch.cuda.get_device_name(device) if cuda else f"cpu, {os.cpu_count()} cores",
    }


def _commit() -> str | None:
    """The git commit of this code, with "-dirty" where files differ from it; None outside git."""
    root = Path(__file__).resolve().parents[2]
    if not (root / ".git").exists():  # else it would be the commit of somebody else's repository
        return None
    try:
        words = ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=40"]
        return subprocess.run(words, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None
