"""The leak gate: can a reader who never sees the exemplars tell chosen from rejected?

    python -m data.leakgate pairs/train.jsonl pairs/test.jsonl
    audit(pairs).failed

If so, the pairs teach that and not style. Five probes that are blind to exemplars (`probes.py`) are
trained on a set and judge writers that they have not seen (`logistic.py`), on the whole set and on
each kind by itself, since a leak of one kind drowns in the others and opposite ones cancel. A sixth
checks the twins (`twins.py`).

    verdict    when
    leak       accuracy above 55 %, and more than 3 standard errors above 50 %; the gate fails
    unsure     above 55 %, but 3 standard errors reach down to 50 %; the gate does not fail
    too few    fewer than 40 pairs could be judged by a fit on strangers; the gate does not fail
    ok         all else

Why 3 errors: a build looks at about 60 numbers, and 1 of 40 honest ones would be 2 errors above
50 %. Worked number: with 12,000 pairs of 200 writers an error is about 0.6 %, so 55.1 % fails; with
50 pairs it is about 7 %, so 71 % would be needed. The intervals in the table are 2 errors wide on
each side (1.96).

With complete twins the four probes of texts are at 50 % exactly and by construction; then only
position can leak. So the table also shows each of them on one pair of each couple, the one in which
a person's own text is chosen, as sets without twins have it. That is for information: it tells what
the twins are for. For the twins, "accuracy" is the most that a blind reader could reach: half of
the pairs with a good twin and all of the others; a single fault is a leak.

What we left out. A leak that is no sum of features (chosen has an even number of words) is not
seen; complete twins are the guard against those. Of more than 8,000 couples the probes see a
sample. Exit code: 0 no leak, 1 a leak, 2 a file that cannot be used.
"""

import argparse
import json
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from data.couples import Rows, couples
from data.grams import Bag, named
from data.logistic import Floats, decide, standard_error
from data.machine_text import Machine
from data.probes import Table, layout, length, position
from data.twins import twin_faults
from nanopersrm import InputError
from nanopersrm.command import exit_code
from nanopersrm.pairs import Pair, iterate

LIMIT = 0.55
ERRORS = 3.0
TOO_FEW = 40  # pairs
ALL = "all"  # in place of a kind
TOO_SMALL = "too few"
WHOLE, HALF = "all pairs", "without twins"
SHOWN, BEGINNING = 3, 70  # examples of a culprit, characters of a text
TELLING = 5  # features of a culprit
LOOKED = 100  # pairs whose texts are searched for the names of hashed grams
IN_CHOSEN = (": more in chosen", ": more in rejected")

Probe = Table | Bag | Machine


@dataclass(frozen=True)
class Row:
    """One probe on one kind."""

    probe: str
    kind: str  # or ALL
    scope: str  # WHOLE or HALF
    n: int  # pairs judged
    accuracy: float
    low: float
    high: float
    verdict: str  # ok, leak, unsure, too few; for HALF: information


@dataclass(frozen=True)
class Culprit:
    """A leak: what told the probe, and pairs that it told apart most surely."""

    probe: str
    kind: str
    n: int
    accuracy: float
    telling: tuple[str, ...]
    examples: tuple[tuple[str, str, str], ...]  # id, beginning of chosen, of rejected

    def lines(self) -> list[str]:
        """For people."""
        return [
            f"leak: {self.probe}, {self.kind}: {self.accuracy:.1%} of {self.n} pairs "
            f"without a look at the exemplars",
            f"  told by: {'; '.join(self.telling)}",
            *(
                f"  {id}: chosen {chosen!r}, rejected {rejected!r}"
                for id, chosen, rejected in self.examples
            ),
        ]


@dataclass(frozen=True)
class Audit:
    """What the gate found in one set."""

    rows: tuple[Row, ...]
    culprits: tuple[Culprit, ...]

    @property
    def failed(self) -> bool:
        return bool(self.culprits)

    def table(self) -> str:
        """All rows as a Markdown table, probes of the whole set first."""
        lines = [
            "| probe | kind | scope | judged | accuracy | interval | verdict |",
            "|---|---|---|--:|--:|---|---|",
        ]
        for row in self.rows:
            seen = row.verdict != TOO_SMALL
            cells = (
                [f"{row.accuracy:.1%}", f"{row.low:.1%} to {row.high:.1%}"] if seen else ["", ""]
            )
            names = [row.probe, row.kind, row.scope, str(row.n), *cells, row.verdict]
            lines.append(f"| {' | '.join(names)} |")
        return "\n".join(lines) + "\n"

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {"failed": self.failed, **asdict(self)}


