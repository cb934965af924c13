"""Sharpen a judge by reinforcement: it writes judgements, and what was right becomes likelier.

    python train_rft.py                                  goes on from runs/sft, on the demo writers
    python train_rft.py --pairs train.jsonl --adapter runs/mine/adapter --out runs/better
    python train_rft.py --out runs/better --resume ...   go on after an interruption

A step of GRPO takes a pair of texts and its twin (the same texts, the other writer's exemplars),
and runs through five stations, all of which are on one screen below (`learn`):

    draw      G free replies to each of the four prompts, every prompt computed once (rollout.py)
    reward    form, right order, twin, faithfulness, calibration, length (rewards.py)
    compare   a reply's advantage is how far it is above its group (grpo.py)
    train     all replies of a pair in one tree: P + G · R rows, gradients through the shared prompt
    step      one update of the adapter; the base never changes

RUN/adapter is the result, as train_sft.py leaves it. RUN/metrics.jsonl has every number,
RUN/replies the groups with their rewards part by part.

How it works. The model that draws is the model that learns: the same weights, the same adapter, no
second engine whose numbers differ. What still differs by rounding, since a cache is not a packed
tree, is measured at every step: `gap` is the mean distance of the two log-probabilities of a token.
Groups in which no reply did better than another are left out of the training pass, which changes no
number. --reward.expected compares and learns all nine digits that a reply might have drawn.
--at-once judges some pairs without reasoning: replies of a digit, many pairs a step. What a step
draws follows from the seed, its number and the adapter: on a CPU, a resumed run makes bit for bit
the numbers of one that never stopped. What we left out: several GPUs, a critic, a KL to a
reference, several passes over the same replies, a curriculum."""

import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import tyro

from nanopersrm import InputError
from nanopersrm.command import exit_code
from nanopersrm.model.base import DEFAULT_BASE, resolve
from nanopersrm.model.lora import Lora, LoraConfig
from nanopersrm.model.tokenizer import Tokenizer
from nanopersrm.model.transformer import Model, ModelConfig
from nanopersrm.model.weights import device_of
from nanopersrm.pairs import digest, read
from nanopersrm.style.similarity import StyleEvidenceFn
from nanopersrm.train import packing, setup
from nanopersrm.train.grpo import (
    GrpoConfig,
    LossStatistics,
    ScoreDigits,
    advantages,
    digit_loss,
    digits_in,
    expected_advantages,
    informative,
    policy_loss,
    statistics,
    token_weights,
)
from nanopersrm.train.objective import reply_log_probs
from nanopersrm.train.optim import OptimConfig, learning_rate
from nanopersrm.train.presets import Preset
from nanopersrm.train.rewards import PARTS, RewardConfig, reward
from nanopersrm.train.rollout import (
    PairOrder,
    Rollout,
    RolloutConfig,
    RolloutGroup,
    collect,
    metrics,
    next_groups,
    page,
    sampler_log_probs,
    score_digits,
    trees,
)
from nanopersrm.train.run import Learner, Run, check_numbers, check_out, memory_guard, save_final
from nanopersrm.train.sft_data import ExamplesConfig, authors_by_exemplars, split_pairs
from nanopersrm.train.validation import Metrics, ValidationSet

import torch  # isort: skip  (after nanopersrm, which settles threads and memory)

from data.build import demo_pairs

