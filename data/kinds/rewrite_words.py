"""Rewrites of words: contractions, spelling, "that", hedges, boosters, numbers and long words.

    expand("I can't say it's bad.")       "I cannot say it is bad."
    to_american("Whilst the grey …")      "While the gray …"
    add_hedges("He was right.")           "Perhaps he was right."
    use_long_words("They began.")         "They commenced."

Each function has the form `rewrite(text, rng) -> text`; a second time changes nothing. Word lists
are in `rewrites.json`. What is not sure stays: an 's is "is" only where it cannot be a possessive
or "has". Words are dropped only where the sentence stands without them. Only words whose other
spelling means the same are respelled. Numbers stay beside marks, months and words like "section".
Long and short words come from the groups of `minor_replacement.py`.

What we left out. "ain't", "'tis", two contractions on one word.
"""

import json
import random
import re
from pathlib import Path

from data.kinds.minor_replacement import places
from data.kinds.rewrite_sentences import (
    LOWERED,
    each_sentence,
    every_other,
    first_word,
    lower_first,
    plain_end,
    upper_first,
    words,
)
from nanopersrm.style.lexicon import HEDGE_PHRASES, HEDGES, PARTICIPLES
from nanopersrm.style.text import WORD

LISTS = json.loads(Path(__file__).with_name("rewrites.json").read_text("utf-8"))

CONTRACTIONS = LISTS["contractions"]
BARE = re.compile(rf"\b({'|'.join(CONTRACTIONS['bare'])})\b", re.IGNORECASE)  # dont, im
AUXILIARIES = "do does did is are was were has have had could would should must need can will shall"
ODD = {"can": "can't", "will": "won't", "shall": "shan't"}  # the others add n't
NOT = re.compile(rf"\b({AUXILIARIES.replace(' ', '|')}) not\b(?! only\b)", re.IGNORECASE)
NT = re.compile(
    r"\b(do|does|did|is|are|was|were|has|have|had|could|would|should|must|need|ca|wo|sha)n't\b"
    r"(?P<subject> (?:I|you|he|she|it|we|they|there)\b(?!'))?",
    re.IGNORECASE,
)
FULL = {"ca": "can", "wo": "will", "sha": "shall"}
SUBJECT = r"(?P<subject>I|you|he|she|it|we|they|there|that|who|what|here|where|let)"
SHORT = re.compile(
    rf"\b{SUBJECT}'(?P<end>m|re|ve|ll|d|s)\b(?P<next>(?: \w+ly| not| never)? \w+)?", re.I
)
LONG = re.compile(
    r"(?P<before>\b[\w']+ )?\b(?P<subject>I|you|he|she|it|we|they|there|that)"
    r" (?P<verb>am|are|is|have|had|will|would)(?= (?P<next>\w+))",
    re.IGNORECASE,
)
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
THINKING = WORDING["thinking"].replace(" ", "|")
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
ADJECTIVE = re.compile(
    r"\b(?P<before>an?|is|are|was|were|be|been|seems?|seemed|looked|felt|became|grew) "
    rf"(?=(?P<word>{'|'.join(WORDING['gradable'].split())})\b"
    r"(?!-| enough| deal| many| part| of| time ago| as| more| call| enough))"
)
BOOSTERS_IN = ("very", "really", "very", "truly")
BEFORE_THAT = (
    r"\b((?:I|you|he|she|we|they|who|to|not|never|always|also|n't|can|could|will|would|may|must) "
    rf"(?:{THINKING})|(?:told|tell|tells|assured|assure) (?:him|her|me|them|us|you)"
    r"|(?:sure|glad|afraid|certain))"
)
DROP_THAT = re.compile(BEFORE_THAT + r" that (?=(?:I|he|she|we|they|you|it|there)(?:'\w+)? \w)")
ADD_THAT = re.compile(BEFORE_THAT + r" (?=(?:I|he|she|we|they|there)(?:'\w+)? [a-z])")
GAP = 2  # letters that a swapped word must gain or lose
FORMAL = [tuple(phrase.split("=")) for phrase in WORDING["plain"].split("|")]
UNITS, TENS = WORDING["ones"].split(), WORDING["tens"].split()
BESIDE = frozenset(WORDING["beside numbers"].split())
SMALL = "|".join(sorted(UNITS[2:], key=len, reverse=True))
NUMBER = re.compile(
    rf"(?<![-\w'])(?P<tens>{'|'.join(TENS)})(?:-(?P<one>{'|'.join(UNITS[1:10])}))?(?![-\w'])"
    rf"|(?<![-\w'])(?P<small>{SMALL})(?P<times> hundred| thousand)?(?![-\w'])"
    r"(?! (?:hundred|thousand|million))",
    re.IGNORECASE,
)
DIGITS = re.compile(
    r"(?<![\w$£#§.,:/'()\[+*-])(\d{1,3})(?![\w.,:/'%)\]°+-]*[\d%:/°)\]'-])(?=[\s.,;?!]|$)"
)


