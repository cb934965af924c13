"""What training starts from: the right model, two adapters that are one, and what is said of it."""

import shlex
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from fixtures import make_adapter, make_base

from nanopersrm import InputError
from nanopersrm.judge import adapter_settings
from nanopersrm.judge.adapter_settings import weights_sha256
from nanopersrm.model.base import DEFAULT_BASE, Base
from nanopersrm.model.linear import Linear
from nanopersrm.model.transformer import Model
from nanopersrm.model.weights import load as load_weights
from nanopersrm.train import setup as starting
from nanopersrm.train.presets import PRESETS, settled
from nanopersrm.train.setup import (
    RANDOM,
    TINY,
    adapter_sha256,
    adapters,
    form_of,
    is_random,
    load,
    named,
    said_by,
    unsaid,
)

CPU = torch.device("cpu")
ROOT = Path(__file__).parents[2]
HOW = PRESETS["tiny"]


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Base:
    return make_base(tmp_path_factory.mktemp("starting") / "smollm", "smollm")


@pytest.fixture(scope="module")
def model(base) -> Model:
    return load(base, HOW, CPU, 0, tiny=False)


@pytest.fixture(scope="module")
def folder(base, tmp_path_factory) -> Path:
    return make_adapter(tmp_path_factory.mktemp("starting") / "adapter", base)


# The model


def test_tiny_is_random_unless_a_base_is_named():
    assert is_random("tiny", DEFAULT_BASE)
    assert not is_random("tiny", "another")
    assert not is_random("cpu", DEFAULT_BASE)
    assert not is_random(None, DEFAULT_BASE)


def test_the_base_frozen_and_in_training(base, model):
    plain = load_weights(base, torch.float32, CPU)
    assert model.training
    assert not any(part.requires_grad for part in model.parameters())
    for name, part in plain.state_dict().items():
        assert torch.equal(model.state_dict()[name], part)


def test_a_random_model_has_the_bases_vocabulary(base):
    one, same, other = (load(base, HOW, CPU, seed, tiny=True) for seed in (0, 0, 1))
    sizes = one.config
    assert (sizes.D, sizes.layers) == (TINY["hidden_size"], TINY["num_hidden_layers"])
    assert base.config["vocab_size"] == sizes.V
    assert one.training
    name = "layers.0.mlp.up_proj.weight"
    assert torch.equal(one.state_dict()[name], same.state_dict()[name])
    assert not torch.equal(one.state_dict()[name], other.state_dict()[name])


def test_four_bits_where_the_preset_says_so(base, model):
    found = load(base, settled("tiny", {"nf4": True}), CPU, 0, tiny=True)
    assert any(matrix.nf4 is not None for matrix in found.modules() if isinstance(matrix, Linear))
    told = starting.made_for("x", base, found, True, True, "pointwise", False)
    assert told.nf4
    assert not starting.made_for("x", base, model, True, True, "pointwise", False).nf4


def test_what_a_result_says_of_itself(base, model, tmp_path, monkeypatch):
    told = starting.made_for(DEFAULT_BASE, base, model, False, True, "pairwise", True)
    assert (told.base, told.dtype, told.evidence) == (DEFAULT_BASE, "fp32", True)
    assert (told.form, told.style) == ("pairwise", True)
    assert told.base_sha256 == weights_sha256(base)
    assert starting.made_for("x", base, model, True, True, "both", False).base == RANDOM
    monkeypatch.chdir(base.path.parent)  # a folder by a name that is true here alone
    near = starting.made_for(base.path.name, base, model, False, True, "both", False)
    assert near.base == str(base.path)


# The adapter


def test_where_the_adapter_is(folder, tmp_path):
    expected = "expected a trained adapter in .*, found none: run `python train_sft.py` first"
    with pytest.raises(InputError, match=expected):
        said_by(None, tmp_path / "none", "some/base")
    found, made = said_by(None, folder, "some/base")
    assert found == folder
    assert made is not None
    assert made.form == "both"
    other = tmp_path / "none"
    assert said_by(folder, other, "some/base") == (folder, made)  # the default need not be there
    with pytest.raises(InputError, match="no such folder"):
        said_by(other, folder, "some/base")
    (folder / "judge.json").rename(folder / "away.json")
    assert said_by(folder, other, "some/base") == (folder, None)  # an adapter from elsewhere
    (folder / "away.json").rename(folder / "judge.json")


