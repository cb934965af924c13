"""Files that are whole or not there."""

import errno
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from nanopersrm import InputError
from nanopersrm.files import hold, reason, write_json, write_text


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_text_is_replaced_whole(tmp_path, monkeypatch):
    path = tmp_path / "deeper" / "note.txt"
    write_text(path, "one\n")
    write_json(path.with_name("note.json"), {"a": [1, "é"]})
    assert json.loads(path.with_name("note.json").read_text(encoding="utf-8")) == {"a": [1, "é"]}

    def full(number):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(InputError, match=r"note.txt: cannot be written \(No space left"):
        write_text(path, "two\n")
    assert path.read_text() == "one\n"
    assert names(path.parent) == ["note.json", "note.txt"]
    with pytest.raises(InputError, match=r"deeper.txt: cannot be written"):
        write_text(path / "deeper.txt", "in a file")


def test_lines_end_alike_everywhere(tmp_path):
    write_text(tmp_path / "note.txt", "one\ntwo\n")
    assert (tmp_path / "note.txt").read_bytes() == b"one\ntwo\n"


def test_a_number_that_is_not_finite_is_not_written(tmp_path):
    with pytest.raises(ValueError, match="Out of range float"):
        write_json(tmp_path / "note.json", {"loss": float("nan")})
    assert names(tmp_path) == []


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (OSError(errno.EACCES, "Permission denied", "a.txt"), "Permission denied"),
        (OSError("no number"), "no number"),
        (ValueError("two\n  lines"), "two lines"),
    ],
)
def test_a_reason_is_one_line(error, said):
    assert reason(error) == said


def test_a_second_process_is_kept_out_until_the_first_ends(tmp_path):
    program = (
        "import sys\nfrom pathlib import Path\nfrom nanopersrm.files import hold\n"
        "hold(Path(sys.argv[1]))\nprint('held', flush=True)\nsys.stdin.read()\n"
    )
    folder = tmp_path / "run"
    first = subprocess.Popen(
        [sys.executable, "-c", program, str(folder)],
        cwd=Path(__file__).parents[1],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert first.stdout is not None
    assert first.stdout.readline() == "held\n"
    with pytest.raises(InputError, match="run: another process is still writing there"):
        hold(folder)
    first.kill()  # no chance to tidy up
    first.wait()
    hold(folder)
    hold(folder)  # a process does not keep itself out
    assert names(folder) == []
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="file: cannot be written"):
        hold(tmp_path / "file")
