"""A ledger by hand: letters, the writer's side, the words behind a line and what they are worth."""

from dataclasses import replace
from typing import Any

import pytest
from fixtures import CANDIDATES, EXEMPLARS, PAIRS, WEIGHED, instrument

from nanopersrm.style.evidence import FACTOR_NAMES, FEATURES, FOLDS, NGRAMS, READING, fold_of
from nanopersrm.style.ledger import LETTERS, MENU, MOST_WORDS, Measurer, habits_of
from nanopersrm.style.profile import BY_NAME, profile

EVERY = replace(WEIGHED, weights=dict.fromkeys(FEATURES, 2.0), means=dict.fromkeys(FEATURES, 0.1))


def test_letters_are_those_that_adapters_were_trained_on():
    assert [*LETTERS] == [*FEATURES]
    assert "".join(LETTERS.values()) == "rnabcdefghijklmopqstuvwxyzABCDEFGHIJKLMNOPQRSTUV"
    assert [FACTOR_NAMES[i] for i in (0, 5, 21, -1)] == [
        "sentence_length", "semicolons", "duties", "which",
    ]  # fmt: skip
    assert (LETTERS["semicolons"], LETTERS["which"]) == ("f", "V")


def test_the_menu_is_the_writer():
    reading = instrument(len)
    menu = Measurer(WEIGHED, reading).menu(EXEMPLARS)
    assert menu == {
        READING: "reading",
        NGRAMS: "n-grams",
        "semicolons": "semicolons 6.7 (100%)",
        "questions": "question marks 0 (36%)",
        "commas": "commas 6.7 (56%)",
    }  # variety shows in no text so short
    assert [*Measurer(WEIGHED).menu(EXEMPLARS)] == [*menu][1:]
    muted = replace(WEIGHED, weights=WEIGHED.weights | {READING: 0.0, NGRAMS: 0.0, "commas": 0.0})
    assert [*Measurer(muted, reading).menu(EXEMPLARS)] == ["semicolons", "questions"]
    for pair in PAIRS[::5]:
        names = [*Measurer(EVERY, reading).menu(pair.exemplars)]
        assert names[:2] == [READING, NGRAMS]
        assert len(names) == MENU
        says = EVERY.salience({trait.factor: trait.value for trait in profile(pair.exemplars)})
        assert [says[name] for name in names[2:]] == sorted(says.values())[: -MENU + 1 : -1]


def test_a_ledger_holds_what_can_be_measured():
    """The menu first; a habit that is on no menu is measured too, and what is read."""
    exemplars, texts = PAIRS[0].exemplars, [PAIRS[0].chosen, "So; be it, then."]
    measurer = Measurer(EVERY, instrument(lambda word: 0.1))
    long, short = measurer.ledgers(exemplars, texts)
    menu = [*measurer.menu(exemplars)]
    for text, ledger in zip(texts, (long, short), strict=True):
        assert {name: line.decibans for name, line in ledger.lines.items()} == EVERY.ledger(
            exemplars, text.strip(), 0.1
        )
        on_it = [name for name in menu if name in ledger.lines]
        assert [*ledger.lines][: len(on_it)] == on_it
        assert ledger.total() == EVERY.total(exemplars, text.strip(), 0.1)
        shown = ledger.shown(on_it[:3])
        assert [line.feature for line in shown] == [*on_it[:3], "sum"]
        assert shown[-1].decibans == ledger.total(on_it[:3])
    assert len(long.lines) > MENU
    assert "variety" in long.lines
    assert "variety" not in short.lines
    bare = Measurer(EVERY).ledgers(exemplars, texts)[0]
    assert bare.reading is None
    assert bare.lines == {name: x for name, x in long.lines.items() if name != READING}


