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
from safetensors import safe_open
from safetensors.torch import load_file
from test_lora_files import peft_adapter, randomized
from test_tokenizer import CHATS
from test_vocabulary import FAMILIES, HOSTILE, gguf_base, make_folder, make_gguf
from transformers import AutoModelForCausalLM, AutoTokenizer

from nanopersrm.judge import export
from nanopersrm.model.base import Base, resolve
from nanopersrm.model.cache import Layout
from nanopersrm.judge.export import Config, run
from nanopersrm.model.lora import LoraConfig
from nanopersrm.model.tokenizer import Tokenizer
from nanopersrm.judge.adapter_settings import AdapterSettings
from nanopersrm.model.weights import DTYPES, load

CPU = torch.device("cpu")
IDS = torch.tensor([5, 390, 17, 33, 2, 64, 328, 9, 77, 141])


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
    lora_files.save(folder, randomized(model, config), base.name)
    made_for = AdapterSettings(base.name, None, nf4, dtype, True, "pointwise", False)
    made_for.save(folder)
    return folder


def live_logits(base: Base, folder: Path, nf4: bool = False, ids: torch.Tensor = IDS):
    """Of the base with the adapter beside it, in fp32."""
    model = load(base, torch.float32, CPU, nf4)
    lora_files.load(folder, model).on(model)
    with torch.no_grad():
        return model.logits(model(ids, Layout.of([len(ids)])))


def their_logits(folder: Path, ids: torch.Tensor = IDS, **more) -> torch.Tensor:
    with torch.no_grad():
        return AutoModelForCausalLM.from_pretrained(folder, **more).eval()(ids[None]).logits[0]


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> tuple[Base, Path]:
    """(base, its adapter) of one family, for tests that do not care which."""
    root = tmp_path_factory.mktemp("export")
    base = make_base("llama-tied", root / "base")
    return base, make_adapter(root / "adapter", base)


@pytest.mark.parametrize("nf4", [False, True])
@pytest.mark.parametrize("name", TINY)
def test_transformers_gives_the_same_logits(name, nf4, tmp_path, capsys):
    base = make_base(name, tmp_path / "base")
    adapter, out = make_adapter(tmp_path / "adapter", base, nf4), tmp_path / "out"
    assert run(Config(adapter, out, dtype="fp32")) == 0
    expected = live_logits(base, adapter, nf4)
    torch.testing.assert_close(their_logits(out), expected, atol=1e-4, rtol=1e-4)
    assert (their_logits(base.path) - expected).abs().max() > 0.05
    said = "the dequantized NF4 weights" if nf4 else "the fp32 weights"
    assert said in capsys.readouterr().out.splitlines()[-1]
    assert said in (out / "README.md").read_text()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter", "base", "out"]
    assert len({file.stat().st_mode for file in out.iterdir()}) == 1


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_rounded_once(dtype, made, tmp_path):
    base, adapter = made
    assert run(Config(adapter, tmp_path / "out", dtype=dtype)) == 0
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    model = load(base, torch.float32, CPU)
    lora = lora_files.load(adapter, model)
    A, B = lora.masters["layers.1.self_attn.v_proj"]
    layers: Any = model.layers
    W = layers[1].self_attn.v_proj.weight + 5 / 3 * (B @ A)
    found = tensors["model.layers.1.self_attn.v_proj.weight"]
    assert found.dtype == DTYPES[dtype]
    assert (found.float() - W).abs().max() <= 0.51 * torch.finfo(DTYPES[dtype]).eps * W.abs().max()
    for name in ("k_proj", "q_proj"):  # one without and one with an adapter
        matrix = getattr(model.layers[0].self_attn, name).weight
        same = torch.equal(
            tensors[f"model.layers.0.self_attn.{name}.weight"], matrix.to(DTYPES[dtype])
        )
        assert same == (name == "k_proj")
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto")
    assert theirs.dtype == DTYPES[dtype]


def test_the_base_keeps_the_type_it_was_trained_on_in(made, tmp_path):
    """Trained beside bf16 weights: these are merged, also into fp32."""
    base, _ = made
    adapter = make_adapter(tmp_path / "adapter", base, dtype="bf16")
    assert run(Config(adapter, tmp_path / "out", dtype="fp32")) == 0
    found = load_file(tmp_path / "out" / "model.safetensors")["model.layers.0.mlp.up_proj.weight"]
    assert torch.equal(found, found.bfloat16().float())


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
    found = gguf_base(make_gguf(tmp_path / "m.gguf", folder.path, pre), pre)
    found.reader().metadata["tokenizer.ggml.add_bos_token"] = adds_bos
    base = replace(found, config=folder.config | found.config)
    out = tmp_path / "out"
    out.mkdir()
    export._write_texts(out, base, "bf16")
    export.write_weights(
        out,
        model := load(folder, torch.float32, CPU),
        lora_files.load(make_adapter(tmp_path / "adapter", folder), model),
        torch.bfloat16,
    )
    check_texts(out, base)
    theirs = AutoTokenizer.from_pretrained(out)
    starts = adds_bos and theirs.bos_token_id is not None
    ids = theirs.encode("a", split_special_tokens=True)
    assert ids[:-1] == ([theirs.bos_token_id] if starts else [])


