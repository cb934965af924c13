"""Rewrites of words: contractions, spelling, "that", hedges, boosters, numbers and long words.

    expand("I can't say it's bad.")       "I cannot say it is bad."
    to_american("Whilst the grey …")      "While the gray …"
    add_hedges("He was right.")           "Perhaps he was right."
    use_long_words("They began.")         "They commenced."

Each function has the form `rewrite(text, rng) -> text`; a second time changes nothing. Words and
patterns are in `rewrites.json`. What is not sure stays: an 's is "is" only where it cannot be a
possessive or "has", and words are dropped only where the sentence stands without them.
"""

import random
import re

from data.kinds.minor_replacement import places, vowel_sound
from data.kinds.rewrite_sentences import (
    LISTS,
    LOWERED,
    PATTERNS,
    each_sentence,
    every_other,
    first_word,
    lower_first,
    plain_end,
    upper_first,
    words,
)
from nanopersrm.style import lexicon
from nanopersrm.style.text import WORD

CONTRACTIONS = LISTS["contractions"]
ODD = {"can": "can't", "will": "won't", "shall": "shan't"}  # the others add n't
FULL = {"ca": "can", "wo": "will", "sha": "shall"}
AGREES = {subject: set(verbs.split()) for subject, verbs in CONTRACTIONS["verbs after"].items()}
NEVER_AFTER, AFTER_WOULD, AFTER_HAD, UNSURE = (
    frozenset(CONTRACTIONS[name].split())
    for name in ("never after", "would before", "had before", "unsure before")
)

SPELLING = {name: words.split() for name, words in LISTS["spelling"].items()}
BRITISH_TO_AMERICAN = dict(zip(SPELLING["british"], SPELLING["american"], strict=True))
AMERICAN_TO_BRITISH = {american: british for british, american in BRITISH_TO_AMERICAN.items()}
BRITISH_TO_AMERICAN |= zip(SPELLING["only british"], SPELLING["for them"], strict=True)

WORDING = LISTS["wording"]
OPENINGS = ("Perhaps", "I think", "I suppose", "Perhaps", "Probably")
BOOSTERS_IN = ("very", "really", "very", "truly")
GAP = 2  # letters that a swapped word must gain or lose
FORMAL = [tuple(phrase.split("=")) for phrase in WORDING["plain"].split("|")]
UNITS, TENS = WORDING["ones"].split(), WORDING["tens"].split()
TIMES = {"": "", "hundred": "00", "thousand": ",000"}
BESIDE = frozenset(WORDING["beside numbers"].split())


def _like(pattern: str, word: str) -> str:
    """`word` with the casing of `pattern`: all capitals, a capital, or as it is."""
    if pattern.isupper() and len(pattern) > 1:
        return word.upper()
    return upper_first(word) if pattern[0].isupper() else word


def _participle(word: str) -> bool:
    return (
        word in lexicon.LISTS["participles"]
        or word in AFTER_HAD
        or (word.endswith("ed") and len(word) > 4)
    )


def _full_not(match: re.Match[str]) -> str:
    verb = match[1].lower()
    verb = FULL.get(verb, verb)
    if subject := match["subject"]:  # a question: "don't you" -> "do you not"
        return f"{_like(match[1], verb)}{subject} {'NOT' if match[0].isupper() else 'not'}"
    return _like(match[1], "cannot" if verb == "can" else f"{verb} not")


def _full_verb(match: re.Match[str]) -> str:
    subject, end = match["subject"].lower(), match["end"].lower()
    following = (match["next"] or "").split()
    last = following[-1].lower() if following else ""
    verb = {"m": "am", "re": "are", "ve": "have", "ll": "will"}.get(end, "")
    if subject == "let":
        verb = "us" if end == "s" else ""
    elif end == "d":
        if last in UNSURE or not last:
            verb = ""
        elif last in AFTER_WOULD and last not in AFTER_HAD:
            verb = "would"
        else:
            verb = "had" if _participle(last) and last != "never" else ""
    elif end == "s":
        often = {"never", "always"} & {word.lower() for word in following}
        if last in {"been", "got", "had", "become"} or (often and _participle(last)):
            verb = "has"
        elif not (_participle(last) and subject in {"he", "she", "who", "it"}):
            verb = "is"
    if not verb:
        return match[0]
    return f"{match['subject']} {verb}{match['next'] or ''}"


