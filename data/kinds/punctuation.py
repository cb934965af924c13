"""Punctuation: semicolons, dashes, brackets, exclamation marks and ellipses, more of them or none.

Every mark is taken away by writing what another person would write there (a full stop and a capital
where a clause can stand alone, else a comma), and brought in where it fits: a semicolon between
short neighbouring sentences or before ", but he", dashes and brackets round ", of course," and
relative clauses. What we left out: colons, quotes, marks in lists, hyphens without blanks. Where to
read next: `rewrites.py`.
"""

import random
import re

from data.kinds.sentence_shape import (
    DEPENDENT,
    NOMINATIVE,
    can_follow,
    each_paragraph,
    is_clause,
    is_complete,
    lower_first,
    plain_end,
    settle,
    upper_first,
    words,
)

SEMICOLON = re.compile(r"\s*;[-\s]*(?=(?P<next>[\w']*))")
CLAUSE = re.compile(rf", (?=(?:but|for|yet|so|and) (?:{'|'.join(sorted(NOMINATIVE))}|it|there)\b)")
DASH = re.compile(r"(?P<before>[,;:.]?)(?:\s*(?:—|―|-{2,})\s*|\s+[-–]\s+)")
DASHES = re.compile(r"—|―|-{2,}|(?<=\s)[-–](?=\s)")
ASIDE = (
    "of course|however|in fact|for example|for instance|indeed|perhaps|I think|I believe|I suppose|"
    "it seems|no doubt|after all|at least|in short|to be sure|in turn|in part|at last|on the whole|"
    "in general|in particular|therefore|moreover|nevertheless|I am sure|it is true|in other words"
)
BETWEEN_COMMAS = re.compile(
    rf"(?<=[\w'\"]), (?P<aside>{ASIDE}|(?:which|who|whom|whose|where) [^,;:.!?()\"]{{4,70}}"
    rf"),(?= (?!and\b|or\b|nor\b|but\b))"
)
AT_END = re.compile(
    r"(?<=[\w'\"]), (?P<aside>(?:which|who|whose|where|though|although|or rather|especially|"
    r"including|such as|not) [^,;:.!?()\"]{4,80})(?=\.$)"
)
LAST_BUT = re.compile(r"(?<=[\w']), (?P<tail>(?:but|yet|and yet|or rather) [^,;:()\"]+)(?=[.!]$)")
BRACKET = re.compile(r"(?P<before>[,;:]?) ?\((?P<inside>[^()]*)\)(?P<after>[,;:.!?]?)")
SHORT_ENOUGH = 22  # words of a sentence that may end in "!" or "..."


def _stop_or_comma(left: str, right: str) -> str:
    """What stands for a semicolon: ". " and a capital between clauses, else ", "."""
    bare = re.sub(r"^(?:and|but|so|yet|for) ", "", right)
    starts = words(re.split(r"[,;:] ", left)[-1])[:1] + words(left)[:1]
    if is_clause(bare) and len(words(left)) > 2 and not set(starts) & DEPENDENT:
        return f"{left.rstrip('.')}. {upper_first(right)}"
    return f"{left}, {right}"


def drop_semicolons(text: str, rng: random.Random) -> str:
    """Full stops between clauses that can stand alone, commas elsewhere."""

    def edit(own: list[str]) -> list[str]:
        out = []
        for sentence in own:
            while match := SEMICOLON.search(sentence):
                left, right = sentence[: match.start()], sentence[match.end() :]
                sentence = _stop_or_comma(left, right)
            out.append(sentence)
        return out

    return each_paragraph(text, edit)


def bring_semicolons(text: str, rng: random.Random) -> str:
    """Before ", but he" and its like, and between short sentences that belong together."""

    def edit(own: list[str]) -> list[str]:
        out: list[str] = []
        for sentence in own:
            if ";" not in sentence:
                match = CLAUSE.search(sentence)
                if match and is_complete(sentence[: match.start()]):
                    sentence = f"{sentence[: match.start()]}; {sentence[match.end() :]}"
            if out and _belong(out[-1], sentence):
                out[-1] = f"{out[-1][:-1]}; {lower_first(sentence)}"
            else:
                out.append(sentence)
        return out

    return each_paragraph(text, edit)


def _belong(left: str, right: str) -> bool:
    return (
        plain_end(left)
        and plain_end(right)
        and can_follow(right)
        and ";" not in left + right
        and 1 < len(words(left)) <= 25
        and len(words(right)) <= 25
    )


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
        return "; " if clause and DASHES.search(right) is None else ", "

    def edit(own: list[str]) -> list[str]:
        return [DASH.sub(plain, sentence) for sentence in own]

    return settle(text, edit)


def bring_dashes(text: str, rng: random.Random) -> str:
    """Dashes round an aside, before a last "but", for a semicolon; one place a sentence."""
    dash = "—" if "—" in text else " - "

    def change(sentence: str) -> str:
        if DASHES.search(sentence):
            return sentence
        for pattern, put in (
            (BETWEEN_COMMAS, rf"{dash}\g<aside>{dash}"),
            (AT_END, rf"{dash}\g<aside>"),
            (LAST_BUT, rf"{dash}\g<tail>"),
            (re.compile(r"(?<=\w); "), dash),
        ):
            after = pattern.sub(put, sentence, count=1)
            if after != sentence:
                return re.sub(r" -  ", " - ", after)
        return sentence

    return each_paragraph(text, lambda own: [change(sentence) for sentence in own])


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

    def edit(own: list[str]) -> list[str]:
        return [BRACKET.sub(plain, one) if one.count("(") == one.count(")") else one for one in own]

    return settle(text, edit)


def bring_brackets(text: str, rng: random.Random) -> str:
    """Brackets round an aside between commas or dashes, or at the end; one place a sentence."""

    def change(sentence: str) -> str:
        if "(" in sentence or ")" in sentence:
            return sentence
        for pattern, put in (
            (BETWEEN_COMMAS, r" (\g<aside>)"),
            (re.compile(r" - (?P<aside>[a-z][^-;:.!?\"]{3,70}) - "), r" (\g<aside>) "),
            (AT_END, r" (\g<aside>)"),
        ):
            after = pattern.sub(put, sentence, count=1)
            if after != sentence:
                return after
        return sentence

    return each_paragraph(text, lambda own: [change(sentence) for sentence in own])


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


STOP_AT_END = re.compile(r"(?<=[\w'])\.(?=[\"']?$)")


def _endings(text: str, mark: str) -> str:
    def edit(own: list[str]) -> list[str]:
        out = []
        for sentence, following in zip(own, [*own[1:], "A"], strict=True):
            short = len(words(sentence)) <= SHORT_ENOUGH and plain_end(sentence.rstrip("\"'"))
            opens = next((c for c in following if c.isalpha()), "A").isupper()
            out.append(STOP_AT_END.sub(mark, sentence) if short and opens else sentence)
        return out

    return each_paragraph(text, edit)


def bring_exclamations(text: str, rng: random.Random) -> str:
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


def bring_ellipses(text: str, rng: random.Random) -> str:
    """Sentences of at most SHORT_ENOUGH words trail off in three dots."""
    return _endings(text, "...")
