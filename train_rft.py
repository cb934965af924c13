"""Sharpen a judge by reinforcement: it writes judgements, and what was right becomes likelier.

    python train_rft.py                                  goes on from runs/sft, on the demo writers
    python train_rft.py --pairs train.jsonl --adapter runs/mine/adapter --out runs/better
    python train_rft.py --out runs/better --resume ...   go on after an interruption

A step of GRPO takes a pair of texts and its twin (the same texts, the other writer's exemplars),
and runs through five stations, all of which are on one screen below (`learn`):

    draw      G free replies to each of the four prompts, every prompt computed once
    reward    form, right order, twin, faithfulness, calibration, length (nanopersrm/rewards.py)
    compare   a reply's advantage is how far it is above its group (nanopersrm/advantages.py)
    train     all replies of a pair in one tree: P + G · R rows, gradients through the shared prompt
    step      one update of the adapter; the base never changes

RUN/adapter is the result, as train_sft.py leaves it. RUN/metrics.jsonl has every number (`python -m
nanopersrm.report RUN` draws them), RUN/replies the groups with their rewards part by part.

How it works. The model that draws is the model that learns: the same weights, the same adapter, no
second engine whose numbers differ. What still differs by rounding, since a cache is not a packed
tree, is measured at every step before anything is clipped: `gap` is the mean distance of the two
log-probabilities of a token. Pairs come from easy to hard (data/curriculum.py). Groups in which no
reply did better than another are left out of the training pass, which changes no number; a plan
that has no other can be replaced (--resample). With --grpo.beta they stay, lest they drift from the
adapter as it came. --reward.expected compares and learns all nine digits that a reply might have
drawn (nanopersrm/expected.py). --at-once judges some couples without reasoning: replies of a digit,
many couples a step. The largest step is tried out first. What a step draws follows from the seed,
its number and the adapter: on a CPU, a resumed run makes bit for bit the numbers of one that never
stopped. What we left out: several GPUs, a critic.
"""

import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import tyro

from nanopersrm.command import exit_code
from nanopersrm.model.bases import DEFAULT_BASE, resolve
from nanopersrm.model.device import device_of
from nanopersrm.model.lora import Lora
from nanopersrm.model.tokenizer import Tokenizer
from nanopersrm.model.transformer import Model, ModelConfig
from nanopersrm.pairs import digest, read
from nanopersrm.train import checkpoint, ending, packing
from nanopersrm.train import setup as starting
from nanopersrm.train.advantages import informative
from nanopersrm.train.expected import check_expected, digit_loss, digits_in
from nanopersrm.train.grpo import GrpoConfig, policy_loss, statistics, token_weights
from nanopersrm.train.objective import reply_log_probs
from nanopersrm.train.optim import OptimConfig, learning_rate
from nanopersrm.train.presets import Preset, for_card, settled
from nanopersrm.train.report import read_metrics
from nanopersrm.train.rewards import RewardConfig
from nanopersrm.train.rollouts import RolloutConfig
from nanopersrm.train.runlog import Stop
from nanopersrm.train.training import (
    Learner,
    Training,
    check_folder,
    check_numbers,
    disk_needed,
    memory_guard,
)
from nanopersrm.train.trial import Trial

import torch  # isort: skip  (after nanopersrm, which settles threads and memory)

from data.build import demo_pairs
from nanopersrm.train import course
from nanopersrm.train.curriculum import Curriculum
from nanopersrm.train.exam import Exam
from nanopersrm.train.harvest import Harvest
from nanopersrm.train.lessons import LessonConfig
from nanopersrm.train.source import Source

SFT = Path("runs/sft/adapter")  # what train_sft.py leaves without arguments


