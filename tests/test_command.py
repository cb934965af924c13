"""How commands end: the code, the line, and which stream it is on."""

import ast
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from nanopersrm import InputError
from nanopersrm.command import Ending, exit_code, printable

ROOT = Path(__file__).resolve().parents[1]


def raising(error: BaseException) -> int:
    """What `main` does, and the words that stood on standard output before."""
    print("before")
    raise error


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (InputError("--limit: expected 2, got 1"), 2, "x.y: error: --limit: expected 2, got 1\n"),
        (InputError("\x1b]0;title\x07 is no base"), 2, "x.y: error: ]0;title is no base\n"),
        (Ending(143, "stopped and saved"), 143, "x.y: stopped and saved\n"),
        (KeyboardInterrupt(), 130, "x.y: interrupted\n"),
    ],
)
def test_every_end_is_a_line_and_a_code(error, code, line, capsys):
    assert exit_code("x.y", lambda: raising(error)) == code
    assert capsys.readouterr() == ("before\n", line)


def test_a_command_that_is_done_gives_its_code(capsys):
    codes = iter((None, 0, 1))
    assert [exit_code("x.y", lambda: next(codes)) for _ in range(3)] == [0, 0, 1]
    assert capsys.readouterr() == ("", "")
    with pytest.raises(ZeroDivisionError):  # a mistake of ours keeps its traceback
        exit_code("x.y", lambda: 1 // 0)


def child(main: str, stdout: int) -> "subprocess.Popen[str]":
    """A command in a process of its own."""
    program = f"import sys, time\nfrom nanopersrm.command import exit_code\ndef main(): {main}\n"
    command = [sys.executable, "-c", program + "sys.exit(exit_code('x.y', main))"]
    return subprocess.Popen(command, cwd=ROOT, stdout=stdout, stderr=subprocess.PIPE, text=True)


@pytest.mark.skipif(os.name == "nt", reason="needs pipes and signals")
def test_a_reader_that_leaves_is_no_traceback():
    read, write = os.pipe()
    process = child("print('long' * 100_000)", write)
    os.close(write)
    os.close(read)
    _, error = process.communicate(timeout=60)
    assert (process.returncode, error) == (1, "")


@pytest.mark.skipif(os.name == "nt", reason="needs signals")
def test_ctrl_c_is_a_line():
    # A shell starts background jobs with Ctrl-C ignored, and children inherit that.
    heed = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler); "
    process = child(heed + "print('ready', flush=True); time.sleep(60)", subprocess.PIPE)
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGINT)
    _, error = process.communicate(timeout=60)
    assert (process.returncode, error) == (130, "x.y: interrupted\n")


def test_what_a_terminal_would_obey_is_dropped():
    assert (
        printable("a\tb\x1b[2J\x1b]0;title\x07b\r\x00\x7f\x80\x9b31m\n") == "a\tb[2J]0;titleb31m\n"
    )
    assert printable("\xa0é — \u2028 \U0001f600") == "\xa0é — \u2028 \U0001f600"


def commands() -> list[Path]:
    files = [*ROOT.glob("*.py"), *ROOT.glob("nanopersrm/**/*.py"), *ROOT.glob("data/**/*.py")]
    return sorted(f for f in files if '__name__ == "__main__"' in f.read_text("utf-8"))


@pytest.mark.parametrize("path", commands(), ids=lambda path: str(path.relative_to(ROOT)))
def test_every_command_ends_here(path):
    tree = ast.parse(path.read_text(encoding="utf-8"))
    names = [ast.unparse(node.func) for node in ast.walk(tree) if isinstance(node, ast.Call)]
    assert {"exit_code", "run"} & {name.split(".")[-1] for name in names}
