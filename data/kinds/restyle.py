"""Restyle: a person against the same person with one to three other habits.

Writer 2 is the person put through rewrites, always the same ones: "the Anne who never contracts and
writes in short sentences". Both candidates are the same passage, before and after. The exemplars of
both come from the same other texts. So only the changed habits can tell which is whose:

    text_1 = passage                         exemplars_1 = other texts
    text_2 = apply_all(rewrites, passage)    exemplars_2 = apply_all(rewrites, each other text)
    from_2 = "restyle:contractions-,sentence_length-:Anne"

A rewrite moves one factor of `nanopersrm/style/features.py` up (+) or down (-). `also` names what
else it moves of necessity: cutting sentences changes how they open. Rewrites of one family want the
same places of a text. Accepted is only what the factors confirm, in z units of `reference()`.
1. Every chosen factor moves by at least MOVED in its direction, in the passage and between the
   pooled exemplars: the habit is there to be seen and the exemplars tell of it.
2. Every factor that no chosen rewrite declares moves by at most HOLDS in the passage.
3. On the chosen factors the passage is nearer to exemplars_1, the rewritten passage nearer to
   exemplars_2, by NEARER: where a person's habit wavers, the question would have no answer.
"""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from data.corpus import Corpus, cut, draw_exemplars
from data.kinds import rewrite_sentences as sentences
from data.kinds import rewrite_words as words
from data.proposals import Proposal, Rejection, from_source
from nanopersrm.style.features import measure
from nanopersrm.style.profile import BY_NAME as FACTORS
from nanopersrm.style.profile import reference
from nanopersrm.style.text import read

KIND = "restyle"
MOST = 3  # habits that change
MOVED = 0.5  # z units a chosen factor must move
HOLDS = 0.75  # z units any other factor may move
NEARER = 0.2  # z units, summed over the chosen factors
# A rewrite that shows in a large share of passages is offered in OFFERED / share of the proposals,
# or two in three would be in small letters or trail off in dots.
OFFERED = 0.2
HABITS = words.LISTS["habits"]
SHOWS: dict[str, float] = HABITS["share of passages"]

Measured = dict[str, float | None]
Apply = Callable[[str, random.Random], str]


@dataclass(frozen=True)
class Rewrite:
    """One habit: which factor it moves, which way, and what else it moves of necessity."""

    name: str  # the factor, then + or -
    factor: str
    direction: int  # +1 or -1
    apply: Apply
    family: str  # a writer has at most one rewrite of a family
    also: tuple[str, ...] = ()


def _both(factor: str, more: Apply, less: Apply) -> tuple[Rewrite, Rewrite]:
    family = HABITS["family"].get(factor, factor)
    also = tuple(HABITS["also moved"].get(factor, "").split())
    return (
        Rewrite(f"{factor}+", factor, 1, more, family, also),
        Rewrite(f"{factor}-", factor, -1, less, family, also),
    )


# In the order of application: what adds or removes words first, what cuts sentences, capitals last.
REWRITES: tuple[Rewrite, ...] = (
    *_both("british", words.to_british, words.to_american),
    *_both("word_length", words.use_long_words, words.use_short_words),
    *_both("digits", words.digits_for_numbers, words.words_for_digits),
    *_both("that", words.add_that, words.drop_that),
    *_both("hedges", words.add_hedges, words.drop_hedges),
    *_both("boosters", words.add_boosters, words.drop_boosters),
    *_both("contractions", words.contract, words.expand),
    *_both("conjunction_openings", sentences.open_with_and, sentences.open_without_and),
    *_both("sentence_length", sentences.join_sentences, sentences.split_sentences),
    *_both("semicolons", sentences.add_semicolons, sentences.drop_semicolons),
    *_both("dashes", sentences.add_dashes, sentences.drop_dashes),
    *_both("brackets", sentences.add_brackets, sentences.drop_brackets),
    *_both("exclamations", sentences.add_exclamations, sentences.drop_exclamations),
    *_both("ellipses", sentences.add_ellipses, sentences.drop_ellipses),
    *_both("paragraphs", sentences.split_paragraphs, sentences.join_paragraphs),
    *_both("lowercase_starts", sentences.lower_starts, sentences.capitalize_starts),
)
BY_NAME: dict[str, Rewrite] = {rewrite.name: rewrite for rewrite in REWRITES}


