"""The style similarity: pooled states, their contrast, and the percentiles of strangers."""

import json
import math
from collections.abc import Sequence
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from nanopersrm import InputError
from nanopersrm.model.cache import Layout
from nanopersrm.model.lora import Lora, LoraConfig
from nanopersrm.model.transformer import Model
from nanopersrm.model.weights import load
from nanopersrm.style import similarity as style
from nanopersrm.style.similarity import (
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
    config = StyleConfig(layers=2, tokens=5)
    return Style(model, adapter(model), config, [i / 100 for i in range(101)])


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


def test_pool_refuses_what_it_cannot_pool():
    for starts, part in (((0, 3), "end at 3"), ((0, 2, 2, 4), "1 row or more")):
        with pytest.raises(AssertionError, match=part):
            pool(torch.zeros(4, 2), starts)


def test_pool_has_the_right_gradient():
    hidden = torch.randn(7, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda h: pool(h, (0, 2, 3, 7)), [hidden])


# The contrast


def test_the_worked_number():
    cosines = torch.tensor([[0.9, 0.5], [0.6, 0.8]])
    mine, same = torch.tensor([0, 1]), torch.eye(2, dtype=torch.bool)
    loss, right = in_batch_loss(torch.eye(2), cosines.T, mine, same, 0.1)
    terms = [math.log1p(math.exp(-lead)) for lead in (4, 2, 3, 3)]
    assert float(loss) == pytest.approx(sum(terms) / 4, abs=1e-6)
    assert float(loss) == pytest.approx(0.061, abs=5e-4)
    assert float(right) == 1
    _, right = in_batch_loss(torch.eye(2), torch.tensor([[0.2, 0.1], [0.6, 0.8]]), mine, same, 0.1)
    assert float(right) == 0.5  # the first writer's exemplar is nearer to the other's candidate


def test_the_contrast_is_the_formula():
    """4 writers, 7 candidates of which some are by the same writers and not in order."""
    exemplars, candidates = units(4, 1), units(7, 2)
    owner = [2, 0, 1, 3, 0, 9, 3]  # of each candidate; 9 is none of the four
    mine = torch.tensor([owner.index(i) for i in range(4)])
    same = torch.tensor([[o == i for o in owner] for i in range(4)])
    loss, right = in_batch_loss(exemplars, candidates, mine, same, 0.05)
    total, found = 0.0, 0
    for i in range(4):
        own = int(mine[i])
        rivals = [j for j in range(7) if j == own or owner[j] != i]
        scores = {j: float(exemplars[i] @ candidates[j]) / 0.05 for j in rivals}
        total += math.log(sum(math.exp(s) for s in scores.values())) - scores[own]
        found += max(scores, key=lambda j: scores[j]) == own
        back = [float(exemplars[k] @ candidates[own]) / 0.05 for k in range(4)]
        total += math.log(sum(map(math.exp, back))) - back[i]
    assert float(loss) == pytest.approx(total / 8, rel=1e-5)
    assert float(right) == found / 4


def test_texts_of_the_same_writer_do_not_push_away():
    exemplars, candidates = units(3, 3), units(5, 4).requires_grad_()
    same = torch.tensor([[1, 0, 0, 1, 0], [0, 1, 0, 1, 0], [0, 0, 1, 1, 0]]).bool()
    loss, _ = in_batch_loss(exemplars, candidates, torch.arange(3), same, 0.1)
    loss.backward()
    assert candidates.grad is not None
    pushed = candidates.grad.abs().sum(-1) > 0
    assert pushed.tolist() == [True, True, True, False, True]


def test_the_contrast_has_the_right_gradient():
    exemplars = units(3, 5, torch.float64).requires_grad_()
    candidates = units(4, 6, torch.float64).requires_grad_()
    same = torch.eye(3, 4).bool()
    same[0, 3] = True

    def loss(e: Tensor, c: Tensor) -> Tensor:
        return in_batch_loss(e, c, torch.arange(3), same, 0.2)[0]

    assert torch.autograd.gradcheck(loss, [exemplars, candidates])


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


@pytest.mark.parametrize("recompute", [False, True])
def test_the_gradient_reaches_the_adapter(model, recompute):
    lora = adapter(model)
    with lora.using(model):
        vectors = vectors_of(states(model, TEXTS, recompute=recompute), None)
        loss = (vectors[0] * vectors[1]).sum()
        loss.backward()
    slope = [p.grad for p in lora.parameters()]
    assert all(g is not None and bool(g.abs().sum() > 0) for g in slope)
    name = "layers.1.mlp.up_proj"
    B = lora.masters[name][1]
    assert B.grad is not None
    step = 1e-2 * B.grad / B.grad.norm()
    values = []
    for sign in (1, -1):
        with torch.no_grad():
            B.add_(sign * step)
        lora.refresh()
        with torch.no_grad(), lora.using(model):
            vectors = vectors_of(states(model, TEXTS), None)
        values.append(float((vectors[0] * vectors[1]).sum()))
        with torch.no_grad():
            B.sub_(sign * step)
    assert (values[0] - values[1]) / 2e-2 == pytest.approx(float(B.grad.norm()), rel=0.02)


def test_the_loss_of_a_step(model):
    """Two writers with 2 and 1 exemplars, and a text by neither."""
    config = StyleConfig(layers=2, temperature=0.1)
    a, b, c, d, e = TEXTS
    loss, right = batch_loss(model, [[a, b], [c]], [d, e], [[5, 5, 1]], config)
    writers = torch.stack([F.normalize(alone(model, a) + alone(model, b), dim=0), alone(model, c)])
    others = torch.stack([alone(model, text) for text in (d, e, [5, 5, 1])])
    expected = in_batch_loss(writers, others, torch.arange(2), torch.eye(2, 3).bool(), 0.1)
    torch.testing.assert_close((loss, right), expected, rtol=1e-4, atol=1e-5)
    fewer, _ = batch_loss(model, [[a, b], [c]], [d, e], [], config)
    assert fewer < loss  # there is less to confuse


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
    monkeypatch.setattr(style, "TOKENS_AT_ONCE", 6)
    torch.testing.assert_close(trained.embed(TEXTS), expected)
    assert sizes == [6, 6, 3]  # 4 + 2, 5 + 1, 3 tokens


# Similarities


def test_similarities_and_percentiles(model, trained):
    with trained.lora.using(model):
        a, b, c, d = (alone(model, text[:5]) for text in TEXTS[:4])
    writer = F.normalize(a + b, dim=0)
    torch.testing.assert_close(writer_of(torch.stack([a, b])), writer)
    found = trained.similarities(TEXTS[:2], TEXTS[2:4])
    assert found == pytest.approx([float(writer @ c), float(writer @ d)], abs=1e-5)
    assert trained.similarities(TEXTS[:1], TEXTS[:1]) == pytest.approx([1.0], abs=1e-6)
    expected = [min(100.0, max(0.0, 100 * cosine)) for cosine in found]
    assert trained.percentiles(TEXTS[:2], TEXTS[2:4]) == pytest.approx(expected, abs=1e-4)


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
    monkeypatch.setattr(style, "REMEMBERED", 2)
    fresh = Style(model, trained.lora, trained.config)
    assert fresh.similarities(TEXTS[:2], TEXTS[2:]) == changed
    assert list(fresh._known) == [tuple(text) for text in TEXTS[3:]]  # the newest


def test_quantiles_of_strangers():
    random = torch.randn(999, generator=torch.Generator().manual_seed(3)).tolist()
    quantiles = strangers_quantiles(random)
    assert len(quantiles) == 101
    assert list(quantiles) == sorted(quantiles)
    assert (quantiles[0], quantiles[100]) == (
        pytest.approx(min(random)),
        pytest.approx(max(random)),
    )
    assert quantiles[50] == pytest.approx(sorted(random)[499])
    assert strangers_quantiles([0.0, 1.0])[25] == pytest.approx(0.25)


# Files


def test_a_saved_style_is_loaded_again(model, trained, tmp_path):
    trained.save(tmp_path / "style", "some/base")
    found = Style.load(tmp_path / "style", model)
    assert found.config == trained.config
    assert found.quantiles == trained.quantiles
    assert not any(part.requires_grad for part in found.lora.parameters())
    assert found.percentiles(TEXTS[:2], TEXTS[2:]) == trained.percentiles(TEXTS[:2], TEXTS[2:])
    names = sorted(file.name for file in (tmp_path / "style").iterdir())
    assert names == ["adapter_config.json", "adapter_model.safetensors", "style.json"]


@pytest.mark.parametrize(
    ("field", "value", "part"),
    [
        ("layers", None, "field layers"),
        ("layers", 9, "at most 3"),
        ("layers", 1.5, "field layers"),
        ("tokens", 0, "tokens from 1"),
        ("tokens", True, "field tokens"),
        ("temperature", -1, "a temperature above 0"),
        ("quantiles", None, "field quantiles"),
        ("quantiles", [0.5] * 100, "101 numbers"),
        ("quantiles", [1.0, *[0.5] * 100], "least first"),
        ("quantiles", ["a"] * 101, "101 numbers"),
        ("quantiles", [math.nan] * 101, "101 numbers"),
    ],
)
def test_a_broken_style_is_refused(model, trained, tmp_path, field, value, part):
    trained.save(tmp_path, "some/base")
    file = tmp_path / "style.json"
    found = json.loads(file.read_text())
    file.write_text(json.dumps(found | {field: value}))
    with pytest.raises(InputError, match=part) as caught:
        Style.load(tmp_path, model)
    assert str(file) in str(caught.value)
    file.unlink()
    with pytest.raises(InputError, match=r"style\.json"):
        Style.load(tmp_path, model)
