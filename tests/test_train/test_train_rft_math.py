"""The loop of train_rft.py against replies computed one by one, each with its own prompt (fp32)."""

import math
import random
from dataclasses import dataclass, field, replace
from statistics import fmean, stdev
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from fixtures import CPU, moved
from tiny_bases import random_ids
from torch import Tensor
from training_runs import load_script, short_pairs

from nanopersrm.model.cache import Layout
from nanopersrm.model.lora import Lora
from nanopersrm.model.tokenizer import Tokenizer
from nanopersrm.model.transformer import Model
from nanopersrm.model.weights import load
from nanopersrm.train import rewards
from nanopersrm.train.grpo import GrpoConfig
from nanopersrm.train.presets import PRESETS
from nanopersrm.train.rewards import RewardConfig
from nanopersrm.train.rollout import ROLES, Rollout, RolloutConfig, RolloutGroup, draw

script = load_script("train_rft")
G, LONGEST = 3, 14
ALL = 100_000  # a budget that holds everything


@dataclass
class Watched:
    """In place of a Learner, for one step: what it gets, and the gradients."""

    model: Model
    lora: Lora
    loss: float = 0.0
    names: list[str] = field(default_factory=list)
    gradients: list[Tensor] = field(default_factory=list)
    numbers: dict[str, float] = field(default_factory=dict)
    tokens: int = 0
    first_step: int = 0

    @property
    def run(self) -> Any:
        names = ("start_clock", "stop_clock", "note", "write_replies")
        ignored = dict.fromkeys(names, lambda *_: None)
        resumed = {"validation": [], "pairs_seen": 0}
        return SimpleNamespace(resumed=resumed, finish_step=self._finish, **ignored)

    def _finish(self, step: int, learner: Any, numbers: dict, tokens: int, facts: dict) -> None:
        self.numbers, self.tokens = numbers, tokens

    def backward(self, loss: Tensor, names: tuple[str, ...]) -> None:
        self.loss += float(loss.detach())
        self.names += names
        loss.backward()

    def update(self, rate: float) -> float:
        parts = self.lora.parameters()
        self.gradients = [torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in parts]
        for part in parts:
            part.grad = None
        return math.sqrt(sum(float(gradient.square().sum()) for gradient in self.gradients))


@pytest.fixture(scope="module")
def known(base) -> tuple[Model, Tokenizer, Lora]:
    model = load(base, torch.float32, CPU)
    lora = moved(model, 3)
    lora.on(model)
    return model, Tokenizer.load(base), lora


def step_drawn(known, temperature: float = 1.0, flat: tuple[int, ...] = ()) -> list:
    """A pair with its twin, and a single pair: six groups of drawn replies with random rewards; in
    the groups that are flat all have the same."""
    model, tokenizer, _ = known
    config = RolloutConfig(group=G, rows=6, reply=LONGEST, temperature=temperature)
    randoms = random.Random(5)
    pair, twin, single, *_ = short_pairs()
    drawn = []
    for n, pairs in enumerate(((pair, twin), (single,))):
        groups = []
        for k, one in enumerate(pairs):
            exemplars = random_ids(40, 10 * n + k)
            for j, role in enumerate(ROLES):
                prompt = exemplars + random_ids(20 + k, 50 + 10 * n + 2 * k + j)
                groups.append(RolloutGroup(one, role, prompt))
        draw(model, tokenizer, groups, config, 20 + n)
        for p, group in enumerate(groups):
            for rollout in group.rollouts:
                order = 0.25 if 4 * n + p in flat else randoms.random()
                rollout.parts = {"format": 1.0, "order": order}
                rollout.reward = 0.5 + order
        drawn.append(groups)
    return drawn


def all_groups(drawn: list) -> list[RolloutGroup]:
    return [group for groups in drawn for group in groups]


def all_rollouts(drawn: list) -> list[Rollout]:
    return [rollout for group in all_groups(drawn) for rollout in group.rollouts]


def lengths_of(drawn: list) -> list[int]:
    return [len(rollout.ids) for rollout in all_rollouts(drawn)]


def step_of(
    known, drawn: list, budget: int, most_tokens: int = LONGEST, **settings: Any
) -> Watched:
    """One turn of the loop, with replies that are drawn and rewarded already, but the update."""
    model, tokenizer, lora = known
    preset = replace(PRESETS["tiny"], budget=budget, rft_steps=1)
    config = script.Config(eval_every=0, **settings)
    facts = {"most_tokens": most_tokens, "tokenizer": tokenizer, "pairs_seen": 0}
    collector = SimpleNamespace(collect=lambda step: drawn, **facts)
    nothing = SimpleNamespace(pairs=0, accuracy=0.0, numbers=dict, summary=str)
    validation = SimpleNamespace(evaluate=lambda *_: (nothing, ""))
    learner = Watched(model, lora)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(script, "reward", lambda groups, config: None)
        patch.setattr(script, "asdict", lambda _: {})
        patch.setattr(script, "Metrics", lambda **_: None)
        script.train(config, preset, learner, collector, validation)
    return learner


