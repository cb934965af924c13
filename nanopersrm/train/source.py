"""Where harvests come from: couples in the curriculum's order, asked, answered and rewarded.

    source = Source(model, tokenizer, curriculum, lesson, near, rollout, reward, seed)
    drawn = source.harvest(step, plans=1, progress=0.3, resample=0, group_by="prompt")

Of the plans of a step `at_once` are judged without reasoning: the score line is given up to the
digit, as it is to a judge that does not think, and a reply has room for a digit and what closes it.

A plan in which nobody did better than another can be replaced by the next one, up to `resample`
times (dynamic sampling, DAPO, arXiv 2503.14476); in the last round what comes is kept.

`longest`, `try_out` and `largest` are for a rehearsal: the most that a step can have.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from nanopersrm import InputError
from nanopersrm.judge.answer import FORCED_ROOM
from nanopersrm.model.sampler import sample_name
from nanopersrm.model.tokenizer import Tokenizer
from nanopersrm.model.transformer import Model
from nanopersrm.style.profile import StyleEvidence
from nanopersrm.style.similarity import StyleEvidenceFn
from nanopersrm.train import plans
from nanopersrm.train.curriculum import Couple, Curriculum
from nanopersrm.train.harvest import Harvest, Yield
from nanopersrm.train.lessons import LessonConfig
from nanopersrm.train.packing import Branch, Bundle, pack
from nanopersrm.train.plans import ROLES, SCORED, Asked
from nanopersrm.train.rewards import RewardConfig, Rollout, rewards
from nanopersrm.train.rollouts import Drawn, RolloutConfig, draw_groups, try_out

LOOK = 16  # couples whose prompts are compared in tokens for a rehearsal


@dataclass
class Source:
    """Couples in the curriculum's order, asked and rewarded."""

    model: Model
    tokenizer: Tokenizer
    curriculum: Curriculum
    lesson: LessonConfig
    near: StyleEvidenceFn | None
    rollout: RolloutConfig
    reward: RewardConfig
    seed: int
    at_once: int = 0  # plans of a step that are judged without reasoning

    def harvest(
        self,
        step: int,
        plans: int,
        progress: float,
        resample: int,
        group_by: str,
        by_part: bool = False,
    ) -> Harvest:
        """The plans of a step, with replies and rewards; by_part: parts are compared one by one."""
        training = self.model.training
        self.model.eval()
        kept: list[Yield] = []
        replaced = 0
        for at_once, count in ((False, plans - self.at_once), (True, self.at_once)):
            wanted = len(kept) + count
            for attempt in range(1 + resample):
                if len(kept) == wanted:
                    break
                seed = sample_name([self.seed, step, attempt, *[1] * at_once])
                some = self._drawn(wanted - len(kept), progress, seed, at_once)
                last = attempt == resample
                telling = [one for one in some if last or not one.flat(group_by, by_part)]
                replaced += len(some) - len(telling)
                kept += telling
        self.model.train(training)
        return Harvest(kept, replaced)

    def _drawn(self, count: int, progress: float, seed: int, at_once: bool) -> list[Yield]:
        wanted = self._asked(count, progress, at_once)
        prompts = [prompt for one in wanted for prompt in one.prompts]
        labels, opening, how = wanted[0].labels, wanted[0].opening, self._how(at_once)
        drawn = draw_groups(self.model, self.tokenizer, prompts, labels, how, seed, opening)
        found = []
        for one in wanted:
            groups, drawn = drawn[: len(one.prompts)], drawn[len(one.prompts) :]
            worth = rewards(one.plan(groups), self.reward)
            flat = [by_role[role] for by_role in worth for role in ROLES]
            found.append(Yield(one, groups, flat))
            self.curriculum.learn(one.pairs, found[-1].success)
        return found

    def _how(self, at_once: bool) -> RolloutConfig:
        return replace(self.rollout, reply=SCORED) if at_once else self.rollout

    def _asked(self, count: int, progress: float, at_once: bool) -> list[Asked]:
        """The next couples as prompts; those too long give way to others."""
        found: list[Asked] = []
        while len(found) < count:
            for couple in self.curriculum.draw(count - len(found), progress):
                one = self._as_prompts(couple, self.near, at_once)
                if one is None:
                    self._leave_out(couple)
                else:
                    found.append(one)
        return found

    def _as_prompts(
        self, couple: Couple, near: StyleEvidenceFn | None, at_once: bool
    ) -> Asked | None:
        """None where it is too long: it is so for both kinds or for none."""
        form = self.lesson.form
        return plans.asked(couple, form, self.tokenizer, self.lesson, near, self._room, at_once)

    @property
    def _room(self) -> int:
        """Tokens after a prompt: of reasoning, and of what is given at once and a reply to it."""
        return max(self.rollout.reply, FORCED_ROOM) if self.at_once else self.rollout.reply

    def _leave_out(self, couple: Couple) -> None:
        """It is too long, now and in all later steps."""
        self.curriculum.leave_out(couple)
        if len(self.curriculum.out) == len(self.curriculum.couples):
            raise self._too_long()

    def _too_long(self) -> InputError:
        return InputError(
            f"pairs: expected prompts that leave room for a reply of {self._room} tokens "
            f"within {self.lesson.longest}, found none among {len(self.curriculum.couples)} "
            "couples; raise --longest or lower --reply"
        )

    # A rehearsal. It must leave no trace: the curriculum does not hear of it.

    def longest(self, count: int) -> list[Asked]:
        """What `count` plans of a step can ask at most, but for those too long; not all may be.

        In tokens only LOOK couples are compared, those with the most characters.
        """
        near = None if self.near is None else _made_up  # the instruments would take their time
        found: list[Couple] = []
        sizes: list[int] = []
        for couple in sorted(self.curriculum.couples, key=_size, reverse=True):
            if (one := self._as_prompts(couple, near, False)) is not None:
                found.append(couple)
                sizes.append(max(map(len, one.prompts)))
            if len(found) == max(count, LOOK):
                break
        if not found:
            raise self._too_long()
        order = sorted(range(len(found)), key=lambda i: -sizes[i])
        asked = []
        for at_once, share in ((False, count - self.at_once), (True, self.at_once)):
            for i in range(share):  # each kind has the longest, and some twice if it must
                one = self._as_prompts(found[order[i % len(order)]], near, at_once)
                assert one is not None, "it fits one kind and not the other"
                asked.append(one)
        return asked

    def try_out(self, asked: Sequence[Asked]) -> None:
        """Draw to these prompts, but no more than two tokens a reply."""
        training = self.model.training
        self.model.eval()
        for at_once in (False, True):
            own = [prompt for one in asked if one.at_once == at_once for prompt in one.prompts]
            if own:
                try_out(self.model, own, self._how(at_once))
        self.model.train(training)

    def largest(self, asked: Sequence[Asked], budget: int) -> list[Bundle]:
        """The largest micro-batch that a step about these prompts can have, all replies as long as
        they may be: the heaviest of its packs, filled up to the budget."""
        G = self.rollout.group
        replies = [_as_long_as_may_be(self._how(one.at_once).reply) for one in asked]
        groups = [
            [[reply] * G] * len(one.prompts) for one, reply in zip(asked, replies, strict=True)
        ]
        trees = Harvest(
            [Yield(one, own, []) for one, own in zip(asked, groups, strict=True)]
        ).trees([True] * sum(G * len(own) for own in groups), budget)
        heaviest = pack(trees, budget)[0]
        whole = min(budget, sum(tree.tokens for tree in trees))
        if (room := whole - sum(tree.tokens for tree in heaviest)) > 1:
            heaviest.append(Bundle("room", (), (Branch((0,) * room, 1),)))
        return heaviest


def _made_up(exemplars: Sequence[str], texts: Sequence[str]) -> list[StyleEvidence]:
    """In place of what instruments say, in as many words."""
    return [StyleEvidence(50.0, 50.0)] * len(texts)


def _as_long_as_may_be(reply: int) -> Drawn:
    return Drawn((0,) * reply, (0.0,) * reply, Rollout("", reply))


def _size(couple: Couple) -> int:
    """Characters of the texts that its prompts show."""
    return sum(
        sum(map(len, pair.exemplars)) + len(pair.chosen) + len(pair.rejected) for pair in couple
    )
