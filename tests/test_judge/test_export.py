"""Merged folders: transformers computes with them what we compute with the adapter beside."""

import nanopersrm  # noqa: F401, I001  (before torch)

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import conftest
import pytest
import torch
from conftest import TINY
from safetensors.torch import load_file
from tiny_bases import (
    CHATS,
    CPU,
    FAMILIES,
    HOSTILE,
    gguf_base,
    logits,
    make_folder,
    make_gguf,
    random_lora,
)
from transformers import AutoModelForCausalLM, AutoTokenizer

from nanopersrm.judge import export
from nanopersrm.judge.adapter_settings import AdapterSettings
from nanopersrm.judge.export import Config, run
from nanopersrm.model.base import Base, resolve
from nanopersrm.model.lora import LoraConfig, load_lora, save_lora
from nanopersrm.model.tokenizer import Tokenizer
from nanopersrm.model.weights import DTYPES, load

IDS = [5, 390, 17, 33, 2, 64, 328, 9, 77, 141]


def make_base(name: str, folder: Path, pre: str = "") -> Base:
    """A tiny random model of a family and a tokenizer that fits, as a Hugging Face folder."""
    make_folder(folder, pre or ("smollm" if name.startswith("llama") else "qwen2"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(conftest.SIZES, "vocab_size", 610)
        conftest.tiny(name, folder)
    return resolve(str(folder))


def make_adapter(folder: Path, base: Base, nf4: bool = False, dtype: str = "fp32") -> Path:
    """A random adapter of some matrices, with its judge.json."""
    model = load(base, DTYPES[dtype], CPU, nf4)
    config = LoraConfig(rank=3, alpha=5, targets=("q_proj", "v_proj", "o_proj", "down_proj"))
    save_lora(folder, random_lora(model, config), base.name)
    AdapterSettings(base.name, None, nf4, dtype, "pointwise").save(folder)
    return folder


def live_logits(base: Base, folder: Path, nf4: bool = False, ids: list[int] = IDS) -> torch.Tensor:
    """Of the base with the adapter beside it, in fp32."""
    model = load(base, torch.float32, CPU, nf4)
    load_lora(folder, model).on(model)
    return logits(model, ids)


def their_logits(folder: Path, ids: list[int] = IDS, **more: Any) -> torch.Tensor:
    model = AutoModelForCausalLM.from_pretrained(folder, **more).eval()
    with torch.no_grad():
        return model(torch.tensor([ids])).logits[0]


def check_texts(out: Path, base: Base) -> None:
    """AutoTokenizer reads `out` as we read `base`."""
    ours, theirs = Tokenizer.load(base), AutoTokenizer.from_pretrained(out)
    for text in HOSTILE:
        ids = theirs.encode(text, add_special_tokens=False, split_special_tokens=True)
        assert ours.encode(text) == ids, text[:40]
    for chat in CHATS:
        for generation in (True, False):
            ids = theirs.apply_chat_template(
                chat, add_generation_prompt=generation, return_dict=False
            )
            assert ours.chat(chat, generation) == ids
    assert theirs.bos_token_id == ours.bos_id
    again = Tokenizer.load(resolve(str(out)))
    assert (again.eos_ids, again.chat(CHATS[1])) == (ours.eos_ids, ours.chat(CHATS[1]))


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> tuple[Base, Path]:
    """(base, its adapter) of one family, for tests that do not care which."""
    root = tmp_path_factory.mktemp("export")
    base = make_base("llama-tied", root / "base")
    return base, make_adapter(root / "adapter", base)


@pytest.mark.slow
@pytest.mark.parametrize("nf4", [False, True])
@pytest.mark.parametrize("name", TINY)
def test_transformers_gives_the_same_logits(name, nf4, tmp_path, capsys):
    base = make_base(name, tmp_path / "base")
    adapter, out = make_adapter(tmp_path / "adapter", base, nf4), tmp_path / "out"
    assert run(Config(adapter, out, dtype="fp32")) == 0
    expected = live_logits(base, adapter, nf4)
    torch.testing.assert_close(their_logits(out), expected, atol=1e-4, rtol=1e-4)
    assert (their_logits(base.path) - expected).abs().max() > 0.05
    weights = "the dequantized NF4 weights" if nf4 else "the fp32 weights"
    assert weights in capsys.readouterr().out.splitlines()[-1]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter", "base", "out"]


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_rounded_once(dtype, made, tmp_path):
    """W + 5/3 B A in fp32, then in the type asked for; matrices without an adapter as they were."""
    base, adapter = made
    assert run(Config(adapter, tmp_path / "out", dtype=dtype)) == 0
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    model = load(base, torch.float32, CPU)
    layers: Any = model.layers
    A, B = load_lora(adapter, model).masters["layers.1.self_attn.v_proj"]
    W = layers[1].self_attn.v_proj.weight + 5 / 3 * (B @ A)
    merged = tensors["model.layers.1.self_attn.v_proj.weight"]
    assert merged.dtype == DTYPES[dtype]
    assert (merged.float() - W).abs().max() <= 0.51 * torch.finfo(DTYPES[dtype]).eps * W.abs().max()
    for name in ("k_proj", "q_proj"):  # one without and one with an adapter
        weight = getattr(layers[0].self_attn, name).weight.to(DTYPES[dtype])
        written = tensors[f"model.layers.0.self_attn.{name}.weight"]
        assert torch.equal(written, weight) == (name == "k_proj")


def test_the_base_keeps_the_type_it_was_trained_on_in(made, tmp_path):
    """Trained beside bf16 weights: these are merged, also into fp32."""
    base, _ = made
    adapter = make_adapter(tmp_path / "adapter", base, dtype="bf16")
    assert run(Config(adapter, tmp_path / "out", dtype="fp32")) == 0
    weight = load_file(tmp_path / "out" / "model.safetensors")["model.layers.0.mlp.up_proj.weight"]
    assert torch.equal(weight, weight.bfloat16().float())


@pytest.mark.parametrize("pre", FAMILIES)
def test_tokenizer_of_a_folder(pre, tmp_path):
    base = make_base("llama-tied", tmp_path / "base", pre)
    adapter = make_adapter(tmp_path / "adapter", base)
    assert run(Config(adapter, tmp_path / "out")) == 0
    check_texts(tmp_path / "out", base)


@pytest.mark.parametrize("adds_bos", [False, True])
@pytest.mark.parametrize("pre", FAMILIES)
def test_tokenizer_of_a_gguf(pre, adds_bos, tmp_path):
    """Only the text side is in this file; the model's part of config.json is a folder's."""
    folder = make_base("llama-tied", tmp_path / "folder", pre)
    from_file = gguf_base(make_gguf(tmp_path / "m.gguf", folder.path, pre), pre)
    base, out = replace(from_file, config=folder.config | from_file.config), tmp_path / "out"
    base.reader.metadata["tokenizer.ggml.add_bos_token"] = adds_bos
    out.mkdir()
    export._write_texts(out, base, "bf16")
    (out / "model.safetensors").write_bytes(b"")  # `resolve` looks for one
    check_texts(out, base)
    theirs = AutoTokenizer.from_pretrained(out)
    starts = adds_bos and theirs.bos_token_id is not None
    ids = theirs.encode("a", split_special_tokens=True)
    assert ids[:-1] == ([theirs.bos_token_id] if starts else [])


def test_an_adapter_in_a_run_and_one_without_a_record(made, tmp_path):
    base, _ = made
    adapter = make_adapter(tmp_path / "run" / "adapter", base)
    assert run(Config(tmp_path / "run", tmp_path / "out")) == 0
    (adapter / "judge.json").unlink()
    assert run(Config(tmp_path / "run", tmp_path / "none")) == 2


def test_only_a_free_folder_is_written(made, tmp_path, capsys):
    _, adapter = made
    out = tmp_path / "out"
    out.mkdir()
    assert run(Config(adapter, out)) == 0  # an empty folder is free
    before = (out / "config.json").read_bytes()
    assert run(Config(adapter, out)) == 2
    assert "empty" in capsys.readouterr().err
    assert (out / "config.json").read_bytes() == before


@pytest.mark.parametrize(
    ("change", "part"),
    [
        ({"adapter": Path("nowhere")}, "nowhere"),
        ({"base": "nowhere"}, "base 'nowhere'"),
        ({"out": Path("/proc/none/out")}, "cannot be written"),
    ],
)
def test_wrong_arguments(change, part, made, tmp_path, capsys):
    assert run(replace(Config(made[1], tmp_path / "out"), **change)) == 2
    error = capsys.readouterr().err
    assert part in error
    assert error.count("\n") == 1
    assert not any(tmp_path.iterdir())


def test_weights_too_large_for_fp16(made, tmp_path, capsys):
    base, _ = made
    adapter = make_adapter(tmp_path / "adapter", base)
    lora = load_lora(adapter, load(base, torch.float32, CPU))
    with torch.no_grad():
        lora.masters["layers.0.mlp.down_proj"][1].fill_(1e7)
    save_lora(adapter, lora, base.name)
    assert run(Config(adapter, tmp_path / "out", dtype="fp16")) == 2
    assert "layers.0.mlp.down_proj.weight" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"]


@pytest.mark.slow
@pytest.mark.base
def test_smollm2(smollm, tmp_path):
    adapter, out = make_adapter(tmp_path / "adapter", smollm), tmp_path / "out"
    assert run(Config(adapter, out, dtype="fp32")) == 0
    check_texts(out, smollm)
    ids = Tokenizer.load(smollm).encode("Well; it rambles, as I do, and on.")
    expected = live_logits(smollm, adapter, ids=ids)
    assert (their_logits(out, ids) - expected).abs().max() < 1e-4 * expected.abs().max()
    config = json.loads((out / "config.json").read_text())
    assert (config["eos_token_id"], config["bos_token_id"]) == (2, 1)
    assert config["architectures"] == ["LlamaForCausalLM"]
    assert json.loads((out / "generation_config.json").read_text())["eos_token_id"] == [2, 0]
