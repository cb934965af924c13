"""The loop of train_rft.py against replies computed one by one, each with its own prompt (fp32)."""

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from statistics import fmean, stdev
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from fixtures import CPU, WEIGHED, moved
from torch import Tensor
from training_runs import load_script, short_pairs

from nanopersrm.judge.reply import choice_ids
from nanopersrm.model.cache import Layout
from nanopersrm.model.lora import Lora
from nanopersrm.model.tokenizer import Tokenizer
from nanopersrm.model.transformer import Model
from nanopersrm.model.weights import load
from nanopersrm.style.ledger import Measurer
from nanopersrm.train import objective, packing, rewards
from nanopersrm.train.grpo import GrpoConfig
from nanopersrm.train.presets import PRESETS
from nanopersrm.train.rewards import RewardConfig
from nanopersrm.train.rollout import Collector, Rollout, RolloutConfig, RolloutGroup, trees

script = load_script("train_rft")
G = 3
ALL = 100_000  # a budget that holds everything
LEDGERS = RolloutConfig(group=G, rows=12, twin_pairs=2, think_lines=3, longest=ALL, seed=2)
FREE = replace(LEDGERS, free=True, think_tokens=7)
DRAWN = RewardConfig(expected=False)  # the digit that was drawn counts alone


@dataclass
class Watched:
    """In place of a Learner, for one step: what it gets, and the gradients."""

    model: Model
    lora: Lora
    loss: float = 0.0
    names: list[str] = field(default_factory=list)
    gradients: list[Tensor] = field(default_factory=list)
    numbers: dict[str, float] = field(default_factory=dict)
    first_step: int = 0

    @property
    def run(self) -> Any:
        ignored = dict.fromkeys(("start_clock", "note", "write_replies"), lambda *_: None)
        resumed = {"validation": [], "pairs_seen": 0}
        return SimpleNamespace(resumed=resumed, finish_step=self._finish, **ignored)

    def _finish(self, step: int, learner: Any, numbers: dict, tokens: int, facts: dict) -> None:
        self.numbers = numbers

    def backward(self, loss: Tensor, names: tuple[str, ...]) -> None:
        self.loss += float(loss.detach())
        self.names += names
        loss.backward()

    def update(self, rate: float) -> float:
        parts = self.lora.parameters()
        self.gradients = [torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in parts]
        for part in parts:
            part.grad = None
        return 1.0


@pytest.fixture(scope="module")
def known(base) -> tuple[Model, Tokenizer, Lora]:
    model = load(base, torch.float32, CPU)
    lora = moved(model, 3)
    lora.on(model)
    return model, Tokenizer.load(base), lora


def step_drawn(
    known, temperature: float = 1.0, flat: tuple[int, ...] = (), config: RolloutConfig = LEDGERS
) -> list[RolloutGroup]:
    """A pair with its twin, and a single pair: six groups of replies, and random rewards, for each
    digit that there could be; in the groups that are flat all have the same."""
    config = replace(config, temperature=temperature)
    model, tokenizer, _ = known
    collector = Collector(model, tokenizer, short_pairs()[:3], config, Measurer(WEIGHED))
    groups = [group for some in sorted(collector.collect(0), key=len)[::-1] for group in some]
    randoms = random.Random(5)
    for i, group in enumerate(groups):
        for rollout in group.rollouts:
            rollout.parts = {"order": 0.25 if i in flat else randoms.random()}
            rollout.reward = rollout.parts["order"]
            rollout.by_digit = tuple(randoms.random() for _ in range(9))
    return groups


def rollouts_of(groups: list[RolloutGroup]) -> list[Rollout]:
    return [rollout for group in groups for rollout in group.rollouts]


def lengths_of(groups: list[RolloutGroup]) -> list[int]:
    """Of what was drawn."""
    return [len(rollout.reply.choices) for rollout in rollouts_of(groups)]


def step_of(
    known, groups: list[RolloutGroup], budget: int, config: RolloutConfig = LEDGERS, **settings: Any
) -> Watched:
    """One turn of the loop, with replies that are drawn and rewarded already, but the update."""
    model, tokenizer, lora = known
    preset = replace(PRESETS["tiny"], budget=budget, rft_steps=1)
    drawn = SimpleNamespace(
        collect=lambda step: [groups[:4], groups[4:]],
        config=config,
        tokenizer=tokenizer,
        pairs_seen=0,
    )
    nothing = SimpleNamespace(pairs=0, accuracy=0.0, numbers=dict, summary=str)
    learner, validation = Watched(model, lora), SimpleNamespace(evaluate=lambda *_: (nothing, ""))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(script, "reward", lambda *_: None)
        patch.setattr(script, "asdict", lambda _: {})
        patch.setattr(script, "Metrics", lambda **_: None)
        script.train(script.Config(eval_every=0, **settings), preset, learner, drawn, validation)
    return learner


