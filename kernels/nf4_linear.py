"""A linear layer whose weight stays in 4 bits: y = x Wᵀ + bias + scale · (x Aᵀ) Bᵀ.

W is NF4 (`nf4.py`) and frozen, as in QLoRA (Dettmers et al., arXiv 2305.14314); the adapter (A, B)
is what learns. `lora_linear` is the same for a weight in 16 or 32 bits, without the decoding. How a
4-bit W is read depends on the number of rows:

    1 to 64 rows, a GPU, 16-bit x   packed, decoded in registers: `nf4_product.py`, 0.52 bytes a
                                    weight, bias and the adapter's B side in the same pass
    else                            dequantized to x's type into a buffer, then PyTorch's product:
                                    4.5 bytes a weight, which many rows make up for

There is one buffer for each device and type, as large as the largest matrix asked for so far: 136
MB for Qwen2.5-7B in 16 bits, where the dequantized model is 13 GB. Each product writes it anew. So
it is never saved for backward, and everything that uses it must run on one stream, in order; inside
a CUDA graph the largest matrix must have been asked for before the capture.

Backward. Let g = dL/dy, a = x Aᵀ and d = scale · g B, both (N, R). From dy = dx Wᵀ + dbias +
scale · (dx Aᵀ + x dAᵀ) Bᵀ + scale · a dBᵀ and dL = <g, dy>:

    dL/dx = g W + d A            <g, dx Wᵀ> = <g W, dx>; scale <g, dx Aᵀ Bᵀ> = <d A, dx>
    dL/dA = dᵀ x                 scale <g, x dAᵀ Bᵀ> = <d, x dAᵀ> = <dᵀ x, dA>
    dL/dB = scale · gᵀ a         scale <g, a dBᵀ> = scale <gᵀ a, dB>
    dL/dbias = Σ_n g[n]          only if the bias asks for it
    dL/dW                        not computed: the base is frozen

Worked example: x = (1, 2), W = ((1, 0), (0, -1)), A = (1, 1), B = (1, 0)ᵀ, scale = 2. Then a = 3,
y = (1, -2) + 2 · 3 · (1, 0) = (7, -2). For g = (1, 1): d = 2, dx = (1, -1) + 2 · (1, 1) = (3, 1),
dA = 2 · (1, 2), dB = 2 · 3 · (1, 1)ᵀ. (Its blocks are too short for NF4; a test has it with zeros.)

Saved for backward: x, A, B, and a, which is R / in of x, 0.4 % at rank 16 (computing it again would
read all of x). W is dequantized once more, 0.5 + 2 bytes a weight: a few percent of the products.

Numerics: products sum in fp32 and round once to x's type; the adapter is converted to it first, and
its gradients come back in its own type. In registers W is code times fp32 scale, with the code
rounded to 16 bits; dequantized, the product of both is rounded instead. The two differ by no more
than that rounding, 2^-11 of a weight in fp16 and 2^-8 in bf16.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from kernels._dispatch import on_triton
from kernels.adapter import Adapter
from kernels.nf4 import NF4, dequantize
from kernels.nf4_product import fits, product

_BUFFERS: dict[tuple[torch.device, torch.dtype], Tensor] = {}


def nf4_linear_reference(
    x: Tensor, weight: NF4, bias: Tensor | None = None, adapter: Adapter | None = None
) -> Tensor:
    """As `nf4_linear`, by plain autograd, in fp32 or wider, from a fresh copy of the weight."""
    wide = torch.promote_types(x.dtype, torch.float32)
    h = x.to(wide)
    y = F.linear(h, dequantize(weight, wide), None if bias is None else bias.to(wide))
    if adapter is not None:
        a = F.linear(h, adapter.A.to(wide))
        y = y + adapter.scale * F.linear(a, adapter.B.to(wide))
    return y.to(x.dtype)


def _dense(weight: NF4 | Tensor, dtype: torch.dtype) -> Tensor:
    """The weight (out, in); of 4 bits in the buffer, valid until the next call."""
    if isinstance(weight, Tensor):
        return weight
    out, columns = weight.shape
    place = (weight.device, dtype)
    if place not in _BUFFERS or _BUFFERS[place].numel() < out * columns:
        with torch.inference_mode(False):  # or only inference could write it ever after
            _BUFFERS[place] = torch.empty(out * columns, dtype=dtype, device=weight.device)
    return dequantize(weight, dtype, _BUFFERS[place][: out * columns].view(out, columns))


def _forward(
    x: Tensor,
    weight: NF4 | Tensor,
    bias: Tensor | None,
    A: Tensor | None,
    B: Tensor | None,
    scale: float,
) -> tuple[Tensor, Tensor | None]:
    """y (N, out) and a = x Aᵀ (N, R); bias, A and B in x's type."""
    a = None if A is None else F.linear(x, A)
    if not isinstance(weight, Tensor) and on_triton(x) and fits(x, weight):
        return product(x, weight, bias, a, B, scale), a
    y = F.linear(x, _dense(weight, x.dtype), bias)
    if a is not None and B is not None:
        y.addmm_(a, B.t(), alpha=scale)
    return y, a


