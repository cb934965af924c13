"""Telling: sentences about a writer and the candidates, out of facts and drawn phrases.

A `Writing` collects what has been claimed and quoted while the sentences of one reply are made.
`body` tells the facts in one of several layouts (the writer first, side by side, or some of both),
`conclusion` says what the digits say and how far the counts carry it.

Quotes are put in last, as they stand in their text, so that no tidying of commas can touch them.
"""

import random
import re
from dataclasses import dataclass, field

from nanopersrm.judge.claims import percentiles
from nanopersrm.judge.subjects import EVERY, WRITER
from nanopersrm.style.features import COUNTED, SHAPE
from nanopersrm.style.profile import BY_NAME
from nanopersrm.train import phrases as say
from nanopersrm.train.facts import Fact, fit, words
from nanopersrm.train.quoting import show

QUOTES = 4  # at most
FIGURES = 0.3  # share of levels told with their number
BARE_SHARE = 0.7  # of "B has none" where it may stand for "B has no semicolons"
TELLING = 0.15  # evidence from which a difference is said to favour one of two
DIFFERS = 0.8  # deviations between writer and candidate from which another level is a break
# A fit for the label below which a reply says that the counts do not carry it, or are against it.
THIN, OUTRIGHT = (
    0.0,
    -0.3,
)  # fits for the label below which a reply says that the counts are against
Claim = tuple[str, str, str]  # subject, factor, what is said


@dataclass
class Writing:
    """What has been said so far, of these texts."""

    rng: random.Random
    exemplars: tuple[str, ...]
    texts: dict[str, str]
    evidence: bool
    claims: list[Claim] = field(default_factory=list)
    quotes: list[str] = field(default_factory=list)

    def name(self, label: str) -> str:
        form = "pointwise" if len(self.texts) == 1 else "pairwise"
        return self.rng.choice(say.NAMES[form]).format(label)

    def told(self, fact: Fact, subject: str, last: bool = True, bare: bool = False) -> str:
        """A level in words, perhaps with its number and a quote; quotes are put in at the end."""
        of = next(iter(fact.texts)) if subject == EVERY else subject
        trait = fact.writer if subject == WRITER else fact.texts[of]
        level = words(trait, False).split()[0]
        self.claims.append((subject, fact.factor, level))
        if bare and BY_NAME[fact.factor].words == COUNTED and self.rng.random() < BARE_SHARE:
            return "none" if level == "no" else level
        if subject == EVERY:
            return words(trait, False)  # their numbers differ
        phrase = words(trait, self.evidence and self.rng.random() < FIGURES)
        quote = self.quote(fact.factor, subject, level)
        if quote is None:
            return phrase
        tails = say.QUOTED_LAST if last else say.QUOTED
        if phrase.endswith(")"):
            return phrase + self.rng.choice([t for t in tails if "(" not in t]).replace(
                "{q}", _mark(quote)
            )
        return phrase + self.rng.choice(tails).replace("{q}", _mark(quote))

    def quote(self, name: str, subject: str, level: str) -> int | None:
        """The number of a new quote that shows the level, or None."""
        levels = BY_NAME[name].words
        wanted = 0.75 if len(self.quotes) < 2 else 0.4
        if len(self.quotes) >= QUOTES or self.rng.random() > wanted or level in ("few", "medium"):
            return None
        if level == levels[-2] and levels != COUNTED:
            return None
        texts = list(self.exemplars) if subject == WRITER else [self.texts[subject]]
        self.rng.shuffle(texts)
        for text in texts[:2]:
            found = show(name, text, self.rng, level not in (levels[0], "short"))
            if found is not None and found not in self.quotes:
                self.quotes.append(found)
                return len(self.quotes) - 1
        return None

    def finish(self, sentences: list[str]) -> str:
        """Sentences, joined and with capitals, commas tidied, and the quotes put in."""
        text = ""
        for sentence in sentences:
            sentence = re.sub(r",\s*([,;.)]|$)", r"\1", sentence.strip())
            joint = self.rng.choice(say.JOINTS)
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


