"""How fast, and in how much memory, is a step of GRPO? Beside TRL's GRPOTrainer, interleaved.

    python -m nanopersrm.bench.bench_rft                                     SmolLM2 on the CPU
    python -m nanopersrm.bench.bench_rft --shape qwen2.5-7b --nf4 --recompute --device cuda --prompt 2048
    python -m nanopersrm.bench.bench_rft --shape qwen2.5-7b --preset 12gb --device cuda --sides ours

A step draws G replies of R tokens to a prompt of P tokens, rewards them, and makes one update of a
LoRA adapter on all seven matrices. All sides have the same weights, prompts, first A and B,
learning rate, clipping and loss (GRPO: one epoch, no reference), and a reward that is a fixed
function of the reply's ids, so that no group is without variance. Replies never end before R.

    ours          the prompt is computed once when drawing and once when training
    ours-whole    drawing as ours; every reply is trained with a copy of the prompt
    trl           TRL's GRPOTrainer on transformers and PEFT, as it comes (`bench_trl.py`)
    trl-reply     the same where the head leaves the prompt out on a CPU too
    trl-fast      that with everything kept for the backward; only when asked for: 3 MB a row

Rows that go through the model, with G = 8, P = 512 and R = 128:

                  drawing                         training
    ours          P + G · (R - 1)     1,528       P + G · R         1,536
    ours-whole    P + G · (R - 1)     1,528       G · (P + R)       5,120
    trl           G · (P + R - 1)     5,112       G · (P + R)       5,120

How it is measured. Each side lives in a process of its own and takes a step when it is asked; the
others sleep. So rounds are interleaved, a first one warms up, and memory is that of the process: at
most, over all steps, in all and beyond what it had with the model loaded. The table has medians;
ratios are taken round by round. Every answer is checked: G replies of R tokens, the rows above, and
an adapter that has moved.

What is not the same. TRL draws with torch's multinomial, ours with its own noise; TRL rules the end
of a text out, ours lets it stand in a reply like any other id. Theirs decodes replies to text: some
milliseconds. Threads spin only briefly on all sides.

With --preset ours computes as that preset does (`presets.py`). Prompts are random ids: the work
does not depend on them. Needs the extra `bench`.
"""

import json
import os
import platform
import statistics
import sys
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
import tyro
from rich.console import Console
from rich.progress import track

from kernels.process import KEEP
from nanopersrm import InputError
from nanopersrm.bench import bench_trl
from nanopersrm.bench.bench_grpo import Ours, load
from nanopersrm.bench.bench_ours import write_base
from nanopersrm.bench.bench_peers import DTYPES, start_peak
from nanopersrm.bench.bench_turns import Ended, Side, own_turns
from nanopersrm.command import exit_code
from nanopersrm.files import write_json
from nanopersrm.model import lora_files, weights
from nanopersrm.model.bases import DEFAULT_BASE, resolve
from nanopersrm.model.device import device_of
from nanopersrm.model.lora import Lora, LoraConfig
from nanopersrm.train import packing
from nanopersrm.train.presets import PRESETS, Preset

OURS = ("ours", "ours-whole")
SIDES = (*OURS, *bench_trl.SIDES)
FEW = (*OURS, "trl", "trl-reply")  # taking part unless asked otherwise
GOALS = {"faster": 2.5, "memory": 0.6, "sharing": 1.7}
OURS_ALONE = "import sys; from nanopersrm.bench.bench_rft import alone; alone(*sys.argv[1:])"
# Without our package's __init__.py, and where `kernels` is that of Hugging Face or none.
THEIRS_ALONE = """
import sys, types
sys.path.remove("")
sys.meta_path = [one for one in sys.meta_path if "nanopersrm" not in getattr(one, "__module__", "")]
bare = sys.modules["nanopersrm"] = types.ModuleType("nanopersrm")
bare.__path__ = [sys.argv[1]]
from nanopersrm.bench.bench_trl import alone
alone(*sys.argv[2:])
"""
MEMORY = {"MALLOC_MMAP_THRESHOLD_": str(KEEP), "MALLOC_TRIM_THRESHOLD_": str(2**31 - 1)}


