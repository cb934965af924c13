"""What a run says while it trains: one aligned line a step, and the same numbers in a file.

    judge     112/400  loss   1.2345  imitation   1.1021  lr 1.90e-04  |g|    0.87
        1,234 tok/s    3.21 GB   4m10s left                          (one line on the terminal)

    RUN/config.json    every setting, the commands, the git commit, versions, the machine
        metrics.jsonl  {"step": 12, "phase": "judge", "loss": 1.2345, …}, one object a line
        replies/       step-000120.txt: replies as readable text

Any number may be given, by any name. These have a unit, and a place at the end of the line:
lr, gradient_norm, tokens_per_second, memory and memory_peak (bytes). Names that begin with
"validation_", "reward_" and the like (ASIDE) go to the file alone. All others are shown with 4
digits, where they were first seen; "loss_imitation" is called imitation. A name that a later step
has not leaves its place empty, so that columns do not jump. What is not finite is "nan" on the
terminal and null in the file.

The time left is the mean of the last 20 steps times the steps to go. A run that goes on from a
checkpoint first cuts the later lines off, so each step is there once.

`Stop` lets a loop end between two steps, when it is asked to by Ctrl-C or by the machine's master.
"""

import json
import math
import os
import platform
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Mapping
from datetime import datetime, timezone
from pathlib import Path
from types import FrameType
from typing import Any

import numpy
import torch
from rich.console import Console

from nanopersrm import InputError, __version__
from nanopersrm.files import write_json, write_text

ASIDE = ("validation_", "reward_", "gap_", "kl_", "clip_", "seconds_", "groups_")  # to the file
TAIL = ("lr", "gradient_norm", "tokens_per_second", "memory", "memory_peak")
STEPS_OF_MEAN = 20  # for the time left
PHASE = 9  # characters of the first column


class RunLog:
    """The files of one run, and its lines on the terminal.

    Steps are counted from 1, over all phases. resumed_at: the first step that this run will log,
    when it goes on with an earlier one: 121 after the checkpoint of step 120.
    """

    def __init__(
        self,
        out: Path,
        config: Mapping[str, Any],
        resumed_at: int | None,
        console: Console | None = None,
    ):
        self.out, self.metrics = out, out / "metrics.jsonl"
        self.console = console or Console()
        self.columns: list[str] = []  # of this phase, in the order in which they were first seen
        self.phase = ""
        self.seconds: deque[float] = deque(maxlen=STEPS_OF_MEAN)
        self.last: float | None = None  # when the last step ended
        try:
            out.mkdir(parents=True, exist_ok=True)
            there = self.metrics.exists() and self.metrics.stat().st_size > 0
        except OSError as error:
            raise InputError(f"{out}: cannot be written ({error.strerror})") from error
        if resumed_at is not None:
            self._cut(resumed_at)
        elif there:
            raise InputError(
                f"{out} holds another run: --resume goes on with it, "
                "--overwrite replaces it, another --out keeps it"
            )
        write_json(out / "config.json", self._facts(config, resumed_at))

    def step(self, step: int, steps: int, phase: str, numbers: Mapping[str, float]) -> None:
        """Write and print that `step` of `steps` is done."""
        now = time.perf_counter()
        if self.last is not None:
            self.seconds.append(now - self.last)
        self.last = now
        self.record(step, phase, numbers)
        if phase != self.phase:
            self.phase, self.columns = phase, []
        left = math.nan
        if self.seconds:
            left = (steps - step) * sum(self.seconds) / len(self.seconds)
        self._print(
            f"{phase:<{PHASE}} {step:>{len(str(steps))}}/{steps}{self._line(numbers, left)}"
        )

    def record(self, step: int, phase: str, numbers: Mapping[str, float]) -> None:
        """Write the numbers of a step without printing them."""
        if clash := numbers.keys() & {"step", "phase"}:
            raise AssertionError(f"{clash.pop()} is no name for a number")
        finite = {k: float(v) if math.isfinite(v) else None for k, v in numbers.items()}
        line = json.dumps({"step": step, "phase": phase, **finite}, allow_nan=False)
        try:
            with open(self.metrics, "a", encoding="utf-8", newline="\n") as file:
                file.write(line + "\n")
        except OSError as error:
            raise InputError(f"{self.metrics}: cannot be written ({error.strerror})") from error

    def note(self, text: str) -> None:
        """Print a line that is no step."""
        self._print(text)

    def write_replies(self, step: int, text: str) -> None:
        """Keep replies of this step as readable text."""
        write_text(self.out / "replies" / f"step-{step:06d}.txt", text)

    def _print(self, text: str) -> None:
        self.console.print(text, markup=False, emoji=False, highlight=False, soft_wrap=True)

    def _line(self, numbers: Mapping[str, float], left: float) -> str:
        own = [name for name in numbers if name not in TAIL and not name.startswith(ASIDE)]
        self.columns += [name for name in own if name not in self.columns]
        cells = [_cell(_label(name), numbers.get(name)) for name in self.columns]
        if "lr" in numbers:
            cells.append(f"lr {numbers['lr']:8.2e}")
        if "gradient_norm" in numbers:
            cells.append(f"|g| {_number(numbers['gradient_norm'], 7, 2)}")
        if "tokens_per_second" in numbers:
            cells.append(f"{numbers['tokens_per_second']:>9,.0f} tok/s")
        if (memory := numbers.get("memory_peak", numbers.get("memory"))) is not None:
            cells.append(f"{memory / 1e9:6.2f} GB")
        cells.append(f"{span(left) if math.isfinite(left) else '?':>6} left")
        return "  " + "  ".join(cells)

    def _cut(self, resumed_at: int) -> None:
        """Drop the steps that this run will log again, and half a line of a killed run."""
        try:
            data = self.metrics.read_bytes() if self.metrics.exists() else b""
        except OSError as error:
            raise InputError(f"{self.metrics}: cannot be read ({error.strerror})") from error
        kept = []
        for number, line in enumerate(data[: data.rfind(b"\n") + 1].splitlines(), 1):
            try:
                before = json.loads(line)["step"] < resumed_at
            except (ValueError, KeyError, TypeError) as error:
                raise InputError(
                    f"{self.metrics}, line {number}: expected a JSON object with a step"
                ) from error
            if before:
                kept.append(line.decode() + "\n")
        write_text(self.metrics, "".join(kept))

    def _facts(self, config: Mapping[str, Any], resumed_at: int | None) -> dict[str, Any]:
        """What config.json holds. The commands and times of all parts of the run are kept."""
        started = datetime.now(timezone.utc).isoformat(timespec="seconds")
        command = shlex.join(["python", *sys.argv])
        part = {"command": command, "started": started, "from_step": resumed_at}
        parts = [part]
        if resumed_at is not None:
            try:
                parts = [*json.loads((self.out / "config.json").read_bytes())["parts"], part]
            except (OSError, ValueError, KeyError, TypeError):
                parts = [part]  # lost, and no reason not to go on
        return {
            "config": json.loads(json.dumps(config, default=str), parse_constant=str),
            "parts": parts,
            "commit": commit(Path(__file__).resolve().parents[2]),
            "versions": {
                "nanopersrm": __version__,
                "python": platform.python_version(),
                "torch": torch.__version__,
                "numpy": numpy.__version__,
            },
            "processor": _processor(),
            "gpus": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
            "cores": os.cpu_count(),
            "load": round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None,
        }


