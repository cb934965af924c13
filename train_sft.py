"""Teach a base to judge, by imitation and by contrast.

    python train_sft.py                                  the demo writers, a first try
    python train_sft.py --pairs train.jsonl --out mine   your own pairs, see docs/data.md
    python train_sft.py --adapter default --pairs ...    from the judge that comes with the base on
    python train_sft.py --out mine --resume ...          go on after an interruption

Two small adapters learn three things, beside a base that stays as it is:

    style      first, texts of one writer are pulled together, those of others pushed apart
               (nanopersrm/style/similarity.py). Then this adapter is frozen: from now on it
               measures how alike two texts are, which stands in the prompts as evidence.
    imitation  replies whose claims are true (nanopersrm/train/replies.py): the form, and the habit
               of giving reasons
    contrast   among candidates by several writers the score line must favour the right one
               (nanopersrm/train/objective.py): the judgement

RUN/adapter is the result, in PEFT's format, RUN/best what judged better after an earlier step; the
rest of the folder is in nanopersrm/train/run.py.

How it works. Pairs become trees of tokens (nanopersrm/train/sft_data.py), trees are packed without
padding (packing.py), and one forward gives all losses of a tree (objective.py). How a step is
computed is a matter of --preset (presets.py); without one, the machine decides. The learning rate
is for SmolLM2-135M; a base of 7 billion weights wants about a tenth of it (--optim.lr 2e-4), and so
does an --adapter.
"""

import math
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import tyro

from data.build import demo_pairs
from nanopersrm.command import exit_code
from nanopersrm.judge.adapter_settings import fingerprint
from nanopersrm.model.base import DEFAULT_BASE, resolve
from nanopersrm.model.lora import Lora, LoraConfig
from nanopersrm.model.tokenizer import Tokenizer
from nanopersrm.model.transformer import Model, ModelConfig
from nanopersrm.model.weights import device_of
from nanopersrm.pairs import digest, read
from nanopersrm.style import similarity
from nanopersrm.style.similarity import Style, StyleConfig
from nanopersrm.train import packing, setup
from nanopersrm.train.objective import SftWeights, loss_sums
from nanopersrm.train.optim import OptimConfig, learning_rate
from nanopersrm.train.packing import PrefixTree
from nanopersrm.train.presets import Preset, check_numbers, memory_note
from nanopersrm.train.run import Learner, Run, check_out, memory_guard, save_final
from nanopersrm.train.sft_data import ExamplesConfig, SftData, split_pairs
from nanopersrm.train.validation import Metrics, ValidationSet


@dataclass(frozen=True)
class Config:
    """Teach a base to judge: style, imitation, contrast."""

    pairs: Path | None = None  # .jsonl of data.build; default: pairs of the demo writers
    validation: Path | None = None  # pairs to validate on; default: a tenth of the writers
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
    batch_pairs: int | None = None  # pairs a step
    budget: int | None = None  # packed tokens in a micro-batch: lower it when memory runs out
    dtype: Literal["auto", "bf16", "fp16", "fp32"] | None = None  # fp16 with loss scaling
    nf4: bool | None = None  # the matrices of the base in 4 bits
    recompute: bool | None = None  # compute each block again in its backward: less memory
    style_from: Path | None = None  # a style adapter to use as it is; default: that in --adapter
    fused: int = 1000  # pairs on which all instruments are weighed into a chance to show; 0: no
    writers: int = 16  # a step of style, of one domain where it has so many
    eval_every: int = 50  # steps between validations; 0: before and after only
    eval_pairs: int = 40  # validation pairs
    save_every: int = 10  # steps between checkpoints
    keep_last: int = 2  # checkpoints to keep, beside the best
    lora: LoraConfig = field(default_factory=LoraConfig)  # of a new adapter
    optim: OptimConfig = field(default_factory=lambda: OptimConfig(lr=2e-3))  # 7B: 2e-4
    style: StyleConfig = field(default_factory=StyleConfig)
    examples: ExamplesConfig = field(default_factory=ExamplesConfig)
    weight: SftWeights = field(default_factory=SftWeights)


