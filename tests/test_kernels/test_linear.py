"""Products with packed and with 4-bit weights against fp64, no worse than twice plain PyTorch.

What needs oneDNN's bf16 is skipped where `can_pack` says no.
"""

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.linear import (
    BLOCK,
    MOST_ROWS,
    can_pack,
    dequantize,
    linear,
    pack,
    q4_linear,
    quantize,
)
from nanopersrm.model.cache import Layout
from nanopersrm.model.tokenizer import Tokenizer
from nanopersrm.model.transformer import Linear, Model
from nanopersrm.model.weights import load

BF16, CPU = torch.bfloat16, torch.device("cpu")
TEXT = Path(__file__).parents[2] / "data" / "demo" / "edmund" / "1.txt"
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


@packs
def test_packed_takes_strided_inputs():
    x, weight = draw(6, 96)[:, ::2], draw(48, 40, seed=1).t()
    assert not any(t.is_contiguous() for t in (x, weight))
    truth = F.linear(x.double(), weight.double())
    close(linear(x, pack(weight)), F.linear(x, weight), truth)


def test_fp32_is_never_packed():
    assert not can_pack(torch.empty(4, 4))
    assert not can_pack(torch.empty(4, 4, dtype=torch.float16))


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


def log_probs(model: Model, ids: Tensor) -> Tensor:
    with torch.inference_mode():
        return model.logits(model(ids, Layout.of([len(ids)]))).log_softmax(-1)


@pytest.mark.base
def test_rounding_the_blocks_costs_less_than_bf16_itself(smollm):
    """Mean KL from fp32 with the file's own numbers: bf16 scales alone, then bf16 arithmetic."""
    ids = torch.tensor(Tokenizer.load(smollm).encode(TEXT.read_text(encoding="utf-8")))
    exact = log_probs(load(smollm, torch.float32, CPU), ids)
    half = load(smollm, torch.bfloat16, CPU)
    rounded = load(smollm, torch.float32, CPU)
    for name, parameter in rounded.named_parameters():
        owner = half.get_submodule(name.removesuffix(".weight")) if "proj" in name else None
        if isinstance(owner, Linear) and owner.q4 is not None:
            steps, zeros = owner.q4.steps_and_zeros.float().unbind(-1)  # (in / 32, out)
            blocks = parameter.view(len(parameter), -1, 32)
            codes = (blocks - (zeros - 8 * steps).t()[..., None]) / steps.t()[..., None]
            again = (codes.round() - 8) * steps.t()[..., None] + zeros.t()[..., None]
            parameter.copy_(again.view_as(parameter))

    def divergence(other: Tensor) -> float:
        return float((exact.exp() * (exact - other)).sum(-1).mean())

    scales, arithmetic = divergence(log_probs(rounded, ids)), divergence(log_probs(half, ids))
    assert 0 < scales < 3e-4
    assert scales < arithmetic / 4
