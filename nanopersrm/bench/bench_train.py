"""How fast, and in how much memory, is fine-tuning? Beside transformers + PEFT, interleaved.

    python -m nanopersrm.bench.bench_train                                   SmolLM2 on the CPU
    python -m nanopersrm.bench.bench_train --shape qwen2.5-7b --nf4 --recompute --device cuda
    python -m nanopersrm.bench.bench_train --shape qwen2.5-7b --preset 12gb --device cuda --sides ours

A step is the imitation loss of a few pairs (`data/lessons.py`), two texts each, and AdamW on a LoRA
adapter. All sides have the same weights, texts in the same order, rank, targets, alpha, learning
rate and first A and B; no dropout, no clipping; the loss is the mean over the reply tokens of the
step. What differs is how a step is computed:

    ours          exemplars that two texts share are computed once (`packing.py`)
    ours-whole    without sharing: every text whole, packed
    peft-…        batches padded, packed or text by text, as `bench_peers.py` explains

No micro-batch has more than `budget` tokens, filling included. Tokens per second count those of the
whole texts, the same number for each side. Worked example: texts of 1,000 and 900 tokens share 600.
They count 1,900. Ours computes 1,300 rows, packed 1,900, padded 2,000.

How it is measured. Losses and memory: each side trains `steps` steps in a process of its own.
Theirs imports nothing of ours, before torch or after, so that it lives as it does elsewhere; ours
has the settings of `kernels/process.py`, under which freed memory stays with the process (more
bytes, fewer page faults). Speed: all sides take turns in this process, with those
settings, which helps theirs too; the table has medians, and ratios are taken round by round.

With --preset ours computes as that preset does (`presets.py`), and on a GPU its process may reserve
no more than the card has, less what CUDA itself takes: where it does not fit, it fails.

Needs the extra `bench`.
"""

import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
import tyro
from rich.console import Console
from rich.progress import track

from data.build import demo_pairs
from nanopersrm import InputError, pairs
from nanopersrm.bench import bench_peers
from nanopersrm.bench.bench_ours import Ours, for_peers, texts, write_base
from nanopersrm.command import exit_code
from nanopersrm.files import write_json
from nanopersrm.model import lora_files, weights
from nanopersrm.model.bases import DEFAULT_BASE, resolve
from nanopersrm.model.cache import Layout
from nanopersrm.model.device import device_of
from nanopersrm.model.lora import Lora, LoraConfig
from nanopersrm.model.tokenizer import Tokenizer
from nanopersrm.model.transformer import Model
from nanopersrm.train import lessons
from nanopersrm.train.packing import Bundle
from nanopersrm.train.presets import PRESETS, Preset

OURS = ("ours", "ours-whole")
SIDES = (*OURS, *bench_peers.WAYS)
# Taking part unless asked otherwise: autocast is as fast as 16bit, and packed slower than single.
FEW = [name for name in SIDES if "autocast" not in name and "packed-16bit-" not in name]
SWITCHES = ("nf4", "recompute", "offload", "eight_bit", "host_embedding")
CUDA_GB = 0.8  # what a process takes on a card beside its tensors
THEIRS = "import runpy, sys; del sys.argv[0]; runpy.run_path(sys.argv[0], run_name='__main__')"
OURS_ALONE = "import sys; from nanopersrm.bench.bench_train import alone; alone(*sys.argv[1:])"


