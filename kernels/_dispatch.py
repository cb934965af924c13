"""Which form of an operation runs: its Triton kernel, or the plain PyTorch reference.

Most files of this folder hold both, and the public function picks one in one visible line:

    return _RMSNorm.apply(x, weight, eps) if on_triton(x) else rms_norm_reference(x, weight, eps)

Triton runs for CUDA tensors on a card with the tensor cores it knows (compute capability 8.0 and
up: Triton 3.3 dropped those of 7.5), and for everything when Python was started with
`TRITON_INTERPRET=1`, which executes kernels in numpy on the CPU: slow, made for tests. Everywhere
else, and where Triton is not installed (macOS, Windows), the reference does the work.

There is no autotuning: it needs a GPU to choose, and chooses differently from run to run. Block
sizes are functions of the shapes, written beside their kernels. Nor is there a choice by card:
every kernel asks for at most 101,376 bytes of shared memory, what sm_86, 89 and 120 have, and a
test that compiles them all holds them to that.
"""

import os
from functools import cache

import torch
from torch import Tensor

try:
    import triton
    import triton.language as tl
    from triton import jit
except ImportError:  # kernels stay plain functions that nobody calls
    triton = tl = None

    def jit(function):
        return function


# Triton reads the variable once, when it is imported, and so do we.
INTERPRETED = triton is not None and os.environ.get("TRITON_INTERPRET") == "1"
OLDEST = (8, 0)  # compute capability


@cache
def _fit(device: torch.device) -> bool:
    return triton is not None and torch.cuda.get_device_capability(device) >= OLDEST


def on_triton(x: Tensor) -> bool:
    """True where the Triton form of an operation on x is the one to run.

    Triton launches on the current device, whatever device its tensors are on.
    """
    if INTERPRETED or not (x.is_cuda and _fit(x.device)):
        return INTERPRETED
    current = torch.cuda.current_device()
    assert x.device.index == current, f"{x.device} is not the current device, cuda:{current}"
    return True


@jit
def wide(x):
    """A kernel's first step after each load: fp32, or fp64 when that is what came (gradcheck)."""
    return x if x.dtype == tl.float64 else x.to(tl.float32)


def rows_of(x: Tensor) -> Tensor:
    """x (..., D) -> (N, D) with a contiguous last dimension; copied only where strides force it."""
    flat = x.reshape(-1, x.shape[-1])
    return flat if flat.stride(-1) == 1 or flat.shape[-1] == 1 else flat.contiguous()
