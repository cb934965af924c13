"""train_sft.py and the instruments that it weighs: when it does, what lessons show, what stays."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from test_train_sft import brief, curve, files, given, here, one_thread, script  # noqa: F401

from data.build import demo_pairs
from nanopersrm.style import fusion, similarity
from nanopersrm.style.fusion import Fusion
from nanopersrm.train import course

FEW = ("--warmup-steps", "1", "--steps", "2", "--eval-pairs", "0", "--save-every", "1")
BY_HAND = Fusion({"n-grams": 2.0}, {"n-grams": -0.4}, slope=1.5, offset=0.25, loss=0.5)


@pytest.fixture(scope="module")
def weighed(given, tmp_path_factory) -> Path:  # noqa: F811
    """A short run that weighed its instruments."""
    out = tmp_path_factory.mktemp("runs") / "weighed"
    assert here(*given, *FEW, "--out", out) == 0
    return out


@pytest.fixture
def unweighable(monkeypatch) -> None:
    def fused(*_: object) -> Fusion:
        raise AssertionError("instruments are weighed")

    monkeypatch.setattr(course, "fused", fused)


def kept(run: Path) -> dict[str, object] | None:
    """The fusion that the adapter of a run shows."""
    found = json.loads((run / "adapter/style/style.json").read_text())["fusion"]
    assert found is None or isinstance(found, dict)
    return found


def test_a_fusion_and_one_apart_for_each_fold(weighed):
    found = fusion.from_json(kept(weighed), "here")
    assert "style" in found.weights
    assert found.loss is not None
    assert found.loss < fusion.GUESS
    assert len(found.folds) == fusion.FOLDS


@pytest.mark.usefixtures("brief", "unweighable")
@pytest.mark.parametrize("more", [("--fused", "0"), ("--lesson.no-evidence",)])
def test_what_nobody_would_see_is_not_weighed(more, given, tmp_path):  # noqa: F811
    assert here(*given, *FEW, *more, "--out", tmp_path) == 0
    assert kept(tmp_path) is None


@pytest.mark.usefixtures("brief", "unweighable")
def test_a_style_adapter_brings_its_own(weighed, given, tmp_path, capsys):  # noqa: F811
    style = ("--style-from", weighed / "adapter/style")
    assert here(*given, *FEW, *style, "--out", tmp_path / "kept") == 0
    told = " ".join(capsys.readouterr().out.split())
    assert f"weighed before, as {style[1]} has them" in told
    assert "fitted on" not in told  # it has a fusion apart for them
    assert kept(tmp_path / "kept") == kept(weighed)
    assert here(*given, *FEW, *style, "--fused", "0", "--out", tmp_path / "none") == 0
    assert kept(tmp_path / "none") is None


@pytest.mark.usefixtures("brief")
def test_no_better_than_a_guess_is_not_shown(given, tmp_path, monkeypatch, capsys):  # noqa: F811
    monkeypatch.setattr(course, "fused", lambda *_: replace(BY_HAND, loss=0.7))
    assert here(*given, *FEW, "--out", tmp_path) == 0
    assert kept(tmp_path) is None
    assert "0.70 nats a pair by other writers, where a guess has 0.69; they are not shown" in (
        " ".join(capsys.readouterr().out.split())
    )


class Power(Exception):
    """It went off."""


@pytest.mark.usefixtures("brief")
@pytest.mark.parametrize("whose", ["own", "another's"])
def test_a_run_that_goes_on_weighs_nothing_again(
    whose,
    weighed,
    given,  # noqa: F811
    tmp_path,
    monkeypatch,
):
    more = ("--style-from", weighed / "adapter/style") if whose == "another's" else ()
    assert here(*given, *FEW, *more, "--out", tmp_path / "whole") == 0
    after = script.Training.after

    def cut(self, step, learner, *rest):
        after(self, step, learner, *rest)
        if learner.phase == "judge":
            raise Power

    with monkeypatch.context() as patch:
        patch.setattr(script.Training, "after", cut)
        with pytest.raises(Power):
            here(*given, *FEW, *more, "--out", tmp_path / "cut")
    monkeypatch.setattr(script, "fuse", lambda *_: pytest.fail("weighed again"))
    torch.manual_seed(123)
    assert here(*given, *FEW, *more, "--out", tmp_path / "cut", "--resume") == 0
    assert curve(tmp_path / "cut") == curve(tmp_path / "whole")
    assert files(tmp_path / "cut/adapter") == files(tmp_path / "whole/adapter")


@pytest.mark.usefixtures("brief")
def test_ctrl_c_is_heard_while_weighing(given, tmp_path, monkeypatch, capsys):  # noqa: F811
    def fused(pairs, count, tokenizer, style, seed, pause):
        pause.__self__.stop.asked = 2
        pause()
        raise AssertionError("it went on")

    monkeypatch.setattr(course, "fused", fused)
    assert here(*given, *FEW, "--out", tmp_path) == 130
    assert capsys.readouterr().err.endswith("train_sft.py: stopped and saved; --resume goes on\n")


# What lessons show


def test_whole_couples_are_drawn(monkeypatch):
    seen = []
    monkeypatch.setattr(fusion, "fit", lambda some, similar: seen.extend(some))
    style, tokenizer = Unit(), Words()
    pairs = demo_pairs(0)
    course.fused(pairs, 7, tokenizer, style, 0)  # type: ignore[arg-type]
    assert len(seen) == 8
    assert {pair.id for pair in seen} == {pair.twin for pair in seen}
    assert [len(batch) for batch in style.asked][:-1] == [64] * (len(style.asked) - 1)


class Unit:
    """A style whose vectors are all the same."""

    def __init__(self) -> None:
        self.asked: list[list[object]] = []
        self.fusion = replace(
            BY_HAND, folds=tuple(replace(BY_HAND, offset=float(i)) for i in range(fusion.FOLDS))
        )

    def embed(self, texts):
        self.asked.append(texts)
        return torch.eye(3)[:1].expand(len(texts), -1)

    def similarities(self, exemplars, texts):
        return [0.5] * len(texts)

    def percentile(self, cosine):
        return 50.0


class Words:
    def encode(self, text):
        return [1] * len(text.split())


def test_lessons_show_what_a_fusion_without_their_writer_says():
    style = Unit()
    (pair, *_) = demo_pairs(0)
    near = similarity.style_evidence_fn(Words(), style, course.writers([pair]))  # type: ignore[arg-type]
    (own,) = near([f" {text}\n" for text in pair.exemplars], [pair.chosen])
    (other,) = near([pair.rejected], [pair.chosen])
    fold = style.fusion.folds[fusion.fold_of(pair.author)]
    assert own.probability == pytest.approx(
        fold.probabilities(pair.exemplars, [pair.chosen], [0.5])[0]
    )
    assert other.probability == style.fusion.probabilities([pair.rejected], [pair.chosen], [0.5])[0]
    assert own.probability != style.fusion.probabilities(pair.exemplars, [pair.chosen], [0.5])[0]
