"""A file of lines becomes a file of records: in order, none lost, none twice, whatever happens."""

import gzip
import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from fake_judge import LONG, OTHER, WRITER, RuleJudge

from nanopersrm import InputError
from nanopersrm.judge.judgement import JudgeConfig
from nanopersrm.serve.batch import Settings, Tally, run

ROOT = Path(__file__).parents[2]
with_ray = pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="needs ray")
PAIR: dict[str, Any] = {"id": "p-1", "twin": "", "author": "A", "chosen": "a 7", "rejected": "a 3"}
GOOD: list[dict[str, Any]] = [
    {"exemplars": WRITER, "candidates": ["is a 3", "is a 7"], "question": "Why?", "id": "one"},
    PAIR | {"exemplars": WRITER, "question": ""},
    {"exemplars": OTHER, "prompt": "How?", "chosen": "a 2", "rejected": "a 4", "id": 7},
    {"exemplars": "One text.", "candidates": ["é \u2028 9"], "subset": "chat"},
    PAIR | {"exemplars": WRITER, "chosen": "tie 5", "rejected": "a tie 5"},
]


def lines_of(*records: object) -> bytes:
    """Records as lines; bytes stay as they are."""
    raw = [x if isinstance(x, bytes) else json.dumps(x).encode() for x in records]
    return b"".join(line + b"\n" for line in raw)


def judged(folder: Path, text: bytes, judge: Any = None, **more: Any) -> tuple[Tally, list[Any]]:
    """What comes out of a file with this text."""
    (folder / "in.jsonl").write_bytes(text)
    judge = RuleJudge() if judge is None else judge
    tally = run(lambda: judge, folder / "in.jsonl", folder / "out.jsonl", Settings(**more))
    return tally, [json.loads(line) for line in (folder / "out.jsonl").read_bytes().splitlines()]


def test_every_kind_of_line(tmp_path):
    judge = RuleJudge()
    tally, records = judged(tmp_path, lines_of(*GOOD), judge)
    numbered = [(record["line"], record.get("id")) for record in records]
    assert numbered == [(1, "one"), (2, "p-1"), (3, 7), (4, None), (5, "p-1")]
    assert [record["scores"] for record in records] == [[3, 7], [7, 3], [2, 4], [9], [5, 5]]
    assert [record["verdict"] for record in records] == [1, 0, 1, 0, "tie"]
    right = [record.get("right", "none") for record in records]
    assert right == ["none", True, False, "none", None]
    assert (records[0]["ranking"], records[0]["candidates"][1]["score"]) == ([1, 0], 7)
    assert {"seconds", "replies"} & set(records[0]) == set()
    assert tally == Tally(lines=5, judged=5, pairs=3, right=1.5)
    questions = [question for _, _, question, _ in judge.calls]
    assert questions == ["Why?", None, "How?", None, None]


def test_messages_and_exemplars_for_all_lines(tmp_path):
    judge = RuleJudge()
    prompt = [{"role": "user", "content": "Who?"}]
    chosen = [{"role": "assistant", "content": "a 8"}]
    text = lines_of({"prompt": prompt, "chosen": chosen, "rejected": "a 2"}, {"candidates": "a 1"})
    judged(tmp_path, text, judge, exemplars=WRITER, principles=("Be brief.",))
    assert judge.calls == [
        (WRITER, ["a 8", "a 2"], "Who?", ("Be brief.",)),
        (WRITER, ["a 1"], None, ("Be brief.",)),
    ]


