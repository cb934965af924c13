"""SwiGLU: against its formula, gradients included."""

import math

import pytest
import torch
from oracle import INTERPRETED, KINDS, gappy, no_worse_than_plain, spread, strided
from torch import Tensor

from kernels.swiglu import BLOCK, _SwiGLU, swiglu, swiglu_reference

SHAPES = [(1, 1), (1, 1536), (3, 7), (2, 5, 33), (17, 64), (2, BLOCK + 1), (8,)]


def plain(gate: Tensor, up: Tensor) -> Tensor:
    """The formula in the type of its inputs, rounding after each step."""
    return gate / (1 + torch.exp(-gate)) * up


@pytest.mark.parametrize("layout", [Tensor.contiguous, strided, gappy])
@pytest.mark.parametrize(("device", "dtype"), KINDS)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("op", [swiglu, swiglu_reference])
def test_no_worse_than_plain_pytorch(op, shape, device, dtype, layout):
    gate = layout(spread(*shape, dtype=dtype, size=3))
    up = spread(*shape, dtype=dtype, seed=1)
    no_worse_than_plain(op, plain, [gate, layout(up)], device)
    no_worse_than_plain(op, plain, [gate, up], device)  # rows of different strides


@pytest.mark.parametrize("op", [swiglu, swiglu_reference])
def test_worked_example(op):
    gate = torch.tensor([math.log(3), 0.0, 40.0, -40.0], requires_grad=True)
    up = torch.tensor([2.0, 5.0, 3.0, 3.0], requires_grad=True)
    y = op(gate, up)
    assert y.tolist() == pytest.approx([1.6479, 0, 120, 0], abs=5e-5)
    d_gate, d_up = torch.autograd.grad(y.sum(), (gate, up))
    assert d_gate.tolist() == pytest.approx([1.9120, 2.5, 3, 0], abs=5e-5)
    assert d_up.tolist() == pytest.approx([0.8240, 0, 40, 0], abs=5e-5)


@pytest.mark.parametrize("size", [90.0, 1e4, 3e38])
def test_large_gates_stay_finite(size):
    """exp(-gate) overflows below -88: σ is 0 there, not NaN, in both directions."""
    gate = torch.tensor([size, -size], requires_grad=True)
    up = torch.tensor([0.5, 0.5], requires_grad=True)
    y = swiglu(gate, up)
    d_gate, d_up = torch.autograd.grad(y.sum(), (gate, up))
    assert y.tolist() == pytest.approx([size / 2, 0])
    assert d_gate.tolist() == pytest.approx([0.5, 0])
    assert d_up.tolist() == pytest.approx([size, 0])


def test_inputs_and_gradients_are_left_alone():
    """gate is used a second time and backward runs twice: values must still be values."""
    gate, up = spread(3, 40).requires_grad_(), spread(3, 40, seed=1).requires_grad_()
    dy = spread(3, 40, seed=2)
    before = [x.detach().clone() for x in (gate, up, dy)]
    y = swiglu(gate, up)
    first = torch.autograd.grad(y, (gate, up), dy, retain_graph=True)
    again = torch.autograd.grad(y, (gate, up), dy)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert all(torch.equal(a, b) for a, b in zip((gate, up, dy), before, strict=True))
    no_worse_than_plain(
        lambda g, u: swiglu(g, u) * g, lambda g, u: plain(g, u) * g, before[:2], "cpu"
    )


@pytest.mark.skipif(not INTERPRETED, reason="the hand-derived backward belongs to the kernels")
def test_backward_against_finite_differences():
    gate = spread(3, 5, size=3).double().requires_grad_()
    up = spread(3, 5, seed=1).double().requires_grad_()
    assert torch.autograd.gradcheck(_SwiGLU.apply, (gate, up))


@pytest.mark.skipif(not INTERPRETED, reason="the offsets belong to the kernels")
def test_rows_beyond_two_to_the_31_numbers(tmp_path):
    """A file of zeros that takes no room: its rows 0 and 2 lie 2^31 numbers apart."""
    room = torch.from_file(str(tmp_path / "sparse"), True, 2**31 + 8)
    both = room.as_strided((3, 8), (2**30, 1))
    both[2] = torch.arange(8.0)
    expected = swiglu_reference(both, both)
    assert expected[2].any()
    assert torch.allclose(swiglu(both, both), expected)
    x = both.requires_grad_()
    (dx,) = torch.autograd.grad(swiglu(x, x).sum(), x)
    (d_expected,) = torch.autograd.grad(swiglu_reference(x, x).sum(), x)
    assert torch.allclose(dx, d_expected)
