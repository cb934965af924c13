"""A step of train_rft.py against replies computed one by one, each with its own prompt, in fp32."""

import math
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from statistics import fmean, stdev
from typing import Any

import pytest
import torch
from fixtures import make_base, moved
from nanopersrm.train.curriculum import Curriculum
from nanopersrm.train.harvest import Harvest, Yield
from nanopersrm.train.plans import Asked
from nanopersrm.train.rollouts import RolloutConfig, draw_groups
from test_train_rft import script
from tiny_bases import random_ids
from torch import Tensor

from nanopersrm.model.cache import Layout
from nanopersrm.model.lora import Lora
from nanopersrm.model.tokenizer import Tokenizer
from nanopersrm.model.transformer import Model
from nanopersrm.model.weights import load
from nanopersrm.pairs import Pair
from nanopersrm.train.grpo import GrpoConfig, Measured
from nanopersrm.train.presets import PRESETS
from nanopersrm.train.rewards import Reward, RewardConfig

CPU = torch.device("cpu")
G, LONGEST = 3, 14
ALL = 100_000  # a budget that holds everything
WEIGHTS = RewardConfig().weights
PAIR = Pair(
    *("a", "b", "writer", "fiction", "train", "cross_author", ("exemplar",), "", "one", "two"),
    *("writer/book", "other/book"),
)
TWIN = replace(PAIR, id="b", twin="a", chosen="two", rejected="one")


@dataclass
class Watched:
    """In place of a Learner: what it was given, and the gradients at each update."""

    lora: Lora
    move: float  # of the masters at an update, against the gradient
    loss: float = 0.0
    names: list[str] = field(default_factory=list)
    gradients: list[list[Tensor]] = field(default_factory=list)

    def backward(self, loss: Tensor, names: tuple[str, ...]) -> None:
        self.loss += float(loss.detach())
        self.names += names
        loss.backward()

    def update(self, rate: float, *, still: bool = False) -> float:
        parts = self.lora.parameters()
        found = [torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in parts]
        self.gradients.append(found)
        with torch.no_grad():
            for part, gradient in zip(parts, found, strict=True):
                part.sub_(self.move * gradient)
                part.grad = None
        self.lora.refresh()
        return math.sqrt(sum(float(gradient.square().sum()) for gradient in found))


@pytest.fixture(scope="module")
def known(tmp_path_factory) -> tuple[Model, Tokenizer, Lora]:
    base = make_base(tmp_path_factory.mktemp("math") / "smollm", "smollm")
    model = load(base, torch.float32, CPU)
    lora = moved(model, 3)
    lora.on(model)
    return model, Tokenizer.load(base), lora


def harvest_of(known, temperature: float = 1.0, flat: tuple[int, ...] = ()) -> Harvest:
    """Two plans, a couple and a single pair: six groups of drawn replies with random rewards;
    in the groups that are flat all have the same."""
    model, tokenizer, _ = known
    config = RolloutConfig(G, 6, LONGEST, temperature)
    randoms = random.Random(5)
    found: list[Yield] = []
    for n, pairs in enumerate(((PAIR, TWIN), (replace(PAIR, id="c", twin=""),))):
        prompts = []
        for k in range(len(pairs)):
            exemplars = random_ids(40, 10 * n + k)
            prompts += [exemplars + random_ids(20 + k, 50 + 10 * n + 2 * k + j) for j in (0, 1)]
        asked = Asked("pointwise", pairs, tuple(prompts))
        groups = draw_groups(model, tokenizer, prompts, "A", config, 20 + n)
        rewards = []
        for p in range(len(prompts)):
            level = 4 * n + p in flat
            orders = [0.25 if level else randoms.random() for _ in range(G)]
            rewards.append([Reward({"format": 1.0, "order": o}, 0.5 + o, None) for o in orders])
        found.append(Yield(asked, groups, rewards))
    return Harvest(found)


@pytest.fixture(scope="module")
def drawn(known) -> Harvest:
    found = harvest_of(known)
    assert len(set(found.lengths)) > 1  # some have ended, or token weights would be all alike
    return found


