"""Corpora: the three forms, splits by author, rare names, cuts at ends of sentences, exemplars."""

import gzip
import json
import random
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from data.corpus import (
    LONGEST,
    Corpus,
    Piece,
    assign_splits,
    cut,
    draw_exemplars,
    draw_sources,
    find_rare_names,
    names_in,
    parts,
    quotas,
    read_corpora,
    split_corpora,
    surname,
    unsigned,
)
from nanopersrm import InputError
from nanopersrm.pairs import SPLITS
from nanopersrm.style.text import sentences

EXAMPLES = json.loads(Path(__file__).with_name("examples.json").read_text("utf-8"))
LINE = {"author": "Jane", "title": "Emma", "year": 1815, "text": "A text."}


def plant(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, "utf-8")
    return root


def test_a_folder_per_writer(tmp_path):
    files = {
        "mails/boris/b.md": "Two.\n---\nThree.\n",
        "mails/anna/a.txt": "One.",
        "mails/README.txt": "not a writer",
        "mails/.git/x.txt": "hidden",
        "mails/empty/x.png": "no text",
    }
    assert read_corpora(plant(tmp_path, files) / "mails") == [
        Piece("anna", "a", None, "One.", "mails"),
        Piece("boris", "b", None, "Two.", "mails"),
        Piece("boris", "b", None, "Three.", "mails"),
    ]


def test_json_lines_plain_and_packed(tmp_path):
    later = LINE | {"author": "Walter", "year": None, "question": "Why?", "more": 1}
    plant(tmp_path, {"novels.jsonl": json.dumps(LINE) + "\n\n" + json.dumps(later)})
    packed = gzip.compress(json.dumps({**LINE, "author": "Bo"}).encode())
    (tmp_path / "blogs.jsonl.gz").write_bytes(packed)
    novels = [
        Piece("Jane", "Emma", 1815, "A text.", "novels"),
        Piece("Walter", "Emma", None, "A text.", "novels", "Why?"),
    ]
    assert read_corpora(tmp_path / "novels.jsonl") == novels
    blogs = [Piece("Bo", "Emma", 1815, "A text.", "blogs")]
    assert read_corpora(tmp_path) == blogs + novels


def test_prompts_and_outputs(tmp_path):
    items = {"u1": [{"prompt": "Say.", "output": "Yes."}, {"prompt": "", "output": "No."}]}
    plant(tmp_path, {"set.json": json.dumps(items)})
    assert read_corpora(str(tmp_path / "set.json")) == [
        Piece("u1", "1", None, "Yes.", "set", "Say."),
        Piece("u1", "2", None, "No.", "set", ""),
    ]


@pytest.mark.parametrize(
    ("name", "wrong"), [("author", None), ("title", ""), ("text", ["A."]), ("year", "1815")]
)
def test_a_wrong_line_is_named(name: str, wrong: Any, tmp_path: Path):
    lines = json.dumps(LINE) + "\n" + json.dumps(LINE | {name: wrong})
    file = plant(tmp_path, {"a.jsonl": lines}) / "a.jsonl"
    with pytest.raises(InputError, match=rf"a\.jsonl, line 2, field {name}: "):
        read_corpora(file)


@pytest.mark.parametrize(
    ("files", "name", "key"),
    [
        ({"a.json": "[1]"}, "a.json", "JSON object"),
        ({"a.json": "{}"}, "a.json", "no text"),
        ({"a.json": '{"u": [{"prompt": "x"}]}'}, "a.json", r"field u\[0\]\.output: missing"),
        ({"a.jsonl": "\n"}, "a.jsonl", "no text"),
        ({"a.jsonl": "{"}, "a.jsonl", "line 1"),
        ({"a.csv": "x"}, "a.csv", "folder per writer"),
        ({}, "none", "no text"),
        ({"loose/a.txt": "One."}, "loose", "no text"),
        ({"b/anna/a.txt": "One.", "b/x.jsonl": json.dumps(LINE)}, "b", "got both"),
        ({"t/x.jsonl": json.dumps(LINE), "t/x.jsonl.gz": ""}, "t", "one file a domain"),
        ({"blank/anna/a.txt": " \n"}, "blank", r"a\.txt"),
    ],
)
def test_what_cannot_be_read_is_named(files: dict[str, str], name: str, key: str, tmp_path: Path):
    with pytest.raises(InputError, match=key) as error:
        read_corpora(plant(tmp_path, files) / name)
    assert str(tmp_path / name) in str(error.value)


