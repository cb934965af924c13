"""What training starts from: the right model, the right adapter, and what is said of it."""

import shlex
from dataclasses import replace
from pathlib import Path

import pytest
from fixtures import CPU, WEIGHED, make_adapter

from nanopersrm import InputError
from nanopersrm.judge import adapter_settings as settings_file
from nanopersrm.judge.adapter_settings import AdapterSettings, weights_sha256
from nanopersrm.model.base import DEFAULT_BASE
from nanopersrm.model.lora import LoraConfig
from nanopersrm.model.tokenizer import Tokenizer
from nanopersrm.model.transformer import Model
from nanopersrm.style.ledger import Measurer
from nanopersrm.train import setup
from nanopersrm.train.presets import PRESETS, resolve_preset
from nanopersrm.train.setup import RANDOM, TINY, defaults_from, find_adapter, require_adapter

ROOT = Path(__file__).parents[2]
PRESET = PRESETS["tiny"]
MADE = AdapterSettings("b", None, True, "fp16", "pointwise", True)


@pytest.fixture(scope="module")
def model(base) -> Model:
    return setup.load_model(base, PRESET, CPU, 0, tiny=False)


@pytest.fixture(scope="module")
def folder(base, tmp_path_factory) -> Path:
    return make_adapter(tmp_path_factory.mktemp("setup") / "adapter", base)


def test_tiny_is_random_unless_a_base_is_named(base, model):
    assert setup.is_random("tiny", DEFAULT_BASE)
    assert not setup.is_random("tiny", "another")
    assert not setup.is_random("cpu", DEFAULT_BASE)
    assert model.training
    assert not any(part.requires_grad for part in model.parameters())
    tiny = setup.load_model(base, PRESET, CPU, 0, tiny=True)
    assert (tiny.config.D, tiny.config.layers) == (TINY["hidden_size"], TINY["num_hidden_layers"])
    assert base.config["vocab_size"] == tiny.config.V


def test_what_a_result_says_of_itself(base, model, monkeypatch):
    saved = setup.adapter_settings(DEFAULT_BASE, base, model, False, free=True)
    expected = replace(MADE, base=DEFAULT_BASE, base_sha256=weights_sha256(base))
    assert saved == replace(expected, nf4=False, dtype="fp32")
    assert setup.adapter_settings("x", base, model, True, False).base == RANDOM
    monkeypatch.chdir(base.path.parent)  # a folder by a name that is true here alone
    named = setup.adapter_settings(base.path.name, base, model, False, False)
    assert (named.base, named.free) == (str(base.path), False)
    four = setup.load_model(base, resolve_preset("tiny", {"nf4": True}), CPU, 0, tiny=True)
    assert setup.adapter_settings("x", base, four, True, False).nf4


def test_where_the_adapter_is(folder, tmp_path):
    none = tmp_path / "none"
    assert find_adapter(None, DEFAULT_BASE) == find_adapter("none", DEFAULT_BASE) == (None, None)
    assert find_adapter("default", DEFAULT_BASE)[0] == settings_file.SHIPPED
    with pytest.raises(InputError, match="no adapter comes with"):
        find_adapter("default", "s/b")
    for adapter, default, word in (
        (None, none, "train_sft.py"),
        (none, folder, "cannot be read"),
        ("none", folder, "got none"),
    ):
        with pytest.raises(InputError, match=word):
            require_adapter(adapter, default, "some/base")
    expected = (folder, settings_file.read(folder))
    assert require_adapter(None, folder, "some/base") == expected
    assert require_adapter(folder, none, "some/base") == expected
    assert require_adapter(None, none, DEFAULT_BASE)[0] == settings_file.SHIPPED


def test_flags_left_out_follow_from_the_adapter():
    taken = {"base": "b", "nf4": True, "dtype": "fp16"}
    assert defaults_from(MADE, DEFAULT_BASE, None, None) == taken
    flags = {"base": "other", "nf4": False, "dtype": "bf16"}
    assert defaults_from(MADE, "other", False, "bf16") == flags
    plain = replace(MADE, base=RANDOM, nf4=False)  # 16 bits: the machine decides
    expected = {"base": DEFAULT_BASE, "nf4": False, "dtype": None}
    assert defaults_from(plain, DEFAULT_BASE, None, None) == expected
    assert defaults_from(None, "other", None, "bf16") == {}


def test_an_adapter_goes_with_its_base(base, model, folder):
    for made, tiny in ((replace(MADE, base=RANDOM), False), (MADE, True)):
        with pytest.raises(InputError, match=RANDOM):
            setup.check_base(made, folder, base, tiny)
    assert setup.check_base(None, folder, base, tiny=True) is None
    assert setup.load_adapter(folder, model, LoraConfig()).tensors()
    with pytest.raises(InputError, match=r"--lora\.rank"):
        setup.load_adapter(folder, model, LoraConfig(rank=3))


def test_what_lies_beside_an_adapter(base, model, folder, tmp_path, monkeypatch):
    """Its evidence and its reading; without them the shipped evidence, and nothing reads."""
    tokenizer, shipped = Tokenizer.load(base), replace(WEIGHED, slope=7.0)
    measurer = setup.load_measurer(folder, model, tokenizer)
    assert measurer.evidence == WEIGHED
    assert measurer.reading is not None
    monkeypatch.setattr(settings_file, "SHIPPED", tmp_path / "shipped")
    shipped.save(tmp_path / "shipped")
    for bare in (None, tmp_path):
        assert setup.load_measurer(bare, model, tokenizer) == Measurer(shipped, None)
    assert (setup.has_evidence(folder), setup.has_evidence(tmp_path)) == (True, False)
    assert setup.reading_folder(None, folder) == folder / "reading"
    assert setup.reading_folder(tmp_path, folder) == tmp_path
    assert setup.reading_folder(None, tmp_path) is None


def test_the_last_words_can_be_pasted():
    _, command = setup.judge_command(Path("my runs/adapter"), DEFAULT_BASE, False).split("\n")
    words = shlex.split(command)
    assert words[:4] == ["python", "judge.py", "--adapter", "my runs/adapter"]
    assert all((ROOT / word).is_file() for word in words if word.endswith(".txt"))
    assert "--base Qwen/x" in setup.judge_command(Path("a"), "Qwen/x", False)
    assert "judge.py" not in setup.judge_command(Path("a"), DEFAULT_BASE, True)
