"""Texts as people have them, and one clear line for each thing that is no text."""

import os
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_bases import refused

from nanopersrm import InputError
from nanopersrm.judge.texts import decode, read_standard_input, read_texts, split_texts

BOM = b"\xef\xbb\xbf"


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("One.\n---\nTwo.\n", ["One.", "Two."]),
        ("---\nOne.\n---\n---\n\n---\nTwo.\n---", ["One.", "Two."]),
        ("One.\n \t---  \nTwo.", ["One.", "Two."]),
        ("One,\n\nstill one.\n---\nTwo.", ["One,\n\nstill one.", "Two."]),
        ("One --- two.\n----\n-- -\n---x", ["One --- two.\n----\n-- -\n---x"]),
        (" \n---\n\t\n", []),
    ],
)
def test_split_texts(text, parts):
    assert split_texts(text) == parts


@settings(deadline=None)
@given(st.binary())
def test_any_bytes_are_text_or_an_input_error(data):
    try:
        text = data.removeprefix(BOM).decode()
    except UnicodeDecodeError:
        text = "\0"
    if "\0" in text:
        with pytest.raises(InputError, match=r"\Ahere, line \d+: expected .*text, got .*\Z"):
            decode(data, "here")
    else:
        assert decode(data, "here") == text.replace("\r\n", "\n").replace("\r", "\n")


def test_read_texts(tmp_path):
    folder = tmp_path / "texts"
    (folder / "sub.txt").mkdir(parents=True)
    (folder / "sub.txt" / "deep.txt").write_text("Deep.")
    for name, text in (("b.md", "B.\n---\nBB."), ("a.txt", "A."), ("c.pdf", "C."), ("d", "D.")):
        (folder / name).write_text(text)
    other = tmp_path / "other.doc"  # a file that is named is read whatever its ending
    other.write_bytes(BOM + "Früh.\r\nSpät.\r---\rTwo.".encode())
    assert read_texts([other, folder]) == ["Früh.\nSpät.", "Two.", "A.", "B.", "BB."]
    assert read_texts([]) == []


@pytest.mark.parametrize(
    ("name", "data", "reason"),
    [
        ("gone.txt", None, "No such file"),
        ("a whole text in place of a name " * 10, None, "cannot be read"),
        ("pictures", None, "found none"),
        ("mark.txt", BOM, "empty file"),
        ("blank.txt", b" \r\n\t", "empty file"),
        ("lines.txt", b"---\n---\n", "found none"),
        ("latin.txt", BOM + b"a\n\xe4", "line 2: expected UTF-8 text, got byte 0xe4"),
        ("zero.txt", b"a\r\nb\0", "line 2: expected UTF-8 text, got byte 0x00"),
    ],
)
def test_what_cannot_be_read_is_one_clear_line(name, data, reason, tmp_path):
    (tmp_path / "pictures").mkdir()
    (tmp_path / "pictures" / "a.png").write_bytes(b"A")
    if data is not None:
        (tmp_path / name).write_bytes(data)
    refused(lambda: read_texts([tmp_path / name]), str(tmp_path / name), reason)


def test_standard_input_that_cannot_be_read(monkeypatch):
    monkeypatch.setattr(sys, "stdin", None)  # as Python has it after <&-
    with pytest.raises(InputError, match="standard input: closed"):
        read_standard_input(print)
    with open(os.open(os.devnull, os.O_WRONLY), encoding="utf-8") as written:
        monkeypatch.setattr(sys, "stdin", written)
        with pytest.raises(InputError, match="standard input: cannot be read"):
            read_standard_input(print)
