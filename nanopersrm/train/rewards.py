"""Rewards: what a sampled reply is worth, in named parts from 0 to 1, and as their weighted sum.

A *plan* is what one step samples about a pair: replies about each candidate (pointwise) or in both
orders (pairwise), and the same for the twin. Each reply is parsed and compared with the others:

    format       1 if it parses
    order        pointwise: share of the replies about the rival that it is right against, ties
                 half: a score of the chosen text must be above, one of the rejected text below.
                 Pairwise, with m = chosen - rejected: ½ + sign(m) (¼ + ¼ min(|m|, M) / M)
    both_orders  pairwise: right · share of the replies in the other order that are right
    twin         right · share of the twin's replies that are right: those that show the same text
                 as A, under the exemplars of the other writer
    faithful     t / (t + f) · t / K: t true and f untrue quotes and claims by `faithful.py`,
                 K = Q + C of them wanted, no more than Q quotes and C claims counted as true
    calibration  1 - (p - y)²: y is 1 if A is the writer's; p is (a - 1) / 8 (pointwise) or
                 ½ + (a - b) / 16 (pairwise), from the soft scores a and b
    length       1 within the budget of tokens, falling to 0 over `fall` tokens on either side

`right` has no ties: the share of the rival's replies strictly on the other side (pointwise), 1 if
m > 0 (pairwise). Replies that do not parse stay in every denominator and are right against nobody;
nobody is right against them. Their own parts are all 0 and so is their total: with parts and
weights from 0, the lowest there is.

Worked example, pointwise. Replies about the chosen text say 7 and 4, about the rejected text 4 and
2; the twin's 6 and 5, and 5 and 3. The reply with the 7:

    order 1          above 4 and 2. The 4 ties once: order 0.75, right 0.5
    twin 0.75        right 1, times the share of the twin: (1 + 0.5) / 2
    faithful 0.52    two true quotes, three true claims, one untrue: 5/6 · 5/8
    calibration 0.91 soft score 6.6, p = 0.7, y = 1      (0.51 if the text were another writer's)
    length 0.5       180 tokens, where 160 are allowed and 200 earn nothing
    total            0.5·1 + 1·1 + 0.5·0.75 + 0.3·0.52 + 0.3·0.91 + 0.1·0.5 = 2.35

Why each, how to play it, and what stops that.

  * order is the task. The same digit for all ties with itself: half. Pairwise margins pay for being
    bold whenever right is likelier than wrong; calibration takes that back.
  * both_orders: "always A" is right in one order and earns 0 (after J1, arXiv 2505.10320).
  * twin: who scores the text and not its fit to the exemplars is right on the pair or the twin,
    never both: with one score a text 0, with noise at most a quarter on average, as by chance.
  * faithful: silence earns 0. What is said twice counts once, truths beyond K do not count and so
    never outweigh an untruth; quotes over 12 words are copying. A quote must be from the text that
    its sentence speaks of.
  * calibration: "always 5" earns 0.75 here and half of the order. Without digit probabilities the
    digits themselves are the soft scores.
  * length keeps reasoning within what a judge may write, and from shrinking to nothing.

In expectation (`expected`, pointwise). A digit drawn from a wide distribution is mostly luck, and
the sampler knows the distribution. Then order and right are means over it, for the reply and its
rivals, and calibration is that of the digits; `Reward.by_digit` is what each would have earned, for
`expected.py` to learn from. Of the chosen text 7 (certain) and 4 or 8 (half each), against a
certain 6: order 1 and 0.5. Order sees differences alone: calibration holds digits in the middle.

In one group `twin` and `both_orders` are `right` times a number that all replies share; across the
plan they say which groups deserve more. At once, unreasoned, there is no `faithful` nor `length`.

What we left out. Whether a true claim matters ("no emoji" is true of most). Kind, author and source
of a pair: what `Shown` does not hold, no reward can depend on. Read next: `grpo.py`.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from itertools import accumulate
from statistics import fmean
from typing import Literal

from nanopersrm import InputError
from nanopersrm.judge.faithful import check, fold
from nanopersrm.judge.verdict import DIGITS, LABELS, parse, soft_score

Role = Literal["chosen", "rejected"]
PARTS = ("format", "order", "both_orders", "twin", "faithful", "calibration", "length")
OTHER: dict[Role, Role] = {"chosen": "rejected", "rejected": "chosen"}
FORMS = ("pointwise", "pairwise")
MOST = 1.001  # a probability that was rounded
WIDEST = DIGITS[-1] - DIGITS[0]  # margin
HEAVIEST = 1000  # weight


@dataclass(frozen=True)
class RewardConfig:
    """Weights of the parts, and what is enough."""

    # The judgement weighs up to 2 and the manners 0.7: what is wholly wrong (order 0) with the best
    # manners earns less than what is wholly right (order 1) with the worst. Any reply that parses
    # earns at least 0.5 more than one that does not.
    format: float = 0.5  # weight of a reply that parses
    order: float = 1.0  # weight of preferring the right text
    both_orders: float = 0.5  # weight of being right in both orders (pairwise)
    twin: float = 0.5  # weight of being right on the twin too
    faithful: float = 0.3  # weight of true quotes and claims
    calibration: float = 0.3  # weight of soft scores that are honest probabilities
    length: float = 0.1  # weight of keeping to the budget
    # Replies to imitate have 2 quotes and 8 claims in the middle, a quarter have 6 claims or fewer.
    quotes: int = 2  # that are counted as true, at most
    claims: int = 6  # that are counted as true, at most
    margin: int = 4  # of digits, beyond which a right order earns no more: half of the widest
    # Replies to imitate have 120 tokens on average, a judge may think for 160.
    shortest: int = 40  # tokens of a reply
    longest: int = 160  # tokens of a reply
    fall: int = 40  # tokens outside the budget over which its reward falls to nothing
    expected: bool = False  # compare and learn all nine digits by their chances, not the one drawn
    entropy: float = 0.0  # weight of their entropy in nats: keeps all nine in play

    def __post_init__(self) -> None:
        for name in (*PARTS, "entropy"):
            if not 0 <= (got := getattr(self, name)) <= HEAVIEST:
                raise InputError(f"{name}: expected a weight from 0 to {HEAVIEST}, got {got}")
        for name in (f.name for f in fields(self) if f.name not in (*PARTS, "expected", "entropy")):
            least = 0 if name in ("quotes", "shortest") else 1
            if getattr(self, name) < least:
                raise InputError(f"{name}: expected at least {least}, got {getattr(self, name)}")
        if self.margin > WIDEST:
            raise InputError(f"margin: expected at most {WIDEST}, got {self.margin}")
        if self.longest < self.shortest:
            raise InputError(
                f"longest: expected at least shortest ({self.shortest}), got {self.longest}"
            )

    @property
    def weights(self) -> tuple[float, ...]:
        """(7,) in the order of PARTS, as the columns of `table`."""
        return tuple(getattr(self, name) for name in PARTS)


@dataclass(frozen=True)
class Rollout:
    """A sampled reply."""

    reply: str
    tokens: int  # that were drawn
    digits: tuple[tuple[float, ...], ...] | None = None  # for each label p(1) … p(9); None: unknown
    chances: tuple[float, ...] | None = None  # p(1) … p(9) of an only digit as drawn


@dataclass(frozen=True)
class Shown:
    """A pair as its prompts showed it, and all that was drawn about it."""

    exemplars: tuple[str, ...]
    chosen: str
    rejected: str
    groups: Mapping[Role, Sequence[Rollout]]  # role of candidate A -> replies, for both roles

    def candidates(self, first: Role, form: str) -> dict[str, str]:
        """Label -> text, as the prompt with `first` as A had them."""
        roles = (first,) if form == "pointwise" else (first, OTHER[first])
        return {label: getattr(self, role) for label, role in zip(LABELS, roles, strict=False)}


@dataclass(frozen=True)
class Plan:
    """A pair and, if it was sampled in the same step, its twin."""

    form: str  # one of FORMS
    shown: tuple[Shown, ...]  # the pair, or the pair and its twin
    at_once: bool = False  # nothing was reasoned

    def __post_init__(self) -> None:
        assert self.form in FORMS, self.form
        assert len(self.shown) in (1, 2), f"expected a pair and its twin, got {len(self.shown)}"
        for shown in self.shown:
            assert set(shown.groups) == set(OTHER), f"groups of {sorted(shown.groups)}"
            assert all(shown.groups.values()), "a group without replies"
        if len(self.shown) == 2:
            pair, twin = self.shown
            mirrored = (twin.chosen, twin.rejected) == (pair.rejected, pair.chosen)
            assert mirrored, "a twin has the same two texts in opposite roles"

    @property
    def parts(self) -> tuple[str, ...]:
        """Those of PARTS that can be earned at all."""
        missing = {"both_orders"} if self.form == "pointwise" else set()
        missing |= {"twin"} if len(self.shown) == 1 else set()
        missing |= {"faithful", "length"} if self.at_once else set()
        return tuple(name for name in PARTS if name not in missing)


@dataclass(frozen=True)
class Reward:
    """What a reply is worth."""

    parts: dict[str, float]  # each from 0 to 1; those that the plan allows, in the order of PARTS
    total: float
    problem: str | None  # why it is invalid; None: it is not
    by_digit: tuple[float, ...] | None = None  # in expectation: its total, had it drawn 1 … 9


@dataclass(frozen=True)
class _Said:
    """The digits of one reply, and what its group's rivals make of them."""

    scores: tuple[int, ...] | None  # None: invalid
    problem: str | None
    order: float = 0.0
    right: float = 0.0
    honest: float = 0.0  # calibration
    chances: tuple[float, ...] | None = None  # of each digit from 1 to 9, and with it:
    by_digit: tuple[tuple[float, float, float], ...] = ()  # order, right, honest


