"""Restyle: a person against the same person with one to three other habits.

Writer 1 is a person of the shelf. Writer 2 is the same person put through rewrites, always the same
ones: "the Anne who never contracts and writes in short sentences". Both candidates are the same
passage, before and after, and the exemplars of both come from the same other texts, so nothing but
the changed habits can tell which is whose:

    text_1 = passage                         exemplars_1 = other texts
    text_2 = apply_all(rewrites, passage)    exemplars_2 = apply_all(rewrites, each other text)
    from_2 = "restyle:contractions-,sentence_length-:Anne"

We chose the same passage rather than another one by the same person: two passages also differ in
subject and in everything the person did not do twice, which is what the twin should hold still.

Accepted is only what the factors confirm, in z units of `profile.reference()`:
1. Every chosen factor moves by at least MOVED in its direction, in the passage and between the
   pooled exemplars: the habit is there to be seen and the exemplars tell of it.
2. Every factor that no chosen rewrite declares (`also`) moves by at most HOLDS in the passage.
3. On the chosen factors the passage is nearer to exemplars_1, the rewritten passage nearer to
   exemplars_2, by NEARER: where a person's own habit wavers, the question would have no answer.
Worked number: no contractions in the passage (z -0.7), 4 per 100 words after (z 2.0): moved by 2.7;
exemplars 0.4 against 3.5: 2.1. |-0.7 - 0.4| < |-0.7 - 2.6|, so the passage is nearer to its own.

What we left out. Whether a person would ever write so: a rewrite may give a novelist of 1860 small
letters at sentence starts. A factor that neither side can show (no word with two spellings) counts
as not moved.
"""

import random
from collections.abc import Sequence

from data.drafts import Draft, Rejection
from data.kinds.rewrites import REWRITES, Rewrite, apply_all
from data.shelf import Shelf, cut, draw_exemplars, draw_writer
from nanopersrm.style.features import measure
from nanopersrm.style.profile import BY_NAME, reference
from nanopersrm.style.text import read

KIND = "restyle"
MOST = 3  # habits that change
MOVED = 0.5  # z units a chosen factor must move
HOLDS = 0.75  # z units any other factor may move
NEARER = 0.2  # z units, summed over the chosen factors
# Share of passages in which a rewrite shows, where it is large. It is offered in OFFERED / share of
# the proposals, or two in three drafts would be in small letters or trail off in dots.
OFFERED = 0.2
SHOWS = {
    "lowercase_starts+": 0.95,
    "exclamations+": 0.8,
    "ellipses+": 0.8,
    "conjunction_openings+": 0.6,
    "contractions+": 0.55,
    "hedges+": 0.55,
    "dashes+": 0.45,
    "paragraphs+": 0.45,
    "paragraphs-": 0.45,
    "semicolons+": 0.35,
    "semicolons-": 0.35,
}

Measured = dict[str, float | None]


def draft(shelf: Shelf, rng: random.Random, exemplars: int) -> Draft | Rejection:
    """One proposal: a passage, the same in other habits, and exemplars of both."""
    writer = draw_writer(shelf, rng)
    source = rng.choice(shelf.sources[writer])
    text = cut(source.text, rng.randint(*shelf.lengths.candidate), rng)
    others = draw_exemplars(shelf, rng, source, exemplars)
    if others is None:
        return Rejection(KIND, "too few sources by the writer")
    seed = rng.getrandbits(64)
    before, exemplars_before = measure([text]), measure(others)
    order = [one for one in REWRITES if rng.random() < OFFERED / SHOWS.get(one.name, OFFERED)]
    rng.shuffle(order)
    chosen = pick(order, rng.randint(1, MOST), text, others, seed)
    if not chosen:
        return Rejection(KIND, "no rewrite shows in the passage and in the exemplars")
    chosen = sorted(chosen, key=REWRITES.index)
    changed = _apply(chosen, text, seed)
    rewritten = tuple(_apply(chosen, other, seed) for other in others)
    if text.split() == changed.split():
        return Rejection(KIND, "only the layout changes")
    if set(others) & set(rewritten):
        return Rejection(KIND, "an exemplar stays as it was")
    after, exemplars_after = measure([changed]), measure(rewritten)
    if reason := fault(chosen, before, after, exemplars_before, exemplars_after):
        return Rejection(KIND, reason)
    names = [rewrite.factor for rewrite in chosen]
    return Draft(
        kind=KIND,
        domain=source.domain,
        author=source.author,
        exemplars_1=others,
        exemplars_2=rewritten,
        text_1=text,
        text_2=changed,
        from_1=source.label,
        from_2=f"{KIND}:{','.join(rewrite.name for rewrite in chosen)}:{source.author}",
        question=source.question,
        meta={
            "rewrites": [rewrite.name for rewrite in chosen],
            "before": _shown(before, names),
            "after": _shown(after, names),
            "exemplars_before": _shown(exemplars_before, names),
            "exemplars_after": _shown(exemplars_after, names),
        },
    )


