"""The decoder equals transformers' on every family, and all its forwards equal the plain one."""

from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from conftest import tiny
from tiny_bases import CPU, random_lora, refused
from tiny_bases import random_ids as ids_of
from torch import Tensor

from nanopersrm.model import transformer
from nanopersrm.model.base import resolve
from nanopersrm.model.cache import Layout
from nanopersrm.model.lora import Lora
from nanopersrm.model.transformer import MLP, Model, ModelConfig, rope_frequencies
from nanopersrm.model.weights import load

SMALL: dict[str, Any] = {  # a configuration to be broken
    "model_type": "llama", "hidden_size": 8, "num_attention_heads": 2, "num_hidden_layers": 1,
    "intermediate_size": 8, "vocab_size": 10, "rms_norm_eps": 1e-5, "max_position_embeddings": 16,
    "rope_theta": 1e4,
}  # fmt: skip
IDS = torch.tensor([5, 90, 17, 33, 2, 64, 128, 9, 77, 41, 3, 8])
FLAT = Layout.of([7, 5])
SHARED = Layout.of([4, 3, 3, 2], parents=[-1, 0, 0, 1])


def plain(model: Model, ids: torch.Tensor) -> torch.Tensor:
    """Logits (T, V) of one text in one forward."""
    return model.logits(model(ids, Layout.of([len(ids)])))


def random_ids(n: int, seed: int = 0) -> torch.Tensor:
    return torch.tensor(ids_of(n, seed), dtype=torch.int64)


def _grad(parameter: torch.nn.Parameter) -> torch.Tensor:
    assert parameter.grad is not None
    return parameter.grad


def test_logits_equal_transformers(tiny_pair):
    oracle, base = tiny_pair
    model = load(base, torch.float32, CPU)
    ids = random_ids(150)  # longer than the 64 positions of the scaled families' original context
    with torch.no_grad():
        expected = oracle(ids[None]).logits[0]
    assert expected.std() > 0.1
    assert (plain(model, ids) - expected).abs().max() < 1e-4


def test_gradients_equal_transformers(tiny_pair):
    """The packed forward is the training forward: a loss on it has transformers' gradients."""
    oracle, base = tiny_pair
    model = load(base, torch.float32, CPU).requires_grad_(True)
    ids = random_ids(40)
    oracle.zero_grad()
    oracle(ids[None]).logits[0].square().mean().backward()
    plain(model, ids).square().mean().backward()
    ours = model.get_parameter("layers.1.self_attn.k_proj.weight").grad
    theirs = oracle.model.layers[1].self_attn.k_proj.weight.grad
    oracle.zero_grad()
    assert theirs.abs().max() > 1e-5
    assert (ours - theirs).abs().max() < 1e-4 * theirs.abs().max() + 1e-7


def test_shared_prefix_equals_plain(tiny_pair):
    """prompt -> two middles -> three endings, and a text alone, in one forward, against seven plain
    texts; every position."""
    model = load(tiny_pair[1], torch.float32, CPU)
    lengths, parents = [20, 7, 5, 3, 1, 6, 17], [-1, 0, 0, 1, 1, 2, -1]
    parts = [random_ids(n, seed=10 + n) for n in lengths]
    layout = Layout.of(lengths, parents)
    shared = model.logits(model(torch.cat(parts), layout)).split(lengths)
    for s in range(len(parts)):
        chain, ancestor = [parts[s]], parents[s]
        while ancestor >= 0:
            chain.insert(0, parts[ancestor])
            ancestor = parents[ancestor]
        expected = plain(model, torch.cat(chain))[-lengths[s] :]
        assert (shared[s] - expected).abs().max() < 1e-4, f"segment {s}"


def test_shared_prefix_gradients_add_up(tiny_base):
    """One forward over P + 2R tokens has the gradients of two forwards over P + R."""
    model = load(tiny_base, torch.float32, CPU).requires_grad_(True)
    prompt, one, two = random_ids(12, 1), random_ids(5, 2), random_ids(8, 3)
    hidden = model(torch.cat([prompt, one, two]), Layout.of([12, 5, 8], [-1, 0, 0]))
    model.logits(hidden[12:]).square().sum().backward()
    shared = [_grad(parameter).clone() for parameter in model.parameters()]
    model.zero_grad()
    for reply in (one, two):
        plain(model, torch.cat([prompt, reply]))[12:].square().sum().backward()
    for ours, parameter in zip(shared, model.parameters(), strict=True):
        theirs = _grad(parameter)
        assert (ours - theirs).abs().max() <= 1e-4 * theirs.abs().max()


@pytest.mark.parametrize("fanout", [(0, 0, 0, 1, 1, 1), (1, 0, 0)])
def test_cached_equals_plain(tiny_pair, fanout):
    """Root, two middles of unequal length, replies fed in unequal pieces: every position against
    the plain forward."""
    model = load(tiny_pair[1], torch.float32, CPU)
    cache = model.new_cache()
    root, middles = random_ids(20, 1), [random_ids(7, 2), random_ids(4, 3)]
    with torch.inference_mode():
        cache.grow([0], 24)
        got: list[list[torch.Tensor]] = [[] for _ in fanout]
        first = model.logits(model(root, cache.step([20])))
        assert (first - plain(model, root)).abs().max() < 1e-4
        cache.grow([0, 0], 8)
        second = model.logits(model(torch.cat(middles), cache.step([7, 4]))).split([7, 4])
        for middle, logits in zip(middles, second, strict=True):
            expected = plain(model, torch.cat([root, middle]))[20:]
            assert (logits - expected).abs().max() < 1e-4
        cache.grow(fanout, 32)
        replies: list[list[torch.Tensor]] = [[] for _ in fanout]
        for step, pieces in enumerate([(1,) * 9, (1,) * 9, (3, 0, 5, 1, 2, 0), (1, 1, 0, 1, 1, 1)]):
            lengths = list(pieces[: len(fanout)])
            fresh = [random_ids(n, 100 * step + i) for i, n in enumerate(lengths)]
            out = model.logits(model(torch.cat(fresh), cache.step(lengths))).split(lengths)
            for i in range(len(fanout)):
                replies[i].append(fresh[i])
                got[i].append(out[i])
        for i, parent in enumerate(fanout):
            whole = torch.cat([root, middles[parent], *replies[i]])
            expected = plain(model, whole)[20 + len(middles[parent]) :]
            assert (torch.cat(got[i]) - expected).abs().max() < 1e-4, f"reply {i}"