@pytest.mark.parametrize(
    ("bad", "word"),
    [
        (b"{", "JSON object"),
        (b'{"a": "\xff"}', "utf-8"),
        (b'{"a": "\\ud800"}', "JSON object"),
        (b"[" * 100_000, "JSON object"),
        ({}, "either candidates"),
        (GOOD[0] | PAIR, "either candidates"),
        (PAIR | {"exemplars": None}, "exemplar"),
        (GOOD[0] | {"candidates": ["a", " "]}, "candidates[1]"),
        (GOOD[0] | {"candidates": ["a"] * 27}, "1 to 26"),
        (GOOD[0] | {"question": 7}, "question"),
        ({"exemplars": WRITER, "chosen": "a"}, "rejected"),
        (GOOD[1] | {"chosen": ["a", "b"]}, "chosen"),
        (GOOD[1] | {"rejected": LONG}, "fits"),
    ],
    ids=range(13),
)
def test_a_bad_line_does_not_cost_the_others(bad: object, word: str, tmp_path: Path):
    tally, records = judged(tmp_path, lines_of(GOOD[0], bad, GOOD[1]))
    assert [record["line"] for record in records] == [1, 2, 3]
    error = records[1]["error"]
    assert error.startswith("line 2")
    assert word in error
    assert "\n" not in error
    assert len(error) < 200
    assert "scores" not in records[1]
    assert [record["verdict"] for record in records[::2]] == [1, 0]
    assert (tally.judged, tally.bad) == (2, 1)


def test_memory_that_runs_out_costs_one_line(tmp_path):
    class Full(RuleJudge):
        """A judge that a long text is too much for."""

        def judge(self, exemplars: Any, candidates: Any, *more: Any) -> Any:
            if candidates[0] == "long":
                raise RuntimeError("CUDA out of memory. Tried to allocate 20.00 GiB")
            if candidates[0] == "bug":
                raise RuntimeError("shapes do not match")
            return super().judge(exemplars, candidates, *more)

    long = GOOD[0] | {"candidates": ["long", "longer"]}
    tally, records = judged(tmp_path, lines_of(GOOD[0], long, GOOD[1]), Full())
    assert "memory" in records[1]["error"]
    assert (tally.judged, tally.bad) == (2, 1)
    (tmp_path / "out.jsonl").unlink()
    with pytest.raises(RuntimeError, match="shapes"):
        judged(tmp_path, lines_of(GOOD[0] | {"candidates": ["bug", "x"]}), Full())


def test_what_has_no_score_is_neither_a_tie_nor_right(tmp_path):
    tally, (record,) = judged(tmp_path, lines_of(GOOD[1] | {"chosen": "what?"}))
    assert (record["verdict"], record["scores"][0], record["right"]) == ("invalid", None, False)
    assert record["preference"] == [[None, None], [None, 0.5]]
    assert record["ranking"] is None
    assert tally == Tally(lines=1, judged=1, invalid=1, pairs=1, right=0)


def test_blank_lines_line_ends_and_packed_input(tmp_path):
    text = b"\xef\xbb\xbf\r\n  \n" + lines_of(GOOD[0]).replace(b"\n", b"\r\n") + b"\n"
    text += lines_of(GOOD[1])[:-1]  # no line end
    assert [record["line"] for record in judged(tmp_path, text)[1]] == [3, 5]
    source, out = tmp_path / "in.jsonl.gz", tmp_path / "made" / "out.jsonl"
    source.write_bytes(gzip.compress(lines_of(*GOOD)))
    assert run(RuleJudge, source, out, Settings()).judged == 5
    source.write_bytes(source.read_bytes()[:-20])
    with pytest.raises(InputError, match="Compressed"):
        run(RuleJudge, source, out, Settings())


def test_going_on_from_any_byte(tmp_path):
    """Wherever the file was cut, it ends as if nothing had happened, and nothing is done twice."""
    text = lines_of(GOOD[0], b"{", GOOD[1], GOOD[2], GOOD[4])
    whole, _ = judged(tmp_path, text)
    out = tmp_path / "out.jsonl"
    full = out.read_bytes()
    ends = [i + 1 for i, byte in enumerate(full) if byte == ord("\n")]
    for cut in range(0, len(full) + 1, 7):
        out.write_bytes(full[:cut])
        judge = RuleJudge()
        tally, _ = judged(tmp_path, text, judge)
        assert out.read_bytes() == full
        kept = sum(end <= cut for end in ends)
        assert (replace(tally, kept=0), tally.kept) == (whole, kept)
        assert len(judge.calls) == 5 - kept - (kept < 2)  # the second line is bad


