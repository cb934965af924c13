"""The style similarity: pooled states, their contrast, and the percentiles of strangers."""

import json
import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from nanopersrm import InputError
from nanopersrm.model.cache import Layout
from nanopersrm.model.lora import TARGETS, Lora, LoraConfig
from nanopersrm.model.transformer import Model
from nanopersrm.model.weights import load
from nanopersrm.style import similarity
from nanopersrm.style.fusion import Fusion
from nanopersrm.style.similarity import (
    Standard,
    Style,
    StyleConfig,
    batch_loss,
    in_batch_loss,
    pool,
    states,
    strangers_quantiles,
    vectors_of,
    writer_of,
)

CPU = torch.device("cpu")
OTHERS = [[1, 2, 3, 4], [90, 80, 70], [5, 15, 25, 35, 45, 55], [120], [64, 32], [8, 88]]
QUANTILES = [i / 100 for i in range(101)]
TEXTS = [[3, 7, 7, 30], [101, 5], [9, 8, 7, 6, 5, 4, 3], [42], [77, 11, 77]]


@pytest.fixture(scope="module")
def model(tiny_base) -> Model:
    return load(tiny_base, torch.float32, CPU)


def adapter(model: Model, seed: int = 5) -> Lora:
    """One that does something."""
    lora = Lora(model, LoraConfig(rank=3), seed)
    random = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for _, B in lora.masters.values():
            B.normal_(0, 0.3, generator=random)
    lora.refresh()
    return lora


@pytest.fixture
def trained(model) -> Style:
    return Style(model, adapter(model), StyleConfig(layers=2, tokens=5), QUANTILES)


@pytest.fixture
def standardised(model) -> Style:
    """With a standard too."""
    style = Style(model, adapter(model), StyleConfig(layers=2, tokens=5), QUANTILES)
    style.standardise(OTHERS)
    return style


def state(model: Model, ids: Sequence[int], layers: int = 2) -> Tensor:
    """Of one text by a plain forward (D,)."""
    with torch.no_grad():
        hidden = model(torch.tensor(ids), Layout.of([len(ids)]), layers)
    return hidden.double().mean(0).float()


def alone(model: Model, ids: Sequence[int], layers: int = 2) -> Tensor:
    """The vector of one text (D,), without a standard."""
    return F.normalize(state(model, ids, layers), dim=0)