@dataclass(frozen=True)
class Config:
    """Sharpen a judge by reinforcement."""

    pairs: Path | None = None  # .jsonl of data.build; default: pairs of the demo writers
    validation: Path | None = None  # pairs for the trials; default: a tenth of the writers
    adapter: str | None = None  # else runs/sft/adapter, or "default", which comes with the base
    out: Path = Path("runs/rft")  # folder of the run
    resume: bool = False  # go on from the last checkpoint in --out
    overwrite: bool = False  # throw an earlier run in --out away
    # tiny: a toy that shows that all runs, in seconds; default: this machine's
    preset: Literal["tiny", "cpu", "24gb", "12gb", "8gb"] | None = None
    base: str = DEFAULT_BASE  # default: the one that the adapter was trained on
    device: str = "auto"  # auto, cpu, cuda, cuda:N
    seed: int = 0  # same seed, same run
    form: Literal["pointwise", "pairwise"] | None = None  # default: as the adapter was trained
    # The preset has a value for each of those whose default is None:
    steps: int | None = None  # of reinforcement
    plans: int | None = None  # couples of a pair and its twin a step
    at_once: int | None = None  # so many of them without reasoning, each in a third of the time
    group: int | None = None  # replies to each prompt
    rows: int | None = None  # replies drawn side by side, at most
    cache_mb: int | None = None  # keys and values while drawing: lower it when memory runs out
    reply: int | None = None  # tokens of a reply, at most
    budget: int | None = None  # packed tokens in a micro-batch: lower it when training runs out
    dtype: Literal["auto", "bf16", "fp16", "fp32"] | None = None  # fp16 with loss scaling
    nf4: bool | None = None  # the matrices of the base in 4 bits
    recompute: bool | None = None  # compute each block again in its backward: less memory
    offload: bool | None = None  # keep what is kept of each block in host memory
    temperature: float = 1.0  # of drawing
    epochs: int = 1  # passes over the replies of a step
    group_by: Literal["prompt", "plan"] = "prompt"  # who is compared with whom
    resample: int = 0  # how often a plan in which nobody did better may be replaced
    window: int = 4  # couples looked at for each that is taken, easy ones first; 1: no curriculum
    longest: int = 2048  # tokens of prompt and reply; longer pairs are left out
    eval_every: int = 50  # steps between trials on validation pairs; 0: before and after only
    eval_pairs: int = 40  # validation pairs in a trial, judged at once
    reason_pairs: int = 12  # of them judged after reasoning as well
    save_every: int = 5  # steps between checkpoints
    keep_last: int = 2  # checkpoints to keep, beside the best
    optim: OptimConfig = field(default_factory=lambda: OptimConfig(lr=3e-4))  # 7B: 2e-5
    reward: RewardConfig = field(default_factory=RewardConfig)
    grpo: GrpoConfig = field(default_factory=GrpoConfig)


@dataclass
class Kit:
    """What the loop works with."""

    config: Config
    how: Preset
    model: Model
    curriculum: Curriculum
    draw: Callable[[int], Harvest]  # the replies of a step with their rewards
    reference: Lora | None  # the adapter as it came, where --grpo.beta asks for it
    digit_ids: Sequence[int]  # nine


def learn(kit: Kit, learner: Learner, step: int) -> tuple[Harvest, dict[str, float]]:
    """One step: draw, reward, compare, train, step."""
    config, how, model = kit.config, kit.how, kit.model
    begun, drawn = time.perf_counter(), kit.draw(step)  # replies and what each is worth
    trained_from = time.perf_counter()
    group, groups = drawn.groups(config.group_by)
    verdicts = drawn.verdicts()
    advantage, by_digit = drawn.advantages(config.reward, config.grpo, config.group_by)
    told = informative(by_digit.abs().amax(-1), group, groups)  # (Q,) some did better than others
    telling = told[group]  # (S,)
    trained = telling | (config.grpo.beta > 0)  # (S,)
    weight = token_weights(torch.tensor(drawn.lengths), drawn.longest(how.reply), config.grpo)
    advantage, weight = advantage.to(model.device), weight.to(model.device)
    micros = packing.pack(drawn.trees(trained.tolist(), how.budget), how.budget)
    before: list[tuple[torch.Tensor, ...]] = []  # what the first pass had, where there is a second
    seen = []
    rate, norm = learning_rate(step, how.rft_steps, config.optim), 0.0
    for epoch in range(config.epochs):
        for k, micro in enumerate(micros):
            batch = packing.batch(micro, model.device)
            places, replies = digits_in(batch.owners, verdicts)
            log_probs, entropy, nine = log_probs_of(kit, batch, places)
            given = log_probs, batch.owners, advantage, weight, config.grpo
            loss, measured = policy_loss(
                *given,
                old=before[k][0] if epoch else None,
                reference=referred(kit, batch) if config.grpo.beta else None,
                sampler=drawn.log_probs(batch.owners),
                entropy=entropy,
            )
            old = before[k][1] if epoch else None
            loss = loss + digit_loss(nine, replies, by_digit, weight, verdicts, config.grpo, old)
            learner.backward(loss, batch.names)
            seen.append(measured)
            before += [(log_probs.detach(), nine.detach())] * (config.epochs > 1 and not epoch)
        norm = max(norm, learner.update(rate, still=not bool(telling.any())))
    found = statistics(seen[: len(micros)])  # of the first pass: the policy that drew
    numbers = drawn.numbers(config.group_by) | {
        "flat": 1 - float(telling.float().mean()),
        "groups_drawn": groups,
        "groups_flat": groups - int(told.sum()),
        "gap": found.pop("gap_mean", 0.0),
        **found,
        "lr": rate,
        "gradient_norm": norm,
        "seconds_drawing": trained_from - begun,
        "seconds_training": time.perf_counter() - trained_from,
    }
    return drawn, numbers


