"""Blocks that forget what they computed, and compute it again in their backward: less memory.

    h = forgetful(block, h, turn, layout, offload)      as block(h), with the same gradients

Of all that a block computes on the way, only its input h is kept, one (N, D) tensor: about 1/20,
for a third more work (Chen et al., arXiv 1604.06174). With `offload` even that waits in the host's
memory. What remains is the one block whose backward runs, and of that most is its MLP: F columns
of gate, of up and of their product, and two gradients as wide. In a 7B base these are 189 KB a row
of 242.

But the rows of an MLP know nothing of each other, so they can come in tiles:

    first pass, nothing kept       y = mlp(x) tile by tile                             (N, D)
    backward, attention again      x, and of the MLP nothing: nobody reads y now
    its gradient                   tile by tile: forward, backward, forget, dx           (N, D)

No row is computed oftener than before. 1,024 rows at a time take 194 MB there, however many there
are: of 4,096 rows of Qwen2.5-7B the block at work falls from 1.05 GB to 0.50. What it costs: a
matrix in 4 bits is unpacked once a tile instead of once, about 5 % of a tile's product on a card of
the 12 GB class (by arithmetic: 136 MB written at 360 GB/s, against 139 GFLOP at 20 TFLOPS). On a
CPU it costs nothing: 1.00 of the time, the median of 5 pairs of steps of four blocks of SmolLM2's
sizes (4,096 rows, bf16, one thread).

What we left out: attention in tiles, which keeps little.
"""

from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import save_on_cpu
from torch.utils.checkpoint import checkpoint

from nanopersrm.model.cache import Layout

TILE = 1024  # rows of an MLP that are at work at a time, at most


def forgetful(
    block: Any, h: Tensor, turn: tuple[Tensor, Tensor], layout: Layout, offload: bool
) -> Tensor:
    """h (N, D) -> the residual stream after the `Block`; only h is kept for the backward."""

    def run(h: Tensor) -> Tensor:
        x, h = block.attended(h, None, turn, layout, None, 0)
        return _in_tiles(block.mlp, x) + h

    h = h if h.requires_grad else h.detach().requires_grad_()  # of the first: the base is frozen
    keep = save_on_cpu(pin_memory=h.is_cuda) if offload else nullcontext()
    with keep:
        return checkpoint(run, h, use_reentrant=True)


def tiles(rows: int) -> int:
    """In how many tiles of about equal size so many rows come."""
    return -(-rows // TILE)


def _in_tiles(mlp: nn.Module, x: Tensor) -> Tensor:
    """x (N, D) -> mlp(x) (N, D); where gradients are wanted, zeros with the gradients of mlp(x)."""
    n = tiles(len(x))
    if n == 1:
        return mlp(x)
    if torch.is_grad_enabled():  # the second pass
        return _Again.apply(x, mlp)
    y = torch.empty_like(x)
    for part, out in zip(x.chunk(n), y.chunk(n), strict=True):
        out.copy_(mlp(part))
    return y


class _Again(torch.autograd.Function):
    """The MLP in the second pass: all of it happens in the backward. Keeps x alone."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, mlp: nn.Module) -> Tensor:
        ctx.save_for_backward(x)
        ctx.mlp = mlp
        ctx.random = torch.get_rng_state()
        ctx.random_cuda = torch.cuda.get_rng_state(x.device) if x.is_cuda else None
        return x.new_zeros(1).expand(x.shape)  # whose values nobody reads

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        (x,), (g,) = ctx.saved_tensors, gradients
        dx, n = torch.empty_like(x), tiles(len(x))
        with torch.random.fork_rng([x.device] if x.is_cuda else []):
            torch.set_rng_state(ctx.random)  # as the first pass had it here: the same dropout
            if x.is_cuda:
                torch.cuda.set_rng_state(ctx.random_cuda, x.device)
            for part, out, into in zip(x.chunk(n), g.chunk(n), dx.chunk(n), strict=True):
                part = part.detach().requires_grad_()
                with torch.enable_grad():
                    y = ctx.mlp(part)
                torch.autograd.backward(y, out)  # what the adapters get is added to theirs
                assert part.grad is not None
                into.copy_(part.grad)
                del y, part  # before the next tile
        return dx, None
