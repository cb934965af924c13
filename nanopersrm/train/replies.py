"""Replies to imitate: honest reasoning about a candidate, with its verdict, in the judge's grammar.

    <think>
    The writer has many semicolons, for instance "ran freely; the pump", and A has no semicolons.
    The writer has few long words, and A has many long words. On balance A is not by this writer.
    </think>
    <scores>A=2</scores>

Per factor, with z the deviation from many writers and r its reliability, two guesses for the z of
the candidate are compared: by the same writer it is near r·z(writer), by a stranger anywhere. The
log of the ratio of the two normal densities is the *evidence* of the factor,

    evidence = -½ log(1 - r²) - ½ (z(candidate) - r z(writer))² / (1 - r²) + ½ z(candidate)²

above 0 for the writer, below 0 for somebody else. Worked numbers, r = 0.25: writer z 2, candidate
z 2 gives +0.83; candidate z -1 gives -0.67; both average gives +0.03, next to nothing.

The *fit* of a candidate is the mean of three numbers, each centred between writers and strangers:
the sum of the evidence, the percentile of the n-grams, the percentile of the factor distance.

    chosen      fit up to -0.4: 5     to 0: 6     to 0.3: 7     to 0.6: 8     above: 9
    rejected    the mirror image:  1 below -0.6, 2, 3, 4, and 5 from 0.4 on (4 if chosen got a 5)

The verdict is the pair's, the margin is the evidence's, and a reply whose counts do not carry its
verdict says so. Two to four habits are drawn out of those that the measured block of the prompt
shows, the heavy ones and those that bear out the verdict more often; the strongest fact against the
verdict is always told when it outweighs all that speak for it. All that is said is measured.
"""

import math
import random
import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from functools import lru_cache

from nanopersrm import InputError
from nanopersrm.judge import verdict
from nanopersrm.judge.claims import contains, percentiles
from nanopersrm.judge.verdict import LABELS
from nanopersrm.pairs import Pair
from nanopersrm.style.features import COUNTED
from nanopersrm.style.profile import ALIKE, BY_NAME, Trait, profile, reference, salient
from nanopersrm.style.text import FOLD, read

ROLES = ("chosen", "rejected")
CUTS = (-0.4, 0.0, 0.3, 0.6)  # of the fit
EVIDENCE_SCALE = 2.0  # sums of evidence differ by about 1 to 2 between human writers
CENTRES = {"evidence": 0.8, "n-grams": 54.0, "factors": 62.0}  # between writers and strangers
POOL = 14  # habits among which the ones to tell are drawn
QUOTED = 0.6  # share of habits told with a quote, where one is found
QUOTE_WORDS = 6
PERCENTS = 0.5  # share of replies that tell the percentiles
THIN = 0.0  # a fit below which the counts do not carry the verdict
FIGURE = re.compile(r"(?:, about .*| \([^()]*\))$")
FORBIDDEN = re.compile(r'["<>]')  # a quote with these could not be closed
# Habits that six words of the middle of a line do not show.
UNSHOWN = frozenset({"quotes", "paragraphs", "list_lines", "conjunction_openings"})
UNSHOWN |= {"pronoun_openings", "lowercase_starts", "short_sentences"}
VERDICTS = {  # of a digit and those below it, down to the next
    1: "A is surely not by this writer",
    2: "A is not by this writer",
    4: "A is rather not by this writer",
    5: "A can be by this writer or not",
    6: "A is rather by this writer",
    7: "A fits the writer",
    9: "A fits the writer very well",
}


# Facts


@dataclass(frozen=True)
class Fact:
    """One habit: how the writer and the candidate have it, and what that says for the writer."""

    factor: str
    writer: Trait
    text: Trait
    evidence: float


@lru_cache(maxsize=512)
def traits(texts: tuple[str, ...]) -> dict[str, Trait]:
    """What can be said of every factor of some texts."""
    return {trait.factor: trait for trait in profile(texts)}


def level_of(trait: Trait) -> str:
    """The level in words, without its number."""
    return FIGURE.sub("", trait.phrase)


def evidence_of(reliability: float, writer: float, text: float) -> float:
    """Log of how much likelier the z of a text is by the same writer than by a stranger."""
    rest = 1.0 - reliability**2
    return -0.5 * math.log(rest) - 0.5 * (text - reliability * writer) ** 2 / rest + 0.5 * text**2


def facts(
    exemplars: tuple[str, ...], candidate: str, only: Collection[str] | None = None
) -> list[Fact]:
    """All factors that writer and candidate can be judged on, those that say most first.

    Of habits that move together only the first is kept. `only`: of these factors alone.
    """
    against = reference().factors
    of_writer, of_text = traits(exemplars), traits((candidate,))
    measured = [
        Fact(
            name,
            trait,
            of_text[name],
            evidence_of(against[name].reliability, trait.z, of_text[name].z),
        )
        for name, trait in of_writer.items()
        if (only is None or name in only) and name in of_text
    ]
    measured.sort(key=lambda fact: -abs(fact.evidence))
    kept, taken = [], set[str]()
    for fact in measured:
        if fact.factor not in taken:
            kept.append(fact)
            taken |= {name for alike in ALIKE if fact.factor in alike for name in alike}
    return kept


