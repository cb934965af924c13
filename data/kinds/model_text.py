"""Model text: openings in, a language model's continuations out, judged by rules.

    opening = draw_opening(source, words, rng)
    opening.text     "The ships lay in the bay until March."         the question of the pair
    opening.rest     "Nobody had paid the crews. The captain ..."    the person's continuation
    write = load_continuer(base, seed)                               nothing is loaded yet
    texts = write([Request(opening.text, style, 105), ...])
    reason = model_fault(text, ...)                                  None: nothing is wrong

An opening is a sentence of 6 to 40 words outside quotations, or the question that a writing
answers. What follows it must pass the rules for a single text, before a model writes beside it.

The style is shown: `turns` are earlier (opening, continuation) pairs, as turns of a chat that the
model goes on with. In up to ROUNDS rounds a reply is drawn until it has the wanted words and ends a
sentence, or goes in circles, or the model ends it. A text in circles is cut back to before the
repetition, and the next round goes on from there. Noise depends on (seed, prompt, position).

A small model goes in circles (four words in a row three times, or packed by zlib to less than
DENSEST), stops too early, speaks as an assistant, sets lists, or says again what it was shown.
Whether a text makes sense is not judged.
"""

import json
import random
import re
import zlib
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from data.corpus import PARAGRAPH, TOKEN, Source, cut
from data.proposals import MARKUP, grams, text_fault
from nanopersrm.style.text import BULLET, CLOSERS, ENDS, WORD, sentences

LEAST, MOST = 6, 40  # words of an opening
ROOM = 1.25  # words after an opening, for each that is wanted
NEAR = 0.15  # the text after it may miss the wanted length by this share
TRIES = 6  # passages looked at before a source is given up
BATCH = 16  # texts drawn together
ROUNDS = 4  # replies that make one text, at most
TOKENS_A_WORD = 1.6  # budget of a round; English prose has about 1.35
OVER = 1.25  # words a reply may have, for each that is wanted, before it is stopped
NEARLY = 0.9  # of the wanted words are enough to stop at a sentence end
SYSTEM = (
    "You are a writer with a manner of your own. You continue whatever is begun, in that manner."
)
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
TABLE = json.loads(Path(__file__).with_name("personas.json").read_text("utf-8"))
CHAT_START, CHAT, LIST_LINE = map(re.compile, TABLE["patterns"].values())


@dataclass(frozen=True)
class Opening:
    """What two writers continue, and how its author did."""

    source: Source
    text: str
    rest: str


@dataclass(frozen=True)
class Style:
    """What the model is to go on with."""

    turns: tuple[tuple[str, str], ...]  # (opening, continuation)
    temperature: float
    top_k: int
    names: tuple[str, ...] = ()  # words that its texts must not say


@dataclass(frozen=True)
class Request:
    """One text to write, of about so many words."""

    opening: str
    style: Style
    words: int


Continuer = Callable[[Sequence[Request]], list[str]]
Prompt = tuple[list[dict[str, str]], str]  # messages of a chat, the reply so far
Test = Callable[[str], bool]  # whether a reply is long enough
# Prompts with their tests, temperature, top-k, tokens -> (reply, whether the model ended it)
Draw = Callable[[Sequence[Prompt], Sequence[Test], float, int, int], list[tuple[str, bool]]]


def sentence_ends(text: str) -> list[tuple[int, int]]:
    """(words so far, place) after each sentence that a text may be cut after, in order."""
    tokens = list(TOKEN.finditer(text))
    ends = []
    read = 0
    for block in PARAGRAPH.split(text.strip()):
        quotes = 0
        for sentence in sentences(block):
            read += len(sentence.split())
            quotes += sentence.count('"')
            if sentence.rstrip(CLOSERS)[-1:] in ENDS and quotes % 2 == 0:
                ends.append((read, tokens[read - 1].end()))
    return ends


def first_words(text: str, words: int) -> str:
    """The beginning of a text up to the sentence end nearest to `words`; "" when there is none."""
    ends = sentence_ends(text)
    _, place = min(ends, key=lambda end: (abs(end[0] - words), end[0]), default=(0, 0))
    return text[:place].strip()


def draw_opening(source: Source, words: int, rng: random.Random) -> Opening | None:
    """An opening of this source after which a good text of about `words` words can be cut."""
    if source.question:
        opening = Opening(source, source.question.strip(), source.text)
        return opening if _continues_well(opening, words) else None
    for _ in range(TRIES):
        passage = cut(source.text, round(ROOM * words) + MOST, rng)
        first = next(sentences(PARAGRAPH.split(passage)[0]), "")
        size = len(first.split())
        plain = first.count('"') % 2 == 0 and not BULLET.match(passage)
        if LEAST <= size <= MOST and plain and first.rstrip(CLOSERS)[-1:] in ENDS:
            at = list(TOKEN.finditer(passage))[size - 1].end()
            opening = Opening(source, first, passage[at:].strip())
            if _continues_well(opening, words):
                return opening
    return None


def _continues_well(opening: Opening, words: int) -> bool:
    """Whether the author's text would be accepted; asked before a model spends time on it."""
    text = first_words(opening.rest, words)
    near = abs(len(text.split()) - words) <= NEAR * words
    return near and text_fault(text, 1, opening.source.author) is None


def load_continuer(base: str, seed: int = 0) -> Continuer:
    """What continues openings with `base`; loads it when the first text is to be drawn."""
    load = cache(lambda: load_draw(base, seed))
    return lambda requests: compose(requests, load())


