"""Four bits to sixteen: eight NF4 codes of a 32-bit word become eight fp16 or bf16 numbers.

The straightforward ways cost more than the multiplication they serve: a look-up in memory takes an
address and a load for each weight, a tree of comparisons 15 selections. This one takes 21
instructions for eight weights. It rests on `prmt` (permute bytes), which makes a word of four
bytes, each picked by four bits of a selector: three say which of the eight bytes of two registers,
the fourth asks for copies of its sign bit instead. So two registers are a table of eight bytes, and
one `prmt` looks up four codes at once. A 16-bit number from 16 codes takes four such tables: low
and high bytes, codes 0 to 7 and 8 to 15.

    word       odd, even, odd, even ... columns from the low end: bytes hold the even one on top
    s          the word without the top bit of each code: four selectors in each half
    m          bytes of ones where that bit is set: `prmt` copies the bytes' signs; the odd codes'
               bits become signs in the word shifted left by four
    low        m chooses between two look-ups of low bytes (one `lop3`)
    high       the same with high bytes
    even, odd  bytes of low and high interleaved, again by `prmt`

The instructions are elementwise in the bytes of the word: byte i gives element i of `even` and of
`odd`. So it does not matter which bytes a thread holds, and Triton may lay them out as it likes.

The first half of each table comes as an operand ($5, $9, $13, $17) and not as a number in the text,
because `prmt` takes one constant at most; the assembler would copy the other into a register before
each look-up, about one instruction a weight. See `_zero` in `nf4_product.py` for what it takes to
stop it from doing the same with the operands.

Numerics: the codes are CODEBOOK rounded to 16 bits, off by 3.3e-4 of their value at most in fp16
(its unit roundoff is 4.9e-4) and by 3.1e-3 in bf16 (3.9e-3). That is what rounding dequantized
weights does, only that here the scale stays out of it. bf16 activations could be scaled row by row
into fp16 without loss, for the better codes; we left that out: who wants precision uses fp16.
"""

from functools import cache

import torch
from torch import Tensor

from kernels.nf4 import CODEBOOK

# Four outputs of two numbers each; the word; four tables that Triton passes four times.
CONSTRAINTS = ",".join(["=r"] * 4 + ["r"] * 17)
CHOOSE = 0xD8  # lop3's truth table of "where the third has ones the second, else the first"


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
