"""Claims: what a reply says of the writer and the candidates that can be measured.

A reply is free text, so only what stands in the words of `profile.py` is a claim:

    many semicolons (2.3 per 100 words)     long sentences, about 31 words     varied wording
    fewer dashes than the writer            longer sentences than B
    many semicolons in the writer, none in A, a few words on: B has some
    by n-grams closer than 74% of strangers, by factors closer than 40%

Each is recomputed from the texts by `factors.py`. A number must be the value, rounded; "about"
allows a twentieth more. A short form ("B has none") speaks of the last factor of its sentence.
"Not many dashes" and "lacks many dashes" hold where "many dashes" does not, "no more dashes than"
where "more" does not.

What we left out. "Few long sentences" says nothing of all sentences and is no claim; nor is "fewer
dashes" without "than", nor anything in other words.
"""

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache

from nanopersrm.judge.subjects import EVERY, WRITER, Scene
from nanopersrm.style.features import COUNTED, FACTORS, SHAPE
from nanopersrm.style.profile import (
    distance_percentile,
    factor_distance,
    level,
    measured,
    ngram_percentile,
    ngram_similarity,
)

SLACK = 1.0  # points by which a stated percentile may be off: it is rounded
NOT = r"(?:(?<!\bif )\b(?:not|never|without|nor|no longer)|n't)"
AND = r"(?: (?:have|has|shows?|uses?|keeps?|with))?(?: (?:any|too|very))? $"
NEGATED = re.compile(  # before a level word
    rf"(?:{NOT}|\b(?:lacks?|lacking|avoids?|avoiding)){AND}", re.IGNORECASE
)
NO = re.compile(rf"\bno $|{NOT}{AND}", re.IGNORECASE)  # before "more" and "less"
TWICE = re.compile(rf"{NOT} $", re.IGNORECASE)  # before one of these: it takes it back
QUANTITY = re.compile(r"\b(?:no|few|some|many|more|fewer|several|less|most) $", re.I)
FIGURE = re.compile(
    r"(?:, | \(| )(about )?(under )?(\d+(?:\.\d+)?)(?=\s?(?:%|words?\b|letters?\b|per\b))"
)
SAYS = (
    r"(?:[ ,:]|\b(?:are|is|it|closer|nearer|than|at|puts?|say|give|the|text|candidate|show|"
    r"stands?|comes|beats|[A-Z])\b)*"
)
UNIT = 24  # characters of one, at most
PERCENT_OF = re.compile(
    r"\b(\d+)\s?%(?: of (?:the )?strangers)? (?:by|in|on) (n-grams|factors)\b", re.I
)
PERCENT_IS = re.compile(rf"\b(n-grams|factors){SAYS}\b(\d+)\s?%", re.I)


@dataclass(frozen=True)
class Claim:
    """What is said of one subject's factor."""

    start: int
    text: str  # as it stands in the reply, a "not" before it too
    subject: str  # "writer", a label, or EVERY
    factor: str  # "n-grams" and "factors" for the percentiles
    said: str  # a level word, "more", "less", or a percentage
    holds: bool


def _vocabulary() -> dict[str, tuple[str, str]]:
    """Phrase -> (factor, level word, "more" or "less"); what is compared ends with " than"."""
    phrases = {}
    for factor in FACTORS:
        noun = (factor.noun or factor.label).lower()
        for word in factor.words:
            phrases[f"{word} {noun}".lower()] = (factor.name, word)
        pairs = {"more": "more", "fewer": "less"} if factor.words == COUNTED else {}
        if factor.words == SHAPE:
            pairs = {"longer": "more", "shorter": "less"}
        for word, said in pairs.items():
            phrases[f"{word} {noun} than"] = (factor.name, said)
    return phrases


PHRASES = _vocabulary()
WORDS = {factor.name: factor.words for factor in FACTORS}
PHRASE = re.compile(
    r"(?<![\w'-])(?:"
    + "|".join(map(re.escape, sorted(PHRASES, key=len, reverse=True)))
    + r")(?!\w)",
    re.IGNORECASE,
)
BARE = re.compile(
    r"\b(?:(none|no|few|some|many)(?: of them)?|(short|medium|long|even|mixed|uneven|repetitive|"
    r"varied|American|British) ones)\b(?=[.,;:)]|\s*$| in | and | but )",
    re.IGNORECASE,
)
HAS = re.compile(r"\b(?:has|have|shows?|uses?|with|keeps?|only|there are) $")


@lru_cache(maxsize=256)
def percentiles(exemplars: tuple[str, ...], candidate: str) -> dict[str, float]:
    """How many strangers in a hundred are farther from the exemplars, by n-grams and by factors."""
    return {
        "n-grams": ngram_percentile(ngram_similarity(exemplars, candidate)),
        "factors": 100.0 - distance_percentile(factor_distance(exemplars, candidate)),
    }


def claims_of(scene: Scene) -> list[Claim]:
    """All claims of a reply, in its order."""
    return sorted([*_levels(scene), *_percents(scene)], key=lambda claim: claim.start)


