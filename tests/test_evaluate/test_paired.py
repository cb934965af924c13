"""Two judges pair by pair: worked by hand, against themselves, and as the command prints them."""

import json
from dataclasses import replace
from math import comb

import pytest
import tyro
from fixtures import PAIRS
from hypothesis import given, settings
from hypothesis import strategies as st
from test_evaluate import oracle
from test_metrics import couples, row

from nanopersrm import InputError
from nanopersrm.evaluate import evaluate, judges
from nanopersrm.evaluate.metrics import Record, Said, measure
from nanopersrm.evaluate.paired import paired, sign_test
from nanopersrm.evaluate.predictions import Opinion, from_scores
from nanopersrm.pairs import write

SAID: tuple[Said, ...] = ("right", "wrong", "tie", "invalid")
RIGHT: list[tuple[Said, Said]] = [("right", "right")]
HALF: list[tuple[Said, Said]] = [("wrong", "right")]
COUPLES = st.lists(st.tuples(st.sampled_from(SAID), st.sampled_from(SAID)), min_size=6, max_size=6)


@pytest.mark.parametrize(
    ("won", "lost", "p"),
    [(0, 0, 1), (1, 0, 1), (4, 1, 12 / 32), (8, 2, 0.109375), (16, 4, 0.01181793212890625)],
)
def test_the_sign_test_by_hand(won, lost, p):
    assert sign_test(won, lost) == sign_test(lost, won) == pytest.approx(p, abs=1e-12)


@pytest.mark.parametrize("n", range(12))
def test_the_sign_test_holds_its_level(n):
    """Of two equal judges, p is at most α with probability α at most, for every α it can take."""
    chance = [comb(n, won) / 2**n for won in range(n + 1)]
    p = [sign_test(won, n - won) for won in range(n + 1)]
    for level in p:
        assert sum(c for c, q in zip(chance, p, strict=True) if q <= level) <= level + 1e-12


def test_hand_worked():
    """Four couples: won both, won one of them, lost a couple by one pair, and both alike."""
    first = couples([("right", "right"), ("right", "right"), ("right", "tie"), ("wrong", "right")])
    other = couples(
        [("wrong", "invalid"), ("wrong", "right"), ("right", "right"), ("wrong", "right")]
    )
    found = paired(first, other)
    counted = {k: (v["won"], v["lost"], v["difference"]["value"]) for k, v in found.items()}
    assert counted == {"pairs": (3, 1, 2 / 8), "twins": (2, 1, 1 / 4)}
    assert found["pairs"]["p"] == sign_test(3, 1)
    assert found["twins"]["p"] == sign_test(2, 1)


@settings(max_examples=30, deadline=None)
@given(COUPLES, COUPLES)
def test_differences_are_those_of_the_metrics(one, other):
    """And the two ways round are opposite, interval and all."""
    first, second = couples(one), couples(other)
    found, back = paired(first, second), paired(second, first)
    for name, metric in (("pairs", "pair_accuracy"), ("twins", "twin_accuracy")):
        own, two = (measure(rows, resamples=2)[metric]["value"] for rows in (first, second))
        assert found[name]["difference"]["value"] == pytest.approx(own - two)
        assert (found[name]["won"], found[name]["lost"]) == (back[name]["lost"], back[name]["won"])
        there, again = found[name]["difference"], back[name]["difference"]
        assert there["low"] == pytest.approx(-again["high"])
        assert there["low"] <= there["value"] + 1e-12


def test_what_both_find_hard_is_not_chance():
    """Five writers are easy for both judges, five hard; the first wins a couple in four of each."""

    def rows(fourth: Said) -> list[Record]:
        alike: tuple[Said, Said] = ("right", "wrong")
        said = [fourth if k == 3 else alike[a < 5] for a in range(10) for k in range(4)]
        made = [(f"{k}", f"author {k // 4}", s) for k, s in enumerate(said)]
        both = [(f"{k}{x}", f"{k}{y}", a, s) for k, a, s in made for x, y in ("ab", "ba")]
        return [row(name, s, twin, author) for name, twin, author, s in both]

    first, other = rows("right"), rows("wrong")
    own, two = (measure(some)["twin_accuracy"] for some in (first, other))
    assert own["low"] < two["high"]
    found = paired(first, other)["twins"]
    assert (found["won"], found["lost"], found["p"]) == (10, 0, 2 / 2**10)
    assert found["difference"] == pytest.approx({"value": 0.25, "low": 0.25, "high": 0.25})


