"""A linear layer whose weight stays in 4 bits: y = x Wᵀ + bias + scale · (x Aᵀ) Bᵀ.

W is NF4 (`nf4.py`) and frozen, as in QLoRA (Dettmers et al., arXiv 2305.14314); the adapter (A, B)
is what learns. `lora_linear` is the same for a weight in 16 or 32 bits, without the decoding. How a
4-bit W is read depends on the number of rows:

    1 to 64 rows, a GPU, 16-bit x   packed, decoded in registers by `product`: 0.52 bytes a weight,
                                    bias and the adapter's B side in the same pass
    else                            dequantized to x's type into a buffer, then PyTorch's product:
                                    4.5 bytes a weight, which many rows make up for

There is one buffer for each device and type, as large as the largest matrix so far: 136 MB for
Qwen2.5-7B in 16 bits. Each product writes it anew. So it is never saved for backward, everything
that uses it runs on one stream, in order, and inside a CUDA graph the largest matrix must have been
used before the capture.

Backward. Let g = dL/dy, a = x Aᵀ and d = scale · g B, both (N, R). From dy = dx Wᵀ + dbias +
scale · (dx Aᵀ + x dAᵀ) Bᵀ + scale · a dBᵀ and dL = <g, dy>:

    dL/dx = g W + d A            <g, dx Wᵀ> = <g W, dx>; scale <g, dx Aᵀ Bᵀ> = <d A, dx>
    dL/dA = dᵀ x                 scale <g, x dAᵀ Bᵀ> = <d, x dAᵀ> = <dᵀ x, dA>
    dL/dB = scale · gᵀ a         scale <g, a dBᵀ> = scale <gᵀ a, dB>
    dL/dbias = Σ_n g[n]          only if the bias asks for it
    dL/dW                        not computed: the base is frozen

Worked example: x = (1, 2), W = ((1, 0), (0, -1)), A = (1, 1), B = (1, 0)ᵀ, scale = 2. Then a = 3,
y = (1, -2) + 2 · 3 · (1, 0) = (7, -2). For g = (1, 1): d = 2, dx = (1, -1) + 2 · (1, 1) = (3, 1),
dA = 2 · (1, 2), dB = 2 · 3 · (1, 1)ᵀ. Saved: x, A, B, and a, 0.4 % of x at rank 16; W is
dequantized once more.

The product of few rows waits for its weights. For output n and blocks b of 64 columns that share a
scale it is

    y[m, n] = Σ_b scale[n, b] · Σ_{k in b} code[n, k] · x[m, k]

The inner sum runs on tensor cores, with the bare codes, in fp32; the scale multiplies that partial
sum once. What decides the speed is how many instructions each weight costs (docs/kernels.md). The
weights are the left operand of `tl.dot`, so that 16 of them meet at least 8 rows of x (right
operands are 8 wide, left ones 16 high). A byte holds an even and an odd column, so there are two
dots, each with its half of x, which arrives as 32-bit pairs of columns. `_zero` hides from the
assembler that all threads read the same tables; otherwise it keeps them in uniform registers and
copies them back before each use. Blocks are 2 warps: with four, Hopper would choose wgmma, which
reads x from shared memory and which GeForce cards do not have.

Matrices with few outputs are too few programs to keep a card busy, so each row of W is split in
equal parts, their partial sums written in fp32, and a second kernel adds them, always in the same
order, and the bias and the adapter after them. How many parts depends on the matrix only: a row's
result does not depend on how many rows are with it. No atomics.

Numerics: products sum in fp32 and round once to x's type; the adapter is converted to it first, and
its gradients come back in its own type. In registers W is code times fp32 scale, with the code
rounded to 16 bits; dequantized, the product of both is rounded instead.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from kernels._dispatch import INTERPRETED, jit, on_triton, rows_of, tl, triton
from kernels.linear import Adapter
from kernels.nf4 import BLOCK, CONSTRAINTS, NF4, RUN, decode_asm, decode_tables, dequantize, tables

# Rows, parts and stages are chosen by arithmetic; no card was at hand to measure them.
MOST_ROWS = 64  # each 32 decode anew; dequantizing costs 4 bytes a weight more, once
BN = 64  # outputs a program
WARPS = 2
STAGES = 4  # turns on their way at a time: 24 KB of weights a multiprocessor with three programs
PROGRAMS = 384  # enough for 132 multiprocessors to have their reads under way
LEAST = 3  # blocks of 64 columns in a part: fewer, and a program only starts and ends
BYTES = BLOCK // 2  # of codes, in a block
MOST_RANK = 64  # columns of B at a time: with 256 the sum spills its registers

_BUFFERS: dict[tuple[torch.device, torch.dtype], Tensor] = {}


def nf4_linear_reference(
    x: Tensor, weight: NF4, bias: Tensor | None = None, adapter: Adapter | None = None
) -> Tensor:
    """As `nf4_linear`, by plain autograd, in fp32 or wider, from a fresh copy of the weight."""
    wide = torch.promote_types(x.dtype, torch.float32)
    h = x.to(wide)
    y = F.linear(h, dequantize(weight, wide), None if bias is None else bias.to(wide))
    if adapter is not None:
        a = F.linear(h, adapter.A.to(wide))
        y = y + adapter.scale * F.linear(a, adapter.B.to(wide))
    return y.to(x.dtype)


@jit
def _zero():
    """0, by way of shuffles that the assembler does not see through."""
    return tl.min(tl.arange(0, 32).to(tl.float32), 0).to(tl.int32)


@jit
def _adapted(acc, n, m, Bias, A, B, scale, M, OUT, R, RANK: tl.constexpr, BIAS: tl.constexpr):
    """acc (BN, BM) + bias + scale · B aᵀ."""
    if RANK:
        for start in tl.range(0, R, RANK, num_stages=1):
            r = start + tl.arange(0, RANK)
            low = tl.load(
                B + n[:, None] * R + r[None, :], mask=(n < OUT)[:, None] & (r < R), other=0.0
            )
            a = tl.load(
                A + m[None, :] * R + r[:, None],
                mask=(m < M)[None, :] & (r < R)[:, None], other=0.0,
            )  # fmt: skip
            acc += scale * tl.dot(low, a, input_precision="ieee")
    if BIAS:
        acc += tl.load(Bias + n, mask=n < OUT, other=0.0).to(tl.float32)[:, None]
    return acc


@jit
def _nf4_product_kernel(
    Pairs, Codes, Absmax, Scales, Offset, Dynamic, Table, Y, Bias, A, B,
    scale, pairs_stride, M, OUT, BLOCKS, PART, R,
    ASM: tl.constexpr, CONSTRAINTS: tl.constexpr, SPLIT: tl.constexpr, RANK: tl.constexpr,
    BIAS: tl.constexpr, TURN: tl.constexpr, BYTES: tl.constexpr, RUN: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """One program: BN outputs, BM rows, PART of the BLOCKS of 64 columns, TURN of them a turn.

    Rows and outputs past the end are read as the last one, which keeps masks out of the loop. Of
    Bias only the type is read, that of x; A, B, scale and R are the sum's, and stand here because
    without them the assembler spills 8 bytes on sm_90."""
    n = tl.program_id(0) * BN + tl.arange(0, BN)
    m = tl.program_id(2) * BM + tl.arange(0, BM)
    first = tl.program_id(1) * PART
    row = tl.minimum(n, OUT - 1)
    byte = tl.arange(0, BYTES)  # a byte of codes is a pair of columns
    codes = Codes + (row.to(tl.int64) * BLOCKS + first)[:, None] * BYTES + byte[None, :]
    x_row = tl.minimum(m, M - 1).to(tl.int64) * pairs_stride
    pairs = Pairs + first * BYTES + x_row[None, :] + byte[:, None]
    offset = tl.load(Offset)
    if ASM is not None:
        table = Table + _zero() + tl.zeros((1, 1), tl.int32)
        t0, t1, t2, t3 = tl.load(table), tl.load(table + 1), tl.load(table + 2), tl.load(table + 3)
    kind = Bias.dtype.element_ty  # the type of x
    half: tl.constexpr = kind.primitive_bitwidth
    acc = tl.zeros((BN, BM), tl.float32)
    for at in range(first, first + PART, TURN):
        for step in tl.static_range(TURN):
            code = tl.load(codes + step * BYTES)  # (BN, 32)
            if ASM is not None:
                even, odd = tl.inline_asm_elementwise(
                    ASM, CONSTRAINTS, [code, t0, t1, t2, t3], (kind, kind), is_pure=True, pack=4
                )
            else:
                even = tl.load(Table + (code >> 4).to(tl.int32)).to(kind)
                odd = tl.load(Table + (code & 15).to(tl.int32)).to(kind)
            pair = tl.load(pairs + step * BYTES)  # (32, BM)
            if half == 16:
                x_even = pair.to(tl.int16).to(kind, bitcast=True)
                x_odd = (pair >> 16).to(tl.int16).to(kind, bitcast=True)
            else:
                x_even = pair.to(tl.int32).to(kind, bitcast=True)
                x_odd = (pair >> 32).to(tl.int32).to(kind, bitcast=True)
            part = tl.dot(even, x_even, input_precision="ieee")
            part = tl.dot(odd, x_odd, part, input_precision="ieee")
            block = row * BLOCKS + at + step
            absmax = tl.load(Dynamic + tl.load(Absmax + block).to(tl.int32))
            acc += part * (absmax * tl.load(Scales + block // RUN) + offset)[:, None]
        codes += TURN * BYTES
        pairs += TURN * BYTES
    inside = (n < OUT)[:, None] & (m < M)[None, :]
    at = m.to(tl.int64)[None, :] * OUT + n[:, None]
    if SPLIT:  # Y (parts, M, OUT) fp32, to be added up, with bias and adapter
        tl.store(Y + tl.program_id(1).to(tl.int64) * M * OUT + at, acc, mask=inside)
    else:
        tl.store(Y + at, acc.to(Y.dtype.element_ty), mask=inside)


@jit
def _nf4_sum_kernel(
    Parts, Y, Bias, A, B, scale, M, OUT, R, PARTS,
    RANK: tl.constexpr, BIAS: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """One program: BN outputs, BM rows; the parts are added first to last."""
    n = tl.program_id(0) * BN + tl.arange(0, BN)
    m = tl.program_id(1) * BM + tl.arange(0, BM)
    inside = (n < OUT)[:, None] & (m < M)[None, :]
    at = m.to(tl.int64)[None, :] * OUT + n[:, None]
    parts = Parts + at
    acc = tl.zeros((BN, BM), tl.float32)
    for _ in range(PARTS):
        acc += tl.load(parts, mask=inside, other=0.0)
        parts += tl.cast(M, tl.int64) * OUT  # M is a plain 1 where there is one row
    acc = _adapted(acc, n, m, Bias, A, B, scale, M, OUT, R, RANK, BIAS)
    tl.store(Y + at, acc.to(Y.dtype.element_ty), mask=inside)


def _parts(out: int, blocks: int) -> int:
    """Equal parts that each row of W is split in: the fewest that make PROGRAMS programs, or else
    the most of at least LEAST blocks. A function of the matrix alone."""
    tiles = triton.cdiv(out, BN)
    fit = [p for p in range(1, blocks // LEAST + 1) if blocks % p == 0] or [1]
    return next((p for p in fit if tiles * p >= PROGRAMS), fit[-1])


def _rows(rows: int) -> int:
    """Rows of x a program: 8, 16 or 32."""
    return 8 if rows <= 8 else 16 if rows <= 16 else 32


def _turn(rows: int, part: int) -> int:
    """Blocks of columns a turn. Two halve the waiting for shared memory; with 32 rows of sums there
    are no registers left for it."""
    return 2 if rows <= 16 and part % 2 == 0 else 1


def _rank(a: Tensor | None) -> int:
    return 0 if a is None else min(max(16, triton.next_power_of_2(a.shape[1])), MOST_RANK)


def fits(x: Tensor, weight: NF4) -> bool:
    """True where `product` has a kernel for x (N, in): whole blocks in a row, few rows, and a type
    that tensor cores multiply (or the interpreter, whose decoder is the plain one)."""
    kinds = (torch.float16, torch.bfloat16, *(torch.float32,) * INTERPRETED)
    return len(x) <= MOST_ROWS and weight.shape[1] % BLOCK == 0 and x.dtype in kinds


def _as_pairs(x: Tensor) -> Tensor:
    """x (N, in) -> (N, in / 2) integers twice as wide; copied if a row starts at an odd place."""
    wide = torch.int32 if x.element_size() == 2 else torch.int64
    x = rows_of(x)
    even = x.stride(0) % 2 == 0 and x.storage_offset() % 2 == 0
    return (x if even else x.clone(memory_format=torch.contiguous_format)).view(wide)


def product(
    x: Tensor,
    weight: NF4,
    bias: Tensor | None = None,
    a: Tensor | None = None,
    B: Tensor | None = None,
    scale: float = 1.0,
) -> Tensor:
    """x (N, in), weight (out, in), bias (out,), a (N, R), B (out, R) -> x Wᵀ + bias + scale · a Bᵀ
    (N, out) in x's type; N up to MOST_ROWS, in a multiple of 64."""
    (N, columns), (out, inner) = x.shape, weight.shape
    assert columns == inner, f"x has {columns} columns, the weight {inner}"
    assert fits(x, weight), f"no kernel for {N} rows of {columns} {x.dtype}"
    if bias is not None:
        assert bias.shape == (out,), f"bias {tuple(bias.shape)} for {out} outputs"
        assert bias.dtype == x.dtype, f"bias {bias.dtype}, x {x.dtype}"
        bias = bias.contiguous()
    assert (a is None) == (B is None), "a and B come together"
    y = torch.empty(N, out, dtype=x.dtype, device=x.device)
    if a is not None and B is not None:
        assert a.shape[0] == N, f"a has {a.shape[0]} rows, x {N}"
        assert B.shape == (out, a.shape[1]), f"B {tuple(B.shape)}, a {tuple(a.shape)}"
        assert a.dtype == B.dtype == x.dtype, f"a {a.dtype}, B {B.dtype}, x {x.dtype}"
        a, B = a.contiguous(), B.contiguous()
    if not N:
        return y
    pairs, blocks, rank = _as_pairs(x), inner // BLOCK, _rank(a)
    parts = _parts(out, blocks)
    part, BM = blocks // parts, _rows(N)
    R = 0 if a is None else a.shape[1]
    codebook, dynamic = tables(x.device)
    table = codebook if INTERPRETED else decode_tables(x.dtype, x.device)
    whole = parts == 1 and bias is None and a is None  # else there is something to add
    sums = y if whole else torch.empty(parts, N, out, dtype=torch.float32, device=x.device)
    tiles, groups = triton.cdiv(out, BN), triton.cdiv(N, BM)
    bias_, a_, B_ = (y if t is None else t for t in (bias, a, B))  # any pointer will do, unread
    _nf4_product_kernel[(tiles, parts, groups)](
        pairs, weight.codes, weight.absmax, weight.scales, weight.offset, dynamic, table, sums,
        bias_, a_, B_, scale, pairs.stride(0), N, out, blocks, part, R,
        ASM=None if INTERPRETED else decode_asm(x.dtype), CONSTRAINTS=CONSTRAINTS,
        SPLIT=not whole, RANK=rank, BIAS=bias is not None, TURN=_turn(N, part), BYTES=BYTES,
        RUN=RUN, BM=BM, BN=BN,
        num_warps=WARPS, num_stages=STAGES, enable_fp_fusion=True,
    )  # fmt: skip
    if not whole:
        _nf4_sum_kernel[(tiles, groups)](
            sums, y, bias_, a_, B_, scale, N, out, R, parts,
            RANK=rank, BIAS=bias is not None, BM=BM, BN=BN, num_warps=WARPS, enable_fp_fusion=True,
        )  # fmt: skip
    return y


