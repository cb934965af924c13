"""Presets: what fits on which card.

A preset sets how a step is computed, never what it computes: the same pairs and seeds give the same
losses up to rounding.

    tiny   two random blocks that learn nothing worth keeping, to see that all runs: seconds
    cpu    SmolLM2-135M in 16 bits, everything kept: 2 cores, 8 GB of memory
    24gb   7 billion weights in 4 bits, blocks computed again in the backward
    12gb   the same, with a smaller budget, 8-bit Adam, and the embedding in host memory
    8gb    the same, with the smallest budget and the fewest replies at a time

`memory_estimate` adds up the large terms of a training step. For N packed tokens, s bytes a number,
L blocks and an adapter of W numbers:

    weights   V D s (twice where the head is not tied) and, in the blocks, s or 0.516 (NF4) bytes
    adapter   masters 4 W, gradients 4 W, copies s W, Adam's moments 8 W or 2 W
    kept      a block keeps N s (4 D + 2 Q + 2 KV + 3 F + 7 R) for its backward; all L blocks do, or
              with recompute one does and the others keep their input, N D s
    head      3 N D s, and a chunk of logits
"""

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

from nanopersrm import InputError
from nanopersrm.model.transformer import ModelConfig

# Settings that are numbers from 1.
SIZES = ("steps", "reading_steps", "batch_pairs", "budget", "rows", "cache_mb")
NF4_BYTES = 0.516  # a weight


@dataclass(frozen=True)
class Preset:
    """How a training step is computed."""

    nf4: bool  # matrices of the blocks in 4 bits
    dtype: str  # of everything else and of all products: auto, bf16, fp16, fp32
    budget: int  # packed tokens in a micro-batch
    recompute: bool  # compute each block again in its backward, instead of keeping all of it
    eight_bit: bool  # Adam's moments in 8 bits (bitsandbytes, paged)
    host_embedding: bool  # the embedding stays in host memory (where it is not the head as well)
    chunk_mb: int  # logits that exist at a time
    card_gb: float | None  # memory of the card; None: not a card
    steps: int  # of imitation and contrast
    reading_steps: int  # of reading before
    batch_pairs: int  # pairs a step
    # of reinforcement:
    rft_steps: int
    twin_pairs: int  # pairs with their twins a step
    group: int  # G: replies to a prompt
    rows: int  # replies drawn side by side, at most
    cache_mb: int  # keys and values while drawing, and in validation


CARD = Preset(
    True, "auto", 8192, True, False, False, 512, 24.0, steps=600, reading_steps=150, batch_pairs=32,
    rft_steps=300, twin_pairs=8, group=8, rows=128, cache_mb=3584,
)  # fmt: skip
TIGHT = replace(CARD, eight_bit=True, host_embedding=True)
PRESETS = {
    "tiny": Preset(
        False, "fp32", 2048, False, False, False, 16, None, steps=6, reading_steps=3, batch_pairs=2,
        rft_steps=4, twin_pairs=1, group=3, rows=6, cache_mb=1024,
    ),
    "cpu": Preset(
        False, "auto", 4096, False, False, False, 64, None, steps=40, reading_steps=10,
        batch_pairs=4,
        rft_steps=10, twin_pairs=1, group=8, rows=32, cache_mb=1024,
    ),
    "24gb": CARD,
    "12gb": replace(TIGHT, budget=6144, chunk_mb=256, card_gb=12.0, rows=64, cache_mb=896),
    "8gb": replace(TIGHT, budget=4096, chunk_mb=128, card_gb=8.0, rows=32, cache_mb=640),
}  # fmt: skip


def preset_for(card_bytes: int | None) -> str:
    """The preset of a machine whose card has so much memory; None: no card."""
    if card_bytes is None:
        return "cpu"
    sizes = {name: preset.card_gb for name, preset in PRESETS.items() if preset.card_gb}
    return next((name for name, gb in sizes.items() if gb * 0.9e9 <= card_bytes), "8gb")


def check_numbers(flags: Mapping[str, Any], least: Mapping[str, int]) -> None:
    """Numbers of flags, or None where the preset decides, from these on."""
    for name, lowest in least.items():
        number = flags.get(name)
        if number is not None and number < lowest:
            flag = name.replace("_", "-")
            raise InputError(f"--{flag}: expected a number from {lowest}, got {number}")


def resolve_preset(name: str, flags: Mapping[str, Any]) -> Preset:
    """The preset of this name, changed by the flags of a command line (None: as the preset)."""
    names = {field.name for field in fields(Preset)}
    changes = {key: value for key, value in flags.items() if key in names and value is not None}
    check_numbers(changes, dict.fromkeys((*SIZES, "twin_pairs"), 1))
    return replace(PRESETS[name], **changes)


def memory_estimate(sizes: ModelConfig, rank: int, preset: Preset, itemsize: int) -> dict[str, int]:
    """Bytes of the large terms of a training step; itemsize: bytes a number of activations."""
    c, s, N = sizes, itemsize, preset.budget
    Q, KV = c.H * c.E, c.K * c.E
    matrices = [(Q, c.D), (KV, c.D), (KV, c.D), (c.D, Q), (c.F, c.D), (c.F, c.D), (c.D, c.F)]
    weights = c.layers * sum(a * b for a, b in matrices)  # of the blocks
    adapter = c.layers * rank * sum(a + b for a, b in matrices)
    tables = 1 if c.tied or (preset.host_embedding and preset.card_gb) else 2
    block = N * s * (4 * c.D + 2 * Q + 2 * KV + 3 * c.F + 7 * rank)
    kept = block + c.layers * N * c.D * s if preset.recompute else c.layers * block
    return {
        "weights": int(weights * (NF4_BYTES if preset.nf4 else s) + tables * c.V * c.D * s),
        "adapter": adapter * (8 + (s if s < 4 else 0) + (2 if preset.eight_bit else 8)),
        "kept for the backward": kept,
        "head": 3 * N * c.D * s + (preset.chunk_mb << 20),
    }


def memory_note(sizes: ModelConfig, rank: int, preset: Preset, itemsize: int) -> str:
    """The estimate in a line."""
    parts = memory_estimate(sizes, rank, preset, itemsize)
    listed = ", ".join(f"{name} {size / 1e9:.2f}" for name, size in parts.items())
    return f"memory: about {sum(parts.values()) / 1e9:.2f} GB ({listed})"
