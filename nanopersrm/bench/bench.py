"""How fast are prefill and decode? Beside transformers' `generate`, in the same interleaved run.

    python -m nanopersrm.bench.bench                                    the embedded base, on the CPU
    python -m nanopersrm.bench.bench --shape qwen2.5-7b --device cuda   random weights of that shape

One job is: read `prompts` prompts of 384 tokens, draw `replies` replies of 128 tokens for each, at
temperature 1 without truncation, no stop token. Both sides get the same weights in the same 16-bit
type. Ours and theirs take turns, and the table shows medians, so that a neighbour hurts both.
transformers has no prefill of its own to time: its prefill is a job of one token, its decode the
rest of the whole job.

What is not the same: on a CPU, for up to 8 rows, ours reads the 4-bit blocks that the base's file
consists of, where transformers has expanded them (`kernels/q4_linear.py`).

Needs the extra `bench`.
"""

import os
import platform
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import tyro
from rich.console import Console
from rich.progress import track
from torch import Tensor

from nanopersrm import InputError
from nanopersrm.command import exit_code
from nanopersrm.files import write_json
from nanopersrm.model.bases import DEFAULT_BASE, resolve
from nanopersrm.model.sampler import Decoder, SamplingConfig
from nanopersrm.model.transformer import Model
from nanopersrm.model.weights import DTYPES, SHAPES, load, random

JOBS = ((1, 1), (1, 8), (4, 8))  # prompts, replies of each: batches of 1, 8 and 32


@dataclass(frozen=True)
class Config:
    """Prefill and decode speed beside transformers."""

    base: str = DEFAULT_BASE  # whose weights
    shape: str | None = None  # instead of a base: random weights of a shape in weights.py
    prompt: int = 384  # tokens of a prompt
    reply: int = 128  # tokens of a reply
    repeats: int = 5  # interleaved pairs of runs
    device: str = "cpu"
    dtype: str = "bf16"  # bf16 or fp16
    seed: int = 0
    out: Path | None = None  # write every measurement to this JSON file


@dataclass(frozen=True)
class Timing:
    """Seconds of one job."""

    prefill: float
    decode: float


def ours(model: Model, prompts: Tensor, replies: int, new: int, seed: int) -> Timing:
    """prompts (P, T) -> the times of P · replies replies of `new` tokens."""
    room = new if replies == 1 else 0
    start = _now(prompts)
    decoder = Decoder(model, prompts.tolist(), room=room)
    decoder.fork([replies] * len(prompts), new)
    middle = _now(prompts)
    drawn = decoder.generate(SamplingConfig(max_new=new, seed=seed))
    assert all(len(reply.ids) == new for reply in drawn)
    return Timing(middle - start, _now(prompts) - middle)


def theirs(oracle: Any, prompts: Tensor, replies: int, new: int, seed: int) -> Timing:
    """The same job by transformers' `generate`."""
    torch.manual_seed(seed)

    def job(tokens: int) -> float:
        start = _now(prompts)
        with torch.inference_mode():
            drawn = oracle.generate(
                prompts,
                attention_mask=torch.ones_like(prompts),
                do_sample=True,
                temperature=1.0,
                top_k=0,
                top_p=1.0,
                num_return_sequences=replies,
                max_new_tokens=tokens,
                min_new_tokens=tokens,
            )
        assert drawn.shape == (len(prompts) * replies, prompts.shape[1] + tokens)
        return _now(prompts) - start

    one, whole = job(1), job(new)
    return Timing(one, whole - one)


def _now(like: Tensor) -> float:
    """Seconds, once the device has done what it was told."""
    if like.is_cuda:
        torch.cuda.synchronize(like.device)
    return time.perf_counter()


