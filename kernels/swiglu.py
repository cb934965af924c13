"""SwiGLU: one half of the MLP decides how much of the other half passes.

    y = silu(gate) · up          silu(z) = z · σ(z)          σ(z) = 1 / (1 + exp(-z))

(Shazeer, "GLU Variants Improve Transformer", arXiv 2002.05202.) Worked example: gate = ln 3 has σ =
3/4, so silu(ln 3) = 0.8240, and with up = 2, y = 1.6479.

Why one kernel: as two PyTorch calls, silu reads gate and writes a result that the product reads
again beside up, and writes y: five passes, here three. A row of Qwen2.5-7B is 18,944 numbers, 38 KB
in bf16: 189 KB before, 114 KB after. Backward, PyTorch takes eight passes (two products and the
derivative of silu), here five: 303 KB and 189 KB.

Backward. With g = dL/dy and s = σ(gate), the derivative of σ is s(1 - s), so that of z · σ(z) is
s + z s(1 - s), and

    dL/dgate = g · up · s · (1 + gate · (1 - s))
    dL/dup   = g · gate · s

In the example, g = 1: dL/dgate = 2 · 0.75 · (1 + 1.0986 · 0.25) = 1.9120, dL/dup = 0.8240.

Saved: gate and up, 76 KB a row; silu and σ are found again from gate, which is read anyway. PyTorch
saves silu(gate) too, 114 KB.

What we chose: fp32 inside, one rounding at the end. The gradients get memory of their own, 76 KB a
row while one layer's backward runs (155 MB at 2,048 rows). Writing them over gate and up, as some
do, saves that, but cannot be shown to be safe from in here: the caller may have used gate
elsewhere, or may call backward twice (`retain_graph`), and would read gradients for values. What we
left out: other gates (GELU, ReLU), which these models do not have.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from kernels._dispatch import jit, on_triton, rows_of, tl, triton, wide

# Columns of a program and its warps: 8 numbers a thread, one 128-bit load of each 16-bit input.
# Any such shape only waits for memory; threads beyond F, a quarter of them at 1,536, idle unasked.
BLOCK, WARPS = 1024, 4


def swiglu_reference(gate: Tensor, up: Tensor) -> Tensor:
    """gate, up (..., F) -> silu(gate) · up (..., F), from the formula, in fp32."""
    z = gate.to(torch.promote_types(gate.dtype, torch.float32))
    return (z * torch.sigmoid(z) * up).to(gate.dtype)


@jit
def _swiglu_forward_kernel(Gate, Up, Y, gate_stride, up_stride, F, BLOCK: tl.constexpr):
    """One program, BLOCK columns of one row."""
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < F
    gate = wide(tl.load(Gate + row * gate_stride + columns, mask=inside, other=0.0))
    up = wide(tl.load(Up + row * up_stride + columns, mask=inside, other=0.0))
    tl.store(Y + row * F + columns, gate * tl.sigmoid(gate) * up, mask=inside)


@jit
def _swiglu_backward_kernel(
    DY, Gate, Up, DGate, DUp, dy_stride, gate_stride, up_stride, F, BLOCK: tl.constexpr
):
    """One program, BLOCK columns of one row; σ and silu are recomputed."""
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < F
    dy = wide(tl.load(DY + row * dy_stride + columns, mask=inside, other=0.0))
    gate = wide(tl.load(Gate + row * gate_stride + columns, mask=inside, other=0.0))
    up = wide(tl.load(Up + row * up_stride + columns, mask=inside, other=0.0))
    s = tl.sigmoid(gate)
    tl.store(DGate + row * F + columns, dy * up * s * (1.0 + gate * (1.0 - s)), mask=inside)
    tl.store(DUp + row * F + columns, dy * gate * s, mask=inside)


def _forward(gate: Tensor, up: Tensor) -> Tensor:
    """gate, up (N, F) with contiguous rows -> y (N, F)."""
    N, F = gate.shape
    y = torch.empty(N, F, dtype=gate.dtype, device=gate.device)
    if N:
        _swiglu_forward_kernel[(N, triton.cdiv(F, BLOCK))](
            gate, up, y, gate.stride(0), up.stride(0), F,
            BLOCK=BLOCK, num_warps=WARPS, enable_fp_fusion=True,
        )  # fmt: skip
    return y


def _backward(dy: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    """dy, gate, up (N, F) with contiguous rows -> dgate, dup (N, F)."""
    N, F = gate.shape
    d_gate, d_up = (torch.empty(N, F, dtype=gate.dtype, device=gate.device) for _ in range(2))
    if N:
        _swiglu_backward_kernel[(N, triton.cdiv(F, BLOCK))](
            dy, gate, up, d_gate, d_up, dy.stride(0), gate.stride(0), up.stride(0), F,
            BLOCK=BLOCK, num_warps=WARPS, enable_fp_fusion=True,
        )  # fmt: skip
    return d_gate, d_up


class _SwiGLU(torch.autograd.Function):
    """Saves gate and up."""

    @staticmethod
    def forward(ctx, gate, up):
        flat = rows_of(gate), rows_of(up)
        ctx.save_for_backward(*flat)
        return _forward(*flat).view(gate.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        d_gate, d_up = _backward(rows_of(dy), *ctx.saved_tensors)
        return d_gate.view(dy.shape), d_up.view(dy.shape)


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """gate, up (..., F) -> silu(gate) · up (..., F)."""
    assert gate.shape == up.shape, f"gate {tuple(gate.shape)}, up {tuple(up.shape)}"
    assert gate.dtype == up.dtype, f"gate {gate.dtype}, up {up.dtype}"
    # On the CPU PyTorch's two calls are the fastest: recomputing silu makes the backward slower.
    return _SwiGLU.apply(gate, up) if on_triton(gate) else F.silu(gate) * up
