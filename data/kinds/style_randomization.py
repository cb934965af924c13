"""Style randomization: a person against a language model that writes in an arbitrary style.

    text_1   what a person wrote after an opening sentence      exemplars_1   other texts by them
    text_2   what a model, as "gusher", wrote after it          exemplars_2   "gusher" after others

The easy kind, when the exemplars are read: the styles are far apart. Without them nothing helps,
not even to know which text is a model's, for the twin asks for the model's.

How it works. Proposals are made in *cells* of CELL. A cell has one persona and one domain, so that
its texts are exemplars for each other: a text stands as a candidate once, beside others of its
cell, cut from other works wherever there are any. Worked number: of 16 texts 8 pass; that gives 8
drafts, each with up to 7 texts to choose exemplars from. Where a cell has fewer than asked for, a
draft has fewer exemplars, on both sides. The person's candidate and exemplars are cut to the
lengths of the model's.

What we chose. The personas of test sets are others than those of the training set. A model text
that fails is a rejection with its reason, so the summary of a build has the yields.
"""

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from data.drafts import Draft, Rejection
from data.kinds.continuing import Ask, Continuer, continuer
from data.kinds.model_text import model_fault, paragraphs
from data.kinds.openings import Opening, draw_opening, first_words
from data.kinds.personas import OPENINGS, Persona, of_split
from data.shelf import Lengths, Shelf, Source, cut, draw_sources

KIND = "style_randomization"
CELL = 16  # proposals with one persona and one domain
SHORTEST, LONGEST = 0.75, 1.25  # of the lengths asked for, as `accept.py` has them

Propose = Callable[[Shelf, Sequence[random.Random], Sequence[int]], Iterator[Draft | Rejection]]


@dataclass(frozen=True)
class Written:
    """What a model made of an opening: a text, or the reason why it is none."""

    opening: Opening
    text: str
    fault: str | None


@dataclass(frozen=True)
class Style:
    """What the model is to go on with."""

    turns: tuple[tuple[str, str], ...]  # (opening, continuation)
    temperature: float
    top_k: int
    names: tuple[str, ...] = ()  # words that its texts must not say


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
    """One draft or rejection for each generator; a cell is written when its first is asked for."""
    personas = list(of_split(shelf.split))
    rngs[0].shuffle(personas)  # the cells of a call have different ones, as far as they go
    for first in range(0, len(rngs), CELL):
        persona = personas[first // CELL % len(personas)]
        cell = rngs[first : first + CELL]
        written = _cell(write, shelf, persona, cell)
        whom = f"model:{base}:{persona.name}"
        meta = {
            "base": base,
            "persona": persona.name,
            "temperature": persona.temperature,
            "top_k": persona.top_k,
        }
        for i, rng in enumerate(cell):
            yield assembled(KIND, shelf, written, i, exemplars[first + i], rng, whom, meta)


def _cell(
    write: Continuer, shelf: Shelf, persona: Persona, rngs: Sequence[random.Random]
) -> list[Written | None]:
    """What the model, as one persona, makes of openings of one domain."""
    domain, _ = rngs[0].choice(shelf.writers)
    openings = []
    for rng in rngs:
        source = rng.choice(shelf.sources[rng.choice(shelf.of_domain(domain))])
        openings.append(draw_opening(source, middle(shelf.lengths), rng))
    turns = tuple(zip(OPENINGS, persona.paragraphs, strict=True))
    style = Style(turns, persona.temperature, persona.top_k, (persona.name,))
    return continued(write, shelf.lengths, openings, [style] * len(rngs), rngs)


def aim(lengths: Lengths) -> tuple[int, int]:
    """The words of a model's text, from and to: it has to serve as candidate and as exemplar.

    >>> aim(Lengths((80, 120), (120, 180)))
    (100, 120)
    """
    least = max(lengths.candidate[0], round(1.1 * SHORTEST * lengths.exemplar[0]))
    least = max(least, sum(lengths.candidate) // 2)
    return least, max(least, lengths.candidate[1])


def middle(lengths: Lengths) -> int:
    """The words of a model's text, on average."""
    return sum(aim(lengths)) // 2


def continued(
    write: Continuer,
    lengths: Lengths,
    openings: Sequence[Opening | None],
    styles: Sequence[Style],
    rngs: Sequence[random.Random],
) -> list[Written | None]:
    """What the model makes of each opening in each style; None where there is no opening."""
    least = SHORTEST * max(lengths.candidate[0], lengths.exemplar[0])
    most = LONGEST * aim(lengths)[1]
    rows = []
    for opening, style, rng in zip(openings, styles, rngs, strict=True):
        words = rng.randint(*aim(lengths))
        if opening is not None:
            ask = Ask(opening.text, style.turns, words, style.temperature, style.top_k)
            rows.append((opening, style, ask))
    texts = iter(write([ask for _, _, ask in rows]))
    found: dict[int, Written] = {}
    for (opening, style, _), reply in zip(rows, texts, strict=True):
        text = paragraphs(reply)
        shown = [opening.text, opening.rest, *(part for turn in style.turns for part in turn)]
        fault = model_fault(text, least, most, shown, style.names)
        found[id(opening)] = Written(opening, text, fault)
    return [found[id(opening)] if opening else None for opening in openings]


def assembled(
    kind: str,
    shelf: Shelf,
    written: Sequence[Written | None],
    index: int,
    count: int,
    rng: random.Random,
    whom: str,
    meta: dict[str, object],
    besides: Sequence[Source] = (),
) -> Draft | Rejection:
    """A draft of one text of a cell, with others of the cell as the exemplars of its writer."""
    own = written[index]
    if own is None:
        return Rejection(kind, "no opening in the source")
    if own.fault:
        return Rejection(kind, own.fault)
    source = own.opening.source
    others = []
    for other in written:
        if other and not other.fault and other.opening.source.number != source.number:
            others.append(other)
    apart = [other for other in others if other.opening.source.title != source.title]
    others = apart or others
    if not others:
        return Rejection(kind, "too few texts of the model")
    count = min(count, len(others))
    exemplars_2 = tuple(other.text for other in rng.sample(others, count))
    mine = draw_sources(shelf, rng, source, count, besides)
    if mine is None:
        return Rejection(kind, "too few other texts")
    text_1 = first_words(own.opening.rest, len(own.text.split()))
    return Draft(
        kind=kind,
        domain=source.domain,
        author=source.author,
        exemplars_1=tuple(
            cut(other.text, len(text.split()), rng)
            for other, text in zip(mine, exemplars_2, strict=True)
        ),
        exemplars_2=exemplars_2,
        text_1=text_1,
        text_2=own.text,
        from_1=source.label,
        from_2=whom,
        question=own.opening.text,
        meta=dict(meta),
    )
