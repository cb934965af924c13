"""Minor replacement: 3 or 4 words of a passage swapped for near-synonyms, nothing else touched.

Writer 2 is the same person with other favourite words: where writer 1 has "perhaps" and "often",
writer 2 has "maybe" and "frequently", always. Passages and sets of exemplars are drawn until
- at least SHOWN of the swapped words are *shown*: the exemplars of writer 1 use the word and never
  its replacement, and those of writer 2 are the same texts put through the same swaps;
- all places of a swapped word in the passage change, 3 or 4 places in all.

`synonyms.json` holds groups of near-synonyms, written for this project, and what must or must not
stand before and after them. `places` finds the words of a text that can be swapped, and what for:

    place, = places("They began the work.")
    place.lemma, place.options        # "begin", {"start": "started", "commence": "commenced"}

There is no tagger: the words next to a word decide which form of a verb it is. Where that is not
sure, only options whose forms are the same are left.
"""

import json
import random
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from data.corpus import Corpus, cut, draw_exemplars
from data.proposals import Proposal, Rejection, from_source
from nanopersrm.style.text import WORD

KIND = "minor_replacement"
CHANGES = (3, 4)  # words of the passage that change
SHOWN = 2  # of the swapped words, how many the exemplars must show
PASSAGES = 6  # passages tried before a proposal is given up
SETS = 8  # sets of exemplars tried for each
BASE, THIRD, PAST, PARTICIPLE, ING = range(5)
_TABLE: dict[str, Any] = json.loads(Path(__file__).with_name("synonyms.json").read_text("utf-8"))


BESIDE = {name: frozenset(words.split()) for name, words in _TABLE["neighbours"].items()}
MODALS, HAVE, BE = BESIDE["modals"], BESIDE["have"], BESIDE["be"]
PLURALS, SINGULARS, RELATIVES = BESIDE["plurals"], BESIDE["singulars"], BESIDE["relatives"]
DETERMINERS, OBJECTS = BESIDE["determiners"], BESIDE["objects"]


@dataclass(frozen=True)
class Group:
    """Near-synonyms of one kind, and where they can stand for each other."""

    number: int
    kind: str  # adjectives, adverbs or verbs
    words: tuple[str, ...]
    before: frozenset[str]  # one of these must follow; empty: anything may
    after: frozenset[str]
    not_before: frozenset[str]
    not_after: frozenset[str]
    then: frozenset[str]  # the second word that must follow
    stop: bool  # a comma, stop, semicolon or colon must follow


@dataclass(frozen=True)
class Place:
    """A word of a text that can be swapped: text[start:end], and lemma -> what it would read."""

    start: int
    end: int
    group: int
    lemma: str
    options: dict[str, str]


@dataclass(frozen=True)
class Lexicon:
    """All groups, the forms of every verb, and which word forms belong to which group."""

    groups: tuple[Group, ...]
    forms: dict[str, tuple[str, ...]]  # verb -> base, third person, past, participle, -ing
    by_form: dict[str, list[tuple[int, str]]]  # word as written -> (group, lemma)
    nouns: frozenset[str]  # verbs that are as often nouns


@lru_cache(maxsize=1)
def lexicon() -> Lexicon:
    """The table beside this file."""
    groups: list[Group] = []
    for kind in ("adjectives", "adverbs", "verbs"):
        for row in _TABLE[kind]:
            keys = ("before", "after", "not_before", "not_after", "then")
            sets = {key: frozenset(row.get(key, "").lower().split()) for key in keys}
            words = tuple(row["words"].split())
            groups.append(Group(len(groups), kind, words, **sets, stop=bool(row.get("stop"))))
    forms = {line.split()[0]: tuple(line.split()) for line in _TABLE["forms"]}
    by_form: dict[str, list[tuple[int, str]]] = defaultdict(list)
    for group in groups:
        for word in group.words:
            for form in dict.fromkeys(forms[word] if group.kind == "verbs" else (word,)):
                by_form[form].append((group.number, word))
    return Lexicon(tuple(groups), forms, dict(by_form), frozenset(_TABLE["nouns"].split()))


@dataclass(frozen=True)
class _Around:
    """The words beside a word; "" where a mark or an end comes first."""

    before: tuple[str, str, str]  # nearest first, in lower case
    next: str
    second: str  # after it, in lower case
    stop: bool
    opens: bool  # the word opens a sentence


def opens_sentence(text: str, at: int) -> bool:
    """Whether a sentence opens at `at`: after nothing, an end mark or a line end."""
    before = text[:at].rstrip(" \"'([*_")
    return not before or before[-1] in ".!?…\n" or (before[-1] in "\"')" and '."' in before[-3:])