def _twin_rows(pairs: Sequence[Pair], kinds: Sequence[str]) -> tuple[list[Row], list[Culprit]]:
    """The share that a blind reader could reach where twins are missing or broken."""
    rows, culprits = [], []
    faults = twin_faults(pairs)
    for kind in kinds:
        places = {i for i, pair in enumerate(pairs) if kind in (ALL, pair.kind)}
        bad = {name: [i for i in found if i in places] for name, found in faults.items()}
        bad = {name: found for name, found in bad.items() if found}
        reach = 0.5 + 0.5 * len({i for found in bad.values() for i in found}) / len(places)
        verdict = "leak" if bad else "ok"
        rows.append(Row("twins", kind, WHOLE, len(places), reach, reach, reach, verdict))
        if bad:
            telling = [f"{name} ({len(found)} pairs)" for name, found in bad.items()]
            examples = list(dict.fromkeys(found[0] for found in bad.values()))
            examples += [i for i in next(iter(bad.values())) if i not in examples]
            shown = tuple(_example(pairs[i]) for i in examples[:SHOWN])
            culprits.append(Culprit("twins", kind, len(places), reach, tuple(telling), shown))
    return rows, culprits


def _example(pair: Pair) -> tuple[str, str, str]:
    return pair.id, pair.chosen[:BEGINNING], pair.rejected[:BEGINNING]


def _try(
    name: str, kind: str, probe: Probe, rows: Rows, used: Floats, seed: int
) -> tuple[Row, Floats, dict[str, float]]:
    """Train and judge one probe; its row, the odds for each row of the set, and the weights."""
    plus, minus = rows.balance(used)
    at = np.flatnonzero(plus + minus)
    odds = np.full(len(plus), np.nan)
    odds[at], weights = decide(probe.part(at).design, rows.groups[at], plus[at], minus[at])
    seen = np.flatnonzero(~np.isnan(odds))
    plus, minus, total = plus[seen], minus[seen], (plus + minus)[seen]
    right = np.where(odds[seen] > 0, plus, np.where(odds[seen] < 0, minus, total / 2))
    n = int(total.sum())
    if n < TOO_FEW:
        return Row(name, kind, WHOLE, n, 0.5, 0.0, 1.0, TOO_SMALL), odds, weights
    accuracy = float(right.sum()) / n
    error = standard_error(right, total, rows.writers[seen], seed)
    low, high = max(0.0, accuracy - 1.96 * error), min(1.0, accuracy + 1.96 * error)
    verdict = "leak" if accuracy - ERRORS * error > 0.5 else "unsure"
    if accuracy <= LIMIT:
        verdict = "ok"
    return Row(name, kind, WHOLE, n, accuracy, low, high, verdict), odds, weights


def _culprit(
    row: Row,
    pairs: Sequence[Pair],
    rows: Rows,
    used: Floats,
    odds: Floats,
    weights: dict[str, float],
) -> Culprit:
    """Name the features with the largest weights and the pairs with the clearest answers."""
    margin = np.where(used > 0, np.nan_to_num(rows.sign * odds[rows.row_of]), -np.inf)
    order = np.argsort(-margin, kind="stable").tolist()
    best = sorted(weights, key=lambda name: -abs(weights[name]))
    texts = [text for i in order[:LOOKED] for text in (pairs[i].chosen, pairs[i].rejected)]
    if row.probe == "n-grams":
        words = named(texts, [int(key) for key in best[: 4 * TELLING]])
        weights = {repr(words[int(key)]): weights[key] for key in best if int(key) in words}
        best = list(weights)
    ways = ("", ", the other way round") if row.probe == "position" else IN_CHOSEN
    telling = [f"{name}{ways[weights[name] < 0]}" for name in best[:TELLING]]
    shown = tuple(_example(pairs[i]) for i in order[:SHOWN])
    return Culprit(row.probe, row.kind, row.n, row.accuracy, tuple(telling), shown)


