"""Model text: what a language model wrote, put into plain form, cut where it is finished, judged.

    text = tidy(reply)                   one typography: straight quotes, " - ", no line wraps
    text = without_loop(text)            up to the first sentence that says what was said before
    text = paragraphs(text)              not every sentence on a line of its own
    reason = model_fault(text, ...)      None: it can stand beside a person's text

A small model's texts fail in a few ways, and each has its rule: they go in circles (`loops`), stop
too early, speak as an assistant ("Here is", "As an AI"), set lists and headings, say the opening or
the shown paragraphs again (a word 8-gram in common), or name the style that they were given.

Worked numbers for circles. Any four words in a row that come three times; or a text that zlib packs
to less than DENSEST of its bytes. Of 1,565 passages of 100 words by people, 9 have such a run, and
they pack to 0.59 on average and to 0.47 at least.

Whether a text makes sense is not judged: a 135M model's often does not.
"""

import re
import zlib
from collections import Counter
from collections.abc import Sequence

from data.accept import MARKUP, grams
from nanopersrm.style.text import BULLET, WORD, sentences

TYPOGRAPHY = str.maketrans(
    dict.fromkeys("‘’ʼ´`′", "'") | dict.fromkeys("“”„«»″", '"') | {"…": "...", "\u00a0": " "}
)
LONG_DASH = re.compile(r"\s*(?:[—―]|(?<!\d)–(?!\d)|--+)\s*")
DOTS = re.compile(r"\.(?:\s*\.){2,}")
BLANK_LINE = re.compile(r"\s*\n\s*\n\s*")
RUN, TIMES = 4, 3  # so many words in a row, so often, are a loop
DENSEST = 0.45  # packed bytes / bytes
SHORT = 30  # words of a paragraph that is joined to another
TWIN_SENTENCE = 0.5  # of the RUN-grams of a sentence that came before
CHAT_START = re.compile(
    r"^(?:sure\b|certainly\b|of course\b|okay\b|here(?:'s| is| are)\b|i'm sorry|i am sorry|"
    r"i'd be happy|i'm here|to continue|continuing|the continuation|title:|dear user)",
    re.IGNORECASE,
)
CHAT = re.compile(
    r"\b(?:as an ai|ai (?:language )?(?:model|assistant)|language model|smollm|hugging ?face|"
    r"the user|your (?:text|prompt|message)|this (?:text|passage|paragraph|sentence)|"
    r"(?:the|this) (?:text|passage) (?:is|was|describes|continues)|"
    r"(?:the|this) (?:sentence|statement|phrase|narrative|context|word|quote|term) "
    r"(?:is|was|are|about|can|may|could|suggests?|indicates?|refers?|describes)|"
    r"(?:use|meaning) of the (?:word|phrase|term)|sentence \d|"
    r"let me know if|how can i (?:help|assist)|rewritten|rephrase[ds]?)\b"
    r"|^(?:user|assistant|system)\s*:",
    re.IGNORECASE | re.MULTILINE,
)
LIST_LINE = re.compile(r"^\s*(?:\d{1,2}[.)]|[-*+•])\s", re.MULTILINE)


def tidy(reply: str) -> str:
    """A reply in the plain typography of the corpora; list lines stay, for `model_fault` to see."""
    text = DOTS.sub("...", LONG_DASH.sub(" - ", reply.translate(TYPOGRAPHY)))
    paragraphs = []
    for paragraph in BLANK_LINE.split(text.strip()):
        if any(BULLET.match(line) for line in paragraph.splitlines()):
            paragraphs.append(paragraph.strip())
        else:
            paragraphs.append(" ".join(paragraph.split()))
    return "\n\n".join(paragraph for paragraph in paragraphs if paragraph)


def paragraphs(text: str) -> str:
    """The text with paragraphs of fewer than SHORT words joined to the one before.

    A small model likes to put every sentence on a line of its own, and people do not.
    """
    found: list[str] = []
    for paragraph in text.split("\n\n"):
        short = min(len(part.split()) for part in (paragraph, *found[-1:])) < SHORT
        if found and short and not LIST_LINE.search(paragraph):
            found[-1] = f"{found[-1]} {paragraph}"
        else:
            found.append(paragraph)
    return "\n\n".join(found)


def _runs(text: str) -> list[tuple[str, ...]]:
    words = [word.lower() for word in WORD.findall(text)]
    return [tuple(words[i : i + RUN]) for i in range(len(words) - RUN + 1)]


def loops(text: str) -> bool:
    """Whether four words in a row come three times."""
    counts = Counter(_runs(text))
    return bool(counts) and max(counts.values()) >= TIMES


def without_loop(text: str) -> str:
    """The text up to the first sentence that mostly repeats what came before, or itself.

    >>> without_loop("He sat in the sun. She saw the sea. He sat in the sun. He sat")
    'He sat in the sun. She saw the sea.'
    """
    seen: set[tuple[str, ...]] = set()
    whole: set[str] = set()
    kept: list[str] = []
    for paragraph in text.split("\n\n"):
        lines: list[str] = []
        for sentence in sentences(paragraph):
            runs = _runs(sentence)
            known = sum(run in seen for run in runs) > TWIN_SENTENCE * max(1, len(runs))
            plain = " ".join(WORD.findall(sentence.lower()))
            if known or plain in whole or loops(sentence):
                return "\n\n".join([*kept, " ".join(lines)]).strip()
            seen.update(runs)
            whole.add(plain)
            lines.append(sentence)
        kept.append(" ".join(lines))
    return "\n\n".join(kept).strip()


def packed(text: str) -> float:
    """Bytes after zlib for each byte before."""
    data = text.encode()
    return len(zlib.compress(data, 9)) / max(1, len(data))


def model_fault(
    text: str, least: float, most: float, shown: Sequence[str] = (), names: Sequence[str] = ()
) -> str | None:
    """What is wrong with a finished text, or None.

    `shown` is what the model saw; `names` are words that it must not say.
    """
    size = len(text.split())
    if CHAT_START.search(text) or CHAT.search(text):
        return "model: chat phrase"
    if MARKUP.search(text) or LIST_LINE.search(text):
        return "model: markup"
    if not all(c.isascii() or c.isalpha() for c in text):
        return "model: odd characters"
    if size < least:
        return "model: too short"
    if size > most:
        return "model: too long"
    if loops(text) or packed(text) < DENSEST:
        return "model: repetition"
    known = {gram for other in shown for gram in grams(other)}
    if any(gram in known for gram in grams(text)):
        return "model: echo"
    spoken = {word.lower() for word in WORD.findall(text)}
    if any(name.lower() in spoken for name in names):
        return "model: style's name"
    return None
