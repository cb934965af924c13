"""Replies to imitate: true, well formed, on the side of the label, and never twice alike."""

import random
import re
from dataclasses import replace
from pathlib import Path

import pytest

from data.build import demo_pairs
from nanopersrm.judge import verdict
from nanopersrm.judge.claims import check as faithful
from nanopersrm.pairs import Pair
from nanopersrm.style.features import COUNTED, FACTORS, measure
from nanopersrm.train.replies import ROLES, digits, evidence_of, fit, quote_of, reply
from nanopersrm.train.sft_data import stripped

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def pairs() -> list[Pair]:
    return [stripped(pair) for pair in demo_pairs(seed=3, pairs=50)]


@pytest.fixture(scope="module")
def written(pairs) -> list[tuple[Pair, str, str]]:
    return [
        (pair, role, reply(pair, role, random.Random(f"{pair.id}/{role}")))
        for pair in pairs
        for role in ROLES
    ]


def test_every_reply_is_true_and_well_formed(written):
    quotes = claims = 0
    for pair, role, text in written:
        assert verdict.parse(text, "A").problem is None
        report = faithful(text, pair.exemplars, {"A": getattr(pair, role)})
        assert report.quotes == report.quotes_true
        assert report.claims == report.claims_true >= 2
        quotes, claims = quotes + report.quotes, claims + report.claims
    assert quotes > len(written)
    assert claims > 4 * len(written)


def test_the_digit_follows_the_label(written):
    scores: dict[str, dict[str, int]] = {}
    for pair, role, text in written:
        parsed = verdict.parse(text, "A").scores
        assert parsed is not None
        scores.setdefault(pair.id, {})[role] = parsed["A"]
    assert all(of["chosen"] > of["rejected"] for of in scores.values())


def test_the_margin_follows_the_evidence():
    grid = [x / 10 for x in range(-10, 11)]
    for chosen in grid:
        for rejected in grid:
            high, low = digits(chosen, rejected)
            assert 1 <= low < high <= 9
            more, same = digits(chosen + 0.1, rejected)
            assert more - same >= high - low
    assert digits(-1, 1) == (5, 4)
    assert digits(1, -1) == (9, 1)
    assert evidence_of(0.25, 2, 2) == pytest.approx(0.832, abs=1e-3)
    assert evidence_of(0.25, 2, -1) == pytest.approx(-0.668, abs=1e-3)
    assert evidence_of(0.0, 2, -1) == 0


def test_a_pair_with_wrong_label_is_told_with_care(pairs):
    """The counts speak for the rejected text: the digits are close and the reply says so."""
    better = [fit(p.exemplars, p.chosen) > fit(p.exemplars, p.rejected) for p in pairs]
    assert sum(better) > 0.9 * len(better)
    pair = max(pairs, key=lambda p: fit(p.exemplars, p.chosen) - fit(p.exemplars, p.rejected))
    swapped = replace(pair, chosen=pair.rejected, rejected=pair.chosen)
    for role in ROLES:
        text = reply(swapped, role, random.Random(0))
        parsed = verdict.parse(text, "A").scores
        assert parsed is not None
        assert 4 <= parsed["A"] <= 6
        assert re.search(r"counts", text)


@pytest.mark.parametrize("name", [f.name for f in FACTORS if f.words == COUNTED])
def test_a_quote_shows_its_habit(name):
    rng = random.Random(name)
    for file in sorted((ROOT / "data" / "demo").glob("*/1.txt")):
        text = file.read_text(encoding="utf-8")
        quote = quote_of(name, [text], rng)
        if quote is not None:
            assert quote in text
            assert not set('"<>\n') & set(quote)
            assert measure([quote])[name], quote
