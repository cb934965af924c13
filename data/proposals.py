"""Proposals: candidates for a pair, the rules that refuse them, and the pair and twin they become.

A proposal speaks of two writers evenly: `text_1` is by writer 1, whose other texts are
`exemplars_1`, and likewise 2. `pair_and_twin` asks about the same two texts twice,

    pair   exemplars_1   chosen text_1   rejected text_2
    twin   exemplars_2   chosen text_2   rejected text_1

so nothing but the exemplars can tell which of the two is meant. A coin decides which record stands
first: were it always the person's, every second record would have a person who is always right.

Rules for every text: enough words, no left-over markup, not broken off, no surname of its own
writer. Rules for the proposal: two different candidates with lengths within 25 %; no exemplar
twice; no passage of an exemplar in a candidate (of the 93 8-grams of 100 words one may be shared,
"the Senate and House of Representatives of the United"); no rare name that the exemplars of a
writer share with that writer's candidate alone. Rule for the set: no candidate that is in it.
"""

import hashlib
import random
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from data.corpus import Corpus, Source, names_in, surname
from nanopersrm.pairs import Pair, check_twins
from nanopersrm.style.text import CLOSERS, EMOJI, ENDS, SMILEY, WORD

MOST_LONGER = 1.25  # words of the longer candidate / words of the shorter
SHORTEST = 0.75  # of the least length asked for
GRAM = 8  # words
MOST_SHARED = 0.015  # of a candidate's 8-grams that are also in an exemplar
MOST_KNOWN = 0.1  # of a candidate's 8-grams that earlier candidates had
LONGEST_GREETING = 4  # words: "With all my love," may end a letter
MARKUP = re.compile(
    r"<\|?/?[a-zA-Z][^<>\n]{0,80}>|&(?:[a-z]{2,8}|#\d{2,6});|```|\{\{|\}\}|\]\(|\ufffd"
    r"|^\s{0,3}#{1,6} |^\s*\[\s*['\"]|\*\*\w|\\(?:n|t|u[0-9a-f]{4}|[a-z]+\{)|^\s*\|.*\|\s*$",
    re.MULTILINE,
)
BROKEN_OFF = re.compile(r"(?:[,;:([{/&\\]|[-–—])$")
BEGINS_INSIDE = re.compile(r"^[,;:.!?)\]}/&%]")
BLANK_LINE = re.compile(r"\n\s*\n")
NOT_BY_A_PERSON = ("restyle:", "minor_replacement:", "model:")  # how such sources begin


@dataclass(frozen=True)
class Proposal:
    """Two texts, and other texts by the writer of each."""

    kind: str
    domain: str
    author: str  # the person whose writings it came from
    exemplars_1: tuple[str, ...]
    exemplars_2: tuple[str, ...]
    text_1: str
    text_2: str
    from_1: str  # who wrote text_1, in the words of Pair.chosen_from
    from_2: str
    question: str = ""
    meta: dict[str, Any] = field(default_factory=dict)  # of both records

    @property
    def author_2(self) -> str:
        """The person behind writer 2: another one only where `meta` names them."""
        return str(self.meta.get("author_2", self.author))


def from_source(
    kind: str,
    source: Source,
    exemplars: tuple[tuple[str, ...], tuple[str, ...]],
    texts: tuple[str, str],
    from_2: str,
    meta: dict[str, Any],
) -> Proposal:
    """A proposal whose text 1 is cut from `source`; exemplars and texts of writers 1 and 2."""
    s = source
    return Proposal(kind, s.domain, s.author, *exemplars, *texts, s.label, from_2, s.question, meta)


@dataclass(frozen=True)
class Rejection:
    """Why a proposal came to nothing."""

    reason: str


def pair_and_twin(proposal: Proposal, id: str, split: str) -> tuple[Pair, Pair]:
    """The two records of a proposal, with the ids `id` + "a" and `id` + "b"."""
    first = random.Random(f"{id}/order").random() >= 0.5
    pair = Pair(
        id=f"{id}{'a' if first else 'b'}",
        twin=f"{id}{'b' if first else 'a'}",
        author=proposal.author,
        domain=proposal.domain,
        split=split,  # type: ignore[arg-type]
        kind=proposal.kind,
        exemplars=proposal.exemplars_1,
        question=proposal.question,
        chosen=proposal.text_1,
        rejected=proposal.text_2,
        chosen_from=proposal.from_1,
        rejected_from=proposal.from_2,
        meta=proposal.meta,
    )
    twin = replace(
        pair,
        id=pair.twin,
        twin=pair.id,
        author=proposal.author_2,
        exemplars=proposal.exemplars_2,
        chosen=proposal.text_2,
        rejected=proposal.text_1,
        chosen_from=proposal.from_2,
        rejected_from=proposal.from_1,
    )
    return (pair, twin) if first else (twin, pair)


def check_set(pairs: Sequence[Pair]) -> None:
    """Each pair stands beside its twin, and the order of the two looks like a fair coin's.

    Then whoever does not read the exemplars is right about half of the pairs, whatever the texts
    look like and wherever they stand. A fair coin fails here in one set of 1.7 million.
    """
    check_twins(pairs)
    person_first = person_second = 0
    for first, second in zip(pairs[::2], pairs[1::2], strict=True):
        assert first.twin == second.id, f"{first.id} and {second.id} are no twins"
        chosen_by_person = not first.chosen_from.startswith(NOT_BY_A_PERSON)
        rejected_by_person = not first.rejected_from.startswith(NOT_BY_A_PERSON)
        person_first += chosen_by_person and not rejected_by_person
        person_second += rejected_by_person and not chosen_by_person
    far = abs(person_first - person_second) > 5 * (person_first + person_second) ** 0.5
    assert not far, f"the person is right {person_first} times first, {person_second} second"


