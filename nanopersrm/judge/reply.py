"""The grammar of a reply: the model chooses, the instruments answer.

    prompt … <think>↵
    r                                              drawn: a letter of the menu not yet used, or "."
     reading +0.11, "the chain was dry": +6.1↵     filled in: what was measured (`style/ledger.py`)
    f                                              drawn
     semicolons 2.5: +0.7↵                         filled in
    .                                              drawn, or given after the last line allowed
     sum +06.8↵</think>↵<scores>A=                  filled in
    7                                              drawn: a digit

Every drawn token is a choice out of a known small set of ids. So no reply is malformed, what a line
says is a measurement, a quote is verbatim, and the log-probability of a choice is exact without a
softmax over the vocabulary. A line costs one forward, over its letter and what is filled in; its
last row draws the next letter. Two candidates stand side by side in a line and in the sum:

    f semicolons 2.5 | 0.3: +0.7 -1.2↵             … sum +06.8 -03.0↵</think>↵<scores>A=7 B=3

The digit of B is drawn under each of the nine that A could have got, nine branches of the tree, so
that p(a, b) is known for all 81 pairs at the price of nine short rows.

Four other ways: `all_evidence` fills in every line of the menu at once; `think` False draws the
digit at once, from the texts alone; `choose` takes lines by a rule instead of the model, to know
what its choice is worth; `free` draws prose, quotes copied from the texts (`verbatim.py`), until
"</think>", a stop token or its budget, and then the score line.
"""

import math
import random
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Literal

import torch
from torch import Tensor

from kernels.sample import draw_key, sample
from nanopersrm import InputError
from nanopersrm.judge.judgement import JudgeConfig
from nanopersrm.judge.prompts import OPENING, prompt_ids
from nanopersrm.judge.tell import quote
from nanopersrm.judge.verbatim import OUTSIDE, Quotable, quote_tokens
from nanopersrm.judge.verdict import CLOSE, LABELS, closing
from nanopersrm.model.sampler import Decoder, Prefix, SamplingConfig
from nanopersrm.model.tokenizer import Tokenizer
from nanopersrm.model.transformer import Model
from nanopersrm.style.evidence import NGRAMS, READING
from nanopersrm.style.ledger import LETTERS, Ledger, Line, Measurer
from nanopersrm.style.profile import BY_NAME, figure

STOP = "."
FORCED_ROOM = 48  # tokens that sum and score line may take, at most
NINE = 9
TAIL = 8  # tokens that are looked at for "</think>", which is at most 8 characters
DIGIT_POSITION = 1 << 32  # and one more for B: the noise of the digits is that of no other draw
# A quote with these could look like a line of ours.
UNQUOTED = re.compile(rf"[\"“”„«»>:={OPENING}]|[+-]\d|\bsum\b", re.IGNORECASE)

# Called as on_line(row, features or prose so far, ended) after each line or token.
OnLine = Callable[[int, "list[str] | str", bool], None]


@dataclass(frozen=True)
class Choice:
    """A token that was drawn."""

    at: int  # its index among the ids of the reply
    allowed: tuple[int, ...]  # the ids that could be drawn there; empty: any of the vocabulary
    log_prob: float  # of the one that was drawn, among these, at the temperature of drawing


@dataclass
class Reply:
    """What follows a prompt, and what of it the model has drawn."""

    ids: list[int] = field(default_factory=list)
    choices: list[Choice] = field(default_factory=list)
    features: list[str] = field(default_factory=list)  # of its lines, in order
    prose: str = ""  # of a free reply
    cut: bool = False  # the budget ended the prose, not the model
    digits: list[float] = field(default_factory=list)  # (9,) p(A = 1) … p(A = 9)
    drawn_digits: list[float] = field(default_factory=list)  # the same at that temperature
    joint: list[list[float]] | None = None  # (9, 9) p(A, B) of two candidates
    digit: int = 0  # that was drawn for A


