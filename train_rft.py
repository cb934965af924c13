"""Sharpen a judge by reinforcement: it chooses evidence, and what was right becomes likelier.

    python train_rft.py                                  goes on from runs/sft, on the demo writers
    python train_rft.py --pairs train.jsonl --adapter runs/mine/adapter --out runs/better
    python train_rft.py --out runs/better --resume ...   go on after an interruption

A step of GRPO takes a pair of texts and its twin (the same texts, the other writer's exemplars):

    draw      G replies to each of the four prompts, every prompt computed once (rollout.py): the
              model chooses which evidence to look at, and the digit; the rest is filled in
    reward    right order, twin, calibration, few lines (rewards.py)
    compare   a reply's advantage is how far it is above its group (rewards.py, grpo.py)
    train     all replies of a pair in one tree, gradients through the shared prompt; only what was
              drawn is trained, out of what could be drawn: no softmax over the vocabulary
    step      one update of the adapter; the base never changes

How it works. The model that draws is the model that learns. A cache and a packed tree still round
differently; `gap_mean` is the mean distance of the two log-probabilities of a token. What a step
draws follows from the seed, its number and the adapter, so a resumed run makes on a CPU bit for bit
the numbers of one that never stopped. What we left out: several GPUs, a critic, a KL to a
reference, several passes over the same replies, a curriculum.
"""

import sys
import time
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Literal

import tyro

from nanopersrm import InputError
from nanopersrm.command import exit_code
from nanopersrm.judge.adapter_settings import fingerprint
from nanopersrm.judge.reply import choice_ids
from nanopersrm.model.base import DEFAULT_BASE, resolve
from nanopersrm.model.lora import Lora, LoraConfig
from nanopersrm.model.tokenizer import Tokenizer
from nanopersrm.model.transformer import ModelConfig
from nanopersrm.model.weights import device_of
from nanopersrm.pairs import digest, read
from nanopersrm.train import packing, setup
from nanopersrm.train.grpo import GrpoConfig, digit_loss, digits_in, policy_loss, statistics
from nanopersrm.train.objective import drawn_log_probs
from nanopersrm.train.optim import OptimConfig, learning_rate
from nanopersrm.train.presets import Preset, check_numbers
from nanopersrm.train.rewards import RewardConfig, check_expected, compare, reward
from nanopersrm.train.rollout import (
    Collector,
    RolloutConfig,
    metrics,
    page,
    sampler_log_probs,
    trees,
)
from nanopersrm.train.run import Learner, Run, check_out, memory_guard, save_final
from nanopersrm.train.sft_data import split_pairs
from nanopersrm.train.validation import Metrics, ValidationSet

import torch  # isort: skip  (after nanopersrm, which settles threads and memory)

from data.build import demo_pairs

SFT = Path("runs/sft/adapter")  # what train_sft.py leaves without arguments


@dataclass(frozen=True)
class Config:
    """Sharpen a judge by reinforcement."""

    pairs: Path | None = None  # .jsonl of data.build; default: pairs of the demo writers
    validation: Path | None = None  # pairs to validate on; default: a tenth of the writers
    adapter: str | None = None  # else runs/sft/adapter, or "default", which comes with the base
    out: Path = Path("runs/rft")  # folder of the run
    resume: bool = False  # go on from the last checkpoint in --out
    overwrite: bool = False  # throw an earlier run in --out away
    # tiny: a toy that shows that all runs, in seconds; default: this machine's
    preset: Literal["tiny", "cpu", "24gb", "12gb", "8gb"] | None = None
    base: str = DEFAULT_BASE  # default: the one that the adapter was trained on
    device: str = "auto"  # auto, cpu, cuda, cuda:N
    seed: int = 0  # same seed, same run
    # The preset has a value for each of those whose default is None:
    steps: int | None = None  # of reinforcement
    twin_pairs: int | None = None  # pairs with their twins a step
    group: int | None = None  # replies to each prompt
    rows: int | None = None  # replies drawn side by side, at most
    cache_mb: int | None = None  # keys and values while drawing: lower it when memory runs out
    budget: int | None = None  # packed tokens in a micro-batch: lower it when training runs out
    dtype: Literal["auto", "bf16", "fp16", "fp32"] | None = None  # fp16 with loss scaling
    nf4: bool | None = None  # the matrices of the base in 4 bits
    recompute: bool | None = None  # compute each block again in its backward: less memory
    think_lines: int = 8  # lines of evidence in a reply, at most
    think_tokens: int = 160  # tokens of a reply in free prose, at most
    temperature: float = 1.0  # of drawing
    longest: int = 2048  # tokens of prompt and reply; longer pairs are left out
    eval_every: int = 50  # steps between validations; 0: before and after only
    eval_pairs: int = 40  # validation pairs
    save_every: int = 5  # steps between checkpoints
    keep_last: int = 2  # checkpoints to keep, beside the best
    optim: OptimConfig = field(default_factory=lambda: OptimConfig(lr=3e-4))  # 7B: 2e-5
    reward: RewardConfig = field(default_factory=RewardConfig)
    grpo: GrpoConfig = field(default_factory=GrpoConfig)


