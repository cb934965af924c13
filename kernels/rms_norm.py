"""RMSNorm, and the residual sum before it: divide each row by its root mean square, scale columns.

    h[n, d] = x[n, d] + residual[n, d]                              (`add_rms_norm` only)
    y[n, d] = h[n, d] · rstd[n] · weight[d]        rstd[n] = 1 / sqrt(mean_d(h[n, d]²) + eps)

(Zhang & Sennrich, "Root Mean Square Layer Normalization", arXiv 1910.07467.) Worked example, eps =
0, weight = 1: x = (3, 4) has mean square 12.5, so y = (3, 4) / 3.5355 = (0.8485, 1.1314).

Why one kernel: as separate PyTorch calls a row is read and written again for the sum, the square,
the mean and two products. Fused, it is read once and written once; with the sum, two reads and two
writes. At width 3,584 in bf16 that is 14 KB a row plain, 28 KB with the sum; nothing less would do.

Backward. Let g = dL/dy and n = h · rstd, so y = n · weight. Then dL/dn = g · weight, and since
d rstd / dh[d] = -rstd³ · h[d] / D,

    dL/dh[d] = rstd · (g[d] weight[d] - n[d] · mean_e(g[e] weight[e] n[e]))
    dL/dweight[d] = Σ_n g[n, d] n[n, d]

With the sum, what arrives for h from its other users is added, and x and residual get the same
gradient. Saved for backward: h, which lives on anyway, and rstd (4 bytes a row); n is recomputed.

What we chose: the arithmetic is fp32 whatever x is, and each result is rounded once, at the end.
(Hugging Face rounds to the model's type before it multiplies by the weight, so 16-bit models differ
from it by one rounding.) The norm reads h as it was rounded, so that backward sees the same h. What
we left out: the mean subtraction of LayerNorm, which these models do not have.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from kernels._dispatch import jit, on_triton, rows_of, tl, triton, wide

FORWARD, BACKWARD = 16, 8  # columns a thread; with 16 backward spills registers on sm_120
MOST_WIDTH = 8192  # columns that one program holds in registers; more would spill
PARTIALS = 256  # programs that sum the weight's gradient, each over its share of the rows


def rms_norm_reference(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x (..., D), weight (D,) -> y (..., D) in x's type; PyTorch's call computes in fp32."""
    return F.rms_norm(x, weight.shape, weight, eps)


