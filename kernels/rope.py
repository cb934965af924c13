"""Rotary position embedding: pairs of a head's numbers are turned, further at each position.

A head of width E holds E/2 pairs (x[i], x[i + E/2]); pair i at position p is turned by the angle p
· f[i]:

    y[i]       = x[i] · cos(p·f[i]) - x[i + E/2] · sin(p·f[i])
    y[i + E/2] = x[i + E/2] · cos(p·f[i]) + x[i] · sin(p·f[i])

The product of a turned query and a turned key then depends on the distance of their positions only
(Su et al., "RoFormer", arXiv 2104.09864). Worked example: E = 2, f = (1,), p = π/2: (1, 0) becomes
(0, 1). Qwen3 first brings each head to unit root mean square and scales its columns: n = x · rstd,
z = n · weight, as in `rms_norm.py`, and turns z. The example with that norm and weight 1: (0, √2).

Why one kernel: as PyTorch calls each of q and k is read or written seven times, here once each. A
row of Qwen2.5-7B, 32 heads in bf16: 57 KB before, 16 KB and 256 bytes of angles after.

Backward. A turn is linear and its inverse turn is its transpose: with g = dL/dy,

    dL/dz[i]       = g[i] · cos + g[i + E/2] · sin
    dL/dz[i + E/2] = g[i + E/2] · cos - g[i] · sin

which is the same turn by the negated sine, so the same kernel does it, and x is not needed. With
the norm, x is. dL/dn = dL/dz · weight, and since d rstd / dx[e] = -rstd³ · x[e] / E,

    dL/dx[e] = rstd · (dL/dn[e] - n[e] · mean_j(dL/dn[j] n[j]))
    dL/dweight[e] = Σ_(rows, heads) dL/dz[e] n[e]

Saved: the angles; with the norm also q and k as they came, from which rstd is found again.

In place. Without the norm the result takes the memory of q and k, which are thereby consumed: use
what `rope` returns. PyTorch's `mark_dirty` is refused for two views (q and k are views of their
projections), and costs three copies of the gradient for one. So we return new names for the same
memory and raise its version: whoever saved the old numbers for a backward gets PyTorch's "modified
by an inplace operation". Gradients are never turned in place: autograd may hand one buffer to
several users (y + z gives both the same).

Positions come row by row, so packed texts, cached texts and replies that continue a shared prefix
need nothing special. The pairing (i with i + E/2) is Hugging Face's; GGUF files of the Llama family
have another, and the loader puts their rows back. Angles are fp32, their cosine and sine rounded to
the model's type; a kernel computes in fp32 and rounds once. Left out: turning a part of each head.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from kernels._dispatch import jit, on_triton, rows_of, tl, triton, wide
from kernels.rms_norm import rms_norm_reference

PARTIALS = 256  # programs that sum a weight's gradient, each over its share of the rows
FORWARD_PAIRS, BACKWARD_PAIRS = 16, 8  # of a thread; with 16, backward takes 140 to 254 registers


def rotation(
    positions: Tensor, frequencies: Tensor, scale: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """positions (N,) int, frequencies (E/2,) fp32 -> cos and signed sin per row, (N, 1, E) each.

    `scale` multiplies both: YaRN's attention temperature, 1 elsewhere. The first half of the sines
    carries the minus sign of the formula, so that the turn is `x · cos + swap(x) · sin`.
    """
    angles = positions.float()[:, None, None] * frequencies  # (N, 1, E/2)
    cos, sin = angles.cos() * scale, angles.sin() * scale
    return torch.cat([cos, cos], -1).to(dtype), torch.cat([-sin, sin], -1).to(dtype)


def rope_reference(
    q: Tensor, k: Tensor, cos: Tensor, sin: Tensor,
    q_weight: Tensor | None = None, k_weight: Tensor | None = None, eps: float = 0.0,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """As `rope`, from the formula, in fp32, without consuming q and k."""
    turned = []
    for x, weight in ((q, q_weight), (k, k_weight)):
        z = x.to(torch.promote_types(x.dtype, torch.float32))
        if weight is not None:
            z = z * torch.rsqrt(z.square().mean(-1, keepdim=True) + eps) * weight
        first, second = z.chunk(2, -1)
        turned.append((z * cos + torch.cat([second, first], -1) * sin).to(x.dtype))
    return turned[0], turned[1]


@jit
def _place(heads, half, HEADS: tl.constexpr, HALF: tl.constexpr):
    """Where the first number of each pair lies in a row of heads (HEADS, HALF), and a mask."""
    head, column = tl.arange(0, HEADS)[:, None], tl.arange(0, HALF)[None, :]
    return head * (2 * half) + column, (head < heads) & (column < half)


@jit
def _numbers(P, inside):
    return wide(tl.load(P, mask=inside, other=0.0))


@jit
def _rstd(a, b, half, eps):
    return 1.0 / tl.sqrt(tl.sum(a * a + b * b, axis=1, keep_dims=True) / (2 * half) + eps)


@jit
def _rope_forward_kernel(
    Q, K, QOut, KOut, Cos, Sin, QWeight, KWeight,
    q_stride, k_stride, q_out_stride, k_out_stride, cos_stride, sin_stride,
    q_heads, k_heads, half, direction, eps,
    NORM: tl.constexpr, HEADS: tl.constexpr, HALF: tl.constexpr,
):  # fmt: skip
    """One program, a row of q or of k: all its heads share an angle. Every thread loads its pairs
    before it stores them, so QOut may be Q. `direction` is 1, or -1 to turn back."""
    row = tl.program_id(0).to(tl.int64)
    X, Y, Weight, heads = Q + row * q_stride, QOut + row * q_out_stride, QWeight, q_heads
    if tl.program_id(1) == 1:
        X, Y, Weight, heads = K + row * k_stride, KOut + row * k_out_stride, KWeight, k_heads
    first, known = _place(1, half, 1, HALF)  # of a single head
    c = _numbers(Cos + row * cos_stride + first, known)  # its second half is the same
    s = _numbers(Sin + row * sin_stride + half + first, known) * direction  # the half without minus
    at, inside = _place(heads, half, HEADS, HALF)
    a, b = _numbers(X + at, inside), _numbers(X + half + at, inside)
    if NORM:
        rstd = _rstd(a, b, half, eps)
        a *= rstd * _numbers(Weight + first, known)
        b *= rstd * _numbers(Weight + half + first, known)
    tl.store(Y + at, a * c - b * s, mask=inside)
    tl.store(Y + half + at, b * c + a * s, mask=inside)


@jit
def _rope_backward_kernel(
    DQOut, DKOut, Q, K, DQ, DK, Cos, Sin, QWeight, KWeight, DWeight,
    dq_out_stride, dk_out_stride, q_stride, k_stride, cos_stride, sin_stride,
    N, q_heads, k_heads, half, eps,
    WEIGHT: tl.constexpr, HEADS: tl.constexpr, HALF: tl.constexpr,
):  # fmt: skip
    """With the norm. One program, the rows program, program + programs, ... of q or of k; their
    dL/dweight adds up in registers, head by head, and over heads at the end."""
    program, programs, is_k = tl.program_id(0), tl.num_programs(0), tl.program_id(1)
    DY, X, DX, Weight, heads = DQOut, Q, DQ, QWeight, q_heads
    dy_stride, x_stride = dq_out_stride, q_stride
    if is_k == 1:
        DY, X, DX, Weight, heads = DKOut, K, DK, KWeight, k_heads
        dy_stride, x_stride = dk_out_stride, k_stride
    first, known = _place(1, half, 1, HALF)  # of a single head
    at, inside = _place(heads, half, HEADS, HALF)
    weight_a, weight_b = _numbers(Weight + first, known), _numbers(Weight + half + first, known)
    d_weight_a = tl.zeros((HEADS, HALF), tl.float32) + weight_a * 0
    d_weight_b = d_weight_a
    for turn in range(program, N, programs):
        row = tl.cast(turn, tl.int64)
        c = _numbers(Cos + row * cos_stride + first, known)
        s = _numbers(Sin + row * sin_stride + half + first, known)
        dy = DY + row * dy_stride + at
        dy_a, dy_b = _numbers(dy, inside), _numbers(dy + half, inside)
        x = X + row * x_stride + at
        a, b = _numbers(x, inside), _numbers(x + half, inside)
        dz_a, dz_b = dy_a * c + dy_b * s, dy_b * c - dy_a * s
        rstd = _rstd(a, b, half, eps)
        n_a, n_b = a * rstd, b * rstd
        dn_a, dn_b = dz_a * weight_a, dz_b * weight_b
        mean = tl.sum(dn_a * n_a + dn_b * n_b, axis=1, keep_dims=True) / (2 * half)
        dx = DX + row * heads * (2 * half) + at
        tl.store(dx, rstd * (dn_a - n_a * mean), mask=inside)
        tl.store(dx + half, rstd * (dn_b - n_b * mean), mask=inside)
        if WEIGHT:  # beyond the last head rstd is infinite if eps is 0: keep its NaN out
            d_weight_a += tl.where(inside, dz_a * n_a, 0.0)
            d_weight_b += tl.where(inside, dz_b * n_b, 0.0)
    if WEIGHT:
        column = tl.arange(0, HALF)
        Sums = DWeight + (is_k * programs + program) * (2 * half) + column
        tl.store(Sums, tl.sum(d_weight_a, axis=0), mask=column < half)
        tl.store(Sums + half, tl.sum(d_weight_b, axis=0), mask=column < half)


def _shape(heads: int, half: int, pairs: int) -> tuple[dict[str, int], int]:
    """Heads and pairs of a head that a program holds (powers of two), and its warps: `pairs` a
    thread. k's programs are as large as q's, their threads beyond the last head idle."""
    block = {"HEADS": triton.next_power_of_2(heads), "HALF": triton.next_power_of_2(half)}
    return block, min(max(block["HEADS"] * block["HALF"] // (32 * pairs), 1), 16)


def _turn(
    q: Tensor, k: Tensor, q_out: Tensor, k_out: Tensor, cos: Tensor, sin: Tensor,
    direction: float, weights: tuple[Tensor, Tensor] | None = None, eps: float = 0.0,
) -> None:  # fmt: skip
    """q, q_out (N, H, E), k, k_out (N, K, E), all with contiguous rows; q_out may be q, k_out k."""
    N, H, E = q.shape
    if not N:
        return
    cos, sin = rows_of(cos), rows_of(sin)  # (N, E)
    q_weight, k_weight = (cos, cos) if weights is None else weights
    block, warps = _shape(max(H, k.shape[1]), E // 2, FORWARD_PAIRS)
    _rope_forward_kernel[(N, 2)](
        q, k, q_out, k_out, cos, sin, q_weight, k_weight,
        q.stride(0), k.stride(0), q_out.stride(0), k_out.stride(0), cos.stride(0), sin.stride(0),
        H, k.shape[1], E // 2, direction, eps,
        NORM=weights is not None, **block, num_warps=warps, enable_fp_fusion=True,
    )  # fmt: skip


def _turn_plainly(
    q: Tensor, k: Tensor, q_out: Tensor, k_out: Tensor, cos: Tensor, sin: Tensor, direction: float
) -> None:
    """`_turn` on the CPU, without the norm: in place and in the model's type, the fastest form."""
    for x, out in ((q, q_out), (k, k_out)):
        swapped = x.roll(x.shape[-1] // 2, -1)
        product = x.mul_(cos) if out is x else torch.mul(x, cos, out=out)  # mul_ saves 3 µs
        product.addcmul_(swapped, sin, value=direction)


def _turn_in_place(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """q and k turned where they lie, or in a copy where their heads are not contiguous."""
    q, k = _heads(q), _heads(k)
    if on_triton(q):
        _turn(q, k, q, k, cos, sin, 1.0)
        torch.autograd.graph.increment_version((q, k))  # PyTorch does not see what kernels write
    else:
        _turn_plainly(q, k, q, k, cos, sin, 1.0)
    return q, k


def _heads(x: Tensor) -> Tensor:
    """x (N, heads, E) with contiguous rows that do not overlap; copied where strides force it."""
    whole = x.stride()[1:] == (x.shape[2], 1) and x.stride(0) >= x.shape[1] * x.shape[2]
    return x if whole else x.contiguous()


def _backward(
    dq: Tensor, dk: Tensor, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor,
    weights: tuple[Tensor, Tensor], eps: float, with_weights: bool,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:  # fmt: skip
    """dq, q (N, H, E), dk, k (N, K, E) -> gradients of q, k and, if asked for, of both weights."""
    N, H, E = q.shape
    into_q, into_k = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k))
    programs = min(N, PARTIALS) if with_weights else N
    kind = torch.promote_types(q.dtype, torch.float32)
    sums = torch.zeros(2, programs if with_weights else 0, E, dtype=kind, device=q.device)
    if N:
        cos, sin, dq, dk = rows_of(cos), rows_of(sin), _heads(dq), _heads(dk)
        block, warps = _shape(max(H, k.shape[1]), E // 2, BACKWARD_PAIRS)
        _rope_backward_kernel[(programs, 2)](
            dq, dk, q, k, into_q, into_k, cos, sin, *weights, sums,
            dq.stride(0), dk.stride(0), q.stride(0), k.stride(0), cos.stride(0), sin.stride(0),
            N, H, k.shape[1], E // 2, eps,
            WEIGHT=with_weights, **block, num_warps=warps, enable_fp_fusion=True,
        )  # fmt: skip
    if not with_weights:
        return into_q, into_k, None, None
    return into_q, into_k, *(s.sum(0).to(w.dtype) for s, w in zip(sums, weights, strict=True))


class _Turn(torch.autograd.Function):
    """Without the norm, in place. Saves cos and sin."""

    @staticmethod
    def forward(ctx, q, k, cos, sin):
        ctx.save_for_backward(cos, sin)
        q, k = _turn_in_place(q, k, cos, sin)
        return q.detach(), k.detach()  # the same memory and version under a name of its own

    @staticmethod
    @once_differentiable
    def backward(ctx, dq, dk):
        cos, sin = ctx.saved_tensors
        into_q, into_k = (torch.empty(d.shape, dtype=d.dtype, device=d.device) for d in (dq, dk))
        turn = _turn if on_triton(dq) else _turn_plainly
        turn(_heads(dq), _heads(dk), into_q, into_k, cos, sin, -1.0)
        return into_q, into_k, None, None


class _NormTurn(torch.autograd.Function):
    """With the norm. Saves q and k as they came, cos and sin."""

    @staticmethod
    def forward(ctx, q, k, cos, sin, q_weight, k_weight, eps):
        q, k = _heads(q), _heads(k)
        ctx.save_for_backward(q, k, cos, sin, q_weight, k_weight)
        ctx.eps = eps
        q_out, k_out = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k))
        _turn(q, k, q_out, k_out, cos, sin, 1.0, (q_weight, k_weight), eps)
        return q_out, k_out

    @staticmethod
    @once_differentiable
    def backward(ctx, dq, dk):
        q, k, cos, sin, *weights = ctx.saved_tensors
        learns = any(ctx.needs_input_grad[4:6])
        dq, dk, *d_weights = _backward(dq, dk, q, k, cos, sin, tuple(weights), ctx.eps, learns)
        return dq, dk, None, None, *d_weights, None


