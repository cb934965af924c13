"""Continuing: openings in, a language model's continuations out, with our own sampler.

    write = continuer(base, seed, folder)        nothing is loaded yet
    texts = write([Ask(opening, turns, 105, 0.85, 50), ...])

The style is shown, not told: `turns` are earlier (opening, continuation) pairs in that style, as
turns of a chat that the model goes on with. `words` is the wanted length. A text comes back in
plain typography and cut after a sentence; what is wrong with it is for `model_text.py` to say.

How a text is drawn. In up to ROUNDS rounds: a reply is drawn until it has the wanted words and ends
a sentence, or goes in circles, or the model ends it. A text in circles is cut back to before the
repetition, one that ended early gets a blank line, and the next round goes on from there, as if the
model had said so much already. Other text before a draw means other noise, so a circle is not run
again. Most texts need one or two rounds.

Batches. BATCH texts at a time, the first BATCH asks first: what is drawn together depends on the
asks alone. Noise depends on (seed, prompt, position). In 16 bits the shape of a batch moves logits
by rounding, but a batch always has the same shape at the same place, so a rerun gives the same
bytes on the same machine and number of threads. Another machine may round otherwise, as with all
sampling in 16 bits.

The cache. With a `folder`, every batch is kept as one file of JSON lines named after a digest of
all that decides it (base, seed, asks, the constants below), written to a temporary name and then
renamed. An interrupted build finds the batches it had drawn; other settings have other names.

What we chose. Top-k and not top-p, which sorts the whole vocabulary for every token: 91 ms a step
for 16 rows of 49,152, against 6 ms (one busy core), where the model itself takes about 120.

What we left out. A repetition penalty: the sampler has none, and cutting back does its work.
"""

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from data.kinds.model_text import RUN, TIMES, tidy, without_loop
from data.kinds.openings import first_words
from data.shards import write_text
from nanopersrm import InputError
from nanopersrm.style.text import CLOSERS, ENDS

if TYPE_CHECKING:
    from nanopersrm.judge.judge import Judge

BATCH = 16  # texts drawn together
ROUNDS = 4  # replies that make one text, at most
TOKENS_A_WORD = 1.6  # budget of a round; English prose has about 1.35
OVER = 1.25  # words a reply may have, for each that is wanted, before it is stopped
NEARLY = 0.9  # of the wanted words are enough to stop at a sentence end
SYSTEM = (
    "You are a writer with a manner of your own. You continue whatever is begun, in that manner."
)


@dataclass(frozen=True)
class Ask:
    """One text to write."""

    opening: str
    turns: tuple[tuple[str, str], ...]  # (opening, continuation) in the wanted style
    words: int
    temperature: float
    top_k: int  # draw from so many of the likeliest tokens


Continuer = Callable[[Sequence[Ask]], list[str]]
# (messages of a chat, the reply so far) of each text, and for each a test whether a reply so far is
# enough -> (reply, whether the model ended it)
Prompt = tuple[list[dict[str, str]], str]
Draw = Callable[
    [Sequence[Prompt], Sequence[Callable[[str], bool]], float, int, int], list[tuple[str, bool]]
]


def continuer(base: str, seed: int = 0, folder: Path | None = None) -> Continuer:
    """What continues openings with `base`; loads it when the first text is really to be drawn."""
    loaded: list[Draw] = []

    def draw() -> Draw:
        if not loaded:
            loaded.append(drawer(base, seed))
        return loaded[0]

    def write(asks: Sequence[Ask]) -> list[str]:
        texts = []
        for first in range(0, len(asks), BATCH):
            texts += _batch(asks[first : first + BATCH], base, seed, folder, draw)
        return texts

    return write


def _batch(
    asks: Sequence[Ask], base: str, seed: int, folder: Path | None, draw: Callable[[], Draw]
) -> list[str]:
    """The texts of a batch, from the folder or drawn."""
    if folder is None:
        return compose(asks, draw())
    constants = [BATCH, ROUNDS, TOKENS_A_WORD, OVER, NEARLY, SYSTEM]
    said = json.dumps([base, seed, constants, [asdict(ask) for ask in asks]])
    path = folder / f"{hashlib.sha256(said.encode()).hexdigest()[:24]}.jsonl"
    if path.exists():
        return _read(path, len(asks))
    texts = compose(asks, draw())
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"{folder}: cannot be written ({error.strerror})") from error
    lines = (
        json.dumps({"opening": a.opening, "text": t}) for a, t in zip(asks, texts, strict=True)
    )
    write_text(path, "".join(f"{line}\n" for line in lines))
    return texts