def _dense(weight: NF4 | Tensor, dtype: torch.dtype) -> Tensor:
    """The weight (out, in); of 4 bits in the buffer, valid until the next call."""
    if isinstance(weight, Tensor):
        return weight
    out, columns = weight.shape
    place = (weight.device, dtype)
    if place not in _BUFFERS or _BUFFERS[place].numel() < out * columns:
        with torch.inference_mode(False):  # or only inference could write it ever after
            _BUFFERS[place] = torch.empty(out * columns, dtype=dtype, device=weight.device)
    return dequantize(weight, dtype, _BUFFERS[place][: out * columns].view(out, columns))


def _forward(
    x: Tensor,
    weight: NF4 | Tensor,
    bias: Tensor | None,
    A: Tensor | None,
    B: Tensor | None,
    scale: float,
) -> tuple[Tensor, Tensor | None]:
    """y (N, out) and a = x Aᵀ (N, R); bias, A and B in x's type."""
    a = None if A is None else F.linear(x, A)
    if not isinstance(weight, Tensor) and on_triton(x) and fits(x, weight):
        return product(x, weight, bias, a, B, scale), a
    y = F.linear(x, _dense(weight, x.dtype), bias)
    if a is not None and B is not None:
        y.addmm_(a, B.t(), alpha=scale)
    return y, a


