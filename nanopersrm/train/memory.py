"""What one training step needs, part by part, before anything is loaded.

    python -m nanopersrm.train.memory --base-shape qwen2.5-7b --preset 12gb [--tokens 4096 --rank 16]
    python -m nanopersrm.train.memory --base-shape qwen2.5-7b --preset 12gb --prompt 2048 --reply 1024

Worked example, the first command: 4.9 GB of weights and what learns, 0.1 GB of buffers, 0.66 GB for
the block at work: 5.7 GB. With 0.7 GB for the CUDA context and workspaces and 5 % lost between
allocations, which we assume, 6.7 GB. The second command, preset by preset, in GB (G = 8; micro-
batches of 8,192, 6,144 and 4,096 tokens):

    preset   training   drawing   replies side by side   together
    24gb         8.83      9.83                     48      11.02
    12gb         5.74      5.51                      8       6.72
    8gb          5.58      5.51                      8       6.56

Under 6 GB it does not go. Matrices in 4 bits 3.37, the head 1.09, adapters with what learning them
takes 0.49, the buffer of a matrix 0.14: 5.08, and 6.03 with what is assumed, before a single row.
A head in 4 bits would save 0.8 of it, and change every logit (`quant.py` says why it is not).

What is counted, and how, is in `ledger.py`.
"""

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import tyro

from nanopersrm import InputError
from nanopersrm.command import exit_code
from nanopersrm.model.lora import LoraConfig
from nanopersrm.model.transformer import ModelConfig
from nanopersrm.model.weights import DTYPES, SHAPES
from nanopersrm.train.ledger import Plan, host_bytes, moments, side_by_side
from nanopersrm.train.presets import PRESETS

CONTEXT = 700_000_000  # bytes: CUDA context, cuBLAS workspaces, compiled kernels; assumed
LOST = 0.05  # of the sum, to fragmentation; assumed
SWITCHES = ("nf4", "recompute", "offload", "eight_bit", "host_embedding")  # of a preset


@dataclass(frozen=True)
class Config:
    """The memory of one training step, predicted."""

    base_shape: str = "qwen2.5-7b"  # a shape of weights.py
    preset: str = "12gb"  # tiny, cpu, 24gb, 12gb, 8gb; the flags below change parts of it
    tokens: int | None = None  # packed tokens of a micro-batch
    rank: int = LoraConfig.rank  # of the adapters
    nf4: bool | None = None  # matrices of the blocks in 4 bits
    recompute: bool | None = None  # each block again in its backward
    offload: bool | None = None  # the inputs of blocks in host memory
    eight_bit: bool | None = None  # Adam's moments in 8 bits
    host_embedding: bool | None = None  # the embedding in host memory
    chunk_mb: int | None = None  # logits that exist at a time
    flash: bool = False  # flash-attn is installed
    prompt: int = 0  # tokens of a prompt that replies are drawn to; 0: training alone
    group: int | None = None  # replies to a prompt
    rows: int | None = None  # replies drawn side by side, at most
    cache_mb: int | None = None  # keys and values while drawing
    reply: int | None = None  # tokens of a reply
    json: bool = False  # print JSON instead of a table


def plan_of(config: Config) -> Plan:
    """The preset, with what the flags change."""
    if config.preset not in PRESETS:
        raise InputError(f"--preset: expected {', '.join(PRESETS)}, got {config.preset!r}")
    preset = PRESETS[config.preset]

    def settled(names: Sequence[str]) -> dict[str, Any]:
        own = {name: getattr(config, name) for name in names}
        return {k: getattr(preset, k) if v is None else v for k, v in own.items()}

    numbers = settled(("chunk_mb", "group", "rows", "cache_mb", "reply"))
    tokens = preset.budget if config.tokens is None else config.tokens
    for name, number in {"tokens": tokens, "rank": config.rank, **numbers}.items():
        if number < 1:
            flag = name.replace("_", "-")
            raise InputError(f"--{flag}: expected a number from 1, got {number}")
    if config.prompt < 0:
        raise InputError(f"--prompt: expected a number from 0, got {config.prompt}")
    if config.prompt:  # no text is cut
        tokens = max(tokens, config.prompt + numbers["reply"])
    dtype = "bf16" if preset.dtype == "auto" else preset.dtype
    return Plan(
        tokens=tokens,
        rank=config.rank,
        width=DTYPES[dtype].itemsize,
        chunk_bytes=numbers.pop("chunk_mb") << 20,
        cache_bytes=numbers.pop("cache_mb") << 20,
        cuda=preset.card_gb is not None,
        flash=config.flash,
        prompt=config.prompt,
        **numbers,
        **settled(SWITCHES),
    )


def main(config: Config) -> None:
    """Predict and print."""
    if config.base_shape not in SHAPES:
        expected = ", ".join(SHAPES)
        raise InputError(f"--base-shape: expected {expected}, got {config.base_shape!r}")
    plan, card = plan_of(config), PRESETS[config.preset].card_gb
    sizes = ModelConfig.of(SHAPES[config.base_shape])
    columns = moments(sizes, plan)
    sums = {name: sum(parts.values()) for name, parts in columns.items()}
    peak = max(sums.values())
    assumed = {"context": CONTEXT, "fragmentation": int(LOST * peak)} if plan.cuda else {}
    total = peak + sum(assumed.values())
    host = host_bytes(sizes, plan)
    if config.json:
        found = {"moments": columns, "sums": sums, "peak": peak, "assumed": assumed}
        found |= {"total": total, "card": None if card is None else int(card * 1e9), "host": host}
        print(json.dumps(found, indent=1))
        return

    def line(name: str, *numbers: float) -> str:
        return f"{name:<24}" + "".join(f"{number / 1e9:>24.3f}" for number in numbers)

    on = [name.replace("_", "-") for name in (*SWITCHES, "flash") if getattr(plan, name)]
    on += [f"{side_by_side(sizes, plan)[1]} replies side by side"] if plan.prompt else []
    what = [f"{plan.tokens:,} packed tokens", f"rank {plan.rank}", f"{8 * plan.width} bits", *on]
    lines = [f"{config.base_shape}, {config.preset}: {', '.join(what)}", ""]
    lines.append(f"{'GB':<24}" + "".join(f"{name:>24}" for name in columns))
    for part in list(columns.values())[-1]:
        lines.append(line(part, *(column.get(part, 0) for column in columns.values())))
    lines += [line("sum", *sums.values()), ""]
    lines += [line(f"{name}, assumed", size) for name, size in assumed.items()]
    lines.append(line("together", total))
    if card is not None:
        lines.append(line(f"left of {card:g} GB", card * 1e9 - total))
    lines += [line(f"on the host: {name}", size) for name, size in host.items() if size]
    print("\n".join(lines))


def run(config: Config) -> int:
    """`main` with an exit code."""
    return exit_code("nanopersrm.train.memory", lambda: main(config))


if __name__ == "__main__":
    about = __doc__.split("Worked example")[0]
    sys.exit(run(tyro.cli(Config, prog="nanopersrm.train.memory", description=about)))
