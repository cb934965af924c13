"""RMSNorm: divide each row by its root mean square, then scale each column.

    y[n, d] = x[n, d] / sqrt(mean_d(x[n, d]²) + eps) · weight[d]

(Zhang & Sennrich, "Root Mean Square Layer Normalization", arXiv 1910.07467.) Worked example, eps =
0, weight = 1: x = (3, 4) has mean square 12.5, so y = (3, 4) / 3.5355 = (0.8485, 1.1314).

What we chose: the arithmetic is fp32 whatever x is, and the result is rounded once, at the end.
(Hugging Face rounds to the model's type before it multiplies by the weight, so 16-bit models differ
from it by one rounding.) What we left out: the mean subtraction of LayerNorm, which these models do
not have.

Where to read next: `rope.py`.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def rms_norm_reference(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """The formula above, in fp32: x (..., D), weight (D,) -> (..., D) in x's type."""
    wide = x.float()
    rstd = torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)  # (..., 1)
    return (wide * rstd * weight.float()).to(x.dtype)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x (..., D), weight (D,) -> (..., D): rows at unit root mean square, times `weight`.

    `torch.nn.functional.rms_norm` makes the same fp32 steps in fewer calls, so it stands in for the
    reference.
    """
    return F.rms_norm(x, weight.shape, weight, eps)
