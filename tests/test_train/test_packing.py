"""Every bundle once, the budget kept, and a packed batch equal to each branch run alone."""

from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from nanopersrm.model.cache import Layout
from nanopersrm.model.transformer import Model
from nanopersrm.model.weights import load
from nanopersrm.train.packing import (
    SHARED_LEAST,
    Branch,
    Bundle,
    Text,
    batch,
    grow,
    pack,
    weights_of,
)

CPU = torch.device("cpu")
V = 131  # of the tiny models


def bundle(name: str, prefix: int, *lengths: int) -> Bundle:
    """Of these lengths, ids counted up."""
    return Bundle(name, tuple(range(prefix)), tuple(Branch((1,) * n, n) for n in lengths))


@st.composite
def bundles(draw, most: int = 6) -> list[Bundle]:
    """Random trees: with and without prefix, reply and list, branches under branches."""
    found = []
    for n in range(draw(st.integers(1, most))):
        prefix = tuple(draw(st.lists(st.integers(0, V - 1), max_size=9)))
        branches = []
        for i in range(draw(st.integers(1, 5))):
            ids = tuple(draw(st.lists(st.integers(0, V - 1), min_size=1, max_size=9)))
            under = draw(st.integers(-1, i - 1))
            first = draw(st.integers(0 if prefix or under >= 0 else 1, len(ids)))
            weight, digit = draw(st.floats(0.0, 4.0, width=32)), draw(st.integers(-1, len(ids) - 1))
            branches.append(Branch(ids, first, weight, digit, under))
        listed = sum(branch.digit_at >= 0 for branch in branches)
        chosen = draw(st.integers(-1, listed - 1))
        found.append(Bundle(f"pair {n}", prefix, tuple(branches), chosen))
    return found


def before(one: Bundle) -> list[tuple[int, ...]]:
    """What each branch continues, from the root on."""
    whole = [one.prefix]
    for branch in one.branches:
        whole.append(whole[branch.under + 1] + branch.ids)
    return [whole[branch.under + 1] for branch in one.branches]


# pack


def test_first_fit_decreasing_by_hand():
    some = [bundle(str(n), 0, n) for n in (3, 7, 5, 4, 1)]
    sizes = [[one.tokens for one in found] for found in pack(some, 10)]
    assert sizes == [[7, 3], [5, 4, 1]]


def test_a_giant_stands_alone_and_first():
    some = [bundle("a", 2, 3), bundle("giant", 5, 20, 20), bundle("b", 2, 4)]
    assert [[one.name for one in found] for found in pack(some, 12)] == [["giant"], ["b", "a"]]


def test_equal_bundles_keep_their_order():
    some = [bundle(name, 1, 3) for name in "abcde"]
    assert ["".join(one.name for one in found) for found in pack(some, 8)] == ["ab", "cd", "e"]


def test_nothing_packs_to_nothing():
    assert pack([], 8) == []
    with pytest.raises(AssertionError, match="budget of 0"):
        pack([], 0)


@given(st.lists(st.tuples(st.integers(0, 30), st.integers(1, 30), st.integers(1, 30))), st.data())
def test_every_bundle_once_and_the_budget_kept(shapes, data):
    budget = data.draw(st.integers(1, 80))
    some = [bundle(str(i), *shape) for i, shape in enumerate(shapes)]
    packs = pack(some, budget)
    assert sorted(one.name for found in packs for one in found) == sorted(b.name for b in some)
    sums = [sum(one.tokens for one in found) for found in packs]
    assert sums == sorted(sums, reverse=True)
    for found, total in zip(packs, sums, strict=True):
        assert total <= budget or len(found) == 1
    assert pack(some, budget) == packs
    least = [total for total in sums if total <= budget]  # no two of these could be one
    assert all(a + b > budget for a, b in pairwise(least))


# batch


