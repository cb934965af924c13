"""What a reply says of the texts that can be checked: claims by measurement, quotes verbatim.

    report = check(reply, exemplars, {"A": candidate})
    report.quotes, report.quotes_true        # spans in "double quotes", and those that are verbatim
    report.claims, report.claims_true        # of the writer or a candidate, and those that hold

Only what stands in the words of `profile.py` is a claim:

    many semicolons (2.3 per 100 words)     long sentences, about 31 words     varied wording
    fewer dashes than the writer            longer sentences than B
    by n-grams closer than 74% of strangers, by factors closer than 40%

Each is recomputed from the texts. A number must be the value, rounded; "about" allows a twentieth
more. A phrase speaks of the subject that follows at once ("in A"), else of the last one named
before it in its sentence, else of the first "in A" after it, else of the last one named at all. A
name after "than", "like", "with", "to" or "as" is compared with, and does not become the subject.

A quote is verbatim when it stands in an exemplar or a candidate, between word ends, in at most
LONGEST_QUOTE words. `placed`: it is from the text that the sentence speaks of.
"""

import re
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache

from nanopersrm.judge.verdict import CLOSE, OPEN
from nanopersrm.style.features import COUNTED, FACTORS, SHAPE
from nanopersrm.style.lexicon import LISTS
from nanopersrm.style.profile import level, measured, strangers_farther
from nanopersrm.style.text import FOLD

WRITER = "writer"
EVERY = "every candidate"
SENTENCE_END = re.compile(r"[.!?](?=\s|$)|\n")
# Words after "A" at the beginning of a sentence that make it a label and not an article.
VERBS = LISTS["label_verbs"]
AHEAD = 8  # names looked at after a phrase
AT_ONCE = re.compile(
    r"\)?(?:, about [\d.]+[\w% ]{0,20})?(?: \([^()]{0,80}\))?,? (?:in|for|from|by)(?: the| this)? "
)
LATER = re.compile(r"\b(?:in|for|from)(?: the| this)? $")
THAN = (" ", " the ", " this ", " in ", " in the ")
COMPARED = r"(?:than|unlike|like|with|to|as)(?: in| for)?(?: the| this)? $"


@dataclass(frozen=True)
class Mention:
    start: int
    end: int
    subject: str | None  # None: somebody we do not know
    compared: bool


@lru_cache(maxsize=32)
def _names(labels: tuple[str, ...]) -> re.Pattern[str]:
    one = r"|(?P<one>\b(?:[Tt]he|[Tt]his) (?:candidate|text|draft)\b)"
    some = f"[{''.join(labels)}]" if labels else "(?!)"  # without any: nothing
    return re.compile(
        r"(?P<writer>\b(?:[Ww]riter|[Aa]uthor|[Ee]xemplars?)\b)"
        r"|(?P<every>\b(?:[Bb]oth|[Ee]ach|[Aa]ll) (?:candidates?|texts?)\b)"
        rf"|(?:\b(?:[Tt]he |[Tt]his )?(?:[Cc]andidate|[Tt]ext|[Dd]raft) "
        rf"(?P<named>{some})\b)" + one + rf"|(?P<label>\b{some}\b)"
    )


def mentions(text: str, starts: Sequence[int], labels: tuple[str, ...]) -> list[Mention]:
    """Who is named, in order. `starts` are the beginnings of the sentences."""
    found = []
    for match in _names(labels).finditer(text):
        kind, subject = match.lastgroup, match[0]
        if kind == "label" and subject in "AI" and not _is_label(text, match, starts):
            continue
        who: str | None = match[kind] if kind in ("named", "label") else None
        if kind == "writer":
            who = WRITER
        elif kind == "every":
            who = EVERY
        elif kind == "one" and len(labels) == 1:
            who = labels[0]
        before = text[max(0, match.start() - 24) : match.start()]
        compared = bool(re.search(rf"\b{COMPARED}", before, re.IGNORECASE))
        found.append(Mention(match.start(), match.end(), who, compared))
    return found


def _is_label(text: str, match: re.Match[str], starts: Sequence[int]) -> bool:
    """ "A" in the midst of a sentence, or before a verb or a mark; an article otherwise."""
    after = text[match.end() : match.end() + 16]
    if match[0] == "I":
        return False
    if match.start() not in starts or not after[:1].isspace():
        return True
    return after.split()[:1] != [] and after.split()[0].strip(",.;:") in VERBS


