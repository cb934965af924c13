"""The small-batch product on packed weights, and the instructions that decode them.

No GPU is needed to know that the decoder is right: the text that goes to the assembler is executed
here, by an interpreter of the five instructions it is made of, for every byte. The kernel around it
runs under Triton's interpreter with its plain decoder.
"""

import random
import re

import pytest
import torch
from oracle import BF16, FP16, FP32, INTERPRETED, NO_GPU, spread, strided

from kernels import nf4_product
from kernels.nf4 import CODEBOOK, CONSTRAINTS, NF4, decode_asm, decode_tables, dequantize, quantize
from kernels.nf4_linear import _as_pairs, _parts, fits, product

ones = 0xFFFFFFFF


def prmt(a: int, b: int, selectors: int) -> int:
    """Four bytes of the eight in b:a, as PTX defines it: the fourth bit of a selector replaces the
    byte by copies of its sign."""
    table = (a | b << 32).to_bytes(8, "little")
    made = 0
    for i in range(4):
        selector = selectors >> 4 * i & 15
        byte = table[selector & 7]
        made |= ((255 if byte & 128 else 0) if selector & 8 else byte) << 8 * i
    return made


def lop3(a: int, b: int, c: int, truth: int) -> int:
    """Bit by bit, the bit of `truth` that a, b and c number, a the highest."""
    made = 0
    for i in range(32):
        made |= (truth >> ((a >> i & 1) << 2 | (b >> i & 1) << 1 | (c >> i & 1)) & 1) << i
    return made


PTX = {
    "prmt.b32": prmt,
    "lop3.b32": lop3,
    "and.b32": lambda a, b: a & b,
    "shl.b32": lambda a, b: a << b & ones,
    "shr.u32": lambda a, b: a >> b,
}


def execute(text: str, operands: dict[str, int]) -> dict[str, int]:
    """The registers after running `text`; refuses what it does not know, or what is read unset."""
    values = dict(operands)
    for line in text.strip("{}\n").splitlines():
        if line.startswith(".reg"):
            continue
        name, rest = re.fullmatch(r"(\S+) (.*);", line).groups()
        target, *sources = rest.split(", ")
        values[target] = PTX[name](*(int(s, 0) if s[0].isdigit() else values[s] for s in sources))
    return values


def decode(word: int, dtype: torch.dtype) -> tuple[list[float], list[float]]:
    """Even and odd columns of a word by the assembler text."""
    tables = [int(t) & ones for t in decode_tables(dtype, torch.device("cpu"))]
    operands = dict(zip(("$5", "$9", "$13", "$17"), tables, strict=True))
    values = execute(decode_asm(dtype), {"$4": word, **operands})
    halves = [values[f"${i}"] >> shift & 0xFFFF for i in range(4) for shift in (0, 16)]
    numbers = torch.tensor([h - (h >> 15 << 16) for h in halves], dtype=torch.int16).view(dtype)
    return numbers[:4].tolist(), numbers[4:].tolist()


@pytest.mark.parametrize("dtype", [FP16, BF16])
def test_decoder_gives_the_rounded_codebook(dtype):
    """Every byte in every place of a word, and random words, bit for bit."""
    codes = torch.tensor(CODEBOOK).to(dtype).tolist()
    randomly = random.Random(3)
    words = [byte << 8 * place for byte in range(256) for place in range(4)]
    words += [byte * 0x01010101 for byte in range(256)]
    words += [randomly.getrandbits(32) for _ in range(500)]
    for word in words:
        packed = word.to_bytes(4, "little")
        even, odd = decode(word, dtype)
        assert even == [codes[b >> 4] for b in packed], f"{word:#x}"
        assert odd == [codes[b & 15] for b in packed], f"{word:#x}"


def test_decoder_takes_21_instructions_for_8_weights():
    assert decode_asm(FP16).count(";") - 1 == 21  # all but the declaration
    operands = {int(n) for n in re.findall(r"\$(\d+)", decode_asm(FP16))}
    assert operands == {0, 1, 2, 3, 4, 5, 9, 13, 17}
    assert CONSTRAINTS.split(",") == ["=r"] * 4 + ["r"] * 17


@pytest.mark.parametrize(("dtype", "worst"), [(FP16, 3.3e-4), (BF16, 3.2e-3)])
def test_error_of_16_bit_codes(dtype, worst):
    codes = torch.tensor(CODEBOOK, dtype=torch.float64)
    off = (torch.tensor(CODEBOOK).to(dtype).double() - codes).abs()
    assert (off <= worst * codes.abs()).all()
    assert (off > 0.9 * worst * codes.abs()).any()  # the docstring does not exaggerate


def base(out: int, columns: int) -> NF4:
    return quantize(spread(out, columns, seed=9) * torch.linspace(0.1, 3, columns))


interpreted = pytest.mark.skipif(not INTERPRETED, reason="needs TRITON_INTERPRET=1")


def check(x, weight, bias=None, a=None, B=None, scale=1.0):
    y = product(x, weight, bias, a, B, scale)
    dense = dequantize(weight, torch.float64)
    truth, size = x.double() @ dense.t(), x.double().abs() @ dense.abs().t()
    if bias is not None:
        truth = truth + bias.double()
    if a is not None:
        truth = truth + scale * (a.double() @ B.double().t())
        size = size + abs(scale) * (a.double().abs() @ B.double().abs().t())
    assert y.dtype == x.dtype
    assert y.shape == truth.shape
    assert ((y.double() - truth).abs() <= 1e-6 * (size + 1)).all()
    return y


