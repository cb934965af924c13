"""A product with a 16-bit matrix, y = x Wᵀ + b, in the order of weights that the machine likes.

A decode step of a small model is a walk over its weights: the 269 MB of SmolLM2-135M in bf16 have
to arrive however few rows wait for them. oneDNN, PyTorch's CPU library, computes fastest on an
order of its own; `pack` puts a weight in that order once.

All 210 matrices of its layers, in milliseconds (`python -m kernels.bench linear`: bf16, torch 2.13,
2 cores with AMX; in brackets with a neighbour on the memory bus):

    rows      plain          packed         4-bit, see q4_linear.py
       1    18.6 (26.8)    13.7 (23.0)     5.6  (6.7)
       4    19.4 (29.6)    14.3 (24.4)     8.8 (14.2)
       8    19.3 (28.4)    14.0 (24.7)    15.2 (17.8)
      16    20.4 (30.3)    15.2 (25.9)    28.5 (31.1)
      32    22.5 (37.9)    15.9 (36.9)    53.2 (86.5)

Gate and up stay two products: as one matrix of 3,072 rows, packed, they were slower than apart.

What we chose: a packed weight is inference only and replaces the plain one. Only bf16 on a CPU is
packed (fp16 has no fast product there). A base that comes in 4-bit blocks keeps them beside, for
few rows (`q4_linear.py`). Everywhere else this is PyTorch's own product. What we left out: oneDNN
can add, multiply and apply silu while it stores; with up to 384 rows that gained nothing (the MLPs
of 30 layers: 1 row 20.4 ms against 20.1, 384 rows 154 against 143), with 1,024 about 10 %.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.q4_linear import MOST_ROWS, Q4, q4_linear

# Rows that oneDNN is told to expect when it chooses the order; 1 to 2,048 ran equally well on it.
PACK_ROWS = 16


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
