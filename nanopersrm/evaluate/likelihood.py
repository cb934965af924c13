"""Conditional likelihood: does knowing the writer's texts make a candidate easier to predict?

    score(c) = (log p(c | exemplars) - log p(c)) / tokens of c                         nats a token

A base that was never taught to judge reads the exemplars as a beginning and the candidate as its
continuation; what it would have expected of anybody is taken away (after Teahan and Harper 2003,
where a text is nearest to the author whose own model is least surprised by it).

One forward does a pair. Every token is predicted by the one before it, so a context gives its last
token to the segments that continue it:

    segment 0   exemplars without their last token                  parent -1
    segments    last token of them, a candidate without its last    parent 0     log p(c | e)
    segments    blank line, a candidate without its last            parent -1    log p(c)

The exemplars are computed once; log p(c) is remembered, so the twin of a pair costs less. Texts are
parted by a blank line. Where exemplars do not fit, their beginning is left out. The question and
the chat template are not shown.
"""

from collections.abc import Sequence

import torch

from kernels.logprob import logprob
from nanopersrm import InputError
from nanopersrm.model.cache import Layout
from nanopersrm.model.tokenizer import Tokenizer
from nanopersrm.model.transformer import Model
from nanopersrm.style.baselines import Score

BREAK = "\n\n"
REMEMBERED = 512  # candidates whose log p is kept


def likelihood(model: Model, tokenizer: Tokenizer) -> Score:
    """The judge `score(exemplars, question, candidates)`."""
    alone: dict[tuple[int, ...], float] = {}  # log p(c) of the latest candidates

    def score(
        exemplars: Sequence[str], question: str, candidates: Sequence[str]
    ) -> list[float] | None:
        blank = tokenizer.encode(BREAK)
        ids = [tuple(tokenizer.encode(text.strip())) for text in candidates]
        context = [i for text in exemplars for i in (*tokenizer.encode(text.strip()), *blank)]
        longest, room = max(map(len, ids)), model.config.context
        if not all(ids) or longest + len(blank) + 1 > room:
            raise InputError(
                f"expected candidates of 1 to {room - len(blank) - 1} tokens, got {longest}"
            )
        context = context[max(0, len(context) + longest - room) :]
        fresh = [c for c in dict.fromkeys(ids) if c not in alone]
        texts = [(True, c) for c in ids] + [(False, c) for c in fresh]
        log_p = log_likelihoods(model, context, blank, texts)
        alone.update(zip(fresh, log_p[len(ids) :], strict=True))
        scores = [(after - alone[c]) / len(c) for c, after in zip(ids, log_p, strict=False)]
        while len(alone) > REMEMBERED:
            del alone[next(iter(alone))]
        return scores

    return score


@torch.inference_mode()
def log_likelihoods(
    model: Model,
    context: list[int],
    blank: list[int],
    texts: Sequence[tuple[bool, tuple[int, ...]]],
) -> list[float]:
    """(after the context, or after a blank line; ids) of each text -> its log p, in nats."""
    assert len(context) > 1, f"a context of {len(context)} tokens"
    rows, parents = [context[:-1]], [-1]
    for after_context, ids in texts:
        rows.append([*(context[-1:] if after_context else blank), *ids[:-1]])
        parents.append(0 if after_context else -1)
    layout = Layout.of([len(row) for row in rows], parents)
    layout = Layout(layout.starts, layout.parents, layout.positions.to(model.device))
    hidden = model(torch.tensor([i for row in rows for i in row], device=model.device), layout)
    ends = layout.starts[2:]  # of the segments of texts, whose last rows predict their ids
    predicting = [
        r for end, (_, ids) in zip(ends, texts, strict=True) for r in range(end - len(ids), end)
    ]
    targets = torch.tensor([i for _, ids in texts for i in ids], device=model.device)
    at = torch.tensor(predicting, device=model.device)
    log_probs, _ = logprob(hidden[at], model.head(), targets)
    return [float(p.sum()) for p in log_probs.double().split([len(ids) for _, ids in texts])]
