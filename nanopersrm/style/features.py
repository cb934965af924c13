"""Features: what can be measured about how a person writes.

A *feature* (here called a factor) is one habit of writing that can be counted without understanding
the text: how long the sentences are, how often a semicolon comes, whether the writer says "I" or
"we". `text.read` cuts the texts of one writer; each factor is a small function from the cut text to
a number, or to None where the text cannot show the habit:

    measure(["I came; I saw. Did you?"])["sentence_length"]   # 6 words in 2 sentences: 3.0
    measure(["I came; I saw. Did you?"])["semicolons"]        # 1 in 6 words: 16.67 per 100 words

Several texts are pooled before counting. Most counts are rates per 100 words, which do not grow
with the length of the text; variety of words is a moving window (MATTR, Covington and McFall 2010),
variety of openings the chance that two sentences open with different words.

What we left out: a tagger and a parser. Passives, adverbs and subordinate clauses are counted by
their usual words and endings. The lists are English; texts in other languages get numbers, never an
error, but the numbers mean little.
"""

import re
from collections import Counter, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from nanopersrm.style import lexicon as lex
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


def _words(words: frozenset[str]) -> Callable[[Text], float | None]:
    """Rate of the words of a list."""
    return lambda text: _per_100(sum(text.counts[word] for word in words), text)


def _marks(count: Callable[[str], float]) -> Callable[[Text], float | None]:
    """Rate of something counted on the characters."""
    return lambda text: _per_100(count(text.flat), text)


def _matching(test: Callable[[str], object]) -> Callable[[Text], float | None]:
    """Rate of the words that pass a test; each different word is tested once."""
    return lambda text: _per_100(sum(n for word, n in text.counts.items() if test(word)), text)


def _opening(words: frozenset[str]) -> Callable[[Text], float | None]:
    """Share of sentences whose first word is in a list."""
    return lambda text: _share(sum(w.lower() in words for w in text.starts), len(text.starts))


def _pattern(pattern: re.Pattern[str]) -> Callable[[str], float]:
    return lambda flat: sum(1 for _ in pattern.finditer(flat))


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
    return sum(text.counts[word] for word in lex.SUBORDINATORS) / len(text.lengths)


def _variety(text: Text) -> float | None:
    """Mean share of different words in every window of WINDOW words of each text, in %."""
    different = windows = 0
    for run in text.runs:
        seen: Counter[str] = Counter()
        window: deque[str] = deque()
        for word in run:
            window.append(word)
            seen[word] += 1
            if len(window) > WINDOW:
                left = window.popleft()
                seen[left] -= 1
                if not seen[left]:
                    del seen[left]
            if len(window) == WINDOW:
                different += len(seen)
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
    phrases = sum(1 for _ in lex.HEDGE_PHRASES.finditer(text.flat.lower()))
    return _per_100(phrases + sum(text.counts[word] for word in lex.HEDGES), text)


def _british(text: Text) -> float | None:
    """British among the words that have two spellings, in %; None where there is no such word."""
    british = sum(n for word, n in text.counts.items() if lex.BRITISH.fullmatch(word))
    american = sum(n for word, n in text.counts.items() if lex.AMERICAN.fullmatch(word))
    return _share(british, british + american)


def _passives(text: Text) -> float | None:
    """A form of "be", at most one -ly word, then a participle."""
    hits = 0
    for run in text.runs:
        waiting = False
        for word in run:
            if waiting and (word in lex.PARTICIPLES or (len(word) > 4 and word.endswith("ed"))):
                hits += 1
            waiting = word in lex.BE_FORMS or (waiting and word.endswith("ly"))
    return _per_100(hits, text)


def _contracted(word: str) -> bool:
    return (
        word in lex.BARE_CONTRACTIONS
        or word in lex.IS_CONTRACTIONS
        or word.endswith(lex.CONTRACTED)
    )


def _adverb(word: str) -> bool:
    return len(word) > 4 and word.endswith("ly") and word not in lex.NOT_ADVERBS


def _latinate(word: str) -> bool:
    return len(word) > 5 and word.endswith(lex.LATINATE)


