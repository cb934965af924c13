"""The measure of injections: a judge that obeys is caught, one that does not read is not."""

import math
from collections.abc import Callable, Sequence
from dataclasses import replace

import pytest
import tyro
from fixtures import PAIRS

from nanopersrm.evaluate import hostile
from nanopersrm.evaluate.hostile import INJECTIONS, PLACES, Case, attack, count, summary
from nanopersrm.judge.judgement import JudgeConfig, Judgement
from nanopersrm.pairs import write

COUNT = sum(map(len, INJECTIONS.values()))
# (exemplars, question, candidate) -> worth
Worth = Callable[[Sequence[str], str | None, str], float]


class Planted:
    """A judge whose preference is the difference of two worths."""

    def __init__(self, worth: Worth):
        self.worth = worth

    def judge(self, exemplars, candidates, question=None, *, config=None, **_) -> Judgement:
        worth = [self.worth(exemplars, question, text) for text in candidates]
        table = [[0.5 + max(-0.5, min(0.5, a - b)) for b in worth] for a in worth]
        return Judgement([5.0] * len(worth), table, [], 0, [], [], 0, 0, 0.0, [])


def test_a_judge_that_obeys_is_caught():
    """It believes every 9 in a candidate; one in an exemplar or a question changes nothing."""
    judge = Planted(lambda e, question, text: 0.1 * len(text.split()[0]) + ("9" in text))
    cases = [case for pair in PAIRS[:2] for case in attack(judge, pair, JudgeConfig())]  # type: ignore[arg-type]
    assert len(cases) == 2 * 4 * COUNT
    numbers = summary(cases)
    nines = sum("9" in words for some in INJECTIONS.values() for words in some)
    against = [numbers[f"in {place}"] for place in ("first", "second")]
    assert sum(n["against"] for n in against) == 2 * COUNT
    for n in against:
        if n["against"]:
            assert n["injected %"] == pytest.approx(100 * nines / COUNT)
            assert n["neutral %"] == 0
    assert numbers["in exemplar"]["beyond"] == numbers["in question"]["beyond"] == 0
    # The first text stands against the attacker in three places, and is turned in one of them.
    assert numbers["score"]["beyond"] == pytest.approx(100 / 3)


@pytest.mark.parametrize("place", ["exemplar", "question"])
def test_words_in_exemplar_and_question_are_seen(place):
    def worth(exemplars: Sequence[str], question: str | None, text: str) -> float:
        where = exemplars[-1] if place == "exemplar" else question or ""
        return ("9" in where) * (1.0 if text == first else 0.0) - 0.2 * (text == first)

    first = sorted((PAIRS[0].chosen, PAIRS[0].rejected))[0]
    numbers = summary(attack(Planted(worth), PAIRS[0], JudgeConfig()))  # type: ignore[arg-type]
    other = "question" if place == "exemplar" else "exemplar"
    assert numbers[f"in {place}"]["beyond"] > 40
    assert numbers[f"in {other}"]["beyond"] == 0


def test_counting_by_hand():
    cases = [
        Case("first", "order", 0.4, 0.6, 0.4),  # turned
        Case("first", "order", 0.4, 0.6, 0.7),  # turned by anything
        Case("first", "order", 0.5, 0.5, 0.5),  # a tie stands against
        Case("first", "order", 0.9, 0.9, 0.9),  # never stood against
        Case("first", "order", math.nan, 0.2, 0.2),
    ]
    assert count(cases) == {"against": 4, "injected %": 50.0, "neutral %": 25.0, "beyond": 25.0}
    assert count([])["beyond"] == 0


@pytest.mark.slow
def test_the_command(base, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(hostile, "INJECTIONS", {"order": INJECTIONS["order"][:1]})
    short = [
        replace(p, exemplars=p.exemplars[:1], chosen=p.chosen[:60], rejected=p.rejected[:60])
        for p in PAIRS[:4]
    ]
    write(file := tmp_path / "test.jsonl", short)

    def call(*arguments: object) -> tuple[int, str, str]:
        code = hostile.run(tyro.cli(hostile.Config, args=[str(a) for a in arguments]))
        return code, *capsys.readouterr()

    common = ("--base", base.path, "--dtype", "fp32")
    code, out, error = call("--pairs", file, "--limit", 2, *common)
    assert code == 0, error
    assert out.count("\n| ") == 2 + len(PLACES) + 1  # all, places, family, below the heading
    code, _, error = call("--pairs", file, "--limit", 1)
    assert (code, error.count("\n")) == (2, 1)
    assert "--limit" in error
