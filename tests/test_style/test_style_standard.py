"""What is usual: the standard of the states, the blocks that run, and both on disk."""

import nanopersrm  # noqa: F401, I001  (before torch)

import json
import math
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from test_style import CPU, TEXTS, adapter, alone, state

from nanopersrm import InputError
from nanopersrm.model import lora_files
from nanopersrm.style import similarity as style
from nanopersrm.model.cache import Layout
from nanopersrm.model.lora import TARGETS, Lora, LoraConfig
from nanopersrm.model.transformer import Model
from nanopersrm.style.fusion import Fusion
from nanopersrm.style.similarity import (
    LEAST_DEVIATION,
    Standard,
    Style,
    StyleConfig,
    batch_loss,
    in_batch_loss,
    vectors_of,
    writer_of,
)
from nanopersrm.model.weights import load

OTHERS = [[1, 2, 3, 4], [90, 80, 70], [5, 15, 25, 35, 45, 55], [120], [64, 32], [8, 88]]
QUANTILES = [i / 100 for i in range(101)]


@pytest.fixture(scope="module")
def model(tiny_base) -> Model:
    return load(tiny_base, torch.float32, CPU)


@pytest.fixture
def trained(model) -> Style:
    """With an adapter that does something, and a standard."""
    made = Style(model, adapter(model), StyleConfig(layers=2, tokens=5), QUANTILES)
    made.standardise(OTHERS)
    return made


def standard_of(made: Style) -> Standard:
    assert made.standard is not None
    return made.standard


def fresh(model: Model, rank: int = 3, **fields: Any) -> Lora:
    """An adapter on the blocks that run, which does something."""
    lora = style.adapter(model, LoraConfig(rank=rank), StyleConfig(**fields), seed=1)
    with torch.no_grad():
        for i, (_, B) in enumerate(lora.masters.values()):
            B.normal_(0, 0.3, generator=torch.Generator().manual_seed(i))
    lora.refresh()
    return lora


# The standard


def test_vectors_by_hand():
    """(7 - 4) / 1 = 3 and (-1 - 1) / 0.5 = -4, a vector of length 5."""
    standard = Standard(torch.tensor([4.0, 1.0]), torch.tensor([1.0, 0.5]))
    found = vectors_of(torch.tensor([[7.0, -1.0], [4.0, 3.0]]), standard)
    torch.testing.assert_close(found, torch.tensor([[0.6, -0.8], [0.0, 1.0]]))
    bare = vectors_of(torch.tensor([[7.0, -1.0], [6.0, -8.0]]), None)
    expected = torch.tensor([[7 / math.sqrt(50), -1 / math.sqrt(50)], [0.6, -0.8]])
    torch.testing.assert_close(bare, expected)


def test_a_number_large_in_every_text_no_longer_decides():
    """100 ± 1 beside 1 and -1: alike without a standard, opposite with it."""
    states = torch.tensor([[101.0, 1.0], [99.0, -1.0]])
    a, b = vectors_of(states, None)
    assert float(a @ b) > 0.999
    a, b = vectors_of(states, Standard(states.mean(0), states.std(0)))
    assert float(a @ b) == pytest.approx(-1)


def test_standardise_measures_with_the_adapter_on_and_texts_cut(model, trained):
    with trained.lora.using(model):
        seen = torch.stack([state(model, text[:5]) for text in OTHERS])
    mean = seen.sum(0) / 6
    found = standard_of(trained)
    torch.testing.assert_close(found.mean, mean)
    torch.testing.assert_close(found.deviation, ((seen - mean) ** 2).sum(0).div(5).sqrt())
    assert not found.mean.requires_grad
    bare = torch.stack([state(model, text[:5]) for text in OTHERS])
    assert (bare.mean(0) - found.mean).abs().max() > 0.01
    trained.standardise(OTHERS)  # measured on states: the standard it had changes nothing
    torch.testing.assert_close(standard_of(trained), found, rtol=0, atol=0)
    with pytest.raises(AssertionError, match="2 texts or more, got 1"):
        trained.standardise(OTHERS[:1])


def test_similarities_with_a_standard(model, trained):
    with trained.lora.using(model):
        rows = torch.stack([state(model, text[:5]) for text in TEXTS])
    a, b, *rest = F.normalize((rows - standard_of(trained).mean) / trained.standard.deviation)
    expected = [float(writer_of(torch.stack([a, b])) @ vector) for vector in rest]
    found = trained.similarities(TEXTS[:2], TEXTS[2:])
    assert found == pytest.approx(expected, abs=1e-4)
    torch.testing.assert_close(trained.embed(TEXTS)[2:], torch.stack(rest), atol=1e-4, rtol=0)