class _FrozenLinear(torch.autograd.Function):
    """Saves x, A, B and a = x Aᵀ."""

    @staticmethod
    def forward(ctx, x, weight, bias, A, B, scale):
        ctx.weight, ctx.scale = weight, scale
        ctx.types = [None if t is None else t.dtype for t in (bias, A, B)]
        bias, A, B = (None if t is None else t.to(x.dtype) for t in (bias, A, B))
        y, a = _forward(x, weight, bias, A, B, scale)
        ctx.save_for_backward(x, A, B, a)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        x, A, B, a = ctx.saved_tensors
        for_x, _, for_bias, for_A, for_B, _ = ctx.needs_input_grad
        bias_type, A_type, B_type = ctx.types
        d = None if A is None else dy @ B * ctx.scale  # (N, R)
        dx = None
        if for_x:
            dx = dy @ _dense(ctx.weight, x.dtype)
            if d is not None:
                dx.addmm_(d, A)
        d_bias = dy.sum(0).to(bias_type) if for_bias else None
        dA = (d.t() @ x).to(A_type) if for_A else None
        dB = (dy.t() @ a * ctx.scale).to(B_type) if for_B else None
        return dx, None, d_bias, dA, dB, None


def nf4_linear(
    x: Tensor, weight: NF4, bias: Tensor | None = None, adapter: Adapter | None = None
) -> Tensor:
    """x (N, in), weight (out, in), bias (out,), adapter A (R, in) and B (out, R)
    -> x Wᵀ + bias + scale · (x Aᵀ) Bᵀ (N, out) in x's type."""
    return _frozen_linear(x, weight, bias, adapter)


