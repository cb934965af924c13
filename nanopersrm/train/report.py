"""Draw a run: its curves, its settings and its last replies, as one HTML page.

    python -m nanopersrm.train.report runs/sft              writes runs/sft/report.html

The page needs nothing but itself: no script, no font, no picture is fetched, also where a reply
asks for one. It can be mailed, opened on a telephone and read in the dark.

How it works. Every number of metrics.jsonl is drawn, whatever its name: names that begin with the
same word share a chart (reward, reward_format), and the losses of each phase have one of their own.
Names that begin with "validation_" were measured on other pairs. A last line that is half written
is left out, so a run can be looked at while it trains.

What we left out: comparing runs.
"""

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

import tyro

from nanopersrm import InputError
from nanopersrm.command import exit_code
from nanopersrm.files import write_text
from nanopersrm.train.chart import STYLE, Series, chart

LARGEST = 1e30  # a number beyond it is drawn as a gap
REPLIES = 3  # files shown
SHOWN = 20_000  # characters of each
KNOWN = {  # name -> title of its chart, unit, scale; drawn last and in this order, from zero
    "lr": ("learning rate", "", 1.0),
    "gradient_norm": ("gradient norm", "", 1.0),
    "tokens_per_second": ("speed", "tokens/s", 1.0),
    "memory": ("memory", "GB", 1e-9),
    "memory_peak": ("memory", "GB", 1e-9),
    "seconds": ("time of a step", "s", 1.0),
}
CALM = ("lr", "memory", "memory_peak")  # nothing to smooth
LOSS, VALIDATION = "loss", "validation_"
PAGE_STYLE = """
body{background:var(--page);color:var(--ink);font:16px/1.5 system-ui,sans-serif;margin:0 auto;
max-width:1400px;padding:1rem}
h1{font-size:1.5rem;margin:.2rem 0}h2{font-size:1.15rem;margin:1.8rem 0 .6rem}
p{margin:.2rem 0;color:var(--soft);overflow-wrap:anywhere}
.charts{display:grid;gap:1rem;grid-template-columns:repeat(auto-fit,minmax(min(100%,400px),1fr))}
figure,details,table{background:var(--card);border-radius:8px;margin:0;padding:.7rem}
figcaption,summary{font-weight:600}details{margin-bottom:.7rem}
pre{white-space:pre-wrap;overflow-wrap:anywhere;margin:.6rem 0 0;font-size:.85rem}
table{border-spacing:0;font-size:.9rem;max-width:100%}
th,td{text-align:left;vertical-align:top;padding:.15rem .8rem .15rem 0;overflow-wrap:anywhere}
th{font-weight:400;color:var(--soft)}
"""


@dataclass(frozen=True)
class Config:
    """Draw the curves of a run into one HTML page."""

    run: tyro.conf.Positional[Path]  # the folder of the run
    out: Path | None = None  # the page to write; default: report.html in that folder


@dataclass(frozen=True)
class Panel:
    """What one chart shows."""

    title: str
    unit: str
    series: tuple[Series, ...]
    from_zero: bool


def main(config: Config) -> None:
    """Read, draw, write."""
    lines = read_metrics(config.run)
    facts = read_facts(config.run)
    out = config.out or config.run / "report.html"
    drawn = page(config.run.resolve().name, lines, facts, read_replies(config.run))
    write_text(out, drawn.encode("utf-8", "replace").decode())  # half a character becomes "?"
    print(out)