def units(rows: int, seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    random = torch.Generator().manual_seed(seed)
    return F.normalize(torch.randn(rows, 6, generator=random, dtype=dtype), dim=-1)


# Pooling


def test_pool_is_the_mean_of_each_segment():
    hidden = torch.randn(11, 6, generator=torch.Generator().manual_seed(1))
    starts = (0, 1, 4, 11)
    expected = torch.stack([hidden[0], hidden[1:4].mean(0), hidden[4:].mean(0)])
    torch.testing.assert_close(pool(hidden, starts), expected)
    pooled = pool(hidden.bfloat16(), starts)
    assert pooled.dtype == torch.float32
    rounded = hidden.bfloat16().float()
    torch.testing.assert_close(pooled[2], rounded[4:].mean(0))  # summed in 32 bits


# The contrast


def test_the_worked_number():
    cosines = torch.tensor([[0.9, 0.5], [0.6, 0.8]])
    loss, right = in_batch_loss(torch.eye(2), cosines.T, 0.1)
    terms = [math.log1p(math.exp(-lead)) for lead in (4, 2, 3, 3)]
    assert float(loss) == pytest.approx(sum(terms) / 4, abs=1e-6)
    assert float(loss) == pytest.approx(0.061, abs=5e-4)
    assert float(right) == 1
    _, right = in_batch_loss(torch.eye(2), torch.tensor([[0.2, 0.1], [0.6, 0.8]]), 0.1)
    assert float(right) == 0.5  # the first writer's exemplar is nearer to the other's candidate


def test_the_contrast_is_the_formula():
    """4 writers, 7 candidates of which the last three are by nobody of the four."""
    exemplars, candidates = units(4, 1), units(7, 2)
    loss, right = in_batch_loss(exemplars, candidates, 0.05)
    total, wins = 0.0, 0
    for i in range(4):
        row = [float(exemplars[i] @ candidates[j]) / 0.05 for j in range(7)]
        back = [float(exemplars[k] @ candidates[i]) / 0.05 for k in range(4)]
        total += math.log(sum(map(math.exp, row))) - row[i]
        total += math.log(sum(map(math.exp, back))) - back[i]
        wins += max(row) == row[i]
    assert float(loss) == pytest.approx(total / 8, rel=1e-5)
    assert float(right) == wins / 4


# Vectors


def test_a_packed_text_is_as_it_is_alone(model):
    found = [states(model, TEXTS, layers) for layers in (1, 2, 3, None)]
    for layers in (1, 2, 3):
        expected = torch.stack([state(model, text, layers) for text in TEXTS])
        torch.testing.assert_close(found[layers - 1], expected)
    assert found[0].dtype == torch.float32
    assert torch.equal(found[2], found[3])  # None: all blocks
    assert all((a - b).abs().max() > 0.01 for a, b in pairwise(found[:3]))
    vectors = vectors_of(found[1], None)
    torch.testing.assert_close(vectors, torch.stack([alone(model, text) for text in TEXTS]))
    torch.testing.assert_close(vectors.norm(dim=-1), torch.ones(len(TEXTS)))


def test_embed_leaves_the_model_as_it_was(model, trained):
    other = adapter(model, seed=9)
    model.train()
    try:
        with other.using(model):
            before = states(model, TEXTS, 2).detach()
            vectors = trained.embed(TEXTS)
            torch.testing.assert_close(states(model, TEXTS, 2).detach(), before)
            with trained.lora.using(model):
                expected = torch.stack([alone(model, text[:5]) for text in TEXTS])
            assert model.training
    finally:
        model.eval()
    assert not vectors.requires_grad
    torch.testing.assert_close(vectors, expected)  # cut after 5 tokens, by the style adapter
    assert (vectors - vectors_of(before, None)).abs().max() > 0.01


def test_embed_runs_in_batches_of_bounded_size(model, trained, monkeypatch):
    expected = trained.embed(TEXTS)
    sizes: list[int] = []
    forward = type(model).forward

    def counting(self, ids, *rest, **named):
        sizes.append(len(ids))
        return forward(self, ids, *rest, **named)

    monkeypatch.setattr(type(model), "forward", counting)
    monkeypatch.setattr(similarity, "TOKENS_AT_ONCE", 6)
    torch.testing.assert_close(trained.embed(TEXTS), expected)
    assert sizes == [6, 6, 3]  # 4 + 2, 5 + 1, 3 tokens


# Similarities


def test_similarities(model, trained):
    with trained.lora.using(model):
        a, b, c, d = (alone(model, text[:5]) for text in TEXTS[:4])
    writer = F.normalize(a + b, dim=0)
    torch.testing.assert_close(writer_of(torch.stack([a, b])), writer)
    found = trained.similarities(TEXTS[:2], TEXTS[2:4])
    assert found == pytest.approx([float(writer @ c), float(writer @ d)], abs=1e-5)
    assert trained.similarities(TEXTS[:1], TEXTS[:1]) == pytest.approx([1.0], abs=1e-6)


def test_neighbours_do_not_matter(model, trained):
    every = trained.similarities(TEXTS[:2], TEXTS[2:])
    for i, text in enumerate(TEXTS[2:]):
        fresh = Style(model, trained.lora, trained.config)
        assert fresh.similarities(TEXTS[:2], [text]) == [every[i]]  # to the last bit


def test_vectors_are_remembered_while_the_adapter_stays(model, trained, monkeypatch):
    runs = 0
    embed = Style.embed

    def counting(self, texts):
        nonlocal runs
        runs += 1
        return embed(self, texts)

    monkeypatch.setattr(Style, "embed", counting)
    first = trained.similarities(TEXTS[:2], TEXTS[2:])
    assert trained.similarities(TEXTS[:2], TEXTS[:1:-1]) == first[::-1]
    assert runs == len(TEXTS)
    with torch.no_grad():
        for part in trained.lora.parameters():
            part.mul_(1.5)
    trained.lora.refresh()
    changed = trained.similarities(TEXTS[:2], TEXTS[2:])
    assert runs == 2 * len(TEXTS)
    assert changed != first
    monkeypatch.setattr(similarity, "REMEMBERED", 2)
    fresh = Style(model, trained.lora, trained.config)
    assert fresh.similarities(TEXTS[:2], TEXTS[2:]) == changed
    assert len(fresh._vectors) <= 2


def test_quantiles_of_strangers():
    quantiles = strangers_quantiles([3.0, 0.0, 1.0, 2.0])
    assert len(quantiles) == 101
    assert [quantiles[i] for i in (0, 25, 50, 100)] == pytest.approx([0, 0.75, 1.5, 3])


def standard_of(made: Style) -> Standard:
    assert made.standard is not None
    return made.standard


def fresh(model: Model, rank: int = 3, **fields: Any) -> Lora:
    """An adapter on the blocks that run, which does something."""
    lora = similarity.adapter(model, LoraConfig(rank=rank), StyleConfig(**fields), seed=1)
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


def test_standardise_measures_with_the_adapter_on_and_texts_cut(model, standardised):
    with standardised.lora.using(model):
        seen = torch.stack([state(model, text[:5]) for text in OTHERS])
    mean = seen.sum(0) / 6
    found = standard_of(standardised)
    torch.testing.assert_close(found.mean, mean)
    torch.testing.assert_close(found.deviation, ((seen - mean) ** 2).sum(0).div(5).sqrt())
    assert not found.mean.requires_grad
    bare = torch.stack([state(model, text[:5]) for text in OTHERS])
    assert (bare.mean(0) - found.mean).abs().max() > 0.01
    standardised.standardise(OTHERS)  # measured on states: the standard it had changes nothing
    torch.testing.assert_close(standard_of(standardised), found, rtol=0, atol=0)


def test_a_new_standard_forgets_the_vectors_of_the_old(model, standardised):
    first = standardised.similarities(TEXTS[:2], TEXTS[2:])
    facts = standardised.facts()
    standardised.standardise(TEXTS)
    second = standardised.similarities(TEXTS[:2], TEXTS[2:])
    other = Style(model, standardised.lora, standardised.config, standard=standardised.standard)
    assert second == other.similarities(TEXTS[:2], TEXTS[2:]) != first
    assert standardised.measured(facts).similarities(TEXTS[:2], TEXTS[2:]) == first


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
    expected = in_batch_loss(vectors[:2], vectors[2:], 0.1)
    torch.testing.assert_close((loss.detach(), right), expected, rtol=1e-4, atol=1e-5)
    assert all(part.grad is not None and bool(part.grad.any()) for part in lora.parameters())
    assert abs(float((without - loss).detach())) > 0.01


# The blocks that run


@pytest.mark.parametrize(("layers", "depth"), [(0, 1), (2, 2), (3, 3)])
def test_the_adapter_sits_on_the_blocks_that_run(model, layers, depth):
    lora = fresh(model, layers=layers)
    assert len(lora.masters) == depth * len(TARGETS)
    assert {int(name.split(".")[1]) for name in lora.masters} == set(range(depth))
    some = LoraConfig(rank=2, targets=("v_proj",))
    few = similarity.adapter(model, some, StyleConfig(layers=layers), seed=1)
    assert list(few.masters) == [f"layers.{i}.self_attn.v_proj" for i in range(depth)]
    made = Style(model, lora, StyleConfig(layers=layers))
    with lora.using(model):
        expected = torch.stack([alone(model, text, depth) for text in TEXTS])
    torch.testing.assert_close(made.embed(TEXTS), expected)


# Files


@pytest.mark.parametrize("layers", [0, 2])
def test_a_saved_style_is_loaded_again(model, tmp_path, layers):
    made = Style(model, fresh(model, layers=layers), StyleConfig(layers, tokens=5), QUANTILES)
    made.standardise(OTHERS)
    made.fusion = Fusion({"n-grams": 2.0}, {"n-grams": -0.4}, slope=1.5, offset=0.25)
    made.save(tmp_path, "some/base")
    names = sorted(file.name for file in tmp_path.iterdir())
    assert names == ["adapter_config.json", "adapter_model.safetensors", "style.json"]
    found = Style.load(tmp_path, model)
    assert (found.config, found.quantiles) == (made.config, made.quantiles)
    assert found.fusion == made.fusion
    assert all(map(torch.equal, standard_of(found), standard_of(made)))
    assert standard_of(found).mean.dtype == torch.float32
    assert found.lora.masters.keys() == made.lora.masters.keys()
    assert not any(part.requires_grad for part in found.lora.parameters())
    assert found.similarities(TEXTS[:2], TEXTS[2:]) == made.similarities(TEXTS[:2], TEXTS[2:])
    made.standard = None
    made.save(tmp_path, "some/base")
    assert Style.load(tmp_path, model).standard is None


@pytest.mark.parametrize(
    ("field", "values"),
    [
        ("layers", [None, 9, 1.5]),
        ("tokens", [0, True]),
        ("temperature", [-1, "warm"]),
        ("quantiles", [None, [0.5] * 100, [1.0, *[0.5] * 100], ["a"] * 101]),
        ("mean", [None, [0.5] * 47, ["a"] * 48, [True] * 48, [[0.5]] * 48, []]),
        ("deviation", [[1.0] * 49, "wide", [1.0] * 47 + [0.0], [-1.0] * 48, []]),
        ("fusion", [3, {"weights": {}}]),
    ],
)
def test_a_broken_style_is_refused(model, standardised, tmp_path, field, values):
    standardised.save(tmp_path, "some/base")
    file = tmp_path / "style.json"
    sound = json.loads(file.read_text())
    for value in values:
        file.write_text(json.dumps(sound | {field: value}))
        with pytest.raises(InputError, match=field if value != [] else "deviation") as caught:
            Style.load(tmp_path, model)
        assert str(caught.value).startswith(str(file))
        assert "\n" not in str(caught.value)
    file.unlink()
    with pytest.raises(InputError, match=r"style\.json"):
        Style.load(tmp_path, model)
