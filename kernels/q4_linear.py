"""A product with 4-bit weights as GGUF files hold them: for few rows, fewer bytes beat everything.

A Q4_1 file keeps a matrix in blocks of 32 weights along a row: one 4-bit number q each, and for the
block a step d and a floor m, in 16 bits:

    w = d · q + m        5 bits a weight        worked example: d = 0.1, m = -0.8, q = 5: w = -0.3

PyTorch has a CPU product for such blocks, written with the middle of the range as the zero:

    w = d · (q - 8) + z      z = m + 8 · d      d and z in bf16

With few rows a product waits for its weights, and 66 MB arrive sooner than 212 MB: one row took 5.6
ms for all matrices of SmolLM2-135M's layers, against 13.7 in bf16; at eight rows both are equal on
an idle machine and 4-bit is ahead on a busy one (the table in `linear.py`). So this form serves up
to `MOST_ROWS` rows, and bf16 the rest.

Is it as exact? Rounding d and z to bf16 moves the next-token distributions of SmolLM2 by a mean KL
divergence of 1.1e-4 from fp32; computing in bf16 at all moves them by 1.1e-3 (a test keeps watch:
tests/test_q4.py). `dequantize` gives the same numbers for the 16-bit form, which rounds them once.
"""

from typing import NamedTuple

import torch
from torch import Tensor

BLOCK = 32  # weights that share d and m
MOST_ROWS = 8  # above, 16-bit weights are faster
MIDDLE = 8  # of the range 0 to 15


class Q4(NamedTuple):
    """A matrix (out, in) in blocks of 4 bits, in the order of PyTorch's product."""

    codes: Tensor  # opaque, uint8
    steps_and_zeros: Tensor  # (in / 32, out, 2) bf16: d and z


def can_quantize(weight: Tensor) -> bool:
    """True where PyTorch has the product: bf16 on a CPU, whole blocks."""
    return (
        weight.device.type == "cpu"
        and weight.dtype == torch.bfloat16
        and weight.ndim == 2
        and weight.shape[1] % BLOCK == 0
        and weight.shape[0] % 64 == 0
    )


def quantize(codes: Tensor, steps: Tensor, floors: Tensor) -> Q4:
    """codes (out, in) int32 of 0 to 15, steps and floors (out, in / 32) fp32 -> Q4."""
    zeros = floors + MIDDLE * steps
    both = torch.stack([steps.t(), zeros.t()], -1).to(torch.bfloat16).contiguous()
    return Q4(torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes, 1), both)


def dequantize(codes: Tensor, steps: Tensor, floors: Tensor) -> Tensor:
    """The weights that `quantize` stands for, (out, in) fp32: d and z rounded to bf16, no more."""
    zeros = (floors + MIDDLE * steps).bfloat16().float()
    blocks = codes.view(*steps.shape, BLOCK) - MIDDLE  # (out, in / 32, 32)
    return (blocks * steps.bfloat16().float()[..., None] + zeros[..., None]).view(codes.shape)


def q4_linear(x: Tensor, weight: Q4, bias: Tensor | None = None) -> Tensor:
    """x (N, in) bf16 -> x Wᵀ + b (N, out) bf16, summed in fp32; without gradient."""
    y = torch.ops.aten._weight_int4pack_mm_for_cpu(x, weight.codes, BLOCK, weight.steps_and_zeros)
    return y if bias is None else y + bias
