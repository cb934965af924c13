"""Conditional likelihood: does knowing the writer's texts make a candidate easier to predict?

    score(c) = (log p(c | exemplars) - log p(c)) / tokens of c

A base that was never taught to judge reads the exemplars as a beginning and the candidate as its
continuation. What it would have expected of anybody is taken away, so a plain text gains nothing by
being plain. The idea is old in authorship work: a text is nearest to the author whose own model is
least surprised by it (Teahan and Harper 2003); here the exemplars take the place of the training.

One forward does a pair. Every token is predicted by the one before it, so a context gives its last
token to the segments that continue it:

    segment 0   exemplars without their last token                  parent -1
    segments    last token of them, candidate A without its last    parent 0      log p(A | ...)
                the same for candidate B                            parent 0      log p(B | ...)
    segments    blank line, candidate A without its last            parent -1     log p(A)
                the same for candidate B                            parent -1     log p(B)

The exemplars are computed once. log p(c) does not depend on them and is remembered, so the twin of
a pair costs less. Worked example: a candidate of two tokens with log p -2.0 and -1.0 after the
exemplars, -2.5 and -1.5 without, scores (-3.0 + 4.0) / 2 = 0.5 nats a token.

What we chose. Texts are parted by a blank line, and "without" means after a blank line alone, so
that the first token has a probability too. Where it does not fit, the beginning of the exemplars is
left out. The question is not shown. What we left out: the chat template, which is for talking.
"""

from collections.abc import Sequence

import torch

from kernels.logprob import logprob
from nanopersrm import InputError
from nanopersrm.evaluate.predictions import Score
from nanopersrm.model.cache import Layout
from nanopersrm.model.tokenizer import Tokenizer
from nanopersrm.model.transformer import Model

BREAK = "\n\n"
REMEMBERED = 512  # candidates whose log p is kept


def likelihood(model: Model, tokenizer: Tokenizer) -> Score:
    """The judge `score(exemplars, question, candidates)`, in nats a token."""
    plain: dict[tuple[int, ...], float] = {}  # log p(c) of the latest candidates

    def score(
        exemplars: Sequence[str], question: str, candidates: Sequence[str]
    ) -> list[float] | None:
        blank = tokenizer.encode(BREAK)
        ids = [tokenizer.encode(text.strip()) for text in candidates]
        context = [i for text in exemplars for i in (*tokenizer.encode(text.strip()), *blank)]
        longest, room = max(map(len, ids)), model.config.context
        if not all(ids) or longest + len(blank) + 1 > room:
            raise InputError(
                f"expected candidates of 1 to {room - len(blank) - 1} tokens, got {longest}"
            )
        context = context[max(0, len(context) + longest - room) :]
        fresh = [c for c in dict.fromkeys(map(tuple, ids)) if c not in plain]
        asked = [(True, tuple(c)) for c in ids] + [(False, c) for c in fresh]
        found = log_likelihoods(model, context, blank, asked)
        plain.update(zip(fresh, found[len(ids) :], strict=True))
        scores = [(told - plain[tuple(c)]) / len(c) for c, told in zip(ids, found, strict=False)]
        while len(plain) > REMEMBERED:
            del plain[next(iter(plain))]
        return scores

    return score


@torch.inference_mode()
def log_likelihoods(
    model: Model,
    context: list[int],
    blank: list[int],
    asked: Sequence[tuple[bool, tuple[int, ...]]],
) -> list[float]:
    """(after the context, or after a blank line; ids) of each text -> its log p, in nats."""
    assert len(context) > 1, f"a context of {len(context)} tokens"
    device = model.device
    rows, parents = [context[:-1]], [-1]
    for told, ids in asked:
        rows.append([*(context[-1:] if told else blank), *ids[:-1]])
        parents.append(0 if told else -1)
    layout = Layout.of([len(row) for row in rows], parents)
    layout = Layout(layout.starts, layout.parents, layout.positions.to(device))
    flat = torch.tensor([i for row in rows for i in row], device=device)
    hidden = model(flat, layout)  # (N, D)
    ends = layout.starts[2:]  # of the segments of `asked`; the last rows of each predict its ids
    predicting = [r for end, (_, ids) in zip(ends, asked, strict=True) for r in _last(end, ids)]
    chosen = torch.tensor([i for _, ids in asked for i in ids], device=device)
    log_probs, _ = logprob(hidden[torch.tensor(predicting, device=device)], model.head(), chosen)
    parts = log_probs.double().split([len(ids) for _, ids in asked])
    return [float(part.sum()) for part in parts]  # waits for the device


def _last(end: int, ids: Sequence[int]) -> range:
    """As many rows as there are ids, up to `end`."""
    return range(end - len(ids), end)
