"""Baselines of reading side by side: what must be taken from the likelihood of a candidate?

    python -m nanopersrm.evaluate.cohorts --pairs validation.jsonl --limit 200
    python -m nanopersrm.evaluate.cohorts --pairs validation.jsonl --symmetric True

One candidate is likelier than another after anybody's text, because it is simpler. With s = mean
log p(c | e) and m[k] = mean log p(c | k) over a cohort k, each row of the table scores c by

    none             s
    blank            s - log p(c | a blank line)                      nothing was read before
    mean             s - mean m                                       of the whole cohort
    z                (s - mean m) / deviation m                       T-norm in speaker verification
    mean, z, nearest the same over the k texts after which c is likeliest         adaptive T-norm
    symmetric        ½ z of c after e, and ½ z of e after c           S-norm

(Auckenthaler et al. 2000; Matějka et al., Interspeech 2017 for the adaptive ones.) The cohort is
the demo writers, or with --others writers of other pairs. The last line needs no baseline:
*couples* asks of two texts and two writers who wrote which, s[1,1] + s[2,2] > s[1,2] + s[2,1].
"""

import random
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import tyro
from numpy.typing import NDArray
from rich.progress import track
from torch import Tensor

from data.build import COHORT_WORDS, demo_cohort
from nanopersrm import InputError
from nanopersrm.command import exit_code
from nanopersrm.evaluate.scoreboard import table
from nanopersrm.model import weights
from nanopersrm.model.base import DEFAULT_BASE, resolve
from nanopersrm.model.tokenizer import Tokenizer
from nanopersrm.model.weights import device_of, dtype_of
from nanopersrm.pairs import Pair, read, twin_pairs
from nanopersrm.style.reading import NEAREST, Reading, ReadingConfig

Array = NDArray[np.float64]
KEPT = 24  # texts of other writers that are drawn for --others


@dataclass(frozen=True)
class Config:
    """Compare baselines of reading on pairs with twins."""

    pairs: Path  # to judge
    adapter: Path | None = None  # a folder reading/; default: the base as it is
    others: Path | None = None  # pairs whose writers are the cohort; default: the demo writers
    exemplars: int | None = None  # so many of each pair; default: all
    limit: int | None = None  # so many pairs
    symmetric: bool = False  # the symmetric form as well: several times as long
    base: str = DEFAULT_BASE
    device: str = "auto"
    dtype: str = "auto"
    seed: int = 0


@dataclass(frozen=True)
class Couple:
    """Mean log p of what is read about two texts (c) and two writers (e), nats a token."""

    after: Array  # (2, 2) of c_j after e_i
    blank: Array  # (2,) of c_j after a blank line
    cohort: Array  # (2, K) of c_j after each text of the cohort
    back: Array  # (2, 2) of e_i after c_j; zeros without --symmetric
    back_cohort: Array  # (2, K) of e_i after each text of the cohort


def z(s: Array, m: Array) -> Array:
    """s (…), m (…, K) of a cohort -> (s - mean) / deviation."""
    return (s - m.mean(-1)) / m.std(-1, ddof=1)


def top(m: Array) -> Array:
    """m (…, K) -> the greatest (…, NEAREST)."""
    return np.sort(m)[..., -NEAREST:]


BASELINES: dict[str, Callable[[Couple], Array]] = {  # -> the score of c_j after e_i (2, 2)
    "none": lambda c: c.after,
    "blank": lambda c: c.after - c.blank,
    "mean": lambda c: c.after - c.cohort.mean(-1),
    "z": lambda c: z(c.after, c.cohort),
    "mean, nearest": lambda c: c.after - top(c.cohort).mean(-1),
    "z, nearest": lambda c: z(c.after, top(c.cohort)),
    "symmetric": lambda c: (z(c.after, c.cohort) + z(c.back.T, c.back_cohort).T) / 2,
}


def mean(log_p: Tensor) -> float:
    """log p (T,) of the tokens of a text -> their mean; the first counts for nothing."""
    return float(log_p[1:].sum()) / len(log_p)


