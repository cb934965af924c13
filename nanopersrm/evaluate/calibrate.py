"""Calibrate: make the probabilities of a judge say how often it is right.

    python -m nanopersrm.evaluate.calibrate --adapter runs/mine/adapter --pairs pairs/validation.jsonl

judges pairs on which the adapter was not trained, and writes one number into its judge.json:

    P(i fits better than j) = σ(sharpness · log-odds that the digits give)

The digits of a small model lie close together: right three times of four, it may say 52 %. One
factor on the log-odds mends that (temperature scaling, Guo et al., arXiv 1706.04599). It is the one
under which what was right in these pairs is likeliest, found by logistic regression
(`baselines.slope_of`). Ranking, verdict and scores stay as they are, and a swapped call has the
mirrored answer as before.

Worked example: every log-odds is 0.08 or -0.08 and the first text wins as the sign says in 3 cases
of 4. log 3 = 1.1 would be honest, so the sharpness is 1.1 / 0.08 = 13.7.

Before and after are printed as the expected calibration error (`metrics.py`) on the same pairs,
which flatters the second; `evaluate.py` measures it on others. A judge that reasons has a number of
its own: --think-tokens 160, which takes some seconds a pair on two cores.

What we left out: pairwise prompts, whose two orders are averaged, and curves with more than one
parameter, for which some hundred pairs are too few.
"""

import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import tyro
from rich.console import Console
from rich.progress import track

from nanopersrm import InputError
from nanopersrm.command import exit_code
from nanopersrm.evaluate.evaluate import select
from nanopersrm.evaluate.metrics import measure, record
from nanopersrm.evaluate.predictions import Opinion
from nanopersrm.judge import trained
from nanopersrm.judge.judge import Judge
from nanopersrm.judge.judgement import JudgeConfig
from nanopersrm.model.embedded import DEFAULT_BASE
from nanopersrm.pairs import Pair, read
from nanopersrm.style import baselines

LEAST = 20  # pairs
SURE = 1e-9  # a probability nearer to 0 or 1 counts as this far from it


@dataclass(frozen=True)
class Config:
    """Measure the sharpness of a judge, and write it to its judge.json."""

    adapter: Path  # a folder that a training script has made
    pairs: Path  # .jsonl or .jsonl.gz, by writers that it was not trained on
    base: str = DEFAULT_BASE  # the embedded default, a folder, a .gguf file, or a hub name
    limit: int = 200  # pairs, drawn by the seed, twins together
    think_tokens: int = 0  # tokens of reasoning before the score; 0: none
    seed: int = 0
    device: str = "auto"  # auto, cpu, cuda, cuda:N
    dtype: str = "auto"  # auto, bf16, fp16, fp32


def log_odds(p: float) -> float:
    """Of a probability from 0 to 1.

    >>> log_odds(0.5)
    0.0
    """
    p = min(max(p, SURE), 1 - SURE)
    return math.log(p) - math.log1p(-p)


def sharpness_of(pairs: Sequence[Pair], preferences: Sequence[float]) -> float:
    """preferences: P(the chosen text fits better) of each pair -> the factor on its log-odds."""
    known = {
        (pair.exemplars, pair.chosen, pair.rejected): log_odds(p)
        for pair, p in zip(pairs, preferences, strict=True)
    }

    def gap(exemplars: Sequence[str], _: str, texts: Sequence[str]) -> list[float]:
        return [known[tuple(exemplars), texts[0], texts[1]], 0.0]

    return baselines.slope_of(gap, pairs)


def error(pairs: Sequence[Pair], preferences: Sequence[float], sharpness: float) -> float:
    """The expected calibration error with log-odds times `sharpness`, 0 to 1."""
    records = []
    for pair, p in zip(pairs, preferences, strict=True):
        sure = 1 / (1 + math.exp(-sharpness * log_odds(p)))
        records.append(record(pair, 0, len(pair.exemplars), Opinion(int(sure < 0.5), None, sure)))
    return float(measure(records, resamples=1)["ece"]["value"])


def main(config: Config) -> None:
    """Judge, fit, write, print a line."""
    for name, least in (("limit", LEAST), ("think_tokens", 0)):
        if (number := getattr(config, name)) < least:
            flag = name.replace("_", "-")
            raise InputError(f"--{flag}: expected a number from {least}, got {number}")
    made_for = trained.read(config.adapter)
    if made_for is None:
        raise InputError(f"{config.adapter}: expected judge.json, as the training scripts write it")
    pairs = select(read(config.pairs), config.limit, None, config.seed)
    if len(pairs) < LEAST:
        raise InputError(f"{config.pairs}: expected at least {LEAST} pairs, found {len(pairs)}")
    log = Console(stderr=True, highlight=False, soft_wrap=True)
    judge = Judge.load(config.base, config.adapter, config.device, config.dtype, say=log.print)
    judge.made_for = replace(made_for, sharpness=1.0, sharpness_reasoned=1.0)
    thinks = config.think_tokens > 0
    judging = JudgeConfig(
        evidence=made_for.evidence,
        think=thinks,
        think_tokens=config.think_tokens if thinks else JudgeConfig.think_tokens,
        seed=config.seed,
    )
    preferences = []
    for pair in track(pairs, "pairs", console=log, transient=True, disable=not log.is_terminal):
        texts = sorted((pair.chosen, pair.rejected))
        said = judge.judge(pair.exemplars, texts, pair.question or None, config=judging)
        first = texts.index(pair.chosen)
        preferences.append(said.preference[first][1 - first])
    sharpness = sharpness_of(pairs, preferences)
    if not sharpness > 0:
        right = sum(p > 0.5 for p in preferences)
        raise InputError(
            f"{config.pairs}: expected a judge that is right more often than not, this one was in "
            f"{right} of {len(pairs)} pairs; nothing was written"
        )
    field, now = "sharpness", replace(made_for, sharpness=sharpness)
    if thinks:
        field, now = "sharpness_reasoned", replace(made_for, sharpness_reasoned=sharpness)
    now.save(config.adapter)
    before, after = (error(pairs, preferences, times) for times in (1.0, sharpness))
    print(
        f"{config.adapter}: {field} {sharpness:.3g}; calibration error on these {len(pairs)} pairs "
        f"{before:.3f}, then {after:.3f}"
    )


def run(config: Config) -> int:
    """`main` with an exit code."""
    return exit_code("nanopersrm.evaluate.calibrate", lambda: main(config))


if __name__ == "__main__":
    about = __doc__.split("The digits of")[0]
    sys.exit(run(tyro.cli(Config, prog="nanopersrm.evaluate.calibrate", description=about)))
