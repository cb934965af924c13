"""Time the operations of this folder against plain PyTorch and against peers, and print a table.

    python -m kernels.bench rms_norm                one operation (or several)
    python -m kernels.bench --all --report          all of them, as one Markdown table
    python -m kernels.bench --all --json FILE       the same numbers for machines, every round

It runs where it is: on a CUDA card with the shapes of Qwen2.5-7B, on a CPU with those of
SmolLM2-135M, where "ours" is the reference, the path that a CPU takes. What each operation is
compared with stands in `bench_cases.py`; a peer that is not installed, or needs a GPU, is named and
left out.

How a figure is made stands in `timing.py`.
"""

import argparse
import json
import os
import platform
import sys
from collections.abc import Sequence

os.environ.setdefault("GOMP_SPINCOUNT", "1000")  # before PyTorch: see nanopersrm/__init__.py

import torch

from kernels import bench_cases
from kernels.timing import HEADS, measure, row, table


def versions() -> dict[str, str]:
    """What the figures depend on."""
    from importlib.metadata import PackageNotFoundError, version

    found = {"python": platform.python_version(), "torch": torch.__version__}
    for name in ("triton", "bitsandbytes", "liger-kernel", "cut-cross-entropy", "flash-attn"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed"
    return found


def place(device: str) -> str:
    if device == "cuda":
        return torch.cuda.get_device_name()
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else float("nan")
    return (
        f"CPU, {torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}, "
        f"load {load:.1f}"
    )


def main(argv: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m kernels.bench",
        description="Time operations against plain PyTorch and peers, in turns.",
    )
    parser.add_argument("ops", nargs="*", metavar="OP", help=", ".join(bench_cases.OPS))
    parser.add_argument("--all", action="store_true", help="every operation")
    parser.add_argument("--report", action="store_true", help="one Markdown table at the end")
    parser.add_argument("--json", metavar="FILE", help="also write every round's seconds")
    parser.add_argument("--rounds", type=int, default=15, help="measured rounds (default 15)")
    parser.add_argument(
        "--device", choices=("cpu", "cuda"), help="default: cuda where there is one"
    )
    asked = parser.parse_args(argv)
    unknown = [op for op in asked.ops if op not in bench_cases.OPS]
    if unknown or not (asked.ops or asked.all) or asked.rounds < 1:
        parser.error(
            f"expected --all or some of {', '.join(bench_cases.OPS)}, got {unknown or 'nothing'}"
            if asked.rounds >= 1
            else f"expected at least 1 round, got {asked.rounds}"
        )
    device = asked.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: PyTorch sees no CUDA device here")
    torch.manual_seed(0)
    results = []
    for op in bench_cases.OPS if asked.all else asked.ops:
        for case in bench_cases.OPS[op](device):
            result = measure(case, asked.rounds, device)
            results.append(result)
            if not asked.report:
                named = zip(HEADS, row(result), strict=True)
                print(", ".join(f"{head} {cell}" for head, cell in named if cell), flush=True)
            else:
                print(f"{op}: {case.shape}", file=sys.stderr, flush=True)
    facts = {"device": place(device), **versions(), "rounds": asked.rounds, "seed": 0}
    if asked.report:
        print(table(results))
        missing = {name: why for r in results for name, why in r.case.missing.items()}
        print("\n" + "; ".join(f"{name} {value}" for name, value in facts.items()) + ".")
        if missing:
            print("Left out: " + "; ".join(f"{n} ({why})" for n, why in missing.items()) + ".")
    if asked.json:
        rows = [
            {"op": r.case.op, "shape": r.case.shape, "seconds": r.seconds, "peak": r.peak,
             "moved": r.case.moved, "least": r.case.least, "missing": r.case.missing}
            for r in results
        ]  # fmt: skip
        fresh = asked.json + ".new"
        with open(fresh, "w", encoding="utf-8") as file:
            json.dump({"facts": facts, "results": rows}, file, indent=1)
        os.replace(fresh, asked.json)


if __name__ == "__main__":
    main(sys.argv[1:])