def build(config: Config) -> tuple[Model, Any]:
    """(our model, transformers' model) with the same weights."""
    import transformers

    dtype, device = DTYPES[config.dtype], torch.device(config.device)
    if config.shape is None:
        base = resolve(config.base)
        sizes, model = base.config, load(base, dtype, device)
    else:
        if config.shape not in SHAPES:
            raise InputError(f"--shape: expected {' or '.join(SHAPES)}, got {config.shape!r}")
        sizes = SHAPES[config.shape]
        model = random(sizes, dtype, device, seed=config.seed)
    plain = {k: v for k, v in sizes.items() if k not in ("rope_theta", "rope_scaling")}
    plain["rope_parameters"] = sizes["rope_scaling"] or {"rope_type": "default"}
    plain["rope_parameters"] |= {"rope_theta": sizes["rope_theta"]}
    with torch.device("meta"):
        oracle = transformers.AutoModelForCausalLM.from_config(
            transformers.AutoConfig.for_model(**plain), dtype=dtype
        )
    names = {name: f"model.{name}" for name, _ in model.named_parameters()}
    names |= {"embed_tokens": "model.embed_tokens.weight", "lm_head.weight": "lm_head.weight"}
    state = {names[name]: parameter.data for name, parameter in model.named_parameters()}
    state.setdefault("lm_head.weight", state["model.embed_tokens.weight"])
    oracle.load_state_dict(state, assign=True)
    fresh = type(oracle.model.rotary_emb)(oracle.config).to(device)  # was left on "meta"
    oracle.model.rotary_emb = fresh
    oracle.generation_config.eos_token_id = None
    oracle.generation_config.pad_token_id = 0
    return model.pack(), oracle.eval()


def main(config: Config) -> None:
    log = Console(stderr=True, highlight=False)
    model, oracle = build(config)
    generator = torch.Generator().manual_seed(config.seed)
    results: dict[str, Any] = {"config": asdict(config) | {"out": None}, "jobs": []}
    sides: dict[str, Callable[[Tensor, int, int, int], Timing]] = {
        "ours": lambda *job: ours(model, *job),
        "transformers": lambda *job: theirs(oracle, *job),
    }
    vocabulary = model.config.V
    for prompts, replies in JOBS:
        ids = torch.randint(vocabulary, (prompts, config.prompt), generator=generator)
        ids = ids.to(config.device)
        for side in sides.values():
            side(ids, replies, 4, config.seed)  # warm up
        times: dict[str, list[dict[str, float]]] = {name: [] for name in sides}
        label = f"{prompts} x {replies}"
        for repeat in track(range(config.repeats), label, console=log, transient=True):
            for name, side in sides.items():
                timing = side(ids, replies, config.reply, config.seed + repeat)
                times[name].append(asdict(timing))
        results["jobs"].append({"prompts": prompts, "replies": replies, "times": times})
        results["load"] = os.getloadavg()[0]
    results["machine"] = _machine(config)
    print(_report(config, results))
    if config.out:
        write_json(config.out, results)


def _machine(config: Config) -> str:
    """What was measured on what, in a line."""
    if torch.device(config.device).type == "cuda":
        device = torch.cuda.get_device_name(config.device)
    else:
        device = (
            f"{torch.get_num_threads()} CPU threads ({torch.backends.cpu.get_cpu_capability()})"
        )
    packages = ", ".join(f"{name} {version(name)}" for name in ("torch", "transformers"))
    return f"{device}, Python {platform.python_version()}, {packages}"


def _report(config: Config, results: dict[str, Any]) -> str:
    """A Markdown table of medians."""
    lines = [
        "| prompts x replies | prefill tok/s, ours | transformers | ratio | decode tok/s, ours "
        "| transformers | ratio | whole job, ratio |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for job in results["jobs"]:
        rows = job["prompts"] * job["replies"]
        cells = [f"{job['prompts']} x {job['replies']}"]
        sides = (job["times"]["ours"], job["times"]["transformers"])
        # A prompt counts once for each reply: so much text stands before it, however it got there.
        tokens = {"prefill": rows * config.prompt, "decode": rows * config.reply}
        for part in ("prefill", "decode"):
            speeds = [statistics.median(tokens[part] / t[part] for t in times) for times in sides]
            ratio = _ratio(*[[t[part] for t in times] for times in sides])
            cells += [f"{speed:,.0f}" for speed in speeds] + [f"{ratio:.2f}"]
        whole = _ratio(*[[t["prefill"] + t["decode"] for t in times] for times in sides])
        lines.append("| " + " | ".join([*cells, f"{whole:.2f}"]) + " |")
    what = f"{config.shape} (random)" if config.shape else config.base
    lines += [
        "",
        f"{what}, {config.dtype}, prompt {config.prompt}, reply {config.reply}, median of "
        f"{config.repeats} interleaved runs, seed {config.seed}; {results['machine']}; load "
        f"{results['load']:.1f}. Ratio: median of theirs / ours, pair by pair.",
    ]
    return "\n".join(lines)


def _ratio(ours: list[float], theirs: list[float]) -> float:
    return statistics.median(b / a for a, b in zip(ours, theirs, strict=True))


if __name__ == "__main__":
    sys.exit(
        exit_code("nanopersrm.bench.bench", lambda: main(tyro.cli(Config, description=__doc__)))
    )
