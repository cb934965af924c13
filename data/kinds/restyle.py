"""Restyle: a person against the same person with one to three other habits.

Writer 2 is the person put through rewrites, always the same ones: "the Anne who never contracts and
writes in short sentences". Both candidates are the same passage, before and after. The exemplars of
both come from the same other texts. So only the changed habits can tell which is whose:

    text_1 = passage                         exemplars_1 = other texts
    text_2 = apply_all(rewrites, passage)    exemplars_2 = apply_all(rewrites, each other text)
    from_2 = "restyle:contractions-,sentence_length-:Anne"

A rewrite moves one factor of `nanopersrm/style/features.py` up (+) or down (-) and declares in
`also` what else it moves of necessity: cutting sentences changes how they open. Rewrites of one
family want the same places of a text, so a writer has at most one of a family.

Accepted is only what the factors confirm, in z units of `profile.reference()`.
1. Every chosen factor moves by at least MOVED in its direction, in the passage and between the
   pooled exemplars: the habit is there to be seen and the exemplars tell of it.
2. Every factor that no chosen rewrite declares moves by at most HOLDS in the passage.
3. On the chosen factors the passage is nearer to exemplars_1, the rewritten passage nearer to
   exemplars_2, by NEARER: where a person's habit wavers, the question would have no answer.
Worked number: no contractions in the passage (z -0.7), 4 per 100 words after (z 2.0): moved by 2.7;
exemplars 0.4 against 3.5: 2.1. |-0.7 - 0.4| < |-0.7 - 2.6|, so the passage is nearer to its writer.

What we left out. Whether a person would ever write so: a rewrite may give a novelist of 1860 small
letters at sentence starts. A factor that neither side can show counts as not moved.
"""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from data.corpus import Corpus, cut, draw_exemplars, draw_writer
from data.kinds import rewrite_sentences as sentences
from data.kinds import rewrite_words as words
from data.proposals import Proposal, Rejection
from nanopersrm.style.features import measure
from nanopersrm.style.profile import BY_NAME as FACTORS
from nanopersrm.style.profile import reference
from nanopersrm.style.text import read

KIND = "restyle"
MOST = 3  # habits that change
MOVED = 0.5  # z units a chosen factor must move
HOLDS = 0.75  # z units any other factor may move
NEARER = 0.2  # z units, summed over the chosen factors
# Share of passages in which a rewrite shows, where it is large. It is offered in OFFERED / share of
# the proposals, or two in three proposals would be in small letters or trail off in dots.
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
SHAPE = (
    "sentence_length sentence_spread short_sentences clauses opening_variety pronoun_openings "
    "conjunction_openings"
)


@dataclass(frozen=True)
class Rewrite:
    """One habit: which factor it moves, which way, and what else it moves of necessity."""

    name: str  # the factor, then + or -
    factor: str
    direction: int  # +1 or -1
    apply: Callable[[str, random.Random], str]
    family: str  # a writer has at most one rewrite of a family
    also: tuple[str, ...] = ()


def _both(
    factor: str,
    more: Callable[[str, random.Random], str],
    less: Callable[[str, random.Random], str],
    family: str = "",
    also: str = "",
) -> tuple[Rewrite, Rewrite]:
    family = family or factor
    names = tuple(name for name in also.split() if name != factor)
    return (
        Rewrite(f"{factor}+", factor, 1, more, family, names),
        Rewrite(f"{factor}-", factor, -1, less, family, names),
    )