def test_a_judge_against_itself():
    rows = couples([("right", "wrong"), ("tie", "right"), ("right", "right")])
    for own in paired(rows, rows).values():
        nothing = {"value": 0, "low": 0, "high": 0}
        assert own == {"won": 0, "lost": 0, "p": 1, "difference": nothing}


def test_without_twins():
    found = paired([row("a", "right"), row("b", "wrong")], [row("a", "tie"), row("b", "wrong")])
    assert (found["pairs"]["won"], found["pairs"]["lost"]) == (1, 0)
    nothing = {"value": None, "low": None, "high": None}
    assert found["twins"] == {"won": 0, "lost": 0, "p": None, "difference": nothing}
    away = [row("a", "right", twin="z"), row("b", "wrong", twin="a")]  # named, not judged
    assert paired(away, away)["twins"]["difference"] == nothing


def test_a_couple_of_two_authors_is_drawn_once():
    """The interval of the couples is that of the pairs that they are counted with."""
    names = "abcdefgh"
    first, other = couples(RIGHT * 3 + HALF * 5), couples(HALF * 4 + RIGHT * 4)
    for rows in (first, other):
        for i, one in enumerate(rows):
            rows[i] = replace(one, author=names[i // 2] if i % 2 == 0 else names[(i // 2 + 3) % 8])
    found = paired(first, other, seed=2)["twins"]["difference"]
    singles = [r for r in first if r.id.endswith("a")], [r for r in other if r.id.endswith("a")]
    assert found == paired(*singles, seed=2)["pairs"]["difference"]  # the second is always right
    few = [paired(first, other, seed, 5)["twins"]["difference"]["low"] for seed in range(8)]
    assert len(set(few)) > 1  # the draw is the seed's, and so many as asked for


def test_the_sign_test_of_thousands():
    assert sign_test(5200, 4800) == pytest.approx(6.57e-5, rel=0.01)  # z = 3.99
    assert sign_test(5000, 5000) == 1
    assert sign_test(3000, 0) == 0  # below the smallest number


def test_other_pairs_are_refused():
    with pytest.raises(ValueError, match="same pairs in the same order"):
        paired([row("a", "right"), row("b", "right")], [row("b", "right"), row("a", "right")])


def test_another_number_of_samples_is_not_a_name():
    with pytest.raises(InputError, match="'model x4' is the name of another judge"):
        evaluate.further(["model x4=folder"])


def test_the_command_says_it(tmp_path, monkeypatch, capsys):
    """The oracle against one that says the opposite."""

    def never(exemplars, question, candidates) -> Opinion:
        return from_scores([-score for score in oracle(exemplars, candidates).scores or ()])

    def made(name, kit):
        if name == "ngrams":
            return judges.Named(name, never, {"judge": name}, "planted")
        return judges.Named(name, lambda e, q, c: oracle(e, c), {"judge": name}, "planted")

    monkeypatch.setattr(evaluate, "make", made)
    write(tmp_path / "pairs.jsonl", PAIRS)
    arguments = ["--pairs", str(tmp_path / "pairs.jsonl"), "--no-neutral", "--judges"]
    out = str(tmp_path / "r.json")
    config = tyro.cli(evaluate.Config, args=[*arguments, "model,ngrams", "--out", out])
    assert evaluate.run(config) == 0
    said = capsys.readouterr().out
    head, _, line, empty, note = said[said.index("| model against ") :].splitlines()[:5]
    cells = [[cell.strip() for cell in one.strip("| ").split("|")] for one in (head, line)]
    points = ["100.0 [100.0, 100.0]"]
    kinds = [[f"{kind} won / lost", "p", "points"] for kind in ("pairs", "twins")]
    assert cells[0] == ["model against", *kinds[0], *kinds[1]]
    assert cells[1] == ["ngrams", "20 / 0", "< 0.001", *points, "10 / 0", "0.002", *points]
    assert (empty, note.split(":")[0]) == ("", "won")
    found = json.loads((tmp_path / "r.json").read_text())["against"]
    assert list(found) == ["ngrams"]
    assert found["ngrams"]["pairs"]["p"] == sign_test(20, 0)
    assert evaluate.run(tyro.cli(evaluate.Config, args=[*arguments, "ngrams"])) == 0
    assert "against" not in capsys.readouterr().out
