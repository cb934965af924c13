"""How a command ends: with an exit code, and with a line where others print a traceback.

    def run(config: Config) -> int:
        return exit_code("judge.py", lambda: main(config))

    code           when                  on standard error
    0, or main's   it is done            nothing
    1              BrokenPipeError       nothing: the reader has left, as `head` does
    2              InputError            judge.py: error: --question: expected a text or a file, …
    2              a full disk           judge.py: error: standard output: cannot be written (…)
    130            Ctrl-C                judge.py: interrupted
    its own        Ending                train_sft.py: stopped and saved; --resume goes on

130 is 128 + 2, a shell's code for what signal 2, Ctrl-C, has ended. Any other exception is a
mistake of ours and keeps its traceback.

Texts come from strangers, and a terminal obeys some characters instead of showing them: ESC begins
a command that moves the cursor or names the window. `printable` drops them.

What we left out: Ctrl-C while Python still imports torch.
"""

import os
import re
import sys
from collections.abc import Callable
from contextlib import redirect_stdout
from typing import Any, TextIO, cast

from nanopersrm import InputError
from nanopersrm.files import reason

CONTROLS = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")  # all but tab and newline


class Ending(Exception):
    """The command ends here though nothing given was wrong: its exit code, and what it says."""

    def __init__(self, code: int, line: str):
        super().__init__(line)
        self.code = code


class Unwritable(OSError):
    """What a full disk or a broken terminal says of standard output, and of no other file."""


class _Output:
    """Standard output whose errors are `Unwritable`."""

    def __init__(self, file: TextIO):
        self.file = file

    def __getattr__(self, name: str) -> Any:
        return getattr(self.file, name)

    def write(self, text: str) -> int:
        return self._tried(lambda: self.file.write(text))

    def flush(self) -> None:
        self._tried(self.file.flush)

    def _tried(self, act: Callable[[], Any]) -> Any:
        try:
            return act()
        except BrokenPipeError:
            raise
        except OSError as error:
            raise Unwritable(reason(error)) from error


def printable(text: str) -> str:
    """Without what moves a terminal: the control characters (C0, DEL, C1) but tab and newline.

    >>> printable("a\\x1b[2Jb\\n")
    'a[2Jb\\n'
    """
    return CONTROLS.sub("", text)


def exit_code(name: str, main: Callable[[], int | None], interrupted: str = "interrupted") -> int:
    """Run `main`; gives the exit code: what it returns, 0 for None, or that of how it ended.

    name: begins every line on standard error. interrupted: what to say after Ctrl-C.
    """
    try:
        if sys.stdout is None:  # closed, as a daemon's: print does nothing
            return main() or 0
        with redirect_stdout(cast(TextIO, _Output(sys.stdout))) as out:
            code = main() or 0
            out.flush()  # at exit it would be too late to catch that the reader has left
    except InputError as error:
        print(f"{name}: error: {printable(str(error))}", file=sys.stderr)
        return 2
    except Unwritable as error:
        _say_no_more()
        print(f"{name}: error: standard output: cannot be written ({error})", file=sys.stderr)
        return 2
    except Ending as ending:
        print(f"{name}: {ending}", file=sys.stderr)
        return ending.code
    except BrokenPipeError:
        _say_no_more()
        return 1
    except KeyboardInterrupt:
        print(f"{name}: {interrupted}", file=sys.stderr)
        return 130
    return code


def _say_no_more() -> None:
    """Python flushes once more at exit; that must not fail as well."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
