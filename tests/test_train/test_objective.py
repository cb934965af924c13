"""The losses of a step: by plain forwards of whole texts, and however the step is cut up."""

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from nanopersrm import InputError
from nanopersrm.model.cache import Layout
from nanopersrm.model.lora import Lora, LoraConfig
from nanopersrm.model.transformer import Model
from nanopersrm.model.weights import load
from nanopersrm.train.contrast import contrast, log_odds
from nanopersrm.train.objective import ObjectiveConfig, sums
from nanopersrm.train.packing import Bundle, Text, batch, grow, pack, weights_of
from nanopersrm.train.presets import PRESETS

CPU = torch.device("cpu")
V = 131  # of the tiny models
HOW = PRESETS["tiny"]
DIGITS = tuple(range(40, 49))
CONFIG = ObjectiveConfig(0.8, 0.3, 0.6)
Loss = tuple[float, float, list[bool], list[float], list[torch.Tensor]]


@pytest.fixture(scope="module")
def model(tiny_base) -> Model:
    return load(tiny_base, torch.float32, CPU).train()


@pytest.fixture
def lora(model):
    """An adapter that is on and does something."""
    lora, random = Lora(model, LoraConfig(rank=4), 0), torch.Generator().manual_seed(3)
    with torch.no_grad():
        for _, B in lora.masters.values():
            B.normal_(0, 0.1, generator=random)
    lora.refresh()
    lora.on(model)
    yield lora
    lora.off(model)


def texts_of(n: int, weight: float, replies: int = 2) -> tuple[list[Text], int]:
    """Replies about the first candidates and a score line about each of 2 + n; the chosen one."""
    random = torch.Generator().manual_seed(n)

    def some(count: int) -> tuple[int, ...]:
        return tuple(torch.randint(50, V, (count,), generator=random).tolist())

    exemplars, texts = some(24 + 3 * n), []
    for k in range(2 + n):
        prompt = exemplars + some(17 + k)
        if k < replies:
            reply = some(5 + n)
            texts.append(Text(prompt + reply, len(prompt), weight))
        line = (*prompt, 7, 8)
        texts.append(Text(line, len(line), weight, len(line) - 1))
    return texts, len(texts) - 1


def bundle(n: int, weight: float = 1.0, name: str = "") -> Bundle:
    texts, chosen = texts_of(n, weight)
    return grow(name or f"pair {n}", texts, chosen)


def step(model: Model, lora: Lora, bundles: list[Bundle], budget: int, **how: Any) -> Loss:
    """A step as train_sft.py makes it: both losses, who is right, scores, gradients."""
    tokens, lists = weights_of(bundles)
    imitated = contrasted = 0.0
    right: dict[str, bool] = {}
    scores: dict[str, list[float]] = {}
    for micro in pack(bundles, budget):
        packed = batch(micro, CPU)
        found = sums(model, packed, DIGITS, CONFIG, replace(HOW, **how))
        (found.imitation / tokens + found.contrast / lists).backward()
        imitated += found.imitation.item() / tokens
        contrasted += found.contrast.item() / lists
        assert found.scores.shape == packed.digit_rows.shape
        for one, is_right, (first, count, _) in zip(micro, found.right, packed.lists, strict=True):
            right[one.name] = bool(is_right)
            scores[one.name] = found.scores[first : first + count].tolist()
    gradients = []
    for part in lora.parameters():
        assert part.grad is not None
        gradients.append(part.grad.clone())
        part.grad = None
    lora.refresh()
    return (
        imitated,
        contrasted,
        [right[one.name] for one in bundles],
        [score for one in bundles for score in scores[one.name]],
        gradients,
    )


def same(one: Loss, other: Loss) -> None:
    assert one[0] == pytest.approx(other[0], rel=1e-6)
    assert one[1] == pytest.approx(other[1], rel=1e-6)
    assert one[2] == other[2]
    assert one[3] == pytest.approx(other[3], rel=1e-5)
    for ours, theirs in zip(one[4], other[4], strict=True):
        assert theirs.any()
        assert (ours - theirs).abs().max() <= 1e-5 * theirs.abs().max()


