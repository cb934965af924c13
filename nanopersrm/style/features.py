"""Features: what can be measured about how a person writes.

A *feature* (here called a factor) is one habit of writing that can be counted without understanding
the text. `text.read` cuts the texts of one writer; each factor is a small function from the cut
text to a number, or to None where the text cannot show the habit:

    measure(["I came; I saw. Did you?"])["sentence_length"]   # 6 words in 2 sentences: 3.0
    measure(["I came; I saw. Did you?"])["semicolons"]        # 1 in 6 words: 16.67 per 100 words

Several texts are pooled before counting. Most counts are rates per 100 words, which do not grow
with the length of the text; variety of words is a moving window (MATTR, Covington and McFall 2010).

To add one: a `Factor` at the end of FACTORS, its words in `lexicon.json`, a worked example in
tests/test_style/test_features.py, and the reference table built anew (`reference.py`), without
which a profile has nothing to compare with. That needs the corpora, and an adapter that was trained
on the old prompts needs training again.

What we left out: a tagger and a parser. Passives, adverbs and subordinate clauses are counted by
their usual words and endings. The lists are English; texts in other languages get numbers, never an
error, but the numbers mean little.
"""

import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from nanopersrm.style.lexicon import AMERICAN, BRITISH, ENDINGS, HEDGE_PHRASES, LISTS, PRONOUNS
from nanopersrm.style.text import COLON, COMMA, DASH, ELLIPSIS, Text, read

WINDOW = 40  # words in the moving window of `variety`; short enough for a text of 60 words
SHORT = 5  # a sentence of at most so many words is short
LONG = 8  # a word of at least so many letters is long

PER_100 = "per 100 words"
SENTENCE_SHARE = "% of sentences"
COUNTED = ("no", "few", "some", "many")  # level words of a habit that can be absent


@dataclass(frozen=True)
class Factor:
    """One measurable habit.

    `words` name its levels: (none, low, middle, high) for a habit that can be absent, else (low,
    middle, high). A word is read before `noun`: "many" "semicolons", "long" "sentences".
    """

    name: str
    label: str
    unit: str
    measure: Callable[[Text], float | None]
    words: tuple[str, ...] = COUNTED
    noun: str = ""


def _per_100(count: float, text: Text) -> float | None:
    return 100.0 * count / text.size if text.size else None


def _share(hits: int, total: int) -> float | None:
    return 100.0 * hits / total if total else None


def _words(words: Iterable[str]) -> Callable[[Text], float | None]:
    """Rate of the words of a list."""
    return lambda text: _per_100(sum(text.counts[word] for word in words), text)


def _marks(mark: str | re.Pattern[str], weight: float = 1) -> Callable[[Text], float | None]:
    """Rate of a mark."""
    pattern = re.compile(re.escape(mark)) if isinstance(mark, str) else mark
    return lambda text: _per_100(weight * sum(1 for _ in pattern.finditer(text.flat)), text)


def _matching(test: Callable[[str], object]) -> Callable[[Text], float | None]:
    """Rate of the words that pass a test; each different word is tested once."""
    return lambda text: _per_100(sum(n for word, n in text.counts.items() if test(word)), text)


def _opening(words: frozenset[str]) -> Callable[[Text], float | None]:
    """Share of sentences whose first word is in a list."""
    return lambda text: _share(sum(w.lower() in words for w in text.starts), len(text.starts))


def _sentence_length(text: Text) -> float | None:
    return text.size / len(text.lengths) if text.lengths else None


def _sentence_spread(text: Text) -> float | None:
    """Standard deviation over mean, in %; unlike the deviation it does not follow the mean."""
    n = len(text.lengths)
    if n < 3:
        return None
    mean = text.size / n
    variance = sum((length - mean) ** 2 for length in text.lengths) / (n - 1)
    return float(100.0 * variance**0.5 / mean)


def _clauses(text: Text) -> float | None:
    if not text.lengths:
        return None
    return sum(text.counts[word] for word in LISTS["subordinators"]) / len(text.lengths)


def _variety(text: Text) -> float | None:
    """Mean share of different words in every window of WINDOW words of each text, in %."""
    different = windows = 0
    for run in text.runs:
        for start in range(len(run) - WINDOW + 1):
            different += len({*run[start : start + WINDOW]})
            windows += 1
    return _share(different, windows * WINDOW)


def _opening_variety(text: Text) -> float | None:
    """Chance in % that two sentences open differently; no drift with the number of sentences."""
    n = len(text.starts)
    if n < 3:
        return None
    alike = sum(k * (k - 1) for k in Counter(word.lower() for word in text.starts).values())
    return 100.0 * (1.0 - alike / (n * (n - 1)))


def _word_length(text: Text) -> float | None:
    return sum(len(word) * n for word, n in text.counts.items()) / text.size if text.size else None


def _hedges(text: Text) -> float | None:
    phrases = sum(1 for _ in HEDGE_PHRASES.finditer(text.flat.lower()))
    return _per_100(phrases + sum(text.counts[word] for word in LISTS["hedges"]), text)


def _british(text: Text) -> float | None:
    """British among the words that have two spellings, in %; None where there is no such word."""
    british = sum(n for word, n in text.counts.items() if BRITISH.fullmatch(word))
    american = sum(n for word, n in text.counts.items() if AMERICAN.fullmatch(word))
    return _share(british, british + american)


