"""Adapters on disk, in PEFT's format: what is trained here loads there, and the reverse.

    adapter_config.json          rank, alpha, targets, and more that we leave as PEFT has it
    adapter_model.safetensors    A and B in fp32, named after transformers' modules:
        base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight    (R, in)
        base_model.model.model.layers.0.self_attn.q_proj.lora_B.weight    (out, R)

PEFT finds its matrices by `target_modules`: a list of endings of module names, or one regular
expression for the whole name, or "all-linear"; less `exclude_modules`, and of a list only the
layers in `layers_to_transform`. `load` follows these rules and then demands exactly the tensors
that they promise, so a file that lost one is refused instead of loaded with a hole. `save` writes
endings such as "q_proj" where every layer has them, and else the name of each matrix.

What we chose: no pickle (adapter_model.bin), and no adapter whose meaning we would change. DoRA,
biases, ranks that differ between layers, trained embeddings, and starts that alter the base (PiSSA,
OLoRA, LoftQ) are errors that name the field. Fields we do not know are ignored, as PEFT does.
"""

import json
import math
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from safetensors.torch import save as to_bytes
from torch import Tensor

from nanopersrm import InputError
from nanopersrm.model.bases import read_json
from nanopersrm.model.lora import TARGETS, Lora, LoraConfig, matrices
from nanopersrm.model.transformer import Model

CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model.model."  # PeftModel, LoraModel, LlamaForCausalLM
LETTERS = {"A": ".lora_A.weight", "B": ".lora_B.weight"}

# Every field that PEFT 0.21 writes, and what it means to use nothing beyond plain LoRA.
PLAIN: dict[str, Any] = {
    "alora_invocation_tokens": None,
    "alpha_pattern": {},
    "arrow_config": None,
    "auto_mapping": None,
    "base_model_name_or_path": None,
    "bias": "none",
    "corda_config": None,
    "ensure_weight_tying": False,
    "eva_config": None,
    "exclude_modules": None,
    "fan_in_fan_out": False,
    "inference_mode": True,
    "init_lora_weights": True,
    "kasa_config": None,
    "layer_replication": None,
    "layers_pattern": None,
    "layers_to_transform": None,
    "loftq_config": {},
    "lora_alpha": 8,
    "lora_bias": False,
    "lora_dropout": 0.0,
    "lora_ga_config": None,
    "megatron_config": None,
    "megatron_core": "megatron.core",
    "modules_to_save": None,
    "monteclora_config": None,
    "peft_type": "LORA",
    "peft_version": "0.21.2",
    "qalora_group_size": 16,
    "r": 8,
    "rank_pattern": {},
    "revision": None,
    "target_modules": None,
    "target_parameters": None,
    "task_type": "CAUSAL_LM",
    "trainable_token_indices": None,
    "use_bdlora": None,
    "use_dora": False,
    "use_qalora": False,
    "use_rslora": False,
    "velora_config": None,
}
# Fields that change what an adapter computes: anything but the plain value is refused.
REFUSED = (
    "alora_invocation_tokens",
    "alpha_pattern",
    "arrow_config",
    "bias",
    "fan_in_fan_out",
    "kasa_config",
    "layer_replication",
    "layers_pattern",
    "lora_bias",
    "modules_to_save",
    "monteclora_config",
    "rank_pattern",
    "target_parameters",
    "trainable_token_indices",
    "use_bdlora",
    "use_dora",
    "use_qalora",
    "velora_config",
)
HARMLESS_STARTS = (True, False, None, "gaussian", "eva", "orthogonal")  # the base stays as it is


