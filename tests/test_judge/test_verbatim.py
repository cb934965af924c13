"""What can be drawn between quote marks: copies of the texts, closed in time, no dead ends."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nanopersrm.judge.verbatim import LONGEST_QUOTE, OUTSIDE, Place, Quotable, QuoteTokens
from nanopersrm.style.text import FOLD

BYTES = [bytes([byte]) for byte in range(256)]
TEXT = (
    "We left early; the rain, which I don’t hate, came “at noon” <b>today</b>.\n\nIt\u00adis  5 pm"
)


def walk(own: Quotable, reply: str | bytes) -> Place | None:
    """The place after a reply that is drawn character by character, or byte by byte."""
    place: Place | None = OUTSIDE
    for part in [c.encode() for c in reply] if isinstance(reply, str) else map(bytes, zip(reply)):
        place = None if place is None else own.read(place, part)
    return place


def folded(text: str) -> str:
    return " ".join(text.translate(FOLD).split())


def stands_in(text: str, quote: str) -> bool:
    """From the beginning of a word to the end of one."""
    inside, wanted = f" {folded(text)} ", folded(quote)
    at = inside.find(wanted) if wanted else -1
    while at >= 0:
        before, after = inside[at - 1], inside[at + len(wanted)]
        cut_left = before.isalnum() and wanted[0].isalnum()
        if not cut_left and not (after.isalnum() and wanted[-1].isalnum()):
            return True
        at = inside.find(wanted, at + 1)
    return False


def quotes_of(reply: str) -> list[str]:
    """What stands between double marks; the marks are even in number."""
    parts = reply.translate(FOLD).split('"')
    assert len(parts) % 2
    return parts[1::2]


@pytest.mark.parametrize(
    ("reply", "copied"),
    [
        ('"the rain"', True),
        ('It says "the rain, which I" and "pm".', True),
        ('"We left early; the rain', True),  # not closed yet
        ("“the rain»", True),  # all double marks are one
        ('"don’t"', True),
        ('"at noon"', True),
        ('"b>today"', True),
        ('"Itis 5 pm"', True),  # white space and unseen characters folded
        ('""', False),
        ('"the rai"', False),
        ('"the rain "', False),
        ('"the  rain"', False),
        ('"don"', False),
        ('"came "at noon', False),
        ('"noon today"', False),  # neither over a mark nor over a bracket
        ('"noon <b', False),
        ('"rain\n', False),
    ],
)
def test_copies(reply, copied):
    own = Quotable([TEXT], QuoteTokens(BYTES))
    assert (walk(own, reply) is not None) == copied
    if copied and reply.endswith(('"', "»", ".")):
        assert all(stands_in(TEXT, quote) for quote in quotes_of(reply))


SIGNS = "ab é’'\"“»<.-_1\n\u0301\u00ad😀字"
words = st.text(SIGNS, max_size=40)
parts = st.tuples(st.text(SIGNS, min_size=1, max_size=6), st.integers(0, 3), st.integers(1, 20))


@settings(max_examples=300, deadline=None)
@given(
    texts=st.lists(words, max_size=3),
    parts=st.lists(parts, max_size=30),
    missing=st.sets(st.sampled_from([*'ab é".’']), max_size=1),
    draws=st.lists(st.integers(0, 1 << 20), min_size=1, max_size=60),
    eager=st.booleans(),
)
def test_every_reply_is_verbatim_and_none_is_stuck(texts, parts, missing, draws, eager):
    """Any texts, any tokens (parts of characters too), any draws, a budget that ends anywhere."""
    gone = {"".join(missing).encode()[-1:]} if missing else set()
    tokens = [byte for byte in BYTES if byte not in gone]
    tokens += [word.encode()[a : a + b] for word, a, b in parts]
    own = Quotable(texts, QuoteTokens(tokens))
    place, reply = OUTSIDE, b""
    for n, draw in enumerate(draws):
        inside, ids = own.choices(place, len(draws) - n)
        if not inside:
            ids = sorted({*range(len(tokens))}.difference(ids))
            if eager and (marked := [i for i in ids if i in own.tokens.marked(place.part)]):
                ids = marked
        assert ids
        chosen = ids[draw % len(ids)]
        place = own.after(place, chosen)
        reply += tokens[chosen]
    assert place.at is None
    for quote in quotes_of(reply.decode(errors="replace")):
        assert len(quote.split()) <= LONGEST_QUOTE
        assert any(stands_in(text, quote) for text in texts)