@dataclass(frozen=True)
class Prompt:
    """A prompt about one candidate or two, and the lines that can follow."""

    ids: list[int]
    fills: dict[str, list[int]]  # feature -> the ids after its letter, of all that is measured
    menu: tuple[str, ...]  # features that can be drawn, in the order of the menu
    ledgers: tuple[Ledger, ...]  # of each candidate
    texts: tuple[str, ...] = ()  # what a free reply may quote

    def sums(self, features: Sequence[str]) -> list[float]:
        """Of each candidate, over these lines, in decibans."""
        return [ledger.total(features) for ledger in self.ledgers]


@dataclass(frozen=True)
class ChoiceIds:
    """The ids that can be drawn in a ledger."""

    letters: dict[str, int]  # feature -> id
    stop: int
    digits: list[int]

    @property
    def all(self) -> list[int]:
        """(C,) letters, stop, digits."""
        return [*self.letters.values(), self.stop, *self.digits]


@lru_cache(maxsize=8)
def choice_ids(tokenizer: Tokenizer) -> ChoiceIds:
    """Of a tokenizer; an error where a letter is not one token."""
    letters = {feature: tokenizer.encode(letter) for feature, letter in LETTERS.items()}
    stop = tokenizer.encode(STOP)
    for name, ids in {**{LETTERS[f]: ids for f, ids in letters.items()}, STOP: stop}.items():
        if len(ids) != 1:
            raise InputError(f"{tokenizer.name}: expected one token for {name!r}, got {len(ids)}")
    return ChoiceIds({f: ids[0] for f, ids in letters.items()}, stop[0], [*tokenizer.digit_ids])


def make_prompt(
    tokenizer: Tokenizer,
    exemplars: Sequence[str],
    candidates: Sequence[str],
    ledgers: Sequence[Ledger],
    menu: dict[str, str],
    question: str | None = None,
    principles: Sequence[str] = (),
    free: bool = False,
) -> Prompt:
    """The prompt about these candidates; a line can be drawn if all of them can be measured."""
    ids = prompt_ids(tokenizer, exemplars, candidates, question, principles, menu, free)
    known = [f for f in ledgers[0].lines if all(f in ledger.lines for ledger in ledgers)]
    fills = {f: tokenizer.encode(line_text([x.lines[f] for x in ledgers])) for f in known}
    drawable = tuple(feature for feature in menu if feature in fills)
    return Prompt(ids, fills, drawable, tuple(ledgers), (*exemplars, *candidates))


def prompts_about(
    tokenizer: Tokenizer,
    measurer: Measurer,
    exemplars: Sequence[str],
    candidates: Sequence[str],
    question: str | None = None,
    writer: str | None = None,
    free: bool = False,
) -> list[Prompt]:
    """A prompt for each candidate, as training sees it; writer: as in `Measurer.ledgers`."""
    menu = measurer.menu(exemplars)
    ledgers = measurer.ledgers(exemplars, candidates, writer, topics=False)
    return [
        make_prompt(tokenizer, exemplars, [text], [ledger], menu, question, free=free)
        for text, ledger in zip(candidates, ledgers, strict=True)
    ]


def line_text(lines: Sequence[Line]) -> str:
    """What is filled in after a letter: the lines of one feature, of each candidate."""
    feature = lines[0].feature
    values = []
    for line in lines:
        assert line.candidate is not None, f"{feature}: not measured"
        if feature == READING:
            quoted = quote(line)
            words = f', "{quoted}"' if quoted and not UNQUOTED.search(quoted) else ""
            values.append(f"{line.candidate:+.2f}{words}")
        else:
            values.append(f"{figure(line.candidate)}{'%' * (feature == NGRAMS)}")
    label = BY_NAME[feature].label if feature in BY_NAME else feature
    decibans = " ".join(f"{line.decibans:+.1f}" for line in lines)
    return f" {label} {' | '.join(values)}: {decibans}\n"


