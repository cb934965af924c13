"""Texts as people have them: files, folders, several texts in one file, standard input.

A folder gives each `.txt` and `.md` file in it, by name. A file with lines of three dashes (`---`)
holds several texts. Everything must be UTF-8 text and not empty; what is not is named with file and
place.
"""

import os
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from nanopersrm import InputError
from nanopersrm.files import reason

DIVIDER = re.compile(r"^[ \t]*---[ \t]*$", re.MULTILINE)
SUFFIXES = (".txt", ".md")


def split_texts(text: str) -> list[str]:
    """One text, or several divided by lines of three dashes; blank ones are dropped.

    >>> split_texts("One.\\n---\\nTwo.\\n")
    ['One.', 'Two.']
    """
    return [part.strip() for part in DIVIDER.split(text) if part.strip()]


def decode(data: bytes, place: str) -> str:
    """UTF-8 bytes -> text, line ends as \\n; what is not text is named with its place."""
    data = data.removeprefix(b"\xef\xbb\xbf")  # a byte-order mark
    text, bad = "", data.find(b"\0")
    try:
        text = data.decode()
    except UnicodeDecodeError as error:
        bad = error.start
    if bad >= 0:
        line = data[:bad].count(b"\n") + 1
        raise InputError(f"{place}, line {line}: expected UTF-8 text, got byte 0x{data[bad]:02x}")
    return text.replace("\r\n", "\n").replace("\r", "\n")


def read_file(path: Path) -> str:
    """The text of one file, line ends as \\n, not empty."""
    try:
        text = decode(path.read_bytes(), str(path))
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({reason(error)})") from error
    if not text.strip():
        raise InputError(f"{path}: expected a text, got an empty file")
    return text


def expand(names: Sequence[str | Path], flag: str = "") -> list[Path]:
    """Files as they are; a folder becomes the text files in it, by name."""
    files: list[Path] = []
    for name in names:
        if name == "":  # of a shell variable that is not set; it would be the current folder
            raise InputError(f"{flag}: expected a file or a folder, got an empty name")
        path = Path(name)
        if not os.path.isdir(path):  # Path.is_dir raises when a text stands for a name
            files.append(path)
            continue
        try:
            inside = [f for f in sorted(path.iterdir()) if f.suffix.lower() in SUFFIXES]
        except OSError as error:
            raise InputError(f"{path}: cannot be read ({reason(error)})") from error
        inside = [file for file in inside if file.is_file()]
        if not inside:
            raise InputError(f"{path}: expected .txt or .md files in this folder, found none")
        files += inside
    return files


def read_texts(names: Sequence[str | Path], flag: str = "") -> list[str]:
    """All texts of these files and folders, in order."""
    files = expand(names, flag)
    return [text for file in files for text in _several(read_file(file), str(file))]


def _several(text: str, place: str) -> list[str]:
    texts = split_texts(text)
    if not texts:
        raise InputError(f"{place}: expected texts, a line --- between two, found none")
    return texts


def read_question(value: str, flag: str) -> str:
    """A text, or the name of a file that holds it: a single word that ends like a file is one."""
    names_file = value.endswith(SUFFIXES) and len(value.split()) == 1
    text = read_file(Path(value)) if names_file or os.path.isfile(value) else value
    if not text.strip():
        raise InputError(f"{flag}: expected a text or a file, got an empty text")
    return text.strip()


def read_standard_input(say: Callable[[str], None]) -> list[str]:
    """All candidates of a pipe, or typed in after a hint."""
    if sys.stdin is None:
        raise InputError("standard input: closed, expected candidates")
    if sys.stdin.isatty():
        say("Paste the candidates, a line --- between two. End with Ctrl-D on a line of its own.")
    try:
        data = sys.stdin.buffer.read()
    except OSError as error:
        raise InputError(f"standard input: cannot be read ({reason(error)})") from error
    return _several(decode(data, "standard input"), "standard input")
