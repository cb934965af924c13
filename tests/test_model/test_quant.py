"""A model in NF4: bitsandbytes' bits in every matrix, transformers' logits with its weights."""

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_weights import CPU, logits, refused, their_name
from torch import Tensor

from kernels.nf4 import CODEBOOK, DYNAMIC, NF4, dequantize
from nanopersrm.model.base import resolve
from nanopersrm.model.linear import Linear, bytes_of, matrices, nf4_bytes, quantize_linear
from nanopersrm.model.lora import Lora, LoraConfig
from nanopersrm.model.weights import SHAPES, load, random

bnb = pytest.importorskip("bitsandbytes.functional")

IDS = [5, 6, 7, 100, 8, 5, 9]


def theirs(weight: Tensor) -> NF4:
    codes, state = bnb.quantize_4bit(
        weight.contiguous(), quant_type="nf4", compress_statistics=True, blocksize=64
    )
    rows, columns = weight.shape
    return NF4(codes.view(rows, columns // 2), state.absmax, state.state2.absmax, state.offset)


def their_dequantize(nf4: NF4) -> Tensor:
    """One block a row: with rows that end within a block, bitsandbytes' AVX-512 code goes wrong."""
    wide = torch.float32
    second = bnb.QuantState(nf4.scales, code=torch.tensor(DYNAMIC), blocksize=256, dtype=wide)
    state = bnb.QuantState(
        nf4.absmax, shape=(len(nf4.absmax), 64), dtype=wide, blocksize=64, quant_type="nf4",
        code=torch.tensor(CODEBOOK), offset=nf4.offset, state2=second,
    )  # fmt: skip
    return bnb.dequantize_4bit(nf4.codes.view(-1, 1), state).view(nf4.shape)


def test_every_matrix_has_bitsandbytes_bits(tiny_pair):
    """From weights rounded to the model's type, as transformers rounds before it packs."""
    oracle, base = tiny_pair
    for dtype in (torch.float32, torch.bfloat16):
        model = load(base, dtype, CPU, nf4=True)
        found = dict(matrices(model))
        assert len(found) == 7 * model.config.layers
        for name, matrix in found.items():
            weight = oracle.get_submodule(f"model.{name}").weight
            assert matrix.nf4 is not None
            assert matrix.weight.device.type == "meta"
            assert matrix.weight.shape == weight.shape == matrix.nf4.shape
            for part, x, y in zip(NF4._fields, matrix.nf4, theirs(weight.to(dtype)), strict=True):
                assert x.dtype == y.dtype, (name, part)
                assert torch.equal(x, y), (name, part)


def test_logits_are_those_of_the_dequantized_weights(tiny_pair):
    oracle, base = tiny_pair
    model = load(base, torch.float32, CPU, nf4=True)
    before = {name: tensor.clone() for name, tensor in oracle.state_dict().items()}
    plain = logits(load(base, torch.float32, CPU), IDS)
    try:
        for name, _ in matrices(model):
            weight = oracle.get_submodule(f"model.{name}").weight
            weight.data = their_dequantize(theirs(weight.data))
        with torch.inference_mode():
            expected = oracle(torch.tensor([IDS])).logits[0]
    finally:
        oracle.load_state_dict(before)
    assert (logits(model, IDS) - expected).abs().max() < 1e-4
    assert (plain - expected).abs().max() > 1e-2  # quantizing does something


def test_the_rest_stays_as_it_came(tiny_pair):
    oracle, base = tiny_pair
    model = load(base, torch.bfloat16, CPU, nf4=True)
    quantized = {f"{name}.weight" for name, _ in matrices(model)}
    state = oracle.state_dict()
    for name, tensor in model.named_parameters():
        assert not tensor.requires_grad
        if name not in quantized:
            assert torch.equal(tensor, state[their_name(name)].bfloat16()), name
    assert not model.training


def test_adapters_learn_beside_it(tiny_base):
    model = load(tiny_base, torch.float32, CPU, nf4=True)
    lora = Lora(model, LoraConfig(rank=2), seed=0)
    before = logits(model, IDS)
    with torch.no_grad():
        for part in lora.parameters():
            part.normal_(0, 0.1)
    lora.refresh()
    lora.on(model)
    assert (logits(model, IDS) - before).abs().max() > 1e-3
    lora.off(model)
    assert torch.equal(logits(model, IDS), before)


@pytest.mark.parametrize("nf4", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bytes(tiny_pair, nf4, dtype):
    model = load(tiny_pair[1], dtype, CPU, nf4=nf4)
    held = bytes_of(model)
    if not nf4:
        assert sum(held.values()) == sum(p.nbytes for p in model.parameters())


def test_half_a_byte_and_a_little_more():
    """codes, 64ths, 16,384ths: a matrix of one run and one block more has two scales of scales."""
    assert nf4_bytes(256, 64) == 256 * 32 + 256 + 4 + 4
    assert nf4_bytes(257, 64) == 257 * 32 + 257 + 8 + 4
    sizes = SHAPES["qwen2.5-7b"]
    D, F = sizes["hidden_size"], sizes["intermediate_size"]
    block = 2 * nf4_bytes(D, D) + 2 * nf4_bytes(512, D) + 2 * nf4_bytes(F, D) + nf4_bytes(D, F)
    assert round(28 * block / 1e9, 2) == 3.37


@pytest.mark.parametrize(("out", "width"), [(3, 64), (64, 2), (2, 96), (32, 6)])
def test_rows_may_end_within_a_block(out, width):
    linear, weight = Linear(width, out), torch.randn(out, width)
    quantize_linear(linear, weight)
    assert linear.nf4 is not None
    x = torch.randn(5, width)
    assert torch.allclose(linear(x), x @ dequantize(linear.nf4, torch.float32).T, atol=1e-6)


@pytest.mark.parametrize(("out", "width"), [(3, 63), (64, 1), (1, 96), (33, 6)])
def test_blocks_must_be_full(out, width):
    linear = Linear(width, out)
    message = f"a multiple of 64 weights for NF4, got {out} x {width}"
    refused(lambda: quantize_linear(linear, torch.randn(out, width)), message)


def test_a_bad_weight_is_named(tmp_path, tiny_base):
    tensors: dict[str, Tensor] = {}
    for shard in sorted(tiny_base.path.glob("*.safetensors")):
        tensors |= load_file(shard)
    name = "model.layers.1.mlp.up_proj.weight"
    tensors[name][3, 4] = 1e6  # infinite in fp16
    save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text((tiny_base.path / "config.json").read_text())
    base = resolve(str(tmp_path))
    refused(lambda: load(base, torch.float16, CPU, nf4=True), str(tmp_path), name, "finite")
    load(base, torch.bfloat16, CPU, nf4=True)


def test_a_width_that_does_not_fill_blocks_is_named(tmp_path):
    sizes = SHAPES["smollm2-135m"] | {"hidden_size": 36, "num_attention_heads": 3}
    sizes |= {"vocab_size": 20, "num_hidden_layers": 1, "intermediate_size": 50}
    refused(lambda: random(sizes, torch.float32, CPU, nf4=True), "NF4, got ")
    assert all(matrix.nf4 is None for _, matrix in matrices(random(sizes, torch.float32, CPU)))
