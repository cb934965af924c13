"""The harvest: one numbering for all, flat plans replaced so often and no oftener."""

import random
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from test_answer import make_base
from test_train_sft import short_pairs

from data import harvest
from data import source as sourcing
from data.curriculum import Curriculum
from data.harvest import Harvest
from data.lessons import LessonConfig
from data.source import Source
from nanopersrm import InputError, packing
from nanopersrm.model import Model
from nanopersrm.pairs import Pair
from nanopersrm.rewards import PARTS, Plan, Reward, RewardConfig
from nanopersrm.rollouts import RolloutConfig
from nanopersrm.tokenizer import Tokenizer
from nanopersrm.weights import load

CPU = torch.device("cpu")
G = 3
BARE = LessonConfig(longest=10_000, evidence=False)
ROLLOUT = RolloutConfig(group=G, rows=12, reply=6)


@pytest.fixture(scope="module")
def known(tmp_path_factory) -> tuple[Model, Tokenizer]:
    base = make_base(tmp_path_factory.mktemp("harvest") / "smollm", "smollm", 16_384)
    return load(base, torch.float32, CPU), Tokenizer.load(base)


@pytest.fixture(scope="module")
def pairs() -> list[Pair]:
    return short_pairs()[:8]  # four couples


def worth(flat: Callable[[str], bool] = lambda text: False):
    """In place of `rewards`: what a reply's text says, or the same for all of a flat plan."""

    def rewarding(plan: Plan, config: RewardConfig):
        level = flat(plan.shown[0].chosen) or flat(plan.shown[0].rejected)
        told: list[dict[str, list[Reward]]] = []
        for shown in plan.shown:
            told.append({})
            for role, rollouts in shown.groups.items():
                order = [0.5 if level else random.Random(one.reply).random() for one in rollouts]
                told[-1][role] = [
                    Reward({"format": 1.0, "order": one}, 1.0 + one, None) for one in order
                ]
        return told

    return rewarding


def source(
    known, pairs: list[Pair], lesson: LessonConfig = BARE, seed: int = 4, at_once: int = 0
) -> Source:
    curriculum = Curriculum(pairs, 1, 0)
    asking = ROLLOUT, RewardConfig(), seed, at_once
    model, tokenizer = known
    return Source(model, tokenizer, curriculum, lesson, None, *asking)


@pytest.fixture
def drawn(known, pairs, monkeypatch) -> Harvest:
    """Two plans of four groups."""
    monkeypatch.setattr(sourcing, "rewards", worth())
    return source(known, pairs).harvest(0, 2, 0.0, 0, "prompt")


# Numbers