def learn_style(
    config: Config, preset: Preset, model: Model, data: SftData, run: Run, style_from: Path | None
) -> Style:
    """The first loop: contrast of pooled states among the writers of a step."""
    if style_from is not None:
        style = Style.load(style_from, model)
    else:
        lora = similarity.adapter(model, config.lora, config.style, config.seed)
        style = Style(model, lora, config.style)
    if run.resumed is not None and not run.resumed_in("style"):  # it has been learned
        style.lora.load_tensors(run.resumed["adapters"]["style"])
        style.lora.freeze()
        return style.measured(run.resumed["style"])
    if style_from is None:
        texts = data.usual_texts()
        style.standardise(texts)
        learner = Learner(run, "style", model, style.lora, config.optim)
        run.start_clock()
        for step in range(learner.first_step, preset.warmup_steps):
            batch = data.style_batch(step, config.writers, config.style.tokens)
            with memory_guard("lower --writers or --style.tokens, or give --recompute True"):
                drawn = (batch.exemplars, batch.candidates, batch.negatives)
                loss, accuracy = similarity.batch_loss(
                    model, *drawn, config.style, style.standard, preset.recompute
                )
                learner.backward(loss, batch.authors)
            lr = learning_rate(step, preset.warmup_steps, config.optim)
            numbers = {"loss_style": float(loss.detach()), "accuracy": float(accuracy), "lr": lr}
            numbers["gradient_norm"] = learner.update(lr)
            run.finish_step(step + 1, learner, numbers, batch.tokens)
        style.lora.off(model)
        style.lora.freeze()
        run.note("style: measuring how alike strangers are")
        style.standardise(texts)
        style.quantiles = similarity.strangers_quantiles(data.stranger_similarities(style))
    data.fit_fusion(style, config.fused, run)
    return style


def learn_to_judge(
    config: Config,
    preset: Preset,
    learner: Learner,
    data: SftData,
    style: Style,
    validation: ValidationSet,
) -> list[Metrics]:
    """The second loop: imitation and contrast. The metrics of all validations."""
    run, history = learner.run, list[dict[str, Any]]()
    facts: dict[str, Any] = {"style": style.facts(), "validation": history, "score": None}

    def validate(step: int) -> Metrics:
        metrics, page = validation.evaluate(learner.model, preset)
        run.write_replies(preset.warmup_steps + step, page)
        run.note(f"after {step} steps: {metrics.summary()}")
        history.append(asdict(metrics))
        return metrics

    if run.resumed is not None and run.resumed_in("judge"):
        history += run.resumed["validation"]
    else:
        validate(0)
    run.start_clock()
    for step in range(learner.first_step, preset.steps):
        trees = data.trees(step, preset.batch_pairs)
        with memory_guard(f"lower --budget (now {preset.budget}) or give --recompute True"):
            numbers = gradient(config, preset, learner, data, trees)
        lr = learning_rate(step, preset.steps, config.optim)
        numbers |= {"gradient_norm": learner.update(lr), "lr": lr}
        done, facts["score"] = step + 1, None
        if done == preset.steps or (config.eval_every and done % config.eval_every == 0):
            metrics = validate(done)
            numbers |= metrics.numbers()
            facts["score"] = metrics.accuracy if metrics.pairs else None
        tokens = sum(tree.tokens for tree in trees)
        number = preset.warmup_steps + done
        run.finish_step(number, learner, numbers, tokens, facts, {"style": style.lora})
    return [Metrics(**record) for record in history]


def gradient(
    config: Config, preset: Preset, learner: Learner, data: SftData, trees: Sequence[PrefixTree]
) -> dict[str, float]:
    """The gradient of a step, micro-batch by micro-batch; its losses."""
    names = ("loss_imitation", "loss_contrast", "right")
    numbers = dict.fromkeys(names, 0.0 if trees else math.nan)
    reply_weight, list_weight = packing.total_weights(trees)
    for micro in packing.pack(trees, preset.budget):
        batch = packing.batch(micro, learner.model.device)
        sums = loss_sums(learner.model, batch, data.tokenizer.digit_ids, config.weight, preset)
        learner.backward(sums.imitation / reply_weight + sums.contrast / list_weight, batch.names)
        numbers["loss_imitation"] += float(sums.imitation.detach()) / reply_weight
        numbers["loss_contrast"] += float(sums.contrast.detach()) / list_weight
        numbers["right"] += float(sums.right.sum()) / len(trees)
    return numbers


