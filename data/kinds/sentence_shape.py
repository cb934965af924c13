"""Sentence shape: split and join sentences and paragraphs, open them with "And", drop capitals.

`each_paragraph` hands the sentences of every paragraph to an edit and puts back what it returns; a
paragraph that the edit leaves as it was stays as it was to the letter, and lists are not touched.

What we chose. A sentence is split only before a clause that can stand alone: a subject that is a
pronoun, or a word like "the" with a verb from a short list behind it; never in brackets, after
"if" and its like, or in a question. Two sentences are joined only where the second opens with a
word that is surely no name. Every edit is built so that a second time changes nothing: an edit
looks only at things that it does not undo.
"""

import random
import re
from collections.abc import Callable

from nanopersrm.style.lexicon import ABBREVIATIONS, CONJUNCTIONS, NEGATIONS
from nanopersrm.style.text import BULLET, WORD, sentences


def _set(words: str) -> frozenset[str]:
    return frozenset(words.split())


PARAGRAPH = re.compile(r"(\n[^\S\n]*\n\s*)")
NOMINATIVE = _set("i he she we they")
SUBJECTS = NOMINATIVE | _set("it you there this that these those")
DETERMINERS = _set("the a an my your his her its our their some many most each every no all such")
LOWERED = SUBJECTS | DETERMINERS  # words that are no names: safe to write small inside a sentence
JOINED = LOWERED | _set(  # openings that can stand behind ", and"
    "in at on for with by from to of under during after before when if as while although though "
    "since then now here soon sometimes often at nothing nobody everything everybody one two "
    "several another both among through without upon over only once perhaps even still instead"
)
FINITE = _set(
    "is are was were am has have had will would can could may might must shall should do does did "
    "said says went came made took gave knew saw thought felt found got began became seemed stood "
    "looked turned told asked left kept held heard let put ran sat lay fell brought means makes "
    "takes gives comes goes seems needs wants remains isn't aren't wasn't weren't don't doesn't "
    "built slept wept fought caught understood led read spoke wrote sat drew threw grew broke "
    "chose drove rose wore met won lost meant spent paid sent says thinks knows shows gets uses "
    "lives works "
    "didn't can't couldn't won't wouldn't i'm it's he's she's we're they're you're there's that's"
)
DEPENDENT = _set(
    "if when while as though although since because unless until whether where whenever before "
    "after once that which who what how why whose whom let both either neither not having being"
)
PASTS = _set(
    "said went came made took gave knew saw thought felt found got began became stood told left "
    "kept held heard ran lay fell brought spoke wrote sat drew threw grew broke chose drove rose "
    "wore met won lost meant spent paid sent built fought caught understood led"
)
SPLIT_AT = re.compile(
    r"(?P<mark>;|,|:| -) (?P<word>(?:and|but|so|yet|which) )?(?=[A-Za-z])"
    r"|(?P<bare>) (?P<and>and|but) (?=(?:I|he|she|we|they) )"
)
SURE = _set("is are was were has have had will would can could may might must should does did")
THIS = {"was": "This", "is": "This", "has": "This", "had": "This", "were": "These", "are": "These"}
SHARED = re.compile(  # "He opened the door and walked out"
    r"^(?P<subject>I|He|She|We|They) (?P<verb>\w+) (?P<rest>[^,;:\"()]*?),? and (?=(?P<next>\w+) )"
)
JOIN_MOST, JOIN_EACH = 60, 38  # words of a joined sentence, of each part
BREAK_AFTER = 2  # sentences of a paragraph after a split


def each_paragraph(text: str, edit: Callable[[list[str]], list[str]]) -> str:
    """The text with the sentences of every paragraph edited."""
    parts = PARAGRAPH.split(text)
    for i in range(0, len(parts), 2):
        lines = parts[i].split("\n")
        if any(BULLET.match(line) for line in lines):
            continue
        before = list(sentences(parts[i]))
        after = edit(list(before)) if before else before
        if after != before:
            parts[i] = " ".join(after)
    return "".join(parts)


def words(sentence: str) -> list[str]:
    """The words of a sentence in lower case."""
    return [word.lower() for word in WORD.findall(sentence)]


def first_word(sentence: str) -> str:
    """The first word in lower case, if nothing stands before it and it is not in capitals."""
    match = WORD.match(sentence)
    return match[0].lower() if match and (len(match[0]) == 1 or not match[0].isupper()) else ""


def lower_first(sentence: str) -> str:
    """The sentence with a small first letter; "I" stays."""
    return sentence if re.match(r"I\b", sentence) else sentence[:1].lower() + sentence[1:]


