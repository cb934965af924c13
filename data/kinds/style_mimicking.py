"""Style mimicking: a person against a language model that imitates this very person.

    model    a passage by the person
    text_1   what the person wrote after an opening      exemplars_1   other texts by the person
    text_2   what the model wrote after it               exemplars_2   its imitations after others

The imitated passage is never the text to be judged nor an exemplar, nor from the source of one.
Proposals are made in cells of CELL, each with one person and one imitated passage, which becomes
one turn of the chat: its first sentence, and the rest. The imitations of a cell are exemplars for
each other. Two cells are written together, to fill a batch. In a cell no source has two openings.
"""

import random
from collections.abc import Iterator, Sequence
from typing import Any

from data.corpus import Corpus, Source
from data.kinds.model_text import (
    BATCH,
    Continuer,
    Style,
    draw_opening,
    first_words,
)
from data.kinds.style_randomization import assemble, continue_openings, mean_words
from data.proposals import Proposal, Rejection

KIND = "style_mimicking"
CELL = 8  # proposals with one person
FEWEST = 4  # sources: one is imitated, one is continued, two are for exemplars
TEMPERATURE, TOP_K = 0.85, 50
IMITATED = 110  # words of the imitated passage after its first sentence
NO_STYLE = Style((), TEMPERATURE, TOP_K)


def proposals(
    base: str,
    write: Continuer,
    corpus: Corpus,
    rngs: Sequence[random.Random],
    exemplars: Sequence[int],
) -> Iterator[Proposal | Rejection]:
    """One result for each generator; a batch is written when its first is needed."""
    for first in range(0, len(rngs), BATCH):
        batch = rngs[first : first + BATCH]
        cells = [batch[at : at + CELL] for at in range(0, len(batch), CELL)]
        imitated = [_draw_imitated(corpus, cell[0]) for cell in cells]
        openings, styles = [], []
        for cell, model in zip(cells, imitated, strict=True):
            sources = _draw_others(corpus, cell[0], model[0]) if model else []
            words = mean_words(corpus.lengths)
            for i, rng in enumerate(cell):
                openings.append(draw_opening(sources[i], words, rng) if i < len(sources) else None)
                styles.append(model[1] if model else NO_STYLE)
        texts = continue_openings(write, corpus.lengths, openings, styles, batch)
        for number, (cell, model) in enumerate(zip(cells, imitated, strict=True)):
            if model is None:
                yield from [Rejection("no passage to imitate")] * len(cell)
                continue
            source, at = model[0], number * CELL
            meta: dict[str, Any] = {"base": base, "persona": "mimic", "imitated": source.label}
            meta |= {"temperature": TEMPERATURE, "top_k": TOP_K}
            written, written_by = texts[at : at + len(cell)], f"model:{base}:mimic:{source.author}"
            for i, rng in enumerate(cell):
                count = exemplars[first + at + i]
                yield assemble(KIND, corpus, written, i, count, rng, written_by, meta, [source])


def _draw_imitated(corpus: Corpus, rng: random.Random) -> tuple[Source, Style] | None:
    """A source of some person, and a passage of it as a style; None where there are too few."""
    sources = corpus.sources[rng.choice(corpus.writers)]
    if len(sources) < FEWEST:
        return None
    source = rng.choice(sources)
    passage = draw_opening(source, IMITATED, rng)
    if passage is None:
        return None
    turn = (passage.text, first_words(passage.rest, IMITATED))
    return source, Style((turn,), TEMPERATURE, TOP_K)


def _draw_others(corpus: Corpus, rng: random.Random, imitated: Source) -> list[Source]:
    """The other sources of the person in random order, from other works where there are enough."""
    sources = corpus.sources[imitated.domain, imitated.author]
    left = [source for source in sources if source.number != imitated.number]
    apart = [source for source in left if source.title != imitated.title]
    if len(apart) >= CELL:
        left = apart
    return rng.sample(left, len(left))