def _neighbours(text: str, spans: list[tuple[int, int]], i: int) -> _Around:
    start, end = spans[i]
    before, after = [], []
    for j in (i - 1, i - 2, i - 3):
        if j < 0 or text[spans[j][1] : spans[j + 1][0]].strip():
            break
        before.append(text[slice(*spans[j])].lower())
    for j in (i + 1, i + 2):
        if j == len(spans) or text[spans[j - 1][1] : spans[j][0]].strip():
            break
        after.append(text[slice(*spans[j])])
    first, second, third = (*before, "", "", "")[:3]
    following, later = (*after, "", "")[:2]
    opens = start == 0 or (not before and opens_sentence(text[max(0, start - 8) : start], 8))
    stop = text[end : end + 1] in set(".,;:")
    return _Around((first, second, third), following, later.lower(), stop, opens)


def _verb_kinds(around: _Around, noun: bool) -> set[int]:
    """Which forms of a verb can stand here."""
    between = BESIDE["between"]
    before = [word for word in around.before if word not in between and not word.endswith("ly")]
    last = before[0] if before else ""
    if last in PLURALS | SINGULARS and len(before) > 1 and before[1] in MODALS | HAVE | BE:
        last = before[1]  # "had they begun"
    for words, kinds in (
        (MODALS, {BASE}),
        (HAVE, {PARTICIPLE}),
        (BE, {PARTICIPLE, ING}),
        (PLURALS, {BASE, PAST}),
        (SINGULARS, {THIRD, PAST}),
        (RELATIVES, {PAST} if noun else {THIRD, PAST}),
    ):
        if last in words:
            return kinds
    kinds = {PAST, PARTICIPLE}
    if not noun and last not in DETERMINERS:
        kinds.add(THIRD)
    object_follows = around.next.lower() in OBJECTS
    if last not in DETERMINERS and (last in BESIDE["before_ing"] or object_follows):
        kinds.add(ING)
    return kinds


def _fits(group: Group, around: _Around) -> bool:
    last, following = around.before[0], around.next.lower()
    if (
        (group.before and following not in group.before)
        or (group.after and last not in group.after)
        or following in group.not_before
        or last in group.not_after
        or (group.then and around.second not in group.then)
        or (group.stop and not around.stop)
    ):
        return False
    if group.kind == "adjectives":
        like_noun = not following or following in BESIDE["after_nouns"]
        return last not in BESIDE["comparing"] and not (last in DETERMINERS and like_noun)
    return True


def vowel_sound(word: str) -> bool:
    """Whether "an" stands before a word."""
    silent = word.startswith(("hour", "honest", "honou", "heir"))
    other = word.startswith(("use", "usu", "uti", "uni", "eu", "one"))
    return silent or (word[0] in "aeiou" and not other)


def _options(
    group: Group, lemma: str, word: str, around: _Around, lexicon: Lexicon
) -> dict[str, str]:
    others = [other for other in group.words if other != lemma]
    if group.kind != "verbs":
        options = {other: other for other in others}
    else:
        kinds = _verb_kinds(around, lemma in lexicon.nouns)
        kinds = {kind for kind in kinds if lexicon.forms[lemma][kind] == word}
        options = {}
        for other in others:
            forms = {lexicon.forms[other][kind] for kind in kinds}
            if len(forms) == 1:
                options[other] = forms.pop()
    if (article := around.before[0]) in ("a", "an"):
        sound = article == "an"
        options = {k: v for k, v in options.items() if vowel_sound(v) == sound}
    return options


@lru_cache(maxsize=4096)
def places(text: str) -> tuple[Place, ...]:
    """The words of a text that can be swapped, in order."""
    known = lexicon()
    spans = [match.span() for match in WORD.finditer(text)]
    result = []
    for i, (start, end) in enumerate(spans):
        written = text[start:end]
        word = written.lower()
        beside = (text[start - 1 : start] if start else "", text[end : end + 1])
        if word not in known.by_form or "-" in beside or "'" in beside:
            continue
        around = _neighbours(text, spans, i)
        case: Callable[[str], str] = str
        if not written.islower():
            goes_on = around.next.islower() or around.stop
            if not (around.opens and written[1:].islower() and goes_on):
                continue  # a name, or a word in capitals
            case = str.capitalize
        for number, lemma in known.by_form[word]:
            group = known.groups[number]
            options = _options(group, lemma, word, around, known) if _fits(group, around) else {}
            if options:
                cased = {other: case(form) for other, form in options.items()}
                result.append(Place(start, end, number, lemma, cased))
                break
    return tuple(result)


