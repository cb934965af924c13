"""Facts: what the measurements say of a candidate against a writer, and which digit that is worth.

Per factor, with z the deviation from many writers and r its reliability (`profile.py`), we compare
two guesses for the z of the candidate: by the same writer it is near r·z(writer), by a stranger
anywhere. The log of the ratio of the two normal densities is the *evidence* of the factor,

    evidence = -½ log(1 - r²) - ½ (z(candidate) - r z(writer))² / (1 - r²) + ½ z(candidate)²

above 0 for the writer, below 0 for somebody else. Worked numbers, r = 0.25: writer z 2, candidate
z 2 gives +0.83; candidate z -1 gives -0.67; both average gives +0.03, next to nothing.

The *fit* of a candidate is the mean of three numbers, each centred between writers and strangers:
the sum of the evidence, the percentile of the n-grams, the percentile of the factor distance. On
300 human pairs by unseen authors it was higher for the chosen text in about 73 %.

    chosen      fit up to -0.4: 5     to 0: 6     to 0.3: 7     to 0.6: 8     above: 9
    rejected    the mirror image:  1 below -0.6, 2, 3, 4, and 5 from 0.4 on (4 if chosen got a 5)

The verdict is the label's, the margin is the evidence's: where the counts say nothing or speak for
the wrong text, the digits lie close together.
"""

import math
import random
import re
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from functools import lru_cache

from nanopersrm.judge.claims import percentiles
from nanopersrm.judge.verdict import LABELS
from nanopersrm.pairs import Pair
from nanopersrm.style.profile import ALIKE, Trait, profile, reference

FORMS = ("pointwise", "pairwise")
ROLES = ("chosen", "rejected")
CUTS = (-0.4, 0.0, 0.3, 0.6)  # of the fit
STEPS = (0.0, 0.2, 0.4, 0.6, 0.8, 1.0, 1.2)  # of the difference of two fits: margins 1 to 8
EVIDENCE_SCALE = 2.0  # sums of evidence differ by about 1 to 2 between human writers
CENTRES = {"evidence": 0.8, "n-grams": 54.0, "factors": 62.0}  # between writers and strangers
FIGURE = re.compile(r"(?:, about .*| \([^()]*\))$")


@dataclass(frozen=True)
class Fact:
    """One habit: how the writer has it, how each candidate has it, and what that says."""

    factor: str
    writer: Trait
    texts: dict[str, Trait]  # label -> the same habit in a candidate
    evidence: dict[str, float]  # label -> for the writer (above 0) or against

    @property
    def weight(self) -> float:
        """How much there is to say: of one candidate, or of the difference of two."""
        values = list(self.evidence.values())
        return abs(values[0]) if len(values) == 1 else max(values) - min(values)


def shown(pair: Pair, form: str, first: str) -> dict[str, str]:
    """Label -> text, as the prompt shows them; `first` says which role A has."""
    assert form in FORMS, form
    assert first in ROLES, first
    order = [first] if form == "pointwise" else [first, *(r for r in ROLES if r != first)]
    return {label: getattr(pair, role) for label, role in zip(LABELS, order, strict=False)}


def asked(pair: Pair, form: str, seed: int) -> Iterator[tuple[str, str, random.Random]]:
    """(form, role of A, generator) of each reply about a pair; `form` may be "both"."""
    for one in FORMS if form == "both" else (form,):
        rng = random.Random(f"{seed}/{pair.id}/{one}")
        for role in ROLES if one == "pointwise" else (rng.choice(ROLES),):
            yield one, role, random.Random(f"{seed}/{pair.id}/{one}/{role}")


def roles_of(texts: dict[str, str], first: str) -> dict[str, str]:
    """Label -> role, for texts as `shown` gives them."""
    order = [first, *(role for role in ROLES if role != first)]
    return dict(zip(texts, order, strict=False))


@lru_cache(maxsize=512)
def traits(texts: tuple[str, ...]) -> dict[str, Trait]:
    """What can be said of every factor of some texts."""
    return {trait.factor: trait for trait in profile(texts)}


def words(trait: Trait, figure: bool) -> str:
    """The level in words, with its number or without."""
    return trait.phrase if figure else FIGURE.sub("", trait.phrase)


def evidence_of(reliability: float, writer: float, text: float) -> float:
    """Log of how much likelier the z of a text is by the same writer than by a stranger."""
    rest = 1.0 - reliability**2
    return -0.5 * math.log(rest) - 0.5 * (text - reliability * writer) ** 2 / rest + 0.5 * text**2


def facts(
    exemplars: tuple[str, ...], candidates: dict[str, str], only: Collection[str] | None = None
) -> list[Fact]:
    """All factors that the writer and every candidate can be judged on, those that say most first.

    Of habits that move together only the first is kept. `only`: of these factors alone.
    """
    against = reference().factors
    own, others = traits(exemplars), {k: traits((text,)) for k, text in candidates.items()}
    found = []
    for name, trait in own.items():
        wanted = only is None or name in only
        if wanted and all(name in other for other in others.values()):
            texts = {label: other[name] for label, other in others.items()}
            evidence = {
                label: evidence_of(against[name].reliability, trait.z, text.z)
                for label, text in texts.items()
            }
            found.append(Fact(name, trait, texts, evidence))
    found.sort(key=lambda fact: -fact.weight)
    kept, taken = [], set[str]()
    for fact in found:
        if fact.factor not in taken:
            kept.append(fact)
            taken |= {name for alike in ALIKE if fact.factor in alike for name in alike}
    return kept


@lru_cache(maxsize=512)
def fit(exemplars: tuple[str, ...], candidate: str) -> float:
    """How well a candidate fits by all that is measured, -1 to 1; 0 says nothing."""
    against, own, other = reference().factors, traits(exemplars), traits((candidate,))
    total = math.fsum(
        evidence_of(against[name].reliability, own[name].z, other[name].z)
        for name in own
        if name in other
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


def digits_together(chosen_fit: float, rejected_fit: float) -> tuple[int, int]:
    """The same where both stand in one prompt: the margin follows the difference of the fits.

    >>> digits_together(0.7, -0.7), digits_together(0.6, 0.5), digits_together(-0.7, 0.7)
    ((9, 1), (7, 5), (5, 4))
    """
    margin = 1 + sum(chosen_fit - rejected_fit > step for step in STEPS)
    middle = 5.0 + (chosen_fit + rejected_fit)
    chosen = min(9, max(1 + margin, math.ceil(middle + margin / 2)))
    return chosen, chosen - margin