def log_probs_of(kit: Kit, batch: packing.Batch, places: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """The log-probabilities (M,) of the replies at the temperature of drawing, their entropies (M,)
    and, of the nine digits at these places (n,), the log-probabilities among themselves (n, 9)."""
    return reply_log_probs(kit.model, batch, kit.how, kit.config.temperature, kit.digit_ids, places)


@torch.no_grad()
def referred(kit: Kit, batch: packing.Batch) -> torch.Tensor:
    """The log-probabilities (M,) of the adapter as it came."""
    assert kit.reference is not None, "a beta without a reference"
    with kit.reference.using(kit.model):
        return log_probs_of(kit, batch, batch.owners[:0])[0]


def rehearse(kit: Kit, learner: Learner, lora: Lora, source: Source) -> None:
    """The largest step that can come, first: memory runs out now or never. It leaves no trace."""
    config, how, device = kit.config, kit.how, kit.model.device
    asked = source.longest(how.plans)
    lower = f"--rows (now {how.rows}) or --cache-mb (now {how.cache_mb})"
    with memory_guard(f"drawing to the longest prompts; lower {lower}"):
        source.try_out(asked)
    batch = packing.batch(source.largest(asked, how.budget), device)
    lower = f"--budget (now {how.budget})"
    if len(batch.ids) > how.budget:  # one prompt and its reply
        lower = f"--longest (now {config.longest}) or --reply (now {how.reply})"
    advice = f"the largest micro-batch has {len(batch.ids)} tokens; lower {lower}"
    with memory_guard(advice + ("" if how.recompute else ", or give --recompute True")):
        held = learner.brace()
        with torch.random.fork_rng([device] if device.type == "cuda" else []):  # of dropout
            log_probs, _, nine = log_probs_of(kit, batch, batch.owners.new_zeros(1))
            if config.grpo.beta:
                referred(kit, batch)
            # Of what is kept, the backward of the last block finds all: further it need not go.
            total = log_probs.sum() + nine.sum()
            total.backward(inputs=None if how.recompute else lora.last_block())
        del held
    learner.forget()


def reinforce(
    kit: Kit, training: Training, lora: Lora, exam: Exam, source: Source
) -> tuple[Trial, Trial]:
    """All steps. The trials before and after."""
    config, how = kit.config, kit.how
    learner = Learner(training, "rft", kit.model, lora, config.optim)
    facts: dict[str, Any] = {"trials": []}
    if training.saved is not None:
        facts["trials"] = training.saved.facts["trials"]
        kit.curriculum.restore(training.saved.facts["curriculum"])
    first = learner.start // config.epochs
    if first < how.rft_steps:
        training.log.note("the largest step, tried out")
        rehearse(kit, learner, lora, source)
    if training.saved is None:
        training.log.note("before training: a trial")
        held, page = exam.hold(kit.model, how)
        training.log.write_replies(0, page)
        training.log.note(f"before: {held.said()}")
        facts["trials"].append(asdict(held))
    lower = f"--rows (now {how.rows}), --cache-mb (now {how.cache_mb})"
    advice = f"lower {lower} or --budget (now {how.budget}), or --recompute True"
    training.begin()
    for step in range(first, how.rft_steps):
        with memory_guard(advice):
            drawn, numbers = learn(kit, learner, step)
        training.lap()
        page = drawn.page()
        if numbers["flat"] == 1:
            training.log.note(f"step {step + 1} taught nothing: no reply is above its group")
        if step + 1 == how.rft_steps or (config.eval_every and (step + 1) % config.eval_every == 0):
            held, told = exam.hold(kit.model, how)
            training.log.note(f"after {step + 1} steps: {held.said()}")
            facts["trials"].append(asdict(held))
            numbers |= held.numbers()
            facts["score"] = held.accuracy if held.pairs else None
            page += f"\n\nThe trial after this step\n\n{told}"
        training.log.write_replies(step + 1, page)
        facts["curriculum"] = kit.curriculum.facts()
        training.after(step + 1, learner, numbers, drawn.tokens, facts)
        facts["score"] = None
    return Trial(**facts["trials"][0]), Trial(**facts["trials"][-1])


def main(config: Config) -> None:
    """Read, draw and learn, save, and say what came of it."""
    least = {"steps": 1, "epochs": 1, "resample": 0, "eval_every": 0, "eval_pairs": 0}
    check_numbers(config, least | {"reason_pairs": 0})
    check_folder(config.out, config.resume, config.overwrite)
    tiny = starting.is_random(config.preset, config.base)
    folder, made = None, None
    if config.adapter is not None or not tiny:
        folder, made = starting.said_by(config.adapter, SFT, config.base)
        told = starting.unsaid(made, config.base, config.nf4, config.dtype)
        config = replace(config, form=config.form or starting.form_of(made), **told)
    form = config.form or "pointwise"
    check_expected(config.reward, form, config.grpo)
    device = device_of(config.device)
    card = torch.cuda.get_device_properties(device).total_memory if device.type == "cuda" else None
    said = asdict(config) | {"rft_steps": config.steps, "steps": None}
    how = settled(config.preset or for_card(card), said)
    rollout = RolloutConfig(how.group, how.rows, how.reply, config.temperature, how.cache_mb)
    eight_bit = config.optim.eight_bit or how.eight_bit
    config = replace(config, optim=replace(config.optim, eight_bit=eight_bit))
    given = demo_pairs(config.seed) if config.pairs is None else read(config.pairs)
    train, validation = course.divided(given, config.validation, config.seed)
    curriculum = Curriculum(train, config.window, config.seed)
    base = resolve(config.base, lambda line: print(line, file=sys.stderr))
    tokenizer = Tokenizer.load(base)
    if note := starting.same_base(made, folder, base, tiny):
        print(note, file=sys.stderr)
    sizes = ModelConfig.of(base.config)
    config = replace(config, longest=min(config.longest, sizes.context))
    evidence = made is None or made.evidence
    lesson = LessonConfig(form=form, evidence=evidence, longest=config.longest)
    model = starting.load(base, how, device, config.seed, tiny)
    lora, reference = starting.adapters(folder, model, config.seed, config.grpo.beta > 0)
    checkpoint.check_room(config.out, disk_needed(sizes, lora.config.rank, config.keep_last))
    styled, near = starting.instruments(folder, made, model, tokenizer, course.writers(train))
    asking = lesson, near, rollout, config.reward, config.seed, how.at_once
    source = Source(model, tokenizer, curriculum, *asking)
    source.longest(how.plans)  # raises where all are too long, before there is a folder
    torch.manual_seed(config.seed)  # of dropout
    with Stop() as stop:
        settings = asdict(config) | asdict(how) | {"texts": digest([*train, *validation])}
        settings["adapter_sha256"] = starting.adapter_sha256(folder)
        saving = config.save_every, config.keep_last, stop, config.resume, config.overwrite
        training = Training(config.out, settings, how.rft_steps, *saving, device)
        training.log.note(
            f"{config.base} with {folder or 'a new adapter'} on {device}, "
            f"{'NF4 and ' * how.nf4}{model.norm.weight.dtype}; {len(train):,} pairs to train on, "
            f"{len(validation):,} for trials; {how.rft_steps} steps of {how.plans} x 2 pairs x 2 "
            f"prompts x {how.group} replies, {how.at_once} of {how.plans} at once"
        )

        def draw(step: int) -> Harvest:
            progress = step / max(1, how.rft_steps - 1)
            asked = config.resample, config.group_by, config.grpo.variant == "gdpo"
            return source.harvest(step, how.plans, progress, *asked)

        kit = Kit(config, how, model, curriculum, draw, reference, tokenizer.digit_ids)
        some, reasoned = validation[: config.eval_pairs], config.reason_pairs
        exam = Exam(some, tokenizer, lesson, config.seed, near, reasoned=reasoned)
        before, after = reinforce(kit, training, lora, exam, source)
    made_for = starting.made_for(config.base, base, model, tiny, evidence, form, near is not None)
    best = ending.save(config.out, "rft", how.rft_steps, made_for, lora, styled)
    if curriculum.out:
        print(f"left out: {len(curriculum.out)} couples longer than --longest {config.longest}")
    untaught = ending.said_of_untaught(read_metrics(config.out), how.rft_steps)
    print(f"{untaught}\nbefore: {before.said()}\nafter:  {after.said()}\n{best}")
    print(starting.to_judge_with(config.out / "adapter", config.base, tiny))


def run(config: Config) -> int:
    """`main` with an exit code."""
    ended = "interrupted; --resume goes on from the last checkpoint"
    return exit_code("train_rft.py", lambda: main(config), ended)


if __name__ == "__main__":
    sys.exit(run(tyro.cli(Config, description=__doc__.split("How it works")[0])))
