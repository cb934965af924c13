"""Replies to imitate: honest reasoning about a candidate, with its verdict, in the judge's grammar.

    <think>
    The writer has no contractions and many semicolons, as in "ran freely; the pump". A keeps to
    that: many semicolons ("it stopped; I"). But the text has few long words. On balance, A fits.
    </think>
    <scores>A=8</scores>

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
verdict says so. Some three habits are drawn out of those that the measured block of the prompt
shows, the heavy ones and those that bear out the verdict more often; the strongest fact against the
verdict is always told when it outweighs all that speak for it. The words are drawn from
reply_phrases.json, quotes come from `reply_quotes.py`; all that is said is measured.
"""

import json
import math
import random
import re
from collections.abc import Collection
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

from nanopersrm import InputError
from nanopersrm.judge import verdict
from nanopersrm.judge.claims import WRITER, percentiles
from nanopersrm.judge.verdict import LABELS
from nanopersrm.pairs import Pair
from nanopersrm.style.features import COUNTED, SHAPE
from nanopersrm.style.profile import ALIKE, BY_NAME, Trait, profile, reference, salient
from nanopersrm.train.reply_quotes import show

PHRASES: dict[str, Any] = json.loads(
    Path(__file__).with_name("reply_phrases.json").read_text(encoding="utf-8")
)
ROLES = ("chosen", "rejected")
CUTS = (-0.4, 0.0, 0.3, 0.6)  # of the fit
EVIDENCE_SCALE = 2.0  # sums of evidence differ by about 1 to 2 between human writers
CENTRES = {"evidence": 0.8, "n-grams": 54.0, "factors": 62.0}  # between writers and strangers
TOKENS = (75, 160)  # by `size`; the tokens of a real vocabulary are within about a tenth
TRIES = 12
POOL = 14  # habits among which the ones to tell are drawn
QUOTES = 4  # at most
FIGURES = 0.3  # share of levels told with their number
BARE_SHARE = 0.7  # of "A has none" where it may stand for "A has no semicolons"
DIFFERS = 0.8  # deviations between writer and candidate from which another level is a break
# Fits below which the counts do not carry the verdict, or are against it.
THIN, OUTRIGHT = 0.0, -0.3
FIGURE = re.compile(r"(?:, about .*| \([^()]*\))$")
PART = re.compile(r"\w+|[^\w\s]")


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


def level_of(trait: Trait, figure: bool = False) -> str:
    """The level in words, with its number or without."""
    return trait.phrase if figure else FIGURE.sub("", trait.phrase)


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
    """A reply about the chosen or the rejected text of a pair; evidence: with numbers, for prompts
    that carry the measured block."""
    candidate = str(getattr(pair, role))
    sign = 1 if role == "chosen" else -1
    fits = [fit(pair.exemplars, text) for text in (pair.chosen, pair.rejected)]
    score = digits(*fits)[ROLES.index(role)]
    block = {trait.factor for trait in salient(pair.exemplars)} if evidence else None
    measured = facts(pair.exemplars, candidate, block) or facts(pair.exemplars, candidate)
    if not measured:
        raise InputError(f"pair {pair.id!r}: expected texts with words, nothing can be measured")
    best: tuple[int, str] | None = None
    for _ in range(TRIES):
        writing = Writing(rng, pair.exemplars, candidate, evidence)
        drawn = _draw_facts(measured, sign, rng)
        sentences = [*_body(writing, drawn), _conclusion(writing, sign, score)]
        text = verdict.write(writing.finish(sentences), {LABELS[0]: score})
        off = max(TOKENS[0] - size(text), size(text) - TOKENS[1], 0)
        if best is None or off < best[0]:
            best = off, text
        if off == 0:
            break
    assert best is not None
    return best[1]


def size(text: str) -> int:
    """Words and marks, long words as two, emoji as four: about the tokens of a reply."""
    return sum(
        1 + (len(part) > 8) + 3 * (not part.isascii() and not part.isalpha())
        for part in PART.findall(text)
    )


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