def rewards(plan: Plan, config: RewardConfig) -> list[dict[Role, list[Reward]]]:
    """A reward for each reply, in the shape of the plan: one entry a pair, then role, then reply.

    Any text gives a reward. Replies may stand in any order in their groups.
    """
    said = [_judged(plan.form, shown, config) for shown in plan.shown]
    shares = [{role: fmean([one.right for one in own[role]]) for role in OTHER} for own in said]
    found: list[dict[Role, list[Reward]]] = []
    for place, shown in enumerate(plan.shown):
        rewarded: dict[Role, list[Reward]] = {}
        for role in OTHER:
            candidates = shown.candidates(role, plan.form)
            rewarded[role] = []
            for rollout, one in zip(shown.groups[role], said[place][role], strict=True):
                parts, twins = dict.fromkeys(plan.parts, 0.0), 0.0
                if one.problem is None:
                    # the text that is A here has the other role in the twin
                    twins = shares[(place + 1) % len(said)][OTHER[role]]
                    everything = {
                        "format": 1.0,
                        "order": one.order,
                        "both_orders": one.right * shares[place][OTHER[role]],
                        "twin": one.right * twins,
                        "faithful": faithful(rollout.reply, shown.exemplars, candidates, config),
                        "calibration": one.honest,
                        "length": length(rollout.tokens, config),
                    }
                    parts = {name: everything[name] for name in parts}
                total = math.fsum(getattr(config, name) * part for name, part in parts.items())
                by_digit = None
                if one.by_digit:
                    twin = config.twin * twins if "twin" in parts else 0.0
                    told = [_dot((config.order, twin, config.calibration), x) for x in one.by_digit]
                    middle = _dot(_chances(one), told)
                    by_digit = tuple(total + own - middle for own in told)
                rewarded[role].append(Reward(parts, total, one.problem, by_digit))
        found.append(rewarded)
    return found


