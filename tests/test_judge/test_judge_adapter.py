"""Judging with a trained adapter: it is the merged model, it is exact, and it says what it is."""

import json
import math
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch
from fixtures import CANDIDATES, CPU, EXEMPLARS, PLAIN, QUICK, WEIGHED, make_adapter
from safetensors.torch import load_file, save_file
from tiny_bases import refused as call_refused

from data.build import demo_pairs
from nanopersrm.judge import adapter_settings
from nanopersrm.judge.judge import UNTRAINED, Judge
from nanopersrm.judge.judgement import JudgeConfig
from nanopersrm.model.base import DEFAULT_BASE
from nanopersrm.model.linear import Linear
from nanopersrm.model.lora import load_lora
from nanopersrm.model.tokenizer import Tokenizer
from nanopersrm.model.weights import load
from nanopersrm.style.profile import measured_block
from nanopersrm.style.reading import Reading


@pytest.fixture(scope="module")
def folder(base, tmp_path_factory) -> Path:
    return make_adapter(tmp_path_factory.mktemp("adapter"), base)


@pytest.fixture(scope="module")
def judge(base, folder) -> Judge:
    return Judge.load(base.path, folder, dtype="fp32")


def test_the_adapter_is_the_merged_model(base, folder, judge):
    model = load(base, torch.float32, CPU)
    untrained = Judge(model, Tokenizer.load(base)).judge(EXEMPLARS, CANDIDATES[:3], config=PLAIN)
    lora = load_lora(folder, model)
    with torch.no_grad():
        for name, (A, B) in lora.masters.items():
            model.get_parameter(f"{name}.weight").add_(lora.config.scale * B @ A)
    merged = Judge(model, Tokenizer.load(base)).judge(EXEMPLARS, CANDIDATES[:3], config=PLAIN)
    found = judge.judge(EXEMPLARS, CANDIDATES[:3], config=PLAIN)
    assert found.scores == pytest.approx(merged.scores, abs=1e-3)
    gaps = [abs(a - b) for a, b in zip(found.scores, untrained.scores, strict=True)]
    assert min(gaps) > 0.05


def test_the_percentile_of_the_reading_stands_in_the_measured_block(
    base, folder, judge, monkeypatch
):
    shown: list[str] = []
    chat = judge.tokenizer.chat

    def recorded(turns, *rest, **named):
        shown.append(turns[1]["content"])
        return chat(turns, *rest, **named)

    monkeypatch.setattr(judge.tokenizer, "chat", recorded)
    judge.judge(EXEMPLARS, CANDIDATES[:2], config=JudgeConfig(think=False))
    bare = load(base, torch.float32, CPU)  # the adapter that reads replaces the judge's
    reading = Reading.load(folder / "reading", bare, judge.tokenizer)
    scores = reading.scores(EXEMPLARS, CANDIDATES[:2])
    chances = WEIGHED.probabilities(EXEMPLARS, CANDIDATES[:2], scores)
    assert len({round(chance) for chance in chances}) == 2
    for candidate, chance in zip(CANDIDATES[:2], chances, strict=True):
        block = measured_block(EXEMPLARS, [candidate], style_evidence=[chance])
        assert block.endswith(f"{chance:.0f}% likely")
        assert any(block in text and candidate in text for text in shown)
    shown.clear()
    judge.judge(EXEMPLARS, CANDIDATES[:2], config=PLAIN)
    assert not any("<measured>" in text for text in shown)


def test_the_probability_of_all_instruments_stands_beside_the_score(judge, monkeypatch):
    """Of each candidate in the order of the call, as the prompts show it; none without."""
    assert judge.judge(EXEMPLARS, CANDIDATES[:2], config=PLAIN).measured is None
    texts = [CANDIDATES[1], CANDIDATES[0], f" {CANDIDATES[1]}\n"]
    stripped = [text.strip() for text in texts]
    scores = judge.reading.scores(EXEMPLARS, stripped)
    expected = WEIGHED.probabilities(EXEMPLARS, stripped, scores)
    for mode in ("pointwise", "pairwise"):
        judgement = judge.judge(EXEMPLARS, texts, config=JudgeConfig(mode, think=False))
        assert judgement.measured == pytest.approx(expected)
        assert judgement.measured[0] == judgement.measured[2] != judgement.measured[1]
    monkeypatch.setattr(judge.reading, "evidence", None)
    assert judge.judge(EXEMPLARS, CANDIDATES[:2], config=JudgeConfig(think=False)).measured is None


