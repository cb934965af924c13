"""Packing: trees of token ids, laid end to end in micro-batches without padding.

`build_tree` finds what texts begin with in common and keeps it once. A segment is a run of ids that
continues an earlier one, or begins a text:

    position   0 1 2 3 | 4 5 6 7 | 4 5 6    exemplars, and two candidates with replies
    row        0 1 2 3 | 4 5 6 7 | 8 9 10   11 rows, not 8 + 7 = 15
    segment    0       | 1       | 2        parents (-1, 0, 0)

A text has *targets*: the places where something is drawn. The row before a target predicts it, and
texts that share that row may each have a target there: two replies with the same first three lines
compute them once. All else in a text is context.

`pack` fills micro-batches with whole trees: the largest first, each into the first micro-batch that
has room (first-fit decreasing, at most 11/9 of the fewest possible, plus one). With a budget of 10,
trees of 3, 7, 5, 4 and 1 tokens come to (7, 3) and (5, 4, 1). The heaviest micro-batch is the
first, so that a budget beyond memory fails at once. A tree beyond the budget goes alone.

`batch` lays one micro-batch out for the model: flat ids, the `Layout`, and of each target its row,
what could be drawn there, and what should be.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from nanopersrm.model.cache import Layout

SHARED_LEAST = 8  # a shorter common beginning is not worth a segment of its own


@dataclass(frozen=True)
class Target:
    """A token of a text that is drawn."""

    at: int  # its index among the ids of the text, or their number: the one after the last
    allowed: tuple[int, ...]  # the ids that could be drawn; empty: any of the vocabulary
    probs: tuple[float, ...] = ()  # how often each of these should be; empty: the one that was
    id: int = -1  # the one that was
    weight: float = 1.0


@dataclass(frozen=True)
class Text:
    """Ids, and what of them is drawn."""

    ids: tuple[int, ...]
    targets: tuple[Target, ...] = ()
    number: int = -1  # which reply it is, for `Batch.owners`
    listed: bool = False  # its last target is the digit of a candidate in a list for contrast


def written(ids: Sequence[int], first: int, number: int = -1) -> Text:
    """A text whose tokens from index `first` >= 1 on are drawn from the whole vocabulary."""
    assert first >= 1, "nothing predicts the first id"
    targets = [Target(i, (), id=ids[i]) for i in range(first, len(ids))]
    return Text(tuple(ids[:-1]), tuple(targets), number)


@dataclass(frozen=True)
class Segment:
    """A run of ids that some texts have in common."""

    ids: tuple[int, ...]
    parent: int  # the earlier segment that it continues; -1: it begins a text
    depth: int  # ids before it


@dataclass(frozen=True)
class PrefixTree:
    """Texts by what they begin with in common."""

    name: str  # of the pair
    segments: tuple[Segment, ...]
    texts: tuple[Text, ...]
    ends: tuple[int, ...]  # the last segment of each text
    chosen: int = -1  # of the texts that are listed, the writer's; -1: no list

    def __post_init__(self) -> None:
        listed = sum(text.listed for text in self.texts)
        assert self.chosen in range(-1, listed), f"{self.name}: chosen {self.chosen} of {listed}"

    @property
    def tokens(self) -> int:
        """Rows that it takes."""
        return sum(len(segment.ids) for segment in self.segments)


@dataclass
class Batch:
    """One micro-batch: N rows, and M targets out of C ids or out of the whole vocabulary."""

    ids: Tensor  # (N,) int64
    layout: Layout
    rows: Tensor  # (M,) int64 rows that predict a target, texts one after another
    drawn: Tensor  # (M,) int64 the ids that were drawn there
    allowed: Tensor  # (M, C) bool; none: the whole vocabulary
    probs: Tensor  # (M, C) fp32
    weights: Tensor  # (M,) fp32
    owners: Tensor  # (M,) int64 number of the text that each target is of
    choices: Tensor  # (C,) int64 ids
    names: tuple[str, ...]  # of its trees
    digits: Tensor  # (n,) int64 which targets are the digits of listed texts
    lists: list[tuple[int, int, int]]  # (first, count, chosen) of each list, in `digits`


def build_tree(name: str, texts: Sequence[Text], chosen: int = -1) -> PrefixTree:
    """The tree of these texts; `chosen`: of those that are listed, the writer's."""
    segments: list[Segment] = []
    ends = [-1] * len(texts)

    def add(group: list[int], depth: int, parent: int) -> None:
        """The texts of a group share their first `depth` ids, which end with segment `parent`."""
        while group:
            first = texts[group[0]].ids
            head = first[depth : depth + SHARED_LEAST]
            siblings = [t for t in group if texts[t].ids[depth : depth + SHARED_LEAST] == head]
            end, most = depth + len(head), min(len(texts[t].ids) for t in siblings)
            while end < most and len({texts[t].ids[end] for t in siblings}) == 1:
                end += 1
            segments.append(Segment(first[depth:end], parent, depth))
            place = len(segments) - 1
            for t in siblings:
                ends[t] = place
            add([t for t in siblings if len(texts[t].ids) > end], end, place)
            group = [t for t in group if t not in siblings]

    add(list(range(len(texts))), 0, -1)
    return PrefixTree(name, tuple(segments), tuple(texts), tuple(ends), chosen)


