"""Texts as people have them, and one clear line for each thing that is no text."""

import os
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nanopersrm import InputError
from nanopersrm.judge.texts import (
    decode,
    read_file,
    read_question,
    read_standard_input,
    read_texts,
    split_texts,
)

BOM = b"\xef\xbb\xbf"


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("One.", ["One."]),
        ("One.\n---\nTwo.\n", ["One.", "Two."]),
        ("---\nOne.\n---\n---\n\n---\nTwo.\n---", ["One.", "Two."]),
        ("One.\r\n---\r\nTwo.\r\n", ["One.", "Two."]),
        ("One.\r---\rTwo.", ["One.", "Two."]),
        ("One.\n \t---  \nTwo.", ["One.", "Two."]),
        ("One,\n\nstill one.\n---\nTwo.", ["One,\n\nstill one.", "Two."]),
        ("One --- two.\n----\n-- -\n---x", ["One --- two.\n----\n-- -\n---x"]),
        ("a\r\nb", ["a\nb"]),
        ("", []),
        (" \n---\n\t\n", []),
        ("---", []),
    ],
)
def test_split_texts(text, parts):
    assert split_texts(text) == parts


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"fine\nb\xe9te\n", "here, line 2: expected UTF-8 text, found byte 0xe9"),
        (b"\xff\xfeO\0n\0e\0", "here, line 1: expected UTF-8 text, found byte 0xff"),
        (b"one\r\ntwo\r\n\xc3", "here, line 3: expected UTF-8 text, found byte 0xc3"),
        (b"surrogate \xed\xa0\x80", "here, line 1: expected UTF-8 text, found byte 0xed"),
        (b"a\nb\n\0c", "here, line 3: expected text, found a zero byte"),
        (b"\0", "here, line 1: expected text, found a zero byte"),
        (BOM + b"a\0", "here, line 1: expected text, found a zero byte"),
        (BOM + b"a\nb\xff", "here, line 2: expected UTF-8 text, found byte 0xff"),
    ],
)
def test_what_is_no_text_is_named_with_its_place(data, message):
    with pytest.raises(InputError) as caught:
        decode(data, "here")
    assert str(caught.value) == message


@settings(deadline=None)
@given(st.binary())
def test_any_bytes_are_text_or_an_input_error(data):
    try:
        text = data.removeprefix(BOM).decode()
    except UnicodeDecodeError:
        text = "\0"
    if "\0" in text:
        with pytest.raises(InputError, match=r"\Ahere, line \d+: expected .*text, found .*\Z"):
            decode(data, "here")
    else:
        assert decode(data, "here") == text


def test_read_file(tmp_path):
    path = tmp_path / "a.txt"
    path.write_bytes(BOM + "Früh.\r\nSpät.\rNie.\n".encode())
    assert read_file(path) == "Früh.\nSpät.\nNie.\n"


def test_read_texts(tmp_path):
    folder = tmp_path / "texts"
    (folder / "sub.txt").mkdir(parents=True)
    (folder / "sub.txt" / "deep.txt").write_text("Deep.")
    for name, text in (("b.md", "B.\n---\nBB."), ("a.txt", "A."), ("c.pdf", "C."), ("d", "D.")):
        (folder / name).write_text(text)
    other = tmp_path / "other.doc"  # a file that is named is read whatever its ending
    other.write_bytes(BOM + b"One.\r\n---\r\nTwo.")
    assert read_texts([folder]) == ["A.", "B.", "BB."]
    assert read_texts([other, folder]) == ["One.", "Two.", "A.", "B.", "BB."]
    assert read_texts([]) == []


NO_TEXTS = "expected .txt or .md files in this folder, found none"


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("gone.txt", "no such file"),
        ("zero.txt/a.txt", "cannot be read"),
        ("a whole text in place of a name " * 10, "cannot be read"),
        ("nothing", "found none"),
        ("pictures", "found none"),
        ("empty.txt", "empty file"),
        ("mark.txt", "empty file"),
        ("blank.txt", "empty file"),
        ("lines.txt", "dividing lines"),
        ("latin.txt", "line 2: expected UTF-8 text"),
        ("zero.txt", "line 1: expected text, found a zero byte"),
    ],
)
def test_what_cannot_be_read_is_one_clear_line(name, reason, tmp_path):
    for folder in ("nothing", "pictures"):
        (tmp_path / folder).mkdir()
    for file, data in (
        ("empty.txt", b""),
        ("mark.txt", BOM),
        ("blank.txt", b" \r\n\t"),
        ("lines.txt", b"---\n---\n"),
        ("latin.txt", b"a\n\xe4"),
        ("zero.txt", b"a\0"),
        ("pictures/a.png", b"A"),
    ):
        (tmp_path / file).write_bytes(data)
    with pytest.raises(InputError) as caught:
        read_texts([tmp_path / name])
    assert str(caught.value).startswith(str(tmp_path / name))
    assert reason in str(caught.value)


def test_a_question_is_a_text_or_a_file(tmp_path):
    (tmp_path / "q.txt").write_text("Why late?\n")
    assert read_question(str(tmp_path / "q.txt"), "--question") == "Why late?"
    for text in ("Why, sir?", "Why?\nReally.", "see q.txt", "long " * 100):
        assert read_question(text, "--question") == text.strip()
    for wrong in (" ", "no/such/question.txt"):
        with pytest.raises(InputError):
            read_question(wrong, "--question")


def test_standard_input_that_cannot_be_read(monkeypatch):
    monkeypatch.setattr(sys, "stdin", None)  # as Python has it after <&-
    with pytest.raises(InputError) as caught:
        read_standard_input("candidates")
    assert "standard input: closed" in str(caught.value)
    place = os.open(os.devnull, os.O_WRONLY)
    with open(place, encoding="utf-8") as written:
        monkeypatch.setattr(sys, "stdin", written)
        with pytest.raises(InputError) as caught:
            read_standard_input("candidates")
    assert "standard input: cannot be read" in str(caught.value)
