"""The losses of a step: by hand, by plain loops and forwards, and however the step is cut up."""

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tiny_bases import CPU, random_lora
from torch import Tensor

from nanopersrm import InputError
from nanopersrm.model.cache import Layout
from nanopersrm.model.lora import Lora, LoraConfig
from nanopersrm.model.transformer import Model
from nanopersrm.model.weights import load
from nanopersrm.train.objective import SftWeights, contrast, log_odds, loss_sums
from nanopersrm.train.packing import Branch, PrefixTree, batch, build_tree, pack, total_weights
from nanopersrm.train.presets import PRESETS

V = 131  # of the tiny models
PRESET = PRESETS["tiny"]
DIGITS = tuple(range(40, 49))
CONFIG = SftWeights(0.3, 0.6)
LISTS = [(0, 4, 2), (4, 1, 0), (5, 2, 1), (8, 3, 0)]  # one candidate alone; 7 is of no list
Loss = tuple[float, float, list[bool], list[float], list[torch.Tensor]]


def random(*shape: int, seed: int = 0, spread: float = 2.0) -> Tensor:
    return spread * torch.randn(
        *shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64
    )


def slowly(s: list[float], pair: float, listed: float) -> float:
    """Both losses with probabilities and nothing else."""
    total = 0.0
    for first, count, chosen in LISTS:
        own = s[first : first + count]
        share = math.exp(own[chosen]) / sum(math.exp(x) for x in own)
        rivals = [x for k, x in enumerate(own) if k != chosen]
        lost = [-math.log(1 / (1 + math.exp(x - own[chosen]))) for x in rivals]
        total += listed * -math.log(share) + pair * (sum(lost) / len(lost) if lost else 0.0)
    return total


def test_the_worked_example():
    z = torch.zeros(2, 9)
    z[1, 8] = math.log(5)
    s = log_odds(z)
    assert s.tolist() == pytest.approx([0.0, math.log(2)], abs=1e-6)
    for weights in ((1.0, 0.0), (0.0, 1.0), (0.5, 0.5)):
        loss, right = contrast(s, [(0, 2, 1)], *weights)
        assert float(loss) == pytest.approx(math.log(3 / 2), abs=1e-6)  # 0.405
        assert right.tolist() == [True]
    assert float(contrast(s, [(0, 2, 0)], 1.0, 0.0)[0]) == pytest.approx(math.log(3), abs=1e-6)


@pytest.mark.parametrize(("pair", "listed"), [(1.0, 0.0), (0.0, 1.0), (0.3, 0.9)])
def test_equals_plain_loops(pair, listed):
    s = random(11)
    loss, right = contrast(s, LISTS, pair, listed)
    assert float(loss) == pytest.approx(slowly(s.tolist(), pair, listed), rel=1e-9)
    best = [int(s[first : first + count].argmax()) for first, count, _ in LISTS]
    assert right.tolist() == [k == chosen for k, (_, _, chosen) in zip(best, LISTS, strict=True)]


def test_gradients_against_finite_differences():
    def loss(z: Tensor) -> Tensor:
        return contrast(log_odds(z), LISTS, 0.4, 0.7)[0]

    z = random(11, 9).requires_grad_()
    assert torch.autograd.gradcheck(loss, (z,))
    loss(z).backward()
    assert z.grad is not None
    assert not z.grad[[4, 7]].any()  # a list of one, and a row of no list
    assert not z.grad[:, 4].any()


@pytest.fixture(scope="module")
def model(tiny_base) -> Model:
    return load(tiny_base, torch.float32, CPU).train()


@pytest.fixture
def lora(model):
    """An adapter that is on and does something."""
    lora = random_lora(model, LoraConfig(rank=4), size=0.1)
    lora.on(model)
    yield lora
    lora.off(model)


def texts_of(n: int, replies: int = 2) -> tuple[list[Branch], int]:
    """Replies about the first candidates and a score line about each of 2 + n; the chosen one."""
    random = torch.Generator().manual_seed(n)

    def some(count: int) -> tuple[int, ...]:
        return tuple(torch.randint(50, V, (count,), generator=random).tolist())

    exemplars, texts = some(24 + 3 * n), []
    for k in range(2 + n):
        prompt = exemplars + some(17 + k)
        if k < replies:
            texts.append(Branch(prompt + some(5 + n), len(prompt), tail=2))
        line = (*prompt, 7, 8)
        texts.append(Branch(line, len(line), len(line) - 1))
    return texts, len(texts) - 1


def tree(n: int) -> PrefixTree:
    return build_tree(f"pair {n}", *texts_of(n))


