"""Charts: round ticks, smoothing, gaps, and drawings that stay within their frame."""

import math
import random
import re
import xml.etree.ElementTree as xml

import pytest

from nanopersrm.train.chart import (
    BOTTOM,
    LEFT,
    RIGHT,
    STRIPS,
    TOP,
    Series,
    chart,
    exact,
    label,
    smooth,
    ticks,
)


def drawing(*series: Series, **more) -> xml.Element:
    """The drawing, parsed: a figure is well-formed XML."""
    svg = xml.fromstring(chart("loss", "nats", series, **more)).find("svg")
    assert svg is not None
    return svg


def paths(svg: xml.Element) -> list[tuple[str, list[tuple[float, float]]]]:
    """(class, points) of each curve."""
    return [
        (
            path.attrib["class"],
            [
                (float(x), float(y))
                for x, y in re.findall(r"[ML]([\d.]+) ([\d.]+)", path.attrib["d"])
            ],
        )
        for path in svg.findall("path")
    ]


def curve(values, name: str = "loss", **more) -> Series:
    return Series(name, tuple(enumerate(values, 1)), **more)


@pytest.mark.parametrize(
    ("low", "high", "labels"),
    [
        (0.13, 0.48, ["0.1", "0.2", "0.3", "0.4", "0.5"]),
        (0, 2e-4, ["0", "5e-5", "1e-4", "1.5e-4", "2e-4"]),
        (0, 1500, ["0", "500", "1,000", "1,500"]),
        (-1, 1, ["-1.0", "-0.5", "0", "0.5", "1.0"]),
        (1.2e6, 4.9e6, ["1e6", "2e6", "3e6", "4e6", "5e6"]),
        (1000001, 1000004, ["1.000001e6", "1.000002e6", "1.000003e6", "1.000004e6"]),
        (-3e-9, 0, ["-3e-9", "-2e-9", "-1e-9", "0"]),
        (0, 3e29, ["0", "1e29", "2e29", "3e29"]),
    ],
)
def test_ticks_are_round(low, high, labels):
    places, step = ticks(low, high, 4)
    assert [label(place, step) for place in places] == labels
    assert places[0] <= low
    assert places[-1] >= high * (1 - 1e-9)


def test_any_range_gives_a_few_ticks():
    rng = random.Random(0)
    for _ in range(500):
        low = rng.uniform(-1, 1) * 10 ** rng.randint(-20, 20)
        high = low + 10 ** rng.uniform(-3, 3) * max(abs(low), 1e-20)
        places, step = ticks(low, high, 4)
        assert 2 <= len(places) <= 7
        assert places[0] <= low + step * 1e-5
        assert places[-1] >= high - step * 1e-5
        assert len({label(place, step) for place in places}) == len(places)


def test_the_mean_of_a_window():
    values = [1.0, 2.0, 3.0, None, 5.0, 60.0]
    assert smooth(values, 2) == (1 + 2 + 3 + 5) / 4
    assert smooth(values, 0) == 2.0  # the window ends with the curve
    assert smooth(values, 3) is None
    assert smooth([float(i % 2) for i in range(1000)], 500) == pytest.approx(0.5, abs=0.02)


def test_numbers_for_people():
    assert [exact(v) for v in (None, 1.234567, 2e-4, 123456.7, 1e12, 0.0)] == [
        "no number",
        "1.2346",
        "0.0002",
        "123,457",
        "1e+12",
        "0",
    ]


def test_a_curve_by_hand():
    """Two points from 0 to 4: from one corner of the plane to the other."""
    ((kind, line), (dots, _)) = paths(drawing(Series("loss", ((1, 0.0), (3, 4.0)))))
    assert (kind, dots) == ("line s0", "line s0 dots")
    assert line == [(LEFT, BOTTOM), (RIGHT, TOP)]


def test_noisy_curves_are_pale_under_their_mean():
    rng = random.Random(1)
    noisy = [1 + rng.random() for _ in range(200)]
    svg = drawing(curve(noisy), curve([2.0] * 200, "other", noisy=False))
    kinds = [kind for kind, _ in paths(svg)]
    assert kinds == ["line s0 pale", "line s0", "line s1"]
    (_, raw), (_, calm), _ = paths(svg)

    def spread(points):
        return max(y for _, y in points) - min(y for _, y in points)

    assert spread(calm) < 0.6 * spread(raw)


def test_a_gap_is_left_and_a_lone_point_is_seen():
    values = [1.0, 2.0, None, 3.0, None, *[4.0] * 10]
    (raw, *_) = drawing(curve(values)).findall("path")
    pieces = raw.attrib["d"].split("M")[1:]
    assert len(pieces) == 3
    assert pieces[1].endswith("h0")
    assert "nan" not in raw.attrib["d"]


@pytest.mark.parametrize(
    "values",
    [
        [1.0],
        [None],
        [None, None, 0.0],
        [0.0] * 30,
        [-5.0] * 30,
        [1e29, -1e29] * 10,
        [1e-29, -1e-29] * 10,
        [0.1 + 0.2, 0.3] * 5,
        [1e9 + i for i in range(30)],
    ],
)
@pytest.mark.parametrize("from_zero", [False, True])
def test_strange_curves_stay_in_their_frame(values, from_zero):
    svg = drawing(curve(values), from_zero=from_zero)
    for _, points in paths(svg):
        for x, y in points:
            assert LEFT <= x <= RIGHT
            assert TOP - 0.1 <= y <= BOTTOM + 0.1
    texts = [text.text or "" for text in svg.findall("text")]
    assert not re.search("nan|inf", " ".join(texts))
    assert len(texts) >= 5


def test_a_long_curve_is_short_and_keeps_its_spikes():
    values = [1.0] * 100_000
    values[54_321] = 9.0
    svg = drawing(curve(values))
    strips = svg.findall("rect")
    assert len(strips) <= STRIPS
    ((_, raw), (_, calm)) = paths(svg)
    assert len(raw) <= 2 * STRIPS
    assert len(calm) <= STRIPS
    assert min(y for _, y in raw) < min(y for _, y in calm) - 50
    assert math.isclose(
        sum(float(strip.attrib["width"]) for strip in strips), RIGHT - LEFT, abs_tol=2
    )


def test_the_pointer_finds_values():
    svg = drawing(curve([0.5, None, 2.5]), Series("other <b>", ((3, 7.0),)))
    titles = [strip.findtext("title") for strip in svg.findall("rect")]
    assert titles == [
        "step 1\nloss: 0.5",
        "step 2\nloss: no number",
        "step 3\nloss: 2.5\nother <b>: 7",
    ]


def test_title_axes_legend_and_marks():
    text = chart("speed", "tokens/s", [curve([5.0] * 9)], marks=[(4, "judge"), (99, "never")])
    for part in ("<figcaption>speed<", ">tokens/s<", ">step<", "</svg>loss 5<", "<title>judge<"):
        assert part in text
    assert "never" not in text


def test_many_curves_are_told_apart():
    many = [curve([float(i)] * 9, f"n{i}", noisy=False) for i in range(8)]
    assert len({kind for kind, _ in paths(drawing(*many))}) == 8
