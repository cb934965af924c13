"""Trees of texts: read back from root to leaf, nothing of a reply shared, and never more rows."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nanopersrm.train.packing import (
    SHARED_LEAST,
    Batch,
    Branch,
    Bundle,
    Text,
    batch,
    fullest,
    grow,
    grow_within,
    weights_of,
)

CPU = torch.device("cpu")
STEM = 40  # ids of a stem, of which a text begins with a part


@st.composite
def families(draw) -> tuple[list[Text], int]:
    """Texts with common beginnings of every length, whose marks may fall inside them."""
    texts: list[Text] = []
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
        texts.append(Text(ids, reply_from, 1.0 + i, digit))
    listed = [i for i, text in enumerate(texts) if text.digit_at >= 0]
    return texts, draw(st.sampled_from([-1, *listed]))


def alone(text: Text) -> Bundle:
    """A text as a bundle that shares nothing."""
    return Bundle("alone", (), (Branch(text.ids, text.reply_from, text.weight, text.digit_at),))


def story(found: Batch, row: int) -> tuple[int, ...]:
    """All ids that a row sees, its own last: up its segment, then through the parents."""
    starts, parents = found.layout.starts, found.layout.parents
    segment = next(s for s in range(len(parents)) if starts[s] <= row < starts[s + 1])
    ids = found.ids[starts[segment] : row + 1].tolist()
    while (segment := parents[segment]) >= 0:
        ids = found.ids[starts[segment] : starts[segment + 1]].tolist() + ids
    assert int(found.layout.positions[row]) == len(ids) - 1
    return tuple(ids)


def predicted(found: Batch) -> list[tuple[tuple[int, ...], int, float]]:
    """(what was read, what comes, weight) for each target."""
    rows = zip(found.rows.tolist(), found.targets.tolist(), found.weights.tolist(), strict=True)
    return [(story(found, row), target, weight) for row, target, weight in rows]


def ruled(found: Batch) -> list[tuple[int, ...]]:
    return [story(found, row) for row in found.digit_rows.tolist()]


@settings(deadline=None, max_examples=150)
@given(families())
def test_a_grown_batch_has_the_losses_of_the_texts(drawn):
    texts, chosen = drawn
    tree = grow("tree", texts, chosen)
    found, apart = batch([tree], CPU), batch([alone(text) for text in texts], CPU)
    assert sorted(predicted(found)) == sorted(predicted(apart))
    assert sorted(ruled(found)) == sorted(ruled(apart))
    assert len(found.ids) == tree.tokens <= len(apart.ids)
    tokens = sum(text.weight * (len(text.ids) - text.reply_from) for text in texts)
    assert weights_of([tree])[0] == pytest.approx(tokens or 1.0)
    if chosen >= 0:
        first, count, place = found.lists[0]
        assert (first, count) == (0, sum(text.digit_at >= 0 for text in texts))
        own = texts[chosen]
        assert ruled(found)[place] == own.ids[: own.digit_at + 1]
        assert found.list_weights.tolist() == [own.weight] == [weights_of([tree])[1]]
    else:
        assert found.lists == []
    assert grow("tree", texts, chosen) == tree


@settings(deadline=None, max_examples=150)
@given(families())
def test_what_is_shared_is_long_enough_and_no_reply(drawn):
    texts, chosen = drawn
    tree = grow("tree", texts, chosen)
    depth = [len(tree.prefix)]
    children: dict[int, int] = {}
    for i, branch in enumerate(tree.branches):
        depth.append(depth[branch.under + 1] + len(branch.ids))
        children[branch.under] = children.get(branch.under, 0) + 1
        assert branch.under < i
    inner = {under for under in children if under >= 0}
    assert len(tree.branches) - len(inner) == len(texts)  # each has a branch of its own
    for i in inner:
        branch = tree.branches[i]
        assert children[i] >= 2
        assert len(branch.ids) >= SHARED_LEAST
        assert (branch.reply_from, branch.digit_at) == (len(branch.ids), -1)
    assert not tree.prefix or len(tree.prefix) >= SHARED_LEAST
    marks = [text.reply_from for text in texts]
    marks += [text.digit_at for text in texts if text.digit_at >= 0]
    if tree.prefix:
        assert len(tree.prefix) <= min(marks)


@settings(deadline=None, max_examples=60)
@given(st.lists(families(), min_size=2, max_size=3))
def test_trees_side_by_side_do_not_mix(drawn):
    trees = [grow(str(i), *some) for i, some in enumerate(drawn)]
    together = batch(trees, CPU)
    apart = [batch([tree], CPU) for tree in trees]
    assert predicted(together) == [one for some in apart for one in predicted(some)]
    assert ruled(together) == [one for some in apart for one in ruled(some)]
    lists = [ruled(some)[f : f + n] for some in apart for f, n, _ in some.lists]
    assert [ruled(together)[f : f + n] for f, n, _ in together.lists] == lists
    assert [c for *_, c in together.lists] == [c for some in apart for *_, c in some.lists]


def test_the_figure_of_the_docstring():
    """Exemplars of 496, candidates of 348 more, two replies of 124, score lines of 8."""
    exemplars = tuple(range(496))
    texts = []
    for k in range(4):
        prompt = exemplars + tuple(1000 * (k + 1) + i for i in range(348))
        if k < 2:
            texts.append(Text(prompt + (7,) * 124, len(prompt)))
        line = prompt + (8,) * 8
        texts.append(Text(line, len(line), 1.0, len(line) - 1))
    tree = grow("pair", texts, 1)
    assert tree.tokens == 496 + 4 * 348 + 2 * 124 + 4 * 8 == 2168
    assert sum(len(text.ids) for text in texts) == 6 * 844 + 2 * 124 + 4 * 8 == 5344
    assert len(tree.prefix) == 496


@pytest.mark.parametrize(
    ("common", "shared"), [(SHARED_LEAST - 1, 0), (SHARED_LEAST, 16), (17, 17)]
)
def test_a_short_beginning_is_not_shared(common, shared):
    texts = [Text((*range(common), 900 + i, 950), common + 1) for i in range(2)]
    tree = grow("short", texts)
    assert len(tree.prefix) == shared
    assert tree.tokens == 2 * (common + 2) - shared


def test_a_reply_that_is_the_same_is_not_shared():
    """Two equal texts, replies and all: the prompt once, each its own reply."""
    text = Text(tuple(range(60)), 40)
    tree = grow("same", [text, text])
    assert tree.prefix == tuple(range(40))
    assert [branch.ids for branch in tree.branches] == [tuple(range(40, 60))] * 2
    assert [branch.reply_from for branch in tree.branches] == [0, 0]


def test_a_digit_is_never_shared():
    """The row that predicts it stays with its text, also where another text goes on after it."""
    line = Text(tuple(range(40)), 40, 1.0, 29)
    tree = grow("digit", [line, Text(tuple(range(40)), 35)], 0)
    assert tree.prefix == tuple(range(29))
    assert [branch.digit_at for branch in tree.branches] == [0, -1]


@pytest.mark.parametrize("chosen", range(4))
def test_the_chosen_one_is_found_where_kin_moved_together(chosen):
    """Texts 0 and 2 share a beginning, so the branches are those of 0, 2, 1, 3."""
    stems = [tuple(range(100 * k, 100 * k + 20)) for k in (1, 2, 1, 3)]
    lines = [Text((*stem, 7, k), 22, 1.0 + k, 21) for k, stem in enumerate(stems)]
    found = batch([grow("moved", lines, chosen)], CPU)
    assert [read[-1] for read in ruled(found)] == [0, 2, 1, 3]
    ((first, count, place),) = found.lists
    assert (first, count) == (0, 4)
    assert ruled(found)[place] == lines[chosen].ids
    assert found.list_weights.tolist() == [1.0 + chosen]


def test_fullest_fills_with_copies():
    some = [Bundle(str(n), (), (Branch((1,) * n, n),)) for n in (7, 3, 2)]
    assert [one.tokens for one in fullest(some, 13)] == [7, 3, 2]
    assert [one.tokens for one in fullest(some, 21)] == [7, 3, 2, 7, 2]
    assert [one.tokens for one in fullest(some, 5)] == [7]  # a giant stands alone


# Replies and their numbers


def group(texts: int, prompt: int = 50, reply: int = 10) -> list[Text]:
    """Replies to one prompt, numbered from 100."""
    shown = tuple(range(prompt))
    told = [tuple(1000 * (i + 1) + j for j in range(reply)) for i in range(texts)]
    return [Text(shown + own, prompt, number=100 + i) for i, own in enumerate(told)]


@settings(deadline=None)
@given(families())
def test_every_target_has_the_number_of_its_text(drawn):
    """Also where texts have moved with their kin: the ids of a number are its reply's."""
    texts, _ = drawn
    numbered = [
        Text(text.ids, text.reply_from, text.weight, number=7 * i) for i, text in enumerate(texts)
    ]
    found = batch([grow("numbered", numbered)], CPU)
    assert found.owners.shape == found.targets.shape
    for text in numbered:
        own = found.targets[found.owners == text.number].tolist()
        assert tuple(own) == text.ids[text.reply_from :]
    assert len(found.targets) == sum(len(text.ids) - text.reply_from for text in texts)