@dataclass(frozen=True)
class Config:
    """Fine-tuning beside transformers + PEFT."""

    base: str = DEFAULT_BASE  # whose weights, and whose tokenizer
    shape: str | None = None  # instead of its weights: random ones of qwen2.5-7b or another shape
    pairs: Path | None = None  # pairs.jsonl for the lengths; none: the demo writers
    sides: tuple[str, ...] = tuple(FEW)  # who takes part; ours must
    preset: str | None = None  # compute as this preset does, instead of the next three
    nf4: bool = False  # matrices of the blocks in 4 bits
    recompute: bool = False  # compute blocks again in the backward (gradient checkpointing)
    budget: int = 4096  # most tokens in a micro-batch
    pairs_a_step: int = 4  # two texts each
    steps: int = 6  # of each side alone, for losses and memory
    rounds: int = 5  # interleaved, for speed
    rank: int = 16
    alpha: float = 32.0
    lr: float = 2e-4
    device: str = "cpu"
    dtype: str = "bf16"  # bf16 or fp32
    seed: int = 0
    out: Path | None = None  # write every measurement to this JSON file

    def __post_init__(self) -> None:
        for name, value, known in (
            ("shape", self.shape, weights.SHAPES),
            ("preset", self.preset, PRESETS),
            ("dtype", self.dtype, bench_peers.DTYPES),
        ):
            if value is not None and value not in known:
                raise InputError(f"--{name}: expected {', '.join(known)}, got {value!r}")
        if unknown := [side for side in self.sides if side not in SIDES]:
            raise InputError(f"--sides: expected {', '.join(SIDES)}, got {unknown[0]!r}")
        if "ours" not in self.sides:
            raise InputError(f"--sides: expected ours among them, got {', '.join(self.sides)}")
        for name in ("budget", "pairs_a_step", "steps", "rounds"):
            if getattr(self, name) < 1:
                raise InputError(f"--{name}: expected at least 1, got {getattr(self, name)}")

    @property
    def settings(self) -> Preset:
        """How ours computes."""
        if self.preset is not None:
            return PRESETS[self.preset]
        kept = PRESETS["cpu"]
        return replace(kept, nf4=self.nf4, recompute=self.recompute, budget=self.budget)

    @property
    def lora(self) -> LoraConfig:
        return LoraConfig(rank=self.rank, alpha=self.alpha)


def steps_of(config: Config, tokenizer: Tokenizer) -> list[list[Bundle]]:
    """The bundles of as many different steps as are asked for; each token of a reply counts the
    same, as it does on the other sides."""
    plain = lessons.LessonConfig(stress=1.0)
    found = pairs.read(config.pairs) if config.pairs else demo_pairs(config.seed)
    train = [replace(pair, weight=1.0) for pair in found if pair.split == "train"]
    wanted = max(config.steps, config.rounds) * config.pairs_a_step
    bundles: list[Bundle] = []
    for i in lessons.plan(train, config.seed, epoch=0):
        bundles += lessons.imitation(train[i], tokenizer, plain, config.seed)
        if len(bundles) >= wanted:
            size = config.pairs_a_step
            return [bundles[k : k + size] for k in range(0, wanted, size)]
    raise InputError(f"pairs: expected {wanted} to train on, got {len(bundles)} that fit")


def our_model(config: Config, base: str | None) -> Model:
    """The weights in the folder `base`, or random ones where no other side needs a folder."""
    how, dtype, device = config.settings, weights.DTYPES[config.dtype], torch.device(config.device)
    if base is not None:
        return weights.load(resolve(base), dtype, device, how.nf4, how.host_embedding)
    sizes = weights.SHAPES[config.shape or ""]
    return weights.random(sizes, dtype, device, how.nf4, config.seed, how.host_embedding)


def our_side(config: Config, name: str, model: Model, digit_ids: Sequence[int]) -> Ours:
    """A fresh adapter on `model`."""
    return Ours(
        model, config.settings, config.lora, config.lr, config.seed, digit_ids, name == "ours"
    )


def alone(folder: str, name: str) -> None:
    """In a process of its own: train on FOLDER/job.json, write FOLDER/NAME.json."""
    job = json.loads((Path(folder) / "job.json").read_text(encoding="utf-8"))
    given = job["config"]
    given |= {"sides": tuple(given["sides"]), "pairs": given["pairs"] and Path(given["pairs"])}
    config = Config(**given)
    tokenizer = Tokenizer.load(resolve(config.base))
    steps = steps_of(config, tokenizer)[: config.steps]
    device, card = torch.device(config.device), config.settings.card_gb
    if card is not None and device.type == "cuda":
        total = torch.cuda.get_device_properties(device).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, (card - CUDA_GB) * 2**30 / total))
    model = our_model(config, job["base"])
    with torch.no_grad():  # every weight is touched once, as on the other sides
        layout = Layout.of([8])
        placed = Layout(layout.starts, layout.parents, layout.positions.to(device))
        model.logits(model(torch.arange(8, device=device), placed))
    side = our_side(config, name, model, tokenizer.digit_ids)
    found = bench_peers.measure(side, steps, device)
    (Path(folder) / f"{name}.json").write_text(json.dumps(found), encoding="utf-8")


