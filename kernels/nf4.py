"""NF4: weights in 4 bits, each block of 64 with a scale, and the scales in 8 bits ("double
quantization"). The storage of QLoRA, bit for bit as bitsandbytes makes and reads it.

    w[i] ≈ CODEBOOK[code[i]] · scale[i // 64]
    scale[b] ≈ DYNAMIC[absmax[b]] · scales[b // 256] + offset

(Dettmers et al., "QLoRA", arXiv 2305.14314.) The 16 values of CODEBOOK are quantiles of a normal
distribution between -1 and 1, 0 among them. To quantize, find the largest |w| of each block along
the flattened matrix, divide by it, take the nearest code. A block's scale in fp32 would cost 0.5
bits a weight. All scales are positive and much alike, so their mean (`offset`) is subtracted and
the rest stored as the nearest of the 256 values of DYNAMIC times the largest of each 256: 0.127
bits. In all 0.516 bytes a weight, against 2 for bf16. DYNAMIC spends its bits on a sign, a decimal
exponent and, with what is left, a linear fraction (arXiv 1511.04561).

Worked example, with blocks of 4 instead of 64: w = (0.3, -0.6, 0.05, 0). The largest is 0.6; w by
it is (0.5, -1, 0.083, 0). Nearest in CODEBOOK are 0.4407, -1, 0.0796 and 0: codes 12, 0, 8, 7, two
a byte, 0xC0 and 0x87. Back: (0.264, -0.6, 0.048, 0). If the next block had scale 0.2, then offset =
0.4, what is left ±0.2, scales = 0.2, and the scales return as 0.6 and 0.2014.

The kernel that dequantizes reads 0.52 bytes and writes 2 a weight, into a buffer that the caller
keeps. A scale is rounded after its product and after its sum, as bitsandbytes does, hence no
fused multiply-add. `quantize` runs once, when a model is loaded: plain PyTorch on every device. On
a CPU bitsandbytes looks up the codes of scales in a table of 65,536 points, and 1 in about 500
becomes the neighbour of the nearest; so do we, there. Left out: other block sizes, and FP4.

In registers (`decode_asm`) a product decodes without memory: eight codes of a 32-bit word become
eight fp16 or bf16 numbers in 21 instructions. `prmt` (permute bytes) makes a word of four bytes,
each picked out of the eight of two registers by three bits of a selector; the fourth asks for
copies of its sign. So two registers are a table of eight bytes, and one `prmt` looks up four
codes at once. A 16-bit number takes four such tables: low and high bytes, codes 0 to 7 and 8 to 15.

    word       odd, even, odd, even ... columns from the low end: bytes hold the even one on top
    s          the word without the top bit of each code: four selectors in each half
    m          bytes of ones where that bit is set: `prmt` copies the bytes' signs; the odd codes'
               bits become signs in the word shifted left by four
    low, high  m chooses between two look-ups of low bytes, and of high ones (`lop3`)
    even, odd  bytes of low and high interleaved, again by `prmt`

The first half of each table comes as an operand ($5, $9, $13, $17), because `prmt` takes one
constant at most. These codes are CODEBOOK rounded to 16 bits, which is within the rounding of
dequantized weights; the scale stays out of it.
"""

from __future__ import annotations

from functools import cache
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels._dispatch import jit, on_triton, tl, triton

BLOCK = 64  # weights that share a scale
RUN = 256  # scales that share a scale of their own
TYPES = (torch.float32, torch.bfloat16, torch.float16)
CHUNK = 2**22  # weights that `quantize` works on at a time: about 70 MB
PIECE = 2**18  # weights that the reference unpacks at a time: 1.5 MB, which stay in the cache
WORDS = 512  # words of eight weights that a program of the kernel unpacks
# Four outputs of two numbers each; the word; four tables that Triton passes four times.
CONSTRAINTS = ",".join(["=r"] * 4 + ["r"] * 17)
CHOOSE = 0xD8  # lop3's truth table of "where the third has ones the second, else the first"
# fmt: off
CODEBOOK = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453,
    -0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0,
    0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)
# fmt: on


