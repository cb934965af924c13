"""Wording: hedges, boosters, "that", numbers, and the length of words, more or less of each.

    soften("He was right.")       "Perhaps he was right."
    sharpen("Perhaps he was.")    "He was."
    longer_words("They began.")   "They commenced."

What we chose. Words are dropped only where the sentence surely stands without them, and "a" or "an"
before them is set right. Longer and shorter words come from the table PLAIN and from the groups of
`synonyms.py`: every place takes the longest word of its group, or the shortest. Numbers stay as
they are beside marks, months, initials and words like "section".
"""

import random
import re

from data.kinds.sentence_shape import (
    LOWERED,
    each_paragraph,
    every_other,
    first_word,
    lower_first,
    plain_end,
    settle,
    upper_first,
    words,
)
from data.kinds.synonyms import places
from nanopersrm.style.lexicon import HEDGE_PHRASES, HEDGES

A_OR_AN = re.compile(r"\b([Aa])n? (?=([a-z]+))")
HEDGE_WORDS = (
    "perhaps|maybe|possibly|probably|presumably|apparently|arguably|seemingly|conceivably|somewhat|"
    "usually|generally|largely|partly"
)
HEDGE_PHRASE = "I think|I suppose|I guess|I believe|it seems|to some extent|more or less|in a way"
HEDGE = re.compile(
    rf", (?:{HEDGE_WORDS}|{HEDGE_PHRASE}),(?= )|, (?:{HEDGE_PHRASE})(?=[.!])"
    rf"|(?<=[a-z] )(?:{HEDGE_WORDS}) (?=[a-z])"
)
BEFORE_RATHER = ["is", "was", "are", "were", "am", "be", "been", "a"]
AFTER_BE = "(?:" + "|".join(rf"(?<=\b{word} )" for word in BEFORE_RATHER) + ")"
RATHER = re.compile(AFTER_BE + r"rather (?!than\b|a\b|the\b)(?=[a-z])")
HEDGED_START = re.compile(
    rf"^(\"?)(?:(?:Perhaps|Maybe|Possibly|Probably|Presumably|Apparently|Generally|Usually),? "
    rf"|(?:I think|I suppose|I guess|I believe) (?:that )?)(?=(?:{'|'.join(sorted(LOWERED))})\b)"
)
OPENINGS = ("Perhaps", "I think", "I suppose", "Perhaps", "Probably")
BOOSTER = re.compile(
    r"(?<=[A-Za-z] )(?<!\bnot )(?<!\bthe )(?<!\bso )(?<!\bas )(?<!\bhow )(?<!\bmore )"
    r"(?<!\bmost )(?<!\btoo )"
    r"(?:very (?!(?:much|well|same|first|last|own|few|best|far|moment|long)\b)"
    r"|(?:really|extremely|absolutely|totally|completely|definitely|truly|utterly|incredibly|"
    r"certainly|obviously|surely|undoubtedly|literally|simply|entirely|perfectly (?!well\b)) )"
    r"(?=[a-z])|, indeed,(?= )"
)
BOOSTED_START = re.compile(
    rf"^(\"?)(?:Certainly|Indeed|Surely|Really|Obviously|Clearly|Undoubtedly),? "
    rf"(?=(?:{'|'.join(sorted(LOWERED))})\b)"
)
GRADABLE = (
    "good bad old young long short great large small big high low deep happy sad strong weak warm "
    "cold hot rich poor easy hard difficult important strange clear dark bright beautiful "
    "interesting useful dangerous serious simple sure glad sorry tired angry proud quiet "
    "pleasant kind gentle careful common curious different effective fine grateful handsome heavy "
    "helpful likely narrow nice popular powerful quick rare sensible significant slow "
    "successful valuable wise busy clever cruel famous fond foolish lonely lovely near "
    "similar simple small smart tall thin true ugly unhappy violent"
)
ADJECTIVE = re.compile(
    r"\b(?P<before>an?|is|are|was|were|be|been|seems?|seemed|looked|felt|became|grew) "
    rf"(?=(?P<word>{'|'.join(GRADABLE.split())})\b"
    r"(?!-| enough| deal| many| part| of| time ago| as| more| call| enough))"
)
BOOSTERS_IN = ("very", "really", "very", "truly")
THINK = (
    "think thinks thought know knows knew believe believes believed say says said hope hopes hoped "
    "feel felt suppose supposed suspect suspected fear feared wish wished"
)
SUBJECT_BEFORE = (
    r"(?:I|you|he|she|we|they|who|to|not|never|always|also|n't|can|could|will|would|may|must)"
)
TOLD = "(?:told|tell|tells|assured|assure) (?:him|her|me|them|us|you)"
DROP_THAT = re.compile(
    rf"\b({SUBJECT_BEFORE} (?:{'|'.join(THINK.split())})"
    rf"|{TOLD}|(?:sure|glad|afraid|certain)) that (?=(?:I|he|she|we|they|you|it|there)(?:'\w+)? \w)"
)
BRING_THAT = re.compile(
    rf"\b({SUBJECT_BEFORE} (?:{'|'.join(THINK.split())})"
    rf"|{TOLD}|(?:sure|glad|afraid|certain)) "
    r"(?=(?:I|he|she|we|they|there)(?:'\w+)? [a-z])"
)
GAP = 2  # letters that a swapped word must gain or lose
PLAIN = (
    "a lot of=a considerable amount of|lots of=numerous|find out=ascertain|found out=ascertained|"
    "carry out=accomplish|carried out=accomplished|set up=establish|look into=investigate|"
    "looked into=investigated|talked about=discussed|talk about=discuss|talking about=discussing|"
    "right away=immediately|these days=currently|more and more=increasingly|"
    "met with=encountered|think about=contemplate|thought about=contemplated|"
    "get rid of=eliminate|got rid of=eliminated|give up=relinquish|gave up=relinquished|"
    "a bit=somewhat"
)
PAIRS = [tuple(pair.split("=")) for pair in PLAIN.split("|")]
ONES = (
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen"
)
ONES += " sixteen seventeen eighteen nineteen"
UNITS = ONES.split()
TENS = ["twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety"]
SMALL = "|".join(sorted(UNITS[2:], key=len, reverse=True))
NUMBER = re.compile(
    rf"(?<![-\w'])(?P<tens>{'|'.join(TENS)})(?:-(?P<one>{'|'.join(UNITS[1:10])}))?(?![-\w'])"
    rf"|(?<![-\w'])(?P<small>{SMALL})(?P<times> hundred| thousand)?(?![-\w'])"
    r"(?! (?:hundred|thousand|million))",
    re.IGNORECASE,
)
BESIDE = [
    "january",
    "february",
    "march",
    "april",
    "may",
    "june",
    "july",
    "august",
    "september",
    "october",
    "november",
    "december",
    "section",
    "sections",
    "no",
    "nos",
    "art",
    "article",
    "paragraph",
    "clause",
    "item",
    "chapter",
    "page",
    "pages",
    "part",
    "vol",
    "title",
    "rule",
    "amendment",
    "figure",
    "at",
    "act",
]
DIGITS = re.compile(
    r"(?<![\w$£#§.,:/'()\[+*-])(\d{1,3})(?![\w.,:/'%)\]°+-]*[\d%:/°)\]'-])(?=[\s.,;?!]|$)"
)


