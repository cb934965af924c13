"""Packing: every tree once, the budget kept, trees read back from root to leaf, nothing of a reply
shared, and a packed batch equal to each branch run alone."""

from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from fixtures import CPU
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from nanopersrm.model.cache import Layout
from nanopersrm.model.transformer import Model
from nanopersrm.model.weights import load
from nanopersrm.train.packing import (
    SHARED_LEAST,
    Batch,
    Branch,
    PrefixTree,
    batch,
    build_tree,
    build_trees,
    pack,
    total_weights,
)

V = 131  # of the tiny models
STEM = 40  # ids of a stem, of which a text begins with a part


def tree(name: str, prefix: int, *lengths: int) -> PrefixTree:
    """Of these lengths, ids counted up."""
    return PrefixTree(name, tuple(range(prefix)), tuple(Branch((1,) * n, n) for n in lengths))


@st.composite
def trees(draw, most: int = 6) -> list[PrefixTree]:
    """Random trees: with and without prefix, reply and list, branches parent branches."""
    found = []
    for n in range(draw(st.integers(1, most))):
        prefix = tuple(draw(st.lists(st.integers(0, V - 1), max_size=9)))
        branches = []
        for i in range(draw(st.integers(1, 5))):
            ids = tuple(draw(st.lists(st.integers(0, V - 1), min_size=1, max_size=9)))
            parent = draw(st.integers(-1, i - 1))
            first = draw(st.integers(0 if prefix or parent >= 0 else 1, len(ids)))
            weight, digit = draw(st.floats(0.0, 4.0, width=32)), draw(st.integers(-1, len(ids) - 1))
            branches.append(Branch(ids, first, weight, digit, parent))
        listed = sum(branch.digit_at >= 0 for branch in branches)
        chosen = draw(st.integers(-1, listed - 1))
        found.append(PrefixTree(f"pair {n}", prefix, tuple(branches), chosen))
    return found


def before(one: PrefixTree) -> list[tuple[int, ...]]:
    """What each branch continues, from the root on."""
    whole = [one.prefix]
    for branch in one.branches:
        whole.append(whole[branch.parent + 1] + branch.ids)
    return [whole[branch.parent + 1] for branch in one.branches]


@given(st.lists(st.tuples(st.integers(0, 30), st.integers(1, 30), st.integers(1, 30))), st.data())
def test_every_tree_once_and_the_budget_kept(shapes, data):
    budget = data.draw(st.integers(1, 80))
    some = [tree(str(i), *shape) for i, shape in enumerate(shapes)]
    packs = pack(some, budget)
    assert sorted(one.name for found in packs for one in found) == sorted(b.name for b in some)
    sums = [sum(one.tokens for one in found) for found in packs]
    assert sums == sorted(sums, reverse=True)
    for found, total in zip(packs, sums, strict=True):
        assert total <= budget or len(found) == 1
    assert pack(some, budget) == packs
    least = [total for total in sums if total <= budget]  # no two of these could be one
    assert all(a + b > budget for a, b in pairwise(least))


def test_a_batch_by_hand():
    """The example of the file's docstring, and a list of two candidates without a prefix."""
    tree = PrefixTree(
        "tree",
        (10, 11, 12, 13),
        (Branch((20, 21, 22, 23), 2, 0.5), Branch((30, 31, 32), 0, 2.0)),
    )
    line = PrefixTree(
        "list",
        (),
        (Branch((40, 41), 2, digit_at=1), Branch((50, 51, 52), 3, 3.0, digit_at=2)),
        chosen=1,
    )
    found = batch([tree, line], CPU)
    assert found.ids.tolist() == [10, 11, 12, 13, 20, 21, 22, 23, 30, 31, 32, 40, 41, 50, 51, 52]
    assert found.layout.starts == (0, 4, 8, 11, 13, 16)
    assert found.layout.parents == (-1, 0, 0, -1, -1)
    assert found.layout.positions.tolist() == [0, 1, 2, 3, 4, 5, 6, 7, 4, 5, 6, 0, 1, 0, 1, 2]
    assert found.rows.tolist() == [5, 6, 3, 8, 9]  # row 3, the prefix's last, predicts 30
    assert found.targets.tolist() == [22, 23, 30, 31, 32]
    assert found.weights.tolist() == [0.5, 0.5, 2.0, 2.0, 2.0]
    assert found.digit_rows.tolist() == [12, 15]
    assert found.lists == [(0, 2, 1)]
    assert found.list_weights.tolist() == [3.0]
    assert found.names == ("tree", "list")
    assert (found.ids.dtype, found.weights.dtype) == (torch.int64, torch.float32)


