"""Who continues whom: the layout of flat tokens, and the tree of cached keys and values.

The model knows no batch and no padding. It runs on N flat rows, and a `Layout` says which rows form
a segment and which segment continues which other:

    rows       0 1 2 3 4 | 5 6 | 7 8 9          starts  = (0, 5, 7, 10)
    segment    0: prompt | 1   | 2: replies     parents = (-1, 0, 0)
    position   0 1 2 3 4 | 5 6 | 5 6 7          the prompt is computed once

Training packs whole examples this way, in one forward. Sampling and judging do the same over
several forwards, with the earlier segments kept in a `KVCache`: a tree of levels, where each node
of a level continues one node of the level above. A judgement of three candidates with two replies
each:

    level 0   1 node    instructions and exemplars          (the prefix that all prompts share)
    level 1   3 nodes   question and candidate              parents (0, 0, 0)
    level 2   6 nodes   replies                             parents (0, 0, 1, 1, 2, 2)

A forward always extends the last level: segment s becomes the new tokens of node s. Keys of a level
lie in one slab (layers, nodes, K, capacity, E), so that a token for all replies is one write and
one product a level. Left out: paging. Lengths are bounded and groups are known.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor

from kernels.decode_attention import Visible, decode_attention, kernel_serves, visible_positions


@dataclass(frozen=True)
class Layout:
    """S segments laid end to end on N flat rows."""

    starts: tuple[int, ...]  # (S + 1,) segment s owns rows starts[s]:starts[s + 1]
    parents: tuple[int, ...]  # (S,) the earlier segment that s continues, -1 for none
    positions: Tensor  # (N,) int64 place of each row in its own text, counted from the root

    @staticmethod
    def of(lengths: Sequence[int], parents: Sequence[int] | None = None) -> "Layout":
        """Segments of these lengths (tokens), each continuing `parents[s]`, or all on their own."""
        parents = tuple(parents) if parents is not None else (-1,) * len(lengths)
        assert len(parents) == len(lengths), f"{len(lengths)} lengths but {len(parents)} parents"
        firsts: list[int] = []
        for s, parent in enumerate(parents):
            assert -1 <= parent < s, f"segment {s} must continue an earlier one, not {parent}"
            firsts.append(0 if parent < 0 else firsts[parent] + lengths[parent])
        return Layout((0, *accumulate(lengths)), parents, _positions(firsts, lengths))


def _positions(firsts: Sequence[int], lengths: Sequence[int]) -> Tensor:
    return torch.cat(
        [torch.arange(f, f + n) for f, n in zip(firsts, lengths, strict=True)] or [torch.arange(0)]
    )


class Level:
    """One level of the tree: n nodes, their parents in the level above, their keys and values."""

    def __init__(self, keys: Tensor, values: Tensor, parents: tuple[int, ...]):
        self.keys = keys  # (layers, n, K, capacity, E)
        self.values = values
        self.parents = parents  # (n,)
        self.lengths = [0] * len(parents)  # (n,) tokens held by each node


@dataclass(frozen=True)
class Step:
    """One forward over a cache: where its rows go and what they see. Made by `KVCache.step`."""

    layout: Layout
    views: list[tuple[Level, Visible]]  # levels read from the cache, and what the rows see of each
    fresh: bool  # own keys are not read from the cache: all are this forward's, causal in each node
    into: Level
    nodes: Tensor  # (N,) where each row is written: node ...
    slots: Tensor  # (N,) ... and position in its slab
    even: slice | None  # the slots of every node, when all get as many tokens at the same place

    def write(self, layer: int, k: Tensor, v: Tensor) -> None:
        """k, v (N, K, E) of this forward -> their places in the slab."""
        keys, values = self.into.keys[layer], self.into.values[layer]  # (n, K, capacity, E)
        if self.even is not None:  # one copy instead of a scatter
            n, K, _, E = keys.shape
            keys[:, :, self.even] = k.view(n, -1, K, E).transpose(1, 2)
            values[:, :, self.even] = v.view(n, -1, K, E).transpose(1, 2)
        else:
            keys[self.nodes, :, self.slots] = k
            values[self.nodes, :, self.slots] = v

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """q (N, H, E), k, v (N, K, E), already written -> what each row attends to (N, H, E)."""
        levels = [(level.keys[layer], level.values[layer], seen) for level, seen in self.views]
        return decode_attention(q, levels, (k, v, self.layout.starts) if self.fresh else None)


class KVCache:
    """The tree. `grow` adds a level, `step` plans a forward that extends the last one."""

    def __init__(self, layers: int, heads: int, kv_heads: int, width: int, like: Tensor):
        self.layers, self.kv_heads, self.width = layers, kv_heads, width
        self.group = heads // kv_heads
        self.like = like  # for its dtype and device
        self.levels: list[Level] = []

    @property
    def token_bytes(self) -> int:
        """Keys and values of one token."""
        return 2 * self.layers * self.kv_heads * self.width * self.like.element_size()

    def grow(self, parents: Sequence[int], capacity: int) -> Level:
        """A new last level of len(parents) empty nodes with room for `capacity` tokens each."""
        above = len(self.levels[-1].parents) if self.levels else 1
        assert all(0 <= p < above for p in parents), f"parents {parents} of {above} nodes"
        shape = (self.layers, len(parents), self.kv_heads, capacity, self.width)
        # Zeros, not garbage: a hidden position has weight 0, but 0 times a stray NaN is NaN.
        keys, values = self.like.new_zeros(shape), self.like.new_zeros(shape)
        self.levels.append(Level(keys, values, tuple(parents)))
        return self.levels[-1]

    def branch(self, root_length: int | None = None) -> "KVCache":
        """A tree that reads the roots of this one and grows on its own.

        root_length: of a single root only the first so many tokens.
        """
        heads, root = self.group * self.kv_heads, self.levels[0]
        lengths = list(root.lengths) if root_length is None else [root_length]
        assert root_length is None or root.lengths[0] >= root_length, f"{lengths} of {root.lengths}"
        tree = KVCache(self.layers, heads, self.kv_heads, self.width, self.like)
        tree.levels = [Level(root.keys, root.values, root.parents)]
        tree.levels[0].lengths = lengths
        return tree

    def room(self) -> int:
        """Tokens that every node of the last level can still take."""
        last = self.levels[-1]
        return last.keys.shape[3] - max(last.lengths)

    def depths(self) -> list[int]:
        """(n,) tokens from the root to the end of each node of the last level."""
        below = [0]
        for level in self.levels:
            below = [below[p] + n for p, n in zip(level.parents, level.lengths, strict=True)]
        return below

    def step(self, lengths: Sequence[int]) -> Step:
        """Plan a forward that appends lengths[i] tokens to node i of the last level."""
        last = self.levels[-1]
        n, before = len(last.parents), list(last.lengths)
        assert len(lengths) == n, f"{n} nodes but {len(lengths)} lengths"
        room = last.keys.shape[3]
        for node, (have, new) in enumerate(zip(before, lengths, strict=True)):
            assert have + new <= room, f"node {node}: {have} + {new} of {room} tokens"
        layout = Layout((0, *accumulate(lengths)), (-1,) * n, _positions(self.depths(), lengths))
        slots = [have + i for have, new in zip(before, lengths, strict=True) for i in range(new)]
        owners = [node for node, new in enumerate(lengths) for _ in range(new)]
        fresh = not any(before) and not kernel_serves(self.like)  # the kernel reads the slab
        few = max(lengths) <= 1
        views = [] if fresh else [self._view(last, owners, [slot + 1 for slot in slots], few)]
        above = owners
        for depth in range(len(self.levels) - 2, -1, -1):
            above = [self.levels[depth + 1].parents[i] for i in above]
            level = self.levels[depth]
            if any(level.lengths):
                ends = [level.lengths[i] for i in above]
                views.append(self._view(level, above, ends, few))
        last.lengths = [have + new for have, new in zip(before, lengths, strict=True)]
        same = len(set(lengths)) == 1 and len(set(before)) == 1
        return Step(
            layout=Layout(layout.starts, layout.parents, layout.positions.to(self.like.device)),
            views=views,
            fresh=fresh,
            into=last,
            nodes=self._ints(owners),
            slots=self._ints(slots),
            even=slice(before[0], before[0] + lengths[0]) if same else None,
        )

    def _ints(self, numbers: list[int]) -> Tensor:
        return torch.tensor(numbers, dtype=torch.long, device=self.like.device)

    def _view(
        self, level: Level, owners: list[int], ends: list[int], few: bool
    ) -> tuple[Level, Visible]:
        """Row i lies under node owners[i] of `level` and sees its first ends[i] >= 1 positions;
        `few`: no node of the last level gets more than one row."""
        n, room = level.keys.shape[1], level.keys.shape[3]
        last = level is self.levels[-1]
        return level, visible_positions(owners, ends, n, room, self.group, self.like, few, last)