def _sounds(word: str) -> bool:
    if word.startswith(("hour", "honest", "honou", "heir")):
        return True
    return word[0] in "aeiou" and not word.startswith(("use", "usu", "uni", "eu", "one", "uti"))


def _article(before: str, after: str) -> str:
    """`after` with "a" and "an" set right where another word follows them than in `before`."""
    known = {(match[0], match[2]) for match in A_OR_AN.finditer(before)}

    def put(match: re.Match[str]) -> str:
        if (match[0], match[2]) in known:
            return match[0]
        return f"{match[1]}{'n' if _sounds(match[2]) else ''} "

    return A_OR_AN.sub(put, after)


def _hedged(sentence: str) -> bool:
    return any(w in HEDGES for w in words(sentence)) or bool(HEDGE_PHRASES.search(sentence.lower()))


def sharpen(text: str, rng: random.Random) -> str:
    """Without "perhaps", "I think" and their like, where the sentence stands without them."""

    def change(sentence: str) -> str:
        after = HEDGE.sub("", RATHER.sub("", sentence))
        if match := HEDGED_START.match(after):
            after = match[1] + upper_first(after[match.end() :])
        return _article(sentence, after) if len(words(after)) >= 3 else sentence

    return settle(text, lambda own: [change(sentence) for sentence in own])