def add_rms_norm_reference(
    x: Tensor, residual: Tensor, weight: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """x, residual (..., D), weight (D,) -> y and h (..., D)."""
    h = x + residual
    return rms_norm_reference(h, weight, eps), h


@jit
def _rms_norm_forward_kernel(
    X, Residual, Weight, Y, H, Rstd,
    x_stride, residual_stride, D, eps,
    ADD: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One program, one row. The row stays in registers between its one read and its one write."""
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    inside = columns < D
    h = tl.load(X + row * x_stride + columns, mask=inside, other=0.0)
    if ADD:
        residual = tl.load(Residual + row * residual_stride + columns, mask=inside, other=0.0)
        h = (wide(h) + wide(residual)).to(X.dtype.element_ty)  # rounded as it will be stored
        tl.store(H + row * D + columns, h, mask=inside)
    h = wide(h)
    rstd = 1.0 / tl.sqrt(tl.sum(h * h) / D + eps)
    tl.store(Rstd + row, rstd)
    weight = wide(tl.load(Weight + columns, mask=inside, other=0.0))
    tl.store(Y + row * D + columns, h * rstd * weight, mask=inside)


@jit
def _rms_norm_backward_kernel(
    DY, DH, H, Weight, Rstd, DX, DWeight,
    dy_stride, dh_stride, h_stride, N, D,
    ADD: tl.constexpr, WEIGHT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One program, the rows program, program + programs, ...; their dL/dweight adds up here."""
    program, programs = tl.program_id(0), tl.num_programs(0)
    columns = tl.arange(0, BLOCK)
    inside = columns < D
    weight = wide(tl.load(Weight + columns, mask=inside, other=0.0))
    d_weight = weight * 0
    for at in range(program, N, programs):
        row = tl.cast(at, tl.int64)
        dy = wide(tl.load(DY + row * dy_stride + columns, mask=inside, other=0.0))
        h = wide(tl.load(H + row * h_stride + columns, mask=inside, other=0.0))
        rstd = tl.load(Rstd + row)
        n = h * rstd
        dn = dy * weight
        dx = rstd * (dn - n * (tl.sum(dn * n) / D))
        if ADD:
            dx += wide(tl.load(DH + row * dh_stride + columns, mask=inside, other=0.0))
        tl.store(DX + row * D + columns, dx, mask=inside)
        if WEIGHT:
            d_weight += dy * n
    if WEIGHT:
        tl.store(DWeight + program * D + columns, d_weight, mask=inside)


def _shape(D: int, columns: int) -> tuple[int, int]:
    """Columns held by a program (a power of two), and its warps for `columns` of them a thread."""
    block = triton.next_power_of_2(D)
    return block, min(max(block // (32 * columns), 1), 16)


def _forward(
    x: Tensor, residual: Tensor | None, weight: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """x, residual (N, D) with contiguous rows -> y, h (N, D) and rstd (N,)."""
    N, D = x.shape
    assert D <= MOST_WIDTH, f"expected at most {MOST_WIDTH} columns, got {D}"
    assert weight.shape == (D,), f"weight {tuple(weight.shape)} for {D} columns"
    assert weight.is_contiguous(), f"weight with stride {weight.stride(0)}"
    y = torch.empty(N, D, dtype=x.dtype, device=x.device)
    h = x if residual is None else torch.empty_like(y)
    rstd = torch.empty(N, dtype=torch.promote_types(x.dtype, torch.float32), device=x.device)
    if N:
        block, warps = _shape(D, FORWARD)
        other = x if residual is None else residual
        _rms_norm_forward_kernel[(N,)](
            x, other, weight, y, h, rstd, x.stride(0), other.stride(0), D, eps,
            ADD=residual is not None, BLOCK=block, num_warps=warps, enable_fp_fusion=True,
        )  # fmt: skip
    return y, h, rstd


def _backward(
    dy: Tensor, dh: Tensor | None, h: Tensor, weight: Tensor, rstd: Tensor, with_weight: bool
) -> tuple[Tensor, Tensor | None]:
    """dy, dh, h (N, D), rstd (N,) -> dx (N, D) and, if asked for, d_weight (D,)."""
    N, D = h.shape
    dx = torch.empty(N, D, dtype=h.dtype, device=h.device)
    programs = min(N, PARTIALS) if with_weight else N
    sums = rstd.new_zeros(max(programs, 1), D) if with_weight else rstd
    if N:
        block, warps = _shape(D, BACKWARD)
        other = dy if dh is None else dh
        _rms_norm_backward_kernel[(programs,)](
            dy, other, h, weight, rstd, dx, sums,
            dy.stride(0), other.stride(0), h.stride(0), N, D,
            ADD=dh is not None, WEIGHT=with_weight, BLOCK=block, num_warps=warps,
            enable_fp_fusion=True,
        )  # fmt: skip
    return dx, sums.sum(0).to(weight.dtype) if with_weight else None


class _RMSNorm(torch.autograd.Function):
    """Saves x and rstd."""

    @staticmethod
    def forward(ctx, x, weight, eps):
        flat = rows_of(x)
        y, _, rstd = _forward(flat, None, weight, eps)
        ctx.save_for_backward(flat, weight, rstd)
        return y.view(x.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        flat, weight, rstd = ctx.saved_tensors
        dx, d_weight = _backward(rows_of(dy), None, flat, weight, rstd, ctx.needs_input_grad[1])
        return dx.view(dy.shape), d_weight, None


class _AddRMSNorm(torch.autograd.Function):
    """Saves h, which is an output, and rstd."""

    @staticmethod
    def forward(ctx, x, residual, weight, eps):
        y, h, rstd = _forward(rows_of(x), rows_of(residual), weight, eps)
        ctx.save_for_backward(h, weight, rstd)
        return y.view(x.shape), h.view(x.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy, dh):
        h, weight, rstd = ctx.saved_tensors
        dx, d_weight = _backward(rows_of(dy), rows_of(dh), h, weight, rstd, ctx.needs_input_grad[2])
        dx = dx.view(dy.shape)
        return dx, dx, d_weight, None  # one object: two would be two .grad in the same memory


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x (..., D), weight (D,) -> y (..., D): rows at unit root mean square, times `weight`."""
    return _RMSNorm.apply(x, weight, eps) if on_triton(x) else rms_norm_reference(x, weight, eps)


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """x, residual (..., D), weight (D,) -> y = rms_norm(h) and h = x + residual, both (..., D)."""
    form = _AddRMSNorm.apply if on_triton(x) else add_rms_norm_reference
    return form(x, residual, weight, eps)
