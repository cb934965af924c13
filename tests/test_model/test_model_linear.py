"""A matrix in all its forms, and models in NF4: bitsandbytes' bits, transformers' logits."""

import itertools

import pytest
import torch
from safetensors.torch import save_file
from tiny_bases import CPU, logits, one_shard, refused
from torch import Tensor

from kernels.linear import Adapter, can_pack
from kernels.nf4 import dequantize
from nanopersrm.model.base import resolve
from nanopersrm.model.linear import Linear, matrices
from nanopersrm.model.weights import load

bits = pytest.importorskip("bits")
N, IN, OUT, R = 70, 64, 48, 4
FP32, BF16 = torch.float32, torch.bfloat16
PACKS = can_pack(torch.empty(0, dtype=BF16))
IDS = [5, 6, 7, 100, 8, 5, 9]


def spread(*shape: int, seed: int, dtype: torch.dtype = FP32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def matrix(bias: bool, nf4: bool, dtype: torch.dtype = FP32) -> Linear:
    linear = Linear(IN, OUT, bias).requires_grad_(False)
    linear.weight.copy_(spread(OUT, IN, seed=1) / 8)
    if linear.bias is not None:
        linear.bias.copy_(spread(OUT, seed=2))
    linear = linear.to(dtype).eval()
    if nf4:
        linear.to_nf4(linear.weight.data)
    return linear


def adapter(dtype: torch.dtype = FP32, learns: bool = True) -> Adapter:
    A, B = spread(R, IN, seed=3, dtype=dtype) / 8, spread(OUT, R, seed=4, dtype=dtype)
    return Adapter(A.requires_grad_(learns), B.requires_grad_(learns), 0.5)


def formula(x: Tensor, linear: Linear, on: Adapter | None) -> Tensor:
    """In fp64."""
    W = linear.weight if linear.nf4 is None else dequantize(linear.nf4, FP32)
    y = x.double() @ W.double().t()
    if linear.bias is not None:
        y = y + linear.bias.double()
    if on is not None:
        a = x.double() @ on.A.double().t()
        y = y + on.scale * (a @ on.B.double().t())
    return y


@pytest.mark.parametrize("with_adapter", [False, True])
@pytest.mark.parametrize("nf4", [False, True])
def test_every_form_against_the_formula(nf4, with_adapter):
    for bias, gradients in itertools.product((False, True), repeat=2):
        linear, x = matrix(bias, nf4), spread(N, IN, seed=5)
        linear.adapter = adapter() if with_adapter else None
        with torch.set_grad_enabled(gradients):
            y = linear(x)
        truth = formula(x, linear, linear.adapter)
        torch.testing.assert_close(y.double(), truth, atol=1e-5, rtol=1e-5)
        assert y.requires_grad == (with_adapter and gradients)


@pytest.mark.parametrize("nf4", [False, True])
def test_gradients(nf4):
    """Of x and the adapter against plain autograd in fp64."""
    linear, x = matrix(True, nf4).train(), spread(N, IN, seed=5).requires_grad_()
    linear.adapter = adapter()
    c = spread(N, OUT, seed=6)
    (linear(x) * c).sum().backward()
    wide = [t.detach().double().requires_grad_() for t in (x, *linear.adapter[:2])]
    on = Adapter(wide[1], wide[2], linear.adapter.scale)
    (formula(wide[0], linear, on) * c).sum().backward()
    for ours, truth in zip((x, *linear.adapter[:2]), wide, strict=True):
        assert ours.grad is not None
        torch.testing.assert_close(ours.grad.double(), truth.grad, atol=1e-4, rtol=1e-4)
    assert linear.weight.grad is None
    assert linear.bias is not None
    assert linear.bias.grad is None


@pytest.mark.skipif(not PACKS, reason="this machine's oneDNN has no bf16")
@pytest.mark.parametrize("rows", [1, N])
def test_packed_with_an_adapter(rows):
    linear, x = matrix(True, False, BF16), spread(rows, IN, seed=5, dtype=BF16)
    linear.adapter = adapter(BF16, learns=False)
    with torch.no_grad():
        plain = linear(x)
    truth = formula(x, linear, linear.adapter)
    linear.pack()
    with torch.no_grad():
        packed = linear(x)
    error = [(y.double() - truth).abs().max() for y in (plain, packed)]
    assert error[1] <= 2 * error[0] + torch.finfo(BF16).eps * truth.abs().max()
    linear.adapter = None
    with torch.no_grad():
        base = linear(x)
    assert (base.double() - truth).abs().max() > 0.1


def test_logits_are_those_of_the_dequantized_weights(tiny_pair):
    oracle, base = tiny_pair
    model = load(base, torch.float32, CPU, nf4=True)
    before = {name: tensor.clone() for name, tensor in oracle.state_dict().items()}
    plain = logits(load(base, torch.float32, CPU), IDS)
    try:
        for name in matrices(model):
            weight = oracle.get_submodule(f"model.{name}").weight
            weight.data = bits.their_dequantize(bits.theirs(weight.data))
        with torch.inference_mode():
            expected = oracle(torch.tensor([IDS])).logits[0]
    finally:
        oracle.load_state_dict(before)
    assert (logits(model, IDS) - expected).abs().max() < 1e-4
    assert (plain - expected).abs().max() > 1e-2  # quantizing does something


@pytest.mark.parametrize(
    ("out", "width", "fits"), [(3, 64, True), (2, 96, True), (3, 63, False), (33, 6, False)]
)
def test_blocks_must_be_full(out, width, fits):
    """They may end within a row."""
    linear, weight = Linear(width, out), torch.randn(out, width)
    if not fits:
        refused(lambda: linear.to_nf4(weight), f"a multiple of 64 weights for NF4, got {out} x")
        return
    linear.to_nf4(weight)
    assert linear.nf4 is not None
    x = torch.randn(5, width)
    assert torch.allclose(linear(x), x @ dequantize(linear.nf4, torch.float32).T, atol=1e-6)


def test_a_bad_weight_is_named(tmp_path, tiny_base):
    tensors = one_shard(tiny_base.path, tmp_path)
    name = "model.layers.1.mlp.up_proj.weight"
    tensors[name][3, 4] = 1e6  # infinite in fp16
    save_file(tensors, tmp_path / "model.safetensors")
    base = resolve(str(tmp_path))
    refused(lambda: load(base, torch.float16, CPU, nf4=True), str(tmp_path), name, "finite")
    load(base, torch.bfloat16, CPU, nf4=True)
