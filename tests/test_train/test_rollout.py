"""Rollouts: prompts as a judge is asked them, ids as they were drawn, digits as a plain forward has
them, and trees that spell both."""

from collections import Counter
from dataclasses import replace

import pytest
import torch
from fixtures import CPU, digits_after, moved
from fixtures import prompts_of as judge_prompts
from training_runs import short_pairs

from nanopersrm import InputError
from nanopersrm.judge import verdict
from nanopersrm.judge.judgement import JudgeConfig
from nanopersrm.judge.prompts import messages
from nanopersrm.judge.reply import answer
from nanopersrm.model import sampler
from nanopersrm.model.sampler import Decoder
from nanopersrm.model.tokenizer import Tokenizer
from nanopersrm.model.transformer import Model
from nanopersrm.model.weights import load
from nanopersrm.pairs import Pair
from nanopersrm.train import packing, rollout
from nanopersrm.train.rewards import RewardConfig, reward
from nanopersrm.train.rollout import (
    AT_ONCE_TOKENS,
    Collector,
    Rollout,
    RolloutConfig,
    RolloutGroup,
    draw,
    empty_groups,
    metrics,
    page,
    sampler_log_probs,
    trees,
)

GOOD = "It fits.\n</think>\n<scores>A=7</scores>"
FORCED = verdict.closing("")[1]
PAIR = short_pairs()[0]
BARE = RolloutConfig(group=3, rows=12, reply=6, longest=10_000, evidence=False, seed=4)
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


def drawn(
    known: Known, prompts: list[list[int]], config: RolloutConfig, seed=0, opening=verdict.OPEN
) -> list[list[Rollout]]:
    """Prompts -> the replies to each."""
    groups = [RolloutGroup(PAIR, "chosen", prompt, opening) for prompt in prompts]
    draw(*known, groups, config, seed)
    return [group.rollouts for group in groups]


def write_replies(monkeypatch, written: list[list[int]]) -> None:
    """Row r draws written[r], in the order of the rows; probabilities stay the model's."""
    rows: dict[int, int] = {}

    def key(seed: int, name: int, place: int) -> tuple[int, int]:
        return rows.setdefault(name, len(rows)), place

    def draw(logits, counters, temperature):
        ids = torch.tensor([written[row][place] for row, place in counters.tolist()])
        log_probs = (logits / temperature).log_softmax(-1)
        return ids, log_probs.gather(-1, ids[:, None])[:, 0]

    monkeypatch.setattr(sampler, "draw_key", key)
    monkeypatch.setattr(sampler, "draw", draw)


def spelt(tokenizer: Tokenizer, text: str) -> list[int]:
    return [*tokenizer.encode(text), min(tokenizer.eos_ids)]


@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_digits_are_a_plain_forwards(known, monkeypatch, temperature):
    """At temperature 1 whatever the drawing has: they are the judge's probabilities."""
    model, tokenizer = known
    prompts = judge_prompts(tokenizer, 1)
    texts = [
        GOOD,
        "A 5 of 9, =7, B=8 and a = 3.",  # no label just before
        "A=3 is what I first\n</think>\n<scores>A=6</scores>A 4",  # the last A= counts
        "Cut before the digit\n</think>\n<scores>A=",
    ] * 2
    written = [spelt(tokenizer, text) for text in texts]
    write_replies(monkeypatch, written)
    config = replace(BARE, group=4, rows=8, reply=60, temperature=temperature)
    groups = drawn(known, prompts, config)
    for prompt, group in zip(prompts, groups, strict=True):
        for reply, ids in zip(group, written, strict=False):
            assert reply.ids == tuple(ids)
        for row in (0, 2):
            at = group[row].digit_at
            assert tokenizer.decode(written[row][:at]).endswith("A=")
            expected = digits_after(model, tokenizer, prompt + written[row][:at])
            assert group[row].digit_probs == pytest.approx(expected.tolist(), abs=1e-6)
            scaled = expected ** (1 / temperature)
            drawn_probs = (scaled / scaled.sum()).tolist()
            assert group[row].drawn_probs == pytest.approx(drawn_probs, abs=1e-5)
        for row in (1, 3):
            assert (group[row].digit_at, group[row].digit_probs) == (-1, None)
    assert groups[0][0].digit_probs != groups[1][0].digit_probs  # each by its own prompt


def test_at_once_digits_are_those_of_a_judge_that_does_not_think(known, monkeypatch):
    """The score line is given: a reply begins with its digit, and its text has the whole form."""
    model, tokenizer = known
    prompts = judge_prompts(tokenizer, 1)
    whole = [prompt + tokenizer.encode(FORCED) for prompt in prompts]
    write_replies(monkeypatch, [spelt(tokenizer, "7</scores>")] * 4)
    config = replace(BARE, group=2, rows=4, reply=16)
    groups = drawn(known, whole, config, opening=verdict.OPEN + FORCED)
    judged = answer(model, tokenizer, prompts, 1, JudgeConfig(think=False))
    for group, [judged_reply] in zip(groups, judged, strict=True):
        for reply in group:
            assert verdict.parse(reply.text, "A").scores == {"A": 7}
            assert reply.digit_at == 0
            assert reply.digit_probs == pytest.approx(judged_reply.digits, abs=1e-5)