def rope(
    q: Tensor, k: Tensor, cos: Tensor, sin: Tensor,
    q_weight: Tensor | None = None, k_weight: Tensor | None = None, eps: float = 0.0,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """q (N, H, E), k (N, K, E), cos and sin (N, 1, E) as `rotation` gives them -> q and k turned.

    With q_weight and k_weight (E,): each head's RMSNorm first. q and k are consumed: their memory
    may hold the result, so go on with what is returned, `q, k = rope(q, k, cos, sin)`.
    """
    N, _, E = q.shape
    assert (k.shape[0], k.shape[2]) == (N, E), f"q {tuple(q.shape)}, k {tuple(k.shape)}"
    assert E % 2 == 0, f"expected heads of even width, got {E}"
    assert cos.shape == sin.shape == (N, 1, E), f"cos {cos.shape}, sin {sin.shape}, q {q.shape}"
    assert q.dtype == k.dtype == cos.dtype == sin.dtype, f"{q.dtype}, {k.dtype}, cos {cos.dtype}"
    assert (q_weight is None) == (k_weight is None), "expected both weights of the norm or none"
    if q_weight is not None and k_weight is not None:
        assert q_weight.shape == k_weight.shape == (E,), f"{q_weight.shape}, {k_weight.shape}"
        assert all(w.is_contiguous() for w in (q_weight, k_weight)), "strided weight"
        if on_triton(q):
            return _NormTurn.apply(q, k, cos, sin, q_weight, k_weight, eps)
        q, k = rms_norm_reference(q, q_weight, eps), rms_norm_reference(k, k_weight, eps)
    if not torch.is_grad_enabled():  # spares a Function's overhead, a quarter of a small turn
        return _turn_in_place(q, k, cos, sin)
    assert not any(x.is_leaf and x.requires_grad for x in (q, k)), "q or k is a leaf: give a copy"
    return _Turn.apply(q, k, cos, sin)