def lora_linear(x: Tensor, weight: Tensor, bias: Tensor | None, adapter: Adapter) -> Tensor:
    """As `nf4_linear` for a plain weight (out, in) of x's type, which gets no gradient."""
    assert weight.dtype == x.dtype, f"expected a weight of {x.dtype}, got {weight.dtype}"
    return _frozen_linear(x, weight, bias, adapter)


def _frozen_linear(
    x: Tensor, weight: NF4 | Tensor, bias: Tensor | None, adapter: Adapter | None
) -> Tensor:
    out, inner = weight.shape
    assert x.ndim == 2, f"expected x (N, {inner}), got {tuple(x.shape)}"
    assert x.shape[1] == inner, f"expected x (N, {inner}), got {tuple(x.shape)}"
    A, B, scale = (None, None, 0.0) if adapter is None else adapter
    if A is not None and B is not None:
        R = A.shape[0]
        assert A.shape == (R, inner), f"expected A (R, {inner}), got {tuple(A.shape)}"
        assert B.shape == (out, R), f"expected B ({out}, {R}), got {tuple(B.shape)}"
    learns = any(t is not None and t.requires_grad for t in (x, bias, A, B))
    if learns and torch.is_grad_enabled():
        return _FrozenLinear.apply(x, weight, bias, A, B, scale)
    bias, A, B = (None if t is None else t.to(x.dtype) for t in (bias, A, B))
    return _forward(x, weight, bias, A, B, scale)[0]
