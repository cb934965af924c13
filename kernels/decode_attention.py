"""Attention over a tree of cached keys and values: what many rows share is read once for all.

A decode step asks with one token of each of N replies. A reply's keys lie on the nodes above it,
one a level: [what all prompts share, its prompt, its own tokens]. Eight replies of one prompt ask
eight times for the same keys, and each of the H/K query heads that share a key head asks again. The
cost of decoding is reading keys and values, so the thing to do is to read a node once, for all rows
under it:

    scores (rows · H/K, T) = q (rows · H/K, E) · keysᵀ (E, T)        one product on tensor cores

Qwen2.5-7B (H 28, K 4, E 128), a prompt of 2,048, 8 replies, bf16, one layer: read by every row and
every query head, 8 · 28 · 2,048 · 128 · 4 bytes = 235 MB; by every row, 34 MB; once, 4.2 MB. The
8 · 7 = 56 lines of the product (a line is a row and a query head) fill two tiles of 32; they run
side by side, and the second finds the keys in the card's cache.

One program owns a node, a key head, a tile of lines and a *split* of the node's positions: whole,
this node would keep 8 programs busy, in splits 128. It walks its positions in blocks and keeps for
each line the greatest score m so far, l = Σ exp(s - m) and acc = Σ exp(s - m) v; when a block has a
greater m', both are first multiplied by exp(m - m') (the online softmax of Milakov & Gimelshein,
arXiv 1805.02867). It leaves out = acc / l and lse = m + log l in fp32, and a second kernel merges
all splits of all levels: out = Σ exp(lse_i - lse) out_i. Worked example: lse 0 and log 3 give the
weights 1/4 and 3/4.

How far a row sees is a number, its end, not a mask: row i sees positions 0 to end - 1 of its node.
That serves new segments too, whose row i ends after itself: prefill is the same kernel, and reads
back the keys that were just written.

What we chose. Neighbours must not move a row's result, so nothing about its arithmetic depends on
them: splits go by the slab's capacity (`split_of`), the tile by the kind of level (`tile_of`),
blocks and splits are added in order, and one that a row does not see changes no bit of it. In a
prefill the rows fill the card, so a node is one split. The partial results cost 2 · 4 · splits · N
· H · E bytes, mostly in the card's cache: 3.7 MB for 8 replies and 16 splits, beside 16.8 MB of
keys and values at 8,192 positions. What we left out: paging, and the gradient, since training has
`attention.segments`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor

from kernels import attention
from kernels._dispatch import jit, on_triton, tl, triton

LEAST_SPLIT, MOST_SPLITS = 128, 16  # positions of a split; splits of a node
LINES = 32  # of the tile of a node that many rows share; at 64 registers spill


@dataclass(frozen=True)
class Visible:
    """What the rows of one forward see of the n nodes of one level; the same for every layer."""

    seen: int  # T: positions 0:T of the slab are read
    most: int  # M: most rows under a node
    # of the PyTorch form
    rows: Tensor | None = None  # (n, M) rows under each node, padded; None: node i, i·M to (i+1)·M
    places: Tensor | None = None  # (N,) where row i stands in `rows`, flattened
    mask: Tensor | None = None  # (n, 1, 1 or M·H/K, T) added to the scores: -inf hides
    # of the kernel
    order: Tensor | None = None  # (N or more,) int32 the rows sorted by node
    begins: Tensor | None = None  # (n + 1 or more,) int32 node i has order[begins[i]:begins[i + 1]]
    ends: Tensor | None = None  # (N or more,) int32 row i sees positions 0:ends[i] of its node
    split: int = 0  # positions a program
    tile: int = 0  # lines a program


# keys, values (n, K, capacity, E) of a level, and what the rows see of it
Level = tuple[Tensor, Tensor, Visible]


def kernel_serves(x: Tensor) -> bool:
    """Triton, on 16-bit tensors (of fp32 tensor cores would drop 13 bits) or interpreted."""
    return on_triton(x) and (not x.is_cuda or x.element_size() == 2)


def split_of(capacity: int, decoding: bool) -> int:
    """Positions of a split: a function of the slab's capacity, never of what runs beside a row.

    Decoding: a power of two, 128 or more, of which at most 16 fill the slab: 128 up to 2,048
    positions, 512 for 8,192. Otherwise the whole slab.
    """
    if not decoding:
        return -(-capacity // LEAST_SPLIT) * LEAST_SPLIT
    return max(LEAST_SPLIT, triton.next_power_of_2(-(-capacity // MOST_SPLITS)))


def tile_of(group: int, alone: bool) -> int:
    """Lines of a tile: 32, or 16 where every node has one row and its H/K heads fit into 16."""
    return 16 if alone and group <= 16 else LINES


def visible_positions(
    owners: Sequence[int],
    ends: Sequence[int],
    n: int,
    capacity: int,
    group: int,
    like: Tensor,
    decoding: bool,
    last: bool,
) -> Visible:
    """Row i lies under node owners[i] of n and sees its first ends[i] >= 1 positions.

    `group` is H/K, `like` has the type and device of the keys. `decoding`: no node of the last
    level gets more than one row; `last`: this is the last level.
    """
    assert min(ends) > 0, "a node without tokens above a row"
    seen = max(ends)
    assert seen <= capacity, f"{seen} positions of {capacity}"
    under: list[list[int]] = [[] for _ in range(n)]
    for row, owner in enumerate(owners):
        under[owner].append(row)
    most = max(map(len, under))
    if not kernel_serves(like):
        return Visible(seen, most, *attention.padded(under, ends, group, like))
    flat = [row for members in under for row in members]
    bounds = list(accumulate(map(len, under), initial=0))
    numbers = torch.zeros(3, -(-max(len(flat), n + 1) // 4) * 4, dtype=torch.int32)
    for row, values in zip(numbers, (flat, bounds, ends), strict=True):
        row[: len(values)] = torch.tensor(values)
    # One copy to the card; rows of whole 16 bytes, so that one compilation serves them all.
    order, begins, stops = numbers.to(like.device)
    split, tile = split_of(capacity, decoding), tile_of(group, decoding and last)
    return Visible(seen, most, order=order, begins=begins, ends=stops, split=split, tile=tile)


@jit
def _partial_kernel(
    Q, Keys, Values, Order, Begins, Ends, Out, Lse,
    q_row, q_head, node_stride, head_stride, position_stride,
    lines_stride, split, scale,
    K: tl.constexpr, GROUP: tl.constexpr, E: tl.constexpr,
    WIDTH: tl.constexpr, TILE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One program: a tile of a node's lines, one key head, one split of the node's positions.

    Line i of a node is its row i // GROUP and query head i % GROUP of those that share the key
    head. The tile of q, acc, m and l stay in registers; keys and values stream by.
    """
    tile, node = tl.program_id(0), tl.program_id(1)
    head, part = tl.program_id(2) % K, tl.program_id(2) // K
    begin = tl.load(Begins + node)
    lines = tile * TILE + tl.arange(0, TILE)
    mine = lines < (tl.load(Begins + node + 1) - begin) * GROUP
    row = tl.load(Order + begin + lines // GROUP, mask=mine, other=0).to(tl.int64)
    end = tl.load(Ends + row, mask=mine, other=0)
    heads = head * GROUP + lines % GROUP
    wide = tl.arange(0, WIDTH)
    inside = wide < E
    q = tl.load(
        Q + (row * q_row + heads * q_head)[:, None] + wide[None, :],
        mask=mine[:, None] & inside[None, :], other=0.0,
    )  # fmt: skip
    slab = tl.cast(node, tl.int64) * node_stride + tl.cast(head, tl.int64) * head_stride
    Keys += slab
    Values += slab

    m = tl.full((TILE,), float("-inf"), tl.float32)  # in base 2: exp2 is the card's instruction
    total = tl.zeros((TILE,), tl.float32)
    acc = tl.zeros((TILE, WIDTH), tl.float32)
    low = part * split
    high = tl.minimum(low + split, tl.max(end))
    for start in range(low, high, BLOCK):
        at = start + tl.arange(0, BLOCK)
        offsets = at[:, None] * position_stride + wide[None, :]
        known = (at < high)[:, None] & inside[None, :]
        keys = tl.load(Keys + offsets, mask=known, other=0.0)  # (BLOCK, WIDTH)
        scores = tl.dot(q, tl.trans(keys), input_precision="ieee") * (scale * 1.4426950408889634)
        scores = tl.where(at[None, :] < end[:, None], scores, float("-inf"))
        greatest = tl.maximum(m, tl.max(scores, 1))
        base = tl.where(greatest == float("-inf"), 0.0, greatest)  # a line that has seen nothing
        shrink = tl.exp2(m - base)
        weights = tl.exp2(scores - base[:, None])
        values = tl.load(Values + offsets, mask=known, other=0.0)
        total = total * shrink + tl.sum(weights, 1)
        acc = tl.dot(
            weights.to(values.dtype), values, acc * shrink[:, None], input_precision="ieee"
        )
        m = greatest
    seen = total != 0  # also of NaN, which must not vanish with its split
    total = tl.where(seen, total, 1.0)
    lse = tl.where(seen, (m + tl.log2(total)) * 0.6931471805599453, float("-inf"))
    line = tl.cast(part, tl.int64) * lines_stride + row * (K * GROUP) + heads
    tl.store(Lse + line, lse, mask=mine)
    tl.store(
        Out + line[:, None] * E + wide[None, :],
        acc * (1.0 / total)[:, None],
        mask=(mine & seen)[:, None] & inside[None, :],
    )


@jit
def _merge_kernel(
    Parts, Lse, Out, S, lines_stride, lines,
    E: tl.constexpr, WIDTH: tl.constexpr, LINES: tl.constexpr,
):  # fmt: skip
    """One program: a few lines of out, summed over their S parts in order."""
    line = tl.program_id(0).to(tl.int64) * LINES + tl.arange(0, LINES)
    mine = line < lines
    wide = tl.arange(0, WIDTH)
    inside = wide < E
    m = tl.full((LINES,), float("-inf"), tl.float32)
    total = tl.zeros((LINES,), tl.float32)
    acc = tl.zeros((LINES, WIDTH), tl.float32)
    for part in range(S):
        at = tl.cast(part, tl.int64) * lines_stride + line
        lse = tl.load(Lse + at, mask=mine, other=float("-inf"))
        seen = lse != float("-inf")  # otherwise its out was never written
        out = tl.load(
            Parts + at[:, None] * E + wide[None, :],
            mask=seen[:, None] & inside[None, :], other=0.0,
        )  # fmt: skip
        greatest = tl.maximum(m, lse)
        base = tl.where(greatest == float("-inf"), 0.0, greatest)
        shrink, share = tl.exp(m - base), tl.exp(lse - base)
        total = total * shrink + share
        acc = acc * shrink[:, None] + share[:, None] * out
        m = greatest
    tl.store(
        Out + line[:, None] * E + wide[None, :],
        acc * (1.0 / tl.where(mine, total, 1.0))[:, None],
        mask=mine[:, None] & inside[None, :],
    )


def _partial_shape(E: int) -> tuple[int, int, int, int]:
    """Width of a tile (a power of two), positions a block, warps and blocks in flight.

    A block of keys is 8 KB: 64 positions of heads of 128 take 194 registers on sm_80, 32 take 167.
    """
    width = max(triton.next_power_of_2(E), 16)
    return width, max(4096 // width, 16) if width > 64 else 64, 4, 2


def _merge_shape(E: int) -> tuple[int, int, int]:
    """Width, lines and warps of a program that merges: 4 numbers a thread, one load of 128 bits."""
    width = max(triton.next_power_of_2(E), 16)
    return width, max(128 // width, 1), 1


def _partials(q: Tensor, levels: Sequence[Level]) -> tuple[Tensor, Tensor]:
    """q (N, H, E) -> out (S, N·H, E) and lse (S, N·H) fp32 of every split of every level, with up
    to 15 lines more that nobody writes."""
    N, H, E = q.shape
    lines = -(-N * H // 16) * 16
    assert E <= 256, f"expected heads of at most 256, got {E}"
    q = q if q.stride(-1) == 1 else q.contiguous()
    splits = [-(-visible.seen // visible.split) for _, _, visible in levels]
    out = torch.empty(sum(splits), lines, E, dtype=torch.float32, device=q.device)
    lse = torch.empty(sum(splits), lines, dtype=torch.float32, device=q.device)
    first = 0
    for (keys, values, visible), parts in zip(levels, splits, strict=True):
        n, K = keys.shape[:2]
        form = (n, K, keys.shape[2], E)
        assert keys.shape == values.shape == form, f"{keys.shape}, {values.shape}, heads of {E}"
        assert keys.stride() == values.stride(), f"{keys.stride()}, {values.stride()}"
        assert keys.stride(3) == 1, f"keys with strides {keys.stride()}"
        assert keys.dtype == values.dtype == q.dtype, f"{q.dtype} rows, {keys.dtype} keys"
        assert max(n, K * parts) < 65_536, f"{n} nodes, {K} heads of {parts} splits"
        tiles = -(-visible.most * (H // K) // visible.tile)
        width, block, warps, stages = _partial_shape(E)
        _partial_kernel[(tiles, n, K * parts)](
            q, keys, values, visible.order, visible.begins, visible.ends, out[first:], lse[first:],
            q.stride(0), q.stride(1), *keys.stride()[:3], lines, visible.split, E**-0.5,
            K=K, GROUP=H // K, E=E, WIDTH=width, TILE=visible.tile, BLOCK=block,
            num_warps=warps, num_stages=stages, enable_fp_fusion=True,
        )  # fmt: skip
        first += parts
    return out, lse


def _decode(q: Tensor, levels: Sequence[Level]) -> Tensor:
    """`decode_attention` by the two kernels."""
    N, H, E = q.shape
    result = torch.empty(N, H, E, dtype=q.dtype, device=q.device)
    if N:
        out, lse = _partials(q, levels)
        width, lines, warps = _merge_shape(E)
        _merge_kernel[(-(-N * H // lines),)](
            out, lse, result, len(lse), lse.stride(0), N * H,
            E=E, WIDTH=width, LINES=lines, num_warps=warps, enable_fp_fusion=True,
        )  # fmt: skip
    return result


def decode_attention_reference(
    q: Tensor, levels: Sequence[Level], new: tuple[Tensor, Tensor, Sequence[int]] | None = None
) -> Tensor:
    """`decode_attention` by PyTorch, with `Visible` made for it."""
    parts = [
        attention.level(
            q,
            keys[:, :, : visible.seen],
            values[:, :, : visible.seen],
            visible.rows,
            visible.places,
            visible.mask,
        )
        for keys, values, visible in levels
    ]
    if new is not None:
        parts.append(attention.segments_partial(q, *new))
    return attention.merge(parts)


def decode_attention(
    q: Tensor, levels: Sequence[Level], new: tuple[Tensor, Tensor, Sequence[int]] | None = None
) -> Tensor:
    """q (N, H, E) over what each row sees of each level -> (N, H, E). No gradient.

    `new` (k, v, starts) adds causal segments that no level holds: k, v (N, K, E) packed as q is.
    The kernel never needs it: there the keys of this forward are read back from their slab.
    """
    if kernel_serves(q):
        assert new is None, "the kernel reads new keys from their level"
        return _decode(q, levels)
    return decode_attention_reference(q, levels, new)
