"""From gradients to the next weights: AdamW, its learning rate, and clipping.

    m = β₁ m + (1 - β₁) g             v = β₂ v + (1 - β₂) g²                   β = (0.9, 0.999)
    w = w - lr · m̂ / (√v̂ + ε)                                                  m̂, v̂: without bias

(Kingma and Ba, arXiv 1412.6980; AdamW without decay is Adam). The learning rate climbs in a
straight line to its peak and comes down on half a cosine:

    lr
    peak      _.-._              n steps, the first w of them to warm up, s = 0, 1, …, n - 1
            /      `-.           s < w:   peak · (s + 1) / (w + 1)
    floor  /           `-.       else:    peak · (floor + (1 - floor) · (1 + cos πt) / 2)
          0  w           n - 1                                          t = (s - w) / (n - 1 - w)

m and v take 8 bytes a weight in fp32. `eight_bit` holds them as codes of 8 bits with a scale for
every 256 (Dettmers et al., arXiv 2110.02861), in memory that moves to the host when the card is
full.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from nanopersrm import InputError

FLOOR = 0.1  # share of the highest learning rate that is left at the end


@dataclass(frozen=True)
class OptimConfig:
    lr: float = 2e-4  # highest learning rate
    warmup: float = 0.05  # share of the steps in which it climbs
    clip: float = 1.0  # longest gradient
    eight_bit: bool = False  # bitsandbytes' paged 8-bit AdamW, on a GPU

    def __post_init__(self) -> None:
        if not (0 < self.lr < math.inf and 0 <= self.warmup <= 1 and 0 < self.clip < math.inf):
            raise InputError(f"expected lr, clip above 0, warmup from 0 to 1, got {self}")


def learning_rate(step: int, steps: int, config: OptimConfig) -> float:
    """Of the step that `step` others came before: with 102 steps and the defaults 3.3e-5 in step 0,
    the peak of 2e-4 in step 5, 1.1e-4 half-way down, in step 53, and 2e-5 in the last."""
    assert 0 <= step < steps, f"step {step} of {steps}"
    warm = round(config.warmup * steps)
    if step < warm:
        return config.lr * (step + 1) / (warm + 1)
    t = (step - warm) / max(1, steps - 1 - warm)
    return config.lr * (FLOOR + (1 - FLOOR) * (1 + math.cos(math.pi * t)) / 2)


def make(parameters: Sequence[nn.Parameter], config: OptimConfig) -> torch.optim.Optimizer:
    """AdamW over fp32 parameters of any shape, all on one device."""
    (device,) = {p.device.type for p in parameters}
    cuda = device == "cuda"
    if not config.eight_bit:
        return torch.optim.AdamW(
            parameters, config.lr, weight_decay=0.0, fused=cuda, foreach=not cuda
        )
    if not cuda:
        raise InputError("--optim.eight-bit needs a GPU: expected a CUDA device, got the CPU")
    try:
        from bitsandbytes.optim import PagedAdamW8bit
    except ImportError as error:
        raise InputError(f"--optim.eight-bit needs bitsandbytes, which fails: {error}") from error
    return PagedAdamW8bit(parameters, config.lr, weight_decay=0.0)


def clip(parameters: Iterable[nn.Parameter], limit: float) -> float:
    """Cut the gradients of all parameters, taken together, to the length `limit`.

    Gives the length before: 5.0 for the gradients (3, 0) and (0, 4), which a limit of 1 turns into
    (0.6, 0) and (0, 0.8). NaN or infinite where any gradient is: do not step then.
    """
    return float(nn.utils.clip_grad_norm_(parameters, limit))


def update(
    optimizer: torch.optim.Optimizer, scaler: torch.amp.GradScaler, lr: float, limit: float
) -> float:
    """One step with the gradients that are there, cut to `limit`; then they are gone.

    Gives their length before. With loss scaling (fp16) a step whose gradients are not finite is
    left out and the scale lowered; without it they are a FloatingPointError, and nothing moves.
    """
    for group in optimizer.param_groups:
        group["lr"] = lr
    scaler.unscale_(optimizer)
    length = clip([p for group in optimizer.param_groups for p in group["params"]], limit)
    if not math.isfinite(length) and not scaler.is_enabled():
        raise FloatingPointError(f"a gradient of length {length}")
    scaler.step(optimizer)
    scaler.update()
    optimizer.zero_grad(set_to_none=True)
    return length