@interpreted
@pytest.mark.parametrize("rows", [1, 3, 16, 17, 33])
@pytest.mark.parametrize(("columns", "out"), [(64, 64), (128, 70), (192, 1), (576, 131)])
def test_against_fp64(rows, columns, out):
    check(spread(rows, columns), base(out, columns))


@interpreted
@pytest.mark.parametrize("programs", [1, 384])  # parts are added in the product or in the sum
@pytest.mark.parametrize("rank", [1, 16, 20, 130])
def test_bias_and_adapter(programs, rank, monkeypatch):
    monkeypatch.setattr(nf4_product, "PROGRAMS", programs)
    weight, x = base(70, 384), spread(5, 384)
    bias, a, B = spread(70, seed=1), spread(5, rank, seed=2), spread(70, rank, seed=3)
    assert (_parts(70, 6) > 1) == (programs > 1)
    check(x, weight, bias)
    check(x, weight, None, a, B, -0.5)
    check(x, weight, bias, a, B, 2.0)


@interpreted
def test_rows_may_start_anywhere():
    """Rows apart from each other, at an odd distance, and from the middle of another tensor."""
    weight = base(8, 64)
    check(strided(spread(3, 64)), weight)
    check(spread(4, 130, seed=1)[1:, 1:65], weight)
    check(spread(200, seed=2)[1:65][None], weight)
    check(spread(64, 3, seed=4).t(), weight)


@interpreted
def test_reads_nothing_past_the_end():
    """Neither rows of x nor outputs that do not exist reach a result."""
    x, weight = spread(9, 64), base(65, 64)
    room = torch.full((64, 64), float("nan"))
    room[:9] = x
    assert torch.equal(check(room[:9], weight), check(x, weight))


@interpreted
def test_an_infinite_output_stays_alone():
    """Ranks are padded to a power of two; what is read there must be 0, not the next output's."""
    a, B = spread(3, 20), spread(70, 20, seed=1)
    B[8] = float("inf")
    y = product(spread(3, 64), base(70, 64), None, a, B)
    assert y.isfinite().sum().item() == 3 * 69


@interpreted
def test_a_row_does_not_depend_on_the_others():
    """Whatever they hold, and how many they are; here up to the rows of a program, because numpy's
    product sums in another order where shapes differ."""
    x, weight = spread(16, 384), base(70, 384)
    together = product(x, weight)
    for rows in (9, 13):
        some = x[:rows].clone()
        some[1:] = spread(rows - 1, 384, seed=5)
        assert torch.equal(product(some, weight)[0], together[0])


@pytest.mark.gpu
@NO_GPU
@pytest.mark.parametrize("dtype", [FP16, BF16])
@pytest.mark.parametrize(("columns", "out"), [(64, 64), (576, 131), (3584, 512)])
def test_on_a_gpu(columns, out, dtype):
    """The real decoder; and a row's result is the same bits alone and among 64."""
    weight, x = base(out, columns).to("cuda"), spread(64, columns, dtype=dtype).cuda()
    bias, a, B = (spread(*s, dtype=dtype).cuda() for s in [(out,), (64, 16), (out, 16)])
    y = product(x, weight, bias, a, B, 0.5).double()
    dense = dequantize(weight, FP32).double()
    truth = x.double() @ dense.t() + bias.double() + 0.5 * (a.double() @ B.double().t())
    rounding = torch.finfo(dtype).eps
    size = (x.double().abs() @ dense.abs().t()) / columns**0.5 + truth.abs() + 1
    assert ((y - truth).abs() <= rounding * size).all()
    for rows in (1, 8, 9, 17, 33):
        few = product(x[:rows], weight, bias, a[:rows], B, 0.5)
        assert torch.equal(few.double(), y[:rows])


@interpreted
def test_no_rows():
    assert product(torch.empty(0, 64), base(4, 64)).shape == (0, 4)


def test_where_there_is_a_kernel():
    weight = base(4, 64)
    assert fits(torch.empty(64, 64, dtype=BF16), weight)
    assert fits(torch.empty(1, 64, dtype=FP16), weight)
    assert not fits(torch.empty(65, 64, dtype=BF16), weight)
    assert not fits(torch.empty(2, 32, dtype=BF16), base(4, 32))
    assert fits(torch.empty(2, 64, dtype=FP32), weight) == INTERPRETED


@pytest.mark.parametrize("dtype", [FP16, FP32])
def test_pairs_are_two_columns(dtype):
    x = spread(3, 64, dtype=dtype)
    pairs = _as_pairs(x)
    assert pairs.shape == (3, 32)
    assert pairs.data_ptr() == x.data_ptr()
    assert torch.equal(pairs.view(dtype), x)
    assert torch.equal(_as_pairs(strided(x)).contiguous().view(dtype), x)


@pytest.mark.skipif(nf4_product.triton is None, reason="Triton is not installed")
@pytest.mark.parametrize(
    ("out", "columns", "parts"),
    [
        (3584, 3584, 7),
        (512, 3584, 14),
        (18944, 3584, 2),
        (3584, 18944, 8),
        (576, 576, 3),
        (64, 64, 1),
    ],
)
def test_parts_are_equal(out, columns, parts):
    assert _parts(out, columns // 64) == parts