def step_of(
    known, drawn: Harvest, budget: int, move: float = 0.0, far: float = 0.0, **settings: Any
) -> tuple[Watched, dict]:
    """`learn` with everything given but the update. far: how much less the reference does."""
    model, tokenizer, lora = known
    how = replace(PRESETS["tiny"], budget=budget, reply=LONGEST, group=G)
    config = script.Config(**settings)
    curriculum = Curriculum([PAIR, TWIN], 1, 0)
    reference = Lora(model, lora.config, 8)
    reference.load_tensors({name: (1 - far) * part for name, part in lora.tensors().items()})
    given = config, how, model, curriculum, lambda step: drawn, reference.freeze()
    kit = script.Kit(*given, tokenizer.digit_ids)
    learner = Watched(lora, move)
    _, numbers = script.learn(kit, learner, 0)
    return learner, numbers


def by_hand(variant: str, drawn: Harvest) -> tuple[list[float], list[float]]:
    """Advantage of each reply, and the weight of each of its tokens, by the papers' formulas."""
    totals = [reward.total for one in drawn.plans for group in one.rewards for reward in group]
    lengths, S = drawn.lengths, len(totals)
    A = []
    for first in range(0, S, G):
        own = totals[first : first + G]
        scale = 1.0 if variant == "dr_grpo" else stdev(own) + 1e-4
        A += [(total - fmean(own)) / scale for total in own]
    if variant == "dr_grpo":
        return A, [1 / (S * LONGEST)] * S
    if variant == "dapo":
        return A, [1 / sum(lengths)] * S
    return A, [1 / (S * length) for length in lengths]


def row_by_row(
    known, drawn: Harvest, variant: str, temperature: float = 1.0
) -> tuple[float, list[Tensor]]:
    """Loss and gradients of replies that each run behind their own copy of the prompt."""
    model, _, lora = known
    A, w = by_hand(variant, drawn)
    total = torch.zeros((), dtype=torch.float64)
    number = 0
    for one in drawn.plans:
        for prompt, group in zip(one.asked.prompts, one.groups, strict=True):
            for reply in group:
                ids = torch.tensor([*prompt, *reply.ids])
                hidden = model(ids, Layout.of([len(ids)]))  # (T, D)
                logits = model.logits(hidden[len(prompt) - 1 : -1]) / temperature
                log_p = logits.log_softmax(-1).gather(-1, ids[len(prompt) :, None]).double()
                ratio = (log_p - log_p.detach()).exp()
                total = total - (w[number] * A[number] * ratio).sum()
                number += 1
    gradients = torch.autograd.grad(total, lora.parameters())
    return float(total.detach()), list(gradients)


def same(ours: list[Tensor], theirs: list[Tensor], tolerance: float = 2e-5) -> None:
    """To rounding of the largest gradient of each matrix."""
    largest = max(float(one.abs().max()) for one in theirs)
    assert largest > 1e-3
    for one, other in zip(ours, theirs, strict=True):
        scale = max(float(other.abs().max()), 1e-3 * largest)
        assert float((one - other).abs().max()) <= tolerance * scale


@contextmanager
def unmoved(known) -> Iterator[None]:
    """Whatever happens inside, the adapter is as it was."""
    _, _, lora = known
    before = {name: part.clone() for name, part in lora.tensors().items()}
    yield
    lora.load_tensors(before)


# Shared prefix


@pytest.mark.parametrize("variant", ["grpo", "dr_grpo", "dapo"])
@pytest.mark.parametrize("budget", [ALL, 130, 1], ids=["one tree a pair", "halves", "each alone"])
def test_shared_prefix_equals_row_by_row(known, drawn, variant, budget):
    learner, _ = step_of(known, drawn, budget, grpo=GrpoConfig(variant=variant))
    loss, gradients = row_by_row(known, drawn, variant)
    assert learner.loss == pytest.approx(loss, rel=1e-5, abs=1e-7)
    same(learner.gradients[0], gradients)
    trees = {ALL: 3, 1: 6 * G}  # pairs, replies
    rows = sum(len(p) * G for one in drawn.plans for p in one.asked.prompts) + sum(drawn.lengths)
    if budget == 1:
        assert drawn.rows == rows
    else:
        assert drawn.rows < rows
    if budget in trees:
        assert len(learner.names) == trees[budget]
    else:
        assert 3 < len(learner.names) < 6 * G


