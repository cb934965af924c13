"""RMSNorm against its formula in fp64, and its gradient against finite differences."""

import pytest
import torch
from torch import Tensor

from kernels.rms_norm import rms_norm, rms_norm_reference

EPS = 1e-5
SHAPES = [(1, 1), (1, 576), (3, 7), (2, 5, 33), (17, 64)]
TYPES = [torch.float32, torch.bfloat16, torch.float16]


def naive(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """The formula in the type of its inputs, rounding after each step."""
    return x * torch.rsqrt((x * x).mean(-1, keepdim=True) + eps) * weight


def worst(x: Tensor, truth: Tensor) -> float:
    assert x.shape == truth.shape
    return (x.double() - truth).abs().max().item()


@pytest.mark.parametrize("strided", [False, True])
@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_no_worse_than_twice_plain_pytorch(shape, dtype, strided):
    torch.manual_seed(0)
    x = (torch.randn(*shape[:-1], shape[-1] * 2) * 3).to(dtype)[..., ::2]
    if not strided:
        x = x.contiguous()
    assert x.is_contiguous() != strided or shape == (1, 1)
    weight = torch.randn(shape[-1]).to(dtype)
    truth = naive(x.double(), weight.double(), EPS)
    allowed = 2 * worst(naive(x, weight, EPS), truth) + torch.finfo(dtype).eps * 0.5
    for op in (rms_norm, rms_norm_reference):
        y = op(x, weight, EPS)
        assert y.dtype == dtype
        assert worst(y, truth) <= allowed


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_rounds_only_once(dtype):
    """Half a unit in the last place of the result, because all steps before are fp32."""
    torch.manual_seed(1)
    x, weight = torch.randn(50, 576).to(dtype), torch.randn(576).to(dtype)
    truth = naive(x.double(), weight.double(), EPS)
    ulp = torch.finfo(dtype).eps * truth.abs()
    y = rms_norm(x, weight, EPS).double()
    assert ((y - truth).abs() <= 0.51 * ulp + 1e-7).all()


@pytest.mark.parametrize("op", [rms_norm, rms_norm_reference])
def test_worked_example(op):
    y = op(torch.tensor([[3.0, 4.0]]), torch.ones(2), 0.0)
    assert y[0].tolist() == pytest.approx([0.8485, 1.1314], abs=5e-5)
    y = op(torch.tensor([[3.0, 4.0]]), torch.tensor([2.0, -1.0]), 12.5)
    assert y[0].tolist() == pytest.approx([6 / 5, -4 / 5])


def test_large_half_precision_does_not_overflow():
    """The square of 300 is no fp16 number; the norm of such a row is."""
    y = rms_norm(torch.full((1, 8), 300.0).half(), torch.ones(8).half(), EPS)
    assert y.tolist() == [[1.0] * 8]


def test_a_row_of_zeros_stays_zero():
    assert rms_norm(torch.zeros(2, 5), torch.ones(5), EPS).abs().max() == 0


def test_rows_do_not_see_each_other():
    torch.manual_seed(2)
    x, weight = torch.randn(6, 33), torch.randn(33)
    whole = rms_norm(x, weight, EPS)
    for i in range(6):
        assert torch.equal(rms_norm(x[i : i + 1], weight, EPS)[0], whole[i])


def test_gradient():
    torch.manual_seed(3)
    x = torch.randn(3, 7, dtype=torch.double, requires_grad=True)
    weight = torch.randn(7, dtype=torch.double, requires_grad=True)
    assert torch.autograd.gradcheck(lambda a, w: rms_norm(a, w, EPS), (x, weight))
    row = torch.randn(1, 5, dtype=torch.double, requires_grad=True)
    assert torch.autograd.gradcheck(lambda a: rms_norm(a, torch.ones(5).double(), EPS), (row,))
