"""Rotary embedding against rotation by complex numbers in fp64, and what a rotation must keep."""

import math
from collections.abc import Callable

import pytest
import torch
from oracle import INTERPRETED, KINDS, TYPES, gappy, no_worse_than_plain, off, spread, strided
from torch import Tensor

from kernels.rope import _NormTurn, _Turn, rope, rope_reference, rotation

EPS = 1e-6
SIZES = [(1, 1, 1, 2), (1, 9, 3, 64), (5, 2, 1, 6), (2, 1, 4, 10), (7, 9, 3, 64)]  # N, H, K, E


def frequencies(E: int) -> Tensor:
    return 1e4 ** -(torch.arange(0, E, 2).float() / E)


def turned(x: Tensor, positions: Tensor, scale: float = 1.0) -> Tensor:
    """The truth: pair (i, i + E/2) is one complex number, times e^(i·p·f), in fp64."""
    first, second = x.double().chunk(2, -1)
    angles = positions.double()[:, None, None] * frequencies(x.shape[-1]).to(x.device).double()
    y = torch.complex(first, second) * torch.polar(torch.full_like(angles, scale), angles)
    return torch.cat([y.real, y.imag], -1)


def naive(x: Tensor, positions: Tensor) -> Tensor:
    """The two lines of the formula in x's type, rounding after each step, from fp32 angles."""
    a, b = x.chunk(2, -1)
    angles = positions.float()[:, None, None] * frequencies(x.shape[-1]).to(x.device)
    c, s = angles.cos().to(x.dtype), angles.sin().to(x.dtype)
    return torch.cat([a * c - b * s, b * c + a * s], -1)


def plain(positions: Tensor) -> Callable[..., tuple[Tensor, ...]]:
    def op(q: Tensor, k: Tensor, *weights: Tensor) -> tuple[Tensor, ...]:
        if weights:
            q, k = (
                x * torch.rsqrt((x * x).mean(-1, keepdim=True) + EPS) * w
                for x, w in zip((q, k), weights, strict=True)
            )
        form = turned if q.dtype == torch.double else naive
        return tuple(form(x, positions.to(q.device)) for x in (q, k))

    return op


def ours(positions: Tensor, form=rope, layout=Tensor.clone) -> Callable[..., tuple[Tensor, ...]]:
    """`form` on copies of q and k, which it may consume, laid out by `layout`."""

    def op(q: Tensor, k: Tensor, *weights: Tensor) -> tuple[Tensor, ...]:
        at = positions.to(q.device), frequencies(q.shape[-1]).to(q.device)
        return form(layout(q), layout(k), *rotation(*at, 1.0, q.dtype), *weights, eps=EPS)

    return op


def fused(x: Tensor) -> Tensor:
    """The same numbers as they lie in the output of one product for q, k and v."""
    other = torch.full_like(x, float("nan"))
    return torch.cat([other, x, other], 1)[:, x.shape[1] : -x.shape[1]]


@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("layout", [Tensor.clone, fused, strided, gappy])
@pytest.mark.parametrize(("device", "dtype"), KINDS)
@pytest.mark.parametrize(("N", "H", "K", "E"), SIZES)
def test_no_worse_than_plain_pytorch(N, H, K, E, device, dtype, layout, norm):
    positions = torch.randint(0, 2000, (N,), generator=torch.Generator().manual_seed(5))
    inputs = [spread(N, H, E, dtype=dtype, size=3), spread(N, K, E, dtype=dtype, seed=1)]
    if norm:
        inputs += [spread(E, dtype=dtype, seed=2), spread(E, dtype=dtype, seed=3)]
    for form in (rope,) if INTERPRETED else (rope, rope_reference):
        if device == "cpu" or layout not in (strided, gappy):  # these two make CPU tensors
            no_worse_than_plain(ours(positions, form, layout), plain(positions), inputs, device)