def test_shards(made, tmp_path, monkeypatch, capsys):
    base, adapter = made
    monkeypatch.setattr(export, "SHARD_BYTES", 150_000)
    assert run(Config(adapter, tmp_path / "out", dtype="fp32")) == 0
    files = sorted((tmp_path / "out").glob("*.safetensors"))
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert len(files) > 2
    assert files[0].name == f"model-00001-of-{len(files):05d}.safetensors"
    for file in files:
        with safe_open(file, "pt") as opened:
            assert all(index["weight_map"][name] == file.name for name in opened.keys())  # noqa: SIM118
    size = sum(t.numel() * 4 for file in files for t in load_file(file).values())
    assert index["metadata"]["total_size"] == size
    expected = live_logits(base, adapter)
    torch.testing.assert_close(their_logits(tmp_path / "out"), expected, atol=1e-4, rtol=1e-4)
    assert f"writing {files[1].name}" in capsys.readouterr().out


def test_an_adapter_of_peft_in_a_run(made, tmp_path):
    """No judge.json; found in RUN/adapter; the base as PEFT names it."""
    base, _ = made
    theirs = peft_adapter(tmp_path / "run" / "adapter", base.path, target_modules="all-linear")
    assert run(Config(tmp_path / "run", tmp_path / "out", dtype="fp32")) == 0
    with torch.no_grad():
        expected = theirs(IDS[None]).logits[0]
    torch.testing.assert_close(their_logits(tmp_path / "out"), expected, atol=1e-4, rtol=1e-4)


def test_the_card_says_what_it_was_trained_for(made, tmp_path):
    base, adapter = made
    assert run(Config(adapter, tmp_path / "out")) == 0
    card = (tmp_path / "out" / "README.md").read_text()
    for part in (base.name, "rank 3, scale 1.66667, on 12 matrices", "Stored in bf16"):
        assert part in card
    assert "pointwise, with a measured block without what trained instruments say." in card


def failing_once(replace):
    """os.replace, whose second call fails."""
    calls = []

    def failing(source, target):
        calls.append(source)
        if len(calls) == 2:
            raise OSError(28, "no room")
        replace(source, target)

    return failing


def test_existing_folders(made, tmp_path, capsys, monkeypatch):
    _, adapter = made
    out = tmp_path / "out"
    out.mkdir()
    assert run(Config(adapter, out)) == 0  # an empty folder is free
    (out / "config.json").write_text("{}")
    assert run(Config(adapter, out)) == 2
    assert "expected an empty or new folder; --overwrite replaces it" in capsys.readouterr().err
    assert (out / "config.json").read_text() == "{}"
    with monkeypatch.context() as patch:  # the old model comes back when the new one cannot
        patch.setattr(export.os, "replace", failing_once(export.os.replace))
        assert run(Config(adapter, out, overwrite=True)) == 2
    assert "cannot be written (no room)" in capsys.readouterr().err
    assert (out / "config.json").read_text() == "{}"
    assert run(Config(adapter, out, overwrite=True)) == 0
    assert json.loads((out / "config.json").read_text())["model_type"] == "llama"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]


def test_overwrite_takes_only_models(made, tmp_path, capsys):
    base, adapter = made
    (tmp_path / "out" / "letters").mkdir(parents=True)
    (tmp_path / "out" / "config.json").write_text("{}")
    (tmp_path / "file").write_text("mine")
    for out, says in [
        (tmp_path / "out", "it holds other things than a model"),
        (tmp_path / "file", "expected a folder, found a file"),
        (base.path, "expected another folder, this one holds"),
        (adapter.parent, "expected another folder, this one holds"),
        (Path("/"), "expected another folder, this one holds"),
    ]:
        assert run(Config(adapter, out, overwrite=True)) == 2
        error = capsys.readouterr().err
        assert says in error
        assert error.startswith("nanopersrm.export: error: ")
        assert error.count("\n") == 1
    assert (tmp_path / "out" / "letters").is_dir()


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"adapter": Path("nowhere")}, "--adapter nowhere: expected a folder with adapter_config"),
        ({"base": "nowhere"}, "base 'nowhere': expected"),
        ({"out": Path("/proc/none/out")}, "/proc/none/out: cannot be written ("),
    ],
)
def test_wrong_arguments(change, says, made, tmp_path, capsys):
    assert run(replace(Config(made[1], tmp_path / "out"), **change)) == 2
    assert says in capsys.readouterr().err
    assert not any(tmp_path.iterdir())


def test_weights_too_large_for_fp16(made, tmp_path, capsys):
    base, adapter = made
    file = adapter / lora_files.TENSORS
    before = file.read_bytes()
    try:
        model = load(base, torch.float32, CPU)
        lora = lora_files.load(adapter, model)
        with torch.no_grad():
            lora.masters["layers.0.mlp.down_proj"][1].fill_(1e7)
        lora_files.save(adapter, lora, base.name)
        assert run(Config(adapter, tmp_path / "out", dtype="fp16")) == 2
    finally:
        file.write_bytes(before)
    assert (
        "layers.0.mlp.down_proj.weight: too large for torch.float16; try --dtype bf16"
        in capsys.readouterr().err
    )
    assert not any(tmp_path.iterdir())


@pytest.mark.base
def test_smollm2(smollm, tmp_path):
    adapter, out = make_adapter(tmp_path / "adapter", smollm), tmp_path / "out"
    assert run(Config(adapter, out, dtype="fp32")) == 0
    check_texts(out, smollm)
    ids = torch.tensor(Tokenizer.load(smollm).encode("Well; it rambles, as I do, and on."))
    expected = live_logits(smollm, adapter, ids=ids)
    theirs = their_logits(out, ids)
    assert (theirs - expected).abs().max() < 1e-4 * expected.abs().max()
    found = json.loads((out / "config.json").read_text())
    assert (found["eos_token_id"], found["bos_token_id"]) == (2, 1)
    assert found["architectures"] == ["LlamaForCausalLM"]
    assert json.loads((out / "generation_config.json").read_text())["eos_token_id"] == [2, 0]
