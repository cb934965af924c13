"""The run's lines and files, its memory, and how it is asked to stop."""

import io
import json
import math
import mmap
import re
import signal
import subprocess
import sys
import threading
from collections import deque
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from nanopersrm import InputError
from nanopersrm.train import runlog
from nanopersrm.train.runlog import RunLog, Stop, clear, commit, memory, span

NUMBERS = {
    "loss": 1.23456,
    "loss_imitation": 1.0,
    "lr": 2e-4,
    "gradient_norm": 0.87,
    "tokens_per_second": 1234.4,
    "memory": 3.0e9,
    "memory_peak": 3.21e9,
}


def new(folder: Path, resumed_at: int | None = None, **config: Any) -> tuple[RunLog, io.StringIO]:
    said = io.StringIO()
    return RunLog(folder, config, resumed_at, Console(file=said)), said


def metrics(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def test_a_line_holds_everything_and_the_file_the_same(tmp_path, monkeypatch):
    now = 0.0
    monkeypatch.setattr(runlog.time, "perf_counter", lambda: now)
    log, said = new(tmp_path)
    log.step(1, 120, "judge", NUMBERS)
    now = 2.5
    log.step(20, 120, "judge", NUMBERS)
    first, second = said.getvalue().splitlines()
    assert second == (
        "judge      20/120  loss   1.2346  imitation   1.0000  lr 2.00e-04  |g|    0.87"
        "      1,234 tok/s    3.21 GB   4m10s left"
    )
    assert first == second.replace(" 20/120", "  1/120").replace(" 4m10s", "     ?")
    assert metrics(tmp_path)[1] == {"step": 20, "phase": "judge", **NUMBERS}


def test_columns_do_not_jump(tmp_path):
    log, said = new(tmp_path)
    for step, loss in enumerate((0.5, -12.25, 99.0, 4321.0, 1e12, -1e12, math.nan, -math.inf), 1):
        numbers = NUMBERS | {"loss": loss, "gradient_norm": abs(loss) * 10}
        if step % 2:
            del numbers["loss_imitation"]
        if step == 3:
            numbers["validation_loss"] = 1.5
        log.step(step, 1000, "style" if step < 4 else "judge", numbers)
    lines = said.getvalue().splitlines()
    assert not any("validation" in line for line in lines)  # that is for the file
    width = len("imitation   1.0000  ")
    at = lines[1].index("imitation")
    wide = [line if "imitation" in line else line[:at] + " " * width + line[at:] for line in lines]
    wide[2:] = lines[2:]  # once it is known, its place is kept: only the first line lacks it
    assert len({len(line) for line in wide}) == 1
    for label in ("loss", "lr", "|g|", "tok/s", "GB", "left"):
        assert len({line.index(label) for line in wide}) == 1, label
    assert "loss     -inf" in lines[7]


def test_parts_of_a_reward_are_for_the_file(tmp_path):
    """The whole is on the line, its parts and the tails of a gap are not."""
    log, said = new(tmp_path)
    aside = {"reward_twin": 0.25, "gap_p99": 0.5, "kl_k1": 0.125, "clip_low": 0.0}
    aside |= {"seconds_drawing": 3.0}
    log.step(1, 2, "rft", {"reward": 1.5, "gap": 0.75, **aside})
    line = said.getvalue()
    assert "reward   1.5000" in line
    assert "gap   0.7500" in line
    assert not any(word in line for word in ("twin", "p99", "kl", "clip", "drawing"))
    (kept,) = metrics(tmp_path)
    assert kept == {"step": 1, "phase": "rft", "reward": 1.5, "gap": 0.75, **aside}


def test_what_is_not_finite_is_null_in_the_file(tmp_path):
    log, _ = new(tmp_path)
    log.step(1, 2, "judge", {"loss": math.nan, "gradient_norm": math.inf, "reward": 1})
    (line,) = metrics(tmp_path)
    assert line == {"step": 1, "phase": "judge", "loss": None, "gradient_norm": None, "reward": 1.0}


def test_without_a_terminal_the_text_is_plain(tmp_path):
    log, said = new(tmp_path)
    long = "[red]no markup[/red] :smile: " + "words " * 60
    log.note(long)
    log.step(1, 2, "[b]", {"loss": 1.0})
    assert said.getvalue().splitlines()[0] == long
    assert "\x1b" not in said.getvalue()
    assert "[b]" in said.getvalue()


def test_the_time_left_is_of_the_last_twenty_steps(tmp_path, monkeypatch):
    now = 0.0
    monkeypatch.setattr(runlog.time, "perf_counter", lambda: now)
    log, said = new(tmp_path)
    for step in range(1, 42):
        now += 100.0 if step <= 21 else 1.0
        log.step(step, 100, "judge", {})
    lines = said.getvalue().splitlines()
    assert lines[20].endswith("2h11m left")  # 79 · 100 s
    assert lines[40].endswith("   59s left")  # 59 · 1 s
    assert isinstance(log.seconds, deque)


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0s"),
        (59.4, "59s"),
        (59.6, "1m00s"),
        (250, "4m10s"),
        (3599.4, "59m59s"),
        (3599.6, "1h00m"),
        (7500, "2h05m"),
        (86399, "23h59m"),
        (86400 * 3 + 4 * 3600, "3d04h"),
    ],
)
def test_spans(seconds, text):
    assert span(seconds) == text