def _relation(fact: Fact, label: str) -> str:
    """Whether a candidate keeps a habit, comes near it or breaks it."""
    writer, text = fact.writer, fact.texts[label]
    if words(writer, False).split()[0] == words(text, False).split()[0]:
        return "keeps"
    return "breaks" if abs(writer.z - text.z) >= DIFFERS else "near"


def _fill(writing: Writing, template: str, fact: Fact, slots: dict[str, str]) -> str:
    """Put a fact into a template; `slots` names who stands behind {pw}, {p}, {px} and {py}."""
    parts = re.split(r"(\{pw\}|\{p\}|\{px\}|\{py\})", template)
    out, known = "", False  # known: the factor has been named in this sentence
    for i, part in enumerate(parts):
        subject = slots.get(part)
        if subject is None:
            out += part
            continue
        ends = parts[i + 1][:1] in ("", ",", ";") or parts[i + 1].startswith((" and ", " but "))
        out += writing.told(
            fact, subject, not parts[i + 1], known and out.endswith("has ") and ends
        )
        known = True
    return out


def _writer_list(writing: Writing, told: list[Fact], more: bool = False) -> str:
    items = [writing.told(f, WRITER, last=f is told[-1]) for f in told]
    template = writing.rng.choice(say.WRITER_MORE if more else say.WRITER)
    return template.replace("{p}", _listed(items, writing.rng))


def _candidate_list(writing: Writing, told: list[Fact], label: str) -> list[str]:
    """What is said of one candidate after the writer's habits have been told."""
    rng, sentences = writing.rng, []
    groups: dict[str, list[Fact]] = {}
    for fact in told:
        groups.setdefault(_relation(fact, label), []).append(fact)
    for relation, members in groups.items():
        templates = {"keeps": say.KEEPS, "breaks": say.BREAKS, "near": say.NEAR}[relation]
        together = [members] if rng.random() < 0.6 else [[fact] for fact in members]
        for some in together:
            fact = some[0]
            compared = None
            if len(some) == 1 and relation == "breaks" and rng.random() < 0.2:
                compared = _compared(writing, fact, label, WRITER)
            if compared:
                sentences.append(compared)
                continue
            items = [writing.told(f, label, last=f is some[-1]) for f in some]
            template = rng.choice(templates).replace("{c}", writing.name(label))
            sentences.append(template.replace("{p}", _listed(items, rng)))
    return sentences


def _compared(writing: Writing, fact: Fact, label: str, other: str) -> str | None:
    """ "A has fewer semicolons than the writer"; None where the factor has no such words."""
    factor = BY_NAME[fact.factor]
    theirs = fact.writer if other == WRITER else fact.texts[other]
    if factor.words not in (COUNTED, SHAPE) or fact.texts[label].value == theirs.value:
        return None
    more = fact.texts[label].value > theirs.value
    word = ("longer" if more else "shorter") if factor.words == SHAPE else ("fewer", "more")[more]
    writing.claims.append((label, fact.factor, "more" if more else "less"))
    than = "the writer" if other == WRITER else writing.name(other)
    return f"{writing.name(label)} has {word} {factor.noun or factor.label} than {than}"


def _named(template: str, fact: Fact) -> str:
    name = say.NAMED.get(fact.factor, BY_NAME[fact.factor].label)
    return template.replace("{name}", name)


def _side(writing: Writing, fact: Fact, label: str) -> str:
    """Writer and candidate in one sentence."""
    rng = writing.rng
    templates = {"keeps": say.SIDE_KEEPS, "breaks": say.SIDE_BREAKS, "near": say.SIDE_NEAR}
    template = rng.choice(templates[_relation(fact, label)])
    template = template.replace("{w}", rng.choice(say.SIDE_WRITER))
    template = template.replace("{c}", writing.name(label))
    return _fill(writing, _named(template, fact), fact, {"{pw}": WRITER, "{p}": label})


