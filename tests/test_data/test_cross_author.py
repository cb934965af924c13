"""Cross-author: two people of one domain and period, and the twin that asks for the other one."""

import random

import pytest

from data.corpus import Corpus, Lengths, Piece, split_corpora
from data.kinds.cross_author import PERIOD, propose
from data.proposals import Proposal, Rejection

LENGTHS = Lengths((20, 30), (30, 40))


def corpus_of(pieces: list[Piece]) -> Corpus:
    return split_corpora(pieces, 0, (), LENGTHS)["train"]


def works(author: str, year: int | None, domain: str = "d", question: str = "") -> list[Piece]:
    texts = [" ".join(f"{author}{k}x{i} went away again." for i in range(30)) for k in range(3)]
    return [Piece(author, f"t{k}", year, text, domain, question) for k, text in enumerate(texts)]


def proposals_of(corpus: Corpus, exemplars: int = 2) -> list[Proposal]:
    found = [propose(corpus, random.Random(seed), exemplars) for seed in range(60)]
    return [one for one in found if isinstance(one, Proposal)]


def test_a_draft_is_of_two_writers_with_their_own_exemplars():
    corpus = corpus_of([*works("ann", None), *works("bob", None), *works("cy", None, "e")])
    found = proposals_of(corpus)
    assert found  # cy has nobody to be set against
    for one in found:
        assert {one.author, one.author_2} == {"ann", "bob"}
        for author, text, exemplars, written_by in (
            (one.author, one.text_1, one.exemplars_1, one.from_1),
            (one.author_2, one.text_2, one.exemplars_2, one.from_2),
        ):
            work = text[: text.index("x")]
            assert written_by == f"{author}/t{work[-1]}"
            assert len(exemplars) == 2
            assert all(e.startswith(author) and not e.startswith(work) for e in exemplars)
            assert 18 <= len(text.split()) <= 32


def test_rejections():
    alone = propose(corpus_of(works("ann", None)), random.Random(0), 1)
    assert alone == Rejection("no other writer in the domain")
    corpus = corpus_of([*works("ann", None), *works("bob", None)])
    assert propose(corpus, random.Random(0), 2) != propose(corpus, random.Random(0), 3)
    assert propose(corpus, random.Random(0), 3) == Rejection("too few other texts")


@pytest.mark.parametrize("year", [1830, None])  # an unknown year fits all
def test_writers_of_one_period_are_preferred(year: int | None):
    corpus = corpus_of([*works("ann", 1800), *works("bob", year), *works("cy", 1900)])
    couples = {frozenset((one.author, one.author_2)) for one in proposals_of(corpus)}
    # cy is 70 years from the nearest, and asked for all the same
    assert couples == {frozenset(("ann", "bob")), frozenset(("bob", "cy"))}
    assert 1830 - 1800 <= PERIOD < 1900 - 1830


@pytest.mark.parametrize(("other", "kept"), [("Why?", "Why?"), ("How?", "")])
def test_a_question_stays_when_both_answer_it(other: str, kept: str):
    corpus = corpus_of([*works("ann", 1, question="Why?"), *works("bob", 1, question=other)])
    assert {one.question for one in proposals_of(corpus)} == {kept}
