"""Probes: does the score follow from the lines of evidence, and from nothing else?

    python -m nanopersrm.evaluate.probes --pairs test.jsonl --adapter runs/sft/adapter --limit 8

    scale     the sum of a ledger is moved from -20 to +20 in steps of half a deciban, all else
              stays: the soft score must rise. Spearman's correlation over the 81 steps, the worst
              of all prompts, and the largest step down
    leave     each line of each ledger is left out, the sum follows: the score must move as the sign
              of the line says, down where a line for the writer goes. Lines that say less than half
              a deciban either way are passed over

Both change what stands in the reply and nothing else, so they show what the digit rests on.
"""

import random
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
import tyro
from rich.console import Console
from rich.progress import track

from nanopersrm import InputError
from nanopersrm.command import exit_code
from nanopersrm.evaluate.scoreboard import table
from nanopersrm.judge.adapter_settings import DEFAULT
from nanopersrm.judge.judge import Judge
from nanopersrm.judge.judgement import JudgeConfig
from nanopersrm.judge.reply import Prompt, choice_ids, draw, prompts_about, spell, sum_text
from nanopersrm.judge.verdict import DIGITS
from nanopersrm.model.base import DEFAULT_BASE
from nanopersrm.model.sampler import Decoder
from nanopersrm.pairs import read, twin_pairs

STEPS = tuple(half / 2 for half in range(-40, 41))  # decibans
LEAST = 0.5  # decibans of a line that is left out


@dataclass(frozen=True)
class Config:
    """Does the score follow from the lines?"""

    pairs: Path  # .jsonl or .jsonl.gz
    adapter: str = DEFAULT  # a folder with a trained adapter; default: that of the base
    base: str = DEFAULT_BASE  # the embedded default, a folder, a .gguf file, or a hub name
    limit: int = 8  # pairs, drawn by the seed, twins together
    think_lines: int = JudgeConfig.think_lines  # lines of evidence in a reply, at most
    seed: int = 0
    device: str = "auto"  # auto, cpu, cuda, cuda:N
    dtype: str = "auto"  # auto, bf16, fp16, fp32


@torch.inference_mode()
def soft_scores(judge: Judge, prompt: Prompt, replies: Sequence[list[int]]) -> list[float]:
    """The expected digit after each of some replies to one prompt."""
    decoder = Decoder(judge.model, [prompt.ids])
    decoder.fork([len(replies)], max(map(len, replies)))
    decoder.feed(replies)
    ids = torch.tensor(judge.tokenizer.digit_ids, device=judge.model.device)
    chances = judge.model.logits_of(decoder.hidden, ids).double().softmax(-1).cpu()  # (n, 9)
    return (chances @ torch.tensor(DIGITS, dtype=torch.float64)).tolist()


def scale(judge: Judge, prompt: Prompt, features: Sequence[str]) -> list[float]:
    """Soft scores after these lines, with each sum of STEPS."""
    lines = spell(judge.tokenizer, prompt, features, stop=False)
    stop = choice_ids(judge.tokenizer).stop
    ends = [[stop, *judge.tokenizer.encode(sum_text([x + 0.0]))] for x in STEPS]
    return soft_scores(judge, prompt, [lines + end for end in ends])


def leave(judge: Judge, prompt: Prompt, features: Sequence[str]) -> list[tuple[float, float]]:
    """Of each line that says something: its decibans, and how the score falls without it."""
    lists = [list(features), *([f for f in features if f != out] for out in features)]
    whole, *without = soft_scores(judge, prompt, [spell(judge.tokenizer, prompt, x) for x in lists])
    decibans = [prompt.ledgers[0].lines[feature].decibans for feature in features]
    both = zip(decibans, without, strict=True)
    return [(line, whole - score) for line, score in both if abs(line) >= LEAST]


def spearman(x: Sequence[float], y: Sequence[float]) -> float:
    """Correlation of ranks; equal values get the mean of theirs."""
    ranks = []
    for values in (np.array(x), np.array(y)):
        order = (values[:, None] > values).sum(1) + ((values[:, None] == values).sum(1) - 1) / 2
        ranks.append(order - order.mean())
    size = np.sqrt((ranks[0] ** 2).sum() * (ranks[1] ** 2).sum())
    return float(ranks[0] @ ranks[1] / size) if size else 0.0


def main(config: Config) -> None:
    """Load, probe, print."""
    if config.limit < 1:
        raise InputError(f"--limit: expected a number from 1, got {config.limit}")
    log = Console(stderr=True, highlight=False, soft_wrap=True)
    groups = twin_pairs(read(config.pairs))
    random.Random(f"{config.seed}/probes").shuffle(groups)
    pairs = [pair for group in groups for pair in group][: config.limit]
    judge = Judge.load(config.base, config.adapter, config.device, config.dtype, say=log.print)
    judging = JudgeConfig(think_lines=config.think_lines)
    correlations, down, moved = list[float](), list[float](), list[bool]()
    for pair in track(pairs, "pairs", console=log, transient=True, disable=not log.is_terminal):
        texts = [text.strip() for text in (pair.chosen, pair.rejected)]
        exemplars = [text.strip() for text in pair.exemplars]
        instruments = (judge.tokenizer, judge.measurer)
        prompts = prompts_about(*instruments, exemplars, texts, pair.question or None)
        drawn = draw(judge.model, judge.tokenizer, prompts, judging)
        for prompt, (reply,) in zip(prompts, drawn, strict=True):
            for features in ([], reply.features):
                scores = scale(judge, prompt, features)
                correlations.append(spearman(STEPS, scores))
                down.append(max(a - b for a, b in pairwise(scores)))
            moved += [line * fall > 0 for line, fall in leave(judge, prompt, reply.features)]
    share = f"{np.mean(moved):.1%}" if moved else "-"
    rows = [
        ["probe", "result", "n"],
        ["scale: Spearman, the worst", f"{min(correlations):.4f}", str(len(correlations))],
        ["scale: Spearman, the mean", f"{np.mean(correlations):.4f}", str(len(correlations))],
        ["scale: largest step down", f"{max(0.0, *down):.4f}", str(len(down))],
        ["leave: moves as the line says", share, str(len(moved))],
    ]
    print("\n".join(table(rows)))


def run(config: Config) -> int:
    """`main` with an exit code."""
    return exit_code("nanopersrm.evaluate.probes", lambda: main(config))


if __name__ == "__main__":
    about = __doc__.split("Both change")[0]
    sys.exit(run(tyro.cli(Config, prog="python -m nanopersrm.evaluate.probes", description=about)))
