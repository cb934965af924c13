"""Line charts as SVG text, to stand in an HTML page: numbers in, one <figure> out.

    5 | .
      | :-._  .                    raw points are pale, and over them goes the mean of a window:
    4 |    :`-:._                  1/25 of the points, at least 5, centred. A number that is missing
      |       :  `--.___           leaves a gap. Ticks are 1, 2 or 5 times a power of ten.
    3 +----+----+----+----
      0   100  200  300  step

What we chose: no script. A strip over each drawn step carries its values as <title>, which a
browser shows under the pointer. A curve of 100,000 steps is drawn as 300 strips: raw, each has its
lowest and highest value, so that no spike is lost. Colours are classes s0 to s5, which `STYLE`
gives for light and dark screens; more than six curves in one chart repeat them, dashed.

What we left out: logarithmic axes, zooming.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

WIDTH, HEIGHT = 440, 250  # of the drawing, in its own units; the page scales it
LEFT, RIGHT, TOP, BOTTOM = 56, 432, 22, 214  # edges of the plane
STRIPS = 300  # drawn steps at most
FEW = 8  # so many numbers need no smoothing
COLOURS = 6
STYLE = """
:root{--page:#fff;--ink:#1b1d21;--soft:#626873;--grid:#e3e5e9;--card:#f6f7f9;
--s0:#0067a5;--s1:#c94f00;--s2:#00805c;--s3:#a8437f;--s4:#7a6400;--s5:#4a55c8}
@media(prefers-color-scheme:dark){:root{--page:#14161a;--ink:#e8eaee;--soft:#9aa1ad;--grid:#2d3138;
--card:#1c1f25;--s0:#5cb8f0;--s1:#ff9a4d;--s2:#3fd0a0;--s3:#f09cc8;--s4:#e3cf4a;--s5:#a5adff}}
svg{display:block;width:100%;height:auto}
svg text{fill:var(--soft);font:12px system-ui,sans-serif}
.grid{stroke:var(--grid)}.mark{stroke:var(--soft);stroke-dasharray:2 4}
.line{fill:none;stroke-width:2;stroke-linejoin:round;stroke-linecap:round}
.pale{opacity:.3;stroke-width:1.2}.dots{stroke-width:6}.dashed{stroke-dasharray:6 4}
.strip{fill:transparent}.strip:hover{fill:var(--soft);fill-opacity:.25}
.s0{stroke:var(--s0)}.s1{stroke:var(--s1)}.s2{stroke:var(--s2)}
.s3{stroke:var(--s3)}.s4{stroke:var(--s4)}.s5{stroke:var(--s5)}
.legend{display:flex;flex-wrap:wrap;gap:.1rem 1rem;margin:.2rem 0 0;font-size:.85rem}
.legend svg{display:inline-block;width:1.4em;height:.7em;margin-right:.4em}
"""


@dataclass(frozen=True)
class Series:
    """One curve."""

    name: str
    points: tuple[tuple[int, float | None], ...]  # (step, value), steps rising; None: a gap
    noisy: bool = True  # False: nothing to smooth, as in a learning rate


@dataclass(frozen=True)
class Plane:
    """Where values lie in the drawing."""

    first: float  # step at the left edge
    last: float  # and at the right one
    low: float  # value at the lower edge
    high: float

    def across(self, x: float) -> float:
        return LEFT + (x - self.first) / (self.last - self.first) * (RIGHT - LEFT)

    def down(self, y: float) -> float:
        return BOTTOM - (y - self.low) / (self.high - self.low) * (BOTTOM - TOP)


def ticks(low: float, high: float, about: int) -> tuple[list[float], float]:
    """Round numbers from the last one at or below `low` to the first at or above `high`, and the
    distance between them: (0.13, 0.48, 4) -> [0.1, 0.2, 0.3, 0.4, 0.5], 0.1."""
    least = max((high - low) / about, abs(low) * 1e-12, abs(high) * 1e-12, 1e-300)
    power = 10.0 ** math.floor(math.log10(least))
    step = next(m * power for m in (1, 2, 5, 10) if m * power >= least * 0.999999)
    first, last = math.floor(low / step + 1e-6), math.ceil(high / step - 1e-6)
    return [i * step for i in range(first, last + 1)], step


def label(value: float, step: float) -> str:
    """A tick as text: 0, 0.25, 1,500, 2e-4 or 1.25e6, with the digits that `step` makes matter."""
    if abs(value) < step / 2:
        return "0"
    places = -math.floor(math.log10(step) + 1e-9)
    if places <= 3 and abs(value) < 1e6:
        return f"{value:,.{max(0, places)}f}"
    digits = max(0, math.floor(math.log10(abs(value)) + 1e-9) + places)
    mantissa, power = f"{value:.{digits}e}".split("e")
    return f"{mantissa.rstrip('0').rstrip('.') if '.' in mantissa else mantissa}e{int(power)}"


def exact(value: float | None) -> str:
    """A value for people to read: 5 digits."""
    if value is None:
        return "no number"
    return f"{value:,.0f}" if 1e4 <= abs(value) < 1e9 else f"{value:.5g}"


def smooth(values: Sequence[float | None], at: int) -> float | None:
    """The mean of the window around one place; None where that place, or all, is missing."""
    if values[at] is None:
        return None
    half = max(5, len(values) // 25) // 2
    near = [v for v in values[max(0, at - half) : at + half + 1] if v is not None]
    return math.fsum(near) / len(near)


def chart(
    title: str,
    unit: str,
    series: Sequence[Series],
    marks: Sequence[tuple[int, str]] = (),
    from_zero: bool = False,
) -> str:
    """A <figure>: title, drawing, legend with the last values. marks: (step, what begins there)."""
    numbers = [y for s in series for _, y in s.points if y is not None]
    steps = [x for s in series for x, _ in s.points]
    assert steps, f"{title}: expected points, got none"
    low, high = min(numbers, default=0.0), max(numbers, default=1.0)
    if from_zero:
        low, high = min(0.0, low), max(0.0, high)
    if high - low <= 1e-9 * abs(high):
        low, high = low - (abs(low) * 0.1 or 1), high + (abs(high) * 0.1 or 1)
    rows, row = ticks(low, high, 4)
    first, last = min(steps), max(steps)
    if first == last:
        first, last = first - 1, last + 1
    if 0 < first < 0.05 * last:
        first = 0  # step 1 of many: the axis may as well begin at 0
    columns, column = ticks(first, last, 5)

    plane = Plane(first, last, rows[0], rows[-1])
    across, down = plane.across, plane.down
    drawn = [f'<text x="4" y="13">{escape(unit)}</text>']
    for y in rows:
        drawn.append(f'<line class="grid" x1="{LEFT}" x2="{RIGHT}" y1="{down(y):.1f}" ')
        drawn.append(f'y2="{down(y):.1f}"/><text x="{LEFT - 6}" y="{down(y) + 4:.1f}" ')
        drawn.append(f'text-anchor="end">{label(y, row)}</text>')
    for x in columns:
        if first <= x <= last and x == round(x):
            drawn.append(f'<text x="{across(x):.1f}" y="{BOTTOM + 17}" text-anchor="middle">')
            drawn.append(f"{label(x, column)}</text>")
    drawn.append(f'<text x="{RIGHT}" y="{HEIGHT - 4}" text-anchor="end">step</text>')
    for x, what in marks:
        if first <= x <= last:
            drawn.append(f'<line class="mark" x1="{across(x):.1f}" x2="{across(x):.1f}" ')
            drawn.append(f'y1="{TOP}" y2="{BOTTOM}"><title>{escape(what)}</title></line>')
    for i, one in enumerate(series):
        drawn += _curves(one, i, plane)
    drawn += _strips(series, plane)
    legend = "".join(_key(one, i) for i, one in enumerate(series))
    return (
        f"<figure><figcaption>{escape(title)}</figcaption>"
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(title)} by step">'
        f'{"".join(drawn)}</svg><div class="legend">{legend}</div></figure>'
    )


def _chosen(count: int) -> list[range]:
    """Places 0 … count - 1 in at most STRIPS runs."""
    wide = math.ceil(count / STRIPS)
    return [range(start, min(start + wide, count)) for start in range(0, count, wide)]


def _class(i: int) -> str:
    return f"line s{i % COLOURS}{' dashed' if i >= COLOURS else ''}"


def _curves(one: Series, i: int, plane: Plane) -> list[str]:
    """The raw line, and the smoothed one where there are enough numbers."""
    values = [y for _, y in one.points]
    raw: list[tuple[int, float | None]] = []
    calm: list[tuple[int, float | None]] = []
    for run in _chosen(len(values)):
        there = [(y, k) for k in run if (y := values[k]) is not None]
        ends = {min(there)[1], max(there)[1]} if there else {run[0]}
        raw += [(k, values[k]) for k in sorted(ends)]
        middle = run[len(run) // 2]
        calm.append((middle, smooth(values, middle)))

    def line(points: list[tuple[int, float | None]], kind: str) -> str:
        pieces, pen = [], "M"
        for k, y in points:
            if y is None:
                pen = "M"
                continue
            dot = "h0" if pen == "M" else ""  # a point between two gaps is seen, too
            pieces.append(f"{pen}{plane.across(one.points[k][0]):.1f} {plane.down(y):.1f}{dot}")
            pen = "L"
        return f'<path class="{kind}" d="{"".join(pieces)}"/>' if pieces else ""

    if sum(y is not None for y in values) < FEW:
        dots = [pair for point in raw for pair in (point, (point[0], None))]  # each on its own
        return [line(raw, _class(i)), line(dots, f"line s{i % COLOURS} dots")]
    if not one.noisy:
        return [line(raw, _class(i))]
    return [line(raw, f"{_class(i)} pale"), line(calm, _class(i))]


def _strips(series: Sequence[Series], plane: Plane) -> list[str]:
    """What the pointer finds: for each drawn step the values of all curves."""
    steps = sorted({x for one in series for x, _ in one.points})
    place = [{x: k for k, (x, _) in enumerate(one.points)} for one in series]
    values = [[y for _, y in one.points] for one in series]
    found, left = [], float(LEFT)
    runs = _chosen(len(steps))
    for number, run in enumerate(runs):
        x = steps[run[len(run) // 2]]
        right = float(RIGHT)
        if number + 1 < len(runs):
            right = plane.across((steps[run[-1]] + steps[runs[number + 1][0]]) / 2)
        said = [f"step {x}"]
        for one, places, ys in zip(series, place, values, strict=True):
            if (k := places.get(x)) is not None:
                calm = one.noisy and len(ys) >= FEW
                mean = f" (mean {exact(smooth(ys, k))})" if calm else ""
                said.append(f"{one.name}: {exact(ys[k])}{mean}")
        found.append(
            f'<rect class="strip" x="{left:.2f}" y="{TOP}" width="{max(0.0, right - left):.2f}" '
            f'height="{BOTTOM - TOP}"><title>{escape(chr(10).join(said))}</title></rect>'
        )
        left = right
    return found


def _key(one: Series, i: int) -> str:
    last = next((y for _, y in reversed(one.points) if y is not None), None)
    swatch = f'<svg viewBox="0 0 20 10"><path class="{_class(i)}" d="M1 5H19"/></svg>'
    return f"<span>{swatch}{escape(one.name)} {exact(last)}</span>"