# In the order of application: what adds or removes words first, what cuts sentences, capitals last.
REWRITES: tuple[Rewrite, ...] = (
    *_both("british", words.to_british, words.to_american),
    *_both(
        "word_length",
        words.use_long_words,
        words.use_short_words,
        also="long_words latinate adverbs hedges boosters variety negations duties passives "
        "conjunction_openings "
        "opening_variety british",
    ),
    *_both("digits", words.digits_for_numbers, words.words_for_digits, also="word_length capitals"),
    *_both("that", words.add_that, words.drop_that, also="variety clauses"),
    *_both(
        "hedges",
        words.add_hedges,
        words.drop_hedges,
        family="openings",
        also=f"first_person adverbs variety commas word_length long_words {SHAPE}",
    ),
    *_both(
        "boosters",
        words.add_boosters,
        words.drop_boosters,
        also=f"adverbs variety passives commas {SHAPE}",
    ),
    *_both(
        "contractions",
        words.contract,
        words.expand,
        also="be negations first_person we second_person third_person word_length passives "
        "pronoun_openings that sentence_length variety duties opening_variety short_sentences "
        "informal clauses",
    ),
    *_both(
        "conjunction_openings",
        sentences.add_openings_with_and,
        sentences.drop_openings_with_and,
        family="openings",
        also="and but pronoun_openings opening_variety commas variety sentence_length adverbs "
        "short_sentences",
    ),
    *_both(
        "sentence_length",
        sentences.join_sentences,
        sentences.split_sentences,
        family="sentences",
        also=f"{SHAPE} semicolons commas colons dashes and but which variety first_person we "
        "third_person lowercase_starts",
    ),
    *_both(
        "semicolons",
        sentences.add_semicolons,
        sentences.drop_semicolons,
        family="sentences",
        also=f"{SHAPE} commas dashes",
    ),
    *_both(
        "dashes",
        sentences.add_dashes,
        sentences.drop_dashes,
        family="sentences",
        also="commas semicolons ellipses",
    ),
    *_both(
        "brackets",
        sentences.add_brackets,
        sentences.drop_brackets,
        family="sentences",
        also="commas dashes",
    ),
    *_both(
        "exclamations",
        sentences.add_exclamations,
        sentences.drop_exclamations,
        family="ends",
        also=f"commas lowercase_starts {SHAPE}",
    ),
    *_both(
        "ellipses",
        sentences.add_ellipses,
        sentences.drop_ellipses,
        family="ends",
        also=f"commas lowercase_starts {SHAPE}",
    ),
    *_both("paragraphs", sentences.split_paragraphs, sentences.join_paragraphs),
    *_both(
        "lowercase_starts",
        sentences.lower_starts,
        sentences.capitalize_starts,
        family="case",
    ),
)
BY_NAME: dict[str, Rewrite] = {rewrite.name: rewrite for rewrite in REWRITES}


def propose(corpus: Corpus, rng: random.Random, exemplars: int) -> Proposal | Rejection:
    """A passage, the same in other habits, and exemplars of both."""
    source = rng.choice(corpus.sources[draw_writer(corpus, rng)])
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
    return Proposal(
        kind=KIND,
        domain=source.domain,
        author=source.author,
        exemplars_1=others,
        exemplars_2=rewritten,
        text_1=text,
        text_2=changed,
        from_1=source.label,
        from_2=f"{KIND}:{','.join(rewrite.name for rewrite in picked)}:{source.author}",
        question=source.question,
        meta={
            "rewrites": [rewrite.name for rewrite in picked],
            "before": _rounded(before, names),
            "after": _rounded(after, names),
            "exemplars_before": _rounded(exemplars_before, names),
            "exemplars_after": _rounded(exemplars_after, names),
        },
    )


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
        if changed == text:
            continue
        if _moved_alone(rewrite, [text], [changed]) < MOVED:
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
    old, new = before[rewrite.factor], after[rewrite.factor]
    if old is None or new is None:
        return 0.0
    return rewrite.direction * (_z(rewrite.factor, new) - _z(rewrite.factor, old))


def _z(name: str, value: float) -> float:
    return reference().z(name, value)


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
    for name in before:
        old, new = before[name], after[name]
        if name in declared or old is None or new is None:
            continue
        if abs(_z(name, new) - _z(name, old)) > HOLDS:
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
    values = [(name, first[name], second[name]) for name in names]
    gaps = [abs(_z(n, a) - _z(n, b)) for n, a, b in values if a is not None and b is not None]
    return sum(gaps, 0.0)


def _rounded(measured: Measured, names: Sequence[str]) -> dict[str, float | None]:
    return {name: None if (value := measured[name]) is None else round(value, 2) for name in names}
