"""Rotary embedding against rotation by complex numbers in fp64, and what a rotation must keep."""

import math

import pytest
import torch
from torch import Tensor

from kernels.rope import rope, rope_reference, rotation

TYPES = [torch.float32, torch.bfloat16, torch.float16]


def frequencies(E: int) -> Tensor:
    return 1e4 ** -(torch.arange(0, E, 2).float() / E)


def turned(x: Tensor, positions: Tensor, E: int, scale: float = 1.0) -> Tensor:
    """The truth: pair (i, i + E/2) is one complex number, times e^(i·p·f), in fp64."""
    first, second = x.double().chunk(2, -1)
    angles = positions.double()[:, None, None] * frequencies(E).double()
    y = torch.complex(first, second) * torch.polar(torch.full_like(angles, scale), angles)
    return torch.cat([y.real, y.imag], -1)


def naive(x: Tensor, positions: Tensor, E: int) -> Tensor:
    """The two lines of the formula in x's type, rounding after each step, from fp32 angles."""
    a, b = x.chunk(2, -1)
    angles = positions.float()[:, None, None] * frequencies(E)
    c, s = angles.cos().to(x.dtype), angles.sin().to(x.dtype)
    return torch.cat([a * c - b * s, b * c + a * s], -1)


def worst(x: Tensor, truth: Tensor) -> float:
    assert x.shape == truth.shape
    return (x.double() - truth).abs().max().item()


@pytest.mark.parametrize("strided", [False, True])
@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize(("N", "heads", "E"), [(1, 1, 2), (1, 3, 64), (5, 2, 6), (33, 9, 64)])
def test_no_worse_than_twice_plain_pytorch(N, heads, E, dtype, strided):
    torch.manual_seed(0)
    positions = torch.randint(0, 2000, (N,))
    if strided:  # q as it lies in the output of one product for q, k and v
        x = torch.randn(N, heads * 3, E).to(dtype)[:, heads : 2 * heads]
        assert N == 1 or not x.is_contiguous()
    else:
        x = torch.randn(N, heads, E).to(dtype)
    cos, sin = rotation(positions, frequencies(E), 1.0, dtype)
    assert cos.shape == sin.shape == (N, 1, E)
    assert cos.dtype == sin.dtype == dtype
    truth = turned(x, positions, E)
    allowed = 2 * worst(naive(x, positions, E), truth) + torch.finfo(dtype).eps
    for op in (rope, rope_reference):
        y = op(x, cos, sin)
        assert y.dtype == dtype
        assert worst(y, truth) <= allowed


def test_angles_are_fp32_for_every_type():
    """At position 8,000 a bf16 angle would be off by many turns."""
    positions = torch.tensor([8000, 8001])
    for dtype in TYPES:
        cos, sin = rotation(positions, frequencies(64), 1.0, dtype)
        angles = positions.double()[:, None, None] * frequencies(64).double()
        allowed = torch.finfo(dtype).eps + 8001 * 2.0**-24
        assert worst(cos[..., :32], angles.cos()) <= allowed
        assert worst(sin[..., 32:], angles.sin()) <= allowed
        assert torch.equal(sin[..., :32], -sin[..., 32:])


@pytest.mark.parametrize("op", [rope, rope_reference])
def test_worked_example(op):
    cos, sin = rotation(torch.tensor([1]), torch.tensor([math.pi / 2]), 1.0, torch.float32)
    y = op(torch.tensor([[[1.0, 0.0]], [[0.0, 1.0]]]), cos, sin)
    assert y.flatten().tolist() == pytest.approx([0, 1, -1, 0], abs=1e-6)


@pytest.mark.parametrize("op", [rope, rope_reference])
def test_position_zero_changes_nothing(op):
    x = torch.randn(2, 3, 8)
    assert torch.equal(op(x, *rotation(torch.zeros(2), frequencies(8), 1.0, x.dtype)), x)


def test_scale_multiplies_the_result():
    x, positions = torch.randn(4, 2, 8), torch.arange(4)
    y = rope(x, *rotation(positions, frequencies(8), 1.25, x.dtype))
    assert worst(y, turned(x, positions, 8, scale=1.25)) < 1e-5
    assert y.norm().item() == pytest.approx(1.25 * x.norm().item())


def test_a_product_depends_on_the_distance_only():
    torch.manual_seed(1)
    q, k = torch.randn(2, 1, 1, 16, dtype=torch.double)

    def score(query_at: int, key_at: int) -> float:
        at = [
            rotation(torch.tensor([p]), frequencies(16), 1.0, q.dtype) for p in (query_at, key_at)
        ]
        return (rope(q, *at[0]) * rope(k, *at[1])).sum().item()

    assert score(7, 3) == pytest.approx(score(104, 100), abs=1e-4)
    assert score(7, 3) != pytest.approx(score(3, 7), abs=1e-2)


def test_rows_are_placed_one_by_one():
    """Packed rows in any order are turned as if each stood alone."""
    x, positions = torch.randn(5, 2, 8), torch.tensor([4, 0, 9, 4, 1])
    y = rope(x, *rotation(positions, frequencies(8), 1.0, x.dtype))
    for i in range(5):
        alone = rotation(positions[i : i + 1], frequencies(8), 1.0, x.dtype)
        assert torch.allclose(rope(x[i : i + 1], *alone)[0], y[i], atol=1e-6)


def test_gradient():
    x = torch.randn(3, 2, 6, dtype=torch.double, requires_grad=True)
    cos, sin = rotation(torch.tensor([0, 5, 17]), frequencies(6), 1.0, torch.double)
    assert torch.autograd.gradcheck(lambda a: rope(a, cos, sin), (x,))
