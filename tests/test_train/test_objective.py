"""The losses of a step: by hand, by plain loops and forwards, and however the step is cut up."""

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from tiny_bases import CPU, random_lora
from torch import Tensor

from nanopersrm import InputError
from nanopersrm.model.cache import Layout
from nanopersrm.model.lora import Lora, LoraConfig
from nanopersrm.model.transformer import Model
from nanopersrm.model.weights import load
from nanopersrm.train import objective, packing
from nanopersrm.train.objective import SftWeights, contrast, log_odds, loss_sums
from nanopersrm.train.packing import PrefixTree, Target, Text, batch, build_tree, pack, written
from nanopersrm.train.presets import PRESETS

V = 131  # of the tiny models
PRESET = PRESETS["tiny"]
DIGITS = tuple(range(40, 49))
CHOICES = (*range(20, 30), *DIGITS)  # letters, a stop, digits
CONFIG = SftWeights(0.3, 0.6)
Loss = tuple[float, float, list[bool], list[Tensor]]


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


def test_lists_by_hand():
    """Odds 1 : 2 : 5 with the last chosen, then one alone: list-wise log 8/5, rivals the mean of
    log 6/5 and log 7/5. What is of no list costs nothing. Slopes by finite differences."""
    s, lists = torch.tensor([1.0, 2, 5, 9, 7]).log(), [(0, 3, 2), (4, 1, 0)]
    loss, right = contrast(s, lists, 0.3, 0.9)
    pair = (math.log(6 / 5) + math.log(7 / 5)) / 2
    assert float(loss) == pytest.approx(0.3 * pair + 0.9 * math.log(8 / 5))
    assert right.tolist() == [True, True]
    assert contrast(s, [(0, 3, 1), (1, 2, 1)], 1, 1)[1].tolist() == [False, True]
    z = torch.randn(5, 9, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    assert torch.autograd.gradcheck(
        lambda z: contrast(log_odds(z), lists, 0.4, 0.7)[0], (z.requires_grad_(),)
    )


class Bare:
    """A model whose hidden states are given, and are the logits of the choices."""

    device = CPU

    def __init__(self, logits: list[list[float]]):
        self.hidden = torch.tensor(logits, requires_grad=True)

    def __call__(self, *_: Any, **__: Any) -> Tensor:
        return self.hidden

    def logits_of(self, hidden: Tensor, ids: Tensor) -> Tensor:
        return hidden[:, ids]

    def head(self) -> Tensor:
        return torch.eye(self.hidden.shape[1])


def test_choices_by_hand():
    """Of 1 : 2 : 5 that are allowed q = ½, ¼, ¼ costs ½ log 8 + ¼ log 4 + ¼ log 8/5, weighed 2, and
    the slope is 2 (p - q). What is not allowed counts nothing, however likely. Then digits."""
    odds = [math.log(n) for n in (1, 2, 5)]
    model: Any = Bare([[*odds, 50.0, *[0.0] * 9], [9.0] * 4 + [0.0] * 9])
    soft = Target(1, (0, 1, 2), (0.5, 0.25, 0.25), 1, 2.0)
    one = Target(2, tuple(range(4, 13)), id=4)  # the one that was drawn
    packed = batch([build_tree("tree", [Text((0, 0), (soft, one))])], range(13), CPU)
    for temperature, share in ((1.0, (1, 2, 5)), (0.5, (1, 4, 25))):
        log_p = objective.choice_log_probs(model, model.hidden, packed, temperature)
        assert log_p[0, :3].exp().tolist() == pytest.approx([n / sum(share) for n in share])
        assert log_p[1, 4:].exp().tolist() == pytest.approx([1 / 9] * 9)
        assert not log_p[~packed.allowed].any()
    sums = loss_sums(model, packed, CONFIG, PRESET)
    cost = math.log(8) / 2 + math.log(4) / 4 + math.log(8 / 5) / 4
    assert sums.imitation.item() == pytest.approx(2 * cost + math.log(9))
    assert (sums.contrast.item(), len(sums.right)) == (0, 0)  # no list
    sums.imitation.backward()
    assert model.hidden.grad[0].tolist() == pytest.approx([-0.75, 0, 0.75] + [0] * 10, abs=1e-6)
    assert model.hidden.grad[1].tolist() == pytest.approx([0] * 4 + [-8 / 9] + [1 / 9] * 8)


def test_batches_without_choices():
    """Every token is drawn from the whole vocabulary, or some are, or nothing is drawn at all."""
    model: Any = Bare([[0.0, math.log(2)] + [0.0] * 7] * 3)
    prose = batch([build_tree("tree", [written((0, 1, 2, 1), 2)])], (), CPU)
    sums = loss_sums(model, prose, CONFIG, PRESET)
    assert sums.imitation.item() == pytest.approx(math.log(10) + math.log(5))
    assert sums.contrast.item() == 0
    texts = [Text((0, 1, 2), (Target(1, (0, 1), id=0), Target(3, (), id=1, weight=2)))]
    mixed = batch([build_tree("tree", texts)], range(9), CPU)
    imitation = loss_sums(model, mixed, CONFIG, PRESET).imitation
    assert imitation.item() == pytest.approx(math.log(3) + 2 * math.log(5))
    nothing = batch([build_tree("tree", [Text((0, 1, 2))])], range(9), CPU)
    assert loss_sums(model, nothing, CONFIG, PRESET).imitation.item() == 0


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


def texts_of(n: int) -> tuple[list[Text], int]:
    """A reply about each of 2 + n candidates, then more about the first: one with the same first
    lines, the same one again, and one in prose; which of the listed ones is the chosen one."""
    random = torch.Generator().manual_seed(n)

    def some(count: int) -> tuple[int, ...]:
        return tuple(torch.randint(50, V, (count,), generator=random).tolist())

    def target(at: int, allowed: tuple[int, ...], weight: float) -> Target:
        q = torch.rand(len(allowed), generator=random)
        return Target(
            at, allowed, tuple((q / q.sum()).tolist()), allowed[at % len(allowed)], weight
        )

    def reply(start: tuple[int, ...], first: int, number: int, listed: bool = False) -> Text:
        lines = [target(first, CHOICES[:6], 1.0), target(first + 9, CHOICES[2 : 6 + n], 1.0)]
        ids = start + some(4 + number)
        return Text(ids, (*lines, target(len(ids), DIGITS, 3.0)), number, listed)

    exemplars = some(24 + 3 * n)
    texts = []
    for k in range(2 + n):
        prompt = exemplars + some(17 + k)
        texts.append(reply(prompt + some(11), len(prompt), k, listed=True))
    first = len(exemplars) + 17
    texts.append(reply(texts[0].ids[: first + 11], first, 8))
    texts.append(replace(texts[-1], number=9))
    texts.append(written(texts[0].ids[:first] + some(6), first, 10))
    return texts, 1 + n


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
    """A step as train_sft.py makes it: both losses, who is right, gradients."""
    tokens, lists = packing.total_weights(trees)
    imitated = contrasted = 0.0
    right: dict[str, bool] = {}
    for micro in pack(trees, budget):
        packed = batch(micro, CHOICES, CPU)
        sums = loss_sums(model, packed, CONFIG, replace(PRESET, **changes))
        (sums.imitation / tokens + sums.contrast / lists).backward()
        imitated += sums.imitation.item() / tokens
        contrasted += sums.contrast.item() / lists
        right |= zip(packed.names, sums.right.tolist(), strict=True)
    return imitated, contrasted, [right[tree.name] for tree in trees], slopes(lora)


def same(ours: Loss, theirs: Loss) -> None:
    assert ours[:2] == pytest.approx(theirs[:2], rel=1e-6)
    assert ours[2] == theirs[2]
    for a, b in zip(ours[3], theirs[3], strict=True):
        assert b.any()
        assert (a - b).abs().max() <= 1e-5 * b.abs().max()


def plain_log_probs(model: Model, text: Text, temperature: float = 1.0) -> list[Tensor]:
    """Of each target, over what is allowed (n,) or the vocabulary (V,), the text read alone."""
    ids = torch.tensor(text.ids)
    logits = model(ids, Layout.of([len(ids)])) @ model.head().T / temperature  # (T, V)
    rows = [(target, logits[target.at - 1]) for target in text.targets]
    return [(z[list(t.allowed)] if t.allowed else z).log_softmax(-1) for t, z in rows]


def test_equals_plain_forwards_of_whole_texts(model, lora):
    """Every text alone, every log-softmax over all logits, every loop in Python."""
    imitated, weight, lists, right = [], 0.0, [], []
    for n in (0, 1, 3):
        texts, chosen = texts_of(n)
        odds = []
        for text in texts:
            for target, log_p in zip(text.targets, plain_log_probs(model, text), strict=True):
                q = torch.tensor(target.probs)
                cost = -log_p[target.id] if not target.allowed else -(q * log_p).sum()
                imitated.append(target.weight * cost)
                weight += target.weight
            if text.listed:
                odds.append(log_p)
        s = log_odds(torch.stack(odds))
        lists.append(contrast(s, [(0, len(odds), chosen)], CONFIG.pair, CONFIG.list)[0])
        right.append(int(s.argmax()) == chosen)
    expected, expected_lists = torch.stack(imitated).sum() / weight, torch.stack(lists).mean()
    (expected + expected_lists).backward()
    plain = (expected.item(), expected_lists.item(), right, slopes(lora))
    same(step(model, lora, [tree(n) for n in (0, 1, 3)], 10_000), plain)


@torch.no_grad()
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_drawn_replies_have_the_log_probs_of_whole_texts(model, lora, temperature):
    """And their entropies; the tree computes less than half of what the texts alone would."""
    texts, packed = texts_of(1)[0], batch([tree(1)], CHOICES, CPU)
    assert 2 * len(packed.ids) < sum(len(text.ids) for text in texts)
    rows = [
        (log_p, target.allowed.index(target.id) if target.allowed else target.id)
        for text in texts
        for target, log_p in zip(
            text.targets, plain_log_probs(model, text, temperature), strict=True
        )
    ]
    drawn, entropy, log_probs = objective.drawn_log_probs(model, packed, PRESET, temperature)
    assert drawn.tolist() == pytest.approx([float(p[i]) for p, i in rows], abs=2e-5)
    spread = [float(-(p.exp() * p).sum()) for p, _ in rows]
    assert entropy.tolist() == pytest.approx(spread, abs=2e-5)
    assert log_probs[0][packed.allowed[0]].tolist() == pytest.approx(rows[0][0].tolist(), abs=2e-5)


@pytest.mark.parametrize(("budget", "recompute"), [(1, False), (150, True), (260, False)])
def test_many_micro_batches_are_one_batch(model, lora, budget, recompute):
    some = [tree(n) for n in range(4)]
    assert len(pack(some, budget)) > 1
    whole = step(model, lora, some, 10_000)
    same(step(model, lora, some, budget, recompute=recompute), whole)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("lead", [60.0, 2000.0])
def test_a_sure_model_still_learns(dtype, lead):
    """Both candidates stand at 9 by far, the wrong one further: the slope is there in full, where
    the expected digit would have none."""
    z = torch.zeros(2, 9, dtype=dtype)
    z[0, 8], z[1, 8] = lead, lead + lead / 4
    loss, right = contrast(s := log_odds(z.requires_grad_()), [(0, 2, 0)], 0.5, 0.5)
    loss.backward()
    assert z.grad is not None
    assert torch.isfinite(z.grad).all()
    assert (s.dtype, right.tolist()) == (torch.float32, [False])
    assert loss.item() == pytest.approx(lead / 4, rel=1e-2)
    assert z.grad[:, 8].tolist() == pytest.approx([-1.0, 1.0], abs=1e-2)


@pytest.mark.parametrize("weights", [(-1, 1), (math.nan, 1), (1, math.inf)])
def test_weights_are_checked(weights):
    with pytest.raises(InputError):
        SftWeights(*weights)