def table(group: Sequence[Reward]) -> list[list[float]]:
    """A row a reply, a column a part in the order of PARTS; 0 for what the plan does not allow."""
    return [[reward.parts.get(name, 0.0) for name in PARTS] for reward in group]


def faithful(
    reply: str, exemplars: Sequence[str], candidates: Mapping[str, str], config: RewardConfig
) -> float:
    """Share of the quotes and claims that are true, times the share of those wanted that is there.

    A claim is counted once for its subject and factor, a quote once for its words.
    """
    report = check(reply, exemplars, candidates)
    good = [q for q in report.found_quotes if q.verbatim and (q.placed or q.subject is None)]
    quotes = {fold(quote.text) for quote in good}
    claims = {(claim.subject, claim.factor) for claim in report.found_claims if claim.holds}
    true = min(len(quotes), config.quotes) + min(len(claims), config.claims)
    untrue = report.quotes - len(good) + report.claims - report.claims_true
    return true / (true + untrue) * true / (config.quotes + config.claims) if true else 0.0


def calibration(soft: Sequence[float], writers: bool) -> float:
    """1 - Brier of the probability that A is the writer's, from the soft scores of all labels.

    >>> calibration([9.0], True), calibration([5.0], True), calibration([9.0, 1.0], False)
    (1.0, 0.75, 0.0)
    """
    one, *two = soft
    p = 0.5 + (one - two[0]) / (2 * WIDEST) if two else (one - DIGITS[0]) / WIDEST
    return 1.0 - (min(max(p, 0.0), 1.0) - writers) ** 2