def train(
    config: Config,
    preset: Preset,
    learner: Learner,
    collector: Collector,
    validation: ValidationSet,
) -> list[Metrics]:
    """All steps. The metrics of all validations."""
    run, model, history = learner.run, learner.model, list[dict[str, Any]]()
    choices = choice_ids(collector.tokenizer).all

    def validate(step: int) -> tuple[Metrics, str]:
        result, replies = validation.evaluate(model, preset)
        run.note(f"after {step} steps: {result.summary()}")
        history.append(asdict(result))
        return result, replies

    if run.resumed is not None:
        history += run.resumed["validation"]
        collector.pairs_seen = run.resumed["pairs_seen"]
    else:
        run.write_replies(0, validate(0)[1])
    run.start_clock()
    for step in range(learner.first_step, preset.rft_steps):
        started = time.perf_counter()
        # draw
        drawn = collector.collect(step)
        groups = [group for about_pair in drawn for group in about_pair]
        rollouts = [rollout for group in groups for rollout in group.rollouts]
        drawing_done = time.perf_counter()
        # reward
        for about_pair in drawn:
            reward(about_pair, config.reward, config.think_lines)
        # compare
        most = collector.config.most_choices
        comparison = compare(groups, most, config.reward, config.grpo, model.device)
        # train
        kept = trees(groups, comparison.informative.tolist(), preset.budget)
        measured = []
        for micro in packing.pack(kept, preset.budget):
            batch = packing.batch(micro, choices, model.device)
            log_probs, entropy, table = drawn_log_probs(model, batch, preset, config.temperature)
            digits, replies = digits_in(batch.owners)
            lines = torch.ones_like(batch.owners, dtype=torch.bool)
            lines[digits] = not config.reward.expected  # else all nine of a digit are learned below
            loss, batch_statistics = policy_loss(
                log_probs[lines],
                batch.owners[lines],
                comparison.advantages,
                comparison.weights,
                config.grpo,
                sampler=sampler_log_probs(rollouts, batch.owners)[lines],
                entropy=entropy[lines],
            )
            if config.reward.expected:
                loss = loss + digit_loss(table[digits][:, -9:], replies, comparison, config.grpo)
            learner.backward(loss, batch.names)
            measured.append(batch_statistics)
        # step
        lr = learning_rate(step, preset.rft_steps, config.optim)
        norm = learner.update(lr)

        numbers = metrics(groups) | {
            "groups_drawn": len(groups),
            "groups_flat": len(groups) - int(comparison.informative.sum()),
            "gap_mean": 0.0,
            **statistics(measured),
            "lr": lr,
            "gradient_norm": norm,
            "seconds_drawing": drawing_done - started,
            "seconds_training": time.perf_counter() - drawing_done,
        }
        if not kept:
            run.note(f"step {step + 1} taught nothing, all groups are flat: raise --temperature")
        done, text, score = step + 1, page(groups, collector.tokenizer), None
        if done == preset.rft_steps or (config.eval_every and done % config.eval_every == 0):
            result, written = validate(done)
            numbers |= result.numbers()
            score = result.accuracy if result.pairs else None
            text += f"\n\nValidation after this step\n\n{written}"
        run.write_replies(done, text)
        facts = {"validation": history, "pairs_seen": collector.pairs_seen, "score": score}
        size = sum(len(rollout.reply.ids) for rollout in rollouts)
        size += sum(tree.tokens for tree in kept)
        run.finish_step(done, learner, numbers, size, facts)
    return [Metrics(**record) for record in history]