def slopes(lora: Lora) -> list[Tensor]:
    """The gradients, which then are gone."""
    gradients = [part.grad for part in lora.parameters() if part.grad is not None]
    for part in lora.parameters():
        part.grad = None
    lora.refresh()
    return gradients


def step(model: Model, lora: Lora, trees: list[PrefixTree], budget: int, **changes: Any) -> Loss:
    """A step as train_sft.py makes it: both losses, who is right, scores, gradients."""
    tokens, lists = total_weights(trees)
    imitated = contrasted = 0.0
    right: dict[str, bool] = {}
    scores: dict[str, list[float]] = {}
    for micro in pack(trees, budget):
        packed = batch(micro, CPU)
        sums = loss_sums(model, packed, DIGITS, CONFIG, replace(PRESET, **changes))
        (sums.imitation / tokens + sums.contrast / lists).backward()
        imitated += sums.imitation.item() / tokens
        contrasted += sums.contrast.item() / lists
        for name, is_right, (first, count, _) in zip(
            packed.names, sums.right, packed.lists, strict=True
        ):
            right[name] = bool(is_right)
            scores[name] = sums.scores[first : first + count].tolist()
    names = [tree.name for tree in trees]
    every = [score for name in names for score in scores[name]]
    return imitated, contrasted, [right[name] for name in names], every, slopes(lora)


def same(ours: Loss, theirs: Loss) -> None:
    assert ours[:2] == pytest.approx(theirs[:2], rel=1e-6)
    assert ours[2] == theirs[2]
    assert ours[3] == pytest.approx(theirs[3], rel=1e-5)
    for a, b in zip(ours[4], theirs[4], strict=True):
        assert b.any()
        assert (a - b).abs().max() <= 1e-5 * b.abs().max()


def test_equals_plain_forwards_of_whole_texts(model, lora):
    """Every text alone, every log-softmax over all logits, every loop in Python."""
    imitated, weight, lists, scores, right = [], 0.0, [], [], []
    for n in (0, 1, 3):
        texts, chosen = texts_of(n)
        odds = []
        for i, text in enumerate(texts):
            ids = torch.tensor(text.ids)
            logits = model(ids, Layout.of([len(ids)])) @ model.head().T  # (T, V)
            for place, w in enumerate(text.weights, text.reply_from):
                imitated.append(-w * F.log_softmax(logits[place - 1], -1)[ids[place]])
                weight += w
            if text.digit_at >= 0:
                odds.append(logits[text.digit_at][list(DIGITS)])
                if i == chosen:
                    place_of_chosen = len(odds) - 1
        s = log_odds(torch.stack(odds))
        lists.append(contrast(s, [(0, len(odds), place_of_chosen)], CONFIG.pair, CONFIG.list)[0])
        right.append(int(s.argmax()) == place_of_chosen)
        scores.append(torch.stack(odds).softmax(-1) @ torch.arange(1.0, 10))
    expected, expected_lists = torch.stack(imitated).sum() / weight, torch.stack(lists).mean()
    (expected + expected_lists).backward()
    every = torch.cat(scores).tolist()
    plain = (expected.item(), expected_lists.item(), right, every, slopes(lora))
    same(step(model, lora, [tree(n) for n in (0, 1, 3)], 10_000), plain)


@pytest.mark.parametrize(("budget", "recompute"), [(1, False), (150, True), (260, False)])
def test_many_micro_batches_are_one_batch(model, lora, budget, recompute):
    some = [tree(n) for n in range(4)]
    assert len(pack(some, budget)) > 1
    whole = step(model, lora, some, 10_000)
    same(step(model, lora, some, budget, recompute=recompute), whole)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("lead", [60.0, 2000.0])
def test_a_sure_model_still_learns(dtype, lead):
    """Both candidates stand at 9 by far, the wrong one further: the slope is there in full.

    The expected digit would have none: 9 - 9 = 0.
    """
    z = torch.zeros(2, 9, dtype=dtype)
    z[0, 8], z[1, 8] = lead, lead + lead / 4
    z.requires_grad_()
    s = log_odds(z)
    assert s.dtype == torch.float32
    loss, right = contrast(s, [(0, 2, 0)], 0.5, 0.5)
    loss.backward()
    assert z.grad is not None
    assert torch.isfinite(z.grad).all()
    assert loss.item() == pytest.approx(lead / 4, rel=1e-2)
    assert float(z.grad[0, 8]) == pytest.approx(-1.0, abs=1e-2)
    assert float(z.grad[1, 8]) == pytest.approx(1.0, abs=1e-2)
    assert right.tolist() == [False]


@pytest.mark.parametrize("weights", [(-1, 1), (math.nan, 1), (1, math.inf)])
def test_weights_are_checked(weights):
    with pytest.raises(InputError):
        SftWeights(*weights)