def length(tokens: int, config: RewardConfig) -> float:
    """1 within the budget, falling in a straight line to 0 on either side."""
    outside = max(config.shortest - tokens, tokens - config.longest, 0)
    return max(0.0, 1.0 - outside / config.fall)


def by_margin(margin: int, config: RewardConfig) -> float:
    """The order of a pairwise reply; the mirrored margin earns what is missing to 1."""
    if margin == 0:
        return 0.5
    shaped = 0.25 + 0.25 * min(abs(margin), config.margin) / config.margin
    return 0.5 + math.copysign(shaped, margin)


def _judged(form: str, shown: Shown, config: RewardConfig) -> dict[Role, list[_Said]]:
    """Every reply about a pair, read and held against the others."""
    labels = LABELS[: 1 if form == "pointwise" else 2]
    read = {role: [_read(one, labels, role) for one in shown.groups[role]] for role in OTHER}
    against = _in_expectation if config.expected and form == "pointwise" else _against
    return {
        role: [against(one, role, read[OTHER[role]], config) if one.scores else one for one in own]
        for role, own in read.items()
    }


def _read(rollout: Rollout, labels: str, role: Role) -> _Said:
    verdict = parse(rollout.reply, labels)
    if verdict.scores is None:
        return _Said(None, verdict.problem)
    scores = tuple(verdict.scores.values())
    if rollout.digits is None:
        return _Said(scores, None, honest=calibration(scores, role == "chosen"))
    chances = rollout.chances and tuple(p / math.fsum(rollout.chances) for p in rollout.chances)
    shape = [len(row) for row in rollout.digits]
    assert shape == [len(DIGITS)] * len(labels), f"expected p of nine digits a label, got {shape}"
    if not all(sum(row) > 0 and all(0 <= p <= MOST for p in row) for row in rollout.digits):
        return _Said(None, "the digits have no probabilities")
    soft = tuple(soft_score(row) / math.fsum(row) for row in rollout.digits)
    return _Said(scores, None, honest=calibration(soft, role == "chosen"), chances=chances)


def _against(one: _Said, role: Role, rivals: Sequence[_Said], config: RewardConfig) -> _Said:
    """A reply that parses, with `order` and `right`."""
    assert one.scores is not None
    sign = 1 if role == "chosen" else -1  # of A, as a difference that should be above 0
    if len(one.scores) == 2:
        margin = sign * (one.scores[0] - one.scores[1])
        return replace(one, order=by_margin(margin, config), right=float(margin > 0))
    margins = [sign * (one.scores[0] - rival.scores[0]) for rival in rivals if rival.scores]
    right = sum(m > 0 for m in margins) / len(rivals)
    return replace(one, order=right + margins.count(0) / 2 / len(rivals), right=right)


def _in_expectation(one: _Said, role: Role, rivals: Sequence[_Said], config: RewardConfig) -> _Said:
    """The same for every digit that the reply might have drawn, against those of its rivals."""
    chances = _chances(one)
    level = [math.fsum(_chances(rival)[k] for rival in rivals if rival.scores) for k in range(9)]
    below = list(accumulate(level, initial=0.0))  # below[k]: rivals' digits under DIGITS[k]
    beaten = below[:-1] if role == "chosen" else [max(0.0, below[-1] - x) for x in below[1:]]
    rows = tuple(
        ((x + tied / 2) / len(rivals), x / len(rivals), calibration([digit], role == "chosen"))
        for x, tied, digit in zip(beaten, level, DIGITS, strict=True)
    )
    order, right, honest = (_dot(chances, column) for column in zip(*rows, strict=True))
    found = replace(one, order=order, right=right)
    return replace(found, honest=honest, by_digit=rows) if one.chances else found


def _chances(one: _Said) -> tuple[float, ...]:
    """p(1) … p(9) of its digit; certain where only the digit is known."""
    assert one.scores is not None
    return one.chances or tuple(float(digit == one.scores[0]) for digit in DIGITS)


def _dot(one: Sequence[float], two: Sequence[float]) -> float:
    return math.fsum(x * y for x, y in zip(one, two, strict=True))
