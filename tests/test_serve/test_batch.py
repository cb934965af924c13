"""A file of lines becomes a file of records: in order, none lost, none twice, whatever happens."""

import gzip
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
from test_reward import LONG, OTHER, WRITER, Rule

from nanopersrm import InputError
from nanopersrm.judge.judgement import JudgeConfig
from nanopersrm.serve import batch
from nanopersrm.serve.batch import Asking, Tally, run

ROOT = Path(__file__).parents[2]
PAIR: dict[str, Any] = {
    "id": "p-1",
    "twin": "",
    "author": "A",
    "domain": "letters",
    "split": "test",
}
PAIR |= {"kind": "cross_author", "question": "", "chosen": "a 7", "rejected": "a 3"}
PAIR |= {"chosen_from": "A/1", "rejected_from": "B/2", "weight": 1.0, "meta": {}}
GOOD: list[dict[str, Any]] = [
    {"exemplars": WRITER, "candidates": ["is a 3", "is a 7"], "question": "Why?", "id": "one"},
    PAIR | {"exemplars": WRITER},
    {"exemplars": OTHER, "prompt": "How?", "chosen": "a 2", "rejected": "a 4", "id": 7},
    {"exemplars": "One text.", "candidates": ["é \u2028 9"], "subset": "chat"},
    PAIR | {"exemplars": WRITER, "chosen": "tie 5", "rejected": "a tie 5"},
]
CHAT = [{"role": "user", "content": "Who?"}]
SAID = [{"role": "assistant", "content": "a 8"}]


def lines_of(*records: object) -> bytes:
    """Records as lines; bytes stay as they are."""
    raw = [one if isinstance(one, bytes) else json.dumps(one).encode() for one in records]
    return b"".join(line + b"\n" for line in raw)


def asked(folder: Path, text: bytes, judge: Any = None, **more: Any) -> tuple[Tally, list[Any]]:
    """What comes out of a file with this text."""
    (folder / "in.jsonl").write_bytes(text)
    judge = Rule() if judge is None else judge
    tally = run(lambda: judge, folder / "in.jsonl", folder / "out.jsonl", Asking(**more))
    return tally, [json.loads(line) for line in (folder / "out.jsonl").read_bytes().splitlines()]


def test_every_kind_of_line(tmp_path):
    judge = Rule()
    tally, found = asked(tmp_path, lines_of(*GOOD), judge)
    assert [(one["line"], one.get("id")) for one in found] == [
        (1, "one"),
        (2, "p-1"),
        (3, 7),
        (4, None),
        (5, "p-1"),
    ]
    assert "id" not in found[3]
    assert [one["scores"] for one in found] == [[3, 7], [7, 3], [2, 4], [9], [5, 5]]
    assert [one["verdict"] for one in found] == [1, 0, 1, 0, "tie"]
    assert [one.get("right", "none") for one in found] == ["none", True, False, "none", None]
    assert found[0]["preference"] == [[0.5, 0.25], [0.75, 0.5]]
    assert found[0]["ranking"] == [1, 0]
    assert {"seconds", "replies"} & set(found[0]) == set()
    assert (tally.judged, tally.bad, tally.kept) == (5, 0, 0)
    assert (tally.pairs, tally.right, tally.lines) == (3, 1.5, 5)
    heard = [(exemplars, question) for exemplars, _, question in judge.calls]
    assert heard == [
        (WRITER, "Why?"),
        (WRITER, None),
        (OTHER, "How?"),
        (("One text.",), None),
        (WRITER, None),
    ]
    assert all(judge.held)


def test_messages_and_exemplars_for_all_lines(tmp_path):
    judge = Rule()
    text = lines_of({"prompt": CHAT, "chosen": SAID, "rejected": "a 2"}, {"candidates": ["a 1"]})
    tally, found = asked(tmp_path, text, judge, exemplars=WRITER, principles=("Be brief.",))
    assert found[0]["right"] is True
    assert judge.calls == [(WRITER, ["a 8", "a 2"], "Who?"), (WRITER, ["a 1"], None)]
    assert tally.judged == 2


