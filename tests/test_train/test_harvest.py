"""The harvest: one numbering for all."""

import random
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from fixtures import make_base
from test_train_sft import short_pairs

from nanopersrm.model.tokenizer import Tokenizer
from nanopersrm.model.transformer import Model
from nanopersrm.model.weights import load
from nanopersrm.pairs import Pair
from nanopersrm.train import harvest, packing
from nanopersrm.train import source as sourcing
from nanopersrm.train.curriculum import Curriculum
from nanopersrm.train.harvest import Harvest
from nanopersrm.train.lessons import LessonConfig
from nanopersrm.train.rewards import PARTS, Plan, Reward, RewardConfig
from nanopersrm.train.rollouts import RolloutConfig
from nanopersrm.train.source import Source

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


def test_the_page_has_the_nine_digits_where_they_teach(drawn):
    """Of the first reply of the first prompt only, its chances and what each would have earned."""
    one = drawn.plans[0]
    chances, worth = [k / 45 for k in range(1, 10)], [k / 10 for k in range(9, 0, -1)]
    reply = one.groups[0][0]
    reply = replace(reply, rollout=replace(reply.rollout, chances=tuple(chances)))
    reward = replace(one.rewards[0][0], by_digit=tuple(worth))
    # Of two others one half is known: by the digit drawn, and without a digit of its own.
    groups = [[reply, reply, *one.groups[0][2:]], *one.groups[1:]]
    unread = [one.rewards[0][1], replace(one.rewards[0][2], by_digit=tuple(worth))]
    rewards = [[reward, *unread, *one.rewards[0][3:]], *one.rewards[1:]]
    page = replace(drawn, plans=[replace(one, groups=groups, rewards=rewards)]).page()
    assert (
        "\nchance of 1 to 9  0.02  0.04  0.07  0.09  0.11  0.13  0.16  0.18  0.20"
        "\nwhich would earn  0.90  0.80  0.70  0.60  0.50  0.40  0.30  0.20  0.10"
        f"\n{reply.rollout.reply}" in page
    )
    assert page.count("chance of") == page.count("would earn") == 1


def test_why_a_reply_is_worth_nothing_is_on_the_page(known, pairs):
    """With the real rewards, a random model's replies do not parse."""
    found = source(known, pairs).harvest(0, 1, 0.0, 0, "prompt")
    assert found.page().count("--- 0.000 (no </think>): format 0.00, order 0.00, ") == 4 * G
    assert found.numbers()["formed"] == 0.0


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
