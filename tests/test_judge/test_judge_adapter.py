"""Judging with a trained adapter: it is the merged model, it is exact, and it says what it is."""

from pathlib import Path

import pytest
import torch
from fixtures import (
    CANDIDATES,
    CPU,
    EXEMPLARS,
    FUSED,
    PLAIN,
    QUICK,
    make_adapter,
    make_base,
)
from safetensors.torch import load_file, save_file

from nanopersrm import InputError
from nanopersrm.judge.judge import UNTRAINED, Judge
from nanopersrm.judge.judgement import JudgeConfig
from nanopersrm.model.base import Base
from nanopersrm.model.linear import Linear
from nanopersrm.model.lora import load_lora
from nanopersrm.model.tokenizer import Tokenizer
from nanopersrm.model.weights import load
from nanopersrm.style.profile import StyleEvidence, measured_block
from nanopersrm.style.similarity import Style


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Base:
    return make_base(tmp_path_factory.mktemp("judge") / "smollm", "smollm")


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


def test_the_style_percentile_stands_in_the_measured_block(base, folder, judge, monkeypatch):
    shown: list[str] = []
    chat = judge.tokenizer.chat

    def listening(turns, *rest, **named):
        shown.append(turns[1]["content"])
        return chat(turns, *rest, **named)

    monkeypatch.setattr(judge.tokenizer, "chat", listening)
    judge.judge(EXEMPLARS, CANDIDATES[:2], config=JudgeConfig(think=False))
    bare = load(base, torch.float32, CPU)  # the style adapter replaces the judge's
    ids = [judge.tokenizer.encode(text) for text in (*EXEMPLARS, *CANDIDATES[:2])]
    percents = Style.load(folder / "style", bare).percentiles(ids[:2], ids[2:])
    assert len({round(percent) for percent in percents}) == 2
    for candidate, percent in zip(CANDIDATES[:2], percents, strict=True):
        block = measured_block(EXEMPLARS, [candidate], style_evidence=[StyleEvidence(percent)])
        assert block.endswith(f", style {percent:.0f}%")
        assert any(block in text and candidate in text for text in shown)
    shown.clear()
    judge.judge(EXEMPLARS, CANDIDATES[:2], config=PLAIN)
    assert not any("<measured>" in text for text in shown)


def test_what_all_instruments_say_is_said_beside_the_score(judge, monkeypatch):
    """Of each candidate in the order of the call, as the prompts show it; none without."""
    assert judge.judge(EXEMPLARS, CANDIDATES[:2], config=PLAIN).measured is None
    assert judge.judge(EXEMPLARS, CANDIDATES[:2], config=JudgeConfig(think=False)).measured is None
    monkeypatch.setattr(judge.style, "fusion", FUSED)
    texts = [CANDIDATES[1], CANDIDATES[0], f" {CANDIDATES[1]}\n"]
    for mode in ("pointwise", "pairwise"):
        found = judge.judge(EXEMPLARS, texts, config=JudgeConfig(mode, think=False))
        expected = [
            near.probability
            for near in judge.style_evidence(EXEMPLARS, [text.strip() for text in texts])
        ]
        assert found.measured == pytest.approx(expected)
        assert found.measured[0] == found.measured[2] != found.measured[1]
    assert judge.judge(EXEMPLARS, texts, config=PLAIN).measured is None  # without evidence


def test_a_model_in_training_can_judge(base, folder, judge):
    """Unpacked, with adapters that still learn, and judged the same."""
    model = load(base, torch.float32, CPU)
    policy = load_lora(folder, model)
    style = Style.load(folder / "style", model)
    policy.on(model)
    live = Judge(model, Tokenizer.load(base), trained=True, style=style)
    expected = judge.judge(EXEMPLARS, CANDIDATES[:2], config=QUICK)
    found = live.judge(EXEMPLARS, CANDIDATES[:2], config=QUICK)
    assert found.scores == pytest.approx(expected.scores, abs=1e-4)
    assert found.notes == []
    style.quantiles = ()  # not measured yet: the block goes without
    assert live.judge(EXEMPLARS, CANDIDATES[:2], config=QUICK).scores != found.scores
    assert all(part.requires_grad and part.grad is None for part in policy.parameters())


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_a_judge_trained_in_4_bits_judges_in_4_bits(base, folder, tmp_path, dtype):
    made = make_adapter(tmp_path / "four", base, nf4=True)
    judge = Judge.load(base.path, made, dtype=dtype)
    matrix = judge.model.get_submodule("layers.0.mlp.up_proj")
    assert isinstance(matrix, Linear)
    assert (matrix.nf4 is None) == matrix.weight.is_mkldnn  # unpacked where bf16 is packed
    found = judge.judge(EXEMPLARS, CANDIDATES[:2], config=QUICK)
    assert found.well_formed
    if dtype == "fp32":
        sixteen = Judge.load(base.path, folder, dtype="fp32")
        other = sixteen.judge(EXEMPLARS, CANDIDATES[:2], config=QUICK)
        assert found.scores != other.scores


# Notes and errors


def test_notes(base, folder, judge, tmp_path):
    assert judge.judge(EXEMPLARS, CANDIDATES[:1], config=QUICK).notes == []
    without = judge.judge(EXEMPLARS, CANDIDATES[:1], config=PLAIN).notes
    assert without == ["this adapter was trained with measured evidence and is asked without"]
    bare = make_adapter(tmp_path / "bare", base, evidence=False, form="pointwise", style=False)
    other = Judge.load(base.path, bare, dtype="fp32")
    config = JudgeConfig("pairwise", think=False)
    assert other.judge(EXEMPLARS, CANDIDATES[:2], config=config).notes == [
        "this adapter was trained without measured evidence and is asked with",
        "this adapter was trained on pointwise prompts and is asked pairwise",
    ]
    assert other.style is not None  # for the judge `style`, but not shown in prompts
    (bare / "judge.json").unlink()
    peft = Judge.load(base.path, bare, dtype="fp32")
    assert peft.judge(EXEMPLARS, CANDIDATES[:1], config=PLAIN).notes == []
    untrained = Judge.load(base.path, dtype="fp32")
    assert untrained.judge(EXEMPLARS, CANDIDATES[:1], config=PLAIN).notes == [UNTRAINED]


def test_refused_folders(base, folder, tmp_path):
    def refused(adapter: Path, *parts: str) -> None:
        with pytest.raises(InputError) as caught:
            Judge.load(base.path, adapter, dtype="fp32")
        assert "\n" not in str(caught.value)
        for part in (str(adapter), *parts):
            assert part in str(caught.value)

    refused(tmp_path / "nowhere", "--adapter", "adapter_config.json", "no such folder")
    refused(tmp_path, "found none")
    made = make_adapter(tmp_path / "run" / "adapter", base)
    refused(made.parent, f"did you mean {made}?")
    tensors = load_file(made / "adapter_model.safetensors")
    name = next(iter(tensors))
    save_file(tensors | {name: tensors[name][:, :-1].clone()}, made / "adapter_model.safetensors")
    refused(made, f"tensor {name} has shape")
    (made / "adapter_model.safetensors").write_bytes(b"cut")
    refused(made, "adapter_model.safetensors")
    made = make_adapter(tmp_path / "fresh", base)
    (made / "style").rename(made / "other")
    refused(made, "the folder style")
    (made / "judge.json").write_text("{")
    refused(made, "judge.json, line 1")