SFT = Path("runs/sft/adapter")  # what train_sft.py leaves without arguments
TEACH_FORM = "no reply is well formed, teach the form first with train_sft.py"


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
    plans: int | None = None  # pairs with their twins a step
    at_once: int | None = None  # so many of them without reasoning, each in a third of the time
    group: int | None = None  # replies to each prompt
    rows: int | None = None  # replies drawn side by side, at most
    cache_mb: int | None = None  # keys and values while drawing: lower it when memory runs out
    reply: int | None = None  # tokens of a reply, at most
    budget: int | None = None  # packed tokens in a micro-batch: lower it when training runs out
    dtype: Literal["auto", "bf16", "fp16", "fp32"] | None = None  # fp16 with loss scaling
    nf4: bool | None = None  # the matrices of the base in 4 bits
    recompute: bool | None = None  # compute each block again in its backward: less memory
    temperature: float = 1.0  # of drawing
    longest: int = 2048  # tokens of prompt and reply; longer pairs are left out
    eval_every: int = 50  # steps between validations; 0: before and after only
    eval_pairs: int = 40  # validation pairs, judged at once
    reason_pairs: int = 12  # of them judged after reasoning as well
    save_every: int = 5  # steps between checkpoints
    keep_last: int = 2  # checkpoints to keep, beside the best
    optim: OptimConfig = field(default_factory=lambda: OptimConfig(lr=3e-4))  # 7B: 2e-5
    reward: RewardConfig = field(default_factory=RewardConfig)
    grpo: GrpoConfig = field(default_factory=GrpoConfig)


@dataclass(frozen=True)
class Comparison:
    """The S replies of a step against their groups, Q of them."""

    digits: ScoreDigits  # what each reply would have earned with another digit
    advantages: torch.Tensor  # (S,)
    by_digit: torch.Tensor  # (S, 9) of the digits that each might have had
    weights: torch.Tensor  # (S,) of each token of a reply
    informative: torch.Tensor  # (Q,) bool: some reply did better than another


def compare(groups: Sequence[RolloutGroup], config: Config, rollout: RolloutConfig) -> Comparison:
    """How far each reply is above its group."""
    rollouts = [one for group in groups for one in group.rollouts]
    Q, sizes = len(groups), torch.tensor([len(group.rollouts) for group in groups])
    group_of = torch.repeat_interleave(torch.arange(Q), sizes)  # (S,)
    digits = score_digits(rollouts)
    if config.reward.expected:
        advantage, by_digit = expected_advantages(
            digits, group_of, Q, config.grpo.by_std, config.reward.entropy
        )
    else:
        parts = torch.tensor([[one.parts.get(name, 0.0) for name in PARTS] for one in rollouts])
        weights = torch.tensor(config.reward.weights)
        advantage = advantages(parts, weights, group_of, Q, config.grpo)
        by_digit = advantage[:, None].expand(-1, 9)
    lengths = torch.tensor([len(one.ids) for one in rollouts])
    weights = token_weights(lengths, rollout.most_tokens, config.grpo)
    kept = informative(by_digit.abs().amax(-1), group_of, Q)
    return Comparison(digits, advantage, by_digit, weights, kept)


def batch_loss(
    model: Model,
    tokenizer: Tokenizer,
    batch: packing.Batch,
    rollouts: Sequence[Rollout],
    comparison: Comparison,
    config: Config,
    preset: Preset,
) -> tuple[torch.Tensor, LossStatistics]:
    """One micro-batch's share of the step's loss (), and its statistics."""
    tokens, replies = digits_in(batch.owners, comparison.digits)  # (n,) each
    log_probs, entropy, nine = reply_log_probs(
        model, batch, preset, config.temperature, tokenizer.digit_ids, tokens
    )  # (M,), (M,), (n, 9)
    weights = comparison.weights.to(model.device)
    loss, measured = policy_loss(
        log_probs,
        batch.owners,
        comparison.advantages.to(model.device),
        weights,
        config.grpo,
        sampler=sampler_log_probs(rollouts, batch.owners),
        entropy=entropy,
    )
    loss = loss + digit_loss(
        nine, replies, comparison.by_digit, weights, comparison.digits, config.grpo
    )
    return loss, measured


