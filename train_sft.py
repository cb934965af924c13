"""Teach a base to judge, by imitation and by contrast.

    python train_sft.py                                  the demo writers, a first try
    python train_sft.py --pairs train.jsonl --out mine   your own pairs, see data/README.md
    python train_sft.py --adapter default --pairs ...    from the judge that comes with the base on
    python train_sft.py --out mine --resume ...          go on after an interruption

Two small adapters learn three things, beside a base that stays as it is:

    style      first, texts of one writer are pulled together, those of others pushed apart
               (nanopersrm/style.py). Then this adapter is frozen: from now on it measures how alike
               two texts are, which stands in the prompts among the other evidence.
    imitation  replies whose claims are true (data/replies.py): the form, and the habit of giving
               reasons
    contrast   among candidates by several writers the score line must favour the right one
               (nanopersrm/contrast.py): the judgement

RUN/adapter is the result, in PEFT's format, RUN/best what judged better in an earlier trial.
RUN/metrics.jsonl has every number (`python -m nanopersrm.train.report RUN` draws them), RUN/replies what
the model wrote on the way, RUN/checkpoints what --resume needs.

How it works. Pairs become trees of tokens (data/lessons.py), trees are packed without padding
(nanopersrm/packing.py), and one forward gives all losses of a tree (nanopersrm/objective.py). What
a step sees follows from the seed and the number of the step alone, so a run that goes on from a
checkpoint sees what it would have seen. How a step is computed is a matter of --preset
(nanopersrm/presets.py); without one, the machine decides. The learning rate is for SmolLM2-135M; a
base of 7 billion weights wants about a tenth of it (--optim.lr 2e-4), and so does an --adapter.

What we left out: several GPUs, and training the base itself.
"""

import math
import sys
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import tyro

from nanopersrm import InputError
from nanopersrm.command import exit_code
from nanopersrm.model.bases import DEFAULT_BASE, resolve
from nanopersrm.model.device import device_of
from nanopersrm.model.lora import Lora, LoraConfig
from nanopersrm.model.tokenizer import Tokenizer
from nanopersrm.model.transformer import Model, ModelConfig
from nanopersrm.pairs import Pair, digest, read
from nanopersrm.style import similarity as style
from nanopersrm.style.fusion import GUESS
from nanopersrm.style.similarity import Style, StyleConfig, StyleEvidenceFn, style_evidence_fn
from nanopersrm.train import checkpoint, ending, packing
from nanopersrm.train import setup as starting
from nanopersrm.train.objective import ObjectiveConfig, sums
from nanopersrm.train.optim import OptimConfig, learning_rate
from nanopersrm.train.presets import Preset, for_card, settled
from nanopersrm.train.runlog import Stop
from nanopersrm.train.training import (
    Learner,
    Training,
    check_folder,
    disk_needed,
    memory_guard,
    named,
)
from nanopersrm.train.trial import Trial

import torch  # isort: skip  (after nanopersrm, which settles threads and memory)

from data.build import demo_pairs
from nanopersrm.train import course
from nanopersrm.train.course import Course
from nanopersrm.train.exam import Exam
from nanopersrm.train.lessons import LessonConfig, StyleBatch


