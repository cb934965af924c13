"""Train the reward model that says nothing: a head in place of the score line and its reasons.

    python -m nanopersrm.rivals.train_scalar --pairs train.jsonl --validation validation.jsonl \\
                                --style-from runs/sft/adapter/style --out runs/scalar
    python -m nanopersrm.evaluate.evaluate --pairs test.jsonl --adapter runs/sft/adapter \\
                                  --beside scalar=runs/scalar/adapter

It sees what train_sft.py sees: the same pairs in the same order, the same rivals, the same prompts,
an adapter of the same size. It lacks what that one adds, replies to imitate, and so takes about a
third less time a step; --steps evens that out. The loss is Bradley-Terry alone
(`nanopersrm/contrast.py` with weights 1 and 0).

It is no part of the judge. It is the opponent that a judge with reasons has to be as good as.
RUN/adapter is the result; --resume goes on as train_sft.py does.
"""

import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import tyro

from nanopersrm import InputError
from nanopersrm.command import exit_code
from nanopersrm.model.bases import DEFAULT_BASE, resolve
from nanopersrm.model.device import device_of
from nanopersrm.model.lora import LoraConfig
from nanopersrm.model.tokenizer import Tokenizer
from nanopersrm.model.transformer import Model, ModelConfig
from nanopersrm.pairs import digest, read
from nanopersrm.rivals import scalar
from nanopersrm.rivals.scalar import Scalar
from nanopersrm.style.similarity import Style, StyleEvidenceFn, style_evidence_fn
from nanopersrm.train import checkpoint, packing
from nanopersrm.train import setup as starting
from nanopersrm.train.contrast import contrast
from nanopersrm.train.optim import OptimConfig, learning_rate
from nanopersrm.train.packing import Bundle
from nanopersrm.train.presets import Preset, for_card, settled
from nanopersrm.train.runlog import Stop
from nanopersrm.train.training import (
    Learner,
    Training,
    check_folder,
    disk_needed,
    memory_guard,
    save_adapter,
)
from nanopersrm.train.trial import both_right

import torch  # isort: skip  (after nanopersrm, which settles threads and memory)

from data.build import demo_pairs
from nanopersrm.train import course
from nanopersrm.train.course import Course
from nanopersrm.train.lessons import LessonConfig


@dataclass(frozen=True)
class Config:
    """Train a scalar reward on pairs."""

    pairs: Path | None = None  # .jsonl of data.build; default: pairs of the demo writers
    validation: Path | None = None  # pairs for the trials; default: a tenth of the writers
    out: Path = Path("runs/scalar")  # folder of the run
    resume: bool = False  # go on from the last checkpoint in --out
    overwrite: bool = False  # throw an earlier run in --out away
    preset: Literal["tiny", "cpu", "24gb", "12gb", "8gb"] | None = None  # default: this machine's
    base: str = DEFAULT_BASE  # the embedded default, a folder, a .gguf file, or a hub name
    device: str = "auto"  # auto, cpu, cuda, cuda:N
    seed: int = 0  # same seed, same run
    steps: int | None = None  # the preset has a value for this and the next
    bundles: int | None = None  # pairs a step
    style_from: Path | None = None  # a style adapter whose percentiles the prompts show
    eval_pairs: int = 40  # validation pairs in the trials before and after
    save_every: int = 10  # steps between checkpoints
    keep_last: int = 2  # checkpoints to keep
    lora: LoraConfig = field(default_factory=LoraConfig)
    optim: OptimConfig = field(default_factory=lambda: OptimConfig(lr=2e-3))  # 7B: 2e-4
    lesson: LessonConfig = field(default_factory=LessonConfig)


@torch.no_grad()
def trial(
    model: Model, learned: Scalar, bundles: Sequence[Bundle], twins: dict[str, str], budget: int
) -> str:
    """Pairs of which the chosen text gets the higher score, in a line."""
    training = model.training
    model.eval()
    right: dict[str, bool] = {}
    for some in packing.pack(bundles, budget):
        batch = packing.batch(some, model.device)
        s = learned.scores(model(batch.ids, batch.layout), batch)
        _, above = contrast(s, batch.lists, batch.list_weights, 1.0, 0.0)
        right |= dict(zip(batch.names, above.tolist(), strict=True))
    model.train(training)
    both = both_right(right, twins)
    of_twins = "" if both is None else f" ({both:.0%} of the twins)"
    return f"{sum(right.values()) / max(1, len(right)):.1%} of {len(right)} pairs{of_twins}"


