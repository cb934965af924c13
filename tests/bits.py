"""NF4 as bitsandbytes has it, on the parts of ours."""

import bitsandbytes.functional as bnb  # complains of another `kernels`
import torch
from torch import Tensor

from kernels.nf4 import CODEBOOK, DYNAMIC, NF4


def theirs(weight: Tensor) -> NF4:
    codes, state = bnb.quantize_4bit(
        weight.contiguous(), quant_type="nf4", compress_statistics=True, blocksize=64
    )
    rows, columns = weight.shape
    return NF4(codes.view(rows, columns // 2), state.absmax, state.state2.absmax, state.offset)


def their_dequantize(nf4: NF4, dtype: torch.dtype = torch.float32) -> Tensor:
    """One block a row: with rows that end within a block, bitsandbytes' AVX-512 code goes wrong."""
    second = bnb.QuantState(
        nf4.scales, code=torch.tensor(DYNAMIC), blocksize=256, dtype=torch.float32
    )
    state = bnb.QuantState(
        nf4.absmax, shape=(len(nf4.absmax), 64), dtype=dtype, blocksize=64, quant_type="nf4",
        code=torch.tensor(CODEBOOK), offset=nf4.offset, state2=second,
    )  # fmt: skip
    return bnb.dequantize_4bit(nf4.codes.view(-1, 1), state).view(nf4.shape)