def train(
    config: Config,
    preset: Preset,
    rollout: RolloutConfig,
    model: Model,
    tokenizer: Tokenizer,
    lora: Lora,
    order: PairOrder,
    style_evidence: StyleEvidenceFn | None,
    run: Run,
    validation: ValidationSet,
) -> list[Metrics]:
    """All steps. The metrics of all validations."""
    learner, steps = Learner(run, "rft", model, lora, config.optim), preset.rft_steps
    facts: dict[str, Any] = {"validation": []}
    if run.resumed is not None:
        facts["validation"] = run.resumed["validation"]
        order.place = run.resumed["place"]
    else:
        validated, text = validation.evaluate(model, preset)
        run.write_replies(0, text)
        run.note(f"before: {validated.summary()}")
        facts["validation"].append(asdict(validated))
    run.start_clock()
    for step in range(learner.first_step, steps):
        started = time.perf_counter()
        # draw
        drawn = collect(model, tokenizer, order, rollout, style_evidence, step)
        drawing_done = time.perf_counter()
        # reward
        for pair_groups in drawn:
            reward(pair_groups, config.reward)
        # compare
        groups = [group for pair_groups in drawn for group in pair_groups]
        rollouts = [one for group in groups for one in group.rollouts]
        comparison = compare(groups, config, rollout)
        # train
        kept = trees(groups, comparison.informative.tolist(), preset.budget)
        measured = []
        for micro in packing.pack(kept, preset.budget):
            batch = packing.batch(micro, model.device)
            loss, seen = batch_loss(model, tokenizer, batch, rollouts, comparison, config, preset)
            learner.backward(loss, batch.names)
            measured.append(seen)
        # step
        rate = learning_rate(step, steps, config.optim)
        norm = learner.update(rate)

        numbers = metrics(groups) | {
            "groups_drawn": len(groups),
            "groups_flat": len(groups) - int(comparison.informative.sum()),
            "gap_mean": 0.0,
            **statistics(measured),
            "lr": rate,
            "gradient_norm": norm,
            "seconds_drawing": drawing_done - started,
            "seconds_training": time.perf_counter() - drawing_done,
        }
        run.stop_clock()
        if not kept:
            advice = "raise --group or --temperature" if numbers["formed"] else TEACH_FORM
            run.note(f"step {step + 1} taught nothing, all groups are flat: {advice}")
        text = page(groups)
        if step + 1 == steps or (config.eval_every and (step + 1) % config.eval_every == 0):
            validated, replies = validation.evaluate(model, preset)
            run.note(f"after {step + 1} steps: {validated.summary()}")
            facts["validation"].append(asdict(validated))
            numbers |= validated.numbers()
            facts["score"] = validated.accuracy if validated.pairs else None
            text += f"\n\nThe validation after this step\n\n{replies}"
        run.write_replies(step + 1, text)
        facts["place"] = order.place
        tokens = sum(len(one.ids) for one in rollouts) + sum(tree.tokens for tree in kept)
        run.finish_step(step + 1, learner, numbers, tokens, facts)
        facts["score"] = None
    return [Metrics(**record) for record in facts["validation"]]