@dataclass(frozen=True)
class Config:
    """Teach a base to judge: style, imitation, contrast."""

    pairs: Path | None = None  # .jsonl of data.build; default: pairs of the demo writers
    validation: Path | None = None  # pairs for the trials; default: a tenth of the writers
    # go on from this one, "default" is that of the base: its base, 4 bits, rank and style stay
    adapter: str | None = None
    out: Path = Path("runs/sft")  # folder of the run
    resume: bool = False  # go on from the last checkpoint in --out
    overwrite: bool = False  # throw an earlier run in --out away
    preset: Literal["tiny", "cpu", "24gb", "12gb", "8gb"] | None = None  # default: this machine's
    base: str = DEFAULT_BASE  # the embedded default, a folder, a .gguf file, or a hub name
    device: str = "auto"  # auto, cpu, cuda, cuda:N
    seed: int = 0  # same seed, same run
    # The preset has a value for each of these:
    steps: int | None = None  # of imitation and contrast
    warmup_steps: int | None = None  # of style before
    bundles: int | None = None  # pairs a step
    budget: int | None = None  # packed tokens in a micro-batch: lower it when memory runs out
    dtype: Literal["auto", "bf16", "fp16", "fp32"] | None = None  # fp16 with loss scaling
    nf4: bool | None = None  # the matrices of the base in 4 bits
    recompute: bool | None = None  # compute each block again in its backward: less memory
    offload: bool | None = None  # keep what is kept of each block in host memory
    style_from: Path | None = None  # a style adapter to use as it is; default: that in --adapter
    fused: int = 1000  # pairs on which all instruments are weighed into a chance to show; 0: no
    writers: int = 16  # a step of style, of one domain where it has so many
    eval_every: int = 50  # steps between trials on validation pairs; 0: before and after only
    eval_pairs: int = 40  # validation pairs in a trial
    save_every: int = 10  # steps between checkpoints
    keep_last: int = 2  # checkpoints to keep, beside the best
    lora: LoraConfig = field(default_factory=LoraConfig)  # of a new adapter
    optim: OptimConfig = field(default_factory=lambda: OptimConfig(lr=2e-3))  # 7B: 2e-4
    style: StyleConfig = field(default_factory=StyleConfig)
    lesson: LessonConfig = field(default_factory=LessonConfig)
    weight: ObjectiveConfig = field(default_factory=ObjectiveConfig)


@dataclass
class Kit:
    """What both loops work with."""

    config: Config
    how: Preset
    model: Model
    tokenizer: Tokenizer
    course: Course  # the training pairs
    validation: list[Pair]
    training: Training
    begun: Lora | None  # the adapter to go on from
    style_from: Path | None  # the style adapter to use as it is


def learn_style(kit: Kit) -> Style:
    """The first loop: contrast of pooled states among the writers of a step."""
    config, how, model, training = kit.config, kit.how, kit.model, kit.training
    if kit.style_from is not None:
        learned = Style.load(kit.style_from, model)
    else:
        learned = Style(
            model, style.adapter(model, config.lora, config.style, config.seed), config.style
        )
    lora = learned.lora
    if training.saved is not None and not training.in_phase("style"):  # it has been learned
        lora.load_tensors(named(training.saved.tensors, "style"))
        lora.freeze()
        return learned.measured(training.saved.facts["style"])
    if kit.style_from is not None:
        return fuse(kit, learned)
    texts = course.usual(kit.course.roster, kit.tokenizer, config.seed)
    learned.standardise(texts)
    learner = Learner(training, "style", model, lora, config.optim)

    def contrast(batch: StyleBatch) -> tuple[torch.Tensor, torch.Tensor]:
        negatives = [ids for _, ids in batch.negatives]
        texts = batch.exemplars, batch.candidates, negatives
        return style.batch_loss(
            model, *texts, config.style, learned.standard, how.recompute, how.offload
        )

    if not learner.start:  # the largest step first: memory runs out now or never
        with memory_guard("lower --writers or --style.tokens, or give --recompute True"):
            contrast(kit.course.longest_style(config.writers, config.style.tokens))[0].backward()
        learner.forget()
    training.begin()
    for step in range(learner.start, how.warmup_steps):
        batch = kit.course.style_step(step, config.writers, config.style.tokens)
        loss, found = contrast(batch)
        learner.backward(loss, batch.authors)
        rate = learning_rate(step, how.warmup_steps, config.optim)
        norm = learner.update(rate)
        numbers = {"loss_style": float(loss.detach()), "found": float(found)}
        numbers |= {"lr": rate, "gradient_norm": norm}
        training.after(step + 1, learner, numbers, batch.tokens, {})
    lora.off(model)
    lora.freeze()
    training.log.note("style: measuring how alike strangers are")
    learned.standardise(texts)
    alike = course.strangers(kit.course.roster, kit.tokenizer, learned, config.seed)
    learned.quantiles = style.strangers_quantiles(alike)
    return fuse(kit, learned)