def piece(author: str, title: str = "t", text: str = "A text.", domain: str = "d") -> Piece:
    return Piece(author, title, None, text, domain)


def numbered(n: int, words: int = 10) -> str:
    """n sentences of so many words, each word with the number of its sentence."""
    return " ".join(" ".join([f"W{i}"] + [f"w{i}"] * (words - 1)) + "." for i in range(n))


MANY = [piece(f"a{i:02}", title) for i in range(40) for title in ("x", "y")]


def test_a_division_depends_on_the_seed_alone():
    splits = assign_splits(MANY, 3)
    assert splits == assign_splits(list(reversed(MANY)), 3)
    assert splits != assign_splits(MANY, 4)
    assert Counter(splits.values()) == {"train": 34, "test": 4, "validation": 2}
    assert [quotas(n) for n in (7, 8, 77)] == [(0, 0), (2, 2), (7, 4)]


def test_whole_domains_are_held_out():
    others = [piece(f"b{i}", domain="e") for i in range(3)] + [piece("a01", domain="e")]
    corpus_of = split_corpora(MANY + others, 0, ["e"])
    assert list(corpus_of) == list(SPLITS)
    assert corpus_of["ood"].writers == [("e", "a01"), ("e", "b0"), ("e", "b1"), ("e", "b2")]
    seen = [author for split in SPLITS for _, author in corpus_of[split].writers]
    assert len(seen) == len(set(seen)) == 43  # nobody is in two splits


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


def test_no_cut_inside_a_quotation():
    text = numbered(3) + ' "He came. He saw. He left again." ' + numbered(3)
    for seed in range(200):
        found = cut(text, 25, random.Random(seed))
        assert found.count('"') % 2 == 0


def test_long_pieces_become_even_parts():
    text = numbered(200) + "\n\n" + numbered(100)
    found = parts(text)
    assert [len(part.split()) for part in found] == [430, 430, 430, 430, 430, 430, 420]
    assert " ".join(" ".join(found).split()) == " ".join(text.split())
    assert parts(numbered(LONGEST // 10)) == [numbered(LONGEST // 10)]


def corpus_with(titles: list[str]) -> Corpus:
    pieces = [piece("a", title, f"{title} {i}. " + numbered(30)) for i, title in enumerate(titles)]
    return split_corpora(pieces, 0)["train"]


def test_exemplars_are_from_other_works_where_there_are_any():
    corpus = corpus_with(["x", "x", "x", "y", "y", "z"])
    (writer,) = corpus.writers
    source = corpus.sources[writer][0]
    for seed in range(50):
        two = draw_sources(corpus, random.Random(seed), source, 2)
        assert two is not None
        assert sorted(other.title for other in two) == ["y", "z"]  # each work once first
    three = draw_sources(corpus, random.Random(0), source, 3)
    assert three is not None
    assert sorted(other.title for other in three) == ["y", "y", "z"]
    assert draw_sources(corpus, random.Random(0), source, 4) is None


def test_exemplars_of_one_work_are_from_other_sources():
    corpus = corpus_with(["x"] * 4)
    (writer,) = corpus.writers
    first, second, *_ = corpus.sources[writer]
    for seed in range(20):
        drawn = draw_sources(corpus, random.Random(seed), first, 2, [second])
        assert drawn is not None
        assert {other.number for other in drawn} == {2, 3}
    assert draw_exemplars(corpus, random.Random(0), first, 4) is None


def test_a_rare_name_is_in_capitals_inside_sentences():
    texts = ["So I met Heathcliff and Mary. Perhaps I'm mad.", "Then Mary went. Never mind."]
    many = [*texts, *["Mary, never, perhaps."] * 8]
    names = find_rare_names([piece(f"a{i}", text=text) for i, text in enumerate(many)])["d"]
    assert names == {"heathcliff"}  # all know Mary; the rest only open sentences
    text = "On a Monday in March I was OBSESSED with DAP. The Reed grew, a reed, the reed."
    other = piece("b", text="So Heathcliff ran.", domain="e")
    assert find_rare_names([piece("a", text=text), other]) == {"d": {"dap"}, "e": {"heathcliff"}}
    assert names_in("Darcy's hat, the reed.", frozenset({"darcy", "reed"})) == {"darcy"}


def test_surnames():
    names = {"Jane Austen": "Austen", "ed-mullen": "Mullen", "Martin King, Jr.": "King"}
    assert {author: surname(author) for author in names} == names
    assert surname("u1") == surname("---") == ""


def test_signatures():
    for text, without in EXAMPLES["signatures"]:
        assert unsigned(text, "Tessa Long") == without
