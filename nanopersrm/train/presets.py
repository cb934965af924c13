"""Presets: what fits on which card.

A preset sets how a step is computed, never what it computes: the same pairs and seeds give the same
losses up to rounding. `python -m nanopersrm.train.memory` prints what each needs.

    tiny   two random blocks that write replies and cannot read, to see that all runs: seconds
    cpu    SmolLM2-135M in 16 bits, everything kept: 2 cores, 8 GB of memory
    24gb   7 billion weights in 4 bits, blocks computed again in the backward
    12gb   the same, with a smaller budget, 8-bit Adam, and in host memory the kept states and the
           embedding
    8gb    the same, with the smallest budget and the fewest replies at a time
"""

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

from nanopersrm import InputError

# Settings that are numbers from 1.
SIZES = ("steps", "warmup_steps", "bundles", "plans", "rows", "cache_mb", "reply")


@dataclass(frozen=True)
class Preset:
    """How a training step is computed."""

    nf4: bool  # matrices of the blocks in 4 bits
    dtype: str  # of everything else and of all products: auto, bf16, fp16, fp32
    budget: int  # packed tokens in a micro-batch
    recompute: bool  # compute each block again in its backward, instead of keeping all of it
    offload: bool  # keep what is kept of each block in host memory
    eight_bit: bool  # Adam's moments in 8 bits (bitsandbytes, paged)
    host_embedding: bool  # the embedding stays in host memory (where it is not the head as well)
    chunk_mb: int  # logits that exist at a time
    card_gb: float | None  # memory of the card; None: not a card
    steps: int  # of imitation and contrast
    warmup_steps: int  # of the pooled contrast before
    bundles: int  # pairs a step
    # of reinforcement:
    rft_steps: int
    plans: int  # couples of twins a step
    at_once: int  # of them judged without reasoning
    group: int  # G: replies to a prompt
    rows: int  # replies drawn side by side, at most
    cache_mb: int  # keys and values while drawing, and in trials
    reply: int  # tokens of a reply, at most


PRESETS = {
    "tiny": Preset(
        False, "fp32", 2048, False, False, False, False, 16, None, steps=6, warmup_steps=3,
        bundles=2,
        rft_steps=4, plans=1, at_once=0, group=3, rows=6, cache_mb=1024, reply=48,
    ),
    "cpu": Preset(
        False, "auto", 4096, False, False, False, False, 64, None, steps=40, warmup_steps=10,
        bundles=2,
        rft_steps=10, plans=1, at_once=0, group=8, rows=32, cache_mb=1024, reply=160,
    ),
    "24gb": Preset(
        True, "auto", 8192, True, False, False, False, 512, 24.0,
        steps=600, warmup_steps=150, bundles=32,
        rft_steps=300, plans=8, at_once=0, group=8, rows=128, cache_mb=3584, reply=256,
    ),
    "12gb": Preset(
        True, "auto", 6144, True, True, True, True, 256, 12.0,
        steps=600, warmup_steps=150, bundles=32,
        rft_steps=300, plans=8, at_once=0, group=8, rows=64, cache_mb=896, reply=256,
    ),
    "8gb": Preset(
        True, "auto", 4096, True, True, True, True, 128, 8.0,
        steps=600, warmup_steps=150, bundles=32,
        rft_steps=300, plans=8, at_once=0, group=8, rows=32, cache_mb=640, reply=256,
    ),
}  # fmt: skip


def for_card(memory: int | None) -> str:
    """The preset of a machine whose card has so many bytes; None: no card."""
    if memory is None:
        return "cpu"
    fitting = [
        name
        for name, preset in PRESETS.items()
        if preset.card_gb is not None and preset.card_gb * 0.9e9 <= memory
    ]
    return fitting[0] if fitting else "8gb"


def settled(name: str, said: Mapping[str, Any]) -> Preset:
    """The preset of this name, with what a command line says otherwise (None: nothing)."""
    own = {field.name for field in fields(Preset)}
    changes = {key: value for key, value in said.items() if key in own and value is not None}
    for key in (*SIZES, "budget"):
        if changes.get(key, 1) < 1:
            flag = key.replace("_", "-")
            raise InputError(f"--{flag}: expected a number from 1, got {changes[key]}")
    found = replace(PRESETS[name], **changes)
    if not 0 <= found.at_once <= found.plans:
        raise InputError(f"--at-once: expected 0 to --plans ({found.plans}), got {found.at_once}")
    if found.offload and not found.recompute:
        raise InputError("--offload True: only with --recompute True is there something to move")
    return found
