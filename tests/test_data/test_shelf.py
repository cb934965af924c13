"""The shelf: splits by author, cuts at ends of sentences, exemplars from other works."""

import random
from collections import Counter
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from data.shelf import (
    LONGEST,
    Lengths,
    Shelf,
    cut,
    divide,
    draw_exemplars,
    draw_sources,
    draw_writer,
    parts,
    quotas,
    shelves,
)
from data.writings import Piece
from nanopersrm import InputError
from nanopersrm.pairs import SPLITS
from nanopersrm.style.text import sentences


def piece(author: str, title: str = "t", text: str = "A text.", domain: str = "d") -> Piece:
    return Piece(author, title, None, text, domain)


def numbered(n: int, words: int = 10) -> str:
    """n sentences of so many words, each word with the number of its sentence."""
    return " ".join(" ".join([f"W{i}"] + [f"w{i}"] * (words - 1)) + "." for i in range(n))


MANY = [piece(f"a{i:02}", title) for i in range(40) for title in ("x", "y")]


def test_quotas_need_two_writers_a_split():
    assert [quotas(n) for n in (1, 7, 8, 12, 41, 43, 51, 77)] == [
        (0, 0),
        (0, 0),
        (2, 2),
        (2, 2),
        (4, 2),
        (4, 2),
        (5, 3),
        (7, 4),
    ]


def test_a_division_depends_on_the_seed_alone():
    splits = divide(MANY, 3)
    assert splits == divide(list(reversed(MANY)), 3)
    assert splits != divide(MANY, 4)
    assert Counter(splits.values()) == {"train": 34, "test": 4, "validation": 2}


def test_writers_of_one_work_are_for_training():
    splits = divide([p for p in MANY if p.title == "x" or p.author >= "a30"], 0)
    assert all(author >= "a30" for author, split in splits.items() if split != "train")
    assert Counter(splits.values())["test"] == 4


def test_whole_domains_are_held_out():
    others = [piece(f"b{i}", domain="e") for i in range(3)] + [piece("a01", domain="e")]
    shelf_of = shelves(MANY + others, 0, ["e"])
    assert list(shelf_of) == list(SPLITS)
    assert shelf_of["ood"].writers == [("e", "a01"), ("e", "b0"), ("e", "b1"), ("e", "b2")]
    seen = [author for split in SPLITS for _, author in shelf_of[split].writers]
    assert len(seen) == len(set(seen)) == 43  # nobody is in two splits


def test_a_writer_of_two_domains_is_in_one_split():
    both = MANY + [replace(p, domain="e") for p in MANY]
    splits = divide(both, 0)
    for split, shelf in shelves(both, 0).items():
        assert {author for _, author in shelf.writers} == {
            a for a, s in splits.items() if s == split
        }


SENTENCE = st.builds(
    lambda words, mark: " ".join(words) + mark,
    st.lists(st.sampled_from(["so", "I", "went", "there"]), min_size=1, max_size=9),
    st.sampled_from(".?!"),
)
PROSE = st.lists(
    st.lists(SENTENCE, min_size=1, max_size=6).map(" ".join), min_size=1, max_size=5
).map("\n\n".join)


@given(PROSE, st.integers(5, 40), st.integers(0, 99))
def test_a_cut_is_a_run_of_whole_sentences(text: str, words: int, seed: int):
    found = cut(text, words, random.Random(seed))
    assert found == cut(text, words, random.Random(seed))
    assert found in text  # to the letter
    whole = [s for block in text.split("\n\n") for s in sentences(block)]
    mine = [s for block in found.split("\n\n") for s in sentences(block)]
    assert any(whole[i : i + len(mine)] == mine for i in range(len(whole)))
    sizes = [len(s.split()) for s in whole]
    if sum(sizes) <= words:
        assert found == text
    else:
        assert abs(len(found.split()) - words) <= max(sizes)


def test_cuts_come_from_everywhere_and_fit():
    text = numbered(20)
    cuts = {cut(text, 52, random.Random(seed)) for seed in range(200)}
    assert {len(c.split()) for c in cuts} == {50}
    assert len(cuts) == 16  # from each sentence that has enough behind it


def test_layout_inside_a_cut_is_kept():
    text = "Dear Jo,\nlook here:\n- one thing\n- another thing\n\nBye  now.\n"
    assert cut(text, 99, random.Random(0)) == text.strip()
    for seed in range(20):  # no cut begins inside the list
        assert cut(text, 8, random.Random(seed)) == text.strip()


def test_no_cut_inside_a_quotation():
    text = numbered(3) + ' "He came. He saw. He left again." ' + numbered(3)
    for seed in range(200):
        found = cut(text, 25, random.Random(seed))
        assert found.count('"') % 2 == 0


def test_a_writer_without_marks_is_cut_at_paragraphs():
    text = "\n\n".join(f"p{i} " + "so what " * 6 for i in range(6)).strip()
    found = cut(text, 26, random.Random(1))
    assert found.startswith("p")
    assert found.endswith("what")


def test_long_pieces_become_even_parts():
    text = numbered(200) + "\n\n" + numbered(100)
    found = parts(text)
    assert [len(part.split()) for part in found] == [430, 430, 430, 430, 430, 430, 420]
    assert " ".join(" ".join(found).split()) == " ".join(text.split())
    assert parts(numbered(LONGEST // 10)) == [numbered(LONGEST // 10)]


def shelf_with(titles: list[str]) -> Shelf:
    pieces = [piece("a", title, f"{title} {i}. " + numbered(30)) for i, title in enumerate(titles)]
    return shelves(pieces, 0)["train"]


def test_exemplars_are_from_other_works_where_there_are_any():
    shelf = shelf_with(["x", "x", "x", "y", "y", "z"])
    (writer,) = shelf.writers
    source = shelf.sources[writer][0]
    for seed in range(50):
        two = draw_sources(shelf, random.Random(seed), source, 2)
        assert two is not None
        assert sorted(other.title for other in two) == ["y", "z"]  # each work once first
    three = draw_sources(shelf, random.Random(0), source, 3)
    assert three is not None
    assert sorted(other.title for other in three) == ["y", "y", "z"]
    assert draw_sources(shelf, random.Random(0), source, 4) is None


def test_exemplars_of_one_work_are_from_other_sources():
    shelf = shelf_with(["x"] * 4)
    (writer,) = shelf.writers
    first, second, *_ = shelf.sources[writer]
    for seed in range(20):
        drawn = draw_sources(shelf, random.Random(seed), first, 2, [second])
        assert drawn is not None
        assert {other.number for other in drawn} == {2, 3}
    assert draw_exemplars(shelf, random.Random(0), first, 3, [second]) is None


def test_exemplars_have_the_length_asked_for():
    shelf = replace(shelf_with(["x", "y", "z"]), lengths=Lengths(exemplar=(60, 80)))
    source = shelf.sources["d", "a"][0]
    for seed in range(30):
        texts = draw_exemplars(shelf, random.Random(seed), source, 2)
        assert texts is not None
        assert all(55 <= len(text.split()) <= 85 for text in texts)


def test_an_empty_shelf_has_no_writer():
    assert draw_writer(shelf_with(["x"]), random.Random(0)) == ("d", "a")
    with pytest.raises(InputError, match="the split ood has no writers"):
        draw_writer(Shelf("ood", {}, {}), random.Random(0))
