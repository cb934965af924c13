"""A teacher's replies: what passes, what is repaired and how, what is dropped."""

from collections import Counter
from collections.abc import Sequence

import pytest

from data.build import demo_pairs
from nanopersrm.judge.faithful import contains
from nanopersrm.judge.verdict import OPEN, parse, write
from nanopersrm.pairs import Pair
from nanopersrm.train.facts import asked
from nanopersrm.train.replies import reply
from nanopersrm.train.teacher import (
    Prompt,
    Question,
    fault,
    joined,
    questions,
    repair,
    right,
    taught,
)


@pytest.fixture(scope="module")
def some() -> list[Pair]:
    return demo_pairs(seed=1, pairs=20)[:4]


class Scripted:
    """A model that says what it is told to, and remembers what it was asked."""

    def __init__(self, *rounds: list[str]):
        self.rounds, self.prompts = list(rounds), list[list[Prompt]]()

    def __call__(self, prompts: Sequence[Prompt], labels: int, seed: int) -> list[str]:
        self.prompts.append(list(prompts))
        drawn = self.rounds.pop(0)
        assert len(drawn) == len(prompts)
        return [joined(p.start, text) for p, text in zip(prompts, drawn, strict=True)]


def good(pair: Pair, form: str = "pointwise") -> list[str]:
    """Replies that are quoted, true and clear about the verdict."""
    texts = []
    for one, role, rng in asked(pair, form, 0):
        imitation = reply(pair, one, role, rng)
        while not imitation.quotes:
            imitation = reply(pair, one, role, rng)
        thought = parse(imitation.text, imitation.labels).reasoning
        digit = {"chosen": 8, "rejected": 2}
        of = zip(imitation.labels, imitation.candidates, strict=True)
        texts.append(write(thought, {label: digit[role] for label, role in of}))
    return texts


def question(pair: Pair, form: str = "pointwise") -> Question:
    return next(questions([pair], form, 0, True))


@pytest.mark.parametrize("form", ["pointwise", "pairwise", "both"])
def test_good_replies_are_kept_at_once(some, form):
    wanted = [good(pair, form) for pair in some]
    flat = [text for texts in wanted for text in texts]
    ones = [t for t in flat if "B=" not in t]
    rounds = [ones[:8], ones[8:]] if form == "pointwise" else [flat]
    if form == "both":  # batches of 8 questions, those with one label first
        rounds = [
            [t for t in flat[i : i + 8] if ("B=" in t) == two]
            for i in range(0, len(flat), 8)
            for two in (False, True)
        ]
    tally = Counter[str]()
    kept = list(taught(some, form, 0, True, Scripted(*[r for r in rounds if r]), tally))
    assert sorted(record["reply"] for record in kept) == sorted(flat)
    assert tally == {"first try: kept": len(flat)}
    assert not any(record["repaired"] for record in kept)


@pytest.mark.parametrize(
    ("text", "kind"),
    [
        ("no form at all", "form"),
        (write('A says "words that nobody wrote here".', {"A": 8}), "truth"),
        (write("A is fine.", {"A": 8}), "no quote"),
    ],
)
def test_faults_are_named(some, text, kind):
    asked_for = question(some[0])
    found = fault(asked_for, text)
    assert found is not None
    assert found[0] == kind


def test_short_replies_and_wrong_verdicts_are_faults(some):
    asked_for, text = question(some[0]), good(some[0])[0]
    assert fault(asked_for, text) is None
    for digit in "12345":
        found = fault(asked_for, text.replace("A=8", f"A={digit}"))
        assert found is not None
        assert found[0] == "verdict"
    words = " ".join(some[0].chosen.split()[:3]).replace('"', "")
    assert contains(some[0].chosen, words)
    found = fault(asked_for, write(f'A says "{words}".', {"A": 8}))
    assert found is not None
    assert found[0] == "short"


def test_a_repair_goes_on_before_the_fault_and_hides_the_hint(some):
    pair = next(pair for pair in some if "..." not in good(pair)[0])
    text = good(pair)[0]
    thought = parse(text, "A").reasoning
    begin = thought.split(". ")[0] + "."
    wrong = write(f'{begin} A says "words that nobody wrote". A fits.', {"A": 8})
    asked_for = question(pair)
    found = fault(asked_for, wrong)
    assert found is not None
    prompt = repair(asked_for, wrong, found[1], found[2])
    assert prompt.start == OPEN + begin
    assert "words that nobody wrote" in prompt.messages[-1]["content"]
    assert "A is by the writer" in prompt.messages[-1]["content"]
    assert "words that" not in asked_for.prompt.messages[-1]["content"]  # the prompt as it was

    rest = write(thought[len(begin) :], {"A": 8})
    model = Scripted([wrong, good(pair)[1]], [rest])
    tally = Counter[str]()
    kept = list(taught([pair], "pointwise", 0, True, model, tally))
    assert [record["repaired"] for record in kept] == [True, False]
    assert kept[0]["reply"] == text
    assert tally == {"first try: truth": 1, "after repair: kept": 1, "first try: kept": 1}
    assert [len(prompts) for prompts in model.prompts] == [2, 1]


def test_what_fails_twice_is_dropped(some):
    bad = write("Nothing here.", {"A": 5})
    tally = Counter[str]()
    model = Scripted([bad, bad], [bad, bad])
    assert list(taught(some[:1], "pointwise", 0, True, model, tally)) == []
    assert tally == {"first try: no quote": 2, "after repair: no quote": 2}


def test_right_is_strict():
    assert right({"A": 6}, {"A": "chosen"})
    assert not right({"A": 5}, {"A": "chosen"})
    assert not right({"A": 5}, {"A": "rejected"})
    assert right({"A": 3, "B": 4}, {"A": "rejected", "B": "chosen"})
    assert not right({"A": 4, "B": 4}, {"A": "rejected", "B": "chosen"})