@dataclass(frozen=True)
class Config:
    """A step of GRPO beside TRL."""

    base: str = DEFAULT_BASE  # whose weights
    shape: str | None = None  # instead of its weights: random ones of qwen2.5-7b or another shape
    sides: tuple[str, ...] = FEW  # who takes part; ours must
    preset: str | None = None  # compute as this preset does, instead of the next three
    nf4: bool = False  # matrices of the blocks in 4 bits
    recompute: bool = False  # ours: compute blocks again in the backward (gradient checkpointing)
    budget: int = 4096  # ours: most tokens in a micro-batch
    group: int = 8  # G: replies to the prompt
    prompt: int = 512  # P: its tokens
    reply: int = 128  # R: tokens of a reply
    rounds: int = 5  # interleaved; one more warms up
    rank: int = 16
    alpha: float = 32.0
    lr: float = 1e-4
    device: str = "cpu"
    dtype: str = "bf16"  # bf16 or fp32
    seed: int = 0
    json: bool = False  # print every measurement as JSON instead of the table
    out: Path | None = None  # write every measurement to this JSON file

    def __post_init__(self) -> None:
        for name, value, known in (
            ("shape", self.shape, weights.SHAPES),
            ("preset", self.preset, PRESETS),
            ("dtype", self.dtype, DTYPES),
        ):
            if value is not None and value not in known:
                raise InputError(f"--{name}: expected {', '.join(known)}, got {value!r}")
        if unknown := [side for side in self.sides if side not in SIDES]:
            raise InputError(f"--sides: expected {', '.join(SIDES)}, got {unknown[0]!r}")
        if "ours" not in self.sides:
            raise InputError(f"--sides: expected ours among them, got {', '.join(self.sides)}")
        # A prompt that is shorter than packing.SHARED_LEAST would not be shared.
        least = {"budget": 1, "group": 2, "prompt": packing.SHARED_LEAST, "reply": 1, "rounds": 1}
        for name, number in least.items():
            if getattr(self, name) < number:
                raise InputError(f"--{name}: expected at least {number}, got {getattr(self, name)}")

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


def alone(folder: str, name: str) -> None:
    """In a process of its own: train on FOLDER/job.json, a step whenever a line comes."""
    job = json.loads((Path(folder) / "job.json").read_text(encoding="utf-8"))
    config = Config(**job["config"] | {"sides": tuple(job["config"]["sides"])})
    device = torch.device(config.device)
    turns = own_turns(device)
    how, G, R = config.settings, config.group, config.reply
    sizes = None if job["base"] else weights.SHAPES[config.shape or ""]
    model = load(job["base"], sizes, how, weights.DTYPES[config.dtype], device, config.seed)
    loaded = start_peak(device)
    side = Ours(model, how, config.lora, config.lr, config.seed, sharing=name == "ours")
    model.register_forward_pre_hook(lambda _, args: turns.count(args[0]))
    turns.say({"loaded": loaded})
    for number, prompt in enumerate(job["prompts"]):
        side.step(prompt, G, R, number, turns)
    learned = {name: B for name, (_, B) in side.lora.masters.items()}
    turns.ended(loaded, [*model.parameters()], learned)


# All sides


def prompts(config: Config, V: int) -> list[list[int]]:
    """One for each step, the warm-up too: P random ids, never the last one."""
    random = torch.Generator().manual_seed(config.seed)
    size = (config.rounds + 1, config.prompt)
    return torch.randint(V - 1, size, generator=random).tolist()


