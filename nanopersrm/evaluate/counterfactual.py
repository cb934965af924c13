"""Counterfactual: does a judge follow the chance that its prompt shows, or the rest of the prompt?

    python -m nanopersrm.evaluate.counterfactual --pairs validation.jsonl --adapter runs/sft/adapter

The measured block of a prompt ends with a number, "candidate by this writer: 62% likely". The judge
scores the same prompts with other numbers there. The variation of the scores has three sources:

    score[p, c] = mean + rest[p] + chance[c] + both[p, c]      share of x = Σ x² / Σ (score - mean)²

Scores 3 5 7 and 4 6 8 of two prompts: rest ±0.5, chance -2, 0, 2, both 0; 91 % by the chance.
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tyro
from rich.progress import track

from nanopersrm import InputError
from nanopersrm.command import exit_code
from nanopersrm.evaluate.evaluate import select
from nanopersrm.judge.adapter_settings import DEFAULT
from nanopersrm.judge.judge import Judge
from nanopersrm.judge.judgement import JudgeConfig
from nanopersrm.judge.prompts import prompt_ids
from nanopersrm.judge.reply import FORCED_ROOM, answer
from nanopersrm.judge.verdict import soft_score
from nanopersrm.model.base import DEFAULT_BASE
from nanopersrm.pairs import Pair, read
from nanopersrm.style.profile import StyleEvidence, measured_block


@dataclass(frozen=True)
class Config:
    """Ask a judge the same with other chances in the measured block of its prompt."""

    pairs: Path  # .jsonl or .jsonl.gz of data.build
    adapter: str = DEFAULT  # a folder with a trained adapter; default: the shipped one
    base: str = DEFAULT_BASE  # the embedded default, a folder, a .gguf file, or a hub name
    limit: int = 10  # pairs, drawn by the seed, twins together; a prompt for each of two texts
    # Percents put into the prompts; the default ones are what prompts of real pairs show.
    chances: tuple[int, ...] = (20, 25, 30, 35, 40, 44, 48, 52, 56, 60, 65, 70, 80)
    seed: int = 0  # same seed, same pairs
    device: str = "auto"  # auto, cpu, cuda, cuda:N
    dtype: str = "auto"  # auto, bf16, fp16, fp32


def scores(judge: Judge, pair: Pair, text: str, chances: Sequence[int]) -> list[float] | None:
    """The score of a text with each chance in its prompt; None: a prompt exceeds the context."""
    exemplars, text = [exemplar.strip() for exemplar in pair.exemplars], text.strip()
    shown = judge.style_evidence(exemplars, [text])[0]
    prompts = []
    for chance in chances:
        evidence = [StyleEvidence(shown.percentile, float(chance))]
        measured = measured_block(exemplars, [text], evidence)
        question = pair.question or None
        prompts.append(prompt_ids(judge.tokenizer, exemplars, [text], question, (), measured))
    if max(map(len, prompts)) + FORCED_ROOM + len(exemplars) > judge.model.config.context:
        return None
    answers = answer(judge.model, judge.tokenizer, prompts, 1, JudgeConfig(think=False))
    return [soft_score(sample.digits) for (sample,) in answers]


def shares(table: Sequence[Sequence[float]]) -> dict[str, float]:
    """table (P, C), the score of each prompt with each chance -> shares of the variation."""
    deviation = np.array(table) - np.mean(table)  # (P, C)
    parts = {"rest": deviation.mean(1, keepdims=True), "chance": deviation.mean(0, keepdims=True)}
    parts["both"] = deviation - parts["rest"] - parts["chance"]
    total = (deviation**2).mean()
    return {name: float((part**2).mean() / total) if total else 0.0 for name, part in parts.items()}


def main(config: Config) -> None:
    """Ask, and print the table."""
    if len(set(config.chances)) < 2 or not all(1 <= chance <= 99 for chance in config.chances):
        raise InputError(f"--chances: expected two percents from 1 to 99, got {config.chances}")
    pairs = select(read(config.pairs), config.limit, None, config.seed)
    judge = Judge.load(config.base, config.adapter, config.device, config.dtype)
    if judge.reading is None or judge.reading.fusion is None or not judge.shows_style():
        raise InputError(f"--adapter {config.adapter}: expected prompts that show a chance")
    shown = track(pairs, "pairs", transient=True, disable=not sys.stderr.isatty())
    texts = ((pair, text) for pair in shown for text in (pair.chosen, pair.rejected))
    rows = [scores(judge, pair, text, config.chances) for pair, text in texts]
    table = [row for row in rows if row is not None]
    if not table:
        raise InputError(f"{config.pairs}: expected a pair that fits the context, found none")
    for chance, score in zip(config.chances, np.mean(table, axis=0), strict=True):
        print(f"{chance:4d} %  mean score {score:.2f}")
    parts = ", ".join(f"{share:.0%} by the {name}" for name, share in shares(table).items())
    print(f"{len(table)} of {len(rows)} prompts fit; the variation is {parts}")


def run(config: Config) -> int:
    """`main` with an exit code."""
    return exit_code("nanopersrm.evaluate.counterfactual", lambda: main(config))


if __name__ == "__main__":
    sys.exit(run(tyro.cli(Config, prog="python -m nanopersrm.evaluate.counterfactual")))
