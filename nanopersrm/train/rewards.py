"""Rewards: what a drawn reply is worth, in named parts from 0 to 1, and as their weighted sum.

A step draws replies to four prompts at a time: about the chosen and the rejected text of a pair,
and about the same two texts under the exemplars of its twin. Each reply is parsed and compared with
the others. Its *rivals* are the replies about the other text of its pair.

    format       1 if it parses
    length       1 within the budget of tokens, falling to 0 over FALL tokens on either side
    order        share of the rivals that it is right against, ties half: the score of a chosen text
                 must be above, that of a rejected text below
    twin         right · share of the twin's replies that are right: those about the same text, with
                 the exemplars of the other writer
    faithful     t / (t + f) · t / K: t true and f untrue quotes and claims (`claims.py`),
                 K = QUOTES + CLAIMS of them wanted, and no more than K counted as true
    calibration  1 - (p - y)²: y is 1 if the text is the writer's, p = (soft score - 1) / 8

`right` has no ties: the share of the rivals strictly on the other side. Replies that do not parse
stay in every denominator. They are right against nobody, and nobody is right against them. Their
own parts are all 0 and so is their total, the lowest there is.

Replies about the chosen text say 7 and 4, about the rejected text 4 and 2; the twin's 6 and 5, and
5 and 3. The reply with the 7:

    order 1          above 4 and 2. The 4 ties once: order 0.75, right 0.5
    twin 0.75        right 1, times the share of the twin: (1 + 0.5) / 2
    faithful 0.52    two true quotes, three true claims, one untrue: 5/6 · 5/8
    calibration 0.91 soft score 6.6, p = 0.7, y = 1      (0.51 if the text were another writer's)
    length 0.5       180 tokens, where 160 are allowed and 200 earn nothing
    total            0.5·1 + 1·1 + 0.5·0.75 + 0.3·0.52 + 0.3·0.91 + 0.1·0.5 = 2.35

How each could be played, and what stops that.

  * order is the task. The same digit for all ties with itself: half.
  * twin: who scores the text and not its fit to the exemplars is right on the pair or the twin,
    never both: with one score a text 0, with noise at most a quarter on average, as by chance.
  * faithful: silence earns 0. What is said twice counts once, truths beyond K never outweigh an
    untruth; quotes over 12 words, or not from the text that the sentence speaks of, are untrue.
  * calibration: "always 5" earns 0.75 here and half of the order.

In expectation (`expected`) order, right and calibration are means over the nine chances of each
digit, for the reply and its rivals, and `Rollout.by_digit` is what each of the nine would have
earned, for `grpo.expected_advantages` to learn from. A judgement at once, without reasoning, has no
`faithful` and no `length`."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from statistics import fmean

import torch

from nanopersrm import InputError
from nanopersrm.judge.claims import check, fold
from nanopersrm.judge.verdict import DIGITS, LABELS, parse, soft_score
from nanopersrm.train.grpo import (
    Comparison,
    GrpoConfig,
    advantages,
    expected_advantages,
    informative,
    token_weights,
)
from nanopersrm.train.rollout import Rollout, RolloutGroup, score_digits

PARTS = ("format", "length", "order", "twin", "faithful", "calibration")
WIDEST = DIGITS[-1] - DIGITS[0]  # difference of two scores
QUOTES, CLAIMS = 2, 6  # counted as true, at most: replies to imitate have 2 and about 8
SHORTEST, LONGEST = 40, 160  # tokens of a reply, the judge's own budget
FALL = 40  # tokens outside of it over which the reward falls to nothing
MOST = 1.001  # a probability that was rounded
HEAVIEST = 1000  # weight


@dataclass(frozen=True)
class RewardConfig:
    """Weights of the parts."""

    # What is wholly wrong (order 0) with the best manners earns less than what is wholly right with
    # the worst, and what parses always more than what does not.
    format: float = 0.5  # weight of a reply that parses
    length: float = 0.1  # weight of keeping to the budget
    order: float = 1.0  # weight of preferring the right text
    twin: float = 0.5  # weight of being right on the twin too
    faithful: float = 0.3  # weight of true quotes and claims
    calibration: float = 0.3  # weight of soft scores that are honest probabilities
    expected: bool = False  # compare and learn all nine digits by their chances, not the one drawn
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

    digit: int | None  # None: invalid
    problem: str | None
    calibration: float = 0.0
    probs: tuple[float, ...] | None = None  # p(1) … p(9) as drawn; None: unknown
    order: float = 0.0
    right: float = 0.0
    by_digit: tuple[tuple[float, float, float], ...] = ()  # order, right, calibration of 1 … 9

    @property
    def nine(self) -> tuple[float, ...]:
        """p(1) … p(9); certain where only the digit is known."""
        return self.probs or tuple(float(digit == self.digit) for digit in DIGITS)


def check_expected(config: RewardConfig, grpo: GrpoConfig) -> None:
    """Raise where an expectation over digits is asked for that cannot be had."""
    if config.entropy and not config.expected:
        raise InputError("--reward.entropy: only with --reward.expected are there nine digits")
    without = {"gdpo": "compares part by part", "gspo": "has one ratio for a whole reply"}
    if config.expected and grpo.variant in without:
        why = f"{grpo.variant} {without[grpo.variant]}"
        raise InputError(f"--reward.expected: {why}, choose another --grpo.variant")


def reward(groups: Sequence[RolloutGroup], config: RewardConfig) -> None:
    """Fill in what each reply has earned. groups: about the chosen and the rejected text of a pair,
    then of its twin if it has one."""
    assert len(groups) in (2, 4), f"expected groups of a pair and its twin, got {len(groups)}"
    assert all(group.rollouts for group in groups), "a group without replies"
    scores = [[_read(rollout, group.role) for rollout in group.rollouts] for group in groups]
    for i, group in enumerate(groups):
        rivals = scores[i ^ 1]  # about the other text of the pair
        for score in scores[i]:
            if score.digit is not None:
                stand = _stand_expected if config.expected else _stand
                stand(score, rivals, group.role == "chosen")
    shares = [fmean([score.right for score in some]) for some in scores]
    for i, group in enumerate(groups):
        # The text that is judged here has the other role in the twin.
        twin_share = shares[3 - i] if len(groups) == 4 else None
        for rollout, score in zip(group.rollouts, scores[i], strict=True):
            _fill_in(rollout, score, group, twin_share, config)


def compare(
    groups: Sequence[RolloutGroup],
    longest: int,
    config: RewardConfig,
    grpo: GrpoConfig,
    device: torch.device,
) -> Comparison:
    """How far each reply of a step is above its group. longest: tokens that a reply could have."""
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
    weights = token_weights(torch.tensor([len(r.ids) for r in rollouts]), longest, grpo)
    return Comparison(above.to(device), by_digit, weights.to(device), kept, digits)


def _read(rollout: Rollout, role: str) -> _Score:
    verdict = parse(rollout.text, LABELS[:1])
    if verdict.scores is None:
        return _Score(None, verdict.problem)
    digit = verdict.scores[LABELS[0]]
    if rollout.digit_probs is None:
        return _Score(digit, None, calibration(digit, role == "chosen"))
    p = rollout.digit_probs
    assert len(p) == len(DIGITS), f"expected p of nine digits, got {len(p)}"
    if not (sum(p) > 0 and all(0 <= x <= MOST for x in p)):
        return _Score(None, "the digits have no probabilities")
    soft = soft_score(p) / math.fsum(p)
    drawn = rollout.drawn_probs
    drawn = drawn and tuple(x / math.fsum(drawn) for x in drawn)
    return _Score(digit, None, calibration(soft, role == "chosen"), drawn)


def _stand(score: _Score, rivals: Sequence[_Score], chosen: bool) -> None:
    """Fill in order and right, of the digit that was drawn."""
    assert score.digit is not None
    sign = 1 if chosen else -1
    margins = [sign * (score.digit - rival.digit) for rival in rivals if rival.digit]
    score.right = sum(margin > 0 for margin in margins) / len(rivals)
    score.order = score.right + margins.count(0) / 2 / len(rivals)


def _stand_expected(score: _Score, rivals: Sequence[_Score], chosen: bool) -> None:
    """The same for every digit that might have been drawn, against those of the rivals."""
    level = [math.fsum(rival.nine[k] for rival in rivals if rival.digit) for k in range(9)]
    below = list(accumulate(level, initial=0.0))  # below[k]: rivals' digits under DIGITS[k]
    beaten = below[:-1] if chosen else [max(0.0, below[-1] - x) for x in below[1:]]
    rows = tuple(
        ((x + tied / 2) / len(rivals), x / len(rivals), calibration(digit, chosen))
        for x, tied, digit in zip(beaten, level, DIGITS, strict=True)
    )
    means = [_dot(score.nine, column) for column in zip(*rows, strict=True)]
    score.order, score.right = means[:2]
    if score.probs:
        score.calibration, score.by_digit = means[2], rows


def _fill_in(
    rollout: Rollout,
    score: _Score,
    group: RolloutGroup,
    twin_share: float | None,
    config: RewardConfig,
) -> None:
    """twin_share: of the twin's replies about the same text those that are right; None: no twin."""
    missing = set[str]() if twin_share is not None else {"twin"}
    missing |= {"faithful", "length"} if group.at_once else set()
    rollout.parts = dict.fromkeys((name for name in PARTS if name not in missing), 0.0)
    if score.problem is None:
        earned = {
            "format": 1.0,
            "length": length(len(rollout.ids)),
            "order": score.order,
            "twin": score.right * (twin_share or 0.0),
            "faithful": faithful(rollout.text, group.pair.exemplars, {LABELS[0]: group.candidate}),
            "calibration": score.calibration,
        }
        rollout.parts = {name: earned[name] for name in rollout.parts}
    rollout.problem = score.problem
    rollout.reward = math.fsum(getattr(config, name) * x for name, x in rollout.parts.items())
    if score.by_digit:
        weights = (config.order, config.twin * (twin_share or 0.0), config.calibration)
        by_digit = [_dot(weights, row) for row in score.by_digit]
        mean = _dot(score.nine, by_digit)
        rollout.by_digit = tuple(rollout.reward + earned - mean for earned in by_digit)