def test_texts_without_a_number_have_none():
    found = batch([grow("plain", [Text(tuple(range(30)), 20)] * 2)], CPU)
    assert found.owners.tolist() == [-1] * 20
    assert found.owners.dtype == torch.int64


@pytest.mark.parametrize(
    ("budget", "sizes"),
    [
        (130, [130]),  # 50 + 8 · 10
        (129, [90, 90]),  # four replies each
        (89, [70] * 4),
        (69, [60] * 8),
        (5, [60] * 8),  # what cannot be cut stands alone
    ],
)
def test_a_tree_beyond_the_budget_is_halved(budget, sizes):
    texts = group(8)
    found = grow_within("halved", texts, budget)
    assert [tree.tokens for tree in found] == sizes
    assert {tree.name for tree in found} == {"halved"}
    told = [branch.number for tree in found for branch in tree.branches]
    assert told == [100 + i for i in range(8)]  # in order


def test_only_the_half_that_is_too_long_is_cut():
    texts = [*group(2, reply=2), *group(2, reply=60)]
    assert [tree.tokens for tree in grow_within("uneven", texts, 120)] == [54, 110, 110]


def test_the_end_of_a_reply_weighs_more():
    """Two texts with a common beginning; the last two tokens of each reply count three times."""
    stem = tuple(range(20))
    texts = [
        Text((*stem, 30, 31, 32, 33), 21, 0.5, tail=2, stress=3.0),
        Text((*stem, 40, 41), 21, 2.0, tail=5, stress=3.0),  # a tail longer than the reply
    ]
    tree = grow("a", texts)
    found = batch([tree], CPU)
    assert found.targets.tolist() == [31, 32, 33, 41]
    assert found.weights.tolist() == [0.5, 1.5, 1.5, 6.0]
    assert weights_of([tree]) == (9.5, 1.0)
    assert [branch.weights for branch in tree.branches] == [[0.5, 1.5, 1.5], [6.0]]