def test_logits_of_some_ids_are_exact(tiny_pair):
    """In 16 bits the whole row is rounded; `logits_of` is not, packed or not."""
    model = load(tiny_pair[1], torch.bfloat16, CPU)
    head = model.head().float()
    ids = torch.tensor([7, 3, 99])
    with torch.inference_mode():
        hidden = model(random_ids(9), Layout.of([9]))
        expected = (hidden.float() @ head.T)[:, ids]
        for again in (model, model.pack()):
            assert (again.logits_of(hidden, ids) - expected).abs().max() < 1e-5
            assert again.logits_of(hidden, ids).dtype == torch.float32


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bit_stays_close(tiny_base, dtype):
    """16-bit forwards, packed for the CPU or not, stay within a few roundings of fp32 (spread of
    logits: 1 to 2)."""
    ids = random_ids(60)
    exact = plain(load(tiny_base, torch.float32, CPU), ids)
    model = load(tiny_base, dtype, CPU)
    with torch.inference_mode():
        error = (plain(model, ids) - exact).abs().mean() / exact.std()
        assert error < (0.03 if dtype == torch.bfloat16 else 0.004)
        packed = plain(model.pack(), ids)
        assert (packed - exact).abs().mean() / exact.std() < 1.5 * error + 1e-3


# Recompute


def loss_and_gradients(model: Model, lora: Lora, layout: Layout, recompute: bool) -> list[Tensor]:
    lora.refresh()
    loss = F.cross_entropy(model.logits(model(IDS, layout, recompute=recompute)), IDS.roll(-1))
    loss.backward()
    gradients = [_grad(part) for part in lora.parameters()]
    for part in lora.parameters():
        part.grad = None
    return [loss.detach(), *gradients]


@pytest.mark.parametrize("tile", [4, 1024])
@pytest.mark.parametrize("name", ["llama-bias-linear", "qwen2", "qwen3"])
def test_recompute_changes_nothing(name, tile, tmp_path, monkeypatch):
    """Loss and gradients, with the MLP in tiles and whole, NF4 and shared prefixes."""
    monkeypatch.setattr(transformer, "TILE", tile)
    tiny(name, tmp_path)
    for nf4 in (False, True):
        model = load(resolve(str(tmp_path)), torch.float32, CPU, nf4)
        lora = random_lora(model)
        lora.on(model)
        for layout in (FLAT, SHARED):
            plain_run = loss_and_gradients(model, lora, layout, recompute=False)
            assert any(grad.abs().max() > 1e-3 for grad in plain_run[1:])
            again = loss_and_gradients(model, lora, layout, recompute=True)
            for ours, expected in zip(again, plain_run, strict=True):
                size = max(expected.abs().max().item(), 1)
                torch.testing.assert_close(ours, expected, atol=1e-5 * size, rtol=1e-4)


def test_every_row_is_computed_twice(tiny_base, monkeypatch):
    """In the first pass and in the backward, however many tiles: no oftener than without."""
    model = load(tiny_base, torch.float32, CPU)
    lora = random_lora(model)
    lora.on(model)
    rows: list[int] = []
    whole = MLP.forward

    def counting(self: MLP, x: Tensor) -> Tensor:
        rows.append(len(x))
        return whole(self, x)

    monkeypatch.setattr(MLP, "forward", counting)
    for tile in (1024, 5):
        monkeypatch.setattr(transformer, "TILE", tile)
        rows.clear()
        loss_and_gradients(model, lora, FLAT, recompute=True)
        assert sum(rows) == 2 * model.config.layers * FLAT.starts[-1]
        assert max(rows) <= tile


# Configurations


@pytest.mark.parametrize(
    ("fields", "part"),
    [
        ({"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}, "'dynamic'"),
        ({"hidden_act": "gelu"}, "'gelu'"),
        ({"use_sliding_window": True}, "use_sliding_window"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
    ],
)
def test_what_is_not_supported_is_named(fields, part):
    refused(lambda: rope_frequencies(ModelConfig.of(SMALL | fields)), part)


@pytest.mark.parametrize(
    ("kind", "field", "bad"),
    [
        ("linear", "factor", None),
        ("llama3", "factor", "x"),
        ("llama3", "original_max_position_embeddings", [64]),
        ("llama3", "low_freq_factor", None),
        ("yarn", "factor", -2),
        ("yarn", "original_max_position_embeddings", True),
        ("yarn", "beta_fast", 0),
        ("yarn", "attention_factor", "x"),
    ],
)
def test_malformed_rope_scaling_is_named(kind, field, bad):
    """None: the field is null, or not there at all."""
    good = {"rope_type": kind, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    rope_frequencies(ModelConfig.of({**SMALL, "rope_scaling": good}))
    broken: list[dict[str, Any]] = [{**good, field: bad}]
    if bad is None:
        broken.append({k: v for k, v in good.items() if k != field})
    for scaling in broken:
        config = ModelConfig.of({**SMALL, "rope_scaling": scaling})
        refused(partial(rope_frequencies, config), kind, field)