def faithful(reply: str, exemplars: Sequence[str], candidates: Mapping[str, str]) -> float:
    """Share of quotes and claims that are true, times the share of those wanted that is there. A
    claim is counted once for its subject and factor, a quote once for its words."""
    report = check(reply, exemplars, candidates)
    good = [q for q in report.found_quotes if q.verbatim and (q.placed or q.subject is None)]
    quotes = {fold(quote.text) for quote in good}
    claims = {(claim.subject, claim.factor) for claim in report.found_claims if claim.holds}
    true = min(len(quotes), QUOTES) + min(len(claims), CLAIMS)
    untrue = report.quotes - len(good) + report.claims - report.claims_true
    return true / (true + untrue) * true / (QUOTES + CLAIMS) if true else 0.0


def calibration(soft: float, writers: bool) -> float:
    """1 - Brier of the probability that the text is the writer's, from its soft score."""
    p = (soft - DIGITS[0]) / WIDEST
    return 1.0 - (min(max(p, 0.0), 1.0) - writers) ** 2


def length(tokens: int) -> float:
    """1 within the budget, falling in a straight line to 0 on either side."""
    outside = max(SHORTEST - tokens, tokens - LONGEST, 0)
    return max(0.0, 1.0 - outside / FALL)


def _dot(a: Sequence[float], b: Sequence[float]) -> float:
    return math.fsum(x * y for x, y in zip(a, b, strict=True))