def test_a_longer_input_goes_on_and_nothing_is_loaded_when_all_is_done(tmp_path):
    judged(tmp_path, lines_of(*GOOD[:2]))
    tally, records = judged(tmp_path, lines_of(*GOOD))
    assert (tally.judged, tally.kept, len(records)) == (5, 2, 5)

    def never() -> RuleJudge:
        raise AssertionError("loaded")

    assert run(never, tmp_path / "in.jsonl", tmp_path / "out.jsonl", Settings()).kept == 5


@pytest.mark.parametrize(
    ("text", "more"),
    [
        (lines_of(GOOD[1], GOOD[0]), {}),
        (lines_of(GOOD[0]), {}),
        (lines_of(b"", *GOOD[:2]), {}),
        (lines_of(*GOOD[:2]), {"exemplars": WRITER}),
        (lines_of(*GOOD[:2]), {"config": JudgeConfig(think=False)}),
        (lines_of(*GOOD[:2]), {"model": "another"}),
    ],
)
def test_records_of_another_run_are_left_alone(text, more, tmp_path):
    judged(tmp_path, lines_of(*GOOD[:2]))
    before = (tmp_path / "out.jsonl").read_bytes()
    with pytest.raises(InputError, match="line"):
        judged(tmp_path, text, **more)
    assert (tmp_path / "out.jsonl").read_bytes() == before


@pytest.mark.parametrize("text", [b"My only copy.", b'{"id": 1}\n', b"\xff\xfe\n", b"\n"])
def test_a_file_that_is_not_ours_is_left_alone(text: bytes, tmp_path: Path):
    (tmp_path / "out.jsonl").write_bytes(text)
    with pytest.raises(InputError, match="out"):
        judged(tmp_path, lines_of(*GOOD))
    assert (tmp_path / "out.jsonl").read_bytes() == text


def test_refused_names(tmp_path):
    source, out = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_bytes(lines_of(*GOOD))
    (tmp_path / "folder.jsonl").mkdir()
    os.mkfifo(tmp_path / "pipe.jsonl")
    for read, write in (
        (tmp_path / "in.json", out),
        (tmp_path / "none.jsonl", out),
        (tmp_path / "folder.jsonl", out),
        (source, tmp_path / "out.txt"),
        (source, source),
        (source, tmp_path / "folder.jsonl"),
        (source, tmp_path / "pipe.jsonl"),
        (source, source / "out.jsonl"),
    ):
        with pytest.raises(InputError, match=r"expected|cannot be"):
            run(RuleJudge, read, write, Settings())
    assert source.read_bytes() == lines_of(*GOOD)
    assert not out.exists()


def test_what_the_loader_says_is_no_bad_line(tmp_path):
    def broken() -> RuleJudge:
        raise InputError("no such base")

    (tmp_path / "in.jsonl").write_bytes(lines_of(b"{", *GOOD))
    with pytest.raises(InputError, match="no such base"):
        run(broken, tmp_path / "in.jsonl", tmp_path / "out.jsonl", Settings())
    assert len((tmp_path / "out.jsonl").read_bytes().splitlines()) == 1


STUB = """
import resource, sys, time
from pathlib import Path
sys.path.insert(0, sys.argv[2])
from fake_judge import RuleJudge
from nanopersrm.command import exit_code
from nanopersrm.serve.batch import Settings, run
class Slow(RuleJudge):
    def judge(self, *arguments):
        time.sleep(0 if len(self.calls) < 3 else 100)
        return super().judge(*arguments)
folder = Path(sys.argv[1])
judge = Slow() if sys.argv[3] == "slow" else RuleJudge()
if sys.argv[3] == "full":  # a record has about 250 bytes
    resource.setrlimit(resource.RLIMIT_FSIZE, (700, 700))
ran = lambda: run(lambda: judge, folder / "in.jsonl", folder / "out.jsonl", Settings())
sys.exit(exit_code("x.y", lambda: ran() and None))
"""