class _FrozenLinear(torch.autograd.Function):
    """Saves x, A, B and a = x Aᵀ."""

    @staticmethod
    def forward(ctx, x, weight, bias, A, B, scale):
        ctx.weight, ctx.scale = weight, scale
        ctx.types = [None if t is None else t.dtype for t in (bias, A, B)]
        bias, A, B = (None if t is None else t.to(x.dtype) for t in (bias, A, B))
        y, a = _forward(x, weight, bias, A, B, scale)
        ctx.save_for_backward(x, A, B, a)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        x, A, B, a = ctx.saved_tensors
        for_x, _, for_bias, for_A, for_B, _ = ctx.needs_input_grad
        bias_type, A_type, B_type = ctx.types
        d = None if A is None else dy @ B * ctx.scale  # (N, R)
        dx = None
        if for_x:
            dx = dy @ _dense(ctx.weight, x.dtype)
            if d is not None:
                dx.addmm_(d, A)
        d_bias = dy.sum(0).to(bias_type) if for_bias else None
        dA = (d.t() @ x).to(A_type) if for_A else None
        dB = (dy.t() @ a * ctx.scale).to(B_type) if for_B else None
        return dx, None, d_bias, dA, dB, None


def nf4_linear(
    x: Tensor, weight: NF4, bias: Tensor | None = None, adapter: Adapter | None = None
) -> Tensor:
    """x (N, in), weight (out, in), bias (out,), adapter A (R, in) and B (out, R)
    -> x Wᵀ + bias + scale · (x Aᵀ) Bᵀ (N, out) in x's type."""
    return _frozen_linear(x, weight, bias, adapter)


def lora_linear(x: Tensor, weight: Tensor, bias: Tensor | None, adapter: Adapter) -> Tensor:
    """As `nf4_linear` for a plain weight (out, in) of x's type, which gets no gradient."""
    assert weight.dtype == x.dtype, f"expected a weight of {x.dtype}, got {weight.dtype}"
    return _frozen_linear(x, weight, bias, adapter)


def _frozen_linear(
    x: Tensor, weight: NF4 | Tensor, bias: Tensor | None, adapter: Adapter | None
) -> Tensor:
    out, inner = weight.shape
    assert x.ndim == 2, f"expected x (N, {inner}), got {tuple(x.shape)}"
    assert x.shape[1] == inner, f"expected x (N, {inner}), got {tuple(x.shape)}"
    A, B, scale = (None, None, 0.0) if adapter is None else adapter
    if A is not None and B is not None:
        R = A.shape[0]
        assert A.shape == (R, inner), f"expected A (R, {inner}), got {tuple(A.shape)}"
        assert B.shape == (out, R), f"expected B ({out}, {R}), got {tuple(B.shape)}"
    learns = any(t is not None and t.requires_grad for t in (x, bias, A, B))
    if learns and torch.is_grad_enabled():
        return _FrozenLinear.apply(x, weight, bias, A, B, scale)
    bias, A, B = (None if t is None else t.to(x.dtype) for t in (bias, A, B))
    return _forward(x, weight, bias, A, B, scale)[0]
