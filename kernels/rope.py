"""Rotary position embedding: pairs of a head's numbers are turned, further at each position.

A head of width E holds E/2 pairs (x[i], x[i + E/2]); pair i at position p is turned by the angle p
· f[i]:

    y[i]       = x[i] · cos(p·f[i]) - x[i + E/2] · sin(p·f[i])
    y[i + E/2] = x[i + E/2] · cos(p·f[i]) + x[i] · sin(p·f[i])

The product of a turned query and a turned key then depends on the distance of their positions only
(Su et al., "RoFormer", arXiv 2104.09864). Worked example: E = 2, f = (1,), p = π/2: (1, 0) becomes
(0, 1).

What we chose: positions are given row by row, so packed texts, cached texts and replies that
continue a shared prefix need nothing special. Hugging Face's pairing (i with i + E/2), which GGUF
files of the Llama family do not use: the loader puts their rows back (see `nanopersrm/weights.py`).
Angles are fp32 always; the turn is made in the type of x.

Where to read next: `attention.py`.
"""

import torch
from torch import Tensor


def rotation(
    positions: Tensor, frequencies: Tensor, scale: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """positions (N,) int, frequencies (E/2,) fp32 -> cos and signed sin per row, (N, 1, E) each.

    `scale` multiplies both: YaRN's attention temperature, 1 elsewhere. The first half of the sines
    carries the minus sign of the formula, so that the turn is `x · cos + swap(x) · sin`.
    """
    angles = positions.float()[:, None, None] * frequencies  # (N, 1, E/2)
    cos, sin = angles.cos() * scale, angles.sin() * scale
    return torch.cat([cos, cos], -1).to(dtype), torch.cat([-sin, sin], -1).to(dtype)


def rope_reference(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x (N, heads, E), cos and signed sin (N, 1, E) -> (N, heads, E): the formula, in fp32."""
    first, second = x.float().chunk(2, -1)
    return (x.float() * cos.float() + torch.cat([second, first], -1) * sin.float()).to(x.dtype)


def rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x (N, heads, E), cos and signed sin (N, 1, E) of x's type -> heads turned (N, heads, E)."""
    return torch.addcmul(x * cos, x.roll(x.shape[-1] // 2, -1), sin)
