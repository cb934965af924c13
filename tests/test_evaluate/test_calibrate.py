"""Calibrate: one factor on the log-odds, found from what was right, written to judge.json, used."""

import math
import random
from dataclasses import replace
from pathlib import Path

import pytest
import tyro
from fake_judge import FakeJudge
from test_answer import make_base
from test_judge import CANDIDATES, EXEMPLARS
from test_judge_adapter import PLAIN, QUICK, make_adapter

from data.build import demo_pairs
from nanopersrm.evaluate import calibrate
from nanopersrm.evaluate.calibrate import error, log_odds, sharpness_of
from nanopersrm.judge import trained
from nanopersrm.judge.judge import Judge
from nanopersrm.judge.judgement import sharpened
from nanopersrm.model.bases import Base
from nanopersrm.pairs import Pair, write


@pytest.fixture(scope="module")
def pairs() -> list[Pair]:
    return demo_pairs(seed=3, pairs=60)


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Base:
    return make_base(tmp_path_factory.mktemp("calibrate") / "smollm", "smollm")


def test_sharpening():
    table = [[0.5, 0.75, 1.0], [0.25, 0.5, 0.5], [0.0, 0.5, 0.5]]
    assert sharpened(table, 1.0) == table
    found = sharpened(table, 2.0)
    assert found[0] == pytest.approx([0.5, 0.9, 1.0])
    assert found[1:] == [[1 - found[0][1], 0.5, 0.5], [0.0, 0.5, 0.5]]
    close = sharpened([[0.5, 0.52], [0.48, 0.5]], 13.7)
    assert close[0][1] == pytest.approx(1 / (1 + math.exp(-13.7 * log_odds(0.52))))
    assert close[1][0] == 1 - close[0][1]
    for p in (1e-300, 0.3):  # powers that vanish keep the order
        assert sharpened([[0.5, p], [1 - p, 0.5]], 1e4)[0][1] < 1e-9
    tiny = sharpened([[0.5, 0.5 - 1e-12], [0.5 + 1e-12, 0.5]], 1e5)
    assert tiny[0][1] == pytest.approx(0.5, abs=1e-6)
    broken = sharpened([[0.5, math.nan], [math.nan, 0.5]], 2.0)
    assert math.isnan(broken[0][1])
    assert math.isnan(broken[1][0])


def test_the_factor_of_the_docstring(pairs):
    """Log-odds of 0.08 and -0.08, right three times of four: 1.1 / 0.08."""
    some = pairs[:40]
    rng = random.Random(0)
    signs = [1] * 30 + [-1] * 10
    rng.shuffle(signs)
    said = [1 / (1 + math.exp(-0.08 * sign)) for sign in signs]
    found = sharpness_of(some, said)
    assert found == pytest.approx(math.log(3) / 0.08, rel=0.15)  # less the ridge of one pair
    assert error(some, said, 1.0) == pytest.approx(0.75 - 0.52, abs=0.001)
    assert error(some, said, found) < 0.03


def calibrated(*arguments: object) -> int:
    return calibrate.run(tyro.cli(calibrate.Config, args=[str(a) for a in arguments]))


class Half(FakeJudge):
    """Right three times of four, and never sure."""

    def __init__(self, pairs: list[Pair], share: float):
        super().__init__()
        self.chosen = {(p.exemplars, p.chosen, p.rejected) for p in pairs}
        self.share, self.made_for = share, None

    def judge(self, exemplars, candidates, *rest, **named):
        said = super().judge(exemplars, ["one", "two"], *rest, **named)
        first = (tuple(exemplars), *candidates) in self.chosen
        right = random.Random(f"{exemplars}{sorted(candidates)}").random() < self.share
        p = 0.51 if first == right else 0.49
        said.preference = [[0.5, p], [1 - p, 0.5]]
        return said


def test_what_is_written(base, pairs, tmp_path, monkeypatch, capsys):
    folder = make_adapter(tmp_path / "adapter", base)
    before = trained.read(folder)
    file = tmp_path / "pairs.jsonl"
    write(file, pairs)
    monkeypatch.setattr(Judge, "load", lambda *_, **__: Half(pairs, 0.8))
    assert calibrated("--adapter", folder, "--pairs", file) == 0
    said = capsys.readouterr().out
    after = trained.read(folder)
    assert before is not None
    assert after is not None
    assert after == replace(before, sharpness=after.sharpness)
    assert 15 < after.sharpness < 60
    assert f"sharpness {after.sharpness:.3g}" in said
    assert calibrated("--adapter", folder, "--pairs", file, "--think-tokens", 8) == 0
    both = trained.read(folder)
    assert both is not None
    assert (both.sharpness, both.sharpness_reasoned) == (after.sharpness, after.sharpness)
    assert sorted(p.name for p in folder.iterdir() if "part" in p.name) == []


def test_who_is_mostly_wrong_is_not_calibrated(base, pairs, tmp_path, monkeypatch, capsys):
    folder = make_adapter(tmp_path / "adapter", base)
    text = (folder / "judge.json").read_text()
    write(file := tmp_path / "pairs.jsonl", pairs)
    monkeypatch.setattr(Judge, "load", lambda *_, **__: Half(pairs, 0.1))
    assert calibrated("--adapter", folder, "--pairs", file) == 2
    assert "right more often than not" in capsys.readouterr().err
    assert (folder / "judge.json").read_text() == text


def test_wrong_use_is_one_line(base, pairs, tmp_path, capsys):
    folder = make_adapter(tmp_path / "adapter", base)
    write(file := tmp_path / "few.jsonl", pairs[:4])
    for arguments, part in (
        (("--limit", 3), "--limit: expected a number from 20, got 3"),
        (("--think-tokens", -1), "--think-tokens: expected a number from 0"),
        ((), "few.jsonl: expected at least 20 pairs, found 4"),
    ):
        assert calibrated("--adapter", folder, "--pairs", file, *arguments) == 2
        assert part in capsys.readouterr().err
    (folder / "judge.json").unlink()
    assert calibrated("--adapter", folder, "--pairs", file) == 2
    assert "expected judge.json" in capsys.readouterr().err


def test_the_judge_uses_it(base, tmp_path: Path):
    """The same scores, other preferences; each way of judging has its own; pairwise has none."""
    plain = Judge.load(base.path, make_adapter(tmp_path / "a", base), dtype="fp32")
    changed = make_adapter(tmp_path / "b", base, sharpness=20.0, sharpness_reasoned=5.0)
    sharp = Judge.load(base.path, changed, dtype="fp32")
    for config, times in ((PLAIN, 20.0), (QUICK, 5.0), (replace(PLAIN, mode="pairwise"), 1.0)):
        one, two = (
            judge.judge(EXEMPLARS, CANDIDATES[:3], config=config) for judge in (plain, sharp)
        )
        assert one.scores == two.scores
        assert one.ranking == two.ranking
        for row, plain_row in zip(two.preference, sharpened(one.preference, times), strict=True):
            assert row == pytest.approx(plain_row, rel=1e-9)
        back = sharp.judge(EXEMPLARS, CANDIDATES[2::-1], config=config)
        assert back.preference == [row[::-1] for row in two.preference[::-1]]
