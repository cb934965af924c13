"""Time the sides of a case in turns, and count the memory that each needs.

How a figure is made. The sides take turns, round by round, so that a noisy machine is noisy for
all; a figure is the median of the rounds, the ratio the median over rounds of theirs / ours. On a
card, a side's calls of one round are recorded in a CUDA graph, where it can be, and replayed
between two events, so that neither Python nor launching counts. Operations that wait for memory
also say what share of it they waste: `moved` are the bytes that our form reads and writes by its
own account, `least` those that any form must. Peak memory is what one call allocates at most beyond
its inputs: by the allocator's count on a card, on a CPU by adding up the storages of all tensors
that live (inside a PyTorch operation nothing is seen there).
"""

import logging
import statistics
import time
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

Run = Callable[[], Any]
SMALL = {"D": 576, "H": 9, "K": 3, "E": 64, "F": 1536, "V": 49_152, "N": 1024}  # SmolLM2-135M
LARGE = {"D": 3584, "H": 28, "K": 4, "E": 128, "F": 18_944, "V": 152_064, "N": 8192}  # Qwen2.5-7B


@dataclass
class Case:
    """One operation on one shape."""

    op: str
    shape: str
    sides: dict[str, Run]  # "ours", "eager", then peers
    moved: int = 0  # bytes that ours reads and writes; 0: not a matter of bytes
    least: int = 0  # bytes that any form must read and write
    calls: int = 1  # of a side in a round; its parts may rotate through several weights
    missing: dict[str, str] = field(default_factory=dict)  # peer -> why it is not here


@dataclass
class Result:
    case: Case
    seconds: dict[str, list[float]]  # side -> each round, for one call
    peak: dict[str, int]  # side -> bytes

    def median(self, side: str) -> float:
        return statistics.median(self.seconds[side])

    def ratio(self, side: str) -> float:
        """How many times as long as ours it takes, pair by pair."""
        pairs = zip(self.seconds[side], self.seconds["ours"], strict=True)
        return statistics.median(theirs / ours for theirs, ours in pairs)


class Ledger(TorchDispatchMode):
    """Counts the bytes of all storages made while it is on and still alive; keeps the peak."""

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = 0
        self.known: set[int] = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        # An output that shares an argument's storage is a view or was written in place.
        before = {t.untyped_storage().data_ptr() for t in _tensors((args, kwargs or {}))}
        out = function(*args, **(kwargs or {}))
        for tensor in _tensors(out):
            storage = tensor.untyped_storage()
            place, size = storage.data_ptr(), storage.nbytes()
            if size and place not in before and place not in self.known:
                self.known.add(place)
                self.live += size
                self.peak = max(self.peak, self.live)
                weakref.finalize(storage, self._free, place, size)
        return out

    def _free(self, place: int, size: int) -> None:
        self.known.discard(place)
        self.live -= size


def _tensors(tree: Any) -> list[torch.Tensor]:
    return [
        leaf
        for leaf in tree_leaves(tree)
        if isinstance(leaf, torch.Tensor) and leaf.layout == torch.strided
    ]


def peak_bytes(run: Run, device: str) -> int:
    """Bytes that one call holds at most, beyond what was there before."""
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    with Ledger() as ledger:
        run()
    return ledger.peak


def _timer(run: Run, calls: int, device: str) -> Run:
    """A function that runs `calls` calls and returns the seconds of one."""
    if device != "cuda":

        def plain() -> float:
            start = time.perf_counter()
            for _ in range(calls):
                run()
            return (time.perf_counter() - start) / calls

        return plain

    def loop() -> None:
        for _ in range(calls):
            run()

    replay: Run = loop
    try:
        graph = torch.cuda.CUDAGraph()
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            loop()
        torch.cuda.current_stream().wait_stream(side)
        with torch.cuda.graph(graph):
            loop()
        replay = graph.replay
    except RuntimeError:  # it waits for the GPU somewhere: timed with its launches
        torch.cuda.synchronize()

    def events() -> float:
        first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        first.record()
        replay()
        last.record()
        last.synchronize()
        return first.elapsed_time(last) / 1e3 / calls

    return events