# All sides


def write_job(config: Config, steps: Sequence[list[Bundle]], folder: Path) -> dict[str, Any]:
    """FOLDER/job.json, and what it names: the base and our first A and B, for theirs to load."""
    job = {name: getattr(config, name) for name in ("device", "dtype", "lr")}
    job |= {"config": asdict(config) | {"out": None, "pairs": config.pairs and str(config.pairs)}}
    job |= {"nf4": config.settings.nf4, "recompute": config.settings.recompute, "base": None}
    if set(config.sides) - set(OURS) or config.shape is None:
        dtype, cpu = weights.DTYPES[config.dtype], torch.device("cpu")
        if config.shape is not None:
            sizes = weights.SHAPES[config.shape]
            model = weights.random(sizes, dtype, cpu, seed=config.seed)
        else:
            base = resolve(config.base)
            sizes, model = base.config, weights.load(base, dtype, cpu)
        is_folder = config.shape is None and base.kind == "safetensors"
        job["base"] = str(base.path) if is_folder else write_base(model, sizes, folder / "base")
        job["adapter"] = str(folder / "adapter")
        lora_files.save(folder / "adapter", Lora(model, config.lora, config.seed), job["base"])
    job["steps"] = [for_peers(bundles, config.settings.budget) for bundles in steps[: config.steps]]
    (folder / "job.json").write_text(json.dumps(job), encoding="utf-8")
    return job


def run_alone(config: Config, folder: Path, name: str) -> dict[str, Any]:
    """What a side measured in a process of its own."""
    program = [OURS_ALONE] if name in OURS else [THEIRS, bench_peers.__file__]
    quiet = ("-W", "ignore::FutureWarning")
    subprocess.run([sys.executable, *quiet, "-c", *program, str(folder), name], check=True)
    return json.loads((folder / f"{name}.json").read_text(encoding="utf-8"))


def take_turns(
    config: Config, job: dict[str, Any], steps: Sequence[Sequence[Bundle]], log: Console
) -> dict[str, list[float]]:
    """Seconds of a step, of each side in each round."""
    device = torch.device(config.device)
    shared: dict[bool, Any] = {}
    digit_ids = Tokenizer.load(resolve(config.base)).digit_ids
    model = our_model(config, job["base"])
    sides: dict[str, Any] = {
        name: our_side(config, name, model, digit_ids)
        if name in OURS
        else bench_peers.Peer(job, name, shared)
        for name in config.sides
    }
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for k in track(range(-1, config.rounds), "rounds", console=log, transient=True):
        bundles = steps[max(k, 0)]
        for name, side in sides.items():
            step = bundles if name in OURS else for_peers(bundles, config.settings.budget)
            start = bench_peers.now(device)
            side.step(step)
            if k >= 0:  # the first round warms up
                seconds[name].append(bench_peers.now(device) - start)
    return seconds


def main(config: Config) -> None:
    device_of(config.device)  # is there one?
    log = Console(stderr=True, highlight=False)
    steps = steps_of(config, Tokenizer.load(resolve(config.base)))
    with tempfile.TemporaryDirectory(prefix="nanopersrm-bench-") as place:
        folder = Path(place)
        job = write_job(config, steps, folder)
        results: dict[str, Any] = {"config": job["config"], "sides": {}}
        for name in track(config.sides, "each alone", console=log, transient=True):
            results["sides"][name] = run_alone(config, folder, name)
        for name, seconds in take_turns(config, job, steps, log).items():
            results["sides"][name]["rounds"] = seconds
    results["tokens"] = [sum(len(ids) for ids, _ in texts(b)) for b in steps[: config.rounds]]
    results["rows"] = [sum(bundle.tokens for bundle in b) for b in steps[: config.rounds]]
    results["load"], results["machine"] = os.getloadavg()[0], _machine(config)
    print(_report(config, results))
    if config.out:
        write_json(config.out, results)


def _machine(config: Config) -> str:
    """What was measured on what, in a line."""
    if torch.device(config.device).type == "cuda":
        device = torch.cuda.get_device_name(config.device)
    else:
        threads, capability = torch.get_num_threads(), torch.backends.cpu.get_cpu_capability()
        device = f"{threads} CPU threads ({capability})"
    packages = ("torch", "transformers", "peft", "bitsandbytes", "flash_attn")
    found = [f"{name} {version(name)}" for name in packages if find_spec(name)]
    return f"{device}, Python {platform.python_version()}, {', '.join(found)}"


