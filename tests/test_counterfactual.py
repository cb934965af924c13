"""Counterfactual: where a score comes from, and that only the number in the prompt changes."""

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import tyro
from test_answer import make_base
from test_judge_adapter import make_adapter

from data.build import demo_pairs
from nanopersrm import counterfactual, trained
from nanopersrm.bases import Base
from nanopersrm.counterfactual import answers, said, scores
from nanopersrm.fusion import NGRAMS, STYLE, Fusion
from nanopersrm.judge import Judge
from nanopersrm.judgement import JudgeConfig
from nanopersrm.pairs import Pair, write
from nanopersrm.style import Style
from nanopersrm.weights import load

FUSED = Fusion({NGRAMS: 2.0, STYLE: 1.0}, {NGRAMS: 0.0, STYLE: 0.0}, 1.0, 0.5)


@pytest.fixture(scope="module")
def pairs() -> list[Pair]:
    return demo_pairs(seed=3, pairs=20)


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Base:
    return make_base(tmp_path_factory.mktemp("counterfactual") / "smollm", "smollm")


def fused_adapter(folder: Path, base: Base, **changed: object) -> Path:
    """An adapter whose prompts show a chance by all instruments."""
    make_adapter(folder, base, **changed)
    style = Style.load(folder / "style", load(base, torch.float32, torch.device("cpu")))
    style.fusion = FUSED
    style.save(folder / "style", base.name)
    return folder


@pytest.fixture(scope="module")
def folder(base, tmp_path_factory) -> Path:
    return fused_adapter(tmp_path_factory.mktemp("adapter"), base)


@pytest.fixture(scope="module")
def judge(base, folder) -> Judge:
    return Judge.load(base.path, folder, dtype="fp32")


def test_the_table_of_the_docstring():
    found = answers([10, 50, 90], [[3, 5, 7], [4, 6, 8]])
    assert found.scores == [3.5, 5.5, 7.5]
    assert (found.texts, found.follows) == (2, pytest.approx(1))
    shares = found.by_number, found.by_text, found.by_both
    assert shares == pytest.approx((16 / 17.5, 1.5 / 17.5, 0))


@pytest.mark.parametrize(
    ("table", "shares", "follows"),
    [
        ([[1, 5, 9], [1, 5, 9]], (1, 0, 0), 1),  # repeats the number
        ([[9, 5, 1], [9, 5, 1]], (1, 0, 0), -1),  # the wrong way round
        ([[2, 2, 2], [7, 7, 7]], (0, 1, 0), None),  # deaf to it
        ([[1, 5, 9], [9, 5, 1]], (0, 0, 1), None),  # the number means the opposite beside the other
        ([[4, 4, 4], [4, 4, 4]], (None, None, None), None),
        ([[1, 9, 5]], (1, 0, 0), 0.5),  # the middle and the last are swapped
    ],
)
def test_where_a_score_comes_from(table, shares, follows):
    found = answers([10, 50, 90], table)
    told = (found.by_number, found.by_text, found.by_both)
    assert told == (pytest.approx(shares) if None not in shares else shares)
    assert found.follows == (None if follows is None else pytest.approx(follows))
    assert (counterfactual.NONE in said(found)) == (shares[0] is None)


def test_equal_scores_share_their_rank():
    """Ranks 0 to 3 and 0, 1.5, 1.5, 3: r = 4.5 / √(5 · 4.5)."""
    found = answers([1, 2, 3, 4], [[3, 5, 5, 8]])
    assert found.follows == pytest.approx(4.5 / (5 * 4.5) ** 0.5)


def test_only_the_number_differs(judge, pairs, monkeypatch):
    shown: list[str] = []
    chat = judge.tokenizer.chat

    def listening(turns, *rest, **named):
        shown.append(turns[1]["content"])
        return chat(turns, *rest, **named)

    monkeypatch.setattr(judge.tokenizer, "chat", listening)
    pair = pairs[0]
    found = scores(judge, pair, f" {pair.rejected}\n", (7, 50, 100))
    assert found is not None
    assert len({round(score, 4) for score in found}) == 3
    assert [re.findall(r"(\d+)% likely", text) for text in shown] == [["7"], ["50"], ["100"]]
    assert len({re.sub(r"\d+% likely", "", text) for text in shown}) == 1


def test_with_the_number_that_was_measured_it_is_the_judge(judge, pairs):
    for pair in pairs[:2]:
        near = judge.nearness(pair.exemplars, [pair.chosen])[0]
        asked = JudgeConfig(think=False)
        question = pair.question or None
        judged = judge.judge(pair.exemplars, [pair.chosen], question, config=asked)
        found = scores(judge, pair, pair.chosen, (round(near.chance), 50))
        assert found is not None
        assert found[0] == pytest.approx(judged.scores[0], abs=1e-4)


def asked(*arguments: object) -> int:
    given = [str(one) for one in arguments]
    return counterfactual.run(tyro.cli(counterfactual.Config, args=given))


@pytest.fixture
def file(tmp_path, pairs) -> Path:
    write(path := tmp_path / "pairs.jsonl", pairs)
    return path


def test_the_command(base, folder, file, capsys):
    own = ("--base", base.path, "--adapter", folder, "--pairs", file, "--dtype", "fp32")
    short = (*own, "--limit", 4, "--chances", 5, 60, 95)
    assert asked(*short, "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert found["chances"] == [5, 60, 95]
    assert found["texts"] == 8
    assert found["by_number"] + found["by_text"] + found["by_both"] == pytest.approx(1)
    assert asked(*short) == 0
    page = capsys.readouterr().out
    for chance, score in zip(found["chances"], found["scores"], strict=True):
        assert re.search(rf"^ *{chance} % +{score:.2f}\b", page, re.MULTILINE)
    assert f"{found['by_text']:.0%} by the text" in page


def test_texts_that_do_not_fit_are_left_out_and_counted(base, folder, pairs, tmp_path, capsys):
    long = replace(pairs[0], id="long", twin="", exemplars=("It rained again. " * 4000,))
    write(file := tmp_path / "pairs.jsonl", [long, replace(pairs[1], twin="")])
    own = ("--base", base.path, "--adapter", folder, "--dtype", "fp32", "--chances", 5, 95)
    assert asked(*own, "--pairs", file) == 0
    printed = capsys.readouterr()
    assert "2 texts x 2 numbers" in printed.out
    assert "left out: 2 texts" in printed.err
    write(file, [long])
    assert asked(*own, "--pairs", file) == 2
    assert "expected a pair that fits the context" in capsys.readouterr().err


def test_wrong_use_is_one_line(base, folder, file, tmp_path, capsys):
    own = ("--base", base.path, "--adapter", folder, "--pairs", file, "--dtype", "fp32")
    for arguments, part in (
        (("--chances", 5, 101), "--chances: expected percents from 0 to 100, got 101"),
        (("--chances", 5, 5), "--chances: expected at least 2 different ones"),
        (("--limit", 0), "--limit: expected a number from 1, got 0"),
    ):
        assert asked(*own, *arguments) == 2
        assert part in capsys.readouterr().err
    for name, changed in (("deaf", {"evidence": False}), ("two", {"form": "pairwise"})):
        other = fused_adapter(tmp_path / name, base, **changed)
        assert asked(*own, "--adapter", other) == 2
        assert "expected a judge of one candidate a prompt" in capsys.readouterr().err
    plain = make_adapter(tmp_path / "plain", base)  # instruments, but none in one number
    assert trained.read(plain) is not None
    assert asked(*own, "--adapter", plain) == 2
    assert "shows its chance by all instruments" in capsys.readouterr().err