def _like(pattern: str, word: str) -> str:
    """`word` with the casing of `pattern`: all capitals, a capital, or as it is."""
    if pattern.isupper() and len(pattern) > 1:
        return word.upper()
    return word[0].upper() + word[1:] if pattern[0].isupper() else word


def _participle(word: str) -> bool:
    return word in PARTICIPLES or word in AFTER_HAD or (word.endswith("ed") and len(word) > 4)


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
    folded = text.replace("’", "'") if "’" in text else text
    out = NT.sub(_full_not, folded)
    out = SHORT.sub(_full_verb, out)
    out = BARE.sub(lambda m: _like(m[0], CONTRACTIONS["bare"][m[0].lower()]), out)
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
    out = NOT.sub(_short_not, out)
    out = LONG.sub(_short_verb, out)
    return re.sub(r"\b([Cc])an not\b(?= only\b)", r"\1annot", out)


def _respell(text: str, table: dict[str, str]) -> str:
    def respell(match: re.Match[str]) -> str:
        word = match[0]
        spelling = table.get(word.lower().removesuffix("'s"))
        if spelling is None:
            return word
        spelling += word[-2:] if word.lower().endswith("'s") else ""
        if word.isupper() and len(word) > 1:
            return spelling.upper()
        if not (word.islower() or word[1:].islower()):
            return word
        return spelling.capitalize() if word[0].isupper() else spelling

    return WORD.sub(respell, text)


def to_american(text: str, rng: random.Random) -> str:
    """Every British spelling in the table as an American writes it."""
    return _respell(text, BRITISH_TO_AMERICAN)


def to_british(text: str, rng: random.Random) -> str:
    """Every American spelling in the table as a Briton writes it."""
    return _respell(text, AMERICAN_TO_BRITISH)


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


def drop_hedges(text: str, rng: random.Random) -> str:
    """Without "perhaps", "I think" and their like, where the sentence stands without them."""

    def change(sentence: str) -> str:
        after = HEDGE.sub("", RATHER.sub("", sentence))
        if match := HEDGED_START.match(after):
            after = match[1] + upper_first(after[match.end() :])
        return _article(sentence, after) if len(words(after)) >= 3 else sentence

    return each_sentence(text, change, times=6)


def add_hedges(text: str, rng: random.Random) -> str:
    """Open with "Perhaps" or "I think" where a subject opens and no sentence beside is hedged."""

    def change(sentence: str, i: int) -> str:
        tokens = words(sentence)
        if first_word(sentence).split("'")[0] not in LOWERED or not plain_end(sentence):
            return sentence
        if len(tokens) < 3 or sentence[0].islower():
            return sentence
        opening = rng.choice(OPENINGS)
        if tokens[0].split("'")[0] == "i":  # "I think I went" is one I too many
            opening = "Perhaps"
        return f"{opening} {lower_first(sentence)}"

    return every_other(text, _hedged, change)


def drop_boosters(text: str, rng: random.Random) -> str:
    """Without "very", "really" and their like before a word."""

    def change(sentence: str) -> str:
        after = BOOSTER.sub("", sentence)
        if match := BOOSTED_START.match(after):
            after = match[1] + upper_first(after[match.end() :])
        return _article(sentence, after)

    return each_sentence(text, change, times=6)


def add_boosters(text: str, rng: random.Random) -> str:
    """Put "very" or "really" before adjectives that take it, behind "a" and forms of be."""

    def put(match: re.Match[str]) -> str:
        before = {"an": "a", "An": "A"}.get(match["before"], match["before"])
        return f"{before} {rng.choice(BOOSTERS_IN)} "

    return ADJECTIVE.sub(put, text)


def drop_that(text: str, rng: random.Random) -> str:
    """Drop it: "I think that he" becomes "I think he"."""
    return DROP_THAT.sub(r"\1 ", text)


def add_that(text: str, rng: random.Random) -> str:
    """Put it in: "I think he" becomes "I think that he"."""
    return ADD_THAT.sub(r"\1 that ", text)


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
    value = UNITS.index(match["small"].lower())
    times = (match["times"] or "").strip().lower()
    return {"": str(value), "hundred": f"{value}00", "thousand": f"{value},000"}[times]


def digits_for_numbers(text: str, rng: random.Random) -> str:
    """Write "twenty-five men" as "25 men"; "one" stays, and so do ordinals and fractions."""
    return NUMBER.sub(_value, text)


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
        if (value > 99 and value % 100) or beside & BESIDE or before[0].endswith("."):
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
