"""Cross-author: two people of one domain, each with a text and exemplars from other works.

The hard kind and the honest one: both candidates are human, of one domain, of about one length and,
where years are known, of one period (`year` within 40 years; where a split has nobody that near,
the writer nearest in time). The texts have a question only when both answer the same one.
"""

import random
from dataclasses import replace

from data.corpus import Corpus, Source, Writer, cut, draw_exemplars
from data.proposals import Proposal, Rejection, from_source

KIND = "cross_author"
PERIOD = 40  # years


def propose(corpus: Corpus, rng: random.Random, exemplars: int) -> Proposal | Rejection:
    """Any writer, any source, then somebody else of the domain and the period."""
    writer = rng.choice(corpus.writers)
    source_1 = rng.choice(corpus.sources[writer])
    source_2 = _draw_stranger(corpus, rng, writer, source_1)
    if source_2 is None:
        return Rejection("no other writer in the domain")
    text_1 = cut(source_1.text, rng.randint(*corpus.lengths.candidate), rng)
    text_2 = cut(source_2.text, len(text_1.split()), rng)
    exemplars_1 = draw_exemplars(corpus, rng, source_1, exemplars)
    exemplars_2 = draw_exemplars(corpus, rng, source_2, exemplars)
    if exemplars_1 is None or exemplars_2 is None:
        return Rejection("too few other texts")
    meta = {"author_2": source_2.author, "year_1": source_1.year, "year_2": source_2.year}
    others, texts = (exemplars_1, exemplars_2), (text_1, text_2)
    proposal = from_source(KIND, source_1, others, texts, source_2.label, meta)
    return proposal if source_1.question == source_2.question else replace(proposal, question="")


def _draw_stranger(
    corpus: Corpus, rng: random.Random, writer: Writer, source: Source
) -> Source | None:
    """A source by another writer of the domain, all who wrote in the period equally likely."""
    in_period = []
    gaps = []
    for other in corpus.of_domain(writer[0]):
        if other == writer:
            continue
        years = [_years_apart(source, theirs) for theirs in corpus.sources[other]]
        near = [s for s, gap in zip(corpus.sources[other], years, strict=True) if gap <= PERIOD]
        if near:
            in_period.append(near)
        gaps.append((min(years), other))
    if in_period:
        return rng.choice(rng.choice(in_period))
    return rng.choice(corpus.sources[min(gaps)[1]]) if gaps else None


def _years_apart(source: Source, other: Source) -> int:
    """Years between two sources; 0 when one is not known."""
    if source.year is None or other.year is None:
        return 0
    return abs(source.year - other.year)
