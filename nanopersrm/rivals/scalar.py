"""A reward without words: the usual reward model, to know what reasoning is worth.

    python -m nanopersrm.rivals.scalar --pairs train.jsonl --out runs/scalar \\
                                       --reading-from runs/sft/adapter/reading
    python -m nanopersrm.evaluate --pairs test.jsonl --adapter runs/sft/adapter \\
                                  --beside scalar=runs/scalar

    s = w · h        h (D,): the state of the last row of the prompt, after the last norm
    loss = -log σ(s[chosen] - s[rejected])

(Ouyang et al., arXiv 2203.02155.) The same base, an adapter of the same size, the same prompts with
every line of evidence up to "<scores>A=": but where the judge reads nine digits, one trained vector
w gives a single number. A judge that chooses lines and is no better than this has only learned to
talk. Its folder is that of train_sft.py with head.safetensors, w (D,) in fp32.
"""

import random
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import count
from pathlib import Path

import tyro
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from nanopersrm import InputError
from nanopersrm.command import exit_code
from nanopersrm.judge.judge import Judge
from nanopersrm.judge.reply import by_rule, prompts_about, spell
from nanopersrm.model import weights
from nanopersrm.model.base import DEFAULT_BASE, resolve
from nanopersrm.model.cache import Layout
from nanopersrm.model.lora import Lora, LoraConfig
from nanopersrm.model.sampler import common_prefix
from nanopersrm.model.tokenizer import Tokenizer
from nanopersrm.model.weights import device_of, dtype_of
from nanopersrm.pairs import Pair, read
from nanopersrm.train.run import save_adapter
from nanopersrm.train.setup import adapter_settings, load_measurer

import torch  # isort: skip  (after nanopersrm, which settles threads and memory)
import torch.nn.functional as F  # isort: skip
from torch import Tensor, nn  # isort: skip

FILE, HEAD = "head.safetensors", "head"  # and its tensor
Prompts = list[list[int]]  # ids of each


@dataclass(frozen=True)
class Config:
    """Train a scalar reward on pairs."""

    pairs: Path  # .jsonl of data.build
    out: Path = Path("runs/scalar")  # the folder to write
    base: str = DEFAULT_BASE  # the embedded default, a folder, a .gguf file, or a hub name
    device: str = "auto"  # auto, cpu, cuda, cuda:N
    dtype: str = "auto"  # auto, bf16, fp32
    seed: int = 0  # same seed, same run
    steps: int = 110
    batch_pairs: int = 4  # pairs a step
    longest: int = 1200  # pairs whose prompts have more tokens are left out
    lr: float = 1e-3  # falls to zero along a line
    reading_from: Path | None = None  # a folder to read with; its evidence lies beside it


def prompts_of(
    judge: Judge,
    exemplars: Sequence[str],
    question: str,
    candidates: Sequence[str],
    writer: str | None = None,
) -> Prompts:
    """The ids of a prompt a candidate with all evidence, up to where the judge draws its digit;
    writer: of exemplars that are trained on."""
    exemplars, candidates = ([text.strip() for text in some] for some in (exemplars, candidates))
    tokenizer, texts = judge.tokenizer, (exemplars, candidates, question.strip() or None)
    prompts = prompts_about(tokenizer, judge.measurer, *texts, writer)
    return [p.ids + spell(tokenizer, p, by_rule(p, "all", 0, 0)) for p in prompts]


def scores_of(judge: Judge, head: Tensor, prompts: Prompts) -> Tensor:
    """head (D,), prompts of one writer -> s (n,) fp32, by one forward that shares the exemplars."""
    shared = min(common_prefix(prompts), *(len(ids) - 1 for ids in prompts))
    rows = [prompts[0][:shared], *(ids[shared:] for ids in prompts)]
    layout = Layout.of([len(row) for row in rows], [-1, *[0] * len(prompts)])
    device, last = judge.model.device, [end - 1 for end in layout.starts[2:]]
    layout = Layout(layout.starts, layout.parents, layout.positions.to(device))
    hidden = judge.model(torch.tensor([i for row in rows for i in row], device=device), layout)
    return hidden[last].float() @ head  # (n,)