def propose(corpus: Corpus, rng: random.Random, exemplars: int) -> Proposal | Rejection:
    """A passage, the same in other habits, and exemplars of both."""
    source = rng.choice(corpus.sources[rng.choice(corpus.writers)])
    text = cut(source.text, rng.randint(*corpus.lengths.candidate), rng)
    others = draw_exemplars(corpus, rng, source, exemplars)
    if others is None:
        return Rejection("too few sources by the writer")
    seed = rng.getrandbits(64)
    before, exemplars_before = measure([text]), measure(others)
    order = [r for r in REWRITES if rng.random() < OFFERED / SHOWS.get(r.name, OFFERED)]
    rng.shuffle(order)
    picked = pick(order, rng.randint(1, MOST), text, others, seed)
    if not picked:
        return Rejection("no rewrite shows in the passage and in the exemplars")
    picked = sorted(picked, key=REWRITES.index)
    changed = apply_all(picked, text, seed)
    rewritten = tuple(apply_all(picked, other, seed) for other in others)
    if text.split() == changed.split():
        return Rejection("only the layout changes")
    if set(others) & set(rewritten):
        return Rejection("an exemplar stays as it was")
    after, exemplars_after = measure([changed]), measure(rewritten)
    if reason := fault(picked, before, after, exemplars_before, exemplars_after):
        return Rejection(reason)
    names = [rewrite.factor for rewrite in picked]
    by = f"{KIND}:{','.join(rewrite.name for rewrite in picked)}:{source.author}"
    meta = {
        "rewrites": [rewrite.name for rewrite in picked],
        "before": _rounded(before, names),
        "after": _rounded(after, names),
        "exemplars_before": _rounded(exemplars_before, names),
        "exemplars_after": _rounded(exemplars_after, names),
    }
    return from_source(KIND, source, (others, rewritten), (text, changed), by, meta)


def pick(
    order: Sequence[Rewrite], number: int, text: str, others: Sequence[str], seed: int
) -> list[Rewrite]:
    """The first `number` rewrites of `order` that show, each of another family.

    More, up to MOST, while an exemplar stays as it was. `fault` measures again, with all of them.
    """
    picked: list[Rewrite] = []
    left = set(others)  # no rewrite has changed these yet
    for rewrite in order:
        if len(picked) >= (MOST if left else number):
            break
        if any(
            other.family == rewrite.family
            or other.factor in rewrite.also
            or rewrite.factor in (other.factor, *other.also)
            for other in picked
        ):
            continue
        changed = apply_all([rewrite], text, seed)
        if changed == text or _moved_alone(rewrite, [text], [changed]) < MOVED:
            continue
        rewritten = [apply_all([rewrite], other, seed) for other in others]
        still = left & set(rewritten)
        if len(picked) >= number and still == left:
            continue
        if _moved_alone(rewrite, others, rewritten) >= MOVED:
            picked.append(rewrite)
            left = still
    return picked


def _moved_alone(rewrite: Rewrite, before: Sequence[str], after: Sequence[str]) -> float:
    """`moved`, without measuring the other factors, which take most of the time."""
    old, new = (FACTORS[rewrite.factor].measure(read(texts)) for texts in (before, after))
    return moved(rewrite, {rewrite.factor: old}, {rewrite.factor: new})


def apply_all(rewrites: Sequence[Rewrite], text: str, seed: int) -> str:
    """All rewrites in the order of the table; the same draws for the same text."""
    rng = random.Random(f"{seed}/{text}")
    for rewrite in sorted(rewrites, key=REWRITES.index):
        text = rewrite.apply(text, rng)
    return text


def moved(rewrite: Rewrite, before: Measured, after: Measured) -> float:
    """How far a rewrite moved its factor in its direction, in z units; 0 where it cannot show."""
    return rewrite.direction * (_moved(rewrite.factor, before, after) or 0.0)


def _moved(name: str, before: Measured, after: Measured) -> float | None:
    old, new = before[name], after[name]
    if old is None or new is None:
        return None
    return reference().z(name, new) - reference().z(name, old)


def fault(
    picked: Sequence[Rewrite],
    before: Measured,
    after: Measured,
    exemplars_before: Measured,
    exemplars_after: Measured,
) -> str:
    """Why the measured texts do not make a proposal; "" if they do."""
    for rewrite in picked:
        if moved(rewrite, before, after) < MOVED:
            return "a chosen factor does not move in the passage"
        if moved(rewrite, exemplars_before, exemplars_after) < MOVED:
            return "a chosen factor does not move in the exemplars"
    declared = {name for rewrite in picked for name in (rewrite.factor, *rewrite.also)}
    if any(abs(_moved(name, before, after) or 0.0) > HOLDS for name in before.keys() - declared):
        return "another factor moves"
    names = [rewrite.factor for rewrite in picked]
    for candidate, same_writer, other_writer in (
        (before, exemplars_before, exemplars_after),
        (after, exemplars_after, exemplars_before),
    ):
        to_same = _distance(names, candidate, same_writer)
        if _distance(names, candidate, other_writer) - to_same < NEARER:
            return "a candidate is no nearer to its own exemplars"
    return ""


def _distance(names: Sequence[str], first: Measured, second: Measured) -> float:
    """The sum of |z difference| over the named factors that both can show."""
    return sum((abs(_moved(name, second, first) or 0.0) for name in names), 0.0)


def _rounded(measured: Measured, names: Sequence[str]) -> dict[str, float | None]:
    return {name: None if (value := measured[name]) is None else round(value, 2) for name in names}