def expand(text: str, rng: random.Random) -> str:
    """Every contraction that is sure, in full."""
    folded = text.replace("’", "'")
    out = PATTERNS["nt"].sub(_full_not, folded)
    out = PATTERNS["short"].sub(_full_verb, out)
    out = PATTERNS["bare"].sub(lambda m: _like(m[0], CONTRACTIONS["bare"][m[0].lower()]), out)
    return text if out == folded else out


def _short_not(match: re.Match[str]) -> str:
    verb = match[1].lower()
    return _like(match[1], ODD.get(verb, f"{verb}n't"))


def _short_verb(match: re.Match[str]) -> str:
    before, subject = (match["before"] or "").strip().lower(), match["subject"].lower()
    verb, following = match["verb"].lower(), match["next"].lower()
    fits = verb in AGREES[subject] and before not in NEVER_AFTER and match["verb"].islower()
    if subject == "that" and before and before not in {"but", "think", "so"}:
        fits = False  # "the man that is here"
    if verb in {"have", "had"}:
        fits = fits and _participle(following) and following not in {"had", "better", "best"}
    if verb == "is" and following in {"to", "in", "by"} and subject == "that":
        fits = False
    if not fits:
        return match[0]
    return f"{match['before'] or ''}{match['subject']}{CONTRACTIONS['short verbs'][verb]}"


def contract(text: str, rng: random.Random) -> str:
    """Every pair of words that is usually contracted, contracted."""
    out = re.sub(r"\b([Cc])annot\b", r"\1an not", text)
    out = PATTERNS["not"].sub(_short_not, out)
    out = PATTERNS["long"].sub(_short_verb, out)
    return re.sub(r"\b([Cc])an not\b(?= only\b)", r"\1annot", out)


def _respell(text: str, table: dict[str, str]) -> str:
    def respell(match: re.Match[str]) -> str:
        word = match[0]
        spelling = table.get(word.lower().removesuffix("'s"))
        if spelling is None:
            return word
        spelling += word[-2:] if word.lower().endswith("'s") else ""
        plain = word[1:].islower() or word.islower() or (word.isupper() and len(word) > 1)
        return _like(word, spelling) if plain else word

    return WORD.sub(respell, text)


def to_american(text: str, rng: random.Random) -> str:
    """Every British spelling in the table as an American writes it."""
    return _respell(text, BRITISH_TO_AMERICAN)


def to_british(text: str, rng: random.Random) -> str:
    """Every American spelling in the table as a Briton writes it."""
    return _respell(text, AMERICAN_TO_BRITISH)


def _article(before: str, after: str) -> str:
    """`after` with "a" and "an" set right where another word follows them than in `before`."""
    known = {(match[0], match[2]) for match in PATTERNS["a or an"].finditer(before)}

    def put(match: re.Match[str]) -> str:
        if (match[0], match[2]) in known:
            return match[0]
        return f"{match[1]}{'n' if vowel_sound(match[2]) else ''} "

    return PATTERNS["a or an"].sub(put, after)


def _hedged(sentence: str) -> bool:
    return any(w in lexicon.LISTS["hedges"] for w in words(sentence)) or bool(
        lexicon.HEDGE_PHRASES.search(sentence.lower())
    )


def _dropped(text: str, inside: tuple[str, ...], start: str, least: int) -> str:
    """Every sentence without what the patterns match, if that many words are left of it."""

    def change(sentence: str) -> str:
        after = sentence
        for name in inside:
            after = PATTERNS[name].sub("", after)
        if match := PATTERNS[start].match(after):
            after = match[1] + upper_first(after[match.end() :])
        return _article(sentence, after) if len(words(after)) >= least else sentence

    return each_sentence(text, change, times=6)