def _two(writing: Writing, fact: Fact, side: bool) -> str:
    """Both candidates in one sentence, with the writer or after them, and perhaps what follows."""
    rng = writing.rng
    x, y = rng.sample(sorted(writing.texts), 2)
    levels = {words(trait, False).split()[0] for trait in fact.texts.values()}
    alike = len(levels) == 1
    several = (say.BOTH, say.BOTH_SIDES) if alike else (say.TWO, say.TWO_SIDES)
    template = rng.choice(several[side]).replace("{w}", rng.choice(say.SIDE_WRITER))
    template = template.replace("{x}", writing.name(x)).replace("{y}", writing.name(y))
    slots = {"{pw}": WRITER, "{p}": EVERY, "{px}": x, "{py}": y}
    sentence = _fill(writing, _named(template, fact), fact, slots)
    better = max(fact.evidence, key=lambda label: fact.evidence[label])
    worse = next(label for label in fact.texts if label != better)
    off = {label: abs(trait.z - fact.writer.z) for label, trait in fact.texts.items()}
    telling = fact.weight > TELLING and off[better] < off[worse]
    if telling and (rng.random() < 0.5 or alike):
        if alike:
            if (compared := _compared(writing, fact, better, worse)) is None:
                return sentence
            sentence += "; " + compared
        sentence += "; " + rng.choice(say.FAVOURS).replace("{x}", writing.name(better))
    return sentence


def _percent(writing: Writing) -> str:
    rng = writing.rng
    values: dict[str, str] = {}
    for (label, text), key in zip(writing.texts.items(), "xy", strict=False):
        near = percentiles(writing.exemplars, text)
        values |= {key: writing.name(label), f"n{key}": f"{near['n-grams']:.0f}"}
        values |= {f"f{key}": f"{near['factors']:.0f}"}
    if len(writing.texts) == 2:
        return rng.choice(say.PERCENT_TWO).format(**values)
    return rng.choice(say.PERCENT).format(c=values["x"], n=values["nx"], f=values["fx"])


def conclusion(writing: Writing, roles: dict[str, str], scores: dict[str, int]) -> str:
    """The last sentence: what the digits say, and how far the counts carry it."""
    rng = writing.rng
    fits = {label: fit(writing.exemplars, text) for label, text in writing.texts.items()}
    carried = sum(fits[label] * (1 if roles[label] == "chosen" else -1) for label in roles)
    if carried < OUTRIGHT:
        lead = rng.choice(say.AGAINST_COUNTS)
    elif carried < THIN:
        lead = rng.choice(say.CLOSE_COUNTS)
    else:
        lead = rng.choice(say.OPENERS)
    if len(roles) == 1:
        (label,) = roles
        band = {8: 9, 2: 1}.get(scores[label], scores[label])
        return lead + rng.choice(say.VERDICTS[band]).replace("{c}", writing.name(label))
    x, y = sorted(roles, key=lambda label: -scores[label])
    margin = scores[x] - scores[y]
    band = 6 if margin >= 5 else 3 if margin >= 3 else 1
    template = rng.choice(say.VERDICTS_TWO[band])
    return lead + template.replace("{x}", writing.name(x)).replace("{y}", writing.name(y))


def body(writing: Writing, told: list[Fact], roles: dict[str, str]) -> list[str]:
    """The writer's habits and the candidates against them, in one of several layouts."""
    rng = writing.rng
    listed = told if rng.random() < 0.45 else told[: rng.choice((0, 0, 1, 1, 2))]
    rest = told[len(listed) :]
    sentences = []
    if listed:
        cut = len(listed) if len(listed) < 3 or rng.random() < 0.5 else rng.randint(1, 2)
        sentences.append(_writer_list(writing, listed[:cut]))
        if listed[cut:]:
            sentences.append(_writer_list(writing, listed[cut:], more=True))
    if len(roles) == 1:
        (label,) = roles
        sentences += _candidate_list(writing, listed, label)
        sentences += [_side(writing, fact, label) for fact in rest]
    else:
        sentences += [_two(writing, fact, side=False) for fact in listed]
        sentences += [_two(writing, fact, side=True) for fact in rest]
    if writing.evidence and rng.random() < 0.55:
        sentences.insert(rng.choice((len(sentences), len(sentences), 0)), _percent(writing))
    return sentences