def audit(pairs: Sequence[Pair], seed: int = 0) -> Audit:
    """Try every probe on a set of pairs; the same pairs and seed give the same audit."""
    if not pairs:
        raise InputError("leak gate: expected pairs, got none")
    kinds = sorted({pair.kind for pair in pairs})
    kinds = [ALL, *kinds] if len(kinds) > 1 else [ALL]
    rows, culprits = _twin_rows(pairs, kinds)
    found = couples(pairs, seed)
    texts, two = found.texts, found.two
    made: dict[str, Callable[[], Probe]] = {  # one at a time, for memory
        "position": lambda: position(pairs).part(found.places),
        "length": lambda: Table.of([length(text) for text in texts], two),
        "format": lambda: Table.of([layout(text) for text in texts], two),
        "n-grams": lambda: Bag.of(texts, two),
        "machine": lambda: Machine.of(texts, two, found.human),
    }
    halves = []
    for name, make in made.items():
        probe, of = make(), found.by_pairs if name == "position" else found.by_texts
        for kind in kinds:
            used = np.array([kind in (ALL, pair.kind) for pair in found.pairs], dtype=np.float64)
            row, odds, weights = _try(name, kind, probe, of, used, seed)
            rows.append(row)
            if row.verdict == "leak":
                culprits.append(_culprit(row, found.pairs, of, used, odds, weights))
            if name != "position":  # the half is chosen by the source, which position looks at
                half = used * found.half
                if (half < used).any():
                    row = _try(name, kind, probe, of, half, seed)[0]
                verdict = row.verdict if row.verdict == TOO_SMALL else "for information"
                halves.append(replace(row, scope=HALF, verdict=verdict))
    return Audit(tuple(rows + halves), tuple(culprits))


class Leak(Exception):
    """Sets that can be solved without their exemplars; the message has a line a finding."""


def gate(sets: Mapping[str, Sequence[Pair]], seed: int) -> dict[str, Audit]:
    """The audit of every split that has pairs; a leak in one of them is raised."""
    found = {split: audit(pairs, seed) for split, pairs in sets.items() if pairs}
    lines = [
        f"{split}: {line}"
        for split, result in found.items()
        for culprit in result.culprits
        for line in culprit.lines()
    ]
    if lines:
        raise Leak("\n".join(lines))
    return found


def tell(files: Sequence[Path], out: Path | None, seed: int) -> int:
    """Audit each file by itself and print its table; gives 1 where one leaks, else 0."""
    audits: dict[str, Audit] = {}
    for file in files:
        pairs = list(iterate(file))
        if not pairs:
            raise InputError(f"{file}: expected pairs, found none")
        audits[str(file)] = audit(pairs, seed)
        print(f"{file}\n\n{audits[str(file)].table()}", flush=True)
        for culprit in audits[str(file)].culprits:
            print("\n".join(culprit.lines()), flush=True)
    if out:
        part = out.with_name(out.name + ".part")
        said = {name: found.as_dict() for name, found in audits.items()}
        try:
            part.write_text(json.dumps(said, ensure_ascii=False, indent=1) + "\n", "utf-8")
            os.replace(part, out)
        except OSError as error:
            raise InputError(f"{out}: cannot be written ({error})") from error
    failed = [name for name, found in audits.items() if found.failed]
    print(f"leak gate: {'failed for ' + ', '.join(failed) if failed else 'passed'}")
    return 1 if failed else 0


def main(arguments: Sequence[str] | None = None) -> int:
    """Parse the flags and audit; the exit code of the command."""
    parser = argparse.ArgumentParser(
        prog="data.leakgate", description="Can pairs be solved without a look at the exemplars?"
    )
    parser.add_argument("files", type=Path, nargs="+", metavar="FILE", help="pairs, .jsonl or .gz")
    parser.add_argument("--json", type=Path, help="also write the audits to this file")
    parser.add_argument("--seed", type=int, default=0, help="of folds and bootstrap (0)")
    flags = parser.parse_args(arguments)
    return exit_code("data.leakgate", lambda: tell(flags.files, flags.json, flags.seed))


if __name__ == "__main__":
    sys.exit(main())
