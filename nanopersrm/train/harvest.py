"""The harvest of a step: replies drawn about a few couples, each with its reward, in one numbering.

    reply      0 … 7       8 … 15      16 … 23     24 … 31         S = 32 with G = 8
    prompt     chosen      rejected    chosen      rejected
    of         the pair                its twin                    plan 0; plan 1 goes on at 32

Rewards, advantages, lengths and the trees for training all speak of a reply by this number, which
its tokens carry along as their owner (`packing.py`). Groups are the replies to one prompt, or all
of a plan: then a pair and a twin that both went right are above those that did not.

Plans that were judged at once, without reasoning, come last. Their replies are counted with the
others, and by themselves where a step has both.

What we left out: replies that several steps share.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from math import fsum
from statistics import fmean

import torch
from torch import Tensor

from nanopersrm.judge.verdict import DIGITS
from nanopersrm.train.expected import Verdicts, expected_advantages
from nanopersrm.train.grpo import GrpoConfig, advantages
from nanopersrm.train.packing import Bundle
from nanopersrm.train.plans import ROLES, SCORED, Asked
from nanopersrm.train.rewards import PARTS, Reward, RewardConfig, table
from nanopersrm.train.rollouts import Drawn

SAME = 1e-6  # totals that are nearer are equal
EVEN = (1 / len(DIGITS),) * len(DIGITS)
RULE = f"\n\n{'=' * 80}\n\n"


@dataclass
class Yield:
    """One plan: its prompts, and for each a group of replies with their rewards."""

    asked: Asked
    groups: list[list[Drawn]]
    rewards: list[list[Reward]]  # in the shape of groups

    @property
    def success(self) -> float:
        """The mean reward for the right order; 0.5 by chance."""
        return fmean(one.parts["order"] for group in self.rewards for one in group)

    def unanimous(self, group_by: str) -> list[bool | None]:
        """Of each group: all replies that parse have the same order, so whatever else they differ
        in, the order teaches nothing. None where nobody judged: fewer than two parse, or no
        rival does, and the form is to be learned first; or in expectation, where it is not so."""
        able = [[one for one in group if one.problem is None] for group in self.rewards]
        parsed = [[one for one in group if one.by_digit is None] for group in able]
        orders = [
            [one.parts["order"] for one in own] if parsed[p ^ 1] else []  # p ^ 1: about the rival
            for p, own in enumerate(parsed)
        ]
        if group_by == "plan":
            orders = [[order for own in orders for order in own]]
        return [max(own) - min(own) < SAME if len(own) > 1 else None for own in orders]

    def flat(self, group_by: str, by_part: bool = False) -> bool:
        """Nobody did better than another of the group, in no group; `by_part`: in no part. In
        expectation, no digit that could be drawn either."""
        worth = [
            [row if by_part else [one.total] for one, row in zip(group, table(group), strict=True)]
            for group in self.rewards
        ]
        if group_by == "plan":
            worth = [[row for group in worth for row in group]]
        columns = [column for group in worth for column in zip(*group, strict=True)]
        return all(max(column) - min(column) < SAME for column in columns) and not any(
            abs(digit - reward.total) >= SAME
            for own, group in zip(self.groups, self.rewards, strict=True)
            for drawn, reward in zip(own, group, strict=True)
            for digit, p in zip(reward.by_digit or (), drawn.rollout.chances or (), strict=False)
            if p > SAME
        )


@dataclass
class Harvest:
    """All that a step has drawn."""

    plans: list[Yield]
    replaced: int = 0  # plans that were drawn and left out for others
    rows: int = field(default=0, init=False)  # that the trees have

    def _replies(self) -> list[tuple[Drawn, Reward]]:
        """By number."""
        return [
            both
            for one in self.plans
            for group, worth in zip(one.groups, one.rewards, strict=True)
            for both in zip(group, worth, strict=True)
        ]

    @property
    def parts(self) -> list[list[float]]:
        """(S, 7) the reward of each reply, part by part."""
        return [row for one in self.plans for worth in one.rewards for row in table(worth)]

    @property
    def lengths(self) -> list[int]:
        """(S,) tokens."""
        return [len(drawn.ids) for drawn, _ in self._replies()]

    def longest(self, reply: int) -> int:
        """Tokens that a reply of this step might have had; `reply`: with reasoning."""
        return max(SCORED if one.asked.at_once else reply for one in self.plans)

    @property
    def tokens(self) -> int:
        """Drawn, and trained on."""
        return sum(self.lengths) + self.rows

    def groups(self, by: str) -> tuple[Tensor, int]:
        """The group of each reply (S,) int64, and how many groups there are."""
        ids: list[int] = []
        count = 0
        for one in self.plans:
            for group in one.groups:
                ids += [count] * len(group)
                count += by == "prompt"
            count += by == "plan"
        return torch.tensor(ids), count

    def trees(self, told: Sequence[bool], budget: int) -> list[Bundle]:
        """What is trained on: the replies whose group has something to tell, by pair."""
        found: list[Bundle] = []
        number = 0
        for one in self.plans:
            sizes = [len(group) for group in one.groups]
            firsts = [number + sum(sizes[:p]) for p in range(len(sizes))]
            found += one.asked.trees(one.groups, number, [told[i] for i in firsts], budget)
            number += sum(sizes)
        self.rows = sum(bundle.tokens for bundle in found)
        return found

    def advantages(
        self, reward: RewardConfig, config: GrpoConfig, by: str
    ) -> tuple[Tensor, Tensor]:
        """(S,) of the replies and (S, 9) of the digits that each might have had."""
        group, groups = self.groups(by)
        if reward.expected:
            return expected_advantages(
                self.verdicts(), group, groups, config.by_std, reward.entropy
            )
        parts, weights = torch.tensor(self.parts), torch.tensor(reward.weights)
        found = advantages(parts, weights, group, groups, config)
        return found, found[:, None].expand(-1, len(DIGITS))

    def verdicts(self) -> Verdicts:
        """What each digit would have earned; a reply without one counts with what it earned."""
        places, chances, worth = list[int](), list[tuple[float, ...]](), list[tuple[float, ...]]()
        for drawn, reward in self._replies():
            known = reward.by_digit is not None and drawn.rollout.chances is not None
            places.append(drawn.digit_at if known else -1)
            p = drawn.rollout.chances if known and drawn.rollout.chances else EVEN
            chances.append(tuple(one / fsum(p) for one in p))
            worth.append(reward.by_digit or (reward.total,) * len(DIGITS))
        wide = torch.float64
        return Verdicts(
            torch.tensor(places), torch.tensor(chances, dtype=wide), torch.tensor(worth, dtype=wide)
        )

    def log_probs(self, owners: Tensor) -> Tensor:
        """owners (M,): the reply of each token, whole replies one after another -> what the sampler
        had as log-probability of the token (M,)."""
        replies = self._replies()
        order = torch.unique_consecutive(owners).tolist()
        flat = [p for number in order for p in replies[number][0].log_probs]
        assert len(flat) == len(owners), f"{len(flat)} tokens were drawn, {len(owners)} are trained"
        return torch.tensor(flat, device=owners.device)

    def numbers(self, group_by: str = "prompt") -> dict[str, float]:
        """For the log: means over the replies."""
        worth = [reward for _, reward in self._replies()]
        order = [reward.parts["order"] for reward in worth]
        found = {
            "reward": fmean(reward.total for reward in worth),
            "right": fmean(order),
            "formed": fmean(reward.problem is None for reward in worth),
            "length": fmean(self.lengths),
        }
        alike = [x for one in self.plans for x in one.unanimous(group_by) if x is not None]
        if alike:
            found["unanimous"] = fmean(alike)
        for name in PARTS:
            if own := [reward.parts[name] for reward in worth if name in reward.parts]:
                found[f"reward_{name}"] = fmean(own)
        if len({one.asked.at_once for one in self.plans}) == 2:
            for at_once, name in ((False, "right_reasoned"), (True, "right_at_once")):
                own = [one.success for one in self.plans if one.asked.at_once == at_once]
                found[name] = fmean(own)
        return found | {"reward_replaced": float(self.replaced)}

    def page(self) -> str:
        """All groups as readable text, with the rewards."""
        pages = []
        for one in self.plans:
            for p, (group, worth) in enumerate(zip(one.groups, one.rewards, strict=True)):
                pair = one.asked.pairs[p // len(ROLES)]
                of = f"{pair.id}, exemplars of {pair.author}, A is {ROLES[p % len(ROLES)]}"
                best = sorted(zip(group, worth, strict=True), key=lambda both: -both[1].total)
                told = [_said(drawn, reward) for drawn, reward in best]
                pages.append("\n\n".join([of, *told]))
        return RULE.join(pages) + "\n"


def _said(drawn: Drawn, reward: Reward) -> str:
    parts = ", ".join(f"{name} {value:.2f}" for name, value in reward.parts.items())
    why = "" if reward.problem is None else f" ({reward.problem})"
    nine = {"chance of 1 to 9": drawn.rollout.chances, "which would earn": reward.by_digit}
    if None in nine.values():  # not in expectation, or no digit to read
        nine = {}
    rows = [" ".join([name, *(f"{x:5.2f}" for x in own or ())]) for name, own in nine.items()]
    return "\n".join([f"--- {reward.total:.3f}{why}: {parts}", *rows, drawn.rollout.reply])
