"""A matrix of the model under its checkpoint name, in whatever form it is held.

    y = x Wᵀ + bias                                  W in 16 or 32 bits; or
        packed                                       in oneDNN's own order, inference on a CPU
        few rows: q4                                 in the blocks of a 4-bit base file, on a CPU
        nf4                                          in 4 bits with an adapter, as in QLoRA
      + scale · (x Aᵀ) Bᵀ                            where an adapter is on (`lora.py`)

The adapter is never merged into W: with it off, the base is exactly the base. A matrix that learns
goes through a backward written by hand (`kernels/nf4_linear.py`).

In 4 bits (QLoRA, Dettmers et al., arXiv 2305.14314) a weight takes half a byte and, for each 64 of
them, a scale in one byte: 3.37 GB for the 6.5 billion weights in the blocks of Qwen2.5-7B instead
of 13.05. Embedding, head, norms and biases stay as they came. Codes and scales are those of
bitsandbytes 0.50 bit for bit. Blocks of 64 run along the flattened matrix and may cross rows.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kernels.linear import Q4, Adapter, linear, pack
from kernels.nf4 import BLOCK, NF4, dequantize, quantize
from kernels.nf4_linear import lora_linear, nf4_linear
from nanopersrm import InputError

TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


class Linear(nn.Module):
    """weight (out, in), optional bias (out,)."""

    def __init__(self, width_in: int, width_out: int, bias: bool = False):
        super().__init__()
        self.width_in, self.width_out = width_in, width_out
        self.weight = nn.Parameter(torch.empty(width_out, width_in))
        self.bias = nn.Parameter(torch.empty(width_out)) if bias else None
        self.q4: Q4 | None = None  # the same matrix in 4-bit blocks, if the base's file has them
        self.packed_q4: Q4 | None = None  # q4 once packed
        self.nf4: NF4 | None = None  # instead of the weight, which then is on "meta"
        self.adapter: Adapter | None = None

    def forward(self, x: Tensor) -> Tensor:
        """(N, in) -> (N, out)"""
        adapter = self.adapter
        if self.nf4 is not None:
            return nf4_linear(x, self.nf4, self.bias, adapter)
        if adapter is not None and (torch.is_grad_enabled() or not self.weight.is_mkldnn):
            return lora_linear(x, self.weight, self.bias, adapter)
        y = linear(x, self.weight, self.bias, self.packed_q4)
        if adapter is None:
            return y
        return y.addmm_(F.linear(x, adapter.A), adapter.B.t(), alpha=adapter.scale)

    def to_nf4(self, weight: Tensor) -> None:
        """Compute with NF4 of weight (out, in) from now on, on the weight's device.

        The own weight becomes a parameter of the right shape on "meta", which holds no bytes.
        """
        out, width = self.width_out, self.width_in
        assert weight.shape == (out, width), f"expected ({out}, {width}), got {tuple(weight.shape)}"
        if width % 2 or out * width % BLOCK:
            raise InputError(
                f"expected an even number of columns and a multiple of {BLOCK} weights for NF4, "
                f"got {out} x {width}"
            )
        low, high = weight.aminmax()  # NaN if there is one; unlike `isfinite` it needs no room
        if not (math.isfinite(low) and math.isfinite(high)):  # waits for the GPU
            raise InputError(f"expected finite weights, got inf or nan in {weight.dtype}")
        self.nf4 = quantize(weight)
        self.q4 = self.packed_q4 = None
        empty = torch.empty(out, width, dtype=weight.dtype, device="meta")
        self.weight = nn.Parameter(empty, requires_grad=False)

    def dense(self, dtype: torch.dtype) -> Tensor:
        """The weight (out, in) in plain form, without the adapter."""
        return self.weight.to(dtype) if self.nf4 is None else dequantize(self.nf4, dtype)

    def pack(self) -> None:
        """Inference only from now on; 4 bits of `nf4` are unpacked once, to the same numbers."""
        self.weight = nn.Parameter(pack(self.dense(self.weight.dtype)), requires_grad=False)
        self.packed_q4, self.nf4 = self.q4, None


def matrices(model: nn.Module, targets: tuple[str, ...] = TARGETS) -> dict[str, Linear]:
    """Name, such as "layers.0.self_attn.q_proj", -> matrix, of all blocks in order."""
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, Linear) and name.rpartition(".")[2] in targets
    }