def fuse(kit: Kit, styled: Style) -> Style:
    """All instruments as one, where it has not been done: what each is worth beside the others."""
    pairs, count, note = kit.course.pairs, kit.config.fused, kit.training.log.note
    if not count or not kit.config.lesson.evidence:
        styled.fusion = None
    elif styled.fusion is not None:
        seen = "" if styled.fusion.folds else ", also for writers whom it was fitted on"
        note(f"instruments: weighed before, as {kit.style_from} has them{seen}")
    else:
        note(f"instruments: weighing them on {min(count, len(pairs)):,} pairs")
        tell = kit.tokenizer, styled, kit.config.seed, kit.training.obey
        found = course.fused(pairs, count, *tell)
        assert found.loss is not None, "a fit measures it"
        told = f"{found.loss:.2f} nats a pair by other writers, where a guess has {GUESS:.2f}"
        styled.fusion = found if found.loss < GUESS else None
        note(f"instruments: {told}{'' if styled.fusion else '; they are not shown as a chance'}")
    return styled


def learn_to_judge(kit: Kit, styled: Style) -> tuple[Lora, Trial, Trial]:
    """The second loop: imitation and contrast. The adapter, and the trials before and after."""
    config, how, model, training = kit.config, kit.how, kit.model, kit.training
    near = style_evidence_fn(kit.tokenizer, styled, course.writers(kit.course.pairs))
    lora = kit.begun or Lora(model, config.lora, config.seed + 1)
    learner = Learner(training, "judge", model, lora, config.optim)
    exam = Exam(
        kit.validation[: config.eval_pairs], kit.tokenizer, config.lesson, config.seed, near
    )
    facts: dict[str, Any] = {"style": styled.facts(), "trials": []}
    if training.saved is not None and training.in_phase("judge"):
        facts["trials"] = training.saved.facts["trials"]
    else:
        training.log.note("before training: the largest step, tried out; then a trial")
        rehearse(kit, learner, near)
        before, page = exam.hold(model, how)
        training.log.write_replies(how.warmup_steps, page)
        training.log.note(f"before: {before.said()}")
        facts["trials"].append(asdict(before))
    training.begin()
    for step in range(learner.start, how.steps):
        number = how.warmup_steps + step + 1
        bundles = kit.course.step(step, how.bundles, near, config.weight.imitation > 0)
        reply_tokens, lists = packing.weights_of(bundles)
        numbers = dict.fromkeys(("loss_imitation", "loss_contrast", "right"), 0.0)
        if not bundles:
            training.log.note(f"step {number}: every pair is longer than --lesson.longest")
            numbers = dict.fromkeys(numbers, math.nan)
        for micro in packing.pack(bundles, how.budget):
            batch = packing.batch(micro, model.device)
            found = sums(model, batch, kit.tokenizer.digit_ids, config.weight, how)
            learner.backward(found.imitation / reply_tokens + found.contrast / lists, batch.names)
            numbers["loss_imitation"] += float(found.imitation.detach()) / reply_tokens
            numbers["loss_contrast"] += float(found.contrast.detach()) / lists
            numbers["right"] += float(found.right.sum()) / len(bundles)
        rate = learning_rate(step, how.steps, config.optim)
        numbers |= {"gradient_norm": learner.update(rate), "lr": rate}
        training.lap()
        if step + 1 == how.steps or (config.eval_every and (step + 1) % config.eval_every == 0):
            held, page = exam.hold(model, how)
            training.log.write_replies(number, page)
            training.log.note(f"after {step + 1} steps: {held.said()}")
            facts["trials"].append(asdict(held))
            numbers |= held.numbers()
            facts["score"] = held.accuracy if held.pairs else None
        tokens = sum(bundle.tokens for bundle in bundles)
        training.after(number, learner, numbers, tokens, facts, {"style": styled.lora})
        facts["score"] = None
    return lora, Trial(**facts["trials"][0]), Trial(**facts["trials"][-1])


def rehearse(kit: Kit, learner: Learner, near: StyleEvidenceFn) -> None:
    """The largest micro-batch that a step can have, first: memory runs out now or never."""
    trees = kit.course.longest(kit.how.bundles, near, kit.config.weight.imitation > 0)
    batch = packing.batch(packing.fullest(trees, kit.how.budget), kit.model.device)
    advice = (
        f"the largest micro-batch has {len(batch.ids)} tokens; lower --budget (now "
        f"{kit.how.budget}) or --lesson.longest, or give --recompute True"
    )
    with memory_guard(advice):
        found = sums(kit.model, batch, kit.tokenizer.digit_ids, kit.config.weight, kit.how)
        (found.imitation + found.contrast).backward()
    learner.forget()


