"""Attention without padding: packed segments, and rows that look back on a tree of prefixes.

Softmax attention of one query over keys k[j] and values v[j], with s[j] = q·k[j] / sqrt(E):

    out = Σ_j P[j] v[j]      P[j] = exp(s[j] - lse)      lse = log Σ_j exp(s[j])

The sums run over *all* visible keys, but nothing forces us to visit them in one go. Split the keys
in two parts and do each alone; out and lse of the whole follow from those of the parts:

    lse = log(exp(lse₁) + exp(lse₂))    out = exp(lse₁ - lse) out₁ + exp(lse₂ - lse) out₂

(Milakov & Gimelshein, arXiv 1805.02867; used for shared prefixes by Hydragen, arXiv 2402.05099.)
Worked example: lse₁ = 0 and lse₂ = log 3 give weights 1/4 and 3/4.

That split is the whole trick of this file. G replies of one prompt have the prompt's keys in
common. Read apart, each reply's rows stream them again; here the rows of all replies become rows of
*one* product with the prompt's keys, without a mask, and each reply's own keys are the second part.
Grouped heads are more of the same: the H/K query heads that share a key head are further rows of
its product.

Backward, with g = dL/dout of a row. v[j] enters out with weight P[j], and s[j] moves every weight:
dP[i]/ds[j] = P[i] ((i = j) - P[j]). Hence

    dL/dv[j] = P[j] g        dL/dP[j] = g·v[j]
    dL/ds[j] = P[j] (g·v[j] - Σ_i P[i] g·v[i]) = P[j] (g·v[j] - δ)        δ = g·out
    dL/dq = Σ_j dL/ds[j] k[j] / sqrt(E)        dL/dk[j] = dL/ds[j] q / sqrt(E)

where those of v[j] and k[j] are summed over the rows that see j. Look at what a key needs to know
of the others: lse, inside P, and δ. Both belong to the row. So the backward of a *part* is that of
attention over the part's keys alone, given lse and out of the *whole* row; the parts' dL/dq are
added, and the prompt's dL/dk and dL/dv are sums over all replies' rows, in one product too. (Ring
attention passes its blocks around by the same identity, Liu et al., arXiv 2310.01889.)
Worked example: scores 0 and log 3, values 8 and 16, g = 1. P = (1/4, 3/4), out = δ = 14, so
dL/ds = (1/4 · (8 - 14), 3/4 · (16 - 14)) = (-1.5, 1.5); either key can be done without the other.

Who serves what:

                        CPU                    CUDA, 16 bits, sm_80 up     CUDA otherwise
    segments            `_InParts`: parts      flash-attn if installed,    PyTorch's attention
      (gradients)       by PyTorch's flash     else PyTorch's attention      (`segments_reference`)
    decode_attention    `level`, `merge`:      Triton kernel of            `level`, `merge`:
      (cached, none)    PyTorch's flash          `decode_attention.py`       scores in fp32

PyTorch's CPU kernel does the backward faster and more exactly in fp32, so it gets fp32.
Shapes: q (N, H, E), k and v (N, K, E) on N flat rows; a level of the tree holds keys and values (n,
K, T, E) of n nodes. What we left out: the split with gradients on a GPU. There flash-attn gets the
ancestors' keys copied in front of each segment's own; reading them once takes its private calls.
"""

from collections.abc import Sequence
from functools import lru_cache
from itertools import accumulate, pairwise

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

try:
    from flash_attn import flash_attn_varlen_func
except ImportError:  # not installed, or built for another PyTorch
    flash_attn_varlen_func = None

# PyTorch's flash attention for the CPU, with the log-sum-exp that its public form keeps to itself
_flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_flash_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward

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


def _dense(*tensors: Tensor) -> list[Tensor]:
    """Copies of those whose last dimension is not contiguous: `_flash` would misread them."""
    return [x if x.stride(-1) == 1 else x.contiguous() for x in tensors]


