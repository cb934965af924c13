"""Checkpoints: whole or not there, whatever happens while they are written."""

import errno
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_bases import refused

from nanopersrm import InputError
from nanopersrm.train import checkpoint
from nanopersrm.train.checkpoint import load_best, load_latest, save

STATE: dict[str, Any] = {"step": 120, "score": 0.25, "name": "é"}
STATE |= {"half": torch.randn(5).bfloat16(), "random": torch.get_rng_state()}


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_what_is_saved_comes_back(tmp_path):
    folder = tmp_path / "run" / "checkpoints"
    assert load_latest(folder) is load_best(folder) is None
    assert save(folder, STATE) == folder / "step-000120.pt"
    for state in (load_latest(folder), load_best(folder)):
        assert state is not None
        assert state.keys() == STATE.keys()
        assert state["name"] == "é"
        assert torch.equal(state["random"], STATE["random"])
        assert state["half"].dtype == torch.bfloat16
        assert torch.equal(state["half"], STATE["half"])


def test_the_last_two_and_the_best_are_kept(tmp_path):
    scores = {10: 0.5, 20: 0.9, 30: 0.9, 40: None, 50: 0.1, 1000000: 0.2}
    for step, score in scores.items():
        save(tmp_path, {"step": step, "score": score})
    assert names(tmp_path) == ["best.pt", "step-000050.pt", "step-1000000.pt"]
    latest, best = load_latest(tmp_path), load_best(tmp_path)
    assert latest is not None
    assert best is not None
    assert (latest["step"], best["step"]) == (1000000, 30)  # of equal ones the later


def test_a_full_disk_leaves_what_was_there(tmp_path, monkeypatch):
    save(tmp_path, {"step": 1})

    def full(number: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(checkpoint.os, "fsync", full)
    with pytest.raises(InputError, match=r"step-000002.*No space"):
        save(tmp_path, {"step": 2})
    assert names(tmp_path) == ["step-000001.pt"]


class Malice:
    def __reduce__(self):
        return print, ("code ran",)


@pytest.mark.parametrize("damage", [b"", b"PK", b"\x80\x04K\x01.", Malice()])
def test_a_damaged_or_strange_one_is_named_and_runs_no_code(tmp_path, damage, capsys):
    save(tmp_path, {"step": 1})
    path = tmp_path / "step-000002.pt"
    path.write_bytes(damage) if isinstance(damage, bytes) else torch.save(damage, path)
    refused(lambda: load_latest(tmp_path), "step-000002.pt")
    assert capsys.readouterr().out == ""
