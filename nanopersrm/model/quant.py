"""A model in 4 bits: which matrices, and what the whole then weighs.

    y = x dequantize(NF4(W))ᵀ + bias        for every matrix W of the blocks

NF4 keeps a weight in half a byte and, for each 64 of them, a scale in one byte (`kernels/nf4.py`
explains the codes): 1/2 + 1/64 + 4/16,384 = 0.5159 bytes a weight, where bf16 takes 2. The base is
frozen, so nothing is ever rounded twice: W is quantized once, when it is read, and what training
learns stands beside it, in the adapter, in full precision (QLoRA, Dettmers et al., arXiv
2305.14314).

What is in 4 bits: q, k, v, o, gate, up and down of every block, which are nearly all there is. What
stays as it came, rounded to the model's type:

    embedding   looked up, not multiplied: it saves no time, and a rare token's row has nobody to
                average its errors with
    head        its logits are compared with each other to the last percent of a probability, by
                the sampler as by the loss
    norms       one number a column that scales the whole column; and together 0.4 MB
    biases      the same; those of Qwen2's k reach hundreds, where a 4-bit step would be huge

Worked number, Qwen2.5-7B: a block has q and o 3,584 x 3,584, k and v 512 x 3,584, and three
matrices of 18,944 x 3,584: 233.0 million weights, 28 blocks 6.525 billion. In bf16 13.05 GB, in NF4
3.37 GB. Embedding and head take 1.09 GB each, as before.

Which shapes: blocks of 64 run along the flattened matrix, so a row may end inside of one: out · in
must be a multiple of 64 and `in` even, no more. (The kernel that multiplies few rows on a GPU wants
`in` to be a multiple of 64; other matrices are dequantized there as well.)

Exactness: codes and scales are those of bitsandbytes 0.50 bit for bit, so a base trained on there
is the same base here. What we left out: quantizing the head or the embedding, and GPTQ-like
corrections from data.
"""

import math
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from kernels.nf4 import BLOCK, RUN, quantize
from nanopersrm import InputError
from nanopersrm.model.linear import Linear
from nanopersrm.model.transformer import Model


def matrices(model: Model) -> Iterator[tuple[str, Linear]]:
    """(name, matrix) of those that go into 4 bits: "layers.0.self_attn.q_proj" and so on."""
    for name, module in model.layers.named_modules(prefix="layers"):
        if isinstance(module, Linear):
            yield name, module


def quantize_linear(linear: Linear, weight: Tensor) -> None:
    """`linear` computes with NF4 of weight (out, in) from now on, on the weight's device.

    Its own weight becomes a parameter of the right shape on "meta", which holds no bytes.
    """
    out, width = linear.width_out, linear.width_in
    assert weight.shape == (out, width), f"expected ({out}, {width}), got {tuple(weight.shape)}"
    if width % 2 or out * width % BLOCK:
        raise InputError(
            f"expected an even number of columns and a multiple of {BLOCK} weights for NF4, "
            f"got {out} x {width}"
        )
    low, high = weight.aminmax()  # NaN if there is one; unlike `isfinite` it needs no room
    if not (math.isfinite(low) and math.isfinite(high)):  # waits for the GPU
        raise InputError(f"expected finite weights, found inf or nan in {weight.dtype}")
    linear.nf4 = quantize(weight)
    linear.q4 = linear.few = None
    empty = torch.empty(out, width, dtype=weight.dtype, device="meta")
    linear.weight = nn.Parameter(empty, requires_grad=False)


def nf4_bytes(out: int, width: int) -> int:
    """Of a matrix (out, in): codes, a byte for each 64 weights, 4 for each 256 of those, and 4."""
    blocks = out * width // BLOCK
    return out * width // 2 + blocks + 4 * -(-blocks // RUN) + 4


def bytes_of(model: Model) -> dict[str, int]:
    """What the base holds, adapters and packed copies aside: matrices, embedding, head, norms (with
    biases). Sums to the whole."""
    held = {"matrices": 0, "embedding": model.embed_tokens.nbytes, "head": 0, "norms": 0}
    if model.lm_head is not None:
        held["head"] = model.lm_head.weight.nbytes
    for _, matrix in matrices(model):
        parts = [matrix.weight] if matrix.nf4 is None else matrix.nf4
        held["matrices"] += sum(part.nbytes for part in parts)
    held["norms"] = sum(p.nbytes for p in model.parameters() if p.ndim == 1)
    return held