def upper_first(sentence: str) -> str:
    """The sentence with a capital first letter, behind quotes and brackets."""
    match = re.search(r"[^\W_]", sentence)
    if not match:
        return sentence
    at = match.start()
    return sentence[:at] + sentence[at].upper() + sentence[at + 1 :]


def is_clause(text: str) -> bool:
    """Whether a piece of a sentence surely stands alone: a subject and a verb of the short list."""
    own = words(text)
    if len(own) < 3:
        return False
    subject = own[0].split("'")[0]
    near = own[1:3] if subject in SUBJECTS else own[1:6]
    if "'" in own[0] and own[0] in FINITE:
        return True
    if subject in NOMINATIVE:
        return not text[len(subject) :].startswith(",")
    named = text[:1].isupper() and subject not in FINITE
    plain = subject not in JOINED | FINITE | DEPENDENT and not subject.endswith(("ing", "ed", "ly"))
    if plain and own[1] in SURE:
        return subject not in ("to", "not", "than", "nor", "or", "and")
    if subject not in LOWERED and not named:
        return False
    head = words(re.split(r"[,;:]| (?:that|which|who|whom|whose|when|where|if) ", text)[0])
    return any(word in FINITE or _past(word) for word in near if word in head)


def _past(word: str) -> bool:
    return word in PASTS or (len(word) > 4 and word.endswith("ed") and not word.endswith("eed"))


def is_complete(text: str) -> bool:
    """Whether what stands before a cut can be a sentence: it has a verb and depends on nothing."""
    own = words(text)
    if len(own) < 3 or own[0] in DEPENDENT or text.count("(") != text.count(")"):
        return False
    tail = re.split(r"[,;:] ", text)[-1]  # "…, when he came, and he" goes with the last part
    return any(word in FINITE or _past(word) for word in own) and not (
        set(words(tail)[:2]) & DEPENDENT
    )


def _split(sentence: str) -> list[str]:
    if not re.search(r"\.[\"')]*$", sentence):
        return [sentence]
    for match in SPLIT_AT.finditer(sentence):
        left, right = sentence[: match.start()].rstrip(" -—–"), sentence[match.end() :]
        word = (match["word"] or match["and"] or "").strip()
        if (match["mark"] == "," and not word) or (match["mark"] == " -" and " - " in right):
            continue
        if word == "which":
            opening = THIS.get(right.split()[0], "")
            if not opening or match["mark"] != "," or "," in right or len(words(right)) < 4:
                continue
            right, word = f"{opening} {right}", ""
        if is_complete(left) and is_clause(right):
            kept = "" if word in ("", "and") else f"{word} "
            return [*_split(f"{left.rstrip('.')}."), *_split(upper_first(kept + right))]
    both = SHARED.match(sentence)
    if both and _past(both["verb"]) and _past(both["next"]):
        left, right = both[0].removesuffix(" and ").removesuffix(","), sentence[both.end() :]
        if len(words(left)) > 3 and not set(words(left)) & DEPENDENT:
            return [f"{left}.", *_split(f"{both['subject']} {right}")]
    return [sentence]


def split_sentences(text: str, rng: random.Random) -> str:
    """Sentences cut at semicolons and before ", and he …", ", but the … was …"."""
    return each_paragraph(text, lambda own: [part for sentence in own for part in _split(sentence)])


def plain_end(sentence: str) -> bool:
    """Whether the sentence ends with one full stop and no quote or bracket behind it."""
    last = sentence.split()[-1].lower() if sentence.split() else ""
    return bool(re.search(r"[\w'\"]\.$", sentence)) and last not in ABBREVIATIONS


def can_follow(sentence: str) -> bool:
    """Whether the sentence can go on behind another one in small letters."""
    opening = first_word(sentence).split("'")[0]
    return sentence[:1].isupper() and (opening in JOINED or opening in {"but", "and", "yet", "so"})


def join_sentences(text: str, rng: random.Random) -> str:
    """Neighbouring short sentences joined by ", and" (or by the "but" that opened the second)."""

    def edit(own: list[str]) -> list[str]:
        out: list[str] = []
        for sentence in own:
            if out and _can_join(out[-1], sentence):
                opened = first_word(sentence) in CONJUNCTIONS
                out[-1] = f"{out[-1][:-1]}, {'' if opened else 'and '}{lower_first(sentence)}"
            else:
                out.append(sentence)
        return out

    return each_paragraph(text, edit)


def _can_join(left: str, right: str) -> bool:
    return (
        plain_end(left)
        and plain_end(right)
        and can_follow(right)
        and 1 < len(words(left)) <= JOIN_EACH
        and len(words(right)) <= JOIN_EACH
        and len(words(left)) + len(words(right)) <= JOIN_MOST
        and ";" not in left + right
    )