@lru_cache(maxsize=512)
def fit(exemplars: tuple[str, ...], candidate: str) -> float:
    """How well a candidate fits by all that is measured, -1 to 1; 0 says nothing."""
    against, of_writer, of_text = reference().factors, traits(exemplars), traits((candidate,))
    total = math.fsum(
        evidence_of(against[name].reliability, of_writer[name].z, of_text[name].z)
        for name in of_writer
        if name in of_text
    )
    near = percentiles(exemplars, candidate)
    parts = [
        (total - CENTRES["evidence"]) / EVIDENCE_SCALE,
        *((near[kind] - CENTRES[kind]) / 50.0 for kind in ("n-grams", "factors")),
    ]
    return math.fsum(max(-1.0, min(1.0, part)) for part in parts) / len(parts)


def digits(chosen_fit: float, rejected_fit: float) -> tuple[int, int]:
    """The digits of chosen and rejected: always in that order, as far apart as the fits say.

    >>> digits(0.7, -0.7), digits(0.1, 0.0), digits(-0.7, 0.7)
    ((9, 1), (7, 4), (5, 4))
    """
    chosen = 5 + sum(chosen_fit > cut for cut in CUTS)
    rejected = 5 - sum(-rejected_fit > cut for cut in CUTS)
    return chosen, min(rejected, chosen - 1)


# The reply


def reply(pair: Pair, role: str, rng: random.Random, evidence: bool = True) -> str:
    """A reply about the chosen or the rejected text of a pair; evidence: for prompts that carry the
    measured block."""
    candidate = str(getattr(pair, role))
    sign = 1 if role == "chosen" else -1
    fits = [fit(pair.exemplars, text) for text in (pair.chosen, pair.rejected)]
    score = digits(*fits)[ROLES.index(role)]
    block = {trait.factor for trait in salient(pair.exemplars)} if evidence else None
    measured = facts(pair.exemplars, candidate, block) or facts(pair.exemplars, candidate)
    if not measured:
        raise InputError(f"pair {pair.id!r}: expected texts with words, nothing can be measured")
    sentences = []
    for fact in _draw_facts(measured, sign, rng):
        writer = _told(fact.writer, pair.exemplars, rng)
        sentences.append(
            f"The writer has {writer}, and A has {_told(fact.text, [candidate], rng)}."
        )
    if evidence and rng.random() < PERCENTS:
        near = percentiles(pair.exemplars, candidate)
        sentences.append(
            f"A is closer than {near['n-grams']:.0f}% of strangers by n-grams and "
            f"{near['factors']:.0f}% by factors."
        )
    thin = sign * fits[ROLES.index(role)] < THIN
    opening = "The counts do not settle this; " if thin else "On balance "
    band = max(digit for digit in VERDICTS if digit <= score)
    sentences.append(f"{opening}{VERDICTS[band]}.")
    return verdict.write(" ".join(sentences), {LABELS[0]: score})


def _told(trait: Trait, texts: Sequence[str], rng: random.Random) -> str:
    """A level in words, perhaps with a quote that shows it."""
    level = level_of(trait)
    few = level.split()[0] in ("no", "few", "medium")
    if BY_NAME[trait.factor].words != COUNTED or few or rng.random() > QUOTED:
        return level
    quote = quote_of(trait.factor, texts, rng)
    return level if quote is None else f'{level}, for instance "{quote}"'


def quote_of(name: str, texts: Sequence[str], rng: random.Random) -> str | None:
    """A few words of one line in which the factor itself counts something, as they stand there."""
    places = [
        (text, line.start() + words[i].start(), line.start() + words[i + QUOTE_WORDS - 1].end())
        for text in texts
        for line in re.finditer(r".+", text)
        for words in [list(re.finditer(r"\S+", line[0]))]
        for i in range(0, len(words) - QUOTE_WORDS + 1, QUOTE_WORDS // 2)
    ]
    rng.shuffle(places)
    for text, start, end in places if name not in UNSHOWN else ():
        quote = text[start:end].strip(",:;-–—() ")
        shows = bool(BY_NAME[name].measure(read([quote])))
        if shows and contains(text, quote) and not FORBIDDEN.search(quote.translate(FOLD)):
            return quote
    return None


def _draw_facts(measured: list[Fact], sign: int, rng: random.Random) -> list[Fact]:
    """The habits to tell, in their order. sign: 1 for a chosen text, else -1."""
    count = rng.choice((2, 3, 3, 3, 4, 4))
    interest = {
        fact.factor: (abs(fact.evidence) + 0.5 * fact.writer.salience)
        * rng.uniform(0.5, 1.5)
        * (1.5 if sign * fact.evidence > 0 else 1.0)
        for fact in measured[:POOL]
    }
    drawn = sorted(measured[:POOL], key=lambda fact: -interest[fact.factor])[:count]
    against = min(measured, key=lambda fact: sign * fact.evidence)
    most = max(sign * fact.evidence for fact in drawn)
    if -sign * against.evidence > most and against not in drawn:
        drawn[-1] = against  # what speaks loudest against the verdict is told
    rng.shuffle(drawn)
    return drawn
