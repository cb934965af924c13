"""A reward without words: the usual reward model, to know what reasoning is worth.

    python -m nanopersrm.rivals.scalar --pairs train.jsonl --validation validation.jsonl \\
                                       --style-from runs/sft/adapter/style --out runs/scalar
    python -m nanopersrm.evaluate --pairs test.jsonl --adapter runs/sft/adapter \\
                                  --beside scalar=runs/scalar

    s = w · h        h (D,): the state of the last row of the prompt, after the last norm
    loss = -log σ(s[chosen] - s[rejected])

(Ouyang et al., arXiv 2203.02155.) The same base, an adapter of the same size, the same prompts up
to "<scores>A=": but where the judge reads nine digits, one trained vector w gives a single number.
A judge that reasons and is no better than this has only learned to talk.

On disk: an adapter folder as train_sft.py leaves it, and in it head.safetensors with w (D,) fp32.
w starts normal with deviation 1 / sqrt(D), so that s starts near the size of a state's numbers.
"""

import random
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import tyro
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from nanopersrm import InputError
from nanopersrm.command import exit_code
from nanopersrm.judge import verdict
from nanopersrm.judge.judge import Judge
from nanopersrm.judge.judgement import JudgeConfig
from nanopersrm.judge.prompts import prompt_ids
from nanopersrm.model import weights
from nanopersrm.model.base import DEFAULT_BASE, resolve
from nanopersrm.model.lora import Lora, LoraConfig
from nanopersrm.model.tokenizer import Tokenizer
from nanopersrm.model.weights import device_of, dtype_of
from nanopersrm.pairs import Pair, read
from nanopersrm.style.baselines import Score
from nanopersrm.style.profile import measured_block
from nanopersrm.style.similarity import Style
from nanopersrm.train import packing
from nanopersrm.train.run import save_adapter
from nanopersrm.train.setup import adapter_settings

import torch  # isort: skip  (after nanopersrm, which settles threads and memory)
import torch.nn.functional as F  # isort: skip
from torch import Tensor, nn  # isort: skip

FILE = "head.safetensors"
HEAD = "head"  # its tensor


@dataclass(frozen=True)
class Config:
    """Train a scalar reward on pairs."""

    pairs: Path  # .jsonl of data.build
    validation: Path | None = None  # pairs to count right ones of, before and after
    out: Path = Path("runs/scalar")  # the folder to write
    base: str = DEFAULT_BASE  # the embedded default, a folder, a .gguf file, or a hub name
    device: str = "auto"  # auto, cpu, cuda, cuda:N
    dtype: str = "auto"  # auto, bf16, fp32
    seed: int = 0  # same seed, same run
    steps: int = 110
    batch_pairs: int = 4  # pairs a step
    longest: int = 1200  # pairs whose prompts have more tokens are left out
    rank: int = LoraConfig.rank  # of the adapter
    lr: float = 1e-3  # falls to zero along a line
    evidence: bool = True  # the prompts show what was measured of the texts
    style_from: Path | None = None  # a style adapter whose percentiles the prompts show
    validation_pairs: int = 40  # so many of them


def prompts_of(
    judge: Judge, exemplars: Sequence[str], question: str, candidates: Sequence[str], evidence: bool
) -> list[list[int]]:
    """The ids of a prompt a candidate, up to the row where the judge reads its digit."""
    exemplars, candidates = ([text.strip() for text in some] for some in (exemplars, candidates))
    score_line = judge.tokenizer.encode(verdict.closing("")[1])
    shown = judge.style_evidence(exemplars, candidates) if judge.shows_style() else None
    prompts = []
    for i, text in enumerate(candidates):
        style_evidence = None if shown is None else [shown[i]]
        measured = measured_block(exemplars, [text], style_evidence) if evidence else None
        ids = prompt_ids(judge.tokenizer, exemplars, [text], question.strip() or None, (), measured)
        prompts.append(ids + score_line)
    return prompts


def scores_of(judge: Judge, head: Tensor, prompts: Sequence[list[int]]) -> Tensor:
    """head (D,), prompts of one writer -> s (n,) fp32, by one forward that shares the exemplars."""
    texts = [
        packing.Branch(tuple(ids), len(ids), digit_at=len(ids) - 1, number=i)
        for i, ids in enumerate(prompts)
    ]
    tree = packing.build_tree("prompts", texts)
    batch = packing.batch([tree], judge.model.device)
    hidden = judge.model(batch.ids, batch.layout)  # (N, D)
    order = [branch.number for branch in tree.branches if branch.digit_at >= 0]
    rows = batch.digit_rows[[order.index(i) for i in range(len(prompts))]]
    return hidden[rows].float() @ head  # (n,)