@pytest.mark.parametrize("end", ["slow", "full"])
def test_a_killed_run_and_a_full_disk_go_on(end, tmp_path):
    """SIGKILL while a judge is at work, or no room for more than half a record."""
    text, out = lines_of(*GOOD * 3), tmp_path / "out.jsonl"
    judged(tmp_path, text)
    full = out.read_bytes()
    out.unlink()
    command = [sys.executable, "-c", STUB, str(tmp_path), str(Path(__file__).parent), end]
    process = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True)
    if end == "slow":
        until = time.monotonic() + 60
        while time.monotonic() < until and (not out.exists() or out.read_bytes().count(b"\n") < 3):
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
    _, error = process.communicate(timeout=60)
    if end == "slow":
        assert process.returncode == -signal.SIGKILL
        assert out.read_bytes() == b"".join(full.splitlines(keepends=True)[:3])
    else:
        assert (process.returncode, error.count("\n")) == (2, 1)
        assert "cannot be written" in error
        assert out.read_bytes() == full[:700]
    judged(tmp_path, text)
    assert out.read_bytes() == full


# judge.py --batch and Ray


def start(*arguments: object, ray: bool = True) -> subprocess.CompletedProcess[str]:
    """judge.py, with Ray on a cluster of this machine alone, of two processors."""
    local = (
        "import runpy, sys; import ray\n"
        "ray.init('local', num_cpus=2, object_store_memory=80 << 20, include_dashboard=False,"
        " log_to_driver=False, logging_level='error')\n"
        f"sys.argv = [{str(ROOT / 'judge.py')!r}, *sys.argv[1:]]\n"
        "runpy.run_path(sys.argv[0], run_name='__main__')"
    )
    script = ["-c", local] if ray else [str(ROOT / "judge.py")]
    command = [sys.executable, *script, *map(str, arguments)]
    env = {**os.environ, "RAY_AUTH_MODE": "disabled", "PYTHONPATH": str(ROOT)}
    return subprocess.run(command, capture_output=True, text=True, timeout=300, env=env)


@pytest.mark.slow
@with_ray
def test_two_workers_write_what_one_process_writes(base, tmp_path):
    source, alone, out = (tmp_path / f"{name}.jsonl" for name in ("in", "alone", "out"))
    source.write_bytes(lines_of(*GOOD * 4, b"[", *GOOD * 4))
    flags = ("--batch", source, "--base", base.path, "--think-lines", 2)
    done = start(*flags, "--out", alone, ray=False)
    assert done.returncode == 1, done.stderr
    assert "40 judged, 1 bad" in done.stdout
    assert f"{source}, line 21" in done.stderr
    by_ray = start(*flags, "--out", out, "--ray", 2)
    assert by_ray.returncode == 1, by_ray.stderr
    assert out.read_bytes() == alone.read_bytes()
    assert by_ray.stdout == done.stdout.replace(str(alone), str(out))
    out.write_bytes(b"".join(alone.read_bytes().splitlines(keepends=True)[:30]) + b'{"line": 31')
    again = start(*flags, "--out", out, "--ray", 2)
    assert "30 of them before" in again.stdout, again.stderr
    assert out.read_bytes() == alone.read_bytes()
    lost = start(*flags[:2], "--base", "nowhere", "--out", tmp_path / "lost.jsonl", "--ray", 2)
    assert lost.returncode == 2, lost.stderr
    assert "nowhere" in lost.stderr
    assert "Traceback" not in lost.stderr