# Sentences


@dataclass
class Writing:
    """The sentences of one reply in the making. Quotes are put in last, as they stand in their
    text, so that no tidying of commas can touch them."""

    rng: random.Random
    exemplars: tuple[str, ...]
    candidate: str
    evidence: bool
    quotes: list[str] = field(default_factory=list)

    def draw(self, phrases: str) -> str:
        """One of the phrases of this name."""
        return str(self.rng.choice(PHRASES[phrases]))

    def habit(self, fact: Fact, subject: str, last: bool = True, bare: bool = False) -> str:
        """A level in words, perhaps with its number and a quote; quotes are put in at the end."""
        trait = fact.writer if subject == WRITER else fact.text
        level = level_of(trait).split()[0]
        if bare and BY_NAME[fact.factor].words == COUNTED and self.rng.random() < BARE_SHARE:
            return "none" if level == "no" else level
        phrase = level_of(trait, self.evidence and self.rng.random() < FIGURES)
        quote = self.quote(fact.factor, subject, level)
        if quote is None:
            return phrase
        tails = PHRASES["quoted_last" if last else "quoted"]
        if phrase.endswith(")"):
            tails = [tail for tail in tails if "(" not in tail]
        return phrase + str(self.rng.choice(tails)).replace("{q}", _mark(quote))

    def quote(self, name: str, subject: str, level: str) -> int | None:
        """The number of a new quote that shows the level, or None."""
        levels = BY_NAME[name].words
        wanted = 0.75 if len(self.quotes) < 2 else 0.4
        if len(self.quotes) >= QUOTES or self.rng.random() > wanted or level in ("few", "medium"):
            return None
        if level == levels[-2] and levels != COUNTED:
            return None
        texts = list(self.exemplars) if subject == WRITER else [self.candidate]
        self.rng.shuffle(texts)
        for text in texts[:2]:
            quote = show(name, text, self.rng, level not in (levels[0], "short"))
            if quote is not None and quote not in self.quotes:
                self.quotes.append(quote)
                return len(self.quotes) - 1
        return None

    def finish(self, sentences: list[str]) -> str:
        """Sentences, joined and with capitals, commas tidied, and the quotes put in."""
        text = ""
        for sentence in sentences:
            sentence = re.sub(r",\s*([,;.)]|$)", r"\1", sentence.strip())
            joint = self.draw("joints")
            begins = not text or text.endswith(". ")
            text += (_capital if begins else _small)(sentence) + joint
        text = text.rstrip("; .") + "."
        for number, quote in enumerate(self.quotes):
            text = text.replace(_mark(number), quote)
        return text


def _mark(number: int) -> str:
    return f"\x00{number}\x00"


def _capital(sentence: str) -> str:
    return sentence[:1].upper() + sentence[1:]


def _small(sentence: str) -> str:
    """The first letter small, unless it is a label."""
    return sentence if not sentence[1:2].isalpha() else sentence[:1].lower() + sentence[1:]


def _listed(items: list[str], rng: random.Random) -> str:
    if len(items) == 1:
        return items[0]
    joint = rng.choice((" and ", " and ", ", and ", ", then ", " plus "))
    return ", ".join(items[:-1]) + joint + items[-1]


def _relation(fact: Fact) -> str:
    """Whether the candidate keeps a habit, comes near it or breaks it."""
    if level_of(fact.writer).split()[0] == level_of(fact.text).split()[0]:
        return "keeps"
    return "breaks" if abs(fact.writer.z - fact.text.z) >= DIFFERS else "near"