def weights_of(variant: str, groups: list[RolloutGroup], most: int) -> list[float]:
    """Of each token that a reply draws, by the papers' formulas."""
    lengths = lengths_of(groups)
    if variant == "dr_grpo":
        return [1 / (len(lengths) * most)] * len(lengths)
    if variant == "dapo":
        return [1 / sum(lengths)] * len(lengths)
    return [1 / (len(lengths) * length) for length in lengths]


def log_probs_of(known, group: RolloutGroup, rollout: Rollout, temperature: float) -> list[Tensor]:
    """Of each choice, over what was allowed, the reply behind its own copy of the prompt."""
    ids = torch.tensor([*group.prompt.ids, *rollout.reply.ids])
    logits = known[0].logits(known[0](ids, Layout.of([len(ids)]))) / temperature  # (T, V)
    rows = [(logits[len(group.prompt.ids) + c.at - 1], c.allowed) for c in rollout.reply.choices]
    return [(z[list(some)] if some else z).log_softmax(-1).double() for z, some in rows]


def dot(p: Sequence[float], r: Sequence[float]) -> float:
    """In the mean, where p need not add up."""
    return math.fsum(map(math.prod, zip(p, r, strict=True))) / math.fsum(p)


def row_by_row(
    known, groups: list[RolloutGroup], variant: str, temperature: float, most: int, expected: bool
) -> tuple[float, list[Tensor]]:
    """Loss and gradients, by the formulas of grpo.py. expected: all nine digits in a digit's
    place."""
    w = iter(weights_of(variant, groups, most))
    total = torch.zeros((), dtype=torch.float64)
    for group in groups:
        chances = [rollout.reply.drawn_digits for rollout in group.rollouts]
        table = [(expected and r.by_digit) or (r.reward,) * 9 for r in group.rollouts]
        means = [dot(p, worth) for p, worth in zip(chances, table, strict=True)]
        m = fmean(means)
        noise = [
            dot(p, [(r - mean) ** 2 for r in worth])
            for p, worth, mean in zip(chances, table, means, strict=True)
        ]
        spread = sum((mean - m) ** 2 for mean in means) + (1 - 1 / G) * math.fsum(noise)
        assert expected or math.sqrt(spread / (G - 1)) == pytest.approx(stdev(means))
        scale = 1.0 if variant == "dr_grpo" else math.sqrt(spread / (G - 1)) + 1e-4
        for i, rollout in enumerate(group.rollouts):
            weight, rows = next(w), log_probs_of(known, group, rollout, temperature)
            for choice, log_p in zip(rollout.reply.choices, rows, strict=True):
                drawn = rollout.reply.ids[choice.at]
                p = log_p[choice.allowed.index(drawn) if choice.allowed else drawn]
                if not (expected and choice is rollout.reply.choices[-1]):
                    total = total - weight * (means[i] - m) / scale * (p - p.detach()).exp()
            if expected:
                A = torch.tensor([r - m - (r - means[i]) / G for r in table[i]]) / scale
                ratio = (rows[-1] - rows[-1].detach()).exp()
                total = total - weight * (torch.tensor(chances[i]) * A * ratio).sum()
    gradients = torch.autograd.grad(total, known[2].parameters())
    return float(total.detach()), list(gradients)


def same(ours: list[Tensor], theirs: list[Tensor], tolerance: float = 2e-5) -> None:
    """To rounding of the largest gradient of each matrix."""
    largest = max(float(one.abs().max()) for one in theirs)
    assert largest > 1e-3
    for our, other in zip(ours, theirs, strict=True):
        scale = max(float(other.abs().max()), 1e-3 * largest)
        assert float((our - other).abs().max()) <= tolerance * scale


def most_tokens(groups: list[RolloutGroup]) -> int:
    """Of the largest tree of a pair."""
    return max(tree.tokens for tree in trees(groups, [True] * len(groups), ALL))


