"""Writings: the three forms in which people have their texts, and what is wrong with a file."""

import gzip
import json
from pathlib import Path
from typing import Any

import pytest

from data.writings import Piece, read_writings
from nanopersrm import InputError

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
    assert read_writings(plant(tmp_path, files) / "mails") == [
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
    assert read_writings(tmp_path / "novels.jsonl") == novels
    blogs = [Piece("Bo", "Emma", 1815, "A text.", "blogs")]
    assert read_writings(tmp_path) == blogs + novels


def test_prompts_and_outputs(tmp_path):
    items = {"u1": [{"prompt": "Say.", "output": "Yes."}, {"prompt": "", "output": "No."}]}
    plant(tmp_path, {"set.json": json.dumps(items)})
    assert read_writings(str(tmp_path / "set.json")) == [
        Piece("u1", "1", None, "Yes.", "set", "Say."),
        Piece("u1", "2", None, "No.", "set", ""),
    ]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"author": None}, "field author: missing"),
        ({"author": 3}, "field author: expected some text, got 3"),
        ({"title": ""}, "field title: expected some text, got ''"),
        ({"text": ["A text."]}, "field text: expected some text, got ['A text.']"),
        ({"question": 1}, "field question: expected some text, got 1"),
        ({"year": "1815"}, "field year: expected a whole number, got '1815'"),
        ({"year": True}, "field year: expected a whole number, got True"),
    ],
)
def test_a_wrong_line_is_named(change: dict[str, Any], said: str, tmp_path: Path):
    lines = json.dumps(LINE) + "\n" + json.dumps(LINE | change)
    file = plant(tmp_path, {"a.jsonl": lines}) / "a.jsonl"
    with pytest.raises(InputError) as error:
        read_writings(file)
    assert str(error.value) == f"{file}, line 2, {said}"


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("a.json", "[1]", "expected a JSON object, got a list"),
        ("a.json", "{}", "expected texts, found none"),
        ("a.json", '{"u": {}}', "author 'u': expected a name and a list"),
        ("a.json", '{"u": ["x"]}', "author 'u', item 1: expected an object"),
        ("a.json", '{"u": [{"prompt": "x"}]}', "author 'u', item 1, field output: missing"),
        ("a.jsonl", "\n", "expected a text a line, found none"),
        ("a.jsonl", "{", "line 1: expected a JSON object"),
        ("a.csv", "x", "expected one folder per writer, .jsonl"),
    ],
)
def test_a_wrong_file_is_named(name: str, text: str, said: str, tmp_path: Path):
    file = plant(tmp_path, {name: text}) / name
    with pytest.raises(InputError) as error:
        read_writings(file)
    assert str(error.value).startswith(str(file))
    assert said in str(error.value)


def test_folders_that_cannot_be_used(tmp_path):
    with pytest.raises(InputError, match="no such file or folder"):
        read_writings(tmp_path / "none")
    with pytest.raises(InputError, match="found none"):
        read_writings(plant(tmp_path / "loose", {"a.txt": "One."}))
    with pytest.raises(InputError, match=r"found both x\.jsonl and anna/"):
        read_writings(plant(tmp_path / "both", {"anna/a.txt": "One.", "x.jsonl": "{}"}))
    twice = {"x.jsonl": json.dumps(LINE), "x.jsonl.gz": ""}
    with pytest.raises(InputError, match=r"x\.jsonl\.gz: the domain 'x' is also in"):
        read_writings(plant(tmp_path / "twice", twice))
    with pytest.raises(InputError, match=r"a\.txt: expected a text, found an empty file"):
        read_writings(plant(tmp_path / "blank", {"anna/a.txt": " \n"}))
