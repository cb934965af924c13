"""The exam of a trained adapter, by its command: a line of figures, and the replies in a file."""

import pytest
import tyro
from test_answer import make_base
from test_judge_adapter import make_adapter
from test_train_sft import short_pairs

from data import exam
from nanopersrm.pairs import write

REAL = exam.LessonConfig


@pytest.fixture(scope="module")
def asked(tmp_path_factory) -> list[str]:
    folder = tmp_path_factory.mktemp("exam")
    base = make_base(folder / "smollm", "smollm", 16_384)
    adapter = make_adapter(folder / "adapter", base)
    write(folder / "pairs.jsonl", short_pairs())
    return [
        *("--pairs", str(folder / "pairs.jsonl"), "--adapter", str(adapter)),
        *("--base", str(base.path), "--limit", "4", "--replies", "2"),
    ]


def call(*arguments: str) -> int:
    return exam.run(tyro.cli(exam.Config, args=list(arguments)))


def test_a_line_and_the_replies(asked, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(exam, "LessonConfig", lambda **k: REAL(longest=16_384, **k))
    monkeypatch.setattr("nanopersrm.trial.REPLY_TOKENS", 8)
    assert call(*asked, "--out", str(tmp_path / "replies.txt")) == 0
    said = capsys.readouterr().out
    assert "of 4 validation pairs" in said
    assert "of 2 replies well formed" in said
    page = (tmp_path / "replies.txt").read_text()
    assert page.count("<think>") >= 2
    assert page.count("=" * 80) == 1


def test_a_wrong_folder_is_one_line(asked, tmp_path, capsys):
    assert call(*asked, "--adapter", str(tmp_path)) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert error.startswith("data.exam: error: --adapter ")
