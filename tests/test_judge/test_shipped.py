"""Which adapter judges by default, and an adapter in half the bytes."""

from pathlib import Path

import pytest
from fixtures import make_adapter, make_base

from data.build import demo_pairs
from nanopersrm.judge import adapter_settings
from nanopersrm.judge.judge import Judge
from nanopersrm.judge.judgement import JudgeConfig
from nanopersrm.model.base import DEFAULT_BASE, Base

AT_ONCE = JudgeConfig(think=False)


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Base:
    return make_base(tmp_path_factory.mktemp("shipped") / "smollm", "smollm")


@pytest.fixture(scope="module")
def folder(base, tmp_path_factory) -> Path:
    return make_adapter(tmp_path_factory.mktemp("adapter"), base)


def test_which_adapter_is_meant(folder, monkeypatch):
    monkeypatch.setattr(adapter_settings, "SHIPPED", folder)
    assert adapter_settings.resolve_adapter("default", DEFAULT_BASE) == folder
    assert adapter_settings.resolve_adapter("default", "some/base") is None
    assert adapter_settings.resolve_adapter("none", DEFAULT_BASE) is None
    assert adapter_settings.resolve_adapter(None, DEFAULT_BASE) is None
    assert adapter_settings.resolve_adapter("mine", DEFAULT_BASE) == Path("mine")
    assert adapter_settings.resolve_adapter("~/mine", "some/base") == Path.home() / "mine"
    monkeypatch.setattr(adapter_settings, "SHIPPED", folder / "nothing")
    assert adapter_settings.resolve_adapter("default", DEFAULT_BASE) is None


# The adapter in the package


def test_what_the_package_brings():
    made = adapter_settings.read(adapter_settings.SHIPPED)
    assert made is not None
    assert (made.base, made.nf4, made.evidence, made.style) == (DEFAULT_BASE, False, True, True)
    assert made.sharpness != 1.0  # calibrated
    files = [path for path in adapter_settings.SHIPPED.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= 24 << 20
    card = (adapter_settings.SHIPPED / "README.md").read_text(encoding="utf-8")
    for told in ("github.com", "Licence", "train_sft.py", "seed", "Limits"):
        assert told in card, told


@pytest.mark.base
def test_it_knows_writers_it_was_not_trained_on():
    """Twelve invented writers, none of them in its training pairs: 20 couples of twins."""
    judge = Judge.load()
    assert judge.trained
    assert judge.style is not None
    assert judge.style.fusion is not None
    pairs = demo_pairs(seed=3, pairs=40)[:40]
    right = {}
    for pair in pairs:
        found = judge.judge(pair.exemplars, [pair.chosen, pair.rejected], config=AT_ONCE)
        assert found.well_formed
        assert found.notes == []
        right[pair.id] = found.verdict == 0
    assert sum(right.values()) >= 30
    assert sum(right[pair.id] and right[pair.twin] for pair in pairs) >= 22


@pytest.mark.base
def test_its_free_reasoning_ends_in_scores():
    judge = Judge.load()
    pair = demo_pairs(seed=3, pairs=40)[0]
    found = judge.judge(pair.exemplars, [pair.chosen, pair.rejected])
    assert found.well_formed
    assert all("writer" in said for said in found.reasoning)
