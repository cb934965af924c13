"""A LoRA adapter: a correction of low rank to a frozen matrix.

    y = x Wᵀ + scale · (x Aᵀ) Bᵀ          the same as a weight W + scale · B A

(Hu et al., "LoRA", arXiv 2106.09685.) W (out, in) never changes; A (R, in) and B (out, R) are
trained. Together they hold R · (in + out) numbers instead of in · out: with R = 16 and a 3,584 x
3,584 matrix 1 in 112. B starts as zeros, so that training starts from the base as it is. `scale` is
a fixed number, usually alpha / R.

Read as two thin products, as above, the adapter never touches W: it works beside weights in 4 bits,
where adding B A would mean to round them again.
"""

from typing import NamedTuple

from torch import Tensor


class Adapter(NamedTuple):
    A: Tensor  # (R, in)
    B: Tensor  # (out, R)
    scale: float
