"""train_sft.py with other lessons than the default."""

import pytest
from test_train_sft import brief, curve, given, here, one_thread, script  # noqa: F401

from nanopersrm.judge import adapter_settings


@pytest.mark.parametrize("more", [("--lesson.form", "both"), ("--lesson.no-evidence",)])
def test_other_lessons(more, given, tmp_path, brief):  # noqa: F811
    assert here(*given, "--out", tmp_path, *more, "--steps", "1", "--warmup-steps", "1") == 0
    made_for = adapter_settings.read(tmp_path / "adapter")
    assert made_for is not None
    assert made_for.form == ("both" if "both" in more else "pointwise")
    assert made_for.evidence == made_for.style == ("both" in more)


def test_without_contrast_no_rival_is_computed(given, tmp_path, brief, monkeypatch):  # noqa: F811
    alone = ("--weight.pair", "0", "--weight.list", "0", "--warmup-steps", "1", "--steps", "1")
    lists: list[int] = []
    sums = script.sums

    def counted(model, batch, *more):
        lists.extend(count for _, count, _ in batch.lists)
        return sums(model, batch, *more)

    monkeypatch.setattr(script, "sums", counted)
    assert here(*given, *alone, "--out", tmp_path) == 0
    assert set(lists) == {2}  # the pair itself: how often it is right is still said
    assert curve(tmp_path)[-1]["loss_contrast"] == 0
