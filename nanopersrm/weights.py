"""From files to tensors: fill a `Model` from safetensors or GGUF, one tensor at a time.

A safetensors folder is read shard by shard and copied tensor by tensor, so that the host never
holds two copies. A GGUF file is memory-mapped and each tensor is expanded from its 4- or 8-bit
blocks by the `gguf` library.

Names are checked both ways: what the model needs and the file lacks, and what the file has and the
model does not know, are errors that name the tensor. Shapes are checked too.

GGUF files of the Llama family store the rows of q and k in another rotary order: there the pair i
is (2i, 2i + 1), in Hugging Face's order it is (i, i + E/2). Row 2i + s of a head goes back to row i
+ s·E/2. Qwen files keep the order.

Where to read next: `sampler.py`.
"""

import re
from collections.abc import Iterator
from pathlib import Path

import gguf
import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from kernels.q4_linear import Q4, can_quantize, dequantize, quantize
from nanopersrm import InputError
from nanopersrm.bases import Base, read_json
from nanopersrm.model import Linear, Model, ModelConfig

Found = tuple[str, str, Tensor, Q4 | None]  # our name, name in the file, tensor, 4-bit form
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}

# GGUF name -> our name; * stands for ".weight" or ".bias"
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


def load(base: Base, dtype: torch.dtype, device: torch.device) -> Model:
    """The model of `base`, on `device`, in `dtype`, ready for inference and without gradients."""
    try:
        config = ModelConfig.of(base.config)
        with torch.device("meta"):  # shapes only, so that no fp32 copy is ever allocated
            model = Model(config).to(dtype)
    except InputError as error:
        raise InputError(f"{base.path}: {error}") from error
    model = model.to_empty(device=device).requires_grad_(False)
    wanted: dict[str, Tensor] = dict(model.named_parameters())
    missing = set(wanted)
    in_gguf = base.kind == "gguf"
    tensors = _from_gguf(base, config, wanted) if in_gguf else _from_safetensors(base)
    for name, source, tensor, q4 in tensors:
        if name == "lm_head.weight" and config.tied:
            continue  # some files repeat the embedding here
        if name not in wanted:
            raise InputError(f"{base.path}: unexpected tensor {source}")
        if tensor.shape != wanted[name].shape:
            expected, came = tuple(wanted[name].shape), tuple(tensor.shape)
            raise InputError(f"{base.path}: tensor {source} has shape {came}, expected {expected}")
        if not tensor.is_floating_point():
            raise InputError(f"{base.path}: tensor {source} is {tensor.dtype}, expected floats")
        wanted[name].copy_(tensor)
        missing.discard(name)
        if q4 is not None:
            owner = model.get_submodule(name.removesuffix(".weight"))
            assert isinstance(owner, Linear), f"{name} is not a matrix"
            owner.q4 = q4
    if missing:
        few = ", ".join(sorted(missing)[:3])
        raise InputError(f"{base.path}: missing {len(missing)} tensors: {few}")
    return model


def _from_safetensors(base: Base) -> Iterator[Found]:
    """(our name, name in the file, tensor, no 4-bit form) of every shard."""
    for shard in _shards(base.path):
        try:
            with safe_open(shard, framework="pt") as file:
                for source in file.keys():  # noqa: SIM118 (not a dict)
                    if DERIVED.search(source):
                        continue
                    name = source.removeprefix("model.")
                    name = "embed_tokens" if name == "embed_tokens.weight" else name
                    yield name, source, file.get_tensor(source), None
        except (SafetensorError, OSError) as error:
            raise InputError(f"{shard}: truncated or not a safetensors file ({error})") from error


def _shards(folder: Path) -> list[Path]:
    """The files of the model itself: those its index names, or model.safetensors, or any."""
    index = folder / "model.safetensors.index.json"
    if index.exists():
        shards = read_json(index).get("weight_map")
        if not isinstance(shards, dict):
            raise InputError(f"{index}: expected an object as weight_map")
        return [folder / name for name in sorted({str(name) for name in shards.values()})]
    whole = folder / "model.safetensors"
    if whole.exists():
        return [whole]
    files = sorted(folder.glob("*.safetensors"))
    return [file for file in files if not file.name.startswith("adapter")]


def _from_gguf(base: Base, config: ModelConfig, wanted: dict[str, Tensor]) -> Iterator[Found]:
    """(our name, name in the file, tensor in Hugging Face's row order, its 4-bit form if any)."""
    for entry in base.reader().tensors:
        if DERIVED.search(entry.name):
            continue
        name = _name_of(entry.name)
        rows = int(entry.shape[-1])
        order = _row_order(entry.name, rows, config)
        is_q4 = entry.tensor_type == gguf.GGMLQuantizationType.Q4_1
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
