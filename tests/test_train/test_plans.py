"""Plans: four prompts as a judge is asked them, and replies in trees that spell what was drawn."""

import random
from dataclasses import replace

import pytest
import torch
from fixtures import make_base
from test_train_sft import short_pairs

from nanopersrm.judge import verdict
from nanopersrm.judge.prompts import messages
from nanopersrm.model.tokenizer import Tokenizer
from nanopersrm.pairs import Pair
from nanopersrm.style.profile import StyleEvidence
from nanopersrm.train import course, lessons, plans
from nanopersrm.train.lessons import LessonConfig
from nanopersrm.train.packing import Bundle, batch
from nanopersrm.train.plans import ROLES, Asked
from nanopersrm.train.rewards import Rollout
from nanopersrm.train.rollouts import Drawn

CPU = torch.device("cpu")
BARE = LessonConfig(longest=10_000, evidence=False)
FULL = LessonConfig(longest=10_000)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory) -> Tokenizer:
    return Tokenizer.load(make_base(tmp_path_factory.mktemp("plans") / "smollm", "smollm"))


@pytest.fixture(scope="module")
def couple() -> tuple[Pair, Pair]:
    pair, twin = short_pairs()[:2]
    assert pair.twin == twin.id
    return replace(pair, chosen=f"  {pair.chosen}\n"), replace(twin, rejected=f"{twin.rejected} ")


def near(exemplars, texts) -> list[StyleEvidence]:
    """A percentile that is told by the text."""
    return [StyleEvidence(float(len(text) % 100)) for text in texts]


def made(sizes: list[int]) -> list[list[Drawn]]:
    """Groups of replies of unequal lengths whose ids say which they are."""
    groups: list[list[Drawn]] = []
    number = 0
    for size in sizes:
        groups.append([])
        for _ in range(size):
            ids = tuple(1000 + 50 * number + i for i in range(3 + number % 4))
            text = Rollout(f"reply {number}", len(ids))
            groups[-1].append(Drawn(ids, tuple(-0.5 * i for i in ids), text))
            number += 1
    return groups


def read(trees: list[Bundle]) -> dict[int, list[int]]:
    """Number of a reply -> the ids that are trained, each tree being laid out for itself."""
    found: dict[int, list[int]] = {}
    for tree in trees:
        packed = batch([tree], CPU)
        for owner in packed.owners.unique().tolist():
            assert owner not in found
            found[owner] = packed.targets[packed.owners == owner].tolist()
    return found


# Prompts


def test_pointwise_prompts_are_those_of_the_judge(couple, tokenizer):
    found = plans.asked(couple, "pointwise", tokenizer, FULL, near, 24)
    assert found is not None
    assert found.labels == "A"
    expected = [
        course.prompt(pair, role, tokenizer, FULL, near) for pair in couple for role in ROLES
    ]
    assert list(found.prompts) == expected
    shown = [tokenizer.decode(prompt) for prompt in found.prompts]
    assert len(set(shown)) == 4
    assert all(text.endswith(verdict.OPEN) for text in shown)
    bare = plans.asked(couple, "pointwise", tokenizer, BARE, near, 24)
    assert bare is not None
    assert max(map(len, bare.prompts)) < min(map(len, found.prompts))


def test_at_once_prompts_are_those_of_a_trial(couple, tokenizer):
    """They end where contrast has its digit, token by token."""
    found = plans.asked(couple, "pointwise", tokenizer, FULL, near, 24, at_once=True)
    thinking = plans.asked(couple, "pointwise", tokenizer, FULL, near, 24)
    assert found is not None
    assert thinking is not None
    assert (found.at_once, thinking.at_once) == (True, False)
    for pair, prompts in zip(couple, (found.prompts[:2], found.prompts[2:]), strict=True):
        alone = replace(FULL, rivals=1)
        lines = lessons.contrast_list(pair, {}, tokenizer, alone, random.Random(0), near)
        assert lines is not None
        whole = {(*lines.prefix, *branch.ids) for branch in lines.branches}
        assert whole == {tuple(prompt) for prompt in prompts}
    for prompt, bare in zip(found.prompts, thinking.prompts, strict=True):
        assert prompt[: len(bare)] == bare
        assert tokenizer.decode(prompt).endswith(found.opening)
    assert found.opening == "<think>\n</think>\n<scores>A="


def test_pairwise_prompts_show_both_in_both_orders(couple, tokenizer):
    found = plans.asked(couple, "pairwise", tokenizer, BARE, None, 24)
    assert found is not None
    assert found.labels == "AB"
    expected = []
    for pair in found.pairs:
        for texts in ([pair.chosen, pair.rejected], [pair.rejected, pair.chosen]):
            chat = messages(pair.exemplars, texts, pair.question or None)
            expected.append(tokenizer.chat(chat, continuation=verdict.OPEN))
    assert list(found.prompts) == expected
    assert found.pairs[0].chosen == couple[0].chosen.strip()