def _report(config: Config, results: dict[str, Any]) -> str:
    """A Markdown table, and what is behind it."""
    sides, tokens = results["sides"], results["tokens"]
    ours = sides["ours"]
    lines = [
        "| side | tokens/s | ours is faster | peak beside the model, GB | ours needs | "
        "peak in all, GB | ours needs | loss of the last step |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for name, side in sides.items():
        speed = statistics.median(n / s for n, s in zip(tokens, side["rounds"], strict=True))
        added, own = side["peak"] - side["loaded"], ours["peak"] - ours["loaded"]
        cells = [name, f"{speed:,.0f}", f"{_faster(ours, side):.2f} x"]
        cells += [f"{added / 1e9:.2f}", f"{own / max(1, added):.2f} x"]
        cells += [f"{side['peak'] / 1e9:.2f}", f"{ours['peak'] / side['peak']:.2f} x"]
        lines.append("| " + " | ".join([*cells, f"{side['losses'][-1]:.4f}"]) + " |")
    lines += ["", *_against(sides)]
    how, first = config.settings, ours["losses"][0]
    switches = [name for name in SWITCHES if getattr(how, name)]
    what = f"{config.shape} (random)" if config.shape else config.base
    lines += [
        f"Losses fall from {first:.4f}; at each step they differ from ours by at most "
        f"{100 * max(_apart(ours, side) for side in sides.values()):.2f} %.",
        f"{what}, {config.dtype}, {', '.join(switches) or 'everything kept'}"
        f", rank {config.rank}, {2 * config.pairs_a_step} texts a step of "
        f"{statistics.mean(tokens):,.0f} tokens, of which ours computes "
        f"{statistics.mean(results['rows']):,.0f} rows, micro-batches of at most {how.budget:,}; "
        f"median of {config.rounds} interleaved rounds, memory and losses of {config.steps} steps "
        f"in a process each, seed {config.seed}; {results['machine']}; load {results['load']:.1f}.",
    ]
    if how.card_gb is not None and torch.device(config.device).type == "cuda":
        lines.append(
            f"Preset {config.preset}: fits, held to a card of {how.card_gb:.0f} GB; its tensors "
            f"took {ours['reserved'] / 2**30:.1f} GiB at most, {CUDA_GB} are set aside for CUDA."
        )
    return "\n".join(lines)


def _against(sides: dict[str, Any]) -> list[str]:
    """The ratios to quote, against the fastest of theirs of each kind."""
    kinds: dict[str, list[str]] = {"padded": [], "unpadded": [], "unpadded, reply only": []}
    for name in sides.keys() - OURS:
        way = bench_peers.WAYS[name]
        padded = "padded" if way.batches == "padded" else "unpadded"
        kinds[padded + ", reply only" * way.reply].append(name)
    lines, ours = [], sides["ours"]
    for kind, names in kinds.items():
        if names:
            best = min(names, key=lambda name: statistics.median(sides[name]["rounds"]))
            side = sides[best]
            memory = (ours["peak"] - ours["loaded"]) / max(1, side["peak"] - side["loaded"])
            lines.append(
                f"Against the fastest of theirs {kind}, {best}: {_faster(ours, side):.2f} x the "
                f"tokens/s, {memory:.2f} x the memory beside the model, "
                f"{ours['peak'] / side['peak']:.2f} x in all."
            )
    return lines


def _faster(ours: dict[str, Any], theirs: dict[str, Any]) -> float:
    """Median over the rounds of theirs / ours in seconds."""
    both = zip(ours["rounds"], theirs["rounds"], strict=True)
    return statistics.median(b / a for a, b in both)


def _apart(ours: dict[str, Any], theirs: dict[str, Any]) -> float:
    """Largest difference of two losses at the same step, as a share of ours."""
    return max(abs(b / a - 1) for a, b in zip(ours["losses"], theirs["losses"], strict=True))


if __name__ == "__main__":
    sys.exit(
        exit_code(
            "nanopersrm.bench.bench_train", lambda: main(tyro.cli(Config, description=__doc__))
        )
    )