@pytest.mark.parametrize(
    ("prefix", "branch", "chosen", "fault"),
    [
        ((1,), ((), 0), -1, "at least one token"),
        ((1,), ((1, 2), 3), -1, "a reply from 3 of 2"),
        ((1,), ((1, 2), 2, 1.0, 2), -1, "a digit after token 2 of 2"),
        ((), ((1, 2), 0), -1, "nothing predicts"),
        ((1,), ((1, 2), 2), 0, "chosen 0 of 0"),
        ((1,), ((1, 2), 2, 1.0, 1), 1, "chosen 1 of 1"),
        ((1,), ((1, 2), 2, 1.0, 1, 0), 0, "branch 0 continues 0"),
    ],
)
def test_what_makes_no_sense_is_refused(prefix, branch, chosen, fault):
    with pytest.raises(AssertionError, match=fault):
        PrefixTree("odd", prefix, (Branch(*branch),), chosen)


@pytest.fixture(scope="module")
def model(tiny_base) -> Model:
    model = load(tiny_base, torch.float32, CPU)
    return model.requires_grad_(True)


def gradients(model: Model, loss: Tensor) -> list[Tensor]:
    return list(torch.autograd.grad(loss, list(model.parameters())))


@settings(deadline=None, max_examples=12)
@given(some=trees(most=4))
def test_packed_equals_alone(model, some):
    """Hidden states, losses and gradients, in fp32 to 1e-5."""
    found = batch(some, CPU)
    hidden = model(found.ids, found.layout)  # (N, D)
    losses = found.weights * F.cross_entropy(
        model.logits(hidden[found.rows]), found.targets, reduction="none"
    )
    alone_losses, alone_digits, pieces = [], [], []
    for one in some:
        for number, (above, branch) in enumerate(zip(before(one), one.branches, strict=True)):
            ids = torch.tensor(above + branch.ids)
            own = model(ids, Layout.of([len(ids)]))
            if number == 0:
                pieces.append(own[: len(one.prefix)])
            pieces.append(own[len(above) :])
            first = len(above) + branch.reply_from
            told = model.logits(own[first - 1 : -1] if first < len(ids) else own[:0])
            loss = F.cross_entropy(told, ids[first:], reduction="none")
            alone_losses.append(branch.weight * loss)
            if branch.digit_at >= 0:
                alone_digits.append(own[len(above) + branch.digit_at])
    expected = torch.cat(pieces)
    assert (hidden - expected).abs().max() <= 1e-5 * expected.abs().max()
    torch.testing.assert_close(losses, torch.cat(alone_losses), rtol=1e-5, atol=1e-5)
    ours, theirs = losses.sum(), torch.cat(alone_losses).sum()
    if alone_digits:
        digits = torch.stack(alone_digits)
        torch.testing.assert_close(hidden[found.digit_rows], digits, rtol=1e-5, atol=1e-5)
        ours = ours + hidden[found.digit_rows].square().mean()
        theirs = theirs + digits.square().mean()
    for one_gradient, other in zip(gradients(model, ours), gradients(model, theirs), strict=True):
        assert (one_gradient - other).abs().max() <= 1e-5 * max(1.0, float(other.abs().max()))


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
        texts.append(Branch(ids, reply_from, 1.0 + i, digit))
    listed = [i for i, text in enumerate(texts) if text.digit_at >= 0]
    return texts, draw(st.sampled_from([-1, *listed]))


def alone(text: Branch) -> PrefixTree:
    """A text as a tree that shares nothing."""
    return PrefixTree("alone", (), (Branch(text.ids, text.reply_from, text.weight, text.digit_at),))


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
    tree = build_tree("tree", texts, chosen)
    found, apart = batch([tree], CPU), batch([alone(text) for text in texts], CPU)
    assert sorted(predicted(found)) == sorted(predicted(apart))
    assert sorted(ruled(found)) == sorted(ruled(apart))
    assert len(found.ids) == tree.tokens <= len(apart.ids)
    tokens = sum(text.weight * (len(text.ids) - text.reply_from) for text in texts)
    assert total_weights([tree])[0] == pytest.approx(tokens or 1.0)
    if chosen >= 0:
        first, count, place = found.lists[0]
        assert (first, count) == (0, sum(text.digit_at >= 0 for text in texts))
        own = texts[chosen]
        assert ruled(found)[place] == own.ids[: own.digit_at + 1]
        assert found.list_weights.tolist() == [own.weight] == [total_weights([tree])[1]]
    else:
        assert found.lists == []
    assert build_tree("tree", texts, chosen) == tree


