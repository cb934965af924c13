"""How a command ends: with an exit code, and with a line where others print a traceback.

    def run(config: Config) -> int:
        return exit_code("judge.py", lambda: main(config))

    code           when                  on standard error
    0, or main's   it is done            nothing
    1              BrokenPipeError       nothing: the reader has left, as `head` does
    2              InputError            judge.py: error: --question: expected a text or a file, …
    130            Ctrl-C                judge.py: interrupted
    its own        Ending                train_sft.py: stopped and saved; --resume goes on

Any other exception is a mistake of ours and keeps its traceback.
"""

import os
import re
import sys
from collections.abc import Callable

from nanopersrm import InputError

CONTROLS = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")  # all but tab and newline


class Ending(Exception):
    """The command ends here though no input was wrong: its exit code, and what it says."""

    def __init__(self, code: int, line: str):
        super().__init__(line)
        self.code = code


def printable(text: str) -> str:
    """Without what moves a terminal: texts come from strangers, and ESC begins a command.

    >>> printable("a\\x1b[2Jb\\n")
    'a[2Jb\\n'
    """
    return CONTROLS.sub("", text)


def exit_code(name: str, main: Callable[[], int | None], interrupted: str = "interrupted") -> int:
    """Run `main`; gives the exit code: what it returns, 0 for None, or that of how it ended.

    name: begins every line on standard error. interrupted: what to say after Ctrl-C.
    """
    try:
        code = main() or 0
        if sys.stdout is not None:  # it is None in a daemon
            sys.stdout.flush()  # at exit it would be too late to catch that the reader has left
        return code
    except InputError as error:
        print(f"{name}: error: {printable(str(error))}", file=sys.stderr)
        return 2
    except Ending as ending:
        print(f"{name}: {ending}", file=sys.stderr)
        return ending.code
    except BrokenPipeError:
        # Python flushes once more at exit; that must not fail as well.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except KeyboardInterrupt:
        print(f"{name}: {interrupted}", file=sys.stderr)
        return 130
