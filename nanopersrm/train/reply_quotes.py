"""Quoting: a few words of a text that show a habit, cut out exactly as they stand there.

    show("semicolons", "I came; I saw. He left.", rng)    ->    "I came; I saw."

How it works. The text is cut into tokens with their places, and the tokens into sentences. A window
of words slides over each sentence in random order; the first one in which the factor itself counts
something is a hit. It is made as narrow as the hit allows, then grows by a word or two on either
side. So what is quoted shows its habit by the same measurement that the reply speaks of.

What we chose. 2 to 9 words, inside one line and one sentence, without a double quote (the reply
could not close it) and without angle brackets (the reply's own tags). Commas at the ends fall away.

What we left out. What is absent cannot be shown, nor can long sentences, variety or unevenness in
nine words: then there is no quote, and `show` gives None.
"""

import random
import re
from collections.abc import Iterator
from functools import lru_cache

from nanopersrm.judge.claims import contains
from nanopersrm.style.features import COUNTED
from nanopersrm.style.profile import BY_NAME
from nanopersrm.style.text import BULLET, FOLD, read, sentences

LEAST, MOST = 2, 9  # words of a quote
WINDOW = 6  # words looked at together
SHORT_WORD, TERSE = 4, 7  # letters and words of what shows short words, short sentences
LONGEST_TEXT = 6000  # characters that are looked at
UNSHOWN = frozenset({"quotes", "paragraphs", "sentence_spread", "variety", "opening_variety"})
AT_THE_START = frozenset({"conjunction_openings", "pronoun_openings", "lowercase_starts"})
TOKEN = re.compile(r"\S+")
FORBIDDEN = re.compile(r'["<>\n\r]')
Span = tuple[int, int]


@lru_cache(maxsize=64)
def _sentences(text: str) -> tuple[tuple[Span, ...], ...]:
    """The places of the tokens of each sentence; a sentence may run over a line's end."""
    text, places_of, at = text[:LONGEST_TEXT], [], 0
    for block in re.split(r"(\n\s*\n)", text):
        places = [(at + m.start(), at + m.end()) for m in TOKEN.finditer(block)]
        at += len(block)
        first = 0
        for sentence in sentences(block):
            count = len(sentence.split())
            places_of.append(tuple(places[first : first + count]))
            first += count
    return tuple(places_of)


def _usable(text: str, span: Span) -> bool:
    quote = text[span[0] : span[1]]
    return not FORBIDDEN.search(quote.translate(FOLD)) and contains(text, quote)


def _trim(text: str, span: Span, keep: str) -> Span:
    """Without what hangs over at the ends: commas and such, brackets that are not closed."""
    start, end = span
    while (
        end > start
        and text[end - 1] not in keep
        and (text[end - 1] in ",:;-–—(" or (text[end - 1] == "." and text[end - 2] != "."))
    ):
        end -= 1
        while end > start and text[end - 1].isspace():
            end -= 1
    while start < end and text[start] in ")'-–—,.;:" and text[start] not in keep:
        start += 1
        while start < end and text[start].isspace():
            start += 1
    return start, end


def _windows(spans: tuple[Span, ...], rng: random.Random, start_only: bool) -> Iterator[Span]:
    """Indices (first, after last) of windows that cover the sentence, in random order."""
    if len(spans) < LEAST:
        return
    if start_only or len(spans) <= WINDOW:
        yield 0, min(WINDOW, len(spans))
        return
    step = WINDOW - 2
    begins = [*range(0, len(spans) - WINDOW, step), len(spans) - WINDOW]
    rng.shuffle(begins)
    for begin in begins:
        yield begin, begin + WINDOW


def show(name: str, text: str, rng: random.Random, high: bool = True) -> str | None:
    """A quote that shows the factor, or None. `high`: much of it, else little of it.

    Of a habit that can be absent only its presence can be shown; of word length and sentence length
    both ends.
    """
    factor = BY_NAME[name]
    if name in UNSHOWN or (factor.words == COUNTED and not high):
        return None
    if name == "list_lines":
        return _list_line(text, rng)
    if name in ("sentence_length", "short_sentences"):
        wanted = high is (name == "short_sentences")
        return _whole_sentence(name, text, rng) if wanted else None
    if name == "word_length":
        return show("long_words", text, rng) if high else _short_words(text, rng)
    order = list(_sentences(text))
    rng.shuffle(order)
    for spans in order:
        if len(spans) > 2 * WINDOW and not _counts(name, text[spans[0][0] : spans[-1][1]], high):
            continue  # one look instead of many
        for first, last in _windows(spans, rng, name in AT_THE_START):
            quote = _grown(name, text, spans, first, last, rng, high)
            if quote is not None:
                return quote
    return None


