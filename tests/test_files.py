"""Files that are whole or not there."""

import errno
import json
import os

import pytest

from nanopersrm import InputError
from nanopersrm.files import put, reason, sha256_of, write_json, write_text


def test_a_text_is_replaced_whole(tmp_path, monkeypatch):
    path = tmp_path / "deeper" / "note.txt"
    write_text(path, "one\n")
    assert path.read_bytes() == b"one\n"
    write_json(path.with_name("note.json"), {"a": [1, "é"]})
    assert json.loads(path.with_name("note.json").read_text(encoding="utf-8")) == {"a": [1, "é"]}
    with pytest.raises(ValueError, match="float"):
        write_json(path.with_name("bad.json"), {"loss": float("nan")})

    def full(number: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(InputError, match=r"note\.txt.*No space"):
        write_text(path, "two\n")
    assert path.read_text() == "one\n"
    assert sorted(file.name for file in path.parent.iterdir()) == ["note.json", "note.txt"]
    with pytest.raises(InputError, match="cannot be written"):
        write_text(path / "below.txt", "in a file")


def test_only_the_right_bytes_get_the_name(tmp_path):
    (tmp_path / "source").write_bytes(b"abc")
    right = sha256_of(tmp_path / "source")
    assert put([b"a", b"bd"], tmp_path / "copy", right) != right
    assert not (tmp_path / "copy").exists()
    assert put([b"a", b"bc"], tmp_path / "copy", right) == right
    assert (tmp_path / "copy").read_bytes() == b"abc"
    assert len(list(tmp_path.iterdir())) == 2


def test_a_reason_is_one_line():
    assert reason(OSError(errno.EACCES, "Permission denied", "a.txt")) == "Permission denied"
    assert reason(ValueError("two\n  lines")) == "two lines"
