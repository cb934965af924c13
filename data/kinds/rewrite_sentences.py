"""Rewrites of sentences: their length, openings, paragraphs and capitals, and their marks.

Each function has the form `rewrite(text, rng) -> text`; a second time changes nothing, since an
edit looks only at things that it does not undo. A paragraph that the edit leaves stays as it was to
the letter; lists are not touched.

A sentence is split only before a clause that can stand alone: a subject that is a pronoun, or a
word like "the" with a verb from a short list behind it. Two are joined only where the second opens
with a word that is surely no name. A mark is replaced by what another person would write there.
"""

import json
import random
import re
from collections.abc import Callable
from pathlib import Path

from nanopersrm.style import lexicon
from nanopersrm.style.text import BULLET, WORD, sentences

LISTS = json.loads(Path(__file__).with_name("rewrites.json").read_text("utf-8"))
DETERMINERS, MORE_JOINED, FINITE, DEPENDENT, PASTS, SURE = (
    frozenset(LISTS["sentences"][name].split())
    for name in ("determiners", "joined", "finite", "dependent", "past", "surely finite")
)
NOMINATIVE = frozenset({"i", "he", "she", "we", "they"})
SUBJECTS = NOMINATIVE | {"it", "you", "there", "this", "that", "these", "those"}
LOWERED = SUBJECTS | DETERMINERS  # words that are no names: safe to write small inside a sentence
JOINED = LOWERED | MORE_JOINED  # openings that can stand behind ", and"
PATTERNS = {
    name: re.compile(pattern.replace("<lowered>", "|".join(sorted(LOWERED))))
    for name, pattern in LISTS["patterns"].items()
}
PARAGRAPH = re.compile(r"(\n[^\S\n]*\n\s*)")
THIS = {"was": "This", "is": "This", "has": "This", "had": "This", "were": "These", "are": "These"}
JOIN_MOST, JOIN_EACH = 60, 38  # words of a joined sentence, of each part
BREAK_AFTER = 2  # sentences of a paragraph after a split
INSTEAD = {"and": "", "but": "Still, ", "yet": "Even so, ", "so": "Thus "}
SHORT_ENOUGH = 22  # words of a sentence that may end in "!" or "..."


def _has_list(paragraph: str) -> bool:
    return any(BULLET.match(line) for line in paragraph.split("\n"))


def each_paragraph(text: str, edit: Callable[[list[str]], list[str]]) -> str:
    """The text with the sentences of every paragraph edited."""
    parts = PARAGRAPH.split(text)
    for i in range(0, len(parts), 2):
        if _has_list(parts[i]):
            continue
        before = list(sentences(parts[i]))
        after = edit(list(before)) if before else before
        if after != before:
            parts[i] = " ".join(after)
    return "".join(parts)


def each_sentence(text: str, change: Callable[[str], str], times: int = 1) -> str:
    """The text with every sentence changed, up to so many times: an edit can make room for more."""
    for _ in range(times):
        before = text
        text = each_paragraph(text, lambda paragraph: [change(sentence) for sentence in paragraph])
        if text == before:
            break
    return text


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
    return re.sub(r"[^\W_]", lambda letter: letter[0].upper(), sentence, count=1)


def is_clause(text: str) -> bool:
    """Whether a piece of a sentence surely stands alone: a subject and a verb of the short list."""
    tokens = words(text)
    if len(tokens) < 3:
        return False
    subject = tokens[0].split("'")[0]
    near = tokens[1:3] if subject in SUBJECTS else tokens[1:6]
    if "'" in tokens[0] and tokens[0] in FINITE:
        return True
    if subject in NOMINATIVE:
        return not text[len(subject) :].startswith(",")
    named = text[:1].isupper() and subject not in FINITE
    plain = subject not in JOINED | FINITE | DEPENDENT and not subject.endswith(("ing", "ed", "ly"))
    if plain and tokens[1] in SURE:
        return subject not in ("to", "not", "than", "nor", "or", "and")
    if subject not in LOWERED and not named:
        return False
    head = words(re.split(r"[,;:]| (?:that|which|who|whom|whose|when|where|if) ", text)[0])
    return any(word in FINITE or _past(word) for word in near if word in head)


def _past(word: str) -> bool:
    return word in PASTS or (len(word) > 4 and word.endswith("ed") and not word.endswith("eed"))


def is_complete(text: str) -> bool:
    """Whether what stands before a cut can be a sentence: it has a verb and depends on nothing."""
    tokens = words(text)
    if len(tokens) < 3 or tokens[0] in DEPENDENT or text.count("(") != text.count(")"):
        return False
    tail = re.split(r"[,;:] ", text)[-1]  # "…, when he came, and he" goes with the last part
    return any(word in FINITE or _past(word) for word in tokens) and not (
        set(words(tail)[:2]) & DEPENDENT
    )


