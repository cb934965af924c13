"""Style randomization: a person against a language model that writes in an arbitrary style.

    text_1   what a person wrote after an opening sentence      exemplars_1   other texts by them
    text_2   what a model, as "gusher", wrote after it          exemplars_2   "gusher" after others

The easy kind, when the exemplars are read: the styles are far apart. Without them nothing helps,
not even to know which text is a model's, for the twin asks for the model's.

A *persona* (`personas.json`) is a style: a temperature, a top-k, and continuations of four openings
that no text of anybody contains. The model sees them as earlier turns of a chat, for a small model
follows what it has just seen, and hardly what it is told. A persona belongs to one split.

Proposals are made in *cells* of CELL with one persona and one domain, so that the texts of a cell
are exemplars for each other. Where a cell has fewer than wanted, both sides have fewer. The
person's candidate and exemplars are cut to the lengths of the model's.
"""

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from data.corpus import Corpus, Lengths, Source, cut, draw_sources
from data.kinds.model_text import (
    TABLE,
    Continuer,
    Opening,
    Request,
    Style,
    draw_opening,
    first_words,
    join_short_paragraphs,
    model_fault,
)
from data.proposals import Proposal, Rejection, from_source

KIND = "style_randomization"
CELL = 16  # proposals with one persona and one domain
SHORTEST, LONGEST = 0.75, 1.25  # of the wanted lengths, as `proposals.py` has them


@dataclass(frozen=True)
class Persona:
    """A style: what it does, in words and in paragraphs that continue OPENINGS."""

    name: str
    description: str
    habits: list[str]  # factors that are high in it
    split: str
    temperature: float
    top_k: int
    paragraphs: list[str]


OPENINGS: list[str] = TABLE["openings"]
PERSONAS = [Persona(**persona) for persona in TABLE["personas"]]


@dataclass(frozen=True)
class Continuation:
    """What a model made of an opening: a text, or the reason why it is none."""

    opening: Opening
    text: str
    fault: str | None


def proposals(
    base: str,
    write: Continuer,
    corpus: Corpus,
    rngs: Sequence[random.Random],
    exemplars: Sequence[int],
) -> Iterator[Proposal | Rejection]:
    """One result for each generator; a cell is written when its first is needed."""
    personas = personas_of(corpus.split)
    rngs[0].shuffle(personas)  # the cells of a call have different ones, as far as they go
    for first in range(0, len(rngs), CELL):
        persona = personas[first // CELL % len(personas)]
        cell = rngs[first : first + CELL]
        texts = _write_cell(write, corpus, persona, cell)
        source = f"model:{base}:{persona.name}"
        meta: dict[str, Any] = {"base": base, "persona": persona.name}
        meta |= {"temperature": persona.temperature, "top_k": persona.top_k}
        for i, rng in enumerate(cell):
            yield assemble(KIND, corpus, texts, i, exemplars[first + i], rng, source, meta)


def personas_of(split: str) -> list[Persona]:
    """The personas of a split; out-of-domain sets have those of the test."""
    return [p for p in PERSONAS if p.split == ("test" if split == "ood" else split)]


def _write_cell(
    write: Continuer, corpus: Corpus, persona: Persona, rngs: Sequence[random.Random]
) -> list[Continuation | None]:
    """What the model, as one persona, makes of openings of one domain."""
    domain, _ = rngs[0].choice(corpus.writers)
    openings = []
    for rng in rngs:
        source = rng.choice(corpus.sources[rng.choice(corpus.of_domain(domain))])
        openings.append(draw_opening(source, mean_words(corpus.lengths), rng))
    turns = tuple(zip(OPENINGS, persona.paragraphs, strict=True))
    style = Style(turns, persona.temperature, persona.top_k, (persona.name,))
    return continue_openings(write, corpus.lengths, openings, [style] * len(rngs), rngs)


def word_range(lengths: Lengths) -> tuple[int, int]:
    """The words of a model's text, from and to: it has to serve as candidate and as exemplar."""
    least = max(lengths.candidate[0], round(1.1 * SHORTEST * lengths.exemplar[0]))
    least = max(least, sum(lengths.candidate) // 2)
    return least, max(least, lengths.candidate[1])


def mean_words(lengths: Lengths) -> int:
    """The words of a model's text, on average."""
    return sum(word_range(lengths)) // 2


def continue_openings(
    write: Continuer,
    lengths: Lengths,
    openings: Sequence[Opening | None],
    styles: Sequence[Style],
    rngs: Sequence[random.Random],
) -> list[Continuation | None]:
    """What the model makes of each opening in each style; None where there is no opening."""
    least = SHORTEST * max(lengths.candidate[0], lengths.exemplar[0])
    most = LONGEST * word_range(lengths)[1]
    wanted = [rng.randint(*word_range(lengths)) for rng in rngs]
    rows = [(i, opening) for i, opening in enumerate(openings) if opening is not None]
    replies = write([Request(opening.text, styles[i], wanted[i]) for i, opening in rows])
    continuations: list[Continuation | None] = [None] * len(openings)
    for (i, opening), reply in zip(rows, replies, strict=True):
        text, style = join_short_paragraphs(reply), styles[i]
        seen = [opening.text, opening.rest, *(part for turn in style.turns for part in turn)]
        fault = model_fault(text, least, most, seen, style.names)
        continuations[i] = Continuation(opening, text, fault)
    return continuations


def assemble(
    kind: str,
    corpus: Corpus,
    cell: Sequence[Continuation | None],
    index: int,
    count: int,
    rng: random.Random,
    source_2: str,
    meta: dict[str, object],
    excluded: Sequence[Source] = (),
) -> Proposal | Rejection:
    """A proposal of one text of a cell, with others of the cell as the exemplars of its writer."""
    candidate = cell[index]
    if candidate is None:
        return Rejection("no opening in the source")
    if candidate.fault:
        return Rejection(candidate.fault)
    source = candidate.opening.source
    others = [other for other in cell if other and not other.fault]
    others = [other for other in others if other.opening.source.number != source.number]
    others = [other for other in others if other.opening.source.title != source.title] or others
    if not others:
        return Rejection("too few texts of the model")
    count = min(count, len(others))
    exemplars_2 = tuple(other.text for other in rng.sample(others, count))
    sources = draw_sources(corpus, rng, source, count, excluded)
    if sources is None:
        return Rejection("too few other texts")
    sizes = [len(text.split()) for text in exemplars_2]
    exemplars_1 = tuple(cut(o.text, n, rng) for o, n in zip(sources, sizes, strict=True))
    by_person = first_words(candidate.opening.rest, len(candidate.text.split()))
    exemplars, texts = (exemplars_1, exemplars_2), (by_person, candidate.text)
    proposal = from_source(kind, source, exemplars, texts, source_2, meta)
    return replace(proposal, question=candidate.opening.text)