def build_trees(name: str, texts: Sequence[Text], budget: int) -> list[PrefixTree]:
    """Trees of these texts with at most `budget` tokens each: halved until they have, or are one
    text. Each half computes what both begin with anew."""
    tree = build_tree(name, texts)
    if tree.tokens <= budget or len(texts) == 1:
        return [tree]
    half = len(texts) // 2
    return build_trees(name, texts[:half], budget) + build_trees(name, texts[half:], budget)


def total_weights(trees: Sequence[PrefixTree]) -> tuple[float, int]:
    """What a whole step divides by: the weight of its targets, and the number of its lists."""
    targets = sum(target.weight for tree in trees for text in tree.texts for target in text.targets)
    return targets or 1.0, sum(tree.chosen >= 0 for tree in trees) or 1


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


def batch(trees: Sequence[PrefixTree], choices: Sequence[int], device: torch.device) -> Batch:
    """Lay the trees of a micro-batch end to end. choices: all ids that targets allow."""
    column = {i: k for k, i in enumerate(choices)}
    ids, lengths, parents, rows, drawn, owners, digits = (list[int]() for _ in range(7))
    weights: list[float] = []
    places: list[tuple[int, int]] = []  # (target, column) that is allowed
    probs: list[float] = []  # of each
    lists: list[tuple[int, int, int]] = []
    for tree in trees:
        if tree.chosen >= 0:
            count = sum(text.listed for text in tree.texts)
            lists.append((len(digits), count, tree.chosen))
        root = len(lengths)  # the segment of the tree's first
        starts: list[int] = []  # the first row of each segment
        for segment in tree.segments:
            starts.append(len(ids))
            ids += segment.ids
            lengths.append(len(segment.ids))
            parents.append(root + segment.parent if segment.parent >= 0 else -1)
        for text, end in zip(tree.texts, tree.ends, strict=True):
            at = end
            of_text = []
            for target in reversed(text.targets):  # from the end towards the root
                while tree.segments[at].depth > target.at - 1:
                    at = tree.segments[at].parent
                of_text.append(starts[at] + target.at - 1 - tree.segments[at].depth)
            rows += reversed(of_text)
            for target in text.targets:
                chances = target.probs or [float(i == target.id) for i in target.allowed]
                places += [(len(drawn), column[i]) for i in target.allowed]
                probs += chances
                drawn.append(target.id)
                weights.append(target.weight)
                owners.append(text.number)
            if text.listed:
                digits.append(len(drawn) - 1)
    layout = Layout.of(lengths, parents)
    allowed = torch.zeros(len(drawn), len(choices), dtype=torch.bool)
    table = torch.zeros(len(drawn), len(choices))
    if places:
        cells = tuple(torch.tensor(axis) for axis in zip(*places, strict=True))
        allowed[cells], table[cells] = True, torch.tensor(probs)

    def int64(numbers: Sequence[int]) -> Tensor:
        return torch.tensor(numbers, dtype=torch.int64, device=device)

    return Batch(
        ids=int64(ids),
        layout=Layout(layout.starts, layout.parents, layout.positions.to(device)),
        rows=int64(rows),
        drawn=int64(drawn),
        allowed=allowed.to(device),
        probs=table.to(device),
        weights=torch.tensor(weights, dtype=torch.float32, device=device),
        owners=int64(owners),
        choices=int64(choices),
        names=tuple(tree.name for tree in trees),
        digits=int64(digits),
        lists=lists,
    )
