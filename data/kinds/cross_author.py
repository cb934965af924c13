"""Cross-author: two people of one domain, each with a text and exemplars from other works.

The hard kind and the honest one: both candidates are human, of one domain, of about one length and,
where years are known, of one period (`year` within 40 years; where a split has nobody that near,
the writer nearest in time). The twin asks for the other person.

The texts answer a question only when both answer the same one; else the question would say which
text is meant.

What we left out. Subjects are not matched, and a text by a speech writer counts as the speaker's.
"""

import random

from data.drafts import Draft, Rejection
from data.shelf import Shelf, Source, Writer, cut, draw_exemplars, draw_writer

KIND = "cross_author"
PERIOD = 40  # years


def draft(shelf: Shelf, rng: random.Random, exemplars: int) -> Draft | Rejection:
    """One proposal: any writer, any source, then somebody else of the domain and the period."""
    writer = draw_writer(shelf, rng)
    source_1 = rng.choice(shelf.sources[writer])
    source_2 = _stranger(shelf, rng, writer, source_1)
    if source_2 is None:
        return Rejection(KIND, "no other writer in the domain")
    text_1 = cut(source_1.text, rng.randint(*shelf.lengths.candidate), rng)
    text_2 = cut(source_2.text, len(text_1.split()), rng)
    exemplars_1 = draw_exemplars(shelf, rng, source_1, exemplars)
    exemplars_2 = draw_exemplars(shelf, rng, source_2, exemplars)
    if exemplars_1 is None or exemplars_2 is None:
        return Rejection(KIND, "too few other texts")
    return Draft(
        kind=KIND,
        domain=source_1.domain,
        author=source_1.author,
        exemplars_1=exemplars_1,
        exemplars_2=exemplars_2,
        text_1=text_1,
        text_2=text_2,
        from_1=source_1.label,
        from_2=source_2.label,
        question=source_1.question if source_1.question == source_2.question else "",
        meta={"author_2": source_2.author, "year_1": source_1.year, "year_2": source_2.year},
    )


def _stranger(shelf: Shelf, rng: random.Random, writer: Writer, source: Source) -> Source | None:
    """A source by another writer of the domain, all who wrote in the period equally likely."""
    fits = []
    apart = []
    for other in shelf.of_domain(writer[0]):
        if other == writer:
            continue
        theirs = shelf.sources[other]
        years = [_years(source, their) for their in theirs]
        near = [their for their, gap in zip(theirs, years, strict=True) if gap <= PERIOD]
        if near:
            fits.append(near)
        apart.append((min(years), other))
    if fits:
        return rng.choice(rng.choice(fits))
    return rng.choice(shelf.sources[min(apart)[1]]) if apart else None


def _years(source: Source, other: Source) -> int:
    """Years between two sources; 0 when one is not known."""
    if source.year is None or other.year is None:
        return 0
    return abs(source.year - other.year)