BAD: list[tuple[object, str]] = [
    (b"{", "line 2: expected a JSON object, found none"),
    (b"[1]", "line 2: expected a JSON object, got a list"),
    (b'{"a": 1e999}', "line 2: expected a JSON object, found none"),
    (b'{"a": "\xff"}', "line 2: expected UTF-8 text"),
    (b'{"a": "\\ud800"}', "line 2: expected text, found half a character"),
    (b"[" * 100_000, "line 2: expected a JSON object, found none"),
    ({}, "line 2: expected either candidates or chosen and rejected, got the fields []"),
    ({"text\x1b[2J\n": 1}, r"got the fields ['text\x1b[2J\n']"),
    (GOOD[0] | PAIR, "line 2: expected either candidates or chosen"),
    (GOOD[0] | {"prompt": "Why?"}, "line 2: expected either question or prompt, got both"),
    ({"candidates": ["x"]}, "line 2, field exemplars: missing, and there is no --exemplar"),
    (PAIR | {"exemplars": None}, "line 2, field exemplars: missing"),
    (PAIR | {"exemplars": []}, "line 2, field exemplars: expected a text or a list of texts"),
    (PAIR | {"exemplars": {"a": "b"}}, "line 2, field exemplars: expected a text or a list"),
    (GOOD[0] | {"candidates": []}, "line 2, field candidates: expected a text or a list"),
    (GOOD[0] | {"candidates": None}, "line 2, field candidates: expected a text or a list"),
    (GOOD[0] | {"candidates": ["a", " "]}, "line 2, field candidates, text 2: expected some text"),
    (GOOD[0] | {"candidates": ["a"] * 27}, "line 2: expected 1 to 26 candidates"),
    (GOOD[0] | {"question": 7}, "line 2, field question: expected a text"),
    ({"exemplars": WRITER, "chosen": "a"}, "line 2, field rejected: missing"),
    (GOOD[1] | {"chosen": ["a", "b"]}, "line 2, field chosen, message 1: expected an object"),
    (GOOD[1] | {"chosen": " "}, "line 2, field chosen: expected some text, got an empty one"),
    (GOOD[1] | {"rejected": LONG}, "line 2: candidate 1: expected a text that fits"),
    (GOOD[0] | {"candidates": ["a", "\0"]}, "line 2, field candidates, text 2: expected a text, f"),
    (
        GOOD[0] | {"exemplars": "a\0b"},
        "field exemplars, text 1: expected a text, found a zero byte",
    ),
    (GOOD[0] | {"question": "a\0b"}, "line 2, field question: expected a text, found a zero byte"),
    (GOOD[1] | {"chosen": "a\0b"}, "line 2, field chosen: expected a text, found a zero byte"),
]


@pytest.mark.parametrize(("bad", "error"), BAD, ids=range(len(BAD)))
def test_a_bad_line_does_not_cost_the_others(bad: object, error: str, tmp_path: Path):
    tally, found = asked(tmp_path, lines_of(GOOD[0], bad, GOOD[1]))
    assert [one["line"] for one in found] == [1, 2, 3]
    assert found[1]["error"].startswith("line 2")
    assert error in found[1]["error"]
    assert "\n" not in found[1]["error"]
    assert len(found[1]["error"]) < 200
    assert "scores" not in found[1]
    assert [one["verdict"] for one in found[::2]] == [1, 0]
    assert (tally.judged, tally.bad, tally.pairs) == (2, 1, 1)


def test_memory_that_runs_out_costs_one_line(tmp_path):
    class Full(Rule):
        """A judge that a long text is too much for."""

        def judge(self, exemplars: Any, candidates: Any, *more: Any) -> Any:
            if candidates[0] == "long":
                raise RuntimeError("CUDA out of memory. Tried to allocate 20.00 GiB")
            if candidates[0] == "bug":
                raise RuntimeError("shapes do not match")
            return super().judge(exemplars, candidates, *more)

    long = GOOD[0] | {"candidates": ["long", "longer"]}
    tally, found = asked(tmp_path, lines_of(GOOD[0], long, GOOD[1]), Full())
    assert found[1]["error"] == "line 2: memory ran out, the texts are too long for it"
    assert (tally.judged, tally.bad) == (2, 1)
    (tmp_path / "out.jsonl").unlink()
    with pytest.raises(RuntimeError, match="shapes"):
        asked(tmp_path, lines_of(GOOD[0] | {"candidates": ["bug", "x"]}), Full())


