"""Ours beside transformers, PEFT and TRL, on the same weights and ids, in one run.

    python -m nanopersrm.bench                                        all four, SmolLM2 on the CPU
    python -m nanopersrm.bench decode --shape qwen2.5-7b --device cuda   random weights of a shape

    prefill   read prompts of P tokens                              transformers' generate
    decode    draw replies of R tokens to prompts that are read     transformers' generate
    sft       a step of AdamW on a LoRA adapter, on pairs of texts  transformers + PEFT
    grpo      draw G replies, reward, compare, update               TRL's GRPOTrainer + PEFT

The sides take turns in one process, a first round warms up, a time is the median of the rounds and
a ratio the median over rounds of theirs / ours. Ours reads a prompt once for all its replies: with
G = 8, P = 384 and R = 128 a step of `grpo` is G · (P + R) = 4,096 rows in TRL's training and
P + G · R = 1,408 in ours. On a CPU, for up to 8 rows, ours reads the 4-bit blocks of a base in
GGUF, which transformers holds expanded. On a card the table has the peak memory of a turn too.
"""

import functools
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from importlib.metadata import version
from importlib.util import find_spec
from typing import Annotated, Any, Literal

import torch
import tyro
from torch import Tensor

from kernels.logprob import logprob
from nanopersrm.bench import peers
from nanopersrm.command import exit_code
from nanopersrm.model.base import DEFAULT_BASE, resolve
from nanopersrm.model.lora import Lora, LoraConfig
from nanopersrm.model.sampler import Decoder, SamplingConfig, sample
from nanopersrm.model.transformer import Model
from nanopersrm.model.weights import DTYPES, SHAPES, device_of, load, random
from nanopersrm.train import grpo, objective, optim, packing
from nanopersrm.train.presets import PRESETS

EXEMPLARS, CANDIDATE, REPLY = 496, 348, 124  # tokens of a pair, see packing.py
PAIRS = 2  # a step of sft, two texts each
JOBS = ((1, 1), (1, 8), (4, 8))  # prompts, replies of each: batches of 1, 8 and 32
Case = Literal["prefill", "decode", "sft", "grpo"]
Seconds = dict[str, float]  # of each part of a turn


@dataclass(frozen=True)
class Config:
    """Ours beside transformers, PEFT and TRL."""

    cases: Annotated[tuple[Case, ...], tyro.conf.Positional] = ("prefill", "decode", "sft", "grpo")
    base: str = DEFAULT_BASE  # whose weights
    shape: Literal["smollm2-135m", "qwen2.5-1.5b", "qwen2.5-7b", "qwen3-8b"] | None = None  # random
    device: str = "cpu"
    dtype: Literal["bf16", "fp32"] = "bf16"
    nf4: bool = False  # training: matrices of the blocks in 4 bits
    recompute: bool = False  # training: compute blocks again in the backward
    budget: int = 4096  # training: most tokens in a micro-batch
    group: int = 8  # G, of grpo
    prompt: int = 384  # P
    reply: int = 128  # R
    rank: int = 16
    lr: float = 1e-4
    rounds: int = 5  # in turns; one more warms up
    seed: int = 0

    @property
    def sizes(self) -> dict[str, Any]:
        return SHAPES[self.shape] if self.shape else resolve(self.base).config

    def ids(self, *shape: int) -> Tensor:
        """Random ids, never the last one: the work does not depend on them."""
        generator = torch.Generator().manual_seed(self.seed)
        return torch.randint(self.sizes["vocab_size"] - 1, shape, generator=generator)


def now() -> float:
    """Seconds, once the device has done its work."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


class Table:
    """Turns of sides, and the table of what they took."""

    def __init__(self, case: str):
        self.case, self.turns = case, dict[str, list[Seconds]]()
        self.peak = dict[str, int]()

    def begin(self) -> float:
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
            self.before = torch.cuda.memory_allocated()
        return now()

    def end(self, name: str, seconds: Seconds) -> None:
        self.turns.setdefault(name, []).append(seconds)
        if torch.cuda.is_available():
            self.peak[name] = torch.cuda.max_memory_allocated() - self.before

    def show(self) -> None:
        """A row for each part and side, without the first round."""
        for part in self.turns["ours"][0]:
            ours = [turn[part] for turn in self.turns["ours"][1:]]
            for name, turns in self.turns.items():
                times = [turn[part] for turn in turns[1:]]
                ratio = statistics.median(b / a for a, b in zip(ours, times, strict=True))
                peak = f"{self.peak[name] / 1e9:.2f}" if name in self.peak else ""
                cells = [f"{part}, {self.case}", name, f"{statistics.median(times):.3f}",
                         f"{ratio:.2f}", peak]  # fmt: skip
                print("| " + " | ".join(cells) + " |", flush=True)


def models(config: Config, training: bool = False) -> tuple[Model, Any]:
    """Our model and transformers', with the same weights; in NF4 if asked for, to train."""
    peers.need("transformers", *["peft", "bitsandbytes"] * training)
    dtype, device, nf4 = DTYPES[config.dtype], torch.device(config.device), training and config.nf4

    def make(nf4: bool) -> Model:
        if config.shape is None:
            return load(resolve(config.base), dtype, device, nf4)
        return random(SHAPES[config.shape], dtype, device, nf4, config.seed)

    model = make(nf4=False)
    peer = peers.transformers_model(model, config.sizes, nf4)
    return make(nf4=True) if nf4 else model, peer


