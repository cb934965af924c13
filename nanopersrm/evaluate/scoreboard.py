"""Scoreboard: the result of an evaluation as Markdown tables, one row a judge.

A number stands with its interval, "63.1 [58.0, 67.9]"; a dash is what does not apply. The second
table is by kind, domain and number of exemplars, the third sets the first judge against the others.
"""

from collections.abc import Sequence
from typing import Any

from nanopersrm.evaluate.metrics import GROUPS

COLUMNS = (  # heading, metric, factor, decimals
    ("pairs %", "pair_accuracy", 100, 1),
    ("twins %", "twin_accuracy", 100, 1),
    ("couples %", "couple_accuracy", 100, 1),
    ("swap gap", "swap_gap", 100, 1),
    ("invalid %", "invalid_rate", 100, 1),
    ("ECE", "ece", 1, 3),
    ("Brier", "brier", 1, 3),
)
NONE = "-"


def page(result: dict[str, Any]) -> str:
    """Tables and facts of a result."""
    judges, facts = result["judges"], result["facts"]
    rows = [["judge", *(heading for heading, *_ in COLUMNS), "n"]]
    for name, numbers in judges.items():
        cells = [_cell(numbers[key], factor, places) for _, key, factor, places in COLUMNS]
        rows.append([name, *cells, str(numbers["n"])])
    lines = table(rows)
    groups = [["pairs % / twins %", "n", *judges]]
    for group in GROUPS:
        values = result[f"by_{group}"]
        for value in values if len(values) > 1 else ():
            numbers = [of_judge[f"by_{group}"][value] for of_judge in judges.values()]
            label = f"{group} {value}" if group == "exemplars" else value
            groups.append([label, str(numbers[0]["n"]), *map(_pairs_and_twins, numbers)])
    if len(groups) > 1:
        lines += ["", *table(groups)]
    if result["against"]:
        lines += ["", *table(_against(facts["judge"], result["against"])), ""]
        lines.append("won: only the first judge is right; p: exact sign test")
    lines += ["", *(f"{name}: {note}" for name, note in facts["notes"].items())]
    versions = ", ".join(f"{name} {number}" for name, number in facts["versions"].items())
    intervals = f"95 % of {facts['resamples']} resamples of authors; seed {facts['seed']}"
    return "\n".join([*lines, f"brackets: {intervals}; {versions}"])


def _against(first: str, against: dict[str, Any]) -> list[list[str]]:
    """The rows of the third table: what the first judge won and lost."""
    rows = [[f"{first} against", "pairs won / lost", "p", "points"]]
    rows[0] += ["twins won / lost", "p", "points"]
    for name, comparison in against.items():
        rows.append([name])
        for part in comparison.values():
            p = NONE if part["p"] is None else f"{max(part['p'], 0.001):.3f}"  # at most this
            rows[-1] += [f"{part['won']} / {part['lost']}", p, _cell(part["difference"], 100, 1)]
    return rows


def table(rows: Sequence[Sequence[str]]) -> list[str]:
    """Aligned Markdown lines; the first row is the heading, the first column is text."""
    widths = [max(3, *map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for row in rows:
        cells = [cell.rjust(width) for cell, width in zip(row, widths, strict=True)]
        lines.append("| " + " | ".join([row[0].ljust(widths[0]), *cells[1:]]) + " |")
    marks = ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])]
    return [lines[0], "| " + " | ".join(marks) + " |", *lines[1:]]


def _cell(number: dict[str, float | None], factor: float, places: int) -> str:
    """A number and its interval; never "-0.0"."""
    value, low, high = (
        NONE if x is None else f"{round(x * factor, places) + 0.0:.{places}f}"
        for x in (number["value"], number["low"], number["high"])
    )
    return value if low == NONE else f"{value} [{low}, {high}]"


def _pairs_and_twins(numbers: dict[str, Any]) -> str:
    values = [numbers[key]["value"] for key in ("pair_accuracy", "twin_accuracy")]
    return " / ".join(NONE if v is None else f"{v * 100:.1f}" for v in values)
