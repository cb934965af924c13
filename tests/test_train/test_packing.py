"""Packing: every tree once, the budget kept, trees read back from root to leaf, and nothing of a
reply shared. That losses and gradients are those of whole texts, test_objective.py shows."""

from itertools import pairwise

import pytest
from fixtures import CPU
from hypothesis import given, settings
from hypothesis import strategies as st

from nanopersrm.train.packing import (
    SHARED_LEAST,
    TAIL_WEIGHT,
    Batch,
    Branch,
    PrefixTree,
    batch,
    build_tree,
    build_trees,
    pack,
    total_weights,
)

STEM = 40  # ids of a stem, of which a text begins with a part


@given(st.lists(st.integers(1, 90)), st.integers(1, 80))
def test_every_tree_once_and_the_budget_kept(lengths, budget):
    some = [PrefixTree(str(i), (Branch((1,) * n, n),)) for i, n in enumerate(lengths)]
    packs = pack(some, budget)
    assert sorted(tree.name for part in packs for tree in part) == sorted(
        tree.name for tree in some
    )
    sums = [sum(tree.tokens for tree in part) for part in packs]
    assert sums == sorted(sums, reverse=True)
    for part, total in zip(packs, sums, strict=True):
        assert total <= budget or len(part) == 1
    least = [total for total in sums if total <= budget]  # no two of these could be one
    assert all(a + b > budget for a, b in pairwise(least))


def test_a_batch_by_hand():
    """The example of the file's docstring, and a list of two candidates."""
    replies = Branch((20, 21, 22, 23), 2, parent=0, tail=1), Branch((30, 31, 32), 0, parent=0)
    tree = PrefixTree("tree", (Branch((10, 11, 12, 13), 4), *replies))
    lines = Branch((40, 41), 2, digit_at=1), Branch((50, 51, 52), 3, digit_at=2)
    line = PrefixTree("list", lines, chosen=1)
    packed = batch([tree, line], CPU)
    assert packed.ids.tolist() == [10, 11, 12, 13, 20, 21, 22, 23, 30, 31, 32, 40, 41, 50, 51, 52]
    assert packed.layout.starts == (0, 4, 8, 11, 13, 16)
    assert packed.layout.parents == (-1, 0, 0, -1, -1)
    assert packed.layout.positions.tolist() == [0, 1, 2, 3, 4, 5, 6, 7, 4, 5, 6, 0, 1, 0, 1, 2]
    assert packed.rows.tolist() == [5, 6, 3, 8, 9]  # row 3, the parent's last, predicts 30
    assert packed.targets.tolist() == [22, 23, 30, 31, 32]
    assert packed.weights.tolist() == [1, TAIL_WEIGHT, 1, 1, 1]
    assert packed.digit_rows.tolist() == [12, 15]
    assert packed.lists == [(0, 2, 1)]
    assert packed.names == ("tree", "list")
    assert total_weights([tree, line]) == (4 + TAIL_WEIGHT, 1)


@st.composite
def families(draw) -> tuple[list[Branch], int]:
    """Texts with common beginnings of every length, whose marks may fall inside them."""
    texts: list[Branch] = []
    for i in range(draw(st.integers(1, 8))):
        if texts and draw(st.booleans()):
            start = draw(st.sampled_from(texts)).ids
            ids = start[: draw(st.integers(1, len(start)))]
        else:
            first = 100 * draw(st.integers(0, 2))
            ids = tuple(range(first, first + draw(st.integers(1, STEM))))
        ids += tuple(draw(st.lists(st.integers(900, 902), max_size=25)))
        reply_from = draw(st.integers(1, len(ids)))
        digit = draw(st.sampled_from([-1, len(ids) - 1, draw(st.integers(0, len(ids) - 1))]))
        tail = draw(st.integers(0, 3))
        texts.append(Branch(ids, reply_from, digit, number=7 * i, tail=tail))
    listed = [i for i, text in enumerate(texts) if text.digit_at >= 0]
    return texts, draw(st.sampled_from([-1, *listed]))


def read_up_to(packed: Batch, row: int) -> tuple[int, ...]:
    """All ids that a row sees, its own last: up its segment, then through the parents."""
    starts, parents = packed.layout.starts, packed.layout.parents
    segment = next(s for s in range(len(parents)) if starts[s] <= row < starts[s + 1])
    ids = packed.ids[starts[segment] : row + 1].tolist()
    while (segment := parents[segment]) >= 0:
        ids = packed.ids[starts[segment] : starts[segment + 1]].tolist() + ids
    assert int(packed.layout.positions[row]) == len(ids) - 1
    return tuple(ids)


@settings(deadline=None, max_examples=150)
@given(families())
def test_a_tree_has_the_losses_of_the_texts(drawn):
    """Each target with what was read before it, its weight and its text; each digit as well."""
    texts, chosen = drawn
    tree = build_tree("tree", texts, chosen)
    packed = batch([tree], CPU)
    columns = (packed.rows, packed.targets, packed.weights, packed.owners)
    targets = [
        (read_up_to(packed, row), *rest)
        for row, *rest in zip(*(column.tolist() for column in columns), strict=True)
    ]
    assert sorted(targets) == sorted(
        (text.ids[:i], text.ids[i], text.weights[i - text.reply_from], text.number)
        for text in texts
        for i in range(text.reply_from, len(text.ids))
    )
    digits = [read_up_to(packed, row) for row in packed.digit_rows.tolist()]
    listed = [text.ids[: text.digit_at + 1] for text in texts if text.digit_at >= 0]
    assert sorted(digits) == sorted(listed)
    assert len(packed.ids) == tree.tokens <= sum(len(text.ids) for text in texts)
    if chosen >= 0:
        ((first, count, place),) = packed.lists
        assert (first, count) == (0, len(listed))
        assert digits[place] == texts[chosen].ids[: texts[chosen].digit_at + 1]


@settings(deadline=None, max_examples=150)
@given(families())
def test_what_is_shared_is_long_enough_and_no_reply(drawn):
    texts, chosen = drawn
    tree = build_tree("tree", texts, chosen)
    children = [branch.parent for branch in tree.branches]
    inner = set(children) - {-1}
    assert len(tree.branches) - len(inner) == len(texts)  # each has a branch of its own
    for i in inner:
        branch = tree.branches[i]
        assert children.count(i) >= 2
        assert len(branch.ids) >= SHARED_LEAST
        assert (branch.reply_from, branch.digit_at) == (len(branch.ids), -1)


@pytest.mark.parametrize(
    ("budget", "sizes"),
    [
        (130, [130]),  # 50 + 8 · 10
        (129, [90, 90]),  # four replies each
        (69, [60] * 8),
        (5, [60] * 8),  # what cannot be cut stands alone
    ],
)
def test_a_tree_beyond_the_budget_is_halved(budget, sizes):
    prompt = tuple(range(50))
    texts = [Branch((*prompt, *range(1000 * n, 1000 * n + 10)), 50, number=n) for n in range(1, 9)]
    halves = build_trees("halved", texts, budget)
    assert [tree.tokens for tree in halves] == sizes
    numbers = [branch.number for tree in halves for branch in tree.branches if branch.number >= 0]
    assert numbers == list(range(1, 9))  # in order