def test_a_batch_by_hand():
    """The example of the file's docstring, and a list of two candidates without a prefix."""
    tree = Bundle(
        "tree",
        (10, 11, 12, 13),
        (Branch((20, 21, 22, 23), 2, 0.5), Branch((30, 31, 32), 0, 2.0)),
    )
    line = Bundle(
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


def test_a_digit_without_a_list_shifts_the_lists_after_it():
    ruled = Branch((1, 2, 3), 3, digit_at=1)
    alone = Bundle("alone", (), (ruled, Branch((4, 5), 2)))
    found = batch([alone, Bundle("list", (6,), (ruled, ruled), chosen=0)], CPU)
    assert found.digit_rows.tolist() == [1, 7, 10]
    assert found.lists == [(1, 2, 0)]


@settings(deadline=None, max_examples=60)
@given(bundles())
def test_targets_continue_their_own_texts(some):
    """Against an oracle that writes every branch out after its prefix."""
    found = batch(some, CPU)
    seen, expected = [], []
    for one in some:
        for above, branch in zip(before(one), one.branches, strict=True):
            text = above + branch.ids
            for place in range(len(above) + branch.reply_from, len(text)):
                expected.append((text[place - 1], place - 1, text[place], branch.weight))
    rows = found.rows.tolist()
    for row, target, weight in zip(
        rows, found.targets.tolist(), found.weights.tolist(), strict=True
    ):
        seen.append((int(found.ids[row]), int(found.layout.positions[row]), target, weight))
    assert seen == expected
    assert len(found.ids) == sum(one.tokens for one in some)
    own = [i for i, one in enumerate(some) for b in one.branches if b.digit_at >= 0]
    at = [own[first : first + count] for first, count, _ in found.lists]
    assert at == [[i] * own.count(i) for i, one in enumerate(some) if one.chosen >= 0]
    assert [chosen for *_, chosen in found.lists] == [b.chosen for b in some if b.chosen >= 0]
    tokens, lists = weights_of(some)
    assert tokens == pytest.approx(sum(weight for *_, weight in expected) or 1.0)
    assert lists == pytest.approx(float(found.list_weights.sum()) or 1.0)
    digits = [found.ids[row] for row in found.digit_rows]
    assert digits == [b.ids[b.digit_at] for one in some for b in one.branches if b.digit_at >= 0]


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
        Bundle("odd", prefix, (Branch(*branch),), chosen)


# grow


def leaves(one: Bundle) -> list[Text]:
    """The texts that a tree spells: each branch that nothing continues, from the root on."""
    inner = {branch.under for branch in one.branches}
    return [
        Text(
            above + branch.ids,
            len(above) + branch.reply_from,
            branch.weight,
            len(above) + branch.digit_at if branch.digit_at >= 0 else -1,
        )
        for i, (above, branch) in enumerate(zip(before(one), one.branches, strict=True))
        if i not in inner
    ]


def test_a_pair_grows_into_three_levels():
    """Exemplars, two candidates, and under each a reply and a score line."""
    exemplars, reply, score = tuple(range(40)), (90, 91, 92), (93, 94)
    candidates = [(50, *range(60, 80)), (51, *range(60, 80))]
    texts = []
    for i, candidate in enumerate(candidates):
        texts.append(Text(exemplars + candidate + reply, 61, 2.0 + i))
        texts.append(Text(exemplars + candidate + score, 63, 2.0 + i, digit_at=62))
    found = grow("pair", texts, chosen=3)
    assert found.prefix == exemplars
    assert [(branch.ids, branch.under) for branch in found.branches] == [
        (candidates[0], -1),
        (reply, 0),
        (score, 0),
        (candidates[1], -1),
        (reply, 3),
        (score, 3),
    ]
    assert [branch.reply_from for branch in found.branches] == [21, 0, 2, 21, 0, 2]
    assert [branch.digit_at for branch in found.branches] == [-1, -1, 1, -1, -1, 1]
    assert (found.chosen, found.list_weight, found.tokens) == (1, 3.0, 40 + 2 * 21 + 2 * 5)
    assert weights_of([found]) == (3 * 2.0 + 3 * 3.0, 3.0)
    assert weights_of([bundle("no reply", 2, 3)]) == (1.0, 1.0)  # nothing to divide


def test_equal_texts_keep_a_token_each():
    found = grow("twice", [Text(tuple(range(30)), 30), Text(tuple(range(30)), 30)])
    assert found.prefix == tuple(range(29))
    assert [branch.ids for branch in found.branches] == [(29,), (29,)]


@settings(deadline=None)
@given(st.data())
def test_a_tree_spells_its_texts(data):
    """Random texts over stems that many share; nothing lost, nothing shared from the reply on."""
    stems = [tuple(range(n, n + 20)) for n in (0, 30, 60)]
    texts: list[Text] = []
    for _ in range(data.draw(st.integers(1, 7))):
        some = data.draw(st.lists(st.sampled_from(stems), max_size=4))
        tail = data.draw(st.lists(st.integers(0, 3), min_size=2, max_size=20))
        ids = sum(some, ()) + tuple(tail)
        first = data.draw(st.integers(1, len(ids)))
        digit = data.draw(st.integers(-1, len(ids) - 1))
        texts.append(Text(ids, first, float(len(texts)), digit))
    listed = [i for i, text in enumerate(texts) if text.digit_at >= 0]
    chosen = data.draw(st.sampled_from([-1, *listed]))
    found = grow("texts", texts, chosen)
    spelt = leaves(found)
    assert sorted(spelt, key=lambda text: text.weight) == texts
    if chosen >= 0:
        assert [text for text in spelt if text.digit_at >= 0][found.chosen] == texts[chosen]
    else:
        assert found.chosen == -1
    for i in {branch.under for branch in found.branches} - {-1}:
        assert found.branches[i].reply_from == len(found.branches[i].ids) >= SHARED_LEAST
        assert sum(branch.under == i for branch in found.branches) >= 2
    assert found.tokens <= sum(len(text.ids) for text in texts)


# A packed batch and each branch alone


@pytest.fixture(scope="module")
def model(tiny_base) -> Model:
    model = load(tiny_base, torch.float32, CPU)
    return model.requires_grad_(True)


def gradients(model: Model, loss: Tensor) -> list[Tensor]:
    return list(torch.autograd.grad(loss, list(model.parameters())))


@settings(deadline=None, max_examples=12)
@given(some=bundles(most=4))
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
