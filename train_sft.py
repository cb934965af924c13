"""Teach a base to judge, by imitation and by contrast.

    python train_sft.py                                  the demo writers, about 10 minutes
    python train_sft.py --pairs train.jsonl --out mine   your own pairs, see data/README.md
    python train_sft.py --out mine --resume ...          go on after an interruption

Two small adapters learn three things, beside a base that stays as it is:

    style      first, texts of one writer are pulled together, those of others pushed apart
               (nanopersrm/style.py). Then this adapter is frozen: from now on it measures how alike
               two texts are, which stands in the prompts among the other evidence.
    imitation  replies whose claims are true (data/replies.py): the form, and the habit of giving
               reasons
    contrast   among candidates by several writers the score line must favour the right one
               (nanopersrm/contrast.py): the judgement

RUN/adapter is the result, in PEFT's format. RUN/metrics.jsonl has every number (`python -m
nanopersrm.report RUN` draws them), RUN/replies what the model wrote on the way, RUN/checkpoints
what --resume needs.

How it works. Pairs become trees of tokens (data/lessons.py), trees are packed without padding
(nanopersrm/packing.py), and one forward gives all losses of a tree (nanopersrm/objective.py). What
a step sees follows from the seed and the number of the step alone, so a run that goes on from a
checkpoint sees what it would have seen. How a step is computed is a matter of --preset
(nanopersrm/presets.py); without one, the machine decides.

What we left out: several GPUs, and training the base itself. Where to read next: `train_rft.py`.
"""

import sys
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import tyro

from nanopersrm import InputError, checkpoint, lora_files, packing, style, trial, verdict, weights
from nanopersrm.bases import DEFAULT_BASE, Base, resolve
from nanopersrm.device import device_of, dtype_of
from nanopersrm.lora import Lora, LoraConfig
from nanopersrm.model import Model
from nanopersrm.objective import ObjectiveConfig, sums
from nanopersrm.optim import OptimConfig, learning_rate
from nanopersrm.pairs import Pair, read
from nanopersrm.presets import Preset, for_card, settled
from nanopersrm.runlog import Stop
from nanopersrm.style import Style, StyleConfig
from nanopersrm.tokenizer import Tokenizer
from nanopersrm.trained import Trained, weights_sha256
from nanopersrm.training import Learner, Stopped, Training, disk_needed, memory_guard, named
from nanopersrm.trial import Trial

import torch  # isort: skip  (after nanopersrm, which settles threads and memory)

from data import course, lessons
from data.build import demo_pairs
from data.course import Course
from data.lessons import LessonConfig

TINY = {  # sizes of the random model of --preset tiny
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
}
WRITTEN = 8  # free replies in a trial
HELD_OUT = 0.1  # share of the writers whose pairs are for trials


