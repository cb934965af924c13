"""Adapters in memory: masters and copies, on and off, and gradients however blocks are computed."""

import pytest
import torch
import torch.nn.functional as F
from conftest import TINY, tiny

from nanopersrm import InputError
from nanopersrm.model.base import Base, resolve
from nanopersrm.model.cache import Layout
from nanopersrm.model.linear import Linear
from nanopersrm.model.lora import TARGETS, Lora, LoraConfig, adapter_off, matrices
from nanopersrm.model.transformer import Model
from nanopersrm.model.weights import load

CPU = torch.device("cpu")
FP32, BF16 = torch.float32, torch.bfloat16
IDS = torch.tensor([5, 90, 17, 33, 2, 64, 128, 9, 77, 41, 3, 8])
FLAT = Layout.of([7, 5])
SHARED = Layout.of([4, 3, 3, 2], parents=[-1, 0, 0, 1])
SMALL = LoraConfig(rank=4, alpha=8)
Q0 = "layers.0.self_attn.q_proj"


def model_of(base: Base, dtype: torch.dtype = FP32, nf4: bool = False) -> Model:
    return load(base, dtype, CPU, nf4)


def random_lora(model: Model, config: LoraConfig = SMALL, seed: int = 0) -> Lora:
    """B not zero, so that it matters."""
    lora, random = Lora(model, config, seed), torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for _, B in lora.masters.values():
            B.normal_(0, 0.2, generator=random)
    lora.refresh()
    return lora


def hidden(model: Model, ids: torch.Tensor = IDS, layout: Layout = FLAT, **how) -> torch.Tensor:
    return model(ids, layout, **how)


def loss_of(model: Model, layout: Layout = FLAT, ids: torch.Tensor = IDS, **how) -> torch.Tensor:
    logits = model.logits(hidden(model, ids, layout, **how))
    return F.cross_entropy(logits, ids.roll(-1))


def gradients(lora: Lora) -> list[torch.Tensor]:
    found = []
    for part in lora.parameters():
        assert part.grad is not None
        found.append(part.grad)
        part.grad = None
    return found


def test_scale():
    assert LoraConfig(rank=16, alpha=32).scale == 2
    assert LoraConfig(rank=16, alpha=32, rslora=True).scale == 8


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"rank": 0}, "rank: expected a number from 1, got 0"),
        ({"dropout": 1.0}, "dropout: expected 0 up to, but not, 1, got 1.0"),
        ({"dropout": -0.1}, "dropout: expected 0"),
        ({"targets": ("q_proj", "lm_head")}, "got 'lm_head'"),
        ({"targets": ()}, "got none"),
    ],
)
def test_wrong_configs(fields, says):
    with pytest.raises(InputError, match=says):
        LoraConfig(**fields)


@pytest.mark.parametrize("targets", [TARGETS, ("v_proj", "down_proj")])
def test_sizes_and_start(targets, tiny_base):
    model = model_of(tiny_base)
    lora = Lora(model, LoraConfig(rank=3, targets=targets), seed=1)
    assert list(lora.masters) == list(matrices(model, targets))
    assert len(lora.parameters()) == 2 * 3 * len(targets)
    for name, (A, B) in lora.masters.items():
        matrix = model.get_submodule(name)
        assert isinstance(matrix, Linear)
        assert A.shape == (3, matrix.width_in)
        assert B.shape == (matrix.width_out, 3)
        bound = matrix.width_in**-0.5
        assert 0.8 * bound < A.abs().max() <= bound
        assert abs(A.mean()) < 0.3 * bound
        assert not B.any()
    before = hidden(model)
    with lora.using(model):
        assert torch.equal(hidden(model), before)


def test_the_size_in_the_docstring():
    """Rank 16 on SmolLM2's matrices: 4.9 million."""
    D, K, F_ = 576, 192, 1536
    widths = [(D, D), (D, K), (D, K), (D, D), (D, F_), (D, F_), (F_, D)]
    assert 30 * 16 * sum(a + b for a, b in widths) == 4_884_480


