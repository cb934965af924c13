"""RMSNorm with and without the residual sum: against its formula, gradients included."""

import pytest
import torch
from oracle import BF16, FP16, INTERPRETED, KINDS, gappy, no_worse_than_plain, spread, strided
from torch import Tensor

from kernels.rms_norm import _AddRMSNorm, _RMSNorm, add_rms_norm, rms_norm, rms_norm_reference

EPS = 1e-5
SHAPES = [(1, 1), (1, 576), (3, 7), (2, 5, 33), (17, 64)]


def plain(x: Tensor, weight: Tensor) -> Tensor:
    """The formula in the type of its inputs, rounding after each step."""
    return x * torch.rsqrt((x * x).mean(-1, keepdim=True) + EPS) * weight


def plain_add(x: Tensor, residual: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    h = x + residual
    return plain(h, weight), h


@pytest.mark.parametrize("layout", [Tensor.contiguous, strided, gappy])
@pytest.mark.parametrize(("device", "dtype"), KINDS)
@pytest.mark.parametrize("shape", SHAPES)
def test_no_worse_than_plain_pytorch(shape, device, dtype, layout):
    x = layout(spread(*shape, dtype=dtype, size=3))
    residual = layout(spread(*shape, dtype=dtype, seed=1))
    weight = spread(shape[-1], dtype=dtype, seed=2)
    no_worse_than_plain(lambda x, w: rms_norm(x, w, EPS), plain, [x, weight], device)
    no_worse_than_plain(
        lambda x, r, w: add_rms_norm(x, r, w, EPS), plain_add, [x, residual, weight], device
    )


@pytest.mark.parametrize("dtype", [BF16, FP16])
@pytest.mark.skipif(INTERPRETED, reason="the interpreter truncates 16-bit stores")
def test_rounds_only_once(dtype):
    """Half a unit in the last place of the result, because all steps before are fp32."""
    x, weight = spread(50, 576, dtype=dtype), spread(576, dtype=dtype, seed=1)
    truth = plain(x.double(), weight.double())
    ulp = torch.finfo(dtype).eps * truth.abs()
    assert ((rms_norm(x, weight, EPS).double() - truth).abs() <= 0.51 * ulp + 1e-7).all()


@pytest.mark.parametrize("op", [rms_norm, rms_norm_reference])
def test_worked_example(op):
    y = op(torch.tensor([[3.0, 4.0]]), torch.ones(2), 0.0)
    assert y[0].tolist() == pytest.approx([0.8485, 1.1314], abs=5e-5)
    y = op(torch.tensor([[3.0, 4.0]]), torch.tensor([2.0, -1.0]), 12.5)
    assert y[0].tolist() == pytest.approx([6 / 5, -4 / 5])


def test_gradients_of_the_sum_do_not_share_memory():
    """Both are dL/dh; a second backward adds to each where it is, once."""
    x, residual = spread(3, 5).requires_grad_(), spread(3, 5, seed=1).requires_grad_()
    weight = spread(5, seed=2)
    sums = []
    for _ in range(2):
        y, h = add_rms_norm(x, residual, weight, EPS)
        (y + h).square().sum().backward()
        sums.append((x.grad.clone(), residual.grad.clone()))
    for once, twice in zip(*sums, strict=True):
        assert torch.allclose(twice, 2 * once)


@pytest.mark.skipif(not INTERPRETED, reason="the hand-derived backward belongs to the kernels")
@pytest.mark.parametrize("frozen", [False, True])
def test_backward_against_finite_differences(frozen):
    x = spread(3, 5).double().requires_grad_()
    residual = spread(3, 5, seed=1).double().requires_grad_()
    weight = spread(5, seed=2).double().requires_grad_(not frozen)
    assert torch.autograd.gradcheck(lambda x, w: _RMSNorm.apply(x, w, EPS), (x, weight))
    assert torch.autograd.gradcheck(
        lambda x, r, w: _AddRMSNorm.apply(x, r, w, EPS), (x, residual, weight)
    )


def test_every_row_counts_when_programs_share_them(monkeypatch):
    """More rows than programs: the weight's gradient is a sum over all."""
    monkeypatch.setattr("kernels.rms_norm.PARTIALS", 4)
    x, weight = spread(11, 6), spread(6, seed=1)
    no_worse_than_plain(lambda x, w: rms_norm(x, w, EPS), plain, [x, weight], "cpu")