class Taken:
    """The 8-grams of all candidates so far; `reuse` says how often a passage may serve."""

    def __init__(self, reuse: int = 1):
        self.reuse = reuse
        self.uses: Counter[int] = Counter()

    def known(self, text: str) -> bool:
        """Whether much of this text was in candidates `reuse` times already."""
        hashes = {_hash(gram) for gram in grams(text)}
        return sum(self.uses[h] >= self.reuse for h in hashes) > MOST_KNOWN * len(hashes)

    def add(self, text_1: str, text_2: str) -> None:
        """Take the candidates of one proposal; what both hold counts once."""
        self.uses.update({_hash(gram) for text in (text_1, text_2) for gram in grams(text)})


def _hash(gram: str) -> int:
    return int.from_bytes(hashlib.blake2b(gram.encode(), digest_size=8).digest(), "big")


def grams(text: str) -> Iterator[str]:
    """The word 8-grams of a text in lower case; a shorter text is one gram."""
    words = [word.lower() for word in WORD.findall(text)]
    for i in range(max(1, len(words) - GRAM + 1)):
        yield " ".join(words[i : i + GRAM])


def shared_share(text: str, others: tuple[str, ...]) -> float:
    """The share of the 8-grams of `text` that are also in one of the others."""
    known = {gram for other in others for gram in grams(other)}
    mine = list(grams(text))
    return sum(gram in known for gram in mine) / len(mine)


def unfinished(text: str, strict: bool) -> bool:
    """Whether a text is broken off at either end.

    A person may end without a mark; `strict`, for what a model wrote, asks for one.
    """
    text = text.strip()
    last, tail = text.rpartition("\n")[2], text[-12:]
    greets = last.endswith(",") and len(last.split()) <= LONGEST_GREETING
    if BEGINS_INSIDE.search(text) or (BROKEN_OFF.search(text) and (strict or not greets)):
        return True
    face = any(m.end() == len(tail) for p in (EMOJI, SMILEY) for m in p.finditer(tail))
    return strict and not (text.rstrip(CLOSERS)[-1:] in ENDS or face)


def cut_quotation(text: str) -> bool:
    """An odd number of quotes in a paragraph; one that opens with a quote may go on in the next."""
    return any(
        paragraph.count('"') % 2 == 1 and not paragraph.lstrip().startswith('"')
        for paragraph in BLANK_LINE.split(text)
    )


def text_fault(text: str, fewest: float, author: str = "", strict: bool = False) -> str | None:
    """What is wrong with one text by itself, or None."""
    name = surname(author)
    faults = {
        "too few words": len(text.split()) < fewest,
        "markup": MARKUP.search(text),
        "masked name": "[name]" in text,
        "unfinished": unfinished(text, strict),
        "cut quotation": cut_quotation(text),
        "writer's name": name and name in WORD.findall(text.replace("'s", "")),
    }
    return next((fault for fault, applies in faults.items() if applies), None)


def tell_tale_names(proposal: Proposal, corpus: Corpus) -> set[str]:
    """Rare names that a writer's exemplars share with that writer's candidate alone.

    A name that both candidates hold tells nothing and is allowed.
    """
    rare = corpus.rare_names[proposal.domain]
    text_1, text_2 = names_in(proposal.text_1, rare), names_in(proposal.text_2, rare)
    exemplars_1 = names_in("\n\n".join(proposal.exemplars_1), rare)
    exemplars_2 = names_in("\n\n".join(proposal.exemplars_2), rare)
    return (exemplars_1 & (text_1 - text_2)) | (exemplars_2 & (text_2 - text_1))


def fault(proposal: Proposal, corpus: Corpus, taken: Taken) -> str | None:
    """Why a proposal is refused. None: accepted, and its candidates are taken."""
    candidates = (proposal.text_1, proposal.text_2)
    if proposal.text_1.split() == proposal.text_2.split():
        return "same text twice"
    shorter, longer = sorted(len(text.split()) for text in candidates)
    if longer > MOST_LONGER * shorter:
        return "lengths differ"
    if any(taken.known(text) for text in candidates):
        return "candidate already taken"
    least = [SHORTEST * words for words, _ in (corpus.lengths.candidate, corpus.lengths.exemplar)]
    for candidate, exemplars, source, author in (
        (proposal.text_1, proposal.exemplars_1, proposal.from_1, proposal.author),
        (proposal.text_2, proposal.exemplars_2, proposal.from_2, proposal.author_2),
    ):
        for i, text in enumerate((candidate, *exemplars)):
            if reason := text_fault(text, least[i > 0], author, source.startswith("model:")):
                return reason
    exemplars = (*proposal.exemplars_1, *proposal.exemplars_2)
    if len(set(exemplars)) < len(exemplars):
        return "same exemplar twice"
    if any(shared_share(text, exemplars) > MOST_SHARED for text in candidates):
        return "passage of an exemplar"
    if tell_tale_names(proposal, corpus):
        return "tell-tale name"
    taken.add(*candidates)
    return None
