"""Teach a base to judge, by imitation and by contrast.

    python train_sft.py                                  the demo writers, a first try
    python train_sft.py --pairs train.jsonl --out mine   your own pairs, see docs/data.md
    python train_sft.py --adapter default --pairs ...    from the judge that comes with the base on
    python train_sft.py --out mine --resume ...          go on after an interruption

Two small adapters learn, beside a base that stays as it is:

    reading    first, a writer's exemplars must make that writer's text likelier than texts by
               others (nanopersrm/train/contrast.py). Then this adapter is frozen: from now on it
               measures how much (nanopersrm/style/reading.py)
    evidence   what this and all other measurements are worth beside each other is weighed by a
               regression (nanopersrm/style/evidence.py)
    imitation  replies in which a teacher chooses lines of evidence, and a digit that follows from
               their sum (nanopersrm/train/sft_data.py)
    contrast   of two candidates, each after its lines, the right one must have the better digit
               (nanopersrm/train/objective.py)

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
from nanopersrm import InputError
from nanopersrm.command import exit_code
from nanopersrm.judge.adapter_settings import fingerprint
from nanopersrm.judge.judgement import JudgeConfig
from nanopersrm.judge.reply import choice_ids
from nanopersrm.model.base import DEFAULT_BASE, resolve
from nanopersrm.model.lora import Lora, LoraConfig, load_lora
from nanopersrm.model.tokenizer import Tokenizer
from nanopersrm.model.transformer import ModelConfig
from nanopersrm.model.weights import device_of
from nanopersrm.pairs import Pair, digest, read
from nanopersrm.style.evidence import SCHEMA, Evidence
from nanopersrm.style.ledger import Measurer
from nanopersrm.style.reading import Reading, ReadingConfig
from nanopersrm.train import contrast, packing, setup
from nanopersrm.train.contrast import WriterSource
from nanopersrm.train.objective import SftWeights, loss_sums
from nanopersrm.train.optim import OptimConfig, learning_rate
from nanopersrm.train.packing import PrefixTree
from nanopersrm.train.presets import Preset, check_numbers, memory_note
from nanopersrm.train.run import Learner, Run, check_out, memory_guard, save_final
from nanopersrm.train.sft_data import ExamplesConfig, SftData, split_pairs
from nanopersrm.train.validation import Metrics, ValidationSet, reading_shares


@dataclass(frozen=True)
class Config:
    """Teach a base to judge: reading, evidence, imitation, contrast."""

    pairs: Path | None = None  # .jsonl of data.build; default: pairs of the demo writers
    validation: Path | None = None  # pairs to validate on; default: a tenth of the writers
    # go on from this one, "default" is that of the base: its base, 4 bits and rank stay
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
    reading_steps: int | None = None  # of reading before
    batch_pairs: int | None = None  # pairs a step
    budget: int | None = None  # packed tokens in a micro-batch: lower it when memory runs out
    dtype: Literal["auto", "bf16", "fp16", "fp32"] | None = None  # fp16 with loss scaling
    nf4: bool | None = None  # the matrices of the base in 4 bits
    recompute: bool | None = None  # compute each block again in its backward: less memory
    # a folder reading/, default: that in --adapter; trained on with --reading-steps, else as it is
    reading_from: Path | None = None
    # validation pairs read to weigh reading beside other features; 0: none. What lies beside
    # the reading already is used as it is, where the reading is not trained on
    evidence_pairs: int = 200
    writers: int = 8  # a step of reading, of one domain where it has so many
    candidate_tokens: int = 112  # of each candidate in a step of reading
    reading_lr: float = 1e-3
    eval_every: int = 50  # steps between validations; 0: before and after only
    eval_pairs: int = 40  # validation pairs
    save_every: int = 10  # steps between checkpoints
    keep_last: int = 2  # checkpoints to keep, beside the best
    lora: LoraConfig = field(default_factory=LoraConfig)  # of a new adapter
    optim: OptimConfig = field(default_factory=lambda: OptimConfig(lr=2e-3))  # 7B: 2e-4
    reading: ReadingConfig = field(default_factory=ReadingConfig)
    examples: ExamplesConfig = field(default_factory=ExamplesConfig)
    weight: SftWeights = field(default_factory=SftWeights)


def learn_to_read(
    config: Config,
    preset: Preset,
    data: SftData,
    reading: Reading,
    held_out: Sequence[Pair],
    run: Run,
) -> None:
    """The first loop: writers of one domain, each of whom must find their own text."""
    model, lora, resumed = reading.model, reading.lora, run.resumed
    assert lora is not None, "there is no adapter to train"
    if resumed is not None and not run.resumed_in("reading"):  # it has been learned
        lora.load_tensors(resumed["adapters"]["reading"])
        lora.freeze()
        return
    source = WriterSource(
        data.pairs, reading.tokenizer, reading.config, config.candidate_tokens, config.seed
    )
    learner = Learner(run, "reading", model, lora, replace(config.optim, lr=config.reading_lr))
    if not learner.first_step:
        validation_of_reading(reading, held_out, run, 0)
    run.start_clock()
    for step in range(learner.first_step, preset.reading_steps):
        writers = source.writers(step, config.writers)
        with memory_guard("lower --budget, or give --recompute True"):
            loss, right, tokens = contrast.gradient(
                learner, writers, preset, reading.config.temperature
            )
        lr = learning_rate(step, preset.reading_steps, learner.config)
        numbers = {"loss_reading": loss, "accuracy": right, "lr": lr}
        numbers["gradient_norm"] = learner.update(lr)
        done = step + 1
        if done == preset.reading_steps or (config.eval_every and done % config.eval_every == 0):
            numbers |= validation_of_reading(reading, held_out, run, done)
        run.finish_step(done, learner, numbers, tokens)
    lora.off(model)
    lora.freeze()


def validation_of_reading(
    reading: Reading, pairs: Sequence[Pair], run: Run, step: int
) -> dict[str, float]:
    """How often reading alone is right about validation pairs, for the log."""
    shares = reading_shares(reading, pairs)
    if shares:
        listed = ", ".join(f"{share:.1%} of {name}" for name, share in shares.items())
        run.note(f"after {step} steps reading is right about {listed}")
    return {f"validation_{name}": share for name, share in shares.items()}


def learn_to_judge(
    config: Config,
    preset: Preset,
    learner: Learner,
    data: SftData,
    measurer: Measurer,
    validation: ValidationSet,
) -> list[Metrics]:
    """The second loop: imitation and contrast. The metrics of all validations."""
    run, history, reading = learner.run, list[dict[str, Any]](), measurer.reading
    assert reading is not None, "something reads"
    assert reading.lora is not None, "reading has an adapter"
    weighed = SCHEMA.dump_python(measurer.evidence, mode="json")
    facts: dict[str, Any] = {"evidence": weighed, "validation": history, "score": None}

    def validate(step: int) -> Metrics:
        metrics, page = validation.evaluate(learner.model, preset)
        run.write_replies(preset.reading_steps + step, page)
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
        number = preset.reading_steps + done
        run.finish_step(number, learner, numbers, tokens, facts, {"reading": reading.lora})
    return [Metrics(**record) for record in history]


def gradient(
    config: Config, preset: Preset, learner: Learner, data: SftData, trees: Sequence[PrefixTree]
) -> dict[str, float]:
    """The gradient of a step, micro-batch by micro-batch; its losses."""
    names = ("loss_imitation", "loss_contrast", "right")
    numbers = dict.fromkeys(names, 0.0 if trees else math.nan)
    reply_weight, list_weight = packing.total_weights(trees)
    choices = choice_ids(data.tokenizer).all
    for micro in packing.pack(trees, preset.budget):
        batch = packing.batch(micro, choices, learner.model.device)
        sums = loss_sums(learner.model, batch, config.weight, preset)
        learner.backward(sums.imitation / reply_weight + sums.contrast / list_weight, batch.names)
        numbers["loss_imitation"] += float(sums.imitation.detach()) / reply_weight
        numbers["loss_contrast"] += float(sums.contrast.detach()) / list_weight
        numbers["right"] += float(sums.right.sum()) / list_weight
    return numbers


def main(config: Config) -> None:
    """Set up, learn to read, learn to judge, save."""
    least = {
        "eval_every": 0,
        "eval_pairs": 0,
        "writers": 2,
        "candidate_tokens": 1,
        "evidence_pairs": 0,
    }
    check_numbers(vars(config), least)
    check_out(config.out, config.resume, config.overwrite)
    folder, settings = setup.find_adapter(config.adapter, config.base)
    config = replace(config, **setup.defaults_from(settings, config.base, config.nf4, config.dtype))
    reading_from = setup.reading_folder(config.reading_from, folder)
    device = device_of(config.device)
    preset = setup.preset_of(config.preset, device, asdict(config))
    if reading_from and config.reading_steps is None:
        preset = replace(preset, reading_steps=0)
    base = resolve(config.base, lambda line: print(line, file=sys.stderr))
    tiny = setup.is_random(config.preset, config.base)
    notes = [setup.check_base(settings, folder, base, tiny)]
    if settings is not None:
        notes += settings.differences("pointwise", config.examples.free)
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
    adapters = [fingerprint(path) for path in (folder, reading_from) if path is not None]
    texts = digest([*train, *held_out])
    resolved = asdict(config) | asdict(preset) | {"texts": texts, "adapters": adapters}
    with Run(config, resolved, preset.reading_steps + preset.steps, device) as run:
        run.note(
            f"{config.base} with {folder or 'a new adapter'} on {device}, "
            f"{'NF4 and ' * preset.nf4}{model.norm.weight.dtype}; {len(train):,} pairs to train "
            f"on, {len(held_out):,} to validate on; steps: {preset.reading_steps} of reading, "
            f"{preset.steps} of {preset.batch_pairs} pairs"
        )
        run.note(memory_note(model.config, config.lora.rank, preset, model.norm.weight.itemsize))
        if reading_from:
            reading = Reading.load(reading_from, model, tokenizer)
            if config.reading not in (ReadingConfig(), reading.config):
                raise InputError(f"--reading: {reading_from} has {reading.config}; leave it out")
        else:
            reader = Lora(model, config.lora, config.seed)
            reading = Reading(model, tokenizer, config.reading, reader)
        if preset.reading_steps:
            if reading_from:  # not frozen, as above
                reading = Reading(model, tokenizer, reading.config, load_lora(reading_from, model))
            learn_to_read(config, preset, data, reading, held_out[: config.eval_pairs], run)
        if run.resumed is not None and run.resumed_in("judge"):
            weighed = SCHEMA.validate_python(run.resumed["evidence"])
        elif reading_from and not preset.reading_steps and setup.has_evidence(reading_from.parent):
            weighed = Evidence.load(reading_from.parent)
            run.note("features: weighed before, beside the reading")
        else:
            weighed = data.weigh_features(reading, config.evidence_pairs, held_out, run)
        data.measurer = measurer = Measurer(weighed, reading)
        lora = lora or Lora(model, config.lora, config.seed + 1)
        learner = Learner(run, "judge", model, lora, config.optim)
        judging = JudgeConfig(think_lines=examples.think_lines, free=examples.free)
        few = held_out[: config.eval_pairs]
        validation = ValidationSet(few, tokenizer, measurer, judging, examples.longest)
        history = learn_to_judge(config, preset, learner, data, measurer, validation)

    settings = setup.adapter_settings(config.base, base, model, tiny, examples.free)
    best = save_final(run, "judge", settings, lora, measurer)
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