def test_what_nobody_has_said_follows_from_the_adapter():
    made = adapter_settings.AdapterSettings(
        base="b",
        base_sha256=None,
        nf4=True,
        dtype="fp16",
        evidence=True,
        form="pairwise",
        style=True,
    )
    assert unsaid(made, DEFAULT_BASE, None, None) == {"base": "b", "nf4": True, "dtype": "fp16"}
    own = {"base": "other", "nf4": False, "dtype": "bf16"}
    assert unsaid(made, "other", False, "bf16") == own
    plain = replace(made, base=RANDOM, nf4=False, form="both")  # 16 bits: the machine decides
    told = {"base": DEFAULT_BASE, "nf4": False, "dtype": None}
    assert unsaid(plain, DEFAULT_BASE, None, None) == told
    assert unsaid(None, "other", None, "bf16") == {}
    assert [form_of(one) for one in (made, plain, None)] == ["pairwise", "pointwise", "pointwise"]


def test_an_adapter_by_name(folder):
    assert named(None, DEFAULT_BASE) == named(Path("none"), DEFAULT_BASE) == (None, None)
    found, made = named(Path("default"), DEFAULT_BASE)
    assert found == adapter_settings.SHIPPED
    assert made is not None
    assert named(folder, "some/base")[0] == folder
    with pytest.raises(InputError, match="--adapter default: no adapter comes with the base s/b"):
        named(Path("default"), "s/b")
    with pytest.raises(InputError, match="--adapter none: expected an adapter to go on from"):
        said_by(Path("none"), folder, DEFAULT_BASE)


@pytest.mark.parametrize("trained", [True, False])
def test_two_that_are_the_same_one_of_them_frozen(model, folder, trained):
    lora, reference = adapters(folder if trained else None, model, 3, True)
    assert reference is not None
    own, other = lora.tensors(), reference.tensors()
    assert own.keys() == other.keys()
    for name, part in own.items():
        assert torch.equal(part, other[name])
        assert part.data_ptr() != other[name].data_ptr()
    assert all(part.requires_grad for part in lora.parameters())
    assert not any(part.requires_grad for part in reference.parameters())
    learned = any(part.any() for name, part in own.items() if name.endswith(".B"))
    assert learned == trained  # a new one does nothing yet
    alone, nothing = adapters(folder if trained else None, model, 3, False)
    assert nothing is None
    assert all(torch.equal(part, own[name]) for name, part in alone.tensors().items())
    assert all(matrix.adapter is None for matrix in lora.places.values())  # neither is on


def test_the_name_of_an_adapter_is_its_bytes(folder, base, tmp_path):
    first = adapter_sha256(folder)
    assert first is not None
    assert len(first) == 64
    assert adapter_sha256(make_adapter(tmp_path / "again", base)) == first
    file = folder / "adapter_model.safetensors"
    before = file.read_bytes()
    file.write_bytes(before[:-1] + bytes([before[-1] ^ 1]))
    assert adapter_sha256(folder) != first
    file.write_bytes(before)
    made = adapter_settings.read(folder)
    assert made is not None
    replace(made, sharpness=9.0).save(folder)  # as calibrate.py does, in the middle of a run
    assert adapter_sha256(folder) == first
    replace(made, evidence=not made.evidence).save(folder)
    assert adapter_sha256(folder) != first
    made.save(folder)
    assert adapter_sha256(folder) == first
    assert adapter_sha256(None) is None


def test_the_last_words_can_be_pasted():
    said = starting.to_judge_with(Path("my runs/adapter"), DEFAULT_BASE, False)
    first, command = said.split("\n")
    assert first == "To judge with it:"
    assert shlex.split(command)[:4] == ["python", "judge.py", "--adapter", "my runs/adapter"]
    assert "--base" not in command
    for word in shlex.split(command):
        assert not word.endswith(".txt") or (ROOT / word).is_file()
    other = starting.to_judge_with(Path("a"), "Qwen/Qwen2.5-7B", False)
    assert "--base Qwen/Qwen2.5-7B" in other
    assert "judge.py" not in starting.to_judge_with(Path("a"), DEFAULT_BASE, True)