@dataclass(frozen=True)
class Scene:
    """The reply with its quotes blanked, and what it speaks of."""

    text: str
    starts: list[int]
    mentions: list[Mention]
    exemplars: Sequence[str]
    candidates: Mapping[str, str]

    def sentence(self, at: int) -> tuple[int, int]:
        """Where the sentence around a place begins and ends."""
        place = bisect_right(self.starts, at)
        begin = self.starts[place - 1] if place else 0
        return begin, self.starts[place] if place < len(self.starts) else len(self.text)

    def following(self, at: int) -> Mention | None:
        """The next one named from a place on."""
        place = bisect_left(self.mentions, at, key=lambda mention: mention.start)
        return self.mentions[place] if place < len(self.mentions) else None

    def subject(self, start: int, end: int) -> str | None:
        """Whom a phrase from `start` to `end` speaks of; the rule is in the docstring above."""
        begin, stop = self.sentence(start)
        after = self.following(end)
        if after and after.start < stop and AT_ONCE.fullmatch(self.text[end : after.start]):
            return after.subject
        earlier = None  # the last one named before, in this sentence or another
        for place in range(bisect_right(self.mentions, start, key=lambda m: m.end) - 1, -1, -1):
            if not self.mentions[place].compared:
                earlier = self.mentions[place]
                break
        if earlier and earlier.start >= begin:
            return earlier.subject
        for _ in range(AHEAD):
            if after is None or after.start >= stop:
                break
            if LATER.search(self.text[max(0, after.start - 10) : after.start]):
                return after.subject
            after = self.following(after.end)
        return earlier.subject if earlier else None

    def within(self, start: int, end: int) -> str | None:
        """Who is named inside a phrase."""
        mention = self.following(start)
        return mention.subject if mention and mention.start < end else None

    def compared(self, end: int) -> str | None:
        """Whom "than" at the end of a phrase compares with."""
        mention = self.following(end)
        if mention and self.text[end : mention.start] in THAN:
            return mention.subject
        return None

    def texts(self, subject: str) -> list[tuple[str, ...]]:
        """The texts of a subject; several entries for "both candidates"."""
        if subject == WRITER:
            return [tuple(self.exemplars)]
        if subject == EVERY:
            return [(text,) for text in self.candidates.values()]
        return [(self.candidates[subject],)]


def scene_of(text: str, exemplars: Sequence[str], candidates: Mapping[str, str]) -> Scene:
    """A reply with its quotes blanked, cut into sentences, with all who are named in it."""
    starts = [0, *(match.end() for match in SENTENCE_END.finditer(text))]
    starts = [at + len(text[at:]) - len(text[at:].lstrip()) for at in starts]
    return Scene(text, starts, mentions(text, starts, tuple(candidates)), exemplars, candidates)


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


def percentiles(exemplars: tuple[str, ...], candidate: str) -> dict[str, float]:
    """How many strangers in a hundred are farther from the exemplars, by n-grams and by factors."""
    ngrams, factors = strangers_farther(exemplars, candidate)
    return {"n-grams": ngrams, "factors": factors}


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


LONGEST_QUOTE = 12  # words
LONGEST_REPLY = 8_000  # characters that are read; a reply has some 800

QUOTE = re.compile(r'"([^"\n]*)"')


@dataclass(frozen=True)
class Quote:
    """A span in double quotes, without them."""

    text: str
    subject: str | None
    verbatim: bool
    placed: bool  # in the text of the subject


@dataclass(frozen=True)
class Report:
    """What was found in a reply."""

    found_quotes: tuple[Quote, ...]
    found_claims: tuple[Claim, ...]

    @property
    def quotes(self) -> int:
        return len(self.found_quotes)

    @property
    def quotes_true(self) -> int:
        return sum(quote.verbatim for quote in self.found_quotes)

    @property
    def claims(self) -> int:
        return len(self.found_claims)

    @property
    def claims_true(self) -> int:
        return sum(claim.holds for claim in self.found_claims)


def fold(text: str) -> str:
    """White space to single blanks, quote marks to straight ones."""
    return " ".join(text.translate(FOLD).split())


@lru_cache(maxsize=256)
def _folded(text: str) -> str:
    return fold(text)


def contains(text: str, quote: str) -> bool:
    """Whether the quote stands in the text, from the beginning of a word to the end of one."""
    inside, wanted = _folded(text), fold(quote)
    if not wanted or len(wanted.split()) > LONGEST_QUOTE:
        return False
    at = inside.find(wanted)
    while at >= 0:
        before, after = inside[at - 1 : at], inside[at + len(wanted) : at + len(wanted) + 1]
        cut_left = before.isalnum() and wanted[0].isalnum()
        if not cut_left and not (after.isalnum() and wanted[-1].isalnum()):
            return True
        at = inside.find(wanted, at + 1)
    return False


def check(reply: str, exemplars: Sequence[str], candidates: Mapping[str, str]) -> Report:
    """Every quote and every claim of a reply (or of its reasoning alone), checked on the texts.

    candidates: label -> text, as the prompt showed them.
    """
    text, whole = _reasoning(reply)
    masked = QUOTE.sub(lambda m: '"' + " " * len(m[1]) + '"', text)
    scene = scene_of(masked, exemplars, candidates)
    quotes = [_quote(scene, match.start(), match[1]) for match in QUOTE.finditer(text)]
    last = QUOTE.sub(lambda m: "." * len(m[0]), text).find('"')
    if last >= 0 and whole:  # a quote that is not closed
        quotes.append(Quote(text[last + 1 : last + 40], None, False, False))
    return Report(tuple(quotes), tuple(claims_of(scene)))


def _reasoning(reply: str) -> tuple[str, bool]:
    """The part between the tags, curly quotes made straight, and whether it was read to its end."""
    whole, reply = len(reply) <= LONGEST_REPLY, reply[:LONGEST_REPLY]
    begin = reply.find(OPEN.strip())
    begin = begin + len(OPEN.strip()) if begin >= 0 else 0
    end = reply.find(CLOSE, begin)
    inside = reply[begin : end if end >= 0 else len(reply)]
    straight = re.sub("[“”„«»″]", '"', inside).replace("’", "'")
    return straight, whole or end >= 0


def _quote(scene: Scene, start: int, quote: str) -> Quote:
    everything = [*scene.exemplars, *scene.candidates.values()]
    subject = scene.subject(start, start + len(quote) + 2)
    of_subject = [t for texts in scene.texts(subject) for t in texts] if subject else []
    return Quote(
        quote,
        subject,
        any(contains(text, quote) for text in everything),
        any(contains(text, quote) for text in of_subject),
    )
