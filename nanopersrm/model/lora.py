"""LoRA adapters: what is trained, beside a base that never changes.

    y = x Wᵀ + scale · (x Aᵀ) Bᵀ           A (R, in), B (out, R), scale = alpha / R

(Hu et al., arXiv 2106.09685; `kernels/adapter.py` has the formula at work.) With rank 16 on all
seven matrices of its blocks, SmolLM2-135M gets 4.9 million numbers to learn beside 134 million that
stay. B starts at zero, so that the first step starts from the base as it is; A starts uniform
between ±1 / sqrt(in), as PEFT's does. rsLoRA divides alpha by sqrt(R) instead of R, which keeps
the size of an update the same as the rank grows (Kalajdzievski, arXiv 2312.03732).

Masters and copies. One step moves a weight by about the learning rate, 2e-4; a number near 0.02 in
bf16 can only move by 6e-5 or 1.2e-4, and much of what should add up over steps would be rounded
away. So the optimizer works on *masters* in fp32. The model multiplies in 16 bits, so it is given
*copies*, made once a step by `refresh`. The copy is a differentiable cast: a gradient that arrives
at it goes on to the master, and is summed there in fp32 over all micro-batches of a step.

Several adapters can share one model; one is on at a time, and none is merged into the weights:

    policy = Lora(model, LoraConfig(), seed=0); policy.on(model)
    with style.using(model): ...          another one for a moment
    with adapter_off(model): ...          the base alone: the reference of reinforcement learning

What we left out: adapters on the embedding and the head, DoRA, ranks that differ between layers.
"""

import math
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from kernels.linear import Adapter
from nanopersrm import InputError
from nanopersrm.model.linear import Linear
from nanopersrm.model.transformer import Model

TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True)
class LoraConfig:
    """The size of an adapter and where it sits."""

    rank: int = 16  # R: numbers between A and B
    alpha: float = 32.0  # scale = alpha / rank
    dropout: float = 0.0  # share of the input that the adapter does not see in training
    rslora: bool = False  # scale = alpha / sqrt(rank)
    targets: tuple[str, ...] = TARGETS  # matrices of each block that get an adapter

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise InputError(f"rank: expected a number from 1, got {self.rank}")
        if not 0 <= self.dropout < 1:
            raise InputError(f"dropout: expected 0 up to, but not, 1, got {self.dropout}")
        if unknown := [name for name in self.targets if name not in TARGETS]:
            raise InputError(
                f"targets: expected names out of {', '.join(TARGETS)}, got {unknown[0]!r}"
            )
        if not self.targets:
            raise InputError(f"targets: expected names out of {', '.join(TARGETS)}, got none")

    @property
    def scale(self) -> float:
        return self.alpha / (math.sqrt(self.rank) if self.rslora else self.rank)


def matrices(model: Model, targets: tuple[str, ...]) -> dict[str, Linear]:
    """Name, as in "layers.0.self_attn.q_proj", -> matrix, for all that carry an adapter."""
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, Linear) and name.rpartition(".")[2] in targets
    }


class Lora:
    """One adapter: masters in fp32, and their copies in the model's type."""

    def __init__(
        self, model: Model, config: LoraConfig, seed: int, only: Collection[str] | None = None
    ):
        """A random, B zero; it does nothing until it is on. `only`: these of the matrices."""
        self.config, self.dtype = config, model.norm.weight.dtype
        self.places: dict[str, Linear] = {}
        self.masters: dict[str, tuple[nn.Parameter, nn.Parameter]] = {}
        self.copies: dict[str, Adapter] = {}
        random = torch.Generator().manual_seed(seed)
        targets = matrices(model, config.targets)
        self.whole = only is None or set(only) == set(targets)  # every layer has every target
        for name, matrix in targets.items():
            if only is not None and name not in only:
                continue
            bound = matrix.width_in**-0.5
            A = torch.empty(config.rank, matrix.width_in).uniform_(-bound, bound, generator=random)
            B = torch.zeros(matrix.width_out, config.rank)
            self.places[name] = matrix
            self.masters[name] = (
                nn.Parameter(A.to(model.device)),
                nn.Parameter(B.to(model.device)),
            )
        self.refresh()

    def parameters(self) -> list[nn.Parameter]:
        """A and B of each matrix, in the order of the model."""
        return [part for pair in self.masters.values() for part in pair]

    def last_block(self) -> list[nn.Parameter]:
        """Those of `parameters` that belong to the last block."""
        block = list(self.masters)[-1].split(".")[:2]  # layers, its number
        found = [pair for name, pair in self.masters.items() if name.split(".")[:2] == block]
        return [part for pair in found for part in pair]

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
        for name, matrix in matrices(model, TARGETS).items():
            matrix.adapter = self.copies.get(name)
            matrix.dropout = self.config.dropout

    def off(self, model: Model) -> None:
        """The model is the base again."""
        for matrix in matrices(model, TARGETS).values():
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
        own = self.tensors()
        if odd := sorted(set(own) ^ set(tensors)):
            here = "missing" if odd[0] in own else "unexpected"
            raise InputError(f"adapter: {here} tensor {odd[0]}")
        for name, tensor in own.items():
            came = tuple(tensors[name].shape)
            if came != tuple(tensor.shape):
                raise InputError(
                    f"adapter: tensor {name} has shape {came}, expected {tuple(tensor.shape)}"
                )
            tensor.copy_(tensors[name].detach())
        self.refresh()  # with gradients on, or the copies would lead nowhere


@contextmanager
def adapter_off(model: Model) -> Iterator[None]:
    """The base alone inside; afterwards the model has what it had before."""
    before = {m: (m.adapter, m.dropout) for m in matrices(model, TARGETS).values()}
    for matrix in before:
        matrix.adapter = None
    try:
        yield
    finally:
        for matrix, (adapter, dropout) in before.items():
            matrix.adapter, matrix.dropout = adapter, dropout