def write_job(config: Config, folder: Path) -> dict[str, Any]:
    """FOLDER/job.json, and what it names: the base and our first A and B, for theirs to load."""
    kept = ("device", "dtype", "lr", "seed", "group", "reply")
    job = {name: getattr(config, name) for name in kept}
    job |= {"config": asdict(config) | {"out": None}, "nf4": config.settings.nf4, "base": None}
    sizes = weights.SHAPES[config.shape] if config.shape else resolve(config.base).config
    if set(config.sides) - set(OURS) or config.shape is None:
        dtype, cpu = weights.DTYPES[config.dtype], torch.device("cpu")
        if config.shape is not None:
            model = weights.random(sizes, dtype, cpu, seed=config.seed)
        else:
            base = resolve(config.base)
            model = weights.load(base, dtype, cpu)
        is_folder = config.shape is None and base.kind == "safetensors"
        job["base"] = str(base.path) if is_folder else write_base(model, sizes, folder / "base")
        job["adapter"] = str(folder / "adapter")
        lora_files.save(folder / "adapter", Lora(model, config.lora, config.seed), job["base"])
    job["prompts"] = prompts(config, sizes["vocab_size"])
    (folder / "job.json").write_text(json.dumps(job), encoding="utf-8")
    return job


def started(folder: Path, name: str) -> Side:
    """A process that has its weights in memory."""
    own = str(Path(bench_trl.__file__).parent)
    program = [OURS_ALONE] if name in OURS else [THEIRS_ALONE, own]
    command = [sys.executable, "-W", "ignore", "-c", *program, str(folder), name]
    return Side(name, command, MEMORY if name == "trl-fast" else {})


def measure(config: Config, folder: Path, log: Console) -> dict[str, Any]:
    """All sides in turns -> what each has answered, by name."""
    with ExitStack() as stack:
        sides: list[Side] = []
        for name in track(config.sides, "loading", console=log, transient=True):
            sides.append(started(folder, name))
            stack.callback(sides[-1].end)
            sides[-1].hear()
        found: dict[str, Any] = {side.name: {"rounds": []} for side in sides}
        for k in track(range(-1, config.rounds), "rounds", console=log, transient=True):
            for side in sides:
                answer = checked(config, side.name, side.ask())
                if k >= 0:  # the first round warms up
                    found[side.name]["rounds"].append(answer)
        for side in sides:
            found[side.name] |= side.hear()
            assert found[side.name]["moved"] > 0, f"{side.name} has learned nothing"
    return found


def checked(config: Config, name: str, answer: dict[str, Any]) -> dict[str, Any]:
    """An answer without its ids, which must be as many as were asked for."""
    G, P, R = config.group, config.prompt, config.reply
    lengths = [len(ids) for ids in answer.pop("replies")]
    assert lengths == [R] * G, f"{name}: expected {G} replies of {R} tokens, got {lengths}"
    rows = answer["rows_drawing"]
    assert rows <= G * (P + R), f"{name}: {rows} rows were drawn with: there is no cache"
    return answer


def main(config: Config) -> None:
    device_of(config.device)  # is there one?
    log = Console(stderr=True, highlight=False)
    with tempfile.TemporaryDirectory(prefix="nanopersrm-bench-") as place:
        job = write_job(config, Path(place))
        try:
            sides = measure(config, Path(place), log)
        except Ended as error:
            raise InputError(f"{error}; it may be left out of --sides") from error
    results = {"config": job["config"], "machine": machine(config), "sides": sides}
    results["load"] = os.getloadavg()[0]
    print(json.dumps(results, indent=1) if config.json else report(config, results))
    if config.out:
        write_json(config.out, results)


def machine(config: Config) -> str:
    """What was measured on what, in a line."""
    if torch.device(config.device).type == "cuda":
        device = torch.cuda.get_device_name(config.device)
    else:
        threads, capability = torch.get_num_threads(), torch.backends.cpu.get_cpu_capability()
        device = f"{threads} CPU threads ({capability})"
    packages = ("torch", "trl", "transformers", "peft", "accelerate", "bitsandbytes")
    found = [f"{name} {version(name)}" for name in packages if find_spec(name)]
    return f"{device}, Python {platform.python_version()}, {', '.join(found)}"


