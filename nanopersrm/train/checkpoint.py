"""Checkpoints: all that a run needs to go on, one file a step.

    RUN/checkpoints/step-000120.pt    {"step": 120, "adapters": …, "optimizer": …, "random": …, …}
                    best.pt           a copy of the one with the highest "score"

A checkpoint is one dict of tensors, numbers and texts, written by `torch.save` under a temporary
name and renamed: a process that dies leaves the old files or the new one. `torch.load` reads it
with `weights_only=True`, which runs no code. Kept are the last few, and the best.
"""

import os
import pickle
import shutil
from pathlib import Path
from typing import Any

import torch

from nanopersrm import InputError
from nanopersrm.files import reason

BEST = "best.pt"

State = dict[str, Any]  # what a checkpoint holds; "step" at least, "score" may be None


def save(folder: Path, state: State, keep_last: int = 2) -> Path:
    """Write the checkpoint of state["step"], then remove all but the last few and the best."""
    path = folder / f"step-{state['step']:06d}.pt"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _write(path, state)
        if state.get("score") is not None:
            best = load_best(folder)
            if best is None or state["score"] >= best["score"]:
                _write(folder / BEST, state)
        for old in _paths(folder)[:-keep_last]:
            old.unlink()
    except (OSError, RuntimeError) as error:  # torch's writer raises the latter on a full disk
        raise InputError(f"{path}: cannot be written ({reason(error)})") from error
    return path


def load_latest(folder: Path) -> State | None:
    """The checkpoint of the highest step; None where there is none yet."""
    paths = _paths(folder)
    return _load(paths[-1]) if paths else None


def load_best(folder: Path) -> State | None:
    """The checkpoint with the highest score, the later of two equal ones; None without scores."""
    return _load(folder / BEST) if (folder / BEST).exists() else None


def empty_folder(folder: Path) -> Path:
    """An empty folder of this name; what an earlier, broken attempt left is removed."""
    try:
        if folder.exists():
            shutil.rmtree(folder)
        folder.mkdir(parents=True)
    except OSError as error:
        raise InputError(f"{folder}: cannot be written ({reason(error)})") from error
    return folder


def replace_folder(part: Path, path: Path) -> None:
    """Give a finished folder its name; what had the name before goes."""
    old = path.with_name(f".{path.name}.old")
    try:
        shutil.rmtree(old, ignore_errors=True)
        if path.exists():
            os.rename(path, old)
        os.rename(part, path)
        shutil.rmtree(old, ignore_errors=True)
    except OSError as error:
        raise InputError(f"{path}: cannot be written ({reason(error)})") from error


def _write(path: Path, state: State) -> None:
    part = path.with_name(f".{path.name}.part")
    try:
        with open(part, "wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def _paths(folder: Path) -> list[Path]:
    """Of the checkpoints, by step."""
    return sorted(folder.glob("step-*.pt"), key=lambda path: int(path.stem[5:]))


def _load(path: Path) -> State:
    try:
        return dict(torch.load(path, map_location="cpu", weights_only=True))
    except (OSError, RuntimeError, TypeError, EOFError, pickle.UnpicklingError) as error:
        raise InputError(f"{path}: a damaged checkpoint, remove it ({reason(error)})") from error