def by_hand(variant: str, drawn: list) -> tuple[list[float], list[float]]:
    """Advantage of each reply, and the weight of each of its tokens, by the papers' formulas."""
    totals, lengths = [rollout.reward for rollout in all_rollouts(drawn)], lengths_of(drawn)
    A, S = [], len(totals)
    for first in range(0, S, G):
        group = totals[first : first + G]
        scale = 1.0 if variant == "dr_grpo" else stdev(group) + 1e-4
        A += [(total - fmean(group)) / scale for total in group]
    if variant == "dr_grpo":
        return A, [1 / (S * LONGEST)] * S
    if variant == "dapo":
        return A, [1 / sum(lengths)] * S
    return A, [1 / (S * length) for length in lengths]


def logits_of(known, prompt: list[int], rollout: Rollout, temperature: float) -> Tensor:
    """(R, V) of a reply behind its own copy of the prompt."""
    ids = torch.tensor([*prompt, *rollout.ids])
    hidden = known[0](ids, Layout.of([len(ids)]))  # (T, D)
    return known[0].logits(hidden[len(prompt) - 1 : -1]) / temperature


def row_by_row(
    known, drawn: list, variant: str, temperature: float = 1.0
) -> tuple[float, list[Tensor]]:
    """Loss and gradients of replies that each run behind their own copy of the prompt."""
    A, w = by_hand(variant, drawn)
    total = torch.zeros((), dtype=torch.float64)
    number = 0
    for group in all_groups(drawn):
        for rollout in group.rollouts:
            log_p = logits_of(known, group.prompt, rollout, temperature).log_softmax(-1)
            log_p = log_p.gather(-1, torch.tensor(rollout.ids)[:, None]).double()
            ratio = (log_p - log_p.detach()).exp()
            total = total - (w[number] * A[number] * ratio).sum()
            number += 1
    gradients = torch.autograd.grad(total, known[2].parameters())
    return float(total.detach()), list(gradients)


def same(ours: list[Tensor], theirs: list[Tensor], tolerance: float = 2e-5) -> None:
    """To rounding of the largest gradient of each matrix."""
    largest = max(float(one.abs().max()) for one in theirs)
    assert largest > 1e-3
    for our, other in zip(ours, theirs, strict=True):
        scale = max(float(other.abs().max()), 1e-3 * largest)
        assert float((our - other).abs().max()) <= tolerance * scale


@pytest.mark.parametrize(
    ("variant", "temperature", "budget"),  # one tree a pair, halves, each reply alone
    [("grpo", 1.0, ALL), ("grpo", 0.7, 130), ("grpo", 1.0, 1), ("dr_grpo", 1.0, 130),
     ("dapo", 1.0, ALL)],
)  # fmt: skip
def test_shared_prefix_equals_row_by_row(known, variant, temperature, budget):
    """With the probabilities that replies were drawn with."""
    drawn = step_drawn(known, temperature)
    assert len(set(lengths_of(drawn))) > 1  # some have ended, or token weights would be all alike
    grpo = GrpoConfig(variant=variant)
    learner = step_of(known, drawn, budget, grpo=grpo, temperature=temperature)
    loss, gradients = row_by_row(known, drawn, variant, temperature)
    assert learner.loss == pytest.approx(loss, rel=1e-5, abs=1e-7)
    same(learner.gradients, gradients)
    rows = sum(len(group.prompt) * G for group in all_groups(drawn)) + sum(lengths_of(drawn))
    trained = learner.tokens - sum(lengths_of(drawn))
    if budget == 1:
        assert (trained, len(learner.names)) == (rows, 6 * G)
    else:
        assert trained < rows
        assert len(learner.names) == 3 if budget == ALL else 3 < len(learner.names) < 6 * G


