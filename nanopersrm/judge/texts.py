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
    text = text.replace("\r\n", "\n").replace("\r", "\n")
    return [part.strip() for part in DIVIDER.split(text) if part.strip()]


def decode(data: bytes, place: str) -> str:
    """UTF-8 bytes -> text; what is not text is named with its place."""
    data = data.removeprefix(b"\xef\xbb\xbf")  # a byte-order mark
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        line = data[: error.start].count(b"\n") + 1
        raise InputError(
            f"{place}, line {line}: expected UTF-8 text, found byte 0x{data[error.start]:02x}"
        ) from error
    if "\0" in text:
        line = text[: text.index("\0")].count("\n") + 1
        raise InputError(f"{place}, line {line}: expected text, found a zero byte")
    return text


def read_file(path: Path) -> str:
    """The text of one file, line ends as \\n, not empty."""
    try:
        data = path.read_bytes()
    except FileNotFoundError as error:
        raise InputError(f"{path}: no such file") from error
    except IsADirectoryError as error:
        raise InputError(f"{path}: expected a file, found a folder") from error
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({reason(error)})") from error
    text = decode(data, str(path)).replace("\r\n", "\n").replace("\r", "\n")
    if not text.strip():
        raise InputError(f"{path}: expected a text, found an empty file")
    return text


def _files(folder: Path) -> list[Path]:
    try:
        inside = sorted(folder.iterdir())
        return [file for file in inside if file.suffix.lower() in SUFFIXES and file.is_file()]
    except OSError as error:
        raise InputError(f"{folder}: cannot be read ({reason(error)})") from error


def expand(names: Sequence[str | Path], flag: str = "") -> list[Path]:
    """Files as they are; a folder becomes the text files in it, by name.

    An empty name, of a shell variable that is not set, is refused: it would be the current folder.
    """
    files: list[Path] = []
    for name in names:
        if name == "":
            raise InputError(f"{flag}: expected a file or a folder, got an empty name")
        path = Path(name)
        if not os.path.isdir(path):  # Path.is_dir raises when a text stands for a name
            files.append(path)
        elif inside := _files(path):
            files += inside
        else:
            raise InputError(f"{path}: expected .txt or .md files in this folder, found none")
    return files


def read_texts(names: Sequence[str | Path], flag: str = "") -> list[str]:
    """All texts of these files and folders, in order."""
    texts: list[str] = []
    for file in expand(names, flag):
        parts = split_texts(read_file(file))
        if not parts:
            raise InputError(f"{file}: expected a text, found only dividing lines")
        texts += parts
    return texts


def read_question(value: str, flag: str) -> str:
    """A text, or the name of a file that holds it: a single word that ends like a file is one."""
    names_file = value.endswith(SUFFIXES) and len(value.split()) == 1
    text = read_file(Path(value)) if names_file or os.path.isfile(value) else value
    if not text.strip():
        raise InputError(f"{flag}: expected a text or a file, got an empty text")
    return text.strip()


def read_standard_input(wanted: str, say: Callable[[str], None] = print) -> list[str]:
    """All texts of a pipe, or typed in after a hint; wanted: what they are."""
    expected = f"expected {wanted}, a line --- between two"
    if sys.stdin is None:
        raise InputError(f"standard input: closed, {expected}")
    if sys.stdin.isatty():
        say(f"Paste the {wanted}, a line --- between two. End with Ctrl-D on a line of its own.")
    try:
        data = sys.stdin.buffer.read()
    except OSError as error:
        raise InputError(f"standard input: cannot be read ({reason(error)}), {expected}") from error
    texts = split_texts(decode(data, "standard input"))
    if not texts:
        raise InputError(f"standard input: {expected}, found none")
    return texts
