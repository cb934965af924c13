"""Packing: every tree once, the budget kept, common beginnings computed once, and each target
predicted by the row that has read all before it. That losses and gradients are those of whole
texts, test_objective.py shows."""

from itertools import pairwise

import pytest
from fixtures import CPU
from hypothesis import given, settings
from hypothesis import strategies as st

from nanopersrm.train.packing import (
    SHARED_LEAST,
    Batch,
    PrefixTree,
    Segment,
    Target,
    Text,
    batch,
    build_tree,
    build_trees,
    pack,
    total_weights,
    written,
)

STEM = 40  # ids of a stem, of which a text begins with a part


@given(st.lists(st.integers(1, 90)), st.integers(1, 80))
def test_every_tree_once_and_the_budget_kept(lengths, budget):
    some = [build_tree(str(i), [Text((1,) * n)]) for i, n in enumerate(lengths)]
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
    head, one, two = (10, 11, 12, 13), (20, 21, 22, 23), (30, 31, 32)
    segments = Segment(head, -1, 0), Segment(one, 0, 4), Segment(two, 0, 4)
    soft = Target(4, (20, 30), (0.25, 0.75), 20, 0.5)  # row 3, the last of the parent, predicts it
    first = Text(head + one, (soft, Target(8, (42, 30), id=42)), 5)  # the second: after the last
    second = Text(head + two, (Target(4, (20, 30), id=30), Target(6, (), id=32)), 7)
    tree = PrefixTree("tree", segments, (first, second), (1, 2))
    digits = [Target(n, (41, 42), (p, 1 - p), weight=4.0) for n, p in ((2, 0.1), (3, 1.0))]
    texts = [
        Text(ids, (digit,), listed=True)
        for ids, digit in zip(((40, 41), (50, 51, 52)), digits, strict=True)
    ]
    line = build_tree("list", texts, chosen=1)
    packed = batch([tree, line], (20, 30, 41, 42), CPU)
    assert packed.ids.tolist() == [*head, *one, *two, 40, 41, 50, 51, 52]
    assert packed.layout.starts == (0, 4, 8, 11, 13, 16)
    assert packed.layout.parents == (-1, 0, 0, -1, -1)
    assert packed.layout.positions.tolist() == [0, 1, 2, 3, 4, 5, 6, 7, 4, 5, 6, 0, 1, 0, 1, 2]
    assert packed.rows.tolist() == [3, 7, 3, 9, 12, 15]  # both texts have a target at row 3
    assert packed.drawn.tolist() == [20, 42, 30, 32, -1, -1]
    allowed = ["1100", "0101", "1100", "0000", "0011", "0011"]
    assert packed.allowed.int().tolist() == [[int(bit) for bit in row] for row in allowed]
    probs = [0.25, 0.75, 0, 0], [0, 0, 0, 1], [0, 1, 0, 0], [0] * 4, [0, 0, 0.1, 0.9], [0, 0, 1, 0]
    assert packed.probs.tolist() == [pytest.approx(row) for row in probs]
    assert packed.weights.tolist() == [0.5, 1, 1, 1, 4, 4]
    assert packed.owners.tolist() == [5, 5, 7, 7, -1, -1]
    assert packed.digits.tolist() == [4, 5]
    assert (packed.lists, packed.names) == ([(0, 2, 1)], ("tree", "list"))
    assert total_weights([tree, line]) == (11.5, 1)
    assert total_weights([]) == (1.0, 1)
    assert written((5, 6, 7), 1, 3) == Text((5, 6), (Target(1, (), id=6), Target(2, (), id=7)), 3)
    with pytest.raises(AssertionError, match="chosen 2 of 2"):
        build_tree("list", texts, chosen=2)


def test_what_texts_begin_with_is_computed_once():
    """20 + (10 + 14 + 12) + 12: 68 rows, not 150."""
    prompt, line, other = tuple(range(20)), tuple(range(100, 110)), tuple(range(200, 212))
    ids = [
        prompt + line + tuple(range(300, 309)) + tuple(range(5)),
        prompt + line + tuple(range(400, 408)) + tuple(range(4)),
        prompt + other,
        prompt + other,  # twice the same
    ]
    targets = [(Target(20, (n,), id=n), Target(len(ids[n]), (7,), id=7)) for n in range(4)]
    texts = [
        Text(some, of, number) for number, (some, of) in enumerate(zip(ids, targets, strict=True))
    ]
    tree = build_tree("tree", texts)
    assert [segment.parent for segment in tree.segments] == [-1, 0, 1, 1, 0]
    assert tree.ends == (2, 3, 4, 4)
    assert tree.tokens == 20 + 10 + 14 + 12 + 12 < sum(map(len, ids)) == 150
    packed = batch([tree], range(8), CPU)
    assert packed.rows.tolist() == [19, 43, 19, 55, 19, 67, 19, 67]
    assert packed.owners.tolist() == [0, 0, 1, 1, 2, 2, 3, 3]  # identical texts keep theirs
    assert packed.drawn.tolist() == [0, 7, 1, 7, 2, 7, 3, 7]


@st.composite
def families(draw) -> list[Text]:
    """Texts with common beginnings of every length, and targets anywhere in them."""
    texts: list[Text] = []
    for i in range(draw(st.integers(1, 8))):
        if texts and draw(st.booleans()):
            start = draw(st.sampled_from(texts)).ids
            ids = start[: draw(st.integers(1, len(start)))]
        else:
            first = 100 * draw(st.integers(0, 2))
            ids = tuple(range(first, first + draw(st.integers(1, STEM))))
        ids += tuple(draw(st.lists(st.integers(900, 902), max_size=25)))
        places = sorted(draw(st.sets(st.integers(1, len(ids)), max_size=6)))
        targets = [Target(at, (), id=(*ids, 77)[at], weight=at / 2) for at in places]
        texts.append(Text(ids, tuple(targets), 7 * i, listed=bool(places) and draw(st.booleans())))
    return texts


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
@given(families(), families())
def test_a_tree_has_the_targets_of_its_texts(first, second):
    """In order, each with what was read before it, its weight and its text; each digit as well."""
    trees, texts = [build_tree("one", first), build_tree("two", second)], first + second
    packed = batch(trees, (), CPU)
    columns = (packed.rows, packed.drawn, packed.weights, packed.owners)
    assert [
        (read_up_to(packed, row), *rest)
        for row, *rest in zip(*(column.tolist() for column in columns), strict=True)
    ] == [(text.ids[: t.at], t.id, t.weight, text.number) for text in texts for t in text.targets]
    listed = [text.ids[: text.targets[-1].at] for text in texts if text.listed]
    digits = [read_up_to(packed, row) for row in packed.rows[packed.digits].tolist()]
    assert digits == listed
    assert len(packed.ids) == sum(tree.tokens for tree in trees) <= sum(len(t.ids) for t in texts)


@settings(deadline=None, max_examples=150)
@given(families())
def test_all_that_is_long_enough_is_shared(texts):
    tree = build_tree("tree", texts)
    for i, segment in enumerate(tree.segments):
        heads = [other.ids[:SHARED_LEAST] for other in tree.segments if other.parent == i]
        assert len({*heads}) == len(heads)
        assert len(heads) != 1 or i in tree.ends  # else they would be one segment
        assert not heads or len(segment.ids) >= SHARED_LEAST


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
    texts = [Text((*prompt, *range(1000 * n, 1000 * n + 10)), number=n) for n in range(1, 9)]
    halves = build_trees("halved", texts, budget)
    assert [tree.tokens for tree in halves] == sizes
    assert [text.number for tree in halves for text in tree.texts] == list(range(1, 9))  # in order