def test_equals_plain_forwards_of_whole_texts(model, lora):
    """Every text alone, every log-softmax over all logits, every loop in Python."""
    pairs = {n: texts_of(n, 0.5 + n) for n in (0, 1, 3)}
    imitated, weight, lists, listed, own, right = [], 0.0, [], 0.0, [], []
    for n, (texts, chosen) in pairs.items():
        odds = []
        for i, text in enumerate(texts):
            ids = torch.tensor(text.ids)
            logits = model(ids, Layout.of([len(ids)])) @ model.head().T  # (T, V)
            for place in range(text.reply_from, len(ids)):
                log_p = F.log_softmax(logits[place - 1], -1)[ids[place]]
                imitated.append(-text.weight * log_p)
                weight += text.weight
            if text.digit_at >= 0:
                odds.append(logits[text.digit_at][list(DIGITS)])
                if i == chosen:
                    place_of_chosen = len(odds) - 1
        s = log_odds(torch.stack(odds))
        at = [(0, len(odds), place_of_chosen)]
        loss, _ = contrast(s, at, torch.ones(1), CONFIG.pair, CONFIG.list)
        right.append(int(s.argmax()) == place_of_chosen)
        lists.append((0.5 + n) * loss)
        listed += 0.5 + n
        own.append(torch.stack(odds).softmax(-1) @ torch.arange(1.0, 10))
    expected = CONFIG.imitation * torch.stack(imitated).sum() / weight
    expected_lists = torch.stack(lists).sum() / listed
    (expected + expected_lists).backward()
    slopes = [part.grad.clone() for part in lora.parameters() if part.grad is not None]
    for part in lora.parameters():
        part.grad = None
    lora.refresh()
    found = step(model, lora, [bundle(n, 0.5 + n) for n in pairs], 10_000)
    assert len(slopes) == len(lora.parameters())
    same(found, (expected.item(), expected_lists.item(), right, torch.cat(own).tolist(), slopes))
    assert 0.1 < expected_lists.item() < 5
    assert expected.item() > 1


@pytest.mark.parametrize("budget", [1, 150, 260, 400])
def test_many_micro_batches_are_one_batch(model, lora, budget):
    some = [bundle(n, weight) for n, weight in ((0, 1.0), (1, 0.25), (2, 3.0), (3, 1.0))]
    whole = step(model, lora, some, 10_000)
    parts = pack(some, budget)
    assert len(parts) > 1
    same(step(model, lora, some, budget), whole)


def test_recomputed_blocks_give_the_same(model, lora):
    some = [bundle(0), bundle(2)]
    plain = step(model, lora, some, 150)
    same(step(model, lora, some, 150, recompute=True), plain)
    same(step(model, lora, some, 150, recompute=True, offload=True), plain)


def test_weight_two_is_the_pair_twice(model, lora):
    heavy = step(model, lora, [bundle(0, 2.0), bundle(1)], 10_000)
    twice = step(model, lora, [bundle(0), bundle(0, 1.0, "again"), bundle(1)], 200)
    same((*heavy[:2], [], [], heavy[4]), (*twice[:2], [], [], twice[4]))
    once = step(model, lora, [bundle(0), bundle(1)], 10_000)
    assert once[0] != pytest.approx(heavy[0], rel=1e-4)
    assert once[1] != pytest.approx(heavy[1], rel=1e-4)


def test_weight_zero_is_no_pair(model, lora):
    with_it = step(model, lora, [bundle(0, 0.0), bundle(1)], 10_000)
    without = step(model, lora, [bundle(1)], 10_000)
    same((*with_it[:2], [], [], with_it[4]), (*without[:2], [], [], without[4]))


def test_only_the_reply_is_imitated(model, lora):
    """What stands in the prompt may change without a loss of its own: its ids are no targets."""
    texts, chosen = texts_of(0, 1.0)
    packed = batch([grow("pair", texts, chosen)], CPU)
    replies = [text.ids[text.reply_from :] for text in texts if text.digit_at < 0]
    assert sorted(packed.targets.tolist()) == sorted(i for reply in replies for i in reply)
    silent = replace(packed, weights=torch.zeros_like(packed.weights))
    assert sums(model, silent, DIGITS, CONFIG, HOW).imitation.item() == 0


def test_each_weight_of_the_config(model, lora):
    packed = batch([bundle(1), bundle(2)], CPU)

    def of(*weights: float) -> tuple[float, float]:
        found = sums(model, packed, DIGITS, ObjectiveConfig(*weights), HOW)
        return found.imitation.item(), found.contrast.item()

    imitation, pair = of(1, 1, 0)
    _, listed = of(1, 0, 1)
    assert of(2, 3, 5) == pytest.approx((2 * imitation, 3 * pair + 5 * listed), rel=1e-6)
    assert of(0, 1, 0) == (0.0, pytest.approx(pair))
    alone = sums(model, packed, DIGITS, ObjectiveConfig(0, 1, 0), HOW)
    (alone.imitation + alone.contrast).backward()  # there is a gradient all the same


def test_replies_without_lists_and_lists_without_replies(model, lora):
    texts, _ = texts_of(1, 1.0)
    told = grow("replies", [text for text in texts if text.digit_at < 0])
    found = sums(model, batch([told], CPU), DIGITS, CONFIG, HOW)
    assert found.contrast.item() == 0.0
    assert found.right.tolist() == found.scores.tolist() == []
    lines = [text for text in texts if text.digit_at >= 0]
    found = sums(model, batch([grow("lines", lines, 1)], CPU), DIGITS, CONFIG, HOW)
    assert found.imitation.item() == 0.0
    assert found.contrast.item() > 0
    (found.imitation + found.contrast).backward()


@pytest.mark.parametrize("weights", [(0, 0, 0), (-1, 1, 1), (1, math.nan, 1), (1, 1, math.inf)])
def test_weights_are_checked(weights):
    with pytest.raises(InputError, match=r"^expected numbers from 0"):
        ObjectiveConfig(*weights)
