"""Texts as people have them, and one clear line for each thing that is no text."""

import os
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nanopersrm import InputError
from nanopersrm.judge.texts import (
    decode,
    paths,
    read_file,
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


@settings(deadline=None)
@given(st.lists(st.text(alphabet="ab .\n-é", min_size=1), max_size=5))
def test_no_text_is_lost(parts):
    parts = [p.strip() for p in parts if p.strip() and "---" not in p]
    for divider in ("\n---\n", "\r\n---\r\n", "\n\n --- \n"):
        assert split_texts(divider.join(parts)) == parts


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
@given(st.text(alphabet=st.characters(exclude_characters="\0\ufeff", exclude_categories=["Cs"])))
def test_text_comes_through(text):
    assert decode(text.encode(), "here") == text
    assert decode(BOM + text.encode(), "here") == text


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
    ("name", "message"),
    [
        ("gone.txt", ": no such file"),
        ("gone/a.txt", ": no such file"),
        ("zero.txt/a.txt", ": cannot be read (Not a directory)"),
        ("a whole text in place of a name " * 10, ": cannot be read (File name too long)"),
        ("nothing", f": {NO_TEXTS}"),
        ("pictures", f": {NO_TEXTS}"),
        ("empty.txt", ": expected a text, found an empty file"),
        ("mark.txt", ": expected a text, found an empty file"),
        ("blank.txt", ": expected a text, found an empty file"),
        ("lines.txt", ": expected a text, found only dividing lines"),
        ("latin.txt", ", line 2: expected UTF-8 text, found byte 0xe4"),
        ("zero.txt", ", line 1: expected text, found a zero byte"),
    ],
)
def test_what_cannot_be_read_is_one_clear_line(name, message, tmp_path):
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
    assert str(caught.value) == f"{tmp_path / name}{message}"


def test_a_folder_is_no_file(tmp_path):
    with pytest.raises(InputError) as caught:
        read_file(tmp_path)
    assert str(caught.value) == f"{tmp_path}: expected a file, found a folder"


def test_one_bad_file_in_a_folder_is_named(tmp_path):
    (tmp_path / "a.txt").write_text("A.")
    (tmp_path / "b.txt").write_text("")
    with pytest.raises(InputError, match=r"b\.txt: expected a text"):
        read_texts([tmp_path])


def test_an_empty_name_is_not_the_current_folder():
    assert paths(["a.txt", ".", " "], "--exemplar") == [Path("a.txt"), Path("."), Path(" ")]
    for names in ([""], ["a.txt", ""]):
        with pytest.raises(InputError) as caught:
            paths(names, "--exemplar")
        assert str(caught.value) == "--exemplar: expected a file or a folder, got an empty name"


def test_standard_input_that_cannot_be_read(monkeypatch):
    monkeypatch.setattr(sys, "stdin", None)  # as Python has it after <&-
    with pytest.raises(InputError) as caught:
        read_standard_input("candidates")
    expected = "expected candidates, a line --- between two"
    assert str(caught.value) == f"standard input: closed, {expected}"
    place = os.open(os.devnull, os.O_WRONLY)
    with open(place, encoding="utf-8") as written:
        monkeypatch.setattr(sys, "stdin", written)
        with pytest.raises(InputError) as caught:
            read_standard_input("candidates")
    said = "standard input: cannot be read (Bad file descriptor)"
    assert str(caught.value) == f"{said}, {expected}"


def test_a_folder_whose_files_cannot_be_asked_about(tmp_path, monkeypatch):
    """A folder that may be listed but not entered (r without x)."""
    (tmp_path / "a.txt").write_text("A.")

    def refuses(path: Path) -> bool:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(Path, "is_file", refuses)
    with pytest.raises(InputError) as caught:
        read_texts([tmp_path])
    assert str(caught.value) == f"{tmp_path}: cannot be read (Permission denied)"