def main(config: Config) -> None:
    """Read, learn, save, and say what came of it."""
    folder, made = starting.named(config.adapter, config.base)
    config = replace(config, **starting.unsaid(made, config.base, config.nf4, config.dtype))
    inside = folder / "style" if folder is not None and (folder / "style").is_dir() else None
    style_from = config.style_from or inside
    if made is not None and made.style and style_from is None:
        raise InputError(f"{folder}: expected the folder style, as judge.json says")
    device = device_of(config.device)
    card = torch.cuda.get_device_properties(device).total_memory if device.type == "cuda" else None
    how = settled(config.preset or for_card(card), asdict(config))
    if style_from is not None:
        how = replace(how, warmup_steps=0)
    for name, least in (("eval_every", 0), ("eval_pairs", 0), ("writers", 2), ("fused", 0)):
        if (number := getattr(config, name)) < least:
            flag = name.replace("_", "-")
            raise InputError(f"--{flag}: expected a number from {least}, got {number}")
    check_folder(config.out, config.resume, config.overwrite)
    eight_bit = config.optim.eight_bit or how.eight_bit
    config = replace(config, optim=replace(config.optim, eight_bit=eight_bit))
    given = demo_pairs(config.seed) if config.pairs is None else read(config.pairs)
    train, validation = course.divided(given, config.validation, config.seed)
    base = resolve(config.base, lambda line: print(line, file=sys.stderr))
    tokenizer = Tokenizer.load(base)
    tiny = starting.is_random(config.preset, config.base)
    notes = [starting.same_base(made, folder, base, tiny)]
    notes += made.asked_otherwise(config.lesson.evidence, config.lesson.form) if made else []
    if folder is not None and not config.resume and config.optim.lr >= Config().optim.lr:
        notes.append(f"{folder} has learned already: a tenth of --optim.lr may be enough")
    for note in filter(None, notes):
        print(note, file=sys.stderr)
    sizes = ModelConfig.of(base.config)
    longest = min(config.lesson.longest, sizes.context)
    config = replace(config, lesson=replace(config.lesson, longest=longest))
    rivals = config.lesson.rivals if config.weight.contrast else 1  # others would teach nothing
    whole = Course(train, tokenizer, replace(config.lesson, rivals=rivals), config.seed)
    model = starting.load(base, how, device, config.seed, tiny)
    begun = None if folder is None else starting.going_on(folder, model, config.lora)
    config = replace(config, lora=begun.config if begun else config.lora)
    checkpoint.check_room(config.out, disk_needed(sizes, config.lora.rank, config.keep_last))
    steps = how.warmup_steps + how.steps
    torch.manual_seed(config.seed)  # of dropout
    settings = asdict(config) | asdict(how) | {"texts": digest([*train, *validation])}
    settings["adapter_sha256"] = starting.adapter_sha256(folder)
    with Stop() as stop:
        saving = config.save_every, config.keep_last, stop, config.resume, config.overwrite
        training = Training(config.out, settings, steps, *saving, device)
        kit = Kit(config, how, model, tokenizer, whole, validation, training, begun, style_from)
        training.log.note(
            f"{config.base} with {folder or 'a new adapter'} on {device}, "
            f"{'NF4 and ' * how.nf4}{model.norm.weight.dtype}; {len(train):,} pairs to train on, "
            f"{len(validation):,} for trials; steps: {how.warmup_steps} of style, {how.steps} of "
            f"{how.bundles} pairs"
        )
        styled = learn_style(kit)
        lora, before, after = learn_to_judge(kit, styled)
    folder = config.out / "adapter"
    shown = config.lesson.evidence
    made_for = starting.made_for(config.base, base, model, tiny, shown, config.lesson.form, shown)
    best = ending.save(config.out, "judge", steps, made_for, lora, styled)
    if whole.left_out:
        print(f"left out: {whole.left_out} pairs longer than --lesson.longest {longest}")
    print(f"\nbefore: {before.said()}\nafter:  {after.said()}\n{best}")
    print(starting.to_judge_with(folder, config.base, tiny))


def run(config: Config) -> int:
    """`main` with an exit code."""
    ended = "interrupted; --resume goes on from the last checkpoint"
    return exit_code("train_sft.py", lambda: main(config), ended)


if __name__ == "__main__":
    sys.exit(run(tyro.cli(Config, description=__doc__.split("How it works")[0])))
