"""A matrix of the model under its checkpoint name, in whatever form it is held.

    y = x Wᵀ + bias                                  W in 16 or 32 bits; or
        packed                                       in oneDNN's own order, inference on a CPU
        few rows: q4                                 in the blocks of a 4-bit base file, ditto
        nf4                                          in 4 bits with an adapter, as in QLoRA
      + scale · (drop(x) Aᵀ) Bᵀ                      where an adapter is on (`lora.py`)

The adapter is never merged into W: with it off, the base is exactly the base. A matrix that learns
goes through a backward written by hand (`kernels/nf4_linear.py`), which saves x once and adds
the two products in place.

What we chose: dropout acts on what the adapter sees of x, as in PEFT, and takes PyTorch's own way
through autograd, which is slower.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kernels.linear import Q4, Adapter, linear, pack
from kernels.nf4 import NF4, dequantize
from kernels.nf4_linear import lora_linear, nf4_linear


class Linear(nn.Module):
    """weight (out, in), optional bias (out,)."""

    def __init__(self, width_in: int, width_out: int, bias: bool = False):
        super().__init__()
        self.width_in, self.width_out = width_in, width_out
        self.weight = nn.Parameter(torch.empty(width_out, width_in))
        self.bias = nn.Parameter(torch.empty(width_out)) if bias else None
        self.q4: Q4 | None = None  # the same matrix in 4-bit blocks, if the base's file has them
        self.few: Q4 | None = None  # q4 once packed
        self.nf4: NF4 | None = None  # instead of the weight, which then is on "meta"
        self.adapter: Adapter | None = None
        self.dropout = 0.0  # share of x that the adapter does not see in training

    def forward(self, x: Tensor) -> Tensor:
        """(N, in) -> (N, out)"""
        adapter = self.adapter
        if adapter is not None and self.training and self.dropout > 0:
            a = F.linear(F.dropout(x, self.dropout), adapter.A.to(x.dtype))  # (N, R)
            return self._base(x) + adapter.scale * F.linear(a, adapter.B.to(x.dtype))
        if self.nf4 is not None:
            return nf4_linear(x, self.nf4, self.bias, adapter)
        if adapter is None:
            return self._base(x)
        if torch.is_grad_enabled() or not self.weight.is_mkldnn:
            return lora_linear(x, self.weight, self.bias, adapter)
        y = self._base(x)
        return y.addmm_(F.linear(x, adapter.A), adapter.B.t(), alpha=adapter.scale)

    def _base(self, x: Tensor) -> Tensor:
        if self.nf4 is not None:
            return nf4_linear(x, self.nf4, self.bias)
        return linear(x, self.weight, self.bias, self.few)

    def dense(self, dtype: torch.dtype) -> Tensor:
        """The weight (out, in) in plain form, without the adapter."""
        return self.weight.to(dtype) if self.nf4 is None else dequantize(self.nf4, dtype)

    def pack(self) -> None:
        """Inference only from now on; 4 bits of `nf4` are unpacked once, to the same numbers."""
        self.weight = nn.Parameter(pack(self.dense(self.weight.dtype)), requires_grad=False)
        self.few, self.nf4 = self.q4, None