def swap(text: str, favourites: dict[int, str]) -> str:
    """Every place of a group in `favourites`, found before any swap, gets the favourite word."""
    parts, end = [], 0
    for place in places(text):
        wanted = favourites.get(place.group)
        if wanted in place.options:
            parts += [text[end : place.start], place.options[wanted]]
            end = place.end
    return "".join([*parts, text[end:]])


def propose(corpus: Corpus, rng: random.Random, exemplars: int) -> Proposal | Rejection:
    """A passage with 3 or 4 words swapped, and exemplars that tell the two apart."""
    sources = corpus.sources[rng.choice(corpus.writers)]
    if len(sources) <= exemplars:
        return Rejection("too few sources by the writer")
    reason = "too few words to swap"
    for _ in range(PASSAGES):
        source = rng.choice(sources)
        text = cut(source.text, rng.randint(*corpus.lengths.candidate), rng)
        if len(places(text)) < CHANGES[0]:
            continue
        reason = "the exemplars do not tell"
        for _ in range(SETS):
            others = draw_exemplars(corpus, rng, source, exemplars)
            if others is None:
                return Rejection("too few sources by the writer")
            favourites, shown = choose(text, others, rng)
            if not favourites:
                continue
            changed = swap(text, favourites)
            everywhere = favourites | other_favourites(text, rng)
            swapped = tuple(swap(other, everywhere) for other in others)
            if set(swapped) & set(others):
                continue  # an exemplar that stays as it was is of no writer
            here = [place for place in places(text) if place.group in favourites]
            swaps = [[text[p.start : p.end], p.options[favourites[p.group]]] for p in here]
            meta, by = {"swaps": swaps, "told": shown}, f"{KIND}:{source.author}"
            return from_source(KIND, source, (others, swapped), (text, changed), by, meta)
    return Rejection(reason)


def _by_group(texts: Sequence[str]) -> dict[int, list[Place]]:
    by_group: dict[int, list[Place]] = defaultdict(list)
    for place in (place for text in texts for place in places(text)):
        by_group[place.group].append(place)
    return by_group


@dataclass(frozen=True)
class _Swap:
    """A word of the passage that can change."""

    group: int
    lemma: str
    replacement: str
    count: int  # places in the passage


def choose(
    text: str, exemplars: Sequence[str], rng: random.Random
) -> tuple[dict[int, str], list[str]]:
    """group -> the word of writer 2, and the words that the exemplars show; empty: nothing fits."""
    used = {word.lower() for part in (text, *exemplars) for word in WORD.findall(part)}
    in_exemplars = _by_group(exemplars)
    forms = lexicon().forms
    shown, unshown = [], []
    for group, in_text in sorted(_by_group([text]).items()):
        lemma = in_text[0].lemma
        if any(place.lemma != lemma for place in in_text):
            continue  # the writer uses two words of the group
        same = [place for place in in_exemplars[group] if place.lemma == lemma]
        fitting = [
            word
            for word in in_text[0].options
            if all(word in place.options for place in in_text)
            and used.isdisjoint(forms.get(word, (word,)))
        ]
        showing = [word for word in fitting if same and all(word in p.options for p in same)]
        if showing:
            shown.append(_Swap(group, lemma, rng.choice(showing), len(in_text)))
        elif fitting:
            unshown.append(_Swap(group, lemma, rng.choice(fitting), len(in_text)))
    rng.shuffle(shown)
    rng.shuffle(unshown)
    swaps = _pick(shown, unshown)
    lemmas = {swap.lemma for swap in shown}
    return (
        {swap.group: swap.replacement for swap in swaps},
        [swap.lemma for swap in swaps if swap.lemma in lemmas],
    )


def _pick(shown: list[_Swap], unshown: list[_Swap]) -> list[_Swap]:
    """3 or 4 changes with at least SHOWN words shown, as many of these as go; empty: none."""
    for size in range(min(len(shown), CHANGES[1]), SHOWN - 1, -1):
        picked: list[_Swap] = []
        count = 0
        for swap in shown:
            if len(picked) < size and count + swap.count <= CHANGES[1]:
                picked.append(swap)
                count += swap.count
        if len(picked) < SHOWN:
            continue
        for swap in unshown:
            if count < CHANGES[0] and count + swap.count <= CHANGES[1]:
                picked.append(swap)
                count += swap.count
        if count >= CHANGES[0]:
            return picked
    return []


def other_favourites(text: str, rng: random.Random) -> dict[int, str]:
    """A favourite word for every group that does not occur in the passage."""
    groups = {place.group for place in places(text)}
    return {
        group.number: rng.choice(group.words)
        for group in lexicon().groups
        if group.number not in groups
    }
