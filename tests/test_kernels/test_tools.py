"""Around the kernels: the choice of a form, the tools' arguments, a side that lacks the memory."""

import subprocess
import sys

import pytest
import torch

from kernels import _dispatch
from kernels.timing import Case, measure, row


def test_triton_runs_on_the_current_device_only(monkeypatch):
    """Triton would launch on cuda:0 with the addresses of cuda:1."""

    class Card:  # what the choice looks at
        is_cuda, device = True, torch.device("cuda:1")

    monkeypatch.setattr(_dispatch, "INTERPRETED", False)
    monkeypatch.setattr(_dispatch, "_fit", lambda device: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    assert _dispatch.on_triton(Card())
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    with pytest.raises(AssertionError, match="cuda:1 is not the current device, cuda:0"):
        _dispatch.on_triton(Card())
    assert not _dispatch.on_triton(torch.empty(1))


def test_aot_reads_its_arguments_before_it_compiles():
    run = [sys.executable, "-m", "kernels.aot", "--nonsense"]
    result = subprocess.run(run, capture_output=True, text=True, timeout=60)
    assert result.returncode == 2
    assert result.stdout == ""
    assert "--nonsense" in result.stderr


def test_a_side_without_the_memory_is_left_out():
    def greedy():
        raise torch.OutOfMemoryError("CUDA out of memory")

    x = torch.ones(3)
    result = measure(Case("op", "shape", {"ours": lambda: x + 1, "eager": greedy}), 1, "cpu")
    assert list(result.seconds) == ["ours"]
    assert result.case.missing == {"eager": "out of memory"}
    assert row(result)[3] == ""
    with pytest.raises(torch.OutOfMemoryError):
        measure(Case("op", "shape", {"ours": greedy}), 1, "cpu")
