"""Attention without padding: packed segments, and rows that look back on a tree of cached prefixes.

Softmax attention of one query over keys k[j] and values v[j], with s[j] = q·k[j] / sqrt(E):

    out = Σ_j exp(s[j] - lse) v[j]      lse = log Σ_j exp(s[j])

The sums run over *all* visible keys, but nothing forces us to visit them in one go. Split the keys
in two parts and do each alone; out and lse of the whole follow from those of the parts:

    lse = log(exp(lse₁) + exp(lse₂))    out = exp(lse₁ - lse) out₁ + exp(lse₂ - lse) out₂

(Milakov & Gimelshein, arXiv 1805.02867; used for shared prefixes by Hydragen, arXiv 2402.05099.)
Worked example: lse₁ = 0 and lse₂ = log 3 give weights 1/4 and 3/4.

That split is the whole trick of this file. G replies of one prompt have the prompt's keys in
common. Read apart, each reply's query streams them again; here the G queries of a node become G
rows of *one* product with the node's keys, and the reply's own keys are the second part. Grouped
heads are more of the same: the H/K query heads that share a key head are further rows of its
product. Measured for the 30 layers of SmolLM2, prompt 384, 64 own keys, in milliseconds (`python -m
kernels.bench attention`: bf16, torch 2.13, 2 cores): 32 replies 13.5, against 27.9 by PyTorch's
attention over 32 full copies; 8 replies 8.6 against 9.5. For one reply two parts cost 5.8, one
whole 1.6: there is nothing to share, and `nanopersrm/sampler.py` then lets it continue in its
prompt's own slab.

Shapes: q (N, H, E), k and v (N, K, E) on N flat rows; a level of the tree holds keys and values (n,
K, T, E) of n nodes. What we left out: the gradient of the split form. With gradients `segments`
uses PyTorch's own differentiable attention on concatenated keys, which is the specification too.
Off the CPU, `partial_reference` holds all scores of a part in fp32: correct, not fast.

Where to read next: `nanopersrm/cache.py`, which keeps the tree.
"""

from collections.abc import Sequence
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

# out (N, H, E) and its log-sum-exp (N, H) in fp32, over some of the keys
Partial = tuple[Tensor, Tensor]


def partial_reference(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Partial:
    """The formula in fp32 over q (n, K, M, E), k and v (n, K, T, E); `mask` is added to the scores.

    Returns out (n, K, M, E) in q's type and lse (n, K, M) fp32.
    """
    scores = q.float() @ k.float().transpose(-1, -2) * q.shape[-1] ** -0.5  # (n, K, M, T)
    if mask is not None:
        scores = scores + mask.float()
    lse = scores.logsumexp(-1)  # (n, K, M)
    return ((scores - lse[..., None]).exp() @ v.float()).to(q.dtype), lse


def partial(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Partial:
    """`partial_reference`, or PyTorch's flash kernel for the CPU, which returns the lse we need."""
    if q.device.type == "cpu":
        return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, attn_mask=mask)
    return partial_reference(q, k, v, mask)


def merge(parts: Sequence[Partial]) -> Tensor:
    """Partial results over different keys -> out (N, H, E) over all of them, part by part."""
    out, lse = parts[0]
    for i, (other, other_lse) in enumerate(parts[1:], start=2):
        share = torch.sigmoid(lse - other_lse)[..., None]  # exp(lse) / (exp(lse) + exp(other_lse))
        out = torch.lerp(other.float(), out.float(), share)
        if i < len(parts):
            lse = torch.logaddexp(lse, other_lse)
    return out.to(parts[0][0].dtype)


def level(
    q: Tensor,
    keys: Tensor,
    values: Tensor,
    rows: Tensor | None = None,
    places: Tensor | None = None,
    mask: Tensor | None = None,
) -> Partial:
    """Every row of q over the cached node it descends from, all nodes of one tree level at once.

    q (N, H, E); keys, values (n, K, T, E). `rows` (n, M) int64 names the rows of each node, padded
    with any row, and `places` (N,) where to find each row in it; without them node i owns rows i·M
    to (i+1)·M, M = N / n. `mask` (n, 1, 1 or M·H/K, T) is added to the scores: -inf hides.
    """
    (n, K, _, E), (N, H, _) = keys.shape, q.shape
    group = H // K
    M = N // n if rows is None else rows.shape[1]
    tiles = q if rows is None else q[rows.flatten()]  # (n·M, H, E)
    tiles = tiles.view(n, M, K, group, E).transpose(1, 2).reshape(n, K, M * group, E)
    out, lse = partial(tiles, keys, values, mask)
    out = out.reshape(n, K, M, group, E).transpose(1, 2).reshape(n * M, H, E)
    lse = lse.reshape(n, K, M, group).transpose(1, 2).reshape(n * M, H)
    return (out, lse) if places is None else (out[places], lse[places])


def segments(
    q: Tensor, k: Tensor, v: Tensor, starts: Sequence[int], parents: Sequence[int]
) -> Tensor:
    """Packed causal attention; segment s continues segment parents[s] (-1: none).

    q (N, H, E), k, v (N, K, E) -> (N, H, E). A row sees the whole chain of its ancestors and its
    own segment up to itself: bottom-right-aligned causal attention over [ancestors, own].
    Differentiable; gradients of all segments that share an ancestor add up in it.
    """
    outs = []
    for s, parent in enumerate(parents):
        own = slice(starts[s], starts[s + 1])
        spans = [own]
        while parent >= 0:
            spans.insert(0, slice(starts[parent], starts[parent + 1]))
            parent = parents[parent]
        seen = torch.cat([k[span] for span in spans]).transpose(0, 1)[None]  # (1, K, T, E)
        told = torch.cat([v[span] for span in spans]).transpose(0, 1)[None]
        asks = q[own].transpose(0, 1)[None]  # (1, H, M, E)
        M, T = asks.shape[2], seen.shape[2]
        mask = None
        if (
            M < T
        ):  # PyTorch's is_causal is aligned to the top left: a suffix needs its mask spelled out
            mask = torch.ones(M, T, dtype=torch.bool, device=q.device).tril(T - M)
        out = F.scaled_dot_product_attention(
            asks, seen, told, attn_mask=mask, is_causal=mask is None, enable_gqa=True
        )
        outs.append(out[0].transpose(0, 1))
    return torch.cat(outs) if len(outs) > 1 else outs[0]


def segments_partial(q: Tensor, k: Tensor, v: Tensor, starts: Sequence[int]) -> Partial:
    """`segments` without parents and without gradient, with its log-sum-exp for `merge`."""
    outs, sums = [], []
    group = q.shape[1] // k.shape[1]
    for begin, end in pairwise(starts):
        if begin == end:
            continue
        asks = q[begin:end].transpose(0, 1)[None]  # (1, H, M, E)
        seen = k[begin:end].repeat_interleave(group, 1).transpose(0, 1)[None]
        told = v[begin:end].repeat_interleave(group, 1).transpose(0, 1)[None]
        if q.device.type == "cpu":
            out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
                asks, seen, told, is_causal=True
            )
        else:
            M = end - begin
            hidden = torch.full((M, M), float("-inf"), device=q.device).triu(1)
            out, lse = partial_reference(asks, seen, told, hidden[None, None])
        outs.append(out[0].transpose(0, 1))
        sums.append(lse[0].transpose(0, 1))
    return torch.cat(outs), torch.cat(sums)
