"""NF4 storage: the same bits as bitsandbytes, both ways, and the kernel the same bits as the plain
form. bitsandbytes is the oracle here and nowhere imported by the kernels."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import BF16, CUDA, FP16, FP32, INTERPRETED, spread
from torch import Tensor

import kernels.nf4 as file
from kernels.nf4 import CODEBOOK, DYNAMIC, NF4, dequantize, dequantize_reference, quantize

bits = pytest.importorskip("bits")  # bitsandbytes

TYPES = (FP32,) if INTERPRETED else (FP32, BF16, FP16)
BITS = {FP32: torch.int32, BF16: torch.int16, FP16: torch.int16}
SHAPES = [(1, 64), (64, 2), (3, 128), (2, 96), (32, 6), (70, 128), (129, 128), (257, 576)]


def same_bits(x: Tensor, y: Tensor) -> bool:
    kind = BITS.get(x.dtype, x.dtype)
    return x.dtype == y.dtype and torch.equal(x.view(kind), y.view(kind))


def check(weight: Tensor) -> None:
    ours = quantize(weight)
    assert ours.shape == weight.shape
    for name, x, y in zip(NF4._fields, ours, bits.theirs(weight), strict=True):
        assert same_bits(x, y), name
    for dtype in TYPES:
        assert same_bits(dequantize(ours, dtype), bits.their_dequantize(ours, dtype))


def test_tables_are_those_of_bitsandbytes():
    assert torch.tensor(DYNAMIC).tolist() == bits.bnb.create_dynamic_map(signed=True).tolist()
    assert torch.tensor(CODEBOOK).tolist() == bits.bnb.get_4bit_type("nf4", device="cpu").tolist()
    assert len(set(DYNAMIC)) == 256


@pytest.mark.parametrize("dtype", [FP32, BF16, FP16])
@pytest.mark.parametrize("shape", SHAPES)
def test_same_bits_as_bitsandbytes(shape, dtype):
    check(spread(*shape, dtype=dtype, size=0.02))


@settings(max_examples=10 if INTERPRETED else 60, deadline=None, derandomize=True)
@given(
    blocks=st.integers(1, 80 if INTERPRETED else 900),
    half=st.sampled_from((1, 2, 4, 8, 16, 32)),
    size=st.sampled_from((1e-20, 1e-3, 0.02, 1.0, 300.0)),
    heavy=st.booleans(),
    seed=st.integers(0, 999),
)
def test_same_bits_at_any_size(blocks, half, size, heavy, seed):
    weight = spread(blocks * 32 // half, 2 * half, size=1.0, seed=seed)
    check((weight**3 if heavy else weight) * size)


def test_flat_blocks():
    """Zeros, one number everywhere, and runs of scales with nothing left after the mean."""
    check(torch.zeros(5, 128))
    check(torch.full((300, 128), 0.25))
    check(torch.cat([torch.zeros(1, 64), spread(3, 64)]))
    check(torch.cat([torch.full((256, 64), 0.25), torch.full((256, 64), -0.25)]))
    assert (dequantize(quantize(torch.zeros(5, 128)), FP32) == 0).all()


def test_worked_example():
    """The one of the file, each number sixteen times; the blocks' scales are 0.6 and 0.2."""
    first = torch.tensor([0.3, -0.6, 0.05, 0.0]).repeat(16)
    nf4 = quantize(torch.stack((first, torch.full((64,), 0.2))))
    assert nf4.codes[0].tolist() == [0xC0, 0x87] * 16
    assert nf4.codes[1].tolist() == [0xFF] * 32
    assert nf4.offset.item() == pytest.approx(0.4)
    assert nf4.scales.tolist() == pytest.approx([0.2])
    assert nf4.absmax.tolist() == [255, 0]
    assert file.block_scales(nf4).tolist() == pytest.approx([0.6, 0.2014], abs=5e-5)
    back = dequantize(nf4, FP32)
    assert back[0, :4].tolist() == pytest.approx([0.2644, -0.6, 0.0477, 0.0], abs=5e-5)


def test_pieces_do_not_matter(monkeypatch):
    weight = spread(200, 96)
    whole = quantize(weight)
    monkeypatch.setattr("kernels.nf4.CHUNK", 96 * 64)
    monkeypatch.setattr("kernels.nf4.PIECE", 64 * 7)
    for x, y in zip(quantize(weight), whole, strict=True):
        assert same_bits(x, y)
    out = dequantize_reference(whole, torch.empty(200, 96))
    assert same_bits(out, bits.their_dequantize(whole, FP32))


@pytest.mark.parametrize("shape", SHAPES)
def test_public_form_has_the_bits_of_the_reference(shape):
    nf4 = quantize(spread(*shape))
    room = torch.full((shape[0] + 1, shape[1]), 7.0)  # the row after is not touched
    out = dequantize(nf4, FP32, room[:-1])
    assert out.data_ptr() == room.data_ptr()
    assert same_bits(out, dequantize_reference(nf4, torch.empty(shape)))
    assert (room[-1] == 7).all()


@pytest.mark.parametrize(("device", "dtype"), CUDA)
def test_kernel_has_the_bits_of_the_reference_on_a_gpu(device, dtype):
    nf4 = quantize(spread(257, 576))
    there = dequantize(nf4.to(device), dtype)
    assert same_bits(there.cpu(), dequantize_reference(nf4, torch.empty(257, 576, dtype=dtype)))
