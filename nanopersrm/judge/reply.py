"""From prompts to digits: free thinking, a given score line, and only digits can be drawn.

A reply is drawn in three parts, so that it always has the form that `verdict.py` reads:

    <think>↵                      given, at the end of the prompt
    …                             free text, until "</think>", a stop token or the thinking budget;
                                  in double quotes only what stands in the texts (`verbatim.py`)
    ↵</think>↵<scores>A=          given, as far as the model has not written it
    7                             a digit, by the probabilities of the nine digit tokens
     B=                           given (two candidates)
    3                             a digit, under each of the nine digits that A could have got

The last step is exact, not sampled: the nine possible digits of A become nine branches of the tree,
so that p(a, b) is known for all 81 pairs at the price of nine short rows.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from kernels.sample import draw_key, sample
from nanopersrm.judge.judgement import JudgeConfig
from nanopersrm.judge.verbatim import OUTSIDE, Quotable, quote_tokens
from nanopersrm.judge.verdict import CLOSE, LABELS, OPEN, closing, write
from nanopersrm.model.sampler import Decoder, Forbid, Prefix, Reply, SamplingConfig
from nanopersrm.model.tokenizer import Tokenizer
from nanopersrm.model.transformer import Model

FORCED_ROOM = 32  # tokens that the given parts may take, at most
NINE = 9
TAIL = 8  # tokens that are looked at for "</think>", which is at most 8 characters
DIGIT_POSITION = 1 << 32  # and one more for B: the noise of the digits is that of no other draw

# Called as on_text(prompt, sample, reasoning so far, ended) after each token.
OnSample = Callable[[int, int, str, bool], None]


@dataclass(frozen=True)
class Answer:
    """One reply, and the probabilities behind its digits."""

    text: str  # the whole reply, in the grammar of verdict.py
    digits: list[float]  # (9,) p(A = 1) … p(A = 9)
    joint: list[list[float]] | None  # (9, 9) p(A, B) of two candidates
    cut: bool  # the thinking was ended by the budget, not by the model
    tokens: int  # that were drawn


def answer(
    model: Model,
    tokenizer: Tokenizer,
    prompts: Sequence[list[int]],
    labels: int,
    config: JudgeConfig,
    prefix: Prefix | None = None,
    on_text: OnSample | None = None,
    texts: Sequence[Sequence[str]] | None = None,
) -> list[list[Answer]]:
    """Prompts about 1 or 2 candidates, ending with OPEN -> config.samples answers for each.

    texts: of each prompt, what its quotes are copied from; None: quotes are drawn freely.
    """
    assert labels in (1, 2), f"{labels} candidates in a prompt"
    room = config.think_tokens * config.think + FORCED_ROOM
    decoder = Decoder(model, prompts, prefix, room=room if config.samples == 1 else 0)
    decoder.fork([config.samples] * len(prompts), room)
    rows = len(prompts) * config.samples
    replies = [Reply(ended="stop") for _ in range(rows)]
    if config.think:
        forbid = None if texts is None else _no_other_quotes(decoder, tokenizer, config, texts)
        replies = _think(decoder, tokenizer, config, on_text, forbid)
    thoughts, completions = [], []
    for reply in replies:
        thought, forced = closing(tokenizer.decode(_without_stop(reply)))
        thoughts.append(thought)
        completions.append(tokenizer.encode(forced))
    decoder.feed(completions)
    first, drawn = _digits(decoder, tokenizer, config)  # (rows, 9) float64, (rows,)
    scores = [{"A": digit} for digit in drawn]
    joint: Tensor | None = None
    if labels == 2:
        joint, seconds = _second_digits(decoder, tokenizer, config, first, drawn)
        scores = [{**score, "B": digit} for score, digit in zip(scores, seconds, strict=True)]
    answers = []
    for row, reply in enumerate(replies):
        finite = bool(first[row].isfinite().all())
        text = write(thoughts[row], scores[row]) if finite else f"{OPEN}{thoughts[row]}\n{CLOSE}"
        pair = None if joint is None else joint[row].tolist()
        tokens = len(reply.ids) + labels
        answers.append(Answer(text, first[row].tolist(), pair, reply.ended == "budget", tokens))
    return [answers[i : i + config.samples] for i in range(0, rows, config.samples)]


def _no_other_quotes(
    decoder: Decoder, tokenizer: Tokenizer, config: JudgeConfig, texts: Sequence[Sequence[str]]
) -> Forbid:
    """Forbids tokens that would quote what is in no text of the row's prompt."""
    quotable = [Quotable(shown, quote_tokens(tokenizer)) for shown in texts]
    places = [OUTSIDE] * (len(texts) * config.samples)

    def forbid(rows: list[int], drawn: list[list[int]]) -> Tensor:
        mask = torch.zeros(len(rows), decoder.logits.shape[-1], dtype=torch.bool)  # (R, V)
        for k, (row, ids) in enumerate(zip(rows, drawn, strict=True)):
            source = quotable[row // config.samples]
            if ids:
                places[row] = source.after(places[row], ids[-1])
            inside, choices = source.choices(places[row], config.think_tokens - len(ids))
            mask[k] = inside
            mask[k, choices] = not inside
        return mask.to(decoder.device)

    return forbid


def _think(
    decoder: Decoder,
    tokenizer: Tokenizer,
    config: JudgeConfig,
    on_text: OnSample | None,
    forbid: Forbid | None,
) -> list[Reply]:
    """Draw the free part of every row."""

    def observe(row: int, ids: list[int]) -> bool:
        ended = CLOSE in tokenizer.decode(ids[-TAIL:])
        if on_text is not None:
            thought, _ = closing(tokenizer.decode(ids))
            on_text(*divmod(row, config.samples), thought, ended)
        return ended

    sampling = SamplingConfig(
        temperature=config.drawing_temperature, max_new=config.think_tokens, seed=config.seed
    )
    replies = decoder.generate(sampling, tokenizer.eos_ids, observe, forbid)
    if on_text is not None:
        for row, reply in enumerate(replies):
            if reply.ended != "observed":
                thought, _ = closing(tokenizer.decode(_without_stop(reply)))
                on_text(*divmod(row, config.samples), thought, True)
    return replies


def _without_stop(reply: Reply) -> list[int]:
    return reply.ids[:-1] if reply.ended == "stop" else reply.ids


def _digits(
    decoder: Decoder, tokenizer: Tokenizer, config: JudgeConfig, place: int = 0
) -> tuple[Tensor, list[int]]:
    """The next digit of every row: probabilities (rows, 9) fp64, and a drawn one."""
    ids = torch.tensor(tokenizer.digit_ids, device=decoder.hidden.device)
    logits = decoder.model.logits_of(decoder.hidden, ids).cpu()  # (rows, 9)
    keys = [draw_key(config.seed, name, DIGIT_POSITION + place) for name in decoder.names]
    drawn, _ = sample(logits, torch.tensor(keys, dtype=torch.int32), config.drawing_temperature)
    return logits.double().softmax(-1), [digit + 1 for digit in drawn.tolist()]


def _second_digits(
    decoder: Decoder, tokenizer: Tokenizer, config: JudgeConfig, first: Tensor, drawn: list[int]
) -> tuple[Tensor, list[int]]:
    """p(a, b) (rows, 9, 9), and B's digit after the digit that A was given."""
    rows = len(drawn)
    between = tokenizer.encode(f" {LABELS[1]}=")
    decoder.fork([NINE] * rows, len(between) + 1)
    decoder.feed([[digit, *between] for _ in range(rows) for digit in tokenizer.digit_ids])
    second, candidates = _digits(decoder, tokenizer, config, place=1)  # (rows·9, 9)
    joint = first[:, :, None] * second.view(rows, NINE, NINE)
    return joint, [candidates[row * NINE + digit - 1] for row, digit in enumerate(drawn)]
