"""A model that comes in 4 bits never exists in 16; an embedding that stays on the host."""

import gc
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from test_weights import CPU, logits, their_name
from test_weights_gguf import SIZES as GGUF_SIZES
from test_weights_gguf import write_gguf
from torch.profiler import ProfilerActivity, profile
from transformers import LlamaConfig, LlamaForCausalLM

import kernels.nf4
from kernels.nf4 import quantize
from nanopersrm.model.base import Base, resolve
from nanopersrm.model.cache import Layout
from nanopersrm.model.linear import bytes_of, matrices
from nanopersrm.model.transformer import Model, ModelConfig
from nanopersrm.model.weights import SHAPES, load, random

IDS = [5, 6, 7, 100, 8, 5, 9]
WIDE = SHAPES["smollm2-135m"] | {
    "hidden_size": 256, "num_attention_heads": 4, "num_key_value_heads": 2, "num_hidden_layers": 6,
    "intermediate_size": 1024, "vocab_size": 300, "tie_word_embeddings": False,
}  # fmt: skip
LARGEST = 256 * 1024  # weights of a matrix
PART = 64 * 1024  # weights quantized at a time here, instead of 2^22: 64 rows of the longest


def held(run) -> tuple[Any, int, int]:
    """What run() returns, the most bytes allocated at one moment of it, and those at its end."""
    gc.collect()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as made:
        result = run()
    profiler: Any = made.profiler
    events = [e for e in profiler.kineto_results.events() if e.name() == "[memory]"]
    now = most = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        now += event.nbytes()
        most = max(most, now)
    return result, most, now


@pytest.fixture(scope="module")
def wide_base(tmp_path_factory) -> Base:
    """12 MB in bf16 on disk, one shard."""
    folder = tmp_path_factory.mktemp("wide")
    torch.manual_seed(0)
    model = random(WIDE, torch.bfloat16, CPU)
    tensors = {their_name(name): p.data for name, p in model.named_parameters()}
    save_file(tensors, folder / "model.safetensors")
    plain = {k: v for k, v in WIDE.items() if k not in ("model_type", "rope_scaling", "rope_theta")}
    LlamaConfig(**plain).save_pretrained(folder)
    return resolve(str(folder))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_one_matrix_at_a_time(wide_base, dtype, monkeypatch):
    """At most the finished model, one matrix in the model's type and the room of `quantize`: 14
    bytes for each weight that it works on at a time, 40 for each scale. No room for a second."""
    monkeypatch.setattr(kernels.nf4, "CHUNK", 64)
    load(wide_base, dtype, CPU, nf4=True)  # tables that stay
    mapped = (wide_base.path / "model.safetensors").stat().st_size  # counted, though only mapped
    for run, file in (
        (lambda: load(wide_base, dtype, CPU, nf4=True), mapped),
        (lambda: random(WIDE, dtype, CPU, nf4=True), 0),
    ):
        model, most, end = held(run)
        final = sum(bytes_of(model).values())
        assert final <= end < final + 20_000
        most -= file
        assert most <= final + LARGEST * dtype.itemsize + 14 * PART + 40 * LARGEST // 64
        assert most < 0.6 * 6 * 3 * LARGEST * dtype.itemsize  # far from the model in that type


def test_nf4_of_a_gguf_file(tmp_path):
    """Its own 4 bits are expanded, then rounded again; none of them is kept."""
    torch.manual_seed(3)
    sizes: dict[str, Any] = dict(GGUF_SIZES)
    oracle = LlamaForCausalLM(LlamaConfig(**sizes)).eval()
    base = resolve(str(write_gguf(tmp_path / "model.gguf", oracle, "Q4_1")))
    plain = load(base, torch.float32, CPU)
    model = load(base, torch.float32, CPU, nf4=True)
    for (name, matrix), (_, dense) in zip(matrices(model), matrices(plain), strict=True):
        assert matrix.q4 is None
        assert matrix.nf4 is not None
        for x, y in zip(matrix.nf4, quantize(dense.weight), strict=True):
            assert torch.equal(x, y), name
    for _, matrix in matrices(load(base, torch.bfloat16, CPU, nf4=True)):
        assert matrix.q4 is None


def test_random_is_a_function_of_its_seed():
    same = [logits(random(WIDE, torch.float32, CPU, seed=seed), IDS) for seed in (0, 0, 1)]
    assert torch.equal(same[0], same[1])
    assert not torch.equal(same[0], same[2])


def test_random_draws_the_same_weights_for_nf4():
    plain, model = (random(WIDE, torch.bfloat16, CPU, nf4=nf4) for nf4 in (False, True))
    assert torch.equal(plain.embed_tokens, model.embed_tokens)
    for (name, matrix), (_, dense) in zip(matrices(model), matrices(plain), strict=True):
        assert matrix.nf4 is not None
        assert torch.equal(matrix.nf4.codes, quantize(dense.weight).codes), name
    spread = dict(matrices(plain))["layers.5.mlp.up_proj"].weight.float().std().item()
    assert abs(spread - 0.02) < 1e-4
    assert bool((plain.norm.weight == 1).all())
    assert not any(p.requires_grad for p in plain.parameters())


@pytest.mark.parametrize("name", list(SHAPES))
def test_shapes_are_whole_configurations(name):
    """Also those of published sizes: parameters in billions, tied ones once."""
    with torch.device("meta"):
        model = Model(ModelConfig.of(SHAPES[name]))
    expected = {"smollm2-135m": 0.1345, "qwen2.5-1.5b": 1.5437}
    expected |= {"qwen2.5-7b": 7.6156, "qwen3-8b": 8.1907}
    assert abs(sum(p.numel() for p in model.parameters()) / 1e9 - expected[name]) < 1e-4


def test_the_embedding_on_the_host(wide_base):
    """Without a GPU host and device are one, and only the numbers can be looked at."""
    plain = load(wide_base, torch.float32, CPU)
    model = load(wide_base, torch.float32, CPU, host_embedding=True)
    assert torch.equal(logits(model, IDS), logits(plain, IDS))


def test_a_tied_embedding_moves_all_the_same():
    sizes = WIDE | {"tie_word_embeddings": True}
    model = random(sizes, torch.float32, CPU, host_embedding=True)
    assert model.head() is model.embed_tokens


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("nf4", [False, True])
def test_the_embedding_on_the_host_of_a_gpu(wide_base, nf4):
    cuda = torch.device("cuda")
    model = load(wide_base, torch.bfloat16, cuda, nf4=nf4, host_embedding=True)
    assert model.embed_tokens.is_pinned()
    assert model.device.type == "cuda"
    plain = load(wide_base, torch.bfloat16, cuda, nf4=nf4)
    layout, ids = Layout.of([len(IDS)]), torch.tensor(IDS, device=cuda)
    layout = Layout(layout.starts, layout.parents, layout.positions.to(cuda))
    with torch.inference_mode():
        assert torch.equal(model(ids, layout), plain(ids, layout))
