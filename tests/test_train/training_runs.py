"""What the tests of both training scripts share: small runs, in this process and in their own."""

import importlib.util
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from subprocess import PIPE
from typing import Any

import tyro

from data.build import demo_pairs
from nanopersrm.pairs import Pair

ROOT = Path(__file__).resolve().parents[2]
UNSTEADY = {"tokens_per_second", "memory_peak", "seconds_drawing", "seconds_training"}


def load_script(name: str) -> Any:
    """train_sft.py or train_rft.py as a module."""
    spec = importlib.util.spec_from_file_location(f"{name}_script", ROOT / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def call(script: Any, *arguments: object) -> int:
    """The script's exit code, run in this process."""
    return int(script.run(tyro.cli(script.Config, args=[str(a) for a in arguments])))


def mistake(script: Any, capsys: Any, arguments: Iterable[object], *words: str) -> str:
    """The one line on standard error, which holds the words."""
    capsys.readouterr()
    assert call(script, *arguments) == 2
    error = str(capsys.readouterr().err)
    assert error.startswith(f"{Path(script.__file__).name}: error: ")
    assert error.count("\n") == 1
    assert all(word in error for word in words), error
    return error


def start(*arguments: object, **variables: str) -> "subprocess.Popen[str]":
    """Python in a process of its own, with one thread."""
    command = [sys.executable, *map(str, arguments)]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "200", **variables}
    return subprocess.Popen(command, cwd=ROOT, env=env, stdout=PIPE, stderr=PIPE, text=True)


def until(process: "subprocess.Popen[str]", out: Path, lines: int) -> None:
    """Wait for so many steps in metrics.jsonl."""
    log = out / "metrics.jsonl"
    deadline = time.monotonic() + 120
    while not log.exists() or log.read_bytes().count(b"\n") < lines:
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.005)


def curve(out: Path) -> list[dict[str, Any]]:
    """metrics.jsonl without what a clock or the machine decides."""
    lines = [json.loads(line) for line in (out / "metrics.jsonl").open()]
    return [{k: v for k, v in line.items() if k not in UNSTEADY} for line in lines]


def files(folder: Path) -> dict[str, bytes]:
    """Name below the folder -> bytes."""
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


def short_pairs(kinds: tuple[str, ...] = ("cross_author",)) -> list[Pair]:
    """16 to train on and 4 others, of a sentence or two: the tiny vocabulary spells words out."""

    def short(text: str, words: int) -> str:
        return " ".join(text.split()[:words])

    drawn = demo_pairs(0, 16, kinds)
    some = [pair for pair in drawn if pair.split == "train"][:16]
    some += [pair for pair in drawn if pair.split == "validation"][:4]
    return [
        replace(
            pair,
            exemplars=(short(pair.exemplars[0], 25),),
            chosen=short(pair.chosen, 20),
            rejected=short(pair.rejected, 20),
        )
        for pair in some
    ]
