"""Two workers of Ray write what one process writes, byte for byte.

Needs Ray (2.60.0 when this was written), which the extra `test` brings. It takes a minute, and
minutes on a crowded machine, in processes of its own, so that nothing of Ray is left behind.
"""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
from fixtures import make_base
from test_batch import GOOD, ROOT, lines_of
from test_reward import Rule

from nanopersrm import InputError
from nanopersrm.serve.batch import Asking
from nanopersrm.serve.spread import spread

with_ray = pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="needs ray[data]")


def test_without_ray_it_says_what_to_install(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"--ray: expected the library ray: pip install 'ray"):
        next(spread(Rule, [(1, b"{}")], Asking(), 2))
    with pytest.raises(InputError, match="--ray: expected a number of workers from 1, got -1"):
        next(spread(Rule, [(1, b"{}")], Asking(), -1))


def test_nothing_to_do_starts_nothing(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name)
    assert list(spread(Rule, [], Asking(), 2)) == []
    assert "ray" not in sys.modules


def start(*arguments: object) -> subprocess.CompletedProcess[str]:
    """judge.py on a cluster of this machine alone, of two processors."""
    local = (
        "import runpy, sys; import ray\n"
        "ray.init('local', num_cpus=2, object_store_memory=80 << 20, include_dashboard=False,"
        " log_to_driver=False, logging_level='error')\n"
        f"sys.argv = [{str(ROOT / 'judge.py')!r}, *sys.argv[1:]]\n"
        "runpy.run_path(sys.argv[0], run_name='__main__')"
    )
    return subprocess.run(
        [sys.executable, "-c", local, *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "RAY_AUTH_MODE": "disabled"},
    )


@pytest.mark.slow
@with_ray
def test_two_workers_write_what_one_process_writes(tmp_path: Path):
    base = make_base(tmp_path / "smollm", "smollm").path
    source, alone, out = (tmp_path / f"{name}.jsonl" for name in ("in", "alone", "out"))
    source.write_bytes(lines_of(*GOOD * 4, b"[", *GOOD * 4))
    flags = ("--batch", source, "--base", base, "--think-tokens", 8)
    done = subprocess.run(
        [sys.executable, str(ROOT / "judge.py"), *map(str, (*flags, "--out", alone))],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 1, done.stderr
    spread_out = start(*flags, "--out", out, "--ray", 2)
    assert spread_out.returncode == 1, spread_out.stderr
    assert out.read_bytes() == alone.read_bytes()
    assert spread_out.stdout == done.stdout.replace(str(alone), str(out))
    assert f"judge.py: {source}, line 21: expected a JSON object" in spread_out.stderr
    assert "40 judged, 1 bad" in spread_out.stdout
    out.write_bytes(b"".join(alone.read_bytes().splitlines(keepends=True)[:30]) + b'{"line": 31')
    going_on = start(*flags[:-4], "--base", "nowhere", *flags[-2:], "--out", out, "--ray", 2)
    assert going_on.returncode == 2
    assert "was made from another line" in going_on.stderr
    lost = start(*flags[:2], "--base", "nowhere", "--out", tmp_path / "lost.jsonl", "--ray", 2)
    assert lost.returncode == 2, lost.stderr
    assert "judge.py: error: base 'nowhere': expected " in lost.stderr
    assert "Traceback" not in lost.stderr
    again = start(*flags, "--out", out, "--ray", 2)
    assert "(30 of them before)" in again.stdout, again.stderr
    assert out.read_bytes() == alone.read_bytes()