def scorer(judge: Judge, head: Tensor, config: JudgeConfig) -> Score:
    """s of each candidate, under the judge's adapter; None where a prompt is too long."""

    @torch.inference_mode()
    def score(
        exemplars: Sequence[str], question: str, candidates: Sequence[str]
    ) -> list[float] | None:
        prompts = prompts_of(judge, exemplars, question, candidates, config.evidence)
        if max(map(len, prompts)) > judge.model.config.context:
            return None
        return scores_of(judge, head, prompts).tolist()

    return score


def load_head(folder: str | Path, judge: Judge) -> Tensor:
    """w (D,) fp32 of a folder."""
    file, D = Path(folder).expanduser() / FILE, judge.model.config.D
    try:
        head = load_file(file).get(HEAD)
    except (SafetensorError, OSError) as error:
        raise InputError(f"{file}: cannot be read as safetensors ({error})") from error
    if head is None or tuple(head.shape) != (D,) or not bool(torch.isfinite(head).all()):
        came = "none" if head is None else f"{tuple(head.shape)}"
        raise InputError(f"{file}: expected {HEAD!r} with {D} finite numbers, found {came}")
    return head.float().to(judge.model.device)


def accuracy(judge: Judge, head: Tensor, pairs: Sequence[Pair], config: JudgeConfig) -> str:
    """Pairs of which the chosen text gets the higher score, in words."""
    score, right = scorer(judge, head, config), 0
    for pair in pairs:
        s = score(pair.exemplars, pair.question, (pair.chosen, pair.rejected))
        right += s is not None and s[0] > s[1]
    return f"{right} of {len(pairs)} pairs right"


def main(config: Config) -> None:
    """Read, train, save."""
    if min(config.steps, config.batch_pairs) < 1:
        raise InputError("--steps and --batch-pairs: expected numbers from 1")
    if config.out.exists():
        raise InputError(f"--out {config.out}: expected a new folder, this one is there")
    pairs = read(config.pairs)
    validation = read(config.validation)[: config.validation_pairs] if config.validation else []
    device = device_of(config.device)
    dtype = dtype_of(config.dtype, device)
    base = resolve(config.base, lambda line: print(line, file=sys.stderr))
    model = weights.load(base, dtype, device)
    style = None if config.style_from is None else Style.load(config.style_from, model)
    judge = Judge(model, Tokenizer.load(base), True, style)
    judging = JudgeConfig(evidence=config.evidence, think=False)
    lora = Lora(model, LoraConfig(rank=config.rank), config.seed)
    D, generator = model.config.D, torch.Generator().manual_seed(config.seed)
    head = nn.Parameter((torch.randn(D, generator=generator) * D**-0.5).to(device))
    parameters = [*lora.parameters(), head]
    optimizer = torch.optim.AdamW(parameters, lr=config.lr, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, config.steps)
    lora.on(model)
    print(f"before: {accuracy(judge, head.detach(), validation, judging)}")
    order: list[Pair] = []
    for step in range(config.steps):
        total, count = 0.0, 0
        while count < config.batch_pairs:
            if not order:
                order = random.Random(f"{config.seed}/scalar/{step}").sample(pairs, len(pairs))
            pair = order.pop()
            candidates = (pair.chosen, pair.rejected)
            prompts = prompts_of(judge, pair.exemplars, pair.question, candidates, config.evidence)
            if max(map(len, prompts)) > config.longest:
                pairs = [other for other in pairs if other is not pair]
                if not pairs:
                    raise InputError(f"{config.pairs}: all prompts are too long; raise --longest")
                continue
            s = scores_of(judge, head, prompts)  # (2,)
            loss = -F.logsigmoid(s[0] - s[1]) / config.batch_pairs
            loss.backward()
            total, count = total + loss.item(), count + 1
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        lora.refresh()
        print(f"step {step + 1:4d}  loss {total:.3f}", flush=True)
    print(f"after: {accuracy(judge, head.detach(), validation, judging)}")
    shows = style is not None
    settings = adapter_settings(config.base, base, model, False, config.evidence, shows)
    save_adapter(config.out, settings, lora, style)
    save_file({HEAD: head.detach().cpu()}, config.out / FILE)


def run(config: Config) -> int:
    """`main` with an exit code."""
    return exit_code("nanopersrm.rivals.scalar", lambda: main(config))


if __name__ == "__main__":
    sys.exit(run(tyro.cli(Config, prog="python -m nanopersrm.rivals.scalar")))