def _counts(name: str, quote: str, high: bool) -> bool:
    value = BY_NAME[name].measure(read([quote]))
    if name == "british":
        return value == (100.0 if high else 0.0)
    return bool(value)


def _grown(
    name: str,
    text: str,
    spans: tuple[Span, ...],
    first: int,
    last: int,
    rng: random.Random,
    high: bool,
) -> str | None:
    """The hit inside a window, made narrow and then grown a little; None where there is no hit."""

    def of(a: int, b: int) -> str:
        return text[spans[a][0] : spans[b - 1][1]]

    if not _counts(name, of(first, last), high):
        return None
    bound = name in AT_THE_START
    while last - first > 1 and _counts(name, of(first, last - 1), high):
        last -= 1
    while not bound and last - first > 1 and _counts(name, of(first + 1, last), high):
        first += 1
    before, after = rng.randint(0, 3), rng.randint(0, 3)
    if name in ("semicolons", "colons", "dashes", "commas", "ellipses", "brackets", "and", "but"):
        before, after = rng.randint(2, 3), rng.randint(2, 4)  # a mark stands between two parts
    if bound:
        before, after = 0, rng.randint(2, 4)
    begin, end = max(0, first - before), min(len(spans), last + after)
    while end - begin < LEAST and (end < len(spans) or begin > 0):
        begin, end = (begin, end + 1) if end < len(spans) else (begin - 1, end)
    for a, b in ((begin, end), (first, end), (begin, last), (first, last)):
        if not LEAST <= b - a <= MOST:
            continue
        keep = {"dashes": "-–—", "brackets": "(", "lowercase_starts": "'", "ellipses": "."}.get(
            name, ""
        )
        keep = {"semicolons": ";", "colons": ":", "commas": ","}.get(name, keep)
        span = _trim(text, (spans[a][0], spans[b - 1][1]), keep)
        quote = text[span[0] : span[1]]
        whole = LEAST <= len(quote.split()) <= MOST
        if whole and _counts(name, quote, high) and _usable(text, span):
            return quote
    return None


def _list_line(text: str, rng: random.Random) -> str | None:
    lines = [line for line in text[:LONGEST_TEXT].splitlines() if BULLET.match(line)]
    rng.shuffle(lines)
    for line in lines:
        match = BULLET.match(line)
        assert match
        quote = " ".join(line[match.end() :].split(" ")[:MOST]).strip()
        if len(quote.split()) >= LEAST and _usable(quote, (0, len(quote))):
            return quote
    return None


def _whole_sentence(name: str, text: str, rng: random.Random) -> str | None:
    """A sentence of 2 to 7 words, of at most 5 where very short ones are shown."""
    order = [spans for spans in _sentences(text) if LEAST <= len(spans) <= TERSE]
    rng.shuffle(order)
    order.sort(key=lambda spans: len(spans) > 5)
    for spans in order:
        quote = text[spans[0][0] : spans[-1][1]]
        if name == "short_sentences" and not _counts(name, quote, True):
            continue
        if _usable(text, (spans[0][0], spans[-1][1])):
            return quote
    return None


def _short_words(text: str, rng: random.Random) -> str | None:
    """Some words in a row, none of them long."""
    order = list(_sentences(text))
    rng.shuffle(order)
    for spans in order:
        row: list[Span] = []
        for span in spans:
            short = len(text[span[0] : span[1]].strip(".,;:!?()'")) <= SHORT_WORD
            row = [*row, span] if short else []
            if len(row) == WINDOW:
                place = _trim(text, (row[0][0], row[-1][1]), "")
                if _usable(text, place):
                    return text[place[0] : place[1]]
    return None