def _read(path: Path, expected: int) -> list[str]:
    try:
        texts = [json.loads(line)["text"] for line in path.read_text("utf-8").splitlines()]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"{path}: cannot be read ({error}); delete it") from error
    if len(texts) != expected or not all(isinstance(text, str) for text in texts):
        raise InputError(f"{path}: expected {expected} texts, found {len(texts)}; delete it")
    return texts


def compose(asks: Sequence[Ask], draw: Draw) -> list[str]:
    """The finished texts of one batch; "" where nothing was finished."""
    texts = ["" for _ in asks]
    ended = [False for _ in asks]
    for _ in range(ROUNDS):
        open_now = [i for i, ask in enumerate(asks) if not _enough(texts[i], ask.words)]
        for rows in _alike(asks, open_now):
            ask = asks[rows[0]]
            prompts = [_prompt(asks[i], texts[i], ended[i]) for i in rows]
            tests = [_stop(texts[i], asks[i].words) for i in rows]
            missing = max(0, *(asks[i].words - len(texts[i].split()) for i in rows))
            budget = int(TOKENS_A_WORD * (missing + 20))
            drawn = draw(prompts, tests, ask.temperature, ask.top_k, budget)
            for i, (reply, ended[i]) in zip(rows, drawn, strict=True):
                texts[i] = without_loop(tidy(_joined(texts[i], reply, prompts[rows.index(i)])))
    return [first_words(text, ask.words) for text, ask in zip(texts, asks, strict=True)]


def _alike(asks: Sequence[Ask], rows: Sequence[int]) -> Iterator[list[int]]:
    """Rows that are drawn with the same temperature and top-k, in the order of the first."""
    kinds = dict.fromkeys((asks[i].temperature, asks[i].top_k) for i in rows)
    for kind in kinds:
        yield [i for i in rows if (asks[i].temperature, asks[i].top_k) == kind]


def _enough(text: str, words: int) -> bool:
    """Whether a text can be cut near the wanted length, or is too long for that to come."""
    if len(text.split()) >= OVER * words:
        return True
    return len(first_words(text, words).split()) >= NEARLY * words


def _stop(before: str, words: int) -> Callable[[str], bool]:
    """Whether a reply that goes on from `before` has gone far enough, or wrong."""

    begun = len(before.split())

    def test(reply: str) -> bool:  # called for every token: the cheap questions first
        spoken = reply.lower().split()
        size = begun + len(spoken)
        if size >= OVER * words or " ".join(spoken).count(" ".join(spoken[-RUN:])) >= TIMES:
            return len(spoken) >= RUN
        if size < words or reply.rstrip().rstrip(CLOSERS)[-1:] not in ENDS:
            return False
        return first_words(reply, len(spoken)) == reply.strip()

    return test


def _prompt(ask: Ask, text: str, ended: bool) -> Prompt:
    """The chat, and what the model has said already; a blank line after an end."""
    messages = [{"role": "system", "content": SYSTEM}]
    for opening, continuation in ask.turns:
        messages.append({"role": "user", "content": opening})
        messages.append({"role": "assistant", "content": continuation})
    messages.append({"role": "user", "content": ask.opening})
    return messages, f"{text}\n\n" if ended and text else text


def _joined(text: str, reply: str, prompt: Prompt) -> str:
    """A text with the next reply; after a blank line the same paragraph goes on."""
    return f"{text} {reply.lstrip()}" if prompt[1].endswith("\n") else text + reply


def drawer(base: str, seed: int) -> Draw:
    """Load a base and draw with it."""
    from nanopersrm.judge.judge import Judge  # torch comes with it, and only here it is needed

    judge = Judge.load(base, None)

    def draw(
        prompts: Sequence[Prompt],
        tests: Sequence[Callable[[str], bool]],
        temperature: float,
        top_k: int,
        budget: int,
    ) -> list[tuple[str, bool]]:
        return draw_with(judge, prompts, tests, temperature, top_k, budget, seed)

    return draw


def draw_with(
    judge: "Judge",
    prompts: Sequence[Prompt],
    tests: Sequence[Callable[[str], bool]],
    temperature: float,
    top_k: int,
    budget: int,
    seed: int,
) -> list[tuple[str, bool]]:
    """One reply for each prompt, until its test says that it is enough."""
    from nanopersrm.model.sampler import SamplingConfig, sample

    tokenizer = judge.tokenizer
    ids = [tokenizer.chat(messages, continuation=text) for messages, text in prompts]

    def observe(row: int, drawn: list[int]) -> bool:
        return tests[row](tokenizer.decode(drawn))

    config = SamplingConfig(temperature, top_k=top_k, max_new=budget, seed=seed)
    replies = sample(judge.model, ids, config, stop_ids=tokenizer.eos_ids, observe=observe)
    return [(tokenizer.decode(reply.ids), reply.ended == "stop") for (reply,) in replies]