def test_a_resumed_run_has_each_step_once(tmp_path):
    log, _ = new(tmp_path, lr=1.0)
    for step in range(1, 8):
        log.step(step, 10, "judge", {"loss": float(step)})
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"step": 8, "pha')  # killed while it wrote
    log, _ = new(tmp_path, resumed_at=5, lr=1.0)
    for step in range(5, 11):
        log.step(step, 10, "judge", {"loss": -float(step)})
    lines = metrics(tmp_path)
    assert [line["step"] for line in lines] == list(range(1, 11))
    assert [line["loss"] for line in lines] == [1, 2, 3, 4, -5, -6, -7, -8, -9, -10]
    parts = json.loads((tmp_path / "config.json").read_text())["parts"]
    assert [part["from_step"] for part in parts] == [None, 5]


def test_resuming_needs_no_earlier_files(tmp_path):
    log, _ = new(tmp_path / "new", resumed_at=5)
    log.step(5, 10, "judge", {})
    assert [line["step"] for line in metrics(tmp_path / "new")] == [5]


def test_a_fresh_run_does_not_mix_with_another(tmp_path):
    log, _ = new(tmp_path)
    log.step(1, 2, "judge", {"loss": 1.0})
    log.write_replies(1, "a reply")
    with pytest.raises(InputError, match=r"another run: --resume .* --overwrite .* --out"):
        new(tmp_path)
    assert len(metrics(tmp_path)) == 1
    (tmp_path / "mine.txt").write_text("mine")
    clear(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]
    clear(tmp_path)
    new(tmp_path)
    clear(tmp_path / "missing")


@pytest.mark.parametrize("line", ["[1]", "nonsense", '{"phase": "judge"}', '{"step": "x"}', "\xff"])
def test_foreign_metrics_are_one_line(line, tmp_path):
    (tmp_path / "metrics.jsonl").write_bytes(b'{"step": 1}\n' + line.encode("latin1") + b"\n")
    with pytest.raises(InputError, match=r"metrics.jsonl, line 2: expected a JSON object"):
        new(tmp_path, resumed_at=5)


def test_a_folder_that_cannot_be_made(tmp_path):
    (tmp_path / "run").write_text("a file")
    with pytest.raises(InputError, match="run: cannot be written"):
        new(tmp_path / "run")


def test_replies_are_readable_text(tmp_path):
    log, _ = new(tmp_path)
    log.write_replies(120, "<think>\né\n")
    path = tmp_path / "replies" / "step-000120.txt"
    assert path.read_text(encoding="utf-8") == "<think>\né\n"


def test_the_config_says_how_to_run_again(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["train_sft.py", "--out", "a folder"])
    new(tmp_path, out=Path("a folder"), lora={"rank": 16}, limit=math.inf)
    facts = json.loads((tmp_path / "config.json").read_text())
    assert facts["config"] == {"out": "a folder", "lora": {"rank": 16}, "limit": "Infinity"}
    assert facts["parts"][0]["command"] == "python train_sft.py --out 'a folder'"
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\+00:00", facts["parts"][0]["started"])
    assert facts["versions"]["torch"] == torch.__version__
    assert {"commit", "processor", "gpus", "cores", "load"} <= set(facts)


def test_the_commit_says_when_files_differ(tmp_path):
    def git(*words: str) -> str:
        who = ("-c", "user.name=a", "-c", "user.email=a@b", "-c", "commit.gpgsign=false")
        done = subprocess.run(
            ["git", "-C", str(tmp_path), *who, *words], capture_output=True, text=True, check=True
        )
        return done.stdout.strip()

    assert commit(tmp_path) is None
    git("init")
    assert commit(tmp_path) is None  # no commit yet
    (tmp_path / "a.py").write_text("1")
    git("add", "a.py")
    git("commit", "-m", "one")
    (tmp_path / "untracked").write_text("2")
    assert commit(tmp_path) == git("rev-parse", "HEAD")
    (tmp_path / "a.py").write_text("2")
    assert commit(tmp_path) == git("rev-parse", "HEAD") + "+changes"
    (tmp_path / "installed").mkdir()
    assert commit(tmp_path / "installed") is None


def test_memory_grows_with_what_is_held():
    device = torch.device("cpu")
    before, _ = memory(device)
    with mmap.mmap(-1, 64 << 20) as held:  # not from the heap, which may have as much to spare
        held.write(bytes(64 << 20))
        now, highest = memory(device)
    assert now - before > 60e6
    assert highest >= now
    assert memory(device)[0] < now


def test_signals_become_a_flag(capfd):
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    with Stop() as stop:
        assert stop.asked is None
        signal.raise_signal(signal.SIGTERM)
        assert stop.asked == signal.SIGTERM
        signal.raise_signal(signal.SIGINT)
        assert stop.asked == signal.SIGINT
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before
    assert capfd.readouterr().err.count("Ctrl-C again") == 1


def test_handlers_come_back_after_an_error():
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(ZeroDivisionError), Stop():
        raise ZeroDivisionError
    assert signal.getsignal(signal.SIGINT) is before


def test_outside_the_main_thread_nothing_happens():
    found: list[object] = []

    def work() -> None:
        with Stop() as stop:
            found.append(stop.asked)

    before = signal.getsignal(signal.SIGINT)
    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert found == [None]
    assert signal.getsignal(signal.SIGINT) is before
