"""Nearness: what the trained instruments say of texts, for the measured block of a prompt.

    near = nearness(tokenizer, style)
    near(exemplars, texts)          -> a `profile.Near` a text
    in_one(near(exemplars, texts))  -> the chance by all instruments together, a text

The style similarity needs token ids and a forward of the model, the fusion of all instruments needs
the texts. Here they meet, for training (`data/course.py`) and judging (`judge.py`) alike, so that
both see numbers of the same kind: of a writer on whose pairs the fusion was fitted, training sees
what it says when it was fitted without them. A writer who is judged is none of those.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence

from nanopersrm.model.tokenizer import Tokenizer
from nanopersrm.style.fusion import Cosines
from nanopersrm.style.profile import Near
from nanopersrm.style.similarity import Style

# (exemplars, texts) -> what is said of each text
Nearness = Callable[[Sequence[str], Sequence[str]], list[Near]]


def cosines(tokenizer: Tokenizer, style: Style) -> Cosines:
    """The style similarity as a function of texts: the cosine of each with the writer."""

    def similar(exemplars: Sequence[str], texts: Sequence[str]) -> list[float]:
        def ids(some: Sequence[str]) -> list[list[int]]:
            return [tokenizer.encode(text.strip()) for text in some]

        return style.similarities(ids(exemplars), ids(texts))

    return similar


def nearness(
    tokenizer: Tokenizer, style: Style, writers: Mapping[tuple[str, ...], str] | None = None
) -> Nearness:
    """The percentile of the style similarity and, where instruments are fused, the chance.

    writers: of exemplars that are trained on, whose they are.
    """
    similar = cosines(tokenizer, style)
    known = writers or {}

    def near(exemplars: Sequence[str], texts: Sequence[str]) -> list[Near]:
        found = similar(exemplars, texts)
        percents = [style.percentile(cosine) for cosine in found]
        if (fused := style.fusion) is None:
            return [Near(percent) for percent in percents]
        if (writer := known.get(tuple(text.strip() for text in exemplars))) is not None:
            fused = fused.unseen_by(writer)
        chances = fused.chances(exemplars, texts, found)
        return [Near(*both) for both in zip(percents, chances, strict=True)]

    return near


def in_one(near: Iterable[Near]) -> list[float] | None:
    """The chance of each text by all instruments together; None where nobody has weighed them."""
    found = [one.chance for one in near]
    known = [chance for chance in found if chance is not None]
    return known if known and len(known) == len(found) else None
