"""Counterfactual: where a score comes from, and that only the number in the prompt changes."""

import re
from dataclasses import replace
from pathlib import Path

import pytest
import tyro
from fixtures import FUSED, PAIRS, make_adapter, make_base

from nanopersrm.evaluate import counterfactual
from nanopersrm.evaluate.counterfactual import scores, shares
from nanopersrm.judge.judge import Judge
from nanopersrm.judge.judgement import JudgeConfig
from nanopersrm.model.base import Base
from nanopersrm.pairs import write


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Base:
    return make_base(tmp_path_factory.mktemp("counterfactual") / "smollm", "smollm")


@pytest.fixture(scope="module")
def folder(base, tmp_path_factory) -> Path:
    """An adapter whose prompts show a chance by all style evidence."""
    folder = make_adapter(tmp_path_factory.mktemp("adapter"), base)
    reading = Judge.load(base.path, folder, dtype="fp32").reading
    assert reading is not None
    reading.fusion = FUSED
    reading.save(folder / "reading", base.name)
    return folder


@pytest.mark.parametrize(
    ("table", "rest", "chance", "both"),
    [
        ([[3, 5, 7], [4, 6, 8]], 1.5 / 17.5, 16 / 17.5, 0),  # the docstring's
        ([[1, 5, 9], [1, 5, 9]], 0, 1, 0),  # repeats the number
        ([[2, 2, 2], [7, 7, 7]], 1, 0, 0),  # deaf to it
        ([[1, 5, 9], [9, 5, 1]], 0, 0, 1),  # the number means the opposite elsewhere
    ],
)
def test_where_a_score_comes_from(table, rest, chance, both):
    assert shares(table) == pytest.approx({"rest": rest, "chance": chance, "both": both})


def test_only_the_number_differs_from_what_the_judge_asks(base, folder, monkeypatch):
    judge = Judge.load(base.path, folder, dtype="fp32")
    exemplars = f"\n {PAIRS[0].exemplars[0]} ", f" {PAIRS[1].chosen}\n"
    pair = replace(PAIRS[0], exemplars=exemplars, question="Did it rain,  or not?\n")
    shown: list[str] = []
    chat = judge.tokenizer.chat

    def listening(turns, *rest, **named):
        shown.append(turns[1]["content"])
        return chat(turns, *rest, **named)

    monkeypatch.setattr(judge.tokenizer, "chat", listening)
    by_chance = scores(judge, pair, f" {pair.rejected}\n", (7, 50, 99))
    assert by_chance is not None
    assert len({round(score, 4) for score in by_chance}) == 3
    assert [re.findall(r"(\d+)% likely", prompt) for prompt in shown] == [["7"], ["50"], ["99"]]
    ours = {re.sub(r"\d+% likely", "", prompt) for prompt in shown}
    shown.clear()
    judge.judge(pair.exemplars, [pair.rejected], pair.question, config=JudgeConfig(think=False))
    assert len(ours) == 1
    assert ours <= {re.sub(r"\d+% likely", "", prompt) for prompt in shown}


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        (("--limit", 2, "--chances", 5, 60), None),
        (("--chances", 5, 5), "--chances"),
        (("--limit", 1), "--limit"),
        (("--adapter", "none"), "--adapter"),
    ],
)
def test_the_command(base, folder, tmp_path, arguments, word, capsys):
    write(tmp_path / "pairs.jsonl", PAIRS)
    common = ["--base", base.path, "--pairs", tmp_path / "pairs.jsonl", "--dtype", "fp32"]
    common += [] if "--adapter" in arguments else ["--adapter", folder]
    flags = [str(a) for a in (*common, *arguments)]
    code = counterfactual.run(tyro.cli(counterfactual.Config, args=flags))
    out, error = capsys.readouterr()
    if word is None:
        assert code == 0, error
        assert "4 of 4 prompts" in out
    else:
        assert (code, out, error.count("\n")) == (2, "", 1)
        assert word in error
