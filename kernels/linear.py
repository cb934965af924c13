"""A product with a matrix that is not trained, y = x Wᵀ + b: plain, packed for a CPU, or in 4 bits.

A decode step of a small model is a walk over its weights: the 269 MB of SmolLM2-135M in bf16 have
to arrive however few rows wait for them. So a CPU has two more forms of a bf16 matrix:

packed   oneDNN, PyTorch's CPU library, computes fastest on an order of its own; `pack` puts a
         weight in that order once. A packed weight is for inference and replaces the plain one.
Q4       the blocks of a GGUF file in Q4_1, for up to MOST_ROWS rows. Each 32 weights along a row
         share a step d and a floor m, in 16 bits, beside one 4-bit number q each, 5 bits a weight:

             w = d · q + m               worked example: d = 0.1, m = -0.8, q = 5: w = -0.3

         PyTorch's CPU product has the middle of the range as its zero, d and z in bf16:

             w = d · (q - 8) + z         z = m + 8 · d

Rounding d and z to bf16 moves the next-token distributions of SmolLM2 by a mean KL divergence of
1.1e-4 from fp32; computing in bf16 at all moves them by 1.1e-3. `dequantize` gives the same numbers
for the 16-bit form, which rounds them once. Everywhere else this is PyTorch's own product.

A LoRA adapter is a correction of low rank to a frozen matrix (Hu et al., arXiv 2106.09685):

    y = x Wᵀ + scale · (x Aᵀ) Bᵀ          the same as a weight W + scale · B A

A (R, in) and B (out, R) are trained, R · (in + out) numbers instead of in · out: with R = 16 and a
3,584 x 3,584 matrix 1 in 112. B starts as zeros, so that training starts from the base as it is.
Read as two thin products the adapter never touches W: it works beside weights in 4 bits, where
adding B A would mean to round them again (`nf4_linear.py`).
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

# Rows that oneDNN is told to expect when it chooses the order; 1 to 2,048 ran equally well on it.
PACK_ROWS = 16
BLOCK = 32  # weights that share d and m
MOST_ROWS = 8  # above, 16-bit weights are faster
MIDDLE = 8  # of the range 0 to 15


class Adapter(NamedTuple):
    A: Tensor  # (R, in)
    B: Tensor  # (out, R)
    scale: float  # alpha / R


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


def can_pack(weight: Tensor) -> bool:
    """True where packing pays: bf16 on a CPU whose PyTorch has oneDNN with native bf16."""
    return (
        weight.device.type == "cpu"
        and weight.dtype == torch.bfloat16
        and torch.backends.mkldnn.is_available()
        and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    )


def pack(weight: Tensor) -> Tensor:
    """weight (out, in) -> an opaque tensor in oneDNN's own order; inference only."""
    return torch.ops.mkldnn._reorder_linear_weight(weight.detach().contiguous(), PACK_ROWS)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None, q4: Q4 | None = None) -> Tensor:
    """x (N, in), weight (out, in) plain or packed, bias (out,) -> x Wᵀ + b (N, out).

    `q4` is the same matrix in 4 bits, used when there are few rows.
    """
    if q4 is not None and len(x) <= MOST_ROWS:
        return q4_linear(x, q4, bias)
    if weight.is_mkldnn:
        return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    return F.linear(x, weight, bias)
