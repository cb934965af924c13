"""Scoreboard: the result of an evaluation as Markdown tables, one row a judge.

A number stands with its interval, "63.1 [58.0, 67.9]"; a dash is what does not apply or cannot be
computed. A second table gives pairs and twins of every judge by kind, domain and number of
exemplars, where there is more than one. A third sets the first judge against each of the others,
pair by pair (`paired.py`).
"""

from collections.abc import Sequence
from typing import Any

from nanopersrm.evaluate.metrics import GROUPS

COLUMNS = (  # heading, metric, factor, decimals
    ("pairs %", "pair_accuracy", 100, 1),
    ("lenient %", "lenient_accuracy", 100, 1),
    ("twins %", "twin_accuracy", 100, 1),
    ("swap gap", "swap_gap", 100, 1),
    ("no exemplar %", "no_exemplar_accuracy", 100, 1),
    ("orders agree %", "order_consistency", 100, 1),
    ("invalid %", "invalid_rate", 100, 1),
    ("ECE", "ece", 1, 3),
    ("Brier", "brier", 1, 3),
    ("length r", "length_correlation", 1, 2),
)
NONE = "-"
AGAINST = (
    "won: only the first judge is right (a tie or an invalid opinion is not); p: sign test, were "
    "either as likely to win; look at the twins, for a pair and its twin are not independent"
)


def page(result: dict[str, Any]) -> str:
    """Tables and facts of a result."""
    judges, facts = result["judges"], result["facts"]
    rows = [["judge", *(heading for heading, *_ in COLUMNS), "n", "pairs/s"]]
    for name, numbers in judges.items():
        speed = facts["pairs_per_second"][name]
        cells = [_cell(numbers[key], factor, places) for _, key, factor, places in COLUMNS]
        pace = NONE if speed is None else f"{speed:,.2f}"
        rows.append([name, *cells, str(numbers["n"]), pace])
    lines = table(rows)
    groups = [["pairs % / twins %", "n", *judges]]
    for group in GROUPS:
        names = result[f"by_{group}"]
        for value in names if len(names) > 1 else ():
            own = [numbers[f"by_{group}"][value] for numbers in judges.values()]
            label = f"{group} {value}" if group == "exemplars" else value
            groups.append([label, str(own[0]["n"]), *map(_both, own)])
    if len(groups) > 1:
        lines += ["", *table(groups)]
    if result["against"]:
        lines += ["", *table(_against(facts["judge"], result["against"])), "", AGAINST]
    return "\n".join([*lines, "", *_notes(facts)])


def _against(first: str, against: dict[str, Any]) -> list[list[str]]:
    """The rows of the third table: what the first judge won and lost."""
    rows = [[f"{first} against"]]
    for what in ("pairs", "twins"):
        rows[0] += [f"{what} won / lost", "p", "points"]
    for name, found in against.items():
        cells = []
        for own in found.values():
            if own["p"] is None:
                cells += [NONE] * 3
                continue
            p = "< 0.001" if own["p"] < 0.001 else _plain(own["p"], 3)
            cells += [f"{own['won']} / {own['lost']}", p, _cell(own["difference"], 100, 1)]
        rows.append([name, *cells])
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
    """A number and its interval."""
    value, low, high = number["value"], number["low"], number["high"]
    if value is None:
        return NONE
    text = f"{_plain(value * factor, places)}"
    if low is None or high is None:
        return text
    return f"{text} [{_plain(low * factor, places)}, {_plain(high * factor, places)}]"


def _plain(value: float, places: int) -> str:
    """Rounded, and never "-0.0"."""
    return f"{round(value, places) + 0.0:.{places}f}"


def _both(numbers: dict[str, Any]) -> str:
    values = [numbers[key]["value"] for key in ("pair_accuracy", "twin_accuracy")]
    return " / ".join(NONE if v is None else _plain(v * 100, 1) for v in values)


def _notes(facts: dict[str, Any]) -> list[str]:
    """What stands under the tables."""
    lines = [f"{name}: {said}" for name, said in facts["judges"].items() if said]
    lines += [f"{name}: left out, {why}" for name, why in facts["left_out"].items()]
    lines += [f"{name}: invalid, at first: {why}" for name, why in facts["problems"].items()]
    versions = ", ".join(f"{name} {number}" for name, number in facts["versions"].items())
    lines.append(
        f"brackets: 95 % of {facts['resamples']} resamples of authors; seed {facts['seed']}; "
        f"{facts['device']}, load {facts['load']}; {versions}"
    )
    return lines