def main(config: Config) -> None:
    """Read, draw and learn, save, and say what came of it."""
    check_numbers(config, {"steps": 1, "eval_every": 0, "eval_pairs": 0, "reason_pairs": 0})
    check_out(config.out, config.resume, config.overwrite)
    tiny = setup.is_random(config.preset, config.base)
    folder, made = None, None
    if config.adapter is not None or not tiny:
        folder, made = setup.require_adapter(config.adapter, SFT, config.base)
        config = replace(config, **setup.defaults_from(made, config.base, config.nf4, config.dtype))
    if made is not None and made.form == "pairwise":
        raise InputError(f"{folder}: expected a pointwise judge, its form is pairwise")
    check_expected(config)
    device = device_of(config.device)
    flags = asdict(config) | {"rft_steps": config.steps, "steps": None}
    preset = setup.preset_of(config.preset, device, flags)
    eight_bit = config.optim.eight_bit or preset.eight_bit
    config = replace(config, optim=replace(config.optim, eight_bit=eight_bit))

    train_pairs, held_out = split_pairs(
        demo_pairs(config.seed) if config.pairs is None else read(config.pairs),
        config.validation,
        config.seed,
    )
    order = PairOrder(train_pairs, config.seed)
    base = resolve(config.base, lambda line: print(line, file=sys.stderr))
    tokenizer = Tokenizer.load(base)
    if note := setup.check_base(made, folder, base, tiny):
        print(note, file=sys.stderr)
    sizes = ModelConfig.of(base.config)
    config = replace(config, longest=min(config.longest, sizes.context))
    rollout = RolloutConfig(
        plans=preset.plans,
        at_once=preset.at_once,
        group=preset.group,
        rows=preset.rows,
        reply=preset.reply,
        temperature=config.temperature,
        cache_mb=preset.cache_mb,
        longest=config.longest,
        evidence=made is None or made.evidence,
        seed=config.seed,
    )
    model = setup.load_model(base, preset, device, config.seed, tiny)
    if folder is None:
        lora = Lora(model, LoraConfig(), config.seed)
    else:
        lora = setup.load_adapter(folder, model, LoraConfig())
    style, style_evidence = setup.load_style(
        folder, made, model, tokenizer, authors_by_exemplars(train_pairs)
    )
    next_groups(order, tokenizer, rollout, style_evidence)  # raises where all are too long
    order.place = 0
    examples = ExamplesConfig(evidence=rollout.evidence, longest=config.longest)
    validation = ValidationSet(
        held_out[: config.eval_pairs],
        tokenizer,
        examples,
        config.seed,
        style_evidence,
        reasoned=config.reason_pairs,
    )
    torch.manual_seed(config.seed)
    settings = asdict(config) | asdict(preset) | {"texts": digest([*train_pairs, *held_out])}
    with Run(config, settings, preset.rft_steps, device) as run:
        run.note(
            f"{config.base} with {folder or 'a new adapter'} on {device}, "
            f"{'NF4 and ' * preset.nf4}{model.norm.weight.dtype}; {len(train_pairs):,} pairs to "
            f"train on, {len(held_out):,} to validate on; {preset.rft_steps} steps of "
            f"{rollout.plans} x 2 pairs x 2 prompts x {rollout.group} replies, {rollout.at_once} "
            f"of {rollout.plans} at once"
        )
        advice = (
            f"lower --rows (now {rollout.rows}), --cache-mb (now {rollout.cache_mb}) or --budget "
            f"(now {preset.budget}), or --recompute True"
        )
        with memory_guard(advice):
            history = train(
                config,
                preset,
                rollout,
                model,
                tokenizer,
                lora,
                order,
                style_evidence,
                run,
                validation,
            )
    shows_style = style_evidence is not None
    made = setup.adapter_settings(config.base, base, model, tiny, rollout.evidence, shows_style)
    best = save_final(run, "rft", made, lora, style)
    print(f"before: {history[0].summary()}\nafter:  {history[-1].summary()}\n{best}")
    print(setup.judge_command(config.out / "adapter", config.base, tiny))


def check_expected(config: Config) -> None:
    """Raise where an expectation over digits is asked for that cannot be had."""
    if config.reward.entropy and not config.reward.expected:
        raise InputError("--reward.entropy: only with --reward.expected are there nine digits")
    without = {"gdpo": "compares part by part", "gspo": "has one ratio for a whole reply"}
    if config.reward.expected and config.grpo.variant in without:
        why = f"{config.grpo.variant} {without[config.grpo.variant]}"
        raise InputError(f"--reward.expected: {why}, choose another --grpo.variant")


def run(config: Config) -> int:
    """`main` with an exit code."""
    interrupted = "interrupted; --resume goes on from the last checkpoint"
    return exit_code("train_rft.py", lambda: main(config), interrupted)


if __name__ == "__main__":
    sys.exit(run(tyro.cli(Config, description=__doc__.split("How it works")[0])))
