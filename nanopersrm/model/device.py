"""Where the model lives and in what type it computes, from what a user wrote."""

import torch

from kernels.linear import can_pack
from nanopersrm import InputError
from nanopersrm.model.weights import DTYPES


def device_of(name: str) -> torch.device:
    """--device: auto, cpu, cuda or cuda:N. auto is the GPU where there is one."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise InputError(f"--device {name}: expected auto, cpu, cuda or cuda:N") from error
    if device.type not in ("cpu", "cuda"):
        raise InputError(f"--device {name}: expected auto, cpu, cuda or cuda:N")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise InputError(
            f"--device {name}: this machine has {torch.cuda.device_count()} CUDA devices"
        )
    if device.type == "cuda":
        torch.cuda.set_device(device)  # Triton launches on the current one
    return device


def dtype_of(name: str, device: torch.device) -> torch.dtype:
    """--dtype: auto, bf16, fp16 or fp32. auto is 16 bits where the machine multiplies them fast."""
    if name != "auto":
        if name not in DTYPES:
            raise InputError(f"--dtype {name}: expected auto, {', '.join(DTYPES)}")
        return DTYPES[name]
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float16
    return torch.bfloat16 if can_pack(torch.empty(0, dtype=torch.bfloat16)) else torch.float32