def save(folder: Path, lora: Lora, base_name: str) -> None:
    """Write both files; the same adapter gives the same bytes."""
    c = lora.config
    config = PLAIN | {
        "base_model_name_or_path": base_name,
        "lora_alpha": int(c.alpha) if c.alpha == int(c.alpha) else c.alpha,
        "lora_dropout": c.dropout,
        "r": c.rank,
        "target_modules": list(c.targets) if lora.whole else list(lora.masters),
        "use_rslora": c.rslora,
    }
    tensors = {}
    for name, pair in lora.masters.items():
        for ending, part in zip(LETTERS.values(), pair, strict=True):
            tensors[PREFIX + name + ending] = part.detach().float().cpu().contiguous()
    contents = {
        TENSORS: to_bytes(tensors, {"format": "pt"}),
        CONFIG: json.dumps(config, indent=2, sort_keys=True).encode(),
    }
    for file, content in contents.items():
        part_name = folder / f"{file}.part"
        try:
            folder.mkdir(parents=True, exist_ok=True)
            part_name.write_bytes(content)
            os.replace(part_name, folder / file)
        except OSError as error:
            raise InputError(f"{folder / file}: cannot be written ({error.strerror})") from error
        finally:
            if folder.is_dir():
                part_name.unlink(missing_ok=True)


def load(folder: Path, model: Model) -> Lora:
    """The adapter in `folder`, for `model`; it is not switched on."""
    for name in (CONFIG, TENSORS):
        if not (folder / name).is_file():
            raise InputError(f"{folder}: expected a folder with {CONFIG} and {TENSORS}, no {name}")
    file = folder / CONFIG
    config = read_json(file)
    _check_plain(config, file)
    wanted = _chosen(config, model, file)
    rank = config.get("r")
    if not isinstance(rank, int) or isinstance(rank, bool):
        raise InputError(f"{file}, field r: expected a whole number, found {rank!r:.80}")
    alpha, dropout = (_number(config, field, file) for field in ("lora_alpha", "lora_dropout"))
    rslora = _flag(config, "use_rslora", file)
    targets = tuple(t for t in TARGETS if any(name.endswith(f".{t}") for name in wanted))
    try:
        sizes = LoraConfig(rank, alpha, dropout, rslora, targets)
    except InputError as error:
        raise InputError(f"{file}: {error}") from error
    tensors = _read(folder / TENSORS)
    _check_shapes(tensors, wanted, model, rank, folder / TENSORS)
    lora = Lora(model, sizes, seed=0, only=wanted)
    lora.load_tensors(tensors)
    return lora


def copy_as(folder: Path, out: Path, dtype: torch.dtype) -> int:
    """All of a folder, with tensors of this type; the bytes of what is written."""
    size = 0
    for file in sorted(path for path in folder.rglob("*") if path.is_file()):
        to = out / file.relative_to(folder)
        to.parent.mkdir(parents=True, exist_ok=True)
        if file.suffix == ".safetensors":
            try:
                tensors = {name: part.to(dtype) for name, part in load_file(file).items()}
            except SafetensorError as error:
                raise InputError(f"{file}: not a safetensors file ({error})") from error
            to.write_bytes(to_bytes(tensors, {"format": "pt"}))
        else:
            to.write_bytes(file.read_bytes())
        size += to.stat().st_size
    return size


def _check_plain(config: dict[str, Any], file: Path) -> None:
    """Nothing is asked for that would compute something else than LoRA."""
    if config.get("peft_type") != "LORA":
        found = config.get("peft_type")
        raise InputError(f"{file}, field peft_type: expected 'LORA', found {found!r}")
    for field in REFUSED:
        value, plain = config.get(field, PLAIN[field]), PLAIN[field]
        if value != plain and not (value in (None, False, [], {}) and not plain):
            raise InputError(
                f"{file}, field {field}: expected {plain!r}, found {value!r:.80}; only plain LoRA "
                "is supported"
            )
    start = config.get("init_lora_weights", True)
    if start not in HARMLESS_STARTS:
        raise InputError(
            f"{file}, field init_lora_weights: expected a start that leaves the base as it is, "
            f"found {start!r:.80}"
        )