def test_a_foreign_line_is_not_cut_off(tmp_path):
    """Half a last line is only ours if it has the number and key of the next record."""
    asked(tmp_path, lines_of(GOOD[0]))
    whole = (tmp_path / "out.jsonl").read_bytes()
    for theirs in (
        b'{"line": 9, "text": "mine"}',
        b'{"line": 1, "key": "other"',
        whole[:20] + b"x",
    ):
        (tmp_path / "out.jsonl").write_bytes(theirs)
        with pytest.raises(InputError, match="another line or with other settings"):
            asked(tmp_path, lines_of(GOOD[0]))
        assert (tmp_path / "out.jsonl").read_bytes() == theirs


def test_what_has_no_score_is_neither_a_tie_nor_right(tmp_path):
    tally, found = asked(tmp_path, lines_of(GOOD[1] | {"chosen": "what?"}))
    assert (found[0]["verdict"], found[0]["scores"][0], found[0]["right"]) == (
        "invalid",
        None,
        False,
    )
    assert found[0]["preference"] == [[None, None], [None, 0.5]]
    assert found[0]["ranking"] is None
    assert (tally.pairs, tally.right, tally.judged, tally.invalid) == (1, 0, 1, 1)


def test_blank_lines_and_line_ends(tmp_path):
    text = b"\xef\xbb\xbf\r\n  \n" + lines_of(GOOD[0]).replace(b"\n", b"\r\n") + b"\n"
    text += lines_of(GOOD[1])[:-1]  # no line end
    tally, found = asked(tmp_path, text)
    assert [one["line"] for one in found] == [3, 5]
    assert (tally.judged, tally.bad) == (2, 0)


def test_nothing_to_judge(tmp_path):
    for text in (b"", b"\n \n"):
        tally, found = asked(tmp_path, text)
        assert (tally.judged, tally.bad, found) == (0, 0, [])


def test_packed_input(tmp_path):
    source, out = tmp_path / "in.jsonl.gz", tmp_path / "made" / "out.jsonl"
    source.write_bytes(gzip.compress(lines_of(*GOOD)))
    tally = run(Rule, source, out, Asking())
    assert (tally.judged, tally.lines) == (5, 5)
    source.write_bytes(source.read_bytes()[:-20])
    out.unlink()
    with pytest.raises(InputError, match=r"in.jsonl.gz, line \d: broken gzip data"):
        run(Rule, source, out, Asking())


def test_going_on_from_any_byte(tmp_path):
    """Wherever the file was cut, it ends as if nothing had happened, and nothing is done twice."""
    text = lines_of(GOOD[0], b"{", GOOD[1], GOOD[2], GOOD[4])
    whole, _ = asked(tmp_path, text)
    out = tmp_path / "out.jsonl"
    full = out.read_bytes()
    ends = [i + 1 for i, byte in enumerate(full) if byte == ord("\n")]
    for cut in range(len(full) + 1):
        out.write_bytes(full[:cut])
        judge = Rule()
        tally, _ = asked(tmp_path, text, judge)
        assert out.read_bytes() == full
        kept = sum(end <= cut for end in ends)
        assert replace(tally, kept=0) == whole
        assert tally.kept == kept
        assert len(judge.calls) == 5 - kept - (kept < 2)  # the second line is bad


def test_nothing_is_loaded_when_all_is_done(tmp_path):
    text = lines_of(*GOOD)
    asked(tmp_path, text)

    def never() -> Rule:
        raise AssertionError("loaded")

    tally = run(never, tmp_path / "in.jsonl", tmp_path / "out.jsonl", Asking())
    assert (tally.judged, tally.kept) == (5, 5)


def test_a_longer_input_goes_on(tmp_path):
    asked(tmp_path, lines_of(*GOOD[:2]))
    tally, found = asked(tmp_path, lines_of(*GOOD))
    assert (tally.judged, tally.kept, len(found)) == (5, 2, 5)


@pytest.mark.parametrize(
    ("text", "more", "part"),
    [
        (lines_of(GOOD[1], GOOD[0]), {}, "line 1: was made from another line or with other"),
        (lines_of(GOOD[0], GOOD[2]), {}, "line 2: was made from another line"),
        (lines_of(GOOD[0]), {}, "line 2: a record more than there are lines"),
        (lines_of(b"", *GOOD[:2]), {}, "line 1: was made from another line"),
        (lines_of(*GOOD[:2]), {"exemplars": WRITER}, "line 1: was made from another line"),
        (lines_of(*GOOD[:2]), {"principles": ("Be brief.",)}, "line 1: was made from another"),
        (lines_of(*GOOD[:2]), {"config": JudgeConfig(think=False)}, "line 1: was made from"),
        (lines_of(*GOOD[:2]), {"model": "another"}, "line 1: was made from another line"),
    ],
)
def test_records_of_another_run_are_left_alone(text, more, part, tmp_path):
    asked(tmp_path, lines_of(*GOOD[:2]))
    before = (tmp_path / "out.jsonl").read_bytes()
    with pytest.raises(InputError, match=part):
        asked(tmp_path, text, **more)
    assert (tmp_path / "out.jsonl").read_bytes() == before


