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
ALONE = ["bench_peers.py"]  # a part of bench_train that runs in a process of its own


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
        (Ending(1, "error: nothing"), 1, "x.y: error: nothing\n"),
        (KeyboardInterrupt(), 130, "x.y: interrupted\n"),
    ],
)
def test_every_end_is_a_line_and_a_code(error, code, line, capsys):
    assert exit_code("x.y", lambda: raising(error)) == code
    assert capsys.readouterr() == ("before\n", line)


def test_ctrl_c_can_say_more(capsys):
    ended = "interrupted; --resume goes on"
    assert exit_code("x.y", lambda: raising(KeyboardInterrupt()), ended) == 130
    assert capsys.readouterr().err == "x.y: interrupted; --resume goes on\n"


@pytest.mark.parametrize(("given", "code"), [(None, 0), (0, 0), (1, 1)])
def test_a_command_that_is_done_gives_its_own_code(given, code, capsys):
    assert exit_code("x.y", lambda: given) == code
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize("error", [ValueError("ours"), OSError("ours"), SystemExit(7)])
def test_what_is_not_expected_is_not_hidden(error):
    with pytest.raises(type(error)) as raised:
        exit_code("x.y", lambda: raising(error))
    assert raised.value is error


def child(main: str, stdout: int) -> subprocess.Popen[str]:
    """A Python process of its own whose command does `main`."""
    program = (
        "import sys, time\n"
        "from nanopersrm.command import exit_code\n"
        f"def main():\n    {main}\n"
        "code = exit_code('x.y', main)\n"
        "assert not {'torch', 'numpy'} & set(sys.modules)\n"
        "sys.exit(code)"
    )
    buffered = {key: value for key, value in os.environ.items() if key != "PYTHONUNBUFFERED"}
    return subprocess.Popen(
        [sys.executable, "-c", program],
        cwd=ROOT,
        env=buffered,
        stdout=stdout,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.mark.parametrize("main", ["print('short')", "print('long' * 100_000)"])
def test_a_reader_that_has_left_is_not_told(main):
    """The short text waits in Python's buffer until the command is done, the long one does not."""
    reader, writer = os.pipe()
    os.close(reader)
    process = child(main, writer)
    os.close(writer)
    _, error = process.communicate(timeout=60)
    assert (process.returncode, error) == (1, "")


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs a device that is full")
@pytest.mark.parametrize(
    "main",
    [
        "print('short')",
        "print('long' * 100_000)",
        "print('flushed', flush=True)",
        "from rich.console import Console; Console().print('styled')",
    ],
)
def test_standard_output_that_is_full_is_a_line(main):
    with open("/dev/full", "w") as full:
        process = child(main, full.fileno())
    _, error = process.communicate(timeout=60)
    said = "x.y: error: standard output: cannot be written (No space left on device)\n"
    assert (process.returncode, error) == (2, said)


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs a device that is full")
def test_another_file_that_is_full_keeps_its_traceback():
    process = child("open('/dev/full', 'w').write('x' * 100_000)", subprocess.DEVNULL)
    _, error = process.communicate(timeout=60)
    assert process.returncode == 1
    assert "standard output" not in error
    assert error.endswith("OSError: [Errno 28] No space left on device\n")


def test_standard_output_that_is_closed_is_nothing_to_flush(monkeypatch):
    monkeypatch.setattr(sys, "stdout", None)
    assert exit_code("x.y", lambda: print("nobody")) == 0


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("a\tb\nc", "a\tb\nc"),
        ("a\x1b[2J\x1b]0;title\x07b\r", "a[2J]0;titleb"),
        ("\x00\x08\x0b\x0c\x1f\x7f\x80\x9b31m\x9f", "31m"),
        ("\xa0é — \u2028 \U0001f600", "\xa0é — \u2028 \U0001f600"),
    ],
)
def test_what_a_terminal_would_obey_is_dropped(text, shown):
    assert printable(text) == shown


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


def commands() -> list[Path]:
    files = [*ROOT.glob("*.py"), *ROOT.glob("nanopersrm/*.py"), *ROOT.glob("data/*.py")]
    found = [file for file in files if '__name__ == "__main__"' in file.read_text("utf-8")]
    return sorted(file for file in found if file.name not in ALONE)


@pytest.mark.parametrize("path", commands(), ids=lambda path: path.name)
def test_every_command_ends_here_under_its_own_name(path):
    name = path.name if path.parent == ROOT else f"{path.parent.name}.{path.stem}"
    tree = ast.parse(path.read_text(encoding="utf-8"))
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call)]
    ended = [call.args[0] for call in calls if ast.unparse(call.func) == "exit_code"]
    assert [ast.literal_eval(word) for word in ended] == [name]