def _dynamic_map() -> list[float]:
    """The 256 values that scales are stored as, ascending."""
    values = [0.0, 1.0]
    for bits in range(7):
        edges = torch.linspace(0.1, 1.0, 2**bits + 1)
        middles = (edges[:-1] + edges[1:]) / 2 * 10.0 ** (bits - 6)
        values += middles.tolist() + (-middles).tolist()
    return sorted(values)


DYNAMIC = tuple(_dynamic_map())


class NF4(NamedTuple):
    """A quantized matrix of shape (out, in)."""

    codes: Tensor  # (out, in / 2) uint8: two weights a byte, the even column in the upper four bits
    absmax: Tensor  # (out · in / 64,) uint8: the 8-bit code of each block's scale
    scales: Tensor  # (ceil(blocks / 256),) fp32: largest |absmax - offset| of 256 blocks each
    offset: Tensor  # () fp32: mean of all absmax

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in) of the matrix."""
        return self.codes.shape[0], 2 * self.codes.shape[1]

    @property
    def device(self) -> torch.device:
        return self.codes.device

    def to(self, device: torch.device | str) -> NF4:
        return NF4(*(part.to(device) for part in self))


@cache
def tables(device: torch.device) -> tuple[Tensor, Tensor]:
    """CODEBOOK (16,) and DYNAMIC (256,) in fp32 on `device`."""
    return torch.tensor(CODEBOOK, device=device), torch.tensor(DYNAMIC, device=device)


@cache
def _pairs(device: torch.device) -> Tensor:
    """(256,) int64: for each byte its two values of CODEBOOK, as the bits of two fp32. One look-up
    then unpacks two weights."""
    values = tables(device)[0]
    return torch.cartesian_prod(values, values).view(torch.int64).view(-1)


def _nearest(x: Tensor, values: Tensor) -> Tensor:
    """Index (uint8) of the nearest of `values` (ascending); halfway, of the smaller."""
    return torch.bucketize(x, (values[:-1] + values[1:]) / 2, out_int32=True).to(torch.uint8)


def _to_ones(x: Tensor, largest: Tensor) -> Tensor:
    """x (N, M) divided by its rows' largest (N,), within -1 and 1. Rows of zeros stay zero."""
    return (x * (1.0 / largest.clamp(min=1e-38))[:, None]).clamp_(-1, 1)