def test_angles_are_fp32_for_every_type():
    """At position 8,000 a bf16 angle would be off by many turns."""
    positions = torch.tensor([8000, 8001])
    for dtype in TYPES:
        cos, sin = rotation(positions, frequencies(64), 1.0, dtype)
        assert cos.shape == sin.shape == (2, 1, 64)
        assert cos.dtype == sin.dtype == dtype
        angles = positions.double()[:, None, None] * frequencies(64).double()
        allowed = torch.finfo(dtype).eps + 8001 * 2.0**-24
        assert off(cos[..., :32], angles.cos()) <= allowed
        assert off(sin[..., 32:], angles.sin()) <= allowed
        assert torch.equal(cos[..., :32], cos[..., 32:])
        assert torch.equal(sin[..., :32], -sin[..., 32:])


@pytest.mark.parametrize("op", [rope, rope_reference])
def test_worked_example(op):
    turn = rotation(torch.tensor([1]), torch.tensor([math.pi / 2]), 1.0, torch.float32)
    q, k = op(torch.tensor([[[1.0, 0.0]]]), torch.tensor([[[0.0, 1.0], [3.0, 0.0]]]), *turn)
    assert q.flatten().tolist() == pytest.approx([0, 1], abs=1e-6)
    assert k.flatten().tolist() == pytest.approx([-1, 0, 0, 3], abs=1e-6)


@pytest.mark.parametrize("grad", [False, True])
def test_works_in_place_and_nowhere_else(grad):
    """q and k as parts of one product: their memory holds the result, v's is not touched."""
    qkv, positions = spread(3, 4, 8).requires_grad_(grad) * 1, torch.tensor([3, 0, 8])
    before = qkv.detach().clone()
    turn = rotation(positions, frequencies(8), 1.0, qkv.dtype)
    with torch.set_grad_enabled(grad):
        q, k = rope(qkv[:, :2], qkv[:, 2:3], *turn)
    assert (q.data_ptr(), k.data_ptr()) == (qkv.data_ptr(), qkv[:, 2:].data_ptr())
    assert q.requires_grad == k.requires_grad == grad
    assert off(q, turned(before[:, :2], positions)) < 1e-5
    assert torch.equal(k, qkv[:, 2:3])
    assert torch.equal(qkv[:, 3], before[:, 3])


def test_gradients_are_not_turned_in_place():
    """y + z hands one buffer to both: z's gradient is all ones, not ones turned."""
    q, k = spread(3, 2, 8).requires_grad_(), spread(3, 1, 8, seed=1).requires_grad_()
    z, dy = torch.zeros(3, 2, 8, requires_grad=True), torch.ones(3, 2, 8)
    y = ours(torch.arange(3))(q, k)[0] + z
    dz, dq, dk = torch.autograd.grad(y, (z, q, k), dy)
    assert torch.equal(dz, torch.ones(3, 2, 8))
    assert torch.equal(dy, torch.ones(3, 2, 8))
    assert off(dq, turned(dy, -torch.arange(3))) < 1e-6
    assert torch.equal(dk, torch.zeros(3, 1, 8))


def test_backward_of_the_turn_against_finite_differences():
    q, k = (spread(1, heads, 4, seed=heads).double().requires_grad_() for heads in (2, 1))
    turn = rotation(torch.tensor([5]), frequencies(4), 1.0, torch.double)
    assert torch.autograd.gradcheck(lambda q, k: _Turn.apply(q * 1, k * 1, *turn), (q, k))


@pytest.mark.skipif(not INTERPRETED, reason="the hand-derived backward belongs to the kernels")
@pytest.mark.parametrize("frozen", [False, True])
def test_backward_of_the_norm_against_finite_differences(frozen):
    q, k = (spread(1, heads, 2, seed=heads).double().requires_grad_() for heads in (3, 1))
    weights = [spread(2, seed=i).double().requires_grad_(not frozen) for i in (5, 6)]
    turn = rotation(torch.tensor([5]), frequencies(2), 1.0, torch.double)
    assert torch.autograd.gradcheck(
        lambda q, k, *w: _NormTurn.apply(q, k, *turn, *w, 0.0), (q, k, *weights)
    )


def test_every_row_counts_when_programs_share_them(monkeypatch):
    """More rows than programs: the weights' gradients are sums over all."""
    monkeypatch.setattr("kernels.rope.PARTIALS", 4)
    positions = torch.arange(11)
    inputs = [spread(11, 3, 6), spread(11, 2, 6, seed=1), spread(6, seed=2), spread(6, seed=3)]
    no_worse_than_plain(ours(positions), plain(positions), inputs, "cpu")