def _split(sentence: str) -> list[str]:
    if not re.search(r"\.[\"')]*$", sentence):
        return [sentence]
    for match in PATTERNS["split at"].finditer(sentence):
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
    both = PATTERNS["shared"].match(sentence)
    if both and _past(both["verb"]) and _past(both["next"]):
        left, right = both[0].removesuffix(" and ").removesuffix(","), sentence[both.end() :]
        if len(words(left)) > 3 and not set(words(left)) & DEPENDENT:
            return [f"{left}.", *_split(f"{both['subject']} {right}")]
    return [sentence]


def split_sentences(text: str, rng: random.Random) -> str:
    """Sentences cut at semicolons and before ", and he …", ", but the … was …"."""
    return each_paragraph(
        text, lambda whole: [part for sentence in whole for part in _split(sentence)]
    )


def plain_end(sentence: str) -> bool:
    """Whether the sentence ends with one full stop and no quote or bracket behind it."""
    last = sentence.split()[-1].lower() if sentence.split() else ""
    return bool(re.search(r"[\w'\"]\.$", sentence)) and last not in lexicon.LISTS["abbreviations"]


def can_follow(sentence: str) -> bool:
    """Whether the sentence can go on behind another one in small letters."""
    opening = first_word(sentence).split("'")[0]
    return sentence[:1].isupper() and (opening in JOINED or opening in {"but", "and", "yet", "so"})


def join_sentences(text: str, rng: random.Random) -> str:
    """Neighbouring short sentences joined by ", and" (or by the "but" that opened the second)."""

    def join(left: str, right: str) -> str | None:
        size = len(words(left)) + len(words(right))
        if not _joinable(left, right, JOIN_EACH) or size > JOIN_MOST:
            return None
        opened = first_word(right) in lexicon.LISTS["conjunctions"]
        return f"{left[:-1]}, {'' if opened else 'and '}{lower_first(right)}"

    return each_paragraph(text, lambda paragraph: _merge(paragraph, join))


def _joinable(left: str, right: str, most: int) -> bool:
    """Whether two neighbours of at most so many words each can be one sentence."""
    return (
        plain_end(left)
        and plain_end(right)
        and can_follow(right)
        and ";" not in left + right
        and 1 < len(words(left)) <= most
        and len(words(right)) <= most
    )


def _merge(paragraph: list[str], join: Callable[[str, str], str | None]) -> list[str]:
    """The sentences, each joined to the one before it where `join` gives a sentence of both."""
    out: list[str] = []
    for sentence in paragraph:
        if out and (both := join(out[-1], sentence)):
            out[-1] = both
        else:
            out.append(sentence)
    return out


def split_paragraphs(text: str, rng: random.Random) -> str:
    """A blank line after every second sentence, never inside quotes."""
    parts = PARAGRAPH.split(text)
    for i in range(0, len(parts), 2):
        if _has_list(parts[i]):
            continue
        within, groups, quotes = list(sentences(parts[i])), [[]], 0  # type: ignore[var-annotated]
        for j, sentence in enumerate(within):
            groups[-1].append(sentence)
            quotes += sentence.count('"')
            full = len(groups[-1]) >= BREAK_AFTER and len(within) - j > BREAK_AFTER
            if full and quotes % 2 == 0 and re.match(r"[\"']?[A-Z]", within[j + 1]):
                groups.append([])
        if len(groups) > 1:
            parts[i] = "\n\n".join(" ".join(group) for group in groups)
    return "".join(parts)


def join_paragraphs(text: str, rng: random.Random) -> str:
    """All paragraphs in one; lists, and what introduces them with a colon, stay apart."""
    parts = PARAGRAPH.split(text)
    for i in range(1, len(parts), 2):
        listed = _has_list(parts[i - 1]) or _has_list(parts[i + 1])
        ended = re.search(r"[.!?][\"')]*\s*$", parts[i - 1])
        if ended and parts[i + 1] and not listed:
            parts[i] = " "
    return "".join(parts)


def every_other(
    text: str, has_habit: Callable[[str], bool], change: Callable[[str, int], str]
) -> str:
    """Change the sentences that have no neighbour with the habit; a second time finds none left.

    change: takes a sentence and its place in the paragraph.
    """

    def edit(paragraph: list[str]) -> list[str]:
        out: list[str] = []
        for i, sentence in enumerate(paragraph):
            neighbours = [*out[-1:], sentence, *paragraph[i + 1 : i + 2]]
            out.append(sentence if any(map(has_habit, neighbours)) else change(sentence, i))
        return out

    return each_paragraph(text, edit)