def _levels(scene: Scene) -> Iterator[Claim]:
    """Level words and comparisons, and the short forms that follow them in a sentence."""
    found: list[tuple[re.Match[str], tuple[str, str] | None]] = [
        (match, PHRASES[match[0].lower()]) for match in PHRASE.finditer(scene.text)
    ]
    taken = [range(match.start(), match.end()) for match, _ in found]
    found += [
        (match, None)
        for match in BARE.finditer(scene.text)
        if not any(match.start() in span for span in taken)
    ]
    last: tuple[int, str] | None = None  # sentence and factor
    for match, known in sorted(found, key=lambda item: item[0].start()):
        begin, _ = scene.sentence(match.start())
        before = scene.text[max(0, match.start() - 24) : match.start()]
        if known:
            factor, said = known
            if said in ("more", "less"):
                yield from _comparison(scene, match, factor, said, _no(NO, before))
                last = begin, factor
                continue
            if WORDS[factor] != COUNTED and QUANTITY.search(before):
                continue  # "few long sentences" says nothing of all sentences
            last = begin, factor
        elif last and last[0] == begin and _stands_alone(scene, match, before):
            factor, word = last[1], (match[1] or match[2]).lower()
            said = next((w for w in WORDS[factor] if w.lower() == word.replace("none", "no")), "")
        else:
            continue
        subject = scene.subject(match.start(), match.end())
        if subject and said:
            yield _level_claim(scene, match, subject, factor, said, _no(NEGATED, before))


def _no(pattern: re.Pattern[str], before: str) -> re.Match[str] | None:
    """The negation that a phrase follows; "does not lack" is none."""
    found = pattern.search(before)
    return None if found and TWICE.search(before[: found.start()]) else found


def _stands_alone(scene: Scene, match: re.Match[str], before: str) -> bool:
    """ "B has none", "none in A": a level word without its factor."""
    mention = scene.following(match.end())
    if mention and re.fullmatch(r" in(?: the)? ", scene.text[match.end() : mention.start]):
        return True
    return bool(HAS.search(before)) and not scene.text.startswith(" in ", match.end())


def _level_claim(
    scene: Scene,
    match: re.Match[str],
    subject: str,
    factor: str,
    said: str,
    negated: re.Match[str] | None,
) -> Claim:
    figure = FIGURE.match(scene.text, match.end())
    end = figure.end() if figure else match.end()
    if figure and figure[0].startswith(" ("):
        end = max(end, scene.text.find(")", end, end + UNIT) + 1)  # with its unit
    text = scene.text[match.start() : end]
    text = f"{negated[0]}{text}" if negated else text

    def holds(texts: tuple[str, ...]) -> bool:
        value = measured(texts)[factor]
        if value is None:
            return False
        if (level(factor, value).split()[0] == said) == (negated is not None):
            return False
        return figure is None or _rounds_to(value, figure)

    return Claim(match.start(), text, subject, factor, said, all(map(holds, scene.texts(subject))))


def _rounds_to(value: float, figure: re.Match[str]) -> bool:
    """Whether the figure written is the value, rounded; "about" allows a twentieth more."""
    about, under, digits = figure.groups()
    if under:
        return value < float(digits)
    _, _, decimals = digits.partition(".")
    slack = max(0.5 * 10 ** -len(decimals), 0.05 * value if about else 0.0)
    return abs(value - float(digits)) <= slack + 1e-9


def _comparison(
    scene: Scene, match: re.Match[str], factor: str, said: str, negated: re.Match[str] | None
) -> Iterator[Claim]:
    subject, other = scene.subject(match.start(), match.start() + 1), scene.compared(match.end())
    if subject is None or other is None or other == EVERY or subject == other:
        return
    other_value = measured(scene.texts(other)[0])[factor]
    sign = 1 if said == "more" else -1

    def holds(texts: tuple[str, ...]) -> bool:
        value = measured(texts)[factor]
        if value is None or other_value is None:
            return False
        return (sign * (value - other_value) > 0) == (negated is None)

    text = f"{negated[0] if negated else ''}{match[0]} {other}"
    yield Claim(match.start(), text, subject, factor, said, all(map(holds, scene.texts(subject))))


def _percents(scene: Scene) -> Iterator[Claim]:
    """Percentiles of similarity, in either order of words; each number once."""
    text = scene.text
    readings: list[tuple[re.Pattern[str], Callable[[re.Match[str]], tuple[str, str]]]] = [
        (PERCENT_OF, lambda m: (m[2].lower(), m[1])),
        (PERCENT_IS, lambda m: (m[1].lower(), m[2])),
    ]
    for pattern, read in readings:
        for match in pattern.finditer(text):
            kind, number = read(match)
            subject = scene.within(match.start(), match.end())
            subject = subject or scene.subject(match.start(), match.end())
            if subject == WRITER or subject is None:
                subject = next(iter(scene.candidates)) if len(scene.candidates) == 1 else None
            if subject is None:
                continue
            off = [
                abs(percentiles(tuple(scene.exemplars), of[0])[kind] - float(number))
                for of in scene.texts(subject)
            ]
            said = f"{number}%"
            yield Claim(match.start(), match[0], subject, kind, said, max(off) <= SLACK)
        text = pattern.sub(lambda m: "·" * len(m[0]), text)