def test_ids_are_kept_as_drawn(known, monkeypatch):
    """Not as the text would be encoded; the stop token is one of them, and no part of the text."""
    _, tokenizer = known
    odd = [i for letter in "scores" for i in tokenizer.encode(letter)]
    assert tokenizer.encode("scores") != odd
    written = [odd + spelt(tokenizer, GOOD), spelt(tokenizer, GOOD), spelt(tokenizer, GOOD + " 7")]
    write_replies(monkeypatch, written)
    prompt = judge_prompts(tokenizer, 1)[:1]
    (group,) = drawn(known, prompt, replace(BARE, group=3, rows=3, reply=60))
    assert [reply.ids for reply in group] == [tuple(ids) for ids in written]
    assert all(len(reply.log_probs) == len(reply.ids) for reply in group)
    texts = (f"scores{GOOD}", GOOD, f"{GOOD} 7")
    assert [reply.text for reply in group] == [verdict.OPEN + text for text in texts]


@pytest.fixture(scope="module")
def free(known) -> tuple[list[list[int]], list[list[Rollout]]]:
    """Prompts, and replies that nothing forced, all side by side."""
    tokenizer = known[1]
    prompts = [*judge_prompts(tokenizer, 1), judge_prompts(tokenizer, 2)[0]]
    return prompts, drawn(known, prompts, replace(BARE, group=4, rows=12, reply=20), 9)


@pytest.mark.parametrize(("rows", "most", "turns"), [(7, 100_000, 3), (100, 360, 0)])
def test_memory_does_not_move_a_reply(known, free, rows, most, turns, monkeypatch):
    """However many run side by side, and if it is one; and no more is held than there is room."""
    held: list[tuple[int, int]] = []
    fork = Decoder.fork

    def watched(self: Decoder, counts: list[int], room: int, first: int = 0) -> None:
        fork(self, counts, room, first)
        levels = (level.keys for level in self.cache.levels)  # tokens that they have room for:
        held.append((sum(keys.shape[1] * keys.shape[3] for keys in levels), sum(counts)))

    monkeypatch.setattr(Decoder, "fork", watched)
    monkeypatch.setattr(rollout, "slots_of", lambda *_: most)
    prompts, expected = free
    groups = drawn(known, prompts, replace(BARE, group=4, rows=rows, reply=20), 9)
    longest = max(map(len, prompts))
    assert max(tokens for tokens, _ in held) <= max(most, longest + 20)  # one reply at least
    assert max(count for _, count in held) <= rows
    assert sum(count for _, count in held) == 12
    assert not turns or len(held) == turns
    for group, others in zip(groups, expected, strict=True):
        for reply, other in zip(group, others, strict=True):
            assert reply.ids == other.ids
            assert reply.log_probs == pytest.approx(other.log_probs, abs=1e-4)


@pytest.mark.parametrize("at_once", [False, True])
def test_the_four_prompts_are_those_of_a_judge(known, pairs, at_once):
    _, tokenizer = known
    groups = empty_groups(pairs[:2], tokenizer, BARE, None, at_once)
    assert groups is not None
    assert [group.role for group in groups] == ["chosen", "rejected"] * 2
    assert [group.at_once for group in groups] == [at_once] * 4
    for group, pair in zip(groups, (pairs[0], pairs[0], pairs[1], pairs[1]), strict=True):
        text = getattr(pair, group.role).strip()
        assert group.candidate == text
        exemplars = [exemplar.strip() for exemplar in pair.exemplars]
        chat = messages(exemplars, [text], pair.question or None)
        prompt = tokenizer.chat(chat, continuation=verdict.OPEN)
        assert group.prompt == prompt + tokenizer.encode(FORCED if at_once else "")
        assert tokenizer.decode(group.prompt).endswith(group.opening)


def test_every_epoch_has_every_pair_in_another_order(known: Known, pairs):
    collector = Collector(*known, pairs, BARE, None)
    epochs = [[collector.next_pair() for _ in range(4)] for _ in range(3)]
    for epoch in epochs:
        assert {pair.id for both in epoch for pair in both} == {pair.id for pair in pairs}
        assert all(pair.twin == twin.id for pair, twin in epoch)
    assert len({str([both[0].id for both in epoch]) for epoch in epochs}) > 1
    resumed = Collector(*known, pairs, BARE, None)
    resumed.pairs_seen = 6
    assert [resumed.next_pair() for _ in range(6)] == [*epochs[1][2:], *epochs[2]]


def test_a_step_follows_from_seed_and_number(known: Known, pairs):
    def ids(seed: int, step: int) -> list[tuple[int, ...]]:
        collector = Collector(*known, pairs[:2], replace(BARE, seed=seed), None)
        (groups,) = collector.collect(step)
        return [reply.ids for group in groups for reply in group.rollouts]

    assert ids(4, 0) == ids(4, 0)
    assert len({str(ids(seed, step)) for seed, step in ((4, 0), (4, 1), (5, 0))}) == 3


