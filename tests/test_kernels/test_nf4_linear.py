"""The linear layer on NF4 weights: against its formula, gradients included, and its buffer.

Then the same layer on a plain weight with an adapter.
"""

import pytest
import torch
from oracle import BF16, FP16, FP32, INTERPRETED, KINDS, gappy, no_worse_than_plain, spread, strided
from torch import Tensor

from kernels import nf4_linear as file
from kernels.linear import Adapter
from kernels.nf4 import NF4, dequantize, quantize
from kernels.nf4_linear import _FrozenLinear, lora_linear, nf4_linear, nf4_linear_reference

# rows, in, out, rank: few rows and many, whole blocks in a row or not, outputs of any number
SHAPES = [(1, 64, 1, 1), (3, 128, 70, 4), (33, 64, 40, 16), (65, 64, 6, 3), (2, 32, 4, 2)]


def parts(rows: int, columns: int, out: int, rank: int, dtype: torch.dtype = FP32) -> list[Tensor]:
    """x, bias, A, B."""
    shapes = [(rows, columns), (out,), (rank, columns), (out, rank)]
    return [spread(*shape, dtype=dtype, seed=i) for i, shape in enumerate(shapes)]


def base(out: int, columns: int, device: str = "cpu") -> NF4:
    return quantize(spread(out, columns, seed=9)).to(device)


def ours(weight: NF4, scale: float = 0.7):
    return lambda x, bias, A, B: nf4_linear(x, weight, bias, Adapter(A, B, scale))


def plain(weight: NF4, scale: float = 0.7):
    """The formula in the type of its inputs, rounding after each step."""

    def formula(x: Tensor, bias: Tensor, A: Tensor, B: Tensor) -> Tensor:
        return x @ dequantize(weight, x.dtype).t() + bias + scale * ((x @ A.t()) @ B.t())

    return formula


@pytest.mark.parametrize("layout", [Tensor.contiguous, strided, gappy])
@pytest.mark.parametrize(("device", "dtype"), KINDS)
@pytest.mark.parametrize("shape", SHAPES)
def test_no_worse_than_plain_pytorch(shape, device, dtype, layout):
    x, *others = parts(*shape, dtype=dtype)
    weight = base(shape[2], shape[1], device)
    no_worse_than_plain(ours(weight), plain(weight), [layout(x), *others], device)


@pytest.mark.parametrize(("device", "dtype"), KINDS)
def test_bias_and_adapter_are_optional(device, dtype):
    x, bias, A, B = parts(5, 64, 12, 2, dtype)
    weight = base(12, 64, device)
    no_worse_than_plain(
        lambda x: nf4_linear(x, weight), lambda x: x @ dequantize(weight, x.dtype).t(), [x], device
    )
    no_worse_than_plain(
        lambda x, b: nf4_linear(x, weight, b),
        lambda x, b: x @ dequantize(weight, x.dtype).t() + b,
        [x, bias],
        device,
    )
    no_worse_than_plain(
        lambda x, A, B: nf4_linear(x, weight, None, Adapter(A, B, -2.0)),
        lambda x, A, B: x @ dequantize(weight, x.dtype).t() - 2.0 * ((x @ A.t()) @ B.t()),
        [x, A, B],
        device,
    )


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


@pytest.mark.skipif(INTERPRETED, reason="the backward is PyTorch's; the rest would only be slow")
def test_backward_against_finite_differences():
    x, bias, A, B = (t.double().requires_grad_() for t in parts(3, 64, 5, 2))
    weight = base(5, 64)
    assert torch.autograd.gradcheck(
        lambda *inputs: _FrozenLinear.apply(inputs[0], weight, *inputs[1:], 0.7), (x, bias, A, B)
    )
    assert torch.autograd.gradcheck(
        lambda x: _FrozenLinear.apply(x, weight, None, None, None, 0.0), (x,)
    )


@pytest.mark.parametrize("learns", range(4))
def test_computes_only_the_gradients_asked_for(learns, monkeypatch):
    inputs = parts(3, 64, 5, 2)
    inputs[learns].requires_grad_()
    dequantized = []
    monkeypatch.setattr(file, "dequantize", lambda *a: dequantized.append(1) or dequantize(*a))
    y = ours(base(5, 64))(*inputs)
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


def test_buffer_made_under_inference_serves_training():
    file._BUFFERS.clear()
    weight, x = base(8, 64), spread(70, 64)
    with torch.inference_mode():
        y = nf4_linear(x, weight)
    z = nf4_linear(x.requires_grad_(), weight)
    z.sum().backward()
    assert torch.equal(y, z.detach())


