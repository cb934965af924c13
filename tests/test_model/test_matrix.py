"""One matrix in all its forms: plain, packed, in 4 bits; with an adapter, with dropout, without."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.linear import Adapter, can_pack
from kernels.nf4 import dequantize, quantize
from nanopersrm.model.linear import Linear

N, IN, OUT, R = 70, 64, 48, 4
FP32, BF16 = torch.float32, torch.bfloat16
PACKS = can_pack(torch.empty(0, dtype=BF16))


def spread(*shape: int, seed: int, dtype: torch.dtype = FP32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def matrix(bias: bool, nf4: bool, dtype: torch.dtype = FP32) -> Linear:
    linear = Linear(IN, OUT, bias).requires_grad_(False)
    linear.weight.copy_(spread(OUT, IN, seed=1) / 8)
    if linear.bias is not None:
        linear.bias.copy_(spread(OUT, seed=2))
    linear = linear.to(dtype).eval()
    if nf4:
        linear.nf4 = quantize(linear.weight)
        linear.weight = torch.nn.Parameter(linear.weight.to("meta"), requires_grad=False)
    return linear


def adapter(dtype: torch.dtype = FP32, learns: bool = True) -> Adapter:
    A, B = spread(R, IN, seed=3, dtype=dtype) / 8, spread(OUT, R, seed=4, dtype=dtype)
    return Adapter(A.requires_grad_(learns), B.requires_grad_(learns), 0.5)


def formula(x: Tensor, linear: Linear, on: Adapter | None, seen: Tensor | None = None) -> Tensor:
    """In fp64; `seen` is what the adapter sees of x."""
    W = linear.weight if linear.nf4 is None else dequantize(linear.nf4, FP32)
    y = x.double() @ W.double().t()
    if linear.bias is not None:
        y = y + linear.bias.double()
    if on is not None:
        a = (x if seen is None else seen).double() @ on.A.double().t()
        y = y + on.scale * (a @ on.B.double().t())
    return y


@pytest.mark.parametrize("gradients", [True, False])
@pytest.mark.parametrize("nf4", [False, True])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("with_adapter", [False, True])
def test_every_form_against_the_formula(bias, nf4, with_adapter, gradients):
    linear, x = matrix(bias, nf4), spread(N, IN, seed=5)
    linear.adapter = adapter() if with_adapter else None
    with torch.set_grad_enabled(gradients):
        y = linear(x)
    torch.testing.assert_close(y.double(), formula(x, linear, linear.adapter), atol=1e-5, rtol=1e-5)
    assert y.requires_grad == (with_adapter and gradients)


@pytest.mark.parametrize("nf4", [False, True])
@pytest.mark.parametrize("dropout", [0.0, 0.4])
def test_gradients(nf4, dropout):
    """Of x and the adapter against plain autograd in fp64, with the same numbers dropped."""
    linear, x = matrix(True, nf4).train(), spread(N, IN, seed=5).requires_grad_()
    linear.adapter, linear.dropout = adapter(), dropout
    c = spread(N, OUT, seed=6)
    torch.manual_seed(1)
    (linear(x) * c).sum().backward()
    wide = [t.detach().double().requires_grad_() for t in (x, *linear.adapter[:2])]
    torch.manual_seed(1)
    mask = F.dropout(torch.ones(N, IN), dropout)
    on = Adapter(wide[1], wide[2], linear.adapter.scale)
    (formula(wide[0], linear, on, wide[0] * mask) * c).sum().backward()
    for ours, truth in zip((x, *linear.adapter[:2]), wide, strict=True):
        assert ours.grad is not None
        torch.testing.assert_close(ours.grad.double(), truth.grad, atol=1e-4, rtol=1e-4)
    assert linear.weight.grad is None
    assert linear.bias is not None
    assert linear.bias.grad is None


@pytest.mark.parametrize("nf4", [False, True])
def test_dropout_only_in_training(nf4):
    linear, x = matrix(False, nf4), spread(N, IN, seed=5)
    linear.adapter, linear.dropout = adapter(), 0.5
    expected = formula(x, linear, linear.adapter)
    torch.testing.assert_close(linear(x).double(), expected, atol=1e-5, rtol=1e-5)
    linear.train()
    assert not torch.allclose(linear(x).double(), expected, atol=0.1)
    base = formula(x, linear, None)
    linear.dropout = 0.99999  # nearly nothing is seen: the base alone
    torch.testing.assert_close(linear(x).double(), base, atol=1e-5, rtol=1e-5)
    linear.adapter, linear.dropout = None, 0.5  # x itself is never dropped
    torch.testing.assert_close(linear(x).double(), base, atol=1e-5, rtol=1e-5)


def test_an_adapter_of_another_type_under_dropout():
    linear, x = matrix(False, False, BF16).train(), spread(N, IN, seed=5, dtype=BF16)
    linear.adapter, linear.dropout = adapter(FP32), 0.1
    y = linear(x)
    y.float().sum().backward()
    slope = linear.adapter.A.grad
    assert slope is not None
    assert (y.dtype, slope.dtype) == (BF16, FP32)


def test_dense():
    plain, four_bits = matrix(False, False), matrix(False, True)
    assert torch.equal(plain.dense(FP32), plain.weight)
    assert plain.dense(BF16).dtype == BF16
    assert four_bits.nf4 is not None
    assert torch.equal(four_bits.dense(FP32), dequantize(four_bits.nf4, FP32))
    plain.adapter = adapter()
    assert torch.equal(plain.dense(FP32), plain.weight)  # never merged


@pytest.mark.skipif(not PACKS, reason="this machine's oneDNN has no bf16")
@pytest.mark.parametrize("rows", [1, N])
def test_packed_with_an_adapter(rows):
    linear, x = matrix(True, False, BF16), spread(rows, IN, seed=5, dtype=BF16)
    linear.adapter = adapter(BF16, learns=False)
    with torch.no_grad():
        plain = linear(x)
    truth = formula(x, linear, linear.adapter)
    linear.pack()
    with torch.no_grad():
        packed = linear(x)
    error = [(y.double() - truth).abs().max() for y in (plain, packed)]
    assert error[1] <= 2 * error[0] + torch.finfo(BF16).eps * truth.abs().max()
    linear.adapter = None
    with torch.no_grad():
        base = linear(x)
    assert (base.double() - truth).abs().max() > 0.1


def test_names_and_widths():
    linear = matrix(True, False)
    assert (linear.width_in, linear.width_out) == (IN, OUT)
    assert set(linear.state_dict()) == {"weight", "bias"}
    assert set(matrix(False, False).state_dict()) == {"weight"}