def measure(case: Case, rounds: int, device: str) -> Result:
    """All sides in turns, after one round to warm up. Others than ours may lack the memory."""
    peak = {}
    for name, run in list(case.sides.items()):
        try:
            peak[name] = peak_bytes(run, device)
        except torch.OutOfMemoryError:
            if name == "ours":
                raise
            del case.sides[name]
            case.missing[name] = "out of memory"
            torch.cuda.empty_cache()
    timers = {name: _timer(run, case.calls, device) for name, run in case.sides.items()}
    seconds: dict[str, list[float]] = {name: [] for name in timers}
    for turn in range(rounds + 1):
        for name, timer in timers.items():
            taken = timer()
            if turn:
                seconds[name].append(taken)
    return Result(case, seconds, peak)


def _size(count: float, unit: str) -> str:
    for step in ("", "k", "M", "G"):
        if count < 1000 or step == "G":
            return f"{count:.3g} {step}{unit}"
        count /= 1000
    raise AssertionError


def row(result: Result) -> list[str]:
    """The cells of one result."""
    case = result.case
    others = [name for name in case.sides if name not in ("ours", "eager")]
    best = min(others, key=result.median) if others else None
    ours = result.median("ours")
    return [
        case.op,
        case.shape,
        f"{ours * 1e3:.3g} ms",
        f"{result.ratio('eager'):.2f}x" if "eager" in case.sides else "",
        f"{result.ratio(best):.2f}x {best}" if best else "; ".join(case.missing) or "none",
        f"{case.moved / case.least:.2f}" if case.least else "",
        _size(case.moved / ours, "B/s") if case.moved else "",
        _size(result.peak["ours"], "B"),
        _size(result.peak["eager"], "B") if "eager" in case.sides else "",
    ]


HEADS = (
    "operation", "shape", "ours", "eager takes", "best peer takes", "bytes moved / least",
    "speed", "peak memory, ours", "eager",
)  # fmt: skip


def table(results: Sequence[Result]) -> str:
    lines = ["| " + " | ".join(HEADS) + " |", "| --- | --- |" + " ---: |" * (len(HEADS) - 2)]
    return "\n".join(lines + ["| " + " | ".join(row(result)) + " |" for result in results])


def sizes(device: str) -> dict[str, int]:
    return LARGE if device == "cuda" else SMALL


def random(device: str, *shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.randn(shape, device=device).to(dtype)


def peers(
    device: str, wanted: dict[str, tuple[str, bool, Callable[[], Run]]]
) -> tuple[dict[str, Run], dict[str, str]]:
    """name -> (module, needs a GPU, how to make it): those that can run, and why others cannot."""
    # bitsandbytes looks for a package called kernels, finds this folder, and says so at length.
    logging.getLogger("bitsandbytes").setLevel(logging.CRITICAL)
    sides, missing = {}, {}
    for name, (module, needs_gpu, make) in wanted.items():
        if find_spec(module) is None:
            missing[name] = "not installed"
        elif needs_gpu and device != "cuda":
            missing[name] = "needs a GPU"
        else:
            sides[name] = make()
    return sides, missing


def trained(run: Callable[..., Any], *inputs: Tensor) -> Run:
    """Forward and backward of run(*inputs), with one fixed gradient for each output."""
    leaves = [x.detach().clone().requires_grad_() for x in inputs]
    gradients: list[Tensor] = []

    def both() -> None:
        outs = run(*leaves)
        outs = (outs,) if isinstance(outs, Tensor) else outs
        if not gradients:
            gradients.extend(torch.randn_like(out) for out in outs)
        torch.autograd.grad(outs, leaves, gradients)

    return both
