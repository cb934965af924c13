"""The table of what every kernel compiles to, for cards that need not be here.

    python -m kernels.aot            print it
    python -m kernels.aot --write    and put it into kernels/README.md

Registers limit how many blocks a multiprocessor runs at a time; shared memory above 101,376 bytes
does not launch on consumer cards; a stack means registers spilled to slow memory. For the product
with 4-bit weights, instructions per weight say whether a card waits for memory or for its
instruction units. All of it holds without a GPU; speed does not follow from it.
"""

import argparse
import os
from importlib import import_module
from pathlib import Path

from kernels._compile import CAPABILITIES, Variant, build

OPS = (
    "rms_norm",
    "rope",
    "swiglu",
    "decode_attention",
    "logprob_rows",
    "nf4",
    "nf4_product",
    "sample",
)
START, END = "<!-- made by python -m kernels.aot --write -->", "<!-- end -->"


def variants() -> list[Variant]:
    """Every compilation that the launchers of this folder ask for."""
    return [v for op in OPS for v in import_module(f"kernels.{op}").variants()]


def table() -> str:
    """Markdown: a row a variant; registers by architecture, the worst of the rest."""
    import triton

    heads = ["kernel", "warps", *(f"sm_{c}" for c in CAPABILITIES)]
    lines = [
        "| "
        + " | ".join([*heads, "shared, bytes", "stack", "mma", "instructions a weight"])
        + " |",
        "| --- |" + " ---: |" * (len(heads) + 3),
    ]
    for variant in variants():
        made = [build(variant, c) for c in CAPABILITIES]
        weight = [m.per_weight(variant) for m in made] if variant.weights else []
        cells = [
            variant.name,
            str(variant.warps),
            *(str(m.registers) for m in made),
            f"{max(m.shared for m in made):,}",
            str(max(m.stack for m in made)),
            "yes" if all(m.mma for m in made) else "",
            f"{min(weight):.1f} to {max(weight):.1f}" if weight else "",
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return (
        "\n".join(lines)
        + f"\n\nTriton {triton.__version__}; under sm_XX: registers a thread. Shared memory, stack "
        "and instructions\nare the worst of the five."
    )


def write(text: str, path: Path) -> None:
    """Replace what stands between the two marks of `path`."""
    before, rest = path.read_text(encoding="utf-8").split(START)
    after = rest.split(END)[1]
    fresh = path.with_suffix(".new")
    fresh.write_text(f"{before}{START}\n{text}\n{END}{after}", encoding="utf-8")
    os.replace(fresh, path)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        prog="python -m kernels.aot",
        description="Compile every kernel for sm_80, 86, 89, 90 and 120 and show what came out.",
    )
    parser.add_argument("--write", action="store_true", help="also update kernels/README.md")
    asked = parser.parse_args()
    made = table()
    print(made)
    if asked.write:
        write(made, Path(__file__).parent / "README.md")