def test_some_pairs_reason_and_others_answer_at_once(known: Known, pairs):
    """What reasons is drawn as it would be alone."""
    alone = Collector(*known, pairs, BARE, None).collect(0)
    both = Collector(*known, pairs, replace(BARE, twin_pairs=3, at_once=2), None).collect(0)
    assert [groups[0].at_once for groups in both] == [False, True, True]
    assert [group.rollouts for group in both[0]] == [group.rollouts for group in alone[0]]
    assert len({groups[0].pair.id for groups in both}) == 3
    for group in [group for groups in both[1:] for group in groups]:
        assert all(reply.text.startswith(group.opening) for reply in group.rollouts)
        assert max(len(reply.ids) for reply in group.rollouts) <= AT_ONCE_TOKENS
    for groups in (*both, *alone):
        reward(groups, RewardConfig())
    numbers = metrics([group for groups in both for group in groups])
    assert {"right_reasoned", "right_at_once"} <= numbers.keys()
    assert "right_at_once" not in metrics(alone[0])


def test_pairs_too_long_give_way(known: Known, pairs):
    text = " and on" * 400
    giants = [replace(p, chosen=p.chosen + text, rejected=p.rejected + text) for p in pairs[:4]]
    config = replace(BARE, longest=1200)
    collector = Collector(*known, [*giants, *pairs[4:]], config, None)
    seen = Counter(collector.next_groups()[0].pair.id for _ in range(4))
    assert len(seen) == 2
    assert set(seen) <= {pair.id for pair in pairs[4:]}
    for few, word in ((giants, "--longest"), ([replace(pairs[0], weight=0.0)], "weight")):
        with pytest.raises(InputError, match=word):
            Collector(*known, few, config, None)


@pytest.fixture
def groups(known, pairs) -> list[RolloutGroup]:
    """Of a pair and its twin, with replies of ids that stand in no prompt."""
    groups, first = empty_groups(pairs[:2], known[1], BARE, None), 1000
    assert groups is not None
    for group, size in zip(groups, (2, 3, 2, 4), strict=True):
        for _ in range(size):
            ids = tuple(range(first, first + 3 + first % 4))
            group.rollouts.append(Rollout(ids, tuple(-i / 1e4 for i in ids), ""))
            first += len(ids)
    return groups


@pytest.mark.parametrize("budget", [100_000, 700, 1])
@pytest.mark.parametrize("kept", [(1, 1, 1, 1), (1, 0, 0, 1), (0, 0, 0, 0)])
def test_every_kept_reply_once_as_it_was_drawn(groups, budget, kept):
    """However small the budget: the drawn ids by the number of their reply, and their log-probs."""
    rollouts = [reply for group in groups for reply in group.rollouts]
    keep = [bool(k) for k, group in zip(kept, groups, strict=True) for _ in group.rollouts]
    seen: dict[int, tuple[int, ...]] = {}
    grown = trees(groups, [bool(k) for k in kept], budget)
    for tree in grown:
        packed = packing.batch([tree], CPU)
        numbers = packed.owners.unique_consecutive().tolist()
        assert tree.tokens <= budget or len(numbers) == 1
        for number in numbers:
            assert number not in seen
            seen[number] = tuple(packed.targets[packed.owners == number].tolist())
        expected = [p for number in numbers for p in rollouts[number].log_probs]
        assert sampler_log_probs(rollouts, packed.owners).tolist() == pytest.approx(expected)
    assert seen == {i: reply.ids for i, reply in enumerate(rollouts) if keep[i]}
    if budget == 100_000 and all(kept):
        assert [tree.name for tree in grown] == [groups[0].pair.id, groups[2].pair.id]


def test_numbers_and_page(known, groups):
    for group in groups:
        for i, reply in enumerate(group.rollouts):
            reply.text, reply.reward, reply.parts = f"text {i}", i / 4, {"order": i / 4}
    best = groups[0].rollouts[1]
    best.drawn_probs, best.by_digit = (1 / 9,) * 9, tuple(k / 10 for k in range(9, 0, -1))
    groups[1].rollouts[0].problem = "no score"
    numbers = metrics(groups)
    assert numbers["reward"] == numbers["right"] == pytest.approx(11 / 4 / 11)
    assert numbers["formed"] == pytest.approx(10 / 11)
    for text, group in zip(page(groups).split(rollout.RULE), groups, strict=True):
        assert text.startswith(f"{group.pair.id}, exemplars of {group.pair.author}, A is ")
        totals = [float(line.split()[1][:5]) for line in text.splitlines() if line[:4] == "--- "]
        assert totals == sorted((reply.reward for reply in group.rollouts), reverse=True)
    assert page(groups).count("chance of 1 to 9") == page(groups).count("(no score)") == 1