@dataclass(frozen=True)
class Config:
    """Teach a base to judge: style, imitation, contrast."""

    pairs: Path | None = None  # .jsonl of data.build; default: pairs of the demo writers
    validation: Path | None = None  # pairs for the trials; default: a tenth of the writers
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
    style_from: Path | None = None  # a style adapter to use as it is, instead of learning one
    writers: int = 16  # a step of style, of one domain where it has so many
    eval_every: int = 50  # steps between trials on validation pairs; 0: before and after only
    eval_pairs: int = 40  # validation pairs in a trial
    save_every: int = 10  # steps between checkpoints
    keep_last: int = 2  # checkpoints to keep, beside the best
    lora: LoraConfig = field(default_factory=LoraConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
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


def learn_style(kit: Kit) -> Style:
    """The first loop: contrast of pooled states among the writers of a step."""
    config, how, model, training = kit.config, kit.how, kit.model, kit.training
    if config.style_from is not None:
        return Style.load(config.style_from, model)
    lora = style.adapter(model, config.lora, config.style, config.seed)
    learned = Style(model, lora, config.style)
    if training.saved is not None and not training.in_phase("style"):  # it has been learned
        lora.load_tensors(named(training.saved.tensors, "style"))
        lora.freeze()
        return learned.measured(training.saved.facts["style"])
    texts = course.usual(kit.course.roster, kit.tokenizer, config.seed)
    learned.standardise(texts)
    learner = Learner(training, "style", model, lora, config.optim)
    for step in range(learner.start, how.warmup_steps):
        batch = kit.course.style_step(step, config.writers, config.style.tokens)
        loss, found = style.batch_loss(
            model,
            batch.exemplars,
            batch.candidates,
            [ids for _, ids in batch.negatives],
            config.style,
            learned.standard,
            how.recompute,
            how.offload,
        )
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
    return learned


def learn_to_judge(kit: Kit, styled: Style) -> tuple[Lora, Trial, Trial]:
    """The second loop: imitation and contrast. The adapter, and the trials before and after."""
    config, how, model, training = kit.config, kit.how, kit.model, kit.training
    near = course.nearness(kit.tokenizer, styled)
    lora = Lora(model, config.lora, config.seed + 1)
    learner = Learner(training, "judge", model, lora, config.optim)
    exam = Exam(kit, near)
    facts: dict[str, Any] = {"style": styled.facts(), "trials": []}
    if training.saved is not None and training.in_phase("judge"):
        facts["trials"] = training.saved.facts["trials"]
    else:
        rehearse(kit, learner, near)
        facts["trials"].append(exam.hold(how.warmup_steps, "before"))
    for step in range(learner.start, how.steps):
        number = how.warmup_steps + step + 1
        bundles = kit.course.step(step, how.bundles, near)
        reply_tokens, lists = packing.weights_of(bundles)
        numbers = {"loss_imitation": 0.0, "loss_contrast": 0.0, "right": 0.0}
        for micro in packing.pack(bundles, how.budget):
            batch = packing.batch(micro, model.device)
            found = sums(model, batch, kit.tokenizer.digit_ids, config.weight, how)
            learner.backward(found.imitation / reply_tokens + found.contrast / lists, batch.names)
            numbers["loss_imitation"] += float(found.imitation.detach()) / reply_tokens
            numbers["loss_contrast"] += float(found.contrast.detach()) / lists
            numbers["right"] += float(found.right.sum()) / len(bundles)
        rate = learning_rate(step, how.steps, config.optim)
        numbers |= {"gradient_norm": learner.update(rate), "lr": rate}
        if step + 1 == how.steps or (config.eval_every and (step + 1) % config.eval_every == 0):
            facts["trials"].append(exam.hold(number, "after" if step + 1 == how.steps else ""))
            numbers |= Trial(**facts["trials"][-1]).numbers()
            facts["score"] = numbers["validation_accuracy"]
        tokens = sum(bundle.tokens for bundle in bundles)
        training.after(number, learner, numbers, tokens, facts, {"style": styled.lora})
        facts["score"] = None
    return lora, Trial(**facts["trials"][0]), Trial(**facts["trials"][-1])


class Exam:
    """The validation pairs as lessons, made once: every trial asks the same."""

    def __init__(self, kit: Kit, near: lessons.Style):
        self.kit = kit
        some = kit.validation[: kit.config.eval_pairs]
        config = replace(kit.config.lesson, form="pointwise", rivals=1)
        trees = [
            course.tree(pair, {}, kit.tokenizer, config, f"{kit.config.seed}/exam", near)
            for pair in some
        ]
        self.bundles = [bundle for bundle in trees if bundle is not None]
        self.twins = {pair.id: pair.twin for pair in some}
        self.prompts = [
            course.prompt(pair, ("chosen", "rejected")[i % 2], kit.tokenizer, config, near)
            for i, pair in enumerate(some[:WRITTEN])
        ]

    def hold(self, number: int, name: str) -> dict[str, Any]:
        """A trial: a line on the terminal, and the replies with their prompts in RUN/replies."""
        kit, log = self.kit, self.kit.training.log
        found, replies = trial.hold(
            kit.model,
            kit.tokenizer,
            self.bundles,
            self.twins,
            self.prompts,
            kit.how,
            kit.config.seed,
        )
        pages = [
            kit.tokenizer.decode(prompt).removesuffix(verdict.OPEN) + reply
            for prompt, reply in zip(self.prompts, replies, strict=True)
        ]
        log.write_replies(number, f"\n\n{'=' * 80}\n\n".join(pages) + "\n")
        log.note(f"{name}: {found.said()}")
        return asdict(found)


def rehearse(kit: Kit, learner: Learner, near: lessons.Style) -> None:
    """The largest micro-batch that a step can have, first: memory runs out now or never."""
    trees = kit.course.longest(kit.how.bundles, near)
    batch = packing.batch(packing.pack(trees, kit.how.budget)[0], kit.model.device)
    advice = (
        f"the largest micro-batch has {len(batch.ids)} tokens; lower --budget (now "
        f"{kit.how.budget}) or --lesson.longest, or give --recompute"
    )
    with memory_guard(advice):
        found = sums(kit.model, batch, kit.tokenizer.digit_ids, kit.config.weight, kit.how)
        (found.imitation + found.contrast).backward()
    learner.optimizer.zero_grad(set_to_none=True)


def load(config: Config, how: Preset, device: torch.device, base: Base) -> Model:
    """The base as it is trained on; for --preset tiny a random model of its vocabulary."""
    dtype = dtype_of(how.dtype, device)
    if config.preset == "tiny" and config.base == DEFAULT_BASE:
        sizes = base.config | TINY
        model = weights.random(sizes, dtype, device, how.nf4, config.seed)
    else:
        model = weights.load(base, dtype, device, how.nf4, how.host_embedding)
    return model.train()


def save_adapter(kit: Kit, base: Base, lora: Lora, styled: Style) -> Path:
    """RUN/adapter, written beside and renamed when whole."""
    config, out = kit.config, kit.config.out / "adapter"
    part = checkpoint.fresh(out.with_name(".adapter.part"))
    lora_files.save(part, lora, config.base)
    styled.save(checkpoint.fresh(part / "style"), config.base)
    Trained(
        base=config.base,
        base_sha256=weights_sha256(base),
        nf4=kit.how.nf4,
        dtype={kind: name for name, kind in weights.DTYPES.items()}[kit.model.norm.weight.dtype],
        evidence=config.lesson.evidence,
        form=config.lesson.form,
        style=config.lesson.evidence,
    ).save(part)
    checkpoint.replace_folder(part, out)
    return out


def main(config: Config) -> None:
    """Read, learn, save, and say what came of it."""
    device = device_of(config.device)
    card = torch.cuda.get_device_properties(device).total_memory if device.type == "cuda" else None
    how = settled(config.preset or for_card(card), asdict(config))
    if config.style_from is not None:
        how = replace(how, warmup_steps=0)
    given = demo_pairs(config.seed) if config.pairs is None else read(config.pairs)
    train, validation = lessons.split(given, config.seed, HELD_OUT)
    if config.validation is not None:
        train, validation = given, read(config.validation)
    base = resolve(config.base, lambda line: print(line, file=sys.stderr))
    tokenizer = Tokenizer.load(base)
    model = load(config, how, device, base)
    need = disk_needed(Lora(model, config.lora, 0), config.keep_last)
    checkpoint.check_room(config.out, need)
    steps = how.warmup_steps + how.steps
    with Stop() as stop:
        training = Training(
            config.out,
            {**asdict(config), **asdict(how)},
            steps,
            config.save_every,
            config.keep_last,
            stop,
            config.resume,
            config.overwrite,
            device,
        )
        training.log.note(f"{config.base} on {device}, {how}")
        lesson = Course(train, tokenizer, config.lesson, config.seed)
        kit = Kit(config, how, model, tokenizer, lesson, validation, training)
        styled = learn_style(kit)
        lora, before, after = learn_to_judge(kit, styled)
    folder = save_adapter(kit, base, lora, styled)
    print(f"\nbefore: {before.said()}\nafter:  {after.said()}\n")
    print(f"python judge.py --adapter {folder} --exemplar data/demo/zoe/1.txt --candidates ...")


def run(config: Config) -> int:
    """`main` with an exit code."""
    try:
        main(config)
    except InputError as error:
        print(f"train_sft.py: error: {error}", file=sys.stderr)
        return 2
    except Stopped as stopped:
        print("train_sft.py: stopped and saved; --resume goes on", file=sys.stderr)
        return 128 + stopped.number
    except KeyboardInterrupt:
        print(
            "train_sft.py: interrupted; --resume goes on from the last checkpoint", file=sys.stderr
        )
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(run(tyro.cli(Config, description=__doc__.split("How it works")[0])))