def test_what_was_read_stands_beside_the_score(judge, monkeypatch):
    """Of each candidate as it came, blanks around it or not; nothing is read twice."""
    for config in (PLAIN, JudgeConfig(think=False, evidence=False, mode="pairwise")):
        assert judge.judge(EXEMPLARS, CANDIDATES[:2], config=config).readings is None
    read = judge.reading.read
    monkeypatch.setattr(judge.reading, "read", watched := Mock(side_effect=read))
    texts = [CANDIDATES[2], CANDIDATES[0], f"\r\n  {CANDIDATES[2]} \n"]
    judgement = judge.judge(EXEMPLARS, texts, config=JudgeConfig("pairwise", think=False))
    watched.assert_called_once_with(EXEMPLARS, sorted([CANDIDATES[0], CANDIDATES[2]]))
    for text, found in zip(texts, judgement.readings, strict=True):
        (expected,) = read(EXEMPLARS, [text])
        assert (found.forward, found.back) == pytest.approx(
            (expected.forward, expected.back), abs=1e-4
        )
        first, last = found.words[0], found.words[-1]
        assert text[first.start : first.end] == text.split()[0]
        assert text[last.start : last.end] in text.split()
        gains = [
            gain
            for gain, (_, end) in zip(expected.gains, expected.spans, strict=True)
            if end <= last.end
        ]
        assert sum(word.gain for word in found.words) == pytest.approx(sum(gains[1:]), abs=1e-2)
        assert found.phrases
        assert all(text[x.start : x.end] == x.text for x in found.phrases)
    one, _, three = judgement.readings
    assert one.moved(4) == three != one
    record = json.loads(json.dumps(judgement.as_dict(), allow_nan=False))["readings"][0]
    assert set(record) == {"forward", "back", "words", "phrases"}
    assert set(record["words"][0]) == {"start", "end", "gain", "topic"}
    assert set(record["phrases"][0]) == {"start", "end", "text", "gain", "topic"}


def test_what_is_no_number_is_not_shown(base, folder):
    judge = Judge.load(base.path, folder, dtype="fp32")
    judge.model.norm.weight.fill_(math.nan)
    judgement = judge.judge(EXEMPLARS, CANDIDATES[:2], config=JudgeConfig(think=False))
    assert (judgement.verdict, judgement.readings) == ("invalid", None)
    json.dumps(judgement.as_dict(), allow_nan=False)


def test_a_model_in_training_can_judge(base, folder, judge):
    """Unpacked, with adapters that still learn, and judged the same."""
    model = load(base, torch.float32, CPU)
    policy = load_lora(folder, model)
    tokenizer = Tokenizer.load(base)
    reading = Reading.load(folder / "reading", model, tokenizer)
    policy.on(model)
    live = Judge(model, tokenizer, trained=True, reading=reading)
    expected = judge.judge(EXEMPLARS, CANDIDATES[:2], config=QUICK)
    found = live.judge(EXEMPLARS, CANDIDATES[:2], config=QUICK)
    assert found.scores == pytest.approx(expected.scores, abs=1e-4)
    assert found.notes == []
    reading.evidence = None  # not fitted yet: the block goes without
    assert live.judge(EXEMPLARS, CANDIDATES[:2], config=QUICK).scores != found.scores
    assert all(part.requires_grad and part.grad is None for part in policy.parameters())


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_a_judge_trained_in_4_bits_judges_in_4_bits(base, judge, tmp_path, dtype):
    folder = make_adapter(tmp_path / "four", base, nf4=True)
    four_bits = Judge.load(base.path, folder, dtype=dtype)
    matrix = four_bits.model.get_submodule("layers.0.mlp.up_proj")
    assert isinstance(matrix, Linear)
    assert (matrix.nf4 is None) == matrix.weight.is_mkldnn  # unpacked where bf16 is packed
    judgement = four_bits.judge(EXEMPLARS, CANDIDATES[:2], config=QUICK)
    assert judgement.well_formed
    assert judgement.scores != judge.judge(EXEMPLARS, CANDIDATES[:2], config=QUICK).scores