def soften(text: str, rng: random.Random) -> str:
    """Open with "Perhaps" or "I think" where a subject opens and no sentence beside is hedged."""

    def change(sentence: str, i: int) -> str:
        own = words(sentence)
        if first_word(sentence).split("'")[0] not in LOWERED or not plain_end(sentence):
            return sentence
        if len(own) < 3 or sentence[0].islower():
            return sentence
        opening = rng.choice(OPENINGS)
        if own[0].split("'")[0] == "i":  # "I think I went" is one I too many
            opening = "Perhaps"
        return f"{opening} {lower_first(sentence)}"

    return each_paragraph(text, lambda own: every_other(own, _hedged, change))


def calm(text: str, rng: random.Random) -> str:
    """Without "very", "really" and their like before a word."""

    def change(sentence: str) -> str:
        after = BOOSTER.sub("", sentence)
        if match := BOOSTED_START.match(after):
            after = match[1] + upper_first(after[match.end() :])
        return _article(sentence, after)

    return settle(text, lambda own: [change(sentence) for sentence in own])


def boost(text: str, rng: random.Random) -> str:
    """Put "very" or "really" before adjectives that take it, behind "a" and forms of be."""

    def put(match: re.Match[str]) -> str:
        before = {"an": "a", "An": "A"}.get(match["before"], match["before"])
        return f"{before} {rng.choice(BOOSTERS_IN)} "

    return ADJECTIVE.sub(put, text)


def drop_that(text: str, rng: random.Random) -> str:
    """Drop it: "I think that he" becomes "I think he"."""
    return DROP_THAT.sub(r"\1 ", text)


def bring_that(text: str, rng: random.Random) -> str:
    """Put it in: "I think he" becomes "I think that he"."""
    return BRING_THAT.sub(r"\1 that ", text)


def _phrases(text: str, pairs: list[tuple[str, str]]) -> str:
    for old, new in pairs:
        text = re.sub(rf"\b{old}\b", new, text)
    return text


def _by_length(text: str, sign: int) -> str:
    """Every place with its longest (+1) or shortest (-1) word, where that is GAP letters apart."""
    for _ in range(4):  # a swap can make room for another
        parts, end = [], 0
        for place in places(text):
            words_of = sorted(place.options, key=lambda word: (sign * len(word), word))
            best = words_of[-1]
            if sign * (len(best) - len(place.lemma)) >= GAP:
                parts += [text[end : place.start], place.options[best]]
                end = place.end
        if not parts:
            break
        text = "".join([*parts, text[end:]])
    return text


def longer_words(text: str, rng: random.Random) -> str:
    """The longest word of every group of near-synonyms, and formal phrases."""
    for old, new in PAIRS:
        text = re.sub(rf"\b{old}\b", new, text)
    return _by_length(text, 1)


def shorter_words(text: str, rng: random.Random) -> str:
    """The shortest word of every group of near-synonyms."""
    return _by_length(text, -1)


def _value(match: re.Match[str]) -> str:
    if match["tens"]:
        value = 10 * (TENS.index(match["tens"].lower()) + 2)
        return str(value + (UNITS.index(match["one"].lower()) if match["one"] else 0))
    value = UNITS.index(match["small"].lower())
    times = (match["times"] or "").strip().lower()
    return {"": str(value), "hundred": f"{value}00", "thousand": f"{value},000"}[times]


def number_digits(text: str, rng: random.Random) -> str:
    """Write "twenty-five men" as "25 men"; "one" stays, and so do ordinals and fractions."""
    return NUMBER.sub(_value, text)


def _spelled(value: int) -> str:
    if value < 20:
        return UNITS[value]
    if value < 100:
        tens, one = TENS[value // 10 - 2], value % 10
        return f"{tens}-{UNITS[one]}" if one else tens
    return f"{UNITS[value // 100]} hundred"


def number_words(text: str, rng: random.Random) -> str:
    """Write "25 men" as "twenty-five men"; dates, sections and times stay."""

    def put(match: re.Match[str]) -> str:
        value = int(match[1])
        before = text[: match.start()].split()[-1:] or [""]
        after = text[match.end() :].split()[:1] or [""]
        beside = {before[0].lower().rstrip(".,"), after[0].lower().rstrip(".,")}
        if (value > 99 and value % 100) or beside & set(BESIDE) or before[0].endswith("."):
            return match[0]
        if not re.match(r" [a-z]{2}|[.,;?!](?:\s|$)", text[match.end() : match.end() + 3]):
            return match[0]
        if match[1].startswith("0") or _at_start(text, match.start()):
            return match[0]  # "07", "2. Open the door"
        return _spelled(value)

    return DIGITS.sub(put, text)


def _at_start(text: str, at: int) -> bool:
    before = text[:at].rstrip(" \"'(")
    return not before or before[-1] in ".!?\n"