def _body(writing: Writing, drawn: list[Fact]) -> list[str]:
    """The writer's habits and the candidate against them, in one of several layouts."""
    rng = writing.rng
    listed = drawn if rng.random() < 0.45 else drawn[: rng.choice((0, 0, 1, 1, 2))]
    rest = drawn[len(listed) :]
    sentences = []
    if listed:
        cut = len(listed) if len(listed) < 3 or rng.random() < 0.5 else rng.randint(1, 2)
        sentences.append(_writer_list(writing, listed[:cut], "writer"))
        if listed[cut:]:
            sentences.append(_writer_list(writing, listed[cut:], "writer_more"))
    sentences += _candidate_list(writing, listed)
    sentences += [_side_by_side(writing, fact) for fact in rest]
    if writing.evidence and rng.random() < 0.55:
        sentences.insert(rng.choice((len(sentences), len(sentences), 0)), _percent(writing))
    return sentences


def _writer_list(writing: Writing, listed: list[Fact], phrases: str) -> str:
    items = [writing.habit(fact, WRITER, last=fact is listed[-1]) for fact in listed]
    return writing.draw(phrases).replace("{p}", _listed(items, writing.rng))


def _candidate_list(writing: Writing, listed: list[Fact]) -> list[str]:
    """What is said of the candidate after the writer's habits have been told."""
    rng, sentences = writing.rng, []
    groups: dict[str, list[Fact]] = {}
    for fact in listed:
        groups.setdefault(_relation(fact), []).append(fact)
    for relation, members in groups.items():
        together = [members] if rng.random() < 0.6 else [[fact] for fact in members]
        for part in together:
            compared = None
            if len(part) == 1 and relation == "breaks" and rng.random() < 0.2:
                compared = _compared(writing, part[0])
            if compared:
                sentences.append(compared)
                continue
            items = [writing.habit(fact, LABELS[0], last=fact is part[-1]) for fact in part]
            template = writing.draw(relation).replace("{c}", writing.draw("names"))
            sentences.append(template.replace("{p}", _listed(items, rng)))
    return sentences


def _compared(writing: Writing, fact: Fact) -> str | None:
    """ "A has fewer semicolons than the writer"; None where the factor has no such words."""
    factor = BY_NAME[fact.factor]
    if factor.words not in (COUNTED, SHAPE) or fact.text.value == fact.writer.value:
        return None
    more = fact.text.value > fact.writer.value
    word = ("longer" if more else "shorter") if factor.words == SHAPE else ("fewer", "more")[more]
    return f"{writing.draw('names')} has {word} {factor.noun or factor.label} than the writer"


def _side_by_side(writing: Writing, fact: Fact) -> str:
    """Writer and candidate in one sentence."""
    template = writing.draw(f"side_{_relation(fact)}")
    template = template.replace("{w}", writing.draw("side_writer"))
    template = template.replace("{c}", writing.draw("names"))
    label = PHRASES["named"].get(fact.factor, BY_NAME[fact.factor].label)
    parts = re.split(r"(\{pw\}|\{p\})", template.replace("{name}", label))
    out, known = "", False  # known: the factor has been named in this sentence
    for i, part in enumerate(parts):
        subject = {"{pw}": WRITER, "{p}": LABELS[0]}.get(part)
        if subject is None:
            out += part
            continue
        ends = parts[i + 1][:1] in ("", ",", ";") or parts[i + 1].startswith((" and ", " but "))
        bare = known and out.endswith("has ") and ends
        out += writing.habit(fact, subject, not parts[i + 1], bare)
        known = True
    return out


def _percent(writing: Writing) -> str:
    near = percentiles(writing.exemplars, writing.candidate)
    name, template = writing.draw("names"), writing.draw("percent")
    return template.format(c=name, n=f"{near['n-grams']:.0f}", f=f"{near['factors']:.0f}")


def _conclusion(writing: Writing, sign: int, score: int) -> str:
    """The last sentence: what the digit says, and how far the counts carry it."""
    carried = sign * fit(writing.exemplars, writing.candidate)
    lead = "against_counts" if carried < OUTRIGHT else "close_counts" if carried < THIN else ""
    opening = writing.draw(lead or "openers")
    band = {8: 9, 2: 1}.get(score, score)
    template = str(writing.rng.choice(PHRASES["verdicts"][str(band)]))
    return opening + template.replace("{c}", writing.draw("names"))
