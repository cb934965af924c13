"""The source: what is drawn, flat plans replaced so often and no oftener, and a rehearsal."""

from dataclasses import replace

import pytest
from test_harvest import BARE, CPU, ROLLOUT, G, drawn, known, pairs, source, worth
from test_rollouts import script, spelt

from nanopersrm import InputError
from nanopersrm.judge.answer import FORCED_ROOM
from nanopersrm.judge.verdict import closing
from nanopersrm.train import packing
from nanopersrm.train import source as sourcing
from nanopersrm.train.curriculum import Curriculum
from nanopersrm.train.plans import SCORED

__all__ = ["drawn", "known", "pairs"]  # fixtures


# Drawing


def test_a_step_follows_from_seed_number_and_curriculum(known, pairs, monkeypatch):
    monkeypatch.setattr(sourcing, "rewards", worth())
    ids: dict[tuple[int, int], list[tuple[int, ...]]] = {}
    for seed, step in ((4, 0), (4, 0), (4, 1), (5, 0)):
        found = source(known, pairs, seed=seed).harvest(step, 1, 0.0, 0, "prompt")
        own = [one.ids for group in found.plans[0].groups for one in group]
        assert ids.setdefault((seed, step), own) == own
    assert len({str(own) for own in ids.values()}) == 3


@pytest.mark.parametrize("at_once", [0, 2, 3])
def test_the_curriculum_hears_of_all(known, pairs, monkeypatch, at_once):
    monkeypatch.setattr(sourcing, "rewards", worth())
    one = source(known, pairs, at_once=at_once)
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


def test_no_more_plans_than_asked(known, pairs, monkeypatch):
    """One of two is flat: one more is drawn, not two."""
    order = [couple[0] for couple in Curriculum(pairs, 1, 0).draw(4, 0.0)]
    dull = {order[0].chosen.strip()}
    monkeypatch.setattr(sourcing, "rewards", worth(lambda text: text in dull))
    one = source(known, pairs)
    found = one.harvest(0, 2, 0.0, 5, "prompt")
    assert [plan.asked.pairs[0].id for plan in found.plans] == [order[1].id, order[2].id]
    assert (found.replaced, one.curriculum.cursor) == (1, 3)


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
        assert max(len(reply.ids) for reply in replies) <= SCORED
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
    """Each with the longest prompts, and with replies as long as its own may be."""
    one = source(known, pairs, at_once=at_once)
    asked = one.longest(2)
    assert [plan.at_once for plan in asked] == [i >= 2 - at_once for i in range(2)]
    most = source(known, pairs).longest(2)
    kinds = [(i - (2 - at_once) if plan.at_once else i, plan) for i, plan in enumerate(asked)]
    for place, plan in kinds:
        assert plan.pairs == most[place].pairs
    (_, forced) = closing("")
    given = len(known[1].encode(forced))
    whole, shorter = [sum(tree.tokens for tree in one.largest(x, 100_000)) for x in (asked, most)]
    if at_once == 2:  # the same couples: what is given once a prompt, and other replies
        assert whole - shorter == 8 * (given + G * (SCORED - ROLLOUT.reply))
    elif at_once == 0:
        assert whole == shorter
    rooms = []
    monkeypatch.setattr(sourcing, "try_out", lambda _, __, how: rooms.append(how.reply))
    one.try_out(asked)
    assert rooms == [ROLLOUT.reply] * (at_once < 2) + [SCORED] * (at_once > 0)


def test_a_reply_at_once_has_room(known):
    _, tokenizer = known
    _, forced = closing("")
    assert len(tokenizer.encode("7 B=3</scores>")) + 1 <= SCORED
    assert len(tokenizer.encode(forced)) + SCORED <= FORCED_ROOM


@pytest.mark.parametrize("at_once", [0, 1, 2])
def test_what_is_too_long_is_so_for_both_kinds(known, pairs, at_once):
    """A reply at once needs the room of what is given as well, also where reasoning is shorter."""
    sizes = sorted(max(map(len, plan.prompts)) for plan in source(known, pairs).longest(4))
    room = FORCED_ROOM if at_once else ROLLOUT.reply
    for spare, fits in ((0, True), (-1, False)):
        lesson = replace(BARE, longest=sizes[0] + room + spare)
        one = source(known, pairs, lesson, at_once=at_once)
        if fits:
            assert len({plan.pairs[0].id for plan in one.longest(2)}) == sizes.count(sizes[0])
            for plan in one.harvest(0, 2, 0.0, 0, "prompt").plans:
                assert max(map(len, plan.asked.prompts)) + SCORED <= sizes[0] + FORCED_ROOM
        else:
            for call in (
                lambda one=one: one.longest(2),
                lambda one=one: one.harvest(0, 2, 0, 0, ""),
            ):
                with pytest.raises(InputError, match=f"leave room for a reply of {room} tokens"):
                    call()


def test_in_expectation_a_digit_is_enough_to_teach(known, pairs, monkeypatch):
    """All replies of a group earn the same, and what else they might have drawn does not."""
    _, tokenizer = known
    script(monkeypatch, [spelt(tokenizer, "7</scores>")] * 4 * G)
    one = source(known, pairs[:2], at_once=1)
    one.reward = replace(one.reward, expected=True)
    found = one.harvest(0, 1, 0.0, 3, "prompt")
    totals = [{reward.total for reward in group} for group in found.plans[0].rewards]
    assert [len(own) for own in totals] == [1] * 4
    assert (found.replaced, found.plans[0].flat("prompt")) == (0, False)
    certain = [
        [replace(reward, by_digit=(reward.total,) * 9) for reward in group]
        for group in found.plans[0].rewards
    ]
    assert replace(found.plans[0], rewards=certain).flat("prompt")
    one.reward = replace(one.reward, expected=False)
    monkeypatch.undo()
    script(monkeypatch, [spelt(tokenizer, "7</scores>")] * 4 * G)
    assert one.harvest(0, 1, 0.0, 0, "prompt").plans[0].flat("prompt")


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
