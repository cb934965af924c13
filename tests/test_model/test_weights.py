"""Every tensor lands where transformers puts it, and damage is named.

In GGUF files the row order of q and k is undone here a second time, from its definition in
llama.cpp's converter, and the real base must then speak exactly as it does in transformers.
"""

import functools
from collections.abc import Callable
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from tiny_bases import CPU, logits, one_shard, refused, their_name, write_out
from torch import Tensor

from kernels.nf4 import quantize
from nanopersrm.model.base import DEFAULT_BASE, Base, resolve
from nanopersrm.model.cache import Layout
from nanopersrm.model.linear import matrices
from nanopersrm.model.sampler import SamplingConfig, sample
from nanopersrm.model.tokenizer import Tokenizer
from nanopersrm.model.transformer import Model
from nanopersrm.model.weights import SHAPES, load, random

DEMO = Path(__file__).parents[2] / "data" / "demo"
IDS = [5, 6, 7, 100, 8, 5, 9]
WIDE = SHAPES["smollm2-135m"] | {
    "hidden_size": 256, "num_attention_heads": 4, "num_key_value_heads": 2, "num_hidden_layers": 6,
    "intermediate_size": 1024, "vocab_size": 300, "tie_word_embeddings": False,
}  # fmt: skip
SIZES = {  # large enough for whole blocks of 32 in a GGUF file
    "vocab_size": 96, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 256,
}  # fmt: skip
GGUF_TYPE = gguf.GGMLQuantizationType.__members__


def parameters(model: Model) -> dict[str, Tensor]:
    return dict(model.named_parameters())


def test_sharded_folder_equals_transformers(tiny_pair):
    oracle, base = tiny_pair
    assert len(list(base.path.glob("*.safetensors"))) > 2
    theirs, ours = oracle.state_dict(), parameters(load(base, torch.float32, CPU))
    assert len(ours) == len({t.data_ptr() for t in theirs.values()})  # a tied head counts once
    for name, tensor in ours.items():
        assert torch.equal(tensor, theirs[their_name(name)]), name
        assert not tensor.requires_grad


@pytest.fixture
def folder(tmp_path, tiny_base) -> Path:
    """A copy of a tied tiny model in one shard, to be damaged."""
    one_shard(tiny_base.path, tmp_path)
    return tmp_path


def reload(folder: Path) -> Model:
    return load(resolve(str(folder)), torch.float32, CPU)


UP, DOWN = "model.layers.1.mlp.up_proj.weight", "model.layers.2.mlp.down_proj.weight"


@pytest.mark.parametrize(
    ("change", "parts"),
    [
        (lambda t: t.pop(UP), ["missing 1", UP.removeprefix("model.")]),
        (lambda t: t.update({"model.layers.0.extra": torch.ones(2)}), ["model.layers.0.extra"]),
        (lambda t: t.update({DOWN: torch.ones(80, 48)}), [DOWN, "(80, 48)", "(48, 80)"]),
        (lambda t: t.update({DOWN: torch.ones(1, 1)}), [DOWN, "(1, 1)"]),  # would broadcast
        (lambda t: t.update({DOWN: t[DOWN].to(torch.int8)}), [DOWN, "int8"]),
    ],
)
def test_a_wrong_tensor_is_named(folder, change, parts):
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")
    refused(lambda: reload(folder), str(folder), *parts)


@pytest.mark.parametrize("content", [b"", b"\xff" * 4096, 400, -1])
def test_a_broken_shard_is_named(folder, content):
    """Garbage, or so many bytes of the file."""
    shard = folder / "model.safetensors"
    shard.write_bytes(shard.read_bytes()[:content] if isinstance(content, int) else content)
    refused(lambda: reload(folder), str(shard))


# GGUF


