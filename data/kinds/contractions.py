"""Contractions: write "do not" as "don't" everywhere a person may, and the other way round.

    expand("I can't say it's bad.")     "I cannot say it is bad."
    contract("I do not know him.")      "I don't know him."

What we chose. An 's is "is" only after the words where it cannot be a possessive, and where the
next word does not make it "has"; 'd is "had" or "would" by the next word; what is not sure stays.
"Don't you think?" becomes "Do you not think?". Nothing is contracted before a mark ("here I am.")
or after "than", "as" and "what". What we left out: "ain't", "'tis", two contractions on one word.
"""

import random
import re

from nanopersrm.style.lexicon import PARTICIPLES

BARE = {
    "dont": "do not",
    "didnt": "did not",
    "doesnt": "does not",
    "isnt": "is not",
    "wasnt": "was not",
    "arent": "are not",
    "couldnt": "could not",
    "wouldnt": "would not",
    "shouldnt": "should not",
    "havent": "have not",
    "hasnt": "has not",
    "im": "i am",
    "ive": "i have",
    "thats": "that is",
    "theyre": "they are",
    "youre": "you are",
    "gonna": "going to",
    "wanna": "want to",
}
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
VERBS = {
    "am": "'m",
    "are": "'re",
    "is": "'s",
    "have": "'ve",
    "had": "'d",
    "will": "'ll",
    "would": "'d",
}
AGREES = {
    "i": {"am", "have", "had", "will", "would"},
    "you": {"are", "have", "had", "will", "would"},
    "we": {"are", "have", "had", "will", "would"},
    "they": {"are", "have", "had", "will", "would"},
    "he": {"is", "had", "will", "would"},
    "she": {"is", "had", "will", "would"},
    "it": {"is", "will"},
    "there": {"is"},
    "that": {"is"},
}
NEVER_AFTER = frozenset(
    ["than", "as", "what", "how", "where", "whatever", "wherever", "and", "or", "nor", "neither"]
)
BASES = frozenset(
    [
        "be",
        "have",
        "do",
        "go",
        "say",
        "think",
        "like",
        "love",
        "give",
        "take",
        "make",
        "see",
        "know",
        "want",
        "need",
        "never",
        "get",
        "tell",
        "find",
        "keep",
        "seem",
        "look",
        "work",
        "help",
        "try",
        "ask",
        "feel",
        "leave",
        "call",
        "stay",
        "prefer",
        "rather",
        "expect",
        "suggest",
        "not",
        "still",
    ]
)
HAD = frozenset(["better", "best", "been", "had", "gone", "never", "already", "always", "just"])
UNSURE = frozenset(
    [
        "come",
        "become",
        "run",
        "put",
        "set",
        "cut",
        "let",
        "hit",
        "read",
        "hurt",
        "shut",
        "spread",
        "cost",
    ]
)


def _like(pattern: str, word: str) -> str:
    """`word` with the casing of `pattern`: all capitals, a capital, or as it is."""
    if pattern.isupper() and len(pattern) > 1:
        return word.upper()
    return word[0].upper() + word[1:] if pattern[0].isupper() else word


def _participle(word: str) -> bool:
    return word in PARTICIPLES or word in HAD or (word.endswith("ed") and len(word) > 4)


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
        elif last in BASES and last not in HAD:
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
    bare = re.compile(rf"\b({'|'.join(BARE)})\b", re.IGNORECASE)
    out = bare.sub(lambda m: _like(m[0], BARE[m[0].lower()]), out)
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
    return f"{match['before'] or ''}{match['subject']}{VERBS[verb]}"


def contract(text: str, rng: random.Random) -> str:
    """Every pair of words that is usually contracted, contracted."""
    out = re.sub(r"\b([Cc])annot\b", r"\1an not", text)
    out = NOT.sub(_short_not, out)
    out = LONG.sub(_short_verb, out)
    return re.sub(r"\b([Cc])an not\b(?= only\b)", r"\1annot", out)
