"""Counterfactual: does a judge follow the chance that its prompt shows, or the rest of the prompt?

    python -m nanopersrm.evaluate.counterfactual --pairs pairs/validation.jsonl --adapter runs/mine/adapter

The measured block of a prompt ends with all instruments in one number, "candidate by this writer:
62% likely" (`similarity.py`). Here a judge is asked for its score at once, without a thought, again
and again with another number in that place and every other word as it was, and so for both texts of
some pairs. That gives a table of scores, prompts x chances. The mean of a column says how the score
answers that number. The variation of the table has three sources (two-way analysis of variance):

    score[p, c] = mean + rest[p] + chance[c] + both[p, c]

    by the chance   Σ chance² / Σ (score - mean)²     sums over the whole table; each is an η²
    by the rest     Σ rest²   / Σ (score - mean)²     texts, exemplars, the other measured lines
    by both         Σ both²   / Σ (score - mean)²     a number that means another thing elsewhere

A judge that ignores the number has 0, 100 and 0 %, one that only repeats it 100, 0 and 0. `follows`
is Spearman's rank correlation of the column means with the numbers: 1 where more is always more.

The shares are those of the numbers asked: the closer together, the less is by the chance. The
default ones are what 160 prompts of real pairs showed, 24 to 77, and a little more. And a
share says what a score depends on, not whether it is right: that is `evaluate.py`. All prompts of a
row are one up to the number, so that one chance more costs the hundred tokens behind it.

Worked example: scores 3 5 7 and 4 6 8 of two prompts at 10, 50 and 90 %. Mean 5.5, rest -0.5 and
0.5, chance -2, 0, 2, both 0: the sums are 1.5 and 16, so 9 % by the rest, 91 % by the chance.

What we left out: other lines of the block, and judging after a thought, which may repeat the number
or not.
"""

import json
import math
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from math import fsum
from pathlib import Path
from statistics import correlation, fmean

import tyro
from rich.console import Console
from rich.progress import track

from nanopersrm import InputError
from nanopersrm.command import exit_code
from nanopersrm.evaluate.evaluate import select
from nanopersrm.judge.adapter_settings import DEFAULT
from nanopersrm.judge.answer import FORCED_ROOM, AnswerConfig, answer
from nanopersrm.judge.judge import Judge
from nanopersrm.judge.prompts import prompt_ids
from nanopersrm.judge.verdict import soft_score
from nanopersrm.model.base import DEFAULT_BASE
from nanopersrm.pairs import Pair, read
from nanopersrm.style.profile import StyleEvidence, measured_block

SAME = 1e-6  # mean squared digits; scores that vary less are the same
BAR = 32  # characters from score 1 to 9
CHANCES = (20, 25, 30, 35, 40, 44, 48, 52, 56, 60, 65, 70, 80)


@dataclass(frozen=True)
class Config:
    """Ask a judge the same with other chances in the measured block of its prompt."""

    pairs: Path  # .jsonl or .jsonl.gz of data.build
    adapter: str = DEFAULT  # a folder that a training script has made; "default": the shipped one
    base: str = DEFAULT_BASE  # the embedded default, a folder, a .gguf file, or a hub name
    limit: int = 10  # pairs, drawn by the seed, twins together; a prompt for each of two texts
    chances: tuple[int, ...] = CHANCES  # put into the prompts, 1 to 99 percent
    seed: int = 0  # same seed, same pairs
    device: str = "auto"  # auto, cpu, cuda, cuda:N
    dtype: str = "auto"  # auto, bf16, fp16, fp32
    json: bool = False  # the numbers as JSON


@dataclass(frozen=True)
class Answers:
    """How a score answers the chance in its prompt."""

    chances: list[int]  # (C,) percent
    scores: list[float]  # (C,) mean over the prompts, 1 to 9
    prompts: int
    by_chance: float | None  # shares of the variation, together 1; None: it does not vary
    by_rest: float | None
    by_both: float | None
    follows: float | None  # rank correlation of scores with chances; None: the means are equal


def answers(chances: Sequence[int], table: Sequence[Sequence[float]]) -> Answers:
    """table (P, C): the score of each prompt with each of these chances in it, all finite.

    >>> found = answers([10, 50, 90], [[3, 5, 7], [4, 6, 8]])
    >>> round(found.by_chance, 2), round(found.by_rest, 2), found.follows
    (0.91, 0.09, 1.0)
    """
    rows = [fmean(row) for row in table]  # (P,)
    columns = [fmean(column) for column in zip(*table, strict=True)]  # (C,)
    mean, size = fmean(rows), len(rows) * len(columns)
    chance = fsum((column - mean) ** 2 for column in columns) / len(columns)
    rest = fsum((row - mean) ** 2 for row in rows) / len(rows)
    total = fsum((score - mean) ** 2 for row in table for score in row) / size
    varies = total > SAME
    return Answers(
        chances=list(chances),
        scores=columns,
        prompts=len(rows),
        by_chance=chance / total if varies else None,
        by_rest=rest / total if varies else None,
        by_both=max(0.0, total - chance - rest) / total if varies else None,
        follows=correlation(_ranks(chances), _ranks(columns)) if chance > SAME else None,
    )


