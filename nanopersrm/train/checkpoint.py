"""Checkpoints: what a run needs to go on, in folders that are whole or not there.

    RUN/checkpoints/step-000120/state.safetensors   weights, optimizer, random states: any tensors
                                facts.json          {"step": 120, "sha256": "…", "facts": {…}}

A checkpoint grows under the name .step-000120.part. Its files are forced to the disk (fsync), and
only then does it get its name, in one rename. A process that dies at any moment, or a machine that
loses power, leaves whole checkpoints and a leftover that the next `save` or `latest` removes. A
checkpoint that is replaced or pruned loses its name in one rename, too, before its files go:

    .step-000120.part   half written, or half deleted      removed
    .step-000120.old    replaced, still whole              put back if the new one is not there

Kept are the last few and the best, by `facts["score"]` (higher is better; none: None). Tensors are
safetensors, facts are JSON: reading a checkpoint from a stranger runs no code. The SHA-256 finds
what a worn disk has changed in the tensors.

What we left out: writing while the training goes on.
"""

import hashlib
import json
import math
import os
import re
import shutil
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from nanopersrm import InputError
from nanopersrm.files import reason, write_json

NAME = re.compile(r"step-(\d{6,})")
LEFTOVER = re.compile(r"\.(step-\d{6,})\.(part|old)")
STATE, FACTS = "state.safetensors", "facts.json"


@dataclass(frozen=True)
class Checkpoint:
    """What `save` was given."""

    step: int
    tensors: dict[str, Tensor]  # on the CPU
    facts: dict[str, Any]
    path: Path


def save(
    folder: Path, step: int, tensors: dict[str, Tensor], facts: dict[str, Any], keep_last: int = 2
) -> Path:
    """Write a checkpoint, then prune; gives its folder. One of the same step is replaced.

    facts: anything that JSON can hold. No tensor may share memory with another.
    """
    assert step >= 0, f"step {step} is negative"
    score = facts.get("score")
    assert score is None or math.isfinite(score), f"score {score}: expected a number, or None"
    assert keep_last >= 1, f"keep_last {keep_last} would remove what was just written"
    path = folder / f"step-{step:06d}"
    part, old = folder / f".{path.name}.part", folder / f".{path.name}.old"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _clean(folder)
        part.mkdir()
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, part / STATE)
        _to_disk(part / STATE)
        record = {"step": step, "sha256": _sha256(part / STATE), "facts": facts}
        write_json(part / FACTS, record)
        _to_disk(part)
        if path.exists():
            os.rename(path, old)
        os.rename(part, path)
        _to_disk(folder)
        if old.exists():
            shutil.rmtree(old)
        _prune(folder, keep_last)
    except (OSError, SafetensorError) as error:
        raise InputError(f"{path}: cannot be written ({reason(error)})") from error
    finally:
        shutil.rmtree(part, ignore_errors=True)  # half of it may have filled the disk
    return path


def latest(folder: Path) -> Checkpoint | None:
    """The checkpoint of the highest step; None where there is none yet."""
    steps = _steps(folder)
    return _load(steps[max(steps)]) if steps else None


def best(folder: Path) -> Checkpoint | None:
    """The checkpoint with the highest score, the later of two equal ones; None without scores."""
    steps = _steps(folder)
    step = _best({step: _record(path) for step, path in steps.items()})
    return None if step is None else _load(steps[step])


def clear(folder: Path) -> None:
    """Remove all checkpoints of an earlier run, and nothing else."""
    try:
        for path in _steps(folder).values():
            _remove(path)
    except OSError as error:
        raise InputError(f"{folder}: cannot be cleared ({reason(error)})") from error


def check_room(folder: Path, need: int) -> None:
    """Create the folder, and prove that it can be written and that the disk has `need` bytes."""
    probe = folder / f".probe-{os.getpid()}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        try:
            with open(probe, "wb") as file:
                file.write(bytes(4096))
                file.flush()
                os.fsync(file.fileno())
        finally:
            probe.unlink(missing_ok=True)
        free = shutil.disk_usage(folder).free
    except FileExistsError as error:
        raise InputError(f"{folder}: expected a folder, found a file") from error
    except OSError as error:
        raise InputError(f"{folder}: cannot be written ({reason(error)})") from error
    if free < need:
        raise InputError(
            f"{folder}: expected {need / 1e9:.2f} GB of free disk, found {free / 1e9:.2f} GB"
        )


def fresh(folder: Path) -> Path:
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
        if old.exists():
            shutil.rmtree(old)
        if path.exists():
            os.rename(path, old)
        os.rename(part, path)
        shutil.rmtree(old, ignore_errors=True)
    except OSError as error:
        raise InputError(f"{path}: cannot be written ({reason(error)})") from error


def _steps(folder: Path) -> dict[int, Path]:
    """step -> folder of each whole checkpoint; leftovers are removed on the way."""
    try:
        if not folder.is_dir():
            return {}
        _clean(folder)
        named = [(NAME.fullmatch(path.name), path) for path in folder.iterdir()]
    except OSError as error:
        raise InputError(f"{folder}: cannot be read ({reason(error)})") from error
    return {int(match[1]): path for match, path in named if match and path.is_dir()}


def _clean(folder: Path) -> None:
    for path in list(folder.iterdir()):
        if match := LEFTOVER.fullmatch(path.name):
            whole = folder / match[1]
            if match[2] == "old" and not whole.exists():
                os.rename(path, whole)
            else:
                shutil.rmtree(path)


def _prune(folder: Path, keep_last: int) -> None:
    steps = _steps(folder)
    records = {}
    for step, path in steps.items():
        with suppress(InputError):  # a damaged old one must not stop the run; it is not the best
            records[step] = _record(path)
    for step in steps.keys() - {_best(records), *sorted(steps)[-keep_last:]}:
        _remove(steps[step])


def _remove(path: Path) -> None:
    part = path.with_name(f".{path.name}.part")
    os.rename(path, part)
    shutil.rmtree(part)


def _best(records: dict[int, dict[str, Any]]) -> int | None:
    """The step with the highest score."""
    scores = {step: record["facts"].get("score") for step, record in records.items()}
    rated = [(score, step) for step, score in scores.items() if score is not None]
    return max(rated)[1] if rated else None


def _record(path: Path) -> dict[str, Any]:
    """facts.json of a checkpoint, checked."""
    try:
        record = json.loads((path / FACTS).read_bytes())
        sound = isinstance(record["facts"], dict) and isinstance(record["sha256"], str)
        if not sound or record["step"] != int(path.name.removeprefix("step-")):
            raise ValueError("it is of another step or has lost its fields")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise _damaged(path / FACTS, error) from error
    return record


def _load(path: Path) -> Checkpoint:
    record = _record(path)
    try:
        if _sha256(path / STATE) != record["sha256"]:
            raise ValueError("its SHA-256 is another than when it was written")
        tensors = load_file(path / STATE)
    except (OSError, ValueError, SafetensorError) as error:
        raise _damaged(path / STATE, error) from error
    return Checkpoint(record["step"], tensors, record["facts"], path)


def _damaged(file: Path, error: Exception) -> InputError:
    return InputError(
        f"{file}: a damaged checkpoint ({reason(error)}); "
        f"without the folder {file.parent.name} a run goes on from the one before"
    )


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while piece := file.read(1 << 20):
            digest.update(piece)
    return digest.hexdigest()


def _to_disk(path: Path) -> None:
    """fsync of a file or a folder."""
    if os.name == "nt" and path.is_dir():
        return  # Windows cannot open folders
    number = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(number)
    finally:
        os.close(number)
