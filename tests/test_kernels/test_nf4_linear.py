"""The linear layer on NF4 and on plain weights with an adapter: against its formula, gradients
included; its buffer; the product of few rows, and the instructions that decode its weights.

No GPU is needed to know that the decoder is right: the text that goes to the assembler is executed
here, by an interpreter of the five instructions it is made of, for every byte. The kernel around it
runs under Triton's interpreter with its plain decoder.
"""

import random
import re

import pytest
import torch
from oracle import (
    BF16,
    FP16,
    FP32,
    INTERPRETED,
    KINDS,
    NO_GPU,
    gappy,
    no_worse_than_plain,
    spread,
    strided,
)
from torch import Tensor

from kernels import nf4_linear as file
from kernels.linear import Adapter
from kernels.nf4 import CODEBOOK, NF4, decode_asm, decode_tables, dequantize, quantize
from kernels.nf4_linear import _parts, lora_linear, nf4_linear, nf4_linear_reference, product

# rows, in, out, rank: few rows and many, whole blocks in a row or not, outputs of any number
SHAPES = [(1, 64, 1, 1), (3, 128, 70, 4), (33, 64, 40, 16), (65, 64, 6, 3), (2, 32, 4, 2)]


def parts(rows: int, columns: int, out: int, rank: int, dtype: torch.dtype = FP32) -> list[Tensor]:
    """x, bias, A, B."""
    shapes = [(rows, columns), (out,), (rank, columns), (out, rank)]
    return [spread(*shape, dtype=dtype, seed=i) for i, shape in enumerate(shapes)]


def base(out: int, columns: int, device: str = "cpu") -> NF4:
    return quantize(spread(out, columns, seed=9)).to(device)


def layer(weight: NF4 | Tensor, scale: float = 0.7):
    """The layer on `weight`; what it is not given, it leaves out."""

    def op(x: Tensor, bias: Tensor | None = None, A: Tensor | None = None, B=None) -> Tensor:
        adapter = None if A is None else Adapter(A, B, scale)
        if isinstance(weight, NF4):
            return nf4_linear(x, weight, bias, adapter)
        return lora_linear(x, weight, bias, adapter)

    return op


def plain(weight: NF4 | Tensor, scale: float = 0.7):
    """The formula in the type of its inputs, rounding after each step."""

    def formula(x: Tensor, bias: Tensor | None = None, A: Tensor | None = None, B=None) -> Tensor:
        W = dequantize(weight, x.dtype) if isinstance(weight, NF4) else weight.to(x.dtype)
        y = x @ W.t() if bias is None else x @ W.t() + bias
        return y if A is None else y + scale * ((x @ A.t()) @ B.t())

    return formula


@pytest.mark.parametrize("quantized", [True, False])
@pytest.mark.parametrize("layout", [Tensor.contiguous, strided, gappy])
@pytest.mark.parametrize(("device", "dtype"), KINDS)
@pytest.mark.parametrize("shape", SHAPES)
def test_no_worse_than_plain_pytorch(shape, device, dtype, layout, quantized):
    x, *others = parts(*shape, dtype=dtype)
    weight = base(shape[2], shape[1], device)
    if not quantized:
        weight = dequantize(weight, dtype)
    no_worse_than_plain(layer(weight), plain(weight), [layout(x), *others], device)


@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize(("device", "dtype"), KINDS)
def test_bias_and_adapter_are_optional(device, dtype, count):
    weight, inputs = base(12, 64, device), parts(5, 64, 12, 2, dtype)
    no_worse_than_plain(layer(weight), plain(weight), inputs[:count], device)
    if count == 1:
        no_worse_than_plain(
            lambda x, A, B: layer(weight, -2.0)(x, None, A, B),
            lambda x, A, B: plain(weight, -2.0)(x, None, A, B),
            [inputs[0], *inputs[2:]],
            device,
        )


@pytest.mark.skipif(INTERPRETED, reason="the backward is PyTorch's; the rest would only be slow")
@pytest.mark.parametrize("weight", [base(5, 64), spread(5, 64).double()], ids=["nf4", "plain"])
def test_backward_against_finite_differences(weight):
    inputs = [t.double().requires_grad_() for t in parts(3, 64, 5, 2)]
    assert torch.autograd.gradcheck(layer(weight), inputs)
    assert torch.autograd.gradcheck(layer(weight), inputs[:1])


