"""LoRA adapters: what is trained, beside a base that never changes; and PEFT's files of them.

    y = x Wᵀ + scale · (x Aᵀ) Bᵀ           A (R, in), B (out, R), scale = alpha / R

(Hu et al., arXiv 2106.09685; `kernels/linear.py` has the formula at work.) B starts at zero, so
that the first step starts from the base as it is; A starts uniform between ±1 / sqrt(in), as PEFT's
does. With rank 16, SmolLM2-135M learns 4.9 million numbers.

Masters and copies. One step moves a weight by about the learning rate, 2e-4; a number near 0.02 in
bf16 can only move by 6e-5 or 1.2e-4, and small steps would be rounded away. So the optimizer works
on *masters* in fp32, and the model multiplies with *copies* in its own type, made once a step by
`refresh`. The copy is a differentiable cast: gradients add up in the master, in fp32.

Several adapters can share one model; one is on at a time, and none is merged into the weights:

    policy = Lora(model, LoraConfig(), seed=0); policy.on(model)
    with other.using(model): ...          another one for a moment
    with adapter_off(model): ...          the base alone: the reference of reinforcement learning

On disk an adapter is PEFT's two files: adapter_config.json with rank, alpha and targets (names of
matrices, or "all-linear"), and adapter_model.safetensors with A and B in fp32, under such names as
base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight. `load_lora` demands exactly the
tensors that the targets promise. A field that asks for more than plain LoRA (DoRA, rsLoRA, biases,
ranks by layer, PiSSA) is an error that names it.
"""

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, TypeAdapter
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from kernels.linear import Adapter
from nanopersrm import InputError
from nanopersrm.files import reason, temporary, write_text
from nanopersrm.model.base import read_json
from nanopersrm.model.linear import TARGETS, Linear, matrices
from nanopersrm.model.transformer import Model
from nanopersrm.pairs import validate

CONFIG_FILE, TENSORS_FILE = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model.model."  # PeftModel, LoraModel, LlamaForCausalLM
# Fields of adapter_config.json that may say anything; every other one must be off.
KNOWN = {"lora_dropout", "base_model_name_or_path", "revision", "inference_mode", "task_type"}
KNOWN |= {"peft_version", "auto_mapping", "megatron_core", "qalora_group_size"}
OFF: tuple[object, ...] = (None, False, [], {}, "none")


@dataclass(frozen=True)
class LoraConfig:
    """The size of an adapter and where it sits."""

    rank: int = 16  # R: numbers between A and B
    alpha: float = 32.0  # scale = alpha / rank
    targets: tuple[str, ...] = TARGETS  # matrices of each block that get an adapter

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise InputError(f"rank: expected a number from 1, got {self.rank}")
        if unknown := [name for name in self.targets or ("none",) if name not in TARGETS]:
            raise InputError(
                f"targets: expected names out of {', '.join(TARGETS)}, got {unknown[0]!r}"
            )

    @property
    def scale(self) -> float:
        return self.alpha / self.rank


class Lora:
    """One adapter: masters in fp32, and their copies in the model's type."""

    def __init__(self, model: Model, config: LoraConfig, seed: int, only: set[str] | None = None):
        """A random, B zero; it does nothing until it is on. `only`: these of the matrices."""
        self.config, self.dtype = config, model.norm.weight.dtype
        self.places: dict[str, Linear] = {}
        self.masters: dict[str, tuple[nn.Parameter, nn.Parameter]] = {}
        self.copies: dict[str, Adapter] = {}
        random = torch.Generator().manual_seed(seed)
        targets = matrices(model, config.targets)
        self.whole = only is None or only == set(targets)  # every layer has every target
        for name, matrix in targets.items():
            if only is not None and name not in only:
                continue
            bound = matrix.width_in**-0.5
            A = torch.empty(config.rank, matrix.width_in).uniform_(-bound, bound, generator=random)
            B = torch.zeros(matrix.width_out, config.rank)
            self.places[name] = matrix
            self.masters[name] = nn.Parameter(A.to(model.device)), nn.Parameter(B.to(model.device))
        self.refresh()

    def parameters(self) -> list[nn.Parameter]:
        """A and B of each matrix, in the order of the model."""
        return [part for pair in self.masters.values() for part in pair]

    def freeze(self) -> "Lora":
        """It learns no more."""
        for part in self.parameters():
            part.requires_grad_(False)
        self.refresh()
        return self

    def refresh(self) -> None:
        """New copies of the masters, after they have changed; in place where it is on."""
        for name, (A, B) in self.masters.items():
            old = self.copies.get(name)
            new = Adapter(A.to(self.dtype), B.to(self.dtype), self.config.scale)
            self.copies[name] = new
            if old is not None and self.places[name].adapter is old:
                self.places[name].adapter = new

    def on(self, model: Model) -> None:
        """The model computes with this adapter."""
        for name, matrix in matrices(model).items():
            matrix.adapter = self.copies.get(name)

    def off(self, model: Model) -> None:
        """The model is the base again."""
        for matrix in matrices(model).values():
            matrix.adapter = None

    @contextmanager
    def using(self, model: Model) -> Iterator[None]:
        """On inside; afterwards the model has what it had before."""
        with adapter_off(model):
            self.on(model)
            yield

    def tensors(self) -> dict[str, Tensor]:
        """The masters by name, "layers.0.self_attn.q_proj.A" and ".B", for a checkpoint."""
        return {
            f"{name}.{letter}": part.detach()
            for name, pair in self.masters.items()
            for letter, part in zip("AB", pair, strict=True)
        }

    def load_tensors(self, tensors: dict[str, Tensor]) -> None:
        """The inverse of `tensors`; names and shapes must be the same."""
        masters = self.tensors()
        if odd := sorted(masters.keys() ^ tensors.keys()):
            kind = "missing" if odd[0] in masters else "unexpected"
            raise InputError(f"adapter: {kind} tensor {_peft_name(odd[0])}")
        for name, master in masters.items():
            shape, expected = tuple(tensors[name].shape), tuple(master.shape)
            if shape != expected:
                raise InputError(
                    f"adapter: tensor {_peft_name(name)} has shape {shape}, expected {expected}"
                )
            master.copy_(tensors[name].detach())
        self.refresh()  # with gradients on, or the copies would lead nowhere


