"""From files to tensors: fill a `Model` from safetensors or GGUF, one tensor at a time.

The model starts on "meta", as shapes without bytes, and every tensor takes its place as it is read.
In NF4 a matrix is rounded to the model's 16 bits (as transformers does before bitsandbytes packs
it), moved to the device, quantized there and dropped: 7 billion weights come to 5.5 GB on a device
that never sees more of its 15 than one matrix. The embedding can stay in the host's memory: a step
needs a few thousand of its rows, 29 MB of 1.09 GB. Names and shapes are checked both ways.

GGUF files of the Llama family store the rows of q and k in another rotary order: there the pair i
is (2i, 2i + 1), in Hugging Face's order it is (i, i + E/2). Qwen files keep the order.
"""

import re
from collections.abc import Iterator
from typing import Any

import gguf
import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from kernels.linear import Q4, can_pack, can_quantize, dequantize, quantize
from nanopersrm import InputError
from nanopersrm.model.base import Base, shards
from nanopersrm.model.linear import Linear
from nanopersrm.model.transformer import Model, ModelConfig

Entry = tuple[str, str, Tensor, Q4 | None]  # our name, name in the file, tensor, 4-bit form
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}

FIELDS = ["model_type", "hidden_size", "num_hidden_layers", "num_attention_heads"]
FIELDS += ["num_key_value_heads", "intermediate_size", "vocab_size", "max_position_embeddings"]
FIELDS += ["rms_norm_eps", "rope_theta", "tie_word_embeddings"]
SHAPES: dict[str, dict[str, Any]] = {  # public config.json files, for random weights and sums
    name: dict(zip(FIELDS, values, strict=True))
    for name, *values in (
        ("smollm2-135m", "llama", 576, 30, 9, 3, 1536, 49152, 8192, 1e-5, 1e5, True),
        ("qwen2.5-1.5b", "qwen2", 1536, 28, 12, 2, 8960, 151936, 32768, 1e-6, 1e6, True),
        ("qwen2.5-7b", "qwen2", 3584, 28, 28, 4, 18944, 152064, 32768, 1e-6, 1e6, False),
        ("qwen3-8b", "qwen3", 4096, 36, 32, 8, 12288, 151936, 40960, 1e-6, 1e6, False),
    )
}