@pytest.mark.parametrize("op", [nf4_linear, nf4_linear_reference])
def test_worked_example(op):
    """That of the docstring, in the first two of 64 columns; ±1 and 0 are codes of NF4."""
    x, W, A = torch.zeros(1, 64), torch.zeros(2, 64), torch.zeros(1, 64)
    x[0, :2] = torch.tensor([1.0, 2.0])
    W[0, 0], W[1, 1], A[0, :2] = 1.0, -1.0, 1.0
    x, A = x.requires_grad_(), A.requires_grad_()
    B = torch.tensor([[1.0], [0.0]], requires_grad=True)
    y = op(x, quantize(W), None, Adapter(A, B, 2.0))
    y.sum().backward()
    assert y.tolist() == [[7.0, -2.0]]
    assert x.grad[0, :3].tolist() == [3.0, 1.0, 0.0]
    assert A.grad[0, :3].tolist() == [2.0, 4.0, 0.0]
    assert B.grad.tolist() == [[6.0], [6.0]]


@pytest.mark.parametrize("learns", range(4))
def test_computes_only_the_gradients_asked_for(learns, monkeypatch):
    inputs = parts(3, 64, 5, 2)
    inputs[learns].requires_grad_()
    dequantized = []
    monkeypatch.setattr(file, "dequantize", lambda *a: dequantized.append(1) or dequantize(*a))
    y = layer(base(5, 64))(*inputs)
    before = len(dequantized)
    y.sum().backward()
    assert [t.grad is not None for t in inputs] == [i == learns for i in range(4)]
    assert len(dequantized) - before == (learns == 0)  # only dL/dx reads the weight again


def test_adapter_in_fp32_beside_a_half_model():
    """Gradients arrive in the adapter's own type."""
    x, bias, A, B = parts(4, 64, 8, 2)
    A.requires_grad_()
    B.requires_grad_()
    y = nf4_linear(x if INTERPRETED else x.to(FP16), base(8, 64), bias, Adapter(A, B, 0.5))
    y.float().sum().backward()
    assert y.dtype == (FP32 if INTERPRETED else FP16)
    assert A.grad.dtype == B.grad.dtype == FP32


def test_layers_share_a_buffer_and_backward_survives_it():
    """A second layer overwrites the first one's weight before backward needs it."""
    first, second = base(64, 128), base(10, 64)
    x, bias, A, B = (t.double() for t in parts(66, 128, 64, 2))

    def two(op):
        leaf = x.clone().requires_grad_()
        op(op(leaf, first, bias, Adapter(A, B, 0.3)), second).square().sum().backward()
        return leaf.grad

    file._BUFFERS.clear()
    torch.testing.assert_close(two(nf4_linear), two(nf4_linear_reference))
    assert [b.numel() for b in file._BUFFERS.values()] == [64 * 128]  # the larger of the two


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


def uneven(out: int, columns: int) -> NF4:
    return quantize(spread(out, columns, seed=9) * torch.linspace(0.1, 3, columns))


interpreted = pytest.mark.skipif(not INTERPRETED, reason="needs TRITON_INTERPRET=1")


def check_product(x, weight, bias=None, a=None, B=None, scale=1.0):
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
def test_product_against_fp64(rows, columns, out):
    check_product(spread(rows, columns), uneven(out, columns))


@interpreted
@pytest.mark.parametrize("programs", [1, 384])  # parts are added in the product or in the sum
@pytest.mark.parametrize("rank", [1, 16, 20, 130])
def test_product_with_bias_and_adapter(programs, rank, monkeypatch):
    monkeypatch.setattr(file, "PROGRAMS", programs)
    weight, x = uneven(70, 384), spread(5, 384)
    bias, a, B = spread(70, seed=1), spread(5, rank, seed=2), spread(70, rank, seed=3)
    assert (_parts(70, 6) > 1) == (programs > 1)
    check_product(x, weight, bias)
    check_product(x, weight, None, a, B, -0.5)
    check_product(x, weight, bias, a, B, 2.0)


@interpreted
def test_a_row_does_not_depend_on_the_others():
    """Whatever they hold, and how many they are; here up to the rows of a program, because numpy's
    product sums in another order where shapes differ."""
    x, weight = spread(16, 384), uneven(70, 384)
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
    weight, x = uneven(out, columns).to("cuda"), spread(64, columns, dtype=dtype).cuda()
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
