"""Baselines of reading side by side: what must be taken from the likelihood of a candidate?

    python -m nanopersrm.evaluate.cohorts --pairs validation.jsonl --limit 200
    python -m nanopersrm.evaluate.cohorts --pairs validation.jsonl --s-norm

One candidate is likelier than another after anybody's text, because it is simpler. With s = mean
log p(c | e), b = mean log p(c), m[k] = mean log p(c | k) over a cohort of texts k by other people,
and the same for the exemplars after the candidate (back), each row of the table scores c by

    none             s
    forward          s - b                                    nothing was read before
    mean             s - mean m                               of the whole cohort
    z                (s - mean m) / deviation m               T-norm in speaker verification
    nearest          mean over the texts after which c is likeliest     adaptive T-norm
    back             mean log p(e | c) - log p(e)
    reading          forward + back                           twice what `style/reading.py` gives
    nearest + back   both
    s-norm           z of c after e + z of e after c          the cohort read before both

(Auckenthaler et al. 2000; Matějka et al., Interspeech 2017 for the adaptive ones.) The cohort is
a text by each demo writer. The last line needs no baseline: *couples* asks of two texts and two
writers who wrote which, s[1,1] + s[2,2] > s[1,2] + s[2,1].
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

from data.build import DEMO
from data.corpus import cut, read_corpora
from nanopersrm import InputError
from nanopersrm.command import exit_code
from nanopersrm.evaluate.scoreboard import table
from nanopersrm.model import weights
from nanopersrm.model.base import DEFAULT_BASE, resolve
from nanopersrm.model.tokenizer import Tokenizer
from nanopersrm.model.weights import device_of, dtype_of
from nanopersrm.pairs import Pair, read, twin_pairs
from nanopersrm.style.reading import Reading, ReadingConfig, Roots, context_ids

Array = NDArray[np.float64]
COHORT_WORDS = 110  # of a text of the cohort
NEAREST = 4  # texts of the cohort


@dataclass(frozen=True)
class Config:
    """Compare baselines of reading on pairs with twins."""

    pairs: Path  # to judge
    adapter: Path | None = None  # a folder reading/; default: the base as it is
    exemplars: int | None = None  # so many of each pair; default: all
    limit: int | None = None  # so many pairs
    s_norm: bool = False  # the last row as well: three times as long
    base: str = DEFAULT_BASE
    device: str = "auto"
    dtype: str = "auto"


@dataclass(frozen=True)
class Couple:
    """Mean log p of what is read about two texts (c) and two writers (e), nats a token."""

    after: Array  # (2, 2) of c_j after e_i
    alone: Array  # (2,) of c_j after a blank line
    cohort: Array  # (2, K) of c_j after each text of the cohort
    back: Array  # (2, 2) gain of e_i after c_j
    back_cohort: Array  # (2, K) gain of e_i after each text of the cohort; NaN without --s-norm


def z(s: Array, m: Array) -> Array:
    """s (…), m (…, K) of a cohort -> (s - mean) / deviation."""
    return (s - m.mean(-1)) / m.std(-1, ddof=1)


BASELINES: dict[str, Callable[[Couple], Array]] = {  # -> the score of c_j after e_i (2, 2)
    "none": lambda c: c.after,
    "forward": lambda c: c.after - c.alone,
    "mean": lambda c: c.after - c.cohort.mean(-1),
    "z": lambda c: z(c.after, c.cohort),
    "nearest": lambda c: c.after - np.sort(c.cohort)[:, -NEAREST:].mean(-1),
    "back": lambda c: c.back,
    "reading": lambda c: c.after - c.alone + c.back,
    "nearest + back": lambda c: BASELINES["nearest"](c) + c.back,
    "s-norm": lambda c: z(c.after, c.cohort) + z(c.back.T, c.back_cohort).T,
}


def mean(log_p: Tensor) -> float:
    """log p (T,) of the tokens of a text -> their mean; the first counts for nothing."""
    return float(log_p[1:].sum()) / len(log_p)


def measure(reading: Reading, cohort: Roots, pairs: Sequence[Pair], also_back: bool) -> Couple:
    """Read one pair and its twin."""
    ids = [reading.candidate(pair.chosen)[0] for pair in pairs]

    def after_cohort(texts: Sequence[list[int]]) -> Array:
        return np.array([[mean(part) for part in row] for row in reading.under(cohort, texts)]).T

    after = [[mean(part) for part in reading.log_probs(pair.exemplars, ids)] for pair in pairs]
    back = [reading.back(pair.exemplars, ids) for pair in pairs]
    back_cohort = np.full((2, len(cohort.lasts)), np.nan)
    if also_back:
        writers = [reading.exemplar_ids(pair.exemplars) for pair in pairs]
        alone = np.array([mean(part) for part in reading.alone(writers)])
        back_cohort = after_cohort(writers) - alone[:, None]
    alone = np.array([mean(part) for part in reading.alone(ids)])
    return Couple(np.array(after), alone, after_cohort(ids), np.array(back), back_cohort)


def demo_cohort() -> list[str]:
    """A short text by each of the invented writers."""
    first = {piece.author: piece.text for piece in reversed(read_corpora(DEMO))}
    return [cut(first[author], COHORT_WORDS, random.Random(0)) for author in sorted(first)]


def rows_of(couples: Sequence[Couple]) -> list[list[str]]:
    """The table: each baseline with its pairs and twins."""
    rows = [["baseline", "pairs %", "twins %"]]
    for name, rule in BASELINES.items():
        tables = [rule(couple) for couple in couples]
        if np.isfinite(tables).all():
            right = np.array([(s[0, 0] > s[0, 1], s[1, 1] > s[1, 0]) for s in tables])
            rows.append([name, f"{100 * right.mean():.1f}", f"{100 * right.all(1).mean():.1f}"])
    return rows


def main(config: Config) -> None:
    """Read all couples and print the table."""
    pairs = [
        replace(pair, exemplars=pair.exemplars[: config.exemplars]) for pair in read(config.pairs)
    ]
    if 0 in (config.exemplars, config.limit):
        raise InputError("--exemplars, --limit: expected numbers from 1, got 0")
    couples = [both for both in twin_pairs(pairs) if len(both) == 2]
    couples = couples[: None if config.limit is None else config.limit // 2]
    if not couples:
        raise InputError(f"{config.pairs}: expected pairs with their twins, found none")
    device = device_of(config.device)
    base = resolve(config.base, lambda line: print(line, file=sys.stderr))
    tokenizer = Tokenizer.load(base)
    model = weights.load(base, dtype_of(config.dtype, device), device)
    reading = Reading(model, tokenizer, ReadingConfig())
    if config.adapter is not None:
        reading = Reading.load(config.adapter, model, tokenizer)
    model.pack()
    most = reading.config.exemplar_tokens
    cohort = reading.roots([context_ids(tokenizer, [text], most) for text in demo_cohort()])
    shown = track(couples, "couples", transient=True, disable=not sys.stderr.isatty())
    measured = [measure(reading, cohort, both, config.s_norm) for both in shown]
    print("\n".join(table(rows_of(measured))))
    share = np.mean([np.trace(m) > np.trace(m[::-1]) for m in (c.after for c in measured)])
    print(f"\ncouples, without a baseline: {100 * share:.1f} % of {len(measured)}")
    print(f"cohort of {len(cohort.lasts)}; {device}, {model.norm.weight.dtype}")


def run(config: Config) -> int:
    """`main` with an exit code."""
    return exit_code("nanopersrm.evaluate.cohorts", lambda: main(config))


if __name__ == "__main__":
    sys.exit(run(tyro.cli(Config, prog="python -m nanopersrm.evaluate.cohorts")))
