"""Disks that are full, and files that are none: one error, and what was written goes on."""

import os
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest
from test_batch import GOOD, ROOT, asked, lines_of
from test_reward import Rule

from nanopersrm import InputError
from nanopersrm.serve import batch
from nanopersrm.serve.batch import Asking, run

LIMITED = """
import resource, sys
from pathlib import Path
sys.path.insert(0, sys.argv[2])
from test_reward import Rule
from nanopersrm.serve.batch import Asking, run
from nanopersrm.command import exit_code
folder = Path(sys.argv[1])
resource.setrlimit(resource.RLIMIT_FSIZE, (700, 700))  # bytes; a record has about 250
ran = lambda: run(Rule, folder / "in.jsonl", folder / "out.jsonl", Asking())
sys.exit(exit_code("x.y", lambda: ran() and None))
"""


@pytest.mark.skipif(os.name == "nt", reason="needs limits")
def test_a_full_disk_is_one_line_and_the_run_goes_on(tmp_path):
    text, out = lines_of(*GOOD), tmp_path / "out.jsonl"
    asked(tmp_path, text)
    full = out.read_bytes()
    out.unlink()
    tests = str(Path(__file__).parent)
    done = subprocess.run(
        [sys.executable, "-c", LIMITED, str(tmp_path), tests],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.stderr == f"x.y: error: {out}: cannot be written (File too large)\n"
    assert done.returncode == 2
    assert out.read_bytes() == full[:700]  # half a record, which the next run knows as such
    tally, _ = asked(tmp_path, text)
    assert (tally.judged, tally.kept) == (5, full[:700].count(b"\n"))
    assert out.read_bytes() == full


@pytest.mark.skipif(os.name == "nt", reason="needs devices")
def test_pipes_and_devices_are_refused_and_not_read_for_ever(tmp_path):
    source, out, pipe = (tmp_path / f"{name}.jsonl" for name in ("in", "out", "pipe"))
    source.write_bytes(lines_of(*GOOD))
    os.mkfifo(pipe)
    zero, closed = tmp_path / "zero.jsonl", tmp_path / "full.jsonl"
    zero.symlink_to("/dev/zero")
    closed.symlink_to("/dev/full")
    for given in ((source, zero), (source, closed), (source, pipe), (pipe, out), (zero, out)):
        with pytest.raises(InputError, match="expected a file, found a pipe or a device"):
            run(Rule, *given, Asking())
    assert not out.exists()


def test_names_that_are_too_long_are_one_line(tmp_path):
    source, out = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_bytes(lines_of(*GOOD))
    for name in (f"{'n' * 300}.jsonl", f"{'n' * 300}/a.jsonl"):
        with pytest.raises(InputError, match=r"jsonl: cannot be read \(File name too long\)"):
            run(Rule, tmp_path / name, out, Asking())
        with pytest.raises(InputError, match=r"jsonl: cannot be written \(File name too long\)"):
            run(Rule, source, tmp_path / name, Asking())
    assert not out.exists()


def test_records_that_hold_less_are_left_alone(tmp_path, monkeypatch):
    """A version before had no `measured`: half a file would have it."""
    asked(tmp_path, lines_of(*GOOD[:2]))
    monkeypatch.setattr(batch, "fields", lambda of: fields(of)[:-1])
    batch._settings.cache_clear()
    with pytest.raises(InputError, match="line 1: was made from another line or with other"):
        asked(tmp_path, lines_of(*GOOD))
    batch._settings.cache_clear()
