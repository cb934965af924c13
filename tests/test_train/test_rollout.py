"""Rollouts: prompts as a judge is asked them, replies as a judge draws them, trees of what was
drawn."""

from dataclasses import replace

import pytest
import torch
from fixtures import CPU, WEIGHED, moved
from training_runs import short_pairs

from nanopersrm import InputError
from nanopersrm.judge.reply import Reply, choice_ids
from nanopersrm.judge.reply import draw as judge_draws
from nanopersrm.model.sampler import Decoder, sample_name
from nanopersrm.model.tokenizer import Tokenizer
from nanopersrm.model.transformer import Model
from nanopersrm.model.weights import load
from nanopersrm.pairs import Pair
from nanopersrm.style.ledger import Measurer
from nanopersrm.train import packing, rollout
from nanopersrm.train.rewards import RewardConfig, reward
from nanopersrm.train.rollout import (
    ROLES,
    Collector,
    RolloutConfig,
    RolloutGroup,
    draw_groups,
    metrics,
    page,
    sampler_log_probs,
    score_digits,
    trees,
)
from nanopersrm.train.sft_data import prompts_of, stripped

CONFIG = RolloutConfig(group=3, rows=12, think_lines=3, longest=10_000, seed=4)
FREE = replace(CONFIG, free=True, think_tokens=8)
MEASURER = Measurer(WEIGHED)
Known = tuple[Model, Tokenizer]


@pytest.fixture(scope="module")
def known(base) -> Known:
    """A random model, its adapter on and not zero, and its tokenizer."""
    model = load(base, torch.float32, CPU)
    moved(model, 3).on(model)
    return model, Tokenizer.load(base)


@pytest.fixture(scope="module")
def pairs() -> list[Pair]:
    return short_pairs()[:8]  # four, each with its twin


def collector_of(known: Known, pairs: list[Pair], config: RolloutConfig = CONFIG) -> Collector:
    return Collector(*known, pairs, config, MEASURER)


def replies_of(groups: list[RolloutGroup]) -> list[Reply]:
    return [drawn.reply for group in groups for drawn in group.rollouts]


@pytest.mark.parametrize("config", [CONFIG, replace(CONFIG, temperature=0.5), FREE])
def test_replies_are_those_of_a_judge(known, pairs, config):
    """To the prompts of a judge, each text without white space around it, with the same seed."""
    model, tokenizer = known
    padded = [replace(pair, chosen=f"\n{pair.chosen} ") for pair in pairs[:2]]
    (groups,) = collector_of(known, padded, config).collect(7)
    about = [
        (stripped(pair), role) for pair in sorted(padded, key=lambda p: p.id) for role in ROLES
    ]
    assert {(group.pair.id, group.role) for group in groups} == {(p.id, r) for p, r in about}
    for first in (0, 2):
        pair = groups[first].pair
        prompts = prompts_of(pair, tokenizer, MEASURER, pair.author, free=config.free)
        assert [group.prompt.ids for group in groups[first : first + 2]] == [p.ids for p in prompts]
    judging = config.judging(config.group, sample_name([config.seed, 7, 0]) >> 1)
    drawn = judge_draws(model, tokenizer, [group.prompt for group in groups], judging)
    assert replies_of(groups) == [reply for some in drawn for reply in some]
    assert len({str(reply.ids) for reply in replies_of(groups)}) > 4
    for reply in replies_of(groups):
        assert len(reply.choices) <= config.most_choices


@pytest.mark.parametrize(("rows", "most"), [(7, 10**6), (2, 10**6), (100, 600), (100, 0)])
def test_memory_does_not_move_a_reply(known, pairs, rows, most, monkeypatch):
    """However many run side by side, and if it is one; and no more is held than there is room."""
    (expected,) = collector_of(known, pairs[:2]).collect(0)
    held: list[tuple[int, int]] = []
    fork = Decoder.fork

    def watched(self: Decoder, counts: list[int], room: int, first: int = 0) -> None:
        fork(self, counts, room, first)
        levels = (level.keys for level in self.cache.levels)  # tokens that they have room for:
        held.append((sum(keys.shape[1] * keys.shape[3] for keys in levels), sum(counts)))

    monkeypatch.setattr(Decoder, "fork", watched)
    monkeypatch.setattr(rollout, "slots_of", lambda *_: most)
    groups = [RolloutGroup(group.pair, group.role, group.prompt) for group in expected]
    config = replace(CONFIG, rows=rows)
    model, tokenizer = known
    draw_groups(model, tokenizer, groups, config, sample_name([CONFIG.seed, 0, 0]) >> 1)
    room = rollout.reply_room([group.prompt for group in groups], config.judging(1, 0))
    longest = max(len(group.prompt.ids) for group in groups)
    assert max(tokens for tokens, _ in held) <= max(most, longest + room)  # one reply at least
    assert max(count for _, count in held) <= rows
    assert sum(count for _, count in held) == 4 * CONFIG.group
    assert len(held) > 1
    for reply, other in zip(replies_of(groups), replies_of(expected), strict=True):
        assert reply.ids == other.ids
        ours, theirs = ([c.log_prob for c in r.choices] for r in (reply, other))
        assert ours == pytest.approx(theirs, abs=1e-4)