def partial(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Partial:
    """`partial_reference`, or PyTorch's flash kernel for the CPU."""
    if q.device.type == "cpu":
        return _flash(*_dense(q, k, v), attn_mask=mask)
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


def padded(
    under: list[list[int]], ends: Sequence[int], group: int, like: Tensor
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """What `level` asks for: `rows`, `places` and `mask`, each None where it is not needed.

    Node i has the rows under[i], and row r sees ends[r] positions.
    """
    M, T = max(map(len, under)), max(ends)
    rows = places = mask = None
    flat = [row for members in under for row in members]
    if len(flat) < M * len(under) or flat != sorted(flat):
        place = {row: i * M + j for i, members in enumerate(under) for j, row in enumerate(members)}
        under = [members + (members[-1:] or [0]) * (M - len(members)) for members in under]
        rows = torch.tensor(under, device=like.device)
        places = torch.tensor([place[row] for row in range(len(ends))], device=like.device)
    if min(ends) < T:
        limits = torch.tensor(
            [[ends[row] for row in members] for members in under], device=like.device
        )
        if bool((limits == limits[:, :1]).all()):
            limits = limits[:, :1]  # every row of a node sees as much of it
        else:
            limits = limits.repeat_interleave(group, 1)  # (n, M·H/K)
        hidden = torch.arange(T, device=like.device) >= limits[..., None]
        zeros = torch.zeros(hidden.shape, dtype=like.dtype, device=like.device)
        mask = zeros.masked_fill_(hidden, float("-inf"))[:, None]
    return rows, places, mask


def segments_partial(q: Tensor, k: Tensor, v: Tensor, starts: Sequence[int]) -> Partial:
    """`segments` without parents and without gradient, with its log-sum-exp for `merge`."""
    outs, sums = [], []
    q, k, v = _dense(q, k, v)
    for begin, end in pairwise(starts):
        if begin == end:
            continue
        rows = slice(begin, end)
        queries, keys, values = (x[rows].transpose(0, 1)[None] for x in (q, k, v))  # (1, H, M, E)
        if q.device.type == "cpu":
            out, lse = _flash(queries, keys, values, is_causal=True)
        else:
            M, group = end - begin, q.shape[1] // k.shape[1]
            keys, values = (x.repeat_interleave(group, 1) for x in (keys, values))
            hidden = torch.full((M, M), float("-inf"), device=q.device).triu(1)
            out, lse = partial_reference(queries, keys, values, hidden[None, None])
        outs.append(out[0].transpose(0, 1))
        sums.append(lse[0].transpose(0, 1))
    return torch.cat(outs), torch.cat(sums)


def _gather(
    k: Tensor, v: Tensor, starts: Sequence[int], parents: Sequence[int]
) -> list[tuple[list[Tensor], list[Tensor]]]:
    """For each segment: keys and values (length, K, E) of its ancestors, root first, and own."""
    lengths = [end - begin for begin, end in pairwise(starts)]
    keys, values = k.split(lengths), v.split(lengths)  # one backward for all uses of a segment
    chains: list[list[int]] = []
    for s, parent in enumerate(parents):
        chains.append([*(chains[parent] if parent >= 0 else []), s])
    return [([keys[s] for s in chain], [values[s] for s in chain]) for chain in chains]


def segments_reference(
    q: Tensor, k: Tensor, v: Tensor, starts: Sequence[int], parents: Sequence[int]
) -> Tensor:
    """`segments` by PyTorch's own attention, one segment at a time over keys laid end to end."""
    outs = []
    chains = _gather(k, v, starts, parents)
    for (begin, end), chain in zip(pairwise(starts), chains, strict=True):
        if begin == end:
            continue
        queries = q[begin:end].transpose(0, 1)[None]  # (1, H, M, E)
        keys, values = (torch.cat(x).transpose(0, 1)[None] for x in chain)  # (1, K, T, E)
        M, T = queries.shape[2], keys.shape[2]
        mask = None
        if M < T:  # is_causal is aligned to the top left: a suffix needs its mask spelled out
            mask = torch.ones(M, T, dtype=torch.bool, device=q.device).tril(T - M)
        out = F.scaled_dot_product_attention(
            queries, keys, values, attn_mask=mask, is_causal=mask is None, enable_gqa=True
        )
        outs.append(out[0].transpose(0, 1))
    return torch.cat(outs)


@lru_cache(maxsize=16)
def _bounds(starts: tuple[int, ...], ends: tuple[int, ...], device: torch.device) -> Tensor:
    """(2, S + 1) int32 on the device: the same for every layer, so it is sent there once."""
    return torch.tensor([starts, ends], dtype=torch.int32, device=device)


def _segments_flash_attn(
    q: Tensor, k: Tensor, v: Tensor, starts: Sequence[int], parents: Sequence[int]
) -> Tensor:
    """`segments` by one call of flash-attn, which aligns its causal mask to the bottom right."""
    lengths = [end - begin for begin, end in pairwise(starts)]
    depths: list[int] = []  # keys that each segment sees
    for length, parent in zip(lengths, parents, strict=True):
        depths.append(length + (depths[parent] if parent >= 0 else 0))
    if any(parent >= 0 for parent in parents):
        gathered = _gather(k, v, starts, parents)
        k = torch.cat([piece for keys, _ in gathered for piece in keys])  # (sum of depths, K, E)
        v = torch.cat([piece for _, values in gathered for piece in values])
    bounds = _bounds(tuple(starts), tuple(accumulate(depths, initial=0)), q.device)
    return flash_attn_varlen_func(
        q, k, v, bounds[0], bounds[1], max(lengths), max(depths), causal=True
    )


def _shared(starts: Sequence[int], parents: Sequence[int]) -> list[tuple[slice, slice | Tensor]]:
    """Each segment that others continue: its rows, and the rows of all its descendants."""
    below: dict[int, list[tuple[int, int]]] = {}
    for s, parent in enumerate(parents):
        while parent >= 0:
            below.setdefault(parent, []).append((starts[s], starts[s + 1]))
            parent = parents[parent]
    shared: list[tuple[slice, slice | Tensor]] = []
    for s, spans in below.items():
        rows: slice | Tensor = slice(spans[0][0], spans[-1][1])
        if any(a[1] != b[0] for a, b in pairwise(spans)):  # others stand between
            rows = torch.cat([torch.arange(*span) for span in spans])
        if starts[s] < starts[s + 1] and any(begin < end for begin, end in spans):
            shared.append((slice(starts[s], starts[s + 1]), rows))
    return shared


def _flat_backward(
    g: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, causal: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of a part, g, q, out (M, H, E), lse (M, H) of the whole rows, k, v (T, K, E)."""
    g, q, k, v, out, lse = (x.transpose(0, 1)[None] for x in (g, q, k, v, out, lse))
    gradients = _flash_backward(g, q, k, v, out, lse, 0.0, causal)
    return tuple(x[0].transpose(0, 1) for x in gradients)


class _InParts(torch.autograd.Function):
    """`segments` in parts, on the CPU. Saves q, k, v, out and lse; no weight is ever stored."""

    @staticmethod
    def forward(ctx, q, k, v, starts, parents):
        shared = _shared(starts, parents)
        q, k, v = _dense(q, k, v)
        out, lse = segments_partial(q, k, v, starts)
        if shared:
            out = out.to(torch.promote_types(q.dtype, torch.float32))
        for keys, rows in shared:
            other, other_lse = _flash(
                *(x.transpose(0, 1)[None] for x in (q[rows], k[keys], v[keys]))
            )
            other, other_lse = (x[0].transpose(0, 1) for x in (other, other_lse))  # (M, H, ...)
            share = torch.sigmoid(lse[rows] - other_lse)[..., None]
            out[rows] = torch.lerp(other.to(out.dtype), out[rows], share)
            lse[rows] = torch.logaddexp(lse[rows], other_lse)
        out = out.to(q.dtype)
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.starts, ctx.shared = starts, shared
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, g):
        dtype, wide = g.dtype, torch.promote_types(g.dtype, torch.float32)
        g, q, k, v, out, lse = (x.to(wide) for x in _dense(g, *ctx.saved_tensors))
        dq, dk, dv = (torch.empty_like(x) for x in (q, k, v))
        for begin, end in pairwise(ctx.starts):
            rows = slice(begin, end)
            if begin < end:
                dq[rows], dk[rows], dv[rows] = _flat_backward(
                    *(x[rows] for x in (g, q, k, v, out, lse)), causal=True
                )
        for keys, rows in ctx.shared:
            dq_part, dk_part, dv_part = _flat_backward(
                g[rows], q[rows], k[keys], v[keys], out[rows], lse[rows], causal=False
            )
            dq[rows] += dq_part
            dk[keys] += dk_part
            dv[keys] += dv_part
        return dq.to(dtype), dk.to(dtype), dv.to(dtype), None, None


def _flash_attn_serves(x: Tensor) -> bool:
    """flash-attn is installed and made for this card and type."""
    return (
        flash_attn_varlen_func is not None
        and x.is_cuda
        and x.dtype in (torch.float16, torch.bfloat16)
        and torch.cuda.get_device_capability(x.device) >= (8, 0)
    )


def segments(
    q: Tensor, k: Tensor, v: Tensor, starts: Sequence[int], parents: Sequence[int]
) -> Tensor:
    """Packed causal attention; segment s continues segment parents[s] (-1: none).

    q (N, H, E), k, v (N, K, E) -> (N, H, E). A row sees the whole chain of its ancestors and its
    own segment up to itself: bottom-right-aligned causal attention over [ancestors, own].
    Differentiable; gradients of all segments that share an ancestor add up in it.
    """
    assert len(q) == starts[-1], f"{len(q)} rows for segments that end at {starts[-1]}"
    if len(q) == 0:
        return q
    if q.device.type == "cpu":
        return _InParts.apply(q, k, v, starts, parents)
    form = _segments_flash_attn if _flash_attn_serves(q) else segments_reference
    return form(q, k, v, starts, parents)