def main(config: Config) -> None:
    """Set up, train, save."""
    least = {"steps": 1, "group": 2, "eval_every": 0, "eval_pairs": 0}
    least |= {"think_lines": 1, "think_tokens": 1}
    check_numbers(vars(config), least)
    if not 0 < config.temperature < float("inf"):
        raise InputError(f"--temperature: expected a number above 0, got {config.temperature}")
    check_out(config.out, config.resume, config.overwrite)
    check_expected(config.reward, config.grpo)
    tiny = setup.is_random(config.preset, config.base)
    folder, settings = None, None
    if config.adapter is not None or not tiny:
        folder, settings = setup.require_adapter(config.adapter, SFT, config.base)
        config = replace(
            config, **setup.defaults_from(settings, config.base, config.nf4, config.dtype)
        )
    if settings is not None and settings.form == "pairwise":
        raise InputError(f"{folder}: expected a pointwise judge, its form is pairwise")
    device = device_of(config.device)
    flags = asdict(config) | {"rft_steps": config.steps, "steps": None}
    preset = setup.preset_of(config.preset, device, flags)
    optim = replace(config.optim, eight_bit=config.optim.eight_bit or preset.eight_bit)
    base = resolve(config.base, lambda line: print(line, file=sys.stderr))
    if note := setup.check_base(settings, folder, base, tiny):
        print(note, file=sys.stderr)
    longest = min(config.longest, ModelConfig.of(base.config).context)
    config = replace(config, optim=optim, longest=longest)
    free = settings is not None and settings.free
    values = asdict(config) | asdict(preset) | {"free": free}
    rollout = RolloutConfig(**{field.name: values[field.name] for field in fields(RolloutConfig)})
    pairs = demo_pairs(config.seed) if config.pairs is None else read(config.pairs)
    train_pairs, held_out = split_pairs(pairs, config.validation, config.seed)
    tokenizer = Tokenizer.load(base)
    model = setup.load_model(base, preset, device, config.seed, tiny)
    new = LoraConfig()
    lora = setup.load_adapter(folder, model, new) if folder else Lora(model, new, config.seed)
    measurer = setup.load_measurer(folder, model, tokenizer)
    collector = Collector(model, tokenizer, train_pairs, rollout, measurer)
    few, judging = held_out[: config.eval_pairs], replace(rollout.judging(1, 0), temperature=0.0)
    validation = ValidationSet(few, tokenizer, measurer, judging, longest)
    torch.manual_seed(config.seed)
    texts, adapter = digest([*train_pairs, *held_out]), fingerprint(folder) if folder else None
    resolved = asdict(config) | asdict(preset) | {"texts": texts, "adapter_sha256": adapter}
    lower = f"--rows ({preset.rows}), --cache-mb ({preset.cache_mb}) or --budget ({preset.budget})"
    advice = f"lower {lower}, or give --recompute True"
    with Run(config, resolved, preset.rft_steps, device) as run, memory_guard(advice):
        run.note(
            f"{config.base} with {folder or 'a new adapter'} on {device}, "
            f"{'NF4 and ' * preset.nf4}{model.norm.weight.dtype}; {len(train_pairs):,} pairs to "
            f"train on, {len(held_out):,} to validate on; {preset.rft_steps} steps of "
            f"{preset.twin_pairs} x 4 prompts x {preset.group} replies"
        )
        learner = Learner(run, "rft", model, lora, config.optim)
        history = train(config, preset, learner, collector, validation)

    settings = setup.adapter_settings(config.base, base, model, tiny, free)
    best = save_final(run, "rft", settings, lora, measurer)
    print(f"before: {history[0].summary()}\nafter:  {history[-1].summary()}\n{best}")
    print(setup.judge_command(config.out / "adapter", config.base, tiny))


def run(config: Config) -> int:
    """`main` with an exit code."""
    interrupted = "interrupted; --resume goes on from the last checkpoint"
    return exit_code("train_rft.py", lambda: main(config), interrupted)


if __name__ == "__main__":
    sys.exit(run(tyro.cli(Config, description=__doc__.split("How it works")[0])))