def test_seeds(tiny_base):
    model = model_of(tiny_base)
    one, same, other = (Lora(model, SMALL, seed).tensors() for seed in (1, 1, 2))
    assert all(torch.equal(one[name], same[name]) for name in one)
    assert not torch.equal(one[f"{Q0}.A"], other[f"{Q0}.A"])
    assert not torch.equal(one[f"{Q0}.A"], one["layers.1.self_attn.q_proj.A"])


@pytest.mark.parametrize("dtype", [FP32, BF16])
def test_refresh_reaches_the_model(dtype, tiny_base):
    """Also while it is on, and the base never moves."""
    model = model_of(tiny_base, dtype)
    lora = random_lora(model)
    base = hidden(model)
    lora.on(model)
    before = hidden(model)
    with torch.no_grad():
        for part in lora.parameters():
            part.mul_(2)
    lora.refresh()
    after = hidden(model)
    assert not torch.equal(after, before)
    matrix = model.get_submodule(Q0)
    assert isinstance(matrix, Linear)
    assert matrix.adapter is not None
    assert matrix.adapter.A.dtype == dtype
    torch.testing.assert_close(matrix.adapter.A, lora.masters[Q0][0].to(dtype))
    lora.off(model)
    assert torch.equal(hidden(model), base)


def test_masters_add_up_in_fp32(tiny_base):
    """bf16 gradients of micro-batches are summed in fp32: exactly the sum of those one by one."""
    model = model_of(tiny_base, BF16)
    lora = random_lora(model)
    lora.on(model)
    assert {part.dtype for part in lora.parameters()} == {FP32}
    parts = [IDS, IDS.flip(0)]
    alone = []
    for ids in parts:
        loss_of(model, ids=ids).backward()
        alone.append(gradients(lora))
    for ids in parts:  # one refresh, two backward calls
        loss_of(model, ids=ids).backward()
    coarse = 0
    for both, one, two in zip(gradients(lora), *alone, strict=True):
        assert both.dtype == FP32
        assert torch.equal(both, one + two)
        coarse += int(not torch.equal(both, (one.bfloat16() + two.bfloat16()).float()))
    assert coarse > len(lora.parameters()) // 2  # in bf16 the sum would be another


def test_two_micro_batches_are_the_large_one(tiny_base):
    model = model_of(tiny_base)
    lora = random_lora(model)
    lora.on(model)
    targets = IDS.roll(-1)
    F.cross_entropy(model.logits(hidden(model)), targets, reduction="sum").backward()
    whole = gradients(lora)
    for rows in (slice(0, 7), slice(7, 12)):
        part = model.logits(hidden(model, IDS[rows], Layout.of([len(IDS[rows])])))
        F.cross_entropy(part, targets[rows], reduction="sum").backward()
    for ours, expected in zip(gradients(lora), whole, strict=True):
        torch.testing.assert_close(ours, expected, atol=1e-4, rtol=1e-4)


def state(model: Model) -> list:
    return [(matrix.adapter, matrix.dropout) for matrix in matrices(model, TARGETS).values()]


def same(one: list, two: list) -> bool:
    return all(a is b and x == y for (a, x), (b, y) in zip(one, two, strict=True))


def test_using_and_off_nest(tiny_base):
    model = model_of(tiny_base)
    policy = random_lora(model, LoraConfig(rank=4, dropout=0.25), seed=1)
    style = random_lora(model, LoraConfig(rank=2, targets=("q_proj",)), seed=2)
    base = state(model)
    policy.on(model)
    on = state(model)
    with style.using(model):
        assert model.get_submodule(Q0).adapter is style.copies[Q0]
        up = model.get_submodule("layers.0.mlp.up_proj")
        assert up.adapter is None  # not a mixture of both
        assert up.dropout == 0
        inside = state(model)
        with adapter_off(model):
            assert all(adapter is None for adapter, _ in state(model))
            with policy.using(model):
                assert same(state(model), on)
        assert same(state(model), inside)
    assert same(state(model), on)
    for context in (style.using, adapter_off):
        with pytest.raises(KeyError), context(model):
            raise KeyError
        assert same(state(model), on)
    policy.off(model)
    assert all(adapter is None for adapter, _ in state(model))
    assert all(adapter is None for adapter, _ in base)


def test_freeze(tiny_base):
    model = model_of(tiny_base, BF16)
    lora = random_lora(model).freeze()
    lora.on(model)
    assert not hidden(model).requires_grad