def settle(text: str, edit: Callable[[list[str]], list[str]]) -> str:
    """`each_paragraph` until nothing changes: an edit can make room for the next one."""
    for _ in range(6):
        after = each_paragraph(text, edit)
        if after == text:
            break
        text = after
    return text


def break_paragraphs(text: str, rng: random.Random) -> str:
    """A blank line after every second sentence, never inside quotes."""
    parts = PARAGRAPH.split(text)
    for i in range(0, len(parts), 2):
        if any(BULLET.match(line) for line in parts[i].split("\n")):
            continue
        own, groups, quotes = list(sentences(parts[i])), [[]], 0  # type: ignore[var-annotated]
        for j, sentence in enumerate(own):
            groups[-1].append(sentence)
            quotes += sentence.count('"')
            full = len(groups[-1]) >= BREAK_AFTER and len(own) - j > BREAK_AFTER
            if full and quotes % 2 == 0 and re.match(r"[\"']?[A-Z]", own[j + 1]):
                groups.append([])
        if len(groups) > 1:
            parts[i] = "\n\n".join(" ".join(group) for group in groups)
    return "".join(parts)


def join_paragraphs(text: str, rng: random.Random) -> str:
    """All paragraphs in one; lists, and what introduces them with a colon, stay apart."""
    parts = PARAGRAPH.split(text)
    for i in range(1, len(parts), 2):
        beside = (parts[i - 1], parts[i + 1])
        listed = any(BULLET.match(line) for part in beside for line in part.split("\n"))
        ended = re.search(r"[.!?][\"')]*\s*$", parts[i - 1])
        if ended and parts[i + 1] and not listed:
            parts[i] = " "
    return "".join(parts)


def _opens_with(sentence: str, openings: frozenset[str]) -> bool:
    own = words(sentence)
    return bool(own) and own[0] in openings


def every_other(
    own: list[str], has: Callable[[str], bool], change: Callable[[str, int], str]
) -> list[str]:
    """Change the sentences that have no neighbour with the habit; a second time finds none left."""
    out: list[str] = []
    for i, sentence in enumerate(own):
        beside = (out[-1:] if out else []) + [sentence, *own[i + 1 : i + 2]]
        out.append(sentence if any(has(one) for one in beside) else change(sentence, i))
    return out


def open_with_and(text: str, rng: random.Random) -> str:
    """Put "And" before sentences that open with a subject, "But" before such with a negation."""

    def change(sentence: str, i: int) -> str:
        opening = first_word(sentence).split("'")[0]
        if i == 0 or opening not in LOWERED or not plain_end(sentence) or sentence[0].islower():
            return sentence
        against = any(w in NEGATIONS or w.endswith("n't") for w in words(sentence)[:6])
        return f"{'But' if against else 'And'} {lower_first(sentence)}"

    return each_paragraph(
        text, lambda own: every_other(own, lambda s: _opens_with(s, CONJUNCTIONS), change)
    )


INSTEAD = {"and": "", "but": "Still, ", "yet": "Even so, ", "so": "Thus "}
OPENING = re.compile(r"^(\"?)(And|But|Yet|So),? (?=([\w']+))")


def open_without_and(text: str, rng: random.Random) -> str:
    """Sentences that open with "And he" open with "He", those with "But he" with "Still, he"."""

    def edit(own: list[str]) -> list[str]:
        out = []
        for sentence in own:
            match = OPENING.match(sentence)
            if match and match[3].lower().split("'")[0] in LOWERED:
                instead, rest = INSTEAD[match[2].lower()], sentence[match.end() :]
                sentence = match[1] + (instead + rest if instead else upper_first(rest))
            out.append(sentence)
        return out

    return each_paragraph(text, edit)


def small_starts(text: str, rng: random.Random) -> str:
    """Sentences open with a small letter, and "I" is "i"."""

    def edit(own: list[str]) -> list[str]:
        out: list[str] = []
        for sentence in own:
            match = WORD.search(sentence)
            known = not out or re.search(r"[^.][.!?]$", out[-1])
            if not known:
                out.append(sentence)  # a quote before it: a small letter would join the two
                continue
            if match and (len(match[0]) == 1 or not match[0].isupper()):
                at = match.start()
                sentence = sentence[:at] + sentence[at].lower() + sentence[at + 1 :]
            out.append(re.sub(r"\bI(?=$|[\s,;]|'[a-z])", "i", sentence))
        return out

    return each_paragraph(text, edit)


def capital_starts(text: str, rng: random.Random) -> str:
    """Sentences open with a capital letter, and "i" is "I"."""
    return each_paragraph(
        text,
        lambda own: [upper_first(re.sub(r"\bi(?=$|[\s,;]|'[a-z])", "I", one)) for one in own],
    )
