"""judge.json: written and read back, checked, and held against the base at hand."""

import hashlib
import json
from pathlib import Path

import pytest

from nanopersrm import InputError, __version__
from nanopersrm.judge import adapter_settings
from nanopersrm.judge.adapter_settings import AdapterSettings, weights_sha256
from nanopersrm.model.base import DEFAULT_BASE, Base

FACTS = AdapterSettings("org/name", "ab12", False, "bf16", "pointwise")


def base_at(folder: Path, name: str, shards: dict[str, bytes]) -> Base:
    folder.mkdir(exist_ok=True)
    for file, content in shards.items():
        (folder / file).write_bytes(content)
    return Base(name, folder, "safetensors", {})


def adapter_at(folder: Path) -> Path:
    (folder / "adapter_config.json").write_text("{}")
    return folder


def test_what_is_saved_is_read(tmp_path):
    adapter_at(tmp_path)
    assert adapter_settings.read(tmp_path) is None
    for facts in (FACTS, AdapterSettings("b.gguf", None, True, "fp16", "both", free=True)):
        facts.save(tmp_path)
        assert adapter_settings.read(tmp_path) == facts
    assert sorted(f.name for f in tmp_path.iterdir()) == ["adapter_config.json", "judge.json"]
    assert json.loads((tmp_path / "judge.json").read_text())["nanopersrm"] == __version__


def test_a_broken_field_is_named(tmp_path):
    FACTS.save(adapter_at(tmp_path))
    file = tmp_path / "judge.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"form": "listwise"}))
    with pytest.raises(InputError, match="field form") as caught:
        adapter_settings.read(tmp_path)
    assert str(caught.value).startswith(str(file))


def test_the_hash_of_weights(tmp_path):
    shards = {"model-2.safetensors": b"two", "model-1.safetensors": b"one"}
    base = base_at(tmp_path / "a", "a", shards | {"adapter_model.safetensors": b"x"})
    assert weights_sha256(base) == hashlib.sha256(b"onetwo").hexdigest()
    one = Base("b", tmp_path / "a" / "model-2.safetensors", "gguf", {})
    assert weights_sha256(one) == hashlib.sha256(b"two").hexdigest()


def test_the_base_at_hand(tmp_path, monkeypatch):
    here = base_at(tmp_path / "here", str(tmp_path / "here"), {"model.safetensors": b"weights"})
    sha = weights_sha256(here)

    def made_on(name: str, sha256: str | None) -> AdapterSettings:
        return AdapterSettings(name, sha256, False, "bf16", "both")

    assert made_on(here.name, "other").same_base(tmp_path, here) is None  # names are believed
    assert made_on("org/name", sha).same_base(tmp_path, here) is None
    monkeypatch.chdir(tmp_path)
    assert made_on("here", None).same_base(tmp_path, here) is None  # the same folder
    for unknown in (None, "0" * 64):
        note = made_on("org/name", unknown).same_base(tmp_path, here)
        assert note is not None
        assert "trained on org/name, and" in note
    default = Base(DEFAULT_BASE, here.path, "safetensors", {})
    assert made_on(DEFAULT_BASE, None).same_base(tmp_path, default) is None
    with pytest.raises(InputError, match="was trained on org/name, so say --base org/name"):
        made_on("org/name", sha).same_base(tmp_path, default)


def test_prompts_of_another_form():
    assert FACTS.differences("pointwise", free=False) == []
    assert len(FACTS.differences("pairwise", free=True)) == 2
    free = AdapterSettings("b", None, False, "bf16", "both", free=True)
    assert free.differences("pairwise", free=True) == []
    (note,) = free.differences("pointwise", free=False)
    assert "prose and is asked for lines" in note


def test_a_fingerprint_is_of_every_part_and_of_no_place(tmp_path):
    folder = tmp_path / "one"
    (folder / "reading").mkdir(parents=True)
    files = ["adapter_config.json", "judge.json", "evidence.json", "reading/reading.json"]
    for name in files:
        (folder / name).write_text(f"{name} as it was")
    first = adapter_settings.fingerprint(folder)
    prints = {first}
    for name in files:
        (folder / name).write_text(f"{name} as it WAS")  # as long as before
        prints.add(adapter_settings.fingerprint(folder))
        (folder / name).write_text(f"{name} as it was")
    assert len(prints) == 1 + len(files)
    (folder / "README.md").write_text("about it")
    folder.rename(tmp_path / "two")
    assert adapter_settings.fingerprint(tmp_path / "two") == first


def test_which_adapter_is_meant(tmp_path, monkeypatch):
    monkeypatch.setattr(adapter_settings, "SHIPPED", adapter_at(tmp_path))
    resolve_adapter = adapter_settings.resolve_adapter
    assert resolve_adapter("default", DEFAULT_BASE) == tmp_path
    assert resolve_adapter("default", "some/base") is None
    assert resolve_adapter("none", DEFAULT_BASE) is resolve_adapter(None, DEFAULT_BASE) is None
    assert resolve_adapter("~/mine", "some/base") == Path.home() / "mine"
    monkeypatch.setattr(adapter_settings, "SHIPPED", tmp_path / "nothing")
    assert resolve_adapter("default", DEFAULT_BASE) is None