def pick(
    order: Sequence[Rewrite], number: int, text: str, others: Sequence[str], seed: int
) -> list[Rewrite]:
    """The first `number` rewrites of `order` that show, each of another family.

    More, up to MOST, while an exemplar stays as it was. A rewrite that shows alone is asked again
    behind the others by `fault`.
    """
    chosen: list[Rewrite] = []
    left = set(others)  # no rewrite has changed these yet
    for rewrite in order:
        if len(chosen) >= (MOST if left else number):
            break
        touched = {name for one in chosen for name in (one.factor, *one.also)}
        if any(one.family == rewrite.family or one.factor in rewrite.also for one in chosen):
            continue
        if rewrite.factor in touched:
            continue
        changed = _apply([rewrite], text, seed)
        if changed == text:
            continue
        if moved(rewrite, _one(rewrite, [text]), _one(rewrite, [changed])) < MOVED:
            continue
        rewritten = [_apply([rewrite], other, seed) for other in others]
        still = left & set(rewritten)
        if len(chosen) >= number and still == left:
            continue
        if moved(rewrite, _one(rewrite, others), _one(rewrite, rewritten)) >= MOVED:
            chosen.append(rewrite)
            left = still
    return chosen


def _one(rewrite: Rewrite, texts: Sequence[str]) -> Measured:
    """The factor of one rewrite, measured; the other factors take most of the time."""
    return {rewrite.factor: BY_NAME[rewrite.factor].measure(read(texts))}


def _apply(rewrites: Sequence[Rewrite], text: str, seed: int) -> str:
    """The same draws for the same text, whatever was rewritten before it."""
    return apply_all(rewrites, text, random.Random(f"{seed}/{text}"))


def moved(rewrite: Rewrite, before: Measured, after: Measured) -> float:
    """How far a rewrite moved its factor in its direction, in z units; 0 where it cannot show."""
    old, new = before[rewrite.factor], after[rewrite.factor]
    if old is None or new is None:
        return 0.0
    return rewrite.direction * (_z(rewrite.factor, new) - _z(rewrite.factor, old))


def _z(name: str, value: float) -> float:
    return reference().z(name, value)


def fault(
    chosen: Sequence[Rewrite],
    before: Measured,
    after: Measured,
    exemplars_before: Measured,
    exemplars_after: Measured,
) -> str:
    """Why the measured texts do not make a draft; "" if they do."""
    for rewrite in chosen:
        if moved(rewrite, before, after) < MOVED:
            return "a chosen factor does not move in the passage"
        if moved(rewrite, exemplars_before, exemplars_after) < MOVED:
            return "a chosen factor does not move in the exemplars"
    declared = {name for rewrite in chosen for name in (rewrite.factor, *rewrite.also)}
    for name in before:
        old, new = before[name], after[name]
        if name in declared or old is None or new is None:
            continue
        if abs(_z(name, new) - _z(name, old)) > HOLDS:
            return "another factor moves"
    names = [rewrite.factor for rewrite in chosen]
    for own, mine, theirs in (
        (before, exemplars_before, exemplars_after),
        (after, exemplars_after, exemplars_before),
    ):
        if _far(names, own, theirs) - _far(names, own, mine) < NEARER:
            return "a candidate is no nearer to its own exemplars"
    return ""


def _far(names: Sequence[str], one: Measured, other: Measured) -> float:
    total = 0.0
    for name in names:
        a, b = one[name], other[name]
        if a is not None and b is not None:
            total += abs(_z(name, a) - _z(name, b))
    return total


def _shown(measured: Measured, names: Sequence[str]) -> dict[str, float | None]:
    return {name: None if (value := measured[name]) is None else round(value, 2) for name in names}