def open_with_and(text: str, rng: random.Random) -> str:
    """Put "And" before sentences that open with a subject, "But" before such with a negation."""

    def change(sentence: str, i: int) -> str:
        opening = first_word(sentence).split("'")[0]
        if i == 0 or opening not in LOWERED or not plain_end(sentence) or sentence[0].islower():
            return sentence
        against = any(
            w in lexicon.LISTS["negations"] or w.endswith("n't") for w in words(sentence)[:6]
        )
        return f"{'But' if against else 'And'} {lower_first(sentence)}"

    return every_other(
        text, lambda s: not lexicon.LISTS["conjunctions"].isdisjoint(words(s)[:1]), change
    )


def open_without_and(text: str, rng: random.Random) -> str:
    """Sentences that open with "And he" open with "He", those with "But he" with "Still, he"."""

    def change(sentence: str) -> str:
        match = PATTERNS["opening"].match(sentence)
        if not match or match[3].lower().split("'")[0] not in LOWERED:
            return sentence
        instead, rest = INSTEAD[match[2].lower()], sentence[match.end() :]
        return match[1] + (instead + rest if instead else upper_first(rest))

    return each_sentence(text, change)


def lower_starts(text: str, rng: random.Random) -> str:
    """Sentences open with a small letter, and "I" is "i"."""

    def edit(paragraph: list[str]) -> list[str]:
        out: list[str] = []
        for sentence in paragraph:
            if out and not re.search(r"[^.][.!?]$", out[-1]):
                out.append(sentence)  # a quote before it: a small letter would join the two
                continue
            match = WORD.search(sentence)
            if match and (len(match[0]) == 1 or not match[0].isupper()):
                at = match.start()
                sentence = sentence[:at] + sentence[at].lower() + sentence[at + 1 :]
            out.append(re.sub(r"\bI(?=$|[\s,;]|'[a-z])", "i", sentence))
        return out

    return each_paragraph(text, edit)


def capitalize_starts(text: str, rng: random.Random) -> str:
    """Sentences open with a capital letter, and "i" is "I"."""
    return each_sentence(text, lambda s: upper_first(re.sub(r"\bi(?=$|[\s,;]|'[a-z])", "I", s)))


def _stop_or_comma(left: str, right: str) -> str:
    """What stands for a semicolon: ". " and a capital between clauses, else ", "."""
    bare = re.sub(r"^(?:and|but|so|yet|for) ", "", right)
    starts = words(re.split(r"[,;:] ", left)[-1])[:1] + words(left)[:1]
    if is_clause(bare) and len(words(left)) > 2 and not set(starts) & DEPENDENT:
        return f"{left.rstrip('.')}. {upper_first(right)}"
    return f"{left}, {right}"


def drop_semicolons(text: str, rng: random.Random) -> str:
    """Full stops between clauses that can stand alone, commas elsewhere."""

    def change(sentence: str) -> str:
        while match := PATTERNS["semicolon"].search(sentence):
            sentence = _stop_or_comma(sentence[: match.start()], sentence[match.end() :])
        return sentence

    return each_sentence(text, change)


def add_semicolons(text: str, rng: random.Random) -> str:
    """Before ", but he" and its like, and between short sentences that belong together."""

    def change(sentence: str) -> str:
        match = None if ";" in sentence else PATTERNS["clause"].search(sentence)
        if match and is_complete(sentence[: match.start()]):
            return f"{sentence[: match.start()]}; {sentence[match.end() :]}"
        return sentence

    def join(left: str, right: str) -> str | None:
        return f"{left[:-1]}; {lower_first(right)}" if _joinable(left, right, 25) else None

    return each_paragraph(text, lambda paragraph: _merge([change(s) for s in paragraph], join))


def drop_dashes(text: str, rng: random.Random) -> str:
    """Commas for dashes; a semicolon before a clause; three dots where speech breaks off."""

    def plain(match: re.Match[str]) -> str:
        left, right = match.string[: match.start()], match.string[match.end() :]
        mark = match["before"]
        if not right or re.match(r"[\"')]+(?:$|[\s.,;:!?])", right):  # speech breaks off
            return "..." if left and left[-1].isalnum() else mark
        opens = re.search(r"(?:^|[\s(\[])[\"'(\[]+$", left)
        if not left or (opens and not mark):
            return f"{mark} " if mark else ""
        if left[-1].isdigit() and right[0].isdigit() and not mark:
            return "-"
        if mark or left[-1] in "!?.":
            return f"{mark} "
        clause = is_clause(re.split(r"\s[-–—]\s|--", right)[0]) and is_complete(left)
        return "; " if clause and PATTERNS["dashes"].search(right) is None else ", "

    return each_sentence(text, lambda sentence: PATTERNS["dash"].sub(plain, sentence), times=6)