def scorer(
    folder: str | Path, judge: Judge
) -> Callable[[Sequence[str], str, Sequence[str]], list[float] | None]:
    """s of each candidate, by the w of a folder; None where a prompt is too long."""
    file, D = Path(folder).expanduser() / FILE, judge.model.config.D
    try:
        head = load_file(file).get(HEAD)
    except (SafetensorError, OSError) as error:
        raise InputError(f"{file}: cannot be read as safetensors ({error})") from error
    if head is None or tuple(head.shape) != (D,) or not bool(torch.isfinite(head).all()):
        raise InputError(f"{file}: expected {HEAD!r} with {D} finite numbers")
    w = head.float().to(judge.model.device)

    @torch.inference_mode()
    def score(
        exemplars: Sequence[str], question: str, candidates: Sequence[str]
    ) -> list[float] | None:
        prompts = prompts_of(judge, exemplars, question, candidates)
        too_long = max(map(len, prompts)) > judge.model.config.context
        return None if too_long else scores_of(judge, w, prompts).tolist()

    return score


def training_prompts(judge: Judge, pairs: Sequence[Pair], config: Config) -> Iterator[Prompts]:
    """Of the chosen and the rejected text of one pair after another, epoch after epoch."""
    for epoch in count():
        fits = False
        for pair in random.Random(f"{config.seed}/scalar/{epoch}").sample(pairs, len(pairs)):
            texts = (pair.exemplars, pair.question, (pair.chosen, pair.rejected))
            prompts = prompts_of(judge, *texts, writer=pair.author)
            if max(map(len, prompts)) <= config.longest:
                fits = True
                yield prompts
        if not fits:
            raise InputError(f"{config.pairs}: all prompts are too long; raise --longest")


def main(config: Config) -> None:
    """Read, train, save."""
    if min(config.steps, config.batch_pairs) < 1:
        raise InputError("--steps and --batch-pairs: expected numbers from 1")
    if config.out.exists():
        raise InputError(f"--out {config.out}: expected a new folder, this one is there")
    pairs = read(config.pairs)
    device = device_of(config.device)
    base = resolve(config.base, lambda line: print(line, file=sys.stderr))
    model = weights.load(base, dtype_of(config.dtype, device), device)
    tokenizer, folder = Tokenizer.load(base), config.reading_from
    measurer = load_measurer(None if folder is None else folder.parent, model, tokenizer)
    judge = Judge(model, tokenizer, True, measurer.reading, evidence=measurer.evidence)
    lora = Lora(model, LoraConfig(), config.seed)
    D, generator = model.config.D, torch.Generator().manual_seed(config.seed)
    head = nn.Parameter((torch.randn(D, generator=generator) * D**-0.5).to(device))
    parameters = [*lora.parameters(), head]
    optimizer = torch.optim.AdamW(parameters, lr=config.lr, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, config.steps)
    lora.on(model)
    prompts = training_prompts(judge, pairs, config)
    for step in range(config.steps):
        total = 0.0
        for _ in range(config.batch_pairs):
            s = scores_of(judge, head, next(prompts))  # (2,)
            loss = -F.logsigmoid(s[0] - s[1]) / config.batch_pairs
            loss.backward()
            total += loss.item()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        lora.refresh()
        print(f"step {step + 1:4d}  loss {total:.3f}", flush=True)
    settings = adapter_settings(config.base, base, model, False, False)
    save_adapter(config.out, settings, lora, measurer)
    save_file({HEAD: head.detach().cpu()}, config.out / FILE)


def run(config: Config) -> int:
    """`main` with an exit code."""
    return exit_code("nanopersrm.rivals.scalar", lambda: main(config))


if __name__ == "__main__":
    sys.exit(run(tyro.cli(Config, prog="python -m nanopersrm.rivals.scalar")))