def sum_text(sums: Sequence[float]) -> str:
    """What is filled in after the full stop, up to the first digit.

    +06.8 is as wide as -16.8, so that tens and units stand in the same places.
    """
    return f" sum {' '.join(f'{x:+05.1f}' for x in sums)}\n{closing('')[1]}"


def spell(
    tokenizer: Tokenizer, prompt: Prompt, features: Sequence[str], stop: bool = True
) -> list[int]:
    """The ids of a reply with these lines, up to the digit; stop: with the sum."""
    ids = choice_ids(tokenizer)
    reply = [i for f in features for i in (ids.letters[f], *prompt.fills[f])]
    return [*reply, ids.stop, *tokenizer.encode(sum_text(prompt.sums(features)))] if stop else reply


def by_rule(
    prompt: Prompt,
    rule: Literal["all", "menu", "salience", "random", "largest"],
    count: int,
    seed: int,
) -> list[str]:
    """At most `count` features in the order of a rule.

    all: everything that says something, on the menu or not. menu: reading, n-grams, then the
    writer's habits by what they can say. salience: these habits alone. random: by the seed.
    largest: by the evidence itself, of all candidates.
    """
    names = [*prompt.menu]
    if rule == "all":
        return [n for n in prompt.fills if any(x.lines[n].decibans for x in prompt.ledgers)]
    if rule == "salience":
        names = [name for name in names if name in BY_NAME]
    elif rule == "random":
        random.Random(f"{seed}/{prompt.ids}").shuffle(names)
    elif rule == "largest":
        size = {n: max(abs(x.lines[n].decibans) for x in prompt.ledgers) for n in names}
        names.sort(key=lambda name: -size[name])
    return names[:count]


def reply_room(prompts: Sequence[Prompt], config: JudgeConfig) -> int:
    """Tokens that a reply may take, at most."""
    if config.free:
        return config.think_tokens + FORCED_ROOM
    count = config.most_lines
    fills = [sorted((len(x) + 1 for x in p.fills.values()), reverse=True) for p in prompts]
    return max((sum(x[:count]) for x in fills), default=0) + FORCED_ROOM


