"""Packing: trees of token ids, laid end to end in micro-batches without padding.

A `PrefixTree` is one tree. Its prefix (instructions and exemplars) is computed once, and its
branches (a candidate and the reply about it) continue it, or each other:

    position   0 1 2 3 | 4 5 6 7 | 4 5 6    a prefix and two branches; reply_from 2 and 1
    row        0 1 2 3 | 4 5 6 7 | 8 9 10   11 rows, not 8 + 7 = 15
    segment    0       | 1       | 2        parents (-1, 0, 0)
    predicts           |   5 6   | 8 9      the row before a token of the reply predicts it

`build_tree` makes the tree of a pair from whole texts, by looking for what they begin with in
common: exemplars, under them each candidate, under the candidate a reply and a score line. With
SmolLM2's tokenizer a prompt has 844 tokens, 496 of them exemplars, and a reply 124: two replies and
the score lines of four candidates take 496 + 4 * 348 + 2 * 124 + 4 * 8 = 2,168 rows, not 5,344.

`pack` fills micro-batches with whole trees: the largest first, each into the first micro-batch that
has room (first-fit decreasing, at most 11/9 of the fewest possible, plus one). With a budget of 10,
trees of 3, 7, 5, 4 and 1 tokens come to (7, 3) and (5, 4, 1). The heaviest micro-batch is the
first, so that a budget beyond memory fails at once. A tree beyond the budget goes alone.

`batch` lays one micro-batch out for the model: flat ids, the `Layout`, which rows predict what, and
for contrast which rows predict the digits of which list of candidates. Where the first token of a
branch belongs to the reply, the last row of what it continues predicts it.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from nanopersrm.model.cache import Layout

SHARED_LEAST = 16  # a shorter common beginning is not worth a segment of its own


@dataclass(frozen=True)
class Branch:
    """One continuation of a tree's prefix, or of an earlier branch; or a text without a tree."""

    ids: tuple[int, ...]
    reply_from: int  # index of the first token of the reply; len(ids): there is none
    weight: float = 1.0  # of each token of the reply, or of the list that it is the chosen one of
    digit_at: int = -1  # index of the token before the digit, whose row predicts it; -1: none
    parent: int = -1  # the earlier branch that it continues; -1: the prefix
    number: int = -1  # by which the tokens of its reply are found again in a batch
    tail: int = 0  # so many tokens at the end of the reply ...
    tail_weight: float = 1.0  # ... weigh so many times as much

    @property
    def weights(self) -> list[float]:
        """Of each token of the reply."""
        n = len(self.ids) - self.reply_from
        heavy = min(self.tail, n)
        return [self.weight] * (n - heavy) + [self.weight * self.tail_weight] * heavy

    def __post_init__(self) -> None:
        n = len(self.ids)
        assert n, "a branch has at least one token"
        assert 0 <= self.reply_from <= n, f"a reply from {self.reply_from} of {n} tokens"
        assert -1 <= self.digit_at < n, f"a digit after token {self.digit_at} of {n}"


@dataclass(frozen=True)
class PrefixTree:
    """A prefix and the branches that continue it."""

    name: str  # of the pair
    prefix: tuple[int, ...]  # may be empty
    branches: tuple[Branch, ...]
    chosen: int = -1  # of the branches with a digit, which are a list, the writer's; -1: no list

    def __post_init__(self) -> None:
        n = sum(branch.digit_at >= 0 for branch in self.branches)
        assert self.branches, f"{self.name}: a tree has at least one branch"
        sound = self.chosen == -1 or 0 <= self.chosen < n
        assert sound, f"{self.name}: chosen {self.chosen} of {n} branches with a digit"
        for i, branch in enumerate(self.branches):
            assert -1 <= branch.parent < i, f"{self.name}: branch {i} continues {branch.parent}"
            predicted = self.prefix or branch.parent >= 0 or branch.reply_from
            assert predicted, f"{self.name}: nothing predicts the first id"

    @property
    def tokens(self) -> int:
        """Rows that it takes."""
        return len(self.prefix) + sum(len(branch.ids) for branch in self.branches)

    @property
    def list_weight(self) -> float:
        """Of its list of candidates: that of the chosen one; 0 without a list."""
        listed = [branch for branch in self.branches if branch.digit_at >= 0]
        return listed[self.chosen].weight if self.chosen >= 0 else 0.0


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
    list_weights: Tensor  # (number of lists,) fp32, the weight of the chosen branch


def build_tree(name: str, texts: Sequence[Branch], chosen: int = -1) -> PrefixTree:
    """The tree of these texts; `chosen` is one of `texts`, those with a digit being a list.

    What is shared ends where a reply begins, and every text keeps a branch of its own.
    """
    assert texts, f"{name}: a tree has at least one text"
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
    place = listed.index(chosen) if chosen >= 0 else -1
    first = branches[0]
    if sum(branch.parent < 0 for branch in branches) > 1 or owners[0] >= 0:
        return PrefixTree(name, (), tuple(branches), place)
    rest = tuple(replace(branch, parent=branch.parent - 1) for branch in branches[1:])
    return PrefixTree(name, first.ids, rest, place)


def build_trees(name: str, texts: Sequence[Branch], budget: int) -> list[PrefixTree]:
    """Trees of these texts with at most `budget` tokens each: halved until they have, or are one
    text. Each half computes what both begin with anew."""
    tree = build_tree(name, texts)
    if tree.tokens <= budget or len(texts) == 1:
        return [tree]
    half = len(texts) // 2
    return [
        *build_trees(name, texts[:half], budget),
        *build_trees(name, texts[half:], budget),
    ]


def total_weights(trees: Sequence[PrefixTree]) -> tuple[float, float]:
    """What a whole step divides by: the weight of its reply tokens, and that of its lists."""
    tokens = sum(sum(branch.weights) for tree in trees for branch in tree.branches)
    return tokens or 1.0, sum(tree.list_weight for tree in trees) or 1.0


def pack(trees: Sequence[PrefixTree], budget: int) -> list[list[PrefixTree]]:
    """Micro-batches of whole trees with at most `budget` tokens; a longer tree stands alone.

    The same trees in the same order give the same micro-batches.
    """
    assert budget > 0, f"a budget of {budget} tokens"
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
    ids: list[int] = []
    lengths: list[int] = []
    parents: list[int] = []
    rows: list[int] = []
    targets: list[int] = []
    weights: list[float] = []
    owners: list[int] = []
    digit_rows: list[int] = []
    lists: list[tuple[int, int, int]] = []
    list_weights: list[float] = []
    for tree in trees:
        if tree.chosen >= 0:
            count = sum(branch.digit_at >= 0 for branch in tree.branches)
            lists.append((len(digit_rows), count, tree.chosen))
            list_weights.append(tree.list_weight)
        root = -1
        if tree.prefix:
            root = len(lengths)
            ids += tree.prefix
            lengths.append(len(tree.prefix))
            parents.append(-1)
        ends = [len(ids)]  # of the prefix, and of each branch
        first_segment = len(lengths)  # of the branches
        for branch in tree.branches:
            start, first = len(ids), branch.reply_from
            ids += branch.ids
            lengths.append(len(branch.ids))
            parents.append(first_segment + branch.parent if branch.parent >= 0 else root)
            before = ends[branch.parent + 1] - 1  # the last row of what it continues
            # Row by row the token before.
            rows += [start + i - 1 if i else before for i in range(first, len(branch.ids))]
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
        list_weights=torch.tensor(list_weights, dtype=torch.float32, device=device),
    )