def test_a_new_standard_forgets_the_vectors_of_the_old(model, trained):
    first = trained.similarities(TEXTS[:2], TEXTS[2:])
    facts = trained.facts()
    trained.standardise(TEXTS)
    second = trained.similarities(TEXTS[:2], TEXTS[2:])
    other = Style(model, trained.lora, trained.config, standard=trained.standard)
    assert second == other.similarities(TEXTS[:2], TEXTS[2:]) != first
    assert trained.measured(facts).similarities(TEXTS[:2], TEXTS[2:]) == first


def test_a_number_that_never_varies(model, trained):
    trained.standardise([TEXTS[0], TEXTS[0]])
    found = standard_of(trained)
    assert torch.equal(found.deviation, torch.full_like(found.mean, LEAST_DEVIATION))
    vectors = trained.embed(TEXTS)
    assert bool(vectors.isfinite().all())
    torch.testing.assert_close(vectors[1:].norm(dim=-1), torch.ones(len(TEXTS) - 1))


def test_the_loss_of_a_step_with_a_standard(model):
    """Two writers; the gradient runs through the standard, and not into it."""
    config = StyleConfig(layers=2, temperature=0.1)
    standard = Standard(torch.linspace(-1, 1, 48), torch.linspace(0.5, 2, 48))
    lora, (a, b, c, d, _) = fresh(model, layers=2), TEXTS
    with lora.using(model):
        loss, right = batch_loss(model, [[a], [b]], [c, d], [], config, standard)
        loss.backward()
        rows = torch.stack([state(model, text) for text in (a, b, c, d)])
        without, _ = batch_loss(model, [[a], [b]], [c, d], [], config)
    vectors = F.normalize((rows - standard.mean) / standard.deviation)
    expected = in_batch_loss(
        vectors[:2], vectors[2:], torch.arange(2), torch.eye(2, dtype=torch.bool), 0.1
    )
    torch.testing.assert_close((loss.detach(), right), expected, rtol=1e-4, atol=1e-5)
    assert all(part.grad is not None and bool(part.grad.any()) for part in lora.parameters())
    assert abs(float((without - loss).detach())) > 0.01


# The blocks that run


@pytest.mark.parametrize(("layers", "depth"), [(30, 8), (28, 7), (3, 1), (1, 1), (16, 4)])
def test_depth(model, layers, depth):
    other: Any = type("Sized", (), {"config": replace(model.config, layers=layers)})
    assert StyleConfig().depth(other) == depth
    assert StyleConfig(layers=2).depth(other) == 2


@pytest.mark.parametrize(("layers", "depth"), [(0, 1), (2, 2), (3, 3)])
def test_the_adapter_sits_on_the_blocks_that_run(model, layers, depth):
    lora = fresh(model, layers=layers)
    assert len(lora.masters) == depth * len(TARGETS)
    assert {int(name.split(".")[1]) for name in lora.masters} == set(range(depth))
    some = LoraConfig(rank=2, targets=("v_proj",))
    few = style.adapter(model, some, StyleConfig(layers=layers), seed=1)
    assert list(few.masters) == [f"layers.{i}.self_attn.v_proj" for i in range(depth)]
    made = Style(model, lora, StyleConfig(layers=layers))
    with lora.using(model):
        expected = torch.stack([alone(model, text, depth) for text in TEXTS])
    torch.testing.assert_close(made.embed(TEXTS), expected)


def test_no_other_block_runs(model, trained, monkeypatch):
    def forward(*_, **__):
        raise AssertionError("the last block ran")

    last: Any = model.layers[2]
    monkeypatch.setattr(last, "forward", forward)
    trained.embed(TEXTS)
    with pytest.raises(AssertionError, match="the last block ran"):
        Style(model, trained.lora, StyleConfig(layers=3)).embed(TEXTS)


