"""The exam: validation pairs as lessons, made once, so that every trial asks the same.

    python -m nanopersrm.train.exam --pairs pairs/test.jsonl --adapter runs/sft/adapter --replies 100

holds it for a trained adapter: how many pairs are judged right without reasoning, how many replies
are well formed when nothing is forced, and how much of what they quote and claim is true.

Each pair is a tree of its chosen and its rejected text (`course.tree`), judged without reasoning;
the first few are also answered freely, the chosen text of one, the rejected text of the next, and
where it is asked for some are judged after reasoning. The measuring is in `nanopersrm/trial.py`.
"""

import random
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import tyro

from nanopersrm import InputError
from nanopersrm.command import exit_code
from nanopersrm.files import write_text
from nanopersrm.judge import faithful, verdict
from nanopersrm.judge.answer import FORCED_ROOM
from nanopersrm.judge.judge import Judge
from nanopersrm.model.embedded import DEFAULT_BASE
from nanopersrm.model.tokenizer import Tokenizer
from nanopersrm.model.transformer import Model
from nanopersrm.pairs import Pair, couples, read
from nanopersrm.style.similarity import StyleEvidenceFn
from nanopersrm.train import course, trial
from nanopersrm.train.facts import ROLES
from nanopersrm.train.lessons import LessonConfig
from nanopersrm.train.presets import PRESETS, Preset
from nanopersrm.train.rollout import RolloutConfig, empty_groups
from nanopersrm.train.trial import Trial

WRITTEN = 8  # free replies
REASONING = 160  # tokens before a score, as the judge's own budget
RULE = f"\n\n{'=' * 80}\n\n"  # between two of them


class Exam:
    """What all trials of a run ask. `near`: what trained instruments say, for the prompts, or None.

    replies: answered freely, at this temperature; reasoned: pairs judged after reasoning as well.
    """

    def __init__(
        self,
        pairs: Sequence[Pair],
        tokenizer: Tokenizer,
        config: LessonConfig,
        seed: int,
        near: StyleEvidenceFn | None,
        replies: int = WRITTEN,
        reasoned: int = 0,
        temperature: float = 1.0,
    ):
        self.tokenizer, self.seed, self.temperature = tokenizer, seed, temperature
        room = REASONING + FORCED_ROOM
        fitting = RolloutConfig(reply=room, longest=config.longest, evidence=config.evidence)
        made = [empty_groups([pair], tokenizer, fitting, near) for pair in pairs[:reasoned]]
        self.asked = {
            groups[0].pair.id: [group.prompt for group in groups] for groups in made if groups
        }
        config = replace(config, form="pointwise", rivals=1, stress=1.0)
        trees = [course.tree(pair, {}, tokenizer, config, f"{seed}/exam", near) for pair in pairs]
        self.bundles = [bundle for bundle in trees if bundle is not None]
        self.twins = {pair.id: pair.twin for pair in pairs}
        self.prompts, self.about = list[list[int]](), list[tuple[tuple[str, ...], str]]()
        for i, pair in enumerate(pairs[:replies]):
            role = ROLES[i % 2]
            prompt = course.prompt(pair, role, tokenizer, config, near)
            if len(prompt) <= config.longest:
                self.prompts.append(prompt)
                self.about.append((pair.exemplars, getattr(pair, role)))

    def hold(self, model: Model, how: Preset) -> tuple[Trial, str]:
        """A trial of the model as it is now, and its replies with their prompts as one text."""
        found, replies = trial.hold(
            model, self.tokenizer, self.bundles, self.twins, self.prompts, how, self.seed,
            self.temperature,
        )  # fmt: skip
        reports = [
            faithful.check(reply, exemplars, {"A": text})
            for reply, (exemplars, text) in zip(replies, self.about, strict=True)
        ]
        found = replace(
            found,
            quotes=_share((report.quotes_true, report.quotes) for report in reports),
            claims=_share((report.claims_true, report.claims) for report in reports),
        )
        if self.asked:
            right = trial.reason(model, self.tokenizer, self.asked, 1, REASONING, how)
            found = replace(
                found,
                reasoned=sum(right.values()) / len(right),
                reasoned_twins=trial.both_right(right, self.twins),
                reasoned_pairs=len(right),
            )
        pages = [
            self.tokenizer.decode(prompt).removesuffix(verdict.OPEN) + reply
            for prompt, reply in zip(self.prompts, replies, strict=True)
        ]
        return found, RULE.join(pages) + "\n"


def _share(counts: Iterable[tuple[int, int]]) -> float | None:
    """(true, all) of each reply -> the share of all that is true; None where nothing was said."""
    true, every = map(sum, zip((0, 0), *counts, strict=True))
    return true / every if every else None


@dataclass(frozen=True)
class Config:
    """Hold the exam for a trained adapter."""

    pairs: Path  # .jsonl or .jsonl.gz
    adapter: Path  # a folder that train_sft.py has made
    base: str = DEFAULT_BASE  # the embedded default, a folder, a .gguf file, or a hub name
    limit: int = 100  # pairs, drawn by the seed, twins together
    replies: int = 100  # of them answered freely, one text of a pair each
    reasoned: int = 0  # of them judged after reasoning as well: some 3 seconds each on two cores
    temperature: float = 1.0  # of the free replies; 0: greedily, as the judge reasons
    seed: int = 0
    device: str = "auto"  # auto, cpu, cuda, cuda:N
    out: Path | None = None  # a text file for the replies


def main(config: Config) -> None:
    """Load, ask, print a line."""
    if not 0 <= config.temperature < float("inf"):
        raise InputError(f"--temperature: expected a number from 0, got {config.temperature}")
    judge = Judge.load(config.base, config.adapter, config.device, say=print)
    drawn = couples(read(config.pairs))
    random.Random(f"{config.seed}/exam").shuffle(drawn)
    some = [pair for couple in drawn for pair in couple][: config.limit]
    made = judge.made_for
    lesson = LessonConfig() if made is None else LessonConfig(evidence=made.evidence)
    shows = judge.style is not None and (made is None or made.style)
    near = judge.style_evidence if shows else None
    asked = config.replies, config.reasoned, config.temperature
    exam = Exam(some, judge.tokenizer, lesson, config.seed, near, *asked)
    found, page = exam.hold(judge.model, PRESETS["cpu"])
    if config.out is not None:
        write_text(config.out, page)
    print(f"{config.adapter}: {found.said()}")


def run(config: Config) -> int:
    """`main` with an exit code."""
    return exit_code("nanopersrm.train.exam", lambda: main(config))


if __name__ == "__main__":
    sys.exit(
        run(
            tyro.cli(
                Config, prog="nanopersrm.train.exam", description=__doc__.split("Each pair is")[0]
            )
        )
    )