def _passives(text: Text) -> float | None:
    """A form of "be", at most one -ly word, then a participle."""
    hits = 0
    for run in text.runs:
        waiting = False
        for word in run:
            if waiting and (
                word in LISTS["participles"] or (len(word) > 4 and word.endswith("ed"))
            ):
                hits += 1
            waiting = word in LISTS["be_forms"] or (waiting and word.endswith("ly"))
    return _per_100(hits, text)


CONTRACTIONS = LISTS["bare_contractions"] | LISTS["is_contractions"]


def _contracted(word: str) -> bool:
    return word in CONTRACTIONS or word.endswith(ENDINGS["contracted"])


def _adverb(word: str) -> bool:
    return len(word) > 4 and word.endswith("ly") and word not in LISTS["not_adverbs"]


SHAPE = ("short", "medium", "long")
SPELLING = ("American", "mixed", "British")
VARIETY = ("repetitive", "mixed", "varied")
FACTORS: tuple[Factor, ...] = (
    # sentences
    Factor("sentence_length", "sentence length", "words", _sentence_length, SHAPE, "sentences"),
    Factor(
        "sentence_spread",
        "sentence length spread",
        "% of the mean",
        _sentence_spread,
        ("even", "mixed", "uneven"),
        "sentence lengths",
    ),
    Factor(
        "short_sentences",
        "very short sentences",
        SENTENCE_SHARE,
        lambda t: _share(sum(n <= SHORT for n in t.lengths), len(t.lengths)),
    ),
    Factor("clauses", "subordinate clauses", "per sentence", _clauses),
    Factor("commas", "commas", PER_100, _marks(COMMA)),
    # marks
    Factor("semicolons", "semicolons", PER_100, _marks(";")),
    Factor("colons", "colons", PER_100, _marks(COLON)),
    Factor("dashes", "dashes", PER_100, _marks(DASH)),
    Factor("exclamations", "exclamation marks", PER_100, _marks("!")),
    Factor("questions", "question marks", PER_100, _marks("?")),
    Factor("ellipses", "ellipses", PER_100, _marks(ELLIPSIS)),
    Factor("brackets", "brackets", PER_100, _marks("(")),
    Factor("quotes", "quoted phrases", PER_100, _marks('"', 0.5)),
    # the writer, the reader, the others
    Factor("contractions", "contractions", PER_100, _matching(_contracted)),
    Factor("first_person", "first person", PER_100, _words(LISTS["i_words"]), noun="I-words"),
    Factor("we", "we-words", PER_100, _words(LISTS["we_words"]), noun="we-words"),
    Factor("second_person", "second person", PER_100, _words(LISTS["you_words"]), noun="you-words"),
    Factor("third_person", "third person", PER_100, _words(LISTS["they_words"]), noun="they-words"),
    # attitude
    Factor("hedges", "hedges", PER_100, _hedges),
    Factor("boosters", "boosters", PER_100, _words(LISTS["boosters"])),
    Factor(
        "negations",
        "negations",
        PER_100,
        _matching(lambda w: w in LISTS["negations"] or w.endswith("n't")),
    ),
    Factor("duties", "words of duty", PER_100, _words(LISTS["duties"])),
    Factor("informal", "informal words", PER_100, _words(LISTS["informal"])),
    # words
    Factor("word_length", "word length", "letters", _word_length, SHAPE, "words"),
    Factor("long_words", "long words", PER_100, _matching(lambda w: len(w) >= LONG)),
    Factor(
        "latinate",
        "Latinate words",
        PER_100,
        _matching(lambda w: len(w) > 5 and w.endswith(ENDINGS["latinate"])),
    ),
    Factor("adverbs", "-ly adverbs", PER_100, _matching(_adverb)),
    Factor("variety", "word variety", "% different", _variety, VARIETY, "wording"),
    Factor("british", "British spelling", "% British", _british, SPELLING, "spelling"),
    Factor("digits", "numbers in digits", PER_100, _matching(lambda w: any(map(str.isdigit, w)))),
    # openings of sentences
    Factor(
        "conjunction_openings",
        "openings with and, but, so",
        SENTENCE_SHARE,
        _opening(LISTS["conjunctions"]),
    ),
    Factor("pronoun_openings", "openings with a pronoun", SENTENCE_SHARE, _opening(PRONOUNS)),
    Factor(
        "opening_variety",
        "variety of openings",
        "% differ",
        _opening_variety,
        VARIETY,
        "sentence openings",
    ),
    # layout and casing
    Factor("paragraphs", "paragraph breaks", PER_100, lambda t: _per_100(t.breaks, t)),
    Factor("list_lines", "list lines", PER_100, lambda t: _per_100(t.items, t)),
    Factor(
        "lowercase_starts",
        "lower-case sentence starts",
        SENTENCE_SHARE,
        lambda t: _share(sum(w[0].islower() for w in t.starts), len(t.starts)),
    ),
    Factor("capitals", "words in capitals", PER_100, lambda t: _per_100(t.capitals, t)),
    Factor("emoji", "emoji and smileys", PER_100, lambda t: _per_100(t.emoji, t)),
    # small words
    Factor("be", "forms of be", PER_100, _words(LISTS["be_forms"])),
    Factor("passives", "passives", PER_100, _passives),
    *(
        Factor(word, f"uses of '{word}'", PER_100, _words((word,)))
        for word in ("the", "of", "and", "but", "that", "which")
    ),
)


def measure(texts: Sequence[str]) -> dict[str, float | None]:
    """Every factor by name over texts of one writer, pooled; never raises, whatever the text."""
    text = read(texts)
    return {factor.name: factor.measure(text) for factor in FACTORS}