def read_metrics(run: Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl in the order of their steps."""
    path = run / "metrics.jsonl"
    if not run.is_dir():
        raise InputError(f"{run}: expected the folder of a run, found none")
    if not path.exists():
        raise InputError(f"{run}: expected a run with metrics.jsonl, found none")
    rows = _bytes(path).split(b"\n")
    found = []
    for number, row in enumerate(rows, 1):
        if not row.strip():
            continue
        try:
            line = json.loads(row)
            if not isinstance(line["step"], int) or not abs(line["step"]) < LARGEST:
                raise ValueError("its step is no whole number")
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            if number == len(rows):
                continue  # half written
            raise InputError(
                f"{path}, line {number}: expected a JSON object with a step, found none"
            ) from error
        found.append(line)
    if not found:
        raise InputError(f"{path}: expected steps, found none")
    return sorted(found, key=lambda line: line["step"])


def read_facts(run: Path) -> dict[str, Any]:
    """config.json; empty where there is none."""
    path = run / "config.json"
    if not path.exists():
        return {}
    try:
        facts = json.loads(_bytes(path))
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path}: expected a JSON object ({error})") from error
    if not isinstance(facts, dict):
        raise InputError(f"{path}: expected a JSON object, found something else")
    return facts


def read_replies(run: Path) -> list[tuple[str, str]]:
    """(name, text) of the last files under replies/, newest first."""
    paths = [path for path in (run / "replies").glob("step-*.txt") if path.is_file()]
    paths.sort(key=lambda path: (len(path.name), path.name), reverse=True)
    texts = {path.stem: _bytes(path).decode("utf-8", "replace") for path in paths[:REPLIES]}
    return [
        (name, text if len(text) <= SHOWN else text[:SHOWN] + "\n… (cut here)")
        for name, text in texts.items()
    ]


def panels(lines: Sequence[dict[str, Any]]) -> list[Panel]:
    """The charts: losses of each phase, validation, names nobody foresaw, then the known ones."""
    curves: dict[tuple[int, str, str], dict[str, dict[int, float | None]]] = {}
    for line in lines:
        phase = str(line.get("phase", ""))
        for name, value in line.items():
            if name in ("step", "phase") or isinstance(value, (bool, str, list, dict)):
                continue
            number = value if value is not None and abs(value) < LARGEST else None
            bare = name.removeprefix(VALIDATION)
            word = bare.split("_")[0]
            if name in KNOWN:
                title, _, scale = KNOWN[name]
                key = (3 + [known[0] for known in KNOWN.values()].index(title), title, "")
                number = None if number is None else number * scale
            elif bare != name:
                key = (1, f"validation {word}", "")
            else:
                key = (0, word, phase) if word == LOSS else (2, word, "")
            curves.setdefault(key, {}).setdefault(name, {})[line["step"]] = number
    found = []
    for (order, title, phase), named in sorted(curves.items(), key=lambda item: item[0][0]):
        if order in (1, 2) and len(named) == 1:
            title = next(iter(named)).replace("_", " ")
        series = [
            Series(name.replace("_", " "), tuple(points.items()), name not in CALM)
            for name, points in named.items()
        ]
        unit = next((KNOWN[name][1] for name in named if name in KNOWN), "")
        title = f"{title} ({phase})" if phase else title
        found.append(Panel(title, unit, tuple(series), from_zero=order > 2))
    return found


def phases(lines: Sequence[dict[str, Any]]) -> list[tuple[int, str]]:
    """(first step, phase) of each phase but the first."""
    firsts: dict[str, int] = {}
    for line in lines:
        firsts.setdefault(str(line.get("phase", "")), line["step"])
    return [(step, phase) for phase, step in firsts.items()][1:]


def page(
    name: str,
    lines: Sequence[dict[str, Any]],
    facts: dict[str, Any],
    replies: Sequence[tuple[str, str]],
) -> str:
    """The whole HTML page."""
    marks = phases(lines)
    figures = [chart(p.title, p.unit, p.series, marks, p.from_zero) for p in panels(lines)]
    flat = flatten(facts)
    settings = {k.removeprefix("config."): v for k, v in flat.items() if k.startswith("config.")}
    rest = {k: v for k, v in flat.items() if not k.startswith("config.")}
    told = "".join(
        f"<details{' open' if i == 0 else ''}><summary>{escape(title)}</summary>"
        f"<pre>{escape(text)}</pre></details>"
        for i, (title, text) in enumerate(replies)
    )
    sections = (
        ("Last replies", told),
        ("Settings", _table(settings)),
        ("The run", _table(rest)),
    )
    body = "".join(f"<h2>{title}</h2>{text}" for title, text in sections if text)
    last = lines[-1]
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        '<meta http-equiv="Content-Security-Policy" '
        "content=\"default-src 'none'; style-src 'unsafe-inline'; img-src data:\">"
        f'<link rel="icon" href="data:,"><title>{escape(name)}</title>'
        f"<style>{STYLE}{PAGE_STYLE}</style></head>\n<body><h1>{escape(name)}</h1>"
        f"<p>up to step {last['step']}, {escape(str(last.get('phase', '')))}</p>"
        f'<div class="charts">{"".join(figures)}</div>\n{body}</body></html>\n'
    )


def flatten(value: object, name: str = "") -> dict[str, str]:
    """{"lora": {"rank": 16}} -> {"lora.rank": "16"}; a list of objects by its numbers."""
    pairs: list[tuple[object, object]] = []
    if isinstance(value, dict):
        pairs = list(value.items())
    elif isinstance(value, list) and any(isinstance(item, dict) for item in value):
        pairs = list(enumerate(value, 1))
    if not pairs:
        text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
        return {name: text} if name else {}
    found: dict[str, str] = {}
    for key, item in pairs:
        found |= flatten(item, f"{name}.{key}" if name else str(key))
    return found


def _table(rows: dict[str, str]) -> str:
    cells = "".join(
        f"<tr><th>{escape(key)}</th><td>{escape(value)}</td></tr>" for key, value in rows.items()
    )
    return f"<table>{cells}</table>" if cells else ""


def _bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror})") from error


def run(config: Config) -> int:
    """`main` with an exit code."""
    return exit_code("nanopersrm.train.report", lambda: main(config))


if __name__ == "__main__":
    about = __doc__.split("How it works")[0]
    sys.exit(run(tyro.cli(Config, prog="nanopersrm.train.report", description=about)))