@pytest.mark.parametrize(
    ("config", "variant", "temperature", "cut", "expected"),
    [
        (LEDGERS, "grpo", 1.0, "whole", True),
        (LEDGERS, "grpo", 0.7, "halves", True),
        (LEDGERS, "dr_grpo", 0.7, "halves", True),
        (LEDGERS, "dr_grpo", 1.0, "halves", False),
        (LEDGERS, "dapo", 0.7, "alone", False),
        (FREE, "grpo", 0.7, "halves", True),
        (FREE, "dapo", 1.0, "whole", False),
    ],
)
def test_shared_prefix_equals_row_by_row(known, config, variant, temperature, cut, expected):
    """With the probabilities that replies were drawn with: lines, or words, and the digit."""
    groups = step_drawn(known, temperature, config=config)
    assert len(set(lengths_of(groups))) > 1  # or token weights would be all alike
    budget = {"whole": ALL, "halves": most_tokens(groups) - 1, "alone": 1}[cut]
    settings = {"temperature": temperature, "grpo": GrpoConfig(variant=variant)}
    learner = step_of(
        known, groups, budget, config, **settings, reward=RewardConfig(expected=expected)
    )
    most = 1 + (7 if config.free else 3)  # and the digit
    assert max(lengths_of(groups)) == most
    loss, gradients = row_by_row(known, groups, variant, temperature, most, expected)
    assert learner.loss == pytest.approx(loss, rel=1e-5, abs=1e-7)
    same(learner.gradients, gradients)
    assert (len(learner.names) > 3) == (cut != "whole")
    assert (len(learner.names) == 6 * G) == (cut == "alone")


@pytest.mark.parametrize("config", [LEDGERS, FREE], ids=["ledgers", "free"])
@pytest.mark.parametrize(("budget", "temperature"), [(ALL, 1.0), (1, 0.7)])
def test_sampler_and_trainer_agree(known, config, temperature, budget):
    """Choice by choice in fp32; and where they differ it is seen."""
    groups = step_drawn(known, temperature, config=config)
    numbers = step_of(known, groups, budget, config, temperature=temperature).numbers
    assert 0 < numbers["gap_mean"] < 1e-5
    assert numbers["gap_max"] < 1e-4
    assert (numbers["gap_outside"], numbers["ratio"]) == (0.0, 1.0)
    reply = groups[0].rollouts[0].reply
    reply.choices = [replace(choice, log_prob=choice.log_prob - 0.5) for choice in reply.choices]
    numbers = step_of(known, groups, budget, config, temperature=temperature, reward=DRAWN).numbers
    assert numbers["gap_max"] == pytest.approx(0.5, abs=1e-4)
    share = len(reply.choices) / sum(lengths_of(groups))
    assert numbers["gap_mean"] == pytest.approx(0.5 * share, rel=1e-3)
    assert numbers["gap_outside"] == pytest.approx(share)


def test_no_softmax_over_the_vocabulary(known, monkeypatch):
    """A step of ledgers is drawn and trained without logits of all ids, here and in train_sft.py;
    one of prose needs them."""

    def forbidden(*_: Any, **__: Any) -> Any:
        raise NotImplementedError

    monkeypatch.setattr(Model, "logits", forbidden)
    monkeypatch.setattr(objective, "logprob", forbidden)
    groups = step_drawn(known)
    assert step_of(known, groups, ALL).gradients[0].any()
    batch = packing.batch(trees(groups, [True] * 6, ALL), choice_ids(known[1]).all, CPU)
    sums = objective.loss_sums(known[0], batch, objective.SftWeights(), PRESETS["tiny"])
    assert sums.imitation > 0
    with pytest.raises(NotImplementedError):
        step_drawn(known, config=FREE)


def test_flat_groups_are_left_out_exactly(known, monkeypatch):
    """The twin and half of the last pair are flat: to the bit where trees stand alone."""
    groups = step_drawn(known, flat=(2, 3, 4))
    skipped = step_of(known, groups, 1, reward=DRAWN)
    everyone = lambda advantage, group, groups: torch.ones(groups, dtype=torch.bool)  # noqa: E731
    monkeypatch.setattr(rewards, "informative", everyone)
    whole = step_of(known, groups, 1, reward=DRAWN)
    assert (len(skipped.names), len(whole.names)) == (3 * G, 6 * G)
    assert (skipped.numbers["groups_flat"], skipped.numbers["groups_drawn"]) == (3, 6)
    assert skipped.loss == whole.loss != 0
    assert any(gradient.any() for gradient in skipped.gradients)
    assert all(map(torch.equal, skipped.gradients, whole.gradients))