def test_what_a_phrase_is_worth():
    """Weight 40 and T = 8 tokens: a gain of 6 nats is 40 · 6 / 16 = 15 decibans. All words and the
    other direction make the line, but for what the mean text has."""
    gains = {"arrived": 4.0, "late,": 2.0, "no": -1.5, "supper.": -1.0}
    reading = instrument(lambda word: gains.get(word, 0.0), back=0.3)
    (ledger,) = Measurer(WEIGHED, reading).ledgers(EXEMPLARS, [f"\n {CANDIDATES[0]} "])
    line = ledger.lines[READING]
    assert [(words.text, words.decibans) for words in line.words] == [
        ("arrived late,", 15.0), ("no supper.", -6.2),
    ]  # fmt: skip
    assert line.candidate == pytest.approx((3.5 / 8 + 0.3) / 2, abs=1e-4)
    assert line.decibans == round(15.0 - 6.25 + 40 * 0.3 / 2 - 40 * 0.1, 1)
    assert ledger.reading is not None
    assert (ledger.reading.forward, ledger.reading.back) == (0.4375, 0.3)


def test_the_words_of_a_habit_share_its_decibans():
    few, many = "So, at noon, we left.", "a, " * (MOST_WORDS + 2)
    for text, count in ((few, 2), (many, MOST_WORDS + 2)):
        (ledger,) = Measurer(WEIGHED).ledgers(EXEMPLARS, [text])
        line = ledger.lines["commas"]
        assert len(line.words) == min(count, MOST_WORDS)
        assert {words.decibans for words in line.words} == {round(line.decibans / count, 2)}
        assert all(words.text == text[words.start : words.end] for words in line.words)
        assert not ledger.lines["semicolons"].words
    listed = "1. Bread, at last\n2. Wine, at last"
    (ledger,) = Measurer(EVERY).ledgers(EXEMPLARS, [listed])
    assert ledger.lines["digits"].candidate == 0
    assert not ledger.lines["digits"].words  # the numbers of a list are none of the text


@pytest.mark.parametrize(
    ("word", "habits"),
    [
        ("cure;", {"semicolons"}),
        ("“Don’t!”", {"exclamations", "quotes", "contractions", "negations"}),
        ("😅", {"emoji"}),
        ("—", {"dashes"}),
        ("TWO", {"capitals"}),
        ("7", {"digits"}),
        ("7)", set()),  # the number of a list
        ("-", set()),
        ("table.", set()),
    ],
)
def test_the_habits_of_a_word(word, habits):
    assert habits_of(word) == habits
    assert all(BY_NAME[name].words[0] == "no" for name in habits)


def test_blanks_before_a_candidate_move_all_places():
    reading = instrument(lambda word: 3.0 * word.startswith("s"))
    text = CANDIDATES[0]
    (ledger,) = Measurer(WEIGHED, reading).ledgers(EXEMPLARS, [text])
    moved, seen = ledger.moved(4), ledger.reading
    assert ledger.moved(0) is ledger
    assert seen is not None
    assert moved.reading is not None
    places: list[tuple[Any, Any]] = [
        (seen.words, moved.reading.words),
        (seen.phrases, moved.reading.phrases),
        *((line.words, moved.lines[name].words) for name, line in ledger.lines.items()),
    ]
    for before, after in places:
        assert [(x.start + 4, x.end + 4) for x in before] == [(x.start, x.end) for x in after]
    assert moved.total() == ledger.total()
    assert all((" " * 4 + text)[x.start : x.end] == x.text for x in moved.lines[READING].words)


def test_a_writer_that_was_trained_on_is_weighed_without():
    folds = tuple(
        replace(WEIGHED, weights={n: k * w for n, w in WEIGHED.weights.items()})
        for k in range(FOLDS)
    )
    measurer = Measurer(replace(WEIGHED, folds=folds))
    for writer, evidence in (("cole", folds[fold_of("cole")]), (None, WEIGHED)):
        (ledger,) = measurer.ledgers(EXEMPLARS, CANDIDATES[:1], writer)
        assert ledger.total() == evidence.total(EXEMPLARS, CANDIDATES[0])


def test_a_reading_that_is_no_number_gives_no_line():
    reading = instrument(lambda word: float("nan"))
    (ledger,) = Measurer(WEIGHED, reading).ledgers(EXEMPLARS, CANDIDATES[:1])
    assert ledger.reading is None
    assert READING not in ledger.lines