def report(config: Config, results: dict[str, Any]) -> str:
    """A table, the goals, and what is behind them."""
    sides = results["sides"]
    ours = sides["ours"]
    table = [
        ["side", "drawing, s", "training, s", "step, s", "ours is faster", "reply tokens/s",
         "peak beside the model, GB", "ours needs", "peak in all, GB", "ours needs",
         "rows drawing + training"],
    ]  # fmt: skip
    for name, side in sides.items():
        spans = [middle(side, span) for span in ("drawing", "training", "seconds")]
        rows = [f"{side['rounds'][0][f'rows_{what}']:,}" for what in ("drawing", "training")]
        beside, own = side["peak"] - side["loaded"], ours["peak"] - ours["loaded"]
        table.append(
            [
                name,
                *(f"{seconds:.2f}" for seconds in spans),
                f"{faster(ours, side, 'seconds'):.2f} x",
                f"{config.group * config.reply / spans[-1]:,.0f}",
                f"{beside / 1e9:.2f}",
                f"{own / max(1, beside):.2f} x",
                f"{side['peak'] / 1e9:.2f}",
                f"{ours['peak'] / side['peak']:.2f} x",
                " + ".join(rows),
            ]
        )
    how = config.settings
    switches = [name for name in ("nf4", "recompute", "offload") if getattr(how, name)]
    what = f"{config.shape} (random)" if config.shape else config.base
    types = [f"{name} {', '.join(side['base'])} and {', '.join(side['adapter'])}"
             for name, side in sides.items()]  # fmt: skip
    return "\n".join(
        [
            *aligned(table),
            "",
            *goals(sides),
            f"Types of base and adapter: {'; '.join(types)}.",
            f"{what}, {config.dtype}, {', '.join(switches) or 'everything kept'}, rank "
            f"{config.rank}, G = {config.group}, P = {config.prompt}, R = {config.reply}, "
            f"micro-batches of at most {how.budget:,} (ours); median of {config.rounds} "
            f"interleaved rounds, seed {config.seed}; {results['machine']}; "
            f"load {results['load']:.1f}.",
        ]
    )


def aligned(table: Sequence[Sequence[str]]) -> list[str]:
    """Rows of cells, the first with titles -> a Markdown table whose columns stand straight."""
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    rule = ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])]
    padded = [
        [row[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(row[1:], widths[1:], strict=True))]
        for row in table
    ]
    return ["| " + " | ".join(row) + " |" for row in (padded[0], rule, *padded[1:])]


def goals(sides: dict[str, Any]) -> list[str]:
    """What was hoped for, and what came."""
    ours, lines = sides["ours"], []
    for name in bench_trl.SIDES:
        if name in sides:
            spans = [faster(ours, sides[name], s) for s in ("seconds", "drawing", "training")]
            memory = ours["peak"] / sides[name]["peak"]
            lines.append(
                f"Against {name}: {spans[0]:.2f} x faster (goal {GOALS['faster']}), drawing "
                f"{spans[1]:.2f} x, training {spans[2]:.2f} x; {memory:.2f} x the peak memory "
                f"(goal {GOALS['memory']})."
            )
    if "ours-whole" in sides:
        shared = faster(ours, sides["ours-whole"], "training")
        lines.append(
            f"Training with the prompt shared: {shared:.2f} x faster (goal {GOALS['sharing']})."
        )
    return lines


def middle(side: dict[str, Any], span: str) -> float:
    """Median seconds over the rounds."""
    return statistics.median(answer[span] for answer in side["rounds"])


def faster(ours: dict[str, Any], theirs: dict[str, Any], span: str) -> float:
    """Median over the rounds of theirs / ours in seconds."""
    both = zip(ours["rounds"], theirs["rounds"], strict=True)
    return statistics.median(b[span] / a[span] for a, b in both)


if __name__ == "__main__":
    sys.exit(
        exit_code("nanopersrm.bench.bench_rft", lambda: main(tyro.cli(Config, description=__doc__)))
    )
