"""Drafts: what every kind of pair hands on before it is accepted and becomes a pair and its twin.

A draft speaks of two writers evenly: `text_1` is by writer 1, whose other texts are `exemplars_1`,
and likewise 2. `pair_and_twin` asks about the same two texts twice,

    pair   exemplars_1   chosen text_1   rejected text_2
    twin   exemplars_2   chosen text_2   rejected text_1

so nothing but the exemplars can tell which of the two is meant. Writer 2 may be another person, the
same person after a rewrite, or a model. `author` is the person whose writings the draft came from;
when writer 2 is another person, `meta["author_2"]` names them, and the twin is theirs.

A coin decides which of the two stands first and ends in "a": were it always the person's, whoever
keeps every second record would have a set in which people are always right. `meta` speaks of the
draft: "_1" is writer 1 and "_2" writer 2, in both records.
"""

import random
from dataclasses import dataclass, field, replace
from typing import Any

from nanopersrm.pairs import Pair


@dataclass(frozen=True)
class Draft:
    """A proposal of one kind: two texts, and other texts by the writer of each."""

    kind: str
    domain: str
    author: str
    exemplars_1: tuple[str, ...]
    exemplars_2: tuple[str, ...]
    text_1: str
    text_2: str
    from_1: str  # who wrote text_1, in the words of Pair.chosen_from
    from_2: str
    question: str = ""
    meta: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Rejection:
    """A proposal that came to nothing, and why."""

    kind: str
    reason: str


def author_2(draft: Draft) -> str:
    """The person behind writer 2."""
    return str(draft.meta.get("author_2", draft.author))


def pair_and_twin(draft: Draft, id: str, split: str) -> tuple[Pair, Pair]:
    """The two records of a draft, with the ids `id` + "a" and `id` + "b"."""
    ids = [f"{id}a", f"{id}b"]
    if random.Random(f"{id}/order").random() < 0.5:
        ids.reverse()
    pair = Pair(
        id=ids[0],
        twin=ids[1],
        author=draft.author,
        domain=draft.domain,
        split=split,
        kind=draft.kind,
        exemplars=draft.exemplars_1,
        question=draft.question,
        chosen=draft.text_1,
        rejected=draft.text_2,
        chosen_from=draft.from_1,
        rejected_from=draft.from_2,
        meta=dict(draft.meta),
    )
    twin = replace(
        pair,
        id=ids[1],
        twin=ids[0],
        author=author_2(draft),
        exemplars=draft.exemplars_2,
        chosen=draft.text_2,
        rejected=draft.text_1,
        chosen_from=draft.from_2,
        rejected_from=draft.from_1,
        meta=dict(draft.meta),
    )
    return (pair, twin) if ids[0] < ids[1] else (twin, pair)