def test_no_function_where_nothing_learns():
    x, bias, A, B = parts(2, 64, 4, 2)
    assert ours(base(4, 64))(x, bias, A, B).grad_fn is None
    with torch.no_grad():
        assert ours(base(4, 64))(x.requires_grad_(), bias, A, B).grad_fn is None


def test_no_rows():
    x, bias, A, B = (t.requires_grad_() for t in parts(0, 64, 4, 2))
    y = ours(base(4, 64))(x, bias, A, B)
    assert y.shape == (0, 4)
    y.sum().backward()
    assert x.grad.shape == (0, 64)
    assert A.grad.abs().sum() == B.grad.abs().sum() == bias.grad.abs().sum() == 0


@pytest.mark.skipif(INTERPRETED, reason="the interpreter truncates 16-bit stores")
@pytest.mark.parametrize("dtype", [BF16, FP16])
def test_reference_computes_in_fp32(dtype):
    x, bias, A, B = parts(4, 128, 8, 2, dtype)
    weight, adapter = base(8, 128), Adapter(A, B, 0.5)
    truth = nf4_linear_reference(
        x.double(), weight, bias.double(), Adapter(A.double(), B.double(), 0.5)
    )
    y = nf4_linear_reference(x, weight, bias, adapter)
    assert y.dtype == dtype
    assert ((y.double() - truth).abs() <= 0.51 * torch.finfo(dtype).eps * truth.abs() + 1e-5).all()


def test_says_what_does_not_fit():
    x, bias, A, B = parts(2, 64, 4, 2)
    with pytest.raises(AssertionError, match="expected x"):
        nf4_linear(x, base(4, 128))
    with pytest.raises(AssertionError, match="expected B"):
        nf4_linear(x, base(4, 64), bias, Adapter(A, B.t(), 1.0))


@pytest.mark.parametrize("layout", [Tensor.contiguous, strided, gappy])
@pytest.mark.parametrize(("device", "dtype"), KINDS)
@pytest.mark.parametrize("shape", SHAPES)
def test_plain_weight_no_worse_than_plain_pytorch(shape, device, dtype, layout):
    """The weight is among the inputs, so that this also sees that it gets no gradient."""
    x, bias, A, B = parts(*shape, dtype=dtype)
    W = spread(shape[2], shape[1], dtype=dtype, seed=9)
    no_worse_than_plain(
        lambda x, W, bias, A, B: lora_linear(x, W, bias, Adapter(A, B, 0.7)),
        lambda x, W, bias, A, B: x @ W.detach().t() + bias + 0.7 * ((x @ A.t()) @ B.t()),
        [layout(x), W, bias, A, B],
        device,
    )


@pytest.mark.parametrize(("device", "dtype"), KINDS)
def test_plain_weight_without_bias(device, dtype):
    x, _, A, B = parts(33, 48, 40, 4, dtype)  # 48 columns: no whole block of NF4
    W = spread(40, 48, dtype=dtype, seed=9)
    no_worse_than_plain(
        lambda x, W, A, B: lora_linear(x, W, None, Adapter(A, B, -2.0)),
        lambda x, W, A, B: x @ W.detach().t() - 2.0 * ((x @ A.t()) @ B.t()),
        [x, W, A, B],
        device,
    )


def test_plain_weight_against_finite_differences():
    x, bias, A, B = (t.double().requires_grad_() for t in parts(3, 6, 5, 2))
    W = spread(5, 6, seed=9).double()
    assert torch.autograd.gradcheck(
        lambda x, bias, A, B: lora_linear(x, W, bias, Adapter(A, B, 0.7)), (x, bias, A, B)
    )


def test_plain_weight_beside_an_adapter_in_fp32():
    x, _, A, B = parts(4, 64, 8, 2)
    adapter = Adapter(A.requires_grad_(), B.requires_grad_(), 0.5)
    y = lora_linear(x.bfloat16(), spread(8, 64, dtype=BF16), None, adapter)
    y.float().sum().backward()
    assert (y.dtype, A.grad.dtype, B.grad.dtype) == (BF16, FP32, FP32)


def test_plain_weight_of_another_type():
    x, _, A, B = parts(4, 64, 8, 2)
    with pytest.raises(AssertionError, match=r"expected a weight of torch\.float32"):
        lora_linear(x, spread(8, 64, dtype=BF16), None, Adapter(A, B, 0.5))