def in_files_order(matrix: np.ndarray, heads: int) -> np.ndarray:
    """The rows of q or k as llama.cpp's convert_hf_to_gguf.py `permute` lays them down."""
    return (
        matrix.reshape(heads, 2, matrix.shape[0] // heads // 2, *matrix.shape[1:])
        .swapaxes(1, 2)
        .reshape(matrix.shape)
    )


def write_gguf(path: Path, oracle: transformers.PreTrainedModel, kind: str, change=None) -> Path:
    """A model of transformers as llama.cpp would store it; norms and biases stay F32."""
    config = oracle.config
    writer = gguf.GGUFWriter(path, config.model_type)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(oracle.model.layers[0].self_attn.head_dim)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_vocab_size(config.vocab_size)
    arch = next(a for a, text in gguf.MODEL_ARCH_NAMES.items() if text == config.model_type)
    names = gguf.get_tensor_name_map(arch, config.num_hidden_layers)
    tensors = {}
    for name, tensor in oracle.state_dict().items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        values = tensor.numpy()
        if config.model_type == "llama" and ("q_proj" in name or "k_proj" in name):
            few = config.num_key_value_heads
            values = in_files_order(values, config.num_attention_heads if "q_p" in name else few)
        stored = names.get_name(name, (".weight", ".bias"))
        assert stored is not None, name
        tensors[stored] = values
    if change:
        change(tensors)
    for name, values in tensors.items():
        if values.ndim == 1 or kind == "F32":
            writer.add_tensor(name, np.ascontiguousarray(values))
        else:
            data = gguf.quantize(np.ascontiguousarray(values), GGUF_TYPE[kind])
            writer.add_tensor(name, data, raw_dtype=GGUF_TYPE[kind])
    write_out(writer)
    return path


def random_oracle(make, **more) -> transformers.PreTrainedModel:
    torch.manual_seed(3)
    oracle = transformers.AutoModelForCausalLM.from_config(make(**SIZES, **more)).eval()
    with torch.no_grad():
        for parameter in oracle.parameters():
            parameter.normal_(0, 0.2 if parameter.ndim > 1 else 1.0)
    return oracle


@pytest.mark.parametrize("kind", ["F32", "Q8_0", "Q4_1"])
@pytest.mark.parametrize(
    ("make", "more"),
    [
        (transformers.LlamaConfig, {"tie_word_embeddings": True}),
        (transformers.LlamaConfig, {"tie_word_embeddings": False, "attention_bias": False}),
        (transformers.Qwen2Config, {"tie_word_embeddings": True}),
        (transformers.Qwen3Config, {"tie_word_embeddings": False, "head_dim": 32}),
    ],
    ids=["llama-tied", "llama-untied", "qwen2", "qwen3"],
)
def test_gguf_of_every_family(tmp_path, make, more, kind):
    """Written as llama.cpp writes it, read back: the same tensors and the same logits."""
    oracle = random_oracle(make, **more)
    model = load(resolve(str(write_gguf(tmp_path / "m.gguf", oracle, kind))), torch.float32, CPU)
    theirs = oracle.state_dict()
    with torch.no_grad():  # the oracle holds what the file's blocks can say
        for tensor in theirs.values():
            if tensor.ndim > 1 and kind != "F32":
                blocks = gguf.quantize(tensor.numpy(), GGUF_TYPE[kind])
                tensor.copy_(torch.from_numpy(gguf.dequantize(blocks, GGUF_TYPE[kind])))
    for name, tensor in parameters(model).items():
        assert torch.equal(tensor, theirs[their_name(name)]), name
    ids = torch.randint(0, 96, (30,), generator=torch.Generator().manual_seed(0)).tolist()
    with torch.no_grad():
        expected = oracle(torch.tensor([ids])).logits[0]
    assert (logits(model, ids) - expected).abs().max() < 1e-4


def test_q4_blocks_in_bf16(tmp_path):
    """The 4-bit form that is kept for few rows means the same matrix as the 16-bit weight."""
    path = write_gguf(tmp_path / "m.gguf", random_oracle(transformers.LlamaConfig), "Q4_1")
    exact = load(resolve(str(path)), torch.float32, CPU)
    model = load(resolve(str(path)), torch.bfloat16, CPU)
    for name, tensor in parameters(model).items():
        reference = parameters(exact)[name]
        assert (tensor.float() - reference).abs().max() < 0.01 * reference.abs().max(), name
    ids = torch.randint(0, 96, (6,), generator=torch.Generator().manual_seed(0)).tolist()
    truth = logits(exact, ids)
    error = (logits(model, ids) - truth).abs().mean()
    packed = logits(model.pack(), ids)  # six rows: the 4-bit products, where the machine has them
    assert error < 0.05 * truth.std()
    assert (packed - truth).abs().mean() < 2 * error


def test_gguf_damage_is_named(tmp_path):
    oracle = random_oracle(transformers.LlamaConfig, tie_word_embeddings=True)
    name = "blk.1.ffn_up.weight"
    cases: list[tuple[Callable[[dict[str, np.ndarray]], object], list[str]]] = [
        (lambda t: t.pop(name), ["missing 1", "layers.1.mlp.up_proj.weight"]),
        (lambda t: t.update({name: t[name].T.copy()}), [name, "(64, 96)", "(96, 64)"]),
    ]
    for i, (change, parts) in enumerate(cases):
        path = write_gguf(tmp_path / f"{i}.gguf", oracle, "F32", change)
        base = resolve(str(path))
        refused(functools.partial(load, base, torch.float32, CPU), str(path), *parts)


@pytest.fixture(scope="module")
def real() -> Model:
    return load(resolve(DEFAULT_BASE), torch.float32, CPU)


@pytest.fixture(scope="module")
def real_oracle() -> transformers.PreTrainedModel:
    """transformers reads the same file by itself, and undoes the row order on its own."""
    path = resolve(DEFAULT_BASE).path
    with pytest.MonkeyPatch.context() as patch:  # it reads the header twice and a map 397 times
        patch.setattr(gguf, "GGUFReader", functools.cache(gguf.GGUFReader))
        patch.setattr(gguf, "get_tensor_name_map", functools.cache(gguf.get_tensor_name_map))
        return transformers.AutoModelForCausalLM.from_pretrained(
            path.parent, gguf_file=path.name, dtype=torch.float32
        ).eval()


@pytest.mark.slow
@pytest.mark.base
def test_real_model_equals_transformers(real: Model, real_oracle, smollm: Base):
    """Logits of a demo text, and 64 greedy tokens after the text and after a chat prompt."""
    tokenizer = Tokenizer.load(smollm)
    text = tokenizer.encode((DEMO / "beatrice" / "1.txt").read_text(encoding="utf-8"))[:160]
    chat = [{"role": "user", "content": "Name three things that letters are good for."}]
    prompts = [text, tokenizer.chat(chat)]
    ours = logits(real, text)
    with torch.inference_mode():
        expected = real_oracle(torch.tensor([text])).logits[0]
    assert expected.std() > 1
    assert (ours - expected).abs().max() < 1e-3
    replies = sample(real, prompts, SamplingConfig(temperature=0, max_new=64), stop_ids={2})
    for prompt, [reply] in zip(prompts, replies, strict=True):
        ids = torch.tensor([prompt])
        out = real_oracle.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            do_sample=False,
            max_new_tokens=64,
            eos_token_id=2,
            pad_token_id=2,
        )
        assert reply.ids == out[0, len(prompt) :].tolist()
        assert len(reply.ids) > 20


