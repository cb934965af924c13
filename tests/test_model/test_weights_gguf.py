"""GGUF files: every tensor lands where transformers puts it, and damage is named.

The row order of q and k is undone here a second time, from its definition in llama.cpp's converter,
and the real base must then speak exactly as it does in transformers.
"""

import functools
from collections.abc import Callable
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
import transformers
from test_weights import CPU, logits, parameters, refused, their_name

from nanopersrm.model.base import DEFAULT_BASE, Base, resolve
from nanopersrm.model.sampler import SamplingConfig, sample
from nanopersrm.model.tokenizer import Tokenizer
from nanopersrm.model.transformer import Model
from nanopersrm.model.weights import load

DEMO = Path(__file__).parents[2] / "data" / "demo"
SIZES = {  # large enough for whole blocks of 32 in a GGUF file
    "vocab_size": 96,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
}
GGUF_TYPE = {
    "F32": gguf.GGMLQuantizationType.F32,
    "F16": gguf.GGMLQuantizationType.F16,
    "Q8_0": gguf.GGMLQuantizationType.Q8_0,
    "Q4_1": gguf.GGMLQuantizationType.Q4_1,
}


def in_files_order(matrix: np.ndarray, heads: int) -> np.ndarray:
    """The rows of q or k as llama.cpp's convert_hf_to_gguf.py `permute` lays them down."""
    return (
        matrix.reshape(heads, 2, matrix.shape[0] // heads // 2, *matrix.shape[1:])
        .swapaxes(1, 2)
        .reshape(matrix.shape)
    )


def in_models_order(matrix: np.ndarray, heads: int) -> np.ndarray:
    """Back again, row by row: pair i of a head is (2i, 2i + 1) there, (i, i + E/2) here."""
    width = len(matrix) // heads
    back = np.empty_like(matrix)
    for head in range(heads):
        for i in range(width // 2):
            back[head * width + i] = matrix[head * width + 2 * i]
            back[head * width + i + width // 2] = matrix[head * width + 2 * i + 1]
    return back


def file_name(name: str) -> str:
    """Our parameter's name in a GGUF file."""
    whole = {"embed_tokens": "token_embd.weight", "norm.weight": "output_norm.weight"}
    if name == "lm_head.weight" or name in whole:
        return whole.get(name, "output.weight")
    _, layer, *parts, kind = name.split(".")
    block = {
        "input_layernorm": "attn_norm",
        "post_attention_layernorm": "ffn_norm",
        "self_attn.q_proj": "attn_q",
        "self_attn.k_proj": "attn_k",
        "self_attn.v_proj": "attn_v",
        "self_attn.o_proj": "attn_output",
        "self_attn.q_norm": "attn_q_norm",
        "self_attn.k_norm": "attn_k_norm",
        "mlp.gate_proj": "ffn_gate",
        "mlp.up_proj": "ffn_up",
        "mlp.down_proj": "ffn_down",
    }
    return f"blk.{layer}.{block['.'.join(parts)]}.{kind}"


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
    tensors = {}
    for name, tensor in oracle.state_dict().items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        ours = name.removeprefix("model.").replace("embed_tokens.weight", "embed_tokens")
        values = tensor.numpy()
        if config.model_type == "llama" and ("q_proj" in name or "k_proj" in name):
            few = config.num_key_value_heads
            values = in_files_order(values, config.num_attention_heads if "q_p" in name else few)
        tensors[file_name(ours)] = values
    if change:
        change(tensors)
    for name, values in tensors.items():
        if values.ndim == 1 or kind == "F32":
            writer.add_tensor(name, np.ascontiguousarray(values))
        else:
            data = gguf.quantize(np.ascontiguousarray(values), GGUF_TYPE[kind])
            writer.add_tensor(name, data, raw_dtype=GGUF_TYPE[kind])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def random_oracle(make, **more) -> transformers.PreTrainedModel:
    torch.manual_seed(3)
    oracle = transformers.AutoModelForCausalLM.from_config(make(**SIZES, **more)).eval()
    with torch.no_grad():
        for parameter in oracle.parameters():
            parameter.normal_(0, 0.2 if parameter.ndim > 1 else 1.0)
    return oracle


@pytest.mark.parametrize("kind", ["F32", "F16", "Q8_0", "Q4_1"])
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
        (lambda t: t.update({"blk.0.odd": np.ones(4, np.float32)}), ["unexpected", "blk.0.odd"]),
        (lambda t: t.update({name: t[name].T.copy()}), [name, "(64, 96)", "(96, 64)"]),
    ]
    for i, (change, parts) in enumerate(cases):
        path = write_gguf(tmp_path / f"{i}.gguf", oracle, "F32", change)
        base = resolve(str(path))
        refused(functools.partial(load, base, torch.float32, CPU), str(path), *parts)


def test_gguf_may_carry_rotary_factors_of_one(tmp_path):
    """`rope_freqs.weight` is read by `bases`, not a parameter."""
    oracle = random_oracle(transformers.LlamaConfig, tie_word_embeddings=True)
    oracle.config.max_position_embeddings = 131_072

    def add(tensors: dict[str, np.ndarray]) -> None:
        tensors["rope_freqs.weight"] = np.ones(8, np.float32)

    model = load(
        resolve(str(write_gguf(tmp_path / "m.gguf", oracle, "F32", add))), torch.float32, CPU
    )
    ids = [5, 6, 7, 8]
    with torch.no_grad():
        expected = oracle(torch.tensor([ids])).logits[0]
    assert (logits(model, ids) - expected).abs().max() < 1e-4


# The real base


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


@pytest.mark.base
def test_real_parameters_equal_the_files(real: Model, smollm: Base):
    ours = {file_name(name): tensor for name, tensor in parameters(real).items()}
    found = smollm.reader().tensors
    assert {tensor.name for tensor in found} == set(ours)
    assert {tensor.tensor_type.name for tensor in found} == {"Q4_1", "Q8_0", "F32"}
    for tensor in found:
        expected = gguf.dequantize(tensor.data, tensor.tensor_type)
        if ".attn_q." in tensor.name:
            expected = in_models_order(expected, 9)
        if ".attn_k." in tensor.name:
            expected = in_models_order(expected, 3)
        assert np.array_equal(ours[tensor.name].numpy(), expected), tensor.name


@pytest.mark.base
def test_real_model_equals_transformers(real: Model, real_oracle, smollm: Base):
    """Logits of a demo text, and 64 greedy tokens after the text and after a chat prompt."""
    tokenizer = Tokenizer.load(smollm)
    text = tokenizer.encode((DEMO / "beatrice" / "1.txt").read_text(encoding="utf-8"))[:160]
    asked = [{"role": "user", "content": "Name three things that letters are good for."}]
    prompts = [text, tokenizer.chat(asked)]
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