def test_a_reply_has_one_number(drawn):
    """In parts, lengths, groups and trees."""
    S = 2 * 4 * G
    replies = [one for plan in drawn.plans for group in plan.groups for one in group]
    rewards = [one for plan in drawn.plans for group in plan.rewards for one in group]
    assert len(replies) == len(rewards) == S == len(drawn.lengths)
    assert drawn.lengths == [len(reply.ids) for reply in replies]
    order, unknown = PARTS.index("order"), PARTS.index("twin")
    assert [row[order] for row in drawn.parts] == [one.parts["order"] for one in rewards]
    assert [row[unknown] for row in drawn.parts] == [0.0] * S
    assert [row[order] for row in drawn.parts] == [
        random.Random(one.rollout.reply).random() for one in replies
    ]
    by_prompt, prompts = drawn.groups("prompt")
    assert by_prompt.tolist() == [number // G for number in range(S)]
    by_plan, plans = drawn.groups("plan")
    assert by_plan.tolist() == [0] * 4 * G + [1] * 4 * G
    assert (prompts, plans, by_plan.dtype) == (8, 2, torch.int64)


@pytest.mark.parametrize("budget", [100_000, 2_000, 1])
def test_tokens_find_their_reply_again(drawn, budget):
    """Every target is the drawn id of the reply that its owner names, with its log-probability."""
    replies = [one for plan in drawn.plans for group in plan.groups for one in group]
    told = [number // G not in (1, 6) for number in range(len(replies))]  # two groups are left out
    trees = drawn.trees(told, budget)
    seen: list[int] = []
    for micro in packing.pack(trees, budget):
        packed = packing.batch(micro, CPU)
        ids: dict[int, list[int]] = {}
        for target, owner in zip(packed.targets.tolist(), packed.owners.tolist(), strict=True):
            ids.setdefault(owner, []).append(target)
        for owner, some in ids.items():
            assert tuple(some) == replies[owner].ids
        expected = [p for owner in ids for p in replies[owner].log_probs]
        assert drawn.log_probs(packed.owners).tolist() == pytest.approx(expected)
        seen += ids
    assert sorted(seen) == [number for number in range(len(replies)) if told[number]]
    assert drawn.rows == sum(tree.tokens for tree in trees)
    assert drawn.tokens == sum(drawn.lengths) + drawn.rows


def test_a_part_of_a_reply_is_refused(drawn):
    with pytest.raises(AssertionError, match="are trained"):
        drawn.log_probs(torch.tensor([0]))


def test_numbers_of_the_log(drawn):
    orders = [row[PARTS.index("order")] for row in drawn.parts]
    mean = sum(orders) / len(orders)
    found = drawn.numbers()
    assert found["right"] == found["reward_order"] == pytest.approx(mean)
    assert found["reward"] == pytest.approx(1 + mean)
    assert found["length"] == sum(drawn.lengths) / len(orders)
    assert (found["formed"], found["reward_format"], found["reward_replaced"]) == (1.0, 1.0, 0.0)
    assert "reward_twin" not in found  # nobody could earn it


def test_the_page_has_all(drawn):
    page = drawn.page()
    pages = page.split(harvest.RULE)
    assert len(pages) == 8
    for place, text in enumerate(pages):
        one = drawn.plans[place // 4]
        pair = one.asked.pairs[place % 4 // 2]
        role = ("chosen", "rejected")[place % 2]
        assert text.startswith(f"{pair.id}, exemplars of {pair.author}, A is {role}\n")
        totals = [float(line.split()[1][:-1]) for line in text.splitlines() if line[:4] == "--- "]
        assert totals == sorted(totals, reverse=True)  # the best first
        assert len(totals) == G
        group, rewards = one.groups[place % 4], one.rewards[place % 4]
        for reply, reward in zip(group, rewards, strict=True):
            order = reward.parts["order"]
            assert f"--- {reward.total:.3f}: format 1.00, order {order:.2f}\n" in text
            assert reply.rollout.reply in text


def test_why_a_reply_is_worth_nothing_is_on_the_page(known, pairs):
    """With the real rewards, a random model's replies do not parse."""
    found = source(known, pairs).harvest(0, 1, 0.0, 0, "prompt")
    assert found.page().count("--- 0.000 (no </think>): format 0.00, order 0.00, ") == 4 * G
    assert found.numbers()["formed"] == 0.0


# Drawing


def test_a_step_follows_from_seed_number_and_curriculum(known, pairs, monkeypatch):
    monkeypatch.setattr(sourcing, "rewards", worth())
    ids: dict[tuple[int, int], list[tuple[int, ...]]] = {}
    for seed, step in ((4, 0), (4, 0), (4, 1), (5, 0)):
        found = source(known, pairs, seed=seed).harvest(step, 1, 0.0, 0, "prompt")
        own = [one.ids for group in found.plans[0].groups for one in group]
        assert ids.setdefault((seed, step), own) == own
    assert len({str(own) for own in ids.values()}) == 3


def test_the_curriculum_hears_of_all(known, pairs, monkeypatch):
    monkeypatch.setattr(sourcing, "rewards", worth())
    one = source(known, pairs)
    found = one.harvest(0, 3, 0.0, 0, "prompt")
    heard = {plan.asked.pairs[0].id: plan.success for plan in found.plans}
    assert one.curriculum.own == pytest.approx(heard)
    orders = [reward.parts["order"] for group in found.plans[0].rewards for reward in group]
    assert found.plans[0].success == pytest.approx(sum(orders) / len(orders))


def test_dropout_is_off_and_the_mode_comes_back(known, pairs, monkeypatch):
    model, _ = known
    seen = []
    draw_groups = sourcing.draw_groups

    def watched(model, *rest):
        seen.append(model.training)
        return draw_groups(model, *rest)

    monkeypatch.setattr(sourcing, "draw_groups", watched)
    for training in (True, False):
        model.train(training)
        source(known, pairs).harvest(0, 1, 0.0, 0, "prompt")
        assert model.training == training
    assert seen == [False, False]


# Resampling


@pytest.mark.parametrize("resample", [0, 1, 2, 5])
def test_flat_plans_are_replaced_so_often_and_no_oftener(known, pairs, monkeypatch, resample):
    """All are flat: the last round is kept."""
    monkeypatch.setattr(sourcing, "rewards", worth(lambda text: True))
    one = source(known, pairs)
    found = one.harvest(0, 2, 0.0, resample, "prompt")
    assert len(found.plans) == 2
    assert found.replaced == 2 * resample
    assert found.numbers()["reward_replaced"] == 2.0 * resample
    assert one.curriculum.cursor == 2 * (1 + resample)
    assert all(plan.flat("prompt") for plan in found.plans)


def test_only_flat_plans_are_replaced(known, pairs, monkeypatch):
    """Of four couples in a row two are flat: the others are both kept, and nothing more drawn."""
    order = [couple[0] for couple in Curriculum(pairs, 1, 0).draw(4, 0.0)]
    dull = {order[0].chosen.strip(), order[2].chosen.strip()}
    monkeypatch.setattr(sourcing, "rewards", worth(lambda text: text in dull))
    one = source(known, pairs)
    found = one.harvest(0, 2, 0.0, 5, "prompt")
    names = [plan.asked.pairs[0].id for plan in found.plans]
    assert names == [order[1].id, order[3].id]
    assert (found.replaced, one.curriculum.cursor) == (2, 4)
    assert not any(plan.flat("prompt") for plan in found.plans)


def test_the_same_couple_again_gets_other_replies(known, pairs, monkeypatch):
    """Two rounds of one step must not draw the same noise."""
    monkeypatch.setattr(sourcing, "rewards", worth(lambda text: True))
    seen = []
    draw_groups = sourcing.draw_groups

    def watched(*given):
        seen.append(draw_groups(*given))
        return seen[-1]

    monkeypatch.setattr(sourcing, "draw_groups", watched)
    source(known, pairs[:2]).harvest(0, 1, 0.0, 1, "prompt")
    first, second = ([one.ids for group in groups for one in group] for groups in seen)
    assert not set(first) & set(second)


def test_flat_by_prompt_and_by_plan(drawn):
    """Equal within each group and different between them: flat by prompt, not by plan."""
    one = drawn.plans[0]
    level = [[Reward({"order": p / 4}, p / 4, None)] * G for p in range(4)]
    found = replace(one, rewards=level)
    assert found.flat("prompt")
    assert not found.flat("plan")
    level[2] = [Reward({"order": p / 4}, p / 4, None) for p in range(G)]
    assert not replace(one, rewards=level).flat("prompt")  # one group is enough
    nearly = [[Reward({"order": 0.5}, 0.5 + 1e-9 * p, None)] * G for p in range(4)]
    assert replace(one, rewards=nearly).flat("plan")


# At once


def test_some_plans_reason_and_others_answer_at_once(known, pairs):
    """One numbering for both kinds; what reasons is drawn as it would be alone."""
    alone = source(known, pairs).harvest(0, 1, 0.0, 0, "prompt")
    both = source(known, pairs, at_once=2).harvest(0, 3, 0.0, 0, "prompt")
    assert [one.asked.at_once for one in both.plans] == [False, True, True]
    assert both.plans[0].groups == alone.plans[0].groups
    assert len({one.asked.pairs[0].id for one in both.plans}) == 3
    for one in both.plans[1:]:
        replies = [reply for group in one.groups for reply in group]
        assert all(reply.rollout.reply.startswith(one.asked.opening) for reply in replies)
        assert max(len(reply.ids) for reply in replies) <= sourcing.SCORED
        named = set().union(*(reward.parts for group in one.rewards for reward in group))
        assert named == {"format", "order", "twin", "calibration"}
    numbers = both.numbers()
    assert numbers["right_reasoned"] == both.plans[0].success
    assert numbers["right_at_once"] == (both.plans[1].success + both.plans[2].success) / 2
    assert "right_at_once" not in alone.numbers()
    S = 3 * 4 * G
    targets: dict[int, list[int]] = {}
    for tree in both.trees([True] * S, 100_000):
        batch = packing.batch([tree], CPU)
        for owner in batch.owners.unique().tolist():
            targets[owner] = batch.targets[batch.owners == owner].tolist()
    told = [reply.ids for one in both.plans for group in one.groups for reply in group]
    assert targets == {i: list(ids) for i, ids in enumerate(told)}


def test_each_kind_is_replaced_by_its_own(known, pairs, monkeypatch):
    monkeypatch.setattr(sourcing, "rewards", worth(lambda text: True))
    found = source(known, pairs, at_once=1).harvest(0, 2, 0.0, 2, "prompt")
    assert [one.asked.at_once for one in found.plans] == [False, True]
    assert found.replaced == 2 * 2


@pytest.mark.parametrize("at_once", [0, 1, 2])
def test_a_rehearsal_has_both_kinds(known, pairs, at_once, monkeypatch):
    one = source(known, pairs, at_once=at_once)
    asked = one.longest(2)
    assert [plan.at_once for plan in asked] == [i >= 2 - at_once for i in range(2)]
    size = sum(tree.tokens for tree in one.largest(asked, 100_000))
    most = sum(G * 4 * (sourcing.SCORED if plan.at_once else ROLLOUT.reply) for plan in asked)
    prompts = [prompt for plan in asked for prompt in plan.prompts]
    assert max(map(len, prompts)) + most < size < sum(map(len, prompts)) + most
    rooms = []
    monkeypatch.setattr(sourcing, "try_out", lambda _, __, how: rooms.append(how.reply))
    one.try_out(asked)
    assert rooms == [ROLLOUT.reply] * (at_once < 2) + [sourcing.SCORED] * (at_once > 0)


# Too long


def test_couples_too_long_give_way(known, pairs, monkeypatch):
    monkeypatch.setattr(sourcing, "rewards", worth())
    giants = [replace(pair, rejected=pair.rejected + " and on" * 400) for pair in pairs[:4]]
    giants = [replace(g, chosen=g.chosen + " and on" * 400) for g in giants]
    lesson = replace(BARE, longest=1200)
    one = source(known, [*giants, *pairs[4:]], lesson)
    for step in range(4):
        found = one.harvest(step, 1, 0.0, 0, "prompt")
        assert found.plans[0].asked.pairs[0].id in {pair.id for pair in pairs[4:]}
    assert one.curriculum.out == {pairs[0].id, pairs[2].id}
    lost = source(known, giants, lesson)
    with pytest.raises(InputError, match=r"reply of 6 tokens within 1200, found none among 2"):
        lost.harvest(0, 1, 0.0, 0, "prompt")


def test_a_couple_too_long_is_not_the_hardest(known, pairs, monkeypatch):
    """Nothing is known of it, so at the end of a run it would come before all that went well."""
    monkeypatch.setattr(sourcing, "rewards", worth())
    giants = [replace(pair, chosen=pair.chosen + " and on" * 400) for pair in pairs[:2]]
    giants[1] = replace(giants[1], chosen=pairs[1].chosen, rejected=giants[0].chosen)
    one = source(known, [*giants, *pairs[2:4]], replace(BARE, longest=1200))
    one.curriculum.window = 4
    one.curriculum.learn((pairs[2], pairs[3]), 0.9)
    one.curriculum.kinds = {}
    found = one.harvest(9, 1, 1.0, 0, "prompt")
    assert found.plans[0].asked.pairs[0].id == min(pairs[2].id, pairs[3].id)


# A rehearsal


def test_the_longest_prompts_first(known, pairs):
    """In tokens, those too long aside; and nobody hears of it."""
    giant = replace(pairs[0], id="giant", twin="", chosen=pairs[0].chosen + " and on" * 400)
    one = source(known, [giant, *pairs], replace(BARE, longest=1200))
    sizes = {p.id: max(map(len, plan.prompts)) for plan in one.longest(4) for p in plan.pairs}
    assert sizes.keys() == {pair.id for pair in pairs}
    found = [plan.pairs[0].id for plan in one.longest(2)]
    assert sizes[found[0]] == max(sizes.values())
    assert [sizes[name] for name in found] == sorted(set(sizes.values()), reverse=True)[:2]
    assert len(one.longest(9)) == 9  # a step of many couples has some twice
    assert (one.curriculum.out, one.curriculum.cursor) == (set(), 0)
    alone = source(known, [giant], replace(BARE, longest=1200))
    with pytest.raises(InputError, match="within 1200, found none among 1 couples"):
        alone.longest(1)


def test_instruments_are_made_up(known, pairs):
    """They have their words in the prompts, and are not asked."""
    one = source(known, pairs, replace(BARE, evidence=True))
    bare = [len(prompt) for plan in one.longest(4) for prompt in plan.prompts]

    def near(exemplars, texts):
        raise AssertionError("an instrument was asked")

    one.near = near
    told = [len(prompt) for plan in one.longest(4) for prompt in plan.prompts]
    assert sum(told) > sum(bare)


@pytest.mark.parametrize("budget", [100_000, 1_000, 1])
def test_the_largest_micro_batch(known, pairs, budget):
    one = source(known, pairs)
    asked = one.longest(2)
    size = sum(tree.tokens for tree in one.largest(asked, budget))
    prompts = [prompt for plan in asked for prompt in plan.prompts]
    assert size == {1: max(map(len, prompts)) + ROLLOUT.reply, 1_000: 1_000}.get(budget, size)
    if budget == 100_000:  # all of the step: each pair's exemplars once, and the replies
        replies = len(prompts) * G * ROLLOUT.reply
        assert max(map(len, prompts)) + replies < size < sum(map(len, prompts)) + replies
    targets = packing.batch(one.largest(asked, budget), CPU).targets
    assert len(targets) >= {1: ROLLOUT.reply}.get(budget, 4 * ROLLOUT.reply)