# Memory, NF4 and random weights


def test_random_draws_the_same_weights_for_nf4():
    plain, model = (random(WIDE, torch.bfloat16, CPU, nf4=nf4) for nf4 in (False, True))
    assert torch.equal(plain.embed_tokens, model.embed_tokens)
    for name, matrix in matrices(model).items():
        dense = matrices(plain)[name]
        assert matrix.nf4 is not None
        assert torch.equal(matrix.nf4.codes, quantize(dense.weight).codes), name
    spread = matrices(plain)["layers.5.mlp.up_proj"].weight.float().std().item()
    assert abs(spread - 0.02) < 1e-4
    assert bool((plain.norm.weight == 1).all())
    assert not any(p.requires_grad for p in plain.parameters())


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("nf4", [False, True])
def test_the_embedding_on_the_host_of_a_gpu(folder, nf4):
    cuda = torch.device("cuda")
    shard = folder / "model.safetensors"
    tensors = load_file(shard)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors, shard)
    config = folder / "config.json"
    config.write_text(config.read_text().replace('embeddings": true', 'embeddings": false'))
    host, plain = (
        load(resolve(str(folder)), torch.bfloat16, cuda, nf4, on_host) for on_host in (True, False)
    )
    assert host.embed_tokens.is_pinned()
    assert host.device.type == "cuda"
    layout, ids = Layout.of([len(IDS)]), torch.tensor(IDS, device=cuda)
    layout = Layout(layout.starts, layout.parents, layout.positions.to(cuda))
    with torch.inference_mode():
        assert torch.equal(host(ids, layout), plain(ids, layout))
