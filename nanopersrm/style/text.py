"""Cut the texts of one writer into paragraphs, sentences and words, once for all features.

A single line break is a hard wrap and counts as a blank; a blank line ends a paragraph; curly
quotes become straight quotes. No pattern below has two ways to match the same characters, so the
time is in proportion to the length. Left out: single quotes are not told from apostrophes, and
scripts without blanks between words come out as few, long words.
"""

import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from nanopersrm.style.lexicon import LISTS

FOLD = str.maketrans(
    dict.fromkeys("‘’ʼ´`′", "'")
    | dict.fromkeys("“”„«»″", '"')
    | dict.fromkeys("\u00ad\u200b\ufeff")
)
ACCENTS = re.compile("[\u0300-\u036f]+")  # loose accents, which would part a word in two
LINK = re.compile(r"(?:https?://|www\.)\S+")
BULLET = re.compile(r"\s*(?:[-*+•‣▪◦·]|\d{1,2}[.)]|[a-z]\))\s+(?=\S)")
FACE = "[\u2600-\u27bf\u2b50\U0001f1e6-\U0001f1ff\U0001f300-\U0001faff]"
EMOJI = re.compile(f"{FACE}(?:[\ufe0f\U0001f3fb-\U0001f3ff]|\u200d{FACE})*")
SMILEY = re.compile(r"(?<!\S)(?:[:;=]['-]?[()DPp3|/]+|<3+|[xX]D+)(?=[\s.,!?]|$)")
WORD = re.compile(r"[^\W_]+(?:(?:'|(?<=\d)[.,:](?=\d))[^\W_]+)*")  # don't, 1,000, 3.15
COMMA = re.compile(r",(?!\d)")
COLON = re.compile(r":(?!\S)")
DASH = re.compile(r"(?<=\s)-(?=\s)|-{2,}|[—―]|(?<!\d)–")
ELLIPSIS = re.compile(r"\.{2,}|…")
ENDS = frozenset(".!?…。！？")
CLOSERS = "\"')]}*_"


@dataclass(frozen=True)
class Text:
    """One or several texts of one writer, cut once for all factors. Words are in lower case."""

    flat: str  # all paragraphs, one a line, bullets, links and smileys taken out
    runs: list[list[str]]  # the words of each text
    counts: Counter[str]  # of words
    size: int  # number of words
    lengths: list[int]  # words of each sentence and list line
    starts: list[str]  # first word of each sentence as written, list lines left out
    breaks: int  # blank-line breaks between paragraphs
    items: int  # list lines
    capitals: int  # words in capitals, two letters or more
    emoji: int  # emoji and smileys


def _paragraphs(text: str) -> Iterator[list[str]]:
    """The lines of each paragraph: runs of lines that are not blank."""
    lines: list[str] = []
    for line in text.splitlines():
        if line.strip():
            lines.append(line)
        elif lines:
            yield lines
            lines = []
    if lines:
        yield lines


def _blocks(lines: list[str]) -> list[tuple[bool, str]]:
    """A paragraph as (is a list line, text) with hard wraps joined.

    "- tired" can also be a wrapped line that happens to begin with a dash. So a bullet counts where
    it opens the paragraph, follows a colon, or is not the only one.
    """
    marks = [BULLET.match(line) for line in lines]
    several = sum(mark is not None for mark in marks) > 1
    blocks: list[tuple[bool, list[str]]] = []
    for i, (line, mark) in enumerate(zip(lines, marks, strict=True)):
        if mark and (several or i == 0 or lines[i - 1].rstrip().endswith(":")):
            blocks.append((True, [line[mark.end() :]]))
        elif i == 0:
            blocks.append((False, [line]))
        else:
            blocks[-1][1].append(line)
    return [(item, " ".join(parts)) for item, parts in blocks]


def ends_sentence(token: str, following: str) -> bool:
    """Whether a sentence ends with `token`: `Mr.`, `U.S.` and `"Why?" she said` do not end one."""
    core = token.rstrip(CLOSERS)
    if core[-1:] not in ENDS or not core:
        return False
    goes_on = next((c.islower() for c in following if c.isalpha()), False)
    if core.endswith(("..", "…")):
        return not goes_on
    if core[-1] in "!?":
        return not (goes_on and core != token)
    bare = core.lower().lstrip("\"'([")
    if bare == "no.":
        return not following[:1].isdigit()
    initials = len(bare) <= 8 and all(
        len(part) == 1 and part.isalpha() for part in bare[:-1].split(".")
    )
    return bare not in LISTS["abbreviations"] and not (initials and bare != "i.")


def sentences(block: str) -> Iterator[str]:
    """The sentences of one paragraph; linear, token by token."""
    tokens = block.split()
    first = 0
    for i, token in enumerate(tokens):
        if i + 1 == len(tokens) or ends_sentence(token, tokens[i + 1]):
            yield " ".join(tokens[first : i + 1])
            first = i + 1


def read(texts: Sequence[str]) -> Text:
    """Cut texts of one writer into paragraphs, sentences and words."""
    flat: list[str] = []
    runs: list[list[str]] = []
    lengths: list[int] = []
    starts: list[str] = []
    breaks = items = capitals = emoji = 0
    for text in texts:
        text = ACCENTS.sub("", LINK.sub(" ", text.translate(FOLD)))
        text, smileys = SMILEY.subn(" ", text)
        emoji += smileys + sum(1 for _ in EMOJI.finditer(text))
        run: list[str] = []
        paragraphs = 0
        for lines in _paragraphs(text):
            paragraphs += 1
            for item, block in _blocks(lines):
                items += item
                flat.append(" ".join(block.split()))
                for sentence in sentences(block):
                    written = WORD.findall(sentence)
                    if not written:
                        continue
                    lengths.append(len(written))
                    if not item:
                        starts.append(written[0])
                    capitals += sum(len(word) > 1 and word.isupper() for word in written)
                    run.extend(word.lower() for word in written)
        breaks += max(paragraphs - 1, 0)
        runs.append(run)
    counts = Counter(word for run in runs for word in run)
    flat_text, size = "\n".join(flat), counts.total()
    return Text(flat_text, runs, counts, size, lengths, starts, breaks, items, capitals, emoji)
