"""Rewards: what a drawn reply is worth, in named parts from 0 to 1, and as their weighted sum.

A step draws replies to four prompts at a time: about the chosen and the rejected text of a pair,
and about the same two texts under the exemplars of its twin. Each reply is compared with the
others. Its *rivals* are the replies about the other text of its pair.

    order        share of the rivals that it is right against, ties half: the score of a chosen text
                 must be above, that of a rejected text below
    twin         right · share of the twin's replies that are right: those about the same text, with
                 the exemplars of the other writer
    calibration  1 - (p - y)²: y is 1 if the text is the writer's, p = (soft score - 1) / 8
    brevity      1 for no line, 0 for as many as there may be: a line costs its weight / think_lines

`right` has no ties: the share of the rivals strictly on the other side.

Replies about the chosen text say 7 and 4, about the rejected text 4 and 2; the twin's 6 and 5, and
5 and 3. The reply with the 7, after 4 of 8 lines:

    order 1          above 4 and 2. The 4 ties once: order 0.75, right 0.5
    twin 0.75        right 1, times the share of the twin: (1 + 0.5) / 2
    calibration 0.91 soft score 6.6, p = 0.7, y = 1      (0.51 if the text were another writer's)
    brevity 0.5
    total            1·1 + 0.5·0.75 + 0.3·0.91 + 0.05·0.5 = 1.67

How each could be played, and what stops that.

  * order is the task. The same digit for all ties with itself: half.
  * twin: who scores the text and not its fit to the exemplars is right on the pair or the twin,
    never both: with one score a text 0, with noise at most a quarter on average, as by chance.
  * calibration: "always 5" earns 0.75 here and half of the order.
  * Nothing rewards what a line says: the instruments say it.

In expectation (`expected`, the default) order, right and calibration are means over the nine
chances of each digit, for the reply and its rivals, and `Rollout.by_digit` is what each of the nine
would have earned, for `grpo.expected_advantages` to learn from. A line is then compared by what it
does to the chances, without the noise of the digit that was drawn."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from statistics import fmean

import torch

from nanopersrm import InputError
from nanopersrm.judge.verdict import DIGITS, soft_score
from nanopersrm.train.grpo import (
    Comparison,
    GrpoConfig,
    advantages,
    expected_advantages,
    informative,
    token_weights,
)
from nanopersrm.train.rollout import Rollout, RolloutGroup, score_digits

PARTS = ("order", "twin", "calibration", "brevity")
WIDEST = DIGITS[-1] - DIGITS[0]  # difference of two scores
HEAVIEST = 1000  # weight


@dataclass(frozen=True)
class RewardConfig:
    """Weights of the parts."""

    order: float = 1.0  # weight of preferring the right text
    twin: float = 0.5  # weight of being right on the twin too
    calibration: float = 0.3  # weight of soft scores that are honest probabilities
    brevity: float = 0.05  # weight of few lines: of no line against as many as there may be
    expected: bool = True  # compare and learn all nine digits by their chances, not the one drawn
    entropy: float = 0.0  # weight of their entropy in nats: keeps all nine in play

    def __post_init__(self) -> None:
        for name in (*PARTS, "entropy"):
            if not 0 <= (weight := getattr(self, name)) <= HEAVIEST:
                raise InputError(f"{name}: expected a weight from 0 to {HEAVIEST}, got {weight}")

    @property
    def weights(self) -> tuple[float, ...]:
        """(C,) in the order of PARTS."""
        return tuple(getattr(self, name) for name in PARTS)


@dataclass
class _Score:
    """What a reply says, and how that stands against its rivals."""

    nine: tuple[float, ...]  # p(1) … p(9): as drawn in expectation, else 1 for the drawn digit
    order: float = 0.0
    right: float = 0.0
    by_digit: tuple[tuple[float, float, float], ...] = ()  # order, right, calibration of 1 … 9


def check_expected(config: RewardConfig, grpo: GrpoConfig) -> None:
    """Raise where an expectation over digits is asked for that cannot be had."""
    if config.entropy and not config.expected:
        raise InputError("--reward.entropy: only with --reward.expected are there nine digits")
    without = {"gdpo": "compares part by part", "gspo": "has one ratio for a whole reply"}
    if config.expected and grpo.variant in without:
        why = f"{grpo.variant} {without[grpo.variant]}"
        raise InputError(f"--grpo.variant: {why}, so say --reward.no-expected")


def reward(groups: Sequence[RolloutGroup], config: RewardConfig, think_lines: int) -> None:
    """Fill in what each reply has earned. groups: about the chosen and the rejected text of a pair,
    then of its twin if it has one. think_lines: that a reply may have."""
    assert len(groups) in (2, 4), f"expected groups of a pair and its twin, got {len(groups)}"
    assert all(group.rollouts for group in groups), "a group without replies"
    scores = [[_score(rollout, config.expected) for rollout in group.rollouts] for group in groups]
    for i, group in enumerate(groups):
        for score in scores[i]:
            _stand(score, scores[i ^ 1], group.role == "chosen")  # about the other text of the pair
    shares = [fmean([score.right for score in some]) for some in scores]
    for i, group in enumerate(groups):
        # The text that is judged here has the other role in the twin.
        twin_share = shares[3 - i] if len(groups) == 4 else None
        for rollout, score in zip(group.rollouts, scores[i], strict=True):
            _fill_in(rollout, score, group.role == "chosen", twin_share, config, think_lines)


def compare(
    groups: Sequence[RolloutGroup],
    most_choices: int,
    config: RewardConfig,
    grpo: GrpoConfig,
    device: torch.device,
) -> Comparison:
    """How far each reply of a step is above its group. most_choices: that a reply could have."""
    rollouts = [rollout for group in groups for rollout in group.rollouts]
    Q, sizes = len(groups), torch.tensor([len(group.rollouts) for group in groups])
    group_of = torch.repeat_interleave(torch.arange(Q), sizes)  # (S,)
    digits = score_digits(rollouts)
    if config.expected:
        above, by_digit = expected_advantages(digits, group_of, Q, grpo.by_std, config.entropy)
    else:
        parts = torch.tensor([[r.parts.get(name, 0.0) for name in PARTS] for r in rollouts])
        above = advantages(parts, torch.tensor(config.weights), group_of, Q, grpo)  # (S,)
        by_digit = above[:, None].expand(-1, len(DIGITS))  # (S, 9)
    kept = informative(by_digit.abs().amax(-1), group_of, Q)  # (Q,)
    lengths = torch.tensor([len(rollout.reply.choices) for rollout in rollouts])
    weights = token_weights(lengths, most_choices, grpo)
    return Comparison(above.to(device), by_digit, weights.to(device), kept, digits)


def _score(rollout: Rollout, expected: bool) -> _Score:
    reply = rollout.reply
    if not all(map(math.isfinite, (*reply.digits, *reply.drawn_digits))):
        raise InputError(
            "the digits have no probabilities: the adapter is broken, lower --optim.lr"
        )
    drawn = tuple(float(digit == reply.digit) for digit in DIGITS)
    return _Score(tuple(reply.drawn_digits) if expected else drawn)


def _stand(score: _Score, rivals: Sequence[_Score], chosen: bool) -> None:
    """Fill in order, right and calibration of every digit, against those of the rivals."""
    level = [math.fsum(rival.nine[k] for rival in rivals) for k in range(9)]
    below = list(accumulate(level, initial=0.0))  # below[k]: rivals' digits under DIGITS[k]
    beaten = below[:-1] if chosen else [max(0.0, below[-1] - x) for x in below[1:]]
    score.by_digit = tuple(
        ((x + tied / 2) / len(rivals), x / len(rivals), calibration(digit, chosen))
        for x, tied, digit in zip(beaten, level, DIGITS, strict=True)
    )
    score.order, score.right, _ = (
        _dot(score.nine, column) for column in zip(*score.by_digit, strict=True)
    )


def _fill_in(
    rollout: Rollout,
    score: _Score,
    chosen: bool,
    twin_share: float | None,
    config: RewardConfig,
    think_lines: int,
) -> None:
    """twin_share: of the twin's replies about the same text those that are right; None: no twin."""
    soft = calibration(soft_score(rollout.reply.digits), chosen)
    in_mean = _dot(score.nine, [row[2] for row in score.by_digit])
    rollout.parts = {"order": score.order}
    if twin_share is not None:
        rollout.parts["twin"] = score.right * twin_share
    rollout.parts["calibration"] = in_mean if config.expected else soft
    rollout.parts["brevity"] = 1 - len(rollout.reply.features) / think_lines
    rollout.reward = math.fsum(getattr(config, name) * x for name, x in rollout.parts.items())
    if config.expected:
        weights = (config.order, config.twin * (twin_share or 0.0), config.calibration)
        by_digit = [_dot(weights, row) for row in score.by_digit]
        mean = _dot(score.nine, by_digit)
        rollout.by_digit = tuple(rollout.reward + earned - mean for earned in by_digit)


def calibration(soft: float, writers: bool) -> float:
    """1 - Brier of the probability that the text is the writer's, from its soft score."""
    p = (soft - DIGITS[0]) / WIDEST
    return 1.0 - (min(max(p, 0.0), 1.0) - writers) ** 2


def _dot(a: Sequence[float], b: Sequence[float]) -> float:
    return math.fsum(x * y for x, y in zip(a, b, strict=True))