def test_tensors_go_round(tiny_base):
    model = model_of(tiny_base, BF16)
    one, two = random_lora(model, seed=1), random_lora(model, seed=2)
    kept = {name: tensor.clone() for name, tensor in one.tensors().items()}
    assert set(kept) == {f"{name}.{letter}" for name in one.masters for letter in "AB"}
    masters = two.parameters()
    two.on(model)
    two.load_tensors(kept)
    assert all(a is b for a, b in zip(masters, two.parameters(), strict=True))  # of the optimizer
    assert all(torch.equal(kept[name], tensor) for name, tensor in two.tensors().items())
    after = hidden(model)
    with one.using(model):
        assert torch.equal(hidden(model), after)
    after.float().sum().backward()
    assert all(part.grad is not None for part in masters)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({f"{Q0}.A": None}, f"adapter: missing tensor {Q0}.A"),
        ({"z.A": torch.zeros(1)}, "adapter: unexpected tensor z.A"),
        ({f"{Q0}.B": torch.zeros(4, 48)}, rf"{Q0}.B has shape \(4, 48\), expected \(48, 4\)"),
    ],
)
def test_tensors_that_do_not_fit(change, says, tiny_base):
    lora = Lora(model_of(tiny_base), SMALL, seed=0)
    tensors = {name: t for name, t in (lora.tensors() | change).items() if t is not None}
    with pytest.raises(InputError, match=says):
        lora.load_tensors(tensors)


@pytest.mark.parametrize("nf4", [False, True])
def test_dropout_only_in_training(nf4, tiny_base):
    model = model_of(tiny_base, nf4=nf4)
    random_lora(model, LoraConfig(rank=4, dropout=0.5)).on(model)
    with torch.no_grad():
        judged = hidden(model)
        assert torch.equal(hidden(model), judged)
        model.train()
        assert not torch.allclose(hidden(model), judged, atol=1e-3)
        assert not torch.equal(hidden(model), hidden(model))
        assert torch.equal(hidden(model.eval()), judged)


@pytest.mark.parametrize("name", TINY)
def test_computing_again_changes_nothing(name, tmp_path_factory):
    """Loss and gradients with `recompute` and `offload`, dropout, NF4 and shared prefixes."""
    folder = tmp_path_factory.mktemp(name)
    tiny(name, folder)
    base = resolve(str(folder))
    for nf4, dropout in ((False, 0.0), (False, 0.3), (True, 0.0), (True, 0.3)):
        model = model_of(base, nf4=nf4).train()
        lora = random_lora(model, LoraConfig(rank=4, dropout=dropout))
        lora.on(model)
        for layout in (FLAT, SHARED):
            found = []
            for recompute, offload in ((False, False), (True, False), (True, True)):
                torch.manual_seed(3)
                loss = loss_of(model, layout, recompute=recompute, offload=offload)
                loss.backward()
                found.append([loss.detach(), *gradients(lora)])
            for ours in found[1:]:
                for one, plain in zip(ours, found[0], strict=True):
                    size = plain.abs().max().item()
                    torch.testing.assert_close(one, plain, atol=1e-5 * max(size, 1), rtol=1e-4)
            assert any(grad.abs().max() > 1e-3 for grad in found[0][1:])


def test_a_shared_prefix_has_the_gradients_of_its_copies(tiny_base):
    """[prefix, two replies] as a tree, and as two whole texts."""
    model = model_of(tiny_base)
    lora = random_lora(model)
    lora.on(model)
    prefix, one, two = IDS[:4], IDS[4:7], IDS[7:12]
    tree = hidden(model, IDS, Layout.of([4, 3, 5], parents=[-1, 0, 0]))[4:]
    c = torch.randn(tree.shape, generator=torch.Generator().manual_seed(0))
    (tree * c).sum().backward()
    shared = gradients(lora)
    flat = hidden(model, torch.cat([prefix, one, prefix, two]), Layout.of([7, 9]))
    (torch.cat([flat[4:7], flat[11:]]) * c).sum().backward()
    for ours, expected in zip(shared, gradients(lora), strict=True):
        size = expected.abs().max().item()
        torch.testing.assert_close(ours, expected, atol=1e-5 * max(size, 1), rtol=1e-4)