@pytest.mark.parametrize(("budget", "temperature"), [(ALL, 1.0), (130, 0.7)])
def test_sampler_and_trainer_agree(known, temperature, budget):
    """Token by token in fp32; and where they differ it is seen."""
    drawn = step_drawn(known, temperature)
    numbers = step_of(known, drawn, budget, temperature=temperature).numbers
    assert 0 < numbers["gap_mean"] < 1e-5
    assert numbers["gap_max"] < 1e-4
    assert (numbers["gap_outside"], numbers["ratio"]) == (0.0, 1.0)
    rollout = drawn[0][0].rollouts[0]
    rollout.log_probs = tuple(p - 0.5 for p in rollout.log_probs)
    numbers = step_of(known, drawn, budget, temperature=temperature).numbers
    assert numbers["gap_max"] == pytest.approx(0.5, abs=1e-4)
    share = len(rollout.ids) / sum(lengths_of(drawn))
    assert numbers["gap_mean"] == pytest.approx(0.5 * share, rel=1e-3)
    assert numbers["gap_outside"] == pytest.approx(share)


def test_flat_groups_are_left_out_exactly(known, monkeypatch):
    """The twin and half of the last pair are flat: to the bit where trees stand alone."""
    drawn = step_drawn(known, flat=(2, 3, 4))
    skipped = step_of(known, drawn, 1)
    everyone = lambda advantage, group, groups: torch.ones(groups, dtype=torch.bool)  # noqa: E731
    monkeypatch.setattr(rewards, "informative", everyone)
    whole = step_of(known, drawn, 1)
    assert skipped.tokens < whole.tokens
    assert (len(skipped.names), len(whole.names)) == (3 * G, 6 * G)
    assert (skipped.numbers["groups_flat"], skipped.numbers["groups_drawn"]) == (3, 6)
    assert skipped.loss == whole.loss != 0
    assert any(gradient.any() for gradient in skipped.gradients)
    assert all(map(torch.equal, skipped.gradients, whole.gradients))


def with_digits(drawn: list) -> list:
    """Most replies get a digit somewhere, its nine chances and what each would have earned."""
    randoms = random.Random(8)
    for rollout in all_rollouts(drawn):
        if randoms.random() < 0.2:
            continue
        p = [randoms.random() for _ in range(9)]
        rollout.drawn_probs = tuple(q / math.fsum(p) for q in p)
        rollout.by_digit = tuple(randoms.random() for _ in range(9))
        rollout.digit_at = randoms.randrange(len(rollout.ids))
        both = zip(rollout.drawn_probs, rollout.by_digit, strict=True)
        rollout.reward = math.fsum(q * r for q, r in both)
    return drawn


@pytest.mark.parametrize(
    ("variant", "budget", "temperature"), [("grpo", 130, 0.7), ("dr_grpo", ALL, 1.0)]
)
def test_all_nine_digits_equal_row_by_row(known, variant, budget, temperature):
    """By the formulas of `expected_advantages`, each reply behind its own copy of the prompt."""
    drawn = with_digits(step_drawn(known, temperature))
    learner = step_of(
        known,
        drawn,
        budget,
        temperature=temperature,
        grpo=GrpoConfig(variant=variant),
        reward=RewardConfig(expected=True),
    )
    w = by_hand(variant, drawn)[1]
    loss = torch.zeros((), dtype=torch.float64)
    number = digits = 0
    for group in all_groups(drawn):
        means = [rollout.reward for rollout in group.rollouts]
        table = [rollout.by_digit or (rollout.reward,) * 9 for rollout in group.rollouts]
        chances = [rollout.drawn_probs or (1 / 9,) * 9 for rollout in group.rollouts]
        m = fmean(means)
        square = sum((mean - m) ** 2 for mean in means) + (1 - 1 / G) * sum(
            p * (r - mean) ** 2
            for q, row, mean in zip(chances, table, means, strict=True)
            for p, r in zip(q, row, strict=True)
        )
        scale = 1.0 if variant == "dr_grpo" else math.sqrt(square / (G - 1)) + 1e-4
        for i, rollout in enumerate(group.rollouts):
            logits = logits_of(known, group.prompt, rollout, temperature)
            ids = torch.tensor(rollout.ids)[:, None]
            log_p = logits.log_softmax(-1).gather(-1, ids).double()
            ratio = (log_p - log_p.detach()).exp()
            loss = loss - (w[number] * (means[i] - m) / scale * ratio).sum()
            if rollout.by_digit is not None:
                digits += 1
                nine = logits[rollout.digit_at, known[1].digit_ids].log_softmax(-1).double()
                A = torch.tensor([r - m - (r - means[i]) / G for r in table[i]]) / scale
                p = torch.tensor(chances[i])
                loss = loss - w[number] * (p * A * (nine - nine.detach()).exp()).sum()
            number += 1
    assert number / 2 < digits < number
    gradients = torch.autograd.grad(loss, known[2].parameters())
    assert learner.loss == pytest.approx(float(loss.detach()), rel=1e-5, abs=1e-7)
    same(learner.gradients, list(gradients))
