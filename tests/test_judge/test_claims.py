"""The checker of replies: what counts, whom it speaks of, and that nothing can fool or stop it."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nanopersrm.judge.claims import EVERY, LONGEST_QUOTE, WRITER, Report, check, contains
from nanopersrm.judge.verdict import write

WRITER_TEXT = (
    "I came; I saw; I left. The road was long; the night was short; nobody asked why. "
    "I kept the lamp; it kept me."
)
A = "Don't wait! We're going now! It's late, and I can't stay! You'd love it! Isn't it fun?"
B = (
    "The committee, which had deliberated at considerable length, determined that the application "
    "should be rejected because the documentation accompanying it was manifestly incomplete, "
    "and that no further hearing of the matter could be of any use to the persons concerned."
)
TWO = {"A": A, "B": B}


def read(reasoning: str, candidates: dict[str, str] | None = None) -> Report:
    return check(write(reasoning, {"A": 5}), [WRITER_TEXT], candidates or TWO)


@pytest.mark.parametrize(
    ("sentence", "subject", "factor", "said", "holds"),
    [
        ("The writer has many semicolons.", WRITER, "semicolons", "many", True),
        ("A has many exclamation marks.", "A", "exclamations", "many", True),
        ("B has long sentences, about 47 words.", "B", "sentence_length", "long", False),
        ("B has long sentences, about 40 words.", "B", "sentence_length", "long", True),
        ("A has many contractions (7 per 100 words).", "A", "contractions", "many", False),
        ("A has fewer semicolons than the writer.", "A", "semicolons", "less", True),
        ("Both candidates have no semicolons.", EVERY, "semicolons", "no", True),
        ("Unlike the writer, A has no semicolons.", "A", "semicolons", "no", True),
        ("The writer writes; no semicolons in A.", "A", "semicolons", "no", True),
        ("A does not have many contractions.", "A", "contractions", "many", False),
        ("A lacks many semicolons.", "A", "semicolons", "many", True),
        ("A does not lack many contractions.", "A", "contractions", "many", True),
        ("No more semicolons than the writer appear in A.", "A", "semicolons", "more", True),
        ("A has no fewer semicolons than the writer.", "A", "semicolons", "less", False),
    ],
)
def test_a_claim_is_recomputed(sentence, subject, factor, said, holds):
    report = read(sentence)
    assert [(c.subject, c.factor, c.said, c.holds) for c in report.found_claims] == [
        (subject, factor, said, holds)
    ]
    assert (report.claims, report.claims_true) == (1, int(holds))


@pytest.mark.parametrize(
    ("sentence", "claims"),
    [
        ("Many semicolons in the writer, none in A.", [(WRITER, "many", True), ("A", "no", True)]),
        ("A stately voice, rich and slow, many dark turns.", []),
        ('The writer says "many semicolons".', []),
        ("Many semicolons.", []),  # whose?
    ],
)
def test_short_forms_and_free_wording(sentence, claims):
    assert [(c.subject, c.said, c.holds) for c in read(sentence).found_claims] == claims


def test_percentiles_are_recomputed():
    near = [check(f"A is at n-grams {percent}%.", [A], {"A": A}) for percent in (0, 100)]
    assert [report.claims_true for report in near] == [0, 1]
    both = read("A is closer than 101% of strangers by n-grams and 102% by factors.")
    expected = [("n-grams", "101%", False), ("factors", "102%", False)]
    assert [(c.factor, c.said, c.holds) for c in both.found_claims] == expected


@pytest.mark.parametrize(
    ("sentence", "true", "placed"),
    [
        ('The writer: "I came; I saw".', 1, 1),
        ('A shows "I came; I saw".', 1, 0),
        ("A shows “Don’t wait!”.", 1, 1),
        ('A shows "don\'t wait!".', 0, 0),
        (f'B: "{B}".', 0, 0),
        ("A shows \"Don't wait", 0, 0),
    ],
)
def test_quotes(sentence, true, placed):
    report = read(sentence)
    assert (report.quotes, report.quotes_true) == (1, true)
    assert sum(quote.placed for quote in report.found_quotes) == placed


def test_white_space_is_folded_and_words_are_whole():
    assert contains("the long\n   road", "long road")
    assert not contains("the long road", "ong road")
    assert contains("a cat, a catalogue", "catalogue")
    assert not contains("a catalogue", "cat")
    assert contains("word " * 30, " ".join(["word"] * LONGEST_QUOTE))
    assert not contains("word " * 30, " ".join(["word"] * (LONGEST_QUOTE + 1)))


@given(st.text(alphabet='AB "\n.;<>()%0123456789no manyfewtherisgcld-', max_size=300))
@settings(max_examples=150, deadline=None)
def test_any_text_gives_a_report(text: str):
    report = check(text, [WRITER_TEXT], TWO)
    assert 0 <= report.quotes_true <= report.quotes
    assert 0 <= report.claims_true <= report.claims