def add_dashes(text: str, rng: random.Random) -> str:
    """Dashes round an aside, before a last "but", for a semicolon; one place a sentence."""
    dash = "—" if "—" in text else " - "

    def change(sentence: str) -> str:
        if PATTERNS["dashes"].search(sentence):
            return sentence
        aside = rf"{dash}\g<aside>"
        edits = {"between commas": f"{aside}{dash}", "at end": aside}
        edits |= {"last but": rf"{dash}\g<tail>", "after word": dash}
        after = _replace_first(sentence, edits)
        return sentence if after == sentence else re.sub(r" -  ", " - ", after)

    return each_sentence(text, change)


def _replace_first(sentence: str, edits: dict[str, str]) -> str:
    """One place of the first pattern that changes the sentence, replaced."""
    edited = (PATTERNS[name].sub(put, sentence, count=1) for name, put in edits.items())
    return next((after for after in edited if after != sentence), sentence)


def _worth(inside: str) -> bool:
    """Whether what stands in brackets reads on as part of the sentence: words in small letters."""
    return bool(re.search(r"[a-z]{2}", inside)) and not re.search(r"[;:.!?\d§]", inside)


def drop_brackets(text: str, rng: random.Random) -> str:
    """Commas for brackets; numbers, short names and whole sentences in brackets stay."""

    def plain(match: re.Match[str]) -> str:
        start = match.start()
        glued = start > 0 and match[0][:1] == "(" and match.string[start - 1].isalnum()
        if glued or not _worth(match["inside"]) or start == 0:
            return match[0]
        goes_on = match.string[match.end() :][:1] not in ("", ")", '"', "'")
        return f", {match['inside'].strip()}{match['after'] or (',' if goes_on else '')}"

    def change(sentence: str) -> str:
        whole = sentence.count("(") == sentence.count(")")
        return PATTERNS["bracket"].sub(plain, sentence) if whole else sentence

    return each_sentence(text, change, times=6)


def add_brackets(text: str, rng: random.Random) -> str:
    """Brackets round an aside between commas or dashes, or at the end; one place a sentence."""

    def change(sentence: str) -> str:
        if "(" in sentence or ")" in sentence:
            return sentence
        put = r" (\g<aside>)"
        edits = {"between commas": put, "between dashes": f"{put} ", "at end": put}
        return _replace_first(sentence, edits)

    return each_sentence(text, change)


def drop_exclamations(text: str, rng: random.Random) -> str:
    """A full stop, or a comma where the sentence goes on ("Stop!" he said; Oh! how)."""

    def plain(match: re.Match[str]) -> str:
        if "?" in match[0]:
            return "?"
        rest = match.string[match.end() :]
        goes_on = re.match(r"[\"')]*\s+([a-z])", rest)
        if match.start() and match.string[match.start() - 1] in ".,;:":
            return ""
        return "," if goes_on else "."

    return re.sub(r"[!?]*![!?]*", plain, text)


def _endings(text: str, mark: str) -> str:
    def edit(paragraph: list[str]) -> list[str]:
        out = []
        for sentence, following in zip(paragraph, [*paragraph[1:], "A"], strict=True):
            short = len(words(sentence)) <= SHORT_ENOUGH and plain_end(sentence.rstrip("\"'"))
            opens = next((c for c in following if c.isalpha()), "A").isupper()
            out.append(PATTERNS["stop at end"].sub(mark, sentence) if short and opens else sentence)
        return out

    return each_paragraph(text, edit)


def add_exclamations(text: str, rng: random.Random) -> str:
    """Sentences of at most SHORT_ENOUGH words end in "!"."""
    return _endings(text, "!")


def drop_ellipses(text: str, rng: random.Random) -> str:
    """A full stop at the end of a sentence, a comma inside."""

    def plain(match: re.Match[str]) -> str:
        left, rest = match.string[: match.start()].rstrip(), match.string[match.end() :]
        if not left or left[-1] in "\"'([\n":
            return ""
        if left[-1] in ".,;:!?" or rest[:1] in tuple("?!,;:."):
            return " " if rest[:1].isalnum() else ""
        goes_on = re.match(r"[\"')]*\s*[a-z]", rest)
        return ", " if goes_on and rest[:1].isalnum() else "," if goes_on else "."

    return re.sub(r"[ \t]*(?:\.{2,}|…)(?:[ \t]*(?:\.{2,}|…))*", plain, text)


def add_ellipses(text: str, rng: random.Random) -> str:
    """Sentences of at most SHORT_ENOUGH words trail off in three dots."""
    return _endings(text, "...")
