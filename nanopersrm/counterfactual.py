"""Counterfactual: does a judge follow what was measured, or the text?

    python -m nanopersrm.counterfactual --adapter default --pairs pairs/validation.jsonl

asks it the same again with other numbers. The measured block of a prompt ends with all instruments
in one, "candidate by this writer: 62% likely" (`nearness.py`). Another number is put in that place,
every other word is left as it is, and the score is taken at once, as often as there are --chances
and about both texts of some pairs. So there is a table of scores, texts x chances. Its mean says
how the score answers the number, and its variation has three sources (two-way analysis of variance;
each share is an η²):

    score[t, c] = mean + text[t] + chance[c] + rest[t, c]

    by the number   Σ chance²  of the table / Σ (score - mean)²
    by the text     Σ text²
    by both         Σ rest²: the number means another thing beside another text

A judge that ignores the number has 0 and 100 %, one that only repeats it 100 and 0. `follows` is
Spearman's rank correlation of the mean score with the number: 1 where more is always more.

Worked example: scores 3 5 7 and 4 6 8 of two texts at 10, 50 and 90 %. Mean 5.5, texts -0.5 and
0.5, chances -2, 0, 2, rest 0: the squares are 16 and 1.5, so 91 % by the number, 9 % by the text.

This says what a score depends on, not whether it is right: that is `evaluate.py`. The prompts of a
text are one up to the number, so that one chance more costs the hundred tokens behind it.

What we left out: the other lines of the block, the exemplars, and judging after a thought, which
may repeat the number or not. Where to read next: `profile.py`.
"""

import json
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
from nanopersrm.answer import FORCED_ROOM, AnswerConfig, answer
from nanopersrm.command import exit_code
from nanopersrm.embedded import DEFAULT_BASE
from nanopersrm.evaluate import select
from nanopersrm.judge import Judge
from nanopersrm.pairs import Pair, read
from nanopersrm.profile import Near
from nanopersrm.question import Question
from nanopersrm.trained import DEFAULT
from nanopersrm.verdict import soft_score

SAME = 1e-9  # squared digits; what varies less does not vary
BAR = 20  # characters of a bar from score 1 to 9
NONE = "(the score is the same whatever the number and the text)"


@dataclass(frozen=True)
class Config:
    """Ask a judge the same with other numbers in the measured block of its prompt."""

    pairs: Path  # .jsonl or .jsonl.gz of data.build
    adapter: str = DEFAULT  # a folder that a training script has made; "default": the shipped one
    base: str = DEFAULT_BASE  # the embedded default, a folder, a .gguf file, or a hub name
    limit: int = 10  # pairs, drawn by the seed, twins together; two texts of each
    # in percent
    chances: tuple[int, ...] = (5, 10, 20, 30, 35, 40, 45, 50, 55, 60, 65, 70, 80, 90, 99)
    seed: int = 0  # same seed, same pairs
    device: str = "auto"  # auto, cpu, cuda, cuda:N
    dtype: str = "auto"  # auto, bf16, fp16, fp32
    json: bool = False  # the numbers as JSON


@dataclass(frozen=True)
class Answers:
    """How a score answers the number in its prompt."""

    chances: list[int]  # (C,) percent
    scores: list[float]  # (C,) mean over the texts, 1 to 9
    texts: int
    by_number: float | None  # shares of the variation, together 1; None: it does not vary
    by_text: float | None
    by_both: float | None
    follows: float | None  # rank correlation of scores with chances; None: all scores are equal


def answers(chances: Sequence[int], table: Sequence[Sequence[float]]) -> Answers:
    """table (T, C): the score of each text with each of these chances in its prompt.

    >>> found = answers([10, 50, 90], [[3, 5, 7], [4, 6, 8]])
    >>> round(found.by_number, 2), round(found.by_text, 2), found.follows
    (0.91, 0.09, 1.0)
    """
    rows = [fmean(row) for row in table]  # (T,)
    columns = [fmean(column) for column in zip(*table, strict=True)]  # (C,)
    mean = fmean(rows)
    number = len(rows) * fsum((column - mean) ** 2 for column in columns)
    text = len(columns) * fsum((row - mean) ** 2 for row in rows)
    total = fsum((score - mean) ** 2 for row in table for score in row)
    varies = total > SAME
    return Answers(
        chances=list(chances),
        scores=columns,
        texts=len(rows),
        by_number=number / total if varies else None,
        by_text=text / total if varies else None,
        by_both=max(0.0, total - number - text) / total if varies else None,
        follows=None if number <= SAME else correlation(_ranks(chances), _ranks(columns)),
    )