def compose(requests: Sequence[Request], draw: Draw) -> list[str]:
    """The finished texts of one batch in one temperature; "" where nothing was finished."""
    texts = ["" for _ in requests]
    ended = [False for _ in requests]
    for _ in range(ROUNDS):
        rows = [i for i, request in enumerate(requests) if not _enough(texts[i], request.words)]
        if not rows:
            break
        style = requests[rows[0]].style
        prompts = [_prompt(requests[i], texts[i], ended[i]) for i in rows]
        tests = [_stop(texts[i], requests[i].words) for i in rows]
        missing = max(0, *(requests[i].words - len(texts[i].split()) for i in rows))
        budget = int(TOKENS_A_WORD * (missing + 20))
        replies = draw(prompts, tests, style.temperature, style.top_k, budget)
        for i, prompt, (reply, ended[i]) in zip(rows, prompts, replies, strict=True):
            after_blank = prompt[1].endswith("\n")  # the same paragraph goes on
            text = f"{texts[i]} {reply.lstrip()}" if after_blank else texts[i] + reply
            texts[i] = without_loop(tidy(text))
    return [first_words(text, r.words) for text, r in zip(texts, requests, strict=True)]


def _enough(text: str, words: int) -> bool:
    """Whether a text can be cut near the wanted length, or is too long for that to come."""
    too_long = len(text.split()) >= OVER * words
    return too_long or len(first_words(text, words).split()) >= NEARLY * words


def _stop(before: str, words: int) -> Test:
    """Whether a reply that goes on from `before` has gone far enough, or wrong."""
    begun = len(before.split())

    def test(reply: str) -> bool:  # called for every token: the cheap questions first
        drawn = reply.lower().split()
        size = begun + len(drawn)
        if size >= OVER * words or " ".join(drawn).count(" ".join(drawn[-RUN:])) >= TIMES:
            return len(drawn) >= RUN
        if size < words or reply.rstrip().rstrip(CLOSERS)[-1:] not in ENDS:
            return False
        return first_words(reply, len(drawn)) == reply.strip()

    return test


def _prompt(request: Request, text: str, ended: bool) -> Prompt:
    """The chat, and the reply so far; a blank line after an end."""
    messages = [{"role": "system", "content": SYSTEM}]
    for opening, continuation in request.style.turns:
        messages.append({"role": "user", "content": opening})
        messages.append({"role": "assistant", "content": continuation})
    messages.append({"role": "user", "content": request.opening})
    return messages, f"{text}\n\n" if ended and text else text


def load_draw(base: str, seed: int) -> Draw:
    """Load a base and draw with it."""
    from nanopersrm.judge.judge import Judge  # torch comes with it, and only here it is needed
    from nanopersrm.model.sampler import SamplingConfig, sample

    judge = Judge.load(base, None)

    def draw(
        prompts: Sequence[Prompt],
        tests: Sequence[Test],
        temperature: float,
        top_k: int,
        budget: int,
    ) -> list[tuple[str, bool]]:
        ids = [judge.tokenizer.chat(chat, continuation=text) for chat, text in prompts]
        config = SamplingConfig(temperature, top_k=top_k, max_new=budget, seed=seed)
        replies = sample(
            judge.model,
            ids,
            config,
            stop_ids=judge.tokenizer.eos_ids,
            observe=lambda row, drawn: tests[row](judge.tokenizer.decode(drawn)),
        )
        return [(judge.tokenizer.decode(r.ids), r.ended == "stop") for (r,) in replies]

    return draw


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


def join_short_paragraphs(text: str) -> str:
    """The text with paragraphs of fewer than SHORT words joined to the one before."""
    joined: list[str] = []
    for paragraph in text.split("\n\n"):
        short = min(len(part.split()) for part in (paragraph, *joined[-1:])) < SHORT
        if joined and short and not LIST_LINE.search(paragraph):
            joined[-1] = f"{joined[-1]} {paragraph}"
        else:
            joined.append(paragraph)
    return "\n\n".join(joined)


def _runs(text: str) -> list[tuple[str, ...]]:
    words = [word.lower() for word in WORD.findall(text)]
    return [tuple(words[i : i + RUN]) for i in range(len(words) - RUN + 1)]


def loops(text: str) -> bool:
    """Whether four words in a row come three times."""
    counts = Counter(_runs(text))
    return bool(counts) and max(counts.values()) >= TIMES


def without_loop(text: str) -> str:
    """The text up to the first sentence that mostly repeats what came before, or itself."""
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
    return len(zlib.compress(text.encode(), 9)) / max(1, len(text.encode()))


def model_fault(
    text: str, least: float, most: float, shown: Sequence[str] = (), names: Sequence[str] = ()
) -> str | None:
    """What is wrong with a finished text, or None; `names` are words that it must not say."""
    size = len(text.split())
    known = {gram for other in shown for gram in grams(other)}
    spoken = {word.lower() for word in WORD.findall(text)}
    faults = {
        "chat phrase": CHAT_START.search(text) or CHAT.search(text),
        "markup": MARKUP.search(text) or LIST_LINE.search(text),
        "odd characters": not all(c.isascii() or c.isalpha() for c in text),
        "too short": size < least,
        "too long": size > most,
        "repetition": loops(text) or packed(text) < DENSEST,
        "echo": any(gram in known for gram in grams(text)),
        "style's name": any(name.lower() in spoken for name in names),
    }
    return next((f"model: {fault}" for fault, applies in faults.items() if applies), None)
