"""Conditional likelihood: does knowing the writer's texts make a candidate easier to predict?

    score(c) = (log p(c | exemplars) - log p(c)) / tokens of c                         nats a token

The base reads the exemplars as a beginning and the candidate as its continuation; what it would
have expected of anybody is taken away (after Teahan and Harper 2003). The question and the chat
template are not shown. One forward does a pair. Every token is predicted by the one before it, so a
context gives its last token to the segments that continue it:

    segment 0   exemplars without their last token                  parent -1
    segments    last token of them, a candidate without its last    parent 0     log p(c | e)
    segments    blank line, a candidate without its last            parent -1    log p(c)
"""

from collections.abc import Sequence

import torch

from kernels.logprob import logprob
from nanopersrm import InputError
from nanopersrm.evaluate.baselines import Score
from nanopersrm.model.cache import Layout
from nanopersrm.model.tokenizer import Tokenizer
from nanopersrm.model.transformer import Model


def likelihood(model: Model, tokenizer: Tokenizer) -> Score:
    """The judge `score(exemplars, question, candidates)`."""
    blank = tokenizer.encode("\n\n")

    def score(exemplars: Sequence[str], question: str, candidates: Sequence[str]) -> list[float]:
        ids = [tokenizer.encode(text.strip()) for text in candidates]
        context = [i for text in exemplars for i in (*tokenizer.encode(text.strip()), *blank)]
        longest, room = max(map(len, ids)), model.config.context
        most = room - len(blank) - 1
        if not all(ids) or longest > most:
            raise InputError(f"expected candidates of 1 to {most} tokens, got {longest}")
        context = context[max(0, len(context) + longest - room) :]
        log_p = log_likelihoods(model, context, blank, ids)
        return [(after - alone) / len(c) for c, (after, alone) in zip(ids, log_p, strict=True)]

    return score


@torch.inference_mode()
def log_likelihoods(
    model: Model, context: list[int], blank: list[int], texts: Sequence[list[int]]
) -> list[tuple[float, float]]:
    """ids of each text -> its log p after the context, and after a blank line, in nats."""
    rows, parents = [context[:-1]], [-1]
    for before, parent in ((context[-1:], 0), (blank, -1)):
        rows += [[*before, *ids[:-1]] for ids in texts]
        parents += [parent] * len(texts)
    layout = Layout.of([len(row) for row in rows], parents)
    layout = Layout(layout.starts, layout.parents, layout.positions.to(model.device))
    hidden = model(torch.tensor([i for row in rows for i in row], device=model.device), layout)
    both = [*texts, *texts]
    ends = layout.starts[2:]  # of the segments of texts, whose last rows predict their ids
    at = [row for end, ids in zip(ends, both, strict=True) for row in range(end - len(ids), end)]
    targets = torch.tensor([i for ids in both for i in ids], device=model.device)
    log_probs, _ = logprob(hidden[torch.tensor(at, device=model.device)], model.head(), targets)
    sums = [float(part.sum()) for part in log_probs.double().split([len(ids) for ids in both])]
    return [*zip(sums[: len(texts)], sums[len(texts) :], strict=True)]