def _ranks(values: Sequence[float]) -> list[float]:
    """0 for the least; equals share the mean of their places."""
    order = sorted(values)
    return [order.index(v) + (order.count(v) - 1) / 2 for v in values]


def scores(judge: Judge, pair: Pair, candidate: str, chances: Sequence[int]) -> list[float] | None:
    """The score of a text at once, with each of these chances (percent) in its prompt; None where
    that does not fit the context."""
    exemplars, text = [one.strip() for one in pair.exemplars], candidate.strip()
    near = judge.nearness(exemplars, [text])[0]
    prompts = []
    for chance in chances:
        ask = Question(judge.tokenizer, exemplars, [text], pair.question or None, (), True)
        ask.near = [Near(near.style, float(chance))]
        prompts.append(ask.ids(exemplars, (0,)))
    if max(map(len, prompts)) + FORCED_ROOM > judge.model.config.context:
        return None
    at_once = AnswerConfig(think=False)
    found = answer(judge.model, judge.tokenizer, prompts, 1, at_once)
    return [soft_score(one.digits) for (one,) in found]


def _shows_chance(judge: Judge) -> bool:
    """Its prompts about one candidate end their measured block with the line in question."""
    made_for = judge.made_for
    if made_for is not None and not (made_for.evidence and made_for.form != "pairwise"):
        return False
    return judge.shows_style() and judge.style is not None and judge.style.fusion is not None


def said(found: Answers) -> str:
    """For a terminal."""
    lines = ["number   mean score", ""]
    for chance, score in zip(found.chances, found.scores, strict=True):
        bar = "█" * round((score - 1) / 8 * BAR)
        lines.append(f"{chance:4d} %   {score:5.2f}   {bar}".rstrip())
    told = NONE
    if found.by_number is not None:
        shares = f"{found.by_number:.0%} by the number, {found.by_text:.0%} by the text"
        told = f"the score varies {shares}, {found.by_both:.0%} by both together"
    ranks = "" if found.follows is None else f"; rank correlation {found.follows:.2f}"
    size = f"{found.texts} texts x {len(found.chances)} numbers"
    return "\n".join([*lines, "", f"{size}: {told}{ranks}"])


def main(config: Config) -> None:
    """Ask, and print the table."""
    for one in config.chances:
        if not 0 <= one <= 100:
            raise InputError(f"--chances: expected percents from 0 to 100, got {one}")
    if len(set(config.chances)) < 2:
        raise InputError(f"--chances: expected at least 2 different ones, got {config.chances}")
    if config.limit < 1:
        raise InputError(f"--limit: expected a number from 1, got {config.limit}")
    pairs = select(read(config.pairs), config.limit, None, config.seed)
    log = Console(stderr=True, highlight=False, soft_wrap=True)
    judge = Judge.load(config.base, config.adapter, config.device, config.dtype, say=log.print)
    if not _shows_chance(judge):
        raise InputError(
            f"--adapter {config.adapter}: expected a judge of one candidate a prompt, which shows "
            "its chance by all instruments; this one has no such prompt"
        )
    asked = [(pair, text) for pair in pairs for text in (pair.chosen, pair.rejected)]
    shown = track(asked, "texts", console=log, transient=True, disable=not log.is_terminal)
    table = [scores(judge, pair, text, config.chances) for pair, text in shown]
    told = [row for row in table if row is not None]
    if len(told) < len(table):
        log.print(f"left out: {len(table) - len(told)} texts whose prompts do not fit the context")
    if not told:
        raise InputError(f"{config.pairs}: expected a pair that fits the context, found none")
    found = answers(config.chances, told)
    print(json.dumps(asdict(found)) if config.json else said(found))


def run(config: Config) -> int:
    """`main` with an exit code."""
    return exit_code("nanopersrm.counterfactual", lambda: main(config))


if __name__ == "__main__":
    about = __doc__.split("asks it the same")[0]
    sys.exit(run(tyro.cli(Config, prog="nanopersrm.counterfactual", description=about)))
