"""Packing: trees of token ids, laid end to end in micro-batches without padding.

A `PrefixTree` is a list of branches, each of which continues an earlier one or begins a text:

    position   0 1 2 3 | 4 5 6 7 | 4 5 6    exemplars, and two candidates with replies
    row        0 1 2 3 | 4 5 6 7 | 8 9 10   11 rows, not 8 + 7 = 15
    segment    0       | 1       | 2        parents (-1, 0, 0), reply_from (4, 2, 1)
    predicts           |   5 6   | 8 9      the row before a token of the reply predicts it

`build_tree` makes the tree of a pair from whole texts, by what they begin with in common: the
exemplars, under them each candidate, under the candidate a reply and a score line.

`pack` fills micro-batches with whole trees: the largest first, each into the first micro-batch that
has room (first-fit decreasing, at most 11/9 of the fewest possible, plus one). With a budget of 10,
trees of 3, 7, 5, 4 and 1 tokens come to (7, 3) and (5, 4, 1). The heaviest micro-batch is the
first, so that a budget beyond memory fails at once. A tree beyond the budget goes alone.

`batch` lays one micro-batch out for the model: flat ids, the `Layout`, which rows predict what, and
for contrast which rows predict the digits of which list of candidates.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from nanopersrm.model.cache import Layout

SHARED_LEAST = 16  # a shorter common beginning is not worth a segment of its own
TAIL_WEIGHT = 4.0  # of a token in the tail of a reply, in imitation


@dataclass(frozen=True)
class Branch:
    """One text, or what continues an earlier branch of its tree."""

    ids: tuple[int, ...]
    reply_from: int  # index of the first token of the reply; len(ids): there is none
    digit_at: int = -1  # index of the token before the digit, whose row predicts it; -1: none
    parent: int = -1  # the earlier branch that it continues; -1: it begins a text
    number: int = -1  # which reply its tokens are of, for `Batch.owners`
    tail: int = 0  # so many tokens at the end of the reply weigh TAIL_WEIGHT

    @property
    def weights(self) -> list[float]:
        """Of each token of the reply."""
        n = len(self.ids) - self.reply_from
        heavy = min(self.tail, n)
        return [1.0] * (n - heavy) + [TAIL_WEIGHT] * heavy


@dataclass(frozen=True)
class PrefixTree:
    """Branches, each after the one that it continues."""

    name: str  # of the pair
    branches: tuple[Branch, ...]
    chosen: int = -1  # of the branches with a digit, which are a list, the writer's; -1: no list

    def __post_init__(self) -> None:
        digits = sum(branch.digit_at >= 0 for branch in self.branches)
        assert self.chosen in range(-1, digits), f"{self.name}: chosen {self.chosen} of {digits}"
        for i, branch in enumerate(self.branches):
            assert branch.parent < i, f"{self.name}: branch {i} continues {branch.parent}"
            assert branch.digit_at < len(branch.ids) >= branch.reply_from, f"{self.name}: {branch}"
            assert branch.parent >= 0 or branch.reply_from, f"{self.name}: nothing predicts an id"

    @property
    def tokens(self) -> int:
        """Rows that it takes."""
        return sum(len(branch.ids) for branch in self.branches)


@dataclass
class Batch:
    """One micro-batch: N rows, M of which predict a token of a reply, and n a digit."""

    ids: Tensor  # (N,) int64
    layout: Layout
    rows: Tensor  # (M,) int64 rows that predict ...
    targets: Tensor  # (M,) int64 ... these ids
    weights: Tensor  # (M,) fp32
    owners: Tensor  # (M,) int64 number of the branch that each target is of
    names: tuple[str, ...]  # of its trees
    digit_rows: Tensor  # (n,) int64
    lists: list[tuple[int, int, int]]  # (first, count, chosen) of each list, in digit_rows


def build_tree(name: str, texts: Sequence[Branch], chosen: int = -1) -> PrefixTree:
    """The tree of these texts; `chosen` is one of `texts`, those with a digit being a list.

    What is shared ends where a reply begins, and every text keeps a branch of its own.
    """
    branches: list[Branch] = []
    owners: list[int] = []  # the text of each branch; -1: of several
    private_from = [  # the first id that is never shared
        min([text.reply_from, len(text.ids) - 1] + [text.digit_at] * (text.digit_at >= 0))
        for text in texts
    ]

    def add(group: list[int], depth: int, parent: int) -> None:
        """The texts of a group share their first `depth` ids, which end with branch `parent`."""
        while group:
            key = texts[group[0]].ids[depth : depth + SHARED_LEAST]
            siblings = [
                t
                for t in group
                if private_from[t] - depth >= SHARED_LEAST
                and texts[t].ids[depth : depth + SHARED_LEAST] == key
            ]
            if len(siblings) > 1:
                end = depth + SHARED_LEAST
                most = min(private_from[t] for t in siblings)
                while end < most and len({texts[t].ids[end] for t in siblings}) == 1:
                    end += 1
                ids = texts[siblings[0]].ids[depth:end]
                branches.append(Branch(ids, len(ids), parent=parent))
                owners.append(-1)
                add(siblings, end, len(branches) - 1)
            else:
                siblings = group[:1]
                text = texts[siblings[0]]
                digit_at = text.digit_at - depth if text.digit_at >= 0 else -1
                ids, reply_from = text.ids[depth:], text.reply_from - depth
                branches.append(
                    replace(text, ids=ids, reply_from=reply_from, digit_at=digit_at, parent=parent)
                )
                owners.append(siblings[0])
            group = [t for t in group if t not in siblings]

    add(list(range(len(texts))), 0, -1)
    listed = [t for t in owners if t >= 0 and texts[t].digit_at >= 0]  # in the branches' order
    return PrefixTree(name, tuple(branches), listed.index(chosen) if chosen >= 0 else -1)


def build_trees(name: str, texts: Sequence[Branch], budget: int) -> list[PrefixTree]:
    """Trees of these texts with at most `budget` tokens each: halved until they have, or are one
    text. Each half computes what both begin with anew."""
    tree = build_tree(name, texts)
    if tree.tokens <= budget or len(texts) == 1:
        return [tree]
    half = len(texts) // 2
    return build_trees(name, texts[:half], budget) + build_trees(name, texts[half:], budget)


def total_weights(trees: Sequence[PrefixTree]) -> tuple[float, int]:
    """What a whole step divides by: the weight of its reply tokens, and the number of its lists."""
    tokens = sum(sum(branch.weights) for tree in trees for branch in tree.branches)
    return tokens or 1.0, sum(tree.chosen >= 0 for tree in trees) or 1


def pack(trees: Sequence[PrefixTree], budget: int) -> list[list[PrefixTree]]:
    """Micro-batches of whole trees with at most `budget` tokens; a longer tree stands alone."""
    packs: list[list[PrefixTree]] = []
    room: list[int] = []
    for tree in sorted(trees, key=lambda tree: -tree.tokens):  # equal ones keep their order
        place = next((i for i, free in enumerate(room) if tree.tokens <= free), len(packs))
        if place == len(packs):
            packs.append([])
            room.append(budget)
        packs[place].append(tree)
        room[place] -= tree.tokens
    heaviest = sorted(range(len(packs)), key=lambda i: room[i])
    return [packs[i] for i in heaviest]


def batch(trees: Sequence[PrefixTree], device: torch.device) -> Batch:
    """Lay the trees of a micro-batch end to end."""
    ids, lengths, parents, rows, targets, owners, digit_rows = (list[int]() for _ in range(7))
    weights: list[float] = []
    lists: list[tuple[int, int, int]] = []
    for tree in trees:
        if tree.chosen >= 0:
            count = sum(branch.digit_at >= 0 for branch in tree.branches)
            lists.append((len(digit_rows), count, tree.chosen))
        root = len(lengths)  # the segment of the tree's first branch
        ends: list[int] = []  # of each branch
        for branch in tree.branches:
            start, first = len(ids), branch.reply_from
            # Row by row the token before; a first token is predicted by the last of the parent.
            before = ends[branch.parent] - 1 if branch.parent >= 0 else -1
            rows += [start + i - 1 if i else before for i in range(first, len(branch.ids))]
            ids += branch.ids
            lengths.append(len(branch.ids))
            parents.append(root + branch.parent if branch.parent >= 0 else -1)
            ends.append(len(ids))
            targets += branch.ids[first:]
            weights += branch.weights
            owners += [branch.number] * (len(branch.ids) - first)
            if branch.digit_at >= 0:
                digit_rows.append(start + branch.digit_at)
    layout = Layout.of(lengths, parents)

    def int64(numbers: list[int]) -> Tensor:
        return torch.tensor(numbers, dtype=torch.int64, device=device)

    return Batch(
        ids=int64(ids),
        layout=Layout(layout.starts, layout.parents, layout.positions.to(device)),
        rows=int64(rows),
        targets=int64(targets),
        weights=torch.tensor(weights, dtype=torch.float32, device=device),
        owners=int64(owners),
        names=tuple(tree.name for tree in trees),
        digit_rows=int64(digit_rows),
        lists=lists,
    )