@pytest.mark.parametrize(
    "text",
    [b"My only copy.", b"Two\nlines\n", b'{"id": 1}\n', b"{}", b"\xff\xfe\n", b"\n", b'{"line"x'],
)
def test_a_file_that_is_not_ours_is_left_alone(text: bytes, tmp_path: Path):
    (tmp_path / "out.jsonl").write_bytes(text)
    with pytest.raises(InputError, match=r"out.jsonl, line 1: expected a record of this command"):
        asked(tmp_path, lines_of(*GOOD))
    assert (tmp_path / "out.jsonl").read_bytes() == text


def test_refused_names(tmp_path):
    source, out = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_bytes(lines_of(*GOOD))
    (tmp_path / "folder.jsonl").mkdir()
    os.link(source, tmp_path / "same.jsonl")
    for read, wrote, part in (
        (tmp_path / "in.json", out, "expected a .jsonl or .jsonl.gz file"),
        (tmp_path / "none.jsonl", out, "none.jsonl: no such file"),
        (tmp_path / "folder.jsonl", out, "folder.jsonl: expected a file, found a folder"),
        (source, tmp_path / "out.txt", "out.txt: expected a name that ends in .jsonl"),
        (source, tmp_path / "out.jsonl.gz", "expected a name that ends in .jsonl"),
        (source, source, "expected another file than the one that is read"),
        (source, tmp_path / "same.jsonl", "expected another file"),
        (source, tmp_path / "folder.jsonl", "folder.jsonl: expected a file, found a folder"),
        (source, source / "out.jsonl", "out.jsonl: cannot be"),
    ):
        with pytest.raises(InputError, match=part):
            run(Rule, read, wrote, Asking())
    assert source.read_bytes() == lines_of(*GOOD)
    assert not out.exists()


def test_what_the_loader_says_is_no_bad_line(tmp_path):
    def broken() -> Rule:
        raise InputError("no such base")

    (tmp_path / "in.jsonl").write_bytes(lines_of(b"{", *GOOD))
    with pytest.raises(InputError, match="no such base"):
        run(broken, tmp_path / "in.jsonl", tmp_path / "out.jsonl", Asking())
    assert len((tmp_path / "out.jsonl").read_bytes().splitlines()) == 1


def test_a_killed_run_goes_on(tmp_path):
    """SIGKILL while a judge is at work: every record before it is there."""
    slow = (
        "import sys, time; from pathlib import Path; sys.path.insert(0, sys.argv[2])\n"
        "from test_reward import Rule; from nanopersrm.serve.batch import Asking, run\n"
        "class Slow(Rule):\n"
        "    def judge(self, *given):\n"
        "        time.sleep(0.02 if len(self.calls) < 3 else 100)\n"
        "        return super().judge(*given)\n"
        "folder = Path(sys.argv[1])\n"
        "run(Slow, folder / 'in.jsonl', folder / 'out.jsonl', Asking())"
    )
    tests, out = str(Path(__file__).parent), tmp_path / "out.jsonl"
    text = lines_of(*GOOD * 3)
    asked(tmp_path, text)
    full = out.read_bytes()
    out.unlink()
    process = subprocess.Popen([sys.executable, "-c", slow, str(tmp_path), tests], cwd=ROOT)
    end = time.monotonic() + 60
    while time.monotonic() < end and (not out.exists() or out.read_bytes().count(b"\n") < 3):
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    assert process.wait(10) == -signal.SIGKILL
    assert out.read_bytes() == b"".join(full.splitlines(keepends=True)[:3])
    tally, _ = asked(tmp_path, text)
    assert (tally.judged, tally.kept) == (15, 3)
    assert out.read_bytes() == full


def test_it_comes_up_without_torch():
    code = "import sys, nanopersrm.batch; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.strip() == "False", done.stderr
    assert json.dumps({"line": 1}).encode().startswith(batch.BEGINS)
