"""Twins: whether every pair of a set has a twin that takes all from whoever is blind to exemplars.

`nanopersrm.pairs.read` refuses a broken twin and stops. Here all faults of a set are counted, since
a leak gate has to name them; a set without any twin is a fault too. A fault is what would let a
blind reader hope for more than half, or find out which of two records it holds.
"""

from collections import Counter
from collections.abc import Iterator, Sequence

from nanopersrm.pairs import Pair


def _faults(pair: Pair, twin: Pair) -> Iterator[str]:
    """What is wrong between two records of which the first names the second."""
    if twin is pair:
        yield "the twin is the pair itself"
        return
    if twin.twin != pair.id:
        yield "the twin names another pair as its twin"
    mine, theirs = (pair.chosen, pair.rejected), (twin.rejected, twin.chosen)
    if mine != theirs:
        if mine == theirs[::-1]:
            yield "the twin chooses the same text"
        elif [" ".join(text.split()) for text in mine] == [" ".join(t.split()) for t in theirs]:
            yield "the twin's texts have other blanks or line ends"
        else:
            yield "the twin has other texts"
    elif (pair.chosen_from, pair.rejected_from) != (twin.rejected_from, twin.chosen_from):
        yield "the twin gives other sources to the same texts"
    if set(pair.exemplars) & set(twin.exemplars):
        yield "the twin has an exemplar of the pair"
    for name in ("split", "kind", "domain", "question", "weight"):
        if getattr(pair, name) != getattr(twin, name):
            yield f"the twin has another {name}"


def twin_faults(pairs: Sequence[Pair]) -> dict[str, list[int]]:
    """Each fault and the places of the pairs that have it; empty when all twins are complete."""
    by_id = {pair.id: pair for pair in pairs}
    found: dict[str, list[int]] = {}
    often = Counter(pair.id for pair in pairs)
    if twice := [i for i, pair in enumerate(pairs) if often[pair.id] > 1]:
        found["another pair has the same id"] = twice
    for i, pair in enumerate(pairs):
        twin = by_id.get(pair.twin)
        if not pair.twin:
            found.setdefault("no twin is named", []).append(i)
        elif twin is None:
            found.setdefault("the twin is not in the set", []).append(i)
        else:
            for fault in _faults(pair, twin):
                found.setdefault(fault, []).append(i)
    return found
