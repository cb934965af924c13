"""The leak gate inside a build."""

import json
from pathlib import Path

import pytest

from data import build
from data.build import DEMO
from data.drafts import Draft, pair_and_twin
from data.leakgate import Leak
from data.recipe import Config


def test_a_leak_ends_the_build_before_anything_is_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    """The gate's findings are printed, and no set is there that could be trained on."""

    def leaky(sets: object, seed: int) -> None:
        raise Leak("train: leak: length, all: 97.0% of 40 pairs without a look at the exemplars")

    monkeypatch.setattr(build, "gate", leaky)
    out = tmp_path / "pairs"
    config = Config(DEMO, out, pairs=4, eval_pairs=2, kinds="cross_author", reuse=10)
    assert build.run(config) == 1
    printed = capsys.readouterr()
    assert "train: leak: length" in printed.err
    assert "nothing was written" in printed.err
    assert not list(out.glob("*.jsonl"))


def test_the_gate_is_part_of_the_summary(tmp_path: Path):
    out = tmp_path / "pairs"
    assert build.run(Config(DEMO, out, pairs=40, eval_pairs=2, kinds="restyle", reuse=10)) == 0
    facts = json.loads((out / "summary.json").read_text(encoding="utf-8"))
    assert facts["leak_gate"]["train"]["failed"] is False
    assert "What a reader without exemplars can tell: train" in (out / "summary.md").read_text()


def test_which_of_a_pair_and_its_twin_comes_first_is_a_coin():
    """Else every record whose id ends in "a" would have the person's text as chosen."""
    draft = Draft(
        "restyle", "d", "Ann", ("x",), ("y",), "mine", "rewritten", "Ann/1", "restyle:Ann"
    )
    first = [pair_and_twin(draft, f"train-restyle-{i}", "train")[0] for i in range(200)]
    assert {pair.id[-1] for pair in first} == {"a"}
    assert 70 < sum(pair.chosen == "mine" for pair in first) < 130
    pair, twin = pair_and_twin(draft, "n", "train")
    assert (pair.twin, twin.twin) == (twin.id, pair.id)
    assert (pair.chosen, pair.rejected) == (twin.rejected, twin.chosen)