def drop_hedges(text: str, rng: random.Random) -> str:
    """Without "perhaps", "I think" and their like, where the sentence stands without them."""
    return _dropped(text, ("rather", "hedge"), "hedged start", 3)


def add_hedges(text: str, rng: random.Random) -> str:
    """Open with "Perhaps" or "I think" where a subject opens and no sentence beside is hedged."""

    def change(sentence: str, i: int) -> str:
        first = first_word(sentence).split("'")[0]
        if first not in LOWERED or not plain_end(sentence) or sentence[0].islower():
            return sentence
        if len(words(sentence)) < 3:
            return sentence
        opening = rng.choice(OPENINGS)  # "I think I went" is one I too many
        return f"{'Perhaps' if first == 'i' else opening} {lower_first(sentence)}"

    return every_other(text, _hedged, change)


def drop_boosters(text: str, rng: random.Random) -> str:
    """Without "very", "really" and their like before a word."""
    return _dropped(text, ("booster",), "boosted start", 0)


def add_boosters(text: str, rng: random.Random) -> str:
    """Put "very" or "really" before adjectives that take it, behind "a" and forms of be."""

    def put(match: re.Match[str]) -> str:
        before = {"an": "a", "An": "A"}.get(match["before"], match["before"])
        return f"{before} {rng.choice(BOOSTERS_IN)} "

    return PATTERNS["adjective"].sub(put, text)


def drop_that(text: str, rng: random.Random) -> str:
    """Drop it: "I think that he" becomes "I think he"."""
    return PATTERNS["drop that"].sub(r"\1 ", text)


def add_that(text: str, rng: random.Random) -> str:
    """Put it in: "I think he" becomes "I think that he"."""
    return PATTERNS["add that"].sub(r"\1 that ", text)


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


def use_long_words(text: str, rng: random.Random) -> str:
    """The longest word of every group of near-synonyms, and formal phrases."""
    for old, new in FORMAL:
        text = re.sub(rf"\b{old}\b", new, text)
    return _by_length(text, 1)


def use_short_words(text: str, rng: random.Random) -> str:
    """The shortest word of every group of near-synonyms."""
    return _by_length(text, -1)


def _value(match: re.Match[str]) -> str:
    if match["tens"]:
        value = 10 * (TENS.index(match["tens"].lower()) + 2)
        return str(value + (UNITS.index(match["one"].lower()) if match["one"] else 0))
    times = (match["times"] or "").strip().lower()
    return f"{UNITS.index(match['small'].lower())}{TIMES[times]}"


def digits_for_numbers(text: str, rng: random.Random) -> str:
    """Write "twenty-five men" as "25 men"; "one" stays, and so do ordinals and fractions."""
    return PATTERNS["number"].sub(_value, text)


def _spelled(value: int) -> str:
    if value < 20:
        return UNITS[value]
    if value < 100:
        tens, one = TENS[value // 10 - 2], value % 10
        return f"{tens}-{UNITS[one]}" if one else tens
    return f"{UNITS[value // 100]} hundred"


def words_for_digits(text: str, rng: random.Random) -> str:
    """Write "25 men" as "twenty-five men"; dates, sections and times stay."""

    def put(match: re.Match[str]) -> str:
        value = int(match[1])
        before = text[: match.start()].split()[-1:] or [""]
        after = text[match.end() :].split()[:1] or [""]
        beside = {before[0].lower().rstrip(".,"), after[0].lower().rstrip(".,")}
        opens = text[: match.start()].rstrip(" \"'(")[-1:] in ("", *".!?\n")
        if (
            (value > 99 and value % 100)
            or beside & BESIDE
            or before[0].endswith(".")
            or not re.match(r" [a-z]{2}|[.,;?!](?:\s|$)", text[match.end() : match.end() + 3])
            or match[1].startswith("0")  # "07"
            or opens  # "2. Open the door"
        ):
            return match[0]
        return _spelled(value)

    return PATTERNS["digits"].sub(put, text)
