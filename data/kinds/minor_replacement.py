"""Minor replacement: 3 or 4 words of a passage swapped for near-synonyms, nothing else touched.

Writer 1 is a person of the shelf. Writer 2 is the same person with other favourite words: where the
first writes "perhaps" and "often", the second writes "maybe" and "frequently", always. The passage
is the same but for 3 or 4 words, so the exemplars are the only way to tell which is whose:

    text_1   ... it was perhaps the best, for he often came ...      exemplars_1  ... perhaps ...
    text_2   ... it was maybe the best, for he frequently came ...   exemplars_2  ... maybe ...

How it works. Some passages and sets of exemplars of one writer are drawn until a combination fits:
- A swapped word is *told* where the exemplars of writer 1 use the same word and never its
  replacement, so that those of writer 2, the same texts put through the same swaps, have the
  replacement in every such place. At least TOLD of the swapped words must be told.
- All places of a swapped word in the passage change, so that writer 2 is consistent; 3 or 4 places
  in all, and `check` reads the two texts again and counts.
- In the exemplars of writer 2 the words of other groups get favourites of their own as well.

What we chose. The exemplars of both writers come from the same sources: between the two sides only
the words differ. What we left out. A person's own preference over all of their writings; the
exemplars at hand are the evidence.
"""

import random
from collections import defaultdict
from collections.abc import Iterator, Sequence
from functools import lru_cache

from data.drafts import Draft, Rejection
from data.kinds.synonyms import Place, lexicon, places, swap
from data.shelf import Shelf, cut, draw_exemplars, draw_writer
from nanopersrm.style.text import WORD

KIND = "minor_replacement"
CHANGES = (3, 4)  # words of the passage that change
TOLD = 2  # of the swapped words, how many the exemplars must tell
PASSAGES = 6  # passages tried before a proposal is given up
SETS = 8  # sets of exemplars tried for each


def draft(shelf: Shelf, rng: random.Random, exemplars: int) -> Draft | Rejection:
    """One proposal: a passage with 3 or 4 words swapped, and exemplars that tell the two apart."""
    writer = draw_writer(shelf, rng)
    sources = shelf.sources[writer]
    if len(sources) <= exemplars:
        return Rejection(KIND, "too few sources by the writer")
    reason = "too few words to swap"
    for _ in range(PASSAGES):
        source = rng.choice(sources)
        text = cut(source.text, rng.randint(*shelf.lengths.candidate), rng)
        if len(places(text)) < CHANGES[0]:
            continue
        reason = "the exemplars do not tell"
        for _ in range(SETS):
            others = draw_exemplars(shelf, rng, source, exemplars)
            if others is None:
                return Rejection(KIND, "too few sources by the writer")
            favourites, told = choose(text, others, rng)
            if not favourites:
                continue
            changed = swap(text, favourites)
            check(text, changed)
            apart = favourites | habits(text, rng)
            swapped = tuple(swap(other, apart) for other in others)
            if set(swapped) & set(others):
                continue  # an exemplar that stays as it was is of no writer
            swaps = [
                [text[p.start : p.end], p.options[favourites[p.group]]]
                for p in places(text)
                if p.group in favourites
            ]
            return Draft(
                kind=KIND,
                domain=source.domain,
                author=source.author,
                exemplars_1=others,
                exemplars_2=swapped,
                text_1=text,
                text_2=changed,
                from_1=source.label,
                from_2=f"{KIND}:{source.author}",
                question=source.question,
                meta={"swaps": swaps, "told": told},
            )
    return Rejection(KIND, reason)


def _by_group(texts: Sequence[str]) -> dict[int, list[Place]]:
    found: dict[int, list[Place]] = defaultdict(list)
    for text in texts:
        for place in places(text):
            found[place.group].append(place)
    return found


@lru_cache(maxsize=4096)
def _spoken(text: str) -> frozenset[str]:
    return frozenset(word.lower() for word in WORD.findall(text))


def choose(
    text: str, exemplars: Sequence[str], rng: random.Random
) -> tuple[dict[int, str], list[str]]:
    """group -> the word of writer 2, and the words that the exemplars tell; empty: nothing fits."""
    spoken = _spoken(text).union(*map(_spoken, exemplars))
    known = _by_group(exemplars)
    told, others = [], []
    for group, here in sorted(_by_group([text]).items()):
        lemma = here[0].lemma
        if any(place.lemma != lemma for place in here):
            continue  # the writer uses two words of the group
        shared = [place for place in known[group] if place.lemma == lemma]
        fitting = [
            word
            for word in here[0].options
            if all(word in place.options for place in here) and spoken.isdisjoint(_forms(word))
        ]
        telling = [word for word in fitting if shared and all(word in p.options for p in shared)]
        if telling:
            told.append((group, lemma, rng.choice(telling), len(here)))
        elif fitting:
            others.append((group, lemma, rng.choice(fitting), len(here)))
    rng.shuffle(told)
    rng.shuffle(others)
    for picked in _picks(told, others):
        lemmas = [lemma for _, lemma, _, _ in picked if any(lemma == t[1] for t in told)]
        return {group: word for group, _, word, _ in picked}, lemmas
    return {}, []


_Pick = tuple[int, str, str, int]  # group, lemma, replacement, how often


def _picks(told: list[_Pick], others: list[_Pick]) -> Iterator[list[_Pick]]:
    """Ways to change 3 or 4 words with at least TOLD groups told, the most told first."""
    for size in range(min(len(told), CHANGES[1]), TOLD - 1, -1):
        picked: list[_Pick] = []
        count = 0
        for pick in told:
            if len(picked) < size and count + pick[3] <= CHANGES[1]:
                picked.append(pick)
                count += pick[3]
        if len(picked) < TOLD:
            continue
        for pick in others:
            if count >= CHANGES[0]:
                break
            if count + pick[3] <= CHANGES[1]:
                picked.append(pick)
                count += pick[3]
        if count >= CHANGES[0]:
            yield picked


def _forms(word: str) -> tuple[str, ...]:
    return lexicon().forms.get(word, (word,))


def habits(text: str, rng: random.Random) -> dict[int, str]:
    """A favourite word for every group that does not occur in the passage."""
    here = {place.group for place in places(text)}
    return {
        group.number: rng.choice(group.words)
        for group in lexicon().groups
        if group.number not in here
    }


def check(before: str, after: str) -> None:
    """3 or 4 words differ and nothing else: number of words, marks, blanks and casing hold."""
    old, new = WORD.findall(before), WORD.findall(after)
    changed = [(a, b) for a, b in zip(old, new, strict=False) if a != b]
    casing = all(a[0].isupper() == b[0].isupper() for a, b in changed)
    if (
        len(old) != len(new)
        or not CHANGES[0] <= len(changed) <= CHANGES[1]
        or not casing
        or WORD.split(before) != WORD.split(after)
    ):
        raise AssertionError(f"a swap changed more than it should: {changed}")