def main(config: Config) -> None:
    """Set up, learn style, learn to judge, save."""
    check_numbers(vars(config), {"eval_every": 0, "eval_pairs": 0, "writers": 2, "fused": 0})
    check_out(config.out, config.resume, config.overwrite)
    folder, settings = setup.find_adapter(config.adapter, config.base)
    config = replace(config, **setup.defaults_from(settings, config.base, config.nf4, config.dtype))
    style_from = setup.style_folder(config.style_from, folder, settings)
    device = device_of(config.device)
    preset = setup.preset_of(config.preset, device, asdict(config))
    preset = replace(preset, warmup_steps=0 if style_from is not None else preset.warmup_steps)
    base = resolve(config.base, lambda line: print(line, file=sys.stderr))
    tiny = setup.is_random(config.preset, config.base)
    notes = [setup.check_base(settings, folder, base, tiny)]
    if settings is not None:
        notes += settings.differences(config.examples.evidence, "pointwise")
    if folder is not None and not config.resume and config.optim.lr >= Config().optim.lr:
        notes.append(f"{folder} has learned already: a tenth of --optim.lr may be enough")
    for note in filter(None, notes):
        print(note, file=sys.stderr)

    pairs = demo_pairs(config.seed) if config.pairs is None else read(config.pairs)
    train, held_out = split_pairs(pairs, config.validation, config.seed)
    longest = min(config.examples.longest, ModelConfig.of(base.config).context)
    examples = replace(config.examples, longest=longest)
    tokenizer = Tokenizer.load(base)
    data = SftData(train, tokenizer, examples, config.seed)
    model = setup.load_model(base, preset, device, config.seed, tiny)
    lora = None if folder is None else setup.load_adapter(folder, model, config.lora)
    optim = replace(config.optim, eight_bit=config.optim.eight_bit or preset.eight_bit)
    config = replace(
        config, lora=lora.config if lora else config.lora, optim=optim, examples=examples
    )
    adapters = [fingerprint(path) for path in (folder, style_from) if path is not None]
    texts = digest([*train, *held_out])
    resolved = asdict(config) | asdict(preset) | {"texts": texts, "adapters": adapters}
    with Run(config, resolved, preset.warmup_steps + preset.steps, device) as run:
        run.note(
            f"{config.base} with {folder or 'a new adapter'} on {device}, "
            f"{'NF4 and ' * preset.nf4}{model.norm.weight.dtype}; {len(train):,} pairs to train "
            f"on, {len(held_out):,} to validate on; steps: {preset.warmup_steps} of style, "
            f"{preset.steps} of {preset.batch_pairs} pairs"
        )
        run.note(memory_note(model.config, config.lora.rank, preset, model.norm.weight.itemsize))
        style = learn_style(config, preset, model, data, run, style_from)
        data.show(style)
        lora = lora or Lora(model, config.lora, config.seed + 1)
        learner = Learner(run, "judge", model, lora, config.optim)
        validation = ValidationSet(
            held_out[: config.eval_pairs], tokenizer, examples, config.seed, data.style_evidence
        )
        history = learn_to_judge(config, preset, learner, data, style, validation)

    evidence = examples.evidence
    settings = setup.adapter_settings(config.base, base, model, tiny, evidence, evidence)
    best = save_final(run, "judge", settings, lora, style)
    if data.left_out:
        print(f"left out: {data.left_out} pairs longer than --examples.longest {longest}")
    print(f"\nbefore: {history[0].summary()}\nafter:  {history[-1].summary()}\n{best}")
    print(setup.judge_command(config.out / "adapter", config.base, tiny))


def run(config: Config) -> int:
    """`main` with an exit code."""
    ended = "interrupted; --resume goes on from the last checkpoint"
    return exit_code("train_sft.py", lambda: main(config), ended)


if __name__ == "__main__":
    sys.exit(run(tyro.cli(Config, description=__doc__.split("How it works")[0])))
