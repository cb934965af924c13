"""Baselines of reading side by side: what must be taken from the likelihood of a candidate?

    python -m nanopersrm.evaluate.cohorts --pairs validation.jsonl --limit 200
    python -m nanopersrm.evaluate.cohorts --pairs validation.jsonl --symmetric True

One candidate is likelier than another after anybody's text, because it is simpler. With s = mean
log p(c | e) and m[k] = mean log p(c | k) over a cohort k, each row of the table scores c by

    none             s
    blank            s - log p(c | a blank line)                      nothing was read before
    mean             s - mean m                                       of the whole cohort
    z                (s - mean m) / deviation m                       T-norm in speaker verification
    mean, z top k    the same over the k texts after which c is likeliest         adaptive T-norm
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
from nanopersrm.style.reading import Reading, ReadingConfig

Array = NDArray[np.float64]
TOP = 4  # of the cohort, in the adaptive forms
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

    own: Array  # (2, 2) of c_j after e_i
    blank: Array  # (2,) of c_j after a blank line
    cohort: Array  # (2, K) of c_j after each text of the cohort
    back: Array  # (2, 2) of e_i after c_j; empty without --symmetric
    back_cohort: Array  # (2, K) of e_i after each text of the cohort

    def scores(self, of: Callable[[Array, Array], Array]) -> Array:
        """of(s, m) for each c_j after e_i (2, 2)."""
        return np.array([[of(self.own[i, j], self.cohort[j]) for j in (0, 1)] for i in (0, 1)])


def z(s: Array, m: Array) -> Array:
    """(s - mean) / deviation over the cohort m (K,)."""
    return (s - m.mean()) / m.std(ddof=1)


def top(m: Array) -> Array:
    """The greatest of m (K,)."""
    return np.sort(m)[-TOP:]


BASELINES: dict[str, Callable[[Couple], Array]] = {
    "none": lambda c: c.own,
    "blank": lambda c: c.own - c.blank,
    "mean": lambda c: c.scores(lambda s, m: s - m.mean()),
    "z": lambda c: c.scores(z),
    f"mean, top {TOP}": lambda c: c.scores(lambda s, m: s - top(m).mean()),
    f"z, top {TOP}": lambda c: c.scores(lambda s, m: z(s, top(m))),
}


def mean(log_p: Tensor) -> float:
    """log p (T,) of the tokens of a text -> their mean; the first counts for nothing."""
    return float(log_p[1:].sum()) / len(log_p)


def symmetric(couple: Couple) -> Array:
    """Half of z either way (2, 2)."""
    back = [[z(couple.back[i, j], couple.back_cohort[i]) for j in (0, 1)] for i in (0, 1)]
    return (couple.scores(z) + np.array(back)) / 2


def measure(reading: Reading, pairs: Sequence[Pair], also_back: bool) -> Couple:
    """Read one pair and its twin."""
    texts = [pair.chosen for pair in pairs]
    ids = [reading.candidate(text)[0] for text in texts]

    def means(exemplars: Sequence[str], candidates: Sequence[list[int]]) -> list[float]:
        return [mean(part) for part in reading.log_probs(exemplars, candidates)]

    def after_cohort(candidates: Sequence[list[int]]) -> Array:
        table = reading.cohort_log_probs(candidates)
        return np.array([[mean(part) for part in row] for row in table]).T

    own = np.array([means(pair.exemplars, ids) for pair in pairs])
    back, back_cohort = np.zeros((0, 0)), np.zeros((0, 0))
    if also_back:
        writers = [reading.candidate("\n\n".join(pair.exemplars))[0] for pair in pairs]
        back = np.array([means([text], writers) for text in texts]).T
        back_cohort = after_cohort(writers)
    blank = np.array(means([""], ids))
    return Couple(own, blank, after_cohort(ids), back, back_cohort)


def rows_of(couples: Sequence[Couple], with_symmetric: bool) -> list[list[str]]:
    """The table: each baseline with its pairs and twins."""
    rules = BASELINES | ({"symmetric": symmetric} if with_symmetric else {})
    rows = [["baseline", "pairs %", "twins %"]]
    for name, rule in rules.items():
        right = np.array(
            [(s[0, 0] > s[0, 1], s[1, 1] > s[1, 0]) for couple in couples for s in [rule(couple)]]
        )
        rows.append([name, f"{100 * right.mean():.1f}", f"{100 * right.all(1).mean():.1f}"])
    return rows


def main(config: Config) -> None:
    """Read all couples and print the table."""
    pairs = read(config.pairs)
    couples = [both for both in twin_pairs(pairs) if len(both) == 2]
    couples = couples[: None if config.limit is None else config.limit // 2]
    if not couples:
        raise InputError(f"{config.pairs}: expected pairs with their twins, found none")
    cohort = demo_cohort()
    if config.others is not None:
        first = {pair.author: pair.chosen for pair in reversed(read(config.others))}
        for pair in pairs:
            first.pop(pair.author, None)
        drawn = random.Random(f"{config.seed}/cohort").sample(sorted(first), min(KEPT, len(first)))
        cohort = [" ".join(first[author].split()[:COHORT_WORDS]) for author in drawn]
    if config.exemplars is not None:
        couples = [
            tuple(cut_exemplars(pair, config.exemplars) for pair in both) for both in couples
        ]
    device = device_of(config.device)
    base = resolve(config.base, lambda line: print(line, file=sys.stderr))
    tokenizer = Tokenizer.load(base)
    model = weights.load(base, dtype_of(config.dtype, device), device)
    if config.adapter is None:
        reading = Reading(model, tokenizer, ReadingConfig(), cohort)
    else:
        reading = Reading.load(config.adapter, model, tokenizer)
        if config.others is not None:
            reading.cohort = tuple(cohort)
    model.pack()
    shown = track(couples, "couples", transient=True, disable=not sys.stderr.isatty())
    measured = [measure(reading, both, config.symmetric) for both in shown]
    print("\n".join(table(rows_of(measured, config.symmetric))))
    crossed = [couple.own for couple in measured]
    share = np.mean([m[0, 0] + m[1, 1] > m[0, 1] + m[1, 0] for m in crossed])
    cohort_words = f"cohort of {len(reading.cohort)}"
    print(f"\ncouples, without a baseline: {100 * share:.1f} % of {len(measured)}; {cohort_words}")


def cut_exemplars(pair: Pair, count: int) -> Pair:
    """The pair with its first exemplars."""
    return replace(pair, exemplars=pair.exemplars[:count])


def run(config: Config) -> int:
    """`main` with an exit code."""
    return exit_code("nanopersrm.evaluate.cohorts", lambda: main(config))


if __name__ == "__main__":
    sys.exit(run(tyro.cli(Config, prog="python -m nanopersrm.evaluate.cohorts")))