def test_an_adapter_on_some_blocks_goes_by_pefts_files(tiny_base, model, tmp_path):
    import peft
    import transformers

    lora = fresh(model, layers=2)
    lora_files.save(tmp_path, lora, "tiny")
    again = lora_files.load(tmp_path, model)
    assert again.tensors().keys() == lora.tensors().keys()
    assert all(torch.equal(again.tensors()[name], t) for name, t in lora.tensors().items())
    base = transformers.AutoModelForCausalLM.from_pretrained(tiny_base.path)
    theirs = peft.PeftModel.from_pretrained(base, str(tmp_path)).eval()
    adapted = {name for name, _ in theirs.named_parameters() if "lora_A" in name}
    assert len(adapted) == 2 * len(TARGETS)
    ids = torch.tensor(TEXTS[2])
    with torch.no_grad():
        expected = theirs(ids[None]).logits[0]
        before = model.logits(model(ids, Layout.of([len(ids)])))
        with again.using(model):
            ours = model.logits(model(ids, Layout.of([len(ids)])))
    torch.testing.assert_close(ours, expected, atol=1e-4, rtol=1e-4)
    assert (ours - before).abs().max() > 0.05


# Files


def test_facts_go_round(model, trained):
    facts = json.loads(json.dumps(trained.facts()))  # as a checkpoint keeps them
    assert sorted(facts) == ["deviation", "fusion", "mean", "quantiles"]
    again = Style(model, trained.lora, trained.config).measured(facts)
    assert again.quantiles == trained.quantiles
    assert all(map(torch.equal, standard_of(again), standard_of(trained)))
    assert again.facts() == trained.facts()
    bare = Style(model, trained.lora, trained.config, QUANTILES)
    assert bare.facts() == {"quantiles": QUANTILES, "mean": [], "deviation": [], "fusion": None}
    assert again.measured(bare.facts()).standard is None
    again.fusion = Fusion({"n-grams": 2.0}, {"n-grams": -0.4}, slope=1.5, offset=0.25)
    told = json.loads(json.dumps(again.facts()))
    assert Style(model, trained.lora, trained.config).measured(told).fusion == again.fusion
    old = {
        key: value for key, value in told.items() if key != "fusion"
    }  # from before there was one
    assert Style(model, trained.lora, trained.config).measured(old).fusion is None


@pytest.mark.parametrize("layers", [0, 2, 3])
def test_a_saved_style_keeps_its_standard(model, tmp_path, layers):
    made = Style(model, fresh(model, layers=layers), StyleConfig(layers, tokens=5), QUANTILES)
    made.standardise(OTHERS)
    made.save(tmp_path, "some/base")
    found = Style.load(tmp_path, model)
    assert (found.config, found.quantiles) == (made.config, made.quantiles)
    assert all(map(torch.equal, standard_of(found), standard_of(made)))
    assert standard_of(found).mean.dtype == torch.float32
    assert found.lora.masters.keys() == made.lora.masters.keys()
    assert found.similarities(TEXTS[:2], TEXTS[2:]) == made.similarities(TEXTS[:2], TEXTS[2:])
    made.standard = None
    made.save(tmp_path, "some/base")
    assert Style.load(tmp_path, model).standard is None


@pytest.mark.parametrize(
    ("changed", "says"),
    [
        ({"mean": None}, "field mean: expected 48 numbers, the base's width"),
        ({"mean": [0.5] * 47}, "field mean: expected 48 numbers, the base's width"),
        ({"mean": ["a"] * 48}, "field mean: expected 48 numbers, the base's width"),
        ({"mean": [True] * 48}, "field mean: expected 48 numbers, the base's width"),
        ({"mean": [math.nan] * 48}, "field mean: expected 48 numbers, the base's width"),
        ({"mean": [-math.inf] * 48}, "field mean: expected 48 numbers, the base's width"),
        ({"mean": {"0": 0.5}}, "field mean: expected 48 numbers, the base's width"),
        ({"mean": [[0.5]] * 48}, "field mean: expected 48 numbers, the base's width"),
        ({"deviation": [1.0] * 49}, "field deviation: expected 48 numbers, above 0"),
        ({"deviation": "wide"}, "field deviation: expected 48 numbers, above 0"),
        ({"deviation": [1.0] * 47 + [0.0]}, "field deviation: expected 48 numbers, above 0"),
        ({"deviation": [-1.0] * 48}, "field deviation: expected 48 numbers, above 0"),
        ({"deviation": []}, "field deviation: expected 48 numbers, above 0"),
        ({"mean": []}, "field deviation: expected 0 numbers"),  # one without the other
    ],
)
def test_a_broken_standard_is_refused(model, trained, tmp_path, changed, says):
    trained.save(tmp_path, "some/base")
    file = tmp_path / "style.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changed))
    with pytest.raises(InputError) as caught:
        Style.load(tmp_path, model)
    assert str(caught.value).startswith(f"{file}, {says}")
    assert "\n" not in str(caught.value)
    file.write_text("{}")
    with pytest.raises(InputError, match="field layers: expected a number"):
        Style.load(tmp_path, model)