def _quantize_scales(absmax: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """absmax (blocks,) fp32 -> its 8-bit codes, scales and offset, as in NF4."""
    offset = absmax.mean()
    runs = F.pad(absmax - offset, (0, -len(absmax) % RUN)).view(-1, RUN)
    scales = runs.abs().amax(-1)
    ones = _to_ones(runs, scales)
    if ones.device.type == "cpu":  # bitsandbytes' table; fp64 stands for a fused multiply-add
        at = (((ones + 1) / 2).double() * 65_535 + 0.5).float().int()
        ones = (at + at).float() / 65_535 - 1
    codes = _nearest(ones, tables(absmax.device)[1])
    codes *= (scales > 0)[:, None]  # where nothing is left, any code will do; bitsandbytes' is 0
    return codes.view(-1)[: len(absmax)], scales, offset


@torch.no_grad()
def quantize(weight: Tensor) -> NF4:
    """weight (out, in) fp32, bf16 or fp16 -> NF4. out · in must be a multiple of 64, in of 2."""
    full = weight.ndim == 2 and weight.numel() > 0
    assert full, f"expected a matrix, got {tuple(weight.shape)}"
    assert weight.dtype in TYPES, f"expected fp32, bf16 or fp16, got {weight.dtype}"
    rows, columns = weight.shape
    assert columns % 2 == 0, f"expected an even number of columns, got {columns}"
    assert rows * columns % BLOCK == 0, f"{rows} x {columns} weights do not fill blocks of {BLOCK}"
    values = tables(weight.device)[0]
    codes = torch.empty(rows, columns // 2, dtype=torch.uint8, device=weight.device)
    absmax = torch.empty(rows * columns // BLOCK, dtype=torch.float32, device=weight.device)
    step = BLOCK * max(1, CHUNK // (BLOCK * columns))  # rows; so many always fill blocks
    for row in range(0, rows, step):
        blocks = weight[row : row + step].reshape(-1, BLOCK).float()
        largest = blocks.abs().amax(-1)
        first = row * columns // BLOCK
        absmax[first : first + len(blocks)] = largest
        even, odd = _nearest(_to_ones(blocks, largest), values).view(-1, 2).unbind(-1)
        codes[row : row + step] = (even << 4 | odd).view(-1, columns // 2)
    nf4 = NF4(codes, *_quantize_scales(absmax))
    assert nf4.offset.isfinite(), "the weight holds inf, nan or too large numbers"  # waits for GPU
    return nf4


def block_scales(nf4: NF4) -> Tensor:
    """(out · in / 64,) fp32: the scale of each block of 64 weights."""
    scale = tables(nf4.device)[1].index_select(0, nf4.absmax.int())
    whole = len(scale) // RUN
    scale[: whole * RUN].view(whole, RUN).mul_(nf4.scales[:whole, None])
    scale[whole * RUN :].mul_(nf4.scales[-1])
    return scale.add_(nf4.offset)


def dequantize_reference(nf4: NF4, out: Tensor) -> Tensor:
    """NF4 -> out (out, in), contiguous, of any floating type. Look-up, product and rounding work on
    a piece at a time that stays in the processor's cache. Half of the time is the look-up, for
    which PyTorch has no vector code: bitsandbytes' AVX-512 kernel takes a quarter of our time."""
    packed, flat = nf4.codes.view(-1), out.view(-1)
    scale, pairs = block_scales(nf4)[:, None], _pairs(nf4.device)
    for at in range(0, len(flat), PIECE):
        end = min(at + PIECE, len(flat))
        values = pairs.index_select(0, packed[at // 2 : end // 2].int()).view(torch.float32)
        values.view(-1, BLOCK).mul_(scale[at // BLOCK : end // BLOCK])
        flat[at:end].copy_(values)
    return out


@jit
def _nf4_dequantize_kernel(
    Codes, Absmax, Scales, Offset, Codebook, Dynamic, Out,
    N, BLOCK: tl.constexpr, RUN: tl.constexpr, WORDS: tl.constexpr,
):  # fmt: skip
    """One program, WORDS words of four bytes, eight weights each. A thread unpacks whole words, so
    that it stores 16 bytes of 16-bit weights at a time and neighbours store neighbours."""
    words = tl.program_id(0).to(tl.int64) * WORDS + tl.arange(0, WORDS)
    inside = words < N
    word = tl.load(Codes.to(tl.pointer_type(tl.int32)) + words, mask=inside, other=0)
    block = words // (BLOCK // 8)
    code = tl.load(Absmax + block, mask=inside, other=0).to(tl.int32)
    run = tl.load(Scales + block // RUN, mask=inside, other=0.0)
    scale = tl.load(Dynamic + code) * run + tl.load(Offset)
    # Bytes go up from the low end of a word, and the upper half of each comes first: 4, 0, 12, 8...
    place = tl.arange(0, 8)
    nibble = (word[:, None] >> ((place ^ 1) * 4)[None, :]) & 15
    codebook = tl.load(Codebook + tl.arange(0, 16))
    values = tl.gather(codebook, tl.reshape(nibble, (WORDS * 8,)), 0)
    out = tl.reshape(values, (WORDS, 8)) * scale[:, None]
    tl.store(Out + words[:, None] * 8 + place[None, :], out, mask=inside[:, None])


def _dequantize(nf4: NF4, out: Tensor) -> Tensor:
    """NF4 -> out (out, in), contiguous."""
    codebook, dynamic = tables(nf4.device)
    words = out.numel() // 8
    # Fusion off: a fused multiply-add would round the scale once, where bitsandbytes rounds twice.
    _nf4_dequantize_kernel[(triton.cdiv(words, WORDS),)](
        nf4.codes, nf4.absmax, nf4.scales, nf4.offset, codebook, dynamic, out,
        words, BLOCK=BLOCK, RUN=RUN, WORDS=WORDS, num_warps=4, enable_fp_fusion=False,
    )  # fmt: skip
    return out


def _check(nf4: NF4, out: Tensor) -> None:
    """Parts that fit together, and an `out` that fits them."""
    blocks = nf4.codes.numel() * 2 // BLOCK
    sizes = {"absmax": (blocks,), "scales": (-(-blocks // RUN),), "offset": ()}
    for name, size in sizes.items():
        part = getattr(nf4, name)
        assert part.shape == size, f"expected {name} {size}, got {tuple(part.shape)}"
    for name, part in zip(nf4._fields, nf4, strict=True):
        kind = torch.uint8 if name in ("codes", "absmax") else torch.float32
        assert part.dtype == kind, f"expected {name} in {kind}, got {part.dtype}"
        assert part.is_contiguous(), f"expected {name} contiguous, got strides {part.stride()}"
        assert part.device == out.device, f"{name} is on {part.device}, out on {out.device}"
    assert out.shape == nf4.shape, f"expected out {nf4.shape}, got {tuple(out.shape)}"
    assert out.is_contiguous(), f"expected a contiguous out, got strides {out.stride()}"


def dequantize(nf4: NF4, dtype: torch.dtype, out: Tensor | None = None) -> Tensor:
    """NF4 -> weight (out, in) of type `dtype`, written into `out` if that is given."""
    out = torch.empty(nf4.shape, dtype=dtype, device=nf4.device) if out is None else out
    assert out.dtype == dtype, f"expected out in {dtype}, got {out.dtype}"
    _check(nf4, out)
    return _dequantize(nf4, out) if on_triton(nf4.codes) else dequantize_reference(nf4, out)


def _words(dtype: torch.dtype) -> list[int]:
    """Eight 32-bit words: low bytes of codes 0-3, 4-7, 8-11, 12-15, then the high bytes."""
    codes = [c & 0xFFFF for c in torch.tensor(CODEBOOK).to(dtype).view(torch.int16).tolist()]
    planes = [[c & 255 for c in codes], [c >> 8 for c in codes]]
    return [int.from_bytes(p[i : i + 4], "little") for p in planes for i in range(0, 16, 4)]


@cache
def decode_tables(dtype: torch.dtype, device: torch.device) -> Tensor:
    """(4,) int32, the operands of `decode_asm`: the first half of each table."""
    words = torch.tensor(_words(dtype)[::2], dtype=torch.int64)
    return words.to(torch.int32).to(device)  # wraps around, which keeps the bits


@cache
def decode_asm(dtype: torch.dtype) -> str:
    """PTX: $4 is a word of four bytes, ($0, $1) their four even columns, ($2, $3) the odd ones."""
    low_end, low_top_end, high_end, high_top_end = _words(dtype)[1::2]
    lines = [
        ".reg .b32 s, h, v, m, low, lowtop, high, hightop;",
        "and.b32 s, $4, 0x77777777;",
        "shr.u32 h, s, 16;",
        "shl.b32 v, $4, 4;",
    ]
    # Selectors, then which bytes' signs make m (8 and up: of $4, 12 and up: of v), then outputs.
    for selectors, signs, even, odd in (("s", 0x9D8C, "$0", "$2"), ("h", 0xBFAE, "$1", "$3")):
        lines += [
            f"prmt.b32 m, $4, v, {signs:#x};",
            f"prmt.b32 low, $5, {low_end:#x}, {selectors};",
            f"prmt.b32 lowtop, $9, {low_top_end:#x}, {selectors};",
            f"prmt.b32 high, $13, {high_end:#x}, {selectors};",
            f"prmt.b32 hightop, $17, {high_top_end:#x}, {selectors};",
            f"lop3.b32 low, low, lowtop, m, {CHOOSE:#x};",
            f"lop3.b32 high, high, hightop, m, {CHOOSE:#x};",
            f"prmt.b32 {even}, low, high, 0x7351;",
            f"prmt.b32 {odd}, low, high, 0x6240;",
        ]
    return "{\n" + "\n".join(lines) + "\n}"
