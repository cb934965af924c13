"""Products with packed and with 4-bit weights against fp64, no worse than twice plain PyTorch.

What needs oneDNN's bf16 is skipped where `can_pack` says no.
"""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.linear import BLOCK, MOST_ROWS, can_pack, dequantize, linear, pack, q4_linear, quantize

BF16 = torch.bfloat16
HAS_PACK = can_pack(torch.empty(0, dtype=BF16))
packs = pytest.mark.skipif(not HAS_PACK, reason="no oneDNN with native bf16 here")


def close(y: Tensor, same: Tensor, truth: Tensor, roundings: int = 1) -> None:
    """error(y) <= 2 · error(plain PyTorch, same type) + some roundings of the result."""
    assert y.shape == truth.shape
    small = roundings * torch.finfo(y.dtype).eps / 2 * truth.abs().max().item()
    error = (y.double() - truth).abs().max().item()
    assert error <= 2 * (same.double() - truth).abs().max().item() + small


def draw(*shape: int, dtype: torch.dtype = BF16, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


@packs
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize(("N", "wide", "out"), [(1, 1, 1), (1, 576, 64), (5, 33, 7), (70, 48, 129)])
def test_packed_is_plain(N, wide, out, biased):
    x, weight = draw(N, wide), draw(out, wide, seed=1)
    bias = draw(out, seed=3) if biased else None
    truth = F.linear(x.double(), weight.double(), bias.double() if bias is not None else None)
    for form in (weight, pack(weight)):
        y = linear(x, form, bias)
        assert y.dtype == BF16
        close(y, F.linear(x, weight, bias), truth)


def blocks(out: int, wide: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Random codes, steps and floors, as a file of typical weights holds them."""
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 16, (out, wide), generator=generator, dtype=torch.int32)
    steps = torch.rand(out, wide // BLOCK, generator=generator).half().float() * 0.02
    floors = -8 * steps + torch.randn(out, wide // BLOCK, generator=generator) * 0.01
    return codes, steps, floors


def test_q4_worked_example():
    """d = 0.1, m = -0.8: code 5 is -0.3, code 8 is 0, code 15 is 0.7, but for bf16."""
    codes = torch.zeros(64, BLOCK, dtype=torch.int32)
    codes[:, :3] = torch.tensor([5, 8, 15])
    parts = codes, torch.full((64, 1), 0.1), torch.full((64, 1), -0.8)
    weight = dequantize(*parts)
    assert weight[0, :4].tolist() == pytest.approx([-0.3, 0, 0.7, -0.8], rel=2**-8, abs=1e-6)
    x = torch.eye(BLOCK, dtype=BF16)[:4]
    y = q4_linear(x, quantize(*parts))
    assert y[:, 0].tolist() == pytest.approx([-0.3, 0, 0.7, -0.8], rel=2**-7, abs=1e-3)


@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize(("N", "wide", "out"), [(1, 32, 64), (8, 576, 192), (3, 96, 128)])
def test_q4_is_the_product_with_its_dequantized_weights(N, wide, out, biased):
    parts = blocks(out, wide)
    weight, q4 = dequantize(*parts), quantize(*parts)
    assert (q4.codes.dtype, q4.steps_and_zeros.shape) == (torch.uint8, (wide // BLOCK, out, 2))
    x = draw(N, wide, seed=1)
    bias = draw(out, seed=3) if biased else None
    truth = F.linear(x.double(), weight.double(), bias.double() if bias is not None else None)
    wrong = torch.full((out, wide), float("nan"), dtype=BF16)  # must not be used
    y = linear(x, wrong, bias, q4)
    close(y, F.linear(x, weight.to(BF16), bias), truth, roundings=2)


def test_q4_serves_few_rows_only():
    parts = blocks(64, 64)
    q4, other = quantize(*parts), torch.zeros(64, 64, dtype=BF16)
    for rows in (MOST_ROWS, MOST_ROWS + 1):
        y = linear(draw(rows, 64), other, q4=q4)
        assert bool(y.any()) == (rows <= MOST_ROWS)