@pytest.mark.parametrize(("room", "fits"), [(0, True), (-1, False)])
def test_a_prompt_leaves_room_for_its_reply(couple, tokenizer, room, fits):
    whole = plans.asked(couple, "pointwise", tokenizer, BARE, None, 0)
    assert whole is not None
    longest = max(map(len, whole.prompts)) + 30 + room
    config = replace(BARE, longest=longest)
    found = plans.asked(couple, "pointwise", tokenizer, config, None, 30)
    assert (found is not None) == fits


# Replies as rewards take them


@pytest.mark.parametrize("count", [1, 2], ids=["alone", "with its twin"])
def test_a_plan_has_each_reply_in_its_place(couple, tokenizer, count):
    found = plans.asked(couple[:count], "pointwise", tokenizer, BARE, None, 0)
    assert found is not None
    groups = made([2, 3, 2, 4][: 2 * count])
    plan = found.plan(groups)
    assert plan.form == "pointwise"
    told = [list(shown.groups[role]) for shown in plan.shown for role in ROLES]
    assert told == [[drawn.rollout for drawn in group] for group in groups]
    texts = [(shown.chosen, shown.rejected) for shown in plan.shown]
    assert texts == [(pair.chosen.strip(), pair.rejected.strip()) for pair in couple[:count]]
    with pytest.raises(AssertionError, match="3 groups"):
        found.plan(made([1, 1, 1]))


# Trees


@pytest.mark.parametrize("budget", [100_000, 1_000, 700, 1])
@pytest.mark.parametrize("number", [0, 40])
def test_every_kept_reply_once_as_it_was_drawn(couple, tokenizer, budget, number):
    """However small the budget: the drawn ids by the number of their reply, and no others."""
    found = plans.asked(couple, "pointwise", tokenizer, BARE, None, 0)
    assert found is not None
    groups = made([2, 3, 2, 4])
    flat = [drawn for group in groups for drawn in group]
    for kept in ([True] * 4, [True, False, False, True], [False, False, True, False]):
        trees = found.trees(groups, number, kept, budget)
        own = [keep for keep, group in zip(kept, groups, strict=True) for _ in group]
        expected = {number + i: list(flat[i].ids) for i in range(11) if own[i]}
        assert read(trees) == expected
        for tree in trees:
            assert tree.tokens <= budget or len(read([tree])) == 1
    assert found.trees(groups, 0, [False] * 4, budget) == []


def test_a_tree_spells_its_prompts(couple, tokenizer):
    """From the root to each reply: the prompt that it was drawn after, and the reply."""
    found = plans.asked(couple, "pointwise", tokenizer, BARE, None, 0)
    assert found is not None
    groups = made([2, 2, 2, 2])
    spelt: list[tuple[int, ...]] = []
    for tree in found.trees(groups, 0, [True] * 4, 100_000):
        whole = [tree.prefix]
        for branch in tree.branches:
            whole.append(whole[branch.under + 1] + branch.ids)
        spelt += [text for text in whole if text[-1] >= 1000]
    expected = [
        (*prompt, *drawn.ids)
        for prompt, group in zip(found.prompts, groups, strict=True)
        for drawn in group
    ]
    assert sorted(spelt) == sorted(expected)


def test_a_couple_is_two_trees_unless_they_are_cut(couple, tokenizer):
    found = plans.asked(couple, "pointwise", tokenizer, BARE, None, 0)
    assert found is not None
    whole = found.trees(made([4, 4, 4, 4]), 0, [True] * 4, 100_000)
    assert [tree.name for tree in whole] == [pair.id for pair in couple]
    halves = found.trees(made([4] * 4), 0, [True] * 4, whole[0].tokens - 1)
    assert [tree.name for tree in halves][:2] == [couple[0].id] * 2
    assert sum(tree.tokens for tree in halves) > sum(tree.tokens for tree in whole)


def test_the_figure_of_the_docstring():
    """540 of exemplars, 332 of each candidate, 8 replies of 120: 3,124 rows, not 15,872."""
    exemplars = list(range(540))
    prompts = tuple(exemplars + [1000 * (k + 1) + i for i in range(332)] for k in range(2))
    reply = Drawn((7,) * 120, (-1.0,) * 120, Rollout("", 120))
    asked = Asked("pointwise", (short_pairs()[0],), prompts)
    (tree,) = asked.trees([[reply] * 8] * 2, 0, [True] * 2, 4096)
    assert tree.tokens == 540 + 2 * (332 + 8 * 120) == 3124
    assert sum(len(prompt) + 120 for prompt in prompts for _ in range(8)) == 15_872