def generation(config: Config, prompts: int, replies: int, model: Model, peer: Any) -> Table:
    """Prefill and decode of `prompts` prompts, with `replies` replies each."""
    ids = config.ids(prompts, config.prompt).to(config.device)
    table = Table(f"{prompts} x {config.prompt} tokens, {replies} replies of {config.reply} each")
    for number in range(config.rounds + 1):
        start = table.begin()
        decoder = Decoder(model, ids.tolist(), room=config.reply if replies == 1 else 0)
        decoder.fork([replies] * prompts, config.reply)
        middle = now()
        decoder.generate(SamplingConfig(max_new=config.reply, seed=config.seed + number))
        table.end("ours", {"prefill": middle - start, "decode": now() - middle})
        del decoder
        torch.manual_seed(config.seed + number)
        start = table.begin()
        peers.generate(peer, ids, replies, 1)  # transformers' prefill is a job of one token
        middle = now()
        peers.generate(peer, ids, replies, config.reply)
        table.end("transformers", {"prefill": middle - start, "decode": now() - 2 * middle + start})
    for turns in table.turns.values():
        turns[:] = [{part: turn[part] for part in turn if part in config.cases} for turn in turns]
    return table


class OurSide:
    """Our adapter in training."""

    def __init__(self, model: Model, config: Config):
        self.model, self.config = model, config
        self.lora = Lora(model, LoraConfig(rank=config.rank), config.seed)
        self.optimizer = optim.make(self.lora.parameters(), optim.OptimConfig(lr=config.lr))
        self.scaler = torch.amp.GradScaler(model.device.type, enabled=False)
        self.lora.on(model)

    def sft_step(self, pairs: list[list[peers.Text]]) -> float:
        """One step on pairs of texts -> the mean loss of a reply token."""
        count = sum(len(ids) - first for texts in pairs for ids, first in texts)
        written = [[packing.written(ids, first) for ids, first in texts] for texts in pairs]
        trees = [packing.build_tree(str(i), texts) for i, texts in enumerate(written)]
        preset = replace(PRESETS["cpu"], recompute=self.config.recompute, budget=self.config.budget)
        imitation, total = objective.SftWeights(pair=0.0, list=0.0), 0.0
        for trees_of_batch in packing.pack(trees, self.config.budget):
            batch = packing.batch(trees_of_batch, (), self.model.device)
            sums = objective.loss_sums(self.model, batch, imitation, preset)
            loss = sums.imitation / count
            loss.backward()
            total += float(loss.detach())
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.lora.refresh()
        return total

    def learn(self, prompt: list[int], replies: list[list[int]]) -> None:
        """One update on replies to the prompt."""
        device, config, G = self.model.device, grpo.GrpoConfig(), len(replies)
        rewards = torch.tensor([reward(ids) for ids in replies])[:, None]  # (G, 1)
        group = torch.zeros(G, dtype=torch.int64)
        advantages = grpo.advantages(rewards, torch.ones(1), group, 1, config).to(device)  # (G,)
        lengths = torch.tensor([len(ids) for ids in replies])
        weights = grpo.token_weights(lengths, int(lengths.max()), config).to(device)  # (G,)
        P = len(prompt)
        texts = [packing.written((*prompt, *ids), P, i) for i, ids in enumerate(replies)]
        trees = packing.build_trees("group", texts, self.config.budget)
        for trees_of_batch in packing.pack(trees, self.config.budget):
            batch = packing.batch(trees_of_batch, (), device)
            hidden = self.model(batch.ids, batch.layout, recompute=self.config.recompute)
            log_probs, _ = logprob(hidden[batch.rows], self.model.head(), batch.drawn)
            loss, _ = grpo.policy_loss(log_probs, batch.owners, advantages, weights, config)
            loss.backward()
        optim.update(self.optimizer, self.scaler, self.config.lr, peers.CLIP)
        self.lora.refresh()


