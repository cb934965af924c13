"""Plans: a pair and its twin as prompts to draw replies to, and those replies as trees to train on.

    pair     exemplars of writer 1    about chosen | about rejected      pointwise
    twin     exemplars of writer 2    about chosen | about rejected      (the same two texts)

Each of the four prompts gets a group of G replies. In pairwise form the two prompts of a pair show
both texts, once in each order. What the prompts say of the texts is what a judge would be told.

At once, without reasoning, the score line is given up to the digit, `</think>↵<scores>A=`: prompts
are longer by that, and replies begin with the digit.

Training sees the same ids again as one tree for each pair: its exemplars once, under them each
candidate, under the candidate its replies: P + G · R rows, not G · (P + R). With SmolLM2's
tokenizer and G = 8 that is 540 + 2 · (332 + 8 · 120) = 3,124 rows where text by text it is 15,872.
A tree beyond the budget of a micro-batch is cut in two, and so on; each half has the prefix again.

Groups in which no reply did better than another teach nothing and are left out: without a KL their
gradient is zero, and `grpo.token_weights` counts them nevertheless, so that changes no number.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import get_args

from nanopersrm.judge import verdict
from nanopersrm.judge.verdict import LABELS
from nanopersrm.model.tokenizer import Tokenizer
from nanopersrm.pairs import Pair
from nanopersrm.style.similarity import StyleEvidenceFn
from nanopersrm.train import lessons
from nanopersrm.train.facts import shown
from nanopersrm.train.lessons import LessonConfig
from nanopersrm.train.packing import Bundle, Text, grow_within
from nanopersrm.train.rewards import Plan, Role, Shown
from nanopersrm.train.rollouts import Drawn

ROLES: tuple[Role, ...] = get_args(Role)
SCORED = 16  # tokens of a reply at once: "7</scores>" or "7 B=3</scores>", and the stop


@dataclass(frozen=True)
class Asked:
    """A pair, or a pair and its twin, as prompts."""

    form: str  # pointwise or pairwise
    pairs: tuple[Pair, ...]
    prompts: tuple[list[int], ...]  # of each pair: with the chosen text as A, with the rejected one
    opening: str = verdict.OPEN  # how the prompts end, which a reply begins with

    @property
    def at_once(self) -> bool:
        """The prompts end where a judge that does not think draws its digit."""
        return self.opening != verdict.OPEN

    @property
    def labels(self) -> str:
        """Of the candidates of a prompt."""
        return LABELS[: 1 if self.form == "pointwise" else 2]

    def plan(self, groups: Sequence[Sequence[Drawn]]) -> Plan:
        """The replies as `rewards` takes them; groups[p] are the replies to prompts[p]."""
        assert len(groups) == len(self.prompts), f"{len(groups)} groups, {len(self.prompts)} asked"
        told = []
        for k, pair in enumerate(self.pairs):
            own = groups[2 * k : 2 * k + 2]
            by_role: Mapping[Role, list] = {
                role: [drawn.rollout for drawn in group]
                for role, group in zip(ROLES, own, strict=True)
            }
            told.append(Shown(pair.exemplars, pair.chosen, pair.rejected, by_role))
        return Plan(self.form, tuple(told), self.at_once)

    def trees(
        self,
        groups: Sequence[Sequence[Drawn]],
        number: int,
        kept: Sequence[bool],
        budget: int,
    ) -> list[Bundle]:
        """Trees of the replies of all groups that are kept, none above the budget if possible.

        number: of the first reply; the others follow in the order of the groups.
        """
        found: list[Bundle] = []
        for k, pair in enumerate(self.pairs):
            texts = []
            for p in (2 * k, 2 * k + 1):
                first = number + sum(map(len, groups[:p]))
                prompt = self.prompts[p]
                texts += [
                    Text((*prompt, *drawn.ids), len(prompt), number=first + i)
                    for i, drawn in enumerate(groups[p])
                    if kept[p] and drawn.ids
                ]
            if texts:
                found += grow_within(pair.id, texts, budget)
        return found


def asked(
    pairs: Sequence[Pair],
    form: str,
    tokenizer: Tokenizer,
    config: LessonConfig,
    near: StyleEvidenceFn | None,
    reply: int,
    at_once: bool = False,
) -> Asked | None:
    """The prompts of a pair, or of a pair and its twin; None where a prompt and a reply of `reply`
    tokens are longer than config.longest. at_once: the score line is given up to the digit."""
    told = tuple(lessons.stripped(pair) for pair in pairs)
    prompts = [
        prompt for pair in told for prompt in prompts_of(pair, form, tokenizer, config, near)
    ]
    if max(map(len, prompts)) + reply > config.longest:
        return None
    _, forced = verdict.closing("") if at_once else ("", "")
    given = tokenizer.encode(forced)
    ended = tuple(prompt + given for prompt in prompts)
    return Asked(form, told, ended, verdict.OPEN + forced)


def prompts_of(
    pair: Pair,
    form: str,
    tokenizer: Tokenizer,
    config: LessonConfig,
    near: StyleEvidenceFn | None,
) -> list[list[int]]:
    """With the chosen text as A, and with the rejected one. The pair is stripped already."""
    texts = [pair.chosen, pair.rejected]
    percent = lessons.similar(pair, texts, config, near)
    return [
        lessons.prompt(pair, list(shown(pair, form, role).values()), tokenizer, config, percent)
        for role in ROLES
    ]