def measure(reading: Reading, pairs: Sequence[Pair], also_back: bool) -> Couple:
    """Read one pair and its twin."""
    texts = [pair.chosen for pair in pairs]
    ids = [reading.candidate(text)[0] for text in texts]

    def after(exemplars: Sequence[str], candidates: Sequence[list[int]]) -> list[float]:
        return [mean(part) for part in reading.log_probs(exemplars, candidates)]

    def after_cohort(candidates: Sequence[list[int]]) -> Array:
        table = reading.cohort_log_probs(candidates)
        return np.array([[mean(part) for part in row] for row in table]).T

    back, back_cohort = np.zeros((2, 2)), np.zeros((2, len(reading.cohort)))
    if also_back:
        writers = [reading.candidate("\n\n".join(pair.exemplars))[0] for pair in pairs]
        back = np.array([after([text], writers) for text in texts]).T
        back_cohort = after_cohort(writers)
    table = np.array([after(pair.exemplars, ids) for pair in pairs])
    return Couple(table, np.array(after([""], ids)), after_cohort(ids), back, back_cohort)


def rows_of(couples: Sequence[Couple], with_symmetric: bool) -> list[list[str]]:
    """The table: each baseline with its pairs and twins."""
    rows = [["baseline", "pairs %", "twins %"]]
    for name, rule in BASELINES.items():
        if name != "symmetric" or with_symmetric:
            tables = [rule(couple) for couple in couples]
            right = np.array([(s[0, 0] > s[0, 1], s[1, 1] > s[1, 0]) for s in tables])
            rows.append([name, f"{100 * right.mean():.1f}", f"{100 * right.all(1).mean():.1f}"])
    return rows


def cohort_of(pairs: Sequence[Pair], judged: Sequence[Pair], seed: int) -> list[str]:
    """A short text by each of some writers of `pairs` who are not judged."""
    texts = {pair.author: pair.chosen for pair in reversed(pairs)}
    names = sorted({*texts} - {pair.author for pair in judged})
    drawn = random.Random(f"{seed}/cohort").sample(names, min(KEPT, len(names)))
    return [" ".join(texts[name].split()[:COHORT_WORDS]) for name in drawn]


def main(config: Config) -> None:
    """Read all couples and print the table."""
    pairs = [
        replace(pair, exemplars=pair.exemplars[: config.exemplars]) for pair in read(config.pairs)
    ]
    couples = [both for both in twin_pairs(pairs) if len(both) == 2]
    couples = couples[: None if config.limit is None else config.limit // 2]
    if not couples:
        raise InputError(f"{config.pairs}: expected pairs with their twins, found none")
    device = device_of(config.device)
    base = resolve(config.base, lambda line: print(line, file=sys.stderr))
    tokenizer = Tokenizer.load(base)
    model = weights.load(base, dtype_of(config.dtype, device), device)
    reading = Reading(model, tokenizer, ReadingConfig(), demo_cohort())
    if config.adapter is not None:
        reading = Reading.load(config.adapter, model, tokenizer)
    if config.others is not None:
        reading.cohort = tuple(cohort_of(read(config.others), pairs, config.seed))
    model.pack()
    shown = track(couples, "couples", transient=True, disable=not sys.stderr.isatty())
    measured = [measure(reading, both, config.symmetric) for both in shown]
    print("\n".join(table(rows_of(measured, config.symmetric))))
    crossed = [couple.after for couple in measured]
    share = np.mean([m[0, 0] + m[1, 1] > m[0, 1] + m[1, 0] for m in crossed])
    print(f"\ncouples, without a baseline: {100 * share:.1f} % of {len(measured)}")
    print(f"cohort of {len(reading.cohort)}; {device}, {model.norm.weight.dtype}")


def run(config: Config) -> int:
    """`main` with an exit code."""
    return exit_code("nanopersrm.evaluate.cohorts", lambda: main(config))


if __name__ == "__main__":
    sys.exit(run(tyro.cli(Config, prog="python -m nanopersrm.evaluate.cohorts")))