def test_every_epoch_has_every_pair_in_another_order(known, pairs):
    """And a run that goes on with its `pairs_seen` sees what it would have seen."""
    collector = collector_of(known, pairs)
    epochs = [[collector.next_pair() for _ in range(4)] for _ in range(3)]
    for epoch in epochs:
        assert {pair.id for both in epoch for pair in both} == {pair.id for pair in pairs}
        assert all(pair.twin == twin.id for pair, twin in epoch)
    assert len({str([both[0].id for both in epoch]) for epoch in epochs}) > 1
    resumed = collector_of(known, pairs)
    resumed.pairs_seen = 6
    assert [resumed.next_pair() for _ in range(6)] == [*epochs[1][2:], *epochs[2]]
    assert resumed.pairs_seen == 12


def test_a_step_follows_from_seed_and_number(known, pairs):
    def ids(seed: int, step: int) -> list[list[int]]:
        (groups,) = collector_of(known, pairs[:2], replace(CONFIG, seed=seed)).collect(step)
        return [reply.ids for reply in replies_of(groups)]

    assert ids(4, 0) == ids(4, 0)
    assert len({str(ids(seed, step)) for seed, step in ((4, 0), (4, 1), (5, 0))}) == 3


def test_pairs_too_long_give_way(known, pairs):
    text = " and on" * 400
    giants = [replace(p, chosen=p.chosen + text, rejected=p.rejected + text) for p in pairs[:4]]
    collector = collector_of(known, [*giants, *pairs[4:]], replace(CONFIG, longest=2000))
    seen = [collector.next_groups()[0].pair.id for _ in range(4)]
    assert len(set(seen)) == 2
    assert set(seen) <= {pair.id for pair in pairs[4:]}
    for few, word in ((giants, "--longest"), ([replace(pairs[0], weight=0.0)], "weight")):
        with pytest.raises(InputError, match=word):
            collector_of(known, few, replace(CONFIG, longest=2000))


@pytest.fixture(scope="module", params=[CONFIG, FREE], ids=["ledgers", "free"])
def groups(request, known, pairs) -> list[RolloutGroup]:
    """Of two pairs with their twins, the second of two replies to a prompt."""
    both = collector_of(known, pairs, replace(request.param, twin_pairs=2)).collect(0)
    for group in both[1]:
        del group.rollouts[2:]
    return [group for groups in both for group in groups]


@pytest.mark.parametrize("budget", [100_000, 1200, 1])
@pytest.mark.parametrize("kept", [(1, 1) * 4, (1, 0, 0, 1, 1, 1, 0, 0), (0,) * 8])
def test_trees_have_what_was_drawn_and_no_other_target(groups, known, budget, kept):
    """However small the budget: each kept reply once, with what it was drawn out of."""
    rollouts = [drawn for group in groups for drawn in group.rollouts]
    keep = [bool(k) for k, group in zip(kept, groups, strict=True) for _ in group.rollouts]
    prompts = [group.prompt.ids for group in groups for _ in group.rollouts]
    choices = choice_ids(known[1]).all
    seen: dict[int, list[tuple[int, tuple[int, ...]]]] = {}
    grown = trees(groups, [bool(k) for k in kept], budget)
    for tree in grown:
        assert tree.tokens <= budget or len(tree.texts) == 1
        for text in tree.texts:
            assert [*text.ids] == [*prompts[text.number], *rollouts[text.number].reply.ids[:-1]]
        packed = packing.batch([tree], choices, CPU)
        numbers = packed.owners.unique_consecutive().tolist()
        for number in numbers:
            assert number not in seen
            mine = packed.owners == number
            seen[number] = [
                (drawn, tuple(sorted(packed.choices[row].tolist())))
                for drawn, row in zip(
                    packed.drawn[mine].tolist(), packed.allowed[mine], strict=True
                )
            ]
        expected = [c.log_prob for n in numbers for c in rollouts[n].reply.choices]
        assert sampler_log_probs(rollouts, packed.owners).tolist() == pytest.approx(expected)
    assert seen == {
        i: [(one.reply.ids[c.at], tuple(sorted(c.allowed))) for c in one.reply.choices]
        for i, one in enumerate(rollouts)
        if keep[i]
    }
    if budget == 100_000 and all(kept):
        assert [tree.name for tree in grown] == [group.pair.id for group in groups[::2]]


def test_numbers_digits_and_page(groups, known):
    for some in (groups[:4], groups[4:]):
        reward(some, RewardConfig(), CONFIG.think_lines)
    rollouts = [drawn for group in groups for drawn in group.rollouts]
    numbers, digits = metrics(groups), score_digits(rollouts)
    assert numbers["right"] == numbers["reward_order"]
    assert numbers["lines"] == sum(len(r.reply.features) for r in rollouts) / len(rollouts)
    assert numbers["reward"] == pytest.approx(sum(r.reward for r in rollouts) / len(rollouts))
    torch.testing.assert_close(digits.probs.sum(-1), torch.ones(len(rollouts)).double())
    for probs, one in zip(digits.probs.tolist(), rollouts, strict=True):
        assert (last := one.reply.choices[-1]).at == len(one.reply.ids) - 1
        assert probs[one.reply.digit - 1] == pytest.approx(torch.tensor(last.log_prob).exp())
    pages = page(groups, known[1]).split(rollout.RULE)
    for text, group in zip(pages, groups, strict=True):
        assert text.startswith(f"{group.pair.id}, exemplars of {group.pair.author}, A is ")
        totals = [float(line.split()[1][:5]) for line in text.splitlines() if line[:4] == "--- "]
        best = sorted((drawn.reward for drawn in group.rollouts), reverse=True)
        assert totals == pytest.approx(best, abs=6e-4)