def draw(
    model: Model,
    tokenizer: Tokenizer,
    prompts: Sequence[Prompt],
    config: JudgeConfig,
    prefix: Prefix | None = None,
    on_line: OnLine | None = None,
    first: int = 0,
) -> list[list[Reply]]:
    """Prompts about 1 or 2 candidates each -> config.samples replies to each.

    first: the number of the first reply, where others were drawn before. on_line: its row is
    prompt · samples + number.
    """
    labels = len(prompts[0].ledgers)
    assert labels in (1, 2), f"{labels} candidates in a prompt"
    rows, room = len(prompts) * config.samples, reply_room(prompts, config)
    alone = config.samples == 1 and not first
    decoder = Decoder(model, [prompt.ids for prompt in prompts], prefix, room=room * alone)
    decoder.fork([config.samples] * len(prompts), room, first)
    replies = [Reply() for _ in range(rows)]
    about = [prompts[row // config.samples] for row in range(rows)]
    if config.free:
        _draw_prose(decoder, tokenizer, about, replies, config, on_line)
    elif config.think:
        _draw_lines(decoder, tokenizer, about, replies, config, on_line)
    else:
        _feed(decoder, replies, [tokenizer.encode(closing("")[1])] * rows)
    _draw_digits(decoder, tokenizer, replies, config, labels)
    return [replies[i : i + config.samples] for i in range(0, rows, config.samples)]


def _feed(decoder: Decoder, replies: Sequence[Reply], pieces: Sequence[list[int]]) -> None:
    decoder.feed(pieces)
    for reply, piece in zip(replies, pieces, strict=True):
        reply.ids += piece


def _draw_lines(
    decoder: Decoder,
    tokenizer: Tokenizer,
    prompts: Sequence[Prompt],
    replies: Sequence[Reply],
    config: JudgeConfig,
    on_line: OnLine | None,
) -> None:
    """The lines of every row, and their sum."""
    ids, count = choice_ids(tokenizer), config.most_lines
    feature_of = {i: feature for feature, i in ids.letters.items()}
    running = dict.fromkeys(range(len(replies)))
    if config.by_rule:  # all at once
        for reply, prompt in zip(replies, prompts, strict=True):
            reply.features = by_rule(prompt, config.rule, count, config.seed)
        pieces = [spell(tokenizer, p, r.features) for p, r in zip(prompts, replies, strict=True)]
        _feed(decoder, replies, pieces)
        for row, reply in enumerate(replies if on_line else ()):
            on_line(row, reply.features, True)  # type: ignore[misc]
        return
    for number in range(count + 1):
        pieces = [list[int]() for _ in replies]
        allowed = {
            row: (*(ids.letters[f] for f in prompts[row].menu if f not in replies[row].features),)
            for row in running
        }
        free = [row for row in running if number < count and allowed[row]]
        drawn = dict.fromkeys(running, ids.stop)
        if free:
            options = [(*allowed[row], ids.stop) for row in free]
            for row, some, (i, log_prob) in zip(
                free, options, _choose(decoder, ids, free, options, number, config), strict=True
            ):
                replies[row].choices.append(Choice(len(replies[row].ids), some, log_prob))
                drawn[row] = i
        for row in [*running]:
            reply, prompt = replies[row], prompts[row]
            if drawn[row] == ids.stop:
                text = sum_text(prompt.sums(reply.features))
                pieces[row] = [ids.stop, *tokenizer.encode(text)]
                del running[row]
            else:
                feature = feature_of[drawn[row]]
                reply.features.append(feature)
                pieces[row] = [drawn[row], *prompt.fills[feature]]
            if on_line is not None:
                on_line(row, reply.features, drawn[row] == ids.stop)
        _feed(decoder, replies, pieces)
        if not running:
            break


def _choose(
    decoder: Decoder,
    ids: ChoiceIds,
    rows: Sequence[int],
    options: Sequence[tuple[int, ...]],
    position: int,
    config: JudgeConfig,
) -> list[tuple[int, float]]:
    """A drawn id of each row, out of its options, the full stop last, and its log-probability.

    At temperature 0 the likeliest letter is taken, unless the full stop is likelier than all
    letters together: many letters share what speaks for going on. A letter has the same place, and
    so the same noise, whatever other rows may draw.
    """
    every = [*ids.letters.values(), ids.stop]  # (C,)
    place = {i: k for k, i in enumerate(every)}
    device = decoder.hidden.device
    hidden = decoder.hidden[torch.tensor(rows, device=device)]
    logits = decoder.model.logits_of(hidden, torch.tensor(every, device=device))  # (R, C)
    mask = torch.ones(len(rows), len(every), dtype=torch.bool)
    for k, some in enumerate(options):
        mask[k, [place[i] for i in some]] = False
    logits = logits.cpu().float().masked_fill(mask, float("-inf"))
    keys = [draw_key(config.seed, decoder.names[row], position) for row in rows]
    counters, temperature = torch.tensor(keys, dtype=torch.int32), config.drawing_temperature
    log_p = (logits / (temperature or 1.0)).log_softmax(-1)
    if temperature == 0:
        stop = logits[:, -1].where(log_p[:, -1] > math.log(0.5), float("-inf"))
        logits[:, -1] = stop
    at, _ = sample(logits, counters, temperature)
    drawn = log_p.gather(-1, at[:, None]).squeeze(-1)
    return [(every[k], p) for k, p in zip(at.tolist(), drawn.tolist(), strict=True)]


def _draw_digits(
    decoder: Decoder,
    tokenizer: Tokenizer,
    replies: Sequence[Reply],
    config: JudgeConfig,
    labels: int,
) -> None:
    """The digit of A of every row, and of B under each of A's."""
    first, warm, drawn = _digits(decoder, tokenizer, config)  # (rows, 9) fp64 twice, (rows,)
    ids = tuple(tokenizer.digit_ids)
    for row, reply in enumerate(replies):
        reply.digits, reply.drawn_digits = first[row].tolist(), warm[row].tolist()
        reply.digit = drawn[row]
        log_prob = float(warm[row, drawn[row] - 1].log())
        reply.choices.append(Choice(len(reply.ids), ids, log_prob))
        reply.ids.append(ids[drawn[row] - 1])
    if labels == 1:
        return
    rows, between = len(replies), tokenizer.encode(f" {LABELS[1]}=")
    decoder.fork([NINE] * rows, len(between) + 1)
    decoder.feed([[digit, *between] for _ in range(rows) for digit in ids])
    second, _, _ = _digits(decoder, tokenizer, config, place=1)  # (rows·9, 9)
    joint = first[:, :, None] * second.view(rows, NINE, NINE)
    for row, reply in enumerate(replies):
        reply.joint = joint[row].tolist()


def _digits(
    decoder: Decoder, tokenizer: Tokenizer, config: JudgeConfig, place: int = 0
) -> tuple[Tensor, Tensor, list[int]]:
    """The next digit of every row: probabilities (rows, 9) fp64, the same at the temperature of
    drawing, and a drawn one."""
    ids = torch.tensor(tokenizer.digit_ids, device=decoder.hidden.device)
    logits = decoder.model.logits_of(decoder.hidden, ids).cpu()  # (rows, 9)
    keys = [draw_key(config.seed, name, DIGIT_POSITION + place) for name in decoder.names]
    temperature = config.drawing_temperature
    drawn, _ = sample(logits, torch.tensor(keys, dtype=torch.int32), temperature)
    z = logits.double()
    warm = (z / (temperature or 1.0)).softmax(-1)
    return z.softmax(-1), warm, [digit + 1 for digit in drawn.tolist()]


def _draw_prose(
    decoder: Decoder,
    tokenizer: Tokenizer,
    prompts: Sequence[Prompt],
    replies: Sequence[Reply],
    config: JudgeConfig,
    on_line: OnLine | None,
) -> None:
    """Free prose of every row, quotes copied from its texts; then the score line."""
    quotable = {id(p): Quotable(p.texts, quote_tokens(tokenizer)) for p in prompts}
    places = [OUTSIDE] * len(prompts)

    def forbid(rows: list[int], drawn: list[list[int]]) -> Tensor:
        mask = torch.zeros(len(rows), decoder.model.config.V, dtype=torch.bool)  # (R, V)
        for k, (row, ids) in enumerate(zip(rows, drawn, strict=True)):
            source = quotable[id(prompts[row])]
            if ids:
                places[row] = source.after(places[row], ids[-1])
            inside, choices = source.choices(places[row], config.think_tokens - len(ids))
            mask[k] = inside
            mask[k, choices] = not inside
        return mask.to(decoder.device)

    def observe(row: int, ids: list[int]) -> bool:
        ended = CLOSE in tokenizer.decode(ids[-TAIL:])
        if on_line is not None:
            on_line(row, closing(tokenizer.decode(ids))[0], ended)
        return ended

    sampling = SamplingConfig(config.drawing_temperature, 0, config.think_tokens, config.seed)
    drawn = decoder.generate(sampling, tokenizer.eos_ids, observe, forbid)
    forced = []
    for reply, free in zip(replies, drawn, strict=True):
        ids = free.ids[:-1] if free.ended == "stop" else free.ids
        reply.prose, rest = closing(tokenizer.decode(ids))
        reply.cut = free.ended == "budget"
        reply.ids = [*ids]
        reply.choices = [Choice(i, (), p) for i, p in enumerate(free.log_probs[: len(ids)])]
        forced.append(tokenizer.encode(rest))
    _feed(decoder, replies, forced)
    for row, reply in enumerate(replies if on_line else ()):
        if drawn[row].ended != "observed":
            on_line(row, reply.prose, True)  # type: ignore[misc]
