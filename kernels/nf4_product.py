"""The product of a few rows with packed NF4 weights: y = x Wᵀ + bias + scale · a Bᵀ, W in 4 bits.

With 1 to 64 rows a product waits for its weights. Dequantized first, each costs 0.52 bytes read, 2
written and 2 read again; here it is 0.52 read, 8.8 times less, and W is never in memory. A 3,584 x
3,584 matrix: 6.6 MB instead of 58.

For output n and blocks b of 64 columns that share a scale (`nf4.py`):

    y[m, n] = Σ_b scale[n, b] · Σ_{k in b} code[n, k] · x[m, k]

The inner sum runs on tensor cores, with the bare codes, in fp32; the scale multiplies that partial
sum once, one product for 64 weights, and exact. `nf4_decode.py` shows how codes become 16-bit
numbers and what that rounds.

What decides the speed is how many instructions each weight costs. A program owns BN outputs and
takes one or two blocks of columns a turn. The weights are the left operand of `tl.dot`, so that 16
of them meet at least 8 rows of x (right operands are 8 wide, left ones 16 high: rows on the left
would be padded to 16), and one fp32 scale serves the 16. Triton copies the packed bytes to
shared memory asynchronously, 16 bytes a thread, reads them in the order of the tensor cores, and
decodes there, in registers. A byte holds an even and an odd column, so there are two dots, each
with its half of x; x arrives as 32-bit pairs of columns, and one byte permutation a pair splits it.

Two details matter more than they look:
  * `_zero` hides from the assembler that all threads read the same tables. Otherwise it keeps the
    tables in uniform registers and copies them back before each use.
  * Blocks are 2 warps with 32 outputs each: the more outputs a warp has, the less each pays for
    reading x. With four warps Hopper would also choose its own instructions (wgmma), which read x
    from shared memory and which GeForce cards do not have.

Instructions a weight in the main loop on sm_80 (sm_90 beside it where it differs by more than 2 %),
Triton 3.9, 16 rows, two blocks of columns a turn. 21 / 8 = 2.6 of them decode, 0.25 multiply:

    as it is                                        4.2     106 registers, 24 KB shared
    codes looked up in memory, one by one           7.8     two loads a byte
    without `_zero`                                 5.1
    even and odd columns of x apart                 4.3     and a pass over x before
    so, and all tables as numbers in the text       5.4     BN 128, four warps
    one block a turn, as where parts are odd        4.6
    four blocks a turn                              4.1     49 KB shared
    BN 32                                           5.5
    BN 128                                          3.8     168 to 185 registers
    BN 128, four warps                              4.1     sm_90: 5.2
    BN 64, four warps                               5.4     sm_90: 6.5
    8 rows                                          3.8
    32 rows, one block a turn                       5.5     168 registers; two blocks 5.1 and 175
    64 rows                                         7.4     222 to 255 registers, spills

So 33 to 64 rows are two programs of 32. Consumer cards can read 8 bytes a clock and multiprocessor,
which are 16 weights, and issue 128 instructions, 8 for each. All this is counted, not timed.

Matrices with few outputs are too few programs to keep a card busy, so each row of W is split in
equal parts, their partial sums written in fp32, and a second kernel adds them, always in the same
order, and the bias and the adapter after them. How many parts depends on the matrix only, and so
does the order in which a sum is taken: a row's result does not depend on how many rows are with it.
No atomics.

Numerics: fp32 sums; partial sums, bias and the adapter are added in fp32 and rounded once. `a` =
x Aᵀ comes rounded to x's type. What we left out: permuting the weights when they are loaded, which
would save two of the 21 instructions, and scales expanded to fp32 beforehand, which would save 0.2
to 0.4 instructions a weight and cost 9 % more bytes, 0.3 GB for Qwen2.5-7B. The scale's look-ups
stay in the first-level cache, and are asked for before the partial sum that waits for them.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kernels._compile import Variant
from kernels._dispatch import INTERPRETED, jit, rows_of, tl, triton
from kernels.nf4 import BLOCK, NF4, RUN, tables
from kernels.nf4_decode import CONSTRAINTS, decode_asm, decode_tables

# Rows, parts and stages are chosen by arithmetic; no card was at hand to measure them.
MOST_ROWS = 64  # each 32 decode anew; dequantizing costs 4 bytes a weight more, once
BN = 64  # outputs a program
WARPS = 2
STAGES = 4  # turns on their way at a time: 24 KB of weights a multiprocessor with three programs
PROGRAMS = 384  # enough for 132 multiprocessors to have their reads under way
LEAST = 3  # blocks of 64 columns in a part: fewer, and a program only starts and ends
BYTES = BLOCK // 2  # of codes, in a block
MOST_RANK = 64  # columns of B at a time: with 256 the sum spills its registers


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


def variants() -> list[Variant]:
    """What the launcher asks for: Qwen2.5-7B's gate, k, down and o projections and SmolLM2-135M's
    q, and a head that is one part, with as many rows of x as fill a program."""
    # out, in, rows, type, rank of the adapter, bias, most registers, most instructions a weight
    shapes = [
        (18944, 3584, 8, torch.float16, 0, False, 128, 3.8),
        (18944, 3584, 16, torch.float16, 16, False, 128, 4.2),
        (512, 3584, 16, torch.bfloat16, 16, True, 128, 4.2),
        (3584, 18944, 16, torch.float16, 0, False, 128, 4.5),
        (576, 576, 8, torch.bfloat16, 0, False, 128, 4.1),
        (3584, 3584, 32, torch.float16, 16, False, 168, 5.5),
        (151936, 4096, 16, torch.float16, 0, False, 128, 4.2),
    ]
    made = []
    for out, columns, rows, dtype, rank, bias, registers, instructions in shapes:
        kind = "fp16" if dtype == torch.float16 else "bf16"
        blocks = columns // BLOCK
        parts = _parts(out, blocks)
        BM, turn = _rows(rows), _turn(rows, blocks // parts)
        name = f"{out} x {columns}, {rows} rows, {kind}"
        whole = parts == 1 and not rank and not bias
        shared = {"Bias": f"*{kind}", "A": f"*{kind}", "B": f"*{kind}", "scale": "fp32"}
        made.append(
            Variant(
                f"nf4 product, {name}",
                _nf4_product_kernel,
                {"Pairs": "*i32", "Codes": "*u8", "Absmax": "*u8", "Scales": "*fp32",
                 "Offset": "*fp32", "Dynamic": "*fp32", "Table": "*i32",
                 "Y": f"*{kind}" if whole else "*fp32", **shared,
                 "pairs_stride": "i32", "M": "i32", "OUT": "i32", "BLOCKS": "i32", "PART": "i32",
                 "R": "i32"},
                {"ASM": decode_asm(dtype), "CONSTRAINTS": CONSTRAINTS, "SPLIT": not whole,
                 "RANK": rank, "BIAS": bias, "TURN": turn, "BYTES": BYTES,
                 "RUN": RUN, "BM": BM, "BN": BN},
                WARPS, STAGES, dot=True, most_registers=registers,
                odd=frozenset({"M", "BLOCKS", "PART"}),
                weights=BN * BLOCK * turn, most_per_weight=instructions,
            )
        )  # fmt: skip
        if rank:
            made.append(
                Variant(
                    f"nf4 sum of {name}",
                    _nf4_sum_kernel,
                    {"Parts": "*fp32", "Y": f"*{kind}", **shared, "M": "i32", "OUT": "i32",
                     "R": "i32", "PARTS": "i32"},
                    {"RANK": rank, "BIAS": bias, "BM": BM, "BN": BN},
                    WARPS, dot=True, odd=frozenset({"M", "PARTS"}),
                )
            )  # fmt: skip
    return made