def _chosen(config: dict[str, Any], model: Model, file: Path) -> set[str]:
    """Names of the matrices that the fields choose, by PEFT's rules.

    {"target_modules": ["q_proj"], "layers_to_transform": [2]} -> {"layers.2.self_attn.q_proj"}
    """
    targets = config.get("target_modules")
    aimed = _matcher(targets, "target_modules", file)
    excluded = _matcher(config.get("exclude_modules") or [], "exclude_modules", file)
    layers = config.get("layers_to_transform")
    layers = [layers] if isinstance(layers, int) else layers or []
    if not isinstance(layers, list) or not all(isinstance(layer, int) for layer in layers):
        raise InputError(
            f"{file}, field layers_to_transform: expected numbers of layers, found {layers!r:.80}"
        )
    found = set()
    for name in matrices(model, TARGETS):
        here = not layers or isinstance(targets, str) or int(name.split(".")[1]) in layers
        if here and aimed(f"model.{name}") and not excluded(f"model.{name}"):
            found.add(name)
    if not found:
        raise InputError(
            f"{file}, field target_modules: expected some of {', '.join(TARGETS)}, "
            f"found {targets!r:.80}"
        )
    return found


def _matcher(targets: Any, field: str, file: Path) -> Callable[[str], bool]:
    """Whether a module name such as "model.layers.0.self_attn.q_proj" is meant."""
    if targets == "all-linear" and field == "target_modules":
        return lambda name: True
    if isinstance(targets, str):
        try:
            pattern = re.compile(targets)
        except re.error as error:
            raise InputError(
                f"{file}, field {field}: expected a regular expression, found {targets!r:.80} "
                f"({error})"
            ) from error
        return lambda name: pattern.fullmatch(name) is not None
    if not isinstance(targets, list) or not all(isinstance(target, str) for target in targets):
        raise InputError(
            f"{file}, field {field}: expected a list of names or a regular expression, "
            f"found {targets!r:.80}"
        )
    return lambda name: any(name == t or name.endswith(f".{t}") for t in targets)


def _number(config: dict[str, Any], field: str, file: Path) -> float:
    value = config.get(field, PLAIN[field])
    right = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not right or not math.isfinite(value):
        raise InputError(f"{file}, field {field}: expected a number, found {value!r:.80}")
    return float(value)


def _flag(config: dict[str, Any], field: str, file: Path) -> bool:
    value = config.get(field, PLAIN[field])
    if not isinstance(value, bool):
        raise InputError(f"{file}, field {field}: expected true or false, found {value!r:.80}")
    return value


def _read(file: Path) -> dict[str, Tensor]:
    """Our name, "layers.0.self_attn.q_proj.A" -> tensor; a name that is not LoRA's stays itself."""
    tensors = {}
    try:
        with safe_open(file, framework="pt") as opened:
            for source in opened.keys():  # noqa: SIM118 (not a dict)
                name = source
                for letter, ending in LETTERS.items():
                    if source.startswith(PREFIX) and source.endswith(ending):
                        name = f"{source[len(PREFIX) : -len(ending)]}.{letter}"
                tensors[name] = opened.get_tensor(source)
    except (SafetensorError, OSError) as error:
        raise InputError(f"{file}: truncated or not a safetensors file ({error})") from error
    return tensors


def _check_shapes(
    tensors: dict[str, Tensor], wanted: set[str], model: Model, rank: int, file: Path
) -> None:
    """Each matrix has its A (R, in) and B (out, R) of finite floats, and nothing else is there."""
    shapes = {}
    for name, matrix in matrices(model, TARGETS).items():
        if name in wanted:
            shapes[f"{name}.A"] = (rank, matrix.width_in)
            shapes[f"{name}.B"] = (matrix.width_out, rank)
    if missing := sorted(set(shapes) - set(tensors)):
        source = PREFIX + missing[0][:-2] + LETTERS[missing[0][-1]]
        raise InputError(f"{file}: missing tensor {source}, which {CONFIG} promises")
    for name, tensor in tensors.items():
        source = PREFIX + name[:-2] + LETTERS[name[-1]] if name[-2:] in (".A", ".B") else name
        if name not in shapes:
            raise InputError(
                f"{file}: unexpected tensor {source}: expected A and B of the matrices that "
                f"{CONFIG} names"
            )
        came = tuple(tensor.shape)
        if came != shapes[name]:
            raise InputError(f"{file}: tensor {source} has shape {came}, expected {shapes[name]}")
        if not tensor.is_floating_point() or not bool(torch.isfinite(tensor).all()):
            raise InputError(f"{file}: tensor {source} holds other than finite floats")