def reward(ids: list[int]) -> float:
    """Of a reply: from 0 to 1, fixed, and hardly ever the same for two."""
    return sum(n * i for n, i in enumerate(ids, start=1)) % 1009 / 1008


def training_sides(config: Config) -> tuple[OurSide, Any]:
    """Our side, and PEFT's model with the same first A and B."""
    model, peer = models(config, training=True)
    ours = OurSide(model, config)
    return ours, peers.with_adapter(peer, ours.lora, config.recompute)


def sft_pairs(config: Config) -> list[list[peers.Text]]:
    """Two texts a pair, which share exemplars: exemplars, candidate, reply."""
    length = CANDIDATE + REPLY
    return [
        [(ids[:EXEMPLARS] + ids[at : at + length], EXEMPLARS + CANDIDATE)
         for at in (EXEMPLARS, EXEMPLARS + length)]
        for ids in config.ids(PAIRS, EXEMPLARS + 2 * length).tolist()
    ]  # fmt: skip


def sft(config: Config) -> Table:
    ours, adapted = training_sides(config)
    pairs = sft_pairs(config)
    texts = [text for pair in pairs for text in pair]
    rows = sorted({1, max(1, config.budget // len(texts[0][0]))})
    sides: list[tuple[str, Callable[[Any], float], Any]] = [("ours", ours.sft_step, pairs)]
    for n in rows:
        peer = peers.PeftSide(adapted, config.lr, n, config.dtype == "bf16")
        sides.append((f"PEFT, {n} at a time", peer.step, texts))
    table = Table(f"{len(texts)} texts of {len(texts[0][0])} tokens")
    for _ in range(config.rounds + 1):
        for name, step, data in sides:
            start = table.begin()
            step(data)
            table.end(name, {"sft": now() - start})
    return table


def grpo_steps(config: Config) -> Table:
    """TRL owns its loop, so our turns are taken between its steps."""
    peers.need("trl", "datasets")
    ours, adapted = training_sides(config)
    prompts = config.ids(config.rounds + 1, config.prompt).tolist()
    table = Table(f"{config.group} replies of {config.reply} to {config.prompt} tokens")
    marks: list[float] = []  # when TRL's step began, and when its replies were there

    def before_step(number: int) -> None:
        start, prompt = table.begin(), prompts[number]
        drawing = SamplingConfig(max_new=config.reply, seed=config.seed + number)
        replies = sample(ours.model, [prompt], drawing, config.group)[0]
        middle = now()
        ours.learn(prompt, [reply.ids for reply in replies])
        table.end("ours", {"grpo, drawing": middle - start, "grpo, training": now() - middle})
        marks[:] = [table.begin()]

    def rewards(replies: list[list[int]]) -> list[float]:
        marks.append(now())
        return [reward(ids) for ids in replies]

    def after_step() -> None:
        start, middle = marks
        table.end("TRL", {"grpo, drawing": middle - start, "grpo, training": now() - middle})

    peers.trl_trainer(adapted, prompts, rewards, before_step, after_step, config).train()
    return table


def main(config: Config) -> None:
    device_of(config.device)  # raises where there is none
    print("| work | side | seconds | times ours | peak, GB |\n|---|---|---:|---:|---:|")
    if {"prefill", "decode"} & set(config.cases):
        model, peer = models(config)
        model.pack()
        for prompts, replies in JOBS:
            generation(config, prompts, replies, model, peer).show()
    if "sft" in config.cases:
        sft(config).show()
    if "grpo" in config.cases:
        grpo_steps(config).show()
    cuda = torch.device(config.device).type == "cuda"
    device = torch.cuda.get_device_name() if cuda else f"CPU, {torch.get_num_threads()} threads"
    packages = ("torch", "transformers", "peft", "trl", "bitsandbytes", "flash_attn")
    versions = [f"{name} {version(name)}" for name in packages if find_spec(name)]
    print(f"\n{config.shape or config.base}, {config.dtype}, rank {config.rank}; median of "
          f"{config.rounds} rounds in turns, seed {config.seed}; {device}, load "
          f"{os.getloadavg()[0]:.1f}; Python {platform.python_version()}, {', '.join(versions)}."
    )  # fmt: skip


if __name__ == "__main__":
    cli = functools.partial(tyro.cli, prog="python -m nanopersrm.bench", description=__doc__)
    sys.exit(exit_code("nanopersrm.bench", lambda: main(cli(Config))))
