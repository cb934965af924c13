"""How the tests of this folder decide that an operation is right.

Each runs the operation three ways: as shipped, in plain PyTorch in the same type, and in plain
PyTorch in fp64, which counts as the truth. The shipped form may be off by twice what the plain form
is off by, and one rounding: outputs and every gradient alike.

The same test files run twice: in the ordinary run on the references, and once more with
`TRITON_INTERPRET=1` on the kernels themselves (`tests/test_interpreted.py`), in fp32, because the
interpreter truncates 16-bit stores. On a machine with a GPU they run there too (`-m gpu`).
"""

from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor

from kernels._dispatch import INTERPRETED

FP32, BF16, FP16 = torch.float32, torch.bfloat16, torch.float16
NO_GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
TYPES = (FP32, BF16, FP16)
CUDA = [pytest.param("cuda", dtype, marks=[pytest.mark.gpu, NO_GPU]) for dtype in TYPES]
# (device, dtype) that an operation is tried on
KINDS = [("cpu", FP32)] if INTERPRETED else [("cpu", FP32), ("cpu", BF16), ("cpu", FP16), *CUDA]

Op = Callable[..., Tensor | tuple[Tensor, ...]]


def outputs_and_gradients(op: Op, inputs: Sequence[Tensor]) -> list[Tensor]:
    """What op returns for copies of `inputs`, then dL/dinput of each floating one, for the loss
    L = Σ out · c with fixed pseudo-random c."""
    leaves = [
        x.detach().requires_grad_() if x.is_floating_point() else x for x in map(_same, inputs)
    ]
    outs = op(*leaves)
    outs = (outs,) if isinstance(outs, Tensor) else outs
    generator = torch.Generator().manual_seed(11)
    loss = torch.zeros((), dtype=torch.float64, device=outs[0].device)
    for out in outs:
        c = torch.randn(out.shape, generator=generator, dtype=torch.float64)
        loss = loss + (out * c.to(out.device, out.dtype)).double().sum()
    if loss.requires_grad:
        loss.backward()
    floats = [leaf for leaf in leaves if leaf.is_floating_point()]
    return [*outs, *(torch.zeros_like(f) if f.grad is None else f.grad for f in floats)]


def _same(x: Tensor, device: str | None = None) -> Tensor:
    """A copy of x with the strides of x."""
    place = device or x.device
    return torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=place).copy_(x)


def off(x: Tensor, truth: Tensor) -> float:
    """Largest absolute difference."""
    assert x.shape == truth.shape, f"{tuple(x.shape)} for {tuple(truth.shape)}"
    return (x.double() - truth).abs().max().item() if x.numel() else 0.0


def no_worse_than_plain(
    op: Op, plain: Op, inputs: Sequence[Tensor], device: str, peer: Op | None = None
) -> None:
    """`op` against `plain`, a formula that computes in the type of its inputs; inputs in the type
    to try, on the CPU, with the strides to try. `peer` computes in that type instead of `plain`,
    which stays the truth."""
    inputs = [_same(x, device) for x in inputs]  # `to` would make the strides plain
    truth = outputs_and_gradients(
        plain, [x.double() if x.is_floating_point() else x for x in inputs]
    )
    same = outputs_and_gradients(peer or plain, inputs)
    ours = outputs_and_gradients(op, inputs)
    for i, (x, y, z) in enumerate(zip(ours, same, truth, strict=True)):
        rounding = torch.finfo(x.dtype).eps if x.is_floating_point() else 0
        size = z.abs().max().item() if z.numel() else 0.0
        allowed = 2 * off(y, z) + rounding * max(size, 1.0)  # of a sum of numbers of unit size
        assert x.isfinite().all() or not z.isfinite().all(), f"result {i}: not finite"
        assert off(x, z) <= allowed, f"result {i}: off by {off(x, z):.3g}, allowed {allowed:.3g}"


def spread(*shape: int, dtype: torch.dtype = FP32, seed: int = 0, size: float = 1.0) -> Tensor:
    """Random numbers, contiguous."""
    return (torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * size).to(dtype)


def strided(x: Tensor) -> Tensor:
    """The same numbers, with every row of the last dimension in the middle of a longer one."""
    room = torch.full((*x.shape[:-1], x.shape[-1] * 2 + 3), float("nan"), dtype=x.dtype)
    room[..., 1 : x.shape[-1] + 1] = x
    return room[..., 1 : x.shape[-1] + 1]


def gappy(x: Tensor) -> Tensor:
    """The same numbers, every second of a longer row: the last dimension is not contiguous."""
    room = torch.full((*x.shape[:-1], x.shape[-1] * 2), float("nan"), dtype=x.dtype)
    room[..., ::2] = x
    return room[..., ::2]