@contextmanager
def adapter_off(model: Model) -> Iterator[None]:
    """The base alone inside; afterwards the model has what it had before."""
    before = {matrix: matrix.adapter for matrix in matrices(model).values()}
    for matrix in before:
        matrix.adapter = None
    try:
        yield
    finally:
        for matrix, adapter in before.items():
            matrix.adapter = adapter


class _PeftConfig(BaseModel):
    """The fields of adapter_config.json that we read."""

    model_config = ConfigDict(strict=True, extra="allow")
    peft_type: Literal["LORA"]
    r: int = Field(8, ge=1)
    lora_alpha: float = Field(8, allow_inf_nan=False)
    target_modules: list[str] | Literal["all-linear"]
    init_lora_weights: bool | Literal["gaussian", "eva", "orthogonal"] | None = None  # as it is


def save_lora(folder: Path, lora: Lora, base_name: str) -> None:
    """Write both files; the same adapter gives the same bytes."""
    alpha = lora.config.alpha
    config = {
        "base_model_name_or_path": base_name,
        "bias": "none",
        "inference_mode": True,
        "lora_alpha": int(alpha) if alpha == int(alpha) else alpha,
        "peft_type": "LORA",
        "r": lora.config.rank,
        "target_modules": list(lora.config.targets) if lora.whole else list(lora.masters),
        "task_type": "CAUSAL_LM",
    }
    tensors = {
        _peft_name(name): part.float().cpu().contiguous() for name, part in lora.tensors().items()
    }
    try:
        folder.mkdir(parents=True, exist_ok=True)
        part = temporary(folder / TENSORS_FILE)
        save_file(tensors, part, {"format": "pt"})
        os.replace(part, folder / TENSORS_FILE)
    except (OSError, SafetensorError) as error:
        raise InputError(f"{folder}: cannot be written ({reason(error)})") from error
    write_text(folder / CONFIG_FILE, json.dumps(config, indent=2, sort_keys=True))


def load_lora(folder: Path, model: Model) -> Lora:
    """The adapter in `folder`, for `model`; it is not switched on."""
    config = _read_config(folder / CONFIG_FILE)
    named = config.target_modules
    chosen = {
        name
        for name in matrices(model)
        if named == "all-linear" or any(f".model.{name}".endswith(f".{n}") for n in named)
    }
    targets = tuple(t for t in TARGETS if any(name.endswith(f".{t}") for name in chosen))
    if not targets:
        raise InputError(
            f"{folder / CONFIG_FILE}, field target_modules: expected some of {', '.join(TARGETS)}, "
            f"got {named!r:.80}"
        )
    file = folder / TENSORS_FILE
    try:
        stored = load_file(file)
    except (SafetensorError, OSError) as error:
        raise InputError(f"{file}: truncated or not a safetensors file ({error})") from error
    for name, tensor in stored.items():
        if not tensor.is_floating_point() or not bool(torch.isfinite(tensor).all()):
            raise InputError(f"{file}: tensor {name} holds other than finite floats")
    R = max((min(tensor.shape, default=1) for tensor in stored.values()), default=1)
    if config.r > R:  # before room is made for it
        raise InputError(f"{file}: expected rank {config.r}, as {CONFIG_FILE} says, got {R}")
    lora = Lora(model, LoraConfig(config.r, config.lora_alpha, targets), seed=0, only=chosen)
    names = {_peft_name(name): name for name in lora.tensors()}
    try:
        lora.load_tensors({names.get(name, name): tensor for name, tensor in stored.items()})
    except InputError as error:
        raise InputError(f"{file}: {error}") from error
    return lora


def _read_config(file: Path) -> _PeftConfig:
    """adapter_config.json, if it asks for plain LoRA and nothing else."""
    config = validate(TypeAdapter(_PeftConfig), read_json(file), str(file))
    for name, value in sorted((config.model_extra or {}).items()):
        if name not in KNOWN and value not in OFF:
            raise InputError(f"{file}, field {name}: only plain LoRA is supported, got {value!r}")
    return config


def _peft_name(name: str) -> str:
    """ "layers.0.self_attn.q_proj.A" -> the same in PEFT's files"""
    matrix, _, letter = name.rpartition(".")
    return f"{PREFIX}{matrix}.lora_{letter}.weight" if letter in ("A", "B") else name