@pytest.mark.parametrize("temperature", [0.7, 1.5])
def test_a_temperature_is_in_the_loss(known, temperature):
    """The probabilities that are trained are those of drawing."""
    drawn = harvest_of(known, temperature)
    learner, numbers = step_of(known, drawn, ALL, temperature=temperature)
    loss, gradients = row_by_row(known, drawn, "grpo", temperature)
    assert learner.loss == pytest.approx(loss, rel=1e-5, abs=1e-7)
    same(learner.gradients[0], gradients)
    assert numbers["gap_max"] < 1e-4


# Sampler and trainer


@pytest.mark.parametrize("temperature", [1.0, 0.7, 1.5])
@pytest.mark.parametrize("budget", [ALL, 130])
def test_sampler_and_trainer_agree(known, temperature, budget, monkeypatch):
    """Token by token in fp32, before any clipping; and where they differ it is seen."""
    drawn = harvest_of(known, temperature)
    _, numbers = step_of(known, drawn, budget, temperature=temperature)
    assert 0 < numbers["gap"] < 1e-5
    assert numbers["gap_max"] < 1e-4
    assert numbers["gap_outside"] == 0.0
    reply = drawn.plans[0].groups[0][0]
    off = replace(reply, log_probs=tuple(p - 0.5 for p in reply.log_probs))
    drawn.plans[0].groups[0][0] = off
    _, numbers = step_of(known, drawn, budget, temperature=temperature)
    assert numbers["gap_max"] == pytest.approx(0.5, abs=1e-4)
    share = len(reply.ids) / sum(drawn.lengths)
    assert numbers["gap"] == pytest.approx(0.5 * share, rel=1e-3)
    assert numbers["gap_outside"] == pytest.approx(share)


def test_the_gap_sees_another_adapter(known, drawn):
    """Who draws with other weights than those that learn is found out."""
    lora = known[2]
    with unmoved(known):
        lora.load_tensors({name: 1.1 * tensor for name, tensor in lora.tensors().items()})
        assert step_of(known, drawn, ALL)[1]["gap"] > 1e-3


# Groups without variance


@pytest.mark.parametrize("variant", ["grpo", "dr_grpo", "dapo", "gspo", "cispo", "gdpo"])
def test_flat_groups_are_left_out_exactly(known, variant, monkeypatch):
    """The twin and half of the last pair are flat: to the bit where trees stand alone."""
    drawn = harvest_of(known, flat=(2, 3, 4))
    skipped, numbers = step_of(known, drawn, 1, grpo=GrpoConfig(variant=variant))
    rows = drawn.rows
    everyone = lambda advantage, group, groups: torch.ones(groups, dtype=torch.bool)  # noqa: E731
    monkeypatch.setattr(script, "informative", everyone)
    whole, _ = step_of(known, drawn, 1, grpo=GrpoConfig(variant=variant))
    assert rows < drawn.rows
    assert (len(skipped.names), len(whole.names)) == (3 * G, 6 * G)
    assert numbers["flat"] == pytest.approx(0.5)
    assert skipped.loss == whole.loss != 0
    assert any(gradient.any() for gradient in skipped.gradients[0])
    for one, other in zip(skipped.gradients[0], whole.gradients[0], strict=True):
        assert torch.equal(one, other)


def test_flat_groups_are_left_out_of_trees(known):
    """Packed in one tree to rounding; the pair of which all is flat has no tree."""
    drawn = harvest_of(known, flat=(2, 3, 4))
    learner, _ = step_of(known, drawn, ALL)
    loss, gradients = row_by_row(known, drawn, "grpo")
    assert sorted(learner.names) == ["a", "c"]
    assert learner.loss == pytest.approx(loss, rel=1e-5, abs=1e-7)
    same(learner.gradients[0], gradients)