def clear(out: Path) -> None:
    """Remove what the log of an earlier run left, and nothing else."""
    try:
        for name in ("metrics.jsonl", "config.json"):
            (out / name).unlink(missing_ok=True)
        if (out / "replies").is_dir():
            shutil.rmtree(out / "replies")
    except OSError as error:
        raise InputError(f"{out}: cannot be cleared ({error.strerror})") from error


def _label(name: str) -> str:
    return (name.removeprefix("loss_") or name).replace("_", " ")


def _cell(label: str, value: float | None) -> str:
    """A label and its number, or as many blanks."""
    return f"{label} {_number(value, 8, 4)}" if value is not None else " " * (len(label) + 9)


def _number(value: float, width: int, digits: int) -> str:
    """Exactly `width` characters: 1.2345, 12345.67, or 1.2e+09 where no decimals help."""
    for decimals in range(digits, -1, -1):
        if len(plain := f"{value:{width}.{decimals}f}") <= width:
            return plain
    return f"{value:{width}.{width - 7}e}"


def span(seconds: float) -> str:
    """45s, 4m10s, 2h05m, 3d04h."""
    whole = round(seconds)
    for limit, large, small, names in ((3600, 60, 1, "ms"), (86400, 3600, 60, "hm")):
        if 60 <= whole < limit:
            return f"{whole // large}{names[0]}{whole % large // small:02d}{names[1]}"
    return f"{whole}s" if whole < 60 else f"{whole // 86400}d{whole % 86400 // 3600:02d}h"


def commit(root: Path) -> str | None:
    """The git commit of the folder, with "+changes" where files differ from it; None outside git.

    Only where .git is in the folder itself: a package that is installed in somebody else's
    repository is not of that commit.
    """

    def git(*words: str) -> str:
        done = subprocess.run(
            ["git", "--no-optional-locks", "-C", str(root), *words],
            capture_output=True,
            text=True,
            timeout=30,
            check=True,
        )
        return done.stdout.strip()

    if not (root / ".git").exists():
        return None
    try:
        changed = git("status", "--porcelain", "--untracked-files=no")
        return git("rev-parse", "HEAD") + ("+changes" if changed else "")
    except (OSError, subprocess.SubprocessError):
        return None


def memory(device: torch.device) -> tuple[int, int]:
    """Bytes in use now, and at the highest: of tensors on a GPU, else of this process.

    Where there is no /proc, the first is not known and the highest stands in for it; 0 on Windows.
    """
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device), torch.cuda.max_memory_allocated(device)
    status = Path("/proc/self/status")
    if status.exists():
        fields = dict(line.split(":", 1) for line in status.read_text().splitlines())
        now, highest = (int(fields[name].split()[0]) * 1024 for name in ("VmRSS", "VmHWM"))
        return now, highest
    try:
        import resource
    except ImportError:
        return 0, 0
    highest = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    highest *= 1 if sys.platform == "darwin" else 1024
    return highest, highest


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    named = (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    return next(named, platform.machine())


class Stop:
    """`with Stop() as stop:` turns Ctrl-C and SIGTERM into `stop.asked`, the signal's number.

    The loop looks at it between two steps, saves and leaves. A second Ctrl-C is KeyboardInterrupt
    at once. Outside the main thread, where Python allows no handlers, nothing happens.
    """

    def __init__(self) -> None:
        self.asked: int | None = None
        self.pressed = 0
        self.before: dict[int, Any] = {}

    def __enter__(self) -> "Stop":
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self.before[number] = signal.signal(number, self._ask)
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self.before.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
        self.before = {}

    def _ask(self, number: int, frame: FrameType | None) -> None:
        self.asked = number
        if number == signal.SIGINT:
            self.pressed += 1
            if self.pressed > 1:
                raise KeyboardInterrupt
            # Not print: the handler may have interrupted one.
            os.write(2, b"\nstopping after this step; Ctrl-C again stops at once\n")