def _ranks(values: Sequence[float]) -> list[float]:
    """0 for the least; equals share the mean of their places."""
    order = sorted(values)
    return [order.index(v) + (order.count(v) - 1) / 2 for v in values]


def scores(judge: Judge, pair: Pair, text: str, chances: Sequence[int]) -> list[float] | None:
    """The score of a text at once, with each of these chances (percent) in its prompt; None where
    the judge would have to cut the exemplars to fit its context."""
    exemplars, text = [one.strip() for one in pair.exemplars], text.strip()
    near = judge.style_evidence(exemplars, [text])[0]
    prompts = []
    for chance in chances:
        block = measured_block(exemplars, [text], [StyleEvidence(near.percentile, float(chance))])
        question = pair.question or None
        prompts.append(prompt_ids(judge.tokenizer, exemplars, [text], question, (), block))
    room = FORCED_ROOM + len(exemplars)  # what the judge keeps free
    if max(map(len, prompts)) + room > judge.model.config.context:
        return None
    found = answer(judge.model, judge.tokenizer, prompts, 1, AnswerConfig(think=False))
    row = [soft_score(one.digits) for (one,) in found]
    if not all(map(math.isfinite, row)):
        raise InputError(f"pair {pair.id!r}: expected scores, this judge has none that is a number")
    return row


def said(found: Answers) -> str:
    """For a terminal."""
    lines = ["chance   mean score", ""]
    for chance, score in zip(found.chances, found.scores, strict=True):
        bar = "#" * round((score - 1) / 8 * BAR)
        lines.append(f"{chance:4d} %   {score:5.2f}   {bar}".rstrip())
    told = "the score is the same in all"
    if found.by_chance is not None:
        shares = f"{found.by_chance:.0%} by the chance, {found.by_rest:.0%} by the rest"
        told = f"the score varies {shares} of the prompt, {found.by_both:.0%} by both together"
    ranks = "" if found.follows is None else f"; rank correlation {found.follows:.2f}"
    size = f"{found.prompts} prompts x {len(found.chances)} chances"
    return "\n".join([*lines, "", f"{size}: {told}{ranks}"])


def check(chances: Sequence[int]) -> None:
    """Raise for chances that no prompt shows, or too few."""
    for one in chances:
        if not 1 <= one <= 99:
            raise InputError(f"--chances: expected percents from 1 to 99, got {one}")
        if list(chances).count(one) > 1:
            raise InputError(f"--chances: expected different ones, got {one} twice")
    if len(chances) < 2:
        given = " ".join(map(str, chances)) or "none"
        raise InputError(f"--chances: expected at least two, got {given}")


def check_shown(judge: Judge, adapter: str) -> None:
    """Raise where the judge's prompts about one candidate do not show a chance."""
    made_for, style = judge.settings, judge.style
    why = None
    if not judge.trained:
        why = "there is no adapter"
    elif made_for is not None and made_for.form == "pairwise":
        why = "its prompts show two candidates"
    elif made_for is not None and not made_for.evidence:
        why = "it was trained without measured evidence"
    elif style is None or style.fusion is None or not judge.shows_style():
        why = "it has no instruments in one number (train_sft.py --fused)"
    if why is not None:
        raise InputError(
            f"--adapter {adapter}: expected a judge whose prompts show a chance of one candidate, "
            f"but {why}"
        )


def main(config: Config) -> None:
    """Ask, and print the table."""
    check(config.chances)
    pairs = select(read(config.pairs), config.limit, None, config.seed)
    log = Console(stderr=True, highlight=False, soft_wrap=True)
    judge = Judge.load(config.base, config.adapter, config.device, config.dtype, say=log.print)
    check_shown(judge, config.adapter)
    for note in judge.notes:
        log.print(f"note: {note}")
    asked = [(pair, text) for pair in pairs for text in (pair.chosen, pair.rejected)]
    shown = track(asked, "prompts", console=log, transient=True, disable=not log.is_terminal)
    rows = [scores(judge, pair, text, config.chances) for pair, text in shown]
    table = [row for row in rows if row is not None]
    if len(table) < len(rows):
        log.print(f"left out: {len(rows) - len(table)} prompts that do not fit the context")
    if not table:
        raise InputError(f"{config.pairs}: expected a pair that fits the context, found none")
    found = answers(config.chances, table)
    print(json.dumps(asdict(found), allow_nan=False) if config.json else said(found))


def run(config: Config) -> int:
    """`main` with an exit code."""
    return exit_code("nanopersrm.evaluate.counterfactual", lambda: main(config))


if __name__ == "__main__":
    about = __doc__.split("Worked example")[0]
    sys.exit(run(tyro.cli(Config, prog="nanopersrm.evaluate.counterfactual", description=about)))