def test_with_a_reference_flat_groups_stay(known):
    """They have nothing to tell, and a distance to keep."""
    drawn = harvest_of(known, flat=(2, 3, 4))
    learner, numbers = step_of(known, drawn, 1, grpo=GrpoConfig(beta=0.1))
    assert len(learner.names) == 6 * G
    assert numbers["flat"] == pytest.approx(0.5)


def test_compared_across_a_plan(known):
    """Each group is flat, but not the plan: there is something to learn."""
    drawn = harvest_of(known, flat=tuple(range(6)))
    nothing, numbers = step_of(known, drawn, ALL)
    assert (nothing.names, numbers["flat"], numbers["gradient_norm"]) == ([], 1.0, 0.0)
    assert (numbers["gap"], drawn.rows) == (0.0, 0)
    for p, group in enumerate(drawn.plans[0].rewards):
        group[:] = [Reward({"format": 1.0, "order": p / 3}, 0.5 + p / 3, None)] * G
    learner, numbers = step_of(known, drawn, ALL, group_by="plan")
    assert sorted(learner.names) == ["a", "b"]
    assert numbers["flat"] == pytest.approx(1 / 3)
    assert step_of(known, drawn, ALL)[0].names == []


# Epochs and the reference


@pytest.fixture
def measured(monkeypatch) -> Callable[[], list[Measured]]:
    """What each call of policy_loss saw."""
    seen: list[Measured] = []
    policy_loss = script.policy_loss

    def watched(*given: Any, **more: Any) -> tuple[Tensor, Measured]:
        loss, one = policy_loss(*given, **more)
        seen.append(one)
        return loss, one

    monkeypatch.setattr(script, "policy_loss", watched)
    return lambda: seen


@pytest.mark.parametrize("budget", [ALL, 130])
def test_the_ratio_is_one_until_the_first_update(known, drawn, measured, budget):
    """Exactly one in every token of the first epoch, and in the second what the update made."""
    with unmoved(known):
        learner, numbers = step_of(known, drawn, budget, move=0.05, epochs=2)
    seen = measured()
    half = len(seen) // 2
    assert len(learner.gradients) == 2
    assert all(float(one.ratio) == one.tokens for one in seen[:half])
    assert all(float(one.ratio) != one.tokens for one in seen[half:])
    assert [one.tokens for one in seen[:half]] == [one.tokens for one in seen[half:]]
    assert numbers["ratio"] == 1.0  # of the log: the first epoch
    assert numbers["gap_max"] < 1e-4
    norms = [math.sqrt(sum(float(g.square().sum()) for g in some)) for some in learner.gradients]
    assert norms[0] != norms[1]
    assert numbers["gradient_norm"] == pytest.approx(max(norms))


def test_beta_weighs_the_distance_to_the_reference(known, drawn):
    """Nothing as long as both are the same; the loss then has the weighted k3 as well."""
    bare, numbers = step_of(known, drawn, ALL, far=0.1)
    assert "kl_k1" not in numbers  # never computed
    near, numbers = step_of(known, drawn, ALL, grpo=GrpoConfig(beta=0.5))
    assert numbers["kl_k1"] == numbers["kl_k2"] == numbers["kl_k3"] == 0.0
    assert near.loss == bare.loss
    config = GrpoConfig(variant="dapo", beta=0.5)  # all tokens weigh the same: k3 is their mean
    losses = [step_of(known, drawn, ALL, far=far, grpo=config)[0].loss for far in (0.0, 0.1)]
    far, numbers = step_of(known, drawn, ALL, far=0.1, grpo=config)
    assert far.loss == losses[1]
    assert numbers["kl_k3"] > 1e-3
    assert losses[1] - losses[0] == pytest.approx(0.5 * numbers["kl_k3"], rel=1e-4)
    assert all(part.grad is None for part in known[2].parameters())
    places = known[2].places
    assert all(matrix.adapter is known[2].copies[name] for name, matrix in places.items())
