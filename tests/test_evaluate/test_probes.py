"""The probes tell a score that follows from the sum from one that does not."""

import math
import re

import pytest
import torch
import tyro
from fixtures import CANDIDATES, EXEMPLARS, PAIRS, digits_after, make_adapter

from nanopersrm.evaluate import probes
from nanopersrm.evaluate.probes import STEPS, leave, scale, soft_scores, spearman
from nanopersrm.judge.judge import Judge
from nanopersrm.judge.reply import Prompt, prompts_about, spell
from nanopersrm.pairs import write

SUM = re.compile(r" sum ([+-]\d+\.\d)\n</think>\n<scores>A=$")


@pytest.fixture(scope="module")
def judge(base, tmp_path_factory) -> Judge:
    folder = make_adapter(tmp_path_factory.mktemp("probes") / "a", base)
    return Judge.load(str(base.path), folder, dtype="fp32")


@pytest.fixture(scope="module")
def prompt(judge) -> Prompt:
    return prompts_about(judge.tokenizer, judge.measurer, EXEMPLARS, CANDIDATES[2:3])[0]


def by_sum(sign: float, bare: float = 1):
    """What stands in for the model: it scores by the sum in the reply, the more with a greater
    sign; times `bare` where the reply has no line."""

    def scores(judge: Judge, prompt: Prompt, replies: list[list[int]]) -> list[float]:
        texts = [judge.tokenizer.decode(reply) for reply in replies]
        signs = [sign * (bare if text.startswith(".") else 1) for text in texts]
        sums = [float(SUM.findall(text)[0]) for text in texts]
        return [5 + 4 * math.tanh(s * x / 20) for s, x in zip(signs, sums, strict=True)]

    return scores


@pytest.mark.parametrize(
    ("x", "y", "expected"),
    [
        ([1, 2, 3], [-5, 0, 90], 1),
        ([1, 2, 3], [3, 2, 1], -1),
        ([3, 1, 2], [2, 1, 3], 0.5),
        ([1, 2, 3, 4], [1, 1, 2, 2], 4 / math.sqrt(5 * 4)),  # ranks ½ ½ 2½ 2½
        ([1, 2, 3], [7, 7, 7], 0),
    ],
)
def test_spearman_by_hand(x, y, expected):
    assert spearman(x, y) == pytest.approx(expected)


def test_a_score_is_that_of_a_plain_forward(judge, prompt):
    replies = [spell(judge.tokenizer, prompt, names) for names in ((), prompt.menu[:2])]
    digits = [digits_after(judge.model, judge.tokenizer, prompt.ids + ids) for ids in replies]
    expected = [float(p @ torch.arange(1, 10).double()) for p in digits]
    assert soft_scores(judge, prompt, replies) == pytest.approx(expected, abs=1e-4)


def test_only_the_sum_is_moved_and_only_a_line_left_out(judge, prompt, monkeypatch):
    monkeypatch.setattr(probes, "soft_scores", by_sum(1))
    names, lines = [*prompt.menu[:4]], prompt.ledgers[0].lines
    assert scale(judge, prompt, names) == pytest.approx([5 + 4 * math.tanh(x / 20) for x in STEPS])
    whole = prompt.sums(names)[0]
    expected = [
        (decibans, 4 * math.tanh(whole / 20) - 4 * math.tanh((whole - decibans) / 20))
        for decibans in (lines[name].decibans for name in names)
        if abs(decibans) >= 0.5
    ]
    assert len(expected) > 1
    assert leave(judge, prompt, names) == [pytest.approx(both) for both in expected]


@pytest.mark.parametrize(
    ("scores", "row"),
    [
        (by_sum(1), ["1.0000", "1.0000", "0.0000", "100.0%"]),
        (by_sum(1, bare=0), ["0.0000", "0.5000", "0.0000", "100.0%"]),
        (by_sum(0), ["0.0000", "0.0000", "0.0000", "0.0%"]),
        (by_sum(-1), ["-1.0000", "-1.0000", "0.1000", "0.0%"]),
        (soft_scores, None),
    ],
)
def test_the_command(judge, tmp_path, capsys, monkeypatch, scores, row):
    monkeypatch.setattr(Judge, "load", lambda *_, **__: judge)
    monkeypatch.setattr(probes, "soft_scores", scores)
    write(file := tmp_path / "test.jsonl", PAIRS[:2])

    def call(limit: int) -> int:
        arguments = ["--pairs", str(file), "--limit", str(limit), "--think-lines", "3"]
        return probes.run(tyro.cli(probes.Config, args=arguments))

    assert call(2) == 0, capsys.readouterr()
    cells = [line.split("|") for line in capsys.readouterr().out.splitlines()[2:]]
    results, counts = ([line[i].strip() for line in cells] for i in (2, 3))
    assert counts[:3] == ["8"] * 3  # two pairs, two candidates, with no line and with its lines
    assert 0 < int(counts[3]) <= 12
    assert row is None or results == row
    assert all(re.fullmatch(r"-?\d+\.\d+%?", result) for result in results)
    assert call(0) == 2
    assert "--limit" in capsys.readouterr().err