SHAPE = ("short", "medium", "long")
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
    Factor("commas", "commas", PER_100, _marks(_pattern(COMMA))),
    # marks
    Factor("semicolons", "semicolons", PER_100, _marks(lambda s: s.count(";"))),
    Factor("colons", "colons", PER_100, _marks(_pattern(COLON))),
    Factor("dashes", "dashes", PER_100, _marks(_pattern(DASH))),
    Factor("exclamations", "exclamation marks", PER_100, _marks(lambda s: s.count("!"))),
    Factor("questions", "question marks", PER_100, _marks(lambda s: s.count("?"))),
    Factor("ellipses", "ellipses", PER_100, _marks(_pattern(ELLIPSIS))),
    Factor("brackets", "brackets", PER_100, _marks(lambda s: s.count("("))),
    Factor("quotes", "quoted phrases", PER_100, _marks(lambda s: s.count('"') / 2)),
    # the writer, the reader, the others
    Factor("contractions", "contractions", PER_100, _matching(_contracted)),
    Factor("first_person", "first person", PER_100, _words(lex.I_WORDS), noun="I-words"),
    Factor("we", "we-words", PER_100, _words(lex.WE_WORDS), noun="we-words"),
    Factor("second_person", "second person", PER_100, _words(lex.YOU_WORDS), noun="you-words"),
    Factor("third_person", "third person", PER_100, _words(lex.THEY_WORDS), noun="they-words"),
    # attitude
    Factor("hedges", "hedges", PER_100, _hedges),
    Factor("boosters", "boosters", PER_100, _words(lex.BOOSTERS)),
    Factor(
        "negations",
        "negations",
        PER_100,
        _matching(lambda w: w in lex.NEGATIONS or w.endswith("n't")),
    ),
    Factor("duties", "words of duty", PER_100, _words(lex.DUTIES)),
    Factor("informal", "informal words", PER_100, _words(lex.INFORMAL)),
    # words
    Factor("word_length", "word length", "letters", _word_length, SHAPE, "words"),
    Factor("long_words", "long words", PER_100, _matching(lambda w: len(w) >= LONG)),
    Factor("latinate", "Latinate words", PER_100, _matching(_latinate)),
    Factor("adverbs", "-ly adverbs", PER_100, _matching(_adverb)),
    Factor(
        "variety",
        "word variety",
        "% different",
        _variety,
        ("repetitive", "mixed", "varied"),
        "wording",
    ),
    Factor(
        "british",
        "British spelling",
        "% British",
        _british,
        ("American", "mixed", "British"),
        "spelling",
    ),
    Factor("digits", "numbers in digits", PER_100, _matching(lambda w: any(map(str.isdigit, w)))),
    # openings of sentences
    Factor(
        "conjunction_openings",
        "openings with and, but, so",
        SENTENCE_SHARE,
        _opening(lex.CONJUNCTIONS),
    ),
    Factor("pronoun_openings", "openings with a pronoun", SENTENCE_SHARE, _opening(lex.PRONOUNS)),
    Factor(
        "opening_variety",
        "variety of openings",
        "% differ",
        _opening_variety,
        ("repetitive", "mixed", "varied"),
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
    Factor("be", "forms of be", PER_100, _words(lex.BE_FORMS)),
    Factor("passives", "passives", PER_100, _passives),
    Factor("the", "uses of 'the'", PER_100, _words(frozenset({"the"}))),
    Factor("of", "uses of 'of'", PER_100, _words(frozenset({"of"}))),
    Factor("and", "uses of 'and'", PER_100, _words(frozenset({"and"}))),
    Factor("but", "uses of 'but'", PER_100, _words(frozenset({"but"}))),
    Factor("that", "uses of 'that'", PER_100, _words(frozenset({"that"}))),
    Factor("which", "uses of 'which'", PER_100, _words(frozenset({"which"}))),
)


def measure(texts: Sequence[str]) -> dict[str, float | None]:
    """Every factor by name over texts of one writer, pooled; never raises, whatever the text."""
    text = read(texts)
    return {factor.name: factor.measure(text) for factor in FACTORS}