# GGUF name -> our name
GGUF_NAMES = {
    "token_embd.weight": "embed_tokens",
    "output_norm.weight": "norm.weight",
    "output.weight": "lm_head.weight",
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
# Tables that files carry and the model computes for itself.
DERIVED = re.compile(r"rotary_emb\.inv_freq$|^rope_freqs\.weight$")


def load(
    base: Base,
    dtype: torch.dtype,
    device: torch.device,
    nf4: bool = False,
    host_embedding: bool = False,
) -> Model:
    """The model of `base`, on `device`, in `dtype`, ready for inference and without gradients.

    `nf4`: the matrices of its blocks in 4 bits. `host_embedding`: the embedding in host memory;
    nothing changes where it is also the head.
    """
    try:
        model = _shapes(base.config, dtype)
    except InputError as error:
        raise InputError(f"{base.path}: {error}") from error
    config = model.config
    scalar = torch.empty((), dtype=dtype, device=device)
    wanted = {name: scalar.expand(p.shape) for name, p in model.named_parameters()}  # no bytes
    missing = set(wanted)
    in_gguf = base.kind == "gguf"
    tensors = _from_gguf(base, config, wanted, not nf4) if in_gguf else _from_safetensors(base)
    for name, source, tensor, q4 in tensors:
        if DERIVED.search(source) or (name == "lm_head.weight" and config.tied):
            continue  # some files repeat the embedding as the head
        try:
            if name not in wanted:
                raise InputError("unexpected, the model has none of this name")
            _assign(model, name, tensor, device, nf4, host_embedding)
        except InputError as error:
            raise InputError(f"{base.path}: tensor {source}: {error}") from error
        missing.discard(name)
        if q4 is not None:
            owner = model.get_submodule(name.removesuffix(".weight"))
            assert isinstance(owner, Linear), f"{name} is not a matrix"
            owner.q4 = q4
    if missing:
        few = ", ".join(sorted(missing)[:3])
        raise InputError(f"{base.path}: missing {len(missing)} tensors: {few}")
    return model.eval()


@torch.no_grad()
def random(
    sizes: dict[str, Any],
    dtype: torch.dtype,
    device: torch.device,
    nf4: bool = False,
    seed: int = 0,
) -> Model:
    """A model of these sizes, fields of a config.json as in SHAPES: matrices and biases normal with
    deviation 0.02, norms 1. In NF4 they are the same numbers, quantized one by one. A CPU and a GPU
    draw different numbers from one seed."""
    model = _shapes(sizes, dtype)
    generator = torch.Generator(device).manual_seed(seed)
    for name, parameter in list(model.named_parameters()):
        values = torch.ones(parameter.shape, dtype=dtype, device=device)
        if "norm" not in name:
            values.normal_(0, 0.02, generator=generator)
        _assign(model, name, values, device, nf4, False)
    return model.eval()


def _shapes(sizes: dict[str, Any], dtype: torch.dtype) -> Model:
    """The model on "meta": no fp32 copy is ever allocated."""
    with torch.device("meta"):
        return Model(ModelConfig.of(sizes)).to(dtype).requires_grad_(False)


def _assign(
    model: Model, name: str, tensor: Tensor, device: torch.device, nf4: bool, host_embedding: bool
) -> None:
    """A parameter of the model gets its numbers and its place, in the model's type or in NF4."""
    owner, _, attribute = name.rpartition(".")
    module = model.get_submodule(owner)
    like = getattr(module, attribute)
    if tensor.shape != like.shape:
        raise InputError(f"has shape {tuple(tensor.shape)}, expected {tuple(like.shape)}")
    if not tensor.is_floating_point():
        raise InputError(f"is {tensor.dtype}, expected floats")
    if nf4 and isinstance(module, Linear) and attribute == "weight" and name != "lm_head.weight":
        module.to_nf4(tensor.to(like.dtype).to(device))
        return
    on_host = host_embedding and name == "embed_tokens" and not model.config.tied
    place = torch.device("cpu") if on_host else device
    pinned = on_host and device.type == "cuda"
    room = torch.empty(like.shape, dtype=like.dtype, device=place, pin_memory=pinned)
    setattr(module, attribute, nn.Parameter(room.copy_(tensor), requires_grad=False))


def _from_safetensors(base: Base) -> Iterator[Entry]:
    """(our name, name in the file, tensor, no 4-bit form) of every shard."""
    for shard in shards(base.path):
        try:
            with safe_open(shard, framework="pt") as file:
                for source in file.keys():  # noqa: SIM118 (not a dict)
                    name = source.removeprefix("model.")
                    name = "embed_tokens" if name == "embed_tokens.weight" else name
                    yield name, source, file.get_tensor(source), None
        except (SafetensorError, OSError) as error:
            raise InputError(f"{shard}: truncated or not a safetensors file ({error})") from error


def _from_gguf(
    base: Base, config: ModelConfig, wanted: dict[str, Tensor], keep_q4: bool
) -> Iterator[Entry]:
    """(our name, name in the file, tensor in Hugging Face's row order, its 4-bit form if any)."""
    for entry in base.reader.tensors:
        name, rows = _name_of(entry.name), entry.rows
        order = _row_order(entry.name, rows, config)
        is_q4 = keep_q4 and entry.tensor_type == gguf.GGMLQuantizationType.Q4_1
        if is_q4 and name in wanted and name != "embed_tokens" and can_quantize(wanted[name]):
            parts = [part[order] for part in _q4_1(entry.data, rows)]
            yield name, entry.name, dequantize(*parts), quantize(*parts)
        else:
            values = gguf.dequantize(entry.data, entry.tensor_type)  # numpy fp32, rows first
            tensor = torch.from_numpy(np.array(values, dtype=np.float32))
            yield name, entry.name, tensor[order], None


def _row_order(source: str, rows: int, config: ModelConfig) -> slice | Tensor:
    """Where each row of Hugging Face's order stands in the file."""
    if config.family != "llama" or not re.search(r"attn_[qk]\.", source):
        return slice(None)
    pairs = torch.arange(rows).view(-1, config.E // 2, 2)  # (heads, E/2, 2)
    return pairs.transpose(1, 2).flatten()


def _q4_1(data: np.ndarray, rows: int) -> tuple[Tensor, Tensor, Tensor]:
    """Blocks of 20 bytes -> codes (rows, in) int32, steps and floors (rows, in / 32) fp32.

    A block is d and m in fp16 and 16 bytes: low halves are codes 0 to 15, high halves 16 to 31.
    """
    blocks = np.ascontiguousarray(data).reshape(rows, -1, 20)
    steps, floors = np.moveaxis(blocks[..., :4].copy().view(np.float16), -1, 0)
    codes = np.concatenate([blocks[..., 4:] & 15, blocks[..., 4:] >> 4], -1)  # (rows, in / 32, 32)
    return (
        torch.from_numpy(codes.reshape(rows, -1).astype(np.int32)),
        torch.from_numpy(steps.astype(np.float32)),
        torch.from_numpy(floors.astype(np.float32)),
    )


def _name_of(source: str) -> str:
    """ "blk.3.attn_q.weight" -> "layers.3.self_attn.q_proj.weight"; unknown names unchanged."""
    block = re.fullmatch(r"blk\.(\d+)\.(\w+)\.(weight|bias)", source)
    if block and block[2] in GGUF_NAMES:
        return f"layers.{block[1]}.{GGUF_NAMES[block[2]]}.{block[3]}"
    return GGUF_NAMES.get(source, source)


def device_of(name: str) -> torch.device:
    """--device: auto, cpu, cuda or cuda:N. auto is the GPU where there is one."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    cards = torch.cuda.device_count()
    if not re.fullmatch(r"cpu|cuda(:\d+)?", name):
        raise InputError(f"--device {name}: expected auto, cpu, cuda or cuda:N")
    device = torch.device(name)
    if device.type == "cuda" and (device.index or 0) >= cards:
        raise InputError(f"--device {name}: this machine has {cards} CUDA devices")
    if device.type == "cuda":
        torch.cuda.set_device(device)  # Triton launches on the current one
    return device


def dtype_of(name: str, device: torch.device) -> torch.dtype:
    """--dtype: auto, bf16, fp16 or fp32. auto is 16 bits where the machine multiplies them fast."""
    if name != "auto":
        if name not in DTYPES:
            raise InputError(f"--dtype {name}: expected auto, {', '.join(DTYPES)}")
        return DTYPES[name]
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float16
    return torch.bfloat16 if can_pack(torch.empty(0, dtype=torch.bfloat16)) else torch.float32