@settings(deadline=None, max_examples=150)
@given(families())
def test_what_is_shared_is_long_enough_and_no_reply(drawn):
    texts, chosen = drawn
    tree = build_tree("tree", texts, chosen)
    depth = [len(tree.prefix)]
    children: dict[int, int] = {}
    for i, branch in enumerate(tree.branches):
        depth.append(depth[branch.parent + 1] + len(branch.ids))
        children[branch.parent] = children.get(branch.parent, 0) + 1
        assert branch.parent < i
    inner = {parent for parent in children if parent >= 0}
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


def test_a_digit_is_never_shared():
    """The row that predicts it stays with its text, also where another text goes on after it."""
    line = Branch(tuple(range(40)), 40, 1.0, 29)
    tree = build_tree("digit", [line, Branch(tuple(range(40)), 35)], 0)
    assert tree.prefix == tuple(range(29))
    assert [branch.digit_at for branch in tree.branches] == [0, -1]


@pytest.mark.parametrize("chosen", range(4))
def test_the_chosen_one_is_found_where_kin_moved_together(chosen):
    """Texts 0 and 2 share a beginning, so the branches are those of 0, 2, 1, 3."""
    stems = [tuple(range(100 * k, 100 * k + 20)) for k in (1, 2, 1, 3)]
    lines = [Branch((*stem, 7, k), 22, 1.0 + k, 21) for k, stem in enumerate(stems)]
    found = batch([build_tree("moved", lines, chosen)], CPU)
    assert [read[-1] for read in ruled(found)] == [0, 2, 1, 3]
    ((first, count, place),) = found.lists
    assert (first, count) == (0, 4)
    assert ruled(found)[place] == lines[chosen].ids
    assert found.list_weights.tolist() == [1.0 + chosen]


def group(texts: int, prompt: int = 50, reply: int = 10) -> list[Branch]:
    """Replies to one prompt, numbered from 100."""
    shown = tuple(range(prompt))
    told = [tuple(1000 * (i + 1) + j for j in range(reply)) for i in range(texts)]
    return [Branch(shown + own, prompt, number=100 + i) for i, own in enumerate(told)]


@settings(deadline=None)
@given(families())
def test_every_target_has_the_number_of_its_text(drawn):
    """Also where texts have moved with their kin: the ids of a number are its reply's."""
    texts, _ = drawn
    numbered = [
        Branch(text.ids, text.reply_from, text.weight, number=7 * i) for i, text in enumerate(texts)
    ]
    found = batch([build_tree("numbered", numbered)], CPU)
    assert found.owners.shape == found.targets.shape
    for text in numbered:
        own = found.targets[found.owners == text.number].tolist()
        assert tuple(own) == text.ids[text.reply_from :]
    assert len(found.targets) == sum(len(text.ids) - text.reply_from for text in texts)


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
    found = build_trees("halved", texts, budget)
    assert [tree.tokens for tree in found] == sizes
    assert {tree.name for tree in found} == {"halved"}
    told = [branch.number for tree in found for branch in tree.branches]
    assert told == [100 + i for i in range(8)]  # in order


def test_the_end_of_a_reply_weighs_more():
    """Two texts with a common beginning; the last two tokens of each reply count three times."""
    stem = tuple(range(20))
    texts = [
        Branch((*stem, 30, 31, 32, 33), 21, 0.5, tail=2, tail_weight=3.0),
        Branch((*stem, 40, 41), 21, 2.0, tail=5, tail_weight=3.0),  # a tail longer than the reply
    ]
    tree = build_tree("a", texts)
    found = batch([tree], CPU)
    assert found.targets.tolist() == [31, 32, 33, 41]
    assert found.weights.tolist() == [0.5, 1.5, 1.5, 6.0]
    assert total_weights([tree]) == (9.5, 1.0)
    assert [branch.weights for branch in tree.branches] == [[0.5, 1.5, 1.5], [6.0]]
