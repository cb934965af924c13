"""Style mimicking: a person against a language model that imitates this very person.

    shown    a passage by the person
    text_1   what the person wrote after an opening      exemplars_1   other texts by the person
    text_2   what the model wrote after it               exemplars_2   its imitations after others

The hard one of the model's kinds: manner and subject are the person's, as far as the model gets.
The passage that the model imitates is never the text to be judged nor an exemplar, nor from the
source of one: else the imitation could be told by the words that it took over.

How it works. Proposals are made in cells of CELL, each with one person and one shown passage; its
imitations are exemplars for each other, as in `style_randomization.py`. The shown passage becomes
one turn of the chat: its first sentence, and the rest. Two cells are written together, to fill a
batch. In a cell no source has two openings, so who has few sources gives few proposals, and the
rest of the cell is rejected.
"""

import random
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path

from data.drafts import Draft, Rejection
from data.kinds.continuing import BATCH, Continuer, continuer
from data.kinds.openings import draw_opening, first_words
from data.kinds.style_randomization import Propose, Style, assembled, continued, middle
from data.shelf import Shelf, Source

KIND = "style_mimicking"
CELL = 8  # proposals with one person
FEWEST = 4  # sources: one is shown, one is continued, two are for exemplars
TEMPERATURE, TOP_K = 0.85, 50
SHOWN = 110  # words of the imitated passage after its first sentence


def load(base: str, seed: int = 0, folder: Path | None = None) -> Propose:
    """What makes many proposals at once, with this base; nothing is loaded yet."""
    return partial(proposals, base, continuer(base, seed, folder))


def proposals(
    base: str,
    write: Continuer,
    shelf: Shelf,
    rngs: Sequence[random.Random],
    exemplars: Sequence[int],
) -> Iterator[Draft | Rejection]:
    """One draft or rejection for each generator; a batch is written when its first is asked for."""
    for first in range(0, len(rngs), BATCH):
        cells = [
            (rngs[at : at + CELL], exemplars[at : at + CELL])
            for at in range(first, min(first + BATCH, len(rngs)), CELL)
        ]
        shown = [_shown(shelf, cell[0]) for cell, _ in cells]
        openings, styles = [], []
        for (cell, _), model in zip(cells, shown, strict=True):
            sources = _others(shelf, cell[0], model)
            for i, rng in enumerate(cell):
                source = sources[i] if i < len(sources) else None
                openings.append(
                    draw_opening(source, middle(shelf.lengths), rng) if source else None
                )
                styles.append(model[1] if model else NOTHING)
        batch = [rng for cell, _ in cells for rng in cell]
        written = continued(write, shelf.lengths, openings, styles, batch)
        for number, ((cell, counts), model) in enumerate(zip(cells, shown, strict=True)):
            if model is None:
                yield from [Rejection(KIND, "no passage to imitate")] * len(cell)
                continue
            source, _ = model
            mine = written[number * CELL : number * CELL + len(cell)]
            whom = f"model:{base}:mimic:{source.author}"
            meta = {
                "base": base,
                "persona": "mimic",
                "imitated": source.label,
                "temperature": TEMPERATURE,
                "top_k": TOP_K,
            }
            for i, (rng, count) in enumerate(zip(cell, counts, strict=True)):
                yield assembled(KIND, shelf, mine, i, count, rng, whom, meta, [source])


NOTHING = Style((), TEMPERATURE, TOP_K)


def _shown(shelf: Shelf, rng: random.Random) -> tuple[Source, Style] | None:
    """A source of some person, and a passage of it as a style; None where there are too few."""
    own = shelf.sources[rng.choice(shelf.writers)]
    if len(own) < FEWEST:
        return None
    source = rng.choice(own)
    passage = draw_opening(source, SHOWN, rng)
    if passage is None:
        return None
    turn = (passage.text, first_words(passage.rest, SHOWN))
    return source, Style((turn,), TEMPERATURE, TOP_K)


def _others(shelf: Shelf, rng: random.Random, model: tuple[Source, Style] | None) -> list[Source]:
    """The other sources of the person in random order, from other works where there are enough."""
    if model is None:
        return []
    shown, _ = model
    own = shelf.sources[shown.domain, shown.author]
    left = [source for source in own if source.number != shown.number]
    apart = [source for source in left if source.title != shown.title]
    if len(apart) >= CELL:
        left = apart
    return rng.sample(left, len(left))