# Notes and errors


def test_notes(base, folder, judge, tmp_path):
    assert judge.judge(EXEMPLARS, CANDIDATES[:1], config=QUICK).notes == []
    without = judge.judge(EXEMPLARS, CANDIDATES[:1], config=PLAIN).notes
    assert without == ["this adapter was trained with measured evidence and is asked without"]
    bare = make_adapter(tmp_path / "bare", base, evidence=False, form="pointwise", reading=False)
    other = Judge.load(base.path, bare, dtype="fp32")
    config = JudgeConfig("pairwise", think=False)
    assert len(other.judge(EXEMPLARS, CANDIDATES[:2], config=config).notes) == 2
    (bare / "judge.json").unlink()
    peft = Judge.load(base.path, bare, dtype="fp32")
    assert peft.judge(EXEMPLARS, CANDIDATES[:1], config=PLAIN).notes == []
    untrained = Judge.load(base.path, dtype="fp32")
    assert untrained.judge(EXEMPLARS, CANDIDATES[:1], config=PLAIN).notes == [UNTRAINED]


def test_refused_folders(base, tmp_path):
    def refused(folder: Path, part: str) -> None:
        call_refused(lambda: Judge.load(base.path, folder, dtype="fp32"), str(folder), part)

    refused(tmp_path / "nowhere", "--adapter")
    refused(tmp_path, "adapter_config.json")
    folder = make_adapter(tmp_path / "adapter", base)
    tensors = load_file(folder / "adapter_model.safetensors")
    name = next(iter(tensors))
    save_file(tensors | {name: tensors[name][:, :-1].clone()}, folder / "adapter_model.safetensors")
    refused(folder, f"tensor {name} has shape")
    folder = make_adapter(tmp_path / "fresh", base)
    (folder / "reading").rename(folder / "other")
    refused(folder, "reading")
    (folder / "judge.json").write_text("{")
    refused(folder, "line 1")


# The adapter in the package


def test_what_the_package_brings():
    made = adapter_settings.read(adapter_settings.SHIPPED)
    assert made is not None
    assert (made.base, made.nf4, made.evidence, made.reading) == (DEFAULT_BASE, False, True, True)
    assert made.sharpness != 1.0  # calibrated
    files = [path for path in adapter_settings.SHIPPED.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= 24 << 20
    card = (adapter_settings.SHIPPED / "README.md").read_text(encoding="utf-8")
    assert all(word in card for word in ("Licence", "train_sft.py", "seed", "Limits"))


@pytest.mark.slow
@pytest.mark.base
def test_it_knows_writers_it_was_not_trained_on():
    """Twelve invented writers, none of them in its training pairs: 20 couples of twins."""
    judge = Judge.load()
    assert judge.trained
    assert judge.reading is not None
    assert judge.reading.evidence is not None
    pairs = demo_pairs(seed=3, pairs=40)[:40]
    right = {}
    for pair in pairs:
        found = judge.judge(
            pair.exemplars, [pair.chosen, pair.rejected], config=JudgeConfig(think=False)
        )
        assert found.well_formed
        assert found.notes == []
        right[pair.id] = found.verdict == 0
    assert sum(right.values()) >= 30
    assert sum(right[pair.id] and right[pair.twin] for pair in pairs) >= 22
    reasoned = judge.judge(pairs[0].exemplars, [pairs[0].chosen, pairs[0].rejected])
    assert reasoned.well_formed
