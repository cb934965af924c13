"""The two kinds that a model writes, with a scripted writer: whose text is whose, and what never
may be shown; personas do what they say and belong to one split."""

import random
from collections.abc import Sequence

import pytest

from data.corpus import Corpus, Lengths, Piece, split_corpora
from data.kinds import style_mimicking, style_randomization
from data.kinds.model_text import Request
from data.kinds.style_randomization import OPENINGS, PERSONAS, Persona, personas_of
from data.proposals import Proposal, Rejection, Taken, fault, pair_and_twin
from nanopersrm.pairs import check_twins
from nanopersrm.style.features import FACTORS, measure

LENGTHS = Lengths((30, 40), (36, 48))
KINDS = {"style_randomization": style_randomization, "style_mimicking": style_mimicking}


def prose(stem: str, sentences: int = 30) -> str:
    return " ".join(
        f"The {stem}{i}x went far away from {stem}{i}y when it was late." for i in range(sentences)
    )


def corpus_of(works: int = 9, question: str = "", split: str = "train") -> Corpus:
    pieces = [
        Piece(author, f"{author}{k}", None, prose(f"{author}{k}q"), domain, question)
        for author, domain in (("ann", "d"), ("bob", "d"), ("cyd", "e"))
        for k in range(works)
    ]
    sources = split_corpora(pieces, 0, (), LENGTHS)["train"]
    return Corpus(split, sources.sources, sources.rare_names, LENGTHS)


class Writer:
    """Writes sentences of its own, another text for every opening; keeps the requests."""

    def __init__(self, spoil: str = ""):
        self.spoil, self.requests, self.calls = spoil, [], 0  # type: str, list[Request], int

    def __call__(self, requests: Sequence[Request]) -> list[str]:
        self.requests += requests
        self.calls += 1
        return [self.text(request) for request in requests]

    def text(self, request: Request) -> str:
        rng = random.Random(request.opening + request.style.turns[0][1])
        words = [f"m{rng.randrange(10**9)}" for _ in range(request.words - 1)]
        words[9::10] = [f"{word}." for word in words[9::10]]
        return f"{self.spoil} {' '.join(words)} end.".strip()


def results(kind: str, corpus: Corpus, writer: Writer, number: int = 32, seed: int = 0):
    rngs = [random.Random(f"{seed}/{i}") for i in range(number)]
    counts = [rng.randint(1, 4) for rng in rngs]
    return list(KINDS[kind].proposals("fake", writer, corpus, rngs, counts))


def accepted(
    kind: str, corpus: Corpus, writer: Writer | None = None, number: int = 32
) -> list[Proposal]:
    found = results(kind, corpus, writer or Writer(), number)
    assert len(found) == number
    return [one for one in found if isinstance(one, Proposal)]


@pytest.mark.parametrize("kind", KINDS)
def test_the_person_and_the_model_each_have_their_own(kind: str):
    corpus, taken = corpus_of(), Taken(reuse=9)
    found = accepted(kind, corpus)
    assert len(found) > 20
    sources = [source.text for own in corpus.sources.values() for source in own]
    texts = [one.text_2 for one in found]
    assert len(set(texts)) == len(texts)  # a text is a candidate once
    sound = [one for one in found if fault(one, corpus, taken) is None]
    assert len(sound) > 10
    check_twins([pair for i, one in enumerate(sound) for pair in pair_and_twin(one, f"{i}", "ood")])
    for one in found:
        assert one.kind == kind
        work = one.from_1.split("/")[1]
        assert one.from_1 == f"{one.author}/{work}"
        assert f"The {work}q" in one.text_1
        assert one.question.startswith(f"The {work}q")
        assert any(f"{one.question} {one.text_1}" in source for source in sources)
        assert 0.8 < len(one.text_1.split()) / len(one.text_2.split()) < 1.25
        for text in one.exemplars_1:
            assert f"The {one.author}" in text
            assert work not in text
        for text in (one.text_2, *one.exemplars_2):
            assert text.startswith("m")
        assert one.text_2 not in one.exemplars_2
        assert len(one.exemplars_1) == len(one.exemplars_2) == len(set(one.exemplars_2))
        assert one.from_2.startswith("model:fake:")
        assert one.meta["base"] == "fake"
        assert 0 < one.meta["temperature"] <= 1.2


@pytest.mark.parametrize("kind", KINDS)
def test_a_text_that_fails_is_rejected_with_its_reason(kind: str):
    found = results(kind, corpus_of(), Writer("Here is the text."))
    assert Rejection("model: chat phrase") in found
    assert not [one for one in found if isinstance(one, Proposal)]


def test_a_persona_has_its_own_turns_and_splits_do_not_share_any():
    named = {}
    for split in ("train", "validation", "test", "ood"):
        writer = Writer()
        found = accepted("style_randomization", corpus_of(split=split), writer)
        named[split] = {one.meta["persona"] for one in found}
        own = {persona.name: persona for persona in personas_of(split)}
        assert {one.from_2 for one in found} == {f"model:fake:{name}" for name in named[split]}
        shown = {tuple(zip(OPENINGS, own[n].paragraphs, strict=True)) for n in named[split]}
        assert {request.style.turns for request in writer.requests} == shown
    assert len(named["train"]) == 2  # two cells
    known = {split: {persona.name for persona in personas_of(split)} for split in named}
    assert known.pop("ood") == known["test"]
    assert sum(map(len, known.values())) == len(set().union(*known.values())) == len(PERSONAS)
    assert not named["train"] & (named["validation"] | named["test"] | named["ood"])


def test_the_imitated_passage_is_in_no_text_of_the_pair():
    writer = Writer()
    found = accepted("style_mimicking", corpus_of(), writer)
    assert len({one.author for one in found}) > 1
    for one in found:
        author, work = one.meta["imitated"].split("/")
        assert (author, one.from_2) == (one.author, f"model:fake:mimic:{one.author}")
        assert work not in one.from_1
        for text in (one.text_1, *one.exemplars_1):
            assert f"{work}q" not in text
    turns = {request.style.turns for request in writer.requests}
    assert all(len(turn) == 1 and turn[0][0].endswith("late.") for turn in turns)
    assert len(turns) == 4  # one for each cell


def test_who_has_few_sources_gives_few_imitations():
    found = results("style_mimicking", corpus_of(works=5), Writer(), 8)
    reasons = [one.reason for one in found if isinstance(one, Rejection)]
    assert reasons.count("no opening in the source") == 4  # 8 of the cell, 4 sources
    found = results("style_mimicking", corpus_of(works=3), Writer(), 8)
    assert found == [Rejection("no passage to imitate")] * 8


MEASURED = {persona.name: measure(persona.paragraphs) for persona in PERSONAS}


@pytest.mark.parametrize("persona", PERSONAS, ids=lambda persona: persona.name)
def test_a_persona_stands_out_in_its_habits(persona: Persona):
    assert persona.habits
    for habit in persona.habits:
        assert habit in {factor.name for factor in FACTORS}
        rates = sorted((MEASURED[other.name][habit] or 0.0 for other in PERSONAS), reverse=True)
        own = MEASURED[persona.name][habit]
        assert own is not None
        assert own >= rates[1], f"{persona.name}: {habit} {own}, others have {rates[:3]}"