def learn(
    config: Config, how: Preset, model: Model, learner: Learner, learned: Scalar, whole: Course,
    near: StyleEvidenceFn | None,
) -> None:  # fmt: skip
    """All steps."""
    training = learner.training
    training.begin()
    for step in range(learner.start, how.steps):
        bundles = whole.step(step, how.bundles, near, replies=False)
        _, lists = packing.weights_of(bundles)
        numbers: dict[str, Any] = {"loss_contrast": 0.0, "right": 0.0}
        for micro in packing.pack(bundles, how.budget):
            batch = packing.batch(micro, model.device)
            with memory_guard(f"lower --bundles (now {how.bundles})"):
                hidden = model(
                    batch.ids, batch.layout, recompute=how.recompute, offload=how.offload
                )
                s = learned.scores(hidden, batch)
                loss, right = contrast(s, batch.lists, batch.list_weights, 1.0, 0.0)
                learner.backward(loss / lists, batch.names)
            numbers["loss_contrast"] += float(loss.detach()) / lists
            numbers["right"] += float(right.sum()) / len(bundles)
        rate = learning_rate(step, how.steps, config.optim)
        numbers |= {"gradient_norm": learner.update(rate), "lr": rate}
        training.after(step + 1, learner, numbers, sum(b.tokens for b in bundles), {})


def main(config: Config) -> None:
    """Read, learn, save, and say what came of it."""
    device = device_of(config.device)
    card = torch.cuda.get_device_properties(device).total_memory if device.type == "cuda" else None
    how = settled(config.preset or for_card(card), asdict(config))
    if config.eval_pairs < 0:
        raise InputError(f"--eval-pairs: expected a number from 0, got {config.eval_pairs}")
    check_folder(config.out, config.resume, config.overwrite)
    given = demo_pairs(config.seed) if config.pairs is None else read(config.pairs)
    train, validation = course.divided(given, config.validation, config.seed)
    base = resolve(config.base, lambda line: print(line, file=sys.stderr))
    tokenizer = Tokenizer.load(base)
    sizes = ModelConfig.of(base.config)
    lesson = replace(config.lesson, longest=min(config.lesson.longest, sizes.context))
    checkpoint.check_room(config.out, disk_needed(sizes, config.lora.rank, config.keep_last))
    whole = Course(train, tokenizer, lesson, config.seed)
    tiny = starting.is_random(config.preset, config.base)
    model = starting.load(base, how, device, config.seed, tiny)
    styled = None if config.style_from is None else Style.load(config.style_from, model)
    near = style_evidence_fn(tokenizer, styled) if styled is not None and lesson.evidence else None
    learned = Scalar.new(model, config.lora, config.seed + 1)
    torch.manual_seed(config.seed)  # of dropout
    with Stop() as stop:
        settings = {**asdict(config), **asdict(how), "texts": digest([*train, *validation])}
        saving = config.save_every, config.keep_last, stop, config.resume, config.overwrite
        training = Training(config.out, settings, how.steps, *saving, device)
        learner = Learner(training, "scalar", model, learned, config.optim)
        one = replace(lesson, form="pointwise", rivals=1)
        some = validation[: config.eval_pairs]
        asked = [course.tree(p, {}, tokenizer, one, "exam", near, replies=False) for p in some]
        trees = [tree for tree in asked if tree is not None]
        twins = {pair.id: pair.twin for pair in some}
        training.log.note(f"{config.base} on {device}, {len(train):,} pairs, {how.steps} steps")
        if training.saved is None:
            before = trial(model, learned, trees, twins, how.budget)
            training.log.note(f"before: {before}")
        learn(config, how, model, learner, learned, whole, near)
    folder = config.out / "adapter"
    shows = near is not None
    made_for = starting.made_for(
        config.base, base, model, tiny, lesson.evidence, "pointwise", shows
    )
    save_adapter(folder, made_for, learned.lora, styled if shows else None)
    scalar.save_head(folder, learned)
    print(f"after: {trial(model, learned, trees, twins, how.budget)}")
    print(
        f"To compare: python -m nanopersrm.evaluate.evaluate --pairs FILE --beside scalar={folder}"
    )


def run(config: Config) -> int:
    """`main` with an exit code."""
    ended = "interrupted; --resume goes on from the last checkpoint"
    return exit_code("nanopersrm.rivals.train_scalar", lambda: main(config), ended)


if __name__ == "__main__":
    about = __doc__.split("It is no part")[0]
    sys.exit(run(tyro.cli(Config, prog="nanopersrm.rivals.train_scalar", description=about)))
